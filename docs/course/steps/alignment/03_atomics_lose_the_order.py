"""Group the slots by expert, step 3: a thread serves a slot, and takes the next place of its expert.

New: what atomics cannot do. An atomic gives every slot a place of its own, at once and by all threads, and which slot
comes first is chance. Blocks hold the right slots in an order that changes from run to run, so later sums of floats
change in their last bits. **This step fails the check, and is here for that.**
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

from numba_moe import align_sizes


@cuda.jit
def count(ids, counts):
    """Count a slot. A thread for each slot."""
    slot = cuda.grid(1)
    if slot < ids.size and 0 <= ids[slot] < counts.size:
        cuda.atomic.add(counts, ids[slot], 1)


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
    """Write a slot where its expert's next one goes. A thread for each slot."""
    slot = cuda.grid(1)
    if slot < ids.size and 0 <= ids[slot] < offsets.size:
        position = cuda.atomic.add(offsets, ids[slot], 1)
        slots[position] = slot


def moe_align_block_size(topk_ids, block_size, num_experts):
    sizes = align_sizes(topk_ids.size, block_size, num_experts)
    slots = cuda.to_device(np.full(sizes.sorted_token_ids, topk_ids.size, np.int32))
    experts = cuda.to_device(np.full(sizes.expert_ids, -1, np.int32))
    used = cuda.device_array(1, np.int32)
    counts = cuda.to_device(np.zeros(num_experts, np.int32))
    offsets = cuda.device_array(num_experts, np.int32)
    ids, blocks = topk_ids.ravel(), max(1, -(-topk_ids.size // 128))
    count[blocks, 128](ids, counts)
    add_up[1, 1](counts, block_size, experts, offsets, used)
    place[blocks, 128](ids, offsets, slots)
    return slots, experts, used


if __name__ == "__main__":
    assert not lab.check(moe_align_block_size, like="moe_align_block_size", library="numba").passed
