"""Slots grouped by expert, each group padded to whole GEMM blocks."""

from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.counting import expert_of_slots, expert_offsets


class AlignedBlocks(NamedTuple):
    """What a grouped GEMM with a fixed block size reads; see `moe_align_block_size`."""

    sorted_token_ids: Any
    expert_ids: Any
    num_tokens_post_padded: Any


def max_sorted_slots(num_slots: int, block_size: int, num_experts: int, pad_sorted_ids: bool = False) -> int:
    """Return the length of `sorted_token_ids`: enough for any routing of that many slots.

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
        Number of experts that ids range over.
    expert_map
        int32 or int64 [num_experts]: this rank's id of each expert; -1, any other number below 0, or one past int32
        for an expert of another rank.
    pad_sorted_ids
        Round the length of `sorted_token_ids` up to a multiple of the block size.
    ignore_invalid_experts
        With a map: leave out the slots of other ranks' experts and group by this rank's ids. Otherwise all slots
        are grouped by their own id, and `expert_ids` names the blocks by the map (-1 for other ranks' blocks).
    inactive_expert_id
        What `expert_ids` holds past the last block in use.
    out
        Arrays to write the result to: `sorted_token_ids` may be longer than below, `expert_ids` has one entry for
        each block of it.
    inv_sorted_idx
        int32, of the shape of `topk_ids`, to be written: the position of each slot, -1 for a skipped one.
    counts
        int32 [num_experts], to be written: the slots of each group.
    workspace
        Scratch memory of kernels, which have use for it; see `numba_moe.align_sizes`.

    Returns
    -------
    AlignedBlocks
        sorted_token_ids: int32 [max_sorted_slots]; the slots of each expert in ascending order, padded with
        num_slots. expert_ids: int32 [ceil(max_sorted_slots / block_size)], the expert of each block.
        num_tokens_post_padded: int32 [1], the positions in use, a multiple of the block size.

    Notes
    -----
    The order is stable. The lengths depend on shapes alone, so nobody needs to wait for the data.

    Examples
    --------
    Three tokens choose two of three experts each; expert 0 gets slots 1 and 2, expert 1 slots 3 and 5, and
    expert 2 slots 0 and 4. Each pair is padded to a block of 4 with 6, the number of slots:

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
