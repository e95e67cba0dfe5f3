"""Slots grouped by expert and padded to whole GEMM blocks.

The counting sort of `numba_moe.ops.sort` with rows padded to the block size.
"""

from typing import Any, NamedTuple

import torch

from numba_moe import sizes
from numba_moe.ops.sort import counting_sort
from numba_moe.reference import align as reference
from numba_moe.reference.align import AlignedBlocks
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, contiguous
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Foreign
from numba_moe.sizes import num_elements

INT32 = (torch.int32,)


class AlignSizes(NamedTuple):
    """Elements of the int32 arrays that `moe_align_block_size` writes; see `align_sizes`."""

    sorted_token_ids: int
    expert_ids: int
    workspace: int


def align_sizes(num_slots: int, block_size: int, num_experts: int, pad_sorted_ids: bool = False) -> AlignSizes:
    """Return how large the arrays must be that are given to `moe_align_block_size`, so that it allocates nothing.

    Parameters
    ----------
    num_slots : int
        Elements of `topk_ids`, at most.
    block_size : int
        Rows of one GEMM block.
    num_experts : int
        Number of experts that ids range over.
    pad_sorted_ids : bool
        Round the length of `sorted_token_ids` up to a multiple of the block size.

    Returns
    -------
    AlignSizes
        sorted_token_ids : int, the length of ``out[0]``, or less. expert_ids : int, the length of ``out[1]`` for such a
        ``out[0]``. workspace : int, the length of `workspace`, or less.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        A negative number of slots, or no block size or experts.

    Notes
    -----
    What suffices for so many slots suffices for fewer.

    Examples
    --------
    >>> sizes = align_sizes(4096, block_size=64, num_experts=256)
    >>> sizes.sorted_token_ids, sizes.expert_ids
    (20224, 316)
    """
    num_slots = checks.integer("num_slots", num_slots, 0)
    block_size = checks.integer("block_size", block_size, 1)
    num_experts = checks.integer("num_experts", num_experts, 1)
    checks.boolean("pad_sorted_ids", pad_sorted_ids)
    length = reference.max_sorted_slots(num_slots, block_size, num_experts, pad_sorted_ids)
    return AlignSizes(length, -(-length // block_size), counting_sort.workspace_size(num_slots, num_experts))


@op(reference.moe_align_block_size, writes=("inv_sorted_idx", "counts", "workspace"), own_out=True)
def moe_align_block_size(
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    expert_map: Array | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    inactive_expert_id: int = -1,
    out: tuple[Array, Array, Array] | None = None,
    inv_sorted_idx: Array | None = None,
    counts: Array | None = None,
    workspace: Array | None = None,
) -> AlignedBlocks:
    """Group the slots by expert and pad each group to a multiple of the block size.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_slots] or [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)``, -1 for instance, are skipped.
    block_size : int
        Rows of one GEMM block.
    num_experts : int
        Number of experts that ids range over.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert; -1, any other number below 0, or one past int32 for an expert of another rank.
    pad_sorted_ids : bool
        Round the length of `sorted_token_ids` up to a multiple of the block size.
    ignore_invalid_experts : bool
        With a map: leave out the slots of other ranks' experts and group by this rank's ids. Otherwise all slots
        are grouped by their own id, and `expert_ids` names the blocks by the map (-1 for other ranks' blocks).
    inactive_expert_id : int
        What `expert_ids` holds past the last block in use.
    out : tuple of three arrays of int32, optional
        Memory for the result, written whole: `sorted_token_ids` of the length below or more, `expert_ids` with one
        entry for each block of it, `num_tokens_post_padded` of length 1.
    inv_sorted_idx : array of int32, shape that of `topk_ids`, optional
        Written: the position of each slot in `sorted_token_ids`, -1 for a skipped slot.
    counts : array of int32, shape [num_experts], optional
        Written: the slots of each group.
    workspace : array of int32, shape [`align_sizes`.workspace] or more, optional
        Scratch memory that begins at a multiple of 16 bytes; it holds nothing between calls. Without it scratch is
        allocated where it is needed.

    Returns
    -------
    AlignedBlocks
        sorted_token_ids : int32 [num_slots + num_experts * (block_size - 1)], or num_slots * block_size if there
        are fewer slots than experts and that is less; the slots of each expert in ascending order, padded with
        num_slots. expert_ids : int32, the expert of each block. num_tokens_post_padded : int32 [1], the positions
        in use, a multiple of the block size.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, block_size below 1, positions past int32, given arrays that are
        too small or share memory with each other or an input.

    Notes
    -----
    The order is stable and the same at every run. Runs on the caller's current stream without synchronising and
    captures into CUDA graphs. Allocates the results and scratch, or nothing if given `out` and `workspace`. To ask
    for `inv_sorted_idx` or `counts` takes no further launch.
    The signature is that of vLLM's function of this name (release 0.21), but for what is by keyword alone.

    Examples
    --------
    >>> import numpy as np
    >>> blocks = moe_align_block_size(np.array([[2, 0], [0, 1], [2, 1]]), block_size=4, num_experts=3)
    >>> blocks.sorted_token_ids
    array([1, 2, 6, 6, 3, 5, 6, 6, 0, 4, 6, 6, 6, 6, 6], dtype=int32)
    >>> blocks.expert_ids
    array([ 0,  1,  2, -1], dtype=int32)
    """


@moe_align_block_size.outputs
def _(given: Any) -> AlignedBlocks:
    num_slots, block_size = num_elements(given.topk_ids), given.block_size
    length = sizes.sorted_slots(num_slots, block_size, given.num_experts, given.pad_sorted_ids)
    return AlignedBlocks(*(contiguous(torch.int32, size) for size in (length, -(-length // block_size), 1)))


@moe_align_block_size.plan
def _(given: Any) -> counting_sort.SortPlan:
    _check_order(given.expert_map)
    num_experts = checks.routing(given.topk_ids, given.num_experts, given.expert_map)
    block_size = checks.integer("block_size", given.block_size, 1)
    checks.boolean("pad_sorted_ids", given.pad_sorted_ids)
    checks.boolean("ignore_invalid_experts", given.ignore_invalid_experts)
    inactive_expert_id = checks.integer("inactive_expert_id", given.inactive_expert_id, -(2**31))
    num_slots = given.topk_ids.shape.numel()
    num_positions = reference.max_sorted_slots(num_slots, block_size, num_experts, given.pad_sorted_ids)
    aligned = True
    if given.out is not None:
        num_positions, aligned = _check_out(given, num_positions)
    _check_written(given)
    checks.fits_int32("topk_ids", num_positions, "the number of padded positions")
    optional = {"position_of_slot": given.inv_sorted_idx, "counts": given.counts}
    written = ["expert_ids", "num_padded", *(name for name, array in optional.items() if array is not None)]
    numbers = (num_experts, num_positions, block_size, inactive_expert_id)
    return counting_sort.plan_sort(given.topk_ids, *numbers, *_maps(given), aligned, written)


def _check_order(expert_map: Any) -> None:
    """Say which order is meant where somebody gives the number of picks at the end, as older functions took it."""
    if isinstance(expert_map, Foreign) and expert_map.what == "builtins.int":
        order = "(topk_ids, block_size, num_experts, expert_map), not (topk_ids, num_experts, block_size, topk)"
        raise TypeError(f"`expert_map` must be an array or None, got an integer: the order is {order}")


def _maps(given: Any) -> tuple[Any, Any]:
    """Return the map that slots go by, and the one that blocks are named by."""
    return (given.expert_map, None) if given.ignore_invalid_experts else (None, given.expert_map)


def _check_out(given: Any, num_positions: int) -> tuple[int, bool]:
    """Check the arrays for a result; return the positions that the first has, and whether it is aligned."""
    checks.tuple_of("out", given.out, len(AlignedBlocks._fields))
    names = [f"out.{name}" for name in AlignedBlocks._fields]
    parts = given.out.values
    for name, part in zip(names, parts, strict=True):
        checks.array(name, part, INT32, (1,), like=("topk_ids", given.topk_ids))
    length = parts[0].shape[0]
    checks.at_least(f"len({names[0]})", length, num_positions, "what any routing needs")
    checks.shape(names[1], parts[1], (-(-length // given.block_size),), "(blocks of `out.sorted_token_ids`,)")
    checks.shape(names[2], parts[2], (1,), "(1,)")
    return length, parts[0].address == 0


def _check_written(given: Any) -> None:
    """Check the other arrays to be written."""
    like = ("topk_ids", given.topk_ids)
    if given.inv_sorted_idx is not None:
        checks.array("inv_sorted_idx", given.inv_sorted_idx, INT32, (1, 2), like=like)
        checks.shape("inv_sorted_idx", given.inv_sorted_idx, tuple(given.topk_ids.shape), "that of `topk_ids`")
    if given.counts is not None:
        checks.array("counts", given.counts, INT32, (1,), like=like)
        checks.shape("counts", given.counts, (given.num_experts,), "(num_experts,)")
    if given.workspace is not None:
        checks.array("workspace", given.workspace, INT32, (1,), like=like)
        size = counting_sort.workspace_size(given.topk_ids.shape.numel(), given.num_experts)
        checks.at_least("len(workspace)", given.workspace.shape[0], size, "what `align_sizes` says")
        checks.aligned("workspace", given.workspace)


@moe_align_block_size.validate
def _(given: Any) -> None:
    checks.ids(given.topk_ids, given.num_experts)


@moe_align_block_size.run
def _(plan: Any, given: Any, sorted_token_ids: Any, expert_ids: Any, num_tokens_post_padded: Any) -> None:
    slot_map, block_names = _maps(given)
    counting_sort.sort(
        *(plan, given.topk_ids, sorted_token_ids, slot_map, given.workspace),
        block_names=block_names,
        position_of_slot=given.inv_sorted_idx,
        counts=given.counts,
        expert_ids=expert_ids,
        num_padded=num_tokens_post_padded,
    )
