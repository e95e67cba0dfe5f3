"""Gradients of activated rows that the weights of their slots multiply: one pass over the results of the first matrix.

The second matrix is linear, so a weight may multiply the row before it or after it. Here it comes before, so the
gradient of the weight is a dot product of rows as wide as the experts, and the pass leaves all that the gradients of
both matrices need.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import load_float, store_float, wait_for_earlier
from numba_moe.device.primitives import WARP, warp_index, warp_sum
from numba_moe.device.types import LIKE, Family, FloatArray, Int32, Int32Array, Run
from numba_moe.ops.activation.activate import activation_backward, check_rows, options_of, plan_sums
from numba_moe.ops.activation.activate_rows import (
    Experts,
    LikeRows,
    Rows,
    Rule,
    add_run,
    family_of,
    load_biased,
    slopes_of,
    store_gate_up,
    store_run,
    width_of_row,
)
from numba_moe.reference import activation as reference
from numba_moe.runtime.arrays import Array, by_reference, contiguous
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.op import op


class Slots(NamedTuple):
    """The weight and the row of each slot."""

    topk_weights: FloatArray  # [num_slots]
    inv_permuted_idx: Int32Array  # [num_slots]; outside [0, num_rows) for a slot without a row
    num_slots: Int32


class WeightedSlopes(NamedTuple):
    """The gradient by the weighted rows, and what is written: two gradients, and the weighted rows."""

    grad: LikeRows  # [num_rows, width]
    grad_gate_up: LikeRows  # as gate_up
    weighted: LikeRows  # [num_rows, width]
    grad_weights: Annotated[Any, LIKE, "topk_weights"]  # [num_slots]


@cuda.jit
def differentiate_weighted(
    rows: Rows, experts: Experts, rule: Rule, slots: Slots, slopes: WeightedSlopes, items: Run, family: Family
):
    """Write the gradients of the rows of slots; a warp takes a slot, and the columns of its row in `segments` turns."""
    wait_for_earlier()
    slot = warp_index()
    if slot >= slots.num_slots:
        return
    row = int64(slots.inv_permuted_idx[slot])
    gate = cuda.local.array(items, float32)
    up = cuda.local.array(items, float32)
    grad = cuda.local.array(items, float32)
    total = float32(0.0)
    if row >= 0 and row < rows.num_rows:
        weight = load_float(slots.topk_weights, slot)
        for segment in range(rows.segments):
            column = int32((segment * WARP + cuda.laneid) * items)
            if column < rows.width:
                load_biased(rows, experts, rule, row, column, gate, up, items)
                for item in range(items):
                    grad[item] = float32(0.0)
                add_run(slopes.grad, row * rows.width + column, grad, items)
                for item in range(items):
                    slopes_here = slopes_of(gate[item], up[item], weight * grad[item], rule, family)
                    activated, gate[item], up[item] = slopes_here
                    total += activated * grad[item]
                    grad[item] = weight * activated
                first = row * width_of_row(rows.width, rule)
                store_gate_up(slopes.grad_gate_up, first, column, rows.width, rule, gate, up, items)
                store_run(slopes.weighted, row * rows.width + column, grad, items)
    total = warp_sum(total)
    if cuda.laneid == 0:
        store_float(slopes.grad_weights, slot, total)


class WeightedGradients(NamedTuple):
    """Gradients by the rows, the weighted rows, the gradient by the weights, and that by the bias, if asked for."""

    rows: Any
    weighted: Any
    weights: Any
    bias: Any


@op(is_gradient=True, like=activation_backward)
def weighted_activation_backward(
    gate_up: Array,
    grad: Array,
    topk_weights: Array,
    inv_permuted_idx: Array,
    expert_first_token_offset: Array | None,
    bias: Array | None,
    activation: str,
    interleaved: bool | None,
    limit: float | None,
    alpha: float | None,
    beta: float | None,
    linear_beta: float | None,
    of_bias: bool,
) -> WeightedGradients:
    """Differentiate activated rows that are multiplied by the weights of their slots.

    Parameters
    ----------
    grad : array of the dtype of `gate_up`, shape [num_rows, width]
        The gradient by the weighted rows.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        The weight of each slot.
    inv_permuted_idx : array of int32, shape [num_tokens, top_k]
        The row of each slot. Each row must belong to at most one slot.

    Returns
    -------
    WeightedGradients
        rows : shape and dtype of `gate_up`. weighted : shape and dtype of `grad`, the activated rows times their
        weights. weights : shape and dtype of `topk_weights`. bias : shape and dtype of `bias`, or None. What becomes
        of rows without a slot is undefined.
    """


@weighted_activation_backward.outputs
def _(given: Any) -> WeightedGradients:
    gate_up, grad, bias = given.gate_up, given.grad, given.bias
    return WeightedGradients(
        contiguous(gate_up.dtype, *gate_up.shape),
        contiguous(gate_up.dtype, *grad.shape),
        contiguous(given.topk_weights.dtype, *given.topk_weights.shape),
        contiguous(gate_up.dtype, *bias.shape) if given.of_bias and bias is not None else None,
    )


@weighted_activation_backward.plan
def _(given: Any) -> tuple[Launch, Launch | None]:
    """Return the launches: the pass over the slots, and the sum of the rows of each expert."""
    (device, *_), items, records = check_rows(given)
    num_slots, dtype = given.topk_weights.shape.numel(), given.gate_up.dtype
    slots = Slots(given.topk_weights, given.inv_permuted_idx, num_slots)
    slopes = WeightedSlopes(dtype, dtype, dtype, given.topk_weights.dtype)
    where = (device, *warps(num_slots))
    constants: dict[str, Any] = {"items": items, "family": family_of(given.activation)}
    return Launch(differentiate_weighted, *where, *records, slots, slopes, **constants), plan_sums(given)


@weighted_activation_backward.on_cpu
def _(given: Any) -> WeightedGradients:
    options = {"activation": given.activation, **options_of(given)}
    offset = given.expert_first_token_offset
    arguments = (given.gate_up, given.grad, given.topk_weights, given.inv_permuted_idx, offset, given.bias)
    rows, weighted, weights = by_reference(reference.weighted_activation_backward, *arguments, **options)
    of_bias = given.of_bias and given.bias is not None
    return WeightedGradients(
        rows, weighted, weights, by_reference(reference.sum_rows, rows, offset) if of_bias else None
    )


@weighted_activation_backward.run
def _(plan: Any, given: Any, *written: torch.Tensor | None) -> None:
    (differentiate, sum_rows), grad = plan, given.grad.contiguous()
    if grad.data_ptr() % 16:
        grad = grad.clone()  # the kernel reads it as it reads the rows
    by_rows, weighted, by_weights, by_bias = written
    offset = given.expert_first_token_offset
    differentiate(
        gate_up=given.gate_up,
        offset=offset,
        bias=given.bias,
        topk_weights=given.topk_weights,
        inv_permuted_idx=given.inv_permuted_idx,
        grad=grad,
        grad_gate_up=by_rows,
        weighted=weighted,
        grad_weights=by_weights,
    )
    if sum_rows is not None:
        sum_rows(gate_up=by_rows, offset=offset, sums=by_bias)
