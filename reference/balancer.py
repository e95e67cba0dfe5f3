"""Decide which layers are worth moving: what a better location gains, against what it costs to get there.

A location here is any object with these maps of an `ExpertLocation`: `physical_to_logical_map` [L, P] and
`rank_of_slot` [P].
"""

from typing import Any

import numpy as np
from numba_moe.reference.rebalance import rank_loads


def layers_worth_moving(
    weight: np.ndarray, old: Any, new: Any, *, min_gain: float = 0.0, move_cost: float = 0.0
) -> np.ndarray:
    """Choose the layers whose experts should move, those that gain most first.

    Parameters
    ----------
    weight
        [L, E], loads of experts over the time that the new location will be in force.
    old, new
        Where the experts are, and where they would be.
    min_gain
        What a layer has to gain at least, as a share of the load of its busiest rank.
    move_cost
        What it costs to fill a slot, in the unit of `weight`. Ranks fill their slots at the same time.

    Returns
    -------
    np.ndarray
        int64, numbers of layers. Of layers that gain equally the lower is first.

    Notes
    -----
    A layer gains what the load of its busiest rank falls by. It costs `move_cost` for each slot that gets another
    expert, on the rank that has most of them. A layer moves if it gains more than it costs, and at least `min_gain`.

    Examples
    --------
    Both layers gain by the exchange of experts 1 and 2, 6 of 12 tokens and 1 of 11:

    >>> class Location:
    ...     rank_of_slot = np.array([0, 0, 1, 1])
    ...     def __init__(self, places):
    ...         self.physical_to_logical_map = np.array(places)
    >>> old, new = Location([[0, 1, 2, 3]] * 2), Location([[0, 2, 1, 3]] * 2)
    >>> weight = np.array([[6, 6, 0, 0], [6, 5, 4, 5]])
    >>> layers_worth_moving(weight, old, new), layers_worth_moving(weight, old, new, min_gain=0.1)
    (array([0, 1]), array([0]))
    >>> layers_worth_moving(weight, old, new, move_cost=6)
    array([], dtype=int64)
    """
    num_ranks, sizes = int(old.rank_of_slot[-1]) + 1, np.bincount(old.rank_of_slot)
    before, after = (
        rank_loads(weight, place.physical_to_logical_map, num_ranks, slots_per_rank=sizes).max(axis=1)
        for place in (old, new)
    )
    first_slot = np.cumsum(sizes) - sizes
    filled = (old.physical_to_logical_map != new.physical_to_logical_map) & (new.physical_to_logical_map >= 0)
    num_filled = np.add.reduceat(filled.astype(int), first_slot, axis=1).max(axis=1)
    gain, cost = before - after, move_cost * num_filled
    chosen = (gain > cost) & (gain >= min_gain * before)
    order = np.argsort(cost - gain, kind="stable")
    return order[chosen[order]]
