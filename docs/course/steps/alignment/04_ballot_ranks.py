"""Group the slots by expert, step 4: a warp serves an expert, and its lanes find their ranks by a vote.

New: `cuda.ballot_sync` gives every lane the mask of those whose answer is yes. The bits below its own are the slots
before it, so each knows its place at once, in order, and the warp reads 32 neighbours at a time.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

from numba_moe import align_sizes

ALL_LANES = 0xFFFFFFFF


@cuda.jit
def count(ids, counts):
    """Count one expert's slots. A warp for each expert."""
    expert, lane, found = cuda.grid(1) // 32, cuda.laneid, 0
    for first in range(0, ids.size, 32):
        is_ours = first + lane < ids.size and ids[min(first + lane, ids.size - 1)] == expert
        found += cuda.popc(cuda.ballot_sync(ALL_LANES, is_ours))
    if expert < counts.size and lane == 0:
        counts[expert] = found


@cuda.jit
def add_up(counts, block_size, experts, offsets, used):
    """Sum what comes before each expert, and name its blocks. One thread."""
    position = 0
    for expert in range(counts.size):
        offsets[expert] = position
        blocks = (counts[expert] + block_size - 1) // block_size
        for block in range(position // block_size, position // block_size + blocks):
            experts[block] = expert
        position += blocks * block_size
    used[0] = position


@cuda.jit
def place(ids, offsets, slots):
    """Write one expert's slots in order. A warp for each expert."""
    expert, lane = cuda.grid(1) // 32, cuda.laneid
    position = offsets[min(expert, offsets.size - 1)]
    for first in range(0, ids.size, 32):
        slot = first + lane
        is_ours = slot < ids.size and ids[min(slot, ids.size - 1)] == expert and expert < offsets.size
        votes = cuda.ballot_sync(ALL_LANES, is_ours)
        if is_ours:
            slots[position + cuda.popc(votes & ((1 << lane) - 1))] = slot
        position += cuda.popc(votes)


def moe_align_block_size(topk_ids, block_size, num_experts):
    sizes = align_sizes(topk_ids.size, block_size, num_experts)
    slots = cuda.to_device(np.full(sizes.sorted_token_ids, topk_ids.size, np.int32))
    experts = cuda.to_device(np.full(sizes.expert_ids, -1, np.int32))
    used = cuda.device_array(1, np.int32)
    counts = cuda.device_array(num_experts, np.int32)
    offsets = cuda.device_array(num_experts, np.int32)
    ids, blocks = topk_ids.ravel(), -(-num_experts // 2)
    count[blocks, 64](ids, counts)
    add_up[1, 1](counts, block_size, experts, offsets, used)
    place[blocks, 64](ids, offsets, slots)
    return slots, experts, used


if __name__ == "__main__":
    assert lab.check(moe_align_block_size, like="moe_align_block_size", library="numba").passed
    lab.roofline(moe_align_block_size, like="moe_align_block_size", library="numba")
