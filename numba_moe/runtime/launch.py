"""Launch a kernel on torch tensors: raw pointers, the caller's current stream, a few microseconds.

Numba's own launch of a kernel on torch tensors takes 73 us of host time on an H200 (numba-cuda 0.30.4), because
it boxes every array; here cuda.core.launch takes 3.5 us of about 5 (cuda.core 1.2; a ctypes call of cuLaunchKernel
with a prepared parameter buffer takes 4.5 in place of those 3.5).
"""

import functools
import threading
from typing import Any

import torch
from cuda.core import Device, LaunchConfig, Stream
from cuda.core import launch as cuda_launch

from numba_moe.runtime import compile, simulator

_NUMBERS = (int, float)

_kernels: dict[tuple[Any, ...], Any] = {}
_compile_lock = threading.Lock()
_thread = threading.local()


def launch(kernel: Any, blocks: int, threads: int, *arguments: Any, shared_bytes: int = 0, **constants: int) -> None:
    """Launch a `@cuda.jit` kernel; its first argument is a tensor, and all tensors are on that one's device.

    Parameters
    ----------
    kernel
        A kernel whose parameters are annotated with types of `numba_moe.runtime.parameters`.
    blocks, threads
        Grid size, and threads per block. A grid of no blocks launches nothing.
    arguments
        Tensors, None for an absent array, Python numbers.
    shared_bytes
        Dynamic shared memory of a block, at most compile.MOST_SHARED_BYTES.
    constants
        The kernel's `Constant` parameters, which are its last, in order.
    """
    if blocks == 0:
        return
    if simulator.is_running():
        simulator.launch(kernel, blocks, threads, (*arguments, *constants.values()), shared_bytes)
        return
    device = arguments[0].get_device()
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            _launch_on_current_device(kernel, blocks, threads, arguments, constants, device, shared_bytes)
    else:
        _launch_on_current_device(kernel, blocks, threads, arguments, constants, device, shared_bytes)


def launch_warps(kernel: Any, warps: int, *arguments: Any) -> None:
    """Launch a kernel in which every warp works for itself; warps past the last do nothing."""
    per_block = 1 if simulator.is_running() else 4
    launch(kernel, -(-warps // per_block), 32 * per_block, *arguments)


def block_threads(wanted: int) -> int:
    """Return the threads for a kernel that works with any whole number of warps a block."""
    return min(128, wanted) if simulator.is_running() else wanted


def _launch_on_current_device(
    kernel: Any,
    blocks: int,
    threads: int,
    arguments: tuple[Any, ...],
    constants: dict[str, int],
    device: int,
    shared_bytes: int,
) -> None:
    # One pass over the arguments: this loop is most of what a launch costs beside the driver's part.
    key: list[Any] = [kernel.py_func, device]
    values: list[Any] = []
    for argument in arguments:
        if argument.__class__ in _NUMBERS:
            values.append(argument)
        elif argument is None:
            key.append(None)
            values.append(0)
        else:
            key.append(argument.dtype)
            values.append(argument.data_ptr())
    key += constants.values()
    loaded = _kernels.get(tuple(key))
    if loaded is None:
        loaded = _load(tuple(key), kernel)
    if getattr(_thread, "device", None) != device:
        _make_context_current(device)
    stream = _stream(torch._C._cuda_getCurrentRawStream(device))
    cuda_launch(stream, _config(blocks, threads, shared_bytes), loaded, *values)


def _load(key: tuple[Any, ...], kernel: Any) -> Any:
    _, device, *given = key
    with _compile_lock:
        if key not in _kernels:
            names = (str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype for dtype in given)
            _kernels[key] = compile.load(kernel, compile.specialisation_for(kernel, names), Device(device))
    return _kernels[key]


def _make_context_current(device: int) -> None:
    """Bind the device's primary context to this thread: a thread that only allocated from torch's cache has none."""
    Device(device).set_current()
    _thread.device = device


@functools.lru_cache(maxsize=4096)
def _config(blocks: int, threads: int, shared_bytes: int) -> Any:
    return LaunchConfig(grid=blocks, block=threads, shmem_size=shared_bytes)


@functools.lru_cache(maxsize=1024)
def _stream(handle: int) -> Any:
    return Stream.from_handle(handle)
