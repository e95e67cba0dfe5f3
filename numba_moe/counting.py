"""Counting sort of slots by expert: counts, offsets, and the stable position of every slot.

Consecutive slots form tiles, and each tile belongs to one warp.

1. `count_slots`: tile_counts[e, t] = slots of expert e in tile t.
2. `scan_tiles`: each expert's row of tile_counts becomes the sum of the tiles before; its total is counts[e].
3. `scan_experts`: offset[e] = counts of the experts before e, each rounded up to the alignment.
4. `place_slots`: position = offset[expert] + tile prefix + slots of the same expert before it in the tile.

No step has an atomic operation or a limit on experts, and every sum is over integers: positions are the same
at every run.
"""

from typing import Any

import torch

from numba_moe.reference import counting as reference
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, int32, int64
from numba_moe.runtime.launch import block_threads, launch, launch_warps
from numba_moe.runtime.parameters import (
    ExpertMap,
    Ids,
    Int32,
    Int32Array,
    Int64Array,
    OptionalInt32Array,
)
from numba_moe.runtime.primitives import (
    ALL_LANES,
    WARP,
    block_inclusive_sum,
    lanes_below,
    warp_inclusive_sum,
    warp_index,
)

SMALLEST_TILE = 256


@cuda.jit(device=True)
def expert_of_slot(topk_ids, expert_map, slot, num_slots, num_experts):
    """Return the expert of a slot after the map, -1 where the slot is skipped or past the last."""
    if slot >= num_slots:
        return int32(-1)
    expert = int64(topk_ids[slot])
    if expert < 0 or expert >= num_experts:
        return int32(-1)
    if expert_map is not None:
        expert = int64(expert_map[expert])
        if expert < 0 or expert >= num_experts:
            return int32(-1)
    return int32(expert)


@cuda.jit
def count_slots(
    topk_ids: Ids,
    expert_map: ExpertMap,
    num_slots: Int32,
    num_experts: Int32,
    num_tiles: Int32,
    tile_size: Int32,
    tile_counts: Int32Array,
):
    # topk_ids [num_slots], expert_map [num_experts], tile_counts [num_experts, num_tiles]; a warp per tile
    tile = warp_index()
    if tile >= num_tiles:
        return
    lane = cuda.laneid
    for expert in range(lane, num_experts, WARP):
        tile_counts[int64(expert) * num_tiles + tile] = 0
    cuda.syncwarp()
    first = int64(tile) * tile_size
    for base in range(first, min(first + tile_size, num_slots), WARP):
        expert = expert_of_slot(topk_ids, expert_map, base + lane, num_slots, num_experts)
        peers = cuda.match_any_sync(ALL_LANES, expert)
        if expert >= 0 and peers & lanes_below() == 0:
            tile_counts[int64(expert) * num_tiles + tile] += cuda.popc(peers)
        cuda.syncwarp()


@cuda.jit
def scan_tiles(tile_counts: Int32Array, num_experts: Int32, num_tiles: Int32, counts: Int32Array):
    # tile_counts [num_experts, num_tiles], counts [num_experts]; a warp per expert
    expert = warp_index()
    if expert >= num_experts:
        return
    row = int64(expert) * num_tiles
    before = int32(0)
    for base in range(0, num_tiles, WARP):
        tile = base + cuda.laneid
        count = int32(0)
        if tile < num_tiles:
            count = int32(tile_counts[row + tile])
        including = warp_inclusive_sum(count)
        if tile < num_tiles:
            tile_counts[row + tile] = before + including - count
        before = int32(before + cuda.shfl_sync(ALL_LANES, including, WARP - 1))
    if cuda.laneid == 0:
        counts[expert] = before


@cuda.jit
def scan_experts(
    counts: Ids, num_experts: Int32, alignment: Int32, offset: Int64Array, last_offset: OptionalInt32Array
):
    # counts [num_experts], offset [num_experts + 1], last_offset [1]; one block
    warp_sums = cuda.shared.array(WARP, int64)
    before = cuda.shared.array(1, int64)
    if cuda.threadIdx.x == 0:
        before[0] = 0
        offset[0] = 0
    cuda.syncthreads()
    for base in range(0, num_experts, cuda.blockDim.x):
        expert = base + cuda.threadIdx.x
        padded = int64(0)
        if expert < num_experts:
            padded = (int64(counts[expert]) + alignment - 1) // alignment * alignment
        upto = before[0] + block_inclusive_sum(padded, warp_sums)
        if expert < num_experts:
            offset[expert + 1] = upto
        cuda.syncthreads()
        if cuda.threadIdx.x == cuda.blockDim.x - 1:
            before[0] = upto
        cuda.syncthreads()
    if last_offset is not None and cuda.threadIdx.x == 0:
        last_offset[0] = before[0]


@cuda.jit
def place_slots(
    topk_ids: Ids,
    expert_map: ExpertMap,
    num_slots: Int32,
    num_experts: Int32,
    num_tiles: Int32,
    tile_size: Int32,
    offset: Int64Array,
    tile_prefix: Int32Array,
    sorted_slots: Int32Array,
    position_of_slot: OptionalInt32Array,
):
    # offset [num_experts + 1], tile_prefix [num_experts, num_tiles], sorted_slots: at least offset[num_experts],
    # position_of_slot [num_slots]; a warp per tile, which uses its column of tile_prefix up
    tile = warp_index()
    if tile >= num_tiles:
        return
    lane = cuda.laneid
    first = int64(tile) * tile_size
    for base in range(first, min(first + tile_size, num_slots), WARP):
        slot = base + lane
        expert = expert_of_slot(topk_ids, expert_map, slot, num_slots, num_experts)
        peers = cuda.match_any_sync(ALL_LANES, expert)
        cell = int64(expert) * num_tiles + tile
        position = int64(-1)
        if expert >= 0:
            position = offset[expert] + tile_prefix[cell] + cuda.popc(peers & lanes_below())
            sorted_slots[position] = slot
        cuda.syncwarp()
        if expert >= 0 and peers & lanes_below() == 0:
            tile_prefix[cell] += cuda.popc(peers)
        cuda.syncwarp()
        if position_of_slot is not None and slot < num_slots:
            position_of_slot[slot] = position


def tile_scratch(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Allocate tile_counts: tiles at least as long as there are experts keep it no larger than the input."""
    num_tiles = -(-topk_ids.numel() // _tile_size(num_experts))
    return arrays.empty((num_experts, num_tiles), torch.int32, topk_ids)


def _tile_size(num_experts: int) -> int:
    return max(SMALLEST_TILE, 1 << (num_experts - 1).bit_length())


def launch_count(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, tile_counts: torch.Tensor, counts: torch.Tensor
) -> None:
    """Launch steps 1 and 2: write counts, and turn tile_counts into each tile's prefix."""
    num_experts, num_tiles = tile_counts.shape
    sizes = (topk_ids.numel(), num_experts, num_tiles, _tile_size(num_experts))
    launch_warps(count_slots, num_tiles, topk_ids, expert_map, *sizes, tile_counts)
    launch_warps(scan_tiles, num_experts, tile_counts, num_experts, num_tiles, counts)


def launch_offsets(
    counts: torch.Tensor, alignment: int, offset: torch.Tensor, last_offset: torch.Tensor | None
) -> None:
    """Launch step 3: write offset, and its last entry once more as int32."""
    launch(scan_experts, 1, block_threads(1024), counts, counts.numel(), alignment, offset, last_offset)


def launch_place(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    offset: torch.Tensor,
    tile_prefix: torch.Tensor,
    sorted_slots: torch.Tensor,
    position_of_slot: torch.Tensor | None,
) -> None:
    """Launch step 4: write each slot to its position, and its position to each slot."""
    num_experts, num_tiles = tile_prefix.shape
    sizes = (topk_ids.numel(), num_experts, num_tiles, _tile_size(num_experts))
    outputs = (sorted_slots, position_of_slot)
    launch_warps(place_slots, num_tiles, topk_ids, expert_map, *sizes, offset, tile_prefix, *outputs)


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
    Runs on the caller's current stream without synchronising and captures into CUDA graphs. Allocates the result,
    and scratch of about num_slots int32 (num_experts at least).

    Examples
    --------
    >>> import numpy as np
    >>> count_tokens_per_expert(np.array([[0, 2], [2, -1]]), 4)
    array([1, 0, 2, 0], dtype=int32)
    """
    num_experts = checks.routing(topk_ids, num_experts, expert_map)
    if arrays.answered_by_reference(topk_ids):
        return arrays.by_reference(reference.count_tokens_per_expert, topk_ids, num_experts, expert_map)
    counts = arrays.empty(num_experts, torch.int32, topk_ids)
    launch_count(topk_ids, expert_map, tile_scratch(topk_ids, num_experts), counts)
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
    checks.array("counts", counts, checks.IDS, (1,))
    alignment = checks.integer("alignment", alignment, 1)
    if arrays.answered_by_reference(counts):
        return arrays.by_reference(reference.expert_offsets, counts, alignment)
    offset = arrays.empty(counts.numel() + 1, torch.int64, counts)
    launch_offsets(counts, alignment, offset, None)
    return offset
