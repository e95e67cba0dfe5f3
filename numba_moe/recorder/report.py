"""Draw a dump: one HTML page with everything in it, on which experts are hot and what moving them would change."""

import argparse
import base64
import functools
import html
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numba_moe.placement import balancedness, rank_loads, rebalance_experts
from numba_moe.placement.rebalance import ALGORITHMS
from numba_moe.recorder.dump_files import Dump, load
from numba_moe.reference.recorder import expert_entropy, traffic_matrix, utilization
from numba_moe.runtime import checks, files
from numba_moe.runtime.text import counted

HOTTEST = 20
WINDOWS = (10, 100, 1000)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } table { border-collapse: collapse } th, td { padding: .15rem .8rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left } .note { color: #666 }
"""

Draw = Callable[[Any], None]  # on a figure of matplotlib


class Rebalanced(NamedTuple):
    """What placing experts by the recorded counts would change."""

    algorithm: str
    before: np.ndarray  # balancedness of each layer [L], as recorded
    after: np.ndarray
    changed: int  # slots that would hold another expert
    loads: np.ndarray  # of ranks [L, R]


def rebalanced(dump: Dump, num_gpus: int, algorithm: str) -> Rebalanced:
    """Place the experts of a dump again, on the same number of slots."""
    total, places = dump.logical_count.sum(axis=0), dump.last_physical_to_logical_map
    placed = rebalance_experts(total, places.shape[1], 1, 1, num_gpus, algorithm=algorithm).physical_to_logical_map
    return Rebalanced(
        algorithm,
        utilization(dump.global_physical_count.sum(axis=0), num_gpus),
        balancedness(total, placed, num_gpus),
        int((placed != places).sum()),
        rank_loads(total, placed, num_gpus),
    )


def _over_mean(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts / np.maximum(counts.mean(axis=-1, keepdims=True), 1e-300))


def _heat(values: np.ndarray, across: str, up: str, title: str, most: float | None = None) -> Draw:
    def draw(figure: Any) -> None:
        panel = figure.subplots()
        image = panel.imshow(values, aspect="auto", interpolation="nearest", vmin=0, vmax=most, cmap="inferno")
        panel.set(xlabel=across, ylabel=up)
        figure.colorbar(image, label=title)

    return draw


def _balance(over_time: np.ndarray) -> Draw:
    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.plot(over_time, color="0.7", label="each pass")
        for window in WINDOWS:
            if window <= len(over_time):
                mean = np.convolve(over_time, np.full(window, 1 / window), "valid")
                panel.plot(np.arange(window - 1, len(over_time)), mean, label=f"mean of {window}")
        panel.set(xlabel="pass", ylabel="balancedness, mean over layers", ylim=(0, 1.02))
        panel.legend()

    return draw


def pictures(dump: Dump, num_gpus: int, change: Rebalanced) -> dict[str, tuple[str, Draw]]:
    """Return the pictures by name: what each shows, and what draws it."""
    physical = dump.global_physical_count
    before = _over_mean(physical.sum(axis=0).reshape(physical.shape[1], num_gpus, -1).sum(axis=-1))
    after = _over_mean(change.loads)
    ranks = ("rank", "layer", "load / mean", max(before.max(), after.max()))  # the same colours, to compare
    over_time = utilization(physical, num_gpus).mean(axis=-1)
    heat = _over_mean(dump.logical_count.sum(axis=0))
    found = {
        "experts": ("Load of experts over the mean of their layer", _heat(heat, "expert", "layer", "load / mean")),
        "ranks": ("Load of ranks, as recorded", _heat(before, *ranks)),
        "balance": ("Balancedness over time", _balance(over_time)),
        "rebalanced": ("Load of ranks after a rebalance", _heat(after, *ranks)),
    }
    if len(dump.rank_physical_count) > 1:
        traffic = traffic_matrix(dump.rank_physical_count, num_gpus).sum(axis=0)
        found["traffic"] = ("Choices from rank to rank", _heat(traffic, "to rank", "from rank", "choices"))
    return found


def png(draw: Draw) -> bytes:
    """Return a picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    draw(figure)
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=110)
    return memory.getvalue()


def _table(header: list[str], rows: list[list[Any]]) -> str:
    def line(tag: str, row: list[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def hottest(dump: Dump) -> list[list[Any]]:
    """Return layer, expert, count and load over the mean of the layer for the busiest experts of all layers."""
    total = dump.logical_count.sum(axis=0)
    over = _over_mean(total)
    order = np.argsort(-over, axis=None, kind="stable")[:HOTTEST]
    places = np.stack(np.unravel_index(order, over.shape), axis=1).tolist()
    return [[layer, expert, int(total[layer, expert]), f"{over[layer, expert]:.2f}"] for layer, expert in places]


def facts(dump: Dump, num_gpus: int) -> list[list[Any]]:
    """Return what was recorded: names and values."""
    num_steps, num_layers, num_experts = dump.logical_count.shape
    entropy = expert_entropy(dump.logical_count.sum(axis=0))
    return [
        ["passes", num_steps],
        ["layers", num_layers],
        ["experts, in slots", f"{num_experts}, in {dump.global_physical_count.shape[2]}"],
        ["ranks", num_gpus],
        ["slots of routing", int(dump.logical_count.sum())],
        ["entropy over that of an even choice", f"{entropy.mean():.3f}, least {entropy.min():.3f}"],
    ]


def page(dump: Dump, name: str, num_gpus: int, change: Rebalanced | None) -> str:
    """Return the report as HTML that refers to nothing outside itself; without counts, that says so."""
    parts = [f"<h1>{html.escape(name)}</h1>", _table(["", "what was recorded"], facts(dump, num_gpus))]
    if change is None:
        parts.append("<p>Nothing was counted: there is nothing to draw, and nothing to rebalance by.</p>")
    else:
        parts += _findings(dump, num_gpus, change)
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _findings(dump: Dump, num_gpus: int, change: Rebalanced) -> Iterator[str]:
    for title, draw in pictures(dump, num_gpus, change).values():
        code = base64.b64encode(png(draw)).decode()
        yield f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{code}">'
    yield "<h2>Hottest experts</h2>"
    yield _table(["layer", "expert", "count", "load / mean"], hottest(dump))
    rows: list[list[Any]] = [
        ["as recorded", f"{change.before.mean():.3f}", f"{change.before.min():.3f}", ""],
        [change.algorithm, f"{change.after.mean():.3f}", f"{change.after.min():.3f}", change.changed],
    ]
    yield "<h2>What a rebalance would change</h2>"
    yield _table(["placement", "balancedness", "of the worst layer", "slots that change"], rows)
    yield '<p class="note">Balancedness is the mean load of ranks over that of the busiest, of all passes together.</p>'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, metavar="DUMP", help="what `recorder.load` reads: .npz, .safetensors, ...")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("report.html"), help="default: report.html")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write each picture to this folder as well")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks that share the slots (default: as recorded)")
    text = "how to place experts anew (default: deepseek)"
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=ALGORITHMS[0], help=text)


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read, check and place anew; return what writes the report and returns the exit status."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install numba-moe[plot]")
    files.check_output("--out", options.out)
    if options.png is not None:
        checks.holds("--png", "in a folder", options.png.is_dir(), options.png)
    with checks.under_names(path="DUMP"):
        dump = load(options.dump)
    num_gpus = checks.integer("--gpus", dump.num_gpus if options.gpus is None else options.gpus, 1)
    checks.divides("--gpus", num_gpus, "the number of slots", dump.global_physical_count.shape[2])
    change = rebalanced(dump, num_gpus, options.algorithm) if dump.logical_count.any() else None
    return functools.partial(run, options, dump, num_gpus, change)


def run(options: argparse.Namespace, dump: Dump, num_gpus: int, change: Rebalanced | None) -> int:
    """Write the report and return the exit status."""
    with files.replacing(options.out) as file:
        file.write(page(dump, options.dump.name, num_gpus, change).encode())
    passes, ranks = counted(len(dump.logical_count), "pass"), counted(num_gpus, "rank")
    if change is None:
        print(f"{options.out}: nothing was counted in {passes} on {ranks}")
        return 0
    if options.png is not None:
        for name, (_, draw) in pictures(dump, num_gpus, change).items():
            with files.replacing(options.png / f"{name}.png") as file:
                file.write(png(draw))
    print(f"{options.out}: {passes} on {ranks}")
    return 0
