"""The benchmark of the experts: what it says of times, and that it compares first."""

import argparse
import json

import pytest
import torch

from numba_moe.bench import layers
from numba_moe.verify import testing

SLOWER = layers.Row("Mixtral-8x7B", 1, 120.0, 100.0, 130.0, 140.0, 20.0, 80.0, 90.0)
FASTER = SLOWER._replace(ours_device=100.0, theirs_device=125.0)


def test_table_and_exit_status(monkeypatch, capsys, tmp_path):
    parser = argparse.ArgumentParser()
    layers.add_arguments(parser)
    monkeypatch.setattr(layers, "weights_of", lambda layer: None)
    monkeypatch.setattr(layers.verification, "environment", lambda on_gpu: {"device": "none"})
    for row, status in ((FASTER, 0), (SLOWER, 1)):
        monkeypatch.setattr(layers, "measure", lambda *arguments, row=row: row)
        path = tmp_path / "times.json"
        options = ["--layer", "Mixtral-8x7B", "--tokens", "1", "--json", str(path)]
        assert layers.run(parser.parse_args(options)) == status
        assert json.loads(path.read_text())["rows"] == [row._asdict()]
    printed = capsys.readouterr().out
    assert "0.800" in printed
    assert "10%" in printed
    assert "1.200" in printed
    assert "25%" in printed


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
    row = layers.measure("small", 64, layers.weights_of(layers.LAYERS["small"]), "zipf")
    assert 0 < row.gemms
    assert 0 < row.ours_device
    monkeypatch.setattr(layers, "fused_experts", lambda rows, *_: torch.zeros_like(rows))
    with pytest.raises(RuntimeError, match="differ"):
        layers.measure("small", 64, layers.weights_of(layers.LAYERS["small"]), "zipf")
