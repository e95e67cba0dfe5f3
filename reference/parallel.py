"""Tokens on their way to the ranks that hold their experts, and back: all ranks at once.

What each rank has is a list of its arrays here, and ids are those of slots, as `dispatch_ids` returns them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.counting import count_tokens_per_expert, expert_of_slots
from numba_moe.reference.permute import MaskedTokens, PermutedTokens, moe_permute, moe_permute_masked, moe_unpermute


class DispatchLayout(NamedTuple):
    """Where the tokens of a rank go; see `dispatch_layout`."""

    num_tokens_per_rank: Any
    num_tokens_per_expert: Any
    is_token_in_rank: Any


class DispatchedTokens(NamedTuple):
    """What a rank received, in the layout that was asked for, and the way back; see `dispatch`."""

    topk_ids: Any
    topk_weights: Any
    num_tokens_per_rank: Any
    way: Any
    num_dropped: Any
    hidden_states: Any = None
    scales: Any = None
    permuted_hidden_states: Any = None
    permuted_scales: Any = None
    permuted_idx: Any = None
    inv_permuted_idx: Any = None
    expert_first_token_offset: Any = None
    counts: Any = None
    m_indices: Any = None
    masked_m: Any = None


def dispatch_layout(topk_ids: np.ndarray, rank_of_expert: np.ndarray, num_ranks: int) -> DispatchLayout:
    """Count the tokens that go to each rank and to each expert.

    Parameters
    ----------
    topk_ids
        int32 or int64 [num_tokens, top_k]; ids outside ``[0, num_experts)`` go nowhere.
    rank_of_expert
        int32 or int64 [num_experts], ascending or not; an expert of a rank outside ``[0, num_ranks)`` is nowhere.
    num_ranks
        Number of ranks.

    Returns
    -------
    DispatchLayout
        num_tokens_per_rank: int32 [num_ranks], where a token counts once for each rank that it goes to.
        num_tokens_per_expert: int32 [num_experts], the slots of each expert that is somewhere. is_token_in_rank: bool
        [num_tokens, num_ranks].

    Examples
    --------
    >>> layout = dispatch_layout(np.array([[0, 1], [2, -1], [1, 3]]), np.array([0, 0, 1, 1]), num_ranks=2)
    >>> layout.num_tokens_per_rank, layout.num_tokens_per_expert
    (array([2, 2], dtype=int32), array([1, 2, 1, 1], dtype=int32))
    >>> layout.is_token_in_rank
    array([[ True, False],
           [False,  True],
           [ True,  True]])
    """
    somewhere = (rank_of_expert >= 0) & (rank_of_expert < num_ranks)
    here = np.where(somewhere, np.arange(len(rank_of_expert)), -1)
    experts = expert_of_slots(topk_ids, len(here), here).reshape(topk_ids.shape)
    ranks = np.where(experts >= 0, rank_of_expert[experts], -1)
    is_token_in_rank = (ranks[:, :, None] == np.arange(num_ranks)).any(1)
    return DispatchLayout(
        is_token_in_rank.sum(0).astype(np.int32),
        count_tokens_per_expert(topk_ids, len(here), here),
        is_token_in_rank,
    )


def local_ids(topk_ids: np.ndarray, rank_of_slot: np.ndarray, rank: int) -> np.ndarray:
    """Return a rank's own number of each slot, -1 for a slot of another rank.

    >>> local_ids(np.array([[0, 2], [3, -1]]), np.array([0, 0, 1, 1]), rank=1)
    array([[-1,  0],
           [ 1, -1]], dtype=int32)
    """
    own = np.where(rank_of_slot == rank, np.cumsum(rank_of_slot == rank) - 1, -1)
    return expert_of_slots(topk_ids, len(own), own).reshape(topk_ids.shape).astype(np.int32)


def lay_out(
    received: DispatchedTokens, num_local: int, layout: str, alignment: int | None, capacity: int | None
) -> DispatchedTokens:
    """Put the rows of received tokens in a layout.

    >>> ids, weights, rows = np.array([[0], [1], [0]]), np.ones((3, 1)), np.array([[10], [20], [30]])
    >>> received = DispatchedTokens(ids, weights, None, None, None, hidden_states=rows)
    >>> laid_out = lay_out(received, num_local=2, layout="permuted", alignment=None, capacity=2)
    >>> laid_out.permuted_hidden_states.ravel(), laid_out.expert_first_token_offset, laid_out.num_dropped
    (array([10, 30]), array([0, 2, 2]), array([1], dtype=int32))
    """
    ids, rows, scales = received.topk_ids, received.hidden_states, received.scales
    if layout == "tokens":
        return received._replace(num_dropped=np.zeros(1, np.int32))
    found: PermutedTokens | MaskedTokens
    if layout == "masked":
        found = moe_permute_masked(rows, ids, num_local, capacity or max(len(ids), 1), scales=scales)
    else:
        found = moe_permute(rows, ids, num_local, scales=scales, alignment=alignment)
        if capacity is not None:
            found = keep_rows(found, capacity)
    num_dropped = ((ids >= 0) & (found.inv_permuted_idx < 0)).sum(dtype=np.int32).reshape(1)
    return received._replace(hidden_states=None, scales=None, num_dropped=num_dropped, **found._asdict())


def keep_rows(permuted: PermutedTokens, capacity: int) -> PermutedTokens:
    """Keep the first rows, and skip the slots of others.

    >>> permuted = moe_permute(np.array([[1], [2]]), np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> kept = keep_rows(permuted, capacity=1)
    >>> kept.permuted_hidden_states.ravel(), kept.counts, kept.inv_permuted_idx.ravel()
    (array([1]), array([1, 0], dtype=int32), array([-1,  0, -1, -1], dtype=int32))
    """
    offset = np.minimum(permuted.expert_first_token_offset, capacity)
    place = permuted.inv_permuted_idx
    first = {
        name: None if rows is None else rows[:capacity]
        for name, rows in permuted._asdict().items()
        if name in ("permuted_hidden_states", "permuted_idx", "m_indices", "permuted_scales")
    }
    return permuted._replace(
        expert_first_token_offset=offset,
        inv_permuted_idx=np.where(place < capacity, place, np.int32(-1)),
        counts=np.minimum(permuted.counts, np.diff(offset)).astype(np.int32),
        **first,
    )


def dispatch(
    hidden_states: Sequence[np.ndarray],
    topk_ids: Sequence[np.ndarray],
    topk_weights: Sequence[np.ndarray],
    rank_of_slot: np.ndarray,
    *,
    scales: Sequence[np.ndarray] | None = None,
    layout: str = "permuted",
    alignment: int | None = None,
    capacity: int | None = None,
    active_ranks: np.ndarray | None = None,
) -> list[DispatchedTokens]:
    """Send each token once to each rank that holds one of its experts.

    Parameters
    ----------
    hidden_states
        For each rank: any dtype, [num_tokens, hidden].
    topk_ids
        For each rank: int32 or int64 [num_tokens, top_k], slots of all ranks; those outside ``[0, num_slots)`` go
        nowhere.
    topk_weights
        For each rank: float [num_tokens, top_k].
    rank_of_slot
        int64 [num_slots], the rank that holds each slot.
    scales
        For each rank: any dtype, [num_tokens] or [num_tokens, groups], which travel beside the rows.
    layout
        "permuted": rows in expert order, as `moe_permute` makes them. "masked": a batch for each expert, as
        `moe_permute_masked` does. "tokens": rows as they are received, with their ids and weights.
    alignment
        Of "permuted", as in `moe_permute`.
    capacity
        Rows of "permuted" in all, or of each batch of "masked"; slots past them are dropped.
    active_ranks
        bool [num_ranks]: ranks that take part. Nothing comes from the others or goes to them.

    Returns
    -------
    list of DispatchedTokens
        For each rank, n tokens in order of (source rank, token). topk_ids: int32 [n, top_k], the rank's own number of
        each slot, -1 for a slot of another rank. topk_weights: [n, top_k]. num_tokens_per_rank: int32 [num_ranks],
        tokens from each source. way: int64 [n], the number of a token among those of all ranks. num_dropped: int32 [1],
        slots past the capacity. hidden_states and scales: those of "tokens", else None. The others: those of
        `moe_permute` or `moe_permute_masked`, else None.

    Examples
    --------
    Two ranks with a token each, and an expert each; the first token goes to both:

    >>> rows, ids = [np.array([[1.0]]), np.array([[2.0]])], [np.array([[0, 1]]), np.array([[1, -1]])]
    >>> weights = [np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]])]
    >>> sent = dispatch(rows, ids, weights, rank_of_slot=np.array([0, 1]))
    >>> sent[1].permuted_hidden_states[:2].ravel(), sent[1].num_tokens_per_rank
    (array([1., 2.]), array([1, 1], dtype=int32))
    >>> combine([10 * s.permuted_hidden_states for s in sent], sent, [1, 1])
    [array([[10.]]), array([[20.]])]
    """
    num_ranks = len(topk_ids)
    active = np.ones(num_ranks, bool) if active_ranks is None else active_ranks
    source = np.repeat(np.arange(num_ranks), [len(ids) for ids in topk_ids])
    every_id, every_weight, every_row = (np.concatenate(part) for part in (topk_ids, topk_weights, hidden_states))
    every_scale = None if scales is None else np.concatenate(scales)
    sent = []
    for rank in range(num_ranks):
        ids = local_ids(every_id, rank_of_slot, rank)
        ids[~active[source]] = -1
        way = np.flatnonzero((ids >= 0).any(1) & active[rank])
        received = DispatchedTokens(
            ids[way],
            every_weight[way],
            np.bincount(source[way], minlength=num_ranks).astype(np.int32),
            way,
            num_dropped=None,
            hidden_states=every_row[way],
            scales=None if every_scale is None else every_scale[way],
        )
        sent.append(lay_out(received, int((rank_of_slot == rank).sum()), layout, alignment, capacity))
    return sent


def combine(
    rows: Sequence[np.ndarray], sent: Sequence[DispatchedTokens], num_tokens: Sequence[int], reduce: str = "rank"
) -> list[np.ndarray]:
    """Bring rows back to the ranks that their tokens came from, and sum those of each token, weighted.

    Parameters
    ----------
    rows
        For each rank: float [.., hidden], what its experts made of the rows that it was sent, in the same layout; of
        "tokens" [n, hidden], the weighted sum over the rank's slots of each token, or [n, top_k, hidden] before it.
    sent
        What `dispatch` returned.
    num_tokens
        For each rank, the tokens that it sent.
    reduce
        "rank": each rank sums the rows of its slots, in order of k, in the dtype of the rows; the sums of ranks are
        added in order of ranks. "source": the rank that a token came from sums all of its slots, in order of k, which
        is what one rank that holds all experts would do.

    Returns
    -------
    list of np.ndarray
        For each rank [num_tokens, hidden]; zeros for a token that went nowhere. Sums are those of `moe_unpermute`.
    """
    top_k = sent[0].topk_ids.shape[1]
    total = sum(num_tokens)
    hidden = rows[0].shape[-1]
    parts, first = [], 0
    by_slot = reduce == "source"
    places = np.full((total, top_k if by_slot else len(sent)), -1, np.int32)
    weights = np.ones(places.shape, sent[0].topk_weights.dtype)
    for rank, (made, received) in enumerate(zip(rows, sent, strict=True)):
        index = received.inv_permuted_idx
        if index is None:
            index = np.where(received.topk_ids >= 0, np.arange(received.topk_ids.size).reshape(-1, top_k), -1)
        part = made.reshape(int(np.prod(made.shape[:-1])), hidden)
        if by_slot:
            kept = index >= 0
            places[received.way] = np.where(kept, first + index, places[received.way])
            weights[received.way] = np.where(kept, received.topk_weights, weights[received.way])
        else:
            if received.inv_permuted_idx is not None or made.ndim == 3:
                part = moe_unpermute(part, received.topk_weights, index)
            places[received.way, rank] = first + np.arange(len(part))
        parts.append(part)
        first += len(part)
    combined = moe_unpermute(np.concatenate(parts), weights, places)
    return np.split(combined, np.cumsum(num_tokens)[:-1])
