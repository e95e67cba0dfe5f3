"""Our ops and their peers' side by side: device time, host time, share of the copy bandwidth.

A result that is wrong is not timed. Device time is the median replay of a CUDA graph of calls; host time is that
of an eager call. Every implementation allocates its outputs inside the call, the way its users call it.

torch is a peer for plain gating alone: what it can compose for alignment and for grouped gating takes a dozen
launches, which nobody who has a choice would run.
"""

import argparse
import functools
import lzma
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from numba_moe.bench import contenders, grid, measure, patched, ratios
from numba_moe.bench.measure import Row
from numba_moe.runtime import checks, files
from numba_moe.runtime.text import fitted
from numba_moe.verify import testing
from numba_moe.verify.cases import Case

PICTURES = (".png", ".svg", ".pdf")


def select_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for."""
    texts = options.shape or [""]
    chosen = [
        case
        for name, op in contenders.OPS.items()
        if testing.matches(name, options.op)
        for case in op.cases(options.routing)
        if any(text in case.name for text in texts)
    ]
    if not chosen:
        raise ValueError("no op and shape is called that")
    return chosen


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read, check and load what the options name; return what measures, and returns the exit status."""
    chosen: Any = None
    if options.merge is None:
        if options.patched:
            checks.holds("--grid", "left out with `--patched`", options.grid is None, options.grid)
            chosen = patched.select_pairs(options)
        else:
            chosen = select_cases(options) if options.grid is None else grid.select_shapes(options)
    for name, suffixes in {"json": None, "plot": PICTURES}.items():
        if getattr(options, name) is not None:
            files.check_output(f"--{name}", getattr(options, name), suffixes)
    if options.plot is not None:
        checks.installed("--plot", "plot", "matplotlib")
    if options.merge is not None:
        with checks.under_names(path="--merge"):
            return functools.partial(grid.report, options, *grid.merge(options.merge))
    with checks.under_names(path="--compare"):
        old = None if options.compare is None else ratios.read_report(options.compare)
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here, and nothing to time without one")
    try:
        peers = contenders.load_peers(options.peers, options.peer_lib, options.peer_tree)
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"`--peer-lib` must be a whole .so.xz file ({error})") from error
    if options.grid is not None:
        return functools.partial(grid.run, options, chosen, peers)
    return functools.partial(run, options, chosen, old, peers)


def run(
    options: argparse.Namespace, cases: Sequence[Any], old: dict[tuple[str, ...], Row] | None, peers: dict[str, str]
) -> int:
    """Measure, print the table, and return the exit status: 1 if a result of ours is wrong."""
    bandwidth = measure.copy_bandwidth()
    where = {**measure.environment(peers), "copy": f"{bandwidth / 1e3:.0f} GB/s read plus written"}
    print("\n".join(f"{name}: {value}" for name, value in where.items()))
    progress = tqdm(cases, unit="case", disable=not sys.stderr.isatty(), leave=False)
    measured = functools.partial(measure.measure, peers=tuple(peers), copy_bytes_per_us=bandwidth)
    rows = [row for case in progress for row in (patched.rows_of(*case) if options.patched else measured(case))]
    print(ratios.table(rows, old))
    headers = ("op", "shapes", "device / best peer", "host / best peer")
    print(fitted([(op, *values) for op, values in ratios.means(rows).items()], headers, floatfmt=".2f"))
    if options.json is not None:
        ratios.write_report(options.json, rows, where)
    if options.plot is not None:
        ratios.plot(options.plot, rows)
    return 1 if any(row.wrong and row.implementation == contenders.OURS for row in rows) else 0
