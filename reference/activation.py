"""The step between the two matrices of an expert: bias, gate, activation."""

import math
from typing import Any, NamedTuple

import numpy as np


class Rule(NamedTuple):
    """How an activation reads a row, and its numbers; None for a number that it does not have. See `moe_activation`."""

    halves: int = 2  # gates and ups, or 1: gates alone
    interleaved: bool = False
    limit: float | None = math.inf
    alpha: float | None = None
    beta: float | None = None
    linear_beta: float | None = None


RULES = {
    "silu": Rule(alpha=1.0, beta=0.0),
    "gelu": Rule(),
    "gelu_tanh": Rule(),
    "swiglu_oai": Rule(interleaved=True, limit=7.0, alpha=1.702, beta=1.0),
    "none": Rule(halves=1, limit=None),
    "swiglu_step": Rule(limit=7.0, alpha=1.0),
    "relu2": Rule(),
    "situ": Rule(beta=4.0, linear_beta=math.inf),
    "silu_no_mul": Rule(halves=1, alpha=1.0),
    "gelu_no_mul": Rule(halves=1),
    "gelu_tanh_no_mul": Rule(halves=1),
    "relu2_no_mul": Rule(halves=1),
}
ACTIVATIONS = tuple(name for name in RULES if name != "none")
OPTIONS = Rule._fields[1:]  # what a caller may say


def rule_of(
    activation: str,
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
) -> Rule:
    """Return the rule of an activation; each given value replaces the default.

    >>> rule_of("swiglu_oai", limit=5.0)
    Rule(halves=2, interleaved=True, limit=5.0, alpha=1.702, beta=1.0, linear_beta=None)
    """
    given = {"interleaved": interleaved, "limit": limit, "alpha": alpha, "beta": beta, "linear_beta": linear_beta}
    return RULES[activation]._replace(**{name: value for name, value in given.items() if value is not None})


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


def share(gate: np.ndarray, activation: str, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return what silu or gelu multiplies gates by, and its derivative."""
    if activation.startswith("gelu") and "tanh" not in activation:
        return normal_cdf(gate), np.exp(-0.5 * gate**2) / math.sqrt(2 * math.pi)
    alpha = 1.0 if rule.alpha is None else rule.alpha
    inside, slope = gate * alpha, alpha
    if activation.startswith("gelu"):  # 1 + tanh(x) == 2 * sigmoid(2 * x), which is accurate far below zero
        inside = math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)
        slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * gate**2)
    return sigmoid(inside), slope * sigmoid(inside) * sigmoid(-inside)


def bent(values: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Return ``bound * tanh(values / bound)``, and its derivative.

    >>> bent(np.array([0.0, 9.0]), np.inf)
    (array([0., 9.]), array([1., 1.]))
    """
    if bound == math.inf:
        return values, np.ones_like(values)
    tanh = np.tanh(values / bound)
    return bound * tanh, 1 - tanh**2


def curve(gate: np.ndarray, activation: str, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return the activation of gates, and its derivative."""
    if activation.startswith("relu2"):
        positive = np.maximum(gate, 0.0)
        return positive**2, 2 * positive
    part, slope = share(gate, activation, rule)
    if activation == "situ":
        value, inner = bent(gate, rule.beta)
        return value * part, inner * part + value * slope
    value, slope = gate * part, part + gate * slope
    if activation == "swiglu_step":
        return np.minimum(value, rule.limit), np.where(value > rule.limit, 0.0, slope)
    return value, slope


def clamped(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return values within bounds, and the derivative: 1 where they were.

    >>> clamped(np.array([-9.0, 3.0, 5.0]), -4.0, 3.0)
    (array([-4.,  3.,  3.]), array([0., 1., 0.]))
    """
    return np.clip(values, low, high), np.where((values < low) | (values > high), 0.0, 1.0)


def of_gates(gate: np.ndarray, activation: str, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return what a row multiplies its ups by, and the derivative by the gates."""
    limit = math.inf if activation == "swiglu_step" else rule.limit
    gate, kept = clamped(gate, -math.inf, limit)
    value, slope = curve(gate, activation, rule)
    return value, kept * slope


def of_ups(up: np.ndarray, activation: str, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return what a row multiplies the activation of its gates by, and the derivative by the ups."""
    up, kept = clamped(up, -rule.limit, rule.limit)
    if activation == "situ":
        up, slope = bent(up, rule.linear_beta)
        return up, kept * slope
    return up + (rule.beta or 0.0), kept


def biased_rows(
    gate_up: np.ndarray, expert_first_token_offset: np.ndarray | None, bias: np.ndarray | None
) -> np.ndarray:
    """Return the rows in use, in float64, each with the bias of its expert.

    >>> biased_rows(np.zeros((3, 1)), np.array([1, 2, 3]), np.array([[1.0], [5.0]])).ravel()
    array([1., 1., 5.])
    """
    if expert_first_token_offset is None:
        return gate_up.astype(np.float64)
    first = np.clip(expert_first_token_offset, 0, len(gate_up))
    first[0] = 0
    rows = gate_up[: first[-1]].astype(np.float64)
    return rows if bias is None else rows + np.repeat(bias, np.diff(first), axis=0)


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
    beta: float | None = None,
    linear_beta: float | None = None,
) -> np.ndarray:
    """Add the bias of each row's expert, apply the activation to the gates, and multiply by the ups.

    Parameters
    ----------
    gate_up
        float32 or float16 [num_rows, 2 * width], rows in expert order. An activation whose name ends in "_no_mul" has
        no ups, so its rows are [num_rows, width], and those of "none" too.
    expert_first_token_offset
        int64 [num_experts + 1]: expert e has the rows from ``offset[e]`` up to ``offset[e + 1]``. Rows from the last
        offset on are unused. Without offsets all rows are in use.
    bias
        float [num_experts, columns of `gate_up`], the bias of each expert, added first. It requires offsets.
    activation
        What is multiplied by the ups. "silu" is ``gate * sigmoid(alpha * gate)``. "gelu" uses the error function, and
        "gelu_tanh" its tanh approximation. "swiglu_oai" is silu with other defaults. "swiglu_step" is silu whose result
        has an upper bound. "relu2" is ``max(gate, 0) ** 2``. "situ" is ``beta * tanh(gate / beta) * sigmoid(gate)``.
        "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul" and "relu2_no_mul" multiply nothing. "none" only adds the bias.
    interleaved
        True if a row holds gate, up, gate, up, ..., False if it holds all gates before all ups. By default True for
        "swiglu_oai" only.
    limit
        Upper bound of the gates, and bound of the magnitude of the ups. By default 7 for "swiglu_oai" and no limit for
        the others. "swiglu_step" bounds what silu returns instead of the gates, by default by 7.
    alpha
        The alpha of silu, by default 1.702 for "swiglu_oai" and 1 for the others.
    beta
        Added to the ups of "silu" and "swiglu_oai", by default 0 and 1. The beta of "situ", by default 4.
    linear_beta
        With it, "situ" multiplies by ``linear_beta * tanh(up / linear_beta)`` instead of the up.

    Returns
    -------
    np.ndarray
        [num_rows, width] in the dtype of `gate_up`. Unused rows are zeros.

    Examples
    --------
    >>> rows = np.array([[0.0, 2.0, 10.0, 20.0]], np.float32)
    >>> moe_activation(rows).round(3)
    array([[ 0.   , 35.232]], dtype=float32)
    >>> moe_activation(rows, activation="swiglu_oai").round(3)
    array([[ 0., 56.]], dtype=float32)
    >>> moe_activation(rows, activation="relu2_no_mul")
    array([[  0.,   4., 100., 400.]], dtype=float32)
    >>> moe_activation(rows, np.array([0, 0, 1]), np.array([[5.0] * 4, [1.0] * 4]), activation="none")
    array([[ 1.,  3., 11., 21.]], dtype=float32)
    """
    rule = rule_of(activation, interleaved, limit, alpha, beta, linear_beta)
    rows = biased_rows(gate_up, expert_first_token_offset, bias)
    if rule.halves == 2:
        gate, up = halves(rows, rule.interleaved)
        rows = of_gates(gate, activation, rule)[0] * of_ups(up, activation, rule)[0]
    elif activation != "none":
        rows = of_gates(rows, activation, rule)[0]
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
    beta: float | None = None,
    linear_beta: float | None = None,
) -> np.ndarray:
    """Return the gradient of a loss by `gate_up`, given the gradient by the result of `moe_activation`.

    Parameters
    ----------
    gate_up, expert_first_token_offset, bias, activation, interleaved, limit, alpha, beta, linear_beta
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
    rule = rule_of(activation, interleaved, limit, alpha, beta, linear_beta)
    rows = biased_rows(gate_up, expert_first_token_offset, bias)
    grad = grad_activated[: len(rows)].astype(np.float64)
    grad_gate_up = np.zeros_like(gate_up)
    used = grad_gate_up[: len(rows)]
    if activation == "none":
        used[:] = grad
    elif rule.halves == 1:
        used[:] = grad * of_gates(rows, activation, rule)[1]
    else:
        gate, up = halves(rows, rule.interleaved)
        grad_gate, grad_up = halves(used, rule.interleaved)
        value, by_gate = of_gates(gate, activation, rule)
        factor, by_up = of_ups(up, activation, rule)
        grad_gate[:] = grad * by_gate * factor
        grad_up[:] = grad * value * by_up
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
