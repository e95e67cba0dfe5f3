"""A grid of shapes in place of a list: ours beside every peer that there is, all in one process, in random order.

Nothing is dropped: a shape that ours refuse or get wrong counts as slower than any peer. Each result is checked before
it is timed. What is above 1.05 of the best peer is timed again five times, and the middle ratio counts. Kernels that
are compiled at their first call are compiled ahead, by processes beside the one that measures.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

from numba_moe.bench import contenders, grid_shapes, grid_summary, measure, ratios
from numba_moe.bench.contenders import OURS
from numba_moe.bench.grid_shapes import Buffer, Shape
from numba_moe.bench.measure import Row
from numba_moe.runtime import checks, compile, launch
from numba_moe.verify import testing

# Device time of a graph and its replays: of a shape that is one of many, with less care than of one that is listed.
ENOUGH_US = 2000
REPLAYS = 9
AGAIN = 5
# Peers that take more than this times the best one's are not timed again.
NEAR = 1.2
# Processes that compile draw no larger arguments: these ops' kernels are few.
MOST_TO_COMPILE = 2**28


def select_shapes(options: argparse.Namespace) -> list[Shape]:
    """Return the shapes that the options ask for."""
    checks.integer("--shapes", options.shapes, 1)
    checks.holds("--seconds", "above 0", options.seconds > 0, options.seconds)
    ops = [op for op in grid_shapes.GRIDS if testing.matches(op, options.grid or None)]
    shapes = grid_shapes.draw_all(ops, options.shapes, options.seed, *options.part)
    if not shapes:
        raise ValueError(f"`--grid` must name ops among {', '.join(grid_shapes.GRIDS)}, got {options.grid}")
    return shapes


def merge(paths: Sequence[Path]) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of several runs, of a shape those of the last run that has it, and where the runs were."""
    shapes: dict[tuple[str, ...], list[Row]] = {}
    where: dict[str, list[str]] = {}
    for path in paths:
        rows, environment = ratios.read_run(path)
        of_run: dict[tuple[str, ...], list[Row]] = {}
        for row in rows.values():
            of_run.setdefault(row.key[:3], []).append(row)
        shapes |= of_run
        for name, value in environment.items():
            where.setdefault(name, []).append(value)
    joined = {name: "; ".join(dict.fromkeys(values)) for name, values in where.items()}
    return [row for of_shape in shapes.values() for row in of_shape], joined


def report(options: argparse.Namespace, rows: Sequence[Row], where: dict[str, str]) -> int:
    """Print and write what was measured; return the exit status: 1 if ours failed somewhere."""
    print("\n".join(f"{name}: {value}" for name, value in where.items()))
    for part in (grid_summary.peers(rows), grid_summary.worst(rows), grid_summary.summary(rows)):
        print(f"\n{part}")
    if options.json is not None:
        ratios.write_report(options.json, rows, where)
    if options.plot is not None:
        grid_summary.draw_maps(options.plot, rows, where)
    return 1 if any(row.device_us is None and row.implementation == OURS for row in rows) else 0


def run(options: argparse.Namespace, shapes: Sequence[Shape], peers: dict[str, str]) -> int:
    """Measure the shapes until the time is over, and report."""
    begin = time.monotonic()
    rows: list[Row] = []
    bar = tqdm(shapes, unit="shape", disable=not sys.stderr.isatty(), leave=False)
    with compiled_ahead(shapes, options) as ready, Measuring(options) as measuring:
        for number, shape in enumerate(bar):
            if time.monotonic() - begin > options.seconds:
                print(f"{len(shapes) - number} of {len(shapes)} shapes were not reached in {options.seconds:.0f} s")
                break
            if ready:
                ready[number].result()
            rows += measuring.measure(shape)
    return report(options, rows, measure.environment(peers))


class Measuring:
    """A process that measures, followed by another one where an implementation has broken its CUDA context."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def __enter__(self) -> "Measuring":
        initial = (self._options.peers, self._options.peer_lib, self._options.peer_tree, self._options.seed)
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, initial)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def measure(self, shape: Shape) -> list[Row]:
        """Return the rows of a shape."""
        broken: dict[str, str] = {}
        while True:
            rows = self._pool.submit(_measure, shape, broken).result()
            if not isinstance(rows, Broken):
                return rows
            broken[rows.implementation] = rows.message
            self.__exit__()
            self.__enter__()


class Broken(NamedTuple):
    """Which implementation broke the context, and how."""

    implementation: str
    message: str


def measure_shape(
    shape: Shape, buffer: Buffer, peers: Sequence[str], broken: Mapping[str, str] = MappingProxyType({})
) -> list[Row] | Broken:
    """Check and time every implementation of a shape but broken ones; where ours are slower, time again what counts."""
    arguments = grid_shapes.arguments_of(shape, buffer)
    wanted = grid_shapes.expected(shape.op, arguments)
    dtype = str(next(iter(arguments.values())).dtype).removeprefix("torch.")
    row = Row(shape.op, shape.name, shape.point["tokens"], dtype, OURS, experts=shape.across)
    calls = {one.name: one for one in measure.contenders_for(shape.op, arguments, peers)}

    def check(name: str, result: Any) -> str:
        return grid_shapes.fault_of(shape.op, result, arguments, wanted)

    def time_it(name: str) -> float:
        return measure.device_time(calls[name].call, ENOUGH_US, REPLAYS)

    def clock(name: str, result: Any) -> dict[str, float]:
        return {"device_us": time_it(name)}

    rows: list[Row] = []
    for name, one in calls.items():
        if name in broken:
            rows.append(row._replace(implementation=name, wrong=name == OURS, message=broken[name]))
            continue
        rows.append(measure.tried(row, one, check, functools.partial(clock, name)))
        if rows[-1].message and not buffer.holds():
            return Broken(name, rows[-1].message)
    [compared] = grid_summary.compare(rows)
    if compared.best is None or not grid_summary.SLOWER < compared.ratio < float("inf"):
        return rows
    near = NEAR * float(compared.best.device_us or 0)
    again = [one.implementation for one in rows if one.device_us is not None and one.device_us <= near]
    tries = []
    for _ in range(AGAIN):
        times = {name: time_it(name) for name in dict.fromkeys([OURS, *again])}
        tries.append([one._replace(device_us=times.get(one.implementation, one.device_us)) for one in rows])
    return sorted(tries, key=lambda rows: grid_summary.compare(rows)[0].ratio)[AGAIN // 2]


@contextlib.contextmanager
def compiled_ahead(shapes: Sequence[Shape], options: argparse.Namespace) -> Iterator[list[Future[None]]]:
    """Compile the kernels of the shapes in other processes, in their order; nothing where there are too few cores."""
    processes = min((os.cpu_count() or 1) - 2, len(shapes))
    if processes < 2:
        yield []
        return
    initial = (options.peers, (), options.peer_tree, options.seed, True)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, initial)
    try:
        yield [pool.submit(_compile, shape) for shape in shapes]
    finally:
        pool.shutdown(cancel_futures=True)


_here: dict[str, Any] = {}  # what a process that measures or compiles has at hand


def _begin(
    peers: Sequence[str] | None, libraries: Sequence[Path], trees: Sequence[Path], seed: int, compiles: bool = False
) -> None:
    """Prepare a process that measures, or that compiles and launches nothing."""
    _here.update(peers=tuple(contenders.load_peers(peers, libraries, trees)), buffer=Buffer("cuda", seed))
    if not compiles:
        return
    capability = torch.cuda.get_device_capability()

    def compile_only(self: launch.Launch, **arrays: Any) -> None:
        compile.compiled(self.kernel, self.specialisation, capability)

    mock.patch.object(launch.Launch, "__call__", compile_only).start()
    with contextlib.suppress(ImportError):
        from triton.runtime.jit import JITFunction

        jit_run = JITFunction.run

        def warm_up(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
            return jit_run(self, *args, warmup=True, **options)

        mock.patch.object(JITFunction, "run", warm_up).start()


def _measure(shape: Shape, broken: Mapping[str, str]) -> list[Row] | Broken:
    return measure_shape(shape, _here["buffer"], _here["peers"], broken)


def _compile(shape: Shape) -> None:
    """Compile what a shape takes; what fails here fails again, and is told, where it is measured."""
    size = shape.point["tokens"] * max(shape.across, shape.point["top_k"] * shape.point.get("hidden", 1))
    if size > MOST_TO_COMPILE:
        return
    arguments = grid_shapes.arguments_of(shape, _here["buffer"])
    for contender in measure.contenders_for(shape.op, arguments, _here["peers"]):
        if not contender.needs and contender.name != "torch":  # others have nothing to compile
            with contextlib.suppress(Exception):
                contender.call()
