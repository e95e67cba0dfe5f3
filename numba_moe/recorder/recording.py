"""Whether a recorder records, the context in which it does, and dumps in numbered files while it goes on."""

import contextlib
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba_moe.recorder.dump_files import FORMATS
from numba_moe.recorder.hooks import MODES
from numba_moe.runtime import checks, files

NAME = "expert_distribution"


class Recording(int):
    """1 or 0: whether passes are recorded; a call of it is a context in which they are."""

    recorder: Any

    @contextlib.contextmanager
    def __call__(
        self,
        path: Any = None,
        *,
        format: str = "npz",
        rotate_passes: int | None = None,
        rotate_seconds: float | None = None,
    ) -> Iterator[Any]:
        """Record what runs inside, and write it, with what was recorded before, when it ends.

        Parameters
        ----------
        path : path, optional
            The file to write, or a folder. By default nothing is written: the records stay until a dump.
        format : {"npz", "safetensors", "json", "csv", "pt"}
            That of the files of a folder.
        rotate_passes : int, optional
            Write to the next numbered file of the folder after this number of recorded passes.
        rotate_seconds : float, optional
            The same after a time in seconds, at the end of a pass.

        Yields
        ------
        ExpertDistributionRecorder
            The recorder.

        Raises
        ------
        TypeError
            A number of the wrong type.
        ValueError
            A path that cannot be written, another format, no folder to rotate files in, a number out of bounds.
        OSError
            The last file could not be written. No file is left, and the records are kept.

        Notes
        -----
        Where each rank of a group writes its own file, its name ends in the rank. What an exception ends is written
        too, unless ranks sum their counts: the others may never come. A file that cannot be written before the end is
        a warning, and its passes are in the next.

        Examples
        --------
        >>> import tempfile, torch
        >>> from numba_moe.recorder import ExpertDistributionRecorder
        >>> recorder = ExpertDistributionRecorder(1, 3, mode="stat", device="cpu")
        >>> folder = tempfile.TemporaryDirectory()
        >>> with recorder.recording(folder.name, rotate_passes=2):
        ...     for number in range(5):
        ...         with recorder.with_forward_pass(number), recorder.with_current_layer(0):
        ...             recorder.on_select_experts(torch.tensor([[0, 2], [2, -1]]))
        >>> sorted(path.name for path in Path(folder.name).iterdir())
        ['expert_distribution_000000.npz', 'expert_distribution_000001.npz', 'expert_distribution_000002.npz']
        >>> folder.cleanup()
        """
        recorder = self.recorder
        checks.choice("format", format, FORMATS)
        place = None if path is None else checks.path("path", path)
        if rotate_passes is not None or rotate_seconds is not None:
            _check_rotation(recorder, place, rotate_passes, rotate_seconds)
        elif place is not None and not place.is_dir():
            files.check_output("path", place, [f".{name}" for name in FORMATS])
        rotation = None if place is None else Rotation(recorder, place, format, rotate_passes, rotate_seconds)
        if not self:
            recorder.start_record()
        if rotation is not None:
            recorder.after_pass.append(rotation.after_pass)
        failed = True
        try:
            yield recorder
            failed = False
        finally:
            if rotation is not None:
                recorder.after_pass.remove(rotation.after_pass)
            if not self and recorder.recording:
                recorder.stop_record()
            sums = recorder.process_group is not None and recorder.mode in MODES[:2]
            if rotation is not None and recorder.mode is not None and not (failed and sums):
                rotation.write()


def _check_rotation(recorder: Any, path: Path | None, passes: Any, seconds: Any) -> None:
    """Check what a rotation is asked for."""
    size = recorder.buffer_size
    if passes is not None:
        checks.integer("rotate_passes", passes, 1)
        fits = size is None or passes <= size
        checks.holds("rotate_passes", f"at most buffer_size = {size}, past which passes are lost", fits, passes)
    if seconds is not None:
        checks.seconds("rotate_seconds", seconds)
        checks.holds("rotate_seconds", "None with a buffer_size, past which passes are lost", size is None, seconds)
        alone = recorder.process_group is None or recorder.mode not in MODES[:2]
        checks.holds("rotate_seconds", "None where ranks sum their counts, as their clocks differ", alone, seconds)
    checks.holds("path", "a folder, where files rotate", path is not None and path.is_dir(), path)


class Rotation:
    """Writes what was recorded to the next file of a folder, every so often, or to the one file of a path."""

    def __init__(self, recorder: Any, path: Path, format: str, passes: int | None, seconds: float | None) -> None:
        self._recorder, self._path, self._format = recorder, path, format
        self._is_folder = path.is_dir()  # now: later it may be gone for a while
        self._claim: Path | None = None
        self._passes, self._seconds = passes, seconds
        alone = recorder.num_ranks == 1 or recorder.mode in MODES[:2]
        own = re.compile(rf"{NAME}_(\d+){'' if alone else f'_{recorder.rank}'}\.\w+")  # others are ahead, or behind
        found = (own.fullmatch(file.name) for file in path.iterdir()) if self._is_folder else ()
        self._number = 1 + max((int(match[1]) for match in found if match), default=-1)
        self._start()

    def _start(self) -> None:
        self._recorded, self._since = 0, time.monotonic()

    def after_pass(self, _records: Any) -> None:
        """Write a file if it is time."""
        self._recorded += 1
        by_passes = self._passes is not None and self._recorded >= self._passes
        if by_passes or (self._seconds is not None and time.monotonic() - self._since >= self._seconds):
            try:
                self.write()
            except OSError as error:
                self._start()
                text = f"a file of passes was not written, and they are kept for the next: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def write(self) -> None:
        """Write what there is, if anything."""
        try:
            self._number += self._recorder._dump("file", self._name, warns=False) is not None
        finally:
            if self._claim is not None:
                self._claim.unlink(missing_ok=True)
                self._claim = None
        self._start()

    def _name(self, rank: str) -> Path:
        """Return the path of a file; `rank` tells those apart that ranks write.

        In a folder it is the next that no other process has, or has claimed by a file until its own is there.
        """
        rank = rank if self._recorder.num_ranks > 1 else ""
        if not self._is_folder:
            return self._path.with_name(f"{self._path.stem}{rank}{self._path.suffix}")
        while True:
            path = self._path / f"{NAME}_{self._number:06d}{rank}.{self._format}"
            claim = path.with_name(f".{path.stem}")
            with contextlib.suppress(FileExistsError):
                claim.touch(exist_ok=False)
                self._claim = claim
                if not path.exists():
                    return path
                claim.unlink()
            self._number += 1
