"""Time `moe_align_block_size` at one's own sizes, with or without a GPU.

    python scripts/time_align.py --tokens 4096 --experts 64 --top-k 2 --block-size 128

It prints the seconds that the calls took together, and on a GPU what of that the device worked. Without one the
reference answers, which is NumPy.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

import numba_moe
from numba_moe.bench import measure
from numba_moe.runtime import checks
from numba_moe.verify import testing

OPTIONS = {"tokens": 4096, "experts": 64, "top-k": 2, "block-size": 128, "calls": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    options = parser.parse_args(arguments)
    try:
        for name in OPTIONS:
            checks.integer(f"--{name}", getattr(options, name.replace("-", "_")), int(name != "tokens"))
        checks.integer("--top-k", options.top_k, 1, options.experts, "the number of experts")
    except ValueError as error:
        parser.error(str(error))
    rng = np.random.default_rng(0)
    ids = testing.random_ids(rng, options.tokens, options.experts, options.top_k, "uniform")
    on_gpu = torch.cuda.is_available()
    topk_ids = torch.from_numpy(ids).to("cuda" if on_gpu else "cpu")
    call = functools.partial(numba_moe.moe_align_block_size, topk_ids, options.block_size, options.experts)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    blocks = call()  # compiles, or reads what was compiled before
    wait()
    begin = time.perf_counter()
    for _ in range(options.calls):
        call()
    wait()
    print(f"Duration: {time.perf_counter() - begin:.4f} seconds")
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}: {measure.device_time(call):.1f} us a call on the device")
    else:
        print("No CUDA device here: this is the reference, NumPy.")
    print(f"{int(blocks.num_tokens_post_padded)} positions in use of {len(blocks.sorted_token_ids)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
