"""Where experts should live: `rebalance_experts`, and how balanced ranks are.

Layers are independent: threads take them in turn and run the compiled functions of `search` on them, which hold no
lock. Those are imported, and Numba with them, when they are first needed.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from numba_moe.reference import rebalance as reference
from numba_moe.reference.forecast import forecast
from numba_moe.reference.rebalance import RebalancedExperts
from numba_moe.runtime import checks

ALGORITHMS = ("deepseek", "refined")
OPTIONS = ("max_moves", "current", "active_ranks", "slots_per_rank")  # of "refined"
Tick = Callable[[], object]  # called when a layer is placed


def even_sizes(total: int, num_parts: int) -> np.ndarray:
    sizes = np.full(num_parts, total // num_parts)
    sizes[: total % num_parts] += 1
    return sizes


def check_slots_per_rank(slots_per_rank: Any, num_slots: int, num_gpus: int) -> np.ndarray:
    """Return the slots of each rank, as equal as can be by default."""
    if slots_per_rank is None:
        return even_sizes(num_slots, num_gpus)
    sizes = checks.host_array("slots_per_rank", slots_per_rank, "int64", (1,))
    checks.host_shape("slots_per_rank", sizes, (num_gpus,), "(num_gpus,)")
    checks.every("slots_per_rank", "at least 1", sizes >= 1, sizes, ("rank",))
    checks.holds("slots_per_rank", f"{num_slots} slots together", sizes.sum() == num_slots, sizes.sum())
    return sizes


def check_map(argument: str, places: np.ndarray, num_experts: int, rank_of_slot: np.ndarray) -> None:
    """Check that every expert of a layer has a slot, and every rank experts in all of its slots or in none."""
    rule = f"-1 or an expert in [0, num_experts = {num_experts})"
    checks.every(argument, rule, (places >= -1) & (places < num_experts), places, ("layer", "slot"))
    first_of_rank = places[:, np.searchsorted(rank_of_slot, rank_of_slot)]
    same = (places < 0) == (first_of_rank < 0)
    checks.every(argument, "-1 in all slots of a rank or in none", same, places, ("layer", "slot"))
    count = count_replicas(places, num_experts)
    checks.every(argument, "a map with slots for every expert", count > 0, count, ("layer", "expert"))


def check_loads(argument: str, weight: Any, ndims: Sequence[int] = (2, 3)) -> np.ndarray:
    loads = checks.host_array(argument, weight, "float64", ndims)
    axes = ("step", "layer", "expert", "rank")[loads.ndim == 2 :][: loads.ndim]
    checks.every(argument, "finite", np.isfinite(loads), loads, axes)
    checks.every(argument, "at least 0", loads >= 0, loads, axes)
    with np.errstate(over="ignore"):
        total = loads.sum()
    checks.holds(argument, "loads whose sum float64 holds", bool(np.isfinite(total)), total)
    return loads


def count_replicas(places: np.ndarray, num_experts: int) -> np.ndarray:
    """Return the slots of each expert [L, E]."""
    layers, slots = np.nonzero(places >= 0)
    experts = layers * num_experts + places[layers, slots]
    return np.bincount(experts, minlength=len(places) * num_experts).reshape(len(places), num_experts)


def slots_of_experts(places: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots of each expert [L, E, P - E + 1], ascending and padded with -1, and their number [L, E]."""
    num_layers, num_slots = places.shape
    slots = np.full((num_layers, num_experts, num_slots - num_experts + 1), -1)
    count = count_replicas(places, num_experts)
    by_expert = np.argsort(places, axis=1, kind="stable")
    experts = np.take_along_axis(places, by_expert, axis=1)
    first = np.cumsum(count, axis=1) - count + (places < 0).sum(axis=1, keepdims=True)
    layers, columns = np.nonzero(experts >= 0)
    experts = experts[layers, columns]
    slots[layers, experts, columns - first[layers, experts]] = by_expert[layers, columns]
    return slots, count


def in_threads(
    function: Callable[..., None], num_layers: int, before: tuple[Any, ...], after: tuple[Any, ...], tick: Tick
) -> None:
    """Call a compiled function for every layer, on one thread for each CPU of this process; tick for each layer."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cpus, num_layers)) as pool:
        for done in [pool.submit(function, *before, layer, *after) for layer in range(num_layers)]:
            done.result()
            tick()


def _deepseek(
    weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, tick: Tick
) -> np.ndarray:
    from numba_moe.placement import search

    places = np.empty((len(weight), num_replicas), np.int64)
    in_threads(search.deepseek_layer, len(weight), (weight, num_groups, num_nodes, num_gpus), (places,), tick)
    return places


def _refined(
    steps: np.ndarray,
    sizes: np.ndarray,
    num_groups: int,
    num_nodes: int,
    active: np.ndarray,
    current: np.ndarray | None,
    max_moves: int | None,
    tick: Tick,
) -> np.ndarray:
    from numba_moe.placement import search

    num_layers, num_experts = steps.shape[1:]
    num_slots, num_gpus = int(sizes.sum()), len(sizes)
    machine = search.Machine(
        np.repeat(np.arange(num_gpus), sizes),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.repeat(np.arange(num_nodes), even_sizes(num_gpus, num_nodes)),
        active.copy(),
        np.repeat(np.arange(num_groups), even_sizes(num_experts, num_groups)),
        num_groups,
        num_nodes,
    )
    divides = num_gpus % num_nodes == num_experts % num_groups == 0
    regular = bool(divides and active.all() and sizes.min() == sizes.max())
    # Copies, because Numba would compile again for arrays that cannot be written.
    now = np.full((num_layers, num_slots), -1) if current is None else current.copy()
    limit = -1 if max_moves is None else max_moves
    places = np.empty((num_layers, num_slots), np.int64)
    missing = np.zeros(num_layers, np.int64)
    loads, risk = (part.transpose(1, 0, 2).copy() for part in forecast(steps, num_slots, num_gpus))
    before = (loads, risk, machine, regular, now, limit)
    in_threads(search.refine_layer, num_layers, before, (places, missing), tick)
    if missing.any():
        rule = f"at least {missing[missing > 0][0]}, the slots that have to change"
        checks.holds("max_moves", rule, False, max_moves)
    return places


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    algorithm: str = "deepseek",
    max_moves: int | None = None,
    current: Any = None,
    active_ranks: Any = None,
    slots_per_rank: Any = None,
) -> RebalancedExperts:
    """Choose the expert of every slot so that the loads of the ranks are as equal as possible.

    Parameters
    ----------
    weight : array of numbers, shape [L, E] or [steps, L, E]
        Load of each expert of each layer, in tokens or any other unit; none negative. From steps, in the order of
        time, "refined" makes a forecast of the next ones; "deepseek" takes their sum.
    num_replicas : int
        Slots of a layer (P), at least one for each expert.
    num_groups : int
        Groups of consecutive experts. If `num_nodes` divides it, the experts of a group stay on one node; otherwise
        groups and nodes are ignored. 1 where the model routes without groups.
    num_nodes : int
        Nodes; consecutive ranks form a node.
    num_gpus : int
        Ranks of all nodes together (R).
    algorithm : str
        "deepseek", the published algorithm; or "refined", at least as balanced on every layer, for any sizes.
    max_moves : int, optional
        For "refined": most slots of a layer whose expert may differ from `current`.
    current : ExpertLocation or array of int, shape [L, P], optional
        For "refined": the expert of each slot now, -1 throughout a rank without experts. An expert that stays on its
        rank stays in its slot.
    active_ranks : array of bool, shape [R], optional
        For "refined": ranks that hold experts; all by default.
    slots_per_rank : array of int, shape [R], optional
        For "refined": slots of each rank, P together; by default as equal as can be, larger ranks first.

    Returns
    -------
    RebalancedExperts
        physical_to_logical_map : int64 [L, P], the expert of each slot, -1 on ranks that are not active.
        logical_to_all_physical_map : int64 [L, E, P - E + 1], the slots of each expert, ascending, padded with -1.
        logical_to_all_physical_map_num_valid : int64 [L, E], their number.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype; no integer where one is due.
    ValueError
        Loads that are negative or not finite, fewer slots than experts or ranks, a map with holes; sizes that do not
        divide, or an option of "refined", with "deepseek"; fewer `max_moves` than it takes to give every expert and
        every slot of an active rank the other.

    Notes
    -----
    A replica has an equal share of its expert's load. "deepseek" is the algorithm of deepseek-ai/EPLB in float64 with
    ties defined: the lower expert, group or rank wins.

    "refined" lowers the load of the busiest rank. It is never above that of "deepseek" where that applies, nor above
    that of `current` with `max_moves`. Fewer than 8 steps count by their sum. From more, it forecasts the mean of each
    expert, recent steps counting more if the loads drift, the cost of its variance, and up to 3 kinds of steps if
    there are any (`reference.forecast`): its placement is for the next steps, and others fit the recorded ones
    better. "Never above" is then said of the forecast. A rank holds an expert
    twice only if it has more slots than there are experts for it, if `max_moves` leaves no choice, or where all that
    was found without is less balanced than the placement of "deepseek" or `current` that does. Groups stay on nodes
    if each node has the slots for its share of them; with `max_moves`, if they are on one node in `current`.

    Results are the same at every run and with any number of threads. Runs on all CPUs of the process without Python's
    lock. The first call compiles, 5 s for "deepseek" and 25 s for "refined"; Numba keeps the code for later processes
    (in NUMBA_CACHE_DIR or beside the package; NUMBA_MOE_CACHE=0 turns that off).

    Examples
    --------
    The spare slot goes to expert 0, the first of the busiest experts. The heaviest replica, of expert 1, is placed
    first:

    >>> import numpy as np
    >>> weight = np.array([[8.0, 8.0, 4.0]])
    >>> placed = rebalance_experts(weight, 4, num_groups=1, num_nodes=1, num_gpus=2)
    >>> placed.physical_to_logical_map
    array([[1, 0, 0, 2]])
    >>> placed.logical_to_all_physical_map
    array([[[ 1,  2],
            [ 0, -1],
            [ 3, -1]]])
    >>> rank_loads(weight, placed.physical_to_logical_map, num_gpus=2)
    array([[12.,  8.]])

    The loads are equal if the spare slot goes to expert 2:

    >>> placed = rebalance_experts(weight, 4, 1, 1, 2, algorithm="refined")
    >>> placed.physical_to_logical_map, rank_loads(weight, placed.physical_to_logical_map, 2)
    (array([[1, 2, 0, 2]]), array([[10., 10.]]))
    """
    options = {"max_moves": max_moves, "current": current}
    options |= {"active_ranks": active_ranks, "slots_per_rank": slots_per_rank}
    return place(weight, num_replicas, num_groups, num_nodes, num_gpus, algorithm, options)


def place(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    algorithm: str,
    options: dict[str, Any],
    tick: Tick = lambda: None,
) -> RebalancedExperts:
    """Do the work of `rebalance_experts`, and tick for each layer."""
    checks.choice("algorithm", algorithm, ALGORITHMS)
    loads = check_loads("weight", weight)
    num_layers, num_experts = loads.shape[-2:]
    num_replicas = checks.integer("num_replicas", num_replicas, 1)
    checks.at_least("num_replicas", num_replicas, num_experts, "num_experts")
    num_gpus = checks.integer("num_gpus", num_gpus, 1, num_replicas, f"num_replicas = {num_replicas}")
    num_nodes = checks.integer("num_nodes", num_nodes, 1, num_gpus, f"num_gpus = {num_gpus}")
    num_groups = checks.integer("num_groups", num_groups, 1, num_experts, f"num_experts = {num_experts}")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    steps = loads.reshape(-1, num_layers, num_experts)

    if algorithm == "deepseek":
        for name, value in options.items():
            checks.holds(name, "None with the algorithm 'deepseek'", value is None, type(value).__name__)
        checks.divides("num_gpus", num_gpus, "num_replicas", num_replicas)
        checks.divides("num_nodes", num_nodes, "num_gpus", num_gpus)
        checks.divides("num_groups", num_groups, "num_experts", num_experts)
        total = np.cumsum(steps, axis=0)[-1].copy()
        places = _deepseek(total, num_replicas, num_groups, num_nodes, num_gpus, tick)
    else:
        max_moves, current, active_ranks, slots_per_rank = (options.get(name) for name in OPTIONS)
        sizes = check_slots_per_rank(slots_per_rank, num_replicas, num_gpus)
        rank_of_slot = np.repeat(np.arange(num_gpus), sizes)
        active = np.ones(num_gpus, bool)
        if active_ranks is not None:
            active = checks.host_array("active_ranks", active_ranks, "bool", (1,))
            checks.host_shape("active_ranks", active, (num_gpus,), "(num_gpus,)")
            num_active = int(sizes[active].sum())
            checks.at_least("active_ranks", num_active, num_experts, "ranks with slots for num_experts")
        if max_moves is not None:
            max_moves = checks.integer("max_moves", max_moves, 0)
            checks.holds("current", "given with `max_moves`", current is not None, None)
        if current is not None:
            current = getattr(current, "physical_to_logical_map", current)
            current = checks.host_array("current", current, "int64", (2,))
            checks.host_shape("current", current, (num_layers, num_replicas), "(num_layers, num_replicas)")
            check_map("current", current, num_experts, rank_of_slot)
        places = _refined(steps, sizes, num_groups, num_nodes, active, current, max_moves, tick)
    return RebalancedExperts(places, *slots_of_experts(places, num_experts))


def _check_placed(weight: Any, physical_to_logical_map: Any, num_gpus: int, slots_per_rank: Any) -> tuple[Any, ...]:
    loads = check_loads("weight", weight)
    places = checks.host_array("physical_to_logical_map", physical_to_logical_map, "int64", (2,))
    num_layers, num_slots = places.shape
    checks.holds("weight", f"of {num_layers} layers", loads.shape[-2] == num_layers, f"shape {loads.shape}")
    num_gpus = checks.integer("num_gpus", num_gpus, 1, num_slots, f"the number of slots = {num_slots}")
    sizes = check_slots_per_rank(slots_per_rank, num_slots, num_gpus)
    check_map("physical_to_logical_map", places, loads.shape[-1], np.repeat(np.arange(num_gpus), sizes))
    return loads, places, num_gpus, sizes


def rank_loads(weight: Any, physical_to_logical_map: Any, num_gpus: int, *, slots_per_rank: Any = None) -> np.ndarray:
    """Sum the loads of the slots of each rank.

    Parameters
    ----------
    weight : array of numbers, shape [L, E] or [steps, L, E]
        Load of each expert of each layer.
    physical_to_logical_map : array of int, shape [L, P]
        The expert of each slot, -1 throughout a rank without experts.
    num_gpus : int
        Ranks (R).
    slots_per_rank : array of int, shape [R], optional
        Slots of each rank, as equal as can be by default.

    Returns
    -------
    np.ndarray
        float64 [L, R] or [steps, L, R], in the unit of `weight`.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Loads that are negative or not finite, a map with holes, sizes that do not agree.

    Notes
    -----
    Slots of an expert share its load equally and add up in slot order, in float64.

    Examples
    --------
    >>> import numpy as np
    >>> rank_loads(np.array([[6.0, 3.0]]), np.array([[0, 1, 0]]), num_gpus=2)
    array([[6., 3.]])
    """
    loads, places, num_gpus, sizes = _check_placed(weight, physical_to_logical_map, num_gpus, slots_per_rank)
    return reference.rank_loads(loads, places, num_gpus, slots_per_rank=sizes)


def balancedness(weight: Any, physical_to_logical_map: Any, num_gpus: int, *, slots_per_rank: Any = None) -> np.ndarray:
    """Return, for each layer, the mean load of the ranks divided by the load of the busiest rank.

    Parameters
    ----------
    weight, physical_to_logical_map, num_gpus, slots_per_rank : as in `rank_loads`
        Loads of experts, and the slots and ranks that they are in.

    Returns
    -------
    np.ndarray
        float64 [L] or [steps, L]: ``(mean + 1e-5) / (max + 1e-5)``, which is 1 for perfect balance.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Loads that are negative or not finite, a map with holes, sizes that do not agree.

    Notes
    -----
    A rank without experts in a layer is not counted. The definition is SGLang's.

    Examples
    --------
    >>> import numpy as np
    >>> balancedness(np.array([[6.0, 3.0], [0.0, 0.0]]), np.array([[0, 1, 0], [0, 0, 1]]), num_gpus=2).round(4)
    array([0.75, 1.  ])
    """
    loads, places, num_gpus, sizes = _check_placed(weight, physical_to_logical_map, num_gpus, slots_per_rank)
    return reference.balancedness(loads, places, num_gpus, slots_per_rank=sizes)
