"""What an op says of itself, and how an eager call of torch tensors is answered from it.

`numba_moe.runtime.op` has the decorator that makes a declaration, and the order in which its parts are asked.
"""

import collections
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch

from numba_moe.device import simulator
from numba_moe.runtime import arrays, checks, plans
from numba_moe.runtime.arrays import Array, Contiguous
from numba_moe.runtime.plans import Layout, Parts, new_tuple

_log = logging.getLogger(__name__)

# What an eager call answers where its result is to be a part of torch's graph.
WANTS_GRADIENT: Any = object()
# Every op of the modules that are imported, by name.
DECLARATIONS: "dict[str, Declaration]" = {}


class Result(NamedTuple):
    """A NamedTuple that an op returns, and what its fields are: None is an array."""

    kind: Any
    fields: "tuple[Result | None, ...]"

    @classmethod
    def of(cls, annotation: Any) -> "Result | None":
        if not hasattr(annotation, "_fields"):
            return None
        fields = inspect.get_annotations(annotation, eval_str=True).values()
        return cls(annotation, tuple(map(cls.of, fields)))


def num_arrays(result: Result | None) -> int:
    """Count the arrays of a result."""
    return 1 if result is None else sum(map(num_arrays, result.fields))


def flat(found: Any) -> list[Any]:
    """Return the arrays of a result, or their descriptions; it is one of them or a tuple of results."""
    if isinstance(found, tuple) and not isinstance(found, Contiguous):
        return [leaf for part in found for leaf in flat(part)]
    return [found]


def rebuild(result: Result | None, leaves: Iterator[Any]) -> Any:
    """Return a result of the arrays of `flat`."""
    return next(leaves) if result is None else result.kind(*(rebuild(field, leaves) for field in result.fields))


def names_of(result: Result | None, name: str) -> list[str]:
    """Return what errors call the arrays of a result that is given by a name."""
    if result is None:
        return [name]
    pairs = zip(result.kind._fields, result.fields, strict=True)
    return [leaf for field, part in pairs for leaf in names_of(part, f"{name}.{field}")]


class Planned(NamedTuple):
    """What is remembered of a call: its plan, its outputs, and which arguments ask for more than launches."""

    plan: Any
    outputs: tuple[Any, ...]  # how to allocate each array of the result, None for one that the call has not
    floats: tuple[int, ...]  # places of arguments that may require a gradient
    plain: bool  # kernels write results that are allocated, all of them, and nothing else
    on_cpu: bool
    written: tuple[int, ...]  # places of arguments to be written
    unaligned: bool  # memory for the result does not begin at multiples of 16 bytes, as kernels take it to


def _kinds(annotation: Any) -> set[Any]:
    """Return what an annotation allows, apart from None."""
    found = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return {kind for kind in found if kind is not types.NoneType}


def _record(name: str, fields: tuple[str, ...]) -> Any:
    """Return a named tuple of fields that are known as the package is imported."""
    return collections.namedtuple(name, fields)


class Declaration:
    """All that there is to say about an op. The parts that are None here are functions that `op` was given.

    Parameters
    ----------
    function
        Has the name, the parameters with their annotations, the docstring, and no body.
    twin
        The function of the reference that defines the op.
    writes
        Parameters whose arrays are written, besides `out`.
    out
        The parameter whose arrays take the result.
    own_out
        The plan checks `out` itself, which may be larger than the result, and the twin takes it.
    onto
        For some of the written ones, the parameter whose array they may be.
    absent
        Fields of the result that are there only with an argument: which.
    is_gradient
        The op is the gradient of another, and has none itself.
    tallies
        Those of the written parameters that hold integers, which a call may write where a gradient is wanted.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        twin: Callable[..., Any] | None,
        writes: tuple[str, ...],
        out: str,
        own_out: bool,
        onto: Mapping[str, str],
        absent: Mapping[str, str],
        is_gradient: bool,
        tallies: tuple[str, ...] = (),
    ) -> None:
        self.function, self.name, self.twin = function, function.__name__, twin
        self.writes, self.out, self.own_out, self.onto = writes, out, own_out, onto
        self.absent, self.is_gradient, self.tallies = absent, is_gradient, tallies
        self.signature = inspect.signature(function, eval_str=True)
        self.parameters = dict(self.signature.parameters)
        self.names = tuple(self.parameters)
        self.defaults = {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in self.parameters.items()
        }
        self.kinds = {name: _kinds(parameter.annotation) for name, parameter in self.parameters.items()}
        self.arrays = tuple(name for name in self.names if self.kinds[name] == {Array})
        self.tables = tuple(
            name for name in self.names if name != out and any(hasattr(kind, "_fields") for kind in self.kinds[name])
        )
        self.first = self.arrays[0]
        self.has_out = out in self.names
        self.written = tuple(name for name in (out, *writes) if name in self.names)
        self.result = Result.of(self.signature.return_annotation)
        self.nested = self.result is not None and any(field is not None for field in self.result.fields)
        self.Given = _record(self.name, self.names)
        self.bind = self._binder()
        self.planned = plans.planned(self._made)
        self.outputs: Callable[[Any], Any] | None = None
        self.plan: Callable[[Any], Any] | None = None
        self.run: Any = None
        self.validate: Callable[[Any], None] | None = None
        self.on_cpu: Callable[[Any], Any] | None = None
        self.compute: Callable[..., Any] | None = None
        self.refuse: Callable[[Any], None] | None = None
        self.saves: Callable[..., None] | None = None
        self.backward: Callable[..., Mapping[str, Any]] | None = None
        self.composed: Callable[[Any], Any] | None = None
        DECLARATIONS[self.name] = self

    def _binder(self) -> Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Compile what takes arguments as the op does, and returns them in order, and the key of their plan.

        It is source text, as in `collections.namedtuple`: `inspect` takes 29 us to bind a call of `select_experts`, and
        this 3 (CPU).
        """
        scope: dict[str, Any] = {"layout": plans.layout, "layouts": plans.layouts}
        declared: list[str] = []
        for name, parameter in self.parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in declared:
                declared.append("*")
            if parameter.default is parameter.empty:
                declared.append(name)
            else:
                scope[f"default_{name}"] = parameter.default
                declared.append(f"{name}=default_{name}")
        of_tuples = dict.fromkeys((*self.tables, *([self.out] if self.result and self.has_out else [])), "layouts")
        readers = dict.fromkeys(self.arrays, "layout") | of_tuples
        read = {name: f"None if {name} is None else {reader}({name})" for name, reader in readers.items()}
        read[self.first] = f"layout({self.first})"
        key = [read.get(name, name) for name in self.names]
        source = f"lambda {', '.join(declared)}: (({', '.join(self.names)},), ({', '.join(key)},))"
        binder: Any = eval(source, scope)
        binder.__name__ = binder.__qualname__ = self.name  # which errors of wrong arguments name
        return binder

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that a call gives, by name."""
        count = min(len(args), len(self.names))  # torch 2.9 traces no zip that is not strict
        return {**dict(zip(self.names[:count], args[:count], strict=True)), **kwargs}

    def given_of(self, arguments: Mapping[str, Any]) -> Any:
        """Return a call's arguments by name, with their defaults for those that are left out."""
        return new_tuple(self.Given, [arguments.get(name, self.defaults[name]) for name in self.names])

    def _made(self, *key: Any) -> Planned:
        """Check a call, whose key has the layouts of its arrays, and plan it."""
        given = new_tuple(self.Given, key)
        for name in self.arrays:
            checks.readable(name, getattr(given, name))
        plan = None if self.plan is None else self.plan(given)
        outputs: list[Contiguous | None] = flat(self.outputs(given)) if self.outputs else []
        places = {name: place for place, name in enumerate(self.names)}
        if self.has_out and not self.own_out and given[places[self.out]] is not None:
            self._check_out(given[places[self.out]], outputs, given)
        floats = [
            places[name]
            for name in self.arrays
            if name not in self.written
            and isinstance(key[places[name]], Layout)
            and key[places[name]].dtype.is_floating_point
        ]
        written = [places[name] for name in self.written if key[places[name]] is not None]
        on_cpu = key[places[self.first]].device.type != "cuda"
        out = key[places[self.out]] if self.has_out and not self.own_out else None
        unaligned = any(part is not None and part.address != 0 for part in flat_layouts(out))
        plain = not (on_cpu or written or self.nested or None in outputs) and self.compute is None
        return Planned(plan, tuple(outputs), tuple(floats), plain, on_cpu, tuple(written), unaligned)

    def _check_out(self, out: Any, outputs: list[Contiguous | None], given: Any) -> None:
        """Check memory for the result: arrays of the shapes and dtypes that would be allocated."""
        names = names_of(self.result, self.out)
        if self.result is not None:
            checks.tuple_of(self.out, out, len(self.result.fields))
        like = (self.first, getattr(given, self.first))
        for name, part, output in zip(names, flat_layouts(out), outputs, strict=True):
            if output is None:
                checks.holds(name, "None, as this call has no such result", part is None, "an array")
                continue
            checks.array(name, part, (output.dtype,), (len(output.shape),), like=like)
            checks.shape(name, part, output.shape, "that of the result")

    def eager(self, args: tuple[Any, ...], kwargs: dict[str, Any], differentiable: bool = True) -> Any:
        """Answer a call of torch tensors with memory on the current device: check, allocate, launch."""
        values, key = self.bind(*args, **kwargs)
        planned = self.planned(*key)
        plan, specs, floats, plain, *_ = planned
        given = new_tuple(self.Given, values)
        if self.validate is not None and checks.VALIDATE:
            self.validate(given)
        for place in floats:
            if differentiable and values[place].requires_grad and torch.is_grad_enabled():
                if self.refuse is not None:
                    self.refuse(given)
                return WANTS_GRADIENT
        if not plain:
            return self._answer(planned, given)
        memory = [arrays.empty(*spec) for spec in specs]
        self.run(plan, given, *memory)
        return memory[0] if self.result is None else new_tuple(self.result.kind, memory)

    def _answer(self, planned: Planned, given: Any) -> Any:
        """Answer a call that is not plain."""
        if planned.written:
            self._check_written(given, planned.written)
        out = getattr(given, self.out) if self.has_out else None
        if self.compute is not None:
            result = self.compute(planned.plan, given)
        elif planned.on_cpu and not simulator.is_running():
            if simulator.ENABLED:
                _tell_once()
            result = self._by_twin(given, planned.outputs, out)
        else:
            allocates = out is None or planned.unaligned
            memory = [spec and arrays.empty(*spec) for spec in planned.outputs] if allocates else flat(out)
            self.run(planned.plan, given, *memory)
            result = self.build(_copied(memory, flat(out)) if planned.unaligned else memory)
        parts = [part for place in planned.written for part in flat(given[place]) if part is not None]
        if parts:
            torch.autograd.graph.increment_version([part for part in parts if not part.is_inference()])
        return result

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of tensors that no gradient is wanted of."""
        return self.eager(args, kwargs)

    def new_results(self, given: Any) -> list[Any]:
        """Return memory for the result of a call of tensors, or fake ones; None for what the call has not."""
        assert self.outputs is not None
        first = getattr(given, self.first)
        return [spec and first.new_empty(spec.shape, dtype=spec.dtype) for spec in flat(self.outputs(given))]

    def build(self, memory: Any) -> Any:
        """Return the result of its arrays."""
        if self.result is None:
            return memory[0]
        return rebuild(self.result, iter(memory)) if self.nested else new_tuple(self.result.kind, memory)

    def _check_written(self, given: Any, written: tuple[int, ...]) -> None:
        """Check that the arrays that a call writes can be, and overlap no other."""
        for place in written:
            for name, part in checks.tensors(self.names[place], given[place]):
                checks.changeable(name, part)
        named = [self.names[place] for place in written]
        checks.apart(dict(zip(self.names, given, strict=True)), named, onto=self.onto)

    def _by_twin(self, given: Any, specs: tuple[Contiguous | None, ...], out: Any) -> Any:
        """Answer by the reference, on the CPU."""
        if self.on_cpu is not None:
            found = self.on_cpu(given)
        else:
            assert self.twin is not None
            arguments = given._asdict()
            if not self.own_out:
                arguments.pop(self.out, None)
            found = arrays.by_reference(self.twin, **arguments)
        if self.own_out and out is not None:
            return self.build(flat(out))
        parts = [
            part if spec is None or part is None else part.to(spec.dtype)
            for part, spec in zip(flat(found), specs, strict=True)
        ]
        return self.build(parts if out is None else _copied(parts, flat(out)))


@functools.cache
def _tell_once() -> None:
    """Say, where a learner has turned the simulator on, that what is on the CPU does not come to a kernel."""
    _log.warning(
        "The reference answers NumPy arrays and CPU tensors, also in the simulator: no kernel runs. "
        "Give `numba.cuda.to_device(array)` instead to see the kernels run."
    )


def _copied(parts: list[Any], targets: list[Any]) -> list[Any]:
    """Copy results into the memory that is given for them, and return that."""
    for target, part in zip(targets, parts, strict=True):
        if target is not None:
            target.copy_(part)
    return targets


def flat_layouts(given: Any) -> list[Any]:
    """Return the layouts of the arrays in what `plans.layouts` describes."""
    return [leaf for part in given.values for leaf in flat_layouts(part)] if isinstance(given, Parts) else [given]
