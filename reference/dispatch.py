"""Choose one of the places that hold a slot's expert.

A `location` here is any object with the maps of an `ExpertLocation`.
"""

from typing import Any, NamedTuple

import numpy as np

# Constants of Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) and of Knuth's hash.
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
HASH_MULTIPLIER = 2654435769
WORD = 0xFFFFFFFF


class DispatchTables(NamedTuple):
    """The arguments of `dispatch_ids` that do not change between calls; gating takes them as one."""

    physical_map: Any
    num_valid: Any = None
    algorithm: str = "static"
    seed: int = 0
    step: Any = None


def philox(counter: Any, key: Any) -> tuple[np.ndarray, ...]:
    """Return the four words that Philox4x32-10 computes from four counter words and two key words, elementwise.

    >>> [f"{int(word):08x}" for word in philox((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = (np.asarray(word).astype(np.uint64) & WORD for word in counter)
    for step in range(ROUNDS):
        first, second = (np.uint64((word + step * gain) & WORD) for word, gain in zip(key, KEY_STEPS, strict=True))
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (right >> 32) ^ b ^ first, right & WORD, (left >> 32) ^ d ^ second, left & WORD
    return a, b, c, d


def static_map(location: Any, seed: int = 0, layers: Any = None) -> np.ndarray:
    """Choose for each rank the slot that it sends tokens of an expert to: int64 [L, E, R], of all layers or of some.

    A rank prefers its own slots, then the slots of its node, then all others. The ranks choose in this order: first
    those that hold the expert, then those with the expert on their node, then the rest; each time by rank number. Each
    takes the preferred slot to which the fewest ranks send so far. A tie goes to the slot with the lowest Philox word
    for the counter (slot, layer, 0, 0) and the seed as key. So every rank computes the same map.

    Expert 0 is on both of two ranks, and expert 1 is on the first:

    >>> class Location:
    ...     physical_to_logical_map = np.array([[0, 1, 2, 0]])
    ...     logical_to_all_physical_map = np.array([[[0, 3], [1, -1], [2, -1]]])
    ...     logical_to_all_physical_map_num_valid = np.array([[2, 1, 1]])
    ...     rank_of_slot, node_of_slot = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])
    >>> static_map(Location)
    array([[[0, 3],
            [1, 1],
            [2, 2]]])
    """
    numbers = np.arange(len(location.physical_to_logical_map)) if layers is None else np.asarray(layers, int)
    slots = location.logical_to_all_physical_map[numbers]
    count = location.logical_to_all_physical_map_num_valid[numbers]
    rank_of_slot, node_of_slot = location.rank_of_slot, location.node_of_slot
    ranks = np.arange(rank_of_slot[-1] + 1)
    chosen = np.repeat(slots[:, :, :1], len(ranks), axis=2)

    rows, experts = np.nonzero(count > 1)
    slots = slots[rows, experts, : count.max(initial=0)]  # [experts with several, replicas]
    pairs = np.arange(len(slots))
    node_of_rank = node_of_slot[np.searchsorted(rank_of_slot, ranks)]
    words = philox((np.arange(len(rank_of_slot)), numbers[:, None], 0, 0), (seed & WORD, seed >> 32))[0]
    tie = words[rows[:, None], slots].astype(np.int64)
    senders = np.zeros(slots.shape, np.int64)
    for distance in range(3):
        for rank in ranks:
            away = (rank_of_slot[slots] != rank).astype(int) + (node_of_slot[slots] != node_of_rank[rank])
            away[slots < 0] = 3
            order = np.where(away == distance, (senders << 32) + tie, np.iinfo(np.int64).max)
            best = order.argmin(axis=1)
            here = away.min(axis=1, initial=3) == distance
            chosen[rows[here], experts[here], rank] = slots[pairs, best][here]
            senders[pairs[here], best[here]] += 1
    return chosen


def dispatch_map(
    location: Any, rank: int, algorithm: str, seed: int = 0, layers: Any = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the `physical_map` and `num_valid` of `dispatch_ids` on a rank, int32 with one row for each layer given.

    - "static": the map is [L, E], the rank's part of `static_map`.
    - "dynamic" and "hash": the map is [L, E, X], the slots of each expert, rotated so that ranks begin at different
      ones.
    - "fake": the map is [L, P], the slots that hold experts, repeated to fill the row. The first slot of every rank
      comes before the second of every rank, and so on, and each rank begins elsewhere.
    """
    if algorithm == "static":
        return static_map(location, seed, layers)[:, :, rank].astype(np.int32), None
    rank_of_slot, numbers = location.rank_of_slot, slice(None) if layers is None else layers
    if algorithm == "fake":
        num_ranks = rank_of_slot[-1] + 1
        position = np.arange(len(rank_of_slot)) - np.searchsorted(rank_of_slot, rank_of_slot)
        order = np.lexsort((rank_of_slot, position))
        rows = []
        for places in location.physical_to_logical_map[numbers]:
            held = order[places[order] >= 0]
            rows.append(np.resize(np.roll(held, -(rank * len(held) // num_ranks)), len(order)))
        return np.stack(rows).astype(np.int32), None
    slots = location.logical_to_all_physical_map[numbers]
    count = location.logical_to_all_physical_map_num_valid[numbers][:, :, None]
    column = np.arange(slots.shape[2])
    turned = np.where(column < count, (column + rank) % count, column)
    return np.take_along_axis(slots, turned, axis=2).astype(np.int32), count[:, :, 0].astype(np.int32)


def dispatch_ids(
    topk_ids: np.ndarray,
    physical_map: np.ndarray,
    num_valid: np.ndarray | None = None,
    *,
    algorithm: str = "static",
    seed: int = 0,
    step: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Replace the expert of each slot by a physical id: one of the places that hold the expert.

    Parameters
    ----------
    topk_ids
        int32 or int64 [num_slots] or [num_tokens, top_k]. Ids outside ``[0, num_experts)`` become -1.
    physical_map
        int32: for "static" [num_experts], for "dynamic" and "hash" [num_experts, max_replicas], for "fake" [length].
    num_valid
        int32 [num_experts]: with "dynamic" and "hash", the number of places in each row of the map.
    algorithm
        "static", "dynamic", "hash" or "fake".
    seed
        With "dynamic": the key of the random generator, 64 bits.
    step
        int64 [1]: with "dynamic", the part of the generator's counter that is not the slot.
    num_token_non_padded
        int32 or int64 [1] or []: slots of tokens from this one on become -1; in one dimension a slot is a token.
    counts
        int32 or int64 [num_physical], written: 1 is added to the counter of each slot's physical id.
    out
        Memory for the result; it may be `topk_ids` itself.

    Returns
    -------
    np.ndarray
        Physical ids with the shape and dtype of `topk_ids`. A slot gets -1 where the map has a negative number or an
        empty row.

    Notes
    -----
    - static: ``physical_map[expert]``.
    - dynamic: ``physical_map[expert, word * num_valid[expert] >> 32]``. The word is the first word of Philox4x32-10 for
      the counter (slot, 0, low word of step, high word of step) and the key (low word of seed, high word of seed).
    - hash: ``physical_map[expert, token * 2654435769 mod 2**32 mod num_valid[expert]]``. With one dimension each slot
      is a token.
    - fake: ``physical_map[slot % length]`` for any expert. Ids below 0 become -1.

    Examples
    --------
    >>> ids = np.array([[0, 2], [1, -1], [0, 1]], np.int32)
    >>> dispatch_ids(ids, np.array([3, 1, 2], np.int32))
    array([[ 3,  2],
           [ 1, -1],
           [ 3,  1]], dtype=int32)
    >>> replicas, num_valid = np.array([[0, 3], [1, -1], [2, -1]], np.int32), np.array([2, 1, 1], np.int32)
    >>> counts = np.zeros(4, np.int32)
    >>> dispatch_ids(ids, replicas, num_valid, algorithm="dynamic", step=np.array([0]), counts=counts)
    array([[ 0,  2],
           [ 1, -1],
           [ 3,  1]], dtype=int32)
    >>> counts
    array([1, 2, 1, 1], dtype=int32)
    """
    slots = np.arange(topk_ids.size).reshape(topk_ids.shape)
    tokens = slots if topk_ids.ndim == 1 else slots // max(topk_ids.shape[1], 1)
    if algorithm == "fake":
        known = topk_ids >= 0
        found = physical_map[slots % len(physical_map)]
    else:
        known = (topk_ids >= 0) & (topk_ids < len(physical_map))
        experts = np.where(known, topk_ids, 0)
    if algorithm == "static":
        found = physical_map[experts]
    elif algorithm in ("dynamic", "hash"):
        valid = np.clip(num_valid, 0, physical_map.shape[1])[experts]
        if algorithm == "dynamic":
            now = int(step[0])
            words, *_ = philox((slots, 0, now & WORD, now >> 32 & WORD), (seed & WORD, seed >> 32))
            replicas = (words * valid.astype(np.uint64)) >> 32
        else:
            replicas = (tokens * HASH_MULTIPLIER & WORD) % np.maximum(valid, 1)
        known = known & (valid > 0)
        found = physical_map[experts, replicas.astype(np.int64)]
    if num_token_non_padded is not None:
        known = known & (tokens < num_token_non_padded)
    physical = np.where(known & (found >= 0), found, -1)
    if counts is not None:
        kept = physical[(physical >= 0) & (physical < len(counts))]
        counts += np.bincount(kept, minlength=len(counts)).astype(counts.dtype)
    if out is None:
        return physical.astype(topk_ids.dtype)
    out[:] = physical
    return out
