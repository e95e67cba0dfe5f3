"""Gradients of weights by the logits, with every option of a selection, and of experts that were given.

Scores are computed anew from the row, which is read twice: by then it is in the cache. What goes to an expert's score
is ``(factor * grad_weight - dot) / total + shared``, summed over the picks that are that expert: dot and total come of
renormalising, 0 and 1 without it, and shared of the weight of shared experts. Zero experts weigh nothing, and take part
in the total alone.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import divide, larger, load_float, present, store_float, tanh, wait_for_earlier
from numba_moe.device.primitives import LARGEST_FLOAT, WARP, warp_index, warp_sum
from numba_moe.device.types import Float32, Float32Array, Int32, Int32Array, OptionalFloat32Array
from numba_moe.ops.gating import which_kernel
from numba_moe.ops.gating.extras import Adjusting, Source, load_one
from numba_moe.ops.gating.long_rows import softmax_from_memory
from numba_moe.ops.gating.scores import SCORING, SMALLEST_SUM, SOFTMAX, Rows, Weighting, score_of, weight_of
from numba_moe.ops.gating.weight_gradients import slope_of
from numba_moe.reference import selection as reference
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.op import op


class Picked(NamedTuple):
    """The experts that were chosen, and the gradient by what they weigh."""

    picked_ids: Int32Array  # [num_tokens, id_columns]; the first top_k of them
    id_columns: Int32
    num_real: Int32  # experts from there on are zero experts
    num_shared: Int32
    shared_factor: Float32  # of the sum of scores, by which a shared expert weighs; 0 if it weighs something else
    grad_weights: Float32Array  # [num_tokens, top_k + num_shared]
    expert_scale: OptionalFloat32Array  # [num_experts]
    epsilon: Float32  # added to the sum by which weights are divided


class ByLogits(NamedTuple):
    """The gradient by the logits, which is written: before the cap, or by what is scored."""

    grad_logits: Annotated[Any, "float32", "float16", "bfloat16"]  # [num_tokens, num_experts]
    by_adjusted: Int32


class Through(NamedTuple):
    """What is the same for all picks of a token."""

    factor: Any
    dot: Any
    inverse: Any
    shared: Any


@cuda.jit(device=True)
def grad_of_pick(pick, expert, first_weight, picked):
    """Return the gradient by the weight of a pick's expert before it is scaled; 0 for a zero expert."""
    if expert >= picked.num_real:
        return float32(0.0)
    grad = picked.grad_weights[first_weight + pick]
    if present(picked.expert_scale):
        grad *= picked.expert_scale[expert]
    return grad


@cuda.jit(device=True)
def grad_of_score(pick, expert, first_weight, picked, through):
    """Return what goes to the score of a pick's expert."""
    grad = grad_of_pick(pick, expert, first_weight, picked)
    return (through.factor * grad - through.dot) * through.inverse + through.shared


@cuda.jit
def differentiate_selection(rows: Rows, adjusting: Adjusting, picked: Picked, weighing: Weighting, gradients: ByLogits):
    """Write the gradient of a token's row, by a warp, a lane every 32nd expert; the grid has a warp per token."""
    wait_for_earlier()
    token = warp_index()
    if token >= rows.num_tokens:
        return
    scoring_func, top_k = weighing.scoring_func, weighing.top_k
    num_experts = rows.num_experts
    source = Source(rows.gating_output, int64(token) * rows.row_stride, rows.vector, adjusting, True)
    peak = float32(0.0)
    total = float32(1.0)
    if scoring_func == SOFTMAX:
        peak, total = softmax_from_memory(source, num_experts)
    first_id = int64(token) * picked.id_columns
    first_weight = int64(token) * (top_k + picked.num_shared)
    factor = float32(weighing.routed_scaling_factor)

    score_sum = float32(0.0)
    dot = float32(0.0)
    pick = int32(cuda.laneid)
    while pick < top_k:
        expert = picked.picked_ids[first_id + pick]
        if expert >= 0 and expert < num_experts:
            score = weight_of(load_one(source, expert), scoring_func, peak, total)
            score_sum += score
            dot += factor * grad_of_pick(pick, expert, first_weight, picked) * score
        pick = int32(pick + WARP)
    inverse = float32(1.0)
    score_sum = warp_sum(score_sum)
    dot = warp_sum(dot)
    smallest = float32(0.0) if picked.epsilon > float32(0.0) else float32(SMALLEST_SUM)
    if weighing.renormalize and score_sum > smallest:
        inverse = divide(float32(1.0), score_sum + picked.epsilon)
        dot = dot * inverse
    else:
        dot = float32(0.0)
    shared = float32(0.0)
    for slot in range(picked.num_shared):
        shared += picked.grad_weights[first_weight + top_k + slot]
    through = Through(factor, dot, inverse, shared * float32(picked.shared_factor))

    mean = float32(0.0)
    if scoring_func == SOFTMAX:
        pick = int32(cuda.laneid)
        while pick < top_k:
            expert = picked.picked_ids[first_id + pick]
            if expert >= 0 and expert < num_experts:
                score = score_of(load_one(source, expert), scoring_func, peak, total)
                mean += score * grad_of_score(pick, expert, first_weight, picked, through)
            pick = int32(pick + WARP)
        mean = warp_sum(mean)
    expert = int32(cuda.laneid)
    while expert < num_experts:
        logit = load_one(source, expert)
        by_score = -mean
        for pick in range(top_k):
            if picked.picked_ids[first_id + pick] == expert:
                by_score += grad_of_score(pick, expert, first_weight, picked, through)
        slope = float32(0.0)
        if scoring_func == SOFTMAX:
            slope = score_of(logit, scoring_func, peak, total)
        elif by_score != float32(0.0):
            slope = slope_of(logit, scoring_func)
        grad = float32(0.0)
        if slope != float32(0.0):
            grad = slope * by_score
        softcap = adjusting.softcap
        if softcap > float32(0.0) and not gradients.by_adjusted:
            raw = load_float(rows.gating_output, source.row + expert)
            if larger(raw, -raw) <= float32(LARGEST_FLOAT):
                bent = tanh(divide(raw, softcap))
                grad *= (float32(1.0) - bent) * (float32(1.0) + bent)
        store_float(gradients.grad_logits, int64(token) * num_experts + expert, grad)
        expert = int32(expert + WARP)


@op(reference.selection_backward, is_gradient=True)
def selection_backward(
    gating_output: Array,
    topk_ids: Array,
    grad_weights: Array,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    routed_scaling_factor: float = 1.0,
    expert_scale: Array | None = None,
    softcap: float = 0.0,
    logit_bias: Array | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    by_adjusted: bool = False,
) -> Any:
    """Return the gradient by the logits of a selection, given that by its weights.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The logits; rows may be strided.
    topk_ids : array of int32, shape [num_tokens, top_k or more]
        The experts that were chosen, in the first columns, -1 for none.
    grad_weights : array of float32, shape [num_tokens, top_k + num_fused_shared_experts]
        The gradient by the weights.
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt", "raw"}
        This and the next ten are as in `select_experts`; `logit_bias` is its bias if it is added to logits.
    by_adjusted : bool
        By the logits as they are scored, in float32.

    Returns
    -------
    array of the dtype of `gating_output`, or of float32, shape [num_tokens, num_experts]
    """


@selection_backward.outputs
def _(given: Any) -> Contiguous:
    dtype = torch.float32 if given.by_adjusted else given.gating_output.dtype
    return contiguous(dtype, *given.gating_output.shape)


@selection_backward.plan
def _(given: Any) -> Launch:
    gating_output, num_shared = given.gating_output, given.num_fused_shared_experts
    checks.array("topk_ids", given.topk_ids, (torch.int32,), (2,), like=("gating_output", gating_output))
    num_tokens, num_experts = gating_output.shape
    on_output = given.apply_routed_scaling_factor_on_output
    factor = float(given.routed_scaling_factor)
    by_sum = not given.renormalize and given.shared_expert_weight is None
    shared_factor = 0.0 if not by_sum else 1.0 if on_output or not num_shared else 1.0 / factor
    picked = Picked(
        *(torch.int32, given.topk_ids.shape[1], num_experts - given.num_zero_experts, num_shared),
        *(shared_factor, torch.float32, given.expert_scale, float(given.renormalize_epsilon)),
    )
    top_k = given.grad_weights.shape[1] - num_shared
    rules = (SCORING.index(given.scoring_func), int(given.renormalize), factor if on_output else 1.0)
    rows = which_kernel.rows_of(gating_output, 4 * which_kernel.in_vectors(gating_output, num_experts))
    dtype = torch.float32 if given.by_adjusted else gating_output.dtype
    records = (rows, Adjusting(given.logit_bias, float(given.softcap)), picked, Weighting(top_k, *rules))
    grid = warps(num_tokens)
    return Launch(
        differentiate_selection, gating_output.device, *grid, *records, ByLogits(dtype, int(given.by_adjusted))
    )


@selection_backward.run
def _(differentiate: Launch, given: Any, grad_logits: torch.Tensor) -> None:
    differentiate(
        gating_output=given.gating_output,
        logit_bias=given.logit_bias,
        picked_ids=given.topk_ids,
        grad_weights=given.grad_weights.contiguous(),
        expert_scale=given.expert_scale,
        grad_logits=grad_logits,
    )
