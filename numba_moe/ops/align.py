"""Group slots by expert and pad each group to whole GEMM blocks: `moe_align_block_size`.

The work is the counting sort of `numba_moe.ops.sort`, with each expert's rows padded to a multiple of the block size.
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
    """Lengths of the int32 arrays that `moe_align_block_size` writes; see `align_sizes`."""

    sorted_token_ids: int
    expert_ids: int
    workspace: int


def align_sizes(num_slots: int, block_size: int, num_experts: int, pad_sorted_ids: bool = False) -> AlignSizes:
    """Return the lengths of the arrays with which `moe_align_block_size` allocates nothing.

    Parameters
    ----------
    num_slots : int
        The largest number of elements that `topk_ids` will have.
    block_size : int
        Rows of one GEMM block.
    num_experts : int
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    pad_sorted_ids : bool
        Round the length of `sorted_token_ids` up to a multiple of the block size.

    Returns
    -------
    AlignSizes
        sorted_token_ids : int, the least length of ``out[0]``. expert_ids : int, the length of ``out[1]`` that belongs
        to this length of ``out[0]``. workspace : int, the least length of `workspace`.

    Raises
    ------
    TypeError
        A value that is not an integer.
    ValueError
        `num_slots` below 0, or `block_size` or `num_experts` below 1.

    Notes
    -----
    Arrays that are large enough for a number of slots are large enough for fewer slots.

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
        Contiguous. Ids outside ``[0, num_experts)``, such as -1, are skipped.
    block_size : int
        Rows of one GEMM block.
    num_experts : int
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert. An expert of another rank has -1, any other number below 0, or a number above
        int32.
    pad_sorted_ids : bool
        Round the length of `sorted_token_ids` up to a multiple of the block size.
    ignore_invalid_experts : bool
        With a map: skip the slots of other ranks' experts and group by this rank's ids. Otherwise all slots are grouped
        by their own id, and the map gives the values of `expert_ids` (-1 for blocks of other ranks).
    inactive_expert_id : int
        Value of `expert_ids` after the last block in use.
    out : tuple of three arrays of int32, optional
        Memory for the result; all of it is written. `sorted_token_ids` has at least the length below, `expert_ids` has
        one entry for each of its blocks, and `num_tokens_post_padded` has length 1.
    inv_sorted_idx : array of int32, shape of `topk_ids`, optional
        Written: the position of each slot in `sorted_token_ids`, -1 for a skipped slot.
    counts : array of int32, shape [num_experts], optional
        Written: the number of slots in each group.
    workspace : array of int32, shape [`align_sizes`.workspace] or more, optional
        Scratch memory, aligned to 16 bytes. It holds nothing between calls. Without it the op allocates the scratch
        that it needs.

    Returns
    -------
    AlignedBlocks
        sorted_token_ids : int32 [max_sorted_slots], the slots of each expert in ascending order, padded with num_slots.
        max_sorted_slots is ``num_slots + num_experts * (block_size - 1)``, and with fewer slots than experts at most
        ``num_slots * block_size``. expert_ids : int32 [ceil(max_sorted_slots / block_size)], the expert of each block.
        num_tokens_post_padded : int32 [1], the number of positions in use, a multiple of the block size.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, `block_size` below 1, more positions than int32 can index, or a given
        array that is too small or shares memory with another array.

    Notes
    -----
    The order is stable, so every run gives the same bits. The op runs on the caller's current stream without
    synchronising, and CUDA graphs can capture it. It allocates the results and scratch, or nothing with `out` and
    `workspace`. `inv_sorted_idx` and `counts` take no further launch. The signature is that of vLLM's function of this
    name (release 0.21), except for the keyword-only parameters.

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
    if isinstance(expert_map, Foreign) and expert_map.what.startswith(("builtins.int", "numpy.int", "numpy.uint")):
        order = "(topk_ids, block_size, num_experts, expert_map), not (topk_ids, num_experts, block_size, topk)"
        raise TypeError(f"`expert_map` must be an array or None, got an integer: the order is {order}")


def _maps(given: Any) -> tuple[Any, Any]:
    """Return the map that decides where slots go, and the map that gives the values of `expert_ids`."""
    return (given.expert_map, None) if given.ignore_invalid_experts else (None, given.expert_map)


def _check_out(given: Any, num_positions: int) -> tuple[int, bool]:
    """Check the arrays of `out`; return the length of the first and whether it is aligned."""
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
    """Check the other arrays that are written."""
    like = ("topk_ids", given.topk_ids)
    if given.inv_sorted_idx is not None:
        checks.array("inv_sorted_idx", given.inv_sorted_idx, INT32, (1, 2), like=like)
        checks.shape("inv_sorted_idx", given.inv_sorted_idx, tuple(given.topk_ids.shape), "`topk_ids`.shape")
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
