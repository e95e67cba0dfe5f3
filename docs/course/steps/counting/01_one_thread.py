"""Count the slots of each expert, step 1: one thread does what the loop in NumPy would.

New: a kernel is a function that a thread runs, and `kernel[blocks, threads](...)` says how many threads do. Here it
is one, so there is nothing to get wrong, and of a GPU with thousands of lanes all but one sleep.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda


@cuda.jit
def count(ids, num_experts, counts):
    """Count all slots. One thread: blocks 1, threads 1."""
    for slot in range(ids.size):
        expert = ids[slot]
        if 0 <= expert < num_experts:
            counts[expert] += 1


def count_tokens_per_expert(topk_ids, num_experts):
    counts = cuda.to_device(np.zeros(num_experts, np.int32))
    count[1, 1](topk_ids.ravel(), num_experts, counts)
    return counts


if __name__ == "__main__":
    assert lab.check(count_tokens_per_expert, like="count_tokens_per_expert", library="numba").passed
    lab.roofline(count_tokens_per_expert, like="count_tokens_per_expert", library="numba")
