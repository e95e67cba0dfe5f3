"""Count the slots of each expert, step 4: a block counts its slots in memory of its own, and adds each sum once.

New: shared memory belongs to a block and is near; its size comes with the launch. All threads wait at
`cuda.syncthreads()` until the counters are zero, and again until all have counted. Slots of a hot expert now meet in
their block, and not at one place of the whole GPU.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda


@cuda.jit
def count(ids, num_experts, counts):
    """Count a block's slots in shared memory of num_experts int32. A thread for each slot."""
    of_block = cuda.shared.array(0, np.int32)
    for expert in range(cuda.threadIdx.x, num_experts, cuda.blockDim.x):
        of_block[expert] = 0
    cuda.syncthreads()
    slot = cuda.grid(1)
    if slot < ids.size and 0 <= ids[slot] < num_experts:
        cuda.atomic.add(of_block, ids[slot], 1)
    cuda.syncthreads()
    for expert in range(cuda.threadIdx.x, num_experts, cuda.blockDim.x):
        if of_block[expert] > 0:
            cuda.atomic.add(counts, expert, of_block[expert])


def count_tokens_per_expert(topk_ids, num_experts):
    counts = cuda.to_device(np.zeros(num_experts, np.int32))
    ids, threads = topk_ids.ravel(), 128
    if ids.size:
        count[-(-ids.size // threads), threads, 0, 4 * num_experts](ids, num_experts, counts)
    return counts


if __name__ == "__main__":
    assert lab.check(count_tokens_per_expert, like="count_tokens_per_expert", library="numba").passed
    lab.roofline(count_tokens_per_expert, like="count_tokens_per_expert", library="numba")
