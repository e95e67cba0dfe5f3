"""`ExpertDistributionRecorder`: what a model calls while it runs, and its owner before and after."""

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack

from numba_moe.recorder import metrics, sums
from numba_moe.recorder.counting import count_into, plan_add
from numba_moe.recorder.files import FORMATS, Dump
from numba_moe.recorder.passes import CountRows, TokenFiles, TokenLists, TokenStream
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import layout

MODES = ("stat", "stat_approx", "per_pass", "per_token")
PRIMARY = "primary"
# The id of what was counted outside of passes.
NO_PASS = -1


class Record(NamedTuple):
    """What the host knows about the counts or tokens of a pass."""

    forward_pass_id: int
    gatherer_key: str
    map_index: int


class Setting:
    """Holds an attribute at a value for a while."""

    __slots__ = ("_before", "_name", "_owner", "_value")

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value

    def __enter__(self) -> None:
        self._before = getattr(self._owner, self._name)
        setattr(self._owner, self._name, self._value)

    def __exit__(self, *error: object) -> None:
        setattr(self._owner, self._name, self._before)


class ExpertDistributionRecorder:
    """Record which experts are chosen, by layer and forward pass.

    Parameters
    ----------
    num_layers, num_experts : int
        MoE layers (L), experts of a layer (E).
    mode : {None, "stat", "stat_approx", "per_pass", "per_token"}
        None: nothing, at no cost. "stat": counts by layer and expert, which dumps sum over ranks. "stat_approx": the
        same from counts that a dispatcher already has. "per_pass": counts, a record for each pass and rank.
        "per_token": the ids and weights of every token.
    top_k : int, optional
        Experts of a token, for "per_token"; by default that of the first call.
    buffer_size : int, optional
        Passes to keep, the last ones; all by default.
    device : torch.device or str, optional
        Where ids are; by default the current CUDA device, or the CPU where there is none.
    process_group : torch.distributed.ProcessGroup, optional
        The ranks whose counts "stat" and "stat_approx" sum. Its order is that of ranks in the map.
    physical_to_logical_map : ExpertLocation or array of int, shape [L, P], optional
        The expert of each slot, where ids are physical; by default ids are experts. `set_physical_to_logical_map` says
        what holds after a rebalance.
    num_gpus : int, optional
        Ranks that share the P slots equally, for metrics; by default those of the group, or 1.
    chunk_tokens : int
        For "per_token": tokens that are moved together. Memory for five times as many is taken on the device and for
        four times as many, pinned, on the host. A captured graph may have so many tokens at most.
    spill_directory : path, optional
        For "per_token": keep tokens in unnamed files there and not in memory.

    Raises
    ------
    TypeError
        Wrong kind of argument.
    ValueError
        An unknown mode, a number out of bounds, a map of other sizes.

    Notes
    -----
    Hooks and passes do not synchronise: counters are int64 on the device, and a hook is one launch. Recording is
    switched by a flag on the device, so a captured graph that contains hooks records, or does not, at each replay.
    Hooks, passes and maps belong to one thread; control may come from others, and then takes effect between passes.

    Examples
    --------
    >>> recorder = ExpertDistributionRecorder(1, 3, mode="stat", device="cpu")
    >>> recorder.start_record()
    >>> for number in range(2):
    ...     with recorder.with_forward_pass(number), recorder.with_current_layer(0):
    ...         recorder.on_select_experts(torch.tensor([[0, 2], [2, -1]]))
    >>> recorder.dump_record(output_mode="object").logical_count
    array([[[1, 0, 2]],
    <BLANKLINE>
           [[1, 0, 2]]])
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        mode: str | None,
        top_k: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        process_group: Any = None,
        physical_to_logical_map: Any = None,
        num_gpus: int | None = None,
        chunk_tokens: int = 4096,
        spill_directory: Any = None,
    ) -> None:
        self.num_layers = checks.integer("num_layers", num_layers, 1)
        self.num_experts = checks.integer("num_experts", num_experts, 1)
        if mode is not None:
            checks.choice("mode", mode, MODES)
        self.mode, self.process_group = mode, process_group
        self._top_k = None if top_k is None else checks.integer("top_k", top_k, 1)
        self._size = None if buffer_size is None else checks.integer("buffer_size", buffer_size, 1)
        self._chunk_tokens = checks.integer("chunk_tokens", chunk_tokens, 1)
        self._spill = None if spill_directory is None else Path(spill_directory)
        spills = mode == "per_token" and buffer_size is None
        checks.holds(
            "spill_directory", "None but for 'per_token' of all passes", spills or not self._spill, self._spill
        )
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.num_ranks = sums.place_in(process_group)
        places = physical_to_logical_map
        self._maps = [np.tile(np.arange(num_experts), (num_layers, 1)) if places is None else self._check_map(places)]
        self.num_slots = self._maps[0].shape[1]
        self.num_gpus = self.num_ranks if num_gpus is None else checks.integer("num_gpus", num_gpus, 1)
        checks.divides("num_gpus", self.num_gpus, "the number of slots", self.num_slots)

        self._layer: int | None = None
        self._name, self._disabled, self._in_pass = PRIMARY, False, False
        self._lock = threading.RLock()
        self._wanted = self._on = False  # what was asked for, and what the device goes by
        self._limited = False
        self._rows_of: dict[tuple[str, int], int] | None = None  # rows of this pass so far, by name and layer
        self._changed: Any = None
        if mode is not None:
            state = torch.tensor([0, checks.LARGEST_INT32], dtype=torch.int32, device=self.device)
            self._flags = list(state.split(1))  # whether to record, and how many tokens
            self._flag_layouts = layout(self._flags[0]), layout(self._flags[1])
            self._lasting: set[str] = set()  # names that captured graphs, or others, count for
            self._counters: dict[str, tuple[torch.Tensor, list[torch.Tensor], list[Any]]] = {}
            self._streams: dict[str, TokenStream] = {}
            self._keeper = ThreadPoolExecutor(1, "numba-moe-recorder") if mode == "per_token" else None
            if mode != "per_token":
                self._counter(PRIMARY)
            self._clear()

    @property
    def recording(self) -> bool:
        """Whether passes are recorded, from the next one on if one is open."""
        return self._wanted

    @property
    def enabled(self) -> torch.Tensor:
        """The flag on the device, int32 [1]: what adds to `layer_counts` by itself does so where it is not 0."""
        return self._flags[0]

    def layer_counts(self, layer: int | None = None) -> torch.Tensor:
        """Return the counter of a layer, the current one by default: int64 [P] on the device, to which others may add.

        Who counts there must go by `enabled`, and must not call `on_select_experts` for the same slots.
        """
        if self.mode not in MODES[:3]:
            raise RuntimeError(f"`layer_counts` must be asked of a mode that counts, got {self.mode!r}")
        last = self.num_layers - 1
        place = self._where() if layer is None else checks.integer("layer", layer, 0, last, f"num_layers - 1 = {last}")
        self._lasting.add(self._key())
        return self._counter(self._key())[1][place]

    def set_physical_to_logical_map(self, physical_to_logical_map: Any) -> None:
        """Say which expert each slot holds, [L, P] or an ExpertLocation, from the next pass on."""
        places = self._check_map(physical_to_logical_map)
        checks.host_shape("physical_to_logical_map", places, self._maps[0].shape, "that of the map before")
        with self._lock:
            self._maps.append(places)

    def _check_map(self, value: Any) -> np.ndarray:
        value = getattr(value, "physical_to_logical_map", value)
        places = checks.host_array("physical_to_logical_map", value, "int64", (2,)).copy()
        checks.holds(
            "physical_to_logical_map", f"of {self.num_layers} layers", len(places) == self.num_layers, len(places)
        )
        known = (places >= -1) & (places < self.num_experts)
        checks.every("physical_to_logical_map", "-1 or in [0, num_experts)", known, places, ("layer", "slot"))
        return places

    # Control

    def start_record(self) -> None:
        """Record from here on, or from the next pass on if one is open."""
        self._switch(True, "`start_record` changes nothing: recording is on already")

    def stop_record(self) -> None:
        """Stop recording, at the end of the pass if one is open; what was recorded stays until a dump or reset."""
        self._switch(False, "`stop_record` changes nothing: recording is off already")

    def _switch(self, on: bool, unchanged: str) -> None:
        if self.mode is None:
            warnings.warn("nothing is recorded: the recorder's mode is None", RuntimeWarning, stacklevel=3)
            return
        with self._lock:
            if self._wanted == on:
                warnings.warn(unchanged, RuntimeWarning, stacklevel=3)
            self._wanted = on
            if not self._in_pass:
                self._apply()

    def _apply(self) -> None:
        if self._on != self._wanted:
            self._wait_for_device()
            self._on = self._wanted
            self._flags[0].fill_(int(self._on))
            self._note_work()

    def reset(self) -> None:
        """Forget what was recorded; recording goes on if it was on. Of an open pass the counts are kept."""
        if self.mode is None:
            return
        with self._lock:
            self._wait_for_device()
            for stream in self._streams.values():
                stream.forget()
            if not self._in_pass:
                for counts, *_ in self._counters.values():
                    counts.zero_()
            self._clear()
            self._note_work()

    def _clear(self) -> None:
        self._maps = self._maps[-1:]
        self._pass_map = 0
        self._records: deque[Record] = deque(maxlen=self._size)
        self._counts = CountRows(self._size, (self.num_layers, self.num_slots), self.device)
        self._tokens: Any = None

    def dump_record(
        self, output_mode: str = "file", *, format: str = "npz", directory: Any = "."
    ) -> Path | Dump | None:
        """Give out what was recorded in finished passes, and forget it.

        Parameters
        ----------
        output_mode : {"file", "object"}
            Write a file and return its path, or return a `Dump`.
        format : {"npz", "safetensors", "json", "csv", "pt"}
            "csv" has the counts summed over passes; "pt" is SGLang's.
        directory : path
            Where to write.

        Returns
        -------
        Path, Dump or None
            None if there is nothing, and with "file" on ranks other than the first where dumps are sums.

        Raises
        ------
        OSError
            The file could not be written: it is not there, and what was recorded is kept.
        ValueError
            An unknown output mode or format; ranks with different maps.

        Notes
        -----
        Synchronises. "stat" and "stat_approx" with a process group: all ranks call it together, and passes of the
        same id add up. Counts outside of passes make one of id -1. A pass that is open is left to the next dump.
        """
        checks.choice("output_mode", output_mode, ("file", "object"))
        checks.choice("format", format, FORMATS)
        if self.mode is None:
            warnings.warn("there is nothing to dump: the recorder's mode is None", RuntimeWarning, stacklevel=2)
            return None
        with self._lock:
            dump = self._dump()
            found: Path | Dump | None = dump
            if not len(dump.forward_pass_id):
                warnings.warn("there is nothing to dump: no pass was recorded", RuntimeWarning, stacklevel=2)
                found = dump if output_mode == "object" else None
            elif output_mode == "file":
                found = None
                summed = self.mode in MODES[:2]
                if not summed or self.rank == 0:
                    name = f"expert_distribution_recorder_{time.time_ns()}" + ("" if summed else f"_{self.rank}")
                    found = Path(directory) / f"{name}.{format}"
                    dump.save(found)
            self.reset()
            return found

    def _dump(self) -> Dump:
        self._wait_for_device()
        tokens: list[Any] = []
        num_tokens = None
        if self.mode == "per_token":
            for stream in self._streams.values():
                stream.flush()
            if self._tokens is not None:
                tokens, num_tokens = self._tokens.read()
        elif not self._in_pass:
            self._pass_map = len(self._maps) - 1
            for name, (open_counts, *_) in self._counters.items():
                if open_counts.any():
                    self._end_counts(name, NO_PASS)
        records = list(self._records)
        counts = self._counts.last(len(self._counts))
        dump = Dump(
            mode=str(self.mode),
            rank=self.rank,
            num_experts=self.num_experts,
            num_gpus=self.num_gpus,
            forward_pass_id=np.array([record.forward_pass_id for record in records], np.int64),
            gatherer_key=[record.gatherer_key for record in records],
            map_of_pass=np.array([record.map_index for record in records], np.int64),
            physical_to_logical_maps=np.stack(self._maps),
            topk_ids=tokens[0] if tokens else None,
            topk_weights=tokens[1] if len(tokens) > 1 else None,
            num_tokens=num_tokens,
        )
        if self.mode == "per_token":
            return dump.with_counts_of_tokens(self.num_slots)
        if self.mode == "per_pass" or self.process_group is None:
            return dump.with_counts(counts.cpu().numpy())
        return sums.over_ranks(dump, counts, self.process_group)

    def metrics(self, windows: Sequence[int] = (10, 100, 1000)) -> metrics.Metrics:
        """Return what the last passes say, on the device and of all ranks, who call it together."""
        if self.mode not in MODES[:3]:
            raise RuntimeError(f"`metrics` must be asked of a mode that counts, got {self.mode!r}")
        with self._lock:
            self._wait_for_device()
            records = list(self._records)[-max(windows) :]
            pass_ids, map_of_pass = [r.forward_pass_id for r in records], [r.map_index for r in records]
            counts, sizes = self._counts.last(len(records)), (self.num_experts, self.num_gpus)
            group = self.process_group
            found = metrics.measure(counts, pass_ids, map_of_pass, self._maps, sizes, windows, group)
            self._note_work()
            return found

    # Context

    @contextlib.contextmanager
    def with_forward_pass(self, forward_pass_id: int, num_tokens: int | None = None) -> Iterator[None]:
        """Take what is counted inside as one forward pass.

        `num_tokens`, if given, says how many tokens it has; further rows of `topk_ids` are padding, in replayed
        graphs too. While a graph is captured there are no passes.
        """
        if self.mode is None or self._capturing():
            with Setting(self, "_rows_of", {}):
                yield
            return
        number = checks.integer("forward_pass_id", forward_pass_id, 0, 2**63 - 1)
        if num_tokens is not None:
            checks.integer("num_tokens", num_tokens, 0)
        with self._lock:
            if self._in_pass:
                raise RuntimeError("`with_forward_pass` must not be inside another")
            self._apply()
            self._in_pass, self._pass_map, self._rows_of = True, len(self._maps) - 1, {}
            if self._on and (self._limited or num_tokens is not None):
                self._limited = num_tokens is not None
                self._flags[1].fill_(checks.LARGEST_INT32 if num_tokens is None else num_tokens)
        try:
            yield
        finally:
            with self._lock:
                self._in_pass = False
                if self._on:
                    self._end_pass(number)
                    self._note_work()
                self._apply()
                self._rows_of = None

    def with_current_layer(self, layer: int) -> Setting:
        """Take hooks inside as those of a layer."""
        last = self.num_layers - 1
        return Setting(self, "_layer", checks.integer("layer", layer, 0, last, f"num_layers - 1 = {last}"))

    def with_debug_name(self, name: str) -> Setting:
        """Keep what is recorded inside apart, as records of this name, in the modes that have records."""
        return Setting(self, "_name", name)

    def disable_this_region(self) -> Setting:
        """Let hooks inside do nothing, in a captured graph too."""
        return Setting(self, "_disabled", True)

    # Hooks

    def on_select_experts(self, topk_ids: Any, topk_weights: Any = None) -> None:
        """Record the experts of tokens, [num_tokens, top_k]; -1 is none. "stat_approx" has no use for it."""
        if self.mode is None or self.mode == "stat_approx" or self._disabled:
            return
        capturing = self._capturing()
        if not (self._on or capturing):
            return
        if not isinstance(topk_ids, torch.Tensor) and hasattr(topk_ids, "__dlpack__"):
            topk_ids, topk_weights = (
                value if value is None else torch.utils.dlpack.from_dlpack(value) for value in (topk_ids, topk_weights)
            )
        layer, name = self._where(), self._key()
        if capturing:
            self._lasting.add(name)
        key = name, layer
        first_row = 0 if self._rows_of is None else self._rows_of.get(key, 0)
        with self._on_device():
            if self.mode == "per_token":
                self._store(name, layer, first_row, topk_ids, topk_weights, capturing)
            else:
                _, rows, layouts = self._counter(name)
                tables = layouts[layer], *self._flag_layouts
                enabled, num_tokens = self._flags
                count_into(topk_ids, rows[layer], enabled, num_tokens, first_row, tables)
        if self._rows_of is not None:
            self._rows_of[key] = first_row + len(topk_ids)

    def on_dispatch_counts(self, counts: Any, first_slot: int | None = None) -> None:
        """Record how many tokens a dispatcher brings to consecutive slots: a list, or an array on the device.

        The first of them is `first_slot`, by default the first of this rank, or 0 if there are counts for all slots.
        Only "stat_approx" has a use for it.
        """
        if self.mode != "stat_approx" or self._disabled:
            return
        capturing = self._capturing()
        if not (self._on or capturing):
            return
        if not isinstance(counts, torch.Tensor):
            if capturing:
                raise RuntimeError("`counts` must be on the device while a graph is captured, got a list")
            host = torch.tensor(counts, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            counts = host.to(self.device, non_blocking=True)
        length = len(counts)
        if first_slot is None:
            first_slot = 0 if length == self.num_slots else self.rank * length
        rule = f"in slots [0, {self.num_slots})"
        checks.holds("counts", rule, 0 <= first_slot <= self.num_slots - length, f"{length} from slot {first_slot} on")
        counter = self._counter(PRIMARY)[1][self._where()][first_slot : first_slot + length]
        launch = plan_add(layout(counts), layout(counter))
        with self._on_device():
            if not arrays.answered_by_reference(counts):
                launch(counts, self._flags[0], counter)
            elif self._flags[0]:
                counter += counts.clamp(min=0)

    # What these have in common

    def _where(self) -> int:
        if self._layer is None:
            raise RuntimeError(
                "hooks must be inside `with_current_layer`, or `disable_this_region` where nothing counts"
            )
        return self._layer

    def _key(self) -> str:
        return self._name if self.mode in ("per_pass", "per_token") else PRIMARY

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _on_device(self) -> Any:
        if self.device.type == "cpu" or torch.cuda.current_device() == self.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def _wait_for_device(self) -> None:
        """Let the current stream wait for what was done to counts on whichever stream."""
        if self._changed is not None:
            torch.cuda.current_stream(self.device).wait_event(self._changed)

    def _note_work(self) -> None:
        if self.device.type == "cuda":
            self._changed = torch.cuda.current_stream(self.device).record_event()

    def _counter(self, name: str) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
        """Return the counters of a name [L, P], and of each layer with its layout."""
        if name not in self._counters:
            self._check_not_captured(name)
            counts = torch.zeros((self.num_layers, self.num_slots), dtype=torch.int64, device=self.device)
            rows = list(counts.unbind())
            self._counters[name] = counts, rows, [layout(row) for row in rows]
        return self._counters[name]

    def _check_not_captured(self, name: str) -> None:
        if self._capturing():
            raise RuntimeError(f"{name!r} must be recorded once before a graph that records it is captured")

    def _store(self, name: str, layer: int, first_row: int, ids: Any, weights: Any, capturing: bool) -> None:
        if self._rows_of is None and not capturing:
            raise RuntimeError("`on_select_experts` must be inside `with_forward_pass` with the mode 'per_token'")
        checks.array("topk_ids", layout(ids), checks.IDS, (2,))
        if name not in self._streams:
            self._open_stream(name, self._top_k or ids.shape[1], weights is not None)
        stream = self._streams[name]
        given = "given" if stream.with_weights else "None"
        checks.holds("topk_weights", f"{given}, as before", (weights is not None) == stream.with_weights, type(weights))
        stream.store(layer, first_row, ids, weights, self._flags, capturing)

    def _open_stream(self, name: str, top_k: int, with_weights: bool) -> None:
        self._check_not_captured(name)
        shape = self.num_layers, top_k
        sizes = self.num_slots, self._chunk_tokens, with_weights, self.device, self._keeper
        self._streams[name] = TokenStream(shape, *sizes)

    def _end_pass(self, number: int) -> None:
        used = self._rows_of or {}
        names = [PRIMARY] if self.mode in MODES[:2] else sorted({name for name, _ in used} | self._lasting)
        for name in names or [PRIMARY]:
            if self.mode != "per_token":
                self._end_counts(name, number)
            elif name in self._streams:
                stream = self._streams[name]
                if self._tokens is None:
                    self._tokens = self._new_tokens(stream)
                stream.end_pass(max((rows for key, rows in used.items() if key[0] == name), default=0), self._tokens)
                self._records.append(Record(number, name, self._pass_map))

    def _new_tokens(self, stream: TokenStream) -> TokenFiles | TokenLists:
        if self._spill is not None:
            return TokenFiles(self._spill, stream.shape, stream.with_weights)
        return TokenLists(self._size, stream.shape, stream.with_weights)

    def _end_counts(self, name: str, number: int) -> None:
        counts = self._counter(name)[0]
        self._counts.append(counts)
        counts.zero_()
        self._records.append(Record(number, name, self._pass_map))
