"""Launch a kernel on torch tensors: raw pointers, the caller's current stream, a few microseconds.

Numba's own launch of a kernel on torch tensors takes 73 us of host time on an H200 (numba-cuda 0.30.4), because
it boxes every array; the driver's part of the three or so here takes 2.3. Its function is called through ctypes with a
configuration made beforehand, where cuda.core.launch takes 3.4 (cuda.core 1.2); and a process that compiles
nothing need not import cuda.core, which takes 55 ms.

From sm_90 on a kernel that calls `wait_for_earlier` may start before the one ahead of it on the stream has ended: the
driver's programmatic stream serialisation. Our kernels call it first, so all that overlaps is their start.
"""

import contextlib
import ctypes
import functools
import itertools
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from cuda.bindings import driver

from numba_moe.device import simulator
from numba_moe.device.types import HOPPER
from numba_moe.runtime import compile, torch_private

# Parameters of a kernel, at most; each has eight bytes of a launch's memory.
MOST_PARAMETERS = 64

_SUCCESS = driver.CUresult.CUDA_SUCCESS
_compile_lock = threading.RLock()  # what runs while one compiles may need another kernel


class _Config(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = (
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the driver, whose value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


_INVALID_CONTEXT = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
_MAY_START_EARLY = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_CLUSTER = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_FORMATS = {"int32": "q", "int64": "q", "float32": "f4x"}
_numbers = itertools.count()
_orders: dict[int, tuple[int, ...]] = {}  # where in a launch's memory each parameter of PTX is, by number of the order
# The driver's handles of kernels that are loaded.
_loaded: dict[tuple[Any, compile.Specialisation, int], tuple[int, bool]] = {}
_current_stream, _current_device = torch_private.current_stream, torch_private.current_device
# Memory for a kernel's parameters that no launch uses just now: a launch takes one and gives it back, so that whatever
# runs in between, in another thread or in this one (a signal's handler, a finaliser), has another.
_idle: list[Any] = []


@functools.cache
def _order(places: tuple[int, ...]) -> int:
    """Return a number for an order of parameters, by which memory keeps their addresses."""
    number = next(_numbers)
    _orders[number] = places
    return number


class _Form(NamedTuple):
    """What launches of a kernel share if the same arrays are present, of the same dtypes, and constants are equal."""

    specialisation: compile.Specialisation
    order: int  # in which memory has the parameters: arrays that are present, those that are not, numbers
    given: tuple[str, ...]  # the arrays that are present
    absent: bytes  # null pointers for the others
    numbers: tuple[int, ...]  # places of numbers among the fields
    pack_numbers: Callable[..., bytes]
    pack: Callable[..., None]


def _fields(kernel: Any) -> list[compile.Parameter]:
    return [field for field in compile.parameters(kernel) if not field.is_constant]


@functools.cache
def _places_of_arrays(kernel: Any) -> tuple[int, ...]:
    """Return the places of arrays among the fields of a kernel's records."""
    return tuple(place for place, field in enumerate(_fields(kernel)) if field.is_array)


@functools.cache
def _form(kernel: Any, dtypes: tuple[torch.dtype | None, ...], constants: tuple[tuple[str, int], ...]) -> _Form:
    """Return the form of a launch, given the dtype of each array, None for one that is absent."""
    fields, places = _fields(kernel), _places_of_arrays(kernel)
    given = [place for place, dtype in zip(places, dtypes, strict=True) if dtype is not None]
    absent = [place for place, dtype in zip(places, dtypes, strict=True) if dtype is None]
    numbers = [place for place, field in enumerate(fields) if not field.is_array]
    order = [*given, *absent, *numbers]
    chosen: dict[str, Any] = {
        fields[place].name: None if dtype is None else str(dtype).removeprefix("torch.")
        for place, dtype in zip(places, dtypes, strict=True)
        if not fields[place].like
    }
    pack_numbers = struct.Struct("<" + "".join(_FORMATS[fields[place].options[0]] for place in numbers))
    num_fixed = 8 * len(absent) + pack_numbers.size
    return _Form(
        specialisation=compile.specialisation_for(kernel, chosen | dict(constants)),
        order=_order(tuple(order.index(place) for place in range(len(fields)))),
        given=tuple(fields[place].name for place in given),
        absent=bytes(8 * len(absent)),
        numbers=tuple(numbers),
        pack_numbers=pack_numbers.pack,
        pack=struct.Struct(f"<{len(given)}Q{num_fixed}s").pack_into,
    )


class Launch:
    """A kernel with everything that a launch needs but its arrays.

    Parameters
    ----------
    kernel
        A kernel whose parameters are records: NamedTuples whose fields are annotated with types of
        `numba_moe.device.types`.
    device
        Where its arrays will be.
    blocks, threads
        Grid size, and threads per block. A grid of no blocks launches nothing.
    records
        What the kernel takes but for its constants, in order. In the place of an array there is its layout, or its
        dtype, and None where it is absent; numbers are themselves.
    shared_bytes
        Dynamic shared memory of a block, at most compile.MOST_SHARED_BYTES.
    one_cluster
        Whether all blocks run together and can read each other's shared memory: if it `fits` the device.
    constants
        By name: the values that the kernel is compiled for.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        blocks: int,
        threads: int,
        *records: Any,
        shared_bytes: int = 0,
        one_cluster: bool = False,
        **constants: int,
    ) -> None:
        self.kernel, self.blocks, self.threads = kernel, blocks, threads
        self._shared_bytes, self._device = shared_bytes, device.index
        self._one_cluster, self._on_gpu = one_cluster, device.type == "cuda"
        self._values, self._constants = compile.values_of(kernel, records), constants
        arrays = [self._values[place] for place in _places_of_arrays(kernel)]
        dtypes = tuple([getattr(array, "dtype", array) for array in arrays])
        form = _form(kernel, dtypes, tuple(constants.items()))
        self.specialisation, self._order = form.specialisation, form.order
        self._given, self._pack = form.given, form.pack
        self._fixed = form.absent + form.pack_numbers(*[self._values[place] for place in form.numbers])
        self._configured: dict[int, Any] = {}  # by stream

    def __call__(self, **arrays: Any) -> None:
        """Launch the kernel on the arrays that it was told of, by name, on the current stream of the current device.

        Names of absent arrays may be left out, and so may be None.
        """
        if not self.blocks:
            return
        if _current_device() != self._device:
            with torch.cuda.device(self._device):
                self(**arrays)
            return
        stream = _current_stream(self._device)
        launch, config, kernel = self._configured.get(stream) or self._configure(stream)
        try:
            memory = _idle.pop()
        except IndexError:
            memory = ctypes.create_string_buffer(8 * MOST_PARAMETERS), {}
        values, addresses = memory
        parameters = addresses.get(self._order) or _addresses(values, addresses, self._order)
        self._pack(values, 0, *[arrays[name].data_ptr() for name in self._given], self._fixed)
        if status := launch(config, kernel, parameters, None):
            if status == _INVALID_CONTEXT:
                _bind_context(self._device)
                status = launch(config, kernel, parameters, None)
            _check(f"the launch of {self.kernel.py_func.__name__}", driver.CUresult(status))
        _idle.append(memory)

    def _configure(self, stream: int) -> Any:
        """Return the driver's function and its first arguments for a stream, which many threads may share."""
        kernel, early = _load(self.kernel, self.specialisation, self._device)
        attributes = (_Attribute * 2)()
        count = 0
        if early:
            attributes[count] = _Attribute(_MAY_START_EARLY, 0, (1,))
            count += 1
        if self._one_cluster:
            attributes[count] = _Attribute(_CLUSTER, 0, (self.blocks, 1, 1))
            count += 1
        shape = (self.blocks, 1, 1, self.threads, 1, 1, self._shared_bytes)
        config = _Config(*shape, stream, ctypes.addressof(attributes), count)
        config.kept = attributes
        self._configured[stream] = _libcuda().cuLaunchKernelEx, ctypes.byref(config), ctypes.c_void_p(kernel)
        return self._configured[stream]

    def fits(self) -> bool:
        """Whether the device runs all blocks of the cluster together; true where there is none."""
        if not self._one_cluster:
            return True
        if simulator.ENABLED:
            return self.blocks <= simulator.MOST_IN_CLUSTER
        if not self._on_gpu or torch.cuda.get_device_capability(self._device) < HOPPER:
            return False
        _, config, kernel = self._configure(0)
        clusters = ctypes.c_int()
        status = _libcuda().cuOccupancyMaxActiveClusters(ctypes.byref(clusters), kernel, config)
        return bool(status == _SUCCESS and clusters.value > 0)

    def _simulate(self, **arrays: torch.Tensor | None) -> None:
        planned = dict(zip((field.name for field in _fields(self.kernel)), self._values, strict=True))
        for name, array in arrays.items():
            if (array is None) != (planned.get(name) is None):
                raise TypeError(
                    f"{self.kernel.py_func.__name__}: {name} was planned as {planned.get(name)}, got {array}"
                )
        if self.blocks:
            values = planned | {name: arrays[name] for name in self._given} | self._constants
            parameters = compile.parameters(self.kernel)
            arguments = compile.arguments(self.kernel, [values[field.name] for field in parameters])
            shape = (self.blocks, self.threads, self._shared_bytes, self._one_cluster)
            simulator.launch(self.kernel, arguments, *shape)

    if simulator.ENABLED:
        __call__ = _simulate


def warps(count: int, per_block: int = 4) -> tuple[int, int]:
    """Return the blocks and threads for `count` independent warps; the last block may have more warps."""
    if simulator.ENABLED:
        per_block //= 4
    return -(-count // per_block), 32 * per_block


def block_threads(wanted: int) -> int:
    """Return the threads for a kernel that works with any whole number of warps a block."""
    return min(128, wanted) if simulator.ENABLED else wanted


def _check(what: str, status: Any, *results: Any) -> Any:
    if status != _SUCCESS:
        raise RuntimeError(f"{what} failed: {status.name}")
    return results[0] if results else None


def _load_once(kernel: Any, specialisation: compile.Specialisation, device: int) -> tuple[int, bool]:
    """Return the driver's handle of a kernel, good in every context, and whether it may start early."""
    capability = torch.cuda.get_device_capability(device)
    entry = compile.compiled(kernel, specialisation, capability)
    what = f"loading {entry.kernel}"
    library = _check(what, *driver.cuLibraryLoadData(entry.cubin, [], [], 0, [], [], 0))
    loaded = _check(what, *driver.cuLibraryGetKernel(library, entry.entry_name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(what, *driver.cuKernelSetAttribute(attribute, compile.MOST_SHARED_BYTES, loaded, device))
    if capability >= HOPPER:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _check(what, *driver.cuKernelSetAttribute(attribute, 1, loaded, device))
    _check(what, *driver.cuKernelGetFunction(loaded))  # has the driver load it now, and not at its launch
    return int(loaded), capability >= HOPPER and compile.starts_early(kernel)


def _load(kernel: Any, specialisation: compile.Specialisation, device: int) -> tuple[int, bool]:
    """Return what `_load_once` does, also while this thread or another captures a CUDA graph.

    A capture refuses, in every thread that does not say otherwise, whatever might wait for the GPU.
    """
    key = kernel, specialisation, device
    found = _loaded.get(key)
    if found is None:
        _bind_context(device)
        with _compile_lock, _unrestricted():
            found = _loaded.get(key) or _load_once(*key)
            _loaded[key] = found
    return found


@contextlib.contextmanager
def _unrestricted() -> Iterator[None]:
    """Let this thread call what a capture of CUDA graphs refuses; nothing of it is put on a stream."""
    what = "changing a thread's mode of capture"
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = _check(what, *driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        _check(what, *driver.cuThreadExchangeStreamCaptureMode(before))


@functools.cache
def _primary_context(device: int) -> Any:
    """Return the context that torch works in on a device; it is kept for the life of the process."""
    return _check("the primary context", *driver.cuDevicePrimaryCtxRetain(device))


def _bind_context(device: int) -> None:
    """Give this thread the device's primary context if it has none: it may only have allocated from torch's cache."""
    if not int(_check("the current context", *driver.cuCtxGetCurrent())):
        _check("the primary context", *driver.cuCtxSetCurrent(_primary_context(device)))


def _addresses(values: Any, known: dict[int, Any], order: int) -> Any:
    """Return where the driver finds each parameter in memory for them, and keep it for the order of parameters."""
    first = ctypes.addressof(values)
    places = _orders[order]
    known[order] = (ctypes.c_void_p * len(places))(*(first + 8 * place for place in places))
    return known[order]


@functools.cache
def _libcuda() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
