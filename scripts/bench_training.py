"""Time forward and backward of layers beside transformers, torch, ScatterMoE and TransformerEngine; needs a GPU."""

import argparse
import sys

from numba_moe.bench import steps


def main() -> int:
    """Return 1 if ours is wrong or took longer than the best peer anywhere, and 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps.add_arguments(parser)
    try:
        return steps.run(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
