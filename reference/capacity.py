"""How many tokens an expert takes: at most its capacity, a multiple of a tile, or those that it chooses."""

import math
from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.gating import SCORING, TopK, best

DROP_POLICIES = ("probs", "position")
ROUNDINGS = ("nearest", "up", "down")


class ExpertChoice(NamedTuple):
    """The tokens of each expert, best first, and how much it weighs for them."""

    topk_weights: Any
    token_ids: Any


def expert_capacity(
    num_tokens: int, top_k: int, num_experts: int, capacity_factor: float, min_capacity: int = 0
) -> int:
    """Return how many slots an expert takes: its even share times the factor, rounded up.

    Parameters
    ----------
    num_tokens : int
        Tokens of a batch.
    top_k : int
        Experts of each.
    num_experts : int
        Number of experts.
    capacity_factor : float
        Slots of an expert over its even share; 1 leaves no room for uneven choices.
    min_capacity : int
        The least capacity.

    Returns
    -------
    int
        The number of slots.

    Raises
    ------
    ZeroDivisionError
        There are no experts.

    Notes
    -----
    Megatron-LM's `get_capacity` of all slots.

    Examples
    --------
    >>> expert_capacity(10, 2, 8, 1.25), expert_capacity(10, 2, 8, 1.0, min_capacity=4)
    (4, 4)
    """
    return max(math.ceil(num_tokens * top_k / num_experts * capacity_factor), min_capacity)


def apply_capacity(
    topk_weights: np.ndarray, topk_ids: np.ndarray, num_experts: int, capacity: int, *, drop_policy: str = "probs"
) -> TopK:
    """Drop the slots of each expert past its capacity: their ids become -1 and their weights 0.

    Parameters
    ----------
    topk_weights
        float [num_tokens, top_k].
    topk_ids
        int of the same shape; ids that are no expert's are dropped too.
    num_experts
        Number of experts.
    capacity
        Slots that an expert keeps.
    drop_policy
        "probs": those that weigh most, of equals the first. "position": the first.

    Returns
    -------
    TopK
        Of the shapes and dtypes that are given.

    Examples
    --------
    >>> weights, ids = np.array([[0.5], [0.7], [0.9]]), np.array([[1], [1], [0]])
    >>> apply_capacity(weights, ids, 2, 1).topk_ids.T
    array([[-1,  1,  0]])
    >>> apply_capacity(weights, ids, 2, 1, drop_policy="position").topk_ids.T
    array([[ 1, -1,  0]])
    """
    ids, weights = topk_ids.ravel(), topk_weights.ravel()
    order = np.argsort(-weights, kind="stable") if drop_policy == "probs" else np.arange(ids.size)
    kept = np.zeros(ids.size, bool)
    for expert in range(num_experts):
        kept[order[ids[order] == expert][:capacity]] = True
    kept = kept.reshape(topk_ids.shape)
    return TopK(np.where(kept, topk_weights, 0).astype(topk_weights.dtype), np.where(kept, topk_ids, -1))


def token_rounding(
    topk_weights: np.ndarray,
    topk_ids: np.ndarray,
    num_experts: int,
    tile: int,
    *,
    top_k: int | None = None,
    rounding: str = "nearest",
) -> TopK:
    """Round the number of slots of each expert to a multiple of a tile: some are dropped, or spare ones are added.

    Parameters
    ----------
    topk_weights
        float [num_tokens, picks], by which slots are ranked.
    topk_ids
        int of the same shape, each expert of a token at most once; ids that are no expert's are dropped too.
    num_experts
        Number of experts.
    tile
        What numbers are to be multiples of.
    top_k
        The picks that were chosen, the first of each token; those after them are spare. None: all were chosen.
    rounding
        "nearest" multiple, of two the even one; "up", or "down".

    Returns
    -------
    TopK
        Of the shapes and dtypes that are given; -1 with weight 0 for slots that were dropped or not added.

    Notes
    -----
    An expert keeps what was chosen before what is spare, and the larger weights first, of equals the first. One without
    enough spare slots takes all.

    Examples
    --------
    >>> ids = np.array([[0, 1], [0, 1], [0, 1], [1, 0]])
    >>> weights = np.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1], [0.8, 0.2]])
    >>> token_rounding(weights, ids, 2, 2, top_k=1).topk_ids.tolist()
    [[0, -1], [0, -1], [0, -1], [-1, 0]]
    """
    slots = np.arange(topk_ids.size).reshape(topk_ids.shape)
    is_spare = np.zeros(topk_ids.shape, bool)
    is_spare[:, topk_ids.shape[1] if top_k is None else top_k :] = True
    order = np.lexsort((slots.ravel(), -topk_weights.ravel(), is_spare.ravel()))
    kept = np.zeros(topk_ids.size, bool)
    for expert in range(num_experts):
        chosen = int(((topk_ids == expert) & ~is_spare).sum())
        number = {"nearest": round(chosen / tile), "up": -(-chosen // tile), "down": chosen // tile}[rounding] * tile
        kept[order[topk_ids.ravel()[order] == expert][:number]] = True
    kept = kept.reshape(topk_ids.shape)
    return TopK(np.where(kept, topk_weights, 0).astype(topk_weights.dtype), np.where(kept, topk_ids, -1))


def expert_choice(
    gating_output: np.ndarray,
    capacity: int,
    *,
    scoring_func: str = "softmax",
    is_padding: np.ndarray | None = None,
) -> ExpertChoice:
    """Let each expert choose its tokens.

    Parameters
    ----------
    gating_output
        float [num_tokens, num_experts], the router's logits.
    capacity
        Tokens of each expert, at most num_tokens.
    scoring_func
        "softmax" over the experts of a token, or "sigmoid".
    is_padding
        bool [num_tokens]: tokens that are chosen where there is no other, as -1 with weight 0.

    Returns
    -------
    ExpertChoice
        topk_weights: float32 [num_experts, capacity], best first. token_ids: int32 of the same shape.

    Notes
    -----
    The lower token wins a tie.

    Examples
    --------
    >>> logits = np.log(np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]))
    >>> expert_choice(logits, 2)
    ExpertChoice(topk_weights=array([[0.75, 0.5 ],
           [0.75, 0.5 ]], dtype=float32), token_ids=array([[0, 1],
           [2, 1]], dtype=int32))
    """
    scores = SCORING[scoring_func](gating_output.astype(np.float64)).astype(np.float32).T
    padded = np.zeros(scores.shape[1], bool) if is_padding is None else is_padding
    tokens = best(np.where(padded, -np.inf, scores), capacity)
    weights = np.where(padded[tokens], 0.0, np.take_along_axis(scores, tokens, axis=1))
    return ExpertChoice(weights.astype(np.float32), np.where(padded[tokens], -1, tokens).astype(np.int32))
