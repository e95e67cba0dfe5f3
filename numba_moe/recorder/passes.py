"""What was recorded until it is dumped: counts on the device, tokens on the host or on disk."""

import itertools
import math
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.ops.record import plan_store
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import layout

# Parts of passes that may be on their way to the host at once.
OUTBOXES = 4
# Rows that are copied together where a dump has to put tokens of several files into one.
ROWS_AT_ONCE = 4096
KINDS = (np.dtype(np.int32), np.dtype(np.float32))  # of ids and weights


class Tokens:
    """The tokens of a record, part by part as they arrive; a part that is sent again is kept once."""

    def __init__(self, keep: Callable[..., Any]) -> None:
        self._keep = keep
        self._parts: dict[int, tuple[int, Any]] = {}  # rows and where they are, by the first row
        self.sent: list[Future[None]] = []

    def add(self, first_row: int, *columns: np.ndarray) -> None:
        self._parts[first_row] = len(columns[0]), self._keep(*columns)

    def parts(self) -> tuple[int, list[Any]]:
        """Wait until all that was sent is kept; return the number of rows and the parts, or raise what failed."""
        for part in self.sent:
            part.result()
        found = [self._parts[first_row] for first_row in sorted(self._parts)]
        return sum(rows for rows, _ in found), [part for _, part in found]


class Record(NamedTuple):
    """What was recorded of a pass under a name: counts [L, P], or tokens."""

    forward_pass_id: int
    gatherer_key: str
    places: np.ndarray  # the map in force
    counts: torch.Tensor | None = None
    tokens: Tokens | None = None


class OpenPass:
    """A pass until its end, and how far that has come: an exception may come at any line of it."""

    def __init__(self, number: int, num_tokens: int | None, names: list[str] | None = None) -> None:
        self.number, self.num_tokens = number, num_tokens
        self.names = names  # under which it counts; None for those that hooks and graphs have used
        self.thread = threading.get_ident()
        self.recorded = False
        self.places = np.empty((0, 0), np.int64)  # the map in force
        self.layer: int | None = None  # as it was set at the begin
        self.rows: dict[tuple[str, int], int] = {}  # so far, by name and layer
        self.tokens: dict[str, Tokens] = {}
        self.records: list[Record] | None = None
        self.is_told = False  # whether who follows passes has seen it


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy integers to a device as int64, without waiting for it."""
    found = torch.from_numpy(np.array(values, np.int64))
    return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)


def copied(*columns: np.ndarray) -> list[np.ndarray]:
    """Keep a part in memory."""
    return [column.copy() for column in columns]


class Stored(NamedTuple):
    """Where a part is on disk."""

    spill: "Spill"
    begin: int
    end: int


class Spill:
    """Tokens on disk, in files without a name: they are gone when nothing refers to them, even after a crash."""

    def __init__(self, directory: Path, row_shape: tuple[int, ...]) -> None:
        self._directory, self._row_shape = directory, row_shape
        self._files: list[Any] = []
        self._rows = 0

    def add(self, *columns: np.ndarray) -> Stored:
        """Write a part after the others, over the remains of a failed write."""
        try:
            while len(self._files) < len(columns):
                file: Any = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
                weakref.finalize(self, file.close)  # arrays that were read keep what they need open
                self._files.append(file)
            for file, column in zip(self._files, columns, strict=True):
                file.seek(self._rows * column.itemsize * math.prod(self._row_shape))
                data = column.reshape(-1).view(np.uint8).data
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise OSError(error.errno, f"tokens were not spilled: {error.strerror}", str(self._directory)) from error
        begin, self._rows = self._rows, self._rows + len(columns[0])
        return Stored(self, begin, self._rows)

    def read(self, begin: int, end: int) -> list[np.ndarray]:
        """Return rows as arrays that are read from disk when they are used."""
        first, shape = begin * math.prod(self._row_shape), (end - begin, *self._row_shape)
        files = zip(self._files, KINDS, strict=False)
        return [np.memmap(file, kind, "r", first * kind.itemsize, shape) for file, kind in files]


def gathered(parts: Sequence[Any], directory: Path | None, row_shape: tuple[int, ...], num_columns: int) -> Any:
    """Concatenate the ids, and the weights if any, of parts."""
    nothing = [np.empty((0, *row_shape), kind) for kind in KINDS[:num_columns]]
    if directory is None:
        return [np.concatenate(column) for column in zip(nothing, *parts, strict=True)]
    parts = [part for part in parts if part.end > part.begin]
    if not parts:
        return nothing
    spill = parts[0].spill
    if any(part.spill is not spill or part.begin != before.end for before, part in itertools.pairwise(parts)):
        spill = Spill(directory, row_shape)
        parts = [
            spill.add(*part.spill.read(first, min(first + ROWS_AT_ONCE, part.end)))
            for part in parts
            for first in range(part.begin, part.end, ROWS_AT_ONCE)
        ]
    return spill.read(parts[0].begin, parts[-1].end)


class Rows:
    """Ids [rows, L, K], perhaps weights, and how many rows each layer has [L]."""

    def __init__(self, rows: int, shape: tuple[int, int], with_weights: bool, device: Any, pinned: bool) -> None:
        with torch.inference_mode(False):  # what is made in that mode cannot be written out of it
            self.ids = torch.empty((rows, *shape), dtype=torch.int32, device=device, pin_memory=pinned)
            self.weights: torch.Tensor | None = None
            if with_weights:
                self.weights = torch.empty((rows, *shape), dtype=torch.float32, device=device, pin_memory=pinned)
            self.stored = torch.zeros(shape[0], dtype=torch.int32, device=device, pin_memory=pinned)
        self.layout = layout(self.ids)

    def take(self, source: "Rows", stored: torch.Tensor, count: int) -> None:
        self.ids[:count].copy_(source.ids[:count], non_blocking=True)
        if self.weights is not None and source.weights is not None:
            self.weights[:count].copy_(source.weights[:count], non_blocking=True)
        self.stored.copy_(stored, non_blocking=True)


class Outbox:
    """A part of a pass on its way: copied on the device, then to pinned memory by a stream of its own, then kept."""

    def __init__(self, rows: int, shape: tuple[int, int], with_weights: bool, device: torch.device) -> None:
        self.here = Rows(rows, shape, with_weights, device, pinned=False)
        is_cuda = device.type == "cuda"
        self.there = Rows(rows, shape, with_weights, "cpu", pinned=True) if is_cuda else self.here
        self.arrived = torch.cuda.Event(blocking=True) if is_cuda else None
        self.free()

    def free(self) -> None:
        self.kept: Future[None] = Future()
        self.kept.set_result(None)


class TokenStream:
    """The way of tokens from the hooks to the host, in chunks, so that few of them are in memory twice.

    A hook copies a layer's tokens into staging memory, which never moves, so that captured graphs find it. At the end
    of a pass the rows in use are copied to an outbox on the device, from there by another stream to pinned memory,
    and from there by a thread to where they are kept. Who ends a pass waits only if all outboxes are on their way.
    """

    def __init__(
        self, shape: tuple[int, int], num_experts: int, chunk: int, with_weights: bool, device: torch.device
    ) -> None:
        self._shape, self._with_weights = shape, with_weights
        self._num_experts, self._chunk, self._device = num_experts, chunk, device
        self._staging: list[Rows] = []
        self._add_staging()
        self._outboxes = [Outbox(chunk, shape, with_weights, device) for _ in range(OUTBOXES)]
        self._turn = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._most_captured = 0  # rows of a pass in a captured graph, whose replays no hook sees

    def _add_staging(self) -> None:
        self._staging.append(Rows(self._chunk, self._shape, self._with_weights, self._device, pinned=False))

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
        self, staging: Rows, layer: int, row: int, place: int, ids: torch.Tensor, weights: Any, state: Any
    ) -> None:
        launch = plan_store(layout(ids), layout(weights), staging.layout, row, place, self._num_experts)
        stored = self._staging[0].stored
        if not arrays.answered_by_reference(ids):
            there = staging.weights if staging.weights is None else staging.weights[:, layer]
            enabled, num_tokens = state
            into = {"ids": staging.ids[:, layer], "weights": there, "stored": stored[layer:]}
            launch(topk_ids=ids, topk_weights=weights, enabled=enabled, num_tokens=num_tokens, **into)
            return
        real = min(len(ids), max(int(state[1]) - row, 0))
        if int(state[0]) and real:
            known = (ids[:real] >= 0) & (ids[:real] < self._num_experts)
            staging.ids[place : place + real, layer] = torch.where(known, ids[:real], -1).int()
            if staging.weights is not None:
                staging.weights[place : place + real, layer] = weights[:real].detach().float()
            stored[layer] = row + real

    def send(self, num_rows: int, tokens: Tokens, keeper: Executor) -> None:
        """Send the rows of the pass, num_rows of them at most or those of the largest graph, to where they are kept.

        To call it again after an exception is right: the rows are here until `clear`.
        """
        num_rows = max(num_rows, self._most_captured)
        try:
            for first_row in range(0, max(num_rows, 1), self._chunk):
                self._send(first_row, min(self._chunk, num_rows - first_row), tokens, keeper)
        except BaseException:
            keeper.submit(int).result()  # until here the thread may use a box that nobody has noted
            raise

    def _send(self, first_row: int, count: int, tokens: Tokens, keeper: Executor) -> None:
        box = self._outboxes[self._turn]
        self._turn = (self._turn + 1) % OUTBOXES
        box.kept.exception()  # waits; what went wrong is the dump's to say: the model goes on
        box.here.take(self._staging[first_row // self._chunk], self._staging[0].stored, count)
        if self._side is not None and box.arrived is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                box.there.take(box.here, box.here.stored, count)
                box.arrived.record(self._side)
        box.kept = keeper.submit(self._keep, box, first_row, count, tokens)
        tokens.sent.append(box.kept)

    def _keep(self, box: Outbox, first_row: int, count: int, tokens: Tokens) -> None:
        if box.arrived is not None:
            box.arrived.synchronize()
        rows_of_layer = box.there.stored.numpy() - first_row
        count = max(min(count, int(rows_of_layer.max())), 0)
        parts = [part[:count].numpy() for part in (box.there.ids, box.there.weights) if part is not None]
        for layer in np.flatnonzero(rows_of_layer < count):
            begin = max(int(rows_of_layer[layer]), 0)
            for part, nothing in zip(parts, (-1, 0), strict=False):
                part[begin:, layer] = nothing
        tokens.add(first_row, *parts)

    def clear(self) -> None:
        """Forget what the hooks have stored."""
        self._staging[0].stored.zero_()

    def start_over(self) -> None:
        """Forget what is on its way, by a thread that is gone."""
        for box in self._outboxes:
            box.free()
