"""Time every step of the course's kernels at one shape: device time, share of the roofline, and of what is shipped.

    python scripts/course_times.py                # on a GPU
    python scripts/course_times.py gating         # one family

Without a GPU the simulator counts bytes instead, at a small case.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from numba_moe import lab

STEPS = Path(__file__).parents[1] / "docs" / "course" / "steps"
FAMILIES = {  # folder: op, shape on a GPU, case in the simulator
    "counting": ("count_tokens_per_expert", "16384x256", "1100 slots"),
    "alignment": ("moe_align_block_size", "4096x64", "1100 slots"),
    "gating": ("topk_softmax", "4096x256 top 8", "ties"),
    "permute": ("moe_permute", "4096x7168", "top 5"),
    "moe_sum": ("moe_sum", "4096x7168", "top 5"),
}


def load(path: Path) -> Any:
    """Return the module of a step, which is no package."""
    spec = importlib.util.spec_from_file_location(f"step_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def times(family: str) -> list[tuple[Any, ...]]:
    """Return a line for each step: its name, microseconds or bytes, share of the roofline, times what is shipped."""
    op, shape, case = FAMILIES[family]
    found = []
    for path in sorted((STEPS / family).glob("*.py")):
        step = getattr(load(path), op)
        where = shape if torch.cuda.is_available() else case
        found.append((path.stem, lab.roofline(step, op, where, library="numba", show=False)))
    measured = [float(one.device_us or one.bytes_moved or 0) for _, one in found]
    return [
        (family, name, one.shape, value, one.share, value / measured[-1])
        for (name, one), value in zip(found, measured, strict=True)
    ]


def main(arguments: Sequence[str]) -> int:
    if unknown := set(arguments) - FAMILIES.keys():
        print(f"no steps of {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    lab.use_simulator_without_gpu()
    rows = [row for family in arguments or FAMILIES for row in times(family)]
    measured = "device us" if torch.cuda.is_available() else "bytes moved"
    headers = ("family", "step", "shape", measured, "of the roofline", "times what is shipped")
    print(tabulate(rows, headers, floatfmt=("", "", "", ".1f", ".0%", ".2f")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
