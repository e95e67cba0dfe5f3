"""Group the slots by expert, step 5: one block does all, in one launch instead of three.

New: for few slots the launches are what takes time. Within a block barriers do what the ends of launches did. Each
warp keeps counts of its own stretch of slots in shared memory, a row for each warp, so that a slot's place is: the
expert's offset, plus what earlier warps have, plus its rank among the lanes of its own.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

from numba_moe import align_sizes

ALL_LANES, WARPS = 0xFFFFFFFF, 4


@cuda.jit
def align(ids, block_size, num_experts, slots, experts, used):
    """Write all blocks. One block of WARPS warps; shared memory of WARPS x num_experts int32."""
    places = cuda.shared.array(0, np.int32)
    warp, lane = cuda.threadIdx.x // 32, cuda.laneid
    for index in range(cuda.threadIdx.x, WARPS * num_experts, cuda.blockDim.x):
        places[index] = 0
    cuda.syncthreads()
    stretch = (ids.size + 32 * WARPS - 1) // (32 * WARPS) * 32
    for sweep in range(2):  # first count, then place
        for first in range(warp * stretch, (warp + 1) * stretch, 32):
            slot, expert = first + lane, -1
            if slot < ids.size and 0 <= ids[slot] < num_experts:
                expert = np.int32(ids[slot])
            same = cuda.match_any_sync(ALL_LANES, expert)
            before = cuda.popc(same & ((1 << lane) - 1))
            if sweep == 1 and expert >= 0:
                slots[places[warp * num_experts + expert] + before] = slot
            cuda.syncwarp()
            if expert >= 0 and before == 0:  # the first of these lanes adds for all
                places[warp * num_experts + expert] += cuda.popc(same)
            cuda.syncwarp()
        cuda.syncthreads()
        if sweep == 0 and cuda.threadIdx.x == 0:
            position = 0
            for expert in range(num_experts):
                begin = position
                for other in range(WARPS):
                    found = places[other * num_experts + expert]
                    places[other * num_experts + expert] = position
                    position += found
                position = begin + (position - begin + block_size - 1) // block_size * block_size
                for block in range(begin // block_size, position // block_size):
                    experts[block] = expert
            used[0] = position
        cuda.syncthreads()


def moe_align_block_size(topk_ids, block_size, num_experts):
    sizes = align_sizes(topk_ids.size, block_size, num_experts)
    slots = cuda.to_device(np.full(sizes.sorted_token_ids, topk_ids.size, np.int32))
    experts = cuda.to_device(np.full(sizes.expert_ids, -1, np.int32))
    used = cuda.device_array(1, np.int32)
    shape = (1, 32 * WARPS, 0, 4 * WARPS * num_experts)
    align[shape](topk_ids.ravel(), block_size, num_experts, slots, experts, used)
    return slots, experts, used


if __name__ == "__main__":
    assert lab.check(moe_align_block_size, like="moe_align_block_size", library="numba").passed
    lab.roofline(moe_align_block_size, like="moe_align_block_size", library="numba")
