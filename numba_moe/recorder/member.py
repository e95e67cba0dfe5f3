"""One rank's part in the commands that reach all ranks; `all_ranks` has the protocol that it answers."""

import contextlib
import io
import math
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numba_moe.recorder.control import NO_PASS, ExpertDistributionRecorder, Taken
from numba_moe.recorder.dump_files import Dump

# Bytes of a message; torch's store takes at most 8 MiB.
MOST_BYTES = 4 << 20


class Armed(NamedTuple):
    """A switch that this rank has agreed to, and that the leader has not decided yet."""

    on: bool
    at: int  # the first pass for which it holds
    deadline: float


class Held:
    """The records that a dump takes: the recorder forgets them when all ranks have given theirs."""

    def __init__(self, recorder: ExpertDistributionRecorder, taken: Taken) -> None:
        self.recorder, self.taken = recorder, taken
        self.file: Path | None = None
        self._dump: Dump | None = None
        self._sent = b""

    @property
    def dump(self) -> Dump:
        """What this rank alone has recorded."""
        if self._dump is None:
            self._dump = self.recorder._dump_of(self.taken, alone=True)
        return self._dump

    def bytes(self) -> bytes:
        """Return what another rank needs for a sum."""
        if not self._sent:
            counts = self.dump.global_physical_count
            memory = io.BytesIO()
            np.savez(
                memory,
                global_physical_count=counts.astype(np.min_scalar_type(int(counts.max(initial=0)))),
                physical_to_logical_maps=self.dump.physical_to_logical_maps,
                map_of_pass=self.dump.map_of_pass,
                forward_pass_id=self.dump.forward_pass_id,
            )
            self._sent = memory.getvalue()
        return self._sent

    def end(self, forget: bool) -> None:
        """Forget the records, or leave them and take back the file of them."""
        if forget:
            self.recorder._forget(self.taken)
        elif self.file is not None:
            with contextlib.suppress(OSError):
                self.file.unlink()
        self.recorder._dumping.release()


class Member:
    """A rank as its recorder and its leader see it: the recorder tells of passes, the leader gives commands.

    Passes belong to the model's thread, and commands to one other thread. A pass waits for a command only if it is the
    pass at which a switch takes effect, the rank has agreed to the switch, and the leader has not decided yet.
    """

    def __init__(self, recorder: ExpertDistributionRecorder) -> None:
        self._recorder = weakref.ref(recorder)
        self.ranks: Any = None  # as this one sees them
        self._news = threading.Condition()  # held while what follows is read and changed
        self._next, self._open, self._restarts = 0, False, 0  # of passes: the id after the last one's
        self._armed: Armed | None = None
        self._due: list[tuple[int, bool]] = []  # decided switches, by the pass at which they take effect
        self._held: Held | None = None
        self._deadline = math.inf  # until then a leader must decide about what is held

    def is_used(self) -> bool:
        return self._recorder() is not None

    @property
    def recorder(self) -> ExpertDistributionRecorder:
        recorder = self._recorder()
        if recorder is None:
            raise RuntimeError("the recorder is gone")
        return recorder

    def before_pass(self, number: int) -> None:
        """Let the switches up to this pass take effect."""
        with self._news:
            starts_over = number < self._next
            while (armed := self._armed) is not None and (starts_over or number >= armed.at):
                left = armed.deadline - time.monotonic()
                if left > 0:
                    self._news.wait(left)
                else:
                    self._armed = None  # the leader is gone, and has told nobody to switch
            self._restarts += starts_over
            self._apply(math.inf if starts_over else number)
            self._next, self._open = number + 1, True

    def after_pass(self) -> None:
        """Let what waits for the end of a pass go on."""
        with self._news:
            self._open = False
            self._apply(self._next)
            self._news.notify_all()

    def _apply(self, number: float) -> None:
        while self._due and self._due[0][0] <= number:
            self._turn(self._due.pop(0)[1])

    def _turn(self, on: bool) -> None:
        recorder = self.recorder
        if bool(recorder.recording) != on:
            (recorder.start_record if on else recorder.stop_record)()

    def hear(self, message: dict[str, Any]) -> Any:
        """Follow a message of the leader, and return what it wants to know."""
        words = dict(message)
        return getattr(self, f"_hear_{words.pop('do')}")(**words)

    def _hear_status(self) -> dict[str, Any]:
        with self._news:
            pending = [{"recording": on, "from_pass": at} for at, on in self._due]
            last, is_open = self._next - 1, self._open
        recorder = self.recorder
        with recorder._lock:
            passes = len(recorder._records)
        about = {"mode": recorder.mode, "recording": bool(recorder.recording), "passes": passes}
        return {**about, "last_pass": None if last < 0 else last, "in_pass": is_open, "pending": pending}

    def _hear_next_switch(self) -> int:
        """Return the first pass at which a switch can take effect."""
        with self._news:
            return max([self._next, *(at for at, _ in self._due)])

    def _hear_next_dump(self) -> int:
        """Return the first pass that is not over."""
        with self._news:
            return self._next - self._open

    def _hear_agree(self, on: bool, at: int, seconds: float) -> int:
        """Agree to a switch, or return the later pass at which it could take effect."""
        with self._news:
            if self._next <= at:
                self._armed = Armed(on, at, time.monotonic() + seconds)
                self._news.notify_all()
            return max(self._next, at)

    def _hear_decide(self, go: bool) -> bool:
        """Do what was agreed to, or forget it; return whether there was something."""
        with self._news:
            armed, self._armed = self._armed, None
            if armed is not None and go:
                self._due.append((armed.at, armed.on))
                self._apply(self._next)  # which takes effect at the end of an open pass
            self._news.notify_all()
        known = armed is not None or self._held is not None
        self.let_go(go)
        return known

    def _hear_take(self, before: int, wait: bool, seconds: float) -> dict[str, Any]:
        """Hold the records of the passes before one, which must be over, and return their number."""
        self.let_go(False)
        recorder, deadline = self.recorder, time.monotonic() + seconds
        with self._news:
            restarts = self._restarts

            def is_over() -> bool:
                return self._next - self._open >= before or self._restarts > restarts

            if wait and not self._news.wait_for(is_over, seconds):
                where = f"is in pass {self._next - 1}" if self._open else f"has not begun pass {self._next}"
                return {"late": f"{where}, while others have come to pass {before}"}
        if not recorder._dumping.acquire(timeout=max(deadline - time.monotonic(), 0)):
            return {"late": "is writing another dump"}
        try:
            self._held = Held(recorder, _before(recorder._finished(), before))
        except BaseException:
            recorder._dumping.release()
            raise
        self._extend(seconds)
        return {"passes": len(self._held.taken.records)}

    def _hear_part(self, begin: int, seconds: float) -> bytes:
        """Return bytes of what is held, none after the last."""
        self._extend(seconds)
        return self.held.bytes()[begin : begin + MOST_BYTES]

    def _hear_write(self, path: str, seconds: float) -> dict[str, Any]:
        """Write what is held to a file of this rank's own."""
        self._extend(seconds)
        self.held.file = Path(path)
        try:
            self.held.dump.save(path)
        except OSError as error:
            return {"errno": error.errno, "error": error.strerror or str(error)}
        finally:
            self._extend(seconds)
        return {}

    @property
    def held(self) -> Held:
        if self._held is None:
            raise RuntimeError("a dump took too long, and its records are back")
        return self._held

    def _extend(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def let_go(self, forget: bool) -> None:
        """End a dump."""
        held, self._held, self._deadline = self._held, None, math.inf
        if held is not None:
            held.end(forget)

    def look_at_clock(self) -> None:
        """Take back the records of a dump that the leader has left."""
        if time.monotonic() > self._deadline:
            self.let_go(False)


def _before(taken: Taken, number: int) -> Taken:
    """Return what was recorded before a pass: a rank may have gone on. Ids rise, but they may have started over."""
    ids = [record.forward_pass_id for record in taken.records]
    last = max((index for index, pass_id in enumerate(ids) if NO_PASS < pass_id < number), default=-1)
    first_later = next((index for index, pass_id in enumerate(ids) if index > last and pass_id >= number), None)
    if first_later is None:
        return taken
    places = taken.records[first_later].places
    until = next(index for index, known in enumerate(taken.maps) if known is places)
    return Taken(taken.records[:first_later], taken.maps[: until + 1])  # a map stays while passes under it do
