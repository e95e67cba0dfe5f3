"""The kernels of the sort: counts by block, their sums, and the slots to their places; see `numba_moe.sorting`."""

from numba_moe.runtime.dialect import cuda, int16, int32, int64, uint32
from numba_moe.runtime.parameters import (
    Ids,
    Int16Array,
    Int32,
    Int32Array,
    Int64,
    Items,
    OptionalIds,
    OptionalInt16Array,
    OptionalInt32Array,
    OptionalInt64Array,
)
from numba_moe.runtime.primitives import (
    ALL_LANES,
    WARP,
    as_uint32,
    atomic_add,
    block_sums,
    cluster_arrive,
    cluster_wait,
    divided,
    fill,
    fill_words,
    first_above,
    flat,
    present,
    quotient,
    tail,
    warp_inclusive_sum,
    warp_index,
)
from numba_moe.sorting.blocks import gather_counts, sum_blocks, sum_cluster
from numba_moe.sorting.ranks import mark_lane, rank_in_warp, sum_warps

MOST_THREADS = 1024
# Experts that a block counts at a time, in shared memory.
CHUNK = 1024
TWO_CHUNKS = 2 * CHUNK


@cuda.jit(device=True)
def load_ids(topk_ids, num_slots, first, step, items, ids):
    """Read the ids of slots first, first + step, ...; past the last slot, some id."""
    last = uint32(max(num_slots - 1, 0))
    if num_slots > 0:
        for item in range(items):  # without branches, so that all loads are on their way before the first is used
            ids[item] = topk_ids[min(uint32(first + item * step), last)]


@cuda.jit(device=True)
def find_experts(ids, expert_map, num_slots, num_experts, first, step, items, experts):
    """Turn the ids of slots first, first + step, ... into experts; num_experts for a skipped slot and past the last."""
    for item in range(items):
        experts[item] = num_experts
        if uint32(first + item * step) < uint32(num_slots) and 0 <= ids[item] < num_experts:
            experts[item] = int32(ids[item])
    if present(expert_map):
        for item in range(items):
            if experts[item] < num_experts:
                expert = int64(expert_map[experts[item]])
                if expert < 0 or expert > num_experts:
                    expert = int64(num_experts)
                experts[item] = int32(expert)


@cuda.jit(launch_bounds=MOST_THREADS)
def count_slots(
    topk_ids: Ids,
    expert_map: OptionalIds,
    block_counts: OptionalInt16Array,
    counts: OptionalInt32Array,
    sorted_slots: OptionalInt32Array,
    num_slots: Int32,
    num_experts: Int32,
    stride: Int32,
    num_positions: Int32,
    num_words: Int32,
    items: Items,
):
    # topk_ids [num_slots]; expert_map [num_experts]; block_counts [blocks, stride]; counts [num_experts], zeros where
    # there are several blocks; sorted_slots [num_positions], filled with num_slots, num_words of 16 bytes as such
    in_block = flat(cuda.shared.array(CHUNK, int32))
    ids = cuda.local.array(items, int64)
    experts = cuda.local.array(items, int32)
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    block = int32(cuda.blockIdx.x)
    blocks = int32(cuda.gridDim.x)
    first_slot = uint32(block * threads * items + thread)  # which may pass the largest int32, past the last slot
    load_ids(topk_ids, num_slots, first_slot, threads, items, ids)
    if present(sorted_slots):
        index = int32(block * threads + thread)
        fill_words(sorted_slots, num_words, num_positions, num_slots, index, int32(blocks * threads))
    find_experts(ids, expert_map, num_slots, num_experts, first_slot, threads, items, experts)
    row = int64(block) * stride
    first = int32(0)
    while first < num_experts:
        size = int32(min(CHUNK, stride - first))  # with zeros for no expert behind the last
        fill(in_block, size, 0, thread, threads)
        cuda.syncthreads()
        for item in range(items):
            expert = int32(experts[item] - first)
            if expert >= 0 and expert < min(size, num_experts - first):
                atomic_add(in_block, expert, 1)
        cuda.syncthreads()
        expert = thread
        while expert < size:
            count = in_block[expert]
            if present(block_counts):
                block_counts[row + first + expert] = count
            elif blocks == 1 and first + expert < num_experts:
                counts[first + expert] = count
            elif count > 0:
                atomic_add(counts, first + expert, count)
            expert = int32(expert + threads)
        first = int32(first + CHUNK)  # no barrier: a thread clears next what it alone has just read


@cuda.jit
def scan_blocks(
    block_counts: Int16Array,
    offsets: Int32Array,
    num_blocks: Int32,
    num_experts: Int32,
    stride: Int32,
):
    # block_counts [num_blocks, stride], offsets [num_blocks + 1, num_experts]: the slots in earlier blocks, and in
    # all of them; a warp per expert
    expert = int64(warp_index())
    if expert >= num_experts:
        return
    before = int32(0)
    for group in range(0, num_blocks, WARP):
        block = int64(group + cuda.laneid)
        count = int32(0)
        if block < num_blocks:
            count = int32(block_counts[block * stride + expert])
        upto = warp_inclusive_sum(count, int32)
        if block < num_blocks:
            offsets[block * num_experts + expert] = before + upto - count
        before = int32(before + cuda.shfl_sync(ALL_LANES, upto, WARP - 1))
    if cuda.laneid == 0:
        offsets[int64(num_blocks) * num_experts + expert] = before


@cuda.jit(device=True)
def name_block(expert_ids, block_names, expert, position, block_size, reciprocal, shift):
    """Write the expert of a GEMM block if it begins at this position."""
    index = divided(position, reciprocal, shift)
    if int32(index * block_size) == position:
        name = int64(expert)
        if present(block_names):
            name = int64(block_names[name])
        expert_ids[index] = name


@cuda.jit(device=True)
def name_blocks(expert_ids, block_names, ends, first, size, begin, end, block_size):
    """Write the expert of each GEMM block from `begin` up to `end`, which `size` experts share."""
    index = int32(begin + cuda.threadIdx.x * cuda.gridDim.x + cuda.blockIdx.x)
    while index < end:
        name = int64(first + first_above(ends, size, int32(index * block_size)))
        if present(block_names):
            name = int64(block_names[name])
        expert_ids[index] = name
        index = int32(index + cuda.blockDim.x * cuda.gridDim.x)


@cuda.jit(launch_bounds=MOST_THREADS)
def place_slots(
    topk_ids: Ids,
    expert_map: OptionalIds,
    block_names: OptionalIds,
    block_counts: OptionalInt16Array,
    block_offsets: OptionalInt32Array,
    sorted_slots: Int32Array,
    position_of_slot: OptionalInt32Array,
    counts: OptionalInt32Array,
    offset: OptionalInt64Array,
    expert_ids: OptionalInt32Array,
    num_padded: OptionalInt32Array,
    num_slots: Int32,
    num_experts: Int32,
    stride: Int32,
    chunk: Int32,
    num_positions: Int32,
    num_words: Int32,
    num_names: Int32,
    block_size: Int32,
    reciprocal: Int64,
    shift: Int32,
    inactive_expert_id: Int32,
    items: Items,
):
    # topk_ids and position_of_slot [num_slots]; expert_map, block_names and counts [num_experts]; block_counts
    # [blocks, stride] from count_slots; block_offsets [blocks + 1, num_experts] from scan_blocks; offset
    # [num_experts + 1]; sorted_slots [num_positions], num_words of 16 bytes; expert_ids [num_names]; num_padded [1];
    # `chunk` experts at a time; a number divided by block_size is the number times reciprocal, shifted
    blocks = int32(cuda.gridDim.x)
    in_cluster = blocks > 1 and not present(block_counts)
    in_warps = flat(cuda.shared.array(0, int16))  # [warps, chunk] slots before those of a warp
    masks = as_uint32(in_warps)  # [warps, chunk] lanes first; instead, where a thread has one slot
    in_blocks = tail(in_warps, ((cuda.blockDim.x + 127) >> 7) * (8 if items == 1 else 4) * chunk)  # [blocks, chunk]
    staged = as_uint32(tail(in_blocks, ((blocks + 7) & -8) * chunk if in_cluster else 0))  # slots in expert order
    around = flat(cuda.shared.array(TWO_CHUNKS, int32))  # slots in earlier blocks, in all
    places = flat(cuda.shared.array(CHUNK, int32))
    ends = flat(cuda.shared.array(CHUNK, int32))
    warp_sums = flat(cuda.shared.array(WARP, int32))
    ids = cuda.local.array(items, int64)
    experts = cuda.local.array(items, int32)
    peers = cuda.local.array(items, uint32)
    ranks = cuda.local.array(items, int32)
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    block = int32(cuda.blockIdx.x)
    warp = int32(thread >> 5)
    block_first = int32(block * threads * items)
    first_in_block = int32((warp << 5) * items + cuda.laneid)
    first_slot = uint32(block_first + first_in_block)  # which may pass the largest int32, past the last slot
    load_ids(topk_ids, num_slots, first_slot, WARP, items, ids)
    everywhere = int32(blocks * threads)
    index = int32(block * threads + thread)
    if not present(block_counts):
        fill_words(sorted_slots, num_words, num_positions, num_slots, index, everywhere)
    row = int32(warp * chunk)
    # Warps of this block that have slots, rounded up to a multiple of four.
    warps = min(int32(threads >> 5), quotient(max(num_slots - block_first, 0) + WARP * items - 1, WARP * items))
    warps = int32((warps + 3) & -4)
    base = int32(0)
    names = int32(0)
    first = int32(0)
    while first < num_experts:
        if first > 0:
            cuda.syncthreads()  # until all have read what is written now
        names_before = names
        base_here = int32(0)
        size = int32(min(chunk, num_experts - first))
        fill_words(masks, int32((warps * chunk) >> (2 if items == 1 else 3)), int32(0), int32(0), thread, threads)
        if present(block_counts):
            fill(around, size, 0, thread, threads)
            fill(tail(around, CHUNK), size, 0, thread, threads)
        cuda.syncthreads()

        if first == 0:
            find_experts(ids, expert_map, num_slots, num_experts, first_slot, WARP, items, experts)
        if warp < warps and items == 1:
            mark_lane(experts, first, size, row, masks, ranks)
        elif warp < warps:
            rank_in_warp(experts, items, num_experts, first, size, row, in_warps, peers, ranks)
        if present(block_counts) and not present(block_offsets):
            sum_blocks(block_counts, stride, first, size, around, tail(around, CHUNK))
        cuda.syncthreads()

        if in_cluster:
            expert = thread
            while expert < size:
                in_blocks[int32(block * chunk + expert)] = sum_warps(in_warps, masks, items, warps, chunk, expert)
                expert = int32(expert + threads)
            cluster_arrive()
            cluster_wait()
            gather_counts(in_blocks, chunk, blocks)
            cluster_arrive()
            cuda.syncthreads()

        group = int32(0)
        while group < size:
            expert = int32(group + thread)
            padded = int32(0)
            total = int32(0)
            total_here = int32(0)
            before = int32(0)
            if expert < size:
                if in_cluster:
                    before, total = sum_cluster(in_blocks, chunk, block, blocks, expert)
                    total_here = int32(in_blocks[int32(block * chunk + expert)])
                else:
                    total_here = sum_warps(in_warps, masks, items, warps, chunk, expert)
                    total = total_here
                if present(block_offsets):
                    before = block_offsets[int64(block) * num_experts + first + expert]
                    total = block_offsets[int64(blocks) * num_experts + first + expert]
                elif present(block_counts):
                    before = around[expert]
                    total = around[CHUNK + expert]
                padded = int32(divided(int32(total + block_size - 1), reciprocal, shift) * block_size)
                if block == 0 and present(counts):
                    counts[first + expert] = total
            upto, of_group = block_sums(padded, warp_sums, int32)
            if expert < size:
                start = int32(base + upto - padded)
                places[expert] = int32(start + before)
                ends[expert] = int32(start + padded)
                if block == 0 and present(offset):
                    offset[first + expert] = start
            base = int32(base + of_group)
            if items > 1:
                upto_here, of_group_here = block_sums(total_here, warp_sums, int32)
                if expert < size:  # `around` is read, and holds the places in `staged`, and from there to positions
                    around[expert] = int32(base_here + upto_here - total_here)
                    around[CHUNK + expert] = int32(places[expert] - around[expert])
                base_here = int32(base_here + of_group_here)
            group = int32(group + threads)
        names = divided(base, reciprocal, shift)
        cuda.syncthreads()

        if items > 1:  # one by one these stores would take a third of the time
            for item in range(items):
                expert = int32(experts[item] - first)
                if expert >= 0 and expert < size:
                    place = int32(around[expert] + in_warps[row + expert] + ranks[item])
                    staged[place] = uint32((expert << 16) | int32(first_in_block + item * WARP))
            cuda.syncthreads()
            for item in range(items):
                place = int32(item * threads + thread)
                if place < base_here:
                    word = staged[place]
                    position = int32(place + around[int32(CHUNK + (word >> 16))])
                    sorted_slots[position] = block_first + int32(word & 0xFFFF)
            if present(expert_ids):
                name_blocks(expert_ids, block_names, ends, first, size, names_before, names, block_size)
        for item in range(items):
            slot = uint32(first_slot + item * WARP)
            expert = int32(experts[item] - first)
            position = int32(-1)
            if expert >= 0 and expert < size:
                earlier = int32(masks[row + expert]) if items == 1 else int32(in_warps[row + expert])
                position = int32(places[expert] + earlier + ranks[item])
                if items == 1:
                    sorted_slots[position] = slot
                    if present(expert_ids):
                        name_block(expert_ids, block_names, experts[item], position, block_size, reciprocal, shift)
            is_new = position >= 0 or (first == 0 and experts[item] == num_experts)
            if present(position_of_slot) and slot < uint32(num_slots) and is_new:
                position_of_slot[slot] = position
        if in_cluster:
            cluster_wait()  # until the others have read the counts
        first = int32(first + chunk)

    if present(expert_ids):
        fill(expert_ids, num_names, inactive_expert_id, int32(names + index), everywhere)
    if index == 0:
        if present(offset):
            offset[num_experts] = base
        if present(num_padded):
            num_padded[0] = base
