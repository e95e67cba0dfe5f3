"""The ops under `torch.ops.numba_moe`, for torch.compile, torch.export and whatever else asks torch's dispatcher.

Nobody needs to import this module but a program that loads an exported one. A public function calls its op by itself
where torch compiles, exports or traces with fake tensors, and then this is imported; eager calls pass it by.

An op has the name, parameters and defaults of its function. Where the function can write memory that it is given, the
op leaves those parameters out, and `<name>_out` beside it has them, the result first, and returns nothing.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from numba_moe.gating.backward import gating_backward
from numba_moe.reference.ragged import BLOCK_SIZES, schedule_shift

LIBRARY = "numba_moe"
# How annotations are called in schemas; sizes may be symbols. What is annotated Any is a tensor.
KINDS: dict[Any, str] = {int: "SymInt", bool: "bool", float: "float", str: "str", str | None: "str?"}
TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),  # the former since torch 2.8
)


class Op(NamedTuple):
    """What torch has to know of a public function beside its signature."""

    module: str
    results: Callable[..., Any]  # tensors like its results, of its arguments, but for what they hold
    written: tuple[str, ...] = ()  # the parameters that it writes, the result first


def _int32(like: torch.Tensor, *shape: Any) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def sorted_slots(num_slots: Any, block_size: Any, num_experts: Any, pad_sorted_ids: bool) -> Any:
    """Return what the reference's `max_sorted_slots` does, for symbols too: without a comparison of them.

    >>> sorted_slots(100, 16, 8, False), sorted_slots(100, 16, 8, True), sorted_slots(3, 16, 8, False)
    (220, 224, 48)
    """
    length = num_slots + torch.sym_min(num_slots, num_experts) * (block_size - 1)
    return -(-length // block_size) * block_size if pad_sorted_ids else length


def scheduled_blocks(num_slices: Any, num_rows: Any) -> Any:
    """Return what the reference's `max_blocks` does, for symbols too.

    >>> scheduled_blocks(4, 159), scheduled_blocks(4, 3), scheduled_blocks(0, 9)
    (13, 3, 0)
    """
    if isinstance(num_slices, int) and num_slices == 0:
        return min(num_rows, 0)
    return torch.sym_min(num_slices, num_rows) + torch.sym_max(num_rows - num_slices, 0) // BLOCK_SIZES[0]


def _align(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    *_: Any,
    **__: Any,
) -> Any:
    length = sorted_slots(topk_ids.numel(), block_size, num_experts, pad_sorted_ids)
    return tuple(_int32(topk_ids, size) for size in (length, -(-length // block_size), 1))


def _batched(max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor) -> Any:
    num_blocks = expert_num_tokens.shape[0] * -(-max_tokens_per_batch // block_size)
    return tuple(_int32(expert_num_tokens, size) for size in (num_blocks * block_size, num_blocks, 1))


def _lora(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    block_size: int,
    num_experts: int,
    max_loras: int,
    adapter_enabled: torch.Tensor | None = None,
    lora_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    *_: Any,
    **__: Any,
) -> Any:
    length = sorted_slots(topk_ids.numel(), block_size, num_experts, pad_sorted_ids)
    shapes = (max_loras, length), (max_loras, -(-length // block_size)), (max_loras,)
    return tuple(_int32(topk_ids, *shape) for shape in shapes)


def _ragged(slice_sizes: torch.Tensor, num_rows: int) -> Any:
    num_slices, kinds = slice_sizes.shape[0], len(BLOCK_SIZES)
    dtype = torch.int32 if schedule_shift(num_slices, num_rows) == 16 else torch.int64
    schedule = slice_sizes.new_empty((kinds, scheduled_blocks(num_slices, num_rows)), dtype=dtype)
    shapes = (num_slices,), (num_slices + 1,), (kinds, num_slices + 1)
    return *(_int32(slice_sizes, *shape) for shape in shapes), schedule


def _choice(gating_output: torch.Tensor, top_k: int, *_: Any, **__: Any) -> Any:
    shape = (gating_output.shape[0], top_k)
    return gating_output.new_empty(shape, dtype=torch.float32), _int32(gating_output, *shape)


def _permuted(hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, *_: Any) -> Any:
    num_slots = topk_ids.numel()
    return (
        hidden_states.new_empty((num_slots, hidden_states.shape[1])),
        hidden_states.new_empty(num_experts + 1, dtype=torch.int64),
        _int32(topk_ids, num_slots),
        _int32(topk_ids, *topk_ids.shape),
    )


def _dispatched(topk_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
    return topk_ids.new_empty(topk_ids.shape)


def _nothing(*_: Any, **__: Any) -> None:
    return None


OPS: Mapping[str, Op] = {
    "moe_align_block_size": Op("align", _align, ("out", "inv_sorted_idx", "counts", "workspace")),
    "batched_moe_align_block_size": Op("batched", _batched),
    "moe_lora_align_block_size": Op("lora", _lora),
    "make_ragged_metadata": Op("ragged", _ragged),
    "count_tokens_per_expert": Op("counting", lambda topk_ids, num_experts, *_: _int32(topk_ids, num_experts)),
    "expert_offsets": Op("counting", lambda counts, *_: counts.new_empty(counts.shape[0] + 1, dtype=torch.int64)),
    **dict.fromkeys(("topk_softmax", "topk_sigmoid", "topk_softplus_sqrt", "topk_raw"), Op("gating", _choice)),
    **dict.fromkeys(("grouped_topk", "select_experts"), Op("gating", _choice)),
    "moe_permute": Op("permute", _permuted),
    "moe_unpermute": Op("permute", lambda rows, weights, _: rows.new_empty((weights.shape[0], rows.shape[1]))),
    "dispatch_ids": Op("placement.dispatch", _dispatched, ("out", "counts")),
    "add_expert_counts": Op("recorder.counting", _nothing, ("counts",)),
}


def writing_name(name: str) -> str:
    """Return the name of the op that writes memory it is given; an op that does nothing else has its function's."""
    return name if OPS[name].results is _nothing else f"{name}_out"


def _function(name: str) -> Callable[..., Any]:
    """Return a public function as it is for tensors of the current device."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"numba_moe.{OPS[name].module}"), name).__wrapped__
    return function


def _result_type(function: Callable[..., Any]) -> Any:
    """Return the NamedTuple that a function returns, None if it returns a tensor."""
    annotation = inspect.signature(function, eval_str=True).return_annotation
    return annotation if hasattr(annotation, "_fields") else None


def schema(name: str, function: Callable[..., Any], written: Sequence[str] = (), left_out: Sequence[str] = ()) -> str:
    """Return the schema of an op with the parameters of a function; with `written` ones it returns nothing.

    >>> schema("double", inspect.unwrap(importlib.import_module("numba_moe.counting").count_tokens_per_expert))
    'double(Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None) -> Tensor'
    """
    result = _result_type(function)
    parameters = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.name in left_out:
            continue
        if written and parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")  # elsewhere not, as a tensor by keyword alone cannot be differentiated
        kind, default = KINDS.get(parameter.annotation, "Tensor"), parameter.default
        if parameter.name in written:
            several = parameter.name == "out" and result is not None
            kind = f"Tensor({chr(ord('a') + written.index(parameter.name))}!)" + "[]" * several
            if parameter.name == written[0]:
                default = parameter.empty
        kind += "?" * (kind.startswith("Tensor") and default is None)
        text = "" if default is parameter.empty else f'="{default}"' if isinstance(default, str) else f"={default}"
        parameters.append(f"{kind} {parameter.name}{text}")
    returns = "()" if written else "Tensor" if result is None else f"({', '.join(['Tensor'] * len(result._fields))})"
    return f"{name}({', '.join(parameters)}) -> {returns}"


def _run(function: Callable[..., Any], writes: bool) -> Callable[..., Any]:
    """Return what torch calls for an op, on tensors with data."""
    names = tuple(inspect.signature(function).parameters)

    def run(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("out"), list):
            kwargs["out"] = tuple(kwargs["out"])
        with torch.cuda.device_of(next(value for value in args if isinstance(value, torch.Tensor))):
            results = function(**dict(zip(names, args, strict=False)), **kwargs)
        return None if writes else tuple(results) if isinstance(results, tuple) else results

    return run


def _register(name: str, text: str, run: Callable[..., Any], results: Callable[..., Any]) -> None:
    torch.library.define(f"{LIBRARY}::{name}", text.removeprefix(name), tags=TAGS)
    torch.library.impl(f"{LIBRARY}::{name}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"{LIBRARY}::{name}", results)


def _differentiate(name: str, function: Callable[..., Any]) -> None:
    """Give the weights of a gating op their gradient by the logits."""
    signature = inspect.signature(function)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        arguments = dict(zip(signature.parameters, inputs, strict=True))
        ctx.save_for_backward(inputs[0], *output)
        ctx.rules = (
            arguments.get("scoring_func", name.removeprefix("topk_")),
            arguments["renormalize"],
            arguments.get("routed_scaling_factor", 1.0),
        )
        ctx.others = len(inputs) - 1

    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> Any:
        grad = torch.ops.numba_moe.gating_backward(*ctx.saved_tensors, grad_weights, *ctx.rules)
        return grad, *[None] * ctx.others

    torch.library.register_autograd(f"{LIBRARY}::{name}", backward, setup_context=setup)


def _define() -> dict[str, Any]:
    """Register all ops; return the types of their results."""
    types_of_results: dict[str, Any] = {}
    for name, op in OPS.items():
        function = _function(name)
        types_of_results[name] = _result_type(function)
        if writing_name(name) != name:
            text = schema(name, function, left_out=op.written)
            _register(name, text, _run(function, writes=False), op.results)
        if op.written:
            text = schema(writing_name(name), function, op.written)
            _register(writing_name(name), text, _run(function, writes=True), _nothing)
        if op.results is _choice:
            _differentiate(name, function)
    text = schema("gating_backward", gating_backward)
    _register("gating_backward", text, gating_backward, lambda logits, *_: logits.new_empty(logits.shape))
    return types_of_results


RESULT_TYPES = _define()


def call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the op of a public function, with its arguments and results, through torch's dispatcher."""
    op = OPS[name]
    given = {key: value for key, value in kwargs.items() if key not in op.written or value is not None}
    if not any(key in given for key in op.written):
        results = getattr(torch.ops.numba_moe, name)(*args, **given)
    else:
        result = op.written[0]
        if result not in given:
            given[result] = op.results(*args, **{key: given[key] for key in given if key not in op.written})
        results = given[result]
        if isinstance(results, tuple):
            given[result] = list(results)
        getattr(torch.ops.numba_moe, writing_name(name))(*args, **given)
    return results if RESULT_TYPES[name] is None else RESULT_TYPES[name](*results)
