"""From a kernel to machine code: Numba function -> PTX -> cubin -> a kernel that the driver can launch.

A specialisation of a kernel is the tuple of its array dtypes and constants. Compilation needs no GPU: Numba brings
NVVM, and cuda.core links the PTX. Numba is imported when something must be compiled.
"""

import functools
import importlib
import inspect
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

from numba_moe.runtime import cache, dialect
from numba_moe.runtime.parameters import CONSTANT, ELEMENT_TYPES, LIKE

KERNEL_MODULES = (
    *("activation.rows", "batched", "counting", "gating.backward", "gating.given", "gating.memory"),
    *("gating.octets", "gating.registers", "gating.routing", "lora"),
    *("permute.backward", "permute.layouts", "permute.rows"),
    *("placement.dispatch", "ragged", "recorder.counting", "sorting.kernels"),
)
# From here on blocks form clusters, and a kernel waits for the one ahead of it on the stream: it may start before that
# has ended.
HOPPER = (9, 0)
# Dynamic shared memory of a block; every GPU since sm_80 has it beside a kernel's static arrays.
MOST_SHARED_BYTES = 64 * 1024

# A kernel of more blocks does not let the next one start before its own last blocks end: blocks of the next
# would crowd where there is room first. An H200 then sorts 32,768 slots in 15 us instead of 10.
MOST_BLOCKS_OVERTAKEN = 32
# The wait comes first: what starts early may read, before it waits itself, what kernels further ahead have written.
WAIT = f"""{{
    .reg .pred %few;
    .reg .u32 %blocks;
    griddepcontrol.wait;
    mov.u32 %blocks, %nctaid.x;
    setp.le.u32 %few, %blocks, {MOST_BLOCKS_OVERTAKEN};
    @%few griddepcontrol.launch_dependents;
}}
"""

_log = logging.getLogger(__name__)

Specialisation = tuple[str | int, ...]

# How many kernels this process compiled, and how many it read from the disk cache instead.
statistics = {"compiled": 0, "read": 0}


def kernels() -> list[Any]:
    """Return every kernel of the package."""
    from numba.cuda.dispatcher import CUDADispatcher

    found: dict[str, Any] = {}
    for name in KERNEL_MODULES:
        namespace = vars(importlib.import_module(f"numba_moe.{name}"))
        dialect.resolve(namespace)
        for value in namespace.values():
            if isinstance(value, CUDADispatcher) and not value.targetoptions.get("device"):
                other = found.setdefault(value.py_func.__name__, value)
                if other is not value:
                    raise RuntimeError(f"two kernels are named {value.py_func.__name__}")
    return list(found.values())


class Parameter(NamedTuple):
    """What a parameter may be: dtypes of an array or number, or the values of a constant; or an array like another."""

    name: str
    is_array: bool
    is_constant: bool
    options: tuple[Any, ...]
    like: str | None = None


@functools.cache
def _parameters(function: Any) -> tuple[Parameter, ...]:
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *options = get_args(parameter.annotation)
        is_constant = options[0] == CONSTANT
        like = options[1] if options[0] == LIKE else None
        options = options[2 if like else is_constant :]
        found.append(Parameter(name, kind not in (int, float), is_constant, tuple(options), like))
    return tuple(found)


def _varying(kernel: Any) -> list[Parameter]:
    """Return the parameters that a specialisation says something about."""
    parameters = _parameters(kernel.py_func)
    return [one for one in parameters if (one.is_array or one.is_constant) and one.like is None]


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


def formats(kernel: Any) -> tuple[int, str]:
    """Return how many arrays a launch passes, and the formats, as of `struct`, of its numbers in eight bytes each."""
    kinds = {"int32": "q", "int64": "q", "float32": "f4x"}
    parameters = _parameters(kernel.py_func)
    numbers = (parameter for parameter in parameters if not parameter.is_array and not parameter.is_constant)
    formats = "".join(kinds[parameter.options[0]] for parameter in numbers)
    return sum(parameter.is_array for parameter in parameters), formats


def chosen(kernel: Any, specialisation: Specialisation) -> Iterator[tuple[Parameter, str | int]]:
    """Yield every parameter with its dtype, or the value of a constant, in one specialisation."""
    choices = dict(zip((parameter.name for parameter in _varying(kernel)), specialisation, strict=True))
    for parameter in _parameters(kernel.py_func):
        name = parameter.like or parameter.name
        yield parameter, choices[name] if name in choices else parameter.options[0]


def signature(kernel: Any, specialisation: Specialisation) -> Any:
    """Return the Numba signature of one specialisation: pointers for arrays, numbers by value, constants not at all."""
    from numba import types

    arguments: list[Any] = []
    for parameter, choice in chosen(kernel, specialisation):
        if parameter.is_constant:
            arguments.append(types.Omitted(choice))
        else:
            element = getattr(types, ELEMENT_TYPES.get(str(choice), str(choice)))
            arguments.append(types.CPointer(element) if parameter.is_array else element)
    return types.void(*arguments)


def launch_bounds(kernel: Any, compute_capability: tuple[int, int]) -> int | tuple[int, int] | None:
    """Return the most threads of a block that a kernel is compiled for, maybe with how many blocks are to fit."""
    bounds: int | tuple[int, int] | None = kernel.targetoptions.get("launch_bounds")
    # Before Hopper a warp operation in a loop takes so many registers that some would be spilled to fit the blocks.
    return None if isinstance(bounds, tuple) and compute_capability < HOPPER else bounds


def ptx(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel to PTX."""
    from numba_moe.runtime import device

    dialect.resolve(kernel.py_func.__globals__)
    bounds = launch_bounds(kernel, compute_capability)
    code = device.compile_kernel(kernel.py_func, signature(kernel, specialisation), compute_capability, bounds)
    return wait_for_earlier(code) if compute_capability >= HOPPER else code


def wait_for_earlier(code: str) -> str:
    """Let a kernel's PTX begin by waiting for the end of the kernel ahead, and a small one let the next start."""
    head, entry = code.split(".visible .entry ", 1)
    declaration, body = entry.split("\n{\n", 1)
    return f"{head}.visible .entry {declaration}\n{{\n{WAIT}{body}"


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
    """Yield every kernel with the machine code of each of its specialisations, with a progress bar."""
    from tqdm import tqdm

    wanted = [
        (kernel, specialisation, capability)
        for capability in compute_capabilities
        for kernel in kernels()
        for specialisation in specialisations(kernel)
    ]
    for kernel, specialisation, capability in tqdm(wanted, unit="kernel", disable=not sys.stderr.isatty()):
        yield kernel, compiled(kernel, specialisation, capability)


def compile_all(compute_capabilities: Iterable[tuple[int, int]]) -> int:
    """Compile every specialisation of every kernel into the cache; return how many there are."""
    return sum(1 for _ in every_compiled(compute_capabilities))
