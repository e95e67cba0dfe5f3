"""Count the slots of each expert, and sum the counts to find where each expert's rows begin."""

import numpy as np


def expert_of_slots(topk_ids: np.ndarray, num_experts: int, expert_map: np.ndarray | None = None) -> np.ndarray:
    """Return the expert of each slot after the map, -1 for a skipped slot.

    A slot is a flattened (token, k) pair. It is skipped if its id is outside ``[0, num_experts)``, or if the map gives
    it an id outside, usually -1, because its expert is on another rank.

    >>> expert_of_slots(np.array([[0, 2], [-1, 9]]), 3)
    array([ 0,  2, -1, -1])
    >>> expert_of_slots(np.array([[0, 2], [1, 0]]), 3, expert_map=np.array([-1, 0, 1]))
    array([-1,  1,  0, -1])
    """
    ids = topk_ids.reshape(-1).astype(np.int64)
    known = (ids >= 0) & (ids < num_experts)
    experts = np.where(known, ids, -1)
    if expert_map is not None:
        local = expert_map[experts].astype(np.int64)
        experts = np.where(known & (local >= 0) & (local < num_experts), local, -1)
    return experts


def count_tokens_per_expert(topk_ids: np.ndarray, num_experts: int, expert_map: np.ndarray | None = None) -> np.ndarray:
    """Count the slots of each expert.

    Parameters
    ----------
    topk_ids
        int32 or int64 [num_slots] or [num_tokens, top_k]; ids outside ``[0, num_experts)`` are skipped.
    num_experts
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    expert_map
        int32 or int64 [num_experts]: the id under which this rank counts each expert, -1 for an expert that it does not
        count.

    Returns
    -------
    np.ndarray
        int32 [num_experts].

    Examples
    --------
    >>> count_tokens_per_expert(np.array([[0, 2], [2, -1]]), 4)
    array([1, 0, 2, 0], dtype=int32)
    """
    experts = expert_of_slots(topk_ids, num_experts, expert_map)
    return np.bincount(experts[experts >= 0], minlength=num_experts).astype(np.int32)


def expert_offsets(counts: np.ndarray, alignment: int = 1) -> np.ndarray:
    """Sum the counts of the experts before each expert, after rounding each count up to a multiple of `alignment`.

    Parameters
    ----------
    counts
        int32 or int64 [num_experts], each at least 0.
    alignment
        The rows of an expert are padded to a multiple of this. An expert without rows gets no padding.

    Returns
    -------
    np.ndarray
        int64 [num_experts + 1]: expert e has the rows from ``offsets[e]`` up to ``offsets[e + 1]``.

    Examples
    --------
    >>> expert_offsets(np.array([3, 0, 5]))
    array([0, 3, 3, 8])
    >>> expert_offsets(np.array([3, 0, 5]), alignment=4)
    array([ 0,  4,  4, 12])
    """
    padded = -(-counts.astype(np.int64) // alignment) * alignment
    return np.concatenate([[0], np.cumsum(padded)])
