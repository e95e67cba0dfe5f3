"""How it is timed: device and host time of a call, share of the copy bandwidth, and where that was."""

import functools
import inspect
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

import numba_moe
from numba_moe import reference
from numba_moe.bench.contenders import OPS, OURS, Contender, is_registered
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import Case

CALLS = 50  # in a captured graph and in a batch of eager calls: too few to fill the launch queue
ENOUGH_US = 5000  # of device time for a graph or a batch: of calls that take long there are fewer
REPLAYS = 20
BATCHES = 20


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

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.shape, self.dtype, self.implementation


def _calls_together(call: Callable[[], Any]) -> int:
    return max(1, min(CALLS, int(ENOUGH_US / testing.time_on_device(call))))


def device_time(call: Callable[[], Any]) -> float:
    """Return the device microseconds of a call, from replays of a graph of many."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads what a capture could not
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    calls = _calls_together(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(REPLAYS):
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

    The device copies memory until the calls are queued behind it, so that it waits for none of them.
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
    """Return the host microseconds of an eager call, the queue drained between batches, of which the best counts.

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


def measure(
    case: Case,
    peers: Sequence[str],
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
    op = getattr(numba_moe, case.op)
    bound = inspect.signature(op).bind(**arguments)  # positional where that is how one calls
    ours = Contender(OURS, functools.partial(op, *bound.args, **bound.kwargs))
    others = (c for c in OPS[case.op].peers(**arguments) if c.name in peers and is_registered(c.needs))
    mine = [] if own is None else [own(**arguments)]
    moved: int | None = None
    for name, call, _ in (ours, *mine, *others):
        row = row._replace(implementation=name)
        try:
            with testing.poisoned_memory():
                result = call()
            judged_as = OURS if any(name == one.name for one in mine) else name
            if message := fault_of(case, judged_as, result, expected, arguments):
                yield row._replace(wrong=True, message=message)
                continue
            if name == OURS:
                moved = bytes_moved(arguments, result)
            time_of = device_time if own is None else queued_time
            device_us, host_us = time_of(call), host_time(call)
        except Exception as error:  # a peer may refuse a case; we may not
            yield row._replace(wrong=name == OURS, message=f"{type(error).__name__}: {error}")
            continue
        fraction = None if moved is None else moved / device_us / copy_bytes_per_us
        yield row._replace(device_us=device_us, host_us=host_us, copy_fraction=fraction)


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
