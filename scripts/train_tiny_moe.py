"""Train a small MoE language model with MoEBlock on the text that ships with Python, and keep which experts it chose.

python scripts/train_tiny_moe.py --trace trace.npz          # a few minutes on a GPU
python scripts/train_tiny_moe.py --plain                    # the same model with a loop over experts in torch
python scripts/train_tiny_moe.py --trim tests/data/tiny_moe_routing.npz
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from numba_moe.tiny import Settings, train, trim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Settings._field_defaults.items():
        if name != "plain":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--plain", action="store_true", help="experts in torch alone, one after the other")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write topk_ids and topk_weights there (.npz)")
    parser.add_argument("--trim", type=Path, metavar="FILE", help="write less than 1 MB of them there")
    given = parser.parse_args()
    if given.plain and (given.trace or given.trim):
        parser.error("--plain leaves no trace")
    settings = Settings(**{name: getattr(given, name) for name in Settings._fields})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = train(settings, device)
    for step in sorted({*range(0, settings.steps, max(1, settings.steps // 10)), settings.steps - 1}):
        print(f"step {step:6} loss {report.losses[step]:.4f}")
    print(f"seed {settings.seed}: loss {report.loss:.4f}, step {report.step_ms:.2f} ms on {device}")
    written: list[tuple[Path | None, dict[str, Any]]] = [(given.trace, report.trace)]
    if given.trim:
        written.append((given.trim, trim(report.trace)))
    for path, trace in written:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **trace)


if __name__ == "__main__":
    main()
