"""Move rows into expert order, and combine them again: `moe_permute`, `moe_unpermute`, `moe_sum`.

The counting sort of `numba_moe.ops.sort` finds the row of each slot, and the kernels of `move_rows` move the rows.
`layouts` has the ops with one batch per expert, and `row_gradients` has the gradients.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.ops.permute.move_rows import Gather, check_rows, gather, permute_by_reference, plan_combine, plan_gather
from numba_moe.ops.permute.row_gradients import permute_backward, unpermute_backward
from numba_moe.ops.sort import counting_sort
from numba_moe.reference import permute as reference
from numba_moe.reference.align import max_sorted_slots
from numba_moe.reference.permute import PermutedTokens
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.op import op
from numba_moe.sizes import num_elements, sorted_slots


@op(reference.moe_permute, absent={"m_indices": "alignment", "permuted_scales": "scales"})
def moe_permute(
    hidden_states: Array,
    topk_ids: Array,
    num_experts: int,
    expert_map: Array | None = None,
    *,
    scales: Array | None = None,
    alignment: int | None = None,
    zero_padding: bool = True,
    out: PermutedTokens | None = None,
) -> PermutedTokens:
    """Copy each token's row once for each of its experts, in expert order.

    Parameters
    ----------
    hidden_states : array of float32, float16, bfloat16, uint8, int8 or float8, shape [num_tokens, hidden]
        Rows may be strided.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert, -1 for an expert of another rank, whose slots are skipped.
    scales : array of any of these dtypes or int32, shape [num_tokens] or [num_tokens, groups], optional
        Scales of quantised rows; they move together with the rows.
    alignment : int, optional
        The rows of each expert begin at a multiple of this, as grouped GEMMs require, and `m_indices` gives the expert
        of each row.
    zero_padding : bool
        Write zeros to rows without a slot. Otherwise these rows are not written.
    out : tuple of arrays as in the result, None where the result has None, optional
        Written: memory for the result.

    Returns
    -------
    PermutedTokens
        permuted_hidden_states : [num_rows, hidden] in the dtype of `hidden_states`. num_rows is ``num_tokens * top_k``,
        and with an alignment the length of `sorted_token_ids` that `align_sizes` returns with `pad_sorted_ids`.
        expert_first_token_offset : int64 [num_experts + 1]; the rows of expert e begin at ``offset[e]``, and rows from
        ``offset[-1]`` on are unused. permuted_idx : int32 [num_rows], the slot of each row, num_slots for a row without
        a slot. inv_permuted_idx : int32 [num_tokens, top_k], the row of each slot, -1 for skipped slots. counts : int32
        [num_experts], the number of slots of each expert. m_indices : int32 [num_rows], the expert of each row, -1 for
        a row without a slot; None without an alignment. permuted_scales : [num_rows] or [num_rows, groups], None
        without scales.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, or more slots or rows than int32 can count.

    Notes
    -----
    The order is stable: the rows of an expert ascend by slot. Row addresses have 64 bits. The op runs on the caller's
    current stream without synchronising, and CUDA graphs can capture it. It is a sort, and a copy that reads every row
    once, 16 bytes at a time if the width, stride and address of the rows allow it. It allocates the results, and the
    scratch of the sort. The gradient by `hidden_states` is the sum of the gradients of each token's rows, in slot
    order.

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


@moe_permute.outputs
def _(given: Any) -> PermutedTokens:
    rows, scales = given.hidden_states, given.scales
    num_rows = sorted_slots(num_elements(given.topk_ids), given.alignment or 1, given.num_experts, pad_sorted_ids=True)
    return PermutedTokens(
        contiguous(rows.dtype, num_rows, rows.shape[1]),
        contiguous(torch.int64, given.num_experts + 1),
        contiguous(torch.int32, num_rows),
        contiguous(torch.int32, *given.topk_ids.shape),
        contiguous(torch.int32, given.num_experts),
        None if given.alignment is None else contiguous(torch.int32, num_rows),
        None if scales is None else contiguous(scales.dtype, num_rows, *scales.shape[1:]),
    )


class PermutePlan(NamedTuple):
    """The sort, the copies of rows and scales, and memory for the experts of blocks where rows need their own."""

    sort: counting_sort.SortPlan
    rows: Gather
    scales: Gather | None
    block_experts: Contiguous | None


@moe_permute.plan
def _(given: Any) -> PermutePlan:
    num_experts, top_k = check_rows(given)
    named = given.alignment is not None
    block_size = checks.integer("alignment", given.alignment, 1) if named else 1
    num_rows = max_sorted_slots(given.topk_ids.shape.numel(), block_size, num_experts, pad_sorted_ids=True)
    checks.fits_int32("topk_ids", num_rows, "the number of rows")
    written = ("position_of_slot", "counts", "offset", *(("expert_ids",) if named else ()))
    numbers = (num_experts, num_rows, block_size)
    by_block = named and block_size > 1
    return PermutePlan(
        counting_sort.plan_sort(given.topk_ids, *numbers, expert_map=given.expert_map, written=written),
        plan_gather(given.hidden_states, top_k, num_rows, given.zero_padding, alignment=block_size, named=by_block),
        given.scales and plan_gather(given.scales, top_k, num_rows, given.zero_padding),
        contiguous(torch.int32, num_rows // block_size) if by_block else None,
    )


@moe_permute.validate
def _(given: Any) -> None:
    checks.ids(given.topk_ids, given.num_experts)


@moe_permute.on_cpu
def _(given: Any) -> PermutedTokens:
    found: PermutedTokens = permute_by_reference(reference.moe_permute, given)
    return found


@moe_permute.run
def _(plan: PermutePlan, given: Any, *memory: Any) -> None:
    rows, offset, permuted_idx, inv_permuted_idx, counts, m_indices, moved_scales = memory
    by_block = plan.block_experts is not None
    block_experts = arrays.empty(*plan.block_experts) if plan.block_experts is not None else m_indices
    counting_sort.sort(
        *(plan.sort, given.topk_ids, permuted_idx, given.expert_map),
        position_of_slot=inv_permuted_idx,
        counts=counts,
        offset=offset,
        expert_ids=block_experts,
    )
    names = (block_experts, m_indices) if by_block else (None, None)  # else `m_indices` is written by the sort
    gather(plan.rows, given.hidden_states, rows, permuted_idx, inv_permuted_idx, *names)
    if plan.scales is not None:
        gather(plan.scales, given.scales, moved_scales, permuted_idx, inv_permuted_idx)


@moe_permute.saves
def _(ctx: Any, _given: Any, *found: Any) -> None:
    ctx.save_for_backward(PermutedTokens(*found).inv_permuted_idx)


@moe_permute.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    [inv_permuted_idx] = ctx.saved_tensors
    return {"hidden_states": permute_backward(inv_permuted_idx, grad)}


@op(reference.moe_unpermute)
def moe_unpermute(
    permuted: Array,
    topk_weights: Array,
    inv_permuted_idx: Array,
    *,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = None,
    out: Array | None = None,
) -> Any:
    """Sum the weighted rows of each token.

    Parameters
    ----------
    permuted : array of float32, float16 or bfloat16, shape [num_rows, hidden]
        Rows in expert order, or the batches of `moe_permute_masked` flattened to rows. Rows may be strided.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        Contiguous.
    inv_permuted_idx : array of int32, shape [num_tokens, top_k] or [num_tokens * top_k]
        The row of each slot; `src2dst` of `moe_reorder` has the same form. A slot whose index is outside ``[0,
        num_rows)`` adds nothing.
    routed_scaling_factor : float
        Factor of the sums.
    out_dtype : torch dtype or its name, optional
        Dtype of the result: float32, float16 or bfloat16. By default the dtype of `permuted`.
    out : array of `out_dtype`, shape [num_tokens, hidden], optional
        Written: memory for the result.

    Returns
    -------
    array of `out_dtype`, shape [num_tokens, hidden]
        ``sum over k of topk_weights[t, k] * permuted[inv_permuted_idx[t, k]]``, times the factor.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, or mixed devices.

    Notes
    -----
    The op sums in float32 in slot order, without atomics, and rounds once, so every run gives the same bits. Row
    addresses have 64 bits. The op is one launch on the caller's current stream. It allocates the result only. The
    result has gradients by the rows and by the weights, and those of the weights are sums in float32. For the gradients
    each row must belong to at most one slot, as `moe_permute` makes them.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[10], [20], [30]], np.float32)
    >>> weights = np.array([[0.5, 0.5], [1.0, 0.25]], np.float32)
    >>> moe_unpermute(rows, weights, np.array([[2, 0], [-1, 1]], np.int32))
    array([[20.],
           [ 5.]], dtype=float32)
    """


@moe_unpermute.outputs
def _(given: Any) -> Contiguous:
    dtype = dtype_of(given.permuted, given.out_dtype)
    return contiguous(dtype, given.topk_weights.shape[0], given.permuted.shape[1])


def dtype_of(rows: Any, out_dtype: Any) -> torch.dtype:
    """Return the dtype of combined rows: `out_dtype`, or by default the dtype of the rows."""
    if out_dtype is None or isinstance(out_dtype, torch.dtype):
        found: torch.dtype = out_dtype or rows.dtype
        return found
    return checks.dtype("out_dtype", out_dtype, checks.FLOATS)


@moe_unpermute.plan
def _(given: Any) -> Launch:
    permuted, topk_weights, inv_permuted_idx = given.permuted, given.topk_weights, given.inv_permuted_idx
    checks.array("permuted", permuted, checks.FLOATS, (2,), rows=True)
    like = ("permuted", permuted)
    checks.array("topk_weights", topk_weights, checks.FLOATS, (2,), like=like)
    checks.array("inv_permuted_idx", inv_permuted_idx, (torch.int32,), (1, 2), like=like)
    num_tokens, top_k = topk_weights.shape
    if len(inv_permuted_idx.shape) == 1:
        checks.shape("inv_permuted_idx", inv_permuted_idx, (num_tokens * top_k,), "(num_tokens * top_k,)")
    else:
        checks.shape("inv_permuted_idx", inv_permuted_idx, (num_tokens, top_k), "`topk_weights`.shape")
    dtype = _check_combination(given, permuted)
    checks.fits_int32("permuted", permuted.shape[0], "the number of rows")
    slots = (num_tokens, top_k, topk_weights, inv_permuted_idx, True)
    return plan_combine(permuted, *slots, float(given.routed_scaling_factor), dtype)


def _check_combination(given: Any, rows: Any) -> torch.dtype:
    """Check the arguments that both combining ops take; return the dtype of the result."""
    checks.number("routed_scaling_factor", given.routed_scaling_factor)
    if given.out_dtype is not None:
        return checks.dtype("out_dtype", given.out_dtype, checks.FLOATS)
    dtype: torch.dtype = rows.dtype
    return dtype


@moe_unpermute.run
def _(combine: Launch, given: Any, combined: torch.Tensor) -> None:
    index, weights = given.inv_permuted_idx, given.topk_weights
    combine(rows=given.permuted, topk_weights=weights, places=index, combined=combined)


@moe_unpermute.saves
def _(ctx: Any, given: Any, _combined: Any) -> None:
    ctx.save_for_backward(given.permuted, given.topk_weights, given.inv_permuted_idx)
    ctx.factor = given.routed_scaling_factor


@moe_unpermute.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    permuted, topk_weights, inv_permuted_idx = ctx.saved_tensors
    by_rows, by_weights = ctx.needs_input_grad[:2]
    found = unpermute_backward(permuted, topk_weights, inv_permuted_idx, grad, ctx.factor, by_rows, by_weights)
    return {"permuted": found[0] if by_rows else None, "topk_weights": found[1] if by_weights else None}


@op(reference.moe_sum, like=moe_unpermute)
def moe_sum(
    hidden_states: Array,
    topk_ids: Array | None = None,
    *,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = None,
    out: Array | None = None,
) -> Any:
    """Sum the rows of each token.

    Parameters
    ----------
    hidden_states : array of float32, float16 or bfloat16, shape [num_tokens, top_k, hidden]
        Contiguous in its last dimension; tokens and slots may be strided.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k], optional
        Experts of the slots. A slot with an id below 0 adds nothing, whatever its row holds.
    out_dtype : torch dtype or its name, optional
        Dtype of the result: float32, float16 or bfloat16. By default the dtype of `hidden_states`.

    Returns
    -------
    array of `out_dtype`, shape [num_tokens, hidden]

    Notes
    -----
    The op sums in float32 in slot order and rounds once, so every run gives the same bits. It is one launch on the
    caller's current stream. It allocates the result only. The result has a gradient by `hidden_states`.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[[1], [2]], [[3], [4]]], np.float32)
    >>> moe_sum(rows, np.array([[5, 0], [-1, 3]]), routed_scaling_factor=10.0)
    array([[30.],
           [40.]], dtype=float32)
    """


@moe_sum.outputs
def _(given: Any) -> Contiguous:
    num_tokens, _, hidden = given.hidden_states.shape
    return contiguous(dtype_of(given.hidden_states, given.out_dtype), num_tokens, hidden)


@moe_sum.plan
def _(given: Any) -> Launch:
    rows, topk_ids = given.hidden_states, given.topk_ids
    checks.array("hidden_states", rows, checks.FLOATS, (3,), rows=True)
    num_tokens, top_k, _ = rows.shape
    if topk_ids is not None:
        checks.array("topk_ids", topk_ids, checks.IDS, (2,), like=("hidden_states", rows))
        checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    dtype = _check_combination(given, rows)
    checks.fits_int32("hidden_states", num_tokens * top_k, "the number of slots")
    numbers = (num_tokens, top_k, None, topk_ids, False)
    return plan_combine(rows, *numbers, float(given.routed_scaling_factor), dtype)


@moe_sum.run
def _(combine: Launch, given: Any, combined: torch.Tensor) -> None:
    combine(rows=given.hidden_states, places=given.topk_ids, combined=combined)


@moe_sum.saves
def _(ctx: Any, given: Any, _combined: Any) -> None:
    ctx.save_for_backward(*(() if given.topk_ids is None else (given.topk_ids,)))
    ctx.factor, ctx.shape, ctx.dtype = given.routed_scaling_factor, given.hidden_states.shape, given.hidden_states.dtype


@moe_sum.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    grad = (grad * ctx.factor).to(ctx.dtype)[:, None].expand(ctx.shape)
    for topk_ids in ctx.saved_tensors:
        grad = grad.masked_fill((topk_ids < 0)[..., None], 0)
    return {"hidden_states": grad}
