"""The step between the two matrices of an expert: `moe_activation`, one pass over the rows.

The pass adds the bias, clamps, applies the activation to the gates, and multiplies by the ups. A warp takes a run of
columns of one row; a lane takes 16 bytes or more where rows are aligned. A binary search of the offsets finds the row's
expert. silu, the tanh form of gelu and swiglu_oai all have the form ``gate * sigmoid(gate * something)``. For the
other activations the kernels are compiled once more. The backward pass has the same structure, and then sums rows for
the bias of each expert.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.device.primitives import WARP
from numba_moe.ops.activation import activate_rows
from numba_moe.ops.activation.activate_rows import KINDS, RUN, SUM_THREADS, family_of
from numba_moe.reference import activation as reference
from numba_moe.reference.activation import OPTIONS, RULES, rule_of
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, by_reference, contiguous
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.op import op


@op(reference.moe_activation)
def moe_activation(
    gate_up: Array,
    expert_first_token_offset: Array | None = None,
    bias: Array | None = None,
    *,
    activation: str = "silu",
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
    out: Array | None = None,
) -> Any:
    """Add the bias of each row's expert, apply the activation to the gates, and multiply by the ups.

    Parameters
    ----------
    gate_up : array of float32, float16 or bfloat16, shape [num_rows, 2 * width]
        Contiguous; rows in expert order. An activation whose name ends in "_no_mul" has no ups, so its rows are
        [num_rows, width], and those of "none" too.
    expert_first_token_offset : array of int64, shape [num_experts + 1], optional
        Expert e has the rows from ``offset[e]`` up to ``offset[e + 1]``, and the first offset counts as 0. Rows from
        the last offset on are unused. Without offsets all rows are in use.
    bias : array of the dtype of `gate_up`, shape [num_experts, columns of `gate_up`], optional
        Bias of each expert, added first. It requires offsets.
    activation : str
        What is multiplied by the ups. "silu" is ``gate * sigmoid(alpha * gate)``. "gelu" uses the error function, and
        "gelu_tanh" its tanh approximation. "swiglu_oai" is silu with other defaults. "swiglu_step" is silu whose result
        has an upper bound. "relu2" is ``max(gate, 0) ** 2``. "situ" is ``beta * tanh(gate / beta) * sigmoid(gate)``.
        "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul" and "relu2_no_mul" multiply nothing. "none" only adds the bias.
    interleaved : bool, optional
        True if a row holds gate, up, gate, up, ..., False if it holds all gates before all ups. By default True for
        "swiglu_oai" only.
    limit : float, optional
        Upper bound of the gates, and bound of the magnitude of the ups. By default 7 for "swiglu_oai" and no limit for
        the others. "swiglu_step" bounds what silu returns instead of the gates, by default by 7.
    alpha : float, optional
        The alpha of silu, by default 1.702 for "swiglu_oai" and 1 for the others.
    beta : float, optional
        Added to the ups of "silu" and "swiglu_oai", by default 0 and 1. The beta of "situ", by default 4.
    linear_beta : float, optional
        With it, "situ" multiplies by ``linear_beta * tanh(up / linear_beta)`` instead of the up.
    out : array of the dtype of `gate_up`, shape [num_rows, width], optional
        Written: memory for the result.

    Returns
    -------
    array of the dtype of `gate_up`, shape [num_rows, width]
        Unused rows are zeros.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, an unknown activation, a number that it does not have, or a bias without
        offsets.

    Notes
    -----
    The op computes in float32 and rounds once. Unused rows may hold anything. It runs on the caller's current stream
    without synchronising, and CUDA graphs can capture it. It allocates the result only. The result has first-order
    gradients by `gate_up` and `bias`, with the same bits at every run.

    Examples
    --------
    >>> import numpy as np
    >>> moe_activation(np.array([[0, 2, 10, 20]], np.float32)).round(3)
    array([[ 0.   , 35.232]], dtype=float32)
    """


@moe_activation.outputs
def _(given: Any) -> Contiguous:
    checks.choice("activation", given.activation, KINDS)
    rows, columns = given.gate_up.shape
    return contiguous(given.gate_up.dtype, rows, columns // RULES[given.activation].halves)


class Activation(NamedTuple):
    """The launch settings of both passes, the number of columns of a lane, and the records."""

    where: tuple[Any, ...]
    items: int
    records: tuple[Any, ...]


def options_of(given: Any) -> dict[str, Any]:
    """Return what a call says of its activation beside the name."""
    return {name: getattr(given, name) for name in OPTIONS}


def check_rule(given: Any) -> activate_rows.Rule:
    """Check what a call says of its activation, and return what kernels are told."""
    activation, options = given.activation, options_of(given)
    checks.choice("activation", activation, KINDS)
    known = RULES[activation]
    for name in ("limit", "alpha", "beta", "linear_beta"):
        if options[name] is not None:
            checks.number(name, options[name], infinite=name == "limit")
            checks.holds(name, f"None for {activation!r}", getattr(known, name) is not None, options[name])
    interleaved = options["interleaved"]
    if interleaved is not None:
        checks.boolean("interleaved", interleaved)
        gated = known.halves == 2 or not interleaved
        checks.holds("interleaved", f"None or False for {activation!r}, which has no ups", gated, interleaved)
    rule = rule_of(activation, **options)
    positive = {"limit": rule.limit, "linear_beta": rule.linear_beta}
    if activation == "situ":
        positive["beta"] = rule.beta
    for name, value in positive.items():
        checks.holds(name, "above 0", value is None or np.float32(value) > 0, value)
    numbers = {
        "limit": math.inf if rule.limit is None else rule.limit,
        "alpha": 1.0 if rule.alpha is None else rule.alpha,
        "shift": 0.0 if rule.beta is None or activation == "situ" else rule.beta,
        "beta": 1.0 if rule.beta is None else rule.beta,
        "linear_beta": math.inf if rule.linear_beta is None else rule.linear_beta,
    }
    if rule.halves == 1:
        numbers["shift"] = 1.0
    kind = KINDS.index(activation.removesuffix(activate_rows.UNGATED))
    return activate_rows.Rule(kind=kind, halves=rule.halves, interleaved=int(rule.interleaved), **numbers)


def check_rows(given: Any) -> Activation:
    """Check the arguments of `moe_activation`, and return how its passes go over the rows."""
    gate_up, offset, bias = given.gate_up, given.expert_first_token_offset, given.bias
    checks.array("gate_up", gate_up, checks.FLOATS, (2,))
    rule = check_rule(given)
    num_rows, row_width = gate_up.shape
    like = ("gate_up", gate_up)
    num_experts = 0
    if offset is not None:
        checks.array("expert_first_token_offset", offset, (torch.int64,), (1,), like=like)
        checks.at_least("len(expert_first_token_offset)", offset.shape[0], 2, "num_experts + 1")
        num_experts = offset.shape[0] - 1
    if bias is not None:
        checks.holds("bias", "None without `expert_first_token_offset`", num_experts > 0, "an array")
        checks.array("bias", bias, (gate_up.dtype,), (2,), like=like)
        checks.shape("bias", bias, (num_experts, row_width), "(num_experts, columns of `gate_up`)")
    checks.holds("gate_up", "of an even number of columns", row_width % rule.halves == 0, row_width)
    width = row_width // rule.halves
    aligned = width % RUN == 0 and gate_up.address == 0 and (bias is None or bias.address == 0)
    items = RUN if aligned else 1
    segments = -(-width // (WARP * items))
    checks.fits_int32("gate_up", num_rows * segments * WARP, "the number of threads")
    records = (
        activate_rows.Rows(gate_up, num_rows, width, segments),
        activate_rows.Experts(offset, bias, num_experts),
        rule,
    )
    return Activation((gate_up.device, *warps(num_rows * segments)), items, records)


@moe_activation.plan
def plan_activation(given: Any) -> Launch:
    """Check the arguments of `moe_activation`, and plan it."""
    where, items, records = check_rows(given)
    family = family_of(given.activation)
    return Launch(activate_rows.activate_rows, *where, *records, given.gate_up.dtype, items=items, family=family)


@moe_activation.run
def _(activate: Launch, given: Any, activated: torch.Tensor) -> None:
    offset = given.expert_first_token_offset
    activate(gate_up=given.gate_up, offset=offset, bias=given.bias, activated=activated)


@moe_activation.saves
def _(ctx: Any, given: Any, _activated: Any) -> None:
    ctx.save_for_backward(given.gate_up, given.expert_first_token_offset, given.bias)
    ctx.options = (given.activation, options_of(given))
    ctx.of_bias = given.bias is not None and ctx.needs_input_grad[2]


@moe_activation.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    gate_up, offset, bias = ctx.saved_tensors
    activation, options = ctx.options
    by_rows, by_bias = activation_backward(gate_up, grad, offset, bias, activation, of_bias=ctx.of_bias, **options)
    return {"gate_up": by_rows, "bias": by_bias if ctx.of_bias else None}


class ActivationGradients(NamedTuple):
    """Gradients by the rows and by the bias; the latter is None if it was not requested."""

    rows: Any
    bias: Any


@op(is_gradient=True, like=moe_activation)
def activation_backward(
    gate_up: Array,
    grad_activated: Array,
    expert_first_token_offset: Array | None,
    bias: Array | None,
    activation: str,
    interleaved: bool | None,
    limit: float | None,
    alpha: float | None,
    beta: float | None,
    linear_beta: float | None,
    of_bias: bool,
) -> ActivationGradients:
    """Return the gradient by the rows, and on request by the bias, given the gradient by the result.

    Parameters
    ----------
    grad_activated : array of the dtype of `gate_up`, shape [num_rows, width]
        The gradient by the result.
    of_bias : bool
        Whether to compute the gradient by the bias.

    Returns
    -------
    ActivationGradients
        rows : shape and dtype of `gate_up`. bias : shape and dtype of `bias`, or None.
    """


@activation_backward.outputs
def _(given: Any) -> ActivationGradients:
    gate_up, bias = given.gate_up, given.bias
    of_bias = contiguous(gate_up.dtype, *bias.shape) if given.of_bias and bias is not None else None
    return ActivationGradients(contiguous(gate_up.dtype, *gate_up.shape), of_bias)


@activation_backward.plan
def _(given: Any) -> tuple[Launch, Launch | None]:
    """Return the launches: the pass over the rows, and the sum of the rows of each expert."""
    where, items, records = check_rows(given)
    slopes = activate_rows.Slopes(given.gate_up.dtype, given.gate_up.dtype)
    constants: dict[str, Any] = {"items": items, "family": family_of(given.activation)}
    return Launch(activate_rows.differentiate_activation, *where, *records, slopes, **constants), plan_sums(given)


def plan_sums(given: Any) -> Launch | None:
    """Plan the sums of the rows of each expert, which are the gradient by the bias, if it is asked for."""
    if not given.of_bias or given.bias is None:
        return None
    dtype, (num_rows, row_width) = given.gate_up.dtype, given.gate_up.shape
    wide = RUN if row_width % RUN == 0 else 1
    segments = -(-row_width // (WARP * wide))
    sums = activate_rows.Sums(dtype, torch.int64, dtype, num_rows=num_rows, width=row_width, segments=segments)
    place = (given.gate_up.device, given.bias.shape[0] * segments, block_threads(SUM_THREADS))
    return Launch(activate_rows.sum_expert_rows, *place, sums, items=wide)


@activation_backward.on_cpu
def _(given: Any) -> ActivationGradients:
    offset = given.expert_first_token_offset
    arrays = (given.gate_up, given.grad_activated, offset, given.bias)
    options = {"activation": given.activation, **options_of(given)}
    grad_gate_up = by_reference(reference.moe_activation_backward, *arrays, **options)
    of_bias = given.of_bias and given.bias is not None
    return ActivationGradients(
        grad_gate_up, by_reference(reference.sum_rows, grad_gate_up, offset) if of_bias else None
    )


@activation_backward.run
def _(plan: Any, given: Any, grad_gate_up: torch.Tensor, grad_bias: torch.Tensor | None) -> None:
    differentiate, sum_rows = plan
    offset, grad = given.expert_first_token_offset, given.grad_activated.contiguous()
    if grad.data_ptr() % 16:
        grad = grad.clone()  # the kernel reads it as it reads the rows
    arrays = {"gate_up": given.gate_up, "offset": offset, "bias": given.bias}
    differentiate(**arrays, grad_activated=grad, grad_gate_up=grad_gate_up)
    if sum_rows is not None:
        sum_rows(gate_up=grad_gate_up, offset=offset, sums=grad_bias)
