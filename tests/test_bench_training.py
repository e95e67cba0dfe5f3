"""The benchmark of training steps: contenders compute the same, and what it says of their times and memory."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from numba_moe.bench import layers, steps

SMALL = layers.Layer(hidden=32, width=16, experts=6, top_k=2)
OURS = steps.OURS


@pytest.fixture
def problem():
    return steps.draw(SMALL, 40, "cpu", torch.float32)


@pytest.mark.parametrize("name", [*steps.PEERS])
def test_every_contender_has_our_loss_and_gradients(problem, name):
    if name not in steps.contenders():
        pytest.skip(f"{name} is not installed")
    if name in ("scattermoe", "transformer_engine") and not torch.cuda.is_available():
        pytest.skip(f"{name} needs a GPU")
    wanted = steps.run_step(steps.by_us, problem)
    found = steps.run_step(steps.contenders()[name], problem)
    assert steps.fault(found, wanted, torch.float32) == ""
    assert all(leaf.grad is None for leaf in problem.leaves)
    assert all(grad.any() for grad in found[1:])


def test_a_wrong_gradient_is_seen(problem):
    wanted = steps.run_step(steps.by_us, problem)
    for place, name in enumerate(steps.GRADIENTS, 1):
        wrong = list(wanted)
        wrong[place] = wanted[place] * 1.001
        assert f"the gradient of {name} is 0.001 off" in steps.fault(wrong, wanted, torch.float32)
        wrong[place] = torch.full_like(wanted[place], torch.nan)
        assert name in steps.fault(wrong, wanted, torch.float32)
    assert "the loss is" in steps.fault((wanted[0] + 10, *wanted[1:]), wanted, torch.float32)

    def halved(problem):
        return steps.by_us(problem) / 2

    assert steps.tried(halved, problem, wanted).message.startswith("WRONG: the gradient of rows is 0.5 off")


def test_what_a_contender_cannot_do_is_told_and_not_timed(problem):
    def refusing(_problem):
        raise NotImplementedError("no such layer")

    step = steps.tried(refusing, problem, steps.run_step(steps.by_us, problem))
    assert step == steps.Step(message="NotImplementedError: no such layer")


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda package: package == "torch" or None)
    assert list(steps.contenders()) == [OURS, "torch"]


def test_the_six_gemms_of_a_step(problem):
    shapes = {name: tuple(call().shape) for name, call in steps.gemms(problem).items()}
    slots, (hidden, width, experts, _) = 80, SMALL
    assert shapes == {
        "first": (slots, 2 * width),
        "second": (slots, hidden),
        "rows of the second": (slots, width),
        "matrices of the second": (experts, hidden, width),
        "rows of the first": (slots, hidden),
        "matrices of the first": (experts, 2 * width, hidden),
    }


def test_ours_keeps_least(problem):
    kept = {
        name: steps.kept_bytes(lambda call=call: call(problem), problem.leaves)[0]
        for name, call in on_the_cpu().items()
    }
    assert kept[OURS] == min(kept.values())
    assert kept[OURS] >= 80 * 2 * SMALL.width * 4


def on_the_cpu():
    return {name: call for name, call in steps.contenders().items() if name in (OURS, "torch", "transformers")}


TIMED = steps.Step(120.0, 3 << 20, 1 << 20)
ROW = steps.Row("OLMoE", 2048, 100.0, {OURS: TIMED, "torch": TIMED._replace(us=240.0)})


def test_table_and_exit_status(monkeypatch, capsys, tmp_path):
    parser = argparse.ArgumentParser()
    steps.add_arguments(parser)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(steps, "environment", lambda peers: {"device": "none", **peers})
    asked = []
    slower = {**ROW.steps, "torch": TIMED._replace(us=100.0)}
    refused = {**ROW.steps, "torch": steps.Step(message="TypeError: no")}
    wrong = {**ROW.steps, OURS: steps.Step(message="WRONG: the loss")}
    for found, status, ratios in (
        (ROW.steps, 0, (1.2, 0.5)),
        (slower, 1, (1.2, 1.2)),
        (refused, 0, (1.2, None)),
        (wrong, 1, (None, None)),
    ):
        row = ROW._replace(steps=found)
        assert row.ratios == ratios
        monkeypatch.setattr(steps, "measure", lambda *given, row=row: (asked.append(given), row)[1])
        path = tmp_path / "times.json"
        assert steps.run(parser.parse_args(["--quick", "--json", str(path)])) == status
        (written,) = json.loads(path.read_text())["rows"]
        assert written["steps"]["torch"]["us"] == row.steps["torch"].us
    assert asked == [("OLMoE", 2048)] * 4
    printed = capsys.readouterr().out
    for part in ("ours / floor", "1.20", "0.50", "torch: TypeError: no", "numba_moe: WRONG: the loss", "kept MiB"):
        assert part in printed, part


def test_the_script_says_that_it_needs_a_gpu(monkeypatch, capsys):
    path = Path(__file__).parents[1] / "scripts" / "bench_training.py"
    spec = importlib.util.spec_from_file_location("bench_training", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--quick"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert "no CUDA device here" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_small_layer_on_the_gpu(monkeypatch):
    monkeypatch.setitem(layers.LAYERS, "small", layers.Layer(256, 128, 16, 2))
    row = steps.measure("small", 512)
    assert row.floor > 0
    ours = row.steps[OURS]
    assert ours.message == ""
    assert min(ours.us, ours.peak, ours.kept) > 0
    assert "torch" in row.steps
    assert "WRONG" not in str(row.steps)
