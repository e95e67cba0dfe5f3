"""From a kernel to machine code: Numba function -> PTX -> cubin -> a kernel that the driver can launch.

A specialisation of a kernel is the tuple of its array dtypes, None where an array is absent. Compilation needs
no GPU: Numba brings NVVM, and cuda.core links the PTX. Numba is imported when something must be compiled.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from cuda.core import ObjectCode, Program, ProgramOptions

from numba_moe.runtime import cache, dialect
from numba_moe.runtime.parameters import ELEMENT_TYPES

KERNEL_MODULES = ("counting", "align", "gating", "permute")

Specialisation = tuple[str | None, ...]

# How many kernels this process compiled, and how many it read from the disk cache instead.
statistics = {"compiled": 0, "read": 0}


def kernels() -> list[Any]:
    """Return every kernel of the package."""
    from numba.cuda.dispatcher import CUDADispatcher

    found = {}
    for name in KERNEL_MODULES:
        namespace = vars(importlib.import_module(f"numba_moe.{name}"))
        dialect.resolve(namespace)
        for value in namespace.values():
            if isinstance(value, CUDADispatcher) and not value.targetoptions.get("device"):
                found[value.py_func.__qualname__] = value
    return list(found.values())


@functools.cache
def _parameters(function: Any) -> tuple[tuple[bool, tuple[str | None, ...]], ...]:
    """Return of each parameter whether it is an array, and the types that it may have."""
    annotations = (get_args(parameter.annotation) for parameter in inspect.signature(function).parameters.values())
    return tuple((kind not in (int, float), tuple(options)) for kind, *options in annotations)


def specialisations(kernel: Any) -> list[Specialisation]:
    """Return every combination of array dtypes that a kernel's signature allows."""
    return list(itertools.product(*(options for is_array, options in _parameters(kernel.py_func) if is_array)))


def signature(kernel: Any, specialisation: Specialisation) -> Any:
    """Return the Numba signature of one specialisation: pointers for arrays, numbers by value."""
    from numba import types

    dtypes = iter(specialisation)
    arguments: list[Any] = []
    for is_array, options in _parameters(kernel.py_func):
        dtype = next(dtypes) if is_array else options[0]
        if dtype not in options:
            raise TypeError(f"kernel {kernel.py_func.__name__} takes {options} here, got {dtype}")
        if dtype is None:
            arguments.append(types.none)
        else:
            element = getattr(types, ELEMENT_TYPES.get(dtype, dtype))
            arguments.append(types.CPointer(element) if is_array else element)
    return types.void(*arguments)


@contextlib.contextmanager
def _compiling_for(compute_capability: tuple[int, int]) -> Iterator[None]:
    """Answer Numba's question for the current device, which it asks for device functions even without a GPU."""
    from numba.cuda import dispatcher

    device = types.SimpleNamespace(compute_capability=compute_capability)
    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: device
    try:
        yield
    finally:
        dispatcher.get_current_device = before


def ptx(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel to PTX."""
    from numba import cuda

    dialect.resolve(kernel.py_func.__globals__)
    with _compiling_for(compute_capability):
        code, _ = cuda.compile(
            kernel.py_func, signature(kernel, specialisation), device=False, abi="numba", cc=compute_capability
        )
    return code if isinstance(code, str) else code.decode()


def entry_name(code: str) -> str:
    """Return the name of the kernel in its PTX."""
    return code.split(".visible .entry ", 1)[1].split("(", 1)[0].strip()


def compiled(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> cache.Entry:
    """Return a kernel's machine code, from the disk cache if it has been compiled before."""
    name = kernel.py_func.__name__
    arch = "sm_{}{}".format(*compute_capability)
    # The fingerprint of a key covers the package's own sources and no other kernel.
    cached = cache.enabled() and cache.covers(kernel.py_func)
    path = cache.path_of(name, specialisation, arch)
    entry = cache.read(path) if cached else None
    if entry is not None:
        statistics["read"] += 1
        return entry
    code = ptx(kernel, specialisation, compute_capability)
    cubin = Program(code, "ptx", ProgramOptions(arch=arch)).compile("cubin")
    statistics["compiled"] += 1
    entry = cache.Entry(name, specialisation, arch, entry_name(code), bytes(cubin.code))
    if cached:
        cache.write(path, entry)
    return entry


def load(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> Any:
    """Return a kernel as a `cuda.core.Kernel`, compiled if need be."""
    entry = compiled(kernel, specialisation, compute_capability)
    return ObjectCode.from_cubin(entry.cubin).get_kernel(entry.entry_name)


def compile_all(compute_capabilities: Iterable[tuple[int, int]]) -> int:
    """Compile every specialisation of every kernel into the cache, with a progress bar; return how many there are."""
    from tqdm import tqdm

    wanted = [
        (kernel, specialisation, capability)
        for capability in compute_capabilities
        for kernel in kernels()
        for specialisation in specialisations(kernel)
    ]
    for kernel, specialisation, capability in tqdm(wanted, unit="kernel", disable=not sys.stderr.isatty()):
        compiled(kernel, specialisation, capability)
    return len(wanted)
