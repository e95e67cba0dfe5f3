"""The benchmark of the experts: what it says of times, and that it compares first."""

import argparse
import json

import pytest
import torch

from numba_moe.bench import layers
from numba_moe.verify import testing

TIMES = layers.Times(device=120.0, eager=130.0, host=20.0)
SLOWER = layers.Row(
    "Mixtral-8x7B", "zipf", 1, 2, 90.0, {layers.OURS: TIMES, "vllm": TIMES._replace(device=100.0), "other": TIMES}
)
FASTER = SLOWER._replace(times=SLOWER.times | {layers.OURS: TIMES._replace(device=80.0)})
ALONE = SLOWER._replace(times={layers.OURS: TIMES})


def test_table_and_exit_status(monkeypatch, capsys, tmp_path):
    parser = argparse.ArgumentParser()
    layers.add_arguments(parser)
    monkeypatch.setattr(layers, "weights_of", lambda layer: None)
    monkeypatch.setattr(layers, "read_bandwidth", lambda: 4e6)
    monkeypatch.setattr(layers.verification, "environment", lambda on_gpu: {"device": "none"})
    for row, status in ((FASTER, 0), (SLOWER, 1), (ALONE, 0)):
        monkeypatch.setattr(layers, "measure", lambda *arguments, row=row: row)
        path = tmp_path / "times.json"
        options = ["--layer", "Mixtral-8x7B", "--tokens", "1", "--routing", "zipf", "--json", str(path)]
        assert layers.run(parser.parse_args(options)) == status
        (found,) = json.loads(path.read_text())["rows"]
        assert found["times"][layers.OURS] == row.times[layers.OURS]._asdict()
    printed = capsys.readouterr().out
    for part in ("vllm device", "0.800", "112%", "1.200", "75%", "nan"):
        assert part in printed, part


def test_what_transformers_takes_for_a_module():
    moe = pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    up, down = torch.randn(3, 8, 8), torch.randn(3, 8, 4)
    rows, ids, weights = torch.randn(5, 8), torch.rand(5, 3).topk(2).indices, torch.rand(5, 2)
    theirs = moe.grouped_mm_experts_forward(layers.as_module(up, down), rows, ids, weights)
    ours = layers.fused_experts(rows, up, down, weights, ids)
    size = testing.EXPERT_ROUNDINGS * testing.largest_in_row(theirs.numpy())
    assert not testing.compare(ours, theirs.numpy(), size=size).mismatches


@pytest.mark.gpu
def test_a_small_layer_on_the_gpu(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(layers.LAYERS, "small", layers.Layer(256, 128, 16, 2))
    weights = layers.weights_of(layers.LAYERS["small"])
    row = layers.measure("small", 64, weights, "zipf", 4e6)
    assert 0 < row.floor
    assert {layers.OURS, "transformers"} <= set(row.times)
    assert all(time > 0 for times in row.times.values() for time in times)
    monkeypatch.setattr(layers, "fused_experts", lambda rows, *_: torch.zeros_like(rows))
    with pytest.raises(RuntimeError, match="differ from transformers's"):
        layers.measure("small", 64, weights, "zipf", 4e6)
