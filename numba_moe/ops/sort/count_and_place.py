"""The kernels of the sort: they count by block, sum the counts, and write the slots; see `counting_sort`."""

from typing import Any, NamedTuple

from numba_moe.device.dialect import cuda, int16, int32, int64, uint32
from numba_moe.device.instructions import (
    as_uint32,
    atomic_add,
    cluster_arrive,
    cluster_wait,
    flat,
    present,
    quotient,
    tail,
    wait_for_earlier,
)
from numba_moe.device.primitives import (
    ALL_LANES,
    LARGEST_INT32,
    WARP,
    block_sums,
    divided,
    fill,
    fill_words,
    first_above,
    warp_inclusive_sum,
    warp_index,
)
from numba_moe.device.types import (
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
from numba_moe.ops.sort.blocks import gather_counts, sum_blocks, sum_cluster
from numba_moe.ops.sort.ranks import mark_lane, rank_in_warp, sum_warps

MOST_THREADS = 1024
# A block counts this many experts at a time, in shared memory.
CHUNK = 1024
TWO_CHUNKS = 2 * CHUNK


class Slots(NamedTuple):
    """The slots to sort. A map, if given, turns a slot's id into its expert. Other slots are skipped."""

    topk_ids: Ids  # [num_slots]
    expert_map: OptionalIds  # [num_experts]
    num_slots: Int32
    num_experts: Int32
    num_local: Int32  # valid experts after the map are below this


class Counted(NamedTuple):
    """The number of slots of each expert: one count for each thread block, or one for all thread blocks."""

    block_counts: OptionalInt16Array  # [blocks, stride]
    counts: OptionalInt32Array  # [num_experts]; zeros before the launch if there are several blocks
    stride: Int32  # num_experts, rounded up to whole words of 16 bytes


class Cleared(NamedTuple):
    """Positions to fill with num_slots before `place_slots` writes the positions that have a slot."""

    sorted_slots: OptionalInt32Array  # [num_positions]
    num_positions: Int32
    num_words: Int32  # 16-byte words of sorted_slots that are written whole


class BlockCounts(NamedTuple):
    """The number of slots of each expert in each thread block, from `count_slots`."""

    block_counts: Int16Array  # [num_blocks, stride]
    num_blocks: Int32
    stride: Int32


class BlockOffsets(NamedTuple):
    """The number of slots of each expert in earlier blocks; the last row is the number in all blocks."""

    offsets: Int32Array  # [num_blocks + 1, num_experts]
    num_experts: Int32


class Elsewhere(NamedTuple):
    """The counts of other blocks. Both arrays are absent if there is one block or one cluster."""

    block_counts: OptionalInt16Array  # [blocks, stride], from `count_slots`
    block_offsets: OptionalInt32Array  # [blocks + 1, num_experts], from `scan_blocks`, if that ran
    stride: Int32


class Padding(NamedTuple):
    """The rows of an expert end at a multiple of block_size; see `primitives.reciprocal_of`."""

    block_size: Int32
    reciprocal: Int64
    shift: Int32  # position // block_size == position * reciprocal >> shift


class GemmBlocks(NamedTuple):
    """The expert of each GEMM block of block_size positions."""

    expert_ids: OptionalInt32Array  # [num_names]; written: an expert, or inactive_expert_id for an unused block
    block_names: OptionalIds  # [num_experts]; the value that expert_ids gets for each expert
    num_names: Int32
    inactive_expert_id: Int32


class Placed(NamedTuple):
    """The results: slots in expert order, and optional arrays."""

    sorted_slots: Int32Array  # [num_positions]; num_slots for a position without a slot
    position_of_slot: OptionalInt32Array  # [num_slots]; -1 for a skipped slot
    counts: OptionalInt32Array  # [num_experts]
    offset: OptionalInt64Array  # [num_experts + 1]; where the rows of each expert begin, and where the last rows end
    num_padded: OptionalInt32Array  # [1]; where the last rows end
    num_positions: Int32
    num_words: Int32  # 16-byte words of sorted_slots that are written whole


@cuda.jit(device=True)
def load_ids(slots, first, step, items, ids):
    """Read the ids of slots first, first + step, ...; a slot past the last one gets the id of another slot."""
    last = uint32(max(slots.num_slots - 1, 0))
    if slots.num_slots > 0:
        for item in range(items):  # no branches, so that all loads start before the first is used
            ids[item] = slots.topk_ids[min(uint32(first + item * step), last)]


@cuda.jit(device=True)
def find_experts(slots, ids, first, step, items, experts):
    """Turn the ids of slots first, first + step, ... into experts; num_experts means that there is none."""
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
    """Count the slots of each expert; a block counts the slots of its threads, `items` each, in shared memory.

    The grid has at least one thread for every `items` slots, and blocks are whole warps.
    """
    wait_for_earlier()
    in_block = flat(cuda.shared.array(CHUNK, int32))
    ids = cuda.local.array(items, int64)
    experts = cuda.local.array(items, int32)
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    block = int32(cuda.blockIdx.x)
    blocks = int32(cuda.gridDim.x)
    first_slot = uint32(block * threads * items + thread)  # may exceed int32 for slots past the last one
    load_ids(slots, first_slot, threads, items, ids)
    if present(cleared.sorted_slots):
        index = int32(block * threads + thread)
        everywhere = int32(blocks * threads)
        fill_words(cleared.sorted_slots, cleared.num_words, cleared.num_positions, slots.num_slots, index, everywhere)
    find_experts(slots, ids, first_slot, threads, items, experts)
    row = int64(block) * counted.stride
    first = int32(0)
    while first < slots.num_experts:
        size = int32(min(CHUNK, counted.stride - first))  # zeros follow the last expert
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
        first = int32(first + CHUNK)  # no barrier: each thread clears only what it has read itself


@cuda.jit
def scan_blocks(by_block: BlockCounts, before: BlockOffsets):
    """Sum the counts of earlier blocks; a warp serves one expert, and the grid has a warp for each expert."""
    wait_for_earlier()
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
    """Write the expert of a GEMM block, or its entry in block_names: -1 for an entry below 0 or above int32."""
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


class Tile(NamedTuple):
    """The slots of a thread: `items` slots, 32 apart. A warp's slots are consecutive, and so are a block's."""

    experts: Any  # [items]; num_experts for a skipped slot or one past the last
    ranks: Any  # [items]; the number of earlier slots of the same expert in the warp
    block_first: Any  # the first slot of this block
    in_block: Any  # the thread's first slot, counted from block_first


class Tables(NamedTuple):
    """The shared memory of a block, which holds `chunk` experts at a time."""

    in_warps: Any  # int16 [warps, chunk]; counts in each warp, later in earlier warps
    masks: Any  # uint32 [warps, chunk]; if items is 1: masks of lanes, later counts in earlier warps
    in_blocks: Any  # int16 [blocks, chunk]; counts in each block of the cluster
    staged: Any  # uint32 [threads * items]; slots of this block in expert order, if items is over 1
    in_earlier: Any  # int32 [CHUNK]; counts in earlier blocks, later the begin of each expert in `staged`
    in_all: Any  # int32 [CHUNK]; counts in all blocks, later the shift of each expert from `staged`
    places: Any  # int32 [CHUNK]; the position of the first slot of an expert in this block
    ends: Any  # int32 [CHUNK]; where the rows of an expert end
    sums: Any  # int32 [32]
    chunk: Any  # columns of the tables
    warps: Any  # warps of this block that have slots, rounded up to a multiple of four


class Experts(NamedTuple):
    """The experts that a block counts at a time: `size` experts from `first` on."""

    first: Any
    size: Any


@cuda.jit(device=True)
def first_slot_of(tile):
    """Return the first slot of a thread, which may exceed int32 for slots past the last one."""
    return uint32(tile.block_first + tile.in_block)


@cuda.jit(device=True)
def is_in_cluster(elsewhere):
    """Return whether blocks read each other's counts."""
    return int32(cuda.gridDim.x) > 1 and not present(elsewhere.block_counts)


@cuda.jit(device=True)
def clear_tables(tables, part, elsewhere, items):
    """Set the counts of this block to zero, and the sums over other blocks if this block computes them."""
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    num_words = int32((tables.warps * tables.chunk) >> (2 if items == 1 else 3))
    fill_words(tables.masks, num_words, int32(0), int32(0), thread, threads)
    if present(elsewhere.block_counts):
        fill(tables.in_earlier, part.size, 0, thread, threads)
        fill(tables.in_all, part.size, 0, thread, threads)
    cuda.syncthreads()


@cuda.jit(device=True)
def rank_in_block(tile, tables, part, num_experts, peers, items):
    """Count each expert's slots in each warp, and rank the slots of this thread in its warp."""
    warp = int32(cuda.threadIdx.x >> 5)
    row = int32(warp * tables.chunk)
    if warp < tables.warps and items == 1:
        mark_lane(tile.experts, part.first, part.size, row, tables.masks, tile.ranks)
    elif warp < tables.warps:
        rank_in_warp(tile.experts, items, num_experts, part.first, part.size, row, tables.in_warps, peers, tile.ranks)


@cuda.jit(device=True)
def sum_own_warps(tables, expert, items):
    """Return an expert's count in this block; afterwards the tables hold its counts in earlier warps."""
    return sum_warps(tables.in_warps, tables.masks, items, tables.warps, tables.chunk, expert)


@cuda.jit(device=True)
def count_elsewhere(elsewhere, tables, part, items):
    """Sum the counts of other blocks, or read them from the cluster, unless `scan_blocks` has summed them."""
    if present(elsewhere.block_counts) and not present(elsewhere.block_offsets):
        sum_blocks(elsewhere.block_counts, elsewhere.stride, part.first, part.size, tables.in_earlier, tables.in_all)
    cuda.syncthreads()
    if is_in_cluster(elsewhere):
        own_row = int32(cuda.blockIdx.x * tables.chunk)
        expert = int32(cuda.threadIdx.x)
        while expert < part.size:
            tables.in_blocks[int32(own_row + expert)] = sum_own_warps(tables, expert, items)
            expert = int32(expert + cuda.blockDim.x)
        cluster_arrive()
        cluster_wait()
        gather_counts(tables.in_blocks, tables.chunk, int32(cuda.gridDim.x))
        cluster_arrive()  # other blocks may now reuse their counts; `place_slots` waits for this
        cuda.syncthreads()


@cuda.jit(device=True)
def counts_of(elsewhere, tables, part, num_experts, expert, items):
    """Return an expert's counts in this block, in earlier blocks, and in all blocks."""
    block = int32(cuda.blockIdx.x)
    blocks = int32(cuda.gridDim.x)
    if is_in_cluster(elsewhere):
        here = int32(tables.in_blocks[int32(block * tables.chunk + expert)])
        before, total = sum_cluster(tables.in_blocks, tables.chunk, block, blocks, expert)
    else:
        here = sum_own_warps(tables, expert, items)
        before = int32(0)
        total = here
    if present(elsewhere.block_offsets):
        before = elsewhere.block_offsets[int64(block) * num_experts + part.first + expert]
        total = elsewhere.block_offsets[int64(blocks) * num_experts + part.first + expert]
    elif present(elsewhere.block_counts):
        before = tables.in_earlier[expert]
        total = tables.in_all[expert]
    return here, before, total


@cuda.jit(device=True)
def start_of_experts(start, slots, elsewhere, padding, placed, tables, part, items):
    """Compute the position of each expert's first slot of this block, given where the rows of the first expert start.

    Return where the rows of the last expert end, and the number of slots of these experts in the block.
    """
    thread = int32(cuda.threadIdx.x)
    is_first_block = cuda.blockIdx.x == 0
    num_here = int32(0)
    group = int32(0)
    while group < part.size:
        expert = int32(group + thread)
        here = int32(0)
        before = int32(0)
        padded = int32(0)
        if expert < part.size:
            here, before, total = counts_of(elsewhere, tables, part, slots.num_experts, expert, items)
            blocks_of_rows = divided(int32(total + padding.block_size - 1), padding.reciprocal, padding.shift)
            padded = int32(blocks_of_rows * padding.block_size)
            if is_first_block and present(placed.counts):
                placed.counts[part.first + expert] = total
        upto, of_group = block_sums(padded, tables.sums, int32)
        if expert < part.size:
            begin = int32(start + upto - padded)
            tables.places[expert] = int32(begin + before)
            tables.ends[expert] = int32(begin + padded)
            if is_first_block and present(placed.offset):
                placed.offset[part.first + expert] = begin
        start = int32(start + of_group)
        if items > 1:
            here_upto, here_of_group = block_sums(here, tables.sums, int32)
            if expert < part.size:
                tables.in_earlier[expert] = int32(num_here + here_upto - here)
                tables.in_all[expert] = int32(tables.places[expert] - tables.in_earlier[expert])
            num_here = int32(num_here + here_of_group)
        group = int32(group + cuda.blockDim.x)
    cuda.syncthreads()
    return start, num_here


@cuda.jit(device=True)
def name_blocks(gemm, padding, tables, part, begin, end):
    """Write the expert of each GEMM block of the rows from `begin` up to `end`, which belong to several experts."""
    last = divided(end, padding.reciprocal, padding.shift)
    index = divided(begin, padding.reciprocal, padding.shift)
    index = int32(index + cuda.threadIdx.x * cuda.gridDim.x + cuda.blockIdx.x)
    while index < last:
        position = int32(index * padding.block_size)
        write_name(gemm, index, part.first + first_above(tables.ends, part.size, position))
        index = int32(index + cuda.blockDim.x * cuda.gridDim.x)


@cuda.jit(device=True)
def write_staged(tile, tables, part, placed, num_here, items):
    """Write slots in the order of positions; in slot order these stores would take a third of the kernel's time."""
    row = int32((cuda.threadIdx.x >> 5) * tables.chunk)
    for item in range(items):
        expert = int32(tile.experts[item] - part.first)
        if expert >= 0 and expert < part.size:
            place = int32(tables.in_earlier[expert] + tables.in_warps[row + expert] + tile.ranks[item])
            tables.staged[place] = uint32((expert << 16) | int32(tile.in_block + item * WARP))
    cuda.syncthreads()
    for item in range(items):
        place = int32(item * int32(cuda.blockDim.x) + int32(cuda.threadIdx.x))
        if place < num_here:
            word = tables.staged[place]
            position = int32(place + tables.in_all[int32(word >> 16)])
            placed.sorted_slots[position] = tile.block_first + int32(word & 0xFFFF)


@cuda.jit(device=True)
def write_places(tile, slots, padding, gemm, placed, tables, part, items):
    """Write the position of each slot of this thread, and with one slot per thread also the slot to its position."""
    row = int32((cuda.threadIdx.x >> 5) * tables.chunk)
    for item in range(items):
        slot = uint32(first_slot_of(tile) + item * WARP)
        expert = int32(tile.experts[item] - part.first)
        position = int32(-1)
        if expert >= 0 and expert < part.size:
            earlier = int32(tables.masks[row + expert]) if items == 1 else int32(tables.in_warps[row + expert])
            position = int32(tables.places[expert] + earlier + tile.ranks[item])
            if items == 1:
                placed.sorted_slots[position] = slot
                if present(gemm.expert_ids):
                    name_block(gemm, padding, tile.experts[item], position)
        is_new = position >= 0 or (part.first == 0 and tile.experts[item] == slots.num_experts)
        if present(placed.position_of_slot) and slot < uint32(slots.num_slots) and is_new:
            placed.position_of_slot[slot] = position


@cuda.jit(launch_bounds=MOST_THREADS)
def place_slots(
    slots: Slots,
    elsewhere: Elsewhere,
    padding: Padding,
    gemm: GemmBlocks,
    placed: Placed,
    chunk: Int32,  # number of experts that a block counts at a time
    items: Items,
):
    """Write every slot to its position, the sum that `counting_sort` explains.

    A warp has 32 * `items` consecutive slots, and the grid has at least one thread for every `items` slots. The shared
    memory (`counting_sort._deal`) holds [warps, chunk] counts in int16, or masks in uint32 if items is 1; in a cluster
    [blocks, chunk] counts in int16; and, if items is above 1, the [threads * items] slots of the block in uint32.
    """
    wait_for_earlier()
    blocks = int32(cuda.gridDim.x)
    threads = int32(cuda.blockDim.x)
    thread = int32(cuda.threadIdx.x)
    in_cluster = is_in_cluster(elsewhere)
    in_warps = flat(cuda.shared.array(0, int16))
    in_blocks = tail(in_warps, ((cuda.blockDim.x + 127) >> 7) * (8 if items == 1 else 4) * chunk)
    staged = as_uint32(tail(in_blocks, ((blocks + 7) & -8) * chunk if in_cluster else 0))
    in_earlier = flat(cuda.shared.array(TWO_CHUNKS, int32))
    places = flat(cuda.shared.array(CHUNK, int32))
    ends = flat(cuda.shared.array(CHUNK, int32))
    sums = flat(cuda.shared.array(WARP, int32))
    ids = cuda.local.array(items, int64)
    experts = cuda.local.array(items, int32)
    peers = cuda.local.array(items, uint32)
    ranks = cuda.local.array(items, int32)
    block_first = int32(int32(cuda.blockIdx.x) * threads * items)
    tile = Tile(experts, ranks, block_first, int32(((thread >> 5) << 5) * items + cuda.laneid))
    load_ids(slots, first_slot_of(tile), WARP, items, ids)
    index = int32(int32(cuda.blockIdx.x) * threads + thread)
    everywhere = int32(blocks * threads)
    if not present(elsewhere.block_counts):
        fill_words(placed.sorted_slots, placed.num_words, placed.num_positions, slots.num_slots, index, everywhere)
    warps = min(int32(threads >> 5), quotient(max(slots.num_slots - block_first, 0) + WARP * items - 1, WARP * items))
    tables = Tables(
        in_warps,
        as_uint32(in_warps),
        in_blocks,
        staged,
        in_earlier,
        tail(in_earlier, CHUNK),
        places,
        ends,
        sums,
        chunk,
        int32((warps + 3) & -4),
    )
    end = int32(0)  # where the rows of the experts so far end
    first = int32(0)
    while first < slots.num_experts:
        part = Experts(first, int32(min(chunk, slots.num_experts - first)))
        if first > 0:
            cuda.syncthreads()  # all threads have read what is written next
        clear_tables(tables, part, elsewhere, items)
        if first == 0:
            find_experts(slots, ids, first_slot_of(tile), WARP, items, experts)
        rank_in_block(tile, tables, part, slots.num_experts, peers, items)
        count_elsewhere(elsewhere, tables, part, items)
        begin = end
        end, num_here = start_of_experts(begin, slots, elsewhere, padding, placed, tables, part, items)
        if items > 1:
            write_staged(tile, tables, part, placed, num_here, items)
            if present(gemm.expert_ids):
                name_blocks(gemm, padding, tables, part, begin, end)
        write_places(tile, slots, padding, gemm, placed, tables, part, items)
        if in_cluster:
            cluster_wait()  # the other blocks have read the counts
        first = int32(first + chunk)

    if present(gemm.expert_ids):
        named = divided(end, padding.reciprocal, padding.shift)
        fill(gemm.expert_ids, gemm.num_names, gemm.inactive_expert_id, int32(named + index), everywhere)
    if index == 0:
        if present(placed.offset):
            placed.offset[slots.num_experts] = end
        if present(placed.num_padded):
            placed.num_padded[0] = end
