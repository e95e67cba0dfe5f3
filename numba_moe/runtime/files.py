"""Files that are written whole or not at all, and what may be read and written."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from numba_moe.runtime import checks


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of a path when it is complete; after a failure the old one is still there.

    Links are followed, and a file that is replaced keeps its mode, and its owner where the process may set it. A pipe
    or a device, /dev/stdout among them, is written when all is there, and never replaced.
    """
    there = _status(path)
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    descriptor = _descriptor(path)
    if descriptor is not None or (there is not None and not stat.S_ISREG(there.st_mode)):
        with tempfile.TemporaryFile() as file:  # writers seek, a pipe does not
            yield file
            file.seek(0)
            with open(path if descriptor is None else os.dup(descriptor), "wb") as output:
                shutil.copyfileobj(file, output)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{os.urandom(8).hex()}")
    mode = 0o666 if there is None else stat.S_IMODE(there.st_mode)  # of a new file, the umask takes some away
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if there is not None:
                _take_over(temporary, there)
            yield file
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _descriptor(path: Path) -> int | None:
    """Return the open descriptor that a path like /dev/stdout or /dev/fd/3 names, through any links."""
    here, of_descriptors = os.fspath(path), os.path.realpath("/dev/fd")
    while os.path.islink(here):
        folder = os.path.realpath(os.path.dirname(here))
        if folder == of_descriptors:
            return int(os.path.basename(here))
        here = os.path.join(folder, os.readlink(here))
    return None


def _take_over(path: Path, there: os.stat_result) -> None:
    """Give a file the owner and the mode of another."""
    mine = path.stat()
    if (mine.st_uid, mine.st_gid) != (there.st_uid, there.st_gid):
        with contextlib.suppress(PermissionError):  # only root gives files away
            os.chown(path, there.st_uid, there.st_gid)
    path.chmod(stat.S_IMODE(there.st_mode))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file; a pipe or a device may never begin, or never end."""
    checks.holds("path", "a regular file", stat.S_ISREG(os.stat(path).st_mode), path)
    with open(path, "rb") as file:
        yield file


def check_output(argument: str, path: Path, suffixes: Sequence[str] | None = None) -> None:
    """Check before any work that a path can be written."""
    if suffixes is not None:
        checks.choice(argument, path.suffix, suffixes)
    checks.holds(argument, "a file", not path.is_dir(), f"the folder {path}")
    if path.exists() and not path.is_file():
        return  # a pipe or a device has no folder that matters
    folder = Path(os.path.realpath(path)).parent
    checks.holds(argument, "in a folder", folder.is_dir(), f"no folder for {path}")
    checks.holds(argument, "in a folder that can be written", os.access(folder, os.W_OK), path)
