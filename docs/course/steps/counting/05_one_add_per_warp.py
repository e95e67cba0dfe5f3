"""Count the slots of each expert, step 5: the lanes of a warp that have one expert send one of them to add for all.

New: 32 threads make a warp, and its lanes can ask each other without memory. `cuda.match_any_sync` gives each lane
the mask of those that hold the same value, `cuda.popc` counts its bits. A block also takes several slots a thread, so
that fewer blocks add to the counters of all.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

ALL_LANES, SLOTS_OF_A_THREAD = 0xFFFFFFFF, 8


@cuda.jit
def count(ids, num_experts, counts):
    """Count a block's slots in shared memory of num_experts int32, a warp at a time."""
    of_block = cuda.shared.array(0, np.int32)
    for expert in range(cuda.threadIdx.x, num_experts, cuda.blockDim.x):
        of_block[expert] = 0
    cuda.syncthreads()
    first = cuda.blockIdx.x * cuda.blockDim.x * SLOTS_OF_A_THREAD
    for number in range(SLOTS_OF_A_THREAD):
        slot = first + number * cuda.blockDim.x + cuda.threadIdx.x
        expert = -1
        if slot < ids.size and 0 <= ids[slot] < num_experts:
            expert = np.int32(ids[slot])
        same = cuda.match_any_sync(ALL_LANES, expert)  # all lanes come here
        if expert >= 0 and cuda.ffs(same) - 1 == cuda.laneid:
            cuda.atomic.add(of_block, expert, cuda.popc(same))
    cuda.syncthreads()
    for expert in range(cuda.threadIdx.x, num_experts, cuda.blockDim.x):
        if of_block[expert] > 0:
            cuda.atomic.add(counts, expert, of_block[expert])


def count_tokens_per_expert(topk_ids, num_experts):
    counts = cuda.to_device(np.zeros(num_experts, np.int32))
    ids, threads = topk_ids.ravel(), 128
    if ids.size:
        blocks = -(-ids.size // (threads * SLOTS_OF_A_THREAD))
        count[blocks, threads, 0, 4 * num_experts](ids, num_experts, counts)
    return counts


if __name__ == "__main__":
    assert lab.check(count_tokens_per_expert, like="count_tokens_per_expert", library="numba").passed
    lab.roofline(count_tokens_per_expert, like="count_tokens_per_expert", library="numba")
