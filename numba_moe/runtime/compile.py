"""From a kernel to machine code: Numba function -> PTX -> cubin -> a kernel that the driver can launch.

A specialisation of a kernel is the tuple of its array dtypes, None where an array is absent. Compilation needs
no GPU: Numba brings NVVM, and cuda.core links the PTX.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, get_args

from cuda.core import ObjectCode, Program, ProgramOptions
from numba import cuda, types
from numba.cuda import dispatcher

from numba_moe.runtime.parameters import ELEMENT_TYPES

KERNEL_MODULES = ("counting", "align", "gating", "permute")

Specialisation = tuple[str | None, ...]


def kernels() -> list[Any]:
    """Return every kernel of the package."""
    found = {}
    for name in KERNEL_MODULES:
        for value in vars(importlib.import_module(f"numba_moe.{name}")).values():
            if isinstance(value, dispatcher.CUDADispatcher) and not value.targetoptions.get("device"):
                found[value.py_func.__qualname__] = value
    return list(found.values())


@functools.cache
def _parameters(function: Any) -> tuple[tuple[Any, ...], ...]:
    """Return what each parameter may be: one Numba type of a scalar, or the dtypes of an array."""
    return tuple(get_args(parameter.annotation)[1:] for parameter in inspect.signature(function).parameters.values())


def specialisations(kernel: Any) -> list[Specialisation]:
    """Return every combination of array dtypes that a kernel's signature allows."""
    arrays = [options for options in _parameters(kernel.py_func) if not isinstance(options[0], types.Type)]
    return list(itertools.product(*arrays))


def signature(kernel: Any, specialisation: Specialisation) -> Any:
    """Return the Numba signature of one specialisation: pointers for arrays, numbers by value."""
    dtypes = iter(specialisation)
    arguments: list[Any] = []
    for options in _parameters(kernel.py_func):
        if isinstance(options[0], types.Type):
            arguments.append(options[0])
            continue
        dtype = next(dtypes)
        if dtype not in options:
            raise TypeError(f"kernel {kernel.py_func.__name__} takes {options} here, got {dtype}")
        arguments.append(types.none if dtype is None else types.CPointer(ELEMENT_TYPES[dtype]))
    return types.void(*arguments)


@contextlib.contextmanager
def _compiling_for(compute_capability: tuple[int, int]) -> Iterator[None]:
    """Answer Numba's question for the current device, which it asks for device functions even without a GPU."""

    class Device:
        pass

    device: Any = Device()
    device.compute_capability = compute_capability
    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: device
    try:
        yield
    finally:
        dispatcher.get_current_device = before


def ptx(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel to PTX."""
    with _compiling_for(compute_capability):
        code, _ = cuda.compile(
            kernel.py_func, signature(kernel, specialisation), device=False, abi="numba", cc=compute_capability
        )
    return code if isinstance(code, str) else code.decode()


def entry_name(code: str) -> str:
    """Return the name of the kernel in its PTX."""
    return code.split(".visible .entry ", 1)[1].split("(", 1)[0].strip()


def load(kernel: Any, specialisation: Specialisation, compute_capability: tuple[int, int]) -> Any:
    """Compile a kernel and return it as a `cuda.core.Kernel`."""
    code = ptx(kernel, specialisation, compute_capability)
    arch = "sm_{}{}".format(*compute_capability)
    cubin = Program(code, "ptx", ProgramOptions(arch=arch)).compile("cubin")
    assert isinstance(cubin, ObjectCode)
    return cubin.get_kernel(entry_name(code))
