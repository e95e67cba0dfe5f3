"""Outputs: whole or not at all, through links, never in place of a device, and with the mode that was there."""

import json
import os
import select
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from numba_moe.placement import ExpertLocation
from numba_moe.recorder import ExpertDistributionRecorder, load
from numba_moe.runtime import files

FORMATS = ["npz", "safetensors", "json", "csv", "pt"]
WITHOUT_PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name here")


@pytest.fixture
def dump():
    """Make a dump of one pass."""
    recorder = ExpertDistributionRecorder(1, 4, mode="per_token", device="cpu")
    recorder.start_record()
    with recorder.with_forward_pass(0), recorder.with_current_layer(0):
        recorder.on_select_experts(torch.tensor([[0, 1], [1, 3]]))
    return recorder.dump_record(output_mode="object")


@pytest.fixture(params=["a location.json", "a location.npz", "a location.pt", *(f"a dump.{name}" for name in FORMATS)])
def writer(request, dump):
    """Name a file, and return what writes it."""
    whole = ExpertLocation.trivial(1, 4) if "location" in request.param else dump
    return request.param, whole.save


def write(path, content=b"new"):
    with files.replacing(path) as file:
        file.write(content)


def test_a_link_is_written_through(writer, tmp_path):
    name, save = writer
    target, link = tmp_path / "folder" / name, tmp_path / name
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(os.path.join("folder", name))  # relative to where the link is
    save(link)
    assert link.is_symlink()
    assert target.read_bytes() not in (b"old", b"")
    assert os.listdir(target.parent) == [name]


def test_a_chain_of_links_and_one_that_leads_nowhere(tmp_path):
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "target")
    write(tmp_path / "first")
    assert (tmp_path / "target").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["first", "second", "target"]
    (tmp_path / "gone").symlink_to(tmp_path / "no folder" / "target")
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone")
    assert (tmp_path / "gone").is_symlink()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="Too many levels"):
        write(tmp_path / "round")
    assert (tmp_path / "round").is_symlink()


@WITHOUT_PIPES
def test_a_pipe_is_written_and_stays(writer, tmp_path):
    name, save = writer
    save(tmp_path / name)
    pipe = tmp_path / f"pipe {name}"
    os.mkfifo(pipe)
    found = []
    thread = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    thread.start()
    save(pipe)
    thread.join(10)
    assert found
    assert len(found[0]) == len((tmp_path / name).read_bytes())
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@WITHOUT_PIPES
def test_a_terminal_is_written_and_stays(tmp_path):
    reader, terminal = os.openpty()
    (tmp_path / "link.csv").symlink_to(os.ttyname(terminal))
    write(tmp_path / "link.csv", b"new\n")
    assert select.select([reader], [], [], 10)[0]
    assert os.read(reader, 100) == b"new\r\n"
    assert (tmp_path / "link.csv").is_char_device()
    assert (tmp_path / "link.csv").is_symlink()
    os.close(reader)
    os.close(terminal)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="descriptors have no names here")
@pytest.mark.parametrize("through_a_link", [False, True])
def test_an_open_descriptor_is_written_where_it_stands(through_a_link, tmp_path):
    """As `numba-moe ... --json /dev/stdout >> log` has it: the log keeps what it has."""
    log = tmp_path / "log"
    log.write_bytes(b"before ")
    with open(log, "ab") as file:
        path = tmp_path / "link"
        path.symlink_to(f"/dev/fd/{file.fileno()}")
        write(path if through_a_link else type(path)(f"/dev/fd/{file.fileno()}"))
        file.write(b" after")
    assert log.read_bytes() == b"before new after"
    assert os.listdir(tmp_path) in (["log", "link"], ["link", "log"])


@pytest.mark.slow
def test_standard_output_is_no_file_to_replace(tmp_path):
    program = "import sys, pathlib; from numba_moe.placement import ExpertLocation\n"
    program += "from numba_moe.runtime import files\n"
    program += "with files.replacing(pathlib.Path('/dev/fd/1')) as file: file.write(b'{}')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("{}", "")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(writer, mode, tmp_path):
    name, save = writer
    path = tmp_path / name
    path.write_bytes(b"old")
    path.chmod(mode)
    save(path)
    assert path.read_bytes() != b"old"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_follows_the_umask(writer, tmp_path):
    name, save = writer
    before = os.umask(0o027)
    try:
        save(tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_what_replaces_a_secret_is_one_from_the_start(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with files.replacing(path) as file:
        modes = [stat.S_IMODE(part.stat().st_mode) for part in tmp_path.iterdir()]
        file.write(b"new")
    assert modes == [0o600, 0o600]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path):
    path = tmp_path / "theirs"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    path.chmod(0o660)
    write(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 54321, 0o660)


def test_a_name_may_be_as_long_as_the_system_lets_it(tmp_path, dump):
    for name in ("x" * 236 + ".npz", "y" * 251 + ".npz"):
        dump.save(tmp_path / name)
        assert load(tmp_path / name).logical_count.tolist() == dump.logical_count.tolist()
    with pytest.raises(OSError, match="File name too long"):
        dump.save(tmp_path / ("z" * 252 + ".npz"))
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_is_no_file(writer, tmp_path):
    name, save = writer
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError):
        save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is an error then, as on a full disk
import numpy as np
from numba_moe.placement import ExpertLocation
from numba_moe.recorder import dump_files
folder, found = sys.argv[1], []
counts = np.random.default_rng(0).integers(0, 2**62, (1, 64, 256)) >> 20
maps, none = np.tile(np.arange(256), (1, 64, 1)), np.zeros(1, int)
dump = dump_files.Dump("stat", 0, 256, 1, none, ["primary"], none, maps)
dump = dump.with_counts(counts)
location = ExpertLocation.from_mapping([np.random.default_rng(i).permutation(4096) for i in range(8)])
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
for whole, formats in ((dump, dump_files.FORMATS), (location, ("json", "npz", "pt"))):
    for format in formats:
        try:
            whole.save(f"{folder}/{format}.{format}")
            found.append(f"{format} was written")
        except OSError as error:
            if error.errno != 27:
                found.append(f"{format}: {error!r}")
        except BaseException as error:
            found.append(f"{format}: {error!r}")
print(found)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of files")
def test_a_full_disk_is_an_oserror_in_every_format(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert os.listdir(tmp_path) == []


OUTPUTS = {
    "no folder": ("gone/x.json", r"`--json` must be in a folder, got no folder for gone/x\.json"),
    "a folder": ("there", "`--json` must be a file, got the folder there"),
    "nothing": ("", r"`--json` must be a file, got the folder \."),
    "another kind": ("x.txt", r"`--json` must be one of '\.json', got '\.txt'"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_checked_before_the_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    path, message = OUTPUTS[name]
    with pytest.raises(ValueError, match=message):
        files.check_output("--json", type(tmp_path)(path), (".json",) if name == "another kind" else None)
    files.check_output("--json", type(tmp_path)("x.json"))
    files.check_output("--json", type(tmp_path)(os.devnull))


def test_json_through_a_link_is_read_again(tmp_path):
    (tmp_path / "link.json").symlink_to("target.json")
    ExpertLocation.trivial(1, 3).save(tmp_path / "link.json")
    assert json.loads((tmp_path / "target.json").read_text())["physical_to_logical_map"] == [[0, 1, 2]]
    assert np.array_equal(ExpertLocation.load(tmp_path / "link.json").rank_of_slot, [0, 0, 0])
