"""Experts without matrices: what they return needs no product, so their slots leave the sort."""

import numpy as np


def constant_experts(
    hidden_states: np.ndarray,
    topk_weights: np.ndarray,
    topk_ids: np.ndarray,
    num_experts: int,
    *,
    num_copies: int = 0,
    constants: np.ndarray | None = None,
    combined: np.ndarray | None = None,
) -> np.ndarray:
    """Sum what experts without matrices return for each token, weighted: the token itself, or a constant.

    Parameters
    ----------
    hidden_states
        float [num_tokens, hidden].
    topk_weights
        float [num_tokens, top_k].
    topk_ids
        int32 or int64 [num_tokens, top_k]. The ids from `num_experts` on are those of experts without matrices: first
        those that return the token, then those that return a constant. All other ids add nothing.
    num_experts
        Number of experts with matrices.
    num_copies
        Number of experts that return the token.
    constants
        float [num_constants, hidden], what each of the next experts returns.
    combined
        float [num_tokens, hidden], what the other experts returned. It is added.

    Returns
    -------
    np.ndarray
        [num_tokens, hidden] in the dtype of `hidden_states`.

    Examples
    --------
    Expert 2 returns the token, expert 3 a constant, and expert 4, which has none, zeros:

    >>> tokens, weights = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.5, 0.5], [0.25, 0.75]])
    >>> ids = np.array([[2, 3], [0, 4]])
    >>> constant_experts(tokens, weights, ids, num_experts=2, num_copies=1, constants=np.array([[10.0, 20.0]]))
    array([[ 5.5, 11. ],
           [ 0. ,  0. ]])
    """
    places = topk_ids.astype(np.int64) - num_experts
    total = np.zeros(hidden_states.shape) if combined is None else combined.astype(np.float64)
    tokens, picks = np.nonzero((places >= 0) & (places < num_copies))
    np.add.at(total, tokens, topk_weights[tokens, picks, None].astype(np.float64) * hidden_states[tokens])
    if constants is not None:
        places = places - num_copies
        tokens, picks = np.nonzero((places >= 0) & (places < len(constants)))
        rows = constants[places[tokens, picks]].astype(np.float64)
        np.add.at(total, tokens, topk_weights[tokens, picks, None] * rows)
    return total.astype(hidden_states.dtype)
