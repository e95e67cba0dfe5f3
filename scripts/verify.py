"""Compare every kernel with its NumPy reference: `numba-moe verify` as a script."""

import sys

from numba_moe.cli import run

if __name__ == "__main__":
    sys.exit(run(["verify", *sys.argv[1:]]))
