"""The step between the two matrices of an expert: bias, gate, activation."""

import math
from typing import Any, NamedTuple

import numpy as np


class Rule(NamedTuple):
    """The layout of gates and ups in a row, and their limit, alpha and shift; see `moe_activation`."""

    interleaved: bool
    limit: float
    alpha: float
    shift: float


RULES = {
    "silu": Rule(False, math.inf, 1.0, 0.0),
    "gelu": Rule(False, math.inf, 1.0, 0.0),
    "gelu_tanh": Rule(False, math.inf, 1.0, 0.0),
    "swiglu_oai": Rule(True, 7.0, 1.702, 1.0),
    "none": Rule(False, math.inf, 1.0, 0.0),
}


def rule_of(activation: str, interleaved: bool | None, limit: float | None, alpha: float | None) -> Rule:
    """Return the rule of an activation; each given value replaces the default.

    >>> rule_of("swiglu_oai", None, 5.0, None)
    Rule(interleaved=True, limit=5.0, alpha=1.702, shift=1.0)
    """
    rule = RULES[activation]
    given = {"interleaved": interleaved, "limit": limit, "alpha": alpha}
    return rule._replace(**{name: value for name, value in given.items() if value is not None})


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return ``1 / (1 + exp(-x))``, accurate also for x far below zero.

    >>> sigmoid(np.array([-100.0, 0.0]))
    array([3.72007598e-44, 5.00000000e-01])
    """
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """Return the share of a standard normal distribution that lies below x.

    >>> normal_cdf(np.array([0.0, 1.0])).round(4)
    array([0.5   , 0.8413])
    """
    return 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x * math.sqrt(0.5))


def curve(gate: np.ndarray, activation: str, alpha: float) -> np.ndarray:
    """Return the activation of gates."""
    if activation == "gelu":
        return gate * normal_cdf(gate)
    if activation == "gelu_tanh":  # 1 + tanh(x) == 2 * sigmoid(2 * x), which is accurate far below zero
        return gate * sigmoid(math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3))
    return gate * sigmoid(alpha * gate)


def slope(gate: np.ndarray, activation: str, alpha: float) -> np.ndarray:
    """Return the derivative of `curve` by the gate."""
    if activation == "gelu":
        return normal_cdf(gate) + gate * np.exp(-0.5 * gate**2) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        inside = math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)
        slope_inside = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * gate**2)
        share, rest = sigmoid(inside), sigmoid(-inside)
        return share + gate * slope_inside * share * rest
    share, rest = sigmoid(alpha * gate), sigmoid(-alpha * gate)
    return share + alpha * gate * share * rest


def biased_rows(
    gate_up: np.ndarray, expert_first_token_offset: np.ndarray | None, bias: np.ndarray | None
) -> np.ndarray:
    """Return the rows in use, in float64, each with the bias of its expert."""
    if expert_first_token_offset is None:
        return gate_up.astype(np.float64)
    rows = gate_up[: expert_first_token_offset[-1]].astype(np.float64)
    if bias is not None:
        first = np.clip(expert_first_token_offset, 0, len(rows))
        rows += np.repeat(bias, np.diff(first), axis=0)
    return rows


def halves(rows: np.ndarray, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return views of the gates and of the ups in rows of both."""
    if interleaved:
        return rows[:, 0::2], rows[:, 1::2]
    width = rows.shape[1] // 2
    return rows[:, :width], rows[:, width:]


def moe_activation(
    gate_up: np.ndarray,
    expert_first_token_offset: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    activation: str = "silu",
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
) -> np.ndarray:
    """Add the bias of each row's expert, apply the activation to the gates, and multiply by the ups.

    Parameters
    ----------
    gate_up
        float32 or float16 [num_rows, 2 * width], rows in expert order.
    expert_first_token_offset
        int64 [num_experts + 1]: expert e has the rows from ``offset[e]`` up to ``offset[e + 1]``. Rows from the last
        offset on are unused. Without offsets all rows are in use.
    bias
        float [num_experts, 2 * width], the bias of each expert, added first. It requires offsets.
    activation
        "silu" is ``gate * sigmoid(alpha * gate)``. "gelu" uses the error function, and "gelu_tanh" its tanh
        approximation. "swiglu_oai" is like silu, multiplied by the up plus 1. "none" only adds the bias; its rows have
        no gates and ups.
    interleaved
        True if a row holds gate, up, gate, up, ..., False if it holds all gates before all ups. By default True for
        "swiglu_oai" only.
    limit
        Upper bound of the gates, and bound of the magnitude of the ups. By default 7 for "swiglu_oai" and no limit for
        the others.
    alpha
        The alpha of "silu" and "swiglu_oai", by default 1 and 1.702.

    Returns
    -------
    np.ndarray
        [num_rows, width] in the dtype of `gate_up`; for "none" as wide as `gate_up`. Unused rows are zeros.

    Examples
    --------
    >>> rows = np.array([[0.0, 2.0, 10.0, 20.0]], np.float32)
    >>> moe_activation(rows).round(3)
    array([[ 0.   , 35.232]], dtype=float32)
    >>> moe_activation(rows, activation="swiglu_oai").round(3)
    array([[ 0., 56.]], dtype=float32)
    >>> moe_activation(rows, np.array([0, 0, 1]), np.array([[5.0] * 4, [1.0] * 4]), activation="none")
    array([[ 1.,  3., 11., 21.]], dtype=float32)
    """
    rule = rule_of(activation, interleaved, limit, alpha)
    rows = biased_rows(gate_up, expert_first_token_offset, bias)
    if activation != "none":
        gate, up = halves(rows, rule.interleaved)
        up = np.clip(up, -rule.limit, rule.limit)
        rows = curve(np.minimum(gate, rule.limit), activation, rule.alpha) * (up + rule.shift)
    activated = np.zeros((len(gate_up), rows.shape[1]), gate_up.dtype)
    activated[: len(rows)] = rows
    return activated


def moe_activation_backward(
    gate_up: np.ndarray,
    grad_activated: np.ndarray,
    expert_first_token_offset: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    activation: str = "silu",
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
) -> np.ndarray:
    """Return the gradient of a loss by `gate_up`, given the gradient by the result of `moe_activation`.

    Parameters
    ----------
    gate_up, expert_first_token_offset, bias, activation, interleaved, limit, alpha
        As in `moe_activation`.
    grad_activated
        float [num_rows, width], the gradient by the result. Unused rows may hold anything.

    Returns
    -------
    np.ndarray
        Shape and dtype of `gate_up`; unused rows are zeros. The sums over the rows of each expert are the gradient by
        the bias.

    Examples
    --------
    >>> moe_activation_backward(np.array([[0.0, 10.0]]), np.array([[1.0]]))  # half of the up, nothing of the gate
    array([[5., 0.]])
    >>> moe_activation_backward(np.array([[0.0, 10.0]]), np.array([[1.0]]), limit=8.0)
    array([[4., 0.]])
    """
    rule = rule_of(activation, interleaved, limit, alpha)
    rows = biased_rows(gate_up, expert_first_token_offset, bias)
    grad = grad_activated[: len(rows)].astype(np.float64)
    grad_gate_up = np.zeros_like(gate_up)
    if activation == "none":
        grad_gate_up[: len(rows)] = grad
        return grad_gate_up
    gate, up = halves(rows, rule.interleaved)
    grad_gate, grad_up = halves(grad_gate_up[: len(rows)], rule.interleaved)
    lowered, clipped = np.minimum(gate, rule.limit), np.clip(up, -rule.limit, rule.limit)
    by_gate = grad * slope(lowered, activation, rule.alpha) * (clipped + rule.shift)
    grad_gate[:] = np.where(gate <= rule.limit, by_gate, 0.0)
    grad_up[:] = np.where(np.abs(up) <= rule.limit, grad * curve(lowered, activation, rule.alpha), 0.0)
    return grad_gate_up


def sum_rows(rows: np.ndarray, expert_first_token_offset: np.ndarray) -> np.ndarray:
    """Sum the rows of each expert.

    >>> sum_rows(np.array([[1.0], [2.0], [4.0], [8.0]]), np.array([0, 2, 2, 3]))
    array([[3.],
           [0.],
           [4.]])
    """
    num_experts = len(expert_first_token_offset) - 1
    sums = np.zeros((num_experts, rows.shape[1]))
    for expert in range(num_experts):
        sums[expert] = rows[slice(*expert_first_token_offset[expert : expert + 2])].sum(axis=0, dtype=np.float64)
    return sums.astype(rows.dtype)


def weighted_activation_backward(
    gate_up: np.ndarray,
    grad: np.ndarray,
    topk_weights: np.ndarray,
    inv_permuted_idx: np.ndarray,
    expert_first_token_offset: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differentiate activated rows that are multiplied by the weights of their slots.

    Parameters
    ----------
    gate_up, expert_first_token_offset, bias, **options
        As in `moe_activation`.
    grad
        float [num_rows, width], the gradient of a loss by the weighted rows.
    topk_weights, inv_permuted_idx
        float and int32 [num_tokens, top_k], the weight and the row of each slot; a row has at most one slot.

    Returns
    -------
    tuple of np.ndarray
        The gradient by `gate_up`, the weighted rows, and the gradient by the weights. Rows without a slot are zeros.

    Examples
    --------
    >>> rows, weights, places = np.array([[0.0, 10.0]]), np.array([[0.5, 2.0]]), np.array([[-1, 0]])
    >>> weighted_activation_backward(rows, np.array([[1.0]]), weights, places)
    (array([[10.,  0.]]), array([[0.]]), array([[0., 0.]]))
    """
    activated = moe_activation(gate_up, expert_first_token_offset, bias, **options).astype(np.float64)
    weight_of_row = np.zeros((len(gate_up), 1))
    present = (inv_permuted_idx >= 0) & (inv_permuted_idx < len(gate_up))
    weight_of_row[inv_permuted_idx[present], 0] = topk_weights[present]
    of_weighted = np.where(weight_of_row == 0, 0.0, weight_of_row * grad)
    by_rows = moe_activation_backward(gate_up, of_weighted, expert_first_token_offset, bias, **options)
    by_weights = np.zeros(topk_weights.shape)
    by_weights[present] = (activated * grad).sum(1)[inv_permuted_idx[present]]
    return by_rows, (weight_of_row * activated).astype(gate_up.dtype), by_weights.astype(topk_weights.dtype)
