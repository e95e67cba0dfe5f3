"""From a kernel to machine code: Numba function -> PTX -> cubin -> a kernel that the driver can launch.

A specialisation of a kernel is the tuple of its array dtypes and constants. Compilation needs no GPU: Numba brings
NVVM, and cuda.core links the PTX. Numba is imported when something must be compiled.
"""

import functools
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple, get_args, get_type_hints

from numba_moe import lazy
from numba_moe.device import dialect
from numba_moe.device.types import CONSTANT, ELEMENT_TYPES, HOPPER, LIKE
from numba_moe.runtime import cache, text

KERNEL_PACKAGES = ("numba_moe.ops",)
# Dynamic shared memory of a block; every GPU since sm_80 has it beside a kernel's static arrays.
MOST_SHARED_BYTES = 64 * 1024

_log = logging.getLogger(__name__)

Specialisation = tuple[str | int, ...]

# How many kernels this process compiled, and how many it read from the disk cache instead.
statistics = {"compiled": 0, "read": 0}


def kernel_modules() -> Iterator[ModuleType]:
    """Import and yield every module that may have kernels."""
    return itertools.chain.from_iterable(map(lazy.modules_of, KERNEL_PACKAGES))


def kernels() -> list[Any]:
    """Return every kernel of the package."""
    from numba.cuda.dispatcher import CUDADispatcher

    found: dict[str, Any] = {}
    for module in kernel_modules():
        namespace = vars(module)
        dialect.resolve(namespace)
        for value in namespace.values():
            if isinstance(value, CUDADispatcher) and not value.targetoptions.get("device"):
                other = found.setdefault(value.py_func.__name__, value)
                if other is not value:
                    raise RuntimeError(f"two kernels are named {value.py_func.__name__}")
    return list(found.values())


class Parameter(NamedTuple):
    """What a field of a kernel's records may be: dtypes of an array or number, or the values of a constant.

    With `like` it is an array of the dtype of another field. The owner is the record that declares it, or the kernel's
    function.
    """

    name: str
    owner: Any
    is_array: bool
    is_constant: bool
    options: tuple[Any, ...]
    like: str | None = None


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    """Return the annotations of a kernel's parameters, or of a record's fields."""
    hints = get_type_hints(owner, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "_fields")


def _is_constant(annotation: Any) -> bool:
    return CONSTANT in get_args(annotation)[1:2]


def _flatten(owner: Any) -> Iterator[Parameter]:
    """Yield the parameters of a kernel's function, and the fields of its records in their place."""
    for name, annotation in _hints(owner).items():
        if _is_record(annotation):
            yield from _flatten(annotation)
        else:
            yield _described(name, annotation, owner)


def _described(name: str, annotation: Any, owner: Any) -> Parameter:
    """Return what an annotation says of a parameter or a field."""
    kind, *options = get_args(annotation)
    is_constant = _is_constant(annotation)
    like = options[1] if options[0] == LIKE else None
    options = options[2 if like else is_constant :]
    return Parameter(name, owner, kind not in (int, float), is_constant, tuple(options), like)


def parameters(kernel: Any) -> tuple[Parameter, ...]:
    """Return the fields of all parameters of a kernel, in the order in which PTX takes them."""
    return _parameters(kernel.py_func)


@functools.cache
def _parameters(function: Any) -> tuple[Parameter, ...]:
    found = tuple(_flatten(function))
    names = [field.name for field in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise TypeError(f"kernel {function.__name__} has two fields named {twice}")
    return found


def arguments(kernel: Any, values: Iterable[Any]) -> list[Any]:
    """Return what each parameter of a kernel takes, records or values, given the values of all fields in order."""
    remaining = iter(values)

    def build(annotation: Any) -> Any:
        if _is_record(annotation):
            return annotation(*map(build, _hints(annotation).values()))
        return next(remaining)

    return [build(hint) for hint in _hints(kernel.py_func).values()]


@functools.cache
def _kinds(owner: Any) -> tuple[tuple[str, Any], ...]:
    """Return the name and the record, or None, of each parameter of a kernel but constants, or field of a record."""
    hints = {name: hint for name, hint in _hints(owner).items() if not _is_constant(hint)}
    return tuple((name, hint if _is_record(hint) else None) for name, hint in hints.items())


def values_of(kernel: Any, records: Iterable[Any]) -> list[Any]:
    """Return the values of all fields of a kernel in order, given its records; constants are none of them."""
    found: list[Any] = []

    def add(owner: Any, values: Iterable[Any]) -> None:
        for (name, kind), value in zip(_kinds(owner), values, strict=True):
            if kind is None:
                found.append(value)
            elif type(value) is kind:
                add(kind, value)
            else:
                raise TypeError(f"kernel {kernel.py_func.__name__} takes {kind.__name__} for {name}, got {value!r}")

    add(kernel.py_func, records)
    return found


def _varying(kernel: Any) -> list[Parameter]:
    """Return the parameters that a specialisation says something about."""
    return [one for one in parameters(kernel) if (one.is_array or one.is_constant) and one.like is None]


def specialisations(kernel: Any) -> list[Specialisation]:
    """Return every specialisation that a kernel's signature allows."""
    choices = ([option for option in parameter.options if option is not None] for parameter in _varying(kernel))
    return list(itertools.product(*choices))


def specialisation_for(kernel: Any, choices: Mapping[str, str | int | None]) -> Specialisation:
    """Return the specialisation with these dtypes and constants; an array that is absent has its first dtype."""
    found = []
    varying = _varying(kernel)
    for parameter in varying:
        choice = choices.get(parameter.name, parameter.options[0])
        if choice not in parameter.options:
            where = f"kernel {kernel.py_func.__name__} takes {parameter.options} for {parameter.name}"
            raise TypeError(f"{where}, got {choice}")
        found.append(parameter.options[0] if choice is None else choice)
    if unknown := set(choices) - {parameter.name for parameter in varying}:
        raise TypeError(f"kernel {kernel.py_func.__name__} has no array or constant {sorted(unknown)}")
    return tuple(found)


def chosen(kernel: Any, specialisation: Specialisation) -> Iterator[tuple[Parameter, str | int]]:
    """Yield every field with its dtype, or the value of a constant, in one specialisation."""
    choices = dict(zip((parameter.name for parameter in _varying(kernel)), specialisation, strict=True))
    for parameter in parameters(kernel):
        name = parameter.like or parameter.name
        yield parameter, choices[name] if name in choices else parameter.options[0]


def signature(kernel: Any, specialisation: Specialisation) -> Any:
    """Return the Numba signature of one specialisation: pointers for arrays, numbers by value, constants not at all.

    Numba passes the fields of a record to PTX one by one, as if each were a parameter.
    """
    from numba import types

    fields: list[Any] = []
    for parameter, choice in chosen(kernel, specialisation):
        if parameter.is_constant:
            fields.append(types.Omitted(choice))
        else:
            element = getattr(types, ELEMENT_TYPES.get(str(choice), str(choice)))
            fields.append(types.CPointer(element) if parameter.is_array else element)

    def type_of(value: Any) -> Any:
        return (
            types.BaseTuple.from_types([type_of(part) for part in value], type(value))
            if _is_record(type(value))
            else value
        )

    return types.void(*map(type_of, arguments(kernel, fields)))


def launch_bounds(
    kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]
) -> int | tuple[int, int] | None:
    """Return the most threads of a block that a kernel is compiled for, maybe with how many blocks are to fit.

    A kernel may have a mapping of these, by the value of its first constant.
    """
    bounds: Any = kernel.targetoptions.get("launch_bounds")
    if isinstance(bounds, Mapping):
        constant = next(choice for field, choice in chosen(kernel, specialisation) if field.is_constant)
        found: tuple[int, int] = bounds[constant]
        return found
    # Before Hopper a warp operation in a loop takes more registers, and some would be spilled to fit the blocks.
    return None if isinstance(bounds, tuple) and compute_capability < HOPPER else bounds


def starts_early(kernel: Any) -> bool:
    """Whether a kernel waits by itself for the one ahead of it, so that it may start before that has ended."""
    return "wait_for_earlier" in kernel.py_func.__code__.co_names


def ptx(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel to PTX."""
    from numba_moe.device import numba_compiler

    dialect.resolve(kernel.py_func.__globals__)
    bounds = launch_bounds(kernel, specialisation, compute_capability)
    return numba_compiler.compile_kernel(kernel.py_func, signature(kernel, specialisation), compute_capability, bounds)


def entry_name(code: str) -> str:
    """Return the name of the kernel in its PTX."""
    return code.split(".visible .entry ", 1)[1].split("(", 1)[0].strip()


def compiled(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> cache.Entry:
    """Return a kernel's machine code, from the disk cache if it has been compiled before."""
    name = kernel.py_func.__name__
    arch = "sm_{}{}".format(*compute_capability)
    path = cache.path_of(name, specialisation, arch) if cache.serves(kernel.py_func) else None
    if path is not None and (entry := cache.read(path)):
        statistics["read"] += 1
        _log.debug("Read %s%s for %s", name, specialisation, arch)
        return entry
    from cuda.core import Program, ProgramOptions

    begin = time.perf_counter()
    code = ptx(kernel, specialisation, compute_capability)
    cubin = Program(code, "ptx", ProgramOptions(arch=arch)).compile("cubin")
    statistics["compiled"] += 1
    _log.debug("Compiled %s%s for %s in %.1f s", name, specialisation, arch, time.perf_counter() - begin)
    entry = cache.Entry(name, specialisation, arch, entry_name(code), bytes(cubin.code))
    if path is not None and cache.serves(kernel.py_func):  # what compiles may have been imported only now
        cache.write(path, entry)
    return entry


def every_compiled(compute_capabilities: Iterable[tuple[int, int]]) -> Iterator[tuple[Any, cache.Entry]]:
    """Yield every kernel with the machine code of each of its specialisations, and show how far that is."""
    wanted = [
        (kernel, specialisation, capability)
        for capability in compute_capabilities
        for kernel in kernels()
        for specialisation in specialisations(kernel)
    ]
    for kernel, specialisation, capability in text.progress(wanted, "kernel"):
        yield kernel, compiled(kernel, specialisation, capability)


def compile_all(compute_capabilities: Iterable[tuple[int, int]]) -> int:
    """Compile every specialisation of every kernel into the cache; return how many there are."""
    return sum(1 for _ in every_compiled(compute_capabilities))
