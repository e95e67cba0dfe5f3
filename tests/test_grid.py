"""The grid of the benchmark: what is drawn, what is checked and timed, what runs say together."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

from numba_moe import cli, reference
from numba_moe.bench import contenders, grid, grid_shapes, grid_summary, measure, ratios
from numba_moe.bench.contenders import OURS
from numba_moe.bench.grid_shapes import GRIDS, Buffer, Shape
from numba_moe.bench.measure import Row
from numba_moe.commands import bench_options

# A small point of each op, in every dtype that its axes have.
SMALL = {
    "topk_softmax": {"tokens": 5, "experts": 12, "top_k": 3, "renormalize": True, "bias": True},
    "topk_sigmoid": {"tokens": 5, "experts": 12, "top_k": 3, "renormalize": False, "bias": False},
    "grouped_topk": {"tokens": 5, "experts": 12, "top_k": 3, "renormalize": True, "groups": (4, 2)},
    "moe_align_block_size": {"tokens": 50, "experts": 7, "top_k": 3, "block_size": 16},
    "moe_sum": {"tokens": 5, "top_k": 3, "hidden": 16},
    "moe_permute": {"tokens": 5, "top_k": 3, "hidden": 16, "experts": 7},
    "moe_unpermute": {"tokens": 5, "top_k": 3, "hidden": 16},
}


def small(op, dtype="bfloat16"):
    return Shape(op, {**SMALL[op], **({"dtype": dtype} if "dtype" in GRIDS[op].axes else {})})


@pytest.mark.sweep(1)
@pytest.mark.parametrize("op", GRIDS)
def test_shapes_are_drawn_by_a_seed_from_all_axes(op):
    drawn = grid_shapes.draw(op, 300, seed=1)
    assert drawn == grid_shapes.draw(op, 300, seed=1)
    assert drawn != grid_shapes.draw(op, 300, seed=2)
    assert len({shape.name + str(shape.point.get("dtype")) for shape in drawn}) == 300
    for axis, values in GRIDS[op].axes.items():
        assert len({shape.point[axis] for shape in drawn}) > 0.8 * len(values), axis
    for shape in drawn:
        at = shape.point
        assert at["top_k"] <= at.get("experts", math.inf)
        assert at["tokens"] * at["top_k"] * at.get("hidden", 1) < 2**31


def test_groups_hold_the_picks():
    for shape in grid_shapes.draw("grouped_topk", 200, seed=3):
        groups, kept = shape.point["groups"]
        assert shape.point["experts"] % groups == 0
        assert shape.point["top_k"] <= kept * shape.point["experts"] // groups


@pytest.mark.slow
def test_parts_make_up_the_whole():
    whole = grid_shapes.draw_all(list(GRIDS), 20, 0)
    parts = [grid_shapes.draw_all(list(GRIDS), 20, 0, part, 3) for part in (1, 2, 3)]
    assert sorted(map(str, whole)) == sorted(str(shape) for part in parts for shape in part)
    assert {shape.op for shape in parts[2][: len(GRIDS)]} == set(GRIDS), "a run that ends early has all ops"


def test_names_of_shapes():
    assert small("topk_softmax").name == "tokens 5 experts 12 top_k 3 renormalize bias"
    assert small("topk_sigmoid").name == "tokens 5 experts 12 top_k 3"
    assert small("topk_sigmoid").across == 12
    assert small("moe_sum").across == 3


@pytest.mark.parametrize("op", GRIDS)
def test_results_are_checked(op):
    """Ours are right on the CPU, by the reference, and a result with two elements exchanged is wrong."""
    arguments = grid_shapes.arguments_of(small(op), Buffer("cpu", 0))
    wanted = grid_shapes.expected(op, arguments)
    result = getattr(measure.numba_moe, op)(**arguments)
    assert grid_shapes.fault_of(op, result, arguments, wanted) == ""
    if isinstance(result, tuple):
        broken = tuple(None if part is None else part.flip(0) for part in result)
    else:
        broken = result.flip(0)
    assert grid_shapes.fault_of(op, broken, arguments, wanted) != ""


def test_alignment_and_permutation_by_torch_are_those_of_the_reference():
    ids = np.random.default_rng(0).integers(0, 9, (40, 3)).astype(np.int32)
    found, wanted = grid_shapes.aligned_by_torch(torch.from_numpy(ids), 4, 9), reference.moe_align_block_size(ids, 4, 9)
    used = int(wanted.num_tokens_post_padded[0])
    assert found.num_tokens_post_padded.tolist() == [used]
    assert found.sorted_token_ids.tolist() == wanted.sorted_token_ids[:used].tolist()
    assert found.expert_ids.tolist() == wanted.expert_ids[: used // 4].tolist()
    order = grid_shapes.permuted_by_torch(torch.from_numpy(ids), 9)
    by_reference = reference.moe_permute(np.ones((40, 1), np.float32), ids, 9)
    assert order.permuted_idx.tolist() == by_reference.permuted_idx.tolist()
    assert order.expert_first_token_offset.tolist() == by_reference.expert_first_token_offset.tolist()


@pytest.fixture
def clock(monkeypatch):
    """Time nothing: each implementation takes what `times` says of it, one number after another, then the last."""
    times = {}

    def device_time(call, enough_us, replays):
        told = times[call]
        return told.pop(0) if len(told) > 1 else told[0]

    monkeypatch.setattr(measure, "device_time", device_time)
    return times


def with_peer(monkeypatch, times, ours, theirs):
    """Let torch be the only peer of moe_sum, and give the times of both."""
    made = measure.contenders_for

    def contenders_for(op, arguments, peers):
        found = made(op, arguments, peers)
        for one in found:
            times[one.call] = list(ours if one.name == OURS else theirs)
        return found

    monkeypatch.setattr(measure, "contenders_for", contenders_for)


def test_what_is_slower_is_timed_again_and_the_middle_counts(clock, monkeypatch):
    with_peer(monkeypatch, clock, [9.0, 1.0, 3.0, 2.0, 5.0, 4.0], [2.0])
    ours, torch_row = grid.measure_shape(small("moe_sum"), Buffer("cpu", 0), ["torch"])
    assert (ours.implementation, ours.device_us, ours.experts, ours.tokens) == (OURS, 3.0, 3, 5)
    assert (torch_row.implementation, torch_row.device_us) == ("torch", 2.0)


def test_what_is_faster_is_timed_once(clock, monkeypatch):
    with_peer(monkeypatch, clock, [1.0, 9.0], [2.0, 1.0])
    assert [row.device_us for row in grid.measure_shape(small("moe_sum"), Buffer("cpu", 0), ["torch"])] == [1.0, 2.0]


def test_an_error_of_ours_counts_as_slower(clock, monkeypatch):
    monkeypatch.setattr(measure.numba_moe, "moe_sum", lambda hidden_states: 1 / 0)
    with_peer(monkeypatch, clock, [1.0], [2.0])
    rows = grid.measure_shape(small("moe_sum"), Buffer("cpu", 0), ["torch"])
    [compared] = grid_summary.compare(rows)
    assert compared.ratio == math.inf
    assert compared.noticeable
    assert "ZeroDivisionError" in grid_summary.worst(rows)
    assert grid_summary.summary(rows).splitlines()[-1].split() == ["moe_sum", "1", "0", "1", "-", "inf", "1", "1", "1"]


def test_another_process_goes_on_where_a_peer_broke_the_context(clock, monkeypatch):
    with_peer(monkeypatch, clock, [1.0], [2.0])
    monkeypatch.setattr(Buffer, "holds", lambda self: False)
    shape, buffer = small("moe_sum"), Buffer("cpu", 0)

    class Pool:
        """Measure here; torch breaks what it runs in."""

        def __init__(self, *options):
            processes.append(self)

        def submit(self, function, shape, broken):
            monkeypatch.setattr(torch.Tensor, "sum", lambda *axes: 1 / 0)
            rows = grid.measure_shape(shape, buffer, ["torch"], broken)
            return argparse.Namespace(result=lambda: rows)

        def shutdown(self, cancel_futures):
            pass

    processes = []
    monkeypatch.setattr(grid, "ProcessPoolExecutor", Pool)
    options = argparse.Namespace(peers=None, peer_lib=[], peer_tree=[], seed=0)
    with grid.Measuring(options) as measuring:
        ours, theirs = measuring.measure(shape)
    assert len(processes) == 2
    assert (ours.device_us, theirs.device_us) == (1.0, None)
    assert theirs.message.startswith("ZeroDivisionError")


def rows():
    def pair(op, shape, tokens, ours, theirs):
        yield Row(op, shape, tokens, "float32", OURS, ours, experts=8)
        yield Row(op, shape, tokens, "float32", "vllm", theirs, experts=8)
        yield Row(op, shape, tokens, "float32", "torch", None, message="RuntimeError: no", experts=8)

    return [
        *pair("moe_sum", "a", 1, 1.0, 2.0),
        *pair("moe_sum", "b", 64, 2.0, 1.0),
        *pair("moe_sum", "c", 64, 1.03, 1.0),
        *pair("topk_softmax", "a", 64, 4.0, 2.0),
        Row("topk_softmax", "alone", 1, "float32", OURS, 1.0, experts=8),
    ]


def test_summary():
    *_, sums, gates = (line.split() for line in grid_summary.summary(rows()).splitlines())
    mean = (0.5 * 2 * 1.03) ** (1 / 3)
    assert sums == ["moe_sum", "3", "0", "0", f"{mean:.3f}", "2.00", "2", "1", "1"]
    assert gates == ["topk_softmax", "2", "1", "0", "2.000", "2.00", "1", "1", "1"]


def test_worst_rows_and_peers():
    lines = grid_summary.worst(rows(), 2).splitlines()[2:]
    assert [line.split()[:3] for line in lines] == [["2.00", "moe_sum", "b"], ["2.00", "topk_softmax", "a"]]
    about = grid_summary.peers(rows())
    assert "RuntimeError: no" in about
    vllm = next(line.split() for line in about.splitlines() if line.startswith("moe_sum") and "vllm" in line)
    assert vllm[1:] == ["vllm", "3", "3", "0", "0"]


def test_runs_are_merged_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    one, two, plot = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "map.png"
    ratios.write_report(one, rows()[:6], {"device": "H200", "torch": "2.11"})
    newer = [row._replace(device_us=0.25) if row.implementation == OURS else row for row in rows()[3:]]
    ratios.write_report(two, newer, {"device": "H100", "torch": "2.11"})
    options = ["bench", "--merge", str(one), str(two), "--json", str(tmp_path / "both.json"), "--plot", str(plot)]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert "device: H200; H100\ntorch: 2.11\n" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    both = list(ratios.read_report(tmp_path / "both.json").values())
    assert len(both) == len(rows())
    of_b = [row.device_us for row in both if row.implementation == OURS and row.shape == "b"]
    assert of_b == [0.25], "the last run counts"


@pytest.mark.slow
def test_options(capsys):
    parser = argparse.ArgumentParser()
    bench_options(parser)
    options = parser.parse_args(["--grid", "moe_*", "--part", "2/3", "--shapes", "5"])
    assert {shape.op for shape in grid.select_shapes(options)} <= {op for op in GRIDS if op.startswith("moe_")}
    every = parser.parse_args(["--grid"])
    assert len(grid.select_shapes(every)) == 300 * len(GRIDS)
    with pytest.raises(ValueError, match="`--grid` must name ops among topk_softmax"):
        grid.select_shapes(parser.parse_args(["--grid", "gemm"]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--part", "4/3"])
    assert "must be I/N" in capsys.readouterr().err


def test_a_merge_of_what_is_no_report(tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps({"environment": {}}))
    assert cli.main(["bench", "--merge", str(tmp_path / "bad.json")]) == 2
    assert "is no report of this benchmark" in capsys.readouterr().err


def test_a_tree_of_peers(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "stub_peers.py").write_text("import sys\ndef install():\n    sys.installed_for_test = True\n")
    contenders.find_trees([tmp_path])
    assert __import__("sys").__dict__.pop("installed_for_test")
    with pytest.raises(ValueError, match="`--peer-tree` must be a folder"):
        contenders.find_trees([tmp_path / "none"])


def test_later_parameters_of_a_peers_op():
    assert contenders.later(torch.ops.aten.topk, 2) == (None, False, False)
    assert contenders.later(lambda: None, 2) == ()


@pytest.mark.gpu
def test_end_to_end(tmp_path):
    path = tmp_path / "grid.json"
    options = ["bench", "--grid", "topk_softmax", "moe_sum", "--shapes", "3", "--peers", "torch", "--json", str(path)]
    assert cli.main(options) == 0
    found = ratios.read_report(path)
    assert len(found) == 2 * 3 * 2
    assert all(row.device_us > 0 and not row.message for row in found.values())
