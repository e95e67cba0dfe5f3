"""Of many cases the few that launch every kernel: what Numba's CUDA simulator runs in about a minute.

The simulator takes minutes for all. What a case launches follows from its plans, so it is known before anything runs.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from numba_moe.device import simulator
from numba_moe.runtime import arrays
from numba_moe.runtime.compile import Specialisation
from numba_moe.runtime.launch import Launch
from numba_moe.verify.cases.draws import Case

MOST_THREADS = 4096  # that the launches of a case have together
LEAST = 6  # cases of an op that launch something, if no other number is asked for


class Launched(NamedTuple):
    """A kernel as it is compiled, and whether its blocks have others beside them."""

    kernel: str
    specialisation: Specialisation
    many_blocks: bool


def launches_of(call: Callable[[], Any]) -> tuple[set[Launched], int]:
    """Return what a call launches in the simulator, and the threads of its launches; it runs none of them."""
    found: set[Launched] = set()
    threads = 0
    empty = arrays.empty

    def note(launch: Launch, **_: Any) -> None:
        nonlocal threads
        threads += launch.blocks * launch.threads
        if launch.blocks:
            found.add(Launched(launch.kernel.py_func.__name__, launch.specialisation, launch.blocks > 1))

    def zeros(*description: Any) -> torch.Tensor:
        """Return memory in which an op that goes on, as if its kernels had run, finds no rows."""
        return empty(*description).zero_()

    with mock.patch.object(Launch, "__call__", note), mock.patch.object(arrays, "empty", zeros), simulator.running():
        call()
    return found, threads


def few(
    cases: Sequence[Case],
    call: Callable[[Case, dict[str, Any]], Any],
    least: int = LEAST,
    most_threads: int = MOST_THREADS,
) -> list[int]:
    """Return the numbers, in order, of the smallest cases of every op that launch all that its cases launch.

    A case stays if it launches nothing, if it is one of the `least` smallest of its op that launch something, or if
    no smaller one of its op launches one of its kernels, as compiled, with one block or with several. None has more
    than `most_threads` threads. The smaller of two cases has fewer threads, or else fewer elements in its arguments.

    Parameters
    ----------
    cases : sequence of Case
        All of them.
    call : callable
        Calls the op of a case with arguments of NumPy.
    least : int
        How many cases of an op that launch something stay, if it has them.
    most_threads : int
        Of all launches of a case together.
    """
    sized = []
    for number, case in enumerate(cases):
        arguments = case.arguments(np.random.default_rng(0))
        launched, threads = launches_of(functools.partial(call, case, arguments))
        elements = sum(value.size for value in arguments.values() if isinstance(value, np.ndarray))
        sized.append((threads, elements, number, launched))
    seen: dict[str, set[Launched]] = collections.defaultdict(set)
    kept: collections.Counter[str] = collections.Counter()
    chosen = []
    for threads, _, number, launched in sorted(sized):
        op = cases[number].op
        if threads <= most_threads and (not launched or kept[op] < least or launched - seen[op]):
            kept[op] += bool(launched)
            seen[op] |= launched
            chosen.append(number)
    return sorted(chosen)
