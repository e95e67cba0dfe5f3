"""Choose where experts live: busy experts get replicas, so that all ranks have the same load.

The replicas of an expert share its load equally. `deepseek.py` is the published algorithm, and `refine.py` is ours.
"""

from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.deepseek import deepseek
from numba_moe.reference.forecast import forecast
from numba_moe.reference.refine import Machine, refine


class RebalancedExperts(NamedTuple):
    """The expert of each slot, and the slots of each expert; see `rebalance_experts`."""

    physical_to_logical_map: Any
    logical_to_all_physical_map: Any
    logical_to_all_physical_map_num_valid: Any


def even_sizes(total: int, num_parts: int) -> np.ndarray:
    """Divide a number into parts that differ by at most 1, larger parts first.

    >>> even_sizes(10, 4)
    array([3, 3, 2, 2])
    """
    return total // num_parts + (np.arange(num_parts) < total % num_parts)


def slots_of_experts(physical_to_logical_map: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots of each expert [L, E, X], ascending and padded with -1, and their number [L, E].

    X is P - E + 1, the most slots that an expert can have if every other expert has one.

    >>> slots_of_experts(np.array([[1, 0, 1]]), 2)
    (array([[[ 1, -1],
            [ 0,  2]]]), array([[1, 2]]))
    """
    num_layers, num_slots = physical_to_logical_map.shape
    slots = np.full((num_layers, num_experts, num_slots - num_experts + 1), -1)
    count = np.zeros((num_layers, num_experts), int)
    for (layer, slot), expert in np.ndenumerate(physical_to_logical_map):
        if expert >= 0:
            slots[layer, expert, count[layer, expert]] = slot
            count[layer, expert] += 1
    return slots, count


def rebalance_experts(
    weight: np.ndarray,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    algorithm: str = "deepseek",
    max_moves: int | None = None,
    current: np.ndarray | None = None,
    active_ranks: np.ndarray | None = None,
    slots_per_rank: np.ndarray | None = None,
) -> RebalancedExperts:
    """Choose the expert of every slot so that the loads of the ranks are as equal as possible.

    Parameters
    ----------
    weight
        Loads of experts, [L, E]; or [steps, L, E], in the order of time. From steps, "refined" makes a `forecast`.
    num_replicas
        Number of slots of a layer, P.
    num_groups
        Number of groups of consecutive experts. A group stays on one node if the groups are a multiple of the nodes.
    num_nodes, num_gpus
        Number of nodes, and number of ranks on all nodes together, R.
    algorithm
        "deepseek" or "refined".
    max_moves
        "refined" only: the largest number of slots of a layer that may differ from `current`.
    current
        "refined" only: int [L, P], the current expert of each slot, -1 for none.
    active_ranks
        "refined" only: bool [R], the ranks in use. The slots of other ranks get -1.
    slots_per_rank
        "refined" only: int [R], the number of slots of each rank. By default they differ by at most 1.

    Returns
    -------
    RebalancedExperts
        physical_to_logical_map: int64 [L, P], the expert of each slot. logical_to_all_physical_map: int64 [L, E, X],
        the slots of each expert, ascending, padded with -1, where X is P - E + 1.
        logical_to_all_physical_map_num_valid: int64 [L, E], the number of slots of each expert.

    Notes
    -----
    Loads are float64 and are summed in order of step, slot and expert, so every machine gets the same result.
    "deepseek" is the algorithm of deepseek-ai/EPLB with defined ties: the lower expert, rank or group wins. It sums the
    steps first.

    Examples
    --------
    The spare slot goes to expert 0, the first of the busiest experts. The heaviest replica, of expert 1, is placed
    first:

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
    num_layers, num_experts = weight.shape[-2:]
    steps = weight.astype(np.float64).reshape(-1, num_layers, num_experts)
    if algorithm == "deepseek":
        total = np.cumsum(steps, axis=0)[-1]
        layers = [deepseek(row, num_replicas, num_groups, num_nodes, num_gpus) for row in total]
    else:
        if num_groups % num_nodes:
            num_groups = num_nodes = 1
        sizes = even_sizes(num_replicas, num_gpus) if slots_per_rank is None else np.asarray(slots_per_rank)
        machine = Machine(
            np.repeat(np.arange(num_gpus), sizes),
            np.repeat(np.arange(num_nodes), even_sizes(num_gpus, num_nodes)),
            np.ones(num_gpus, bool) if active_ranks is None else np.asarray(active_ranks),
            np.repeat(np.arange(num_groups), even_sizes(num_experts, num_groups)),
        )
        loads = forecast(steps, num_replicas, num_gpus)
        layers = []
        for layer in range(num_layers):
            now = None if current is None else np.asarray(current)[layer]
            layers.append(refine(loads.weight[:, layer], loads.risk[:, layer], machine, now, max_moves))
    places = np.stack(layers)
    return RebalancedExperts(places, *slots_of_experts(places, num_experts))


def rank_loads(
    weight: np.ndarray, physical_to_logical_map: np.ndarray, num_gpus: int, *, slots_per_rank: np.ndarray | None = None
) -> np.ndarray:
    """Sum the loads of the slots of each rank.

    Parameters
    ----------
    weight
        Loads of experts, [L, E] or [steps, L, E].
    physical_to_logical_map
        int [L, P], the expert of each slot, -1 for none.
    num_gpus
        Number of ranks, R.
    slots_per_rank
        int [R], the number of slots of each rank. By default they differ by at most 1.

    Returns
    -------
    np.ndarray
        float64 [L, R] or [steps, L, R].

    Notes
    -----
    The slots of an expert share its load equally, and loads are summed in slot order. An expert without a slot adds
    nothing.

    Examples
    --------
    >>> rank_loads(np.array([[6.0, 3.0]]), np.array([[0, 1, 0]]), num_gpus=2)
    array([[6., 3.]])
    """
    num_slots, num_experts = physical_to_logical_map.shape[1], weight.shape[-1]
    sizes = even_sizes(num_slots, num_gpus) if slots_per_rank is None else np.asarray(slots_per_rank)
    rank_of_slot = np.repeat(np.arange(num_gpus), sizes)
    loads = np.empty((*weight.shape[:-1], num_gpus))
    for index in np.ndindex(weight.shape[:-1]):
        place = physical_to_logical_map[index[-1]]
        experts, ranks = place[place >= 0], rank_of_slot[place >= 0]
        share = weight[index] / np.maximum(np.bincount(experts, minlength=num_experts), 1)
        loads[index] = np.bincount(ranks, weights=share[experts], minlength=num_gpus)
    return loads


def balancedness(
    weight: np.ndarray, physical_to_logical_map: np.ndarray, num_gpus: int, *, slots_per_rank: np.ndarray | None = None
) -> np.ndarray:
    """Return, for each layer, the mean load of the ranks divided by the load of the busiest rank.

    Parameters
    ----------
    weight
        Loads of experts, [L, E] or [steps, L, E].
    physical_to_logical_map
        int [L, P], the expert of each slot, -1 for none.
    num_gpus
        Number of ranks, R.
    slots_per_rank
        int [R], the number of slots of each rank. By default they differ by at most 1.

    Returns
    -------
    np.ndarray
        float64 [L] or [steps, L]: ``(mean + 1e-5) / (max + 1e-5)``, which is 1 for perfect balance.

    Notes
    -----
    A rank without experts in a layer is not counted. The definition is SGLang's.

    Examples
    --------
    >>> balancedness(np.array([[6.0, 3.0], [0.0, 0.0]]), np.array([[0, 1, 0], [0, 0, 1]]), num_gpus=2).round(4)
    array([0.75, 1.  ])
    """
    loads = rank_loads(weight, physical_to_logical_map, num_gpus, slots_per_rank=slots_per_rank)
    there = rank_loads(np.ones_like(weight), physical_to_logical_map, num_gpus, slots_per_rank=slots_per_rank) > 0
    mean = np.cumsum(loads, axis=-1)[..., -1] / there.sum(axis=-1)
    return (mean + 1e-5) / (loads.max(axis=-1) + 1e-5)
