"""Gradients of permutation and combination, for torch's autograd.

The gradient of a permuted token is the sum of the gradients of its rows, which is a combination without weights. The
gradients of a combination are, for slot s of token t, row r and the factor f of the sums,

    grad_row[r] = f * weight[s] * grad[t]        grad_weight[s] = f * dot(row[r], grad[t])

and 0 for a row without a slot. Warp n serves slot n, and row n if that row has no slot. All sums are in float32 in a
fixed order.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import (
    add_scaled,
    dot,
    floats_of,
    load_float,
    load_like,
    present,
    store_float,
    store_floats,
    wait_for_earlier,
)
from numba_moe.device.primitives import WARP, warp_sum
from numba_moe.device.types import (
    LIKE,
    Float32,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFloat32Array,
    OptionalInt32Array,
)
from numba_moe.ops.permute.move_rows import Gather, gather, plan_combine, plan_gather, stride_of
from numba_moe.reference import permute as reference
from numba_moe.runtime import arrays
from numba_moe.runtime.arrays import Array, Contiguous, by_reference, contiguous
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.op import op

THREADS = 256
WARPS_IN_BLOCK = 4
# 12 of these blocks must fit on a multiprocessor, so that the compiler issues loads early, as in `move_rows`. H200: the
# gradients of 16,384 tokens with eight rows of 4 KiB each take 300 us; without this they take 326 us.
DIFFERENTIATE_BOUNDS = (WARP * WARPS_IN_BLOCK, 12)


class Inverse(NamedTuple):
    """The row of each slot."""

    inv_permuted_idx: Int32Array  # [num_slots]; outside [0, num_rows) for a slot without a row
    num_slots: Int32


class ByRow(NamedTuple):
    """The slot of each row that has one."""

    permuted_idx: Int32Array  # [num_rows]; -1 before the launch
    num_rows: Int32


@cuda.jit
def invert_index(slots: Inverse, by_row: ByRow):
    """Write the slot of each row that has one; a thread takes one slot."""
    wait_for_earlier()
    slot = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    if slot < slots.num_slots:
        row = slots.inv_permuted_idx[slot]
        if row >= 0 and row < by_row.num_rows:
            by_row.permuted_idx[row] = slot


class Forward(NamedTuple):
    """The rows that were combined."""

    rows: FloatArray  # [num_rows, hidden], row_stride apart
    num_rows: Int32
    hidden: Int32
    row_stride: Int64
    lanes: Int32  # elements that a thread loads at a time: 16 bytes, or one element


class Weighted(NamedTuple):
    """The row and the weight of each slot, and the factor of the sums."""

    topk_weights: FloatArray  # [num_slots]
    inv_permuted_idx: Int32Array  # [num_slots]; outside [0, num_rows) for a slot without a row
    num_slots: Int32
    top_k: Int32
    factor: Float32


class Slopes(NamedTuple):
    """The gradient by the result."""

    grad: FloatArray  # [num_tokens, hidden], grad_stride apart
    grad_stride: Int64


class Gradients(NamedTuple):
    """The requested gradients, by rows and by weights."""

    permuted_idx: OptionalInt32Array  # [num_rows], for grad_rows; -1 for a row without a slot
    grad_rows: Annotated[Any, LIKE, "rows", None]  # [num_rows, hidden]
    grad_weights: OptionalFloat32Array  # [num_slots]


@cuda.jit(launch_bounds=DIFFERENTIATE_BOUNDS)
def differentiate_rows(forward: Forward, slots: Weighted, slopes: Slopes, gradients: Gradients):
    """Write gradients; warp n takes slot n and row n, and a thread takes `lanes` columns at a time."""
    wait_for_earlier()
    turn = int64(cuda.blockIdx.x) * (cuda.blockDim.x >> 5) + (cuda.threadIdx.x >> 5)
    row = int64(-1)
    if turn < slots.num_slots:
        row = int64(slots.inv_permuted_idx[turn])
    zeros = floats_of(forward.rows, (int32(0), int32(0), int32(0), int32(0)))
    first = int32(cuda.laneid * forward.lanes)
    step = int32(WARP * forward.lanes)
    total = float32(0.0)
    if row >= 0 and row < forward.num_rows:
        weight = float32(slots.factor) * load_float(slots.topk_weights, turn)
        source = row * forward.row_stride
        of_token = (turn // slots.top_k) * slopes.grad_stride
        column = first
        while column < forward.hidden:
            if forward.lanes == 1:
                slope = load_float(slopes.grad, of_token + column)
                if present(gradients.grad_weights):
                    total += load_float(forward.rows, source + column) * slope
                if present(gradients.grad_rows):
                    store_float(gradients.grad_rows, row * forward.hidden + column, weight * slope)
            else:
                eight = load_like(slopes.grad, of_token + column, forward.rows)
                if present(gradients.grad_weights):
                    total += dot(load_like(forward.rows, source + column, forward.rows), eight)
                if present(gradients.grad_rows):
                    store_floats(gradients.grad_rows, row * forward.hidden + column, add_scaled(zeros, weight, eight))
            column = int32(column + step)
    if present(gradients.grad_weights):
        total = warp_sum(total)
        if cuda.laneid == 0 and turn < slots.num_slots:
            gradients.grad_weights[turn] = float32(slots.factor) * total
    if present(gradients.grad_rows) and turn < forward.num_rows and gradients.permuted_idx[turn] < 0:
        column = first
        while column < forward.hidden:
            if forward.lanes == 1:
                store_float(gradients.grad_rows, turn * forward.hidden + column, float32(0.0))
            else:
                store_floats(gradients.grad_rows, turn * forward.hidden + column, zeros)
            column = int32(column + step)


class UnpermuteGradients(NamedTuple):
    """Gradients by rows and by weights; None for one that was not requested."""

    rows: Any
    weights: Any


@op(is_gradient=True)
def unpermute_backward(
    permuted: Array,
    topk_weights: Array,
    inv_permuted_idx: Array,
    grad: Array,
    routed_scaling_factor: float,
    by_rows: bool,
    by_weights: bool,
) -> UnpermuteGradients:
    """Return the requested gradients, by the rows and by the weights, given the gradient by the result.

    Parameters
    ----------
    permuted : array of float32, float16 or bfloat16, shape [num_rows, hidden]
        The argument of `moe_unpermute`.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        The argument of `moe_unpermute`.
    inv_permuted_idx : array of int32, shape [num_tokens, top_k]
        The argument of `moe_unpermute`. Each row must belong to at most one slot.
    grad : array of float32, float16 or bfloat16, shape [num_tokens, hidden]
        The gradient by the result.
    routed_scaling_factor : float
        Factor of the sums.
    by_rows, by_weights : bool
        Whether to compute the gradient by the rows, and the gradient by the weights.

    Returns
    -------
    UnpermuteGradients
        rows : shape and dtype of `permuted`, or None. weights : shape and dtype of `topk_weights`, or None.
    """


@unpermute_backward.outputs
def _(given: Any) -> UnpermuteGradients:
    permuted, topk_weights = given.permuted, given.topk_weights
    return UnpermuteGradients(
        contiguous(permuted.dtype, *permuted.shape) if given.by_rows else None,
        contiguous(topk_weights.dtype, *topk_weights.shape) if given.by_weights else None,
    )


class BackwardPlan(NamedTuple):
    """The scratch, and the launches."""

    permuted_idx: Contiguous
    grad_weights: Contiguous | None
    invert: Launch
    differentiate: Launch


@unpermute_backward.plan
def _(given: Any) -> BackwardPlan:
    permuted, topk_weights, grad = given.permuted, given.topk_weights, given.grad
    num_rows, hidden = permuted.shape
    num_slots, top_k = topk_weights.shape.numel(), topk_weights.shape[1]
    by_row = grad.strides is None or grad.strides[-1] == 1
    strides = stride_of(permuted), stride_of(grad) if by_row else hidden
    lanes = 16 // permuted.dtype.itemsize
    if permuted.address or (by_row and grad.address) or any(number % lanes for number in (hidden, *strides)):
        lanes = 1
    threads, most = block_threads(THREADS), max(num_slots, num_rows)
    gradients = Gradients(
        permuted_idx=torch.int32 if given.by_rows else None,
        grad_rows=permuted.dtype if given.by_rows else None,
        grad_weights=torch.float32 if given.by_weights else None,
    )
    inverse = Inverse(given.inv_permuted_idx, num_slots)
    blocks = -(-num_slots // threads)
    rounded = given.by_weights and topk_weights.dtype != torch.float32
    return BackwardPlan(
        contiguous(torch.int32, num_rows),
        contiguous(torch.float32, *topk_weights.shape) if rounded else None,
        Launch(invert_index, permuted.device, blocks, threads, inverse, ByRow(torch.int32, num_rows)),
        Launch(
            *(differentiate_rows, permuted.device, *warps(most, WARPS_IN_BLOCK)),
            Forward(permuted, num_rows, hidden, row_stride=strides[0], lanes=lanes),
            Weighted(topk_weights, given.inv_permuted_idx, num_slots, top_k, float(given.routed_scaling_factor)),
            Slopes(grad, strides[1]),
            gradients,
        ),
    )


@unpermute_backward.on_cpu
def _(given: Any) -> UnpermuteGradients:
    arguments = (given.permuted, given.topk_weights, given.inv_permuted_idx, given.grad)
    rows, weights = by_reference(reference.unpermute_backward, *arguments, given.routed_scaling_factor)
    return UnpermuteGradients(rows if given.by_rows else None, weights if given.by_weights else None)


@unpermute_backward.run
def _(plan: BackwardPlan, given: Any, grad_rows: torch.Tensor | None, grad_weights: torch.Tensor | None) -> None:
    permuted_idx = None
    if grad_rows is not None:
        permuted_idx = arrays.empty(*plan.permuted_idx).fill_(-1)
        plan.invert(inv_permuted_idx=given.inv_permuted_idx, permuted_idx=permuted_idx)
    in_float32 = grad_weights if plan.grad_weights is None else arrays.empty(*plan.grad_weights)
    plan.differentiate(
        rows=given.permuted,
        topk_weights=given.topk_weights,
        inv_permuted_idx=given.inv_permuted_idx,
        grad=in_rows(given.grad),
        permuted_idx=permuted_idx,
        grad_rows=grad_rows,
        grad_weights=in_float32,
    )
    if grad_weights is not None and in_float32 is not None and in_float32 is not grad_weights:
        grad_weights.copy_(in_float32)


def in_rows(grad: torch.Tensor) -> torch.Tensor:
    """Return a gradient with contiguous rows."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


@op(is_gradient=True)
def permute_backward(inv_permuted_idx: Array, grad: Array) -> Any:
    """Return the gradient by the tokens' rows, given the gradient by the permuted rows or batches.

    Parameters
    ----------
    inv_permuted_idx : array of int32, shape [num_tokens, top_k]
        The row of each slot, as `moe_permute` or `moe_permute_masked` returned it.
    grad : array of float32, float16 or bfloat16, shape [num_rows, hidden] or [num_experts, max_m, hidden]
        The gradient by the permuted rows.

    Returns
    -------
    array of the dtype of `grad`, shape [num_tokens, hidden]
    """


@permute_backward.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.grad.dtype, given.inv_permuted_idx.shape[0], given.grad.shape[-1])


@permute_backward.plan
def _(given: Any) -> Launch:
    grad, (num_tokens, top_k) = given.grad, given.inv_permuted_idx.shape
    whole = grad.strides is None or (len(grad.shape) == 2 and grad.strides[-1] == 1)
    rows = grad if whole else grad._replace(strides=None, address=0)
    if len(grad.shape) == 3:
        rows = rows._replace(shape=torch.Size((grad.shape[0] * grad.shape[1], grad.shape[2])))
    return plan_combine(rows, num_tokens, top_k, None, given.inv_permuted_idx, True, 1.0, grad.dtype)


def _rows_of(grad: torch.Tensor) -> torch.Tensor:
    return in_rows(grad) if grad.dim() == 2 else grad.contiguous().view(-1, grad.shape[-1])


@permute_backward.on_cpu
def _(given: Any) -> torch.Tensor:
    ones = torch.ones(given.inv_permuted_idx.shape, dtype=torch.float32, device=given.grad.device)
    found: torch.Tensor = by_reference(reference.moe_unpermute, _rows_of(given.grad), ones, given.inv_permuted_idx)
    return found


@permute_backward.run
def _(combine: Launch, given: Any, found: torch.Tensor) -> None:
    combine(rows=_rows_of(given.grad), places=given.inv_permuted_idx, combined=found)


@op(is_gradient=True)
def spread_rows(rows: Array, inv_permuted_idx: Array) -> Any:
    """Copy the row of each token to the rows of its slots, as `moe_permute` did; others are undefined.

    Parameters
    ----------
    rows : array of float32, float16 or bfloat16, shape [num_tokens, hidden]
        A row for each token.
    inv_permuted_idx : array of int32, shape [num_tokens, top_k]
        The row of each slot, as `moe_permute` returned it.

    Returns
    -------
    array of the dtype of `rows`, shape [num_tokens * top_k, hidden]
    """


@spread_rows.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.rows.dtype, given.inv_permuted_idx.shape.numel(), given.rows.shape[1])


@spread_rows.plan
def _(given: Any) -> Gather:
    rows = given.rows
    if rows.strides is not None and rows.strides[-1] != 1:
        rows = rows._replace(strides=None, address=0)
    num_slots = given.inv_permuted_idx.shape.numel()
    return plan_gather(rows, given.inv_permuted_idx.shape[1], num_slots, zero_padding=False)


@spread_rows.on_cpu
def _(given: Any) -> torch.Tensor:
    found: torch.Tensor = by_reference(reference.spread_rows, in_rows(given.rows), given.inv_permuted_idx)
    return found


@spread_rows.run
def _(plan: Gather, given: Any, found: torch.Tensor) -> None:
    places = given.inv_permuted_idx
    gather(plan, in_rows(given.rows), found, places, places)  # which slot a row has matters to padding alone
