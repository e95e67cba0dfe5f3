"""What experts do between their two matrices, in one pass over the rows: bias, clamp, activation, gate times up.

A warp takes a run of columns of a row, 16 bytes or more a lane where rows are aligned; the row's expert, whose bias it
adds, comes from a binary search of the offsets. silu, the tanh form of gelu and swiglu_oai are all
``gate * sigmoid(gate * something)``. Backward is the same pass, and a sum of rows for each expert's bias.
"""

import math
from typing import Annotated, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from numba_moe.reference import activation as reference
from numba_moe.reference.activation import RULES, rule_of
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.parameters import (
    LIKE,
    Float32,
    FloatArray,
    Int32,
    Int64Array,
    OptionalInt64Array,
    Run,
)
from numba_moe.runtime.plans import Layout, layout, planned
from numba_moe.runtime.primitives import (
    WARP,
    erfc,
    exp,
    first_above,
    flat,
    load_eight,
    load_float,
    present,
    quotient,
    reciprocal,
    store_eight,
    store_float,
    warp_index,
)

LikeRows = Annotated[Any, LIKE, "gate_up"]
OptionalLikeRows = Annotated[Any, LIKE, "gate_up", None]
KINDS = tuple(RULES)
SILU, GELU, GELU_TANH, SWIGLU_OAI, NONE = range(len(KINDS))
# gelu by tanh is gate * sigmoid(gate * (TANH_ALPHA + TANH_CUBIC * gate^2)).
TANH_ALPHA = 1.5957691216057308
TANH_CUBIC = 0.07135481282553884
SQUARE_ROOT_HALF = 0.7071067811865476
NORMAL_PEAK = 0.3989422804014327
RUN = 8
SUM_THREADS = 256
SUM_FLOATS = SUM_THREADS * RUN


@cuda.jit(device=True)
def share_of(gate, kind, alpha):
    """Return what multiplies a gate in its activation."""
    if kind == GELU:
        return float32(0.5) * erfc(gate * float32(-SQUARE_ROOT_HALF))
    inner = alpha
    if kind == GELU_TANH:
        inner = float32(TANH_ALPHA) + float32(TANH_CUBIC) * gate * gate
    return reciprocal(float32(1.0) + exp(-gate * inner))


@cuda.jit(device=True)
def slope_of(gate, share, kind, alpha):
    """Return the derivative of the activation, given what multiplies the gate."""
    if kind == GELU:
        return share + gate * float32(NORMAL_PEAK) * exp(float32(-0.5) * gate * gate)
    inner = alpha
    if kind == GELU_TANH:
        inner = float32(TANH_ALPHA) + float32(3.0 * TANH_CUBIC) * gate * gate
    return share + gate * inner * share * (float32(1.0) - share)


@cuda.jit(device=True)
def add_run(array, first, values, items):
    """Add the elements from `first` on to as many values."""
    if items == RUN:
        a, b, c, d, e, f, g, h = load_eight(array, first)
        values[0] += a
        values[1] += b
        values[2] += c
        values[3] += d
        values[4] += e
        values[5] += f
        values[6] += g
        values[7] += h
    else:
        values[0] += load_float(array, first)


@cuda.jit(device=True)
def store_run(array, first, values, items):
    if items == RUN:
        a, b, c, d = values[0], values[1], values[2], values[3]
        store_eight(array, first, (a, b, c, d, values[4], values[5], values[6], values[7]))
    else:
        store_float(array, first, values[0])


@cuda.jit(device=True)
def add_gate_up(array, row, column, width, kind, interleaved, gate, up, items):
    """Add what a row has in some columns to gates and ups; for NONE a row has no ups."""
    if kind == NONE:
        add_run(array, row + column, gate, items)
    elif interleaved and items == RUN:
        a, b, c, d, e, f, g, h = load_eight(array, row + 2 * column)
        gate[0] += a
        up[0] += b
        gate[1] += c
        up[1] += d
        gate[2] += e
        up[2] += f
        gate[3] += g
        up[3] += h
        a, b, c, d, e, f, g, h = load_eight(array, row + 2 * column + RUN)
        gate[4] += a
        up[4] += b
        gate[5] += c
        up[5] += d
        gate[6] += e
        up[6] += f
        gate[7] += g
        up[7] += h
    elif interleaved:
        gate[0] += load_float(array, row + 2 * column)
        up[0] += load_float(array, row + 2 * column + 1)
    else:
        add_run(array, row + column, gate, items)
        add_run(array, row + width + column, up, items)


@cuda.jit(device=True)
def store_gate_up(array, row, column, width, kind, interleaved, gate, up, items):
    """Write gates and ups to where `add_gate_up` reads them."""
    if kind == NONE:
        store_run(array, row + column, gate, items)
    elif interleaved and items == RUN:
        first = row + 2 * column
        store_eight(array, first, (gate[0], up[0], gate[1], up[1], gate[2], up[2], gate[3], up[3]))
        store_eight(array, first + RUN, (gate[4], up[4], gate[5], up[5], gate[6], up[6], gate[7], up[7]))
    elif interleaved:
        store_float(array, row + 2 * column, gate[0])
        store_float(array, row + 2 * column + 1, up[0])
    else:
        store_run(array, row + column, gate, items)
        store_run(array, row + width + column, up, items)


@cuda.jit(device=True)
def place_of(segments, items):
    """Return the row of this lane, and its first column."""
    warp = warp_index()
    row = quotient(warp, segments)
    segment = int32(warp - row * segments)
    return row, int32((segment * WARP + cuda.laneid) * items)


@cuda.jit(device=True)
def load_biased(gate_up, offset, bias, row, column, num_rows, num_experts, width, kind, interleaved, gate, up, items):
    """Load gates and ups with their bias; return whether the row is in use."""
    for item in range(items):
        gate[item] = float32(0.0)
        up[item] = float32(0.0)
    if present(offset) and row >= offset[num_experts]:
        return False
    row_width = int64(width) if kind == NONE else 2 * int64(width)
    add_gate_up(gate_up, row * row_width, column, width, kind, interleaved, gate, up, items)
    if present(bias):
        expert = max(first_above(offset, int32(num_experts + 1), row) - 1, 0)
        add_gate_up(bias, expert * row_width, column, width, kind, interleaved, gate, up, items)
    return True


@cuda.jit
def activate_rows(
    gate_up: FloatArray,
    offset: OptionalInt64Array,
    bias: OptionalLikeRows,
    activated: LikeRows,
    num_rows: Int32,
    num_experts: Int32,
    width: Int32,
    segments: Int32,
    kind: Int32,
    interleaved: Int32,
    limit: Float32,
    alpha: Float32,
    shift: Float32,
    items: Run,
):
    # gate_up [num_rows, 2 * width], or [num_rows, width] for NONE, offset [num_experts + 1], bias [num_experts, as
    # gate_up], activated [num_rows, width]; a warp per 32 * items columns, of which a row has `segments`
    row, column = place_of(segments, items)
    if row >= num_rows or column >= width:
        return
    gate = cuda.local.array(items, float32)
    up = cuda.local.array(items, float32)
    inputs = (gate_up, offset, bias, row, column, num_rows, num_experts)
    used = load_biased(*inputs, width, kind, interleaved, gate, up, items)
    if used and kind != NONE:
        for item in range(items):
            x = gate[item]
            y = up[item]
            if x > limit:
                x = float32(limit)
            if y > limit:
                y = float32(limit)
            elif y < -limit:
                y = float32(-limit)
            gate[item] = x * share_of(x, kind, alpha) * (y + shift)
    store_run(activated, int64(row) * width + column, gate, items)


@cuda.jit
def differentiate_rows(
    gate_up: FloatArray,
    offset: OptionalInt64Array,
    bias: OptionalLikeRows,
    grad_activated: LikeRows,
    grad_gate_up: LikeRows,
    num_rows: Int32,
    num_experts: Int32,
    width: Int32,
    segments: Int32,
    kind: Int32,
    interleaved: Int32,
    limit: Float32,
    alpha: Float32,
    shift: Float32,
    items: Run,
):
    # as in activate_rows; grad_activated [num_rows, width], grad_gate_up as gate_up
    row, column = place_of(segments, items)
    if row >= num_rows or column >= width:
        return
    gate = cuda.local.array(items, float32)
    up = cuda.local.array(items, float32)
    grad = cuda.local.array(items, float32)
    inputs = (gate_up, offset, bias, row, column, num_rows, num_experts)
    used = load_biased(*inputs, width, kind, interleaved, gate, up, items)
    for item in range(items):
        grad[item] = float32(0.0)
    if used:
        add_run(grad_activated, int64(row) * width + column, grad, items)
    for item in range(items):
        x = gate[item]
        y = up[item]
        through_gate = grad[item]
        through_up = grad[item]
        if x > limit:
            x = float32(limit)
            through_gate = float32(0.0)
        if y > limit:
            y = float32(limit)
            through_up = float32(0.0)
        elif y < -limit:
            y = float32(-limit)
            through_up = float32(0.0)
        if kind != NONE:
            share = share_of(x, kind, alpha)
            through_gate = through_gate * slope_of(x, share, kind, alpha) * (y + shift)
            through_up = through_up * x * share
        gate[item] = through_gate
        up[item] = through_up
    row_width = int64(width) if kind == NONE else 2 * int64(width)
    store_gate_up(grad_gate_up, row * row_width, column, width, kind, interleaved, gate, up, items)


@cuda.jit
def sum_expert_rows(
    gate_up: FloatArray,
    offset: Int64Array,
    sums: LikeRows,
    num_rows: Int32,
    num_experts: Int32,
    width: Int32,
    segments: Int32,
    items: Run,
):
    # gate_up [num_rows, width], offset [num_experts + 1], sums [num_experts, width]; a block per expert and 32 * items
    # columns, of which a row has `segments`; its warps take turns in the expert's rows
    partial = flat(cuda.shared.array(SUM_FLOATS, float32))
    block = int32(cuda.blockIdx.x)
    expert = quotient(block, segments)
    start = int32((block - expert * segments) * WARP * items)
    column = int32(start + cuda.laneid * items)
    num_warps = int32(cuda.blockDim.x >> 5)
    warp = int32(cuda.threadIdx.x >> 5)
    total = cuda.local.array(items, float32)
    for item in range(items):
        total[item] = float32(0.0)
    if column < width:
        row = offset[expert] + warp
        end = min(offset[expert + 1], int64(num_rows))
        while row < end:
            add_run(gate_up, row * width + column, total, items)
            row += num_warps
    for item in range(items):
        partial[(warp * WARP + cuda.laneid) * items + item] = total[item]
    cuda.syncthreads()
    column = int32(cuda.threadIdx.x)
    while column < WARP * items and start + column < width:
        whole = float32(0.0)
        for part in range(num_warps):
            whole += partial[part * WARP * items + column]
        store_float(sums, int64(expert) * width + start + column, whole)
        column = int32(column + cuda.blockDim.x)


class ActivationPlan(NamedTuple):
    """The result, the gradients of rows and bias, and the launches that write them."""

    activated: arrays.Contiguous
    activate: Launch
    grad_gate_up: arrays.Contiguous
    differentiate: Launch
    grad_bias: arrays.Contiguous
    sum_rows: Launch | None


@planned
def _plan(
    gate_up: Layout,
    expert_first_token_offset: Layout | None,
    bias: Layout | None,
    activation: str,
    interleaved: bool | None,
    limit: float | None,
    alpha: float | None,
) -> ActivationPlan:
    checks.array("gate_up", gate_up, checks.FLOATS, (2,))
    checks.choice("activation", activation, KINDS)
    if interleaved is not None:
        checks.boolean("interleaved", interleaved)
    for name, number in (("limit", limit), ("alpha", alpha)):
        if number is not None:
            checks.number(name, number)
    rule = rule_of(activation, interleaved, limit, alpha)
    checks.holds("limit", "above 0", rule.limit > 0, rule.limit)
    num_rows, row_width = gate_up.shape
    like = ("gate_up", gate_up)
    num_experts = 0
    if expert_first_token_offset is not None:
        checks.array("expert_first_token_offset", expert_first_token_offset, (torch.int64,), (1,), like=like)
        checks.at_least("len(expert_first_token_offset)", expert_first_token_offset.shape[0], 2, "num_experts + 1")
        num_experts = expert_first_token_offset.shape[0] - 1
    if bias is not None:
        checks.holds("bias", "None without `expert_first_token_offset`", num_experts > 0, "an array")
        checks.array("bias", bias, (gate_up.dtype,), (2,), like=like)
        checks.shape("bias", bias, (num_experts, row_width), "(num_experts, columns of `gate_up`)")
    if activation != "none":
        checks.holds("gate_up", "of an even number of columns", row_width % 2 == 0, row_width)
    width = row_width if activation == "none" else row_width // 2
    aligned = width % RUN == 0 and gate_up.address == 0 and (bias is None or bias.address == 0)
    items = RUN if aligned else 1
    segments = -(-width // (WARP * items))
    checks.fits_int32("gate_up", num_rows * segments * WARP, "the number of threads")
    where = (gate_up.device, *warps(num_rows * segments))
    limit = math.inf if activation == "none" else rule.limit
    kind = (KINDS.index(activation), int(rule.interleaved), limit, rule.alpha, rule.shift)
    numbers = (num_rows, num_experts, width, segments, *kind)
    choices: dict[str, Any] = {"gate_up": gate_up.dtype, "items": items}
    sum_rows = None
    if bias is not None:
        wide = RUN if row_width % RUN == 0 else 1
        parts = -(-row_width // (WARP * wide))
        sizes = (num_rows, num_experts, row_width, parts)
        place = (gate_up.device, num_experts * parts, block_threads(SUM_THREADS))
        sum_rows = Launch(sum_expert_rows, *place, sizes, {"gate_up": gate_up.dtype, "items": wide})
    return ActivationPlan(
        arrays.contiguous(gate_up.dtype, num_rows, width),
        Launch(activate_rows, *where, numbers, choices),
        arrays.contiguous(gate_up.dtype, num_rows, row_width),
        Launch(differentiate_rows, *where, numbers, choices),
        arrays.contiguous(gate_up.dtype, num_experts, row_width),
        sum_rows,
    )


class Activating(torch.autograd.Function):
    """An activation as a part of torch's graph; gradients go to the rows and the bias."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, offset: Any, bias: Any, options: dict[str, Any]) -> torch.Tensor:
        ctx.save_for_backward(gate_up, offset, bias)
        ctx.options = options
        return moe_activation(gate_up, offset, bias, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_activated: torch.Tensor) -> Any:
        gate_up, offset, bias = ctx.saved_tensors
        gradients = activation_backward(gate_up, grad_activated, offset, bias, ctx.needs_input_grad[2], **ctx.options)
        return gradients[0], None, gradients[1], None


def activation_backward(
    gate_up: torch.Tensor,
    grad_activated: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    of_bias: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients by the rows and, if wanted, by the bias."""
    if arrays.answered_by_reference(gate_up):
        function = reference.moe_activation_backward
        grad_gate_up = arrays.by_reference(function, gate_up, grad_activated, offset, bias, **options)
        grad_bias = arrays.by_reference(reference.sum_rows, grad_gate_up, offset) if of_bias else None
        return grad_gate_up.to(gate_up.dtype), None if grad_bias is None else grad_bias.to(gate_up.dtype)
    grad_activated = grad_activated.contiguous()
    if grad_activated.data_ptr() % 16:
        grad_activated = grad_activated.clone()  # the kernel reads it as it reads the rows
    plan = _plan(layout(gate_up), layout(offset), layout(bias), *options.values())
    grad_gate_up = arrays.empty(*plan.grad_gate_up)
    plan.differentiate(gate_up, offset, bias, grad_activated, grad_gate_up)
    if not of_bias or plan.sum_rows is None:
        return grad_gate_up, None
    grad_bias = arrays.empty(*plan.grad_bias)
    plan.sum_rows(grad_gate_up, offset, grad_bias)
    return grad_gate_up, grad_bias


@arrays.public
def moe_activation(
    gate_up: Any,
    expert_first_token_offset: Any = None,
    bias: Any = None,
    *,
    activation: str = "silu",
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
) -> Any:
    """Add the bias of each row's expert, apply the activation to the gates, and multiply by the ups.

    Parameters
    ----------
    gate_up : array of float32, float16 or bfloat16, shape [num_rows, 2 * width]
        Contiguous; rows in expert order.
    expert_first_token_offset : array of int64, shape [num_experts + 1], optional
        Rows of expert e are ``offset[e]`` up to ``offset[e + 1]``, of the first from 0 on; rows from the last on are
        not in use. Without it all are.
    bias : array of the dtype of `gate_up`, shape [num_experts, 2 * width], optional
        Added first; takes offsets.
    activation : {"silu", "gelu", "gelu_tanh", "swiglu_oai", "none"}
        "silu": ``gate * sigmoid(alpha * gate)``; "gelu", by the error function; "gelu_tanh", its approximation;
        "swiglu_oai", as silu, and the up is taken plus 1; "none": the rows plus their bias, which have no halves.
    interleaved : bool, optional
        A row holds gate, up, gate, up, ..., not all gates before all ups. By default that of "swiglu_oai" alone.
    limit : float, optional
        Gates are at most this, ups at most this in magnitude; 7 by default for "swiglu_oai", none for the others.
    alpha : float, optional
        Of "silu" and "swiglu_oai"; 1 and 1.702 by default.

    Returns
    -------
    array of the dtype of `gate_up`, shape [num_rows, width]
        As wide as `gate_up` for "none". Zeros in rows not in use.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, unknown activation, a bias without offsets.

    Notes
    -----
    Computed in float32 and rounded once. What rows not in use hold does not count. Runs on the caller's current stream
    without synchronising, captures into CUDA graphs, allocates the result only. The result has a gradient by `gate_up`
    and `bias`, of first order, with the same bits at every run.

    Examples
    --------
    >>> import numpy as np
    >>> moe_activation(np.array([[0, 2, 10, 20]], np.float32)).round(3)
    array([[ 0.   , 35.232]], dtype=float32)
    """
    options = (activation, interleaved, limit, alpha)
    plan = _plan(layout(gate_up), layout(expert_first_token_offset), layout(bias), *options)
    names = {"activation": activation, "interleaved": interleaved, "limit": limit, "alpha": alpha}
    if torch.is_grad_enabled() and (gate_up.requires_grad or (bias is not None and bias.requires_grad)):
        return Activating.apply(gate_up, expert_first_token_offset, bias, names)
    if arrays.answered_by_reference(gate_up):
        function = reference.moe_activation
        return arrays.by_reference(function, gate_up, expert_first_token_offset, bias, **names).to(gate_up.dtype)
    activated = arrays.empty(*plan.activated)
    plan.activate(gate_up, expert_first_token_offset, bias, activated)
    return activated
