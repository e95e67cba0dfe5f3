"""Print the files of the package that the first call of an op goes through in a new process, and their lines.

    python scripts/walk.py                          # moe_align_block_size and topk_softmax
    python scripts/walk.py moe_sum                  # any op of verification's named cases

With a GPU the call goes down to the launch, and kernels come from the disk cache, which a first process fills. Without
one it ends at the reference.
"""

import argparse
import sys
from pathlib import Path
from subprocess import run
from types import FrameType
from typing import Any

OPS = ("moe_align_block_size", "topk_softmax")


def call_of(op: str) -> Any:
    """Return a call of an op, by the first of its named cases for models."""
    import numpy as np
    import torch

    from numba_moe.verify import verification
    from numba_moe.verify.cases import model_cases

    case = next(case for case in model_cases("quick") if case.op == op)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = verification.on_device(case, case.arguments(np.random.default_rng(0)), device)
    function = getattr(verification.OPS[op], op)  # which imports its files
    return lambda: function(**arguments)


def walk(op: str) -> None:
    """Call an op under a profiler, and print each file of the package that runs, with its lines."""
    call = call_of(op)
    package = Path(sys.modules["numba_moe"].__file__ or "").parent
    reference = Path(sys.modules["numba_moe.reference"].__file__ or "").parent
    entered: dict[Path, None] = {}

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and (package in path.parents or reference in path.parents):
            entered[path] = None

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    lines = {path: len(path.read_text().splitlines()) for path in entered}
    for path, count in lines.items():
        print(f"{count:6} {path.relative_to(package.parent)}")
    print(f"{sum(lines.values()):6} lines of {len(lines)} files: {op}", flush=True)


def main() -> int:
    """Walk through each op in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", default=OPS, metavar="OP")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        walk(*options.ops)
        return 0
    for op in options.ops:
        command = [sys.executable, __file__, "--here", op]
        run(command, check=True, capture_output=True)  # fills the cache
        run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
