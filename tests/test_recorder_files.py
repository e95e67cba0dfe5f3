"""Dumps in files: every format keeps what it can hold, whole or not at all, and others' tools read them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from numba_moe import reference
from numba_moe.placement import ExpertLocation, traces
from numba_moe.recorder import ExpertDistributionRecorder, load

FORMATS = ("npz", "safetensors", "json", "csv", "pt")
MAPS = np.array([[[0, 1, 2, 0], [2, 1, 0, 1]], [[1, 1, 2, 0], [2, 1, 0, 0]]])


def record(mode, **options):
    """Return a recorder with three passes, the last of them by another map."""
    rng = np.random.default_rng(0)
    recorder = ExpertDistributionRecorder(
        2, 3, mode=mode, device="cpu", physical_to_logical_map=MAPS[0], num_gpus=2, **options
    )
    recorder.start_record()
    for number, tokens in enumerate((4, 1, 6)):
        if number == 2:
            recorder.set_physical_to_logical_map(MAPS[1])
        with recorder.with_forward_pass(number):
            for layer in range(2):
                ids = torch.from_numpy(rng.integers(-1, 4, (tokens, 2)))
                with recorder.with_current_layer(layer):
                    recorder.on_select_experts(ids, torch.rand(tokens, 2))
    return recorder


def same(found, expected):
    for name, value in vars(expected).items():
        other = getattr(found, name)
        assert (value is None) == (other is None), name
        assert np.array_equal(other, value) if isinstance(value, np.ndarray) else other == value, name
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype, name


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read(mode, format, tmp_path):
    dump = record(mode).dump_record(output_mode="object")
    path = tmp_path / f"dump.{format}"
    dump.save(path)
    found = load(path)
    if format in ("npz", "safetensors", "json"):
        same(found, dump)
    elif format == "csv":
        assert path.read_text().splitlines()[:2] == [
            "layer_id,expert_id,count",
            f"0,0,{dump.logical_count[:, 0, 0].sum()}",
        ]
        assert found.logical_count.tolist() == dump.logical_count.sum(axis=0, keepdims=True).tolist()
    else:
        assert found.logical_count.tolist() == dump.logical_count.tolist()
        assert found.forward_pass_id.tolist() == dump.forward_pass_id.tolist()
        assert found.last_physical_to_logical_map.tolist() == MAPS[1].tolist()
    if format == "pt" and mode == "per_token":
        assert found.topk_ids.tolist() == dump.topk_ids.tolist()
        assert found.topk_weights.tolist() == dump.topk_weights.tolist()
        assert found.map_of_pass.tolist() == dump.map_of_pass.tolist()


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.parametrize("format", ["npz", "safetensors", "json", "pt"])
def test_locations_and_simulations_read_dumps(mode, format, tmp_path):
    dump = record(mode).dump_record(output_mode="object")
    path = tmp_path / f"dump.{format}"
    dump.save(path)
    location = ExpertLocation.load(path, num_replicas=4, num_gpus=2)
    assert location == ExpertLocation.from_counts(dump.logical_count, 4, 1, 1, 2)
    assert traces.load_trace(path).tolist() == dump.logical_count.tolist()


def test_spilled_tokens_are_written_from_disk(tmp_path):
    (tmp_path / "spill").mkdir()
    expected = record("per_token").dump_record(output_mode="object")
    for format in ("npz", "safetensors"):
        recorder = record("per_token", spill_directory=tmp_path / "spill", chunk_tokens=2)
        found = load(recorder.dump_record(format=format, directory=tmp_path))
        assert found.topk_ids.tolist() == expected.topk_ids.tolist()
        assert found.num_tokens.tolist() == expected.num_tokens.tolist()


def test_sglang_dumps_are_read(tmp_path):
    """Dumps as SGLang writes them: of counts, of passes, of tokens."""
    counts = torch.arange(12, dtype=torch.int32).reshape(2, 2, 3)
    stat = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": 0.5}
    torch.save(stat, tmp_path / "stat.pt")
    assert load(tmp_path / "stat.pt").logical_count.tolist() == counts.tolist()
    physical = torch.arange(8).reshape(2, 4)
    entry = {"forward_pass_id": 7, "rank": 1, "gatherer_key": "primary", "global_physical_count": physical}
    content = {"records": [entry], "last_physical_to_logical_map": torch.from_numpy(MAPS[0])}
    torch.save(content, tmp_path / "pass.pt")
    found = load(tmp_path / "pass.pt")
    assert (found.mode, found.rank, found.forward_pass_id.tolist()) == ("per_pass", 1, [7])
    assert found.logical_count.tolist() == [reference.logical_counts(physical.numpy(), MAPS[0], 3).tolist()]
    ids = torch.tensor([[[0, 3], [1, -1]], [[2, 1], [0, 0]]], dtype=torch.int32)
    entry = {"forward_pass_id": 7, "rank": 1, "topk_ids_of_layer": ids, "input_ids": [1, 2], "misc_objects": []}
    torch.save({**content, "records": [entry]}, tmp_path / "token.pt")
    found = load(tmp_path / "token.pt")
    assert found.mode == "per_token"
    assert found.global_physical_count.tolist() == [[[1, 1, 0, 1], [2, 1, 1, 0]]]
    assert found.records()[0]["topk_ids_of_layer"].tolist() == ids.tolist()


def test_pickles_are_not_run(tmp_path):
    torch.save({"logical_count": Path("x")}, tmp_path / "dump.pt")
    with pytest.raises(ValueError, match=r"must be a whole \.pt file"):
        load(tmp_path / "dump.pt")
    np.savez(tmp_path / "dump.npz", logical_count=np.array([{}], object))
    with pytest.raises(ValueError, match=r"must be a whole \.npz file"):
        load(tmp_path / "dump.npz")


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_write_leaves_the_old_file(format, tmp_path, monkeypatch):
    recorder = record("per_token")
    path = tmp_path / f"dump.{format}"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    dump = recorder.dump_record(output_mode="object")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left on device"):
        dump.save(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "old")]


def test_a_dump_that_was_not_written_is_kept(tmp_path, monkeypatch):
    recorder = record("stat")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(np, "savez", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recorder.dump_record(directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert load(recorder.dump_record(directory=tmp_path)).forward_pass_id.tolist() == [0, 1, 2]


BAD = {
    "another format": ("dump.txt", "", "`path` must be one of 'npz', 'safetensors', 'json', 'csv', 'pt', got 'txt'"),
    "another header": ("dump.csv", "expert_id,count\n0,1\n", "`path` must be a file with the header layer_id,expert_id,count"),
    "half a line": ("dump.csv", "layer_id,expert_id,count\n0,0\n", "`path` must be a whole .csv file"),
    "words": ("dump.csv", "layer_id,expert_id,count\n0,0,many\n", "`path` must be a whole .csv file"),
    "negative": ("dump.csv", "layer_id,expert_id,count\n0,0,-1\n", "`path` must be a file of counts, none negative"),
    "no lines": ("dump.csv", "layer_id,expert_id,count\n", "`path` must be a file of counts"),
    "no counts": ("dump.json", "{}", "`path` must be a file with logical_count or records"),
    "half": ("dump.json", '{"logical_count": [', "`path` must be a whole .json file"),
    "half a dump": ("dump.json", '{"logical_count": [[1]], "physical_to_logical_maps": [[[0]]]}', "`path` must be a whole dump, got one without mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    file, text, message = BAD[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        load(tmp_path / file)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "gone.npz")


WRONG = {  # of a dump of 3 records, 2 layers, 3 experts, 4 slots, 2 maps, 11 tokens
    "mode": ["other", 5, None, ["stat"]],
    "rank": [-1, "0", 1.5, None, True],
    "num_experts": [0, 2, 4, 10**12, "3", None],
    "num_gpus": [0, 3, -2, None],
    "forward_pass_id": [None, [0, 1], [0, 1, 2, 3], [0, 1, 1.5], [0, 1, 2**63], "012"],
    "gatherer_key": [None, ["primary"], "abc", [1, 2, 3], {"a": 1}],
    "map_of_pass": [None, [0, 0], [0, 0, 2], [0, 0, -1], [[0, 0, 1]]],
    "physical_to_logical_maps": [None, [], [[[0, 1]]], [[[0, 1, 2, 3], [0, 1, 2, 0]]], [[[0, 1, 2, -2], [0, 1, 2, 0]]], 7],
    "logical_count": [None, [], [[[1, 2, 3], [1, 2, 3]]], [[[1, 2], [1, 2]]] * 3, [[[1, 2, -3], [1, 2, 3]]] * 3],
    "global_physical_count": [None, [], [[[1] * 3] * 2] * 3, [[[2**62] * 4] * 2] * 3],
    "rank_physical_count": [None, [], [[[1] * 4]], [[[-1] * 4] * 2]],
    "topk_ids": [None, [], [[[0, 1], [0, 1]]] * 10, [[[0, 4], [0, 1]]] * 11, [[[0, -2], [0, 1]]] * 11, [[[0, 2**40]] * 2] * 11],
    "topk_weights": [[], [[[0.5], [0.5]]] * 11, [[["x", "y"]] * 2] * 11],
    "num_tokens": [None, [11], [4, 1, 7], [4, -1, 8], [4, 1, None], [2**62] * 3],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_dump_whose_parts_contradict_each_other_is_refused(name, tmp_path):
    record("per_token").dump_record(output_mode="object").save(tmp_path / "dump.json")
    content = json.loads((tmp_path / "dump.json").read_text())
    assert name in content
    for value in WRONG[name]:
        (tmp_path / "x.json").write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match="`"):
            load(tmp_path / "x.json")
    if name not in ("topk_ids", "topk_weights", "num_tokens"):
        del content[name]
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"`path` must be a (whole dump|file with)"):
            load(tmp_path / "x.json")


@pytest.mark.parametrize("format", ["npz", "safetensors", "json"])
def test_a_dump_of_nothing_is_read(format, tmp_path):
    recorder = record("per_token")
    recorder.reset()
    with pytest.warns(RuntimeWarning, match="nothing to dump"):
        dump = recorder.dump_record(output_mode="object")
    dump.save(tmp_path / f"dump.{format}")
    assert load(tmp_path / f"dump.{format}").logical_count.shape == (0, 2, 3)


@pytest.mark.parametrize("format", ["npz", "safetensors", "json", "pt"])
def test_passes_without_tokens_are_read(format, tmp_path):
    recorder = ExpertDistributionRecorder(1, 3, mode="per_token", device="cpu")
    recorder.start_record()
    for number, tokens in enumerate((0, 2, 0)):
        with recorder.with_forward_pass(number), recorder.with_current_layer(0):
            recorder.on_select_experts(torch.zeros(tokens, 2, dtype=torch.int32), torch.ones(tokens, 2))
    dump = recorder.dump_record(output_mode="object")
    dump.save(tmp_path / f"dump.{format}")
    assert load(tmp_path / f"dump.{format}").logical_count.tolist() == [[[0, 0, 0]], [[4, 0, 0]], [[0, 0, 0]]]


def test_ids_without_counts_make_a_location(tmp_path):
    """As SGLang's "per_token" has them; the location is that of the counts of the ids."""
    dump = record("per_token").dump_record(output_mode="object")
    records = [
        {"forward_pass_id": r["forward_pass_id"], "rank": 0, "topk_ids_of_layer": torch.from_numpy(r["topk_ids_of_layer"].copy())}
        for r in dump.records()[:2]
    ]  # fmt: skip
    maps = torch.from_numpy(MAPS[0])
    torch.save({"records": records, "last_physical_to_logical_map": maps}, tmp_path / "tokens.pt")
    counts = dump.logical_count[:2]
    assert load(tmp_path / "tokens.pt").logical_count.tolist() == counts.tolist()
    assert traces.load_trace(tmp_path / "tokens.pt").tolist() == counts.tolist()
    location = ExpertLocation.load(tmp_path / "tokens.pt", num_replicas=4, num_gpus=2)
    assert location == ExpertLocation.from_counts(counts, 4, 1, 1, 2)
    records[1]["physical_to_logical_map"] = torch.from_numpy(MAPS[1])  # its own, as ours have it
    torch.save({"records": records, "last_physical_to_logical_map": maps}, tmp_path / "maps.pt")
    counts[1] = dump.with_counts(np.repeat(dump.global_physical_count[1:2], 3, axis=0)).logical_count[2]
    assert load(tmp_path / "maps.pt").logical_count.tolist() == counts.tolist()
    assert traces.load_trace(tmp_path / "maps.pt").tolist() == counts.tolist()


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_our_csv_makes_a_location(mode, tmp_path):
    dump = record(mode).dump_record(output_mode="object")
    dump.save(tmp_path / "dump.csv")
    total = dump.logical_count.sum(axis=0)
    assert traces.load_trace(tmp_path / "dump.csv").tolist() == [total.tolist()]
    location = ExpertLocation.load(tmp_path / "dump.csv", num_replicas=4, num_gpus=2)
    assert location == ExpertLocation.from_counts(total, 4, 1, 1, 2)


def test_json_is_json(tmp_path):
    record("stat").dump_record(output_mode="object").save(tmp_path / "dump.json")
    content = json.loads((tmp_path / "dump.json").read_text())
    assert content["mode"] == "stat"
    assert len(content["logical_count"]) == 3
