"""Locations: how they are made, compared, changed, written and read, and what they refuse."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from numba_moe.placement import ExpertLocation, make_expert_map, rebalance_experts
from numba_moe.placement.traces import load_trace

MAP = np.array([[0, 1, 2, 0, 3, 1], [3, 2, 1, 0, 0, 3]])
LOCATION = ExpertLocation.from_mapping(MAP, num_gpus=3, num_nodes=2, slots_per_rank=[1, 3, 2])
COUNTS = np.random.default_rng(0).integers(0, 1000, (3, 2, 8))
FORMATS = [".json", ".npz", ".pt"]


def write(path, content):
    """Write what another program would."""
    if path.suffix == ".json":
        path.write_text(json.dumps({name: np.asarray(value).tolist() for name, value in content.items()}))
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save({name: torch.as_tensor(value) for name, value in content.items()}, path)
    return path


def test_arrays_by_hand():
    assert LOCATION.logical_to_all_physical_map.tolist() == [
        [[0, 3, -1], [1, 5, -1], [2, -1, -1], [4, -1, -1]],
        [[3, 4, -1], [2, -1, -1], [1, -1, -1], [0, 5, -1]],
    ]
    assert LOCATION.logical_to_all_physical_map_num_valid.tolist() == [[2, 2, 1, 1], [2, 1, 1, 2]]
    assert LOCATION.rank_of_slot.tolist() == [0, 1, 1, 1, 2, 2]
    assert LOCATION.node_of_slot.tolist() == [0, 0, 0, 0, 1, 1]
    sizes = LOCATION.num_layers, LOCATION.num_physical_experts, LOCATION.num_logical_experts
    assert (*sizes, LOCATION.num_gpus, LOCATION.num_nodes) == (2, 6, 4, 3, 2)
    assert LOCATION.slots_per_rank.tolist() == [1, 3, 2]
    assert repr(LOCATION) == "ExpertLocation(2 layers, 4 experts in 6 slots of 3 ranks on 2 nodes)"
    for field in dataclasses.fields(LOCATION):
        assert getattr(LOCATION, field.name).dtype == np.int64


def test_constructors():
    trivial = ExpertLocation.trivial(2, 4, 10, num_gpus=4, num_nodes=3)
    assert trivial.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]] * 2
    assert trivial.rank_of_slot.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert trivial.node_of_slot.tolist() == [0] * 6 + [1] * 2 + [2] * 2
    assert ExpertLocation.trivial(1, 5).num_physical_experts == 5
    counted = ExpertLocation.from_counts(COUNTS, 12, 1, 1, 4, algorithm="refined")
    placed = rebalance_experts(COUNTS, 12, 1, 1, 4, algorithm="refined")
    for name in placed._fields:
        assert getattr(counted, name).tolist() == getattr(placed, name).tolist()
    uneven = ExpertLocation.from_counts(COUNTS[0], 12, 1, 1, 3, algorithm="refined", slots_per_rank=[2, 4, 6])
    assert uneven.slots_per_rank.tolist() == [2, 4, 6]
    idle = ExpertLocation.from_counts(COUNTS, 12, 1, 1, 3, algorithm="refined", active_ranks=[True, False, True])
    assert (idle.physical_to_logical_map == -1).sum() == 8
    assert idle.logical_to_all_physical_map.shape == (2, 8, 5)


def test_nothing_can_be_written():
    source = MAP.copy()
    location = ExpertLocation.from_mapping(source)
    source[0, 0] = 2
    assert location.physical_to_logical_map[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        location.physical_to_logical_map[0, 0] = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        location.rank_of_slot = None


def test_equality():
    assert ExpertLocation.from_mapping(MAP, num_gpus=3, num_nodes=2, slots_per_rank=[1, 3, 2]) == LOCATION
    assert ExpertLocation.from_mapping(MAP, num_gpus=3, num_nodes=2) != LOCATION
    assert ExpertLocation.from_mapping(MAP, num_gpus=3, num_nodes=3, slots_per_rank=[1, 3, 2]) != LOCATION
    assert ExpertLocation.from_mapping(MAP[:, ::-1], num_gpus=3, num_nodes=2, slots_per_rank=[1, 3, 2]) != LOCATION
    assert ExpertLocation.from_mapping(MAP[:1]) != ExpertLocation.from_mapping(MAP)
    assert LOCATION != MAP.tolist()


def test_update():
    other = ExpertLocation.from_mapping(MAP[::-1], num_gpus=3, num_nodes=2, slots_per_rank=[1, 3, 2])
    changed = LOCATION.update(other, layers=[1])
    assert changed.physical_to_logical_map.tolist() == [MAP[0].tolist(), MAP[0].tolist()]
    assert changed.logical_to_all_physical_map[1].tolist() == LOCATION.logical_to_all_physical_map[0].tolist()
    assert LOCATION.physical_to_logical_map.tolist() == MAP.tolist()
    assert LOCATION.update(other) == other
    assert LOCATION.update(other, layers=[]) == LOCATION
    with pytest.raises(ValueError, match="`layers` must be at most num_layers - 1 = 1, got 2"):
        LOCATION.update(other, layers=[2])
    with pytest.raises(ValueError, match=r"`other` must be of the same sizes, ranks and nodes, got ExpertLocation\(2"):
        LOCATION.update(ExpertLocation.from_mapping(MAP))
    with pytest.raises(TypeError, match="`other` must be an ExpertLocation, got ndarray"):
        LOCATION.update(MAP)


CONTRADICTIONS = {
    "a slot of another expert": ("logical_to_all_physical_map", (0, 1, 1), 3, "got 3 at layer 0, expert 1, replica 1"),
    "a slot too many": ("logical_to_all_physical_map", (1, 2, 1), 5, "got 5 at layer 1, expert 2, replica 1"),
    "a count": ("logical_to_all_physical_map_num_valid", (1, 0), 1, "got 1 at layer 1, expert 0"),
    "an expert that is not there": ("physical_to_logical_map", (1, 4), 4, r"in \[0, num_experts = 4\), got 4 at layer 1, slot 4"),
    "a hole": ("physical_to_logical_map", (0, 3), -1, "got -1 at layer 0, slot 3"),
    "an expert without a slot": ("physical_to_logical_map", (0, 2), 1, "got 0 at layer 0, expert 2"),
    "the map changed alone": ("physical_to_logical_map", (0, 3), 1, "got 2 at layer 0, expert 0"),
    "a rank out of order": ("rank_of_slot", 3, 0, "`rank_of_slot` must be ascending from 0 without gaps, got 0 at slot 3"),
    "no rank 0": ("rank_of_slot", 0, 1, "`rank_of_slot` must be ascending from 0 without gaps, got 1 at slot 0"),
    "a rank left out": ("rank_of_slot", slice(4, 6), 3, "`rank_of_slot` must be ascending .* got 3 at slot 4"),
    "a rank on two nodes": ("node_of_slot", 3, 1, "`node_of_slot` must be the same in all slots of a rank, got 1 at slot 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_validation_names_the_first_contradiction(name):
    field, place, value, message = CONTRADICTIONS[name]
    array = getattr(LOCATION, field).copy()
    array[place] = value
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LOCATION, **{field: array})


BAD = {
    "more GPUs than slots": (lambda: ExpertLocation.from_mapping(MAP, num_gpus=7), "`num_gpus` must be at most the number of slots = 6, got 7"),
    "more nodes than GPUs": (lambda: ExpertLocation.from_mapping(MAP, num_nodes=2), "`num_nodes` must be at most num_gpus = 1, got 2"),
    "an expert left out": (lambda: ExpertLocation.from_mapping(MAP, num_experts=5), "`physical_to_logical_map` must be a map with slots for every expert, got 0 at layer 0, expert 4"),
    "fewer slots than experts": (lambda: ExpertLocation.trivial(1, 4, 3), "`num_replicas` must be at least num_experts = 4, got 3"),
    "layers that are a number": (lambda: LOCATION.update(LOCATION, 1), "`layers` must be integers, got int"),
    "one layer": (lambda: ExpertLocation.from_mapping(MAP[0]), r"`physical_to_logical_map` must be of 2 dimensions, got shape \(6,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_saved_is_loaded(suffix, tmp_path):
    path = tmp_path / f"location{suffix}"
    idle = np.where(LOCATION.rank_of_slot == 2, -1, [0, 1, 2, 3, 0, 0])[None]
    for location in (ExpertLocation.trivial(3, 8, 12, num_gpus=4), LOCATION):
        location.save(path)
        assert ExpertLocation.load(path) == location
        assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary file stays"
    location = ExpertLocation.from_mapping(idle, num_gpus=3, slots_per_rank=[1, 3, 2])
    location.save(path)
    assert ExpertLocation.load(str(path)) == location


@pytest.mark.parametrize("suffix", FORMATS)
def test_maps_and_dumps_of_others(suffix, tmp_path):
    path = write(tmp_path / f"map{suffix}", {"physical_to_logical_map": MAP})
    assert ExpertLocation.load(path, num_gpus=3, num_nodes=2, slots_per_rank=[1, 3, 2]) == LOCATION
    with pytest.raises(ValueError, match=f"`num_gpus` must be given for map{suffix}, which does not say, got None"):
        ExpertLocation.load(path)

    path = write(tmp_path / f"dump{suffix}", {"rank": 0, "logical_count": COUNTS.astype(np.int32)})
    expected = ExpertLocation.from_counts(COUNTS, 12, 4, 2, 4)
    assert ExpertLocation.load(path, num_replicas=12, num_groups=4, num_nodes=2, num_gpus=4) == expected
    refined = ExpertLocation.load(path, num_replicas=11, num_gpus=4, algorithm="refined", slots_per_rank=[2, 3, 3, 3])
    assert refined.slots_per_rank.tolist() == [2, 3, 3, 3]
    with pytest.raises(
        ValueError, match=f"`num_replicas` must be given for dump{suffix}, which does not say, got None"
    ):
        ExpertLocation.load(path, num_gpus=4)


PASSES = [{"forward_pass_id": 5 + step, "rank": 0, "logical_count": count} for step, count in enumerate(COUNTS)]
SIZES = {"num_replicas": 11, "num_gpus": 4, "algorithm": "refined"}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("counts", [COUNTS, COUNTS[0]], ids=["steps", "no steps"])
def test_dumps_of_counts(suffix, counts, tmp_path):
    path = tmp_path / f"dump{suffix}"
    counts = counts.astype(np.int32)
    if suffix == ".npz":
        np.savez(path, logical_count=counts)
    elif suffix == ".safetensors":
        save_file({"logical_count": counts}, path)
    else:  # as SGLang's "stat" dump
        dump = {"rank": 0, "logical_count": torch.from_numpy(counts), "average_utilization_rate_over_window": None}
        torch.save(dump, path)
    expected = ExpertLocation.from_counts(counts, 11, 1, 1, 4, algorithm="refined")
    assert ExpertLocation.load(path, **SIZES) == expected


def test_dumps_of_records(tmp_path):
    expected = ExpertLocation.from_counts(COUNTS, 11, 1, 1, 4, algorithm="refined")
    torch.save(
        [{**record, "logical_count": torch.tensor(record["logical_count"])} for record in PASSES], tmp_path / "a.pt"
    )
    lists = [{**record, "logical_count": record["logical_count"].tolist()} for record in PASSES]
    (tmp_path / "b.json").write_text(json.dumps(lists))
    (tmp_path / "c.json").write_text(json.dumps({"records": lists}))
    for path in tmp_path.iterdir():
        assert ExpertLocation.load(path, **SIZES) == expected
    assert load_trace(tmp_path / "a.pt").tolist() == COUNTS.tolist()


def test_detail_dump_of_sglang(tmp_path):
    """Counts by slot, some of one pass in two records; the second slot of an expert counts for it."""
    mapping = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1], [7, 6, 5, 4, 3, 2, 1, 0, 7, -1]])
    physical = torch.from_numpy(np.random.default_rng(1).integers(1, 90, (3, 2, 10)).astype(np.int32))
    parts = [(5, "primary", physical[0]), (5, "child", physical[1]), (6, "primary", physical[2])]
    records = [
        {"forward_pass_id": number, "rank": 0, "gatherer_key": key, "global_physical_count": count}
        for number, key, count in parts
    ]
    torch.save({"records": records, "last_physical_to_logical_map": mapping}, tmp_path / "detail.pt")
    expected = np.zeros((2, 2, 8), int)
    for step, (_, _, count) in zip((0, 0, 1), parts, strict=True):
        for layer, slot in np.ndindex(2, 10):
            if mapping[layer, slot] >= 0:
                expected[step, layer, mapping[layer, slot]] += int(count[layer, slot])
    assert load_trace(tmp_path / "detail.pt").tolist() == expected.tolist()
    location = ExpertLocation.load(tmp_path / "detail.pt", **SIZES)
    assert location == ExpertLocation.from_counts(expected, 11, 1, 1, 4, algorithm="refined")


def test_records_that_make_no_counts(tmp_path):
    one_without = [{"logical_count": [[1, 2]]}, {"rank": 0}]
    without_map = {"records": [{"global_physical_count": [[1, 2]]}]}
    for content in ([], [1, 2], one_without, without_map):
        (tmp_path / "dump.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"`path` must be a file with .* got dump\.json"):
            ExpertLocation.load(tmp_path / "dump.json", **SIZES)
    (tmp_path / "dump.json").write_text(json.dumps([{"logical_count": [[1, 2]]}, {"logical_count": [[1, 2, 3]]}]))
    with pytest.raises(ValueError, match=r"of shape that of the first record = \(1, 2\), got shape \(1, 3\)"):
        ExpertLocation.load(tmp_path / "dump.json", **SIZES)
    content = {"records": [{"global_physical_count": [[1, 2]]}], "last_physical_to_logical_map": [[0, 1, 1]]}
    (tmp_path / "dump.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`global_physical_count` must be of shape `last_\w+`.shape = \(1, 3\)"):
        ExpertLocation.load(tmp_path / "dump.json", **SIZES)
    (tmp_path / "dump.safetensors").write_bytes(b"noise")
    with pytest.raises(
        ValueError, match=r"`path` must be a whole \.safetensors file, got dump\.safetensors of 5 bytes"
    ):
        ExpertLocation.load(tmp_path / "dump.safetensors", **SIZES)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_is_not_told_what_it_does_not_need(suffix, tmp_path):
    LOCATION.save(tmp_path / f"location{suffix}")
    with pytest.raises(
        ValueError, match=r"`num_gpus` must be left out for location\.\w+, which does not need it, got 3"
    ):
        ExpertLocation.load(tmp_path / f"location{suffix}", num_gpus=3)
    path = write(tmp_path / f"map{suffix}", {"physical_to_logical_map": MAP})
    with pytest.raises(
        ValueError, match=r"`algorithm` must be left out for map\.\w+, which does not need it, got best"
    ):
        ExpertLocation.load(path, num_gpus=3, algorithm="best")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "neither"])
def test_damaged_files(suffix, damage, tmp_path):
    path = tmp_path / f"location{suffix}"
    LOCATION.save(path)
    message = rf"`path` must be a whole {suffix} file, got location{suffix} of \d+ bytes"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 4)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        write(path, {"counts": COUNTS})
        message = "`path` must be a file with physical_to_logical_map or logical_count, got location"
    with pytest.raises(ValueError, match=message):
        ExpertLocation.load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_whose_arrays_disagree(suffix, tmp_path):
    path = tmp_path / f"location{suffix}"
    content = {"physical_to_logical_map": MAP, "num_logical_experts": np.array(4), "rank_of_slot": [0, 1, 1, 1, 2, 2]}
    write(path, content)
    with pytest.raises(ValueError, match="`path` must be a file with node_of_slot, got location"):
        ExpertLocation.load(path)
    write(path, {**content, "node_of_slot": [0, 0, 0, 1, 1, 1]})
    with pytest.raises(ValueError, match="`node_of_slot` must be the same in all slots of a rank, got 1 at slot 3"):
        ExpertLocation.load(path)
    write(path, {**content, "node_of_slot": [0, 0, 0, 0, 1, 1], "num_logical_experts": np.array(5)})
    with pytest.raises(ValueError, match="`physical_to_logical_map` must be a map with slots for every expert"):
        ExpertLocation.load(path)
    write(path, {**content, "node_of_slot": [0, 0, 0, 0, 1]})
    with pytest.raises(ValueError, match=r"`node_of_slot` must be of shape \(P,\) = \(6,\), got shape \(5,\)"):
        ExpertLocation.load(path)
    write(path, {**content, "node_of_slot": [0] * 6, "rank_of_slot": [2, 2, 1, 1, 0, 0]})
    with pytest.raises(ValueError, match="`rank_of_slot` must be ascending from 0 without gaps, got 2 at slot 0"):
        ExpertLocation.load(path)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/x\.json"):  # and no name of our own
        LOCATION.save(tmp_path / "missing" / "x.json")
    with pytest.raises(TypeError, match="`path` must be a str or a path, got int"):
        LOCATION.save(3)
    with pytest.raises(FileNotFoundError):
        ExpertLocation.load(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"`path` must be one of '\.json', '\.npz', '\.pt', got '\.csv'"):
        LOCATION.save(tmp_path / "location.csv")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="`path` must be a file with physical_to_logical_map"):
        ExpertLocation.load(tmp_path / "list.json")


class Dangerous:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ("code from a file",)


def test_no_code_from_a_file_runs(tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"physical_to_logical_map": Dangerous()}))
    torch.save({"physical_to_logical_map": Dangerous()}, tmp_path / "worse.pt")
    np.savez(tmp_path / "bad.npz", physical_to_logical_map=np.array([Dangerous()], object))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="`path` must be a whole"):
            ExpertLocation.load(path)
    assert "code from a file" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_failed_save_leaves_what_was_there(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"location{suffix}"
    LOCATION.save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ExpertLocation.trivial(1, 2).save(path)
    monkeypatch.undo()
    assert ExpertLocation.load(path) == LOCATION
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 2), (7, 3), (3, 5), (1, 1)])
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_maps_give_every_expert_to_one_rank(num_experts, num_ranks, strategy):
    maps = np.stack([make_expert_map(num_experts, num_ranks, rank, strategy) for rank in range(num_ranks)])
    assert (maps >= 0).sum(0).tolist() == [1] * num_experts
    owners = (maps >= 0).argmax(0).tolist()
    if strategy == "round_robin":
        assert owners == [expert % num_ranks for expert in range(num_experts)]
    else:
        assert owners == sorted(owners)
    sizes = (maps >= 0).sum(1)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(sizes) <= 0).all()  # the first ranks have more
    for local in maps:
        assert local[local >= 0].tolist() == list(range((local >= 0).sum()))


def test_maps_of_no_such_rank_or_strategy_are_refused():
    with pytest.raises(ValueError, match="`rank` must be at most num_ranks - 1 = 1, got 2"):
        make_expert_map(8, 2, 2)
    with pytest.raises(ValueError, match="`strategy` must be one of 'linear', 'round_robin', got 'random'"):
        make_expert_map(8, 2, 1, "random")
