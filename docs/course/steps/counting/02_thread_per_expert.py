"""Count the slots of each expert, step 2: a thread serves an expert and looks at every slot.

New: `cuda.grid(1)` numbers the threads. Each has a counter of its own in a register, so no two write to one place,
and the last block may have threads to spare. All ids are read once for every expert.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda


@cuda.jit
def count(ids, num_experts, counts):
    """Count one expert's slots. A thread for each expert."""
    expert = cuda.grid(1)
    if expert < num_experts:
        found = 0
        for slot in range(ids.size):
            if ids[slot] == expert:
                found += 1
        counts[expert] = found


def count_tokens_per_expert(topk_ids, num_experts):
    counts = cuda.device_array(num_experts, np.int32)
    threads = 32
    count[-(-num_experts // threads), threads](topk_ids.ravel(), num_experts, counts)
    return counts


if __name__ == "__main__":
    assert lab.check(count_tokens_per_expert, like="count_tokens_per_expert", library="numba").passed
    lab.roofline(count_tokens_per_expert, like="count_tokens_per_expert", library="numba")
