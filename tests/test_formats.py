"""What files hold and claim: nothing runs, nothing asks for more memory than the file has, numbers are checked."""

import collections
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from numba_moe import cli, recorder
from numba_moe.placement import ExpertLocation
from numba_moe.placement.traces import load_trace
from numba_moe.runtime import formats
from numba_moe.runtime.formats import load_routing

REFUSED = r"must be|holds no"
MANY = ["json", "npz", "safetensors", "pt"]  # that hold arrays by name
READERS = {
    "recorder.load": recorder.load,
    "ExpertLocation.load": lambda path: ExpertLocation.load(path, num_replicas=4, num_gpus=1),
    "load_trace": load_trace,
    "load_routing": load_routing,
}
OF_DUMPS = [name for name in READERS if name != "load_routing"]


def write(path, content):
    """Write arrays by name as another program would."""
    arrays = {name: np.asarray(value) for name, value in content.items()}
    if path.suffix == ".json":
        path.write_text(json.dumps({name: value.tolist() for name, value in arrays.items()}))
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        tensors = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def plant(path, marker):
    """Write a file whose unpickling makes the marker, in the way of its format."""
    payload = {name: Payload(marker) for name in ("logical_count", "physical_to_logical_map", "topk_ids")}
    objects = {name: np.array([[value]], object) for name, value in payload.items()}
    if path.suffix == ".npy":
        np.save(path, objects["topk_ids"], allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, **objects, allow_pickle=True)
    elif path.suffix == ".pt":
        torch.save(payload, path)
    elif path.suffix == ".pth":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(payload))
    return path


SUFFIXES = [".npy", ".npz", ".pt", ".pth", ".safetensors", ".json", ".csv"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("reader", [*READERS, "verify --input", "rebalance", "report"])
def test_no_code_from_a_file_runs(suffix, reader, tmp_path, capsys):
    marker = tmp_path / "it ran"
    path = plant(tmp_path / f"evil{suffix}", marker)
    if reader in READERS:
        with pytest.raises(ValueError, match="`path` must be"):
            READERS[reader](path)
    else:
        arguments = {"rebalance": ["--gpus", "1"], "report": ["--out", str(tmp_path / "report.html")]}
        assert cli.main([*reader.split(), str(path), *arguments.get(reader, [])]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert [part.name for part in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_the_files_hold_would_run(suffix, tmp_path):
    marker = tmp_path / "it ran"
    path = plant(tmp_path / f"evil{suffix}", marker)
    if suffix in (".npy", ".npz"):
        found = np.load(path, allow_pickle=True)
        assert found is not None
        _ = found["topk_ids"] if suffix == ".npz" else found
    elif suffix in (".pt", ".pth"):
        with pytest.raises(FileExistsError):  # once for each of its names
            torch.load(path, weights_only=False)
    else:
        with pytest.raises(FileExistsError):
            pickle.loads(path.read_bytes())
    assert marker.is_dir()


def tensor(storage=12, offset=0, sizes=(3, 4), strides=(4, 1)):
    """Return a tensor that says of its storage what is asked for."""
    return torch.arange(storage).as_strided(sizes, strides, offset)


def test_tensors_are_read_as_torch_reads_them(tmp_path):
    content = {
        "transposed": tensor().t(),
        "a part": tensor()[1:, 2],
        "expanded": torch.ones(1).expand(5),
        "of nothing": torch.zeros(0, 3),
        "a number": torch.tensor(3),
        "bfloat16": torch.arange(3.0).bfloat16(),
        "float8": torch.arange(3.0).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "uint64": torch.tensor([2**63], dtype=torch.uint64),
        "a parameter": torch.nn.Parameter(torch.ones(2)),
        "others": collections.OrderedDict(a=[1, 2.5, None, True, "x", (1, 2)], size=torch.Size([1, 2])),
    }
    torch.save(content, tmp_path / "x.pt")
    found = formats.read(tmp_path / "x.pt", (".pt",))
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found.pop("others") == expected.pop("others")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = value.detach()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float8_e4m3fn) else value
        assert found[name].dtype == value.numpy().dtype, name
        assert np.array_equal(found[name], value.numpy()), name


def doubled(times):
    """Return lists of one list twice, and so on."""
    found = [1, 2]
    for _ in range(times):
        found = [found, found]
    return found


WRONG_TENSORS = {
    "expanded": {"logical_count": tensor(1, 0, (1, 4_000_000_000), (0, 0))},
    "expanded in parts": {str(i): tensor(1, 0, (8_000_000,), (0,)) for i in range(10)},
    "the same one often": [{"logical_count": tensor(10_000, 0, (10, 1000), (1000, 1))}] * 10_000,
    "lists that double": {"logical_count": doubled(60)},
    "not a plain one": {"logical_count": torch._neg_view(torch.ones(2, 2))},
    "sparse": {"logical_count": torch.eye(3).to_sparse()},
    "code": {"logical_count": Path("x")},
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_are_refused(name, tmp_path):
    torch.save(WRONG_TENSORS[name], tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"`path` must be a whole \.pt file, got x\.pt"):
        formats.read(tmp_path / "x.pt", (".pt",))


def changed(path, member, old, new):
    """Write an archive again with a member changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in parts if name.endswith(member)]
    assert old in parts[name]
    parts[name] = parts[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


CHANGES = {  # in what `tensor()` is pickled as: K and a byte is a number, ( a mark, \x86 a pair
    "a storage of more than it has": (b"K\x0ctq", b"K\x0dtq"),
    "a storage of less": (b"K\x0ctq", b"K\x0btq"),
    "a storage of terabytes": (b"K\x0ctq", b"\x8a\x06\x00\x00\x00\x00\x00\x0ftq"),
    "more rows than there are": (b"K\x03K\x04\x86", b"K\x04K\x04\x86"),
    "rows past the end": (b"K\x04K\x01\x86", b"K\x05K\x01\x86"),
    "an offset": (b"QK\x00K\x03", b"QK\x01K\x03"),
    "an offset past memory": (b"QK\x00K\x03", b"QJ\xff\xff\xff\x7fK\x03"),
    "a negative stride": (b"K\x04K\x01\x86", b"K\x04J\xff\xff\xff\xff\x86"),
    "a place far away": (b"}q\x00", b"}r\xff\xff\xff\x7f"),
    "a later protocol": (b"\x80\x02", b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x000"),
    "an attribute": (b"s.", b"s}b."),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_that_claims_what_its_storage_has_not(name, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": tensor()}, path)
    changed(path, "data.pkl", b"", b"")
    assert formats.read(path, (".pt",))["x"].tolist() == tensor().tolist()
    changed(path, "data.pkl", *CHANGES[name])
    with pytest.raises(ValueError, match=r"`path` must be a whole \.pt file"):
        formats.read(path, (".pt",))


def test_another_byte_order_is_refused(tmp_path):
    torch.save({"x": tensor()}, tmp_path / "x.pt")
    changed(tmp_path / "x.pt", "byteorder", sys.byteorder.encode(), b"big" if sys.byteorder == "little" else b"little")
    with pytest.raises(ValueError, match="byte order of another machine"):
        formats.read(tmp_path / "x.pt", (".pt",))


def npy(shape, dtype="<i8", data=b"", version=1):
    """Return an array's bytes whose header claims a shape."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def archive(**members):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return memory.getvalue()


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


LARGE = 20_000_000  # numbers, of which a file of nothing but zeros is 160 kB
RECORD = '{"records": [{"topk_ids_of_layer": [[[0]]], "physical_to_logical_map": %s}]}'
BOMBS = {
    "a header's shape.npy": npy((1, 1 << 40)),
    "a second header's shape.npy": npy((1, 1 << 40), version=2),
    "a header of 4 GiB.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100),
    "a negative shape.npy": npy((-1, 4), data=bytes(64)),
    "a header's shape.npz": archive(logical_count=npy((1, 1 << 40)), topk_ids=npy((1, 1 << 40))),
    "zeros.npz": lambda: archive(logical_count=npy((1, LARGE), data=bytes(8 * LARGE))),
    "zeros in parts.npz": lambda: archive(**{f"ids{i}": npy((1 << 20, 1), data=bytes(8 << 20)) for i in range(20)}),
    "a header's shape.safetensors": safetensors(
        {"logical_count": {"dtype": "I64", "shape": [1, 1 << 40], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "a header's length.safetensors": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    "a layer and an expert.csv": b"layer_id,expert_id,count\n40000,40000,1\n",
    "a layer.csv": b"layer_id,expert_id,count\n300000000,0,1\n",
    "an expert.csv": b"layer_id,expert_id,count\n0,1000000000000,1\n",
    "a map.json": (RECORD % "[[1000000000]]").encode(),
    "a map of 2^62.json": (RECORD % f"[[{2**62}]]").encode(),
    "an id.json": b'{"topk_ids": [[[1000000000000]]], "records": [{"topk_ids_of_layer": [[[1000000000000]]]}]}',
    "an id of a dump.json": b'{"topk_ids": [[[1000000000]]]}',
    "a rank.json": b'{"topk_ids": [[[1]]], "rank_of_token": [1000000000]}',
}


@pytest.fixture
def bomb(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BOMBS[name]() if callable(BOMBS[name]) else BOMBS[name])
    return path


@pytest.fixture
def little_memory():
    """Let this process have half a gigabyte more than it has, so that what asks for more fails at once."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((int(status["VmSize"].split()[0]) << 10) + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no limit of memory")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_does_not_take_all_memory(bomb, little_memory):
    for reader, read in READERS.items():
        with pytest.raises(ValueError, match=REFUSED) as caught:
            read(bomb)
        assert "MemoryError" not in str(caught.value), reader
        assert "Unable to allocate" not in str(caught.value), reader


def test_what_compresses_well_is_read_up_to_a_size(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", logical_count=np.zeros((100, 61, 256), np.int64))
    assert 500 * (tmp_path / "x.npz").stat().st_size < 8 * 100 * 61 * 256
    assert recorder.load(tmp_path / "x.npz").logical_count.shape == (100, 61, 256)


def test_options_do_not_take_all_memory(tmp_path, little_memory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("counts.npz", logical_count=np.ones((1, 16), int))
    np.savez("ids.npz", topk_ids=np.ones((1, 4, 2), int))
    np.save("ids.npy", np.ones((4, 2), int))
    for options in (
        ["rebalance", "counts.npz", "--gpus", "1000000000"],
        ["rebalance", "counts.npz", "--gpus", "2", "--replicas", "16,2000000000"],
        ["rebalance", "ids.npz", "--gpus", "1", "--num-experts", "1000000000"],
        ["verify", "--input", "ids.npy", "--num-experts", "2000000000"],
        ["verify", "--input", "ids.npy", "--block-size", "2000000000"],
    ):
        assert cli.main(options) == 2
        assert "must be small enough for" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`num_replicas` must be small enough for the slots of every expert"):
        ExpertLocation.load("counts.npz", num_replicas=2_000_000_000, num_gpus=1)
    many = load_trace(Path("ids.npz"), tokens_per_step=1 << 40)
    assert many.tolist() == load_trace(Path("ids.npz")).tolist()
    np.savez("map.npz", physical_to_logical_map=np.tile(np.arange(30_000), 2)[None])
    with pytest.raises(ValueError, match="`physical_to_logical_map` must be small enough"):
        ExpertLocation.load("map.npz", num_gpus=1)


@pytest.mark.parametrize("suffix", [*MANY, "npy", "csv"])
def test_damaged_files_are_value_errors(suffix, tmp_path):
    """A byte of a file is flipped, or the file ends early, in many places one after another."""
    path = tmp_path / f"x.{suffix}"
    if suffix == "csv":
        path.write_text("layer_id,expert_id,count\n0,0,5\n0,1,7\n")
    elif suffix == "npy":
        np.save(path, np.arange(12).reshape(3, 4))
    else:
        write(path, {"logical_count": np.arange(12).reshape(3, 4), "topk_ids": np.arange(12).reshape(3, 4) % 5})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = rng.permutation(len(whole))[:60]
    messages = []
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        for data in (bytes(flipped), whole[:place]):
            path.write_bytes(data)
            for read in READERS.values():
                try:
                    read(path)
                except ValueError as error:
                    messages.append(str(error))
    assert len(messages) > 60
    assert not [message for message in messages if "MemoryError" in message]


@pytest.mark.parametrize("format", MANY)
@pytest.mark.parametrize("reader", OF_DUMPS)
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[3, -4]], "must be at least 0, got -4"),
        ([[2**62, 2**62]], f"must be counts whose sum is at most {2**63 - 1}, got {2**63}"),
        ([[[2**62, 0]], [[2**62, 0]]], f"must be counts whose sum is at most {2**63 - 1}, got {2**63}"),
        (np.array([[1, 2**64 - 1]], np.uint64), f"must be at most {2**63 - 1}, got {2**64 - 1}"),
    ],
)
def test_counts_that_are_none(format, reader, counts, message, tmp_path):
    path = write(tmp_path / f"x.{format}", {"logical_count": counts})
    if format == "json" and isinstance(counts, np.ndarray):
        message = "must be (an array that converts to int64|loads whose sum is at most)"  # it has no types
    with pytest.raises(ValueError, match=f"`logical_count` {message}"):
        READERS[reader](path)
    just = write(tmp_path / f"y.{format}", {"logical_count": [[2**62, 2**62 - 1]]})
    READERS[reader](just)


@pytest.mark.parametrize("format", MANY)
def test_ids_and_maps_that_int64_cannot_hold(format, tmp_path):
    ids = write(tmp_path / f"x.{format}", {"topk_ids": np.array([[[2**64 - 2, 2**64 - 1]]], np.uint64)})
    with pytest.raises(ValueError, match=f"`topk_ids` must be at most {2**63 - 1}, got {2**64 - 1}"):
        load_trace(ids)
    places = np.array([[2**64 - 2, 2**64 - 1]], np.uint64)
    with pytest.raises(ValueError, match=f"`physical_to_logical_map` must be at most {2**63 - 1}"):
        ExpertLocation.load(write(tmp_path / f"y.{format}", {"physical_to_logical_map": places}), num_gpus=1)
    with pytest.raises(ValueError, match=f"`physical_to_logical_map` must be at most {2**63 - 1}"):
        ExpertLocation.from_mapping(places)
    if format != "json":
        with pytest.raises(ValueError, match=f"`topk_ids` must be at most {2**63 - 1}"):
            load_routing(write(tmp_path / f"z.{format}", {"topk_ids": np.array([0, 2**64 - 1], np.uint64)}))


def test_about_is_bytes_of_an_object(tmp_path):
    for about in (10**12, "x", None, [1.5], [-1], list(b"[1]"), list(b"{")):
        (tmp_path / "x.json").write_text(json.dumps({"logical_count": [[1]], "about": about}))
        with pytest.raises(ValueError, match=REFUSED):
            recorder.load(tmp_path / "x.json")


TWICE = {
    "at the top": '{"logical_count": [[1]], "logical_count": [[2]]}',
    "in a record": '{"records": [{"logical_count": [[1]], "logical_count": [[2]]}]}',
    "deep": '{"logical_count": [[1]], "about": {"a": {"b": 1, "b": 1}}}',
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("reader", OF_DUMPS)
def test_a_key_twice_is_refused(name, reader, tmp_path):
    (tmp_path / "x.json").write_text(TWICE[name])
    with pytest.raises(ValueError, match=r"the key '(logical_count|b)' is there twice"):
        READERS[reader](tmp_path / "x.json")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("reader", READERS)
def test_a_name_twice_is_refused_in_other_formats(reader, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for value in (1, 2):
            file.writestr("logical_count.npy", npy((1, 1), data=struct.pack("<q", value)))
    with pytest.raises(ValueError, match="a name is there twice"):
        READERS[reader](tmp_path / "x.npz")
    one = '"logical_count": {"dtype": "I64", "shape": [1, 1], "data_offsets": [%d, %d]}'
    header = "{" + one % (0, 0) + ", " + one % (0, 8) + "}"
    (tmp_path / "x.safetensors").write_bytes(safetensors(header.replace("[1, 1]", "[0, 1]", 1).encode(), bytes(8)))
    with pytest.raises(ValueError, match="is there twice"):
        READERS[reader](tmp_path / "x.safetensors")
    keys = b'{"mode": "stat", "mode": "stat"}'
    write(tmp_path / "y.npz", {"logical_count": [[1]], "about": np.frombuffer(keys, np.uint8)})
    with pytest.raises(ValueError, match="the key 'mode' is there twice"):
        recorder.load(tmp_path / "y.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name here")
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a link to a pipe"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".npz", ".json", ".pt", ".safetensors", ".csv"])
def test_what_is_no_file_is_refused_at_once(kind, reader, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if "link" in kind else (tmp_path / "pipe").rename(path)
    rule = (
        r"a \.npy, \.npz"
        if (reader, suffix) in {("load_routing", ".json"), ("load_routing", ".csv")}
        else "a regular file"
    )
    with pytest.raises(ValueError, match=f"`path` must be {rule}"):
        READERS[reader](path)


KINDS = [None, "x", 1.5, True, {}, [], [[None]], [["x"]], [[1.5]], [[1], [1, 2]], [[[[[1]]]]], 10**30, [[10**30]]]


@pytest.mark.parametrize("name", ["logical_count", "records", "physical_to_logical_map", "topk_ids"])
@pytest.mark.parametrize("reader", OF_DUMPS)
def test_wrong_kinds_are_value_errors(name, reader, tmp_path):
    for value in KINDS:
        if reader == "ExpertLocation.load" and name == "logical_count" and value == [[1.5]]:
            continue  # a load, if no count
        (tmp_path / "x.json").write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=REFUSED):
            READERS[reader](tmp_path / "x.json")
        (tmp_path / "x.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match=REFUSED):
            READERS[reader](tmp_path / "x.json")


FIELDS = ["logical_count", "global_physical_count", "physical_to_logical_map", "topk_ids_of_layer", "forward_pass_id"]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("reader", OF_DUMPS)
def test_wrong_kinds_in_records_are_value_errors(name, reader, tmp_path):
    good = {"forward_pass_id": 3, "logical_count": [[1, 2]]}
    if name != "logical_count":
        good = {"forward_pass_id": 3, "global_physical_count": [[1, 2]], "physical_to_logical_map": [[0, 1]]}
    if name == "topk_ids_of_layer":
        good = {"topk_ids_of_layer": [[[0, 1]]], "physical_to_logical_map": [[0, 1]]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"records": [good]}))
    READERS[reader](path)
    for value in [*KINDS, -2, [[-2, 0]], [[0, 1, 2]], [[0], [1]], [[[0, 7]]], [[[0, -2]]]]:
        if name == "topk_ids_of_layer" and value is None:
            continue
        path.write_text(json.dumps({"records": [good, {**good, name: value}]}))
        with pytest.raises(ValueError, match="`"):
            READERS[reader](path)


def test_csv_as_others_write_it(tmp_path):
    path = tmp_path / "x.csv"
    for text in (
        "\ufefflayer_id,expert_id,count\r\n0,0,5\r\n\r\n1,2,7\r\n0,0,1\r\n",
        '\n\nlayer_id, expert_id, count\n 0 , 0 , 6\n,,\n"1","2","7"\n   \n',
    ):
        path.write_bytes(text.encode())
        assert recorder.load(path).logical_count.tolist() == [[[6, 0, 0], [0, 0, 7]]]
    assert load_trace(path, num_layers=3, num_experts=4).tolist() == [[[6, 0, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0]]]
    assert recorder.load(path, num_layers=3, num_experts=4).logical_count.shape == (1, 3, 4)
    assert ExpertLocation.load(path, num_replicas=4, num_gpus=2, num_experts=4).num_logical_experts == 4
    for sizes, message in {
        "num_layers": (1, "`num_layers` must be at least what x.csv names = 2, got 1"),
        "num_experts": (2, "`num_experts` must be at least what x.csv names = 3, got 2"),
    }.items():
        with pytest.raises(ValueError, match=message[1]):
            recorder.load(path, **{sizes: message[0]})


def test_sizes_are_those_of_any_file(tmp_path):
    path = write(tmp_path / "x.npz", {"logical_count": [[1, 2, 3]]})
    assert recorder.load(path, num_layers=1, num_experts=3).logical_count.tolist() == [[[1, 2, 3]]]
    with pytest.raises(ValueError, match=r"`num_experts` must be that of x\.npz = 3, got 4"):
        recorder.load(path, num_experts=4)
    with pytest.raises(ValueError, match=r"`num_experts` must be left out for x\.npz"):
        ExpertLocation.load(path, num_replicas=3, num_gpus=1, num_experts=3)


CSV = {
    "an overflow": "0,0,9000000000000000000\n0,0,9000000000000000000\n0,1,5\n",
    "more than int64": "0,0,9300000000000000000\n",
    "much more": "0,0,1" + "0" * 40 + "\n",
    "more than decimals hold": "0,0,1e30\n",
    "a fraction of many digits": "0,0,1.0000000000000000000000000000005\n",
    "negative": "0,0,-1\n",
    "a negative layer": "-1,0,1\n",
    "four numbers": "0,0,1,1\n",
    "a fraction": "0,0,1.5",
    "underscores": "0,0,1_000\n",
    "another script": "0,0,\u0663\n",
    "bytes": b"0,0,\xff\n",
    "a null": "0,0,1\0\n",
}


@pytest.mark.parametrize("name", CSV)
@pytest.mark.parametrize("reader", OF_DUMPS)
def test_csv_that_is_refused(name, reader, tmp_path):
    body = CSV[name] if isinstance(CSV[name], bytes) else CSV[name].encode()
    (tmp_path / "x.csv").write_bytes(b"layer_id,expert_id,count\n" + body)
    with pytest.raises(ValueError, match="`path` must be"):
        READERS[reader](tmp_path / "x.csv")


@pytest.mark.slow
def test_a_process_with_little_memory_reads_what_is_small(tmp_path):
    """One byte of a .pt file is flipped, everywhere one after another; nothing asks for more than a gigabyte."""
    program = """
import resource, sys
from pathlib import Path
import torch
from numba_moe import recorder
path = Path(sys.argv[1]); whole = path.read_bytes()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = (int(status["VmSize"].split()[0]) << 10) + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for place in range(0, len(whole), 7):
    for bit in (1, 64):
        data = bytearray(whole); data[place] ^= bit; path.write_bytes(data)
        try:
            recorder.load(path)
        except ValueError as error:
            assert "emory" not in str(error) or "64 MiB" in str(error), error
print("HELD")
"""
    path = write(tmp_path / "x.pt", {"logical_count": np.arange(6).reshape(2, 3)})
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("HELD\n", "")
