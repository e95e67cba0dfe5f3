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


class Inverse(NamedTuple):
    """The row of each slot."""

    inv_permuted_idx: Int32Array  # [num_slots]; outside [0, num_rows) for none
    num_slots: Int32


class ByRow(NamedTuple):
    """The slot of each row that has one."""

    permuted_idx: Int32Array  # [num_rows], of -1 before
    num_rows: Int32


@cuda.jit
def invert_index(slots: Inverse, by_row: ByRow):
    """Write the slot of each row that has one; a thread takes a slot."""
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
    lanes: Int32  # elements of a thread: 16 bytes of them, or one


class Weighted(NamedTuple):
    """The row and the weight of each slot, and the factor of all of them."""

    topk_weights: FloatArray  # [num_slots]
    inv_permuted_idx: Int32Array  # [num_slots]; outside [0, num_rows) for none
    num_slots: Int32
    top_k: Int32
    factor: Float32


class Slopes(NamedTuple):
    """The gradient by the result."""

    grad: FloatArray  # [num_tokens, hidden], grad_stride apart
    grad_stride: Int64


class Gradients(NamedTuple):
    """Gradients by rows and weights, those that are wanted."""

    permuted_idx: OptionalInt32Array  # [num_rows], for grad_rows: -1 for no slot
    grad_rows: Annotated[Any, LIKE, "rows", None]  # [num_rows, hidden]
    grad_weights: OptionalFloat32Array  # [num_slots]


@cuda.jit(launch_bounds=DIFFERENTIATE_BOUNDS)
def differentiate_rows(forward: Forward, slots: Weighted, slopes: Slopes, gradients: Gradients):
    """Write gradients: a warp takes a slot, and the row of its own number; `lanes` columns to a thread at a time."""
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


class BackwardPlan(NamedTuple):
    """The gradients, the index of slots by row, and the launches that write them."""

    grad_rows: arrays.Contiguous
    grad_weights: arrays.Contiguous
    permuted_idx: arrays.Contiguous
    invert: Launch
    differentiate: Launch


@planned
def _plan_backward(
    permuted: Layout,
    topk_weights: Layout,
    inv_permuted_idx: Layout,
    grad: Layout,
    factor: float,
    wanted: tuple[bool, bool],
) -> BackwardPlan:
    num_rows, hidden = permuted.shape
    num_slots, top_k = topk_weights.shape.numel(), topk_weights.shape[1]
    strides = stride_of(permuted), stride_of(grad)
    lanes = 16 // permuted.dtype.itemsize
    if permuted.address or grad.address or any(number % lanes for number in (hidden, *strides)):
        lanes = 1
    threads, most = block_threads(THREADS), max(num_slots, num_rows)
    grad_rows = arrays.contiguous(permuted.dtype, num_rows, hidden)
    grad_weights = arrays.contiguous(torch.float32, *topk_weights.shape)
    permuted_idx = arrays.contiguous(torch.int32, num_rows)
    gradients = Gradients(
        permuted_idx=permuted_idx if wanted[0] else None,
        grad_rows=grad_rows if wanted[0] else None,
        grad_weights=grad_weights if wanted[1] else None,
    )
    inverse = Inverse(inv_permuted_idx, num_slots)
    blocks = -(-num_slots // threads)
    return BackwardPlan(
        *(grad_rows, grad_weights, permuted_idx),
        Launch(invert_index, permuted.device, blocks, threads, inverse, ByRow(permuted_idx, num_rows)),
        Launch(
            *(differentiate_rows, permuted.device, *warps(most, WARPS_IN_BLOCK)),
            Forward(permuted, num_rows, hidden, row_stride=strides[0], lanes=lanes),
            Weighted(topk_weights, inv_permuted_idx, num_slots, top_k, float(factor)),
            Slopes(grad, strides[1]),
            gradients,
        ),
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
    plan = _plan_backward(rows, weights, index, slopes, routed_scaling_factor, wanted)
    permuted_idx = grad_rows = grad_weights = None
    if wanted[0]:
        grad_rows = arrays.empty(*plan.grad_rows)
        permuted_idx = arrays.empty(*plan.permuted_idx).fill_(-1)
        plan.invert(inv_permuted_idx=inv_permuted_idx, permuted_idx=permuted_idx)
    if wanted[1]:
        grad_weights = arrays.empty(*plan.grad_weights)
    plan.differentiate(
        rows=permuted,
        topk_weights=topk_weights,
        inv_permuted_idx=inv_permuted_idx,
        grad=grad,
        permuted_idx=permuted_idx,
        grad_rows=grad_rows,
        grad_weights=grad_weights,
    )
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
    combine(rows=grad, places=inv_permuted_idx, combined=found)
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
        wanted = tuple(ctx.needs_input_grad[:2])
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
