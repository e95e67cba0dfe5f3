"""The ops under `torch.ops.numba_moe`, for torch.compile, torch.export and whatever else asks torch's dispatcher.

An op is registered where it is needed first, from its declaration; `numba_moe.interop.torch_ops` registers all.

An op has the name, parameters and defaults of its function, but these. Where the function can write memory that it is
given, the op leaves those parameters out, and another has them: `<name>_out`, whose result goes to what it is given,
or `<name>_writing`, which returns new results as well. A result that a call has none of is an array of no elements.
Dispatch tables are separate parameters with the prefix `dispatch_`.

For an op with a gradient torch asks Python at every call whether one is wanted, 6 us on the host (H200, torch 2.11).
So it has an overload without, `torch.ops.numba_moe.<name>.without_gradient`, for compiled code that wants none.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch.fx.operator_schemas import get_signature_for_torch_op

from numba_moe.runtime import arrays, checks, observe, plans, torch_private
from numba_moe.runtime.declaration import DECLARATIONS, Declaration, flat, num_arrays, rebuild

FakeTensor: Any = torch_private.FakeTensor
forward_ad, is_traced, is_transformed = torch_private.forward_ad, arrays.is_traced, torch_private.is_transformed
LIBRARY = "numba_moe"
# How annotations are called in schemas; sizes may be symbols. Some names say more than their annotation.
KINDS: dict[Any, str] = {int: "SymInt", bool: "bool", float: "float", str: "str", str | None: "str?"}
KINDS |= {int | None: "SymInt?", bool | None: "bool?", float | None: "float?"}
KINDS_BY_NAME = {"out_dtype": "ScalarType?", "indices_dtype": "str"}
TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),  # the former since torch 2.8
)
NO_TANGENTS = (
    "`{argument}` must be without a tangent, as no op has a forward-mode derivative (torch.func.jvp, jacfwd, hessian,"
    " torch.autograd.forward_ad), got one that has it"
)
SECOND = "without a second derivative, as gradients are of first order"
# Each op that is registered as a function that torch.func's transforms know.
FUNCTIONS: dict[str, Any] = {}
_registered: set[str] = set()


class Variant(NamedTuple):
    """An op that a declaration is registered as: its name, the parameters that it writes, and whether it returns."""

    name: str
    written: tuple[str, ...]
    returns: bool


def variants(declaration: Declaration) -> dict[str, Variant]:
    """Return the ops of a declaration: "plain", "writing" and "out", as far as it has them."""
    name, written, out = declaration.name, declaration.written, declaration.has_out
    if declaration.outputs is None:
        return {"out": Variant(name, written, False)}
    found = {"plain": Variant(name, (), True)}
    if declaration.writes and not declaration.own_out:
        found["writing"] = Variant(f"{name}_writing", declaration.writes, True)
    if out:
        found["out"] = Variant(f"{name}_out", written, False)
    return found


@functools.cache  # compiled code asks at every call
def _tables(declaration: Declaration, name: str) -> list[inspect.Parameter]:
    """Return the parameters that a tuple of tables has in a schema."""
    [kind] = [kind for kind in declaration.kinds[name] if hasattr(kind, "_fields")]
    return [
        field.replace(name=f"{name}_{field.name}", default=None if field.default is field.empty else field.default)
        for field in inspect.signature(kind, eval_str=True).parameters.values()
    ]


def _arguments(declaration: Declaration) -> Iterator[tuple[str, inspect.Parameter]]:
    """Yield the parameters of an op's schema, each with the name of the function's parameter that it is of."""
    for name, parameter in declaration.parameters.items():
        parts = _tables(declaration, name) if name in declaration.tables else [parameter]
        yield from ((name, part) for part in parts)


def schema(declaration: Declaration, variant: Variant) -> str:
    """Return the schema of an op but for its name.

    >>> from numba_moe import count_tokens_per_expert
    >>> schema(count_tokens_per_expert.declaration, variants(count_tokens_per_expert.declaration)["plain"])
    '(Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None) -> Tensor'
    """
    parameters: list[str] = []
    for whole, parameter in _arguments(declaration):
        name, default = parameter.name, parameter.default
        if name in declaration.written and name not in variant.written:
            continue
        if (
            variant.written
            and declaration.parameters[whole].kind is inspect.Parameter.KEYWORD_ONLY
            and "*" not in parameters
        ):
            parameters.append("*")  # elsewhere not, as a tensor by keyword alone cannot be differentiated
        kind = KINDS_BY_NAME.get(name) or KINDS.get(parameter.annotation, "Tensor")
        if name in declaration.written:
            kind = f"Tensor({chr(ord('a') + declaration.written.index(name))}!)"
        if name == declaration.out:
            kind, default = kind + "[]" * (declaration.result is not None), parameter.empty
        kind += "?" * (kind.startswith("Tensor") and default is None)
        text = "" if default is parameter.empty else f'="{default}"' if isinstance(default, str) else f"={default}"
        parameters.append(f"{kind} {name}{text}")
    returns = "Tensor"
    if declaration.result is not None:
        returns = f"({', '.join(['Tensor'] * num_arrays(declaration.result))})"
    return f"({', '.join(parameters)}) -> {returns if variant.returns else '()'}"


def _given(declaration: Declaration, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the function, given the arguments of its op."""
    given: dict[str, Any] = {}
    for name in declaration.names:
        if name in declaration.tables:
            tables = [found.get(part.name, part.default) for part in _tables(declaration, name)]
            [kind] = [kind for kind in declaration.kinds[name] if hasattr(kind, "_fields")]
            given[name] = None if tables[0] is None else kind(*tables)
        elif name in found:
            given[name] = (
                tuple(found[name]) if name == declaration.out and isinstance(found[name], list) else found[name]
            )
    return given


def _parameters(op: Any) -> list[str]:
    """Return the names of the parameters of an op's overload, as its schema has them."""
    [signature] = cast(list[inspect.Signature], get_signature_for_torch_op(op))
    return list(signature.parameters)


def _register(declaration: Declaration, variant: Variant, overload: str = "default") -> None:
    """Register an op, or an overload of it."""
    whole = f"{LIBRARY}::{variant.name}" if overload == "default" else f"{LIBRARY}::{variant.name}.{overload}"
    torch.library.define(whole, schema(declaration, variant), tags=TAGS)
    names = _parameters(getattr(getattr(torch.ops.numba_moe, variant.name), overload))

    def fake(*args: Any, **kwargs: Any) -> Any:
        if not variant.returns:
            return None
        given = declaration.given_of(_given(declaration, dict(zip(names, args, strict=False)) | kwargs))
        first = getattr(given, declaration.first)
        found = [first.new_empty(0) if part is None else part for part in declaration.new_results(given)]
        return found[0] if declaration.result is None else tuple(found)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = _given(declaration, dict(zip(names, args, strict=False)) | kwargs)
        if not variant.returns and declaration.result is not None:
            given[declaration.out] = _in_places(declaration, given)
        first = given[declaration.first]
        with arrays.on_device(first), observe.range_of(declaration.name):
            found = declaration.eager((), given, differentiable=False)
        if not variant.returns:
            return None
        parts = [first.new_empty(0) if part is None else part for part in flat(found)]
        return parts[0] if declaration.result is None else tuple(parts)

    torch.library.impl(whole, ("cpu", "cuda"), run)
    torch.library.register_fake(whole, fake)


def _in_places(declaration: Declaration, given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return memory for the results of a call, with None in the place of one that it has not."""
    found = iter(given[declaration.out])
    assert declaration.outputs is not None
    specs = flat(declaration.outputs(declaration.given_of(given)))
    return tuple(None if spec is None else next(found) for spec in specs)


def _differentiate(name: str, declaration: Declaration) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return what keeps what the gradient of an op needs, and what computes it, as torch calls them."""
    names = _parameters(getattr(torch.ops.numba_moe, name).default)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        found = dict(zip(names, inputs, strict=True))
        outputs = output if isinstance(output, tuple | list) else (output,)
        given = declaration.given_of(_given(declaration, found))
        assert declaration.saves is not None
        if declaration.refuse is not None:
            declaration.refuse(given)
        declaration.saves(ctx, given, *outputs)
        ctx.mark_non_differentiable(*outputs[1:])

    def backward(ctx: Any, *grads: Any) -> Any:
        assert declaration.backward is not None
        found = declaration.backward(ctx, grads[0])
        return tuple(found.get(name) for name in names)

    return setup, backward


class _FirstOrder(torch.autograd.Function):
    """A gradient that depends on tensors in a way that has no derivative: an error where one is wanted.

    torch's `once_differentiable` lets it be zero where the gradient that comes in has none.
    """

    @staticmethod
    def forward(ctx: Any, name: str, grad: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"the gradient of `{ctx.name}` must be differentiated no further (once_differentiable)")


def of_first_order(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the gradients of an op be an error where a second derivative of them is wanted."""

    def call(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        causes = [one for one in (*grads, *ctx.saved_tensors) if one is not None and one.requires_grad]

        def mark(grad: Any) -> Any:
            return grad if grad is None else _FirstOrder.apply(name, grad, *causes)

        return {key: mark(grad) for key, grad in found.items()} if isinstance(found, dict) else tuple(map(mark, found))

    return call


def _refuse_gradient(name: str) -> Callable[..., None]:
    def refuse(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001 (torch gives them by name)
        raise RuntimeError(f"the op `{name}` has no gradient, the function `numba_moe.{name}` has")

    return refuse


def register() -> None:
    """Register all ops that are declared and not registered yet."""
    for name, declaration in [*DECLARATIONS.items()]:
        if name in _registered:
            continue
        _registered.add(name)
        rules = None
        for variant in variants(declaration).values():
            _register(declaration, variant)
        if declaration.outputs is not None:
            plain = variants(declaration)["plain"]
            if declaration.backward is not None:
                _register(declaration, plain, "without_gradient")
                rules = _differentiate(name, declaration)
                once = of_first_order(name, rules[1])
                torch.library.register_autograd(f"{LIBRARY}::{name}", once, setup_context=rules[0])
            elif declaration.composed is not None:
                _register(declaration, plain, "without_gradient")
                refuse = _refuse_gradient(name)
                torch.library.register_autograd(f"{LIBRARY}::{name}", refuse, setup_context=refuse)
            _define_function(name, rules)


class Traits(NamedTuple):
    """What a call asks of a declaration, as constants of compiled code."""

    out: str
    own_out: bool
    written: tuple[str, ...]
    absent: tuple[tuple[str, str], ...]
    differentiable: bool
    composed: bool
    is_gradient: bool
    tables: str
    tallies: tuple[str, ...]


@torch_private.assume_constant_result  # what compiled code would otherwise look up at each call, to see it unchanged
def _traits(name: str) -> Traits:
    register()
    one = DECLARATIONS[name]
    out = one.out if one.has_out else ""
    return Traits(
        out=out,
        own_out=one.own_out or one.outputs is None,
        written=one.written,
        absent=tuple(one.absent.items()),
        differentiable=one.backward is not None,
        composed=one.composed is not None,
        is_gradient=one.is_gradient,
        tables="".join(one.tables),
        tallies=one.tallies,
    )


@torch_private.assume_constant_result
def _variant(name: str, which: str) -> str:
    return variants(DECLARATIONS[name])[which].name


@torch_private.assume_constant_result
def _is_exporting() -> bool:
    # the compiler would take torch's own function for true wherever it compiles (torch 2.11)
    return bool(getattr(torch.compiler, "is_exporting", lambda: True)())


def wanted(values: Iterable[Any]) -> bool:
    """Whether a gradient by any of these is wanted."""
    return torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def overload(op: Any, values: Iterable[Any]) -> Any:
    """Return the overload to call on these values, of an op with a gradient.

    What is exported may want a gradient later, and torch.func's transforms want theirs of tensors that do not say so.
    """
    if not is_traced() or _is_exporting() or torch_private.in_transform() or wanted(values):
        return op.default
    return op.without_gradient


def _refuse_gradients(declaration: Declaration, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Refuse a gradient of an op that has none: compiled code would go on as if it were zero."""
    for value in (*args, *given.values()):
        if wanted((value,)):
            named = declaration.named(args, given)
            argument = next(key for key, found in named.items() if found is value)
            rule = "without a gradient for these options"
            raise ValueError(f"`{argument}` must be {rule}, got one that requires it")


def _check(declaration: Declaration, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse tensors that the ops cannot do justice to: with tangents, with data beside fake ones."""
    arguments = declaration.named(args, kwargs)
    tensors = [pair for argument, value in arguments.items() for pair in checks.tensors(argument, value)]
    for argument, tensor in tensors:
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise TypeError(NO_TANGENTS.format(argument=argument))
    fakes = [argument for argument, tensor in tensors if isinstance(tensor, FakeTensor)]
    mixable = all(tensor.fake_mode.allow_non_fake_inputs for _, tensor in tensors if isinstance(tensor, FakeTensor))
    if fakes and not mixable and len(fakes) < len(tensors):
        other = next(argument for argument, tensor in tensors if not isinstance(tensor, FakeTensor))
        raise TypeError(f"`{other}` must be a fake tensor, as `{fakes[0]}` is, got one with data")


def call(declaration: Declaration, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an op, with the arguments and results of its function, through torch's dispatcher."""
    if is_traced():
        return _call(declaration, args, kwargs)
    _check(declaration, args, kwargs)
    try:
        return _call(declaration, args, kwargs)
    except NotImplementedError as error:
        arguments = declaration.named(args, kwargs)
        for argument, value in arguments.items():
            for part, tensor in checks.tensors(argument, value):
                if not plans.is_plain(tensor):
                    rule = f"of a class that knows the op `{declaration.name}`"
                    raise TypeError(f"`{part}` must be {rule}, got {type(tensor).__name__}") from error
        raise


def _call(declaration: Declaration, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = declaration.name
    traits = _traits(name)
    composed = declaration.composed
    if composed is not None and (wanted((*args, *kwargs.values())) or is_transformed()):
        return composed(*args, **kwargs)
    tallied = [key for key in traits.tallies if kwargs.get(key) is not None]
    if tallied and traits.differentiable and not is_transformed() and wanted((*args, *kwargs.values())):
        # torch lets no op that writes have a gradient, so one call counts and another is differentiated.
        _call(declaration, tuple(map(_detached, args)), {key: _detached(value) for key, value in kwargs.items()})
        kwargs = {key: value for key, value in kwargs.items() if key not in tallied}
    given = {**kwargs}
    tables = given.pop(traits.tables, None)
    if tables is not None:
        given.update({f"{traits.tables}_{field}": getattr(tables, field) for field in tables._fields})
    if "indices_dtype" in given:
        given["indices_dtype"] = str(given["indices_dtype"]).removeprefix("torch.")
    if isinstance(given.get("out_dtype"), str):
        given["out_dtype"] = getattr(torch, given["out_dtype"])
    absent = [place for place, argument in traits.absent if given.get(argument) is None]
    written = [key for key in traits.written if given.get(key) is not None]
    for key in traits.written:
        if key not in written:
            given.pop(key, None)
    if written and is_transformed():
        rule = "None under the transforms of torch.func (functorch)"
        raise ValueError(f"`{written[0]}` must be {rule}, got memory to write")
    if written or not (traits.differentiable or traits.composed or traits.is_gradient):
        _refuse_gradients(declaration, args, given)
    if written and (traits.out in written or traits.own_out):
        if traits.out not in given:
            given[traits.out] = _fresh(declaration, args, given)
        results = flat(given[traits.out])
        given[traits.out] = (
            [part for part in results if part is not None] if isinstance(given[traits.out], tuple) else results[0]
        )
        getattr(torch.ops.numba_moe, _variant(name, "out"))(*args, **given)
    elif written:
        results = getattr(torch.ops.numba_moe, _variant(name, "writing"))(*args, **given)
    elif is_transformed() and not is_traced():
        results = apply(name, *args, **given)
    elif traits.differentiable or traits.composed:
        results = overload(getattr(torch.ops.numba_moe, name), (*args, *given.values()))(*args, **given)
    else:
        results = getattr(torch.ops.numba_moe, name)(*args, **given)
    result = declaration.result
    if result is None:
        return results[0] if isinstance(results, list) else results
    built: Any = rebuild(result, iter(results)) if declaration.nested else result.kind(*results)
    if not absent:
        return built
    fields = zip(built._fields, built, strict=True)
    return result.kind(*(None if field in absent else part for field, part in fields))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _fresh(declaration: Declaration, args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
    """Return memory for the result of an op that writes other memory too."""
    named = _given(declaration, declaration.named(args, given))
    found = declaration.new_results(declaration.given_of(named))
    return found[0] if declaration.result is None else tuple(found)


# The ops under torch.func's transforms, as functions that `grad`, `vmap` and what is made of them know. What
# torch.library registers for an op does not do there (torch 2.13). Their gradient is that of the op, of first order,
# and a batch is a loop. Compiled code has the ops alone.


def _refuse(ctx: Any, name: str, rule: str) -> NoReturn:
    arguments = getattr(torch.ops.numba_moe, name).default._schema.arguments
    argument = next(argument.name for argument, needed in zip(arguments, ctx.needs_input_grad, strict=True) if needed)
    raise ValueError(f"`{argument}` must be {rule}, got one that torch.func (functorch) differentiates")


def _is_functional(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and torch_private.is_functional(value)


def _over_batch(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """Call a function for each element of a batch and stack what it returns; zeros say what an empty one returns."""
    size = info.batch_size

    def elements(value: Any, dim: int | None) -> list[Any]:
        if dim is None:
            return [value] * max(size, 1)
        if not size:
            return [value.new_zeros(value.movedim(dim, 0).shape[1:])]
        return [part.contiguous() for part in value.unbind(dim)]

    given = [elements(value, dim) for value, dim in zip(args, in_dims, strict=True)]
    results = [function(*one) for one in zip(*given, strict=True)]
    if isinstance(results[0], tuple):
        stacked = tuple(torch.stack(parts)[:size] for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)
    return torch.stack(results)[:size], 0


def _define_function(name: str, rules: tuple[Callable[..., None], Callable[..., Any]] | None) -> None:
    """Make the function of an op that is registered."""
    packet = getattr(torch.ops.numba_moe, name)
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
            elif not DECLARATIONS[name].is_gradient and any(ctx.needs_input_grad):
                _refuse(ctx, name, "without a gradient, which this op has not")

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if rules is None:
                _refuse(ctx, name, SECOND)
            return rules[1](ctx, *grads)

        @staticmethod
        def jvp(_ctx: Any, *_tangents: Any) -> Any:
            raise TypeError(NO_TANGENTS.format(argument=packet.default._schema.arguments[0].name))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _over_batch(Function.apply, info, in_dims, *args)

    FUNCTIONS[name] = Function


def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an op under torch.func's transforms."""
    packet = getattr(torch.ops.numba_moe, name)
    if any(map(_is_functional, args)):
        return packet(*args, **kwargs)  # which torch.func.functionalize knows, and functions it does not
    arguments = packet.default._schema.arguments[len(args) :]
    rest = [kwargs.get(argument.name, argument.default_value) for argument in arguments]
    return FUNCTIONS[name].apply(*args, *rest)
