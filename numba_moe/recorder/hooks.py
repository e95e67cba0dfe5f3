"""The recorder's hooks, which a model calls while it runs, and their context."""

import contextlib
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack

from numba_moe.ops.record import add_expert_counts, plan_add, plan_count
from numba_moe.recorder import sums
from numba_moe.recorder.passes import OpenPass, Record, Spill, TokenStream, to_device
from numba_moe.runtime import arrays, checks, torch_private
from numba_moe.runtime.plans import layout

MODES = ("stat", "stat_approx", "per_pass", "per_token")
PRIMARY = "primary"
# Number of counters for each expert of a layer; their sum is its count. With several rows fewer threads add to the same
# counter. H200, 4,096 tokens, 256 experts: counting in gating takes 0.1 to 0.3 us with 16 rows or more, and 0.9 to 1.8
# us with one row.
COUNTER_ROWS = 32


class Counters(NamedTuple):
    """The counters of a name, int64 [L, rows, P]; those of each layer; and of each layer the first row."""

    all: torch.Tensor
    layers: list[torch.Tensor]
    first_rows: list[torch.Tensor]


HERE = contextlib.nullcontext()


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


@contextlib.contextmanager
def setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Do the same, and end it whichever line an exception comes at; three times as slow."""
    before = getattr(owner, name)
    try:
        try:
            setattr(owner, name, value)
            yield
        finally:
            setattr(owner, name, before)
    except BaseException:
        setattr(owner, name, before)  # again, as an interrupt may have come before the first of it
        raise


_recorders: "weakref.WeakSet[Hooks]" = weakref.WeakSet()


def _start_over_in_child() -> None:
    for recorder in _recorders:
        recorder._start_over()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over_in_child)


def _made_anew(kind: "type[Hooks]", settings: dict[str, Any]) -> "Hooks":
    made = kind.__new__(kind)
    Hooks.__init__(made, **settings)
    return made


class Hooks:
    """The part of `ExpertDistributionRecorder` that a model calls."""

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
        self._directory = None if spill_directory is None else checks.path("spill_directory", spill_directory)
        spills = mode == "per_token" and buffer_size is None
        checks.holds(
            "spill_directory", "None but for 'per_token' of all passes", spills or not self._directory, self._directory
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = checks.device("device", device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._is_cuda = self.device.type == "cuda"
        self.rank, self.num_ranks = sums.place_in(process_group)
        places = physical_to_logical_map
        if places is None:
            places = np.tile(np.arange(num_experts, dtype=np.int64), (num_layers, 1))
        self._maps = [self._check_map(places)]
        self.num_slots = self._maps[0].shape[1]
        if num_gpus is None:  # more ranks than experts may each have all of them
            num_gpus = 1 if self.num_slots % self.num_ranks else self.num_ranks
        self.num_gpus = checks.integer("num_gpus", num_gpus, 1)
        checks.divides("num_gpus", self.num_gpus, "the number of slots", self.num_slots)

        self._attachment: Any = None
        self.numbers = itertools.count()  # of passes that a model opens
        self.after_pass: list[Callable[[list[Record]], None]] = []  # what is told the records of each pass
        self._layer: int | None = None
        self._name, self._disabled = PRIMARY, False
        self._pass: OpenPass | None = None
        self._rows_of: dict[tuple[str, int], int] | None = None  # rows of this pass so far, by name and layer
        self._member: Any = None  # what commands to all ranks reach this one by
        self._lock = threading.RLock()  # what follows is read and changed under it
        self._dumping = threading.RLock()  # held by one dump, while it writes
        self._records: deque[Record] = deque(maxlen=self._size)
        self._spill: Spill | None = None
        self._limited = False  # whether the device goes by a number of tokens
        self._wanted = self._on = False  # what was asked for, and what the device goes by
        self._changed: Any = None
        self._executor: ThreadPoolExecutor | None = None
        if mode is not None:
            with torch.inference_mode(False):  # what is made in that mode cannot be written out of it
                state = torch.zeros(2, dtype=torch.int32, device=self.device)
                self._flags = list(state.split(1))  # whether to record, and how many tokens
            self._flags[1].fill_(checks.LARGEST_INT32)
            self._lasting: set[str] = set()  # names that captured graphs, or others, count for
            self._counters: dict[str, Counters] = {}
            self._streams: dict[str, TokenStream] = {}
            self._with_weights = False
            if mode != "per_token":
                self._counter(PRIMARY)
        _recorders.add(self)

    __init__.__qualname__ = "ExpertDistributionRecorder.__init__"  # which a wrong keyword's error names

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings: what is loaded is empty and off, and of this process alone."""
        return _made_anew, (type(self), self._settings())

    def __deepcopy__(self, _memo: Any) -> "Hooks":
        return _made_anew(type(self), {**self._settings(), "process_group": self.process_group})

    def _settings(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "mode": self.mode,
            "top_k": self._top_k,
            "buffer_size": self._size,
            "device": str(self.device),
            "physical_to_logical_map": self._maps[-1],
            "num_gpus": self.num_gpus,
            "chunk_tokens": self._chunk_tokens,
            "spill_directory": self._directory,
        }

    def _keeper(self) -> ThreadPoolExecutor:
        """Return what keeps tokens: a thread that ends when the recorder is closed or nothing refers to it."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "numba-moe-recorder")
        return self._executor

    def _start_over(self) -> None:
        """In a forked child, forget what the parent recorded, and its threads with whatever locks they held."""
        self._lock, self._dumping = threading.RLock(), threading.RLock()
        self._member = None
        self._executor = self._spill = self._changed = None
        self._records = deque(maxlen=self._size)
        if self._pass is not None and self._pass.thread != threading.get_ident():
            self._pass = self._rows_of = self._layer = None
            self._name, self._disabled = PRIMARY, False
        if self._pass is not None:
            self._pass.rows.clear()
            self._pass.tokens, self._pass.records = {}, None
        if self.mode is None:
            return
        for stream in self._streams.values():
            stream.start_over()
        if not self._is_cuda:  # a device is of no use to a forked child
            self._clear_counts()
            if self._pass is None:
                self._unlimit()

    def _clear_counts(self) -> None:
        for counters in self._counters.values():
            counters.all.zero_()
        for stream in self._streams.values():
            stream.clear()

    def _unlimit(self) -> None:
        """Let every row be a token."""
        if self._limited:
            self._flags[1].fill_(checks.LARGEST_INT32)
            self._limited = False

    def with_current_layer(self, layer: int) -> Setting:
        """Let the hooks inside count for a layer."""
        last = self.num_layers - 1
        return Setting(self, "_layer", checks.integer("layer", layer, 0, last, f"num_layers - 1 = {last}"))

    def with_debug_name(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Keep the records inside separately, under this name, in the modes that have records."""
        checks.instance("name", name, str)
        return setting(self, "_name", name)

    def disable_this_region(self) -> contextlib.AbstractContextManager[None]:
        """Let the hooks inside do nothing, also in a captured graph."""
        return setting(self, "_disabled", True)

    @property
    def enabled(self) -> torch.Tensor:
        """The flag on the device, int32 [1]: code that adds to `layer_counts` itself must check that it is not 0."""
        if self.mode is None:
            raise RuntimeError("`enabled` must be asked of a recorder with a mode, got None")
        return self._flags[0]

    def layer_counts(self, layer: int | None = None) -> torch.Tensor:
        """Return the counters of a layer, the current one by default: int64 [rows, P] on the device; add to any row.

        Code that counts there must obey `enabled`, and must not call `on_select_experts` for the same slots. Gating
        counts in its own launch with ``counts=recorder.layer_counts(layer), counts_enabled=recorder.enabled``.
        """
        if self.mode not in MODES[:3]:
            raise RuntimeError(f"`layer_counts` must be asked of a mode that counts, got {self.mode!r}")
        last = self.num_layers - 1
        place = self._where() if layer is None else checks.integer("layer", layer, 0, last, f"num_layers - 1 = {last}")
        self._lasting.add(self._key())
        return self._counter(self._key()).layers[place]

    @property
    def in_pass(self) -> bool:
        """Whether a pass is open."""
        return self._pass is not None

    @property
    def takes_ids(self) -> bool:
        """Whether `on_select_experts` would do something just now."""
        if self.mode is None or self.mode == "stat_approx" or self._disabled:
            return False
        return self._on or self._capturing() or self._is_new(self._key())

    def on_select_experts(self, topk_ids: Any, topk_weights: Any = None) -> None:
        """Record the experts of tokens, [num_tokens, top_k]; an id of -1 is no expert. "stat_approx" ignores this."""
        if self.mode is None or self.mode == "stat_approx" or self._disabled:
            return
        if arrays.is_traced():
            raise RuntimeError(
                "`on_select_experts` must be outside of compiled code; in it, gating counts into `layer_counts`"
            )
        name, capturing = self._key(), self._capturing()
        if not (self._on or capturing or self._is_new(name)):
            return
        if not isinstance(topk_ids, torch.Tensor) and hasattr(topk_ids, "__dlpack__"):
            topk_ids, topk_weights = (
                value if value is None else torch.utils.dlpack.from_dlpack(value) for value in (topk_ids, topk_weights)
            )
        if self._is_new(name):  # a model's first run, recorded or not, comes before its capture
            self._open(name, topk_ids, topk_weights)
        if not (self._on or capturing):
            return
        layer = self._where()
        if capturing:
            self._lasting.add(name)
        key = name, layer
        in_pass = self._pass is not None
        rows_of = None if capturing and in_pass else self._rows_of  # what is captured in a pass is not of it
        first_row = 0 if rows_of is None else rows_of.get(key, 0)
        with torch_private.Untraced(), self._on_device():
            if self.mode == "per_token":
                self._store(name, layer, first_row, topk_ids, topk_weights, capturing)
            else:
                past = first_row if capturing or self._limited else 0  # that matters where `num_tokens` says less
                launch = plan_count(*(layout(topk_ids), self.num_slots, past, self.device), switched=True, limited=True)
                enabled, num_tokens = self._flags
                counts = self._counter(name).first_rows[layer]
                if arrays.answered_by_reference(topk_ids):
                    add_expert_counts(topk_ids, counts=counts, enabled=enabled, num_tokens=num_tokens, first_row=past)
                else:
                    launch(topk_ids=topk_ids, enabled=enabled, num_tokens=num_tokens, counts=counts)
        if rows_of is not None:
            rows_of[key] = first_row + topk_ids.shape[0]

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
            counts = to_device(checks.host_array("counts", counts, "int64", (1,)), self.device)
        length = len(counts)
        if first_slot is None:
            first_slot = 0 if length == self.num_slots else self.rank * length
        first_slot = checks.integer("first_slot", first_slot, 0)
        rule = f"in slots [0, {self.num_slots})"
        checks.holds("counts", rule, first_slot <= self.num_slots - length, f"{length} from slot {first_slot} on")
        counter = self._counter(PRIMARY).first_rows[self._where()][first_slot : first_slot + length]
        launch = plan_add(layout(counts), layout(counter))
        with torch_private.Untraced(), self._on_device():
            if not arrays.answered_by_reference(counts):
                launch(given=counts, enabled=self._flags[0], counts=counter)
            elif self._flags[0]:
                counter += counts.clamp(min=0)

    def _check_map(self, value: Any) -> np.ndarray:
        value = getattr(value, "physical_to_logical_map", value)
        places = checks.host_array("physical_to_logical_map", value, "int64", (2,)).copy()
        checks.holds(
            "physical_to_logical_map", f"of {self.num_layers} layers", len(places) == self.num_layers, len(places)
        )
        known = (places >= -1) & (places < self.num_experts)
        checks.every("physical_to_logical_map", "-1 or in [0, num_experts)", known, places, ("layer", "slot"))
        return places

    def _where(self) -> int:
        if self._layer is None:
            raise RuntimeError(
                "hooks must be inside `with_current_layer`, or `disable_this_region` where nothing counts"
            )
        return self._layer

    def _key(self) -> str:
        return self._name if self.mode in ("per_pass", "per_token") else PRIMARY

    def _capturing(self) -> bool:
        return self._is_cuda and torch_private.is_capturing()

    def _on_device(self) -> Any:
        if not self._is_cuda or torch_private.current_device() == self.device.index:
            return HERE
        return torch.cuda.device(self.device)

    def _wait_for_device(self) -> None:
        """Let the current stream wait for what was done to counts on whichever stream."""
        if self._changed is not None:
            torch.cuda.current_stream(self.device).wait_event(self._changed)

    def _note_work(self) -> None:
        if self._is_cuda:
            self._changed = torch.cuda.current_stream(self.device).record_event()

    def _counter(self, name: str) -> Counters:
        if name not in self._counters:
            self._check_not_captured(name)
            shape = (self.num_layers, COUNTER_ROWS, self.num_slots)
            with torch.inference_mode(False):  # what is made in that mode cannot be written out of it
                counts = torch.zeros(shape, dtype=torch.int64, device=self.device)
                self._counters[name] = Counters(counts, list(counts.unbind()), list(counts[:, 0].unbind()))
        return self._counters[name]

    def _is_new(self, name: str) -> bool:
        return name not in (self._streams if self.mode == "per_token" else self._counters)

    def _check_not_captured(self, name: str) -> None:
        if self._capturing():
            raise RuntimeError(f"hooks must have run once for {name!r} before a graph that holds them is captured")

    def _open(self, name: str, ids: Any, weights: Any) -> None:
        """Take memory for what is recorded under a name."""
        if self.mode != "per_token":
            self._counter(name)
            return
        self._check_not_captured(name)
        checks.array("topk_ids", layout(ids), checks.IDS, (2,))
        if not self._streams:
            self._top_k, self._with_weights = self._top_k or ids.shape[1], weights is not None
        shape = self.num_layers, self._top_k or 1
        sizes = self.num_slots, self._chunk_tokens, self._with_weights, self.device
        self._streams[name] = TokenStream(shape, *sizes)

    def _store(self, name: str, layer: int, first_row: int, ids: Any, weights: Any, capturing: bool) -> None:
        if self._rows_of is None and not capturing:
            raise RuntimeError("`on_select_experts` must be inside `with_forward_pass` with the mode 'per_token'")
        checks.array("topk_ids", layout(ids), checks.IDS, (2,))
        given = "given" if self._with_weights else "None"
        checks.holds("topk_weights", f"{given}, as before", (weights is not None) == self._with_weights, type(weights))
        self._streams[name].store(layer, first_row, ids, weights, self._flags, capturing)
