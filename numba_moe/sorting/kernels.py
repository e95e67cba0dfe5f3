"""The kernels of the sort: counts by block, their sums, and the slots to their places; see `numba_moe.sorting`."""

from typing import NamedTuple

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
    LARGEST_INT32,
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


class Slots(NamedTuple):
    """What is sorted. The expert of a slot is its id, or what the map says of its id; any other number is skipped."""

    topk_ids: Ids  # [num_slots]
    expert_map: OptionalIds  # [num_experts]
    num_slots: Int32
    num_experts: Int32
    num_local: Int32  # what the map says is an expert below it


class Counted(NamedTuple):
    """The slots of each expert: by block of threads if there is an array for that, and otherwise of all blocks."""

    block_counts: OptionalInt16Array  # [blocks, stride]
    counts: OptionalInt32Array  # [num_experts]; zeros before, if there are several blocks
    stride: Int32  # num_experts, rounded up to whole words of 16 bytes


class Cleared(NamedTuple):
    """Positions that are filled with num_slots, before `place_slots` writes those that have a slot."""

    sorted_slots: OptionalInt32Array  # [num_positions]
    num_positions: Int32
    num_words: Int32  # words of 16 bytes of sorted_slots that are written as such


class BlockCounts(NamedTuple):
    """The slots of each expert by block of threads, from `count_slots`."""

    block_counts: Int16Array  # [num_blocks, stride]
    num_blocks: Int32
    stride: Int32


class BlockOffsets(NamedTuple):
    """The slots of each expert in earlier blocks and, in the last row, in all."""

    offsets: Int32Array  # [num_blocks + 1, num_experts]
    num_experts: Int32


class Elsewhere(NamedTuple):
    """What other blocks have counted; without both arrays there is one block, or the blocks are one cluster."""

    block_counts: OptionalInt16Array  # [blocks, stride], from `count_slots`
    block_offsets: OptionalInt32Array  # [blocks + 1, num_experts], from `scan_blocks`, if that ran
    stride: Int32


class Padding(NamedTuple):
    """The rows of an expert end at a multiple of block_size; see `primitives.reciprocal_of`."""

    block_size: Int32
    reciprocal: Int64
    shift: Int32  # position // block_size == position * reciprocal >> shift


class GemmBlocks(NamedTuple):
    """Which expert each block_size positions are of."""

    expert_ids: OptionalInt32Array  # [num_names]; written: an expert, or inactive_expert_id past the last row in use
    block_names: OptionalIds  # [num_experts]; what expert_ids holds instead of an expert
    num_names: Int32
    inactive_expert_id: Int32


class Placed(NamedTuple):
    """What is written: slots in the order of experts, and what else is asked for."""

    sorted_slots: Int32Array  # [num_positions]; num_slots where there is no slot
    position_of_slot: OptionalInt32Array  # [num_slots]; -1 for a skipped slot
    counts: OptionalInt32Array  # [num_experts]
    offset: OptionalInt64Array  # [num_experts + 1]; where the rows of each expert begin, and where the last ones end
    num_padded: OptionalInt32Array  # [1]; where the last ones end
    num_positions: Int32
    num_words: Int32  # words of 16 bytes of sorted_slots that are written as such


@cuda.jit(device=True)
def load_ids(slots, first, step, items, ids):
    """Read the ids of slots first, first + step, ...; past the last slot, some id."""
    last = uint32(max(slots.num_slots - 1, 0))
    if slots.num_slots > 0:
        for item in range(items):  # without branches, so that all loads are on their way before the first is used
            ids[item] = slots.topk_ids[min(uint32(first + item * step), last)]


@cuda.jit(device=True)
def find_experts(slots, ids, first, step, items, experts):
    """Turn the ids of slots first, first + step, ... into experts; num_experts for a skipped slot and past the last."""
    for item in range(items):
        experts[item] = slots.num_experts
        if uint32(first + item * step) < uint32(slots.num_slots) and 0 <= ids[item] < slots.num_experts:
            experts[item] = int32(ids[item])
    if present(slots.expert_map):
        for item in range(items):
            if experts[item] < slots.num_experts:
                expert = int64(slots.expert_map[experts[item]])
                if expert < 0 or expert >= slots.num_local:
                    expert = int64(slots.num_experts)
                experts[item] = int32(expert)


@cuda.jit(launch_bounds=MOST_THREADS)
def count_slots(slots: Slots, counted: Counted, cleared: Cleared, items: Items):
    """Count the slots of each expert: a block counts those of its threads, `items` each, in shared memory.

    The grid has a thread for every `items` slots at least, and a whole number of warps in a block.
    """
    in_block = flat(cuda.shared.array(CHUNK, int32))
    ids = cuda.local.array(items, int64)
    experts = cuda.local.array(items, int32)
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    block = int32(cuda.blockIdx.x)
    blocks = int32(cuda.gridDim.x)
    first_slot = uint32(block * threads * items + thread)  # which may pass the largest int32, past the last slot
    load_ids(slots, first_slot, threads, items, ids)
    if present(cleared.sorted_slots):
        index = int32(block * threads + thread)
        everywhere = int32(blocks * threads)
        fill_words(cleared.sorted_slots, cleared.num_words, cleared.num_positions, slots.num_slots, index, everywhere)
    find_experts(slots, ids, first_slot, threads, items, experts)
    row = int64(block) * counted.stride
    first = int32(0)
    while first < slots.num_experts:
        size = int32(min(CHUNK, counted.stride - first))  # with zeros for no expert behind the last
        fill(in_block, size, 0, thread, threads)
        cuda.syncthreads()
        for item in range(items):
            expert = int32(experts[item] - first)
            if expert >= 0 and expert < min(size, slots.num_experts - first):
                atomic_add(in_block, expert, 1)
        cuda.syncthreads()
        expert = thread
        while expert < size:
            count = in_block[expert]
            if present(counted.block_counts):
                counted.block_counts[row + first + expert] = count
            elif blocks == 1 and first + expert < slots.num_experts:
                counted.counts[first + expert] = count
            elif count > 0:
                atomic_add(counted.counts, first + expert, count)
            expert = int32(expert + threads)
        first = int32(first + CHUNK)  # no barrier: a thread clears next what it alone has just read


@cuda.jit
def scan_blocks(by_block: BlockCounts, before: BlockOffsets):
    """Sum the counts of earlier blocks: a warp sums those of one expert, and the grid has a warp for each of them."""
    expert = int64(warp_index())
    if expert >= before.num_experts:
        return
    earlier = int32(0)
    for group in range(0, by_block.num_blocks, WARP):
        block = int64(group + cuda.laneid)
        count = int32(0)
        if block < by_block.num_blocks:
            count = int32(by_block.block_counts[block * by_block.stride + expert])
        upto = warp_inclusive_sum(count, int32)
        if block < by_block.num_blocks:
            before.offsets[block * before.num_experts + expert] = earlier + upto - count
        earlier = int32(earlier + cuda.shfl_sync(ALL_LANES, upto, WARP - 1))
    if cuda.laneid == 0:
        before.offsets[int64(by_block.num_blocks) * before.num_experts + expert] = earlier


@cuda.jit(device=True)
def write_name(gemm, index, expert):
    """Write the expert of a GEMM block, or its name if there are names: -1 for one below 0 or past int32."""
    name = int64(expert)
    if present(gemm.block_names):
        name = int64(gemm.block_names[name])
        if name < 0 or name > LARGEST_INT32:
            name = int64(-1)
    gemm.expert_ids[index] = int32(name)


@cuda.jit(device=True)
def name_block(gemm, padding, expert, position):
    """Write the expert of a GEMM block if it begins at this position."""
    index = divided(position, padding.reciprocal, padding.shift)
    if int32(index * padding.block_size) == position:
        write_name(gemm, index, expert)


@cuda.jit(device=True)
def name_blocks(gemm, block_size, ends, first, size, begin, end):
    """Write the expert of each GEMM block from `begin` up to `end`, which `size` experts share."""
    index = int32(begin + cuda.threadIdx.x * cuda.gridDim.x + cuda.blockIdx.x)
    while index < end:
        write_name(gemm, index, first + first_above(ends, size, int32(index * block_size)))
        index = int32(index + cuda.blockDim.x * cuda.gridDim.x)


@cuda.jit(launch_bounds=MOST_THREADS)
def place_slots(
    slots: Slots,
    elsewhere: Elsewhere,
    padding: Padding,
    gemm: GemmBlocks,
    placed: Placed,
    chunk: Int32,  # experts that a block counts at a time
    items: Items,
):
    """Write every slot to its place; a warp has 32 * `items` consecutive slots, a block consecutive warps.

    The grid has a thread for every `items` slots at least. Shared memory is what `sorting._deal` says: int16 counts by
    warp, [warps, chunk], or uint32 masks if items is 1; in a cluster counts by block, [blocks, chunk]; and uint32
    slots of the block, [threads * items], if items is above 1.
    """
    blocks = int32(cuda.gridDim.x)
    in_cluster = blocks > 1 and not present(elsewhere.block_counts)
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
    load_ids(slots, first_slot, WARP, items, ids)
    everywhere = int32(blocks * threads)
    index = int32(block * threads + thread)
    if not present(elsewhere.block_counts):
        fill_words(placed.sorted_slots, placed.num_words, placed.num_positions, slots.num_slots, index, everywhere)
    row = int32(warp * chunk)
    # Warps of this block that have slots, rounded up to a multiple of four.
    warps = min(int32(threads >> 5), quotient(max(slots.num_slots - block_first, 0) + WARP * items - 1, WARP * items))
    warps = int32((warps + 3) & -4)
    base = int32(0)
    names = int32(0)
    first = int32(0)
    while first < slots.num_experts:
        if first > 0:
            cuda.syncthreads()  # until all have read what is written now
        names_before = names
        base_here = int32(0)
        size = int32(min(chunk, slots.num_experts - first))
        fill_words(masks, int32((warps * chunk) >> (2 if items == 1 else 3)), int32(0), int32(0), thread, threads)
        if present(elsewhere.block_counts):
            fill(around, size, 0, thread, threads)
            fill(tail(around, CHUNK), size, 0, thread, threads)
        cuda.syncthreads()

        if first == 0:
            find_experts(slots, ids, first_slot, WARP, items, experts)
        if warp < warps and items == 1:
            mark_lane(experts, first, size, row, masks, ranks)
        elif warp < warps:
            rank_in_warp(experts, items, slots.num_experts, first, size, row, in_warps, peers, ranks)
        if present(elsewhere.block_counts) and not present(elsewhere.block_offsets):
            sum_blocks(elsewhere.block_counts, elsewhere.stride, first, size, around, tail(around, CHUNK))
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
                if present(elsewhere.block_offsets):
                    before = elsewhere.block_offsets[int64(block) * slots.num_experts + first + expert]
                    total = elsewhere.block_offsets[int64(blocks) * slots.num_experts + first + expert]
                elif present(elsewhere.block_counts):
                    before = around[expert]
                    total = around[CHUNK + expert]
                padded = int32(
                    divided(int32(total + padding.block_size - 1), padding.reciprocal, padding.shift)
                    * padding.block_size
                )
                if block == 0 and present(placed.counts):
                    placed.counts[first + expert] = total
            upto, of_group = block_sums(padded, warp_sums, int32)
            if expert < size:
                start = int32(base + upto - padded)
                places[expert] = int32(start + before)
                ends[expert] = int32(start + padded)
                if block == 0 and present(placed.offset):
                    placed.offset[first + expert] = start
            base = int32(base + of_group)
            if items > 1:
                upto_here, of_group_here = block_sums(total_here, warp_sums, int32)
                if expert < size:  # `around` is read, and holds the places in `staged`, and from there to positions
                    around[expert] = int32(base_here + upto_here - total_here)
                    around[CHUNK + expert] = int32(places[expert] - around[expert])
                base_here = int32(base_here + of_group_here)
            group = int32(group + threads)
        names = divided(base, padding.reciprocal, padding.shift)
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
                    placed.sorted_slots[position] = block_first + int32(word & 0xFFFF)
            if present(gemm.expert_ids):
                name_blocks(gemm, padding.block_size, ends, first, size, names_before, names)
        for item in range(items):
            slot = uint32(first_slot + item * WARP)
            expert = int32(experts[item] - first)
            position = int32(-1)
            if expert >= 0 and expert < size:
                earlier = int32(masks[row + expert]) if items == 1 else int32(in_warps[row + expert])
                position = int32(places[expert] + earlier + ranks[item])
                if items == 1:
                    placed.sorted_slots[position] = slot
                    if present(gemm.expert_ids):
                        name_block(gemm, padding, experts[item], position)
            is_new = position >= 0 or (first == 0 and experts[item] == slots.num_experts)
            if present(placed.position_of_slot) and slot < uint32(slots.num_slots) and is_new:
                placed.position_of_slot[slot] = position
        if in_cluster:
            cluster_wait()  # until the others have read the counts
        first = int32(first + chunk)

    if present(gemm.expert_ids):
        fill(gemm.expert_ids, gemm.num_names, gemm.inactive_expert_id, int32(names + index), everywhere)
    if index == 0:
        if present(placed.offset):
            placed.offset[slots.num_experts] = base
        if present(placed.num_padded):
            placed.num_padded[0] = base
