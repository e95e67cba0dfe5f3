"""The experts of each token, and how much each weighs: softmax, sigmoid and grouped top-k."""

import functools
from typing import Any, NamedTuple

import torch

from numba_moe.gating import memory, octets, registers
from numba_moe.gating.backward import differentiable
from numba_moe.gating.rows import GROUP_SCORES, SCORING
from numba_moe.reference import gating as reference
from numba_moe.reference.gating import TopK
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.parameters import COLUMNS
from numba_moe.runtime.plans import Layout, layout, new_tuple, planned
from numba_moe.runtime.primitives import WARP

# From so many tokens on, and so many for each expert, eight lanes serve a token instead of 32. Measured on an H200 with
# 64 to 1024 experts: eight lanes take longer for one token, and less for many; with groups twice as many are many.
MANY_TOKENS = 2048
MANY_TOKENS_PER_EXPERT = 16


class GatingPlan(NamedTuple):
    """The results, the launch, whether it is of the kernel for rows of any size, and the group scores of that one."""

    topk_weights: arrays.Contiguous
    topk_ids: arrays.Contiguous
    choose: Launch
    in_memory: bool
    group_scores: arrays.Contiguous | None


def _plan_gating(
    gating_output: Layout,
    top_k: int,
    renormalize: bool,
    correction_bias: Layout | None,
    scoring_func: str,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    routed_scaling_factor: float = 1.0,
) -> GatingPlan:
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_tokens, num_experts = gating_output.shape
    checks.integer("num_experts (columns of `gating_output`)", num_experts, 1)
    top_k = checks.integer("top_k", top_k, 1, num_experts, f"num_experts = {num_experts}")
    checks.boolean("renormalize", renormalize)
    checks.fits_int32("gating_output", num_tokens * top_k, "num_tokens * top_k")
    if correction_bias is not None:
        like = ("gating_output", gating_output)
        checks.array("correction_bias", correction_bias, (torch.float32,), (1,), like=like)
        checks.shape("correction_bias", correction_bias, (num_experts,), "(num_experts,)")

    dtype, device, group_size = gating_output.dtype, gating_output.device, num_experts // num_expert_group
    stride = num_experts if gating_output.strides is None else gating_output.strides[0]
    sizes = (num_tokens, num_experts, stride)
    scoring = SCORING.index(scoring_func)
    rules = (int(renormalize), float(routed_scaling_factor))
    groups = (num_expert_group, topk_group, GROUP_SCORES.index(group_score))
    # Weights that sum to one, and a choice by logits, do without the sum of all exponentials.
    by_scores = correction_bias is not None or (num_expert_group > 1 and group_score != "max")
    whole_softmax = scoring_func == "softmax" and (by_scores or not renormalize)
    vectors = not (group_size % 4 or stride % 4 or gating_output.address % (4 * dtype.itemsize))
    lane_bits = (WARP // num_expert_group).bit_length() - 1  # -1 if there are more groups than lanes
    many = max(MANY_TOKENS, MANY_TOKENS_PER_EXPERT * num_experts * (1 if num_expert_group == 1 else 2))
    group_scores = None
    in_memory = lane_bits < 0 or COLUMNS[-1] << lane_bits < group_size
    if in_memory:
        if num_expert_group > 1:
            group_scores = arrays.contiguous(torch.float32, num_tokens, num_expert_group)
        numbers: tuple[float, ...] = (*sizes, top_k, scoring, *rules, *groups)
        choose = Launch(memory.choose_from_memory, device, *warps(num_tokens), numbers, {"gating_output": dtype})
    elif num_tokens >= many and top_k <= octets.MOST_PICKS and num_expert_group in (1, 2, 4, 8):
        aligned = vectors and (correction_bias is None or correction_bias.address == 0)
        whole_softmax = whole_softmax or (scoring_func == "softmax" and num_expert_group > 1)
        mask = (1 << (num_experts - 1).bit_length()) - 1
        exact = correction_bias is None and dtype.itemsize == 2
        of_row = (*sizes, int(aligned), top_k, scoring, int(whole_softmax))
        of_keys = ((octets.LANES // num_expert_group).bit_length() - 1, mask, int(exact))
        where = (device, *warps(-(-num_tokens * octets.LANES // WARP)))
        numbers = (*of_row, *rules, *groups, group_size, *of_keys)
        choose = Launch(octets.choose_for_many, *where, numbers, {"gating_output": dtype})
    else:
        columns = next(columns for columns in COLUMNS if columns << lane_bits >= group_size)
        aligned = vectors and columns >= 4
        ragged = num_experts != WARP * columns
        flags = (int(aligned), int(ragged), top_k, scoring, int(whole_softmax))
        numbers = (*sizes, *flags, *rules, *groups, group_size, lane_bits)
        choices: dict[str, Any] = {"gating_output": dtype, "columns": columns}
        choose = Launch(registers.choose_experts, device, *warps(num_tokens), numbers, choices)
    return GatingPlan(
        arrays.contiguous(torch.float32, num_tokens, top_k),
        arrays.contiguous(torch.int32, num_tokens, top_k),
        choose,
        in_memory,
        group_scores,
    )


@planned
def _plan_topk(
    gating_output: Layout, top_k: int, renormalize: bool, correction_bias: Layout | None, scoring_func: str
) -> GatingPlan:
    return _plan_gating(gating_output, top_k, renormalize, correction_bias, scoring_func)


@planned
def _plan_grouped(
    gating_output: Layout,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    scoring_func: str,
    correction_bias: Layout | None,
    group_score: str | None,
    routed_scaling_factor: float,
) -> GatingPlan:
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_experts = gating_output.shape[1]
    limit = f"num_experts = {num_experts}"
    num_expert_group = checks.integer("num_expert_group", num_expert_group, 1, num_experts, limit)
    checks.divides("num_expert_group", num_expert_group, "num_experts", num_experts)
    limit = f"num_expert_group = {num_expert_group}"
    topk_group = checks.integer("topk_group", topk_group, 1, num_expert_group, limit)
    eligible = topk_group * (num_experts // num_expert_group)
    top_k = checks.integer("top_k", top_k, 1, eligible, f"the {eligible} experts of {topk_group} groups")
    checks.choice("scoring_func", scoring_func, SCORING)
    if group_score is None:
        group_score = "max" if correction_bias is None else "top2_sum"
    checks.choice("group_score", group_score, GROUP_SCORES)
    checks.number("routed_scaling_factor", routed_scaling_factor)
    groups = (num_expert_group, topk_group, group_score)
    return _plan_gating(
        *(gating_output, top_k, renormalize, correction_bias, scoring_func, *groups, routed_scaling_factor)
    )


def _choose(plan: GatingPlan, gating_output: torch.Tensor, correction_bias: torch.Tensor | None) -> TopK:
    topk_weights = arrays.empty(*plan.topk_weights)
    topk_ids = arrays.empty(*plan.topk_ids)
    if not plan.in_memory:
        plan.choose(gating_output, correction_bias, topk_weights, topk_ids)
    else:
        scores = arrays.empty(*plan.group_scores) if plan.group_scores else None
        plan.choose(gating_output, correction_bias, scores, topk_weights, topk_ids)
    return new_tuple(TopK, (topk_weights, topk_ids))


def _topk(scoring_func: str, gating_output: Any, top_k: int, renormalize: bool, correction_bias: Any) -> TopK:
    plan = _plan_topk(layout(gating_output), top_k, renormalize, layout(correction_bias), scoring_func)
    if checks.VALIDATE:
        checks.logits("gating_output", gating_output)
    if gating_output.requires_grad and torch.is_grad_enabled():
        options = {"top_k": top_k, "renormalize": renormalize, "correction_bias": correction_bias}
        choose = functools.partial(_topk, scoring_func, **options)
        return differentiable(choose, gating_output, scoring_func, renormalize)
    if arrays.answered_by_reference(gating_output):
        function = getattr(reference, f"topk_{scoring_func}")
        return arrays.by_reference(function, gating_output, top_k, renormalize, correction_bias)
    return _choose(plan, gating_output, correction_bias)


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
    captures into CUDA graphs, allocates the results only (above 1024 experts
    or 32 groups also one float32 per token and group).

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, -3, 1, 2]], np.float32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="top2_sum").topk_ids
    array([[3]], dtype=int32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="max").topk_ids
    array([[0]], dtype=int32)
    """
    rules = (renormalize, scoring_func, layout(correction_bias), group_score, routed_scaling_factor)
    plan = _plan_grouped(layout(gating_output), top_k, num_expert_group, topk_group, *rules)
    if checks.VALIDATE:
        checks.logits("gating_output", gating_output)
    if gating_output.requires_grad and torch.is_grad_enabled():
        choose = functools.partial(
            grouped_topk,
            top_k=top_k,
            num_expert_group=num_expert_group,
            topk_group=topk_group,
            renormalize=renormalize,
            scoring_func=scoring_func,
            correction_bias=correction_bias,
            group_score=group_score,
            routed_scaling_factor=routed_scaling_factor,
        )
        return differentiable(choose, gating_output, scoring_func, renormalize, routed_scaling_factor)
    if arrays.answered_by_reference(gating_output):
        return arrays.by_reference(
            reference.grouped_topk,
            *(gating_output, top_k, num_expert_group, topk_group, renormalize),
            scoring_func=scoring_func,
            correction_bias=correction_bias,
            group_score=group_score,
            routed_scaling_factor=routed_scaling_factor,
        )
    return _choose(plan, gating_output, correction_bias)
