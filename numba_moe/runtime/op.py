"""`op`: one declaration of a public function says all that there is to say about it.

The function has a name, annotated parameters, a docstring and no body. Beside it stand small functions, each given the
arguments of a call by name (`given.topk_ids`)::

    @op(twin=reference.count_tokens_per_expert)
    def count_tokens_per_expert(topk_ids: Array, num_experts: int, expert_map: Array | None = None) -> Array:
        '''Count the slots of each expert. ...'''

    @count_tokens_per_expert.outputs     # shapes and dtypes of the results; arrays are layouts or fake tensors here
    def _(given): return contiguous(torch.int32, given.num_experts)

    @count_tokens_per_expert.plan        # checks, grids and launches; remembered for equal layouts and numbers
    def _(given): ...

    @count_tokens_per_expert.run         # launches, into the results that are allocated or given
    def _(plan, given, counts): ...

and where an op has them: `validate` (checks that read data, with NUMBA_MOE_VALIDATE=1), `on_cpu` (instead of a plain
call of the twin), `compute` (instead of launches, anywhere, for what torch's own functions do), `refuse`, `saves` and
`backward` (calls that have no gradient, what it needs, and the gradient), `composed` (what is called instead where a
gradient is wanted).

From that come eager calls of torch tensors; arrays of other libraries, on their own device and stream; CPU tensors, by
the twin; `out=`; the checks that what is written can be and overlaps nothing, and that autograd is told of it; ranges
in profiles; and the op under `torch.ops.numba_moe` with its schema, fake and gradient, for whatever asks torch's
dispatcher.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import torch

from numba_moe.runtime import arrays, checks, observe, torch_library, torch_private
from numba_moe.runtime.declaration import WANTS_GRADIENT, Declaration, flat
from numba_moe.runtime.docstrings import completed

Tensor, is_traced = torch.Tensor, torch.compiler.is_dynamo_compiling
# What eager calls pay for, 0.1 us together: is torch compiling, is torch.jit tracing, and how many dispatch modes (of
# make_fx, FakeTensorMode, counters of flops) want to see each op. All of them are told of ops by torch's dispatcher.
is_jit_tracing, num_modes, forward_ad = torch_private.is_jit_tracing, torch_private.num_modes, torch_private.forward_ad
is_transformed, current_device = torch_private.is_transformed, torch_private.current_device
P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Part = TypeVar("Part", bound=Callable[..., Any])


class Op(Protocol, Generic[P, R]):
    """A public function, and the decorators that take the parts of its declaration."""

    declaration: Declaration
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def outputs(self, part: Part) -> Part: ...

    def plan(self, part: Part) -> Part: ...

    def run(self, part: Part) -> Part: ...

    def validate(self, part: Part) -> Part: ...

    def on_cpu(self, part: Part) -> Part: ...

    def compute(self, part: Part) -> Part: ...

    def refuse(self, part: Part) -> Part: ...

    def saves(self, part: Part) -> Part: ...

    def backward(self, part: Part) -> Part: ...

    def composed(self, part: Part) -> Part: ...


PARTS = ("outputs", "plan", "run", "validate", "on_cpu", "compute", "refuse", "saves", "backward", "composed")


def op(
    twin: Callable[..., Any] | None = None,
    *,
    writes: tuple[str, ...] = (),
    out: str = "out",
    own_out: bool = False,
    onto: Mapping[str, str] | None = None,
    absent: Mapping[str, str] | None = None,
    is_gradient: bool = False,
    tallies: tuple[str, ...] = (),
    like: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Return a decorator that makes an op of a function without a body.

    Parameters
    ----------
    twin : callable, optional
        The function of the reference that defines it; it answers calls of CPU tensors.
    writes : tuple of str
        Parameters whose arrays are written, besides `out`.
    out : str
        The parameter whose arrays take the result.
    own_out : bool
        The op's plan checks `out` itself, and its twin takes it; otherwise it must be as what would be allocated.
    onto : mapping of str to str, optional
        For some of the written parameters, the one whose array they may be.
    absent : mapping of str to str, optional
        Fields of the result that are there only with an argument: which.
    is_gradient : bool
        The op is the gradient of another, and has none itself.
    tallies : tuple of str
        Those of the written parameters that hold integers, which a call may write where a gradient is wanted.
    like : callable, optional
        Another op, whose docstring has what this one's leaves out: parameters, results, errors.
    """

    def decorate(function: Callable[P, R]) -> Op[P, R]:
        if like is not None:
            function.__doc__ = completed(function, like)
        declaration = Declaration(function, twin, writes, out, own_out, onto or {}, absent or {}, is_gradient, tallies)
        call = cast(Op[P, R], _callable(declaration))
        for part in PARTS:
            setattr(call, part, functools.partial(_keep, declaration, part))
        return call

    return decorate


def _keep(declaration: Declaration, part: str, function: Part) -> Part:
    setattr(declaration, part, function)
    return function


class _Differentiable(torch.autograd.Function):
    """An op in torch's graph, called eagerly; through torch's dispatcher `topk_softmax` takes 94 us so (H200)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *values, declaration = arguments
        given = dict(zip(declaration.names, values, strict=True))
        parts = flat(declaration.eager((), given, differentiable=False))
        declaration.saves(ctx, declaration.given_of(given), *parts)
        ctx.mark_non_differentiable(*(part for part in parts[1:] if part is not None))
        ctx.declaration = declaration
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        found = torch_library.of_first_order(ctx.declaration.name, ctx.declaration.backward)(ctx, grad)
        return *(found.get(name) for name in ctx.declaration.names), None


def _in_graph(declaration: Declaration, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer a call of tensors for which a gradient is wanted."""
    if declaration.composed is not None:
        return declaration.composed(*args, **kwargs)
    values, _ = declaration.bind(*args, **kwargs)
    named = dict(zip(declaration.names, values, strict=True))
    if declaration.backward is None or any(
        named[name] is not None for name in declaration.written if name not in declaration.tallies
    ):
        return torch_library.call(declaration, args, kwargs)  # which refuses it, and says why
    return declaration.build(list(_Differentiable.apply(*values, declaration)))


def _is_wrapped(value: Any) -> bool:
    """Whether a transform of torch.func made a tensor; in its backward pass none is active."""
    return isinstance(value, Tensor) and torch_private.is_wrapped_by_transform(value)


def _callable(declaration: Declaration) -> Callable[..., Any]:
    """Return the public function: it finds who answers a call."""
    name, first = declaration.name, declaration.first
    place = declaration.names.index(first)
    eager = declaration.eager

    @functools.wraps(declaration.function)
    def call(*args: Any, **kwargs: Any) -> Any:
        array = args[place] if len(args) > place else kwargs.get(first)
        if type(array) is Tensor and not (
            is_traced() or is_jit_tracing() or num_modes() or forward_ad._current_level >= 0
        ):
            device = array.get_device()
            try:
                if (device < 0 or device == current_device()) and not observe.RANGES:
                    result = eager(args, kwargs)
                    return _in_graph(declaration, args, kwargs) if result is WANTS_GRADIENT else result
                with arrays.on_device(array), observe.range_of(name):
                    result = eager(args, kwargs)
                    return _in_graph(declaration, args, kwargs) if result is WANTS_GRADIENT else result
            except checks.UnreadableError:
                if not is_transformed() and not any(map(_is_wrapped, (*args, *kwargs.values()))):
                    raise
        if isinstance(array, Tensor):  # torch compiles, or the tensor is a fake, a parameter, of another's class
            return torch_library.call(declaration, args, kwargs)
        return arrays.bridged(declaration, args, kwargs)

    call.declaration = declaration  # type: ignore[attr-defined]
    return call
