"""Gradients of the ops under `torch.ops.numba_moe`: those that eager calls have, as ops of their own.

For an op with a gradient torch asks Python at every call whether one is wanted, 6 us on the host (H200, torch 2.11).
So it has an overload without, `torch.ops.numba_moe.<name>.without_gradient`, for compiled code that wants none.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx.operator_schemas import get_signature_for_torch_op

from numba_moe.runtime import arrays, torch_private


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # the compiler would take torch's own function for true wherever it compiles (torch 2.11); before 2.7 there is none
    return bool(getattr(torch.compiler, "is_exporting", lambda: True)())


def wanted(*values: Any) -> bool:
    """Whether a gradient by any of these is wanted."""
    return torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def overload(op: Any, *values: Any) -> Any:
    """Return the overload to call on these values, of an op with a gradient.

    What is exported may want a gradient later, and torch.func's transforms want theirs of tensors that do not say so.
    """
    if not arrays.is_traced() or _is_exporting() or torch_private.in_transform() or wanted(*values):
        return op.default
    return op.without_gradient


def parameters_of(op: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of an op's overload, as its schema has them."""
    [signature] = cast(list[inspect.Signature], get_signature_for_torch_op(op))
    return signature.parameters


# The rules of ops with a gradient: what keeps what it needs, and what computes it. And the ops that do the latter.
RULES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {}
BACKWARD = {"gating_backward", "permute_backward", "unpermute_backward", "activation_backward", "outer_by_expert"}


def _register(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"numba_moe::{name}", backward, setup_context=setup)
    RULES[name] = setup, backward


def call(name: str, *args: Any) -> Any:
    """Call an op by itself, or under torch.func's transforms as a function that they know."""
    if arrays.is_transformed() and not arrays.is_traced():
        from numba_moe.interop import torch_transforms

        return torch_transforms.apply(name, *args)
    return getattr(torch.ops.numba_moe, name)(*args)


def _arguments(name: str, inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of an op by name, and their defaults."""
    parameters = parameters_of(getattr(torch.ops.numba_moe, name).default)
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    return dict(zip(defaults, inputs, strict=True)), defaults


def _refuse_options(arguments: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse a gradient with options that have none: those behind the factor."""
    names = list(arguments)
    for name in names[names.index("routed_scaling_factor") + 1 :]:
        value, default = arguments[name], defaults[name]
        if value is not None and (default is None or value != default):
            rule = "without a gradient for these options"
            raise ValueError(f"`gating_output` must be {rule}, got one that requires it, and `{name}`")


def of_gating(name: str) -> None:
    """Give the weights of a gating op their gradient by the logits, unless it has options that have none."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        arguments, defaults = _arguments(name, inputs)
        if name == "select_experts":
            _refuse_options(arguments, defaults)
        ctx.save_for_backward(inputs[0], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.rules = (
            arguments.get("scoring_func", name.removeprefix("topk_")),
            arguments["renormalize"],
            arguments.get("routed_scaling_factor", 1.0),
        )
        ctx.others = len(inputs) - 1

    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> Any:
        grad = call("gating_backward", *ctx.saved_tensors, grad_weights, *ctx.rules)
        return grad, *[None] * ctx.others

    _register(name, setup, backward)


def of_permuting(name: str) -> None:
    """Give rows in expert order their gradient by the tokens' rows."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[3])  # inv_permuted_idx
        ctx.mark_non_differentiable(*output[1:])
        ctx.others = len(inputs) - 1

    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        return call("permute_backward", *ctx.saved_tensors, grad), *[None] * ctx.others

    _register(name, setup, backward)


def of_unpermuting(name: str) -> None:
    """Give combined rows their gradients by rows and by weights."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.factor = inputs[3]

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        wanted = ctx.needs_input_grad[:2]
        found = call("unpermute_backward", *ctx.saved_tensors, grad, ctx.factor, *wanted)
        return *(part if needed else None for part, needed in zip(found, wanted, strict=True)), None, None, None

    _register(name, setup, backward)


def of_summing(name: str) -> None:
    """Give summed rows their gradient by the rows."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        hidden_states, topk_ids, factor, _ = inputs
        ctx.save_for_backward(*(() if topk_ids is None else (topk_ids,)))
        ctx.factor, ctx.shape, ctx.dtype = factor, hidden_states.shape, hidden_states.dtype

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = (grad * ctx.factor).to(ctx.dtype)[:, None].expand(ctx.shape)
        for topk_ids in ctx.saved_tensors:
            grad = grad.masked_fill((topk_ids < 0)[..., None], 0)
        return grad, None, None, None

    _register(name, setup, backward)


def of_activating(name: str) -> None:
    """Give activated rows their gradients by rows and bias."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        gate_up, offset, bias, *ctx.options = inputs
        ctx.save_for_backward(gate_up, offset, bias)
        ctx.of_bias = bias is not None and ctx.needs_input_grad[2]

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate_up, offset, bias = ctx.saved_tensors
        rest = (*ctx.options, ctx.of_bias)
        by_rows, by_bias = call("activation_backward", gate_up, grad, offset, bias, *rest)
        return by_rows, None, by_bias if ctx.of_bias else None, *[None] * len(ctx.options)

    _register(name, setup, backward)


def of_multiplying(name: str) -> None:
    """Give products their gradients by rows and weights."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, weights, ends = ctx.saved_tensors
        grad = grad.contiguous()
        by_rows, by_weights, _ = ctx.needs_input_grad
        return (
            call("multiply_by_expert", grad, weights.transpose(1, 2), ends) if by_rows else None,
            call("outer_by_expert", grad, rows, ends) if by_weights else None,
            None,
        )

    _register(name, setup, backward)


def refused(name: str) -> None:
    """Refuse a gradient where it is the function that has it, not the op."""

    def refuse(ctx: Any, inputs: Any, output: Any) -> None:
        raise RuntimeError(f"the op `{name}` has no gradient, the function `numba_moe.{name}` has")

    torch.library.register_autograd(f"numba_moe::{name}", refuse, setup_context=refuse)
