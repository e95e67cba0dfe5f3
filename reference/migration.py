"""Choose the source of each slot's weights when experts move, and who exchanges weights with whom at a time.

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


def preserve_intragpu_slots(old: Any, new: Any) -> np.ndarray:
    """Put the experts of each rank into its slots so that those which stay on it stay in their slots.

    Parameters
    ----------
    old, new
        Where the experts are, and on which ranks they will be.

    Returns
    -------
    np.ndarray
        int64 [L, P], the expert of each slot: each rank has the experts that it has in `new`.

    Notes
    -----
    Slots are served in order; the experts that are new to a rank keep their order.

    Examples
    --------
    The second rank keeps expert 3 in its last slot:

    >>> class Location:
    ...     rank_of_slot = np.array([0, 0, 1, 1])
    ...     def __init__(self, places):
    ...         self.physical_to_logical_map = np.array(places)
    >>> preserve_intragpu_slots(Location([[0, 1, 2, 3]]), Location([[2, 1, 3, 0]]))
    array([[2, 1, 0, 3]])
    """
    places = new.physical_to_logical_map.copy()
    num_slots = np.bincount(old.rank_of_slot).tolist()
    for layer, before in enumerate(old.physical_to_logical_map.tolist()):
        after, end = places[layer].tolist(), 0
        for count in num_slots:
            begin, end = end, end + count
            slots = [slot for slot in range(begin, end) if after[slot] != before[slot]]
            coming, free = [after[slot] for slot in slots], []
            for slot in slots:
                if before[slot] in coming:
                    coming.remove(before[slot])
                    after[slot] = before[slot]
                else:
                    free.append(slot)
            for slot, expert in zip(free, coming, strict=True):
                after[slot] = expert
        places[layer] = after
    return places


def pair_ranks(size: np.ndarray) -> np.ndarray:
    """Divide what ranks send each other into rounds, in which each rank has one peer at most.

    Parameters
    ----------
    size
        int [R, R], what goes from each rank to each rank, in bytes or any other unit.

    Returns
    -------
    np.ndarray
        int64 [R, R], symmetric: the round in which two ranks exchange all that they have for each other, -1 for none.

    Notes
    -----
    Pairs take the first round in which both ranks are free, those with most to send in one direction first. Equal ones
    go by the turns of a round-robin tournament: if all ranks have equally much for all others, there are as few rounds
    as there can be. Where no rank has more than n peers, there are at most 2 n - 1 rounds.

    Examples
    --------
    Ranks 0 and 1 have most for each other. Ranks 2 and 3 exchange in the same round:

    >>> pair_ranks(np.array([[0, 9, 0, 1], [0, 0, 1, 0], [0, 0, 0, 4], [1, 0, 0, 0]]))
    array([[-1,  0, -1,  1],
           [ 0, -1,  1, -1],
           [-1,  1, -1,  0],
           [ 1, -1,  0, -1]])
    """
    num_ranks = len(size)
    most = np.triu(np.maximum(size, size.T), 1)
    low, high = np.nonzero(most)
    num_turns = num_ranks - 1 + num_ranks % 2
    turn = np.where(high == num_turns, 2 * low, low + high) % num_turns
    order = np.lexsort((low, turn, -most[low, high]))
    rounds = np.full(size.shape, -1)
    taken: list[set[int]] = [set() for _ in range(num_ranks)]
    for one, other in zip(low[order], high[order], strict=True):
        number = next(n for n in range(2 * num_ranks) if n not in taken[one] | taken[other])
        taken[one].add(number)
        taken[other].add(number)
        rounds[one, other] = rounds[other, one] = number
    return rounds
