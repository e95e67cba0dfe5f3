"""Compiled kernels on disk: one file an entry, written whole or not at all, checked when read.

An entry is keyed by everything that decides its machine code: the package's sources as they were imported, the
versions of what compiles them, the kernel, its specialisation and the compute capability. Sources that change on disk
afterwards are not those that run, so from then on a process compiles for itself alone.

An entry is machine code that runs on the GPU with the caller's rights. It is believed only where nobody but this user
and root could have written it.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import stat
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from numba_moe.device import sources

COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings")
# The libraries that make machine code, with the distributions that bring them: for CUDA 13, and for CUDA 12.
LIBRARIES = {
    "nvvm": ("nvidia-nvvm", "nvidia-nvvm-cu12", "nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12"),
    "nvjitlink": ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
}
SUFFIX = ".kernel"
# Bits of a file's mode by which others than its owner may write it.
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A kernel as machine code."""

    kernel: str
    specialisation: tuple[str | int, ...]
    arch: str
    entry_name: str
    cubin: bytes


def enabled() -> bool:
    """Whether the cache is used: NUMBA_MOE_CACHE=0 turns it off."""
    return os.environ.get("NUMBA_MOE_CACHE", "1") != "0"


def folder() -> Path | None:
    """Return where entries lie: NUMBA_MOE_CACHE_DIR, or numba_moe in the user's caches; None without a home."""
    if chosen := os.environ.get("NUMBA_MOE_CACHE_DIR"):
        return Path(chosen)
    try:
        import platformdirs

        found = platformdirs.user_cache_path("numba_moe", appauthor=False)
    except ImportError:  # the package was installed without what it depends on
        found = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "numba_moe")
    except RuntimeError:
        return None
    return found if found.is_absolute() else None  # earlier versions return "~/.cache" without a home


def version(distribution: str) -> str:
    """Return the version of an installed distribution, or "absent"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def compilers() -> dict[str, str]:
    """Return the version of everything that compiles kernels, by distribution, or by library where none brings it."""
    found = {name: version(name) for name in COMPILERS}
    for library, distributions in LIBRARIES.items():
        versions = {name: version(name) for name in distributions}
        installed = {name: number for name, number in versions.items() if number != "absent"}
        found |= installed or {library: _version_of_library(library)}
    return found


def _version_of_library(library: str) -> str:
    """Ask a library that a toolkit or conda brings for its version; "absent" where it cannot be loaded."""
    ask = {"nvvm": "ir_version", "nvjitlink": "version", "nvrtc": "nvrtcVersion"}
    try:
        return str(getattr(importlib.import_module(f"cuda.bindings.{library}"), ask[library])())
    except (ImportError, OSError, RuntimeError) as error:
        _log.debug("%s does not tell its version: %s", library, error)
        return "absent"


@functools.cache
def fingerprint() -> str:
    """Return a digest of the sources that were imported and of the versions of what compiles them."""
    versions = [f"{name} {number}" for name, number in compilers().items()]
    parts = [str(sources.IMPORTED), *versions, str(sys.version_info[:2])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def serves(function: types.FunctionType) -> bool:
    """Whether a kernel may be read from the cache and written there: as long as the sources are those imported."""
    if not enabled() or function.__module__.partition(".")[0] != "numba_moe":
        return False
    unchanged = sources.IMPORTED is not None and sources.digest() == sources.IMPORTED
    if not unchanged:
        _log.info("Kernels are not cached: the package's sources are not, or no longer, those that were imported")
    return unchanged


def _name_of(key: str, kernel: str, specialisation: tuple[str | int, ...], arch: str) -> str:
    digest = hashlib.sha256(json.dumps([key, kernel, specialisation, arch]).encode())
    return f"{kernel}-{arch}-{digest.hexdigest()[:32]}{SUFFIX}"


def path_of(kernel: str, specialisation: tuple[str | int, ...], arch: str) -> Path | None:
    """Return the file of an entry, or None without a folder."""
    where = folder()
    return where and where / _name_of(fingerprint(), kernel, specialisation, arch)


def _is_believed(path: Path, found: os.stat_result) -> bool:
    """Whether only this user and root could have written what lies at a path; otherwise the log says why not."""
    if not hasattr(os, "geteuid"):
        return True
    if found.st_uid not in (0, os.geteuid()):
        _log.warning("%s is not used for kernels: it belongs to another user (uid %d)", path, found.st_uid)
        return False
    if found.st_mode & WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        _log.warning("%s is not used for kernels: others can write it (mode %o)", path, mode)
        return False
    return True


def _content(path: Path) -> bytes | None:
    """Return the bytes of a believed file in a believed folder; None if it is not there or not readable."""
    try:  # links are followed, as what counts is what they lead to
        if not stat.S_ISREG(path.stat().st_mode) or not _is_believed(path.parent, path.parent.stat()):
            return None
        with open(path, "rb") as file:
            return file.read() if _is_believed(path, os.fstat(file.fileno())) else None
    except OSError:
        return None


def _parse(body: bytes, name: str) -> Entry | None:
    """Return the entry of a file of this name; None if the file does not say so itself."""
    header, _, cubin = body.partition(b"\n")
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(fields, list) and len(fields) == 5 and isinstance(fields[2], list)):
        return None
    key, kernel, specialisation, arch, entry_name = fields
    if not all(isinstance(text, str) for text in (key, kernel, arch, entry_name)):
        return None
    if not all(type(choice) in (str, int) for choice in specialisation):
        return None
    if _name_of(key, kernel, tuple(specialisation), arch) != name:
        return None
    return Entry(kernel, tuple(specialisation), arch, entry_name, cubin)


def read(path: Path) -> Entry | None:
    """Return an entry, or None if it is not there, not whole, another's, or not to be believed."""
    content = _content(path)
    if content is None:
        return None
    digest, body = content[:32], content[32:]
    entry = _parse(body, path.name) if hashlib.sha256(body).digest() == digest else None
    if entry is None:
        _log.warning("%s is damaged, or not what its name says, and will be compiled again", path)
    return entry


def write(path: Path, entry: Entry) -> None:
    """Write an entry at once, so that other processes see all of it or none; without space or rights, do not."""
    header = json.dumps([fingerprint(), entry.kernel, entry.specialisation, entry.arch, entry.entry_name]).encode()
    body = header + b"\n" + entry.cubin
    try:
        _make_folder(path.parent)
        if _is_believed(path.parent, path.parent.stat()):
            _replace(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        _log.info("%s is not written: %s", path, error)


def _replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of whatever lies there, as others may not write that, and may read this."""
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _make_folder(path: Path) -> None:
    """Make a folder, and those above it, that only this user can write, whatever the umask."""
    if not path.exists():
        _make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def entries() -> Iterator[tuple[Path, Entry]]:
    """Yield every whole entry that is believed, of this version of the package and of others."""
    where = folder()
    if where is None or not where.is_dir() or not _is_believed(where, where.stat()):
        return
    for path in sorted(where.glob(f"*{SUFFIX}")):
        entry = read(path)
        if entry is not None:
            yield path, entry
