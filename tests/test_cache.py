"""Compiled kernels come back from disk as they were, or are compiled again; nothing on disk can break a run."""

import json
import os
import subprocess
import sys

import pytest

from numba_moe.runtime import cache

ENTRY = cache.Entry("scan_blocks", ("int32", "int32"), "sm_90", "entry", bytes(range(256)) * 40)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_MOE_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def path():
    return cache.path_of(ENTRY.kernel, ENTRY.specialisation, ENTRY.arch)


def test_what_is_written_is_read(folder):
    assert cache.read(path()) is None
    cache.write(path(), ENTRY)
    assert cache.read(path()) == ENTRY
    assert [entry for _, entry in cache.entries()] == [ENTRY]
    assert [file.name for file in folder.iterdir()] == [path().name], "no temporary file stays"


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "one bit", "directory"])
def test_a_damaged_entry_is_none_and_can_be_written_again(folder, damage):
    cache.write(path(), ENTRY)
    content = path().read_bytes()
    path().unlink()
    if damage == "directory":  # unreadable, whoever runs this
        path().mkdir()
    else:
        flipped = content[:99] + bytes([content[99] ^ 1]) + content[100:]
        damaged = {"truncated": content[:-1], "noise": os.urandom(500), "empty": b"", "one bit": flipped}[damage]
        path().write_bytes(damaged)
    assert cache.read(path()) is None
    assert list(cache.entries()) == []
    cache.write(path(), ENTRY)
    assert cache.read(path()) == (None if damage == "directory" else ENTRY)
    assert [file.name for file in folder.iterdir()] == [path().name]


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_MOE_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    cache.write(path(), ENTRY)
    assert cache.read(path()) is None
    assert list(cache.entries()) == []


WRITE_OFTEN = """
import pathlib, sys
from numba_moe.runtime import cache
for step in range(300):
    entry = cache.Entry("scan_blocks", ("int32", "int32"), "sm_90", "entry", bytes([int(sys.argv[2])]) * (1000 + step))
    cache.write(pathlib.Path(sys.argv[1]), entry)
"""


def test_a_reader_beside_two_writers_sees_whole_entries(folder):
    cache.write(path(), ENTRY)
    writers = [subprocess.Popen([sys.executable, "-c", WRITE_OFTEN, str(path()), seed]) for seed in ("1", "2")]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        entry = cache.read(path())
        assert entry is not None
        assert entry == ENTRY or len(set(entry.cubin)) == 1
        seen.add(entry.cubin[-1])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen - {ENTRY.cubin[-1]}, "never read while the others wrote"


def test_every_part_of_a_key_counts(monkeypatch):
    keys = {
        cache.path_of("a", ("int32",), "sm_90"),
        cache.path_of("b", ("int32",), "sm_90"),
        cache.path_of("a", ("int64",), "sm_90"),
        cache.path_of("a", ("int32", "int32"), "sm_90"),
        cache.path_of("a", ("int32",), "sm_80"),
    }
    cache.fingerprint.cache_clear()
    monkeypatch.setattr(cache, "version", lambda name: "another")
    keys.add(cache.path_of("a", ("int32",), "sm_90"))
    cache.fingerprint.cache_clear()
    assert len(keys) == 6


def test_an_edit_of_any_source_changes_the_fingerprint(tmp_path, monkeypatch):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "primitives.py").write_text("x = 1\n")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    found = set()
    for text in ("x = 1\n", "x = 2\n"):
        (tmp_path / "runtime" / "primitives.py").write_text(text)
        cache.fingerprint.cache_clear()
        found.add(cache.fingerprint())
    cache.fingerprint.cache_clear()
    assert len(found) == 2


def test_only_kernels_of_the_package_are_covered():
    from numba_moe.runtime import primitives

    assert cache.covers(primitives.warp_index.py_func)
    assert not cache.covers(test_only_kernels_of_the_package_are_covered)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/numba_moe"),
        ("linux", {"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/numba_moe"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/numba_moe"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/numba_moe"),
        ("linux", {"NUMBA_MOE_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_folder(platform, variables, expected, monkeypatch):
    monkeypatch.delenv("NUMBA_MOE_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.folder().as_posix() == expected


COMPILE = """
import json, sys
from numba_moe.sorting import kernels
from numba_moe.runtime import compile
entry = compile.compiled(kernels.scan_blocks, ("int32", "int32"), (9, 0))
print(json.dumps([compile.statistics, "numba" in sys.modules, len(entry.cubin)]))
"""


def test_a_second_process_compiles_nothing_and_never_imports_numba(folder, without_simulator, monkeypatch):
    first, second = (json.loads(without_simulator(COMPILE)) for _ in range(2))
    assert first[0] == {"compiled": 1, "read": 0}
    assert second == [{"compiled": 0, "read": 1}, False, first[2]]
    [file] = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert json.loads(without_simulator(COMPILE))[0] == {"compiled": 1, "read": 0}
    monkeypatch.setenv("NUMBA_MOE_CACHE", "0")
    assert json.loads(without_simulator(COMPILE))[0] == {"compiled": 1, "read": 0}


COMMANDS = """
import sys
from numba_moe import cli
from numba_moe.runtime import compile, parameters
compile.KERNEL_MODULES = ("counting",)
import torch
torch.cuda.device_count = lambda: 0
print([cli.main(arguments.split()) for arguments in sys.argv[1:]])
"""


def test_warmup_and_info(folder, without_simulator):
    printed = without_simulator(COMMANDS, "warmup --arch sm_90", "warmup --arch sm_90,sm_100", "info", "warmup")
    lines = printed.splitlines()
    assert lines[0].startswith("2 kernels ready in ")
    assert lines[0].endswith("2 of them compiled now")
    assert lines[1].endswith("4 of them compiled now")
    assert any(line.startswith("scan_experts") and line.split()[1:] == ["sm_100", "2"] for line in lines)
    assert lines[-1] == "[0, 0, 0, 2]"
