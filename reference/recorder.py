"""Statistics of chosen experts: counts, loads of experts and ranks, and experts that tokens choose together."""

from typing import Any

import numpy as np


def add_expert_counts(
    topk_ids: np.ndarray, *, counts: np.ndarray, enabled: Any = None, num_tokens: Any = None, first_row: int = 0
) -> np.ndarray:
    """Add the number of slots of each expert to the expert's counter.

    Parameters
    ----------
    topk_ids
        int [num_slots] or [num_tokens, top_k], the expert of each slot.
    counts
        int64 [num_experts], written. Ids outside ``[0, num_experts)`` are not counted.
    enabled
        int32 [1]: nothing is counted if it holds 0.
    num_tokens
        [1]: the number of real tokens of the pass. Later rows are padding.
    first_row
        Number of the first row of `topk_ids` in the pass whose tokens `num_tokens` counts.

    Returns
    -------
    np.ndarray
        `counts`.

    Examples
    --------
    >>> add_expert_counts(np.array([[0, 2], [2, -1], [2, 1]]), counts=np.array([10, 0, 0]))
    array([11,  1,  3])
    """
    if enabled is None or enabled[0]:
        rows = topk_ids if num_tokens is None else topk_ids[: max(int(num_tokens[0]) - first_row, 0)]
        counts += np.bincount(rows[(rows >= 0) & (rows < len(counts))], minlength=len(counts))
    return counts


def held(exact: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """Return int64 sums; raise if one overflowed, which the same sums in float64 (`rounded`) show."""
    if (past := (rounded >= 2.0**63) | ((rounded > 0) & (exact < 0))).any():
        raise ValueError(f"`physical_count` must be small enough for sums to fit int64, got {rounded[past].max():.3g}")
    return exact


def logical_counts(physical_count: np.ndarray, physical_to_logical_map: np.ndarray, num_experts: int) -> np.ndarray:
    """Sum, for each expert, the counts of the slots that hold it.

    Parameters
    ----------
    physical_count
        Counts of slots, [L, P] or [steps, L, P].
    physical_to_logical_map
        [L, P], the expert of each slot. The counts of a slot with -1 are left out.
    num_experts
        Number of experts, E.

    Returns
    -------
    np.ndarray
        int64 [L, E] or [steps, L, E].

    Raises
    ------
    ValueError
        A sum that does not fit int64.

    Examples
    --------
    >>> logical_counts(np.array([[3, 1, 2]]), np.array([[0, 1, 0]]), 2)
    array([[5, 1]])
    """
    exact, rounded = (np.zeros((*physical_count.shape[:-1], num_experts), kind) for kind in (np.int64, np.float64))
    for layer, experts in enumerate(physical_to_logical_map):
        slots = np.argsort(experts, kind="stable")
        slots = slots[(experts[slots] >= 0) & (experts[slots] < num_experts)]
        present, first = np.unique(experts[slots], return_index=True)
        for counts in (exact, rounded):
            of_slots = physical_count[..., layer, slots].astype(counts.dtype)
            counts[..., layer, present] = np.add.reduceat(of_slots, first, axis=-1)
    return held(exact, rounded)


def utilization(physical_count: np.ndarray, num_gpus: int) -> np.ndarray:
    """Return the mean count of the ranks divided by the count of the busiest rank.

    Parameters
    ----------
    physical_count
        Counts of slots, [L, P] or [steps, L, P].
    num_gpus
        Number of ranks. Each has P / num_gpus consecutive slots.

    Returns
    -------
    np.ndarray
        float64 [L] or [steps, L]: ``(mean + 1e-5) / (max + 1e-5)``, which is 1 for perfect balance and for no tokens.

    Examples
    --------
    >>> utilization(np.array([[6, 2, 3, 1]]), 2).round(4)
    array([0.75])
    """
    loads = physical_count.reshape(*physical_count.shape[:-1], num_gpus, -1).sum(axis=-1, dtype=np.float64)
    return (loads.mean(axis=-1) + 1e-5) / (loads.max(axis=-1) + 1e-5)


def expert_entropy(counts: np.ndarray) -> np.ndarray:
    """Return the entropy of the choice of an expert, divided by the entropy of an even choice.

    Parameters
    ----------
    counts
        Counts of experts, [..., E].

    Returns
    -------
    np.ndarray
        float64 [...]: 1 if all experts have equal counts, 0 if one expert has all counts, if all counts are 0, or if E
        is 1.

    Examples
    --------
    >>> expert_entropy(np.array([[5, 5], [0, 7], [0, 0]]))
    array([1., 0., 0.])
    """
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True, dtype=np.float64), 1)
    terms = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1)), 0)
    return np.abs(terms.sum(axis=-1)) / max(np.log(counts.shape[-1]), 1e-300)


def coactivation(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Count the tokens that chose two experts together.

    Parameters
    ----------
    topk_ids
        int [num_tokens, top_k], the experts of each token, distinct in a row. Ids outside ``[0, num_experts)`` are
        skipped.
    num_experts
        Number of experts, E.

    Returns
    -------
    np.ndarray
        int64 [E, E], symmetric; its diagonal counts the tokens of each expert.

    Examples
    --------
    >>> coactivation(np.array([[0, 1], [1, 2], [1, -1]]), 3)
    array([[1, 1, 0],
           [1, 3, 1],
           [0, 1, 1]])
    """
    pairs = np.zeros((num_experts, num_experts), np.int64)
    for row in topk_ids:
        chosen = row[(row >= 0) & (row < num_experts)]
        np.add.at(pairs, np.ix_(chosen, chosen), 1)
    return pairs


def traffic_matrix(physical_count: np.ndarray, num_gpus: int) -> np.ndarray:
    """Count the slots that go from each rank to each rank.

    Parameters
    ----------
    physical_count
        [sources, L, P], the counts of slots that the tokens of each source rank chose.
    num_gpus
        Number of ranks. Each has P / num_gpus consecutive slots.

    Returns
    -------
    np.ndarray
        int64 [L, sources, num_gpus].

    Raises
    ------
    ValueError
        A sum that does not fit int64.

    Examples
    --------
    >>> traffic_matrix(np.array([[[3, 1]], [[2, 5]]]), 2)
    array([[[3, 1],
            [2, 5]]])
    """
    sources, num_layers, _ = physical_count.shape
    slots = physical_count.reshape(sources, num_layers, num_gpus, -1)
    return held(slots.sum(axis=-1, dtype=np.int64), slots.sum(axis=-1, dtype=np.float64)).transpose(1, 0, 2)
