"""Replay recorded loads with several ways of placing experts."""

import contextlib
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numba_moe.placement.location import ExpertLocation
from numba_moe.placement.rebalance import ALGORITHMS, Tick, check_loads, place
from numba_moe.reference.migration import plan_migration
from numba_moe.runtime import checks
from numba_moe.runtime.text import counted, ticking

STAY = "stay"
LONGEST = 1e15  # steps: a longer time is never
BANDWIDTH = 50.0  # GB/s into and out of a rank: a 400 Gb/s network card for each


class Rebalance(NamedTuple):
    """One change of location, and what it brings until the next one or the end."""

    step: int  # before which it happens
    num_moved: int  # experts of layers that a rank receives from another
    num_across_nodes: int  # those of them that come from another node
    busiest_rank: int  # most that one rank sends, or receives
    move_ms: float | None
    saved_ms: float | None
    pays_after: int | None


class Scenario(NamedTuple):
    """One way to place experts, replayed."""

    algorithm: str
    num_replicas: int
    interval: int | None
    balancedness: np.ndarray
    rank_load: np.ndarray
    step_time: np.ndarray
    time: float
    crossing_gpus: np.ndarray
    crossing_nodes: np.ndarray
    rebalances: list[Rebalance]
    bytes_moved: int | None
    move_ms: float | None
    saved_ms: float | None
    pays_after: int | None
    location: ExpertLocation
    held_out: float | None
    then_stays: bool
    bytes_per_rank: int | None

    @property
    def name(self) -> str:
        if self.interval is None:
            return f"{self.algorithm}, {self.num_replicas} slots"
        return f"{self.algorithm}, {self.num_replicas} slots, {self.when}"

    @property
    def when(self) -> str:
        """When experts move."""
        if not self.interval:
            return "never" if self.interval is None else "once"
        steps = counted(self.interval, "step")
        return f"once after {steps}" if self.then_stays else f"every {steps}"


class Simulation(NamedTuple):
    """All scenarios, and the one that takes least time."""

    scenarios: list[Scenario]
    best: Scenario


class Replay(NamedTuple):
    """What a location makes of some steps."""

    balancedness: np.ndarray  # [steps, L]
    rank_load: np.ndarray  # [steps, R], summed over layers
    busiest: np.ndarray  # [steps], the busiest rank's load summed over layers
    crossing_gpus: np.ndarray  # [steps]
    crossing_nodes: np.ndarray  # [steps]


def replay(weight: np.ndarray, location: ExpertLocation) -> Replay:
    # weight [steps, L, E] or [steps, L, E, R]
    num_gpus, num_nodes = location.num_gpus, location.num_nodes
    total = weight if weight.ndim == 3 else weight.sum(axis=3)
    share = np.zeros((*total.shape[1:], num_gpus))  # of an expert's load, by rank
    layers = np.arange(location.num_layers)[:, None]
    np.add.at(share, (layers, location.physical_to_logical_map, location.rank_of_slot), 1)
    share /= location.logical_to_all_physical_map_num_valid[:, :, None]
    loads = np.matmul(total.transpose(1, 0, 2), share).transpose(1, 0, 2)  # [steps, L, R]
    peaks = loads.max(axis=2)

    node_of_rank = location.node_of_slot[np.searchsorted(location.rank_of_slot, np.arange(num_gpus))]
    first_rank = np.searchsorted(node_of_rank, np.arange(num_nodes))
    crossing = []
    for first in (np.arange(num_gpus), first_rank):
        shares = np.add.reduceat(share, first, axis=2)
        if weight.ndim == 3:
            live = np.add.reduceat(np.full(num_gpus, 1 / num_gpus), first)
            crossing.append((total * (1 - np.minimum(live, shares).sum(axis=2))).sum(axis=(1, 2)))
        else:
            kept = [
                np.minimum(np.add.reduceat(step, first, axis=2), all_of[:, :, None] * shares).sum()
                for step, all_of in zip(weight, total, strict=True)
            ]
            crossing.append(total.sum(axis=(1, 2)) - kept)
    return Replay((loads.mean(axis=2) + 1e-5) / (peaks + 1e-5), loads.sum(axis=1), peaks.sum(axis=1), *crossing)


def count_moves(old: ExpertLocation, new: ExpertLocation) -> tuple[int, int, int]:
    """Return how many experts ranks receive, how many of them from other nodes, and the most of one rank."""
    ranks, nodes = old.rank_of_slot, old.node_of_slot
    sent, received = np.zeros(old.num_gpus, int), np.zeros(old.num_gpus, int)
    across = 0
    for layer in range(old.num_layers):
        source = plan_migration(old, new, layer)
        slots = np.flatnonzero(source >= 0)
        pairs = np.unique(np.stack([ranks[slots], source[slots]]), axis=1)
        receivers, senders = pairs[0], ranks[pairs[1]]
        remote = receivers != senders
        np.add.at(received, receivers[remote], 1)
        np.add.at(sent, senders[remote], 1)
        first_slots = np.searchsorted(ranks, receivers)
        across += int((nodes[first_slots] != nodes[pairs[1]]).sum())
    return int(received.sum()), across, int(max(sent.max(), received.max()))


def steps_to_pay(cost: float, saved: float, num_steps: int) -> int | None:
    """Return the steps after which a saving, as large at each, outweighs a cost; None if it never does."""
    if cost == 0:
        return 0
    steps = cost * num_steps / saved if saved > 0 else math.inf
    return math.ceil(steps - 1e-9) if steps < LONGEST else None


def over(loads: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Divide loads by their mean; a step without load is in balance."""
    return np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)


class _Trace(NamedTuple):
    """Recorded loads, and what does not change from scenario to scenario."""

    loads: np.ndarray  # [steps, L, E] or [steps, L, E, R]
    num_groups: int
    max_moves: int | None
    step_ms: float | None
    bytes_per_expert: int | None
    bandwidth: float
    tick: Tick

    @property
    def half(self) -> int:
        """The first of the steps that a placement is scored on and not fitted to; 0 if there is one step."""
        return len(self.loads) // 2

    def cost(self, scenario: Scenario) -> float:
        """Return the time of a scenario with its moves, in steps of perfect balance; on steps not seen if it can be."""
        steps = (scenario.time if scenario.held_out is None else scenario.held_out) * len(self.loads)
        if self.step_ms is None or scenario.move_ms is None:
            return steps
        return steps + scenario.move_ms / self.step_ms

    def place(self, window: slice, algorithm: str, now: ExpertLocation) -> ExpertLocation:
        """Choose a location by the loads of some steps."""
        weight = self.loads[window] if self.loads.ndim == 3 else self.loads[window].sum(axis=3)
        options: dict[str, Any] = {}
        if algorithm == "refined":
            options = {"current": now, "max_moves": self.max_moves, "slots_per_rank": now.slots_per_rank}
        sizes = now.num_physical_experts, self.num_groups, now.num_nodes, now.num_gpus
        placed = place(weight, *sizes, algorithm, options, self.tick)
        slots, count = placed.logical_to_all_physical_map, placed.logical_to_all_physical_map_num_valid
        return ExpertLocation(placed.physical_to_logical_map, slots, count, now.rank_of_slot, now.node_of_slot)

    def account(self, step: int, old: ExpertLocation, new: ExpertLocation, saved: float, num_steps: int) -> Rebalance:
        """Say what a move costs, and what it saves, given as load of the busiest ranks."""
        moved, across, busiest = count_moves(old, new)
        move_ms = saved_ms = pays_after = None
        if self.bytes_per_expert is not None:
            move_ms = busiest * self.bytes_per_expert / self.bandwidth / 1e6
        if self.step_ms is not None:
            saved_ms = saved * self.step_ms * len(self.loads) * old.num_gpus / float(self.loads.sum())
        if move_ms is not None and saved_ms is not None:
            pays_after = steps_to_pay(move_ms, saved_ms, num_steps)
        return Rebalance(step, moved, across, busiest, move_ms, saved_ms, pays_after)

    def begins(self, interval: int | None, then_stays: bool) -> list[int]:
        """Return the steps before which experts move."""
        if not interval:
            return [] if interval is None else [0]
        return [interval] if then_stays else list(range(interval, len(self.loads), interval))

    def run(
        self,
        start: ExpertLocation,
        stay: Scenario | None = None,
        algorithm: str = STAY,
        interval: int | None = None,
        then_stays: bool = False,
    ) -> Scenario:
        """Replay the loads; `stay` is the scenario to compare with, None for that one itself."""
        num_steps = len(self.loads)
        bounds = [0, *self.begins(interval, then_stays), num_steps]
        replays = [replay(self.loads[: bounds[1]], start)]
        rebalances: list[Rebalance] = []
        location = start
        for first, after in itertools.pairwise(bounds[1:]):
            before = location
            location = self.place(slice(first - interval, first) if interval else slice(None), algorithm, before)
            replays.append(replay(self.loads[first:after], location))
            saved = replay(self.loads[first:after], before).busiest.sum() - replays[-1].busiest.sum()
            rebalances.append(self.account(first, before, location, float(saved), after - first))
        if interval and not then_stays:
            location = self.place(slice(num_steps - interval, num_steps), algorithm, location)

        whole = Replay(*map(np.concatenate, zip(*replays, strict=True)))
        mean = self.loads.reshape(num_steps, -1).sum(axis=1) / start.num_gpus
        time = float(whole.busiest.sum() / mean.sum())
        held_out = None
        if self.half and mean[self.half :].any():
            busiest = whole.busiest[self.half :]
            if interval == 0:  # in hindsight; what the first half says of the second
                busiest = replay(self.loads[self.half :], self.place(slice(self.half), algorithm, start)).busiest
            held_out = float(busiest.sum() / mean[self.half :].sum())
        bytes_moved = bytes_per_rank = move_ms = saved_ms = pays_after = None
        if self.bytes_per_expert is not None:
            bytes_per_rank = self.bytes_per_expert * start.num_layers * int(start.slots_per_rank.max())
            bytes_moved = self.bytes_per_expert * sum(r.num_moved for r in rebalances)
            move_ms = float(sum(r.move_ms or 0 for r in rebalances))
        if self.step_ms is not None:
            saved_ms = 0.0 if stay is None else (stay.time - time) * self.step_ms * num_steps
        if rebalances and move_ms is not None and saved_ms is not None:
            pays_after = steps_to_pay(move_ms, saved_ms, num_steps - bounds[1])
        return Scenario(
            algorithm,
            start.num_physical_experts,
            interval,
            whole.balancedness,
            over(whole.rank_load, mean[:, None]),
            over(whole.busiest, mean),
            time,
            whole.crossing_gpus,
            whole.crossing_nodes,
            rebalances,
            bytes_moved,
            move_ms,
            saved_ms,
            pays_after,
            location,
            held_out,
            then_stays,
            bytes_per_rank,
        )


def simulate(
    weight: Any,
    num_replicas: int | Sequence[int],
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    algorithms: Sequence[str] = ALGORITHMS,
    intervals: Sequence[int] = (0,),
    once_after: Sequence[int] = (),
    current: ExpertLocation | None = None,
    max_moves: int | None = None,
    bytes_per_expert: int | None = None,
    step_ms: float | None = None,
    bandwidth: float = BANDWIDTH,
    progress: bool = False,
) -> Simulation:
    """Replay recorded loads with several ways of placing experts.

    Parameters
    ----------
    weight : array of numbers, shape [L, E], [steps, L, E] or [steps, L, E, R]
        Tokens that chose each expert of each layer at each step; a token that chooses k experts counts k times. With
        ranks, those of the tokens that live on each; otherwise tokens live on all ranks evenly.
    num_replicas : int or sequence of int
        Slots of a layer; each number makes its own scenarios.
    num_groups : int
        Groups of consecutive experts that stay on a node, as for `rebalance_experts`.
    num_nodes : int
        Nodes; consecutive ranks form a node.
    num_gpus : int
        Ranks of all nodes together (R).
    algorithms : sequence of str
        Those of `rebalance_experts` to try.
    intervals : sequence of int
        Steps between rebalances; each rebalance uses the loads of the interval that just ended. 0 means one rebalance
        before the first step, with the loads of all steps, in hindsight: the gain if the same loads came again.
    once_after : sequence of int
        Numbers of steps after which experts move once, by the loads of these steps, and then stay.
    current : ExpertLocation, optional
        Where experts are at the beginning, on every rank; `ExpertLocation.trivial` by default.
    max_moves : int, optional
        For "refined": the largest number of slots of a layer that one rebalance may change.
    bytes_per_expert : int, optional
        Bytes of the weights of one expert of one layer.
    step_ms : float, optional
        Milliseconds that the experts of all layers take at a step of average load if it is perfectly balanced.
    bandwidth : float
        GB/s that a rank can send, and receive at the same time.
    progress : bool
        Whether to show progress on the standard error: a bar, or lines where that is no terminal.

    Returns
    -------
    Simulation
        scenarios : list of Scenario. For each number of slots first "stay", which never moves anything, then every
        algorithm with every interval and every number of `once_after`.
        best : the Scenario that takes least time, moves included where their time is known; the first of equals. With
        two steps or more its time is ``held_out``.

        A Scenario has ``algorithm``, ``num_replicas``, ``interval`` (None for "stay") and ``then_stays``, and

        balancedness : float64 [steps, L], the mean load of ranks over that of the busiest.
        rank_load : float64 [steps, R], load of a rank over the mean, all layers together.
        step_time : float64 [steps], the busiest ranks' loads over the mean loads, each summed over layers: the time of
        a step if ranks wait for each other in every layer, 1 if perfectly balanced. ``time`` is the same over all
        steps together.
        held_out : the time of the second half of the steps alone, whose placements know only steps before: with
        interval 0, that which the first half gives. None if there is one step, or no load in the second half.
        bytes_per_rank : weights on the rank with most slots.
        crossing_gpus, crossing_nodes : float64 [steps], choices whose token and expert are on two ranks, two nodes.
        rebalances : list of Rebalance, with ``step``, ``num_moved``, ``num_across_nodes``, ``busiest_rank``,
        ``move_ms``, ``saved_ms`` and ``pays_after``; the last three against staying with the location before it, until
        the next rebalance.
        bytes_moved, move_ms : all rebalances together. saved_ms : against "stay", moves not counted.
        pays_after : steps after which ``saved_ms``, as large at each step since the first rebalance, outweighs
        ``move_ms``; 0 if nothing moved, None if never or if there was no rebalance. More than there were steps means:
        not within these.
        location : where experts should be for what comes next, by the loads of the last interval, or where they stay.

        What needs `bytes_per_expert` or `step_ms` is None without.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        What `rebalance_experts` refuses; loads that are all 0; a `current` of other sizes; an interval that is not
        shorter than the trace.

    Notes
    -----
    Replicas of an expert have equal shares of its load, as for `balancedness`. Each takes tokens of its own rank
    first, then of its node, then the others: of an expert's load, what stays on ranks is the sum over ranks of the
    smaller of the tokens there and the share there, and the same with nodes. It is the least that equal shares allow.

    A move takes ``busiest_rank * bytes_per_expert / bandwidth``: the rank that sends or receives most, at full
    bandwidth, nothing else going on meanwhile. A rank receives an expert once (`plan_migration`).

    "refined" is given the location before as `current`, and makes a forecast from the steps of an interval.

    Examples
    --------
    Experts 0 and 1 have all the load and share a rank until the second step:

    >>> import numpy as np
    >>> loads = np.tile([6.0, 6.0, 0.0, 0.0], (3, 1, 1))
    >>> found = simulate(loads, 4, 1, 1, 2, algorithms=["refined"], intervals=[1], bytes_per_expert=10**9, step_ms=15)
    >>> [(scenario.name, scenario.step_time.tolist()) for scenario in found.scenarios]
    [('stay, 4 slots', [2.0, 2.0, 2.0]), ('refined, 4 slots, every 1 step', [2.0, 1.0, 1.0])]
    >>> found.best.rebalances[0]
    Rebalance(step=1, num_moved=2, num_across_nodes=0, busiest_rank=1, move_ms=20.0, saved_ms=15.0, pays_after=2)
    >>> found.best.bytes_moved, found.best.move_ms, found.best.pays_after
    (2000000000, 20.0, 2)
    """
    loads = check_loads("weight", weight, (2, 3, 4))
    loads = loads[None] if loads.ndim == 2 else loads
    num_steps = len(loads)
    checks.holds("weight", "above 0 somewhere", bool(loads.any()), "0 everywhere")
    sizes = num_replicas if isinstance(num_replicas, Sequence) else [num_replicas]
    checks.holds("num_replicas", "one number or more", len(sizes) > 0, "none")
    num_gpus = checks.integer("num_gpus", num_gpus, 1)
    num_nodes = checks.integer("num_nodes", num_nodes, 1, num_gpus, f"num_gpus = {num_gpus}")
    if loads.ndim == 4:
        checks.holds("weight", f"of {num_gpus} ranks", loads.shape[3] == num_gpus, f"shape {loads.shape}")
    for name, values in {"algorithms": algorithms, "intervals": intervals, "once_after": once_after}.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"`{name}` must be a sequence, got {type(values).__name__}")
    for algorithm in algorithms:
        checks.choice("algorithms", algorithm, ALGORITHMS)
    because = f"the number of steps - 1 = {num_steps - 1}"
    intervals = [checks.integer("intervals", interval, 0, num_steps - 1, because) for interval in intervals]
    once_after = [checks.integer("once_after", steps, 1, num_steps - 1, because) for steps in once_after]
    if bytes_per_expert is not None:
        bytes_per_expert = checks.integer("bytes_per_expert", bytes_per_expert, 1, sys.maxsize)
    for name, value in {"step_ms": step_ms, "bandwidth": bandwidth}.items():
        if value is not None:
            checks.number(name, value)
            checks.holds(name, "above 0", value > 0, value)
    if current is not None:
        checks.instance("current", current, ExpertLocation)
        everywhere = bool((current.physical_to_logical_map >= 0).all())
        checks.holds("current", "a location with experts on every rank", everywhere, current)

    policies = [(interval, False) for interval in intervals] + [(steps, True) for steps in once_after]
    tried = [(algorithm, *policy) for algorithm in algorithms for policy in policies]
    trace = _Trace(loads, num_groups, max_moves, step_ms, bytes_per_expert, bandwidth, lambda: None)
    placed = sum(len(trace.begins(interval, once)) + (not once) for _, interval, once in tried)
    shown = ticking(len(sizes) * loads.shape[1] * placed, "layer") if progress else contextlib.nullcontext(trace.tick)
    with shown as tick:
        scenarios = _scenarios(trace._replace(tick=tick), sizes, (num_gpus, num_nodes), current, tried)
    return Simulation(scenarios, min(scenarios, key=trace.cost))


def _scenarios(
    trace: _Trace, sizes: Sequence[int], places: tuple[int, int], current: ExpertLocation | None, tried: list[Any]
) -> list[Scenario]:
    """Replay a trace with each number of slots: staying, and then all that is tried."""
    scenarios: list[Scenario] = []
    num_layers, num_experts = trace.loads.shape[1:3]
    num_gpus, num_nodes = places
    for size in sizes:
        start = current
        if start is None:
            start = ExpertLocation.trivial(num_layers, num_experts, size, num_gpus=num_gpus, num_nodes=num_nodes)
        found = start.num_layers, start.num_logical_experts, start.num_physical_experts, start.num_gpus, start.num_nodes
        wanted = num_layers, num_experts, size, num_gpus, num_nodes
        checks.holds("current", f"of (layers, experts, slots, ranks, nodes) = {wanted}", found == wanted, found)
        stay = trace.run(start)
        scenarios.append(stay)
        for algorithm, interval, then_stays in tried:
            scenarios.append(trace.run(start, stay, algorithm, interval, then_stays))
    return scenarios
