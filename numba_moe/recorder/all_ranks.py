"""Start, stop and dump on all ranks of a process group at the same pass, by messages through the group's store.

Rank 0 leads: its HTTP app gets the commands. On each other rank a thread looks for messages of the leader in the store
20 times a second, and the leader waits for each answer until a timeout. So a rank that is gone or late is known by its
number. No message is a collective, and the model's thread sends and awaits none. So the messages cannot get between the
model's own collectives, and while there is no command a pass costs one comparison.

A switch has three steps. Each rank says which pass it would begin next, by the ids that `with_forward_pass` is given.
Each rank then agrees to switch at the largest of them. A rank that has begun this pass meanwhile names a later one, and
the leader asks all ranks again. Then the leader decides, and each rank switches when it begins the pass, or at once if
it is between passes and this pass is next. A model that comes to the pass between the last two steps waits for the
decision. The decision needs no other model, only the threads, and the wait ends with the timeout. If a rank does not
answer, the leader takes the agreement back, and nothing has changed.

A dump takes the passes before the first one that some rank has not finished. Each rank finishes the passes before it,
and puts their records aside while the model goes on. If dumps are sums, the leader fetches the counts, adds them and
writes one file; otherwise each rank writes its own. Then the leader decides, and all ranks forget these records. If
anything fails before, all ranks keep them for the next dump. A rank whose leader is gone keeps them as well.

Ids of passes must rise in the same way on all ranks, as engines count them. Where they start over, a switch that waits
for a pass takes effect. A rank that has no pass in which the others record can be left out with ``partial``.
"""

import atexit
import contextlib
import dataclasses
import errno
import io
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numba_moe.recorder.control import ExpertDistributionRecorder
from numba_moe.recorder.dump_files import Dump
from numba_moe.recorder.hooks import MODES
from numba_moe.recorder.member import Member
from numba_moe.recorder.sums import LARGEST_INT64, add_rows, numbered, places_of
from numba_moe.runtime import checks, torch_private

_log = logging.getLogger(__name__)

IDLE = 0.05  # seconds between two looks into the store
BUSY = 0.001  # the same for a second after a message, as others follow
STORE_TIMEOUT = timedelta(seconds=60)  # for a store that itself hangs


class RanksMissingError(RuntimeError):
    """Ranks did not do their part in time; `ranks` has their numbers."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class BusyError(RuntimeError):
    """Another command is at work."""


class NotLeadingError(RuntimeError):
    """The command came to a rank that follows."""


class StoreGoneError(RuntimeError):
    """The group's store does not answer: the rank or program that keeps it is gone."""


def follow(recorder: ExpertDistributionRecorder) -> None:
    """Let a rank follow the commands that rank 0 gets over HTTP.

    Parameters
    ----------
    recorder : ExpertDistributionRecorder
        The recorder of this rank; its process group has the ranks.

    Returns
    -------
    None

    Raises
    ------
    TypeError
        Something that is no recorder.
    ValueError
        The recorder has no process group.

    Notes
    -----
    Call this, or `make_app`, once on every rank, for several recorders in the same order. A thread then waits for
    commands for the life of the recorder.

    Examples
    --------
    >>> from numba_moe.recorder import ExpertDistributionRecorder
    >>> recorder = ExpertDistributionRecorder(1, 3, mode="stat", device="cpu")
    >>> follow(recorder)
    Traceback (most recent call last):
        ...
    ValueError: `recorder` must be one with a process group, got None
    """
    checks.instance("recorder", recorder, ExpertDistributionRecorder)
    checks.holds("recorder", "one with a process group", recorder.process_group is not None, recorder.process_group)
    ranks_of(recorder)


def ranks_of(recorder: ExpertDistributionRecorder) -> "AllRanks":
    """Return the ranks of a recorder, the same for two apps of one."""
    if recorder._member is None:
        recorder._member = Member(recorder)
        recorder._member.ranks = AllRanks(recorder._member)
    return recorder._member.ranks


_followed: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()  # recorders of each group so far


def _store_of(group: Any) -> Any:
    """Return the group's store under a name of our own, by a connection that nobody else waits on."""
    import torch.distributed as dist

    store = torch_private.group_store(group)
    if hasattr(store, "clone"):  # from torch 2.8 on
        store = store.clone()
        store.set_timeout(STORE_TIMEOUT)
    number = _followed.get(group, 0)
    _followed[group] = number + 1
    return dist.PrefixStore(f"numba_moe recorder {number}", store)  # type: ignore[attr-defined]


def _of_store() -> type[Exception]:
    import torch.distributed as dist

    return dist.DistError if dist.is_available() else RuntimeError


class AllRanks:
    """The ranks of a recorder's group as their leader sees them; on other ranks, that they follow.

    Parameters
    ----------
    member : Member
        This rank.
    """

    def __init__(self, member: Member) -> None:
        recorder = member.recorder
        self.rank, self.num_ranks = recorder.rank, recorder.num_ranks
        self._member = member
        self._store = None if self.num_ranks == 1 else _store_of(recorder.process_group)
        self._sent = [0] * self.num_ranks
        self._leading = threading.Lock()  # held by one command
        if self.rank > 0:
            _Listener(self._store, member, self.rank).start()

    def status(self, seconds: float) -> tuple[list[dict[str, Any]], list[int]]:
        """Return what each rank does that answers, and who does not."""
        with self._command(seconds, partial=True) as command:
            replies = command.tell("status")
            return [{"rank": rank, **reply} for rank, reply in sorted(replies.items())], command.missing

    def switch(self, on: bool, seconds: float, partial: bool = False) -> tuple[int, list[int]]:
        """Let all ranks start or stop recording; return from which pass on, and who is left out."""
        with self._command(seconds, partial) as command:
            at, ahead = max(command.tell("next_switch").values()), 0
            while True:
                possible = max(command.tell("agree", on=on, at=at).values())
                if possible == at:
                    break
                at, ahead = possible + ahead, 2 * ahead + 1  # where passes are shorter than these steps
            command.decide()
            return at, command.missing

    def dump(self, format: str, directory: Path, seconds: float, partial: bool = False) -> tuple[list[str], list[int]]:
        """Let all ranks dump; return the names of files, none if nothing was recorded, and who is left out."""
        stamp = f"expert_distribution_recorder_{time.time_ns()}"
        names: dict[int, str] = {}
        with self._command(seconds, partial) as command:
            before = max(command.tell("next_dump").values())
            taken = command.tell("take", before=before, wait=not partial)
            late = {rank: reply["late"] for rank, reply in taken.items() if "late" in reply}
            if late:
                raise RanksMissingError("; ".join(f"rank {rank} {what}" for rank, what in late.items()), list(late))
            recorded = [rank for rank, reply in taken.items() if reply["passes"]]
            with contextlib.ExitStack() as files:
                if recorded and self._member.recorder.mode in MODES[:2]:
                    names = {self.rank: f"{stamp}.{format}"}
                    total = added([self._part_of(rank, command) for rank in taken], self._member.held.dump)
                    path = directory / names[self.rank]
                    files.callback(path.unlink, missing_ok=True)
                    total.save(path)
                elif recorded:
                    names = {rank: f"{stamp}_{rank}.{format}" for rank in recorded}
                    paths = {rank: {"path": str(directory / name)} for rank, name in names.items()}
                    for rank, reply in command.tell_each("write", paths).items():
                        if reply:
                            where = f"on rank {rank}: " if self.num_ranks > 1 else ""
                            raise OSError(reply["errno"] or errno.EIO, where + reply["error"])
                files.pop_all()
            command.decide()
            return list(names.values()), command.missing

    def _part_of(self, rank: int, command: "_Command") -> "Part":
        """Return the counts that a rank has put aside."""
        if rank == self.rank:
            dump = self._member.held.dump
            return Part(*(getattr(dump, name) for name in Part._fields))
        memory = io.BytesIO()
        while part := command.tell_each("part", {rank: {"begin": memory.tell()}})[rank]:
            memory.write(part)
        memory.seek(0)
        with np.load(memory, allow_pickle=False) as found:
            return Part(*(found[name].astype(np.int64) for name in Part._fields))

    @contextlib.contextmanager
    def _command(self, seconds: float, partial: bool) -> Iterator["_Command"]:
        """Lead a command; if it fails before its decision, let all ranks take back what they have agreed to."""
        if self.rank > 0:
            raise NotLeadingError(f"rank {self.rank} follows rank 0, which has the commands of all ranks")
        if not self._leading.acquire(timeout=seconds):
            raise BusyError(f"another command is at work for more than {seconds:g} s")
        command = _Command(self._member, self._store, self._sent, seconds, partial)
        try:
            try:
                yield command
            except _of_store() as error:
                raise StoreGoneError(f"the group's store does not answer: {error}") from error
        except BaseException:
            if not command.decided:
                self._member.hear({"do": "decide", "go": False})
                with contextlib.suppress(RuntimeError):  # the store is gone too; the first error is the one to tell
                    command.take_back()
            raise
        finally:
            self._leading.release()


class _Command:
    """One command of the leader: who takes part, and until when."""

    def __init__(self, member: Member, store: Any, sent: list[int], seconds: float, partial: bool) -> None:
        self._member, self._store, self._sent = member, store, sent
        self._seconds, self._partial = seconds, partial
        self._deadline = time.monotonic() + seconds
        self.ranks, self.missing = list(range(len(sent))), list[int]()
        self.decided = False

    @property
    def left(self) -> float:
        """Seconds until all ranks must have come to the pass."""
        return max(self._deadline - time.monotonic(), 0.0)

    def tell(self, do: str, **words: Any) -> dict[int, Any]:
        """Tell all ranks, and return what each answers before the command's deadline."""
        return self._answers(do, dict.fromkeys(self.ranks, words), self.left)

    def tell_each(self, do: str, words: dict[int, dict[str, Any]]) -> dict[int, Any]:
        """Tell each rank its own words, and wait for each as long as for a command."""
        return self._answers(do, words, self._seconds)

    def decide(self) -> None:
        """Let all ranks do what they have agreed to."""
        self.decided = True
        done = self._answers("decide", {rank: {"go": True} for rank in self.ranks}, self._seconds)
        gone = [rank for rank, known in done.items() if not known]
        if gone:
            raise RanksMissingError(f"{_named(gone)} did not wait for the decision; all others have followed it", gone)

    def take_back(self) -> None:
        """Let the other ranks undo what they have agreed to, and wait for them no longer than `GRACE`."""
        words = {rank: {"go": False} for rank in range(len(self._sent))}
        self._collect(self._post("decide", words), time.monotonic() + GRACE)

    def _post(self, do: str, words: dict[int, dict[str, Any]]) -> dict[int, str]:
        """Send messages to other ranks, and return where in the store each answer will be."""
        places = {}
        for rank, about in words.items():
            if rank != 0:
                number, self._sent[rank] = self._sent[rank], self._sent[rank] + 1
                self._store.set(f"to {rank} {number}", json.dumps({"do": do, **about}))
                places[rank] = f"from {rank} {number}"
        return places

    def _answers(self, do: str, words: dict[int, dict[str, Any]], seconds: float) -> dict[int, Any]:
        deadline = time.monotonic() + seconds
        if do in TIMED:
            deadline += GRACE
            words = {rank: {**about, "seconds": seconds} for rank, about in words.items()}
        places = self._post(do, words)
        found = {0: self._member.hear({"do": do, **words[0]})} if 0 in words else {}
        found |= self._collect(places, deadline)
        if places:
            self._leave_out(do, list(places))
        return {rank: found[rank] for rank in words if rank in found}

    def _collect(self, places: dict[int, str], deadline: float) -> dict[int, Any]:
        """Return what has come before the deadline; `places` keeps the others."""
        found, pause = {}, BUSY
        while places:
            for rank in [rank for rank, place in places.items() if self._store.check([place])]:
                place = places.pop(rank)
                found[rank] = _opened(rank, self._store.get(place))
                self._store.delete_key(place)
            if places:
                if time.monotonic() > deadline:
                    break
                time.sleep(pause)
                pause = min(2 * pause, IDLE)
        return found

    def _leave_out(self, do: str, gone: list[int]) -> None:
        if self.decided:
            raise RanksMissingError(f"{_named(gone)} did not confirm the decision; all others have followed it", gone)
        if not self._partial or do in ("part", "write"):
            raise RanksMissingError(f"{_named(gone)} did not answer within {self._seconds:g} s", gone)
        self.ranks = [rank for rank in self.ranks if rank not in gone]
        self.missing += gone
        self._deadline = time.monotonic() + self._seconds


# Messages that say how long a rank may take, and the seconds that its answer then has to arrive.
TIMED, GRACE = ("agree", "take", "part", "write"), 0.5


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# The first byte of an answer says what it is.
VALUE, BYTES, ERROR = b"v", b"b", b"e"


def _closed(answer: Any) -> bytes:
    return BYTES + answer if isinstance(answer, bytes) else VALUE + json.dumps(answer).encode()


def _opened(rank: int, answer: bytes) -> Any:
    kind, content = answer[:1], answer[1:]
    if kind == ERROR:
        raise RuntimeError(f"rank {rank} failed: {content.decode()}")
    return content if kind == BYTES else json.loads(content)


class _Listener(threading.Thread):
    """Waits on a rank for messages of the leader, until its recorder is gone, or the program ends."""

    def __init__(self, store: Any, member: Member, rank: int) -> None:
        super().__init__(name="numba-moe-commands", daemon=True)
        self._store, self._member, self._rank = store, member, rank
        self._ended = threading.Event()
        self._process = os.getpid()
        atexit.register(self._end)

    def _end(self) -> None:
        self._ended.set()
        if os.getpid() == self._process:
            self.join()  # a thread that is in the store while Python ends would fall into nothing

    def run(self) -> None:
        try:
            self._listen()
        except _of_store() as error:
            _log.warning("rank %d follows no more commands: the group's store is gone (%s)", self._rank, error)
        finally:
            self._member.let_go(False)
            atexit.unregister(self._end)

    def _listen(self) -> None:
        number, last = 0, -math.inf
        while not self._ended.wait(BUSY if time.monotonic() < last + 1 else IDLE) and self._member.is_used():
            self._member.look_at_clock()
            place = f"to {self._rank} {number}"
            if self._store.check([place]):
                message = json.loads(self._store.get(place))
                self._store.delete_key(place)
                self._store.set(f"from {self._rank} {number}", self._answer(message))
                number, last = number + 1, time.monotonic()

    def _answer(self, message: dict[str, Any]) -> bytes:
        try:
            return _closed(self._member.hear(message))
        except Exception as error:  # the leader says it to whom it may concern
            _log.exception("rank %d could not follow %s", self._rank, message)
            return ERROR + f"{type(error).__name__}: {error}".encode()


class Part(NamedTuple):
    """What a rank adds to a sum, in arrays of a `Dump`."""

    global_physical_count: np.ndarray
    physical_to_logical_maps: np.ndarray
    map_of_pass: np.ndarray
    forward_pass_id: np.ndarray


def added(parts: Sequence[Part], dump: Dump) -> Dump:
    """Add the counts of ranks by pass and map, into a dump which says the rest.

    A pass that some ranks lack, or have less often, is the sum of the others.
    """
    maps: dict[bytes, np.ndarray] = {}
    keys = []
    for part in parts:
        in_force = part.physical_to_logical_maps[part.map_of_pass]
        maps |= {places.tobytes(): places for places in in_force}
        of_pass = [places.tobytes() for places in in_force]
        keys.append(numbered(zip(part.forward_pass_id.tolist(), of_pass, strict=True)))
    place, rows = places_of(keys)
    most = sum(int(part.global_physical_count.max(initial=0)) for part in parts)
    checks.holds("counts", "small enough for their sums over ranks to fit int64", most <= LARGEST_INT64, most)
    counts = [part.global_physical_count for part in parts]
    total = add_rows(counts, rows, (len(place), *dump.global_physical_count.shape[1:]))
    number_of = {places: number for number, places in enumerate(maps)}
    summed = dataclasses.replace(
        dump,
        forward_pass_id=np.array([pass_id for pass_id, _, _ in place], np.int64),
        gatherer_key=["primary"] * len(place),
        map_of_pass=np.array([number_of[places] for _, places, _ in place], np.int64),
        physical_to_logical_maps=np.stack(list(maps.values())),
    ).with_counts(total)
    return dataclasses.replace(summed, rank_physical_count=np.stack([part.sum(0) for part in counts]))
