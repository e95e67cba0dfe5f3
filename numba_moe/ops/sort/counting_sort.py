"""Counting sort of slots by expert, on which alignment and permutation stand.

Consecutive slots belong to one warp, consecutive warps to one block. The position of a slot is a sum:

    rows of the experts before its own, padded  +  slots of its expert in earlier blocks
                                                +  slots of its expert in earlier warps of its block
                                                +  slots of its expert before it in its warp

1. `count_slots` counts each expert's slots in each block. Few slots do not need this launch: one block holds all slots,
   or one cluster does, and its blocks read each other's counts.
2. `place_slots` sums these counts, counts the slots of its own block by warp, and writes every slot to its position.

Nine slots, three to a block, and rows padded to 4:

    slot           0 1 2 | 3 4 5 | 6 7 8
    its expert     1 1 2 | 2 1 0 | 1 2 2

    expert         slots by block      in earlier blocks      in all    padded    begins at
       0              0  1  0               0  0  1              1         4          0
       1              2  1  1               0  2  3              4         4          4
       2              1  1  2               0  1  2              4         4          8

    position       0 1 2 3 | 4 5 6 7 | 8 9 10 11
    its slot       5 . . . | 0 1 4 6 | 2 3  7  8

Slot 8 goes to 8 + 2 + 0 + 1 = 11: its expert begins at 8 and has two slots in earlier blocks, no slot in earlier warps
of the block, and one slot before it in its warp.

No position depends on the order in which threads run, so the order is stable and the same at every run.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from numba_moe.device.primitives import reciprocal_of
from numba_moe.ops.sort import count_and_place, few_slots
from numba_moe.runtime import arrays, compile
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.plans import Layout

# Optional results of a sort; see `count_and_place.Placed` and `count_and_place.GemmBlocks`.
OPTIONAL = {
    "position_of_slot": torch.int32,
    "counts": torch.int32,
    "offset": torch.int64,
    "expert_ids": torch.int32,
    "num_padded": torch.int32,
}
# One cluster saves a launch, because its blocks read each other's counts. CLUSTERS are numbers of blocks to try, and
# CLUSTER_DEALS are (threads of a block, slots of a thread). H200, with a cluster and without: 4,096 slots take 3.6 and
# 5.4 us, 32,768 slots take 6.4 and 6.6 us.
CLUSTERS = (16, 8)
CLUSTER_DEALS = ((256, 1), (512, 1), (256, 4), (512, 4))
# The positions that one block fills, at most. Where there are more, each block of a cluster fills POSITIONS_OF_EACH. On
# an H200 the sort of 192 slots of 1,000 experts, padded to 256, takes 8.0 us by one block and 6.8 us by 16.
POSITIONS_OF_ONE = 3 * 2**13
POSITIONS_OF_EACH = 2**13
# (threads of a block, slots of a thread), measured on an H200. A sort takes the first pair with at most MOST_COUNTS
# counts by block; with more than FEW_SLOTS slots it skips the first pair.
DEALS = ((512, 1), (256, 4), (512, 4), (512, 8))
FEW_SLOTS = 2**15
MOST_COUNTS = 48 * 1024
# With more counts by block than this, `scan_blocks` sums them once; otherwise every block sums them for itself.
UNSCANNED_COUNTS = 64 * 1024


class Grid(NamedTuple):
    """How threads share the slots, `items` slots each, and how the counts by block lie in memory, `stride` apart.

    A block counts `chunk` experts at a time, in shared memory.
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


def grid_of(num_slots: int, num_experts: int, most_in_cluster: int, num_positions: int = 0) -> Grid:
    """Choose the grid of a sort; a cluster has at most `most_in_cluster` blocks.

    One block serves them if it has shared memory to count all experts at once, and few positions to fill.
    """
    most = block_threads(count_and_place.MOST_THREADS)
    clusters = (deal for deal in CLUSTER_DEALS if num_slots <= most_in_cluster * block_threads(deal[0]) * deal[1])
    in_cluster = next(clusters, None) if most_in_cluster else None
    if num_slots <= most:
        threads = -(-min(most, max(num_slots, num_experts)) // 128) * 128
        one = _deal(1, threads, 1, num_experts, False, num_slots)
        at_once = one.chunk >= min(one.stride, count_and_place.CHUNK)
        if in_cluster is None or (at_once and num_positions <= POSITIONS_OF_ONE):
            return one
    if in_cluster is not None:
        threads, items = block_threads(in_cluster[0]), in_cluster[1]
        filling = min(most_in_cluster, num_positions // POSITIONS_OF_EACH)
        return _deal(max(2, filling, -(-num_slots // (threads * items))), threads, items, num_experts, False)
    for wanted, items in DEALS if num_slots <= FEW_SLOTS else DEALS[1:]:
        threads = block_threads(wanted)
        grid = _deal(-(-num_slots // (threads * items)), threads, items, num_experts, True)
        if grid.blocks * grid.stride <= MOST_COUNTS:
            break
    return grid


def grid_to_count(num_slots: int, num_experts: int) -> Grid:
    """Choose the grid of a count without a sort."""
    for items in (1, 4, 8):  # with one block the counters need not be zero before
        threads = -(-num_slots // (128 * items)) * 128
        if threads <= block_threads(count_and_place.MOST_THREADS):
            return _deal(1, max(128, threads), items, num_experts, False)
    return grid_of(num_slots, num_experts, 0)


def _deal(blocks: int, threads: int, items: int, num_experts: int, counted: bool, num_slots: int | None = None) -> Grid:
    """Deal slots to blocks; one that has all `num_slots` keeps counts of no more warps than theirs."""
    stride = -(-num_experts // 8) * 8
    one_cluster = blocks > 1 and not counted
    serving = threads if num_slots is None else min(threads, num_slots)
    rows = max(1, -(-serving // 128)) * 4 * (2 if items == 1 else 1)  # of int16
    rows += -(-blocks // 8) * 8 if one_cluster else 0
    staged_bytes = 4 * threads * items if items > 1 else 0
    chunk = min(stride, count_and_place.CHUNK, (compile.MOST_SHARED_BYTES - staged_bytes) // (2 * rows) // 8 * 8)
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
    """Return the number of int32 elements that are enough scratch for a sort of up to `num_slots` slots."""
    scratch = [array for array in _scratch(grid_of(num_slots, num_experts, 0), num_experts) if array]
    if not scratch:
        return 0
    threads, items = DEALS[0]
    most_blocks = -(-num_slots // (block_threads(threads) * items))
    most_counts = min(MOST_COUNTS, most_blocks * -(-num_experts // 8) * 8)  # of a sort of fewer slots
    return max(most_counts // 2, sum(array.shape[0] * array.dtype.itemsize // 4 for array in scratch))


class SortPlan(NamedTuple):
    """The launches of a sort, and the scratch between them: counts by block, and their sums."""

    block_counts: arrays.Contiguous | None
    block_offsets: arrays.Contiguous | None
    count_slots: Launch | None
    scan_blocks: Launch | None
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
    written: Iterable[str] = (),
    num_local: int | None = None,
) -> SortPlan:
    """Plan the sort of slots by expert, with the rows of each expert padded to a multiple of block_size.

    `aligned` says that the sorted slots begin at a multiple of 16 bytes. `written` names optional results (`OPTIONAL`).
    An id of num_local (by default num_experts) or more after the map belongs to another rank.
    """
    num_slots = topk_ids.shape.numel()
    num_local = num_experts if num_local is None else num_local
    outputs = {name: dtype if name in written else None for name, dtype in OPTIONAL.items()}
    num_words = num_positions // 4 if aligned else 0
    slots = count_and_place.Slots(topk_ids, expert_map, num_slots, num_experts, num_local)
    padding = count_and_place.Padding(block_size, *reciprocal_of(block_size))
    num_names = -(-num_positions // block_size)
    gemm = count_and_place.GemmBlocks(outputs["expert_ids"], block_names, num_names, inactive_expert_id)
    placed = count_and_place.Placed(
        sorted_slots=torch.int32,
        position_of_slot=outputs["position_of_slot"],
        counts=outputs["counts"],
        offset=outputs["offset"],
        num_padded=outputs["num_padded"],
        num_positions=num_positions,
        num_words=num_words,
    )
    if num_slots <= few_slots.MOST_SLOTS and not {"counts", "offset"} & {*written}:
        threads = few_slots.THREADS // (2 if 2 * num_slots <= few_slots.MOST_SLOTS else 1)
        few = Launch(few_slots.place_few, topk_ids.device, 1, threads, slots, padding, gemm, placed)
        return SortPlan(None, None, None, None, few)
    for most_in_cluster in (*CLUSTERS, 0):
        grid = grid_of(num_slots, num_experts, most_in_cluster, num_positions)
        block_counts, block_offsets = _scratch(grid, num_experts)
        where = (topk_ids.device, grid.blocks, grid.threads)
        place = Launch(
            *(count_and_place.place_slots, *where, slots),
            *(count_and_place.Elsewhere(block_counts, block_offsets, grid.stride), padding, gemm, placed, grid.chunk),
            shared_bytes=grid.shared_bytes,
            one_cluster=grid.one_cluster,
            items=grid.items,
        )
        if place.fits():
            break
    count = scan = None
    if block_counts:
        counted = count_and_place.Counted(block_counts, None, grid.stride)
        cleared = count_and_place.Cleared(torch.int32, num_positions, num_words)
        count = Launch(count_and_place.count_slots, *where, slots, counted, cleared, items=grid.items)
    if block_offsets:
        by_block = count_and_place.BlockCounts(block_counts, grid.blocks, grid.stride)
        before = count_and_place.BlockOffsets(block_offsets, num_experts)
        scan = Launch(count_and_place.scan_blocks, topk_ids.device, *warps(num_experts), by_block, before)
    return SortPlan(block_counts, block_offsets, count, scan, place)


def sort(
    plan: SortPlan,
    topk_ids: torch.Tensor,
    sorted_slots: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    *,
    block_names: torch.Tensor | None = None,
    position_of_slot: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
    num_padded: torch.Tensor | None = None,
) -> None:
    """Write every slot to its position, and the optional results of the plan; positions without a slot get num_slots.

    Scratch is allocated, or taken from a workspace of `workspace_size` int32 elements that is aligned to 16 bytes.
    """
    block_counts = block_offsets = None
    if plan.count_slots:
        assert plan.block_counts
        words = plan.block_counts.shape[0] // 2
        block_counts = arrays.empty(*plan.block_counts) if workspace is None else workspace[:words].view(torch.int16)
        plan.count_slots(topk_ids=topk_ids, expert_map=expert_map, block_counts=block_counts, sorted_slots=sorted_slots)
        if plan.scan_blocks:
            assert plan.block_offsets
            block_offsets = arrays.empty(*plan.block_offsets) if workspace is None else workspace[words:]
            plan.scan_blocks(block_counts=block_counts, offsets=block_offsets)
    plan.place_slots(
        topk_ids=topk_ids,
        expert_map=expert_map,
        block_counts=block_counts,
        block_offsets=block_offsets,
        sorted_slots=sorted_slots,
        block_names=block_names,
        position_of_slot=position_of_slot,
        counts=counts,
        offset=offset,
        expert_ids=expert_ids,
        num_padded=num_padded,
    )
