"""The command `numba-moe`."""

import argparse
import os
import sys
from collections.abc import Sequence


def use_simulator_without_gpu() -> None:
    """Turn Numba's CUDA simulator on where there is no CUDA device; Numba reads the switch when imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    use_simulator_without_gpu()
    from numba_moe import verification

    parser = argparse.ArgumentParser("numba-moe", description="Mixture-of-Experts routing as Numba CUDA kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser(
        "verify", help="compare the kernels with the reference", description=verification.__doc__
    )
    verification.add_arguments(verify)
    return verification.run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
