"""Which slot gets its weights from where when experts move.

Anything with the maps of an `ExpertLocation` is a location here: `physical_to_logical_map` [L, P], `rank_of_slot` [P]
and `node_of_slot` [P].
"""

from typing import Any

import numpy as np


def plan_migration(old: Any, new: Any, layer: int) -> np.ndarray:
    """Choose the slot that each slot of a layer gets its weights from.

    Parameters
    ----------
    old, new
        Where experts are and where they shall be.
    layer
        The layer.

    Returns
    -------
    np.ndarray
        int64 [P], slots of `old`: a slot's own number if its expert stays, -1 if it shall hold none.

    Notes
    -----
    The first of these that there is: the slot itself; a slot of its rank, the lowest; one of its node; any other.
    Among the slots of other ranks, that of the rank which sends least in this layer so far, slots being served in
    order; of equals the next rank after the receiving one, cyclically, and its lowest slot. Slots of a rank that need
    the same expert name the same source, so a rank receives it once.

    Examples
    --------
    Expert 0 is in slot 0 and comes to slot 3, in place of expert 3. Expert 3 moves to slot 0:

    >>> class Location:
    ...     rank_of_slot, node_of_slot = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])
    ...     def __init__(self, places):
    ...         self.physical_to_logical_map = np.array(places)
    >>> plan_migration(Location([[0, 1, 2, 3]]), Location([[3, 1, 2, 0]]), layer=0)
    array([3, 1, 2, 0])
    """
    before = old.physical_to_logical_map[layer].tolist()
    after = new.physical_to_logical_map[layer].tolist()
    ranks, nodes = old.rank_of_slot.tolist(), old.node_of_slot.tolist()
    num_ranks = ranks[-1] + 1
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(before):
        holders.setdefault(expert, []).append(slot)

    sends = [0] * num_ranks
    source_for: dict[tuple[int, int], int] = {}
    source = np.full(len(after), -1)
    for slot, expert in enumerate(after):
        if expert < 0:
            continue
        if before[slot] == expert:
            source[slot] = slot
            continue
        rank = ranks[slot]
        if (rank, expert) not in source_for:
            on_rank = [other for other in holders[expert] if ranks[other] == rank]
            on_node = [other for other in holders[expert] if nodes[other] == nodes[slot]]
            chosen = min(
                on_rank or on_node or holders[expert],
                key=lambda other: (sends[ranks[other]], (ranks[other] - rank) % num_ranks, other),
            )
            if not on_rank:
                sends[ranks[chosen]] += 1
            source_for[rank, expert] = chosen
        source[slot] = source_for[rank, expert]
    return source
