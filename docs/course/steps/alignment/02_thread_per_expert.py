"""Group the slots by expert, step 2: a thread serves an expert, in three launches.

New: a sort by counting. Count, then sum what comes before each expert, then place: where an expert's slots begin
depends on all counts, and no thread can know when others have counted but at the end of a launch. So there are three.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

from numba_moe import align_sizes


@cuda.jit
def count(ids, counts):
    """Count one expert's slots. A thread for each expert."""
    expert = cuda.grid(1)
    if expert < counts.size:
        found = 0
        for slot in range(ids.size):
            found += ids[slot] == expert
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
    """Write one expert's slots in order. A thread for each expert."""
    expert = cuda.grid(1)
    if expert < offsets.size:
        position = offsets[expert]
        for slot in range(ids.size):
            if ids[slot] == expert:
                slots[position] = slot
                position += 1


def moe_align_block_size(topk_ids, block_size, num_experts):
    sizes = align_sizes(topk_ids.size, block_size, num_experts)
    slots = cuda.to_device(np.full(sizes.sorted_token_ids, topk_ids.size, np.int32))
    experts = cuda.to_device(np.full(sizes.expert_ids, -1, np.int32))
    used = cuda.device_array(1, np.int32)
    counts = cuda.device_array(num_experts, np.int32)
    offsets = cuda.device_array(num_experts, np.int32)
    ids, blocks = topk_ids.ravel(), -(-num_experts // 32)
    count[blocks, 32](ids, counts)
    add_up[1, 1](counts, block_size, experts, offsets, used)
    place[blocks, 32](ids, offsets, slots)
    return slots, experts, used


if __name__ == "__main__":
    assert lab.check(moe_align_block_size, like="moe_align_block_size", library="numba").passed
    lab.roofline(moe_align_block_size, like="moe_align_block_size", library="numba")
