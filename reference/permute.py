"""Rows moved into expert order, and combined again."""

from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.counting import count_tokens_per_expert, expert_of_slots, expert_offsets


class PermutedTokens(NamedTuple):
    """Rows in expert order, and the way back; see `moe_permute`."""

    permuted_hidden_states: Any
    expert_first_token_offset: Any
    permuted_idx: Any
    inv_permuted_idx: Any


def moe_permute(
    hidden_states: np.ndarray, topk_ids: np.ndarray, num_experts: int, expert_map: np.ndarray | None = None
) -> PermutedTokens:
    """Copy each token's row once for each of its experts, in expert order.

    Parameters
    ----------
    hidden_states
        float32 or float16 [num_tokens, hidden].
    topk_ids
        int32 or int64 [num_tokens, top_k]; ids outside ``[0, num_experts)`` are skipped.
    num_experts
        Number of experts that ids range over.
    expert_map
        int32 or int64 [num_experts]: this rank's id of each expert, -1 for an expert of another rank, whose slots
        are skipped.

    Returns
    -------
    PermutedTokens
        permuted_hidden_states: [num_tokens * top_k, hidden] in the dtype of `hidden_states`, zeros past the last
        row in use. expert_first_token_offset: int64 [num_experts + 1]; rows of expert e are ``offset[e]`` up to
        ``offset[e + 1]``. permuted_idx: int32 [num_tokens * top_k], the slot of each row, num_slots for unused
        rows. inv_permuted_idx: int32 [num_tokens, top_k], the row of each slot, -1 for skipped slots.

    Notes
    -----
    The order is stable: rows of one expert ascend by slot.

    Examples
    --------
    >>> rows = np.array([[1.0], [2.0]], np.float32)
    >>> permuted = moe_permute(rows, np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> permuted.permuted_hidden_states.ravel()
    array([1., 2., 1., 0.], dtype=float32)
    >>> permuted.expert_first_token_offset
    array([0, 2, 3])
    >>> permuted.permuted_idx
    array([1, 3, 0, 4], dtype=int32)
    >>> permuted.inv_permuted_idx
    array([[ 2,  0],
           [-1,  1]], dtype=int32)
    """
    num_slots = topk_ids.size
    experts = expert_of_slots(topk_ids, num_experts, expert_map)
    slots = np.argsort(experts, kind="stable")[np.count_nonzero(experts < 0) :]

    permuted_hidden_states = np.zeros((num_slots, hidden_states.shape[1]), hidden_states.dtype)
    permuted_idx = np.full(num_slots, num_slots, np.int32)
    inv_permuted_idx = np.full(num_slots, -1, np.int32)
    if num_slots:
        permuted_hidden_states[: len(slots)] = hidden_states[slots // topk_ids.shape[1]]
    permuted_idx[: len(slots)] = slots
    inv_permuted_idx[slots] = np.arange(len(slots))
    offsets = expert_offsets(count_tokens_per_expert(topk_ids, num_experts, expert_map))
    return PermutedTokens(permuted_hidden_states, offsets, permuted_idx, inv_permuted_idx.reshape(topk_ids.shape))


def moe_unpermute(permuted: np.ndarray, topk_weights: np.ndarray, inv_permuted_idx: np.ndarray) -> np.ndarray:
    """Sum each token's rows, weighted.

    Parameters
    ----------
    permuted
        float32 or float16 [num_rows, hidden], rows in expert order.
    topk_weights
        float32 [num_tokens, top_k].
    inv_permuted_idx
        int32 [num_tokens, top_k], the row of each slot; a slot whose index is outside ``[0, num_rows)`` adds nothing.

    Returns
    -------
    np.ndarray
        [num_tokens, hidden] in the dtype of `permuted`: ``sum over k of topk_weights[t, k] * permuted[inv[t, k]]``.

    Examples
    --------
    >>> rows = np.array([[10.0], [20.0], [30.0]], np.float32)
    >>> weights = np.array([[0.5, 0.5], [1.0, 0.25]], np.float32)
    >>> moe_unpermute(rows, weights, np.array([[2, 0], [-1, 1]], np.int32))
    array([[20.],
           [ 5.]], dtype=float32)
    """
    num_tokens, top_k = inv_permuted_idx.shape
    combined = np.zeros((num_tokens, permuted.shape[1]), np.float64)
    for k in range(top_k):
        rows = inv_permuted_idx[:, k]
        present = (rows >= 0) & (rows < len(permuted))
        weights = topk_weights[present, k, None].astype(np.float64)
        combined[present] += weights * permuted[rows[present]]
    return combined.astype(permuted.dtype)
