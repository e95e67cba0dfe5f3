"""The kernels of the activation: a warp takes a run of columns, of one row or of all rows of an expert."""

from typing import Annotated, Any, NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import (
    divide,
    erfc,
    flat,
    load_eight,
    load_float,
    present,
    quotient,
    reciprocal,
    store_eight,
    store_float,
    tanh,
    wait_for_earlier,
)
from numba_moe.device.primitives import INFINITY, WARP, exp, first_above, warp_index
from numba_moe.device.types import (
    LIKE,
    OTHERS,
    PRODUCTS,
    Family,
    Float32,
    FloatArray,
    Int32,
    Int64Array,
    OptionalInt64Array,
    Run,
)
from numba_moe.reference.activation import RULES

LikeRows = Annotated[Any, LIKE, "gate_up"]
OptionalLikeRows = Annotated[Any, LIKE, "gate_up", None]
KINDS = tuple(RULES)
GELU, GELU_TANH, NONE, SWIGLU_STEP, RELU2, SITU = map(
    KINDS.index, ("gelu", "gelu_tanh", "none", "swiglu_step", "relu2", "situ")
)
UNGATED = "_no_mul"
# gelu by tanh is gate * sigmoid(gate * (TANH_ALPHA + TANH_CUBIC * gate^2)).
TANH_ALPHA = 1.5957691216057308
TANH_CUBIC = 0.07135481282553884
SQUARE_ROOT_HALF = 0.7071067811865476
NORMAL_PEAK = 0.3989422804014327
RUN = 8
SUM_THREADS = 256
SUM_FLOATS = SUM_THREADS * RUN


class Rows(NamedTuple):
    """Rows in expert order, and how warps share them."""

    gate_up: FloatArray  # [num_rows, halves * width]
    num_rows: Int32
    width: Int32
    segments: Int32  # warps that serve a row: one for 32 * items columns


class Experts(NamedTuple):
    """Where the rows of each expert begin, and its bias."""

    offset: OptionalInt64Array  # [num_experts + 1]
    bias: OptionalLikeRows  # [num_experts, columns of gate_up]
    num_experts: Int32


class Rule(NamedTuple):
    """The formula for gates and ups; see `moe_activation`. Where a row has no ups, they are 0 and the shift is 1."""

    kind: Int32  # its index in KINDS, without "_no_mul"
    halves: Int32
    interleaved: Int32
    limit: Float32
    alpha: Float32
    shift: Float32  # added to ups
    beta: Float32
    linear_beta: Float32


class Slopes(NamedTuple):
    """The gradient by the result, and the gradient by the rows, which is written."""

    grad_activated: LikeRows  # [num_rows, width]
    grad_gate_up: LikeRows  # as gate_up


class Sums(NamedTuple):
    """Rows in expert order, and their sum for each expert."""

    gate_up: FloatArray  # [num_rows, width]
    offset: Int64Array  # [num_experts + 1]
    sums: LikeRows  # [num_experts, width]
    num_rows: Int32
    width: Int32
    segments: Int32  # blocks that serve an expert: one for 32 * items columns


def family_of(activation: str) -> int:
    """Return the family of an activation."""
    return PRODUCTS if activation in ("silu", "gelu", "gelu_tanh", "swiglu_oai", "none") else OTHERS


@cuda.jit(device=True)
def share_of(gate, rule):
    """Return the factor of the gate in its activation, activation(gate) / gate."""
    if rule.kind == GELU:
        return float32(0.5) * erfc(gate * float32(-SQUARE_ROOT_HALF))
    inner = rule.alpha
    if rule.kind == GELU_TANH:
        inner = float32(TANH_ALPHA) + float32(TANH_CUBIC) * gate * gate
    return reciprocal(float32(1.0) + exp(-gate * inner))


@cuda.jit(device=True)
def activation_of(gate, up, rule, family):
    """Return the activation of a gate times its up."""
    if family == OTHERS:
        return other_activation_of(gate, up, rule)
    if gate > rule.limit:
        gate = float32(rule.limit)
    if up > rule.limit:
        up = float32(rule.limit)
    elif up < -rule.limit:
        up = float32(-rule.limit)
    return gate * share_of(gate, rule) * (up + rule.shift)


@cuda.jit(device=True)
def slope_of(gate, share, rule):
    """Return the derivative of the activation, given the factor of the gate from `share_of`."""
    if rule.kind == GELU:
        return share + gate * float32(NORMAL_PEAK) * exp(float32(-0.5) * gate * gate)
    inner = rule.alpha
    if rule.kind == GELU_TANH:
        inner = float32(TANH_ALPHA) + float32(3.0 * TANH_CUBIC) * gate * gate
    return share + gate * inner * share * (float32(1.0) - share)


@cuda.jit(device=True)
def of_gate(gate, rule):
    """Return what the up of a gate is multiplied by, and its derivative, for any activation."""
    kept = float32(1.0)
    if gate > rule.limit and rule.kind != SWIGLU_STEP:
        gate = float32(rule.limit)
        kept = float32(0.0)
    if rule.kind == RELU2:
        if gate < float32(0.0):
            gate = float32(0.0)
        return gate * gate, kept * float32(2.0) * gate
    share = share_of(gate, rule)
    if rule.kind == SITU:
        bent = tanh(divide(gate, rule.beta))
        value = rule.beta * bent
        slope = (float32(1.0) - bent * bent) * share + value * share * (float32(1.0) - share)
        return value * share, kept * slope
    value = gate * share
    if value > rule.limit and rule.kind == SWIGLU_STEP:
        value = float32(rule.limit)
        kept = float32(0.0)
    return value, kept * slope_of(gate, share, rule)


@cuda.jit(device=True)
def of_up(up, rule):
    """Return what the activation of a gate is multiplied by, and its derivative."""
    kept = float32(1.0)
    if up > rule.limit:
        up = float32(rule.limit)
        kept = float32(0.0)
    elif up < -rule.limit:
        up = float32(-rule.limit)
        kept = float32(0.0)
    if rule.linear_beta < float32(INFINITY):
        bent = tanh(divide(up, rule.linear_beta))
        return rule.linear_beta * bent, kept * (float32(1.0) - bent * bent)
    return up + rule.shift, kept


@cuda.jit(device=True)
def other_activation_of(gate, up, rule):
    """Return the activation of a gate times its up, for any activation."""
    value, _ = of_gate(gate, rule)
    factor, _ = of_up(up, rule)
    return value * factor


@cuda.jit(device=True)
def add_eight(values, eight):
    """Add eight numbers without a loop: the compiler unrolls an outer loop only if it has no loop inside."""
    values[0] += eight[0]
    values[1] += eight[1]
    values[2] += eight[2]
    values[3] += eight[3]
    values[4] += eight[4]
    values[5] += eight[5]
    values[6] += eight[6]
    values[7] += eight[7]


@cuda.jit(device=True)
def add_run(array, first, values, items):
    """Add the elements from `first` on to the values, one to each."""
    if items == RUN:
        add_eight(values, load_eight(array, first))
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
def add_gate_up(array, row, column, width, rule, gate, up, items):
    """Add the gates and ups in some columns of a row to sums; a row may have no ups."""
    if rule.halves == 1:
        add_run(array, row + column, gate, items)
    elif rule.interleaved and items == RUN:
        low = load_eight(array, row + 2 * column)
        high = load_eight(array, row + 2 * column + RUN)
        add_eight(gate, (low[0], low[2], low[4], low[6], high[0], high[2], high[4], high[6]))
        add_eight(up, (low[1], low[3], low[5], low[7], high[1], high[3], high[5], high[7]))
    elif rule.interleaved:
        gate[0] += load_float(array, row + 2 * column)
        up[0] += load_float(array, row + 2 * column + 1)
    else:
        add_run(array, row + column, gate, items)
        add_run(array, row + width + column, up, items)


@cuda.jit(device=True)
def store_gate_up(array, row, column, width, rule, gate, up, items):
    """Write gates and ups to the columns that `add_gate_up` reads."""
    if rule.halves == 1:
        store_run(array, row + column, gate, items)
    elif rule.interleaved and items == RUN:
        first = row + 2 * column
        store_eight(array, first, (gate[0], up[0], gate[1], up[1], gate[2], up[2], gate[3], up[3]))
        store_eight(array, first + RUN, (gate[4], up[4], gate[5], up[5], gate[6], up[6], gate[7], up[7]))
    elif rule.interleaved:
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
def width_of_row(width, rule):
    """Return the number of columns of a row of `gate_up`: gates and ups, or `width` columns without ups."""
    return int64(width) if rule.halves == 1 else 2 * int64(width)


@cuda.jit(device=True)
def load_biased(rows, experts, rule, row, column, gate, up, items):
    """Load gates and ups with their bias; return whether the row is in use."""
    for item in range(items):
        gate[item] = float32(0.0)
        up[item] = float32(0.0)
    if present(experts.offset) and row >= experts.offset[experts.num_experts]:
        return False
    row_width = width_of_row(rows.width, rule)
    add_gate_up(rows.gate_up, row * row_width, column, rows.width, rule, gate, up, items)
    if present(experts.bias):
        expert = max(first_above(experts.offset, int32(experts.num_experts + 1), row) - 1, 0)
        add_gate_up(experts.bias, expert * row_width, column, rows.width, rule, gate, up, items)
    return True


@cuda.jit
def activate_rows(
    rows: Rows,
    experts: Experts,
    rule: Rule,
    activated: LikeRows,  # [num_rows, width]
    items: Run,
    family: Family,
):
    """Write the activation of each row; the grid has `segments` independent warps for each row."""
    wait_for_earlier()
    row, column = place_of(rows.segments, items)
    if row >= rows.num_rows or column >= rows.width:
        return
    gate = cuda.local.array(items, float32)
    up = cuda.local.array(items, float32)
    used = load_biased(rows, experts, rule, row, column, gate, up, items)
    if used and rule.kind != NONE:
        for item in range(items):
            gate[item] = activation_of(gate[item], up[item], rule, family)
    store_run(activated, int64(row) * rows.width + column, gate, items)


@cuda.jit(device=True)
def slopes_of(x, y, grad, rule, family):
    """Return the activation of a gate times its up, and the gradients by both, given that by the result."""
    if family == OTHERS:
        value, slope = of_gate(x, rule)
        factor, slope_of_factor = of_up(y, rule)
        return value * factor, grad * slope * factor, grad * value * slope_of_factor
    activated = x
    through_gate = grad
    through_up = grad
    if x > rule.limit:
        x = float32(rule.limit)
        through_gate = float32(0.0)
    if y > rule.limit:
        y = float32(rule.limit)
        through_up = float32(0.0)
    elif y < -rule.limit:
        y = float32(-rule.limit)
        through_up = float32(0.0)
    if rule.kind != NONE:
        share = share_of(x, rule)
        activated = x * share * (y + rule.shift)
        through_gate = through_gate * slope_of(x, share, rule) * (y + rule.shift)
        through_up = through_up * x * share
    return activated, through_gate, through_up


@cuda.jit
def differentiate_activation(rows: Rows, experts: Experts, rule: Rule, slopes: Slopes, items: Run, family: Family):
    """Write the gradient by the rows; the grid has `segments` independent warps for each row."""
    wait_for_earlier()
    row, column = place_of(rows.segments, items)
    if row >= rows.num_rows or column >= rows.width:
        return
    gate = cuda.local.array(items, float32)
    up = cuda.local.array(items, float32)
    grad = cuda.local.array(items, float32)
    used = load_biased(rows, experts, rule, row, column, gate, up, items)
    for item in range(items):
        grad[item] = float32(0.0)
    if used:
        add_run(slopes.grad_activated, int64(row) * rows.width + column, grad, items)
    for item in range(items):
        _, through_gate, through_up = slopes_of(gate[item], up[item], grad[item], rule, family)
        gate[item] = through_gate
        up[item] = through_up
    first = row * width_of_row(rows.width, rule)
    store_gate_up(slopes.grad_gate_up, first, column, rows.width, rule, gate, up, items)


@cuda.jit
def sum_expert_rows(of: Sums, items: Run):
    """Sum the rows of each expert; `segments` blocks serve an expert, and their warps take its rows in turn."""
    wait_for_earlier()
    partial = flat(cuda.shared.array(SUM_FLOATS, float32))
    block = int32(cuda.blockIdx.x)
    expert = quotient(block, of.segments)
    start = int32((block - expert * of.segments) * WARP * items)
    column = int32(start + cuda.laneid * items)
    num_warps = int32(cuda.blockDim.x >> 5)
    warp = int32(cuda.threadIdx.x >> 5)
    total = cuda.local.array(items, float32)
    for item in range(items):
        total[item] = float32(0.0)
    if column < of.width:
        row = of.offset[expert] + warp
        end = min(of.offset[expert + 1], int64(of.num_rows))
        while row < end:
            add_run(of.gate_up, row * of.width + column, total, items)
            row += num_warps
    for item in range(items):
        partial[(warp * WARP + cuda.laneid) * items + item] = total[item]
    cuda.syncthreads()
    column = int32(cuda.threadIdx.x)
    while column < WARP * items and start + column < of.width:
        whole = float32(0.0)
        for part in range(num_warps):
            whole += partial[part * WARP * items + column]
        store_float(of.sums, int64(expert) * of.width + start + column, whole)
        column = int32(column + cuda.blockDim.x)
