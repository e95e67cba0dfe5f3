"""Choose the source of each slot's weights when experts move.

A location here is any object with these maps of an `ExpertLocation`: `physical_to_logical_map` [L, P], `rank_of_slot`
[P] and `node_of_slot` [P].
"""

from typing import Any

import numpy as np


def plan_migration(old: Any, new: Any, layer: int) -> np.ndarray:
    """Choose, for each slot of a layer, the slot that sends its weights.

    Parameters
    ----------
    old, new
        Where the experts are, and where they will be.
    layer
        Number of the layer.

    Returns
    -------
    np.ndarray
        int64 [P], slots of `old`: the slot's own number if its expert stays, -1 if the slot will hold no expert.

    Notes
    -----
    The source is the first of these that holds the expert: the slot itself, the lowest slot of its rank, a slot of its
    node, any other slot. Slots are served in order. Of several other ranks, the one that sends least in this layer so
    far sends its lowest slot. A tie goes to the next rank after the receiver, cyclically. Slots of a rank that need the
    same expert have the same source, so a rank receives each expert once.

    Examples
    --------
    Experts 0 and 3 exchange their slots, 0 and 3:

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
