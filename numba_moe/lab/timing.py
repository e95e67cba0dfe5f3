"""How long a kernel of one's own takes, beside ours and the peers', and how near it is to the speed of memory."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.bench import contenders, measure, ratios
from numba_moe.bench.contenders import Contender
from numba_moe.bench.measure import Row
from numba_moe.device import simulator
from numba_moe.lab import checking
from numba_moe.lab.own import Grid, Own
from numba_moe.runtime import checks
from numba_moe.runtime.text import fitted
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import Case


def bench(
    function: Any,
    like: str,
    shapes: str | Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    *,
    library: str | None = None,
    grid: Grid | None = None,
    fill: float | None = None,
    show: bool = True,
) -> list[Row]:
    """Time a function or a kernel of one's own beside the op that it is like, and beside the peers.

    Parameters
    ----------
    function : callable or kernel
        As `check` takes.
    like : str
        The name of the op.
    shapes : str or sequence of str, optional
        Only shapes of the benchmark whose name contains this, such as "4096x64".
    peers : sequence of str, optional
        Of "vllm", "sglang" and "torch"; by default those that are installed.
    library : str, optional
        As `check` takes, and so are the others.
    grid : tuple of int, or callable, optional
        Of a kernel.
    fill : float, optional
        What a kernel's results hold before the launch.
    show : bool
        Print the table.

    Returns
    -------
    list of Row
        op, shape, tokens, dtype, implementation : what was timed. device_us, host_us : float, microseconds of a call.
        copy_fraction : float, of the bandwidth of a copy. wrong : bool, a result that differs, which is not timed.

    Raises
    ------
    ValueError
        No GPU, no such shape, or an op that the benchmark has not.

    Notes
    -----
    Device time is that of calls whose launches were queued before: the device waits for none. A result that is wrong is
    not timed.

    Examples
    --------
    >>> rows = bench(my_topk, like="topk_softmax", shapes="4096x64")  # doctest: +SKIP
    """
    own = _own_of(function, like, library, grid, fill)
    loaded = contenders.load_peers(peers, [])
    bandwidth = measure.copy_bandwidth()
    rows = [
        row
        for case in _shapes(like, shapes)
        for row in measure.measure(own.case_for(case), tuple(loaded), bandwidth, _contender(own))
    ]
    if show:
        print(ratios.table(rows))
    return rows


class Roofline(NamedTuple):
    """How near a call is to the speed of memory."""

    name: str
    shape: str
    bytes_needed: int  # each input read once, each result written once
    least_us: float | None  # time that a copy of bytes_needed takes
    device_us: float | None
    bytes_moved: int | None  # that threads loaded and stored, counted in the simulator
    accesses: str = ""  # what threads did in the simulator: loads, stores, atomics, barriers

    @property
    def share(self) -> float:
        """The share of the roofline: of time on a GPU, of bytes in the simulator."""
        if self.device_us is not None and self.least_us is not None:
            return self.least_us / self.device_us
        return self.bytes_needed / self.bytes_moved if self.bytes_moved else float("nan")


def roofline(
    function: Any = None,
    like: str = "",
    case: str | Case | None = None,
    *,
    library: str | None = None,
    grid: Grid | None = None,
    fill: float | None = None,
    show: bool = True,
) -> Roofline:
    """Say how near a call is to what the speed of memory allows.

    Parameters
    ----------
    function : callable or kernel, optional
        As `check` takes; by default the library's own op.
    like : str
        The name of the op.
    case : str or Case, optional
        On a GPU a part of the name of a shape of the benchmark, in the simulator of a case; the first one by default.
    library : str, optional
        As `check` takes, and so are the others.
    grid : tuple of int, or callable, optional
        Of a kernel.
    fill : float, optional
        What a kernel's results hold before the launch.
    show : bool
        Print the line.

    Returns
    -------
    Roofline
        share : float. bytes_needed : int, each input read once and each result written once. least_us, device_us :
        float, on a GPU the times in microseconds of a copy of bytes_needed, and of the call. bytes_moved : int, in the
        simulator what threads loaded and stored. accesses : str, the numbers of loads, barriers and so on there.

    Raises
    ------
    ValueError
        No such op or case, or neither a GPU nor the simulator.

    Notes
    -----
    In the simulator a share says how many of the bytes that kernels move are needed: more than 1 where memory is filled
    by something else, such as NumPy, which is not counted; NaN where no kernel ran.

    Examples
    --------
    >>> roofline(like="moe_sum", case="top 5").share > 0.2  # doctest: +SKIP
    True
    """
    own = Own(function or functools.partial(_op(like)), like, library if function else "torch", grid, fill)
    found = _on_gpu(own, case) if torch.cuda.is_available() else _in_simulator(own, case)
    if show:
        print(table([found]), *([found.accesses] if found.accesses else []), sep="\n")
    return found


def table(found: Sequence[Roofline]) -> str:
    """Format roofs for a terminal."""
    rows = [
        (*one[:3], one.bytes_moved, one.least_us, one.device_us, None if np.isnan(one.share) else f"{one.share:.0%}")
        for one in found
    ]
    headers = ("name", "shape", "bytes needed", "bytes moved", "least us", "device us", "share")
    return fitted(rows, headers, keys=2, floatfmt=("", "", "", "", ".2f", ".2f", ""), missingval="-")


def _op(like: str) -> Callable[..., Any]:
    checks.choice("like", like, tuple(verification.OPS))
    return getattr(verification.OPS[like], like)


def _own_of(function: Any, like: str, library: str | None, grid: Grid | None, fill: float | None) -> Own:
    """Return what takes the arrays that one's own function is timed with."""
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here, and nothing to time without one; `lab.counting` counts in the simulator")
    own = Own(function, like, library, grid, fill)
    own.find_library(checking.select(like, None, "cuda"), "cuda")
    return own


def _shapes(like: str, wanted: str | Sequence[str] | None) -> list[Case]:
    checks.choice("like", like, tuple(contenders.OPS))
    texts = [wanted] if isinstance(wanted, str) else list(wanted or [""])
    cases = list(contenders.OPS[like].cases(["uniform"]))
    found = [case for case in cases if any(text in case.name for text in texts)]
    checks.holds("shapes", f"in one of {', '.join(case.name for case in cases)}", bool(found), repr(wanted))
    return found


def _contender(own: Own) -> Callable[..., Contender]:
    return lambda **arguments: Contender(own.name, functools.partial(own, **arguments))


def _on_gpu(own: Own, case: str | Case | None) -> Roofline:
    chosen = case if isinstance(case, Case) else _shapes(own.declaration.name, case)[0]
    own.find_library(checking.select(own.declaration.name, None, "cuda"), "cuda")
    arguments = verification.on_device(own.case_for(chosen), chosen.arguments(np.random.default_rng(0)), "cuda")
    call = functools.partial(own, **arguments)
    needed = measure.bytes_moved(arguments, call())
    device_us = measure.queued_time(call)
    return Roofline(own.name, chosen.name, needed, needed / measure.copy_bandwidth(), device_us, None)


def _in_simulator(own: Own, case: str | Case | None) -> Roofline:
    if not simulator.ENABLED:
        raise ValueError("no CUDA device here, and the simulator, which counts, is off")
    chosen = case if isinstance(case, Case) else checking.select(own.declaration.name, case, "cpu")[0]
    own.find_library([chosen], "cpu")
    arguments = verification.on_device(own.case_for(chosen), chosen.arguments(np.random.default_rng(0)), "cpu")
    with simulator.running(), checking.counting() as counts, testing.poisoned_memory():
        result = own(**arguments)
    needed = measure.bytes_moved(arguments, result)
    accesses = str(counts) if counts.launches else "no kernel ran"
    return Roofline(own.name, chosen.name, needed, None, None, counts.bytes_moved, accesses)
