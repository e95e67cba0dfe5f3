"""`ExpertDistributionRecorder`: the methods for its owner; `hooks` has the methods that a model calls."""

import contextlib
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from numba_moe.recorder import attachment, metrics, sums
from numba_moe.recorder.choosing import Reader, find_layers
from numba_moe.recorder.dump_files import FORMATS, Dump, over_ranks
from numba_moe.recorder.hooks import HERE, MODES, PRIMARY, Hooks, setting
from numba_moe.recorder.passes import OpenPass, Record, Spill, Tokens, copied, gathered
from numba_moe.recorder.recording import Recording
from numba_moe.runtime import checks

# The id of what was counted outside of passes.
NO_PASS = -1


class Taken:
    """What a dump gives out, the maps of it, and what `_forget` has left."""

    def __init__(self, records: list[Record], maps: list[np.ndarray]) -> None:
        self.records, self.maps = records, maps
        self.left: deque[Record] | None = None


class ExpertDistributionRecorder(Hooks):
    """Record which experts are chosen, by layer and forward pass.

    Parameters
    ----------
    num_layers, num_experts : int
        Number of MoE layers (L), and of experts of a layer (E).
    mode : {None, "stat", "stat_approx", "per_pass", "per_token"}
        None records nothing, at no cost. "stat" counts by layer and expert, and dumps sum the counts over ranks.
        "stat_approx" does the same with counts that a dispatcher already has. "per_pass" keeps the counts of each pass
        and rank. "per_token" keeps the ids and weights of every token.
    top_k : int, optional
        Number of experts of a token, for "per_token". By default that of the first call.
    buffer_size : int, optional
        Number of last passes to keep. By default all passes.
    device : torch.device or str, optional
        The device of the ids. By default the current CUDA device, or the CPU without CUDA.
    process_group : torch.distributed.ProcessGroup, optional
        The ranks whose counts "stat" and "stat_approx" sum, in the same order as in the map.
    physical_to_logical_map : ExpertLocation or array of int, shape [L, P], optional
        The expert of each slot if ids are physical. By default ids are experts. Call `set_physical_to_logical_map`
        after a rebalance.
    num_gpus : int, optional
        Number of ranks that share the P slots equally, for metrics. By default the ranks of the group if they divide
        the slots, otherwise 1.
    chunk_tokens : int
        For "per_token": number of tokens that move to the host together, and the most tokens of a captured graph. The
        recorder takes memory for ``5 * chunk_tokens`` tokens on the device, and pinned memory for ``4 * chunk_tokens``
        tokens on the host.
    spill_directory : path, optional
        For "per_token": keep tokens in unnamed files there and not in memory.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        An unknown mode, a number out of bounds, a map of other sizes.

    Notes
    -----
    Hooks and passes do not synchronise: counters are int64 on the device, and a hook is one launch. A flag on the
    device switches recording, so each replay of a captured graph reads it. Hooks, passes and maps belong to one thread.
    Other threads may call the control methods, which then take effect between passes. Passes go on while a dump is
    written, and belong to the next dump.

    An exception (also a KeyboardInterrupt) loses only the counts of the call that it stops. The pass ends with all
    other counts, and a dump that fails keeps its counts. In a forked child the recorder is empty, and it works on the
    CPU only.

    With "per_token" the recorder has a thread. It ends when the recorder is closed, which a ``with`` statement does as
    well, or when nothing refers to it.

    Examples
    --------
    >>> import torch
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

    @property
    def recording(self) -> Recording:
        """Whether passes are recorded; if one is open, from the next on. ``with recorder.recording(path):`` does so."""
        found = Recording(self._wanted)
        found.recorder = self
        return found

    @property
    def buffer_size(self) -> int | None:
        """Number of last passes that are kept; None for all."""
        return self._size

    def attach(
        self,
        model: torch.nn.Module,
        *,
        pattern: str | re.Pattern[str] | None = None,
        ids: Reader | None = None,
        layers: Sequence[int] | None = None,
        experts: Sequence[int] | None = None,
    ) -> list[str]:
        """Record what a model chooses, and open a pass for each of its outermost forwards.

        Parameters
        ----------
        model, pattern, ids, layers, experts
            As in `numba_moe.recorder.attach`, which also makes the recorder.

        Returns
        -------
        list of str
            The name of the module that each layer is.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        RuntimeError
            The recorder is attached already, or its mode is "stat_approx", which ignores what models choose.
        ValueError
            A model without such layers, or with others than the recorder has; a number out of bounds.
        """
        if self._attachment is not None:
            raise RuntimeError("`attach` must come after `detach`, as this recorder is attached to a model")
        if self.mode == "stat_approx":
            raise RuntimeError("`attach` must be asked of a mode that counts what models choose, got 'stat_approx'")
        if ids is not None and not callable(ids):
            raise TypeError(f"`ids` must be a function of a module and its call, got {type(ids).__name__}")
        while isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):  # of what torch.compile returns
            model = inner
        found = find_layers(model, pattern)
        checks.holds("model", f"of num_layers = {self.num_layers}", len(found) == self.num_layers, len(found))
        most, sizes = max(self.num_experts, self.num_slots), [layer.num_experts or 0 for layer in found]
        checks.holds("model", f"of num_experts = {most} at most", max(sizes) <= most, max(sizes))
        numbers = checks.subset("layers", layers, self.num_layers)
        kept = None if experts is None else checks.subset("experts", experts, self.num_slots)
        if self.mode is not None:
            attachment.tie(self, model, found, numbers, kept, ids)
        return [layer.name for layer in found]

    def detach(self) -> None:
        """Leave the model that `attach` was given as it was before; the records stay."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def set_physical_to_logical_map(self, physical_to_logical_map: Any) -> None:
        """Say which expert each slot holds, [L, P] or an ExpertLocation, from the next pass on."""
        places = self._check_map(physical_to_logical_map)
        checks.host_shape("physical_to_logical_map", places, self._maps[0].shape, "that of the map before")
        with self._lock:
            self._maps.append(places)

    def start_record(self) -> None:
        """Start recording; if a pass is open, start with the next pass."""
        self._switch(True, "`start_record` changes nothing: recording is on already")

    def stop_record(self) -> None:
        """Stop recording; if a pass is open, stop at its end. The records stay until a dump or a reset."""
        self._switch(False, "`stop_record` changes nothing: recording is off already")

    def _switch(self, on: bool, unchanged: str) -> None:
        if self.mode is None:
            warnings.warn("nothing is recorded: the recorder's mode is None", RuntimeWarning, stacklevel=3)
            return
        with self._lock:
            if self._wanted == on:
                warnings.warn(unchanged, RuntimeWarning, stacklevel=3)
            self._wanted = on
            if self._pass is None:
                self._apply()

    def _apply(self) -> None:
        if self._on != self._wanted:
            self._wait_for_device()
            self._flags[0].fill_(int(self._wanted))
            self._on = self._wanted
            self._note_work()

    def reset(self) -> None:
        """Forget all records, but not the counts of an open pass; recording goes on if it was on."""
        if self.mode is None:
            return
        with self._lock:
            self._wait_for_device()
            self._records = deque(maxlen=self._size)
            self._spill = None
            self._forget_maps(self._maps[-1])
            if self._pass is None:
                self._clear_counts()
            self._note_work()

    def _forget_maps(self, places: np.ndarray) -> None:
        """Forget the maps before one, or before that of the open pass."""
        first = self._index_of(places)
        if self._pass is not None and self._pass.recorded:
            first = min(first, self._index_of(self._pass.places))
        self._maps = self._maps[first:]

    def _index_of(self, places: np.ndarray) -> int:
        return next((index for index, known in enumerate(self._maps) if known is places), 0)

    def close(self) -> None:
        """Stop recording, forget all records, and end the recorder's thread; the recorder may start again.

        Raises
        ------
        RuntimeError
            A pass is open.
        """
        with self._lock:
            if self._pass is not None:
                raise RuntimeError("`close` must not be called inside a pass")
            if self.mode is not None:
                self._wanted = False
                self._apply()
                self.reset()
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def __enter__(self) -> "ExpertDistributionRecorder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def dump_record(
        self, output_mode: str = "file", *, format: str = "npz", directory: Any = "."
    ) -> Path | Dump | None:
        """Return or write the records of finished passes, and forget them.

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
            The file could not be written. No file is left, and the records are kept.
        ValueError
            An unknown output mode or format; ranks with different maps.

        Notes
        -----
        The method synchronises. With "stat" or "stat_approx" and a process group all ranks call it together, and passes
        with the same id are summed. Counts outside of passes form a pass with id -1. An open pass belongs to the next
        dump.
        """
        checks.choice("output_mode", output_mode, ("file", "object"))
        checks.choice("format", format, FORMATS)
        if self.mode is None:
            warnings.warn("there is nothing to dump: the recorder's mode is None", RuntimeWarning, stacklevel=2)
            return None

        folder = checks.path("directory", directory)

        def path_of(rank: str) -> Path:
            return folder / f"expert_distribution_recorder_{time.time_ns()}{rank}.{format}"

        return self._dump(output_mode, path_of)

    def _dump(self, output_mode: str, path_of: Callable[[str], Path], warns: bool = True) -> Path | Dump | None:
        """Give out what `dump_record` does; a path is of the text that tells this rank's file from those of others."""
        taken, path, is_new = None, None, False
        try:
            with self._dumping:
                taken = self._finished()
                dump = self._dump_of(taken)
                found: Path | Dump | None = dump
                if not len(dump.forward_pass_id):
                    if warns:
                        warnings.warn("there is nothing to dump: no pass was recorded", RuntimeWarning, stacklevel=3)
                    found = dump if output_mode == "object" else None
                elif output_mode == "file":
                    summed = self.mode in MODES[:2]
                    if not summed or self.rank == 0:
                        path = path_of("" if summed else f"_{self.rank}")
                        is_new = not path.exists()
                    with sums.together(self.process_group if summed else None):
                        if path is not None:
                            dump.save(path)
                    found = path
                self._forget(taken)
            return found
        except BaseException:
            if path is not None and is_new:
                with contextlib.suppress(OSError):
                    path.unlink()
            if taken is not None:
                self._put_back(taken)
            raise

    def _finished(self) -> Taken:
        """Return what finished passes and calls outside of passes have left."""
        with self._lock:
            self._wait_for_device()
            if self._pass is None:
                names = [name for name, counters in self._counters.items() if counters.all.any()]
                if names:
                    with self._open_pass(OpenPass(NO_PASS, None, names)):
                        pass
            self._spill = None  # what comes after is another dump's
            return Taken(list(self._records), list(self._maps))

    def _forget(self, taken: Taken) -> None:
        """Forget what was given out."""
        with self._lock:
            known = set(map(id, taken.records))
            taken.left = deque((record for record in self._records if id(record) not in known), maxlen=self._size)
            self._records = taken.left
            self._forget_maps(taken.maps[-1])

    def _put_back(self, taken: Taken) -> None:
        """Undo what `_forget` did, unless a reset has come since."""
        with self._lock:
            if self._records is taken.left:
                first = next(index for index, places in enumerate(taken.maps) if places is self._maps[0])
                self._maps = [*taken.maps[:first], *self._maps]
                self._records = deque([*taken.records, *self._records], maxlen=self._size)

    def _dump_of(self, taken: Taken, alone: bool = False) -> Dump:
        """Return a dump of what was taken; with the counts of all ranks where they are summed, unless alone."""
        records, maps = taken.records, taken.maps
        index_of = {id(places): index for index, places in enumerate(maps)}
        tokens, num_tokens = None, None
        if self.mode == "per_token" and records:
            found = [record.tokens.parts() for record in records if record.tokens is not None]
            num_tokens = np.array([rows for rows, _ in found], np.int64)
            sizes = self._directory, (self.num_layers, self._top_k or 1), 1 + self._with_weights
            tokens = gathered([part for _, parts in found for part in parts], *sizes)
        dump = Dump(
            mode=str(self.mode),
            rank=self.rank,
            num_experts=self.num_experts,
            num_gpus=self.num_gpus,
            forward_pass_id=np.array([record.forward_pass_id for record in records], np.int64),
            gatherer_key=[record.gatherer_key for record in records],
            map_of_pass=np.array([index_of[id(record.places)] for record in records], np.int64),
            physical_to_logical_maps=np.stack(maps),
            topk_ids=tokens and tokens[0],
            topk_weights=tokens[1] if tokens and len(tokens) > 1 else None,
            num_tokens=num_tokens,
        )
        if self.mode == "per_token":
            return dump.with_counts_of_tokens(self.num_slots)
        counts = self._counts_of(records)
        if alone or self.mode == "per_pass" or self.process_group is None:
            return dump.with_counts(counts.cpu().numpy())
        return over_ranks(dump, counts, self.process_group)

    def _counts_of(self, records: Sequence[Record]) -> torch.Tensor:
        """Return counts on the device, [N, L, P]."""
        counts = [record.counts for record in records if record.counts is not None]
        shape = len(counts), self.num_layers, self.num_slots
        return torch.stack(counts) if counts else torch.empty(shape, dtype=torch.int64, device=self.device)

    def metrics(self, windows: Sequence[int] = (10, 100, 1000)) -> metrics.Metrics:
        """Return what the last passes say, on the device and of all ranks, who call it together.

        Parameters
        ----------
        windows : sequence of int
            Of how many last passes there is a mean balancedness each; the largest is what all other figures are of,
            but for `utilization`.

        Raises
        ------
        TypeError
            Windows that are no sequence of integers.
        ValueError
            No windows, or one below 1; ranks with different maps; counts whose sums int64 does not hold.
        RuntimeError
            A mode without counts; nothing was recorded.
        """
        if self.mode not in MODES[:3]:
            raise RuntimeError(f"`metrics` must be asked of a mode that counts, got {self.mode!r}")
        windows = metrics.check_windows(windows)
        with self._lock:
            self._wait_for_device()
            records, maps = list(self._records)[-max(windows) :], list(self._maps)
        index_of = {id(places): index for index, places in enumerate(maps)}
        pass_ids, map_of_pass = [r.forward_pass_id for r in records], [index_of[id(r.places)] for r in records]
        counts, sizes = self._counts_of(records), (self.num_experts, self.num_gpus)
        found = metrics.measure(counts, pass_ids, map_of_pass, maps, sizes, windows, self.process_group)
        with self._lock:
            self._note_work()
        return found

    def with_forward_pass(
        self, forward_pass_id: int, num_tokens: int | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Record everything inside as one forward pass.

        `num_tokens`, if given, is the number of real tokens; later rows of `topk_ids` are padding, also in replayed
        graphs. There are no passes while a graph is captured.
        """
        if self.mode is None:
            return HERE
        if self._capturing():
            return setting(self, "_rows_of", {})
        number = checks.integer("forward_pass_id", forward_pass_id, 0, 2**63 - 1)
        if num_tokens is not None:
            checks.integer("num_tokens", num_tokens, 0)
        return self._open_pass(OpenPass(number, num_tokens))

    @contextlib.contextmanager
    def _open_pass(self, opened: OpenPass) -> Iterator[None]:
        """Open a pass, and close it whichever line an exception comes at."""
        try:
            try:
                self._begin_pass(opened)
                yield
            finally:
                self._close_pass(opened)
        except BaseException:
            self._close_pass(opened)  # again, as an interrupt may have come before the first of it
            raise

    def _begin_pass(self, opened: OpenPass) -> None:
        if self._member is not None and opened.names is None and self._pass is None:
            self._member.before_pass(opened.number)
        with self._lock:
            if self._pass is not None:
                raise RuntimeError("`with_forward_pass` must not be inside another")
            self._wait_for_device()
            self._apply()
            opened.places, opened.layer = self._maps[-1], self._layer
            self._pass = opened  # from here on an exception ends it, and before the last line nothing is recorded
            self._rows_of = opened.rows
            if self._on and opened.num_tokens is not None:
                self._limited = True
                self._flags[1].fill_(opened.num_tokens)
            opened.recorded = self._on or opened.names is not None

    def _close_pass(self, opened: OpenPass) -> None:
        with self._lock:
            try:
                self._end_pass(opened)
            except BaseException:
                try:
                    self._end_pass(opened)  # again from where it came to
                finally:
                    self._settle(opened)  # without its counts, if an error comes twice
                raise
        if opened.names is None and opened.records and not opened.is_told:
            opened.is_told = True
            for follower in tuple(self.after_pass):
                follower(opened.records)
        if self._member is not None and opened.names is None and self._pass is None:
            self._member.after_pass()

    def _end_pass(self, opened: OpenPass) -> None:
        if self._pass is opened and opened.recorded:
            self._wait_for_device()
            if opened.records is None:
                found = [self._record(name, opened) for name in self._names_of(opened)]
                opened.records = [record for record in found if record is not None]
            if opened.records and not (self._records and self._records[-1] is opened.records[-1]):
                self._records.extend(opened.records)
        self._settle(opened)

    def _settle(self, opened: OpenPass) -> None:
        """Clear the counters of a pass, whose counts are kept, and let control take effect."""
        if self._pass is opened:
            for name in self._names_of(opened) if opened.recorded else ():
                if self.mode != "per_token":
                    self._counter(name).all.zero_()
                elif name in self._streams:
                    self._streams[name].clear()
            self._unlimit()
            if opened.recorded:
                self._note_work()
            self._apply()
            self._layer, self._rows_of = opened.layer, None
            self._pass = None

    def _names_of(self, opened: OpenPass) -> list[str]:
        if opened.names is not None:
            return opened.names
        names = [] if self.mode in MODES[:2] else sorted({name for name, _ in opened.rows} | self._lasting)
        return names or [PRIMARY]

    def _record(self, name: str, opened: OpenPass) -> Record | None:
        about = opened.number, name, opened.places
        if self.mode != "per_token":
            return Record(*about, counts=self._counter(name).all.sum(dim=1))
        if name not in self._streams:
            return None
        if self._directory is not None and self._spill is None:
            self._spill = Spill(self._directory, (self.num_layers, self._top_k or 1))
        tokens = opened.tokens.setdefault(name, Tokens(copied if self._spill is None else self._spill.add))
        num_rows = max((rows for key, rows in opened.rows.items() if key[0] == name), default=0)
        self._streams[name].send(num_rows, tokens, self._keeper())
        return Record(*about, tokens=tokens)


def attach(
    model: torch.nn.Module,
    *,
    mode: str | None = "stat",
    pattern: str | re.Pattern[str] | None = None,
    ids: Reader | None = None,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    num_experts: int | None = None,
    **options: Any,
) -> ExpertDistributionRecorder:
    """Make a recorder of a model's sizes and attach it: its layers are numbered in order, its forwards are passes.

    Parameters
    ----------
    model : torch.nn.Module
        A model with blocks of `MoEBlock`, or of transformers, or any with modules that a pattern names.
    mode : {"stat", "per_pass", "per_token", None}
        As in `ExpertDistributionRecorder`.
    pattern : str or re.Pattern, optional
        The names of the modules that choose experts: a pattern as for files, ``"*.mlp.gate"``, or a regular expression
        for whole names. By default they are found by what they do.
    ids : callable, optional
        Reads the ids [..., top_k], or a tuple of ids and weights, given ``(module, args, kwargs, result)`` of a call.
        By default they are the first integers of two or more dimensions that a module returns or is given.
    layers : sequence of int, optional
        Numbers of the layers to record; the others count nothing. By default all.
    experts : sequence of int, optional
        Ids of the experts to record, in the same way.
    num_experts : int, optional
        Experts of a layer (E). By default the model says it.
    **options
        What else `ExpertDistributionRecorder` takes; `device` is that of the layers by default, and `top_k` the most
        of them.

    Returns
    -------
    ExpertDistributionRecorder
        Attached, and off: ``recorder.start_record()`` or ``with recorder.recording():`` starts it.

    Raises
    ------
    ValueError
        A model without such modules, sizes that nothing in it says, a number out of bounds.
    TypeError
        An argument of the wrong type, or an unknown option.

    Notes
    -----
    Works eagerly, under torch.compile with ``fullgraph=True``, in CUDA graphs and in `torch.inference_mode`. What
    activation checkpointing computes anew counts once. A pass that is open already goes on; passes are numbered from 0.
    A copy of the model, or a pickled one, has a recorder of its own, which is empty and off: `attached` returns it.

    Examples
    --------
    >>> import torch, numba_moe
    >>> model = torch.nn.Sequential(*(numba_moe.MoEBlock(16, 8, num_experts=4, top_k=2) for _ in range(3)))
    >>> recorder = attach(model)
    >>> with recorder.recording():
    ...     _ = model(torch.randn(5, 16))
    >>> recorder.dump_record("object").logical_count.sum(axis=2)
    array([[10, 10, 10]])
    >>> recorder.detach()
    """
    found = find_layers(model, pattern)
    most = max(layer.num_experts or 0 for layer in found) if num_experts is None else num_experts
    checks.holds("num_experts", "given, as the model does not say it", most != 0 or num_experts is not None, None)
    defaults = {"device": _device_of(model), "top_k": max((layer.top_k or 0 for layer in found), default=0) or None}
    recorder = ExpertDistributionRecorder(len(found), most, mode=mode, **{**defaults, **options})
    recorder.attach(model, pattern=pattern, ids=ids, layers=layers, experts=experts)
    return recorder


def _device_of(model: torch.nn.Module) -> torch.device | None:
    """Return the device of a model; None where it has no memory yet."""
    return next((part.device for part in model.parameters() if part.device.type != "meta"), None)


def attached(model: torch.nn.Module) -> list[ExpertDistributionRecorder]:
    """Return the recorders that are attached to a model.

    Parameters
    ----------
    model : torch.nn.Module
        Any model, or a part of one.

    Returns
    -------
    list of ExpertDistributionRecorder
        Those that record some module in it.

    Raises
    ------
    TypeError
        Something that is no model.

    Notes
    -----
    A copy of a model, and an unpickled one, has recorders of its own.

    Examples
    --------
    >>> import copy, numba_moe
    >>> block = numba_moe.MoEBlock(16, 8, num_experts=4, top_k=2)
    >>> recorder = attach(block)
    >>> other = copy.deepcopy(block)                # has a recorder of its own, empty and off
    >>> attached(block) == [recorder], attached(other) == [recorder], len(attached(other))
    (True, False, 1)
    """
    checks.instance("model", model, torch.nn.Module)
    found: dict[int, ExpertDistributionRecorder] = {}
    for module in model.modules():
        for tie in attachment.ties_of(module):
            found[tie.number] = tie.recorder
    return list(found.values())
