"""How it is timed: device and host time of a call, share of the copy bandwidth, and where that was."""

import functools
import inspect
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

import numba_moe
from numba_moe import reference
from numba_moe.bench import contenders
from numba_moe.bench.contenders import OPS, OURS, Contender
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import Case

CALLS = 50  # in a captured graph and in a batch of eager calls: too few to fill the launch queue
ENOUGH_US = 5000  # of device time for a graph or a batch: of calls that take long there are fewer
REPLAYS = 20
BATCHES = 20

Check = Callable[[str, Any], str]  # of an implementation's name and result: what is wrong with it, "" if nothing is


class Row(NamedTuple):
    """What one implementation took for one case; no times if its result is wrong or it refused the case."""

    op: str
    shape: str
    tokens: int
    dtype: str
    implementation: str
    device_us: float | None = None
    host_us: float | None = None
    copy_fraction: float | None = None
    wrong: bool = False
    message: str = ""
    experts: int | None = None  # or what else a grid has across its tokens

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.shape, self.dtype, self.implementation


def _calls_together(call: Callable[[], Any], enough_us: float = ENOUGH_US) -> int:
    return max(1, min(CALLS, int(enough_us / testing.time_on_device(call))))


def device_time(call: Callable[[], Any], enough_us: float = ENOUGH_US, replays: int = REPLAYS) -> float:
    """Return the device microseconds of a call: the median of replays of a graph of calls, enough of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads what a capture could not
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    calls = _calls_together(call, enough_us)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # keeps the device busy until the timed replay is queued, whose launch would count otherwise
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return median(times)


def queued_time(call: Callable[[], Any]) -> float:
    """Return the device microseconds of a call whose launches do not go through torch, so that no graph captures them.

    The device copies memory until all calls are queued, so that it waits for none of them.
    """
    host_us, calls = host_time(call), min(CALLS, _calls_together(call))
    source = torch.empty(1 << 26, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copies = 2 + int(1.5 * host_us * calls / testing.time_on_device(lambda: target.copy_(source)))
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(copies):
            target.copy_(source)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return median(times)


def host_time(call: Callable[[], Any]) -> float:
    """Return the host microseconds of an eager call: the best of several batches, with the queue drained in between.

    What else the host does only ever adds to them.
    """
    times, calls = [], _calls_together(call)
    for batch in range(BATCHES + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if batch > 0:  # the first warms up
            times.append((time.perf_counter() - begin) * 1e6 / calls)
    torch.cuda.synchronize()
    return min(times)


def copy_bandwidth() -> float:
    """Return the bytes per microsecond, read plus written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / testing.time_on_device(lambda: target.copy_(source), REPLAYS)


def read_bandwidth() -> float:
    """Return the bytes per microsecond of reading 2 GiB."""
    source = torch.empty(1 << 28, dtype=torch.int64, device="cuda").random_()
    return source.nbytes / testing.time_on_device(source.sum, REPLAYS)


def bytes_moved(arguments: Mapping[str, Any], result: Any) -> int:
    """Return the bytes that an op cannot avoid: each input read once, each output written once."""

    def size(value: Any) -> int:
        if isinstance(value, tuple):
            return sum(map(size, value))
        return value.nbytes if isinstance(value, torch.Tensor) else 0

    return size(tuple(arguments.values())) + size(result)


def fault_of(case: Case, name: str, result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Return what is wrong with a result, "" if nothing is: ours equals the reference, a peer's is valid."""
    if name != OURS:
        return OPS[case.op].fault(result, expected, arguments)
    on_host = {k: testing.to_numpy(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    comparisons = testing.compare_results(case.op, result, expected, on_host)
    return "; ".join(comparison.message for comparison in comparisons if comparison.mismatches)


def contenders_for(op: str, arguments: Mapping[str, Any], peers: Collection[str]) -> list[Contender]:
    """Return ours and those of the peers that are there, on arguments on the device."""
    function = getattr(numba_moe, op)
    bound = inspect.signature(function).bind(**arguments)  # positional where that is how one calls
    ours = Contender(OURS, functools.partial(function, *bound.args, **bound.kwargs))
    return [ours, *(one for one in OPS[op].peers(**arguments) if contenders.competes(one, peers))]


def tried(row: Row, contender: Contender, check: Check, clock: Callable[[Any], dict[str, Any]]) -> Row:
    """Call, check and time an implementation; the clock gives what the row is to say of its call and result."""
    row = row._replace(implementation=contender.name)
    try:
        with testing.poisoned_memory():
            result = contender.call()
        if message := check(contender.name, result):
            return row._replace(wrong=True, message=message)
        return row._replace(**clock(result))
    except Exception as error:  # a peer may refuse a case; we may not
        return row._replace(wrong=contender.name == OURS, message=f"{type(error).__name__}: {error}")


def measure(
    case: Case,
    peers: Collection[str],
    copy_bytes_per_us: float,
    own: Callable[..., Contender] | None = None,
) -> Iterator[Row]:
    """Check and time every implementation of a case, and one of the caller's own, given its arguments."""
    on_host = case.arguments(np.random.default_rng(0))
    arguments = {name: testing.to_device(value, "cuda") for name, value in on_host.items()}
    expected = getattr(reference, case.op)(**on_host)
    payload = next(iter(arguments))  # has a row a token, or for each expert
    if case.dtype is not None:
        arguments[payload] = arguments[payload].to(getattr(torch, case.dtype))
    tokens = len(arguments.get("topk_weights", arguments[payload]))  # of rows in expert order there are more
    row = Row(case.op, case.name, tokens, str(arguments[payload].dtype).removeprefix("torch."), OURS)
    moved: list[int] = []
    ours, *others = contenders_for(case.op, arguments, peers)
    mine = [] if own is None else [own(**arguments)]
    held_to_ours = {one.name for one in (ours, *mine)}

    def check(name: str, result: Any) -> str:
        return fault_of(case, OURS if name in held_to_ours else name, result, expected, arguments)

    def clock(contender: Contender, result: Any) -> dict[str, Any]:
        if contender.name == OURS:
            moved.append(bytes_moved(arguments, result))
        time_of = device_time if own is None else queued_time
        device_us = time_of(contender.call)
        fraction = moved[0] / device_us / copy_bytes_per_us if moved else None
        return {"device_us": device_us, "host_us": host_time(contender.call), "copy_fraction": fraction}

    for contender in (ours, *mine, *others):
        yield tried(row, contender, check, functools.partial(clock, contender))


def environment(peers: Mapping[str, str]) -> dict[str, str]:
    """Return what a reader needs to know to compare two runs."""
    from cuda.core import system

    where = verification.environment(on_gpu=True)
    try:
        where["driver"] = ".".join(map(str, system.get_kernel_mode_driver_version()))
    except RuntimeError as error:  # some containers lack NVML
        where["driver"] = f"unknown: {error}"
    where["CUDA"] = str(torch.version.cuda)
    where |= {f"peer {name}": source for name, source in peers.items() if name != "torch"}
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        if described.returncode == 0:
            where["commit"] = described.stdout.strip()
    where["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return where
