"""Slots grouped by expert and padded to whole GEMM blocks.

The counting sort of `numba_moe.counting` with rows padded to the block size.
"""

from typing import Any, NamedTuple

import torch

from numba_moe import counting
from numba_moe.reference import align as reference
from numba_moe.reference.align import AlignedBlocks
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import Layout, layout, new_tuple, planned


class AlignPlan(NamedTuple):
    """The outputs, and the sort."""

    sorted_token_ids: arrays.Contiguous
    expert_ids: arrays.Contiguous
    num_tokens_post_padded: arrays.Contiguous
    sort: counting.SortPlan


@planned
def _plan(
    topk_ids: Layout,
    block_size: int,
    num_experts: int,
    expert_map: Layout | None,
    pad_sorted_ids: bool,
    ignore_invalid_experts: bool,
    inactive_expert_id: int,
) -> AlignPlan:
    num_experts = checks.routing(topk_ids, num_experts, expert_map)
    block_size = checks.integer("block_size", block_size, 1)
    checks.boolean("pad_sorted_ids", pad_sorted_ids)
    checks.boolean("ignore_invalid_experts", ignore_invalid_experts)
    inactive_expert_id = checks.integer("inactive_expert_id", inactive_expert_id, -(2**31))
    num_positions = reference.max_sorted_slots(topk_ids.shape.numel(), block_size, num_experts, pad_sorted_ids)
    checks.fits_int32("topk_ids", num_positions, "the number of padded positions")
    maps = (expert_map, None) if ignore_invalid_experts else (None, expert_map)
    sort = counting.plan_sort(topk_ids, num_experts, num_positions, block_size, inactive_expert_id, *maps)
    return AlignPlan(
        arrays.contiguous(torch.int32, num_positions),
        arrays.contiguous(torch.int32, -(-num_positions // block_size)),
        arrays.contiguous(torch.int32, 1),
        sort,
    )


@arrays.public
def moe_align_block_size(
    topk_ids: Any,
    block_size: int,
    num_experts: int,
    expert_map: Any = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    inactive_expert_id: int = -1,
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
        This rank's id of each expert, -1 for an expert of another rank.
    pad_sorted_ids : bool
        Round the length of `sorted_token_ids` up to a multiple of the block size.
    ignore_invalid_experts : bool
        With a map: leave out the slots of other ranks' experts and group by this rank's ids. Otherwise all slots
        are grouped by their own id, and `expert_ids` names the blocks by the map (-1 for other ranks' blocks).
    inactive_expert_id : int
        What `expert_ids` holds past the last block in use.

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
        Wrong shape or layout, mixed devices, block_size below 1, positions past int32.

    Notes
    -----
    The order is stable and the same at every run. Runs on the caller's current stream without synchronising and
    captures into CUDA graphs. Allocates the results, and scratch as `count_tokens_per_expert` does.
    The signature is that of vLLM's function of this name (release 0.21).

    Examples
    --------
    >>> import numpy as np
    >>> blocks = moe_align_block_size(np.array([[2, 0], [0, 1], [2, 1]]), block_size=4, num_experts=3)
    >>> blocks.sorted_token_ids
    array([1, 2, 6, 6, 3, 5, 6, 6, 0, 4, 6, 6, 6, 6, 6], dtype=int32)
    >>> blocks.expert_ids
    array([ 0,  1,  2, -1], dtype=int32)
    """
    plan = _plan(
        *(layout(topk_ids), block_size, num_experts, layout(expert_map)),
        *(pad_sorted_ids, ignore_invalid_experts, inactive_expert_id),
    )
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    if arrays.answered_by_reference(topk_ids):
        arguments = (topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts)
        return arrays.by_reference(reference.moe_align_block_size, *arguments, inactive_expert_id=inactive_expert_id)
    sorted_token_ids = arrays.empty(*plan.sorted_token_ids)
    expert_ids = arrays.empty(*plan.expert_ids)
    num_tokens_post_padded = arrays.empty(*plan.num_tokens_post_padded)
    slot_map, block_names = (expert_map, None) if ignore_invalid_experts else (None, expert_map)
    outputs = (sorted_token_ids, None, None, None, expert_ids, num_tokens_post_padded)
    counting.sort(plan.sort, topk_ids, slot_map, block_names, *outputs)
    return new_tuple(AlignedBlocks, (sorted_token_ids, expert_ids, num_tokens_post_padded))
