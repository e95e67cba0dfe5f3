"""Numba's names for kernel files, without importing Numba before something must be compiled.

Importing Numba takes 0.3 s, and a process whose kernels are all in the disk cache has no use for it. So kernel files
take `cuda` and the scalar types from here. Until Numba is needed these are placeholders; `resolve` then puts the
real things in their place, in the namespace of the kernel. In the simulator they are Numba's and NumPy's at once.
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any

from numba_moe.device import simulator
from numba_moe.device import sources as sources  # before any kernel: it notes what is imported

_lock = threading.RLock()


class Deferred:
    """A placeholder for an object of a module that is not imported yet."""

    def __init__(self, module: str, name: str = "") -> None:
        self._module, self._name = module, name

    def resolve(self) -> Any:
        module = importlib.import_module(self._module)
        return getattr(module, self._name) if self._name else module


class DeferredKernel(Deferred):
    """A `@cuda.jit` function that Numba sees when it is compiled or launched by hand."""

    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        self.py_func, self.targetoptions = function, options
        self._real: Any = None
        self.__doc__ = function.__doc__

    def resolve(self) -> Any:
        with _lock:
            if self._real is None:
                from numba_moe.device import numba_compiler

                self._real = numba_compiler.jit(self.py_func, self.targetoptions)
                resolve(self.py_func.__globals__)
        return self._real

    def __getitem__(self, configuration: Any) -> Any:
        return self.resolve()[configuration]


class _DeferredCuda(Deferred):
    def jit(self, function: Any = None, **options: Any) -> Any:
        if function is not None:
            return DeferredKernel(function, options)
        return lambda function: DeferredKernel(function, options)


def either(twins: Any, intrinsics: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module of functions that have twins in Python for the simulator."""

    def find(name: str) -> Any:
        twin = getattr(twins, name)
        return twin if simulator.ENABLED else Deferred(intrinsics, name)

    return find


def resolve(namespace: dict[str, Any]) -> None:
    """Replace the placeholders of a namespace by their objects."""
    importlib.import_module(
        "numba_moe.device.numba_compiler"
    )  # first, as it says what is wrong with another `numba.cuda`
    for name, value in list(namespace.items()):
        if isinstance(value, Deferred):
            namespace[name] = value.resolve()


cuda: Any
float32: Any
int16: Any
int32: Any
int64: Any
uint32: Any
uint64: Any
_SCALARS = ("float32", "int16", "int32", "int64", "uint32", "uint64")
if simulator.ENABLED:
    import numba.cuda
    import numpy as np

    cuda = numba.cuda
    float32, int16, int32, int64, uint32, uint64 = (getattr(np, name) for name in _SCALARS)  # Numba's convert by these
else:
    cuda = _DeferredCuda("numba.cuda")
    float32, int16, int32, int64, uint32, uint64 = (Deferred("numba", name) for name in _SCALARS)
