"""Count the slots of each expert, step 3: a thread serves a slot, and adds to a counter that others add to as well.

New: `cuda.atomic.add` reads, adds and writes with no other thread in between. `counts[expert] += 1` would lose what
another thread added meanwhile; try it, the simulator shows it too. Integers may be added in any order; of floats the
last bits would change from run to run.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda


@cuda.jit
def count(ids, num_experts, counts):
    """Add one slot to its expert. A thread for each slot."""
    slot = cuda.grid(1)
    if slot < ids.size:
        expert = ids[slot]
        if 0 <= expert < num_experts:
            cuda.atomic.add(counts, expert, 1)


def count_tokens_per_expert(topk_ids, num_experts):
    counts = cuda.to_device(np.zeros(num_experts, np.int32))
    ids, threads = topk_ids.ravel(), 128
    if ids.size:
        count[-(-ids.size // threads), threads](ids, num_experts, counts)
    return counts


if __name__ == "__main__":
    assert lab.check(count_tokens_per_expert, like="count_tokens_per_expert", library="numba").passed
    lab.roofline(count_tokens_per_expert, like="count_tokens_per_expert", library="numba")
