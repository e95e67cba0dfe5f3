"""Counting sort of slots by expert: the ground under alignment and permutation.

Consecutive slots belong to one warp, consecutive warps to one block. The position of a slot is a sum:

    rows of the experts before its own, padded  +  slots of its expert in earlier blocks
                                                +  slots of its expert in earlier warps of its block
                                                +  slots of its expert before it in its warp

1. `count_slots` counts each expert's slots by block. With few slots there is no such launch: one block holds them all,
   or the blocks of one cluster, which read each other's counts.
2. `place_slots` sums these counts, finds the slots of its own block by warp, and writes every slot to its place.

Nine slots of experts 1 1 2 | 2 1 0 | 1 2 2, three to a block and rows padded to 4: expert 2 begins at position 8,
two of its slots are in earlier blocks, one is before the last slot in its warp: that one goes to 8 + 2 + 0 + 1 = 11.

No position depends on which thread came first, so the order is stable and the same at every run.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.reference import counting as reference
from numba_moe.runtime import arrays, checks, compile
from numba_moe.runtime.dialect import cuda, int16, int32, int64, uint32
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.parameters import (
    Ids,
    Int16Array,
    Int32,
    Int32Array,
    Int64,
    Int64Array,
    Items,
    OptionalIds,
    OptionalInt16Array,
    OptionalInt32Array,
    OptionalInt64Array,
)
from numba_moe.runtime.plans import Layout, layout, planned
from numba_moe.runtime.primitives import (
    ALL_LANES,
    WARP,
    as_uint32,
    atomic_add,
    atomic_or,
    block_sums,
    cluster_arrive,
    cluster_arrive_relaxed,
    cluster_wait,
    count_lanes,
    divided,
    first_above,
    flat,
    lanes_below,
    load_words,
    of_block,
    present,
    quotient,
    reciprocal_of,
    store_words,
    tail,
    warp_inclusive_sum,
    warp_index,
)

MOST_THREADS = 1024
# Experts that a block counts at a time, in shared memory.
CHUNK = 1024
TWO_CHUNKS = 2 * CHUNK
# Blocks of one cluster read each other's counts, which is a launch less: as many of them as the device runs together,
# with so many threads and slots to a thread. Measured on an H200: 4,096 slots take 3.6 us instead of 5.4, 32,768 6.4
# instead of 6.6.
CLUSTERS = (16, 8)
CLUSTER_DEALS = ((256, 1), (512, 1), (256, 4), (512, 4))
# Measured on an H200: threads of a block and slots of a thread, for few slots and for more of them; the first that need
# no more than so many counts by block, which every block sums for itself.
DEALS = ((512, 1), (256, 4), (512, 4), (512, 8))
FEW_SLOTS = 2**15
MOST_COUNTS = 48 * 1024
# With more counts by block than this, `scan_blocks` sums them once instead of every block for itself.
UNSCANNED_COUNTS = 64 * 1024
# Loads of 16 bytes of counts that a thread has on their way at once.
ROW_BATCH = 4
ROW_BATCH_WORDS = 4 * ROW_BATCH


@cuda.jit(device=True)
def load_ids(topk_ids, num_slots, first, step, items, ids):
    """Read the ids of slots first, first + step, ...; past the last slot, some id."""
    last = max(num_slots - 1, 0)
    if num_slots > 0:
        for item in range(items):  # without branches, so that all loads are on their way before the first is used
            ids[item] = topk_ids[min(first + item * step, last)]


@cuda.jit(device=True)
def find_experts(ids, expert_map, num_slots, num_experts, first, step, items, experts):
    """Turn the ids of slots first, first + step, ... into experts; num_experts for a skipped slot and past the last."""
    for item in range(items):
        experts[item] = num_experts
        if first + item * step < num_slots and 0 <= ids[item] < num_experts:
            experts[item] = int32(ids[item])
    if present(expert_map):
        for item in range(items):
            if experts[item] < num_experts:
                expert = int64(expert_map[experts[item]])
                if expert < 0 or expert > num_experts:
                    expert = int64(num_experts)
                experts[item] = int32(expert)


@cuda.jit(device=True)
def fill(array, size, value, first, step):
    """Write array[first:size:step]."""
    index = uint32(first)  # which passes the size by up to a step, and that may be the largest int32
    while index < uint32(size):
        array[index] = value
        index = uint32(index + step)


@cuda.jit(device=True)
def fill_words(array, num_words, size, value, first, step):
    """Write int32 array[:size], the first num_words words of 16 bytes as such, from the first of so many threads."""
    index = int32(first)
    while index < num_words:
        store_words(array, int64(index) << 2, (value, value, value, value))
        index = int32(index + step)
    fill(array, size, value, int32((num_words << 2) + first), step)


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
    first_slot = int64(block) * threads * items + thread
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
        cuda.syncthreads()
        first = int32(first + CHUNK)


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
def mark_lane(experts, first, size, row, masks, ranks):
    """Mark in masks[row + expert] which lanes of this warp have a slot of each expert, and rank this lane's slot."""
    expert = int32(experts[0] - first)
    counted = expert >= 0 and expert < size
    if counted:
        atomic_or(masks, int32(row + expert), uint32(1 << cuda.laneid))
    cuda.syncwarp()
    if counted:
        ranks[0] = count_lanes(masks[int32(row + expert)] & lanes_below())


@cuda.jit(device=True)
def rank_in_warp(experts, items, num_experts, first, size, row, in_warps, peers, ranks):
    """Count the experts [first, first + size) of this warp from in_warps[row] on, and rank its slots among them."""
    for item in range(items):
        peers[item] = ALL_LANES
    bit = int32(1)
    while 0 < bit <= num_experts:  # a vote for each bit of an id: less than match_any_sync takes for many ids
        for item in range(items):
            is_set = (experts[item] & bit) != 0
            votes = cuda.ballot_sync(ALL_LANES, is_set)
            if not is_set:
                votes = votes ^ ALL_LANES
            peers[item] = peers[item] & votes
        bit = int32(bit << 1)
    for item in range(items):
        expert = int32(experts[item] - first)
        counted = expert >= 0 and expert < size
        earlier = count_lanes(peers[item] & lanes_below())
        if counted:
            ranks[item] = in_warps[row + expert] + earlier
        cuda.syncwarp()
        if counted and earlier == 0:
            in_warps[row + expert] += count_lanes(peers[item])
        cuda.syncwarp()


@cuda.jit(device=True)
def sum_blocks(block_counts, stride, first, size, around):
    """Sum the counts of earlier blocks to around[:size], of the others from around[CHUNK] on.

    A thread takes eight experts of every so many blocks.
    """
    words = cuda.local.array(ROW_BATCH_WORDS, int32)
    earlier = cuda.local.array(8, int32)
    others = cuda.local.array(8, int32)
    for i in range(8):
        earlier[i] = 0
        others[i] = 0
    thread = int32(cuda.threadIdx.x)
    mine = int32(cuda.blockIdx.x)
    last = int32(cuda.gridDim.x - 1)
    groups = int32((size + 7) >> 3)
    rows = quotient(cuda.blockDim.x, groups)
    row = quotient(thread, groups)
    expert = int32((thread - row * groups) * 8)
    if row < rows:
        while row <= last:
            for turn in range(ROW_BATCH):
                block = min(int32(row + turn * rows), last)
                four = load_words(block_counts, int64(block) * stride + first + expert)
                for i in range(4):
                    words[4 * turn + i] = four[i]
            for turn in range(ROW_BATCH):
                block = int32(row + turn * rows)
                for i in range(8):
                    count = int32((words[4 * turn + i // 2] >> (16 * (i % 2))) & 0xFFFF)
                    if block < mine:
                        earlier[i] = int32(earlier[i] + count)
                    elif block <= last:
                        others[i] = int32(others[i] + count)
            row = int32(row + ROW_BATCH * rows)
        for i in range(8):
            atomic_add(around, expert + i, earlier[i])
            atomic_add(around, CHUNK + expert + i, others[i])


@cuda.jit(device=True)
def sum_warps(in_warps, masks, items, warps, chunk, expert):
    """Turn an expert's counts by warp, or masks, into its slots in earlier warps; return its slots in all of them."""
    counts = cuda.local.array(4, int32)
    before = int32(0)
    cell = expert
    end = int32(warps * chunk)
    while cell < end:
        for i in range(4):
            if items == 1:
                counts[i] = count_lanes(masks[int32(cell + i * chunk)])
            else:
                counts[i] = in_warps[int32(cell + i * chunk)]
        for i in range(4):
            if items == 1:
                masks[int32(cell + i * chunk)] = before
            else:
                in_warps[int32(cell + i * chunk)] = before
            before = int32(before + counts[i])
        cell = int32(cell + 4 * chunk)
    return before


@cuda.jit(device=True)
def gather_counts(in_blocks, chunk, blocks):
    """Read the row of in_blocks [blocks, chunk] that each block of the cluster has written; two rows to a warp."""
    none = int32(0)
    warps = int32(cuda.blockDim.x >> 5)
    one = int32(cuda.threadIdx.x >> 5)
    while one < blocks:
        other = int32(one + warps)
        word = int32(cuda.laneid << 3)
        while word < chunk:
            place = int32(one * chunk + word)
            other_place = int32(other * chunk + word)
            words = load_words(of_block(in_blocks, one), place)
            other_words = (none, none, none, none)
            if other < blocks:
                other_words = load_words(of_block(in_blocks, other), other_place)
            if one != cuda.blockIdx.x:
                store_words(in_blocks, place, words)
            if other < blocks and other != cuda.blockIdx.x:
                store_words(in_blocks, other_place, other_words)
            word = int32(word + (WARP << 3))
        one = int32(one + 2 * warps)


@cuda.jit(device=True)
def sum_cluster(in_blocks, chunk, block, blocks, expert):
    """Return an expert's slots in earlier blocks of the cluster, and in all."""
    counts = cuda.local.array(8, int32)
    before = int32(0)
    total = int32(0)
    other = int32(0)
    cell = expert
    while other < blocks:
        for i in range(8):
            counts[i] = in_blocks[int32(cell + i * chunk)]
        for i in range(8):
            if int32(other + i) < block:
                before = int32(before + counts[i])
            if int32(other + i) < blocks:
                total = int32(total + counts[i])
        other = int32(other + 8)
        cell = int32(cell + 8 * chunk)
    return before, total


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
    around = flat(cuda.shared.array(TWO_CHUNKS, int32))  # slots in earlier blocks, in the others
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
    first_slot = int64(block_first) + first_in_block
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
            sum_blocks(block_counts, stride, first, size, around)
        cuda.syncthreads()

        if in_cluster:
            expert = thread
            while expert < size:
                in_blocks[int32(block * chunk + expert)] = sum_warps(in_warps, masks, items, warps, chunk, expert)
                expert = int32(expert + threads)
            cluster_arrive()
            cluster_wait()
            gather_counts(in_blocks, chunk, blocks)
            cluster_arrive_relaxed()
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
                    total = int32(before + around[CHUNK + expert])
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
            slot = first_slot + item * WARP
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
            if present(position_of_slot) and slot < num_slots and is_new:
                position_of_slot[slot] = position
        if in_cluster:
            cluster_wait()  # until the others have read the counts
        cuda.syncthreads()
        first = int32(first + chunk)

    if present(expert_ids):
        fill(expert_ids, num_names, inactive_expert_id, int32(names + index), everywhere)
    if index == 0:
        if present(offset):
            offset[num_experts] = base
        if present(num_padded):
            num_padded[0] = base


@cuda.jit
def scan_experts(
    counts: Ids,
    offset: Int64Array,
    num_experts: Int32,
    alignment: Int32,
):
    # counts [num_experts], offset [num_experts + 1]; one block
    warp_sums = flat(cuda.shared.array(WARP, int64))
    base = int64(0)
    first = 0
    while first < num_experts:
        expert = first + cuda.threadIdx.x
        padded = int64(0)
        if expert < num_experts:
            padded = (int64(counts[expert]) + alignment - 1) // alignment * alignment
        upto, group_sum = block_sums(padded, warp_sums, int64)
        if expert < num_experts:
            offset[expert] = base + upto - padded
        base += group_sum
        first += cuda.blockDim.x
    if cuda.threadIdx.x == 0:
        offset[num_experts] = base


class Grid(NamedTuple):
    """How slots are dealt to threads, `items` to each, and how counts by block are kept: a stride of whole words.

    A block counts so many experts at a time, in shared memory.
    """

    blocks: int
    threads: int
    items: int
    stride: int
    chunk: int
    shared_bytes: int
    one_cluster: bool
    counted: bool
    scanned: bool


def _grid(num_slots: int, num_experts: int, most_in_cluster: int) -> Grid:
    most = block_threads(MOST_THREADS)
    if num_slots <= most:
        return _deal(1, -(-min(most, max(num_slots, num_experts)) // 128) * 128, 1, num_experts, False)
    for wanted, items in CLUSTER_DEALS:
        threads = block_threads(wanted)
        if num_slots <= most_in_cluster * threads * items:
            return _deal(-(-num_slots // (threads * items)), threads, items, num_experts, False)
    for wanted, items in DEALS if num_slots <= FEW_SLOTS else DEALS[1:]:
        threads = block_threads(wanted)
        grid = _deal(-(-num_slots // (threads * items)), threads, items, num_experts, True)
        if grid.blocks * grid.stride <= MOST_COUNTS:
            break
    return grid


def _grid_to_count(num_slots: int, num_experts: int) -> Grid:
    for items in (1, 4, 8):  # one block needs no zeros to add to
        threads = -(-num_slots // (128 * items)) * 128
        if threads <= block_threads(MOST_THREADS):
            return _deal(1, max(128, threads), items, num_experts, False)
    return _grid(num_slots, num_experts, 0)


def _deal(blocks: int, threads: int, items: int, num_experts: int, counted: bool) -> Grid:
    stride = -(-num_experts // 8) * 8
    one_cluster = blocks > 1 and not counted
    rows = -(-threads // 128) * 4 * (2 if items == 1 else 1) + (-(-blocks // 8) * 8 if one_cluster else 0)  # of int16
    staged_bytes = 4 * threads * items if items > 1 else 0
    chunk = min(stride, CHUNK, (compile.MOST_SHARED_BYTES - staged_bytes) // (2 * rows) // 8 * 8)
    shared_bytes = 2 * rows * chunk + staged_bytes
    scanned = counted and blocks * stride > UNSCANNED_COUNTS
    return Grid(blocks, threads, items, stride, chunk, shared_bytes, one_cluster, counted, scanned)


def _scratch(grid: Grid, num_experts: int) -> tuple[arrays.Contiguous | None, arrays.Contiguous | None]:
    """Describe the scratch between the launches of a sort: counts by block, and their sums."""
    return (
        arrays.contiguous(torch.int16, grid.blocks * grid.stride) if grid.counted else None,
        arrays.contiguous(torch.int32, (grid.blocks + 1) * num_experts) if grid.scanned else None,
    )


def workspace_size(num_slots: int, num_experts: int) -> int:
    """Return the int32 elements that hold the scratch of any sort of up to that many slots."""
    scratch = [array for array in _scratch(_grid(num_slots, num_experts, 0), num_experts) if array]
    if not scratch:
        return 0
    threads, items = DEALS[0]
    most_blocks = -(-num_slots // (block_threads(threads) * items))
    most_counts = min(MOST_COUNTS, most_blocks * -(-num_experts // 8) * 8)  # with fewer slots, but less to a block
    return max(most_counts // 2, sum(array.shape[0] * array.dtype.itemsize // 4 for array in scratch))


def _choices(topk_ids: Layout, expert_map: Layout | None, grid: Grid) -> dict[str, Any]:
    return {"topk_ids": topk_ids.dtype, "expert_map": expert_map and expert_map.dtype, "items": grid.items}


class SortPlan(NamedTuple):
    """The launches of a sort, and the scratch between them: counts by block, and their sums."""

    block_counts: arrays.Contiguous | None
    block_offsets: arrays.Contiguous | None
    count_slots: Launch
    scan_blocks: Launch
    place_slots: Launch


def plan_sort(
    topk_ids: Layout,
    num_experts: int,
    num_positions: int,
    block_size: int = 1,
    inactive_expert_id: int = -1,
    expert_map: Layout | None = None,
    block_names: Layout | None = None,
    aligned: bool = True,
) -> SortPlan:
    """Plan the sort of slots by expert, the rows of each padded to a multiple of block_size.

    The sorted slots begin at a multiple of 16 bytes if they are aligned.
    """
    num_slots = topk_ids.shape.numel()
    positions = (num_positions, num_positions // 4 if aligned else 0)
    names = {"block_names": block_names and block_names.dtype}
    blocks = (-(-num_positions // block_size), block_size, *reciprocal_of(block_size), inactive_expert_id)
    for most_in_cluster in (*CLUSTERS, 0):
        grid = _grid(num_slots, num_experts, most_in_cluster)
        where = (topk_ids.device, grid.blocks, grid.threads)
        ids = _choices(topk_ids, expert_map, grid)
        sizes = (num_slots, num_experts, grid.stride, grid.chunk, *positions, *blocks)
        place = Launch(place_slots, *where, sizes, ids | names, grid.shared_bytes, grid.one_cluster)
        if place.fits():
            break
    return SortPlan(
        *_scratch(grid, num_experts),
        Launch(count_slots, *where, (num_slots, num_experts, grid.stride, *positions), ids),
        Launch(scan_blocks, topk_ids.device, *warps(num_experts), (grid.blocks, num_experts, grid.stride)),
        place,
    )


def sort(
    plan: SortPlan,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    block_names: torch.Tensor | None,
    sorted_slots: torch.Tensor,
    position_of_slot: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
    num_padded: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Write every slot to its position, and what else is asked for; positions without a slot hold num_slots.

    Scratch is allocated, or lies in a workspace of `workspace_size` int32 elements, at a multiple of 16 bytes.
    """
    block_counts = block_offsets = None
    if plan.block_counts:
        words = plan.block_counts.shape[0] // 2
        block_counts = arrays.empty(*plan.block_counts) if workspace is None else workspace[:words].view(torch.int16)
        plan.count_slots(topk_ids, expert_map, block_counts, None, sorted_slots)
        if plan.block_offsets:
            block_offsets = arrays.empty(*plan.block_offsets) if workspace is None else workspace[words:]
            plan.scan_blocks(block_counts, block_offsets)
    inputs = (topk_ids, expert_map, block_names, block_counts, block_offsets)
    plan.place_slots(*inputs, sorted_slots, position_of_slot, counts, offset, expert_ids, num_padded)


class CountPlan(NamedTuple):
    """The result, whether it must start at zero, and the launch."""

    counts: arrays.Contiguous
    several_blocks: bool
    launch: Launch


@planned
def _plan_count(topk_ids: Layout, num_experts: int, expert_map: Layout | None) -> CountPlan:
    num_experts = checks.routing(topk_ids, num_experts, expert_map)
    num_slots = topk_ids.shape.numel()
    grid = _grid_to_count(num_slots, num_experts)
    where = (topk_ids.device, grid.blocks, grid.threads)
    ids = _choices(topk_ids, expert_map, grid)
    launch = Launch(count_slots, *where, (num_slots, num_experts, grid.stride, 0, 0), ids)
    return CountPlan(arrays.contiguous(torch.int32, num_experts), grid.blocks > 1, launch)


@planned
def _plan_offsets(counts: Layout, alignment: int) -> tuple[arrays.Contiguous, Launch]:
    checks.array("counts", counts, checks.IDS, (1,))
    alignment = checks.integer("alignment", alignment, 1)
    where = (counts.device, 1, block_threads(MOST_THREADS))
    launch = Launch(scan_experts, *where, (counts.shape[0], alignment), {"counts": counts.dtype})
    return arrays.contiguous(torch.int64, counts.shape[0] + 1), launch


@arrays.public
def count_tokens_per_expert(topk_ids: Any, num_experts: int, expert_map: Any = None) -> Any:
    """Count the slots of each expert.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_slots] or [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts that ids range over.
    expert_map : array of int32 or int64, shape [num_experts], optional
        The id under which this rank counts each expert, -1 for none.

    Returns
    -------
    array of int32, shape [num_experts]

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, more slots than int32 counts.

    Notes
    -----
    Runs on the caller's current stream without synchronising and captures into CUDA graphs. Allocates the result
    only.

    Examples
    --------
    >>> import numpy as np
    >>> count_tokens_per_expert(np.array([[0, 2], [2, -1]]), 4)
    array([1, 0, 2, 0], dtype=int32)
    """
    plan = _plan_count(layout(topk_ids), num_experts, layout(expert_map))
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    if arrays.answered_by_reference(topk_ids):
        return arrays.by_reference(reference.count_tokens_per_expert, topk_ids, num_experts, expert_map)
    counts = arrays.empty(*plan.counts)
    if plan.several_blocks:
        counts.zero_()
    plan.launch(topk_ids, expert_map, None, counts, None)
    return counts


@arrays.public
def expert_offsets(counts: Any, alignment: int = 1) -> Any:
    """Sum the counts before each expert, every count rounded up to a multiple of the alignment.

    Parameters
    ----------
    counts : array of int32 or int64, shape [num_experts]
        Slots of each expert, none negative.
    alignment : int
        Rows of an expert are padded to a multiple of this; an expert without rows keeps none.

    Returns
    -------
    array of int64, shape [num_experts + 1]
        Rows of expert e are ``offsets[e]`` up to ``offsets[e + 1]``.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, alignment below 1.

    Notes
    -----
    One launch on the caller's current stream; allocates the result only.

    Examples
    --------
    >>> import numpy as np
    >>> expert_offsets(np.array([3, 0, 5]), alignment=4)
    array([ 0,  4,  4, 12])
    """
    result, scan = _plan_offsets(layout(counts), alignment)
    if arrays.answered_by_reference(counts):
        return arrays.by_reference(reference.expert_offsets, counts, alignment)
    offset = arrays.empty(*result)
    scan(counts, offset)
    return offset
