"""What experts do between their two matrices, in one pass over the rows: bias, clamp, activation, gate times up.

A warp takes a run of columns of a row, 16 bytes or more a lane where rows are aligned; the row's expert, whose bias it
adds, comes from a binary search of the offsets. silu, the tanh form of gelu and swiglu_oai are all
``gate * sigmoid(gate * something)``. Backward is the same pass, and a sum of rows for each expert's bias.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from numba_moe.activation import rows
from numba_moe.activation.rows import KINDS, RUN, SUM_THREADS
from numba_moe.reference import activation as reference
from numba_moe.reference.activation import rule_of
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.plans import Layout, layout, planned
from numba_moe.runtime.primitives import WARP


class ActivationPlan(NamedTuple):
    """The result, the gradients of rows and bias, and the launches that write them."""

    activated: arrays.Contiguous
    activate: Launch
    grad_gate_up: arrays.Contiguous
    differentiate: Launch
    grad_bias: arrays.Contiguous
    sum_rows: Launch | None


@planned
def plan_activation(
    gate_up: Layout,
    expert_first_token_offset: Layout | None,
    bias: Layout | None,
    activation: str,
    interleaved: bool | None,
    limit: float | None,
    alpha: float | None,
) -> ActivationPlan:
    """Check the arguments of `moe_activation` and plan it and its gradients."""
    checks.array("gate_up", gate_up, checks.FLOATS, (2,))
    checks.choice("activation", activation, KINDS)
    if interleaved is not None:
        checks.boolean("interleaved", interleaved)
    if limit is not None:
        checks.number("limit", limit, infinite=True)
    if alpha is not None:
        checks.number("alpha", alpha)
    rule = rule_of(activation, interleaved, limit, alpha)
    checks.holds("limit", "above 0", rule.limit > 0, rule.limit)
    num_rows, row_width = gate_up.shape
    like = ("gate_up", gate_up)
    num_experts = 0
    if expert_first_token_offset is not None:
        checks.array("expert_first_token_offset", expert_first_token_offset, (torch.int64,), (1,), like=like)
        checks.at_least("len(expert_first_token_offset)", expert_first_token_offset.shape[0], 2, "num_experts + 1")
        num_experts = expert_first_token_offset.shape[0] - 1
    if bias is not None:
        checks.holds("bias", "None without `expert_first_token_offset`", num_experts > 0, "an array")
        checks.array("bias", bias, (gate_up.dtype,), (2,), like=like)
        checks.shape("bias", bias, (num_experts, row_width), "(num_experts, columns of `gate_up`)")
    if activation != "none":
        checks.holds("gate_up", "of an even number of columns", row_width % 2 == 0, row_width)
    width = row_width if activation == "none" else row_width // 2
    aligned = width % RUN == 0 and gate_up.address == 0 and (bias is None or bias.address == 0)
    items = RUN if aligned else 1
    segments = -(-width // (WARP * items))
    checks.fits_int32("gate_up", num_rows * segments * WARP, "the number of threads")
    where = (gate_up.device, *warps(num_rows * segments))
    limit = math.inf if activation == "none" else rule.limit
    kind = rows.Rule(KINDS.index(activation), int(rule.interleaved), limit, rule.alpha, rule.shift)
    experts = rows.Experts(expert_first_token_offset, bias, num_experts)
    inputs = (rows.Rows(gate_up, num_rows, width, segments), experts, kind)
    activated = arrays.contiguous(gate_up.dtype, num_rows, width)
    grad_gate_up = arrays.contiguous(gate_up.dtype, num_rows, row_width)
    grad_bias = arrays.contiguous(gate_up.dtype, num_experts, row_width)
    sum_rows = None
    if bias is not None:
        wide = RUN if row_width % RUN == 0 else 1
        parts = -(-row_width // (WARP * wide))
        sums = rows.Sums(
            grad_gate_up,
            expert_first_token_offset,
            grad_bias,
            num_rows=num_rows,
            width=row_width,
            segments=parts,
        )
        place = (gate_up.device, num_experts * parts, block_threads(SUM_THREADS))
        sum_rows = Launch(rows.sum_expert_rows, *place, sums, items=wide)
    slopes = rows.Slopes(activated, grad_gate_up)
    return ActivationPlan(
        activated,
        Launch(rows.activate_rows, *where, *inputs, activated, items=items),
        grad_gate_up,
        Launch(rows.differentiate_activation, *where, *inputs, slopes, items=items),
        grad_bias,
        sum_rows,
    )


class Activating(torch.autograd.Function):
    """An activation as a part of torch's graph; gradients go to the rows and the bias."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, offset: Any, bias: Any, options: dict[str, Any]) -> torch.Tensor:
        ctx.save_for_backward(gate_up, offset, bias)
        ctx.options = options
        return moe_activation(gate_up, offset, bias, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_activated: torch.Tensor) -> Any:
        gate_up, offset, bias = ctx.saved_tensors
        gradients = activation_backward(gate_up, grad_activated, offset, bias, ctx.needs_input_grad[2], **ctx.options)
        return gradients[0], None, gradients[1], None


def activation_backward(
    gate_up: torch.Tensor,
    grad_activated: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    of_bias: bool,
    *,
    activation: str,
    interleaved: bool | None,
    limit: float | None,
    alpha: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients by the rows and, if wanted, by the bias."""
    if arrays.answered_by_reference(gate_up):
        function = reference.moe_activation_backward
        options = {"activation": activation, "interleaved": interleaved, "limit": limit, "alpha": alpha}
        grad_gate_up = arrays.by_reference(function, gate_up, grad_activated, offset, bias, **options)
        grad_bias = arrays.by_reference(reference.sum_rows, grad_gate_up, offset) if of_bias else None
        return grad_gate_up.to(gate_up.dtype), None if grad_bias is None else grad_bias.to(gate_up.dtype)
    grad_activated = grad_activated.contiguous()
    if grad_activated.data_ptr() % 16:
        grad_activated = grad_activated.clone()  # the kernel reads it as it reads the rows
    plan = plan_activation(layout(gate_up), layout(offset), layout(bias), activation, interleaved, limit, alpha)
    grad_gate_up = arrays.empty(*plan.grad_gate_up)
    plan.differentiate(
        gate_up=gate_up, offset=offset, bias=bias, grad_activated=grad_activated, grad_gate_up=grad_gate_up
    )
    if not of_bias or plan.sum_rows is None:
        return grad_gate_up, None
    grad_bias = arrays.empty(*plan.grad_bias)
    plan.sum_rows(gate_up=grad_gate_up, offset=offset, sums=grad_bias)
    return grad_gate_up, grad_bias


@arrays.public
def moe_activation(
    gate_up: Any,
    expert_first_token_offset: Any = None,
    bias: Any = None,
    *,
    activation: str = "silu",
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
) -> Any:
    """Add the bias of each row's expert, apply the activation to the gates, and multiply by the ups.

    Parameters
    ----------
    gate_up : array of float32, float16 or bfloat16, shape [num_rows, 2 * width]
        Contiguous; rows in expert order.
    expert_first_token_offset : array of int64, shape [num_experts + 1], optional
        Rows of expert e are ``offset[e]`` up to ``offset[e + 1]``, of the first from 0 on; rows from the last on are
        not in use. Without it all are.
    bias : array of the dtype of `gate_up`, shape [num_experts, 2 * width], optional
        Added first; takes offsets.
    activation : {"silu", "gelu", "gelu_tanh", "swiglu_oai", "none"}
        "silu": ``gate * sigmoid(alpha * gate)``; "gelu", by the error function; "gelu_tanh", its approximation;
        "swiglu_oai", as silu, and the up is taken plus 1; "none": the rows plus their bias, which have no halves.
    interleaved : bool, optional
        A row holds gate, up, gate, up, ..., not all gates before all ups. By default that of "swiglu_oai" alone.
    limit : float, optional
        Gates are at most this, ups at most this in magnitude; 7 by default for "swiglu_oai", none for the others.
    alpha : float, optional
        Of "silu" and "swiglu_oai"; 1 and 1.702 by default.

    Returns
    -------
    array of the dtype of `gate_up`, shape [num_rows, width]
        As wide as `gate_up` for "none". Zeros in rows not in use.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, unknown activation, a bias without offsets.

    Notes
    -----
    Computed in float32 and rounded once. What rows not in use hold does not count. Runs on the caller's current stream
    without synchronising, captures into CUDA graphs, allocates the result only. The result has a gradient by `gate_up`
    and `bias`, of first order, with the same bits at every run.

    Examples
    --------
    >>> import numpy as np
    >>> moe_activation(np.array([[0, 2, 10, 20]], np.float32)).round(3)
    array([[ 0.   , 35.232]], dtype=float32)
    """
    options = (activation, interleaved, limit, alpha)
    plan = plan_activation(layout(gate_up), layout(expert_first_token_offset), layout(bias), *options)
    names = {"activation": activation, "interleaved": interleaved, "limit": limit, "alpha": alpha}
    if torch.is_grad_enabled() and (gate_up.requires_grad or (bias is not None and bias.requires_grad)):
        return Activating.apply(gate_up, expert_first_token_offset, bias, names)
    if arrays.answered_by_reference(gate_up):
        function = reference.moe_activation
        return arrays.by_reference(function, gate_up, expert_first_token_offset, bias, **names).to(gate_up.dtype)
    activated = arrays.empty(*plan.activated)
    plan.activate(gate_up=gate_up, offset=expert_first_token_offset, bias=bias, activated=activated)
    return activated
