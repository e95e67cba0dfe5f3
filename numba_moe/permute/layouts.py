"""Rows of each expert in a batch of their own, and the order of slots under the names of SGLang's dispatcher."""

import functools
from typing import Any, NamedTuple

import torch

from numba_moe import sorting
from numba_moe.permute.backward import differentiable_permute
from numba_moe.permute.rows import Gather, check_rows, deal, gather, permute_by_reference, plan_gather
from numba_moe.reference import permute as reference
from numba_moe.reference.permute import MaskedTokens, ReorderedSlots
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, int32
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.parameters import Int32, Int32Array, Int64Array
from numba_moe.runtime.plans import Layout, layout, new_tuple, planned
from numba_moe.runtime.primitives import quotient


class Grouped(NamedTuple):
    """Slots in the order of experts."""

    sorted_slots: Int32Array  # [num_slots]
    offset: Int64Array  # [num_experts + 1]; where the slots of each expert begin, and where the last ones end
    num_slots: Int32


class Batches(NamedTuple):
    """A batch of max_m rows for each of the first num_batches experts."""

    inv_permuted_idx: Int32Array  # [num_slots]; written: the row of each slot that is sorted, -1 for none
    permuted_idx: Int32Array  # [num_batches, max_m]; the slot of each row, num_slots for none
    masked_m: Int32Array  # [num_batches]; rows in use
    num_batches: Int32
    max_m: Int32
    parts: Int32  # blocks of threads that serve an expert


@cuda.jit
def lay_out_rows(grouped: Grouped, batches: Batches):
    """Give each sorted slot a row of its expert's batch; `parts` blocks, of any number of threads, serve an expert."""
    expert = quotient(cuda.blockIdx.x, batches.parts)
    part = int32(cuda.blockIdx.x - expert * batches.parts)
    first = int32(grouped.offset[expert])
    count = int32(grouped.offset[expert + 1] - first)
    rows = batches.max_m if expert < batches.num_batches else int32(0)
    if part == 0 and cuda.threadIdx.x == 0 and expert < batches.num_batches:
        batches.masked_m[expert] = min(count, rows)
    row = int32(part * cuda.blockDim.x + cuda.threadIdx.x)
    while row < max(count, rows):
        slot = grouped.num_slots
        place = int32(-1)
        if row < rows:
            place = int32(expert * batches.max_m + row)
        if row < count:
            slot = grouped.sorted_slots[first + row]
            batches.inv_permuted_idx[slot] = place
        if row < rows:
            batches.permuted_idx[place] = slot
        row = int32(row + batches.parts * cuda.blockDim.x)


class MaskedPlan(NamedTuple):
    """The results but for the rows, and what they are made from; the sort, and the copies of rows and scales."""

    indices: tuple[arrays.Contiguous, ...]
    sort: sorting.SortPlan
    lay_out: Launch
    rows: Gather
    scales: Gather | None


@planned
def _plan_masked(
    hidden_states: Layout,
    topk_ids: Layout,
    num_experts: int,
    max_m: int,
    expert_map: Layout | None,
    num_local_experts: int | None,
    scales: Layout | None,
    zero_padding: bool,
) -> MaskedPlan:
    num_experts, top_k = check_rows(hidden_states, topk_ids, num_experts, expert_map, scales, zero_padding)
    max_m = checks.integer("max_m", max_m, 1)
    batches = num_experts
    if num_local_experts is not None:
        batches = checks.integer("num_local_experts", num_local_experts, 1, num_experts, f"num_experts = {num_experts}")
    checks.fits_int32("max_m", batches * max_m, "the number of rows")
    num_slots = topk_ids.shape.numel()
    indices = (
        arrays.contiguous(torch.int32, num_slots),
        arrays.contiguous(torch.int64, num_experts + 1),
        arrays.contiguous(torch.int32, *topk_ids.shape),
        arrays.contiguous(torch.int32, batches, max_m),
        arrays.contiguous(torch.int32, batches),
    )
    threads, parts = deal(num_experts, max_m)
    sorted_slots, offset, inv_permuted_idx, permuted_idx, masked_m = indices
    grouped = Grouped(sorted_slots, offset, num_slots)
    into = Batches(inv_permuted_idx, permuted_idx, masked_m, num_batches=batches, max_m=max_m, parts=parts)
    written = ("position_of_slot", "offset")
    return MaskedPlan(
        indices,
        sorting.plan_sort(topk_ids, num_experts, num_slots, expert_map=expert_map, written=written),
        Launch(lay_out_rows, topk_ids.device, num_experts * parts, threads, grouped, into),
        plan_gather(hidden_states, top_k, (batches, max_m), zero_padding),
        scales and plan_gather(scales, top_k, (batches, max_m), zero_padding),
    )


def _permute_masked(
    hidden_states: Any,
    topk_ids: Any,
    num_experts: int,
    max_m: int,
    expert_map: Any,
    num_local_experts: int | None,
    scales: Any,
    zero_padding: bool,
) -> MaskedTokens:
    plan = _plan_masked(
        *(layout(hidden_states), layout(topk_ids), num_experts, max_m, layout(expert_map)),
        *(num_local_experts, layout(scales), zero_padding),
    )
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    arguments = {"topk_ids": topk_ids, "num_experts": num_experts, "max_m": max_m, "expert_map": expert_map}
    arguments |= {"num_local_experts": num_local_experts, "scales": scales, "zero_padding": zero_padding}
    if hidden_states.requires_grad and torch.is_grad_enabled():
        permute = functools.partial(_permute_masked, **arguments)
        return MaskedTokens(*differentiable_permute(permute, hidden_states))
    if arrays.answered_by_reference(hidden_states):
        return permute_by_reference(reference.moe_permute_masked, hidden_states, **arguments)
    sorted_slots, offset, inv_permuted_idx, permuted_idx, masked_m = (arrays.empty(*array) for array in plan.indices)
    sorting.sort(*(plan.sort, topk_ids, sorted_slots, expert_map), position_of_slot=inv_permuted_idx, offset=offset)
    plan.lay_out(
        sorted_slots=sorted_slots,
        offset=offset,
        inv_permuted_idx=inv_permuted_idx,
        permuted_idx=permuted_idx,
        masked_m=masked_m,
    )
    rows = gather(plan.rows, hidden_states, permuted_idx, inv_permuted_idx)
    moved = None if plan.scales is None else gather(plan.scales, scales, permuted_idx, inv_permuted_idx)
    return new_tuple(MaskedTokens, (rows, masked_m, permuted_idx, inv_permuted_idx, moved))


@planned
def _plan_reorder(
    topk_ids: Layout, num_experts: int, expert_map: Layout | None
) -> tuple[sorting.SortPlan, arrays.Contiguous, arrays.Contiguous]:
    num_experts = checks.routing(topk_ids, num_experts, expert_map)
    num_slots = topk_ids.shape.numel()
    written = ("position_of_slot", "offset", "expert_ids")
    sort = sorting.plan_sort(topk_ids, num_experts, num_slots, expert_map=expert_map, written=written)
    return sort, arrays.contiguous(torch.int32, num_slots), arrays.contiguous(torch.int64, num_experts + 1)


@arrays.public
def moe_permute_masked(
    hidden_states: Any,
    topk_ids: Any,
    num_experts: int,
    max_m: int,
    expert_map: Any = None,
    *,
    num_local_experts: int | None = None,
    scales: Any = None,
    zero_padding: bool = True,
) -> MaskedTokens:
    """Copy each token's row once for each of its experts, into a batch of rows for every expert.

    Parameters
    ----------
    hidden_states : array of float32, float16, bfloat16, uint8, int8 or float8, shape [num_tokens, hidden]
        Rows may be strided.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts that ids range over.
    max_m : int
        Rows of a batch. What an expert gets beyond them is skipped; it gets no more than num_tokens if a token's
        experts are distinct.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert, -1 for an expert of another rank, whose slots are skipped.
    num_local_experts : int, optional
        Number of batches, num_experts unless given. Slots of experts beyond are skipped.
    scales : array of any of these dtypes or int32, shape [num_tokens] or [num_tokens, groups], optional
        What quantised rows are scaled by: moved along with them.
    zero_padding : bool
        Write zeros to rows without a slot. Otherwise they hold what was in memory, and batches cost what they hold.

    Returns
    -------
    MaskedTokens
        permuted_hidden_states : [num_local_experts, max_m, hidden] in the dtype of `hidden_states`. masked_m : int32
        [num_local_experts], the rows in use of each batch. permuted_idx : int32 [num_local_experts, max_m], the slot
        of each row, num_slots where there is none. inv_permuted_idx : int32 [num_tokens, top_k],
        ``expert * max_m + row`` of each slot, -1 for skipped slots. permuted_scales : [num_local_experts, max_m] or
        [num_local_experts, max_m, groups], None without scales.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, more slots or rows than int32 counts.

    Notes
    -----
    Stable: rows of one expert ascend by slot, and the first max_m stay. Runs on the caller's current stream without
    synchronising and captures into CUDA graphs; a launch more than `moe_permute`. `moe_unpermute` takes the batches
    back, flattened to rows. Rows have a gradient by `hidden_states`.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[1], [2], [3]], np.float32)
    >>> masked = moe_permute_masked(rows, np.array([[1, 0], [-1, 0], [0, 1]]), num_experts=2, max_m=2)
    >>> masked.permuted_hidden_states.reshape(2, 2)
    array([[1., 2.],
           [1., 3.]], dtype=float32)
    >>> masked.masked_m
    array([2, 2], dtype=int32)
    """
    options = (expert_map, num_local_experts, scales, zero_padding)
    return _permute_masked(hidden_states, topk_ids, num_experts, max_m, *options)


@arrays.public
def moe_reorder(topk_ids: Any, num_experts: int, expert_map: Any = None) -> ReorderedSlots:
    """Order slots by expert, and return the order as SGLang's dispatcher for DeepEP does.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_tokens, top_k] or [num_slots]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts that ids range over.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert, -1 for an expert of another rank, whose slots are skipped.

    Returns
    -------
    ReorderedSlots
        reorder_topk_ids : int32 [num_slots], the expert of each row, -1 behind the last one in use. src2dst : int32
        [num_slots], the row of each slot, -1 for skipped slots. seg_indptr : int64 [num_experts + 1]; rows of expert e
        are ``seg_indptr[e]`` up to ``seg_indptr[e + 1]``.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, more slots than int32 counts.

    Notes
    -----
    The order is that of `moe_permute`, and this is its sort alone. Runs on the caller's current stream without
    synchronising and captures into CUDA graphs.

    Examples
    --------
    >>> import numpy as np
    >>> reordered = moe_reorder(np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> reordered.reorder_topk_ids
    array([ 0,  0,  1, -1], dtype=int32)
    >>> reordered.src2dst
    array([ 2,  0, -1,  1], dtype=int32)
    """
    sort, slots, offset = _plan_reorder(layout(topk_ids), num_experts, layout(expert_map))
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    if arrays.answered_by_reference(topk_ids):
        return arrays.by_reference(reference.moe_reorder, topk_ids, num_experts, expert_map)
    sorted_slots, reorder_topk_ids, src2dst = (arrays.empty(*slots) for _ in range(3))
    seg_indptr = arrays.empty(*offset)
    sorting.sort(
        *(sort, topk_ids, sorted_slots, expert_map),
        position_of_slot=src2dst,
        offset=seg_indptr,
        expert_ids=reorder_topk_ids,
    )
    return new_tuple(ReorderedSlots, (reorder_topk_ids, src2dst, seg_indptr))
