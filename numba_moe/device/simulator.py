"""Numba's CUDA simulator, completed: warp operations, and threads that take turns.

With ``NUMBA_ENABLE_CUDASIM=1`` Numba runs each CUDA thread as a Python thread. It lacks the warp-wide operations
and lets all threads compete for the interpreter. Here each CUDA thread is a greenlet: exactly one of a block runs
at a time and hands over where it waits, in a random order with a fixed seed. Runs repeat, code that needs a missing
barrier to get right answers gets wrong ones, and a thread that waits for one that never comes is an error, not a hang.
"""

import contextlib
import random
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from numba_moe.device import switch

ENABLED = switch.is_on()
switch.check_in_time()
_ALL_LANES = 0xFFFFFFFF
# Blocks of a cluster, which are simulated together.
MOST_IN_CLUSTER = 4
_running = False
_order = 0


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Let CPU arrays be answered by the kernels, in the simulator, instead of by the reference."""
    global _running
    if not ENABLED:
        raise RuntimeError(f"the simulator is off: {switch.HOW}")
    before, _running = _running, True
    try:
        yield
    finally:
        _running = before


@contextlib.contextmanager
def in_another_order() -> Iterator[None]:
    """Let threads take turns in another order, and blocks of launches by hand, so that what depends on it changes."""
    global _order
    _order += 1
    try:
        yield
    finally:
        _order -= 1


def is_running() -> bool:
    """Whether CPU arrays are answered by kernels in the simulator."""
    return _running


class Pointer:
    """A tensor's memory as a kernel sees it: flat, and an access outside it raises IndexError."""

    def __init__(self, tensor: torch.Tensor) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))
        self._memory = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
        self.dtype = self._memory.dtype

    def _check(self, index: int) -> None:
        if not 0 <= index < self._memory.size:
            raise IndexError(f"index {index} is outside an array of {self._memory.size} elements")

    def __getitem__(self, index: int) -> Any:
        self._check(index)
        value = self._memory[index]
        # Numba widens integers to 64 bits in arithmetic; Python's own integers cannot overflow either.
        return int(value) if isinstance(value, np.integer) else value

    def words(self, index: int) -> Any:
        """Return the 16 bytes from an element on, as an array of int32 that can be written."""
        width = 16 // self.dtype.itemsize
        self._check(index)
        self._check(index + width - 1)
        return _words(self._memory, index)

    def __setitem__(self, index: int, value: Any) -> None:
        self._check(index)
        self._memory[index] = value


class CountedPointer(Pointer):
    """The same, where somebody counts what kernels do."""

    shared = False

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self.uncounted = Pointer(tensor)

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        watch.count_access("loads", self.dtype.itemsize)
        return value

    def __setitem__(self, index: int, value: Any) -> None:
        super().__setitem__(index, value)
        watch.count_access("stores", self.dtype.itemsize)


def _words(memory: Any, index: int) -> Any:
    width = 16 // memory.dtype.itemsize
    if index % width:
        raise IndexError(f"index {index} is not a multiple of 16 bytes")
    return memory[index : index + width].view(np.int32)


def update(array: Any, index: int, change: Callable[[Any], Any]) -> None:
    """Change an element as an atomic does: no other thread comes between."""
    watch.count_atomic(array)
    memory = array.uncounted if isinstance(array, CountedPointer) else watch.unwatched(array)
    memory[index] = change(memory[index])


def device_array(tensor: torch.Tensor) -> Any:
    """Return what is a device array of Numba's in the simulator, over the memory of a tensor of the CPU."""
    return watch.as_argument(tensor)


def words(array: Any, index: int, kind: str = "loads") -> Any:
    """Return 16 bytes of device or shared memory from an element on, as an array of int32; "stores" are written."""
    if isinstance(array, CountedPointer):
        watch.count_access(kind, 16)
    return array.words(index) if isinstance(array, Pointer) else _words(array, int(index))


def launch(
    kernel: Any, arguments: Sequence[Any], blocks: int, threads: int, shared_bytes: int = 0, one_cluster: bool = False
) -> None:
    """Run a kernel in the simulator on CPU tensors, its blocks one after another unless they are one cluster."""

    def pointed(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(pointed, value))
        return pointer(value) if isinstance(value, torch.Tensor) else value

    pointer = CountedPointer if watch.is_counting() else Pointer
    _Block.together, _Block.by_hand = one_cluster, False
    try:
        kernel[blocks, threads, 0, shared_bytes](*map(pointed, arguments))
    finally:
        _Block.together, _Block.by_hand = False, True


if ENABLED:
    import greenlet
    import numba.cuda
    from numba.cuda.simulator import kernel as _kernel
    from numba.cuda.simulator import kernelapi as _kernelapi
    from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule

    from numba_moe.device import watch

    class _Thread(greenlet.greenlet):
        """One CUDA thread, which runs until it waits for others or ends."""

        def __init__(
            self, program: Callable[[], None], block: "_Block", block_idx: Any, thread_idx: Any, shared: Any
        ) -> None:
            super().__init__(program)
            self.manager, self.shared, self.block = block, shared, block_idx[0]
            self.blockIdx, self.threadIdx = Dim3(*block_idx), Dim3(*thread_idx)
            across, up, _ = block._block_dim
            self.thread_id = thread_idx[0] + across * (thread_idx[1] + up * thread_idx[2])
            self.warp, self.lane = divmod(self.thread_id, 32)
            self.received: dict[int, Any] = {}  # what the threads brought that it met last, by lane
            self.arrived = False

        def syncthreads(self) -> None:
            watch.count("barriers")
            self.manager.meet(self, ("block", self.block), lambda: self.manager.alive[self.block], None)

    class _Block(_kernel.BlockManager):
        """Runs one block, or a cluster of them: a loop that lets one thread after another run."""

        together = False
        by_hand = True  # and not by `launch`

        def run(self, grid_point: tuple[int, ...], *arguments: Any) -> None:
            points = [grid_point]
            if _order and self.by_hand:  # the last block first
                points = [tuple(size - 1 - place for size, place in zip(self._grid_dim, grid_point, strict=True))]
            if self.together:
                if any(grid_point):
                    return  # with the first block
                points = list(np.ndindex(*self._grid_dim))
            context = _kernel._get_kernel_context()
            watch.count("launches", int(not any(grid_point)))
            self.threads: list[_Thread] = []
            self.shared = {}
            for block in points:
                self.shared[block[0]] = shared = watch.SharedMemory(context._shared._dynshared_size)
                shared._dynshared[:], shared.watched = watch.POISON, self.by_hand
                for point in np.ndindex(*self._block_dim):
                    self.threads.append(_Thread(lambda: self._f(*arguments), self, block, point, shared))
            watch.count("threads", len(self.threads))
            self._ready = list(self.threads)
            self.alive = {block[0]: len(self.threads) // len(points) for block in points}
            self._waiting: dict[Any, dict[_Thread, Any]] = {}
            order = random.Random(len(self.threads) + (_order << 32))
            try:
                while self._ready:
                    thread = self._ready.pop(order.randrange(len(self._ready)))
                    try:
                        returned = thread.switch()
                        if thread.dead and returned is not None:
                            raise TypeError(f"a kernel must return nothing, got {returned}")
                    except Exception as error:
                        where = f"thread {thread.thread_id} of block {thread.block}"
                        error.args = (f"{where}: {error}", *error.args[1:])
                        raise
                    if thread.dead:
                        self._leave(thread.block)
                if self._waiting:
                    stuck = {
                        str(place): sorted(thread.thread_id for thread in group)
                        for place, group in self._waiting.items()
                    }
                    raise RuntimeError(f"deadlock: threads wait for others that never arrive: {stuck}")
            finally:
                for thread in self.threads:  # after a failure some have begun and will not end
                    if thread:
                        thread.throw()

        def meet(self, thread: _Thread, place: Any, expected: Callable[[], int], value: Any) -> dict[int, Any]:
            """Wait until all expected threads came to a place; return the value that each brought, by lane."""
            group = self._waiting.setdefault(place, {})
            group[thread] = value
            if len(group) == expected():
                self._release(place)
                self._ready.remove(thread)
            else:
                thread.parent.switch()
            return thread.received

        def give_way(self, thread: _Thread) -> None:
            """Let another thread run, maybe."""
            self._ready.append(thread)
            thread.parent.switch()

        def _leave(self, block: int) -> None:
            """Count out a thread of a block that ended: others may have waited for it alone."""
            self.alive[block] -= 1
            for place, alive in ((("block", block), self.alive[block]), ("cluster", self.all_alive())):
                if len(self._waiting.get(place, ())) == alive > 0:
                    self._release(place)

        def all_alive(self) -> int:
            return sum(self.alive.values())

        def _release(self, place: Any) -> None:
            group = self._waiting.pop(place)
            values = {thread.lane: value for thread, value in group.items()}
            for thread in group:
                thread.received = values
            self._ready.extend(group)

    def exchange(mask: int, value: Any) -> tuple[dict[int, Any], int]:
        """Give a value to the lanes of a mask; return theirs by lane, and this lane's number."""
        thread: Any = greenlet.getcurrent()
        watch.count("warp_operations")
        mask, lane = int(mask) & _ALL_LANES, thread.lane
        if not mask >> lane & 1:
            raise RuntimeError(f"lane {lane} calls a warp operation whose mask {mask:#x} leaves it out")
        return thread.manager.meet(thread, (thread.block, thread.warp, mask), mask.bit_count, value), lane

    def cluster_arrive() -> None:
        """Say that this thread came to a barrier of its cluster."""
        thread: Any = greenlet.getcurrent()
        if thread.arrived:
            raise RuntimeError("a thread arrives at a barrier of its cluster again and has not waited there")
        thread.arrived = True

    def cluster_wait() -> None:
        """Wait until all threads of the cluster came; here even until they wait, which CUDA does not ask for."""
        thread: Any = greenlet.getcurrent()
        if not thread.arrived:
            raise RuntimeError("a thread waits at a barrier of its cluster where it has not arrived")
        thread.arrived = False
        thread.manager.meet(thread, "cluster", thread.manager.all_alive, None)

    def of_block(array: Any, block: int) -> Any:
        """Return what another block of the cluster has where this one has an array of dynamic shared memory."""
        thread: Any = greenlet.getcurrent()
        mine, other = thread.shared._dynshared, thread.manager.shared[block]._dynshared
        offset = array.__array_interface__["data"][0] - mine.__array_interface__["data"][0]
        return other[offset : offset + array.nbytes].view(array.dtype)

    def _mask(lanes: Any) -> int:
        return sum(1 << lane for lane in lanes)

    class _WarpOperations:
        def shfl_sync(self, mask: int, value: Any, source: int) -> Any:
            values, lane = exchange(mask, value)
            return values.get(source % 32, values[lane])

        def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
            values, lane = exchange(mask, value)
            return values.get(lane - delta, values[lane])

        def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
            values, lane = exchange(mask, value)
            return values.get(lane + delta, values[lane])

        def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
            values, lane = exchange(mask, value)
            return values.get(lane ^ lane_mask, values[lane])

        def all_sync(self, mask: int, predicate: Any) -> bool:
            return all(exchange(mask, bool(predicate))[0].values())

        def any_sync(self, mask: int, predicate: Any) -> bool:
            return any(exchange(mask, bool(predicate))[0].values())

        def eq_sync(self, mask: int, predicate: Any) -> bool:
            return len(set(exchange(mask, bool(predicate))[0].values())) == 1

        def ballot_sync(self, mask: int, predicate: Any) -> int:
            return _mask(lane for lane, given in exchange(mask, bool(predicate))[0].items() if given)

        def match_any_sync(self, mask: int, value: Any) -> int:
            return _mask(lane for lane, given in exchange(mask, value)[0].items() if given == value)

        def match_all_sync(self, mask: int, value: Any) -> tuple[int, bool]:
            values, _ = exchange(mask, value)
            same = all(given == value for given in values.values())
            return (_mask(values) if same else 0), same

        def syncwarp(self, mask: int = _ALL_LANES) -> None:
            exchange(mask, None)

        def activemask(self) -> int:
            """Return the lanes of this warp that have not ended: the simulator follows no branches."""
            this: Any = greenlet.getcurrent()
            return _mask(
                thread.lane
                for thread in this.manager.threads
                if (thread.block, thread.warp) == (this.block, this.warp) and not thread.dead
            )

    def _jit(function: Any = None, *, launch_bounds: int | tuple[int, ...] | None = None, **options: Any) -> Any:  # noqa: ARG001
        """`cuda.jit` with the option that the simulator's lacks; it says how to compile, not what is computed."""
        return _simulated_jit(function, **options)

    _simulated_jit, numba.cuda.jit = numba.cuda.jit, _jit

    def _give_way() -> None:
        thread: Any = greenlet.getcurrent()
        if isinstance(thread, _Thread):
            thread.manager.give_way(thread)

    _kernel.BlockManager = _Block
    watch.install(_kernel, _give_way)
    _kernelapi.threading = types.SimpleNamespace(current_thread=greenlet.getcurrent)  # all that kernels ask of it
    FakeCUDAModule.shared = property(lambda self: greenlet.getcurrent().shared)
    for _name, _operation in vars(_WarpOperations).items():
        if not _name.startswith("__"):
            setattr(FakeCUDAModule, _name, _operation)
