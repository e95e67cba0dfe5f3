"""Compare our ops with those of released vLLM and SGLang libraries; needs a CUDA device."""

import sys

from numba_moe.bench.comparison import main

if __name__ == "__main__":
    sys.exit(main())
