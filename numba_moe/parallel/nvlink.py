"""Tokens between the GPUs of a host, which read each other's memory.

`dispatch` leaves rows where they are and tells all ranks of their ids; when all have told, each rank sorts what it was
told and reads every row that it needs once, over NVLink, straight to its places in expert order. `combine` leaves a
rank's sums in its own buffer, and the source reads and adds those of its tokens. Sizes follow from max_tokens, and the
host reads nothing, so all of it can be captured into a CUDA graph.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from numba_moe.device import simulator
from numba_moe.ops import peer_rows
from numba_moe.ops.permute.layouts import moe_permute_masked
from numba_moe.ops.permute.move_rows import WORDS
from numba_moe.ops.permute.permutation import moe_permute, moe_unpermute
from numba_moe.ops.permute.row_gradients import permute_backward, unpermute_backward
from numba_moe.parallel.arrival import first_rows
from numba_moe.parallel.memory import SharedMemory
from numba_moe.parallel.peers import PeerTimeoutError
from numba_moe.reference.parallel import DispatchedTokens
from numba_moe.runtime import checks
from numba_moe.runtime.launch import Launch, block_threads

SIGNALS = 4096  # bytes: a step of each rank, for each phase
PHASES = ("dispatch", "combine")
BLOCKS = 264  # two to each multiprocessor of an H200
ALIGNMENT = 256


class Places(NamedTuple):
    """Where parts of a buffer begin, in bytes."""

    ids: int
    weights: int
    rows: int
    scales: int
    sums: int
    gradients: int  # of weights
    size: int


class Sizes(NamedTuple):
    """What a dispatcher is made for."""

    max_tokens: int
    top_k: int
    hidden: int
    dtype: torch.dtype  # of rows
    scale_bytes: int  # of the scales of a token


class Way(NamedTuple):
    """What brings rows back."""

    step: int
    slots: torch.Tensor  # int32 [num_tokens, top_k]
    topk_weights: torch.Tensor  # float32 [num_tokens, top_k]


class PeerMemory:
    """One rank's end of the memory that all ranks share.

    Parameters
    ----------
    group
        The ranks, all on one host.
    rank_of_slot
        int32 [num_slots] on the device.
    sizes
        Those of the dispatcher.
    by_slot
        Rows come back for each slot.
    timeout
        Seconds to wait for a rank.
    """

    def __init__(
        self,
        group: Any,
        rank: int,
        num_ranks: int,
        rank_of_slot: torch.Tensor,
        sizes: Sizes,
        by_slot: bool,
        timeout: float,
    ) -> None:
        max_tokens, top_k, hidden, dtype, scale_bytes = sizes
        self.rank, self.num_ranks, self.timeout, self.by_slot = rank, num_ranks, timeout, by_slot
        self.max_tokens, self.top_k = max_tokens, top_k
        self.device = rank_of_slot.device
        counts = torch.bincount(rank_of_slot, minlength=num_ranks)
        self.num_local = int(counts[rank])
        self._first_slot = (counts.cumsum(0) - counts).to(torch.int32)
        self._rank_of_slot = self._active_rank_of_slot = rank_of_slot
        n = num_ranks * max_tokens
        self.sum_bytes = hidden * max(dtype.itemsize, 2)
        parts = (
            *(4 * n * top_k, 4 * n * top_k, max_tokens * hidden * dtype.itemsize, max_tokens * scale_bytes),
            *(n * (top_k if by_slot else 1) * self.sum_bytes, 4 * n * top_k),
        )
        places = [SIGNALS]
        for size in parts:
            places.append(places[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        self.at = Places(*places)
        self.scale_bytes = scale_bytes
        self._memory = SharedMemory(self.at.size, group, self.device)
        self._peers: torch.Tensor | None = None
        self._active = torch.ones(num_ranks, dtype=torch.int32, device=self.device)
        self._steps = [torch.zeros(2, dtype=torch.int32, device=self.device) for _ in PHASES]
        status = torch.zeros(4, dtype=torch.int32, device="cpu")
        self.status = status.pin_memory() if self.device.type == "cuda" else status
        self.ids = self.part(self.at.ids, torch.int32, n, top_k)
        self.weights = self.part(self.at.weights, torch.float32, n, top_k)
        self._launches: dict[Any, Launch] = {}

    def part(self, first: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return a part of this rank's buffer."""
        count = torch.Size(shape).numel() * dtype.itemsize
        return self._memory.buffer[first : first + count].view(dtype).view(shape)

    def activate(self, active: list[bool]) -> None:
        """Let nothing go to ranks that are not active, and wait for none of them; forget who was late."""
        self._active.copy_(torch.tensor(active, dtype=torch.bool, device="cpu"))
        mask = torch.tensor(active, dtype=torch.bool, device=self.device)
        self._active_rank_of_slot = torch.where(mask[self._rank_of_slot], self._rank_of_slot, -1)
        self.status.zero_()

    def check(self) -> None:
        """Raise if a rank was late."""
        who, wanted, found, number = self.status.tolist()
        if who:
            self.status.zero_()
            phase = PHASES[number]
            message = f"rank {who - 1} told of {phase} {found}, not {wanted}, within {self.timeout:g} s"
            raise PeerTimeoutError(message, who - 1, phase, wanted)

    def _launch(self, name: str, blocks: int, threads: int, *records: Any) -> Launch:
        key = (name, blocks, *(value for record in records for value in record if not isinstance(value, torch.Tensor)))
        if key not in self._launches:
            kernel = getattr(peer_rows, name)
            self._launches[key] = Launch(kernel, self.device, blocks, block_threads(threads), *records)
        return self._launches[key]

    def _ranks(self) -> tuple[peer_rows.Ranks, dict[str, torch.Tensor]]:
        """Return the record of the buffers of all ranks, and its array."""
        if self._peers is None:
            self._peers = torch.tensor(self._memory.addresses(), dtype=torch.int64, device=self.device)
        return peer_rows.Ranks(torch.int64, self.rank, self.num_ranks), {"peers": self._peers}

    def _signals(self, phase: int) -> tuple[tuple[peer_rows.Ranks, peer_rows.Signals], dict[str, torch.Tensor]]:
        """Return the records of a phase, and their arrays."""
        ranks, arrays = self._ranks()
        signals = peer_rows.Signals(torch.int32, phase * SIGNALS // len(PHASES))
        return (ranks, signals), {**arrays, "steps": self._steps[phase]}

    def _chosen(self, num_tokens: int) -> peer_rows.Chosen:
        sizes = (num_tokens, self.top_k, len(self._rank_of_slot), self.max_tokens)
        return peer_rows.Chosen(torch.int32, torch.float32, torch.int32, *sizes)

    def publish(self, slots: torch.Tensor, weights: torch.Tensor) -> None:
        """Tell all ranks of the slots of this rank's tokens, whose rows are in its buffer."""
        records, arrays = self._signals(0)
        where = peer_rows.Published(torch.int32, self.at.ids, self.at.weights)
        blocks = min(BLOCKS, max(1, -(-self.max_tokens * self.top_k // peer_rows.MOST_THREADS)))
        launch = self._launch("publish", blocks, peer_rows.MOST_THREADS, *records, self._chosen(len(slots)), where)
        tables = {"rank_of_slot": self._active_rank_of_slot, "first_slot": self._first_slot}
        launch(**arrays, slots=slots, topk_weights=weights, **tables)

    def tell(self, phase: int) -> None:
        """Tell all ranks that what this one wrote is there."""
        records, arrays = self._signals(phase)
        self._launch("tell_ranks", 1, 32, *records)(**arrays)

    def wait(self, phase: int) -> None:
        """Let the stream wait until all ranks have told."""
        self._memory.turn()
        records, arrays = self._signals(phase)
        patience = peer_rows.Patience(torch.int32, torch.int32, int(self.timeout * 1e9), phase)
        launch = self._launch("wait_for_ranks", 1, 32, *records, patience)
        launch(**arrays, active=self._active, status=self.status)

    def fetch(self, places: torch.Tensor, target: torch.Tensor, first: int) -> torch.Tensor:
        """Copy rows of bytes that begin at `first` in all buffers to their places: [num_ranks * max_tokens, width]."""
        row_bytes = target.shape[-1] * target.dtype.itemsize
        word = next(word for word in WORDS if row_bytes % word.itemsize == 0)
        row_words = row_bytes // word.itemsize
        if not target.numel() or not self.max_tokens:
            return target
        units = self.num_ranks * self.max_tokens
        blocks = min(BLOCKS if not simulator.ENABLED else 2, max(1, units))
        warps = blocks * block_threads(peer_rows.MOST_THREADS) // 32
        parts = max(1, min(-(-row_words // 32), warps // units))
        ranks, arrays = self._ranks()
        sizes = (self.max_tokens, places.shape[1], row_words, first, parts)
        fetched = peer_rows.Fetched(torch.int32, word, *sizes)
        words = target.view(torch.uint8).view(word) if simulator.ENABLED else target
        self._launch("fetch_rows", blocks, peer_rows.MOST_THREADS, ranks, fetched)(
            **arrays, places=places, permuted=words
        )
        return target

    def sum(self, way: Way, columns: int, dtype: torch.dtype, by_slot: bool, first: int) -> torch.Tensor:
        """Sum the rows that ranks have for this rank's tokens, from `first` on in their buffers."""
        num_tokens = len(way.slots)
        out = torch.empty(num_tokens, columns, dtype=dtype, device=self.device)
        lanes = 16 // dtype.itemsize
        lanes = lanes if columns % lanes == 0 else 1
        ranks, arrays = self._ranks()
        summed = peer_rows.Summed(dtype, columns, lanes, int(by_slot), first)
        threads = min(peer_rows.MOST_THREADS, max(32, -(-columns // (32 * lanes)) * 32))
        blocks = min(num_tokens, 4 * BLOCKS) if columns else 0
        launch = self._launch("sum_rows", blocks, threads, ranks, self._chosen(num_tokens), summed)
        chosen = {"slots": way.slots, "topk_weights": way.topk_weights, "rank_of_slot": self._active_rank_of_slot}
        launch(**arrays, **chosen, combined=out)
        return out

    def bring_back(self, partial: torch.Tensor, way: Way, first: int) -> torch.Tensor:
        """Sum a row of each rank for each of this rank's tokens."""
        self.part(first, partial.dtype, *partial.shape).copy_(partial)
        self.tell(1)
        self.wait(1)
        return self.sum(way, partial.shape[1], partial.dtype, False, first)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        slots: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None,
        step: int,
    ) -> Callable[[str, int | None, int | None], DispatchedTokens]:
        """Tell all ranks of this rank's tokens; return what waits for theirs and puts their rows in a layout."""
        self.check()
        self.put(hidden_states)
        if scales is not None:
            row = math.prod(scales.shape[1:]) * scales.dtype.itemsize
            checks.holds("scales", f"of at most scale_bytes = {self.scale_bytes} a token", row <= self.scale_bytes, row)
            self.part(self.at.scales, scales.dtype, *scales.shape).copy_(scales)
        weights = topk_weights.detach()
        self.publish(slots, weights)
        way = Way(step, slots, weights)

        def finish(layout: str, alignment: int | None, capacity: int | None) -> DispatchedTokens:
            self.wait(0)
            found, places, shape = self.index(layout, alignment, capacity)
            rows, recv_weights = Fetch.apply(self, way, places, shape, hidden_states, topk_weights)
            moved = None
            if scales is not None:
                moved = torch.empty(*shape, *scales.shape[1:], dtype=scales.dtype, device=self.device)
                self.fetch(places, moved.view(math.prod(shape), math.prod(scales.shape[1:])), self.at.scales)
            here = layout == "tokens"
            received = torch.full((self.num_ranks,), self.max_tokens, dtype=torch.int32, device="cpu")
            names = ("hidden_states", "scales") if here else ("permuted_hidden_states", "permuted_scales")
            moved_names = dict(zip(names, (rows, moved), strict=True))
            return found._replace(topk_weights=recv_weights, num_tokens_per_rank=received, way=way, **moved_names)

        return finish

    def put(self, rows: torch.Tensor) -> None:
        """Put rows where the other ranks read them, unless they are there."""
        mine = self.part(self.at.rows, rows.dtype, *rows.shape)
        if rows.numel() and rows.data_ptr() != mine.data_ptr():
            mine.copy_(rows.detach())

    def index(
        self, layout: str, alignment: int | None, capacity: int | None
    ) -> tuple[DispatchedTokens, torch.Tensor, tuple[int, ...]]:
        """Return where received tokens go, the places of their rows, and the leading sizes of these."""
        ids = self.ids
        empty = DispatchedTokens(ids, None, None, None, ids.new_zeros(1))
        if layout == "tokens":
            row = torch.arange(len(ids), dtype=torch.int32, device=self.device)
            return empty, torch.where((ids >= 0).any(1), row, -1)[:, None].contiguous(), (len(ids),)
        none = torch.empty(len(ids), 0, device=self.device, dtype=torch.float32)
        found: Any
        if layout == "masked":
            found = moe_permute_masked(none, ids, self.num_local, capacity or max(len(ids), 1))
        else:
            found = moe_permute(none, ids, self.num_local, alignment=alignment, zero_padding=False)
            if capacity is not None:
                found = first_rows(found, capacity)
        places = found.inv_permuted_idx
        dropped = ((ids >= 0) & (places < 0)).sum(dtype=torch.int32).reshape(1)
        return empty._replace(**found._asdict())._replace(num_dropped=dropped), places, tuple(found.permuted_idx.shape)

    def combine(self, rows: torch.Tensor, places: torch.Tensor | None, sent: DispatchedTokens) -> torch.Tensor:
        """Return rows, [num_rows, hidden], to the sources of their tokens, and sum them there."""
        row_bytes = rows.shape[-1] * rows.dtype.itemsize
        checks.holds("rows", f"of at most {self.sum_bytes} bytes each", row_bytes <= self.sum_bytes, row_bytes)
        combined: torch.Tensor = Combine.apply(self, sent.way, places, rows, sent.topk_weights)
        return combined

    def release(self, _: Way) -> None:
        """Let all ranks go on where nothing is combined."""
        self.tell(1)
        self.wait(1)


class Fetch(torch.autograd.Function):
    """Rows and weights of the tokens that a rank was told of; gradients are summed where the tokens came from."""

    @staticmethod
    def forward(
        ctx: Any, end: PeerMemory, way: Way, places: Any, shape: Any, rows: torch.Tensor, _: torch.Tensor
    ) -> Any:
        ctx.end, ctx.way = end, way
        make = torch.zeros if rows.requires_grad else torch.empty  # zeros for gradients of what nobody wrote
        target = make(*shape, rows.shape[1], dtype=rows.dtype, device=rows.device)
        end.fetch(places, target.flatten(0, -2), end.at.rows)
        wanted = any(ctx.needs_input_grad[4:])
        if wanted:
            ctx.save_for_backward(places)
        found = end.weights.clone() if wanted else end.weights.view_as(end.weights)
        if not rows.is_floating_point() or rows.dtype.itemsize == 1:
            ctx.mark_non_differentiable(target)
        return target, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_rows: torch.Tensor, by_weights: torch.Tensor) -> Any:
        end: PeerMemory = ctx.end
        [places] = ctx.saved_tensors
        grads: list[torch.Tensor | None] = [None, None]
        if ctx.needs_input_grad[4]:
            partial = permute_backward(places, by_rows.flatten(0, -2))
            grads[0] = end.bring_back(partial, ctx.way, end.at.sums)
        if ctx.needs_input_grad[5]:
            grads[1] = end.bring_back(by_weights.contiguous(), ctx.way, end.at.gradients)
        return None, None, None, None, *grads


class Combine(torch.autograd.Function):
    """The weighted sums of rows, where their tokens came from; the gradient is fetched from there."""

    @staticmethod
    def forward(ctx: Any, end: PeerMemory, way: Way, places: Any, rows: torch.Tensor, weights: torch.Tensor) -> Any:
        ctx.end = end
        columns, n = rows.shape[-1], len(weights)
        wanted = any(ctx.needs_input_grad[3:])
        if wanted:
            saved = [] if places is None else [places, rows, weights]
            ctx.save_for_backward((end.ids >= 0).any(1), *saved)
        width = end.top_k if end.by_slot else 1
        out = end.part(end.at.sums, rows.dtype, n * width, columns)
        if places is None:
            out.copy_(rows.detach().reshape(n * width, columns))
        elif end.by_slot:
            ones = torch.ones(n * width, 1, dtype=torch.float32, device=rows.device)
            moe_unpermute(rows.detach(), ones, places.reshape(-1, 1), out=out)
        else:
            moe_unpermute(rows.detach(), weights.detach(), places, out=out)
        end.tell(1)
        end.wait(1)
        return end.sum(way, columns, rows.dtype, end.by_slot, end.at.sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        end: PeerMemory = ctx.end
        here, *saved = ctx.saved_tensors
        end.put(grad.contiguous())
        end.tell(0)
        end.wait(0)
        row = torch.arange(len(here), dtype=torch.int32, device=grad.device)
        places = torch.where(here, row, -1)[:, None].contiguous()
        received = torch.zeros(len(here), grad.shape[1], dtype=grad.dtype, device=grad.device)
        end.fetch(places, received, end.at.rows)
        if not saved:
            return None, None, None, received, None
        index, rows, weights = saved
        found = unpermute_backward(rows, weights, index, received, 1.0, True, ctx.needs_input_grad[4])
        return None, None, None, found.rows, found.weights
