"""Gating and alignment of few tokens in one launch: a block, or a cluster, chooses experts; the first sorts the slots.

A warp chooses for one token after the other, as in `warp_per_token`. Then a thread takes a slot: it sets its lane's bit
in the mask of its warp and expert. The slots before it are the bits below its own, and those in earlier warps.
"""

from typing import NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64, uint32
from numba_moe.device.instructions import atomic_or, cluster_arrive, cluster_wait, flat, wait_for_earlier
from numba_moe.device.primitives import (
    LARGEST_INT32,
    WARP,
    block_sums,
    count_lanes,
    divided,
    fill,
    fill_words,
    lanes_below,
    load_integer,
)
from numba_moe.device.types import Int32, Int32Array, Int64, OptionalSizedArray, Role, RouteColumns
from numba_moe.ops.gating.extras import Extras, load_id
from numba_moe.ops.gating.scores import Choice, Chosen, Rows, Weighting
from numba_moe.ops.gating.warp_per_token import Own, WarpLanes, choose_for_token

MOST_THREADS = 1024
MOST_EXPERTS = 512


class Sorting(NamedTuple):
    """What slots are sorted by: experts, or what a map makes of them."""

    expert_map: OptionalSizedArray  # [num_sorted]
    map_bytes: Int32  # of an element of it, 0 where it is absent
    by_map: Int32  # whether slots are sorted by it, or only blocks named
    num_sorted: Int32


class Blocks(NamedTuple):
    """The sorted slots, and the experts of their GEMM blocks."""

    sorted_slots: Int32Array  # [num_positions]
    expert_ids: Int32Array  # [num_names]
    num_padded: Int32Array  # [1]
    num_positions: Int32
    num_words: Int32  # of 16 bytes, that lie in `sorted_slots`
    num_names: Int32
    block_size: Int32
    reciprocal: Int64  # position // block_size == position * reciprocal >> shift
    shift: Int32
    inactive_expert_id: Int32


@cuda.jit(launch_bounds=MOST_THREADS)
def route_tokens(
    rows: Rows,
    choice: Choice,
    weighing: Weighting,
    lanes: WarpLanes,
    chosen: Chosen,
    extras: Extras,
    sorting: Sorting,
    blocks: Blocks,
    columns: RouteColumns,
    role: Role,
):
    """Choose for tokens, by the warps of one cluster, and then place each slot, by a thread of the first block.

    The grid is one cluster, whose blocks have a thread for each slot at least. Dynamic shared memory: an uint32 for
    each of `num_sorted` experts and each 32 slots.
    """
    wait_for_earlier()
    masks = flat(cuda.shared.array(0, uint32))  # [warps, num_sorted]
    places = flat(cuda.shared.array(MOST_EXPERTS, int32))
    warp_sums = flat(cuda.shared.array(WARP, int32))
    own = Own(
        cuda.local.array(columns, float32),
        cuda.local.array(columns, int32),
        cuda.local.array(columns, int32),
    )
    num_sorted, block_size = sorting.num_sorted, blocks.block_size
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    block = int32(cuda.blockIdx.x)
    num_blocks = int32(cuda.gridDim.x)
    warp = int32(thread >> 5)
    num_slots = int32(rows.num_tokens * (weighing.top_k + extras.shared.num_shared))
    warps = int32((num_slots + WARP - 1) >> 5)
    fill(masks, int32(warps * num_sorted) if block == 0 else int32(0), uint32(0), thread, threads)
    index = int32(block * threads + thread)
    all_threads = int32(num_blocks * threads)
    fill_words(blocks.sorted_slots, blocks.num_words, blocks.num_positions, num_slots, index, all_threads)
    token = int32(num_blocks * warp + block)
    while token < rows.num_tokens:
        choose_for_token(token, own, rows, choice, weighing, lanes, chosen, extras, columns, role)
        token = int32(token + num_blocks * (threads >> 5))
    if num_blocks > 1:
        cluster_arrive()
        cluster_wait()
        if block > 0:
            return
    else:
        cuda.syncthreads()

    expert = int64(-1)
    if thread < num_slots:
        expert = load_id(chosen.topk_ids, thread, extras.id_bytes)
        if sorting.by_map and expert >= 0 and expert < num_sorted:
            expert = load_integer(sorting.expert_map, expert, sorting.map_bytes)
    is_placed = expert >= 0 and expert < num_sorted
    cell = int32(warp * num_sorted + (expert if is_placed else 0))
    if is_placed:
        atomic_or(masks, cell, uint32(1 << cuda.laneid))
    cuda.syncthreads()
    rank = int32(0)
    if is_placed:
        rank = count_lanes(masks[cell] & lanes_below())
    cuda.syncthreads()

    base = int32(0)
    first = int32(0)
    while first < num_sorted:
        mine = int32(first + thread)
        count = int32(0)
        if mine < num_sorted:
            for other in range(warps):
                place = int32(other * num_sorted + mine)
                before = count
                count = int32(count + count_lanes(masks[place]))
                masks[place] = uint32(before)
        padded = int32(divided(int32(count + block_size - 1), blocks.reciprocal, blocks.shift) * block_size)
        upto, of_all = block_sums(padded, warp_sums, int32)
        if mine < num_sorted:
            places[mine] = int32(base + upto - padded)
        base = int32(base + of_all)
        first = int32(first + threads)
    cuda.syncthreads()

    if is_placed:
        position = int32(places[int32(expert)] + int32(masks[cell]) + rank)
        blocks.sorted_slots[position] = thread
        name_index = divided(position, blocks.reciprocal, blocks.shift)
        if int32(name_index * block_size) == position:
            name = expert
            if sorting.map_bytes and not sorting.by_map:
                name = load_integer(sorting.expert_map, expert, sorting.map_bytes)
                if name < 0 or name > LARGEST_INT32:
                    name = int64(-1)
            blocks.expert_ids[name_index] = int32(name)
    unused = int32(divided(base, blocks.reciprocal, blocks.shift) + thread)
    fill(blocks.expert_ids, blocks.num_names, blocks.inactive_expert_id, unused, threads)
    if thread == 0:
        blocks.num_padded[0] = base
