"""Compare every kernel with its NumPy reference: `numba-moe verify` as a script."""

import sys

from numba_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
