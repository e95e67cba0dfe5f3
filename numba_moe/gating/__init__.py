"""The experts of each token, and how much each weighs: top-k by four kinds of scores, in groups or not."""

import functools
from typing import Any

import torch

from numba_moe.gating.backward import differentiable
from numba_moe.gating.plans import GatingPlan, plan_grouped, plan_topk
from numba_moe.reference import gating as reference
from numba_moe.reference.gating import TopK
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import layout, new_tuple


def run_plan(
    plan: GatingPlan,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor | None,
    **extras: torch.Tensor | None,
) -> TopK:
    topk_weights = arrays.empty(*plan.topk_weights)
    topk_ids = arrays.empty(*plan.topk_ids)
    if plan.group_scores is not None:
        extras["group_scores"] = arrays.empty(*plan.group_scores)
    plan.choose(
        gating_output=gating_output,
        correction_bias=correction_bias,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        **extras,
    )
    return new_tuple(TopK, (topk_weights, topk_ids))


def _topk(scoring_func: str, gating_output: Any, top_k: int, renormalize: bool, correction_bias: Any) -> TopK:
    plan = plan_topk(layout(gating_output), top_k, renormalize, layout(correction_bias), scoring_func)
    if checks.VALIDATE:
        checks.logits("gating_output", gating_output)
    if gating_output.requires_grad and torch.is_grad_enabled():
        options = {"top_k": top_k, "renormalize": renormalize, "correction_bias": correction_bias}
        choose = functools.partial(_topk, scoring_func, **options)
        return differentiable(choose, gating_output, scoring_func, renormalize)
    if arrays.answered_by_reference(gating_output):
        function = getattr(reference, f"topk_{scoring_func}")
        return arrays.by_reference(function, gating_output, top_k, renormalize, correction_bias)
    return run_plan(plan, gating_output, correction_bias)


def choose_grouped(
    gating_output: Any,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    scoring_func: str,
    correction_bias: Any,
    group_score: str | None,
    routed_scaling_factor: float,
) -> TopK:
    plan = plan_grouped(
        layout(gating_output),
        top_k,
        num_expert_group,
        topk_group,
        renormalize,
        scoring_func,
        layout(correction_bias),
        group_score,
        routed_scaling_factor,
    )
    if checks.VALIDATE:
        checks.logits("gating_output", gating_output)
    in_graph = gating_output.requires_grad and torch.is_grad_enabled()
    if not in_graph and not arrays.answered_by_reference(gating_output):
        return run_plan(plan, gating_output, correction_bias)
    options = {
        "top_k": top_k,
        "num_expert_group": num_expert_group,
        "topk_group": topk_group,
        "renormalize": renormalize,
        "scoring_func": scoring_func,
        "correction_bias": correction_bias,
        "group_score": group_score,
        "routed_scaling_factor": routed_scaling_factor,
    }
    if in_graph:
        choose = functools.partial(choose_grouped, **options)
        return differentiable(choose, gating_output, scoring_func, renormalize, routed_scaling_factor)
    return arrays.by_reference(reference.grouped_topk, gating_output, **options)


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
    synchronising, captures into CUDA graphs, allocates the results only. The weights have a gradient by logits that
    require one, of first order; the bias has none.

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
    stream without synchronising, captures into CUDA graphs, allocates the results only. The weights have a gradient
    by logits that require one, of first order; the bias has none.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_sigmoid(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[0.8808, 0.5   ]], dtype=float32))
    """
    return _topk("sigmoid", gating_output, top_k, renormalize, correction_bias)


@arrays.public
def topk_softplus_sqrt(gating_output: Any, top_k: int, renormalize: bool = False, correction_bias: Any = None) -> TopK:
    """Choose the experts of each token by the square roots of softplus scores, ``sqrt(log(1 + exp(x)))``.

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
    The lower id wins a tie. A logit of NaN or +inf scores 0 and, without a bias, ranks last. Runs on the caller's
    current stream without synchronising, captures into CUDA graphs, allocates the results only. The weights have a
    gradient by logits that require one, of first order; the bias has none.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_softplus_sqrt(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[1.4584, 0.8326]], dtype=float32))
    """
    return _topk("softplus_sqrt", gating_output, top_k, renormalize, correction_bias)


@arrays.public
def topk_raw(gating_output: Any, top_k: int, renormalize: bool = False, correction_bias: Any = None) -> TopK:
    """Choose the experts of each token by the logits, which are the scores as they are.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The scores, however the router made them; rows may be strided.
    top_k : int
        Experts per token, at most num_experts.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is not positive).
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
    The lower id wins a tie. A logit of NaN or infinity ranks last and weighs 0. Runs on the caller's current stream
    without synchronising, captures into CUDA graphs, allocates the results only. The weights have a gradient by
    logits that require one, of first order; the bias has none.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_raw(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[2., 0.]], dtype=float32))
    """
    return _topk("raw", gating_output, top_k, renormalize, correction_bias)


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
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt", "raw"}
        How logits become scores.
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice of groups and experts alone; the weights stay the scores.
    group_score : {"max", "top2_sum", "topk_sum"}, optional
        "max": the best rank of the group; "top2_sum": the sum of its two best ``score + bias``; "topk_sum": of its
        ``top_k // topk_group`` best, as Megatron does ("max" if that is one). By default "top2_sum" with a bias and
        "max" without one, as vLLM and SGLang do.
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
    captures into CUDA graphs, allocates the results only (above 1024 experts or 32 groups, and for a "topk_sum" of
    more than two, also one float32 per token and group). The weights have a gradient by logits that require one, of
    first order; the bias has none.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, -3, 1, 2]], np.float32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="top2_sum").topk_ids
    array([[3]], dtype=int32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="max").topk_ids
    array([[0]], dtype=int32)
    """
    return choose_grouped(
        gating_output,
        top_k,
        num_expert_group,
        topk_group,
        renormalize,
        scoring_func,
        correction_bias,
        group_score,
        routed_scaling_factor,
    )
