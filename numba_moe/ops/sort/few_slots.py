"""Few slots to their places by one block, without counting by expert: each slot is compared with every other one.

Tables of all experts take longer than the comparisons where there are fewer slots than experts: on an H200 the sort of
12 slots of 896 experts takes 1.5 us by comparisons and 4.4 us by tables.
"""

from numba_moe.device.dialect import cuda, int32, int64
from numba_moe.device.instructions import flat, present, wait_for_earlier
from numba_moe.device.primitives import ALL_LANES, divided, fill, fill_words
from numba_moe.ops.sort.count_and_place import GemmBlocks, Padding, Placed, Slots, find_experts, load_ids, write_name

MOST_SLOTS = 64
# Lanes that share the comparisons of a slot, and with how many others each compares it at a time.
PARTS = 4
TURNS = 4
THREADS = MOST_SLOTS * PARTS


@cuda.jit(device=True)
def sum_parts(value):
    """Return the sum over the lanes of a slot."""
    value = int32(value + cuda.shfl_xor_sync(ALL_LANES, value, 1))
    return int32(value + cuda.shfl_xor_sync(ALL_LANES, value, 2))


@cuda.jit(launch_bounds=THREADS)
def place_few(slots: Slots, padding: Padding, gemm: GemmBlocks, placed: Placed):
    """Write every slot to its place, `MOST_SLOTS` of them at most; one block, with `PARTS` threads to a slot."""
    wait_for_earlier()
    experts = flat(cuda.shared.array(MOST_SLOTS, int32))
    rows = flat(cuda.shared.array(MOST_SLOTS, int32))  # of an expert, padded, at its first slot; 0 at others
    ids = cuda.local.array(1, int64)
    expert_of_id = cuda.local.array(1, int32)
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    load_ids(slots, thread, int32(1), 1, ids)
    fill_words(placed.sorted_slots, placed.num_words, placed.num_positions, slots.num_slots, thread, threads)
    find_experts(slots, ids, thread, int32(1), 1, expert_of_id)
    if thread < MOST_SLOTS:
        experts[thread] = expert_of_id[0]
        rows[thread] = int32(0)
    cuda.syncthreads()

    slot = int32(thread // PARTS)
    part = int32(thread % PARTS)
    expert = experts[slot]
    alike = int32(0)
    rank = int32(0)
    first = part
    while first < slots.num_slots:
        for turn in range(TURNS):
            other = int32(first + PARTS * turn)
            if experts[other] == expert:
                alike = int32(alike + 1)
                if other < slot:
                    rank = int32(rank + 1)
        first = int32(first + PARTS * TURNS)
    alike = sum_parts(alike)
    rank = sum_parts(rank)
    is_first = rank == 0 and expert < slots.num_experts
    num_blocks = divided(int32(alike + padding.block_size - 1), padding.reciprocal, padding.shift)
    if part == 0:
        rows[slot] = int32(num_blocks * padding.block_size) if is_first else int32(0)
    cuda.syncthreads()

    start = int32(0)
    end = int32(0)
    first = part
    while first < slots.num_slots:
        for turn in range(TURNS):
            other = int32(first + PARTS * turn)
            end = int32(end + rows[other])
            if experts[other] < expert:
                start = int32(start + rows[other])
        first = int32(first + PARTS * TURNS)
    start = sum_parts(start)
    end = sum_parts(end)
    position = int32(start + rank) if expert < slots.num_experts else int32(-1)
    if part == 0 and position >= 0:
        placed.sorted_slots[position] = slot
    if part == 0 and present(placed.position_of_slot) and slot < slots.num_slots:
        placed.position_of_slot[slot] = position
    if present(gemm.expert_ids):
        named = divided(start, padding.reciprocal, padding.shift)
        block = part if is_first else num_blocks
        while block < num_blocks:
            write_name(gemm, named + block, expert)
            block = int32(block + PARTS)
        used = divided(end, padding.reciprocal, padding.shift)
        fill(gemm.expert_ids, gemm.num_names, gemm.inactive_expert_id, int32(used + thread), threads)
    if thread == 0 and present(placed.num_padded):
        placed.num_padded[0] = end
