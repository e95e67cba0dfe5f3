"""Choose the experts of each token, and compute their weights.

Every op scores all experts of a row, ranks them, chooses the best `top_k`, and uses their scores as weights.
Without a correction bias experts rank by their logits, which have the order of the scores without rounding.
With a bias they rank by ``score + bias`` in float32, and the weights are still the scores.
"""

from typing import Any, NamedTuple

import numpy as np


class TopK(NamedTuple):
    """The chosen experts of each token, best first."""

    topk_weights: Any
    topk_ids: Any


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of each row; a row with NaN or +inf, or of -inf only, becomes zeros.

    >>> softmax(np.array([[0.0, np.log(3.0)], [0.0, np.nan]]))
    array([[0.25, 0.75],
           [0.  , 0.  ]])
    """
    peak = logits.max(axis=1, keepdims=True)
    usable = np.isfinite(peak)
    powers = np.exp(np.where(usable, logits, 0.0) - np.where(usable, peak, 0.0))
    return np.where(usable, powers / powers.sum(axis=1, keepdims=True), 0.0)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return ``1 / (1 + exp(-x))``; 0 for NaN.

    >>> sigmoid(np.array([0.0, np.inf, -np.inf, np.nan]))
    array([0.5, 1. , 0. , 0. ])
    """
    with np.errstate(over="ignore"):
        scores = 1.0 / (1.0 + np.exp(-logits))
    return np.where(np.isnan(logits), 0.0, scores)


def softplus_sqrt(logits: np.ndarray) -> np.ndarray:
    """Return ``sqrt(log(1 + exp(x)))``; 0 for NaN and +inf.

    >>> softplus_sqrt(np.array([np.log(np.e - 1), 100.0, -np.inf, np.inf]))
    array([ 1., 10.,  0.,  0.])
    """
    usable = logits < np.inf
    return np.where(usable, np.sqrt(np.logaddexp(0.0, np.where(usable, logits, 0.0))), 0.0)


def raw(logits: np.ndarray) -> np.ndarray:
    """Return the logits; a logit that is not finite becomes -inf.

    >>> raw(np.array([2.0, -3.0, np.inf, np.nan]))
    array([  2.,  -3., -inf, -inf])
    """
    return np.where(np.isfinite(logits), logits, -np.inf)


SCORING = {"softmax": softmax, "sigmoid": sigmoid, "softplus_sqrt": softplus_sqrt, "raw": raw}


def score_and_rank(
    gating_output: np.ndarray, scoring_func: str, correction_bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores in float64, and the ranks, by which experts are chosen; NaN ranks as -inf."""
    logits = gating_output.astype(np.float64)
    scores = SCORING[scoring_func](logits)
    if correction_bias is not None:
        ranks = scores.astype(np.float32) + correction_bias.astype(np.float32)
    elif scoring_func == "softmax":
        usable = np.isfinite(logits.max(axis=1, keepdims=True))
        ranks = np.where(usable, logits, 0.0)
    elif scoring_func == "sigmoid":
        ranks = logits
    else:
        ranks = np.where(logits < np.inf, logits, -np.inf)
    return scores, np.where(np.isnan(ranks), -np.inf, ranks)


def best(ranks: np.ndarray, count: int) -> np.ndarray:
    """Return the columns of the `count` largest values of each row, largest first; the lower column wins a tie.

    >>> best(np.array([[1.0, 5.0, 5.0, 2.0]]), 3)
    array([[1, 2, 3]])
    """
    return np.argsort(-ranks, axis=1, kind="stable")[:, :count]


def chosen_scores(scores: np.ndarray, topk_ids: np.ndarray) -> np.ndarray:
    """Return the scores of the chosen experts; 0 for -inf, which is chosen only if nothing else is left.

    >>> chosen_scores(np.array([[1.0, -np.inf, 3.0]]), np.array([[2, 0, 1]]))
    array([[3., 1., 0.]])
    """
    scores = np.take_along_axis(scores, topk_ids, axis=1)
    return np.where(np.isneginf(scores), 0.0, scores)


def weights_of(
    scores: np.ndarray,
    topk_ids: np.ndarray,
    renormalize: bool,
    routed_scaling_factor: float = 1.0,
    renormalize_epsilon: float = 0.0,
) -> np.ndarray:
    """Return the weights of the chosen experts: their scores, divided by a positive sum of them with `renormalize`."""
    weights = chosen_scores(scores, topk_ids)
    if renormalize:
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total > 0, total + renormalize_epsilon, 1.0)
    return weights * routed_scaling_factor


def weigh(scores: np.ndarray, topk_ids: np.ndarray, renormalize: bool, routed_scaling_factor: float = 1.0) -> TopK:
    """Return the chosen experts and their weights, which are rounded once."""
    weights = weights_of(scores, topk_ids, renormalize, routed_scaling_factor)
    return TopK(weights.astype(np.float32), topk_ids.astype(np.int32))


def topk_softmax(
    gating_output: np.ndarray, top_k: int, renormalize: bool = False, correction_bias: np.ndarray | None = None
) -> TopK:
    """Choose the experts of each token by softmax scores.

    Parameters
    ----------
    gating_output
        float32 or float16 [num_tokens, num_experts], the router's logits.
    top_k
        Number of experts per token, at most num_experts.
    renormalize
        Divide the weights of each token by their sum, or by 1 if that sum is not positive.
    correction_bias
        float32 [num_experts], added to the scores when experts are chosen. The weights do not contain it.

    Returns
    -------
    TopK
        topk_weights: float32 [num_tokens, top_k], best first. topk_ids: int32 of the same shape.

    Notes
    -----
    The lower id wins a tie. In a row with NaN or +inf all scores are 0. Without a bias the experts 0, 1, ... are then
    chosen with weight 0.

    Examples
    --------
    >>> logits = np.log(np.array([[0.1, 0.6, 0.3], [0.4, 0.2, 0.4]]))
    >>> weights, ids = topk_softmax(logits, 2)
    >>> ids
    array([[1, 2],
           [0, 2]], dtype=int32)
    >>> weights
    array([[0.6, 0.3],
           [0.4, 0.4]], dtype=float32)
    """
    scores, ranks = score_and_rank(gating_output, "softmax", correction_bias)
    return weigh(scores, best(ranks, top_k), renormalize)


def topk_sigmoid(
    gating_output: np.ndarray, top_k: int, renormalize: bool = False, correction_bias: np.ndarray | None = None
) -> TopK:
    """Choose the experts of each token by sigmoid scores.

    The parameters and the result are those of `topk_softmax`. A NaN logit scores 0 and ranks last; it does not affect
    other logits of the row.

    Examples
    --------
    >>> weights, ids = topk_sigmoid(np.array([[0.0, 2.0, -2.0]]), 2, correction_bias=np.array([0.0, 0.0, 1.0]))
    >>> ids
    array([[2, 1]], dtype=int32)
    >>> weights.round(4)
    array([[0.1192, 0.8808]], dtype=float32)
    """
    scores, ranks = score_and_rank(gating_output, "sigmoid", correction_bias)
    return weigh(scores, best(ranks, top_k), renormalize)


def topk_softplus_sqrt(
    gating_output: np.ndarray, top_k: int, renormalize: bool = False, correction_bias: np.ndarray | None = None
) -> TopK:
    """Choose the experts of each token by scores that are square roots of softplus.

    The parameters and the result are those of `topk_softmax`. A logit of NaN or +inf scores 0, and without a bias it
    ranks last.

    Examples
    --------
    >>> weights, ids = topk_softplus_sqrt(np.array([[0.0, 2.0, -2.0]]), 2)
    >>> ids
    array([[1, 0]], dtype=int32)
    >>> weights.round(4)
    array([[1.4584, 0.8326]], dtype=float32)
    """
    scores, ranks = score_and_rank(gating_output, "softplus_sqrt", correction_bias)
    return weigh(scores, best(ranks, top_k), renormalize)


def topk_raw(
    gating_output: np.ndarray, top_k: int, renormalize: bool = False, correction_bias: np.ndarray | None = None
) -> TopK:
    """Choose the experts of each token by the logits, which are also the scores.

    The parameters and the result are those of `topk_softmax`. A logit of NaN or infinity ranks last and has weight 0.
    Weights whose sum is not positive are not renormalised.

    Examples
    --------
    >>> topk_raw(np.array([[0.5, 3.5, np.inf]]), 3, renormalize=True)
    TopK(topk_weights=array([[0.875, 0.125, 0.   ]], dtype=float32), topk_ids=array([[1, 0, 2]], dtype=int32))
    """
    scores, ranks = score_and_rank(gating_output, "raw", correction_bias)
    return weigh(scores, best(ranks, top_k), renormalize)


def grouped_topk(
    gating_output: np.ndarray,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = False,
    *,
    scoring_func: str = "softmax",
    correction_bias: np.ndarray | None = None,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
) -> TopK:
    """Choose groups of experts first, then experts inside the chosen groups (DeepSeek-V2 and -V3).

    Parameters
    ----------
    gating_output
        float32 or float16 [num_tokens, num_experts], the router's logits.
    top_k
        Number of experts per token, at most the experts in `topk_group` groups.
    num_expert_group
        Number of groups. Consecutive experts form a group, and all groups have the same size.
    topk_group
        Number of groups that each token chooses.
    renormalize
        Divide the weights of each token by their sum, or by 1 if that sum is not positive.
    scoring_func
        "softmax", "sigmoid", "softplus_sqrt" or "raw".
    correction_bias
        float32 [num_experts], added to the scores when groups and experts are chosen. The weights do not contain it.
    group_score
        The score of a group. "max" is its best rank. "top2_sum" is the float32 sum of its two best ``score + bias`` (of
        one in groups of one expert). "topk_sum" sums its ``top_k // topk_group`` best, and is "max" if that is 1. By
        default "top2_sum" with a bias and "max" without one.
    routed_scaling_factor
        Factor of the weights, applied after renormalising.

    Returns
    -------
    TopK
        topk_weights: float32 [num_tokens, top_k], best first. topk_ids: int32 of the same shape.

    Notes
    -----
    The lower group and the lower expert win a tie.

    Examples
    --------
    Of the groups (0, 1) and (2, 3) the second has the larger sum of its best two. So expert 0 is not chosen, although
    its score is the best of all:

    >>> logits = np.array([[3.0, -3.0, 1.0, 2.0]])
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="top2_sum").topk_ids
    array([[3]], dtype=int32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="max").topk_ids
    array([[0]], dtype=int32)
    """
    groups = (num_expert_group, topk_group, group_score)
    scores, topk_ids = choose_in_groups(gating_output, top_k, scoring_func, correction_bias, *groups)
    return weigh(scores, topk_ids, renormalize, routed_scaling_factor)


def choose_in_groups(
    gating_output: np.ndarray,
    top_k: int,
    scoring_func: str,
    correction_bias: np.ndarray | None,
    num_expert_group: int,
    topk_group: int,
    group_score: str | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of all experts, and the chosen ones."""
    scores, ranks = score_and_rank(gating_output, scoring_func, correction_bias)
    picks = group_picks(group_score, top_k, topk_group, correction_bias)
    group_scores = score_groups(scores, ranks, num_expert_group, correction_bias, picks)
    chosen = np.zeros(group_scores.shape, bool)
    np.put_along_axis(chosen, best(group_scores, topk_group), True, axis=1)

    # Experts outside the chosen groups come last, even after experts inside whose rank is -inf.
    eligible = np.repeat(chosen, ranks.shape[1] // num_expert_group, axis=1)
    by_rank = best(ranks, ranks.shape[1])
    outside = ~np.take_along_axis(eligible, by_rank, axis=1)
    return scores, np.take_along_axis(by_rank, np.argsort(outside, axis=1, kind="stable")[:, :top_k], axis=1)


def group_picks(group_score: str | None, top_k: int, topk_group: int, correction_bias: np.ndarray | None) -> int:
    """Return how many experts of a group enter its score: 1 for the best rank, more for a sum."""
    if group_score is None:
        group_score = "max" if correction_bias is None else "top2_sum"
    return {"max": 1, "top2_sum": 2, "topk_sum": top_k // topk_group}[group_score]


def score_groups(
    scores: np.ndarray, ranks: np.ndarray, num_expert_group: int, correction_bias: np.ndarray | None, picks: int
) -> np.ndarray:
    """Return the score of each group [num_tokens, num_expert_group]: its best rank, or the sum of its best `picks`."""
    num_tokens, num_experts = ranks.shape
    shape = (num_tokens, num_expert_group, num_experts // num_expert_group)
    ranks = ranks.reshape(shape)
    if picks == 1:
        return ranks.max(axis=2)
    values = ranks if correction_bias is not None else scores.astype(np.float32).reshape(shape)
    best_of_group = np.argsort(-ranks, axis=2, kind="stable")[:, :, :picks]
    sums = np.take_along_axis(values, best_of_group, axis=2).sum(axis=2, dtype=np.float32)
    return np.where(np.isnan(sums), -np.inf, sums)


def slopes(logits: np.ndarray, scoring_func: str) -> np.ndarray:
    """Return the derivative of each score by its own logit, for scores that depend on no other logit.

    >>> slopes(np.array([0.0, np.nan]), "sigmoid")
    array([0.25, 0.  ])
    """
    if scoring_func == "sigmoid":
        return sigmoid(logits) * sigmoid(-logits)
    if scoring_func == "raw":
        return np.isfinite(logits).astype(np.float64)
    scores = softplus_sqrt(logits)
    return np.where(scores > 0, sigmoid(logits) / np.where(scores > 0, 2 * scores, 1.0), 0.0)


def through_scores(logits: np.ndarray, scores: np.ndarray, grad_scores: np.ndarray, scoring_func: str) -> np.ndarray:
    """Return the gradient by the logits, given that by their scores.

    >>> through_scores(np.zeros((1, 2)), np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]]), "softmax")
    array([[ 0.25, -0.25]])
    """
    if scoring_func == "softmax":
        return scores * (grad_scores - (scores * grad_scores).sum(axis=1, keepdims=True))
    return slopes(logits, scoring_func) * grad_scores


def gating_backward(
    gating_output: np.ndarray,
    topk_ids: np.ndarray,
    grad_weights: np.ndarray,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
) -> np.ndarray:
    """Return the gradient of a loss by the logits, given the gradient by the weights; the choice has no gradient.

    Parameters
    ----------
    gating_output
        float [num_tokens, num_experts], the router's logits.
    topk_ids
        int [num_tokens, top_k], the chosen experts.
    grad_weights
        float [num_tokens, top_k], the gradient of the loss by `topk_weights`.
    scoring_func, renormalize, routed_scaling_factor
        The options with which the weights were computed.

    Returns
    -------
    np.ndarray
        The gradient, with the shape and dtype of `gating_output`.

    Examples
    --------
    A softmax weight grows with its own logit and shrinks with every other logit, in proportion to their scores:

    >>> logits = np.log(np.array([[0.3, 0.1, 0.6]]))
    >>> gating_backward(logits, np.array([[2, 0]]), np.array([[1.0, 0.0]])).round(4)
    array([[-0.18, -0.06,  0.24]])
    """
    logits = gating_output.astype(np.float64)
    scores = SCORING[scoring_func](logits)
    grad = grad_weights.astype(np.float64) * routed_scaling_factor
    if renormalize:
        chosen = chosen_scores(scores, topk_ids)
        total = chosen.sum(axis=1, keepdims=True)
        divisor = np.where(total > 0, total, 1.0)
        through_total = np.where(total > 0, (grad * chosen).sum(axis=1, keepdims=True) / divisor, 0.0)
        grad = (grad - through_total) / divisor
    grad_scores = np.zeros(scores.shape)
    np.put_along_axis(grad_scores, topk_ids.astype(np.int64), grad, axis=1)
    return through_scores(logits, scores, grad_scores, scoring_func).astype(gating_output.dtype)
