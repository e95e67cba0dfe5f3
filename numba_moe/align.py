"""Slots grouped by expert and padded to whole GEMM blocks.

The counting sort of `numba_moe.sorting` with rows padded to the block size.
"""

from typing import Any, NamedTuple

import torch

from numba_moe import sorting
from numba_moe.reference import align as reference
from numba_moe.reference.align import AlignedBlocks
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import Layout, layout, new_tuple, planned

INT32 = (torch.int32,)


class Given(NamedTuple):
    """Layouts of what a caller gives to be written."""

    out: Any
    inv_sorted_idx: Any
    counts: Any
    workspace: Any


class AlignPlan(NamedTuple):
    """The outputs, and the sort."""

    sorted_token_ids: arrays.Contiguous
    expert_ids: arrays.Contiguous
    num_tokens_post_padded: arrays.Contiguous
    sort: sorting.SortPlan


class AlignSizes(NamedTuple):
    """Elements of the int32 arrays that `moe_align_block_size` writes; see `align_sizes`."""

    sorted_token_ids: int
    expert_ids: int
    workspace: int


def _check_out(out: Any, topk_ids: Layout, num_positions: int, block_size: int) -> int:
    """Check the arrays given for a result; return the positions that the first one has."""
    checks.tuple_of("out", out, len(AlignedBlocks._fields))
    like = ("topk_ids", topk_ids)
    names = [f"out.{name}" for name in AlignedBlocks._fields]
    for name, part in zip(names, out, strict=True):
        checks.array(name, part, INT32, (1,), like=like)
    given = out[0].shape[0]
    checks.at_least(f"len({names[0]})", given, num_positions, "what any routing needs")
    checks.shape(names[1], out[1], (-(-given // block_size),), "(blocks of `out.sorted_token_ids`,)")
    checks.shape(names[2], out[2], (1,), "(1,)")
    return given


@planned
def _plan(
    topk_ids: Layout,
    block_size: int,
    num_experts: int,
    expert_map: Layout | None,
    pad_sorted_ids: bool,
    ignore_invalid_experts: bool,
    inactive_expert_id: int,
    given: Given | None,
) -> AlignPlan:
    num_experts = checks.routing(topk_ids, num_experts, expert_map)
    block_size = checks.integer("block_size", block_size, 1)
    checks.boolean("pad_sorted_ids", pad_sorted_ids)
    checks.boolean("ignore_invalid_experts", ignore_invalid_experts)
    inactive_expert_id = checks.integer("inactive_expert_id", inactive_expert_id, -(2**31))
    num_slots = topk_ids.shape.numel()
    num_positions = reference.max_sorted_slots(num_slots, block_size, num_experts, pad_sorted_ids)
    like = ("topk_ids", topk_ids)
    if given is not None:
        if given.out is not None:
            num_positions = _check_out(given.out, topk_ids, num_positions, block_size)
        if given.inv_sorted_idx is not None:
            checks.array("inv_sorted_idx", given.inv_sorted_idx, INT32, (1, 2), like=like)
            checks.shape("inv_sorted_idx", given.inv_sorted_idx, tuple(topk_ids.shape), "that of `topk_ids`")
        if given.counts is not None:
            checks.array("counts", given.counts, INT32, (1,), like=like)
            checks.shape("counts", given.counts, (num_experts,), "(num_experts,)")
        if given.workspace is not None:
            checks.array("workspace", given.workspace, INT32, (1,), like=like)
            size = sorting.workspace_size(num_slots, num_experts)
            checks.at_least("len(workspace)", given.workspace.shape[0], size, "what `align_sizes` says")
            checks.aligned("workspace", given.workspace)
    checks.fits_int32("topk_ids", num_positions, "the number of padded positions")
    slot_map, block_names = (expert_map, None) if ignore_invalid_experts else (None, expert_map)
    aligned = given is None or given.out is None or given.out[0].address == 0
    written = ["expert_ids", "num_padded"]
    if given is not None and given.inv_sorted_idx is not None:
        written.append("position_of_slot")
    if given is not None and given.counts is not None:
        written.append("counts")
    sizes = (num_experts, num_positions, block_size, inactive_expert_id)
    sort = sorting.plan_sort(topk_ids, *sizes, slot_map, block_names, aligned, written)
    return AlignPlan(
        arrays.contiguous(torch.int32, num_positions),
        arrays.contiguous(torch.int32, -(-num_positions // block_size)),
        arrays.contiguous(torch.int32, 1),
        sort,
    )


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
    return AlignSizes(length, -(-length // block_size), sorting.workspace_size(num_slots, num_experts))


@arrays.public_writing("out", "inv_sorted_idx", "counts", "workspace")
def moe_align_block_size(
    topk_ids: Any,
    block_size: int,
    num_experts: int,
    expert_map: Any = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    inactive_expert_id: int = -1,
    out: Any = None,
    inv_sorted_idx: Any = None,
    counts: Any = None,
    workspace: Any = None,
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
    given = None
    if not (out is None and inv_sorted_idx is None and counts is None and workspace is None):
        parts = tuple(map(layout, out)) if isinstance(out, tuple) else out
        given = Given(parts, layout(inv_sorted_idx), layout(counts), layout(workspace))
    plan = _plan(
        *(layout(topk_ids), block_size, num_experts, layout(expert_map)),
        *(pad_sorted_ids, ignore_invalid_experts, inactive_expert_id, given),
    )
    if given is not None:
        memory = {"out": out, "inv_sorted_idx": inv_sorted_idx, "counts": counts, "workspace": workspace}
        checks.apart({"topk_ids": topk_ids, "expert_map": expert_map, **memory}, tuple(memory))
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    if arrays.answered_by_reference(topk_ids):
        return arrays.by_reference(
            reference.moe_align_block_size,
            *(topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts),
            inactive_expert_id=inactive_expert_id,
            out=out,
            inv_sorted_idx=inv_sorted_idx,
            counts=counts,
        )
    if out is None:
        sorted_token_ids = arrays.empty(*plan.sorted_token_ids)
        expert_ids = arrays.empty(*plan.expert_ids)
        num_tokens_post_padded = arrays.empty(*plan.num_tokens_post_padded)
    else:
        sorted_token_ids, expert_ids, num_tokens_post_padded = out
    slot_map, block_names = (expert_map, None) if ignore_invalid_experts else (None, expert_map)
    sorting.sort(
        *(plan.sort, topk_ids, sorted_token_ids, slot_map, workspace),
        block_names=block_names,
        position_of_slot=inv_sorted_idx,
        counts=counts,
        expert_ids=expert_ids,
        num_padded=num_tokens_post_padded,
    )
    return new_tuple(AlignedBlocks, (sorted_token_ids, expert_ids, num_tokens_post_padded))
