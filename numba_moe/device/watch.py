"""What learners see of the simulator: accesses are counted, and between two of them other threads may run.

Numba's simulator hands arrays to a kernel that is launched by hand, `kernel[blocks, threads](...)`. Here each of their
loads and stores is counted, and after a load another thread takes its turn. So an update that is no atomic loses some,
as on a GPU, where the library's own launches, which the tests are made of, run undisturbed and fast.
"""

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numba import cuda
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray, FakeWithinKernelCUDAArray
from numba.cuda.simulator.kernelapi import FakeCUDAAtomic, FakeCUDALocal, FakeCUDAShared

POISON = 0x5A
MOST_SHARED = 48 << 10  # bytes; more has to come with the launch


@dataclasses.dataclass(eq=False)
class Accesses:
    """What the threads of kernels did, all of them together."""

    launches: int = 0
    threads: int = 0
    loads: int = 0
    stores: int = 0
    shared_loads: int = 0
    shared_stores: int = 0
    atomics: int = 0
    barriers: int = 0
    warp_operations: int = 0
    bytes_moved: int = 0  # by loads, stores and atomics of what is not shared

    def __str__(self) -> str:
        found = {name.replace("_", " "): value for name, value in dataclasses.asdict(self).items() if value}
        return ", ".join(f"{name}: {value}" for name, value in found.items()) or "nothing"


_counted: list[Accesses] = []
_give_way: Callable[[], None]


@contextlib.contextmanager
def counting() -> Iterator[Accesses]:
    """Count what kernels in the simulator load, store and wait for."""
    found = Accesses()
    _counted.append(found)
    try:
        yield found
    finally:
        _counted.remove(found)


def is_counting() -> bool:
    """Whether somebody counts."""
    return bool(_counted)


def count(name: str, number: int = 1) -> None:
    """Count an event for all who count."""
    for found in _counted:
        setattr(found, name, getattr(found, name) + number)


def count_access(kind: str, size: int) -> None:
    """Count a load or a store of `size` bytes of device memory."""
    count(kind)
    count("bytes_moved", size)


def count_atomic(array: Any) -> None:
    """Count an atomic, and its bytes where the memory is the device's."""
    count("atomics")
    if getattr(array, "shared", True) is False:
        count("bytes_moved", array.dtype.itemsize)


class WatchedArray(FakeWithinKernelCUDAArray):
    """An array inside of a kernel."""

    shared = False

    def __getitem__(self, index: Any) -> Any:
        value = self._item[index]
        if isinstance(value, FakeCUDAArray):
            return type(self)(value)
        self._note("loads")
        _give_way()
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        self._item[index] = value
        self._note("stores")

    def _note(self, kind: str) -> None:
        if self.shared:
            count(f"shared_{kind}")
        else:
            count_access(kind, self._item.dtype.itemsize)


class WatchedShared(WatchedArray):
    """Shared memory inside of a kernel."""

    shared = True


class SharedMemory(FakeCUDAShared):
    """The shared memory of a block, an array for each place in a program that asks for one."""

    watched = False

    def array(self, shape: Any, dtype: Any, alignment: Any = None) -> Any:
        if shape == 0:
            found = super().array(shape, dtype if hasattr(dtype, "name") else np.dtype(dtype), alignment)
        else:
            caller = sys._getframe(1)
            place = caller.f_code, caller.f_lasti
            if place not in self._allocations:
                made = FakeCUDALocal().array(shape, dtype, alignment)  # poisoned, by `install`
                size = made.nbytes + sum(array.nbytes for array in self._allocations.values())
                if size > MOST_SHARED:
                    raise ValueError(f"shared memory of a fixed size must be at most {MOST_SHARED} bytes, got {size}")
                self._allocations[place] = made
            found = self._allocations[place]
        return WatchedShared(FakeCUDAArray(found)) if self.watched else found


def poisoned(array: np.ndarray) -> np.ndarray:
    """Fill new memory with what is no result of anything."""
    array.reshape(-1).view(np.uint8)[...] = POISON
    return array


def unwatched(array: Any) -> Any:
    """Return the memory of an array, for accesses that no other thread interrupts."""
    return array._item if isinstance(array, WatchedArray) else array


def as_argument(value: Any) -> Any:
    """Let a kernel take a tensor of the CPU, as on a GPU it takes one of the GPU."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return FakeCUDAArray((value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy())
    return value


def install(kernel: Any, give_way: Callable[[], None]) -> None:
    """Put all this into the simulator, given its module of kernels and what lets another thread run."""
    global _give_way
    _give_way = give_way
    kernel.FakeWithinKernelCUDAArray = WatchedArray
    launch, configure = kernel.FakeCUDAKernel.__call__, kernel.FakeCUDAKernel.__getitem__
    local = FakeCUDALocal.array

    def call(self: Any, *arguments: Any) -> Any:
        if kernel._kernel_context is not None:  # a kernel runs: this is a function of it
            _replace_cuda(self.fn.__globals__, kernel._kernel_context)
            return self.fn(*arguments)
        try:
            return launch(self, *map(as_argument, arguments))
        finally:
            while _replaced:
                namespace, names = _replaced.popitem()[1]
                namespace.update(dict.fromkeys(names, cuda))

    @contextlib.contextmanager
    def with_cuda_replaced(function: Any, simulated: Any) -> Iterator[None]:
        _replace_cuda(function.__globals__, simulated)
        yield

    def configured(self: Any, configuration: Any) -> Any:
        found = copy.copy(self)  # else the next launch had what this one is given
        found.dynshared_size = 0
        return configure(found, configuration)

    kernel.FakeCUDAKernel.__call__, kernel.FakeCUDAKernel.__getitem__ = call, configured
    kernel.swapped_cuda_module = with_cuda_replaced
    FakeCUDALocal.array = lambda self, *shape_and_dtype, **options: poisoned(local(self, *shape_and_dtype, **options))
    for name, function in list(vars(FakeCUDAAtomic).items()):
        if not name.startswith("__"):
            setattr(FakeCUDAAtomic, name, _atomic(function))


# The namespaces of the functions that the running kernel has called so far, and the names that `cuda` has there. Numba
# itself searches a namespace and puts it back at every call.
_replaced: dict[int, tuple[dict[str, Any], list[str]]] = {}


def _replace_cuda(namespace: dict[str, Any], simulated: Any) -> None:
    """Let `cuda` mean the running kernel's, in a function that it calls, until it ends."""
    if id(namespace) not in _replaced:
        names = [name for name, value in namespace.items() if value is cuda]
        _replaced[id(namespace)] = namespace, names
        namespace.update(dict.fromkeys(names, simulated))


def _atomic(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, array: Any, *operands: Any) -> Any:
        old = function(self, unwatched(array), *operands)
        count_atomic(array)
        _give_way()
        return old

    return call
