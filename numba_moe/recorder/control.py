"""`ExpertDistributionRecorder`: what its owner calls; `hooks` has what a model calls."""

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from numba_moe.recorder import metrics, sums
from numba_moe.recorder.files import FORMATS, Dump
from numba_moe.recorder.hooks import MODES, PRIMARY, Hooks, Record, Setting
from numba_moe.recorder.passes import TokenFiles, TokenLists, TokenStream
from numba_moe.runtime import checks

# The id of what was counted outside of passes.
NO_PASS = -1


class ExpertDistributionRecorder(Hooks):
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
    def recording(self) -> bool:
        """Whether passes are recorded, from the next one on if one is open."""
        return self._wanted

    def set_physical_to_logical_map(self, physical_to_logical_map: Any) -> None:
        """Say which expert each slot holds, [L, P] or an ExpertLocation, from the next pass on."""
        places = self._check_map(physical_to_logical_map)
        checks.host_shape("physical_to_logical_map", places, self._maps[0].shape, "that of the map before")
        with self._lock:
            self._maps.append(places)

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
                stream.forget(self._in_pass)
            if not self._in_pass:
                for counters in self._counters.values():
                    counters.all.zero_()
            self._clear()
            self._note_work()

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
            for name, counters in self._counters.items():
                if counters.all.any():
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
            self._wait_for_device()
            self._apply()
            self._in_pass, self._pass_map, self._rows_of = True, len(self._maps) - 1, {}
            self._limited = self._on and num_tokens is not None
            if self._limited:
                self._flags[1].fill_(num_tokens)
        try:
            yield
        finally:
            with self._lock:
                used, self._rows_of = self._rows_of or {}, None
                self._in_pass = False
                if self._on:
                    self._end_pass(number, used)
                    if self._limited:
                        self._flags[1].fill_(checks.LARGEST_INT32)
                    self._note_work()
                self._apply()

    def _end_pass(self, number: int, used: dict[tuple[str, int], int]) -> None:
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
        counts = self._counter(name).all
        self._counts.append(counts.sum(dim=1))
        counts.zero_()
        self._records.append(Record(number, name, self._pass_map))
