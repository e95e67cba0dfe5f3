"""Slots grouped by expert, each group padded to whole GEMM blocks."""

from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.counting import expert_of_slots, expert_offsets


class AlignedBlocks(NamedTuple):
    """The arrays that a grouped GEMM with a fixed block size reads; see `moe_align_block_size`."""

    sorted_token_ids: Any
    expert_ids: Any
    num_tokens_post_padded: Any


def max_sorted_slots(num_slots: int, block_size: int, num_experts: int, pad_sorted_ids: bool = False) -> int:
    """Return the length of `sorted_token_ids`, which is enough for any routing of `num_slots` slots.

    >>> max_sorted_slots(100, 16, 8), max_sorted_slots(100, 16, 8, pad_sorted_ids=True), max_sorted_slots(3, 16, 8)
    (220, 224, 48)
    """
    length = num_slots + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = -(-length // block_size) * block_size
    if num_slots < num_experts:
        length = min(length, num_slots * block_size)
    return length


def moe_align_block_size(
    topk_ids: np.ndarray,
    block_size: int,
    num_experts: int,
    expert_map: np.ndarray | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    inactive_expert_id: int = -1,
    out: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    inv_sorted_idx: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    workspace: np.ndarray | None = None,
) -> AlignedBlocks:
    """Group the slots by expert and pad each group to a multiple of the block size.

    Parameters
    ----------
    topk_ids
        int32 or int64 [num_slots] or [num_tokens, top_k]; ids outside ``[0, num_experts)`` are skipped.
    block_size
        Rows of one GEMM block.
    num_experts
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    expert_map
        int32 or int64 [num_experts]: this rank's id of each expert. An expert of another rank has -1, any other number
        below 0, or a number above int32.
    pad_sorted_ids
        Round the length of `sorted_token_ids` up to a multiple of the block size.
    ignore_invalid_experts
        With a map: skip the slots of other ranks' experts and group by this rank's ids. Otherwise all slots are grouped
        by their own id, and the map gives the values of `expert_ids` (-1 for blocks of other ranks).
    inactive_expert_id
        Value of `expert_ids` after the last block in use.
    out
        Memory for the result. `sorted_token_ids` may be longer than below, and `expert_ids` has one entry for each of
        its blocks.
    inv_sorted_idx
        int32, shape of `topk_ids`, written: the position of each slot, -1 for a skipped slot.
    counts
        int32 [num_experts], written: the number of slots in each group.
    workspace
        Scratch memory for kernels (see `numba_moe.align_sizes`); the reference does not use it.

    Returns
    -------
    AlignedBlocks
        sorted_token_ids: int32 [max_sorted_slots], the slots of each expert in ascending order, padded with num_slots.
        expert_ids: int32 [ceil(max_sorted_slots / block_size)], the expert of each block. num_tokens_post_padded: int32
        [1], the number of positions in use, a multiple of the block size.

    Notes
    -----
    The order is stable. The lengths depend on shapes alone, so the host never waits for the data.

    Examples
    --------
    Three tokens choose two of three experts each. Expert 0 gets slots 1 and 2, expert 1 gets slots 3 and 5, and expert
    2 gets slots 0 and 4. Each pair is padded to a block of 4 with the number of slots, 6:

    >>> blocks = moe_align_block_size(np.array([[2, 0], [0, 1], [2, 1]]), block_size=4, num_experts=3)
    >>> blocks.sorted_token_ids
    array([1, 2, 6, 6, 3, 5, 6, 6, 0, 4, 6, 6, 6, 6, 6], dtype=int32)
    >>> blocks.expert_ids
    array([ 0,  1,  2, -1], dtype=int32)
    >>> blocks.num_tokens_post_padded
    array([12], dtype=int32)
    """
    num_slots = topk_ids.size
    experts = expert_of_slots(topk_ids, num_experts, expert_map if ignore_invalid_experts else None)
    sizes = np.bincount(experts[experts >= 0], minlength=num_experts)
    offsets = expert_offsets(sizes, block_size)
    if out is None:
        length = max_sorted_slots(num_slots, block_size, num_experts, pad_sorted_ids)
        out = np.empty(length, np.int32), np.empty(-(-length // block_size), np.int32), np.empty(1, np.int32)

    sorted_token_ids, expert_ids, num_tokens_post_padded = out
    sorted_token_ids[:] = num_slots
    expert_ids[:] = inactive_expert_id
    num_tokens_post_padded[:] = offsets[-1]
    names = np.arange(num_experts)
    if expert_map is not None and not ignore_invalid_experts:
        names = np.where((expert_map >= 0) & (expert_map < 2**31), expert_map, -1)
    by_expert = np.argsort(experts, kind="stable")[np.count_nonzero(experts < 0) :]
    for expert, (group, first) in enumerate(zip(np.split(by_expert, np.cumsum(sizes)[:-1]), offsets, strict=False)):
        sorted_token_ids[first : first + len(group)] = group
        expert_ids[first // block_size : offsets[expert + 1] // block_size] = names[expert]
    if inv_sorted_idx is not None:
        positions = np.flatnonzero(sorted_token_ids < num_slots)
        inv_sorted_idx[...] = -1
        inv_sorted_idx.flat[sorted_token_ids[positions]] = positions
    if counts is not None:
        counts[:] = sizes
    return AlignedBlocks(*out)
