"""Compare the kernels with the reference on random calls: sizes, skew, invalid ids, maps and options are all drawn.

Without a CUDA device a few smaller calls run in Numba's CUDA simulator, where the same index is another call.
"""

import argparse
import sys

from numba_moe.device.switch import turn_on_without_gpu


def main() -> int:
    """Return 1 if a case failed or nothing ran."""
    turn_on_without_gpu()  # before anything imports numba
    from numba_moe.verify import random_cases

    parser = argparse.ArgumentParser(description=__doc__)
    random_cases.add_arguments(parser)
    return random_cases.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
