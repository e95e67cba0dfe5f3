"""Choose the experts of each token and compute their weights: top-k by four kinds of scores, with or without groups."""

from typing import Any

import torch

from numba_moe.ops.gating.weight_gradients import gating_backward
from numba_moe.ops.gating.which_kernel import GatingPlan, grouped_plan, topk_plan
from numba_moe.reference import gating as reference
from numba_moe.reference.gating import TopK
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.op import op


def choose(
    plan: GatingPlan,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    **extras: torch.Tensor | None,
) -> None:
    """Write weights and ids by the one launch of a plan; `extras` are the arrays of options."""
    if plan.group_scores is not None:
        extras["group_scores"] = arrays.empty(*plan.group_scores)
    plan.choose(
        gating_output=gating_output,
        correction_bias=correction_bias,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        **extras,
    )


@op(reference.topk_softmax)
def topk_softmax(
    gating_output: Array,
    top_k: int,
    renormalize: bool = False,
    correction_bias: Array | None = None,
    *,
    out: TopK | None = None,
) -> TopK:
    """Choose the experts of each token by softmax scores.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Number of experts per token, at most num_experts.
    renormalize : bool
        Divide the weights of each token by their sum, or by 1 if that sum is not positive.
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores when experts are chosen. The weights do not contain it.
    out : tuple of two arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k], best first. topk_ids : int32 of the same shape, distinct in
        each row.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, or `top_k` above num_experts.

    Notes
    -----
    The lower id wins a tie. Without a bias experts are compared by their logits, so rounding of scores causes no ties.
    In a row with NaN or +inf all scores are 0. The op runs on the caller's current stream without synchronising, and
    CUDA graphs can capture it. It allocates the results only. The weights have a first-order gradient by logits that
    require one. The bias has no gradient.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_softmax(np.log(np.array([[0.1, 0.6, 0.3]], np.float32)), 2)
    >>> ids, weights.round(4)
    (array([[1, 2]], dtype=int32), array([[0.6, 0.3]], dtype=float32))
    """


@op(reference.topk_sigmoid, like=topk_softmax)
def topk_sigmoid(
    gating_output: Array,
    top_k: int,
    renormalize: bool = False,
    correction_bias: Array | None = None,
    *,
    out: TopK | None = None,
) -> TopK:
    """Choose the experts of each token by sigmoid scores.

    Notes
    -----
    The lower id wins a tie. A NaN logit scores 0 and, without a bias, ranks last. The op runs on the caller's current
    stream without synchronising, and CUDA graphs can capture it. It allocates the results only. The weights have a
    first-order gradient by logits that require one. The bias has no gradient.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_sigmoid(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[0.8808, 0.5   ]], dtype=float32))
    """


@op(reference.topk_softplus_sqrt, like=topk_softmax)
def topk_softplus_sqrt(
    gating_output: Array,
    top_k: int,
    renormalize: bool = False,
    correction_bias: Array | None = None,
    *,
    out: TopK | None = None,
) -> TopK:
    """Choose the experts of each token by the square roots of softplus scores, ``sqrt(log(1 + exp(x)))``.

    Notes
    -----
    The lower id wins a tie. A logit of NaN or +inf scores 0 and, without a bias, ranks last. The op runs on the
    caller's current stream without synchronising, and CUDA graphs can capture it. It allocates the results only. The
    weights have a first-order gradient by logits that require one. The bias has no gradient.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_softplus_sqrt(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[1.4584, 0.8326]], dtype=float32))
    """


@op(reference.topk_raw, like=topk_softmax)
def topk_raw(
    gating_output: Array,
    top_k: int,
    renormalize: bool = False,
    correction_bias: Array | None = None,
    *,
    out: TopK | None = None,
) -> TopK:
    """Choose the experts of each token by the logits, which are the scores as they are.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The scores; rows may be strided.

    Notes
    -----
    The lower id wins a tie. A logit of NaN or infinity ranks last and has weight 0. The op runs on the caller's current
    stream without synchronising, and CUDA graphs can capture it. It allocates the results only. The weights have a
    first-order gradient by logits that require one. The bias has no gradient.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_raw(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[2., 0.]], dtype=float32))
    """


@op(reference.grouped_topk, like=topk_softmax)
def grouped_topk(
    gating_output: Array,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = False,
    *,
    scoring_func: str = "softmax",
    correction_bias: Array | None = None,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
    out: TopK | None = None,
) -> TopK:
    """Choose groups of experts first, then experts inside the chosen groups (DeepSeek-V2 and -V3).

    Parameters
    ----------
    top_k : int
        Number of experts per token, at most the experts in `topk_group` groups.
    num_expert_group : int
        Number of groups. Consecutive experts form a group, and all groups have the same size.
    topk_group : int
        Number of groups that each token chooses.
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt", "raw"}
        How logits become scores.
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores when groups and experts are chosen. The weights do not contain it.
    group_score : {"max", "top2_sum", "topk_sum"}, optional
        The score of a group. "max" is its best rank. "top2_sum" is the sum of its two best ``score + bias``. "topk_sum"
        sums its ``top_k // topk_group`` best, as in Megatron, and is "max" if that is 1. By default "top2_sum" with a
        bias and "max" without one, as in vLLM and SGLang.
    routed_scaling_factor : float
        Factor of the weights, applied after renormalising.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, experts not divisible by groups, more groups or experts than exist, or
        an unknown `scoring_func` or `group_score`.

    Notes
    -----
    The lower group and the lower expert win a tie. The op runs on the caller's current stream without synchronising,
    and CUDA graphs can capture it. It allocates the results only (above 1024 experts or 32 groups, and for a "topk_sum"
    of more than two, also one float32 per token and group). The weights have a first-order gradient by logits that
    require one. The bias has no gradient.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, -3, 1, 2]], np.float32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="top2_sum").topk_ids
    array([[3]], dtype=int32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="max").topk_ids
    array([[0]], dtype=int32)
    """


@grouped_topk.plan
def _(given: Any) -> GatingPlan:
    return grouped_plan(
        *(given.gating_output, given.top_k, given.num_expert_group, given.topk_group, given.renormalize),
        *(given.scoring_func, given.correction_bias, given.group_score, given.routed_scaling_factor),
    )


def outputs(given: Any) -> tuple[Contiguous, Contiguous]:
    shape = (given.gating_output.shape[0], given.top_k)
    return contiguous(torch.float32, *shape), contiguous(torch.int32, *shape)


def validate(given: Any) -> None:
    checks.logits("gating_output", given.gating_output)


def run(plan: GatingPlan, given: Any, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    choose(plan, given.gating_output, given.correction_bias, topk_weights, topk_ids)


def backward(ctx: Any, grad_weights: torch.Tensor) -> dict[str, Any]:
    """Return the gradient by the logits, of what `keep` kept."""
    logits, topk_weights, topk_ids = ctx.saved_tensors
    scoring_func, renormalize, factor = ctx.rules
    grad = gating_backward(logits, topk_weights, topk_ids, grad_weights, scoring_func, renormalize, factor)
    return {"gating_output": grad}


def keep(ctx: Any, logits: Any, topk_weights: Any, topk_ids: Any, *rules: Any) -> None:
    """Keep what `backward` needs: the rules are the scoring function, whether to renormalise, and the factor."""
    ctx.save_for_backward(logits, topk_weights, topk_ids)
    ctx.rules = rules


for _op in (topk_softmax, topk_sigmoid, topk_softplus_sqrt, topk_raw, grouped_topk):
    _op.outputs(outputs)
    _op.validate(validate)
    _op.run(run)
    _op.backward(backward)


@grouped_topk.saves
def _(ctx: Any, given: Any, topk_weights: Any, topk_ids: Any) -> None:
    rules = (given.scoring_func, given.renormalize, given.routed_scaling_factor)
    keep(ctx, given.gating_output, topk_weights, topk_ids, *rules)


def _by_scores(call: Any, scoring_func: str) -> None:
    """Give an op without groups its plan, and what its gradient needs."""

    @call.plan
    def _(given: Any) -> GatingPlan:
        rules = (given.top_k, given.renormalize, given.correction_bias, scoring_func)
        return topk_plan(given.gating_output, *rules)

    @call.saves
    def _(ctx: Any, given: Any, topk_weights: Any, topk_ids: Any) -> None:
        keep(ctx, given.gating_output, topk_weights, topk_ids, scoring_func, given.renormalize, 1.0)


_by_scores(topk_softmax, "softmax")
_by_scores(topk_sigmoid, "sigmoid")
_by_scores(topk_softplus_sqrt, "softplus_sqrt")
_by_scores(topk_raw, "raw")
