"""Where counts and tokens are kept until they are dumped: counts on the device, tokens on the host or on disk."""

import tempfile
import weakref
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from numba_moe.recorder.counting import plan_store
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import layout

# Passes whose counts are allocated together.
CHUNK = 128
# Parts of passes that may be on their way to the host at once.
OUTBOXES = 4


class CountRows:
    """Counts of passes on the device, the last `size` of them or all, in chunks that never move."""

    def __init__(self, size: int | None, shape: tuple[int, ...], device: torch.device) -> None:
        self._size, self._shape, self._device = size, shape, device
        self._chunks: list[torch.Tensor] = []
        self._next = 0

    def append(self, counts: torch.Tensor) -> None:
        index = self._next if self._size is None else self._next % self._size
        chunk, place = divmod(index, CHUNK)
        if chunk == len(self._chunks):
            self._chunks.append(torch.empty((CHUNK, *self._shape), dtype=torch.int64, device=self._device))
        self._chunks[chunk][place].copy_(counts)
        self._next += 1

    def __len__(self) -> int:
        return self._next if self._size is None else min(self._next, self._size)

    def last(self, count: int) -> torch.Tensor:
        """Return the counts of the last passes, oldest first."""
        begin = self._next - min(count, len(self))
        parts = [torch.empty((0, *self._shape), dtype=torch.int64, device=self._device)]
        while begin < self._next:
            index = begin if self._size is None else begin % self._size
            chunk, place = divmod(index, CHUNK)
            take = min(self._next - begin, CHUNK - place, CHUNK if self._size is None else self._size - index)
            parts.append(self._chunks[chunk][place : place + take])
            begin += take
        return torch.cat(parts)

    def clear(self) -> None:
        self._chunks, self._next = [], 0


class TokenFiles:
    """Tokens on disk, in files without a name: they are gone when nothing refers to them, even after a crash."""

    def __init__(self, directory: Path, row_shape: tuple[int, ...], with_weights: bool) -> None:
        self._directory, self._row_shape = directory, row_shape
        kinds = (np.int32, np.float32)[: 1 + with_weights]
        self._files: list[tuple[IO[bytes], Any]] = [
            (tempfile.TemporaryFile(dir=directory), kind)  # noqa: SIM115
            for kind in kinds
        ]
        for file, _ in self._files:
            weakref.finalize(self, file.close)  # arrays that were read keep what they need open
        self._num_tokens: list[int] = []

    def add(self, is_new: bool, *parts: np.ndarray) -> None:
        if is_new:
            self._num_tokens.append(0)
        for (file, _), part in zip(self._files, parts, strict=True):
            try:
                file.write(part.data)
                file.flush()
            except OSError as error:
                raise OSError(
                    error.errno, f"tokens were not spilled: {error.strerror}", str(self._directory)
                ) from error
        self._num_tokens[-1] += len(parts[0])

    def read(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Return ids, perhaps weights, and the tokens of each pass; arrays are read from disk when they are used."""
        shape = (sum(self._num_tokens), *self._row_shape)
        found = [
            np.memmap(file, kind, "r", shape=shape) if shape[0] else np.empty(shape, kind) for file, kind in self._files
        ]
        return found, np.array(self._num_tokens, np.int64)


class TokenLists:
    """Tokens in memory, of the last `size` passes or of all."""

    def __init__(self, size: int | None, row_shape: tuple[int, ...], with_weights: bool) -> None:
        self._empty = [np.empty((0, *row_shape), kind) for kind in (np.int32, np.float32)[: 1 + with_weights]]
        self._passes: deque[list[list[np.ndarray]]] = deque(maxlen=size)

    def add(self, is_new: bool, *parts: np.ndarray) -> None:
        if is_new:
            self._passes.append([])
        self._passes[-1].append([part.copy() for part in parts])

    def read(self) -> tuple[list[np.ndarray], np.ndarray]:
        pieces = [piece for parts in self._passes for piece in parts]
        found = [np.concatenate(column) for column in zip(self._empty, *pieces, strict=True)]
        num_tokens = [sum(len(piece[0]) for piece in parts) for parts in self._passes]
        return found, np.array(num_tokens, np.int64)


class Rows:
    """Ids [rows, L, K], perhaps weights, and how many rows each layer has [L]."""

    def __init__(self, rows: int, shape: tuple[int, int], with_weights: bool, device: Any, **options: Any) -> None:
        self.ids = torch.empty((rows, *shape), dtype=torch.int32, device=device, **options)
        self.weights = torch.empty((rows, *shape), device=device, **options) if with_weights else None
        self.stored = torch.zeros(shape[0], dtype=torch.int32, device=device, **options)
        self.layout = layout(self.ids)

    def take(self, source: "Rows", stored: torch.Tensor, count: int) -> None:
        self.ids[:count].copy_(source.ids[:count], non_blocking=True)
        if self.weights is not None and source.weights is not None:
            self.weights[:count].copy_(source.weights[:count], non_blocking=True)
        self.stored.copy_(stored, non_blocking=True)


class Outbox:
    """A part of a pass on its way: copied on the device, then to pinned memory by a stream of its own, then kept."""

    def __init__(self, rows: int, shape: tuple[int, int], with_weights: bool, device: torch.device) -> None:
        self.here = Rows(rows, shape, with_weights, device)
        is_cuda = device.type == "cuda"
        self.there = Rows(rows, shape, with_weights, "cpu", pin_memory=True) if is_cuda else self.here
        self.arrived = torch.cuda.Event(blocking=True) if is_cuda else None
        self.kept: Future[None] = Future()
        self.kept.set_result(None)


class TokenStream:
    """The way of tokens from the hooks to the host, in chunks, so that few of them are in memory twice.

    A hook copies a layer's tokens into staging memory, which never moves, so that captured graphs find it. At the end
    of a pass the rows in use are copied to an outbox on the device, from there by another stream to pinned memory,
    and from there by a thread to where they are kept. Who ends a pass waits only if all outboxes are on their way.
    """

    def __init__(
        self, shape: tuple[int, int], num_experts: int, chunk: int, with_weights: bool, device: Any, keeper: Any
    ) -> None:
        self.shape, self.with_weights, self._keeper = shape, with_weights, keeper
        self._num_experts, self._chunk, self._device = num_experts, chunk, device
        self._staging: list[Rows] = []
        self._add_staging()
        self._outboxes = [Outbox(chunk, shape, with_weights, device) for _ in range(OUTBOXES)]
        self._turn = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._most_captured = 0  # rows of a pass in a captured graph, whose replays no hook sees

    def _add_staging(self) -> None:
        self._staging.append(Rows(self._chunk, self.shape, self.with_weights, self._device))

    def store(
        self, layer: int, first_row: int, ids: torch.Tensor, weights: Any, state: list[torch.Tensor], capturing: bool
    ) -> None:
        """Copy a layer's tokens to the rows of the pass from first_row on."""
        end = first_row + len(ids)
        if capturing:
            self._most_captured = max(self._most_captured, end)
        while end > len(self._staging) * self._chunk:
            checks.holds("chunk_tokens", f"at least {end}, the tokens in a captured graph", not capturing, self._chunk)
            self._add_staging()
        row = first_row
        while row < end:
            number, place = divmod(row, self._chunk)
            count = min(end - row, self._chunk - place)
            part = slice(row - first_row, row - first_row + count)
            self._store(
                self._staging[number], layer, row, place, ids[part], None if weights is None else weights[part], state
            )
            row += count

    def _store(
        self,
        staging: Rows,
        layer: int,
        row: int,
        place: int,
        ids: torch.Tensor,
        weights: Any,
        state: list[torch.Tensor],
    ) -> None:
        launch = plan_store(layout(ids), layout(weights), staging.layout, row, place, self._num_experts)
        stored = self._staging[0].stored
        if not arrays.answered_by_reference(ids):
            there = staging.weights if staging.weights is None else staging.weights[:, layer]
            enabled, num_tokens = state
            launch(
                topk_ids=ids,
                topk_weights=weights,
                enabled=enabled,
                num_tokens=num_tokens,
                ids=staging.ids[:, layer],
                weights=there,
                stored=stored[layer:],
            )
            return
        real = min(len(ids), max(int(state[1]) - row, 0))
        if int(state[0]) and real:
            known = (ids[:real] >= 0) & (ids[:real] < self._num_experts)
            staging.ids[place : place + real, layer] = torch.where(known, ids[:real], -1).int()
            if staging.weights is not None:
                staging.weights[place : place + real, layer] = weights[:real].float()
            stored[layer] = row + real

    def end_pass(self, num_rows: int, kept: Any) -> None:
        """Send the rows of the pass, num_rows of them at most or those of the largest graph, to where they are kept."""
        stored = self._staging[0].stored
        num_rows = max(num_rows, self._most_captured)
        for first_row in range(0, max(num_rows, 1), self._chunk):
            box = self._outboxes[self._turn]
            self._turn = (self._turn + 1) % OUTBOXES
            if box.kept.exception() is not None:
                return  # what went wrong is the dump's to say: the model goes on
            count = min(self._chunk, num_rows - first_row)
            box.here.take(self._staging[first_row // self._chunk], stored, count)
            if self._side is not None and box.arrived is not None:
                self._side.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._side):
                    box.there.take(box.here, box.here.stored, count)
                    box.arrived.record(self._side)
            box.kept = self._keeper.submit(self._keep, box, first_row, count, kept)
        stored.zero_()

    def _keep(self, box: Outbox, first_row: int, count: int, kept: Any) -> None:
        if box.arrived is not None:
            box.arrived.synchronize()
        rows_of_layer = box.there.stored.numpy() - first_row
        count = max(min(count, int(rows_of_layer.max())), 0)
        parts = [part[:count].numpy() for part in (box.there.ids, box.there.weights) if part is not None]
        for layer in np.flatnonzero(rows_of_layer < count):
            begin = max(int(rows_of_layer[layer]), 0)
            for part, nothing in zip(parts, (-1, 0), strict=False):
                part[begin:, layer] = nothing
        kept.add(first_row == 0, *parts)

    def flush(self) -> None:
        """Wait until everything that was sent is kept; raise what went wrong."""
        for box in self._outboxes:
            box.kept.result()

    def forget(self, in_pass: bool) -> None:
        """Wait for what was sent, whether it was kept or not; what an open pass has is kept."""
        for box in self._outboxes:
            box.kept.exception()
            box.kept = Future()
            box.kept.set_result(None)
        if not in_pass:
            self._staging[0].stored.zero_()
