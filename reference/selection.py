"""Gating with all options: capped logits, mapped ids, padding, counts; and the weights of given experts."""

from typing import Any

import numpy as np
from numba_moe.reference.dispatch import dispatch_ids
from numba_moe.reference.gating import SCORING, TopK, choose_in_groups, chosen_scores, through_scores, weights_of


def adjust(gating_output: np.ndarray, softcap: float = 0.0, logit_bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``softcap * tanh(x / softcap) + bias`` in float32. Logits that are not finite are not capped.

    >>> adjust(np.array([[0.0, 40.0, -np.inf]]), softcap=30.0, logit_bias=np.array([0.5, 0.0, 0.0]))
    array([[ 0.5    , 26.10185,     -inf]], dtype=float32)
    """
    logits = gating_output.astype(np.float64)
    if 0 < softcap < np.inf:
        logits = np.where(np.isfinite(logits), softcap * np.tanh(logits / softcap), logits)
    logits = logits.astype(np.float32)
    return logits if logit_bias is None else logits + logit_bias.astype(np.float32)


def select_experts(
    gating_output: np.ndarray,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    correction_bias: np.ndarray | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
    expert_scale: np.ndarray | None = None,
    softcap: float = 0.0,
    bias_mode: str = "choice",
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    zero_expert_id: int = -1,
    identity_weights: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
    dispatch: Any = None,
    counts: np.ndarray | None = None,
    counts_enabled: np.ndarray | None = None,
    indices_dtype: Any = "int32",
) -> TopK:
    """Choose the experts of each token; one function has the options of all kinds of gating.

    The parameters up to `routed_scaling_factor` that are not listed here, and the result, are those of `grouped_topk`.
    The default is one group, so all experts compete.

    Parameters
    ----------
    renormalize_epsilon
        Added to the sum that `renormalize` divides by, if that sum is positive.
    expert_scale
        float32 [num_experts]: factors of the experts' weights, applied after renormalising.
    softcap
        Cap of the logits: a finite logit x becomes ``softcap * tanh(x / softcap)``. 0 and infinity mean no cap.
    bias_mode
        "choice": the correction bias changes which experts are chosen, not their weights. "logits": it is added to the
        logits after the cap, so it changes the weights too.
    num_fused_shared_experts
        Number of shared-expert slots appended to each token. Their ids are num_real, num_real + 1, ..., where num_real
        is ``num_experts - num_zero_experts``. Each has the sum of the token's chosen scores as its weight, or 1 with
        `renormalize`.
    shared_expert_weight
        The weight of each shared expert, instead of that.
    apply_routed_scaling_factor_on_output
        Multiply the weights by `routed_scaling_factor`. Otherwise the caller scales the layer's output by it, and the
        weights of shared experts are divided by it here.
    num_zero_experts
        Number of zero experts, the last ones. A zero expert returns a token unchanged. Its slots get the id
        `zero_expert_id` and weight 0.
    zero_expert_id
        Id written for a zero expert.
    identity_weights
        float32 [num_tokens], written: the sum of the weights of each token's zero experts.
    num_token_non_padded
        An integer [1] or []: the number of real tokens. The tokens after them are padding.
    is_padding
        bool [num_tokens], True for padding. Padding gets ids of -1 and weights of 0.
    dispatch
        A `DispatchTables`: the ids are mapped by `dispatch_ids`. A physical id that `indices_dtype` cannot hold becomes
        -1. Zero experts are not mapped.
    counts
        int32 or int64 [any] or [rows, any], written: 1 is added to the counter of each slot's returned id, if that id
        has a counter. Padding and zero experts are not counted. Token t adds to row ``t % rows``.
    counts_enabled
        int32 [1]: nothing is counted if it holds 0.
    indices_dtype
        Dtype of the ids: "int32", "int64" or "int16".

    Examples
    --------
    >>> logits = np.array([[3.0, -3.0, 1.0, 2.0], [0.0, 1.0, 0.0, 0.0]])
    >>> counts = np.zeros(5, np.int32)
    >>> weights, ids = select_experts(
    ...     logits, 2, scoring_func="raw", renormalize=True, num_fused_shared_experts=1, counts=counts
    ... )
    >>> ids
    array([[0, 3, 4],
           [1, 0, 4]], dtype=int32)
    >>> weights
    array([[0.6, 0.4, 1. ],
           [1. , 0. , 1. ]], dtype=float32)
    >>> counts
    array([2, 1, 0, 1, 2], dtype=int32)
    """
    logit_bias, choice_bias = (correction_bias, None) if bias_mode == "logits" else (None, correction_bias)
    logits = gating_output
    if softcap or logit_bias is not None:
        logits = adjust(gating_output, softcap, logit_bias)
    groups = (num_expert_group, topk_group, group_score)
    scores, topk_ids = choose_in_groups(logits, top_k, scoring_func, choice_bias, *groups)
    return send(
        *(scores, topk_ids, renormalize, renormalize_epsilon, routed_scaling_factor, expert_scale),
        *(num_fused_shared_experts, shared_expert_weight, apply_routed_scaling_factor_on_output),
        *(num_zero_experts, zero_expert_id, identity_weights),
        *(num_token_non_padded, is_padding, dispatch, counts, counts_enabled, indices_dtype),
    )


def weigh_experts(
    gating_output: np.ndarray,
    topk_ids: np.ndarray,
    *,
    input_ids: np.ndarray | None = None,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    routed_scaling_factor: float = 1.0,
    expert_scale: np.ndarray | None = None,
    softcap: float = 0.0,
    logit_bias: np.ndarray | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    zero_expert_id: int = -1,
    identity_weights: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
    dispatch: Any = None,
    counts: np.ndarray | None = None,
    counts_enabled: np.ndarray | None = None,
    indices_dtype: Any = "int32",
) -> TopK:
    """Weigh experts that were chosen before: recorded ones, or those that a table lists for each token id.

    The parameters not listed here, and the result, are those of `select_experts`.

    Parameters
    ----------
    gating_output
        float32 or float16 [num_tokens, num_experts], the router's logits.
    topk_ids
        int16, int32 or int64 [num_tokens, top_k], the experts. Ids outside ``[0, num_experts)`` become -1 with weight
        0.
    input_ids
        int32 or int64 [num_tokens]: the row of `topk_ids` that each token takes. `topk_ids` is then a table of any
        length. A token whose row is outside the table has no experts.
    logit_bias
        float32 [num_experts], added to the logits.

    Examples
    --------
    The first layers of DeepSeek-V4 choose experts by the token's id:

    >>> table = np.array([[0, 1], [2, 0], [1, 2]])
    >>> logits = np.log(np.array([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]))
    >>> weigh_experts(logits, table, input_ids=np.array([2, 1])).topk_ids
    array([[1, 2],
           [2, 0]], dtype=int32)
    >>> weigh_experts(logits, table, input_ids=np.array([2, 1]), renormalize=True).topk_weights.round(4)
    array([[0.6667, 0.3333],
           [0.5   , 0.5   ]], dtype=float32)
    """
    if input_ids is not None:
        known = (input_ids >= 0) & (input_ids < len(topk_ids))
        topk_ids = np.where(known[:, None], np.append(topk_ids, [[-1] * topk_ids.shape[1]], 0)[input_ids * known], -1)
    logits = adjust(gating_output, softcap, logit_bias) if softcap or logit_bias is not None else gating_output
    scores = SCORING[scoring_func](logits.astype(np.float64))
    unknown = (topk_ids < 0) | (topk_ids >= scores.shape[1])
    scores = np.append(scores, np.zeros((len(scores), 1)), axis=1)  # of the expert -1
    return send(
        *(scores, np.where(unknown, -1, topk_ids), renormalize, renormalize_epsilon, routed_scaling_factor),
        *(expert_scale, num_fused_shared_experts, shared_expert_weight, apply_routed_scaling_factor_on_output),
        *(num_zero_experts + 1, zero_expert_id, identity_weights),
        *(num_token_non_padded, is_padding, dispatch, counts, counts_enabled, indices_dtype),
    )


def send(
    scores: np.ndarray,
    topk_ids: np.ndarray,
    renormalize: bool,
    renormalize_epsilon: float,
    routed_scaling_factor: float,
    expert_scale: np.ndarray | None,
    num_fused_shared_experts: int,
    shared_expert_weight: float | None,
    apply_routed_scaling_factor_on_output: bool,
    num_not_real: int,
    zero_expert_id: int,
    identity_weights: np.ndarray | None,
    num_token_non_padded: np.ndarray | None,
    is_padding: np.ndarray | None,
    dispatch: Any,
    counts: np.ndarray | None,
    counts_enabled: np.ndarray | None,
    indices_dtype: Any,
) -> TopK:
    """Return the weights of the chosen experts, and their ids after every option that changes ids."""
    topk_ids = topk_ids.astype(np.int64)
    num_tokens = len(topk_ids)
    num_real = scores.shape[1] - num_not_real
    weights = weights_of(scores, topk_ids, renormalize, renormalize_epsilon=renormalize_epsilon)
    shared = np.ones(num_tokens) if renormalize else weights.sum(axis=1)
    if expert_scale is not None:
        weights = weights * expert_scale.astype(np.float64)[topk_ids]
    if apply_routed_scaling_factor_on_output:
        weights = weights * routed_scaling_factor
    elif num_fused_shared_experts:
        shared = shared / routed_scaling_factor
    if shared_expert_weight is not None:
        shared = np.full(num_tokens, shared_expert_weight)

    padded = np.zeros(num_tokens, bool)
    if num_token_non_padded is not None:
        padded |= np.arange(num_tokens) >= num_token_non_padded.item()
    if is_padding is not None:
        padded |= is_padding
    is_zero = topk_ids >= num_real
    if identity_weights is not None:
        identity_weights[:] = np.where(padded, 0.0, np.where(is_zero, weights, 0.0).sum(axis=1))

    more = num_real + np.arange(num_fused_shared_experts)
    weights = np.append(np.where(is_zero, 0.0, weights), np.outer(shared, np.ones(len(more))), axis=1)
    topk_ids = np.append(np.where(is_zero, -1, topk_ids), np.tile(more, (num_tokens, 1)), axis=1)
    weights[padded], topk_ids[padded] = 0.0, -1
    if dispatch is not None:
        physical_map, num_valid, algorithm, seed, step = dispatch
        rules = {"algorithm": algorithm, "seed": seed, "step": step}
        topk_ids = dispatch_ids(topk_ids, physical_map, num_valid, **rules)
        topk_ids = np.where(topk_ids <= np.iinfo(indices_dtype).max, topk_ids, -1)
    if counts is not None and (counts_enabled is None or counts_enabled[0]):
        tokens, picks = np.nonzero((topk_ids >= 0) & (topk_ids < counts.shape[-1]))
        rows = np.atleast_2d(counts)  # a view
        np.add.at(rows, (tokens % len(rows), topk_ids[tokens, picks]), 1)
    of_zero = np.append(is_zero & ~padded[:, None], np.zeros((num_tokens, len(more)), bool), axis=1)
    topk_ids = np.where(of_zero, zero_expert_id, topk_ids)
    return TopK(weights.astype(np.float32), topk_ids.astype(np.dtype(indices_dtype)))


def selection_backward(
    gating_output: np.ndarray,
    topk_ids: np.ndarray,
    grad_weights: np.ndarray,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    routed_scaling_factor: float = 1.0,
    expert_scale: np.ndarray | None = None,
    softcap: float = 0.0,
    logit_bias: np.ndarray | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    by_adjusted: bool = False,
) -> np.ndarray:
    """Return the gradient of a loss by the logits of `select_experts` or `weigh_experts`, given that by the weights.

    Parameters that are not listed here are those of `select_experts`, with its bias as `logit_bias` if it is added to
    logits.

    Parameters
    ----------
    topk_ids
        int [num_tokens, top_k or more], the experts that were chosen, in the first columns, before they became places
        or `zero_expert_id`; -1 for none, and throughout for padding.
    grad_weights
        float [num_tokens, top_k + num_fused_shared_experts], the gradient of the loss by `topk_weights`.
    by_adjusted
        By the logits as they are scored, in float32: after the cap and the bias.

    Examples
    --------
    A shared expert weighs the sum of the chosen scores, so its gradient goes to each of them:

    >>> logits, ids = np.zeros((1, 3)), np.array([[0, 2]])
    >>> selection_backward(logits, ids, np.array([[0.0, 0.0, 1.0]]), scoring_func="raw", num_fused_shared_experts=1)
    array([[1., 0., 1.]])
    """
    logits = adjust(gating_output, softcap, logit_bias) if softcap or logit_bias is not None else gating_output
    logits = logits.astype(np.float64)
    num_tokens, num_experts = logits.shape
    top_k = grad_weights.shape[1] - num_fused_shared_experts
    topk_ids = topk_ids[:, :top_k].astype(np.int64)
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    topk_ids = np.where(known, topk_ids, num_experts)
    scores = SCORING[scoring_func](logits)
    chosen = chosen_scores(np.append(scores, np.zeros((num_tokens, 1)), axis=1), topk_ids)

    grad = grad_weights.astype(np.float64)
    by_score = np.where(topk_ids < num_experts - num_zero_experts, grad[:, :top_k], 0.0)
    if expert_scale is not None:
        by_score = by_score * np.append(expert_scale, 0.0)[topk_ids]
    if apply_routed_scaling_factor_on_output:
        by_score = by_score * routed_scaling_factor
    total = chosen.sum(axis=1, keepdims=True)
    if renormalize:
        divisor = np.where(total > 0, total + renormalize_epsilon, 1.0)
        through_total = np.where(total > 0, (by_score * chosen).sum(axis=1, keepdims=True) / divisor, 0.0)
        by_score = (by_score - through_total) / divisor
    elif num_fused_shared_experts and shared_expert_weight is None:
        factor = 1.0 if apply_routed_scaling_factor_on_output else 1.0 / routed_scaling_factor
        by_score = by_score + factor * grad[:, top_k:].sum(axis=1, keepdims=True)
    grad_scores = np.zeros((num_tokens, num_experts + 1))
    np.add.at(grad_scores, (np.arange(num_tokens)[:, None], topk_ids), by_score)
    grad_logits = through_scores(logits, scores, grad_scores[:, :num_experts], scoring_func)
    if by_adjusted:
        return grad_logits.astype(np.float32)
    if 0 < softcap < np.inf:
        raw = gating_output.astype(np.float64)
        finite = np.isfinite(raw)
        grad_logits = grad_logits * np.where(finite, 1 - np.tanh(np.where(finite, raw, 0.0) / softcap) ** 2, 1.0)
    return grad_logits.astype(gating_output.dtype)
