"""The ops under `torch.ops.numba_moe`, for torch.compile, torch.export and whatever else asks torch's dispatcher.

Nobody needs to import this module but a program that loads an exported one. A public function calls its op by itself
where torch compiles, exports or traces with fake tensors, and then this is imported; eager calls pass it by.

An op has the name, parameters and defaults of its function, but these. Where the function can write memory that it is
given, the op leaves those parameters out, and another has them: `<name>_out`, whose result goes to what it is given,
or `<name>_writing`, which returns new results as well. A result that a call has none of is an array of no elements.
Dispatch tables come one by one, each behind `dispatch_`. An op with a gradient has an overload `without_gradient`, that
compiled code calls where none is wanted.
"""

import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from numba_moe.gating.backward import gating_backward
from numba_moe.interop import torch_experts, torch_gradients, torch_results, torch_transforms
from numba_moe.permute.backward import permute_backward, unpermute_backward
from numba_moe.reference.dispatch import DispatchTables
from numba_moe.runtime import arrays, checks, observe, plans, torch_private

FakeTensor: Any = torch_private.FakeTensor
LIBRARY = "numba_moe"
# How annotations are called in schemas; sizes may be symbols. What is annotated Any is a tensor, but by these names.
KINDS: dict[Any, str] = {int: "SymInt", bool: "bool", float: "float", str: "str", str | None: "str?"}
KINDS |= {int | None: "SymInt?", bool | None: "bool?", float | None: "float?"}
KINDS_BY_NAME = {"out_dtype": "ScalarType?", "indices_dtype": "str"}
TABLES = [
    table.replace(name=f"dispatch_{table.name}", default=None if table.default is table.empty else table.default)
    for table in inspect.signature(DispatchTables).parameters.values()
]
TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),  # the former since torch 2.8
)
GATING_OPTIONS = ("identity_weights", "counts")


class Op(NamedTuple):
    """What torch has to know of a public function beside its signature."""

    module: str
    results: Callable[..., Any]  # tensors like its results, of its arguments
    out: str = ""  # the parameter that its result goes to
    written: tuple[str, ...] = ()  # the others that it writes
    absent: Mapping[str, str] = types.MappingProxyType({})  # results that there are only with an argument: which
    gradient: Callable[[str], None] | None = None  # what registers it


OPS: Mapping[str, Op] = {
    "moe_align_block_size": Op("align", torch_results.align, "out", ("inv_sorted_idx", "counts", "workspace")),
    "batched_moe_align_block_size": Op("batched", torch_results.batched),
    "moe_lora_align_block_size": Op("lora", torch_results.lora),
    "make_ragged_metadata": Op("ragged", torch_results.ragged),
    "count_tokens_per_expert": Op("counting", torch_results.counts),
    "expert_offsets": Op("counting", torch_results.offsets),
    **dict.fromkeys(
        ("topk_softmax", "topk_sigmoid", "topk_softplus_sqrt", "topk_raw", "grouped_topk"),
        Op("gating", torch_results.choice, gradient=torch_gradients.of_gating),
    ),
    "select_experts": Op(
        "gating.selection", torch_results.selection, written=GATING_OPTIONS, gradient=torch_gradients.of_gating
    ),
    "weigh_experts": Op("gating.selection", torch_results.weighing, written=GATING_OPTIONS),
    "route": Op("routing", torch_results.routed, written=GATING_OPTIONS),
    "moe_permute": Op(
        "permute",
        torch_results.permuted,
        absent={"m_indices": "alignment", "permuted_scales": "scales"},
        gradient=torch_gradients.of_permuting,
    ),
    "moe_permute_masked": Op(
        "permute.layouts",
        torch_results.masked,
        absent={"permuted_scales": "scales"},
        gradient=torch_gradients.of_permuting,
    ),
    "moe_reorder": Op("permute.layouts", torch_results.reordered),
    "moe_unpermute": Op("permute", torch_results.combined, gradient=torch_gradients.of_unpermuting),
    "moe_sum": Op("permute", torch_results.summed, gradient=torch_gradients.of_summing),
    "moe_activation": Op("activation", torch_results.activated, gradient=torch_gradients.of_activating),
    "fused_experts": Op("experts", torch_results.experts, gradient=torch_gradients.refused),
    "dispatch_ids": Op("placement.dispatch", torch_results.dispatched, "out", ("counts",)),
    "add_expert_counts": Op("recorder.counting", torch_results.nothing, "counts"),
}


def _unpermute_backward(by_rows: bool, by_weights: bool, **given: Any) -> Any:
    return unpermute_backward(**given, wanted=(by_rows, by_weights))


BACKWARD: tuple[torch_experts.Step, ...] = (
    (
        "gating_backward",
        "(Tensor gating_output, Tensor topk_weights, Tensor topk_ids, Tensor grad_weights, str scoring_func,"
        " bool renormalize, float routed_scaling_factor) -> Tensor",
        gating_backward,
        torch_results.choice_backward,
    ),
    (
        "permute_backward",
        "(Tensor inv_permuted_idx, Tensor grad) -> Tensor",
        permute_backward,
        torch_results.permuted_backward,
    ),
    (
        "unpermute_backward",
        "(Tensor permuted, Tensor topk_weights, Tensor inv_permuted_idx, Tensor grad, float routed_scaling_factor,"
        " bool by_rows, bool by_weights) -> (Tensor, Tensor)",
        _unpermute_backward,
        torch_results.combined_backward,
    ),
)


def writing_name(name: str) -> str:
    """Return the name of the op that writes memory it is given; one that does nothing else has its function's."""
    op = OPS[name]
    return name if op.results is torch_results.nothing else f"{name}_out" if op.out else f"{name}_writing"


def _function(name: str) -> Callable[..., Any]:
    """Return a public function as it is for tensors of the current device."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"numba_moe.{OPS[name].module}"), name).__wrapped__
    return function


class Result(NamedTuple):
    """A NamedTuple that a function returns, and what its fields are: None is a tensor."""

    kind: Any
    fields: "tuple[Result | None, ...]"


def _result_of(annotation: Any) -> Result | None:
    if not hasattr(annotation, "_fields"):
        return None
    fields = inspect.get_annotations(annotation, eval_str=True).values()
    return Result(annotation, tuple(map(_result_of, fields)))


def _result_type(function: Callable[..., Any]) -> Result | None:
    return _result_of(inspect.signature(function, eval_str=True).return_annotation)


def num_tensors(result: Result | None) -> int:
    """Count the tensors of a result."""
    return 1 if result is None else sum(map(num_tensors, result.fields))


def _flat(found: Any) -> list[Any]:
    return [leaf for part in found for leaf in (_flat(part) if isinstance(part, tuple) else [part])]


def _rebuild(result: Result | None, tensors: Iterator[torch.Tensor]) -> Any:
    """Return a result of the tensors of `_flat`."""
    return next(tensors) if result is None else result.kind(*(_rebuild(field, tensors) for field in result.fields))


def schema(name: str, function: Callable[..., Any], op: Op, writes: bool) -> str:
    """Return the schema of an op: of the one that writes what it is given, or of the one that does not.

    >>> schema("count", _function("count_tokens_per_expert"), OPS["count_tokens_per_expert"], writes=False)
    'count(Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None) -> Tensor'
    """
    result, given = _result_type(function), [name for name in (op.out, *op.written) if name]
    parameters: list[str] = []
    for whole in inspect.signature(function, eval_str=True).parameters.values():
        for parameter in TABLES if whole.name == "dispatch" else [whole]:
            name_, default = parameter.name, parameter.default
            if name_ in given and not writes:
                continue
            if writes and whole.kind is whole.KEYWORD_ONLY and "*" not in parameters:
                parameters.append("*")  # elsewhere not, as a tensor by keyword alone cannot be differentiated
            kind = KINDS_BY_NAME.get(name_) or KINDS.get(parameter.annotation, "Tensor")
            if name_ in given:
                kind = f"Tensor({chr(ord('a') + given.index(name_))}!)"
            if name_ == op.out:
                kind, default = kind + "[]" * (result is not None), parameter.empty
            kind += "?" * (kind.startswith("Tensor") and default is None)
            text = "" if default is parameter.empty else f'="{default}"' if isinstance(default, str) else f"={default}"
            parameters.append(f"{kind} {name_}{text}")
    returns = "Tensor" if result is None else f"({', '.join(['Tensor'] * num_tensors(result))})"
    return f"{name}({', '.join(parameters)}) -> {'()' if writes and op.out else returns}"


def _gather_tables(given: dict[str, Any]) -> None:
    """Put dispatch tables together again."""
    tables = {table.name: given.pop(table.name) for table in TABLES if table.name in given}
    if tables.get(TABLES[0].name) is not None:
        given["dispatch"] = DispatchTables(*tables.values())


def _register(
    name: str, text: str, function: Callable[..., Any], results: Callable[..., Any], overload: str = "default"
) -> None:
    """Register an op that a function computes, given tensors with data."""
    whole = f"{LIBRARY}::{name}" if overload == "default" else f"{LIBRARY}::{name}.{overload}"
    torch.library.define(whole, text.removeprefix(name), tags=TAGS)
    parameters = torch_gradients.parameters_of(getattr(getattr(torch.ops.numba_moe, name), overload))
    names = list(parameters)
    first_tensor = next(i for i, one in enumerate(parameters.values()) if one.annotation is torch.Tensor)
    has_tables = TABLES[0].name in names

    def fake(*args: Any, **kwargs: Any) -> Any:
        return results(**dict(zip(names, args, strict=False)), **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if has_tables:
            _gather_tables(given)
        if isinstance(given.get("out"), list):
            given["out"] = tuple(given["out"])
        named = observe.named(function)
        first = args[first_tensor]
        device = first.get_device()
        if device < 0 or device == arrays.current_device():
            found = named(**given)
        else:
            with torch.cuda.device(device):
                found = named(**given)
        if text.endswith("()"):
            return None
        return (
            tuple(first.new_empty(0) if part is None else part for part in _flat(found))
            if isinstance(found, tuple)
            else found
        )

    torch.library.impl(whole, ("cpu", "cuda"), run)
    torch.library.register_fake(whole, fake)


def _define() -> dict[str, Result | None]:
    """Register all ops; return the types of their results."""
    types_of_results: dict[str, Result | None] = {}
    for name, op in OPS.items():
        function = _function(name)
        types_of_results[name] = _result_type(function)
        other = writing_name(name)
        if other != name:
            _register(name, schema(name, function, op, writes=False), function, op.results)
        if op.gradient is not None:
            text = schema(name, function, op, writes=False)
            _register(name, text, function, op.results, "without_gradient")
            op.gradient(name)
        if op.out or op.written:
            results = torch_results.nothing if op.out else op.results
            _register(other, schema(other, function, op, writes=True), function, results)
    for name, text, function, results in (*BACKWARD, *torch_experts.STEPS):
        _register(name, f"{name}{text}", function, results)
    torch_gradients.of_multiplying("multiply_by_expert")
    for name in (*OPS, *(step[0] for step in (*BACKWARD, *torch_experts.STEPS))):
        if OPS.get(name) is None or OPS[name].results is not torch_results.nothing:
            torch_transforms.define(name)
    return types_of_results


RESULT_TYPES = _define()
PARAMETERS = {name: tuple(inspect.signature(_function(name)).parameters) for name in OPS}


def _refuse_gradient(name: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Refuse a gradient of an op that has none: compiled code would go on as if it were zero."""
    for value in (*args, *given.values()):
        if torch_gradients.wanted(value):
            named = {**dict(zip(PARAMETERS[name], args, strict=False)), **given}
            argument = next(key for key, found in named.items() if found is value)
            rule = "without a gradient for these options"
            raise ValueError(f"`{argument}` must be {rule}, got one that requires it")


@torch.compiler.assume_constant_result  # what compiled code would otherwise look up at each call, to see it unchanged
def _traits(name: str) -> tuple[str, tuple[str, ...], tuple[tuple[str, str], ...], bool, bool]:
    op, result = OPS[name], RESULT_TYPES[name]
    nested = result is not None and any(field is not None for field in result.fields)
    return op.out, op.written, tuple(op.absent.items()), op.gradient is not None, nested


def _check(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse tensors that the ops cannot do justice to: with tangents, with data beside fake ones."""
    arguments = {**dict(zip(PARAMETERS[name], args, strict=False)), **kwargs}
    tensors = [pair for argument, value in arguments.items() for pair in checks.tensors(argument, value)]
    for argument, tensor in tensors:
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise TypeError(torch_transforms.NO_TANGENTS.format(argument=argument))
    fakes = [argument for argument, tensor in tensors if isinstance(tensor, FakeTensor)]
    mixable = all(tensor.fake_mode.allow_non_fake_inputs for _, tensor in tensors if isinstance(tensor, FakeTensor))
    if fakes and not mixable and len(fakes) < len(tensors):
        other = next(argument for argument, tensor in tensors if not isinstance(tensor, FakeTensor))
        raise TypeError(f"`{other}` must be a fake tensor, as `{fakes[0]}` is, got one with data")


def call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the op of a public function, with its arguments and results, through torch's dispatcher."""
    if arrays.is_traced():
        return _call(name, args, kwargs)
    _check(name, args, kwargs)
    try:
        return _call(name, args, kwargs)
    except NotImplementedError as error:
        arguments = {**dict(zip(PARAMETERS[name], args, strict=False)), **kwargs}
        for argument, value in arguments.items():
            for part, tensor in checks.tensors(argument, value):
                if not plans.is_plain(tensor):
                    rule = f"of a class that knows the op `{name}`"
                    raise TypeError(f"`{part}` must be {rule}, got {type(tensor).__name__}") from error
        raise


def _call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if name == "fused_experts":
        return torch_experts.fused_experts(*args, **kwargs)
    out, also_written, absent_without, differentiable, nested = _traits(name)
    given = {**kwargs}
    tables = given.pop("dispatch", None)
    if tables is not None:
        given.update({f"dispatch_{field}": getattr(tables, field) for field in DispatchTables._fields})
    if "indices_dtype" in given:
        given["indices_dtype"] = str(given["indices_dtype"]).removeprefix("torch.")
    if isinstance(given.get("out_dtype"), str):
        given["out_dtype"] = getattr(torch, given["out_dtype"])
    absent = [place for place, argument in absent_without if given.get(argument) is None]
    written = [key for key in (out, *also_written) if given.get(key) is not None]
    for key in (out, *also_written):
        if key not in written:
            given.pop(key, None)
    op = getattr(torch.ops.numba_moe, writing_name(name) if written else name)
    if written and arrays.is_transformed():
        rule = "None under the transforms of torch.func (functorch)"
        raise ValueError(f"`{written[0]}` must be {rule}, got memory to write")
    if not differentiable or written:
        _refuse_gradient(name, args, given)
    if written and out:
        if out not in given:
            given[out] = OPS[name].results(*args, **given)
        results = given[out]
        if isinstance(results, tuple):
            given[out] = list(results)
        op(*args, **given)
    elif arrays.is_transformed() and not arrays.is_traced():
        results = torch_transforms.apply(name, *args, **given)
    elif differentiable and not written:
        results = torch_gradients.overload(op, *args, *given.values())(*args, **given)
    else:
        results = op(*args, **given)
    result = RESULT_TYPES[name]
    if result is None:
        return results
    found = _rebuild(result, iter(results)) if nested else result.kind(*results)
    return found._replace(**dict.fromkeys(absent)) if absent else found
