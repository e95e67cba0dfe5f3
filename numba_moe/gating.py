"""The experts of each token, and how much each weighs: softmax, sigmoid and grouped top-k.

One warp serves one token. A candidate is one 64-bit key, its rank above its inverted id, so that one maximum
finds the best expert and lets the lower id win a tie. Pick k is the largest key below pick k - 1: nothing is
stored between picks, and neither the number of experts nor top_k has a limit.

Experts rank by their logits, or by score + bias where there is a correction bias.
"""

from typing import Any

import torch

from numba_moe.reference import gating as reference
from numba_moe.reference.gating import TopK
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, float32, int64
from numba_moe.runtime.launch import launch_warps
from numba_moe.runtime.parameters import (
    Float32Array,
    Float64,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFloat32Array,
)
from numba_moe.runtime.primitives import (
    HIGHEST_KEY,
    LARGEST_FLOAT,
    LOWEST_KEY,
    NEGATIVE_INFINITY,
    WARP,
    choice_key,
    chosen_index,
    exp,
    load_float,
    present,
    store_float,
    warp_index,
    warp_max,
    warp_sum,
)

SCORING = ("softmax", "sigmoid")
SOFTMAX = 0
GROUP_SCORES = ("max", "top2_sum")
MAX = 0


@cuda.jit(device=True)
def softmax_statistics(gating_output, row, num_experts):
    """Return the largest logit of a row and the sum of exponentials; a sum of 0 if the row has no softmax."""
    peak = float32(NEGATIVE_INFINITY)
    broken = 0
    for expert in range(cuda.laneid, num_experts, WARP):
        logit = load_float(gating_output, row + expert)
        if logit > peak:
            peak = logit
        if not logit <= float32(LARGEST_FLOAT):  # NaN or +inf
            broken = 1
    peak = warp_max(peak)
    broken = warp_max(broken)
    total = float32(0.0)
    if broken == 0 and peak > float32(NEGATIVE_INFINITY):
        for expert in range(cuda.laneid, num_experts, WARP):
            total += exp(load_float(gating_output, row + expert) - peak)
    return peak, warp_sum(total)


@cuda.jit(device=True)
def score_of(logit, scoring_func, peak, total):
    if scoring_func != SOFTMAX:
        if logit != logit:
            return float32(0.0)
        return float32(1.0) / (float32(1.0) + exp(-logit))
    if total == float32(0.0):
        return float32(0.0)
    return exp(logit - peak) / total


@cuda.jit(device=True)
def rank_of(gating_output, row, expert, correction_bias, scoring_func, peak, total):
    logit = load_float(gating_output, row + expert)
    if present(correction_bias):
        return score_of(logit, scoring_func, peak, total) + correction_bias[expert]
    if scoring_func == SOFTMAX and total == float32(0.0):
        return float32(0.0)
    return logit


@cuda.jit(device=True)
def score_group(gating_output, row, first, size, correction_bias, scoring_func, group_score, peak, total):
    """Return the score of the group of experts [first, first + size)."""
    group_value = float32(0.0)
    last = int64(HIGHEST_KEY)
    for _ in range(1 if group_score == MAX else min(size, 2)):
        key = int64(LOWEST_KEY)
        for expert in range(first + cuda.laneid, first + size, WARP):
            candidate = choice_key(
                rank_of(gating_output, row, expert, correction_bias, scoring_func, peak, total), expert
            )
            if candidate < last:
                key = max(key, candidate)
        last = warp_max(key)
        best = chosen_index(last)
        if group_score == MAX or present(correction_bias):
            value = rank_of(gating_output, row, best, correction_bias, scoring_func, peak, total)
        else:
            value = score_of(load_float(gating_output, row + best), scoring_func, peak, total)
        group_value = value if group_score == MAX else group_value + value
    return group_value


@cuda.jit(device=True)
def last_group_key(group_scores, row, num_expert_group, topk_group):
    """Return the key of the last group that is chosen."""
    last = int64(HIGHEST_KEY)
    for _ in range(topk_group):
        key = int64(LOWEST_KEY)
        for group in range(cuda.laneid, num_expert_group, WARP):
            candidate = choice_key(group_scores[row + group], group)
            if candidate < last:
                key = max(key, candidate)
        last = warp_max(key)
    return last


@cuda.jit
def choose_experts(
    gating_output: FloatArray,
    correction_bias: OptionalFloat32Array,
    num_tokens: Int32,
    num_experts: Int32,
    row_stride: Int64,
    top_k: Int32,
    scoring_func: Int32,
    renormalize: Int32,
    routed_scaling_factor: Float64,
    num_expert_group: Int32,
    topk_group: Int32,
    group_score: Int32,
    group_scores: OptionalFloat32Array,
    topk_weights: Float32Array,
    topk_ids: Int32Array,
):
    # gating_output [num_tokens, num_experts] with rows row_stride apart, correction_bias [num_experts],
    # group_scores [num_tokens, num_expert_group], topk_weights and topk_ids [num_tokens, top_k]; a warp per token
    token = warp_index()
    if token >= num_tokens:
        return
    lane = cuda.laneid
    row = int64(token) * row_stride
    peak = float32(0.0)
    total = float32(0.0)
    if scoring_func == SOFTMAX:
        peak, total = softmax_statistics(gating_output, row, num_experts)

    groups = int64(token) * num_expert_group
    group_size = num_experts // num_expert_group
    last_group = int64(LOWEST_KEY)
    if present(group_scores):
        for group in range(num_expert_group):
            first = group * group_size
            value = score_group(
                gating_output, row, first, group_size, correction_bias, scoring_func, group_score, peak, total
            )
            if lane == 0:
                group_scores[groups + group] = value
        cuda.syncwarp()
        last_group = last_group_key(group_scores, groups, num_expert_group, topk_group)

    first_pick = int64(token) * top_k
    last = int64(HIGHEST_KEY)
    weight_sum = float32(0.0)
    for pick in range(top_k):
        key = int64(LOWEST_KEY)
        for expert in range(lane, num_experts, WARP):
            eligible = True
            if present(group_scores):
                group = expert // group_size
                eligible = choice_key(group_scores[groups + group], group) >= last_group
            if eligible:
                candidate = choice_key(
                    rank_of(gating_output, row, expert, correction_bias, scoring_func, peak, total), expert
                )
                if candidate < last:
                    key = max(key, candidate)
        last = warp_max(key)
        chosen = chosen_index(last)
        weight = score_of(load_float(gating_output, row + chosen), scoring_func, peak, total)
        weight_sum += weight
        if lane == pick % WARP:
            topk_ids[first_pick + pick] = chosen
            store_float(topk_weights, first_pick + pick, weight)

    scale = float32(routed_scaling_factor)
    if renormalize and weight_sum > float32(0.0):
        scale = scale / weight_sum
    for pick in range(lane, top_k, WARP):  # the lane that wrote this pick
        topk_weights[first_pick + pick] *= scale


def _launch_choose(
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor | None,
    scoring_func: str,
    renormalize: bool,
    routed_scaling_factor: float,
    groups: tuple[int, int, str],
    group_scores: torch.Tensor | None,
    out: TopK,
) -> None:
    num_tokens, num_experts = gating_output.shape
    num_expert_group, topk_group, group_score = groups
    launch_warps(
        choose_experts,
        num_tokens,
        gating_output,
        correction_bias,
        *(num_tokens, num_experts, gating_output.stride(0), out.topk_ids.shape[1]),
        *(SCORING.index(scoring_func), int(renormalize), float(routed_scaling_factor)),
        *(num_expert_group, topk_group, GROUP_SCORES.index(group_score), group_scores),
        *out,
    )


def _check_gating(gating_output: Any, top_k: Any, renormalize: Any, correction_bias: Any) -> int:
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_tokens, num_experts = gating_output.shape
    checks.integer("num_experts (columns of `gating_output`)", num_experts, 1)
    top_k = checks.integer("top_k", top_k, 1, num_experts, f"num_experts = {num_experts}")
    checks.boolean("renormalize", renormalize)
    checks.logits("gating_output", gating_output)
    checks.fits_int32("gating_output", num_tokens * top_k, "num_tokens * top_k")
    if correction_bias is not None:
        like = ("gating_output", gating_output)
        checks.array("correction_bias", correction_bias, (torch.float32,), (1,), like=like)
        checks.shape("correction_bias", correction_bias, (num_experts,), "(num_experts,)")
    return top_k


def _allocate(gating_output: torch.Tensor, top_k: int) -> TopK:
    shape = (gating_output.shape[0], top_k)
    return TopK(arrays.empty(shape, torch.float32, gating_output), arrays.empty(shape, torch.int32, gating_output))


def _topk(scoring_func: str, gating_output: Any, top_k: int, renormalize: bool, correction_bias: Any) -> TopK:
    top_k = _check_gating(gating_output, top_k, renormalize, correction_bias)
    if arrays.answered_by_reference(gating_output):
        function = getattr(reference, f"topk_{scoring_func}")
        return arrays.by_reference(function, gating_output, top_k, renormalize, correction_bias)
    out = _allocate(gating_output, top_k)
    _launch_choose(gating_output, correction_bias, scoring_func, renormalize, 1.0, (1, 1, "max"), None, out)
    return out


@arrays.public
def topk_softmax(gating_output: Any, top_k: int, renormalize: bool = False, correction_bias: Any = None) -> TopK:
    """Choose the experts of each token by softmax scores.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Experts per token, at most num_experts.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is 0).
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice alone; the weights stay the scores.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k], best first. topk_ids : int32 of the same shape, distinct in
        each row.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, top_k above num_experts.

    Notes
    -----
    The lower id wins a tie. Without a bias experts are compared by their logits, which no rounding of scores can
    make equal. A row with NaN or +inf has scores 0 throughout. Runs on the caller's current stream without
    synchronising, captures into CUDA graphs, allocates the results only.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_softmax(np.log(np.array([[0.1, 0.6, 0.3]], np.float32)), 2)
    >>> ids, weights.round(4)
    (array([[1, 2]], dtype=int32), array([[0.6, 0.3]], dtype=float32))
    """
    return _topk("softmax", gating_output, top_k, renormalize, correction_bias)


@arrays.public
def topk_sigmoid(gating_output: Any, top_k: int, renormalize: bool = False, correction_bias: Any = None) -> TopK:
    """Choose the experts of each token by sigmoid scores.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Experts per token, at most num_experts.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is 0).
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice alone; the weights stay the scores.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k], best first. topk_ids : int32 of the same shape, distinct in
        each row.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, top_k above num_experts.

    Notes
    -----
    The lower id wins a tie. A NaN logit scores 0 and, without a bias, ranks last. Runs on the caller's current
    stream without synchronising, captures into CUDA graphs, allocates the results only.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_sigmoid(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[0.8808, 0.5   ]], dtype=float32))
    """
    return _topk("sigmoid", gating_output, top_k, renormalize, correction_bias)


@arrays.public
def grouped_topk(
    gating_output: Any,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = False,
    *,
    scoring_func: str = "softmax",
    correction_bias: Any = None,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
) -> TopK:
    """Choose groups of experts first, then experts inside the chosen groups (DeepSeek-V2 and -V3).

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Experts per token, at most those of `topk_group` groups.
    num_expert_group : int
        Number of groups; consecutive experts form a group, all of one size.
    topk_group : int
        Groups per token.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is 0).
    scoring_func : {"softmax", "sigmoid"}
        How logits become scores.
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice of groups and experts alone; the weights stay the scores.
    group_score : {"max", "top2_sum"}, optional
        "max": the best rank of the group; "top2_sum": the sum of its two best ``score + bias``. By default
        "top2_sum" with a bias and "max" without one, as vLLM and SGLang do.
    routed_scaling_factor : float
        Multiplies the weights, after renormalising.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k], best first. topk_ids : int32 of the same shape, distinct in
        each row.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, experts not divisible by groups, more groups or experts asked for
        than there are, unknown `scoring_func` or `group_score`.

    Notes
    -----
    The lower group and the lower expert win a tie. Runs on the caller's current stream without synchronising,
    captures into CUDA graphs, allocates the results and one float32 per token and group.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, -3, 1, 2]], np.float32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="top2_sum").topk_ids
    array([[3]], dtype=int32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="max").topk_ids
    array([[0]], dtype=int32)
    """
    top_k = _check_gating(gating_output, top_k, renormalize, correction_bias)
    num_tokens, num_experts = gating_output.shape
    limit = f"num_experts = {num_experts}"
    num_expert_group = checks.integer("num_expert_group", num_expert_group, 1, num_experts, limit)
    checks.divides("num_expert_group", num_expert_group, "num_experts", num_experts)
    limit = f"num_expert_group = {num_expert_group}"
    topk_group = checks.integer("topk_group", topk_group, 1, num_expert_group, limit)
    eligible = topk_group * (num_experts // num_expert_group)
    checks.integer("top_k", top_k, 1, eligible, f"the {eligible} experts of {topk_group} groups")
    checks.choice("scoring_func", scoring_func, SCORING)
    if group_score is None:
        group_score = "max" if correction_bias is None else "top2_sum"
    checks.choice("group_score", group_score, GROUP_SCORES)
    checks.number("routed_scaling_factor", routed_scaling_factor)
    if arrays.answered_by_reference(gating_output):
        return arrays.by_reference(
            reference.grouped_topk,
            *(gating_output, top_k, num_expert_group, topk_group, renormalize),
            scoring_func=scoring_func,
            correction_bias=correction_bias,
            group_score=group_score,
            routed_scaling_factor=routed_scaling_factor,
        )
    out = _allocate(gating_output, top_k)
    group_scores = arrays.empty((num_tokens, num_expert_group), torch.float32, gating_output)
    groups = (num_expert_group, topk_group, group_score)
    _launch_choose(
        gating_output, correction_bias, scoring_func, renormalize, routed_scaling_factor, groups, group_scores, out
    )
    return out
