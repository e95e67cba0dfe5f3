"""Group the slots by expert, step 1: one thread goes over all experts and all slots.

New: the contract in loops. Slots keep their order within an expert, and each expert's part is padded to whole blocks
of a GEMM with the number of slots, which is no slot. Lengths follow from the sizes alone, so the host waits for
nothing.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

from numba_moe import align_sizes


@cuda.jit
def align(ids, block_size, num_experts, slots, experts, used):
    """Write all blocks. One thread."""
    position = 0
    for expert in range(num_experts):
        first = position
        for slot in range(ids.size):
            if ids[slot] == expert:
                slots[position] = slot
                position += 1
        while position % block_size:
            position += 1
        for block in range(first // block_size, position // block_size):
            experts[block] = expert
    used[0] = position


def moe_align_block_size(topk_ids, block_size, num_experts):
    sizes = align_sizes(topk_ids.size, block_size, num_experts)
    slots = cuda.to_device(np.full(sizes.sorted_token_ids, topk_ids.size, np.int32))
    experts = cuda.to_device(np.full(sizes.expert_ids, -1, np.int32))
    used = cuda.device_array(1, np.int32)
    align[1, 1](topk_ids.ravel(), block_size, num_experts, slots, experts, used)
    return slots, experts, used


if __name__ == "__main__":
    assert lab.check(moe_align_block_size, like="moe_align_block_size", library="numba").passed
    lab.roofline(moe_align_block_size, like="moe_align_block_size", library="numba")
