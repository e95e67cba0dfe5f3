"""Tokens sent over a process group: gloo between CPUs, NCCL between GPUs and hosts.

A token is sent once to each rank that holds one of its experts, with its ids and weights beside it, and each rank
returns one row for it: the weighted sum over the rank's slots. What a rank receives is in order of (source rank,
token), and sums are those of `moe_unpermute`, so nothing depends on time.

If `padded`, each rank sends all its tokens, padded to max_tokens, to all ranks, and the host reads nothing: it can be
captured into a CUDA graph.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from numba_moe.ops.destinations import dispatch_layout
from numba_moe.ops.permute.layouts import moe_reorder
from numba_moe.ops.permute.permutation import moe_unpermute
from numba_moe.parallel.arrival import pick_rows
from numba_moe.parallel.peers import Peers, exchange
from numba_moe.reference.parallel import DispatchedTokens
from numba_moe.runtime import checks


class Sizes(NamedTuple):
    """For each rank, what is sent to it and what is received from it."""

    sent: list[int]
    received: list[int]


class Way(NamedTuple):
    """What brings rows back to where their tokens came from."""

    step: int
    received: list[int]  # tokens from each rank
    returned: Sizes
    places: torch.Tensor  # int32 [num_tokens, num_ranks], or [num_tokens, top_k] with `reduce="source"`: what is summed
    topk_weights: torch.Tensor  # [num_tokens, top_k]


class Network:
    """One rank's end of a process group.

    Parameters
    ----------
    peers
        The ranks of the group.
    rank_of_slot
        int32 [num_slots] on the device.
    first_slot, num_local
        The slots of this rank.
    max_tokens
        What a rank sends at most.
    by_slot
        Rows come back for each slot, and are summed where their token came from.
    padded
        Whether all ranks send max_tokens to all.
    """

    def __init__(
        self,
        peers: Peers,
        rank_of_slot: torch.Tensor,
        first_slot: int,
        num_local: int,
        max_tokens: int,
        by_slot: bool,
        padded: bool,
    ) -> None:
        self.peers, self.first_slot, self.num_local, self.max_tokens = peers, first_slot, num_local, max_tokens
        self.by_slot, self.padded = by_slot, padded
        self._rank_of_slot = self._active_rank_of_slot = rank_of_slot

    def activate(self, active: list[bool]) -> None:
        """Let nothing go to ranks that are not active."""
        self.peers.active = active
        mask = torch.tensor(active, dtype=torch.bool, device=self._rank_of_slot.device)
        self._active_rank_of_slot = torch.where(mask[self._rank_of_slot], self._rank_of_slot, -1)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        slots: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None,
        step: int,
    ) -> Callable[[], DispatchedTokens]:
        """Begin to send tokens to the ranks of their slots, int32 [num_tokens, top_k]; return what does the rest."""
        begin = self._begin_padded if self.padded else self._begin
        return begin(hidden_states, slots, topk_weights, scales, step)

    def _begin(self, rows: Any, slots: Any, weights: Any, scales: Any, step: int) -> Callable[[], DispatchedTokens]:
        size = self.peers.size
        layout = dispatch_layout(slots, self._active_rank_of_slot, size)
        by_rank = layout.is_token_in_rank.T
        tokens = by_rank.nonzero()[:, 1]  # in order of (rank, token)
        places = _places(by_rank).T.contiguous()
        numbers, summed = [layout.num_tokens_per_rank], places
        if self.by_slot:
            order = moe_reorder(_rank_of(slots, self._active_rank_of_slot), size)
            summed = order.src2dst.view(slots.shape)
            numbers.append(order.seg_indptr.diff())
        mine = torch.stack(numbers, 1).tolist()
        listen = self.peers.tell("dispatch", step, mine)

        def finish() -> DispatchedTokens:
            theirs = listen()
            sizes = Sizes([counts[0] for counts in mine], [counts[0] for counts in theirs])
            tensors = [pick_rows(rows, tokens, places), slots[tokens], pick_rows(weights, tokens, places)]
            tensors += [] if scales is None else [pick_rows(scales, tokens, places)]
            found = exchange(self.peers, tensors, *sizes, "dispatch", step)
            returned = Sizes([counts[-1] for counts in theirs], [counts[-1] for counts in mine])
            return self._received(Way(step, sizes.received, returned, summed, weights), *found)

        return finish

    def _begin_padded(
        self, rows: Any, slots: Any, weights: Any, scales: Any, step: int
    ) -> Callable[[], DispatchedTokens]:
        most, size, top_k = self.max_tokens, self.peers.size, slots.shape[1]
        spare = most - len(rows)

        def padded(values: torch.Tensor, value: float = 0.0) -> torch.Tensor:
            if values.dtype in checks.BYTES:  # torch joins no floats of a byte
                words = values.view(torch.uint8)
                return torch.cat([words, words.new_zeros(spare, *words.shape[1:])]).view(values.dtype)
            return torch.cat([values, values.new_full((spare, *values.shape[1:]), value)])

        token = torch.arange(len(rows), dtype=torch.int32, device=rows.device)[:, None]
        sizes = [most * active for active in self.peers.active]
        first = torch.tensor([0, *sizes], dtype=torch.int64, device=rows.device).cumsum(0)[:-1].to(torch.int32)
        if self.by_slot:
            ranks = _rank_of(slots, self._active_rank_of_slot)
            k = torch.arange(top_k, dtype=torch.int32, device=rows.device)
            places = torch.where(ranks >= 0, (first[ranks.long()] + token) * top_k + k, -1)
        else:
            goes = dispatch_layout(slots, self._active_rank_of_slot, size).is_token_in_rank
            places = torch.where(goes, first + token, -1)
        tensors = [padded(rows), padded(slots, -1), padded(weights)]
        tensors += [] if scales is None else [padded(scales)]

        def finish() -> DispatchedTokens:
            found = exchange(self.peers, tensors, sizes, sizes, "dispatch", step, to_all=True)
            returned = [size * (top_k if self.by_slot else 1) for size in sizes]
            return self._received(Way(step, sizes, Sizes(returned, returned), places, weights), *found)

        return finish

    def _received(self, way: Way, rows: Any, slots: Any, weights: Any, scales: Any = None) -> DispatchedTokens:
        local = slots - self.first_slot
        return DispatchedTokens(
            torch.where((local >= 0) & (local < self.num_local), local, -1),
            weights,
            torch.tensor(way.received, dtype=torch.int32, device="cpu"),
            way,
            num_dropped=None,
            hidden_states=rows,
            scales=scales,
        )

    def combine(self, rows: torch.Tensor, sent: DispatchedTokens) -> torch.Tensor:
        """Return rows, [n, hidden], or [n, top_k, hidden] with `by_slot`, to their sources, and sum them there."""
        way: Way = sent.way
        if self.by_slot:
            rows = rows.flatten(0, 1)
            if not self.padded:
                rows = rows[(sent.topk_ids >= 0).flatten()]
        if not self.padded:
            self.peers.tell("combine", way.step, [[0]] * self.peers.size)()
        [returned] = exchange(self.peers, [rows], *way.returned, "combine", way.step)
        weights = way.topk_weights
        if not self.by_slot:
            weights = torch.ones(way.places.shape, dtype=torch.float32, device=rows.device)
        return moe_unpermute(returned, weights, way.places)


def _rank_of(slots: torch.Tensor, rank_of_slot: torch.Tensor) -> torch.Tensor:
    """Return the rank of each slot, -1 for none."""
    known = (slots >= 0) & (slots < len(rank_of_slot))
    return torch.where(known, rank_of_slot[torch.where(known, slots, 0).long()], -1)


def _places(goes: torch.Tensor) -> torch.Tensor:
    """Return the number of each true element of a mask, in order, -1 for the others."""
    numbers = goes.flatten().cumsum(0, dtype=torch.int32).view(goes.shape) - 1
    return torch.where(goes, numbers, -1)
