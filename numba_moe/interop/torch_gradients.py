"""Gradients of the ops under `torch.ops.numba_moe`: those that eager calls have, as ops of their own."""

from typing import Any

import torch


def _arguments(name: str, inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of an op by name, and their defaults."""
    parameters = getattr(torch.ops.numba_moe, name).default._schema.arguments
    defaults = {parameter.name: parameter.default_value for parameter in parameters}
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
        grad = torch.ops.numba_moe.gating_backward(*ctx.saved_tensors, grad_weights, *ctx.rules)
        return grad, *[None] * ctx.others

    torch.library.register_autograd(f"numba_moe::{name}", backward, setup_context=setup)


def of_permuting(name: str) -> None:
    """Give rows in expert order their gradient by the tokens' rows."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[3])  # inv_permuted_idx
        ctx.mark_non_differentiable(*output[1:])
        ctx.others = len(inputs) - 1

    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        return torch.ops.numba_moe.permute_backward(*ctx.saved_tensors, grad), *[None] * ctx.others

    torch.library.register_autograd(f"numba_moe::{name}", backward, setup_context=setup)


def of_unpermuting() -> None:
    """Give combined rows their gradients by rows and by weights."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.factor = inputs[3]

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        wanted = ctx.needs_input_grad[:2]
        found = torch.ops.numba_moe.unpermute_backward(*ctx.saved_tensors, grad, ctx.factor, *wanted)
        return *(part if needed else None for part, needed in zip(found, wanted, strict=True)), None, None, None

    torch.library.register_autograd("numba_moe::moe_unpermute", backward, setup_context=setup)


def of_summing() -> None:
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

    torch.library.register_autograd("numba_moe::moe_sum", backward, setup_context=setup)


def register() -> None:
    """Register the gradients of all ops that have one."""
    for name in ("topk_softmax", "topk_sigmoid", "topk_softplus_sqrt", "topk_raw", "grouped_topk", "select_experts"):
        of_gating(name)
    for name in ("moe_permute", "moe_permute_masked"):
        of_permuting(name)
    of_unpermuting()
    of_summing()
