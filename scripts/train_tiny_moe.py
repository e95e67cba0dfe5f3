r"""Train a small MoE language model with MoEBlock on the text that ships with Python, and keep which experts it chose.

python scripts/train_tiny_moe.py --trace trace.npz          # a few minutes on a GPU
python scripts/train_tiny_moe.py --plain                    # the same model with a loop over experts in torch
python scripts/train_tiny_moe.py --trim tests/data/tiny_moe_routing.npz
python scripts/train_tiny_moe.py --compare docs/balance.svg --layers 2 --hidden 32 --heads 2 --experts 8 --top-k 2 \
    --width 16 --length 32 --batch 8 --steps 300 --rate 3e-3    # three ways to balance, a minute and a half on a CPU
python scripts/train_tiny_moe.py --steps 100 --rollouts 4   # samples text, and trains on it with the sampling's experts
torchrun --nproc-per-node 2 scripts/train_tiny_moe.py --shard --steps 100   # FSDP2: gloo without a GPU, else NCCL
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from numba_moe.tiny import BALANCES, Settings, train, trim
from numba_moe.tiny_rollouts import replay_rollouts


def compare(settings: Settings, device: str, path: Path) -> None:
    """Train with each way to balance, print what comes of it, and draw how busy the busiest expert is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="tight")
    axes = figure.subplots()
    print("| balance | loss | perplexity over that without | busiest expert over the mean |\n|---|---|---|---|")
    without = None
    for balance in BALANCES:
        report = train(settings._replace(balance=balance), device)
        without = report.loss if without is None else without
        print(f"| {balance} | {report.loss:.4f} | {math.exp(report.loss - without):.4f} | {report.load:.2f} |")
        axes.plot(report.busiest.max(axis=1), label=balance)
    axes.axhline(1.5, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="load of the busiest expert\nover the mean", ylim=(1, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Settings._field_defaults.items():
        if name != "plain":
            choices = BALANCES if name == "balance" else None
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, choices=choices)
    parser.add_argument("--plain", action="store_true", help="experts in torch alone, one after the other")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write topk_ids and topk_weights there (.npz)")
    parser.add_argument("--trim", type=Path, metavar="FILE", help="write less than 1 MB of them there")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="train once for each way to balance; draw the loads"
    )
    parser.add_argument("--rollouts", type=int, default=0, metavar="N", help="sample, and replay the experts")
    parser.add_argument("--shard", action="store_true", help="share the model with the other ranks of torchrun")
    given = parser.parse_args()
    if given.plain and (given.trace or given.trim or given.rollouts):
        parser.error("--plain leaves no trace")
    if given.shard and (given.trace or given.trim or given.rollouts or given.compare):
        parser.error("--shard trains, and does nothing else")
    settings = Settings(**{name: getattr(given, name) for name in Settings._fields})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.compare:
        compare(settings, device, given.compare)
        return
    if given.shard:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    report = train(settings, device, given.shard)
    if given.shard:
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank:
            return
    for step in sorted({*range(0, settings.steps, max(1, settings.steps // 10)), settings.steps - 1}):
        print(f"step {step:6} loss {report.losses[step]:.4f}")
    print(f"seed {settings.seed}: loss {report.loss:.4f}, step {report.step_ms:.2f} ms on {device}")
    if not settings.plain:
        print(f"busiest expert {report.load:.2f} of the mean, balance {settings.balance!r}")
    if given.rollouts:
        found = replay_rollouts(report.model, settings, device, given.rollouts)
        print(
            f"rollouts: {found.differing:.2%} of the picks would be others; log-probabilities are {found.own:.5f} off"
            f" with the training pass' own experts, {found.replayed:.5f} with those of the sampling"
        )
    written: list[tuple[Path | None, dict[str, Any]]] = [(given.trace, report.trace)]
    if given.trim:
        written.append((given.trim, trim(report.trace)))
    for path, trace in written:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **trace)


if __name__ == "__main__":
    main()
