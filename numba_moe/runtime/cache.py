"""Compiled kernels on disk: one file an entry, written whole or not at all, checked when read.

An entry is keyed by everything that decides its machine code: the content of all of the package's sources, the
versions of what compiles them, the kernel, its specialisation and the compute capability. Nothing is ever
invalid, so nothing needs invalidating; `numba-moe info` says where old entries lie.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from numba_moe.runtime import files

COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink")
SUFFIX = ".kernel"
PACKAGE = Path(__file__).parents[1]

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


def folder() -> Path:
    """Return where entries lie: NUMBA_MOE_CACHE_DIR, or numba_moe in the platform's user cache directory."""
    if chosen := os.environ.get("NUMBA_MOE_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "numba_moe"


def version(distribution: str) -> str:
    """Return the version of an installed distribution, or "absent"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def covers(function: types.FunctionType) -> bool:
    """Whether a function comes from a source that the fingerprint covers."""
    return PACKAGE in Path(function.__code__.co_filename).parents


@functools.cache
def fingerprint() -> str:
    """Return a digest of the package's sources and of the versions of what compiles them."""
    digest = hashlib.sha256()
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{source.relative_to(PACKAGE)}\0".encode() + source.read_bytes() + b"\0")
    for distribution in COMPILERS:
        digest.update(f"{distribution} {version(distribution)}\0".encode())
    digest.update(f"{sys.version_info[:2]}".encode())
    return digest.hexdigest()


def path_of(kernel: str, specialisation: tuple[str | int, ...], arch: str) -> Path:
    """Return the file of an entry."""
    key = json.dumps([fingerprint(), kernel, specialisation, arch])
    return folder() / f"{kernel}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:32]}{SUFFIX}"


def read(path: Path) -> Entry | None:
    """Return an entry, or None if it is not there, not readable or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != digest:
        _log.warning("%s is damaged and will be compiled again", path)
        return None
    header, _, cubin = body.partition(b"\n")
    kernel, specialisation, arch, entry_name = json.loads(header)
    return Entry(kernel, tuple(specialisation), arch, entry_name, cubin)


def write(path: Path, entry: Entry) -> None:
    """Write an entry at once, so that other processes see all of it or none; without space or rights, do not."""
    header = json.dumps([entry.kernel, entry.specialisation, entry.arch, entry.entry_name]).encode()
    body = header + b"\n" + entry.cubin
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            file.write(hashlib.sha256(body).digest() + body)
    except OSError as error:
        _log.info("%s is not written: %s", path, error)


def entries() -> Iterator[tuple[Path, Entry]]:
    """Yield every whole entry, of this version of the package and of others."""
    for path in sorted(folder().glob(f"*{SUFFIX}")):
        entry = read(path)
        if entry is not None:
            yield path, entry
