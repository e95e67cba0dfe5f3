"""The commands about compiled kernels: `numba-moe warmup`, `export` and `info`."""

import argparse
import functools
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from numba_moe.runtime import cache, compile, export, files
from numba_moe.runtime.text import counted, fitted
from numba_moe.verify.verification import PACKAGES


def _devices() -> dict[str, tuple[int, int]]:
    return {
        f"{index}: {torch.cuda.get_device_name(index)}": torch.cuda.get_device_capability(index)
        for index in range(torch.cuda.device_count())
    }


def _wanted(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return what to compile for, if the compiler that is here knows it."""
    from cuda.bindings import nvrtc

    wanted: list[tuple[int, int]] = options.arch or sorted(set(_devices().values()))
    if not wanted:
        raise ValueError("no CUDA device here; name what to compile for with --arch")
    try:
        _, known = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError as error:
        raise ValueError(f"CUDA's compiler is not there: pip install numba-moe[cu13] ({error})") from error
    for major, minor in wanted:
        if 10 * major + minor not in known:
            names = ", ".join(f"sm_{arch}" for arch in known)
            raise ValueError(f"`--arch` must be among {names}, which the compiler here knows, got sm_{major}{minor}")
    return wanted


def prepare_warmup(options: argparse.Namespace) -> Callable[[], int]:
    """Check what is asked for; return what compiles, and returns the exit status."""
    wanted = _wanted(options)
    if not cache.enabled():
        raise ValueError("the cache is off (NUMBA_MOE_CACHE=0)")
    if cache.folder() is None:
        raise ValueError("there is no home directory; set NUMBA_MOE_CACHE_DIR")
    return functools.partial(_warmup, wanted)


def _warmup(wanted: list[tuple[int, int]]) -> int:
    count = compile.compile_all(wanted)
    print(
        f"{counted(count, 'kernel')} ready in {cache.folder()}, {compile.statistics['compiled']} of them compiled now"
    )
    return 0


def prepare_export(options: argparse.Namespace) -> Callable[[], int]:
    """Check what is asked for; return what writes, and returns the exit status."""
    wanted = _wanted(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    files.check_output("DIR", options.folder / export.MANIFEST)
    return functools.partial(_export, options.folder, wanted)


def _export(folder: Path, wanted: list[tuple[int, int]]) -> int:
    count = export.export(folder, wanted)
    print(f"{counted(count, 'kernel')} and {export.MANIFEST} in {folder}")
    return 0


def prepare_info(_options: argparse.Namespace) -> Callable[[], int]:
    """Return what prints versions, devices and the cache."""
    return _info


def _info() -> int:
    versions = [("python", platform.python_version()), *((name, cache.version(name)) for name in PACKAGES)]
    print(fitted(versions, ("package", "version")), end="\n\n")
    devices = [(name, "sm_{}{}".format(*capability)) for name, capability in _devices().items()]
    print(fitted(devices, ("device", "arch")) if devices else "no CUDA device", end="\n\n")
    found = list(cache.entries())
    size = sum(path.stat().st_size for path, _ in found)
    state = "" if cache.enabled() else ", off (NUMBA_MOE_CACHE=0)"
    where = cache.folder() or "no folder, as there is no home directory"
    print(f"cache: {where}, {counted(len(found), 'kernel')}, {size / 1024:.0f} KiB{state}")
    current = Counter(
        (entry.kernel, entry.arch)
        for path, entry in found
        if path == cache.path_of(entry.kernel, entry.specialisation, entry.arch)
    )
    if current:
        rows = [(*name, count) for name, count in sorted(current.items())]
        print("\n" + fitted(rows, ("kernel of this version", "arch", "specialisations")))
    return 0
