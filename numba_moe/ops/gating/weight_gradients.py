"""Gradients of the weights by the logits, for torch's autograd; which experts are chosen has no gradient.

A weight is the score of its expert, times a factor, over the sum of the chosen scores where they are renormalised.
With ``dot``, the sum of all ``grad_weights * topk_weights`` of a token, all gradients have one form:
``slope * (factor * grad_weight - dot)``, where the grad_weight of an expert that was not chosen is 0 and the slope is

- the score, for softmax; the others' is 0 if renormalised, as the weights then are a softmax of the chosen logits;
- the derivative of the score over the sum of the chosen, otherwise; the sum is 1 and dot is 0 unless renormalised.

Softmax scores come from the weights, so no row is reduced again.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import divide, load_float, reciprocal, store_float, wait_for_earlier, warp_highest
from numba_moe.device.primitives import ALL_LANES, NEGATIVE_INFINITY, WARP, exp, first_lane, order, warp_index, warp_sum
from numba_moe.device.types import LIKE, Float32Array, FloatArray, Int32, Int32Array, Int64
from numba_moe.ops.gating.scores import (
    FAR_BELOW,
    SCORING,
    SIGMOID,
    SMALLEST_SUM,
    SOFTMAX,
    SOFTPLUS_SQRT,
    Weighting,
    score_of,
    weight_of,
)
from numba_moe.reference import gating as reference
from numba_moe.runtime.arrays import Array, Contiguous, by_reference, contiguous
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.op import op

# Where all chosen experts score less, which takes a correction bias, the others' gradients count as 0.
SMALLEST_SCORE = 1e-30


class Weighed(NamedTuple):
    """What was weighed, and what came of it."""

    gating_output: FloatArray  # [num_tokens, num_experts]
    topk_weights: Float32Array  # [num_tokens, top_k]
    topk_ids: Int32Array  # [num_tokens, top_k]
    num_tokens: Int32
    num_experts: Int32
    row_stride: Int64  # elements from one row of logits to the next


class Gradients(NamedTuple):
    """The gradient by the weights, and that by the logits, which is written."""

    grad_weights: Float32Array  # [num_tokens, top_k]
    grad_logits: Annotated[Any, LIKE, "gating_output"]  # [num_tokens, num_experts]


@cuda.jit(device=True)
def slope_of(logit, scoring_func):
    """Return the derivative of a score that depends on its own logit alone."""
    score = score_of(logit, scoring_func, float32(0.0), float32(1.0))
    slope = float32(0.0)
    if scoring_func == SIGMOID:
        if score > float32(0.0):  # not of NaN
            slope = score * reciprocal(float32(1.0) + exp(logit))
    elif scoring_func == SOFTPLUS_SQRT:
        if logit < float32(FAR_BELOW):
            slope = float32(0.5) * score
        elif score > float32(0.0):
            slope = divide(float32(0.5) * reciprocal(float32(1.0) + exp(-logit)), score)
    elif score > float32(NEGATIVE_INFINITY):
        slope = float32(1.0)
    return slope


@cuda.jit
def differentiate_weights(weighed: Weighed, weighing: Weighting, gradients: Gradients):
    """Write the gradient of a token's row, by a warp, a lane every 32nd expert; the grid has a warp per token."""
    wait_for_earlier()
    token = warp_index()
    if token >= weighed.num_tokens:
        return
    scoring_func, top_k = weighing.scoring_func, weighing.top_k
    lane = int32(cuda.laneid)
    row = int64(token) * weighed.row_stride
    grad_row = int64(token) * weighed.num_experts
    first_pick = int64(token) * top_k
    factor = float32(weighing.routed_scaling_factor)
    to_score = float32(0.0)
    if factor != float32(0.0):
        to_score = divide(float32(1.0), factor)

    dot = float32(0.0)
    total = float32(0.0)
    score = float32(0.0)
    best = int32(0)
    pick = lane
    while pick < top_k:
        weight = weighed.topk_weights[first_pick + pick]
        dot += gradients.grad_weights[first_pick + pick] * weight
        chosen = weighed.topk_ids[first_pick + pick]
        if scoring_func == SOFTMAX:
            if weight * to_score > score:
                score = weight * to_score
                best = chosen
        else:
            logit = load_float(weighed.gating_output, row + chosen)
            total += weight_of(logit, scoring_func, float32(0.0), float32(1.0))
        pick = int32(pick + WARP)
    dot = warp_sum(dot)
    inverse = float32(1.0)
    if scoring_func != SOFTMAX:
        total = warp_sum(total)
        if weighing.renormalize and total > float32(SMALLEST_SUM):
            inverse = divide(float32(1.0), total)
        else:
            dot = float32(0.0)

    # All scores of a softmax follow from the largest that was chosen; it is 0 in a row without one.
    peak = float32(0.0)
    if scoring_func == SOFTMAX and not weighing.renormalize:
        rank = order(score)
        winner = first_lane(rank == warp_highest(rank))
        score = cuda.shfl_sync(ALL_LANES, score, winner)
        peak = load_float(weighed.gating_output, row + cuda.shfl_sync(ALL_LANES, best, winner))
    if weighing.renormalize or score <= float32(SMALLEST_SCORE):
        score = float32(0.0)
    expert = lane
    while expert < weighed.num_experts:
        grad = float32(0.0)
        if score > float32(0.0):
            grad = -dot * (score * exp(load_float(weighed.gating_output, row + expert) - peak))
        store_float(gradients.grad_logits, grad_row + expert, grad)
        expert = int32(expert + WARP)
    cuda.syncwarp()  # what follows overwrites what other lanes wrote
    pick = lane
    while pick < top_k:
        chosen = weighed.topk_ids[first_pick + pick]
        if scoring_func == SOFTMAX:
            slope = weighed.topk_weights[first_pick + pick] * to_score
        else:
            slope = slope_of(load_float(weighed.gating_output, row + chosen), scoring_func) * inverse
        grad = float32(0.0)
        if slope != float32(0.0):
            grad = slope * (factor * gradients.grad_weights[first_pick + pick] - dot)
        store_float(gradients.grad_logits, grad_row + chosen, grad)
        pick = int32(pick + WARP)


@op(reference.gating_backward, is_gradient=True)
def gating_backward(
    gating_output: Array,
    topk_weights: Array,
    topk_ids: Array,
    grad_weights: Array,
    scoring_func: str,
    renormalize: bool,
    routed_scaling_factor: float,
) -> Any:
    """Return the gradient by the logits, given that by the weights, both results of the call being at hand.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The logits; rows may be strided.
    topk_weights : array of float32, shape [num_tokens, top_k]
        The weights that the call returned.
    topk_ids : array of int32, shape [num_tokens, top_k]
        The ids that it returned.
    grad_weights : array of float32, shape [num_tokens, top_k]
        The gradient by the weights.
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt", "raw"}
        How logits became scores.
    renormalize : bool
        Whether weights were divided by their sum.
    routed_scaling_factor : float
        What they were multiplied by.

    Returns
    -------
    array of the dtype of `gating_output`, shape [num_tokens, num_experts]
    """


@gating_backward.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.gating_output.dtype, *given.gating_output.shape)


@gating_backward.plan
def _(given: Any) -> Launch:
    gating_output, top_k = given.gating_output, given.topk_ids.shape[1]
    num_tokens, num_experts = gating_output.shape
    stride = num_experts if gating_output.strides is None else gating_output.strides[0]
    weighed = Weighed(gating_output, torch.float32, torch.int32, num_tokens, num_experts, stride)
    rules = (SCORING.index(given.scoring_func), int(given.renormalize), float(given.routed_scaling_factor))
    records = (weighed, Weighting(top_k, *rules), Gradients(torch.float32, gating_output.dtype))
    return Launch(differentiate_weights, gating_output.device, *warps(num_tokens), *records)


@gating_backward.on_cpu
def _(given: Any) -> Any:
    rules = (given.scoring_func, given.renormalize, given.routed_scaling_factor)
    return by_reference(reference.gating_backward, given.gating_output, given.topk_ids, given.grad_weights, *rules)


@gating_backward.run
def _(differentiate: Any, given: Any, grad_logits: torch.Tensor) -> None:
    differentiate(
        gating_output=given.gating_output,
        topk_weights=given.topk_weights,
        topk_ids=given.topk_ids,
        grad_weights=given.grad_weights.contiguous(),
        grad_logits=grad_logits,
    )
