"""Time every op beside its peers: `numba-moe bench` as a script."""

import sys

from numba_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
