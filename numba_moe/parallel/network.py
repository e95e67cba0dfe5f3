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
from numba_moe.parallel.arrival import lay_out, pick_rows
from numba_moe.parallel.peers import Peers, exchange, in_backward, wants_gradient
from numba_moe.reference.parallel import DispatchedTokens
from numba_moe.runtime import checks

# Waits for what was sent, and puts it in a layout, with an alignment and a capacity.
Finish = Callable[[str, int | None, int | None], DispatchedTokens]


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
        self.by_slot, self.padded, peers.tells_of_gradients = by_slot, padded, not padded
        self._rank_of_slot = rank_of_slot
        self.activate(peers.active)

    def activate(self, active: list[bool]) -> None:
        """Let nothing go to ranks that are not active."""
        self.peers.active = active
        mask = torch.tensor(active, dtype=torch.bool, device=self._rank_of_slot.device)
        self._active_rank_of_slot = torch.where(mask[self._rank_of_slot], self._rank_of_slot, -1)
        sizes = self._padded_sizes = [self.max_tokens * one for one in active]
        self._first = torch.tensor(
            [sum(sizes[:rank]) for rank in range(len(sizes))], dtype=torch.int32, device=mask.device
        )

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        slots: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None,
        step: int,
    ) -> Finish:
        """Begin to send tokens to the ranks of their slots, int32 [num_tokens, top_k]; return what does the rest."""
        begin = self._begin_padded if self.padded else self._begin
        return begin(hidden_states, slots, topk_weights, scales, step)

    def _begin(self, rows: Any, slots: Any, weights: Any, scales: Any, step: int) -> Finish:
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
        wanted = [wants_gradient(rows), wants_gradient(weights)]
        listen = self.peers.tell("dispatch", step, [[*wanted, *counts] for counts in mine])

        def finish(*layout: Any) -> DispatchedTokens:
            theirs = listen()
            by_rows, by_weights, arriving, *_ = zip(*theirs, strict=True)
            sizes = Sizes([counts[0] for counts in mine], list(arriving))
            tensors = [
                pick_rows(in_backward(rows, any(by_rows)), tokens, places),
                slots[tokens],
                pick_rows(in_backward(weights, any(by_weights)), tokens, places),
            ]
            tensors += [] if scales is None else [pick_rows(scales, tokens, places)]
            found = exchange(self.peers, tensors, *sizes, "dispatch", step)
            returned = Sizes([counts[-1] for counts in theirs], [counts[-1] for counts in mine])
            return self._received(layout, Way(step, sizes.received, returned, summed, weights), *found)

        return finish

    def _begin_padded(self, rows: Any, slots: Any, weights: Any, scales: Any, step: int) -> Finish:
        most, size, top_k = self.max_tokens, self.peers.size, slots.shape[1]
        spare = most - len(rows)

        def padded(values: torch.Tensor, value: float = 0.0) -> torch.Tensor:
            if values.dtype in checks.BYTES:  # torch joins no floats of a byte
                words = values.view(torch.uint8)
                return torch.cat([words, words.new_zeros(spare, *words.shape[1:])]).view(values.dtype)
            return torch.cat([values, values.new_full((spare, *values.shape[1:]), value)])

        token = torch.arange(len(rows), dtype=torch.int32, device=rows.device)[:, None]
        sizes, first = self._padded_sizes, self._first
        if self.by_slot:
            ranks = _rank_of(slots, self._active_rank_of_slot)
            k = torch.arange(top_k, dtype=torch.int32, device=rows.device)
            places = torch.where(ranks >= 0, (first[ranks.long()] + token) * top_k + k, -1)
        else:
            goes = dispatch_layout(slots, self._active_rank_of_slot, size).is_token_in_rank
            places = torch.where(goes, first + token, -1)
        tensors = [padded(rows), padded(slots, -1), padded(weights)]
        tensors += [] if scales is None else [padded(scales)]

        def finish(*layout: Any) -> DispatchedTokens:
            found = exchange(self.peers, tensors, sizes, sizes, "dispatch", step, to_all=True)
            returned = [size * (top_k if self.by_slot else 1) for size in sizes]
            return self._received(layout, Way(step, sizes, Sizes(returned, returned), places, weights), *found)

        return finish

    def _received(
        self, layout: Any, way: Way, rows: Any, slots: Any, weights: Any, scales: Any = None
    ) -> DispatchedTokens:
        local = slots - self.first_slot
        received = DispatchedTokens(
            torch.where((local >= 0) & (local < self.num_local), local, -1),
            weights,
            torch.tensor(way.received, dtype=torch.int32, device="cpu"),
            way,
            num_dropped=None,
            hidden_states=rows,
            scales=scales,
        )
        return lay_out(received, self.num_local, *layout)

    def release(self, _: Way) -> None:
        """Let go of what was dispatched: nobody waits for it."""

    def check(self) -> None:
        """Raise what went wrong on the device: calls wait for all of it."""

    def combine(self, rows: torch.Tensor, places: torch.Tensor | None, sent: DispatchedTokens) -> torch.Tensor:
        """Return rows, [num_rows, hidden], to the sources of their tokens, and sum them there."""
        way: Way = sent.way
        if not self.by_slot:
            rows = rows if places is None else moe_unpermute(rows, sent.topk_weights, places)
        elif places is not None:
            rows = _of_slots(rows, places)
            if not self.padded:
                rows = rows[(sent.topk_ids >= 0).flatten()]
        if not self.padded:
            told = self.peers.tell("combine", way.step, [[wants_gradient(rows)]] * self.peers.size)()
            rows = in_backward(rows, any(wanted for [wanted] in told))
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


def _of_slots(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the row of each slot, zeros for one without: [n * top_k, columns]."""
    if not len(rows):  # there is nothing to pick, and a gradient all the same
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    return rows[places.flatten().clamp(min=0).long()].masked_fill((places < 0).view(-1, 1), 0)
