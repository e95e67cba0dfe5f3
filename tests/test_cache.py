"""Compiled kernels come back from disk as they were, or are compiled again; nothing on disk can break a run."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile

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
    try:
        while any(writer.poll() is None for writer in writers):
            entry = cache.read(path())
            assert entry is not None
            assert entry == ENTRY or len(set(entry.cubin)) == 1
            seen.add(entry.cubin[-1])
    finally:
        for writer in writers:
            with writer:  # waits for its end
                writer.kill()
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


def test_only_kernels_of_the_package_are_served(folder):
    from numba_moe.device import primitives

    assert cache.serves(primitives.warp_index.py_func)
    assert not cache.serves(test_only_kernels_of_the_package_are_served)


# ---------------------------------------------------------------- the key is of the sources that were imported


@pytest.fixture
def run(without_simulator):
    """Return a function that runs a program with a package that lies in a folder or an archive."""

    def run(package, program):
        begin = f"import sys; sys.path.insert(0, {str(package.parent)!r}); import numba_moe\n"
        check = f"assert numba_moe.__file__.startswith({str(package)!r}), numba_moe.__file__\n"
        return without_simulator(begin + check + program).split()

    return run


KEY = "from numba_moe.runtime import cache; print(cache.fingerprint(), end=' ')\n"
COMPILE_HERE = """
from numba_moe.runtime import cache, compile
from numba_moe.ops.count import scan_experts
compile.compiled(scan_experts, compile.specialisations(scan_experts)[0], (9, 0))
print(*compile.statistics.values())
"""


@pytest.mark.parametrize("name", ["ops/align.py", "device/primitives.py", "runtime/compile.py", "reference/ragged.py"])
def test_any_edit_changes_the_key_of_the_processes_that_import_it(package_copy, run, name):
    edit = f"path = {str(package_copy / name)!r}; open(path, 'a').write('\\n# edited\\n')\n"
    before, after = run(package_copy, KEY + edit + KEY)
    assert before == after, "the code that runs is the old one"
    assert run(package_copy, KEY) != [before]


@pytest.mark.slow
def test_a_process_whose_sources_were_replaced_leaves_nothing_on_disk(package_copy, run, folder):
    kernel = str(package_copy / "ops/count.py")
    upgrade = f"""
import numba_moe.runtime.compile
path = {kernel!r}; text = open(path).read(); assert text.count("+ rows.alignment - 1") == 1
open(path, "w").write(text.replace("+ rows.alignment - 1", "+ rows.alignment - 2"))
"""
    assert run(package_copy, upgrade + COMPILE_HERE) == ["1", "0"], "the module is imported after the upgrade"
    assert not folder.exists()
    assert run(package_copy, COMPILE_HERE) == ["1", "0"]
    assert run(package_copy, COMPILE_HERE) == ["0", "1"]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.slow
def test_a_process_does_not_read_what_its_replaced_sources_would_name(package_copy, run, folder):
    assert run(package_copy, COMPILE_HERE) == ["1", "0"]
    edit = f"import numba_moe.runtime.compile; open({str(package_copy / 'ops/count.py')!r}, 'a').write('#')\n"
    assert run(package_copy, edit + COMPILE_HERE) == ["1", "0"]


@pytest.mark.slow
def test_bytecode_without_sources_has_a_key_of_its_own(package_copy, run, folder):
    def compile_to_bytecode(source):
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-b", str(source)], check=True)

    compile_to_bytecode(package_copy)
    kept = {source: source.read_text() for source in package_copy.rglob("*.py")}
    for source in kept:
        source.unlink()
    first = run(package_copy, KEY)
    assert run(package_copy, COMPILE_HERE) == ["1", "0"]
    assert run(package_copy, COMPILE_HERE) == ["0", "1"]
    edited = package_copy / "ops/count.py"
    edited.write_text(kept[edited].replace("+ rows.alignment - 1", "+ rows.alignment - 2"))
    compile_to_bytecode(edited)
    edited.unlink()
    assert run(package_copy, KEY) != first
    assert run(package_copy, COMPILE_HERE) == ["1", "0"]


@pytest.mark.slow
def test_an_archive_is_not_cached(package_copy, run, folder):
    archive = package_copy.parent / "program.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for source in package_copy.rglob("*.py"):
            file.write(source, source.relative_to(package_copy.parent))
    assert run(archive / "numba_moe", COMPILE_HERE) == ["1", "0"]
    assert not folder.exists()


CU12 = {"nvidia-cuda-nvcc-cu12": "12.9.86", "nvidia-nvjitlink-cu12": "12.9.86", "nvidia-cuda-nvrtc-cu12": "12.9.86"}


@pytest.mark.parametrize("name", [*CU12, "numba-cuda", "cuda-bindings"])
def test_every_compiler_counts_among_those_of_cuda_12(monkeypatch, name):
    installed = dict.fromkeys(cache.COMPILERS, "1") | CU12
    keys = set()
    for number in ("1", "2"):
        installed[name] = number
        monkeypatch.setattr(cache, "version", lambda asked: installed.get(asked, "absent"))
        cache.fingerprint.cache_clear()
        keys.add(cache.fingerprint())
    cache.fingerprint.cache_clear()
    assert len(keys) == 2


def test_a_compiler_that_no_distribution_brings_is_asked_itself(monkeypatch):
    monkeypatch.setattr(cache, "version", lambda asked: "1" if asked in cache.COMPILERS else "absent")
    monkeypatch.setattr(cache, "_version_of_library", lambda library: f"{library} of a toolkit")
    found = cache.compilers()
    assert {name: found[name] for name in cache.LIBRARIES} == {
        name: f"{name} of a toolkit" for name in ("nvvm", "nvjitlink", "nvrtc")
    }


def test_a_library_tells_its_version():
    assert [cache._version_of_library(library) for library in cache.LIBRARIES] != ["absent"] * 3


# ---------------------------------------------------------------- where entries lie


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/c"}, "/c/numba_moe"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/numba_moe"),
        ({"NUMBA_MOE_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="paths are Linux's")
def test_folder(variables, expected, monkeypatch):
    monkeypatch.delenv("NUMBA_MOE_CACHE_DIR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.folder().as_posix() == expected


HOMELESS = """
import os, pwd, sys
def absent(*_): raise KeyError("uid not found")
for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_MOE_CACHE_DIR"): os.environ.pop(name, None)
pwd.getpwuid = absent
from numba_moe import cli
from numba_moe.runtime import cache, compile
from numba_moe.ops.count import scan_experts
compile.compiled(scan_experts, compile.specialisations(scan_experts)[0], (9, 0))
print(compile.statistics["compiled"], cache.folder(), *[cli.main([command]) for command in ("info", "warmup")])
"""


@pytest.mark.slow
@pytest.mark.parametrize("value", ["0", "1"])
def test_without_a_home_there_is_no_cache_and_no_error(without_simulator, monkeypatch, tmp_path, value):
    monkeypatch.setenv("NUMBA_MOE_CACHE", value)
    monkeypatch.chdir(tmp_path)
    printed = without_simulator(HOMELESS)
    assert printed.splitlines()[-1] == "1 None 0 2"
    assert "no home directory" in printed
    assert list(tmp_path.iterdir()) == [], "no folder named ~"


# ---------------------------------------------------------------- what others can write is not believed


def mode(place):
    return place.stat().st_mode & 0o777


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_what_is_made_can_be_written_by_its_owner_alone(no_umask, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_MOE_CACHE_DIR", str(tmp_path / "a" / "b" / "kernels"))
    cache.write(path(), ENTRY)
    assert [mode(tmp_path / part) for part in ("a", "a/b", "a/b/kernels")] == [0o700] * 3
    assert mode(path()) == 0o644
    assert cache.read(path()) == ENTRY


def let_others_write_the_folder(folder):
    folder.chmod(0o777)


def let_the_group_write_the_folder(folder):
    folder.chmod(0o770)


def make_it_like_tmp(folder):
    folder.chmod(0o1777)


def let_others_write_the_entry(folder):
    path().chmod(0o666)


def let_the_group_write_the_entry(folder):
    path().chmod(0o664)


def link_to_a_folder_that_others_write(folder):
    open_to_all = folder.with_name("open to all")
    folder.rename(open_to_all)
    open_to_all.chmod(0o777)
    folder.symlink_to(open_to_all)


def link_to_an_entry_that_others_write(folder):
    elsewhere = folder.with_name("elsewhere")
    path().rename(elsewhere)
    elsewhere.chmod(0o666)
    path().symlink_to(elsewhere)


def give_the_folder_away(folder):
    os.chown(folder, 65534, 65534)


def give_the_entry_away(folder):
    os.chown(path(), 65534, 65534)


OPENINGS = [
    let_others_write_the_folder,
    let_the_group_write_the_folder,
    make_it_like_tmp,
    let_others_write_the_entry,
    let_the_group_write_the_entry,
    link_to_a_folder_that_others_write,
    link_to_an_entry_that_others_write,
    pytest.param(give_the_folder_away, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives away")),
    pytest.param(give_the_entry_away, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives away")),
]


@pytest.mark.parametrize("open_up", OPENINGS)
def test_what_others_can_write_is_not_read_and_the_log_says_so(folder, caplog, open_up):
    cache.write(path(), ENTRY)
    open_up(folder)
    with caplog.at_level(logging.WARNING, "numba_moe"):
        assert cache.read(path()) is None
        assert "is not used for kernels" in caplog.text
        caplog.clear()
        assert list(cache.entries()) == []
        assert "is not used for kernels" in caplog.text


def test_what_root_wrote_is_believed(folder, monkeypatch):
    cache.write(path(), ENTRY)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert (cache.read(path()) == ENTRY) == (folder.stat().st_uid == 0)


def test_an_entry_that_others_could_write_is_replaced_by_one_of_ours(folder):
    cache.write(path(), ENTRY)
    path().chmod(0o666)
    cache.write(path(), ENTRY)
    assert mode(path()) == 0o644
    assert cache.read(path()) == ENTRY


def test_nothing_is_written_where_it_would_not_be_read(folder, caplog):
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    cache.write(path(), ENTRY)
    assert list(folder.iterdir()) == []
    assert "others can write it (mode 777)" in caplog.text


def test_a_link_in_the_place_of_an_entry_is_replaced_and_not_followed(folder, tmp_path):
    folder.mkdir(mode=0o700)
    (tmp_path / "precious").write_text("kept")
    path().symlink_to(tmp_path / "precious")
    cache.write(path(), ENTRY)
    assert (tmp_path / "precious").read_text() == "kept"
    assert cache.read(path()) == ENTRY


# ---------------------------------------------------------------- an entry is what its name says


def plant(header, cubin=b"code"):
    body = header + b"\n" + cubin
    path().parent.mkdir(mode=0o700, exist_ok=True)
    path().write_bytes(hashlib.sha256(body).digest() + body)


FIELDS = ["key", *ENTRY[:4]]
HEADERS = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "a number": b"1",
    "null": b"null",
    "an object": json.dumps(dict(enumerate(FIELDS))).encode(),
    "too few": json.dumps(FIELDS[:4]).encode(),
    "too many": json.dumps([*FIELDS, 1]).encode(),
    "a number for a name": json.dumps(["key", 1, *FIELDS[2:]]).encode(),
    "a number for a specialisation": json.dumps([*FIELDS[:2], 1, *FIELDS[3:]]).encode(),
    "a list in a specialisation": json.dumps([*FIELDS[:2], [[]], *FIELDS[3:]]).encode(),
    "null for an entry": json.dumps([*FIELDS[:4], None]).encode(),
    "deep": b"[" * 100_000,
    "a huge number": b"9" * 10_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_does_not_parse_is_logged_and_compiled_again(folder, caplog, header):
    plant(header)
    assert cache.read(path()) is None
    assert "will be compiled again" in caplog.text
    assert list(cache.entries()) == []
    cache.write(path(), ENTRY)
    assert cache.read(path()) == ENTRY


@pytest.mark.parametrize(
    "other",
    [
        ENTRY._replace(kernel="count_slots"),
        ENTRY._replace(specialisation=("int64", "int32")),
        ENTRY._replace(specialisation=("int32",)),
        ENTRY._replace(arch="sm_80"),
    ],
)
def test_the_entry_of_another_kernel_under_a_name_is_not_taken(folder, caplog, other):
    cache.write(path(), other)
    assert cache.read(path()) is None
    assert "not what its name says" in caplog.text
    assert list(cache.entries()) == []


def test_the_entry_of_another_version_under_a_name_is_not_taken(folder, monkeypatch):
    name = path()
    monkeypatch.setattr(cache, "fingerprint", lambda: "another version")
    cache.write(name, ENTRY)
    cache.write(path(), ENTRY)
    monkeypatch.undo()
    assert cache.read(name) is None


def test_entries_of_other_versions_are_listed(folder, monkeypatch):
    cache.write(path(), ENTRY)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "fingerprint", lambda: "another version")
        cache.write(path(), ENTRY)
    assert [entry for _, entry in cache.entries()] == [ENTRY, ENTRY]


COMPILE = """
import json, sys
from numba_moe.ops.sort import count_and_place
from numba_moe.runtime import compile
entry = compile.compiled(count_and_place.scan_blocks, ("int32", "int32"), (9, 0))
print(json.dumps([compile.statistics, "numba" in sys.modules, len(entry.cubin)]))
"""


@pytest.mark.slow
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
from numba_moe.runtime import compile
compile.KERNEL_PACKAGES = ("numba_moe.ops.count",)
import torch
torch.cuda.device_count = lambda: 0
print([cli.main(arguments.split()) for arguments in sys.argv[1:]])
"""


@pytest.mark.slow
def test_warmup_and_info(folder, without_simulator):
    printed = without_simulator(COMMANDS, "warmup --arch sm_90", "warmup --arch sm_90,sm_100", "info", "warmup")
    lines = printed.splitlines()
    assert lines[0].startswith("2 kernels ready in ")
    assert lines[0].endswith("2 of them compiled now")
    assert lines[1].endswith("4 of them compiled now")
    assert any(line.startswith("scan_experts") and line.split()[1:] == ["sm_100", "2"] for line in lines)
    assert lines[-1] == "[0, 0, 0, 2]"
