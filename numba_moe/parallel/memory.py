"""Memory of each rank that all ranks of a host reach: torch's symmetric memory, or CUDA's handles between processes.

`emulate` makes ranks of one process, whose buffers all are on its device: what several GPUs do can be run, and tested,
on one, and in Numba's simulator.
"""

import logging
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from cuda.bindings import driver

from numba_moe.runtime import torch_private

R = TypeVar("R")
logger = logging.getLogger(__name__)


class Abandoned(BaseException):
    """Another rank of this process has failed, and this one ends with it."""


class Turns:
    """Which of the ranks of this process runs: one at a time, each in a thread of its own, in order of rank."""

    def __init__(self, num_ranks: int) -> None:
        self._changed = threading.Condition()
        self._running = list(range(num_ranks))
        self._holder, self._failed = 0, False

    def wait(self, rank: int) -> None:
        """Wait for a rank's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._holder == rank)
            if self._failed:
                raise Abandoned

    def end(self, rank: int, *, ended: bool = False, failed: bool = False) -> None:
        """End a rank's turn: the next one goes on, unless this one failed, which ends all."""
        with self._changed:
            self._failed |= failed
            after = [other for other in self._running if other > rank]
            self._holder = (after or self._running)[0]
            if ended:
                self._running.remove(rank)
            self._changed.notify_all()


class EmulatedRank:
    """One of the ranks of this process, in the place of a process group."""

    def __init__(self, rank: int, buffers: list[list[torch.Tensor]], turns: Turns) -> None:
        self.rank, self.size, self.buffers, self._turns = rank, len(buffers), buffers, turns

    def turn(self) -> None:
        """Let the other ranks go on until they wait for this one."""
        self._turns.end(self.rank)
        self._turns.wait(self.rank)


def emulate(num_ranks: int, program: Callable[[EmulatedRank], R]) -> list[R]:
    """Run a program as several ranks of this process, on one device; where a rank waits for others, they go on.

    Parameters
    ----------
    num_ranks : int
        Number of ranks.
    program : callable
        Takes what `TokenDispatcher` takes as its group; each rank dispatches and combines as often as the others.

    Returns
    -------
    list
        What the program returned for each rank.

    Examples
    --------
    >>> emulate(2, lambda group: group.rank)
    [0, 1]
    """
    buffers: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
    turns, enabled = Turns(num_ranks), torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def of(rank: int) -> R:
        failed = True
        # A backward pass stays in this thread: torch's own for a GPU would serve all ranks, and wait for one.
        with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
            try:
                turns.wait(rank)
                with torch.set_grad_enabled(enabled):
                    found = program(EmulatedRank(rank, buffers, turns))
                failed = False
                return found
            finally:
                turns.end(rank, ended=True, failed=failed)

    with ThreadPoolExecutor(num_ranks) as threads:
        ranks = [threads.submit(of, rank) for rank in range(num_ranks)]
    errors = [one.exception() for one in ranks]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, Abandoned)):
        raise error
    return [one.result() for one in ranks]


class SharedMemory:
    """A rank's buffer, zeros at first, and the addresses of those of all ranks."""

    def __init__(self, num_bytes: int, group: Any, device: torch.device) -> None:
        self._group, self._index = group, 0
        self._kept: Any = None
        if isinstance(group, EmulatedRank):
            self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self._index = len(group.buffers[group.rank])
            group.buffers[group.rank].append(self.buffer)
            group.turn()
            return
        try:
            self.buffer, self._addresses = self._symmetric(num_bytes, device)
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.info("no symmetric memory (%s): CUDA IPC instead", error)
            self.buffer, self._addresses = self._by_handles(num_bytes, device)
        self.buffer.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)

    def turn(self) -> None:
        """Let other ranks of this process go on, which are waited for next."""
        if isinstance(self._group, EmulatedRank):
            self._group.turn()

    def addresses(self) -> list[int]:
        """Return where the buffers of all ranks are; all have theirs when the first step begins."""
        if isinstance(self._group, EmulatedRank):
            return [buffers[self._index].data_ptr() for buffers in self._group.buffers]
        return self._addresses

    def _symmetric(self, num_bytes: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
        symmetric = torch_private.symmetric_memory()
        buffer = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        self._kept = handle = symmetric.rendezvous(buffer, self._group)
        ranks = range(dist.get_world_size(self._group))
        return buffer, [handle.get_buffer(rank, (num_bytes,), torch.uint8).data_ptr() for rank in ranks]

    def _by_handles(self, num_bytes: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
        with torch.cuda.device(device):
            pointer = _check(*driver.cuMemAlloc(num_bytes))
            mine = _check(*driver.cuIpcGetMemHandle(pointer))
            handles: list[Any] = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(handles, bytes(mine.reserved), group=self._group)
            rank = dist.get_rank(self._group)
            addresses = [int(pointer) if r == rank else _opened(handle) for r, handle in enumerate(handles)]
        where = {"shape": (num_bytes,), "typestr": "|u1", "data": (int(pointer), False), "version": 3}
        holder = type("Holder", (), {"__cuda_array_interface__": where})()
        return torch.as_tensor(holder, dtype=torch.uint8, device=device), addresses


def _opened(reserved: bytes) -> int:
    handle = driver.CUipcMemHandle()
    handle.reserved = reserved
    flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    return int(_check(*driver.cuIpcOpenMemHandle(handle, flag)))


def _check(status: Any, *results: Any) -> Any:
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"sharing memory between processes failed: {status.name}")
    return results[0] if results else None


def all_reach_each_other(group: Any, device: torch.device) -> bool:
    """Whether every rank's GPU can read the memory of all others: they are on one host, and the driver says so."""
    if isinstance(group, EmulatedRank):
        return True
    mine = (platform.node(), device.index)
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, mine, group=group)
    others = {index for _, index in places} - {device.index}
    near = len({host for host, _ in places}) == 1 and all(index < torch.cuda.device_count() for index in others)
    near = near and all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
    answers: list[Any] = [None] * len(places)
    dist.all_gather_object(answers, near, group=group)
    return all(answers)
