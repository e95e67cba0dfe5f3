"""Rows moved into expert order, and combined again.

The counting sort of `numba_moe.sorting` finds the row of each slot; the kernels of `rows` move them; `layouts` has
what is particular to one batch for each expert, and `backward` the gradients.
"""

import functools
from typing import Any, NamedTuple

import torch

from numba_moe import sorting
from numba_moe.permute.backward import differentiable_permute, differentiable_sum, differentiable_unpermute
from numba_moe.permute.layouts import moe_permute_masked as moe_permute_masked
from numba_moe.permute.layouts import moe_reorder as moe_reorder
from numba_moe.permute.rows import Gather, check_rows, gather, permute_by_reference, plan_combine, plan_gather
from numba_moe.reference import permute as reference
from numba_moe.reference.align import max_sorted_slots
from numba_moe.reference.permute import MaskedTokens as MaskedTokens
from numba_moe.reference.permute import PermutedTokens
from numba_moe.reference.permute import ReorderedSlots as ReorderedSlots
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.plans import Layout, layout, new_tuple, planned


class PermutePlan(NamedTuple):
    """The results but for the rows, the experts of aligned blocks, the sort, and the copies of rows and scales."""

    indices: tuple[arrays.Contiguous, ...]
    block_experts: arrays.Contiguous | None
    m_indices: arrays.Contiguous | None  # where it is not the same
    sort: sorting.SortPlan
    rows: Gather
    scales: Gather | None


@planned
def _plan_permute(
    hidden_states: Layout,
    topk_ids: Layout,
    num_experts: int,
    expert_map: Layout | None,
    scales: Layout | None,
    alignment: int | None,
    zero_padding: bool,
) -> PermutePlan:
    num_experts, top_k = check_rows(hidden_states, topk_ids, num_experts, expert_map, scales, zero_padding)
    aligned = alignment is not None
    block_size = checks.integer("alignment", alignment, 1) if aligned else 1
    num_rows = max_sorted_slots(topk_ids.shape.numel(), block_size, num_experts, pad_sorted_ids=True)
    checks.fits_int32("topk_ids", num_rows, "the number of rows")
    indices = (
        arrays.contiguous(torch.int64, num_experts + 1),
        arrays.contiguous(torch.int32, num_rows),
        arrays.contiguous(torch.int32, *topk_ids.shape),
        arrays.contiguous(torch.int32, num_experts),
    )
    written = ("position_of_slot", "counts", "offset", *(("expert_ids",) if aligned else ()))
    return PermutePlan(
        indices,
        arrays.contiguous(torch.int32, num_rows // block_size) if aligned else None,
        arrays.contiguous(torch.int32, num_rows) if block_size > 1 else None,
        sorting.plan_sort(topk_ids, num_experts, num_rows, block_size, expert_map=expert_map, written=written),
        plan_gather(
            hidden_states, top_k, (num_rows,), zero_padding, alignment=block_size, named=aligned and block_size > 1
        ),
        scales and plan_gather(scales, top_k, (num_rows,), zero_padding),
    )


def permute_rows(
    hidden_states: Any,
    topk_ids: Any,
    num_experts: int,
    expert_map: Any,
    scales: Any,
    alignment: int | None,
    zero_padding: bool,
    out: Any = None,
) -> PermutedTokens:
    """Permute; rows go to `out`, if it is given, which only a call that is the kernels' has a use for."""
    plan = _plan_permute(
        *(layout(hidden_states), layout(topk_ids), num_experts, layout(expert_map)),
        *(layout(scales), alignment, zero_padding),
    )
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    options = {"scales": scales, "alignment": alignment, "zero_padding": zero_padding}
    if hidden_states.requires_grad and torch.is_grad_enabled():
        permute = functools.partial(
            permute_rows, topk_ids=topk_ids, num_experts=num_experts, expert_map=expert_map, **options
        )
        return PermutedTokens(*differentiable_permute(permute, hidden_states))
    if arrays.answered_by_reference(hidden_states):
        arguments = (hidden_states, topk_ids, num_experts, expert_map)
        return permute_by_reference(reference.moe_permute, *arguments, **options)
    offset, permuted_idx, inv_permuted_idx, counts = (arrays.empty(*indices) for indices in plan.indices)
    block_experts = None if plan.block_experts is None else arrays.empty(*plan.block_experts)
    m_indices = None if plan.m_indices is None else arrays.empty(*plan.m_indices)
    sorting.sort(
        *(plan.sort, topk_ids, permuted_idx, expert_map),
        position_of_slot=inv_permuted_idx,
        counts=counts,
        offset=offset,
        expert_ids=block_experts,
    )
    named = None if m_indices is None else block_experts  # one row to a block is named already
    rows = gather(plan.rows, hidden_states, permuted_idx, inv_permuted_idx, named, m_indices, out=out)
    moved = None if plan.scales is None else gather(plan.scales, scales, permuted_idx, inv_permuted_idx)
    experts = block_experts if m_indices is None else m_indices
    return new_tuple(PermutedTokens, (rows, offset, permuted_idx, inv_permuted_idx, counts, experts, moved))


@planned
def plan_unpermute(
    permuted: Layout, topk_weights: Layout, inv_permuted_idx: Layout, routed_scaling_factor: float, out_dtype: Any
) -> tuple[arrays.Contiguous, Launch]:
    checks.array("permuted", permuted, checks.FLOATS, (2,), rows=True)
    like = ("permuted", permuted)
    checks.array("topk_weights", topk_weights, checks.FLOATS, (2,), like=like)
    checks.array("inv_permuted_idx", inv_permuted_idx, (torch.int32,), (1, 2), like=like)
    shape, flat = tuple(topk_weights.shape), len(inv_permuted_idx.shape) == 1
    rule = "(num_tokens * top_k,)" if flat else "that of `topk_weights`"
    checks.shape("inv_permuted_idx", inv_permuted_idx, (shape[0] * shape[1],) if flat else shape, rule)
    checks.number("routed_scaling_factor", routed_scaling_factor)
    dtype = permuted.dtype if out_dtype is None else checks.dtype("out_dtype", out_dtype, checks.FLOATS)
    checks.fits_int32("permuted", permuted.shape[0], "the number of rows")
    num_tokens, top_k = shape
    numbers = (num_tokens, top_k, topk_weights, inv_permuted_idx, True, float(routed_scaling_factor), dtype)
    return arrays.contiguous(dtype, num_tokens, permuted.shape[1]), plan_combine(permuted, *numbers)


def _unpermute(
    permuted: Any, topk_weights: Any, inv_permuted_idx: Any, routed_scaling_factor: float, out_dtype: Any
) -> Any:
    options = {"routed_scaling_factor": routed_scaling_factor, "out_dtype": out_dtype}
    result, combine = plan_unpermute(layout(permuted), layout(topk_weights), layout(inv_permuted_idx), **options)
    if (permuted.requires_grad or topk_weights.requires_grad) and torch.is_grad_enabled():
        unpermute = functools.partial(_unpermute, inv_permuted_idx=inv_permuted_idx, **options)
        return differentiable_unpermute(unpermute, permuted, topk_weights, inv_permuted_idx, routed_scaling_factor)
    if arrays.answered_by_reference(permuted):
        combined = arrays.by_reference(reference.moe_unpermute, permuted, topk_weights, inv_permuted_idx, **options)
        return combined.to(result.dtype)
    combined = arrays.empty(*result)
    combine(rows=permuted, topk_weights=topk_weights, places=inv_permuted_idx, combined=combined)
    return combined


@planned
def plan_sum(
    hidden_states: Layout, topk_ids: Layout | None, routed_scaling_factor: float, out_dtype: Any
) -> tuple[arrays.Contiguous, Launch]:
    checks.array("hidden_states", hidden_states, checks.FLOATS, (3,), rows=True)
    num_tokens, top_k, hidden = hidden_states.shape
    if topk_ids is not None:
        checks.array("topk_ids", topk_ids, checks.IDS, (2,), like=("hidden_states", hidden_states))
        checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    checks.number("routed_scaling_factor", routed_scaling_factor)
    dtype = hidden_states.dtype if out_dtype is None else checks.dtype("out_dtype", out_dtype, checks.FLOATS)
    checks.fits_int32("hidden_states", num_tokens * top_k, "the number of slots")
    numbers = (num_tokens, top_k, None, topk_ids, False, float(routed_scaling_factor), dtype)
    return arrays.contiguous(dtype, num_tokens, hidden), plan_combine(hidden_states, *numbers)


def _sum(hidden_states: Any, topk_ids: Any, routed_scaling_factor: float, out_dtype: Any) -> Any:
    options = {"routed_scaling_factor": routed_scaling_factor, "out_dtype": out_dtype}
    result, combine = plan_sum(layout(hidden_states), layout(topk_ids), **options)
    if hidden_states.requires_grad and torch.is_grad_enabled():
        add = functools.partial(_sum, topk_ids=topk_ids, **options)
        return differentiable_sum(add, hidden_states, topk_ids, routed_scaling_factor)
    if arrays.answered_by_reference(hidden_states):
        return arrays.by_reference(reference.moe_sum, hidden_states, topk_ids, **options).to(result.dtype)
    combined = arrays.empty(*result)
    combine(rows=hidden_states, places=topk_ids, combined=combined)
    return combined


@arrays.public
def moe_permute(
    hidden_states: Any,
    topk_ids: Any,
    num_experts: int,
    expert_map: Any = None,
    *,
    scales: Any = None,
    alignment: int | None = None,
    zero_padding: bool = True,
) -> PermutedTokens:
    """Copy each token's row once for each of its experts, in expert order.

    Parameters
    ----------
    hidden_states : array of float32, float16, bfloat16, uint8, int8 or float8, shape [num_tokens, hidden]
        Rows may be strided.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts that ids range over.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert, -1 for an expert of another rank, whose slots are skipped.
    scales : array of any of these dtypes or int32, shape [num_tokens] or [num_tokens, groups], optional
        What quantised rows are scaled by: moved along with them.
    alignment : int, optional
        Rows of an expert begin at a multiple of it, as grouped GEMMs want, and `m_indices` names them.
    zero_padding : bool
        Write zeros to rows without a slot. Otherwise they hold what was in memory.

    Returns
    -------
    PermutedTokens
        permuted_hidden_states : [num_rows, hidden] in the dtype of `hidden_states`; num_rows is num_tokens * top_k,
        and with an alignment as much as any routing can need, see `align_sizes` with `pad_sorted_ids`.
        expert_first_token_offset : int64 [num_experts + 1]; rows of expert e begin at ``offset[e]``, and none is in use
        from ``offset[-1]`` on. permuted_idx : int32 [num_rows], the slot of each row, num_slots where there is none.
        inv_permuted_idx : int32 [num_tokens, top_k], the row of each slot, -1 for skipped slots. counts : int32
        [num_experts], the slots of each expert. m_indices : int32 [num_rows], the expert of each row, -1 where there
        is no slot; None without an alignment. permuted_scales : [num_rows] or [num_rows, groups], None without scales.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, more slots or rows than int32 counts.

    Notes
    -----
    Stable: rows of one expert ascend by slot. Rows are addressed in 64 bits. Runs on the caller's current stream
    without synchronising and captures into CUDA graphs: a sort, and a copy that reads every row once, 16 bytes at a
    time where width, distance and address of the rows allow it. Allocates the results, and scratch as
    `count_tokens_per_expert` does.
    Rows have a gradient by `hidden_states`: the sum of the gradients of a token's rows, in slot order.

    Examples
    --------
    >>> import numpy as np
    >>> permuted = moe_permute(np.array([[1], [2]], np.float32), np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> permuted.permuted_hidden_states.ravel()
    array([1., 2., 1., 0.], dtype=float32)
    >>> permuted.inv_permuted_idx
    array([[ 2,  0],
           [-1,  1]], dtype=int32)
    """
    return permute_rows(hidden_states, topk_ids, num_experts, expert_map, scales, alignment, zero_padding)


@arrays.public
def moe_unpermute(
    permuted: Any,
    topk_weights: Any,
    inv_permuted_idx: Any,
    *,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = None,
) -> Any:
    """Sum each token's rows, weighted.

    Parameters
    ----------
    permuted : array of float32, float16 or bfloat16, shape [num_rows, hidden]
        Rows in expert order, or batches of `moe_permute_masked` flattened to rows; rows may be strided.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        Contiguous.
    inv_permuted_idx : array of int32, shape [num_tokens, top_k] or [num_tokens * top_k]
        The row of each slot, as `src2dst` of `moe_reorder` has it too. A slot whose index is outside ``[0, num_rows)``
        adds nothing.
    routed_scaling_factor : float
        What sums are multiplied by.
    out_dtype : torch dtype or its name, optional
        float32, float16 or bfloat16; that of `permuted` unless given.

    Returns
    -------
    array of `out_dtype`, shape [num_tokens, hidden]
        ``sum over k of topk_weights[t, k] * permuted[inv_permuted_idx[t, k]]``, times the factor.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices.

    Notes
    -----
    Summed in float32 in slot order, without atomics, and rounded once: the same bits at every run. Rows are
    addressed in 64 bits. One launch on the caller's current stream; allocates the result only.
    The result has gradients by the rows and by the weights, the latter summed in float32; for these each row must be
    that of one slot at most, as `moe_permute` makes them.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[10], [20], [30]], np.float32)
    >>> weights = np.array([[0.5, 0.5], [1.0, 0.25]], np.float32)
    >>> moe_unpermute(rows, weights, np.array([[2, 0], [-1, 1]], np.int32))
    array([[20.],
           [ 5.]], dtype=float32)
    """
    return _unpermute(permuted, topk_weights, inv_permuted_idx, routed_scaling_factor, out_dtype)


@arrays.public
def moe_sum(
    hidden_states: Any, topk_ids: Any = None, *, routed_scaling_factor: float = 1.0, out_dtype: Any = None
) -> Any:
    """Sum each token's rows.

    Parameters
    ----------
    hidden_states : array of float32, float16 or bfloat16, shape [num_tokens, top_k, hidden]
        Contiguous in its last dimension; tokens and slots may be strided.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k], optional
        Slots with an id below 0 add nothing, whatever their rows hold.
    routed_scaling_factor : float
        What sums are multiplied by.
    out_dtype : torch dtype or its name, optional
        float32, float16 or bfloat16; that of `hidden_states` unless given.

    Returns
    -------
    array of `out_dtype`, shape [num_tokens, hidden]

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices.

    Notes
    -----
    Summed in float32 in slot order and rounded once: the same bits at every run. One launch on the caller's current
    stream; allocates the result only. The result has a gradient by `hidden_states`.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[[1], [2]], [[3], [4]]], np.float32)
    >>> moe_sum(rows, np.array([[5, 0], [-1, 3]]), routed_scaling_factor=10.0)
    array([[30.],
           [40.]], dtype=float32)
    """
    return _sum(hidden_states, topk_ids, routed_scaling_factor, out_dtype)
