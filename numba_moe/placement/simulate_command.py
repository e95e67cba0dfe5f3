"""What rebalancing would have brought: locations replayed against recorded loads, before a cluster is touched."""

import argparse
import functools
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from numba_moe.placement.dumps import read_file
from numba_moe.placement.location import FORMATS, MOST_BYTES, ExpertLocation, check_tables
from numba_moe.placement.simulation import Scenario, Simulation, simulate
from numba_moe.placement.traces import load_trace
from numba_moe.runtime import checks, files
from numba_moe.runtime.text import UNBOUNDED, counted, filled, fitted, room

PICTURES = (".png", ".svg", ".pdf")
# What the command calls the arguments of `simulate`, and of what that calls.
NAMES = {"num_gpus": "--gpus", "num_nodes": "--nodes", "num_groups": "--groups", "num_replicas": "--replicas"}
NAMES |= {"algorithms": "--algorithm", "intervals": "--interval", "current": "--location"}
NAMES |= {name: f"--{name.replace('_', '-')}" for name in ("once_after", "max_moves", "bytes_per_expert", "step_ms")}
NAMES |= {"bandwidth": "--bandwidth"}
MOST_PAIRS = 10**8  # of copies, in a layer; a million take a second
PERIODS = 8  # columns of the tables over time
DRAWN = 6  # lines that a picture has room for
COLUMNS = {  # what the columns say, and how numbers are written
    "algorithm": "",
    "slots": "",
    "rebalance\n(steps)": "",
    "balance\n(mean/\nmax)": ".3f",
    "worst\nlayer": ".3f",
    "time (x\nperfect)": ".3f",
    "off\nGPU\n(%)": ".1f",
    "off\nnode\n(%)": ".1f",
    "re-\nbalances": "",
    "experts\nmoved": "",
    "moved\n(GB)": ".2f",
    "moves\n(ms)": ".1f",
    "saved\n(ms)": ".1f",
    "pays\nafter\n(steps)": "",
    "time, not\nfitted (x\nperfect)": ".3f",
    "weights\n(GB/\nGPU)": ".2f",
}
LEFT_OUT_FIRST = (7, 6, 8, 9, 10, 4, 11, 12, 3, 5)  # columns, if a terminal is too narrow
NOTES = """\
balance: mean load of GPUs over that of the busiest.
time: of the busiest GPUs, over that of perfect balance; once is in hindsight.
time, not fitted: of the second half of the steps, placed by steps before."""


def load_location(path: Path, num_gpus: int, num_nodes: int) -> ExpertLocation:
    """Read where experts are now; the ranks of a map alone are those of the command."""
    content = read_file(path)
    has_map = isinstance(content, dict) and "physical_to_logical_map" in content
    checks.holds("path", "a file with physical_to_logical_map", has_map, path.name)
    sizes = {} if "rank_of_slot" in content else {"num_gpus": num_gpus, "num_nodes": num_nodes}
    return ExpertLocation.load(path, **sizes)


def search_sizes(num_experts: int, num_gpus: int) -> list[int]:
    """Return numbers of slots to try: as few as can be, then 1, 2 and 4 more on each rank.

    >>> search_sizes(num_experts=30, num_gpus=8)
    [32, 40, 48, 64]
    """
    least = -(-num_experts // num_gpus)
    return [num_gpus * (least + more) for more in (0, 1, 2, 4) if least + more <= max(num_experts, least)]


def search_intervals(num_steps: int) -> list[int]:
    """Return intervals to try: a half, a quarter, ... of the steps; once if there is one step alone.

    >>> search_intervals(100)
    [50, 25, 12, 6]
    """
    return list(dict.fromkeys(num_steps // parts for parts in (2, 4, 8, 16) if num_steps >= parts)) or [0]


def table(found: Simulation, num_choices: float, width: int | None = None) -> str:
    """Format the scenarios: columns that have something to say, in a terminal of some width those that it has room for.

    Those left out are named below.
    """
    rows = []
    for s in found.scenarios:
        when = None if s.interval is None else s.when.removeprefix("every ").partition(" step")[0]
        pays = None if s.pays_after is None else str(s.pays_after)
        if s.rebalances and None not in (s.move_ms, s.saved_ms) and s.pays_after is None:
            pays = "never"
        gigabytes = None if s.bytes_moved is None else s.bytes_moved / 1e9
        crossing = [100 * float(c.sum()) / num_choices for c in (s.crossing_gpus, s.crossing_nodes)]
        balance = [float(s.balancedness.mean()), float(s.balancedness.mean(axis=0).min())]
        moved = [len(s.rebalances), sum(r.num_moved for r in s.rebalances), gigabytes, s.move_ms, s.saved_ms]
        weights = None if s.bytes_per_rank is None else s.bytes_per_rank / 1e9
        rows.append([s.algorithm, s.num_replicas, when, *balance, s.time, *crossing, *moved, pays, s.held_out, weights])
    known = [column for column in range(len(COLUMNS)) if any(row[column] is not None for row in rows)]
    names, formats, left_out = [*COLUMNS], [*COLUMNS.values()], []

    def drawn(formatted: Callable[..., str] = tabulate) -> str:
        chosen = [[row[column] for column in known] for row in rows]
        texts = [place for place, column in enumerate(known) if column in (2, 13)]
        headers, written = ([part[column] for column in known] for part in (names, formats))
        return formatted(chosen, headers, floatfmt=written, missingval="-", disable_numparse=texts)

    for column in LEFT_OUT_FIRST:
        if width is not None and column in known and max(map(len, drawn().splitlines())) > width:
            known.remove(column)
            left_out.append(names[column].replace("-\n", "").replace("\n", " ").partition(" (")[0])
    note = textwrap.wrap(f"(no room for {', '.join(left_out)})", width or 120) if left_out else []
    return "\n".join([drawn(tabulate if width is None else fitted), *note])


def over_time(rows: dict[str, np.ndarray], title: str) -> str:
    """Format series [steps] as means over a few periods."""
    num_steps = len(next(iter(rows.values())))
    parts = np.array_split(np.arange(num_steps), min(PERIODS, num_steps))
    headers = [title, *(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)]
    lines = [[name, *(float(values[part].mean()) for part in parts)] for name, values in rows.items()]
    return fitted(lines, headers, floatfmt=".3f")


def verdict(found: Simulation, num_steps: int) -> str:
    """Say what is best, on which steps, whether it pays, and what its slots cost."""
    return "\n".join([_best(found, num_steps), *_not_fitted(found), *_memory(found), *_over_more_steps(found)])


def _not_fitted(found: Simulation) -> Iterator[str]:
    """Say how the best does on steps that it is not fitted to, and how both algorithms do."""
    stay, *tried = best_and_before(found)
    if not tried:
        return
    if found.best.held_out is None or stay.held_out is None:
        yield "There are no other steps to try it on: record more than one."
        return
    yield f"On steps that it is not fitted to it takes {found.best.held_out:.3f}, and staying {stay.held_out:.3f}."
    best = found.best
    for other in found.scenarios:
        same = (other.num_replicas, other.when) == (best.num_replicas, best.when)
        if same and other is not best and _time(other) <= _time(best):
            yield f"{other.algorithm.capitalize()} is no worse: {_time(other):.3f}."


def _memory(found: Simulation) -> Iterator[str]:
    """Say what slots beyond the fewest cost, and what is best without."""
    best, least = found.best, min(found.scenarios, key=lambda scenario: scenario.num_replicas)
    if best.num_replicas == least.num_replicas:
        return
    more = f"{best.num_replicas - least.num_replicas} more slots of a layer than {least.num_replicas}"
    if best.bytes_per_rank is not None and least.bytes_per_rank is not None:
        more += f", {(best.bytes_per_rank - least.bytes_per_rank) / 1e9:.2f} GB on each GPU"
    within = min((s for s in found.scenarios if s.num_replicas == least.num_replicas), key=_time)
    yield f"It needs {more}; without them the best is {within.name}, with {_time(within):.3f}."


def _over_more_steps(found: Simulation) -> Iterator[str]:
    """Name what takes least time if its moves need not pay within the recorded steps."""
    least = min(found.scenarios, key=_time)
    if least is not found.best and least.pays_after and found.best.interval is not None:
        yield f"Over more steps like these, {least.name} takes {_time(least):.3f} and pays after {least.pays_after}."


def _time(scenario: Scenario) -> float:
    return scenario.time if scenario.held_out is None else scenario.held_out


def _best(found: Simulation, num_steps: int) -> str:
    best = found.best
    if best.interval is None:
        paying = {scenario.pays_after: scenario.name for scenario in found.scenarios[::-1] if scenario.pays_after}
        if not paying:
            return f"Best: {best.name}. No rebalance takes less time."
        steps = min(paying)
        over = counted(num_steps, "step")
        return f"Best over {over}: {best.name}. With more like these, {paying[steps]} pays after {steps}."
    text = f"Best: {best.name}, {best.time:.3f} times the time of perfect balance"
    text += " in hindsight." if best.interval == 0 else "."
    if best.pays_after is None:
        return f"{text} Whether that pays: give --bytes-per-expert and --step-ms."
    return f"{text} It pays after {counted(best.pays_after, 'step')}."


def best_and_before(found: Simulation) -> list[Scenario]:
    """Return "stay" with the slots of the best scenario, and that if it is another."""
    stay = next(scenario for scenario in found.scenarios if scenario.num_replicas == found.best.num_replicas)
    return [stay] if stay is found.best else [stay, found.best]


def report(found: Simulation) -> dict[str, Any]:
    """Return all numbers as what JSON can hold; locations are written elsewhere."""
    scenarios = []
    for scenario in found.scenarios:
        fields = {**scenario._asdict(), "rebalances": [r._asdict() for r in scenario.rebalances]}
        del fields["location"]
        scenarios.append({name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in fields.items()})
    return {"best": next(i for i, s in enumerate(found.scenarios) if s is found.best), "scenarios": scenarios}


def lines_of(found: Simulation) -> list[Scenario]:
    """Return what a picture or a table over time has room for: staying, the best, and those next to it, in order."""
    wanted = [*best_and_before(found), *sorted(found.scenarios, key=_time)]
    chosen = {id(scenario) for scenario in list({id(s): s for s in wanted}.values())[:DRAWN]}
    return [scenario for scenario in found.scenarios if id(scenario) in chosen]


def plot(path: Path, found: Simulation) -> None:
    """Draw balancedness and time over steps for scenarios of least time, and ranks' loads before and with the best."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 9), layout="constrained")
    shown = best_and_before(found)
    drawn = lines_of(found)
    (balance, time), heats = figure.subplots(2, 2)
    for scenario in drawn:
        balance.plot(scenario.balancedness.mean(axis=1), marker=".", label=scenario.name)
        time.plot(scenario.step_time, marker=".")
    balance.set(xlabel="step", ylabel="balancedness (mean/max), mean over layers")
    time.set(xlabel="step", ylabel="time over that of perfect balance")
    left = len(found.scenarios) - len(drawn)
    title = f"{counted(left, 'scenario')} that take more time are not drawn" if left else None
    figure.legend(loc="outside lower center", ncols=3, title=title)
    top = max(float(scenario.rank_load.max()) for scenario in shown)
    for panel, scenario in zip(heats, shown, strict=False):
        image = panel.imshow(scenario.rank_load.T, aspect="auto", vmin=0, vmax=top, interpolation="nearest")
        panel.set(title=scenario.name, xlabel="step", ylabel="GPU")
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (balance, time, *heats):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(heats), label="load over the mean")
    with files.replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))


def check_outputs(options: argparse.Namespace) -> None:
    """Check before the work what is to be written after it."""
    for name, suffixes in {"json": None, "out": FORMATS, "plot": PICTURES}.items():
        path = getattr(options, name)
        if path is not None:
            files.check_output(f"--{name}", path, suffixes)
    if options.plot is not None:
        checks.installed("--plot", "plot", "matplotlib")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read, check and simulate; return what prints the tables, writes what is asked for, and returns the status."""
    check_outputs(options)
    num_gpus = checks.integer("--gpus", options.gpus, 1)
    sizes_of_file = {name: getattr(options, name) for name in ("num_layers", "num_experts", "tokens_per_step")}
    with checks.under_names(path="DUMP", **{name: f"--{name.replace('_', '-')}" for name in sizes_of_file}):
        for name, value in sizes_of_file.items():
            if value is not None:
                checks.integer(name, value, 1)
        loads = load_trace(options.dump, **sizes_of_file, num_gpus=num_gpus)
    num_layers, num_experts = loads.shape[1:3]
    current = None
    if options.location is not None:
        with checks.under_names(path="--location", num_nodes="--nodes", num_gpus="--gpus"):
            current = load_location(options.location, num_gpus, options.nodes)
    sizes = search_sizes(num_experts, num_gpus)
    sizes = options.replicas or (sizes if options.search else sizes[:1])
    if current is not None and not options.replicas:
        sizes = [current.num_physical_experts]
    for num_slots in sizes:
        name = "--replicas" if options.replicas else "--gpus"
        check_tables(name, num_layers, num_experts, num_slots)
        rule = f"few enough for {num_experts} experts: a move compares all copies of each with all others"
        checks.holds(name, rule, num_slots**2 <= MOST_PAIRS * num_experts, num_slots)
    most = max(MOST_BYTES, 4 * loads.nbytes)
    wanted = 8 * len(loads) * num_layers * num_gpus
    checks.holds("--gpus", f"few enough for their loads to take at most {most} bytes", wanted <= most, num_gpus)
    intervals = search_intervals(len(loads)) if options.search else [0]
    once_after = options.once_after or ([len(loads) // 4] if options.search and len(loads) >= 4 else [])
    with checks.under_names(weight="DUMP", **NAMES):
        found = simulate(
            loads,
            sizes,
            options.groups,
            options.nodes,
            num_gpus,
            algorithms=options.algorithm,
            intervals=options.interval or ([] if options.once_after else intervals),
            once_after=once_after,
            current=current,
            max_moves=options.max_moves,
            bytes_per_expert=options.bytes_per_expert,
            step_ms=options.step_ms,
            bandwidth=options.bandwidth,
            progress=True,
        )
    return functools.partial(run, options, loads, found)


def run(options: argparse.Namespace, loads: np.ndarray, found: Simulation) -> int:
    """Print the tables, write what is asked for, and return the exit status."""
    kind = "" if loads.ndim == 3 else ", tokens on the ranks that it says"
    sizes = ", ".join(map(counted, loads.shape, ("step", "layer", "expert")))
    print(filled(f"{options.dump.name}: {sizes}{kind}"), end="\n\n")
    width = room() if room() < UNBOUNDED else None
    print(table(found, float(loads.sum()), width), end="\n\n")
    print(filled(NOTES), end="\n\n")
    title = "balance (mean/max) at steps"
    print(over_time({s.name: s.balancedness.mean(axis=1) for s in lines_of(found)}, title), end="\n\n")
    if options.detail:
        for scenario in best_and_before(found):
            print_detail(scenario)
    print(filled(verdict(found, len(loads))))
    if options.json is not None:
        with files.replacing(options.json) as file:
            file.write(json.dumps(report(found)).encode())
    if options.out is not None:
        found.best.location.save(options.out)
    if options.plot is not None:
        plot(options.plot, found)
    return 0


def print_detail(scenario: Scenario) -> None:
    layers = {f"layer {index}": values for index, values in enumerate(scenario.balancedness.T)}
    ranks = {f"rank {index}": values for index, values in enumerate(scenario.rank_load.T)}
    print(f"{scenario.name}\n")
    print(over_time(layers, "balance (mean/max) at steps"), end="\n\n")
    print(over_time(ranks, "load (x mean) at steps"), end="\n\n")
