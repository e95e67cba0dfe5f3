"""Time every op beside its peers: `numba-moe bench` as a script."""

import sys

from numba_moe.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", *sys.argv[1:]]))
