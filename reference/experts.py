"""Run the experts on all tokens: move rows, multiply, activate, multiply, combine."""

from typing import Any

import numpy as np
from numba_moe.reference.activation import moe_activation
from numba_moe.reference.permute import moe_permute, moe_unpermute


def multiply_by_expert(rows: np.ndarray, weights: np.ndarray, expert_first_token_offset: np.ndarray) -> np.ndarray:
    """Multiply the rows of each expert e by ``weights[e].T``; rows without an expert become zeros.

    >>> weights = np.array([[[1.0, 1.0]], [[0.0, 9.0]]])
    >>> multiply_by_expert(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), weights, np.array([0, 1, 2]))
    array([[ 3.],
           [36.],
           [ 0.]])
    """
    products = np.zeros((len(rows), weights.shape[1]), rows.dtype)
    for expert, weight in enumerate(weights):
        own = slice(*expert_first_token_offset[expert : expert + 2])
        products[own] = rows[own].astype(np.float64) @ weight.T.astype(np.float64)
    return products


def first_half(
    hidden_states: np.ndarray,
    gate_up_proj: np.ndarray,
    topk_ids: np.ndarray,
    expert_map: np.ndarray | None = None,
    gate_up_bias: np.ndarray | None = None,
    **activation: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the activated rows in expert order, the offset of each expert, and the row of each slot."""
    num_experts = len(gate_up_proj) if expert_map is None else len(expert_map)
    permuted = moe_permute(hidden_states, topk_ids, num_experts, expert_map)
    offset = permuted.expert_first_token_offset[: len(gate_up_proj) + 1]
    rows = multiply_by_expert(permuted.permuted_hidden_states, gate_up_proj, offset)
    return moe_activation(rows, offset, gate_up_bias, **activation), offset, permuted.inv_permuted_idx


def fused_experts(
    hidden_states: np.ndarray,
    gate_up_proj: np.ndarray,
    down_proj: np.ndarray,
    topk_weights: np.ndarray,
    topk_ids: np.ndarray,
    *,
    activation: str = "silu",
    expert_map: np.ndarray | None = None,
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
) -> np.ndarray:
    """Send each token through its experts and sum their weighted results.

    Each step computes in float64 and rounds its result to the dtype of `hidden_states`.

    Parameters
    ----------
    hidden_states
        float32 or float16 [num_tokens, hidden].
    gate_up_proj
        float [num_experts, 2 * width, hidden], the first matrix of each expert of this rank. For an activation whose
        name ends in "_no_mul" it has `width` rows.
    down_proj
        float [num_experts, hidden, width], the second matrix of each expert.
    topk_weights
        float [num_tokens, top_k].
    topk_ids
        int32 or int64 [num_tokens, top_k], the experts of each token. An id outside the experts adds nothing.
    activation, interleaved, limit, alpha, beta, linear_beta
        The step between the matrices; see `moe_activation`.
    expert_map
        int32 or int64 [experts of all ranks]: the index of each expert in the matrices. -1 or any other number outside
        ``[0, num_experts)`` means an expert of another rank, which adds nothing.
    gate_up_bias
        float [num_experts, rows of `gate_up_proj`], added after the first matrix.
    down_bias
        float [num_experts, hidden], added after the second.

    Returns
    -------
    np.ndarray
        [num_tokens, hidden] in the dtype of `hidden_states`.

    Examples
    --------
    Expert 1 returns twice the result of expert 0. The second token chooses neither of them:

    >>> gate_up_proj = np.array([[[1.0], [1.0]], [[1.0], [2.0]]], np.float32)
    >>> weights, ids = np.array([[0.5, 0.5], [1.0, 1.0]], np.float32), np.array([[0, 1], [-1, 2]])
    >>> tokens = np.array([[20.0], [30.0]], np.float32)
    >>> fused_experts(tokens, gate_up_proj, np.ones((2, 1, 1), np.float32), weights, ids)
    array([[600.],
           [  0.]], dtype=float32)
    """
    options: dict[str, Any] = {"activation": activation, "interleaved": interleaved, "limit": limit, "alpha": alpha}
    options |= {"beta": beta, "linear_beta": linear_beta}
    rows, offset, places = first_half(hidden_states, gate_up_proj, topk_ids, expert_map, gate_up_bias, **options)
    rows = moe_activation(multiply_by_expert(rows, down_proj, offset), offset, down_bias, activation="none")
    return moe_unpermute(rows, topk_weights, places)
