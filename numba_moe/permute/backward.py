"""Gradients of permutation and combination, for torch's autograd.

What copies a token's row has the sum of the rows' gradients, which is the combination without weights. What combines
rows has, for slot s of token t, row r and the factor f of the whole,

    grad_row[r] = f * weight[s] * grad[t]        grad_weight[s] = f * dot(row[r], grad[t])

and 0 for a row without a slot. A warp serves a slot, and the row of its own number if that has no slot. All sums are
of float32 in a fixed order.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from numba_moe.permute.rows import plan_combine, stride_of
from numba_moe.reference import permute as reference
from numba_moe.runtime import arrays
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.parameters import (
    LIKE,
    Float32,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFloat32Array,
    OptionalInt32Array,
)
from numba_moe.runtime.plans import Layout, layout, planned
from numba_moe.runtime.primitives import (
    WARP,
    add_scaled,
    dot,
    floats_of,
    load_float,
    load_like,
    present,
    store_float,
    store_floats,
    warp_sum,
)

THREADS = 256
WARPS_IN_BLOCK = 4
# Of these blocks, 12 are to fit on a multiprocessor, for loads to be early as in `rows`: on an H200 the gradients of
# 16,384 tokens, eight rows of 4 KiB each, take 300 us instead of 326.
DIFFERENTIATE_BOUNDS = (WARP * WARPS_IN_BLOCK, 12)


@cuda.jit
def invert_index(inv_permuted_idx: Int32Array, permuted_idx: Int32Array, num_slots: Int32, num_rows: Int32):
    # inv_permuted_idx [num_slots], permuted_idx [num_rows] of -1: the slot of each row that has one
    slot = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    if slot < num_slots:
        row = inv_permuted_idx[slot]
        if row >= 0 and row < num_rows:
            permuted_idx[row] = slot


@cuda.jit(launch_bounds=DIFFERENTIATE_BOUNDS)
def differentiate_rows(
    rows: FloatArray,
    topk_weights: FloatArray,
    inv_permuted_idx: Int32Array,
    permuted_idx: OptionalInt32Array,
    grad: FloatArray,
    grad_rows: Annotated[Any, LIKE, "rows", None],
    grad_weights: OptionalFloat32Array,
    num_slots: Int32,
    top_k: Int32,
    num_rows: Int32,
    hidden: Int32,
    row_stride: Int64,
    grad_stride: Int64,
    factor: Float32,
    lanes: Int32,
):
    # rows [num_rows, hidden] and grad [num_tokens, hidden], row_stride and grad_stride apart; topk_weights,
    # inv_permuted_idx and grad_weights [num_slots]; permuted_idx [num_rows], -1 for no slot; grad_rows
    # [num_rows, hidden]; a thread takes `lanes` elements, which are 16 bytes of a row or one
    turn = int64(cuda.blockIdx.x) * (cuda.blockDim.x >> 5) + (cuda.threadIdx.x >> 5)
    row = int64(-1)
    if turn < num_slots:
        row = int64(inv_permuted_idx[turn])
    zeros = floats_of(rows, (int32(0), int32(0), int32(0), int32(0)))
    first = int32(cuda.laneid * lanes)
    step = int32(WARP * lanes)
    total = float32(0.0)
    if row >= 0 and row < num_rows:
        weight = float32(factor) * load_float(topk_weights, turn)
        source = row * row_stride
        of_token = (turn // top_k) * grad_stride
        column = first
        while column < hidden:
            if lanes == 1:
                slope = load_float(grad, of_token + column)
                if present(grad_weights):
                    total += load_float(rows, source + column) * slope
                if present(grad_rows):
                    store_float(grad_rows, row * hidden + column, weight * slope)
            else:
                slopes = load_like(grad, of_token + column, rows)
                if present(grad_weights):
                    total += dot(load_like(rows, source + column, rows), slopes)
                if present(grad_rows):
                    store_floats(grad_rows, row * hidden + column, add_scaled(zeros, weight, slopes))
            column = int32(column + step)
    if present(grad_weights):
        total = warp_sum(total)
        if cuda.laneid == 0 and turn < num_slots:
            grad_weights[turn] = float32(factor) * total
    if present(grad_rows) and turn < num_rows and permuted_idx[turn] < 0:
        column = first
        while column < hidden:
            if lanes == 1:
                store_float(grad_rows, turn * hidden + column, float32(0.0))
            else:
                store_floats(grad_rows, turn * hidden + column, zeros)
            column = int32(column + step)


class BackwardPlan(NamedTuple):
    """The gradients, the index of slots by row, and the launches that write them."""

    grad_rows: arrays.Contiguous
    grad_weights: arrays.Contiguous
    permuted_idx: arrays.Contiguous
    invert: Launch
    differentiate: Launch


@planned
def _plan_backward(
    permuted: Layout, topk_weights: Layout, inv_permuted_idx: Layout, grad: Layout, factor: float
) -> BackwardPlan:
    num_rows, hidden = permuted.shape
    num_slots, top_k = topk_weights.shape.numel(), topk_weights.shape[1]
    strides = stride_of(permuted), stride_of(grad)
    lanes = 16 // permuted.dtype.itemsize
    if permuted.address or grad.address or any(number % lanes for number in (hidden, *strides)):
        lanes = 1
    threads, most = block_threads(THREADS), max(num_slots, num_rows)
    numbers = (num_slots, top_k, num_rows, hidden, *strides, float(factor), lanes)
    dtypes = {"rows": permuted.dtype, "topk_weights": topk_weights.dtype, "grad": grad.dtype}
    return BackwardPlan(
        arrays.contiguous(permuted.dtype, num_rows, hidden),
        arrays.contiguous(torch.float32, *topk_weights.shape),
        arrays.contiguous(torch.int32, num_rows),
        Launch(invert_index, permuted.device, -(-num_slots // threads), threads, (num_slots, num_rows)),
        Launch(differentiate_rows, permuted.device, *warps(most, WARPS_IN_BLOCK), numbers, dtypes),
    )


def unpermute_backward(
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    grad: torch.Tensor,
    routed_scaling_factor: float,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients by rows and by weights, those that are wanted, given that by the result."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    arguments = (permuted, topk_weights, inv_permuted_idx, grad)
    if arrays.answered_by_reference(permuted):
        found = arrays.by_reference(reference.unpermute_backward, *arguments, routed_scaling_factor)
        return found[0].to(permuted.dtype), found[1].to(topk_weights.dtype)
    rows, weights, index, slopes = map(layout, arguments)
    plan = _plan_backward(rows, weights, index, slopes, routed_scaling_factor)
    permuted_idx = grad_rows = grad_weights = None
    if wanted[0]:
        grad_rows = arrays.empty(*plan.grad_rows)
        permuted_idx = arrays.empty(*plan.permuted_idx).fill_(-1)
        plan.invert(inv_permuted_idx, permuted_idx)
    if wanted[1]:
        grad_weights = arrays.empty(*plan.grad_weights)
    plan.differentiate(permuted, topk_weights, inv_permuted_idx, permuted_idx, grad, grad_rows, grad_weights)
    return grad_rows, None if grad_weights is None else grad_weights.to(topk_weights.dtype)


@planned
def _plan_permute_backward(grad: Layout, inv_permuted_idx: Layout) -> tuple[arrays.Contiguous, Launch]:
    num_tokens, top_k = inv_permuted_idx.shape
    launch = plan_combine(grad, num_tokens, top_k, None, inv_permuted_idx, True, 1.0, grad.dtype)
    return arrays.contiguous(grad.dtype, num_tokens, grad.shape[1]), launch


def permute_backward(inv_permuted_idx: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient by the tokens' rows, given that by the permuted ones, or by batches of them."""
    grad = grad.reshape(-1, grad.shape[-1]) if grad.dim() == 3 else grad
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    if arrays.answered_by_reference(grad):
        ones = torch.ones(inv_permuted_idx.shape, dtype=torch.float32, device=grad.device)
        return arrays.by_reference(reference.moe_unpermute, grad, ones, inv_permuted_idx).to(grad.dtype)
    result, combine = _plan_permute_backward(layout(grad), layout(inv_permuted_idx))
    found: torch.Tensor = arrays.empty(*result)
    combine(grad, None, inv_permuted_idx, found)
    return found


class Permuting(torch.autograd.Function):
    """A permutation whose rows have a gradient by the tokens' rows."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, permute: Any) -> Any:
        found = permute(hidden_states)
        ctx.save_for_backward(found.inv_permuted_idx)
        ctx.mark_non_differentiable(*(part for part in found[1:] if part is not None))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        (inv_permuted_idx,) = ctx.saved_tensors
        return permute_backward(inv_permuted_idx, grad), None


class Unpermuting(torch.autograd.Function):
    """A combination that has gradients by rows and by weights."""

    @staticmethod
    def forward(
        ctx: Any,
        permuted: torch.Tensor,
        topk_weights: torch.Tensor,
        inv_permuted_idx: torch.Tensor,
        unpermute: Any,
        differentiate: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(permuted, topk_weights, inv_permuted_idx)
        ctx.differentiate = differentiate
        found: torch.Tensor = unpermute(permuted, topk_weights)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        wanted = ctx.needs_input_grad[:2]
        return *ctx.differentiate(*ctx.saved_tensors, grad, wanted=wanted), None, None, None


class Adding(torch.autograd.Function):
    """A sum of each token's rows, of which each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, topk_ids: Any, factor: float, add: Any) -> torch.Tensor:
        ctx.save_for_backward(*(() if topk_ids is None else (topk_ids,)))
        ctx.factor, ctx.shape, ctx.dtype = factor, hidden_states.shape, hidden_states.dtype
        found: torch.Tensor = add(hidden_states)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = (grad * ctx.factor).to(ctx.dtype)[:, None].expand(ctx.shape)
        for topk_ids in ctx.saved_tensors:
            grad = grad.masked_fill((topk_ids < 0)[..., None], 0)
        return grad, None, None, None


def differentiable_permute(permute: Callable[[torch.Tensor], Any], hidden_states: torch.Tensor) -> Any:
    """Return the parts of what `permute` makes of rows that require a gradient, as a part of torch's graph."""
    return Permuting.apply(hidden_states, permute)


def differentiable_unpermute(
    unpermute: Callable[..., torch.Tensor],
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    routed_scaling_factor: float,
) -> Any:
    """Return what `unpermute` makes of rows or weights that require a gradient, as a part of torch's graph."""
    differentiate = functools.partial(unpermute_backward, routed_scaling_factor=routed_scaling_factor)
    return Unpermuting.apply(permuted, topk_weights, inv_permuted_idx, unpermute, differentiate)


def differentiable_sum(
    add: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, topk_ids: Any, factor: float
) -> Any:
    """Return what `add` makes of rows that require a gradient, as a part of torch's graph."""
    return Adding.apply(hidden_states, topk_ids, factor, add)
