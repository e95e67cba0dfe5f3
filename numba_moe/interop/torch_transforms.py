"""The ops under torch.func's transforms: as functions that `grad`, `vmap` and what is made of them know.

What torch.library registers for an op does not do there (torch 2.13). So each op is a torch.autograd.Function as well:
its gradient is that of the op, of first order, and a batch is a loop. Compiled code has the ops alone.
"""

from typing import Any, NoReturn

import torch

from numba_moe.interop import torch_gradients
from numba_moe.runtime import torch_private

OPS = torch.ops.numba_moe
FUNCTIONS: dict[str, Any] = {}
NO_TANGENTS = (
    "`{argument}` must be without a tangent, as no op has a forward-mode derivative (torch.func.jvp, jacfwd, hessian,"
    " torch.autograd.forward_ad), got one that has it"
)


def _refuse(ctx: Any, name: str, rule: str) -> NoReturn:
    arguments = getattr(OPS, name).default._schema.arguments
    argument = next(argument.name for argument, needed in zip(arguments, ctx.needs_input_grad, strict=True) if needed)
    raise ValueError(f"`{argument}` must be {rule}, got one that torch.func (functorch) differentiates")


def _is_functional(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and torch_private.is_functional(value)


def _over_batch(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """Call a function for each element of a batch and stack what it returns."""
    given = [
        [value] * info.batch_size if dim is None else [part.contiguous() for part in value.unbind(dim)]
        for value, dim in zip(args, in_dims, strict=True)
    ]
    results = [function(*one) for one in zip(*given, strict=True)]
    if isinstance(results[0], tuple):
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)
    return torch.stack(results), 0


def define(name: str) -> None:
    """Make the function of an op that is registered."""
    packet, rules = getattr(OPS, name), torch_gradients.RULES.get(name)
    op = packet.without_gradient if "without_gradient" in packet.overloads() else packet.default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            found = op(*args)
            return tuple(found) if isinstance(found, list | tuple) else found

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            if rules is not None:
                rules[0](ctx, inputs, output)
            elif name not in torch_gradients.BACKWARD and any(ctx.needs_input_grad):
                _refuse(ctx, name, "without a gradient, which this op has not")

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if rules is None:
                _refuse(ctx, name, "without a second derivative, as gradients are of first order")
            return rules[1](ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise TypeError(NO_TANGENTS.format(argument=getattr(OPS, name).default._schema.arguments[0].name))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _over_batch(Function.apply, info, in_dims, *args)

    FUNCTIONS[name] = Function


def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an op."""
    if any(map(_is_functional, args)):
        return getattr(OPS, name)(*args, **kwargs)  # which torch.func.functionalize knows, and functions it does not
    arguments = getattr(OPS, name).default._schema.arguments[len(args) :]
    rest = [kwargs.get(argument.name, argument.default_value) for argument in arguments]
    return FUNCTIONS[name].apply(*args, *rest)
