"""Launch a kernel on torch tensors: raw pointers, the caller's current stream, a few microseconds.

Numba's own launch of a kernel on torch tensors takes 73 us of host time on an H200 (numba-cuda 0.30.4), because
it boxes every array; here cuda.core.launch takes 3.7 us of about 5 (cuda.core 1.2, hardly less through the driver's
own functions).
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cuda.core import Device, LaunchConfig, Stream
from cuda.core import launch as cuda_launch

from numba_moe.runtime import compile, simulator

_compile_lock = threading.Lock()
_thread = threading.local()


class Launch:
    """A kernel with everything that a launch needs but its arrays.

    Parameters
    ----------
    kernel
        A kernel whose parameters are annotated with types of `numba_moe.runtime.parameters`: arrays first, then
        numbers, then constants.
    device
        Where its arrays will be.
    blocks, threads
        Grid size, and threads per block. A grid of no blocks launches nothing.
    numbers
        The kernel's number parameters.
    choices
        By name: the dtype of each array that may have several (None for an absent one), the value of each constant.
    shared_bytes
        Dynamic shared memory of a block, at most compile.MOST_SHARED_BYTES.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        blocks: int,
        threads: int,
        numbers: Sequence[int | float],
        choices: Mapping[str, torch.dtype | int | None] | None = None,
        shared_bytes: int = 0,
    ) -> None:
        self._kernel, self._blocks, self._threads = kernel, blocks, threads
        self._numbers, self._shared_bytes, self._device = tuple(numbers), shared_bytes, device.index
        names = {name: _name(choice) for name, choice in (choices or {}).items()}
        self._specialisation = compile.specialisation_for(kernel, names)
        self._constants = tuple(choice for choice in self._specialisation if isinstance(choice, int))
        self._loaded: Any = None

    def __call__(self, *arrays: torch.Tensor | None) -> None:
        """Launch the kernel on tensors, None for an absent one, on the current stream of their device."""
        if not self._blocks:
            return
        if simulator.ENABLED:
            arguments = (*arrays, *self._numbers, *self._constants)
            simulator.launch(self._kernel, self._blocks, self._threads, arguments, self._shared_bytes)
        elif torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self._launch(arrays)
        else:
            self._launch(arrays)

    def _launch(self, arrays: tuple[torch.Tensor | None, ...]) -> None:
        device = self._device
        if self._loaded is None:
            self._config = LaunchConfig(grid=self._blocks, block=self._threads, shmem_size=self._shared_bytes)
            self._loaded = _load(self._kernel, self._specialisation, device)
        if getattr(_thread, "device", None) != device:
            _make_context_current(device)
        pointers = [0 if array is None else array.data_ptr() for array in arrays]
        stream = _stream(torch._C._cuda_getCurrentRawStream(device))
        cuda_launch(stream, self._config, self._loaded, *pointers, *self._numbers)


def warps(count: int) -> tuple[int, int]:
    """Return blocks and threads for so many warps that each work for themselves; the last block may have more."""
    per_block = 1 if simulator.ENABLED else 4
    return -(-count // per_block), 32 * per_block


def block_threads(wanted: int) -> int:
    """Return the threads for a kernel that works with any whole number of warps a block."""
    return min(128, wanted) if simulator.ENABLED else wanted


def _name(choice: torch.dtype | int | None) -> str | int | None:
    return str(choice).removeprefix("torch.") if isinstance(choice, torch.dtype) else choice


@functools.cache
def _load_once(kernel: Any, specialisation: compile.Specialisation, device: int) -> Any:
    return compile.load(kernel, specialisation, Device(device))


def _load(kernel: Any, specialisation: compile.Specialisation, device: int) -> Any:
    with _compile_lock:
        return _load_once(kernel, specialisation, device)


def _make_context_current(device: int) -> None:
    """Bind the device's primary context to this thread: a thread that only allocated from torch's cache has none."""
    Device(device).set_current()
    _thread.device = device


@functools.lru_cache(maxsize=1024)
def _stream(handle: int) -> Any:
    return Stream.from_handle(handle)
