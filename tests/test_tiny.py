"""The small model trains, the same with our block and with a plain one, and leaves a trace that cases can use."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from numba_moe import tiny, tiny_rollouts
from numba_moe.verify import cases

SMALL = tiny.Settings(layers=2, hidden=16, heads=2, experts=6, top_k=2, width=16, length=24, batch=2, steps=3)


@pytest.mark.slow
def test_our_block_learns_what_the_plain_one_does():
    ours, plain = (tiny.train(SMALL._replace(plain=plain), "cpu") for plain in (False, True))
    assert len(ours.losses) == 3
    np.testing.assert_allclose(ours.losses, plain.losses, rtol=1e-5)
    assert ours.losses == tiny.train(SMALL, "cpu").losses
    assert ours.step_ms > 0
    assert plain.trace == {}


@pytest.mark.slow
def test_the_loss_falls():
    report = tiny.train(SMALL._replace(steps=40, rate=1e-2), "cpu")
    assert np.mean(report.losses[-5:]) < report.losses[0] - 0.5


def test_autocast_is_that_of_the_experts():
    block = tiny.Layer(SMALL).experts
    rows = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        result = block(rows)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert block.gate_up_proj.grad.dtype == torch.float32


def script(monkeypatch, *arguments):
    path = Path(__file__).parents[1] / "scripts" / "train_tiny_moe.py"
    spec = importlib.util.spec_from_file_location("train_tiny_moe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in SMALL._asdict().items()
        if name not in ("plain", "traced_steps")
    ]
    monkeypatch.setattr(sys, "argv", ["train_tiny_moe.py", *sizes, *arguments])
    module.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sizes are those of a CPU")
def test_the_script_writes_a_trace_that_becomes_cases(tmp_path, monkeypatch, capsys):
    whole, trimmed = tmp_path / "trace.npz", tmp_path / "data" / "routing.npz"
    script(monkeypatch, "--trace", str(whole), "--trim", str(trimmed))
    printed = capsys.readouterr().out
    assert "step      2 loss" in printed
    assert "seed 0: loss" in printed
    with np.load(whole) as trace:
        assert trace["topk_ids"].shape == trace["topk_weights"].shape == (3, 2, 48, 2)
        assert trace["steps"].tolist() == [0, 1, 2]
        assert 0 <= trace["topk_ids"].min() <= trace["topk_ids"].max() < trace["num_experts"] == 6
    assert trimmed.stat().st_size < 1 << 20
    monkeypatch.setattr(cases.models, "TRAINED_ROUTING", trimmed)
    found = list(cases.trained_cases(48))
    assert {case.op for case in found} >= {"moe_align_block_size", "moe_permute", "fused_experts"}
    arguments = found[0].arguments(np.random.default_rng(0))
    assert arguments["topk_ids"].shape == (48, 2)
    monkeypatch.setattr(cases.models, "TRAINED_ROUTING", tmp_path / "absent.npz")
    assert list(cases.trained_cases(48)) == []


def test_a_plain_model_leaves_no_trace(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        script(monkeypatch, "--plain", "--trace", "trace.npz")
    assert "--plain leaves no trace" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_pass_has_the_experts_of_its_rollouts():
    settings = SMALL._replace(steps=20, rate=1e-2, length=16, experts=16, top_k=4)
    model = tiny.train(settings, "cpu").model
    model.zero_grad()
    found = tiny_rollouts.replay_rollouts(model, settings, "cpu", 16)
    assert found.tokens.shape == (16, 16)
    assert 0 < found.differing < 0.1
    assert found.replayed < found.own < 0.1
    assert all(layer.experts.router.weight.grad.any() for layer in model.layers)


def test_the_script_replays_its_rollouts(monkeypatch, capsys):
    script(monkeypatch, "--rollouts", "1")
    assert "of the picks would be others" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks would want a GPU each")
def test_the_script_trains_on_two_ranks_what_it_trains_on_one(monkeypatch, capsys):
    script(monkeypatch)
    (wanted,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("seed"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, *sys.argv, "--shard"],
        cwd=Path(__file__).parents[1] / "scripts",
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [line.partition(", step")[0] for line in done.stdout.splitlines() if line.startswith("seed")]
    assert found == [wanted.partition(", step")[0]]


def test_ranks_train_and_do_nothing_else(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        script(monkeypatch, "--shard", "--rollouts", "2")
    assert "--shard trains, and does nothing else" in capsys.readouterr().err


def test_a_trimmed_trace_is_small():
    ids = np.random.default_rng(0).integers(0, 32, (8, 4, 8192, 4)).astype(np.int16)
    trace = {"topk_ids": ids, "topk_weights": ids.astype(np.float16), "steps": np.arange(8), "num_experts": 32}
    few = tiny.trim(trace)
    assert few["steps"].tolist() == [0, 2, 4, 7]
    assert few["topk_ids"].nbytes + few["topk_weights"].nbytes < 1 << 20
    assert np.array_equal(few["topk_ids"][-1], ids[-1, :, :1024])


@pytest.mark.sweep(1)
@pytest.mark.parametrize("balance", tiny.BALANCES)
def test_each_way_to_balance_trains_and_measures_loads(balance):
    report = tiny.train(SMALL._replace(balance=balance), "cpu")
    assert report.busiest.shape == (3, 2)
    assert (report.busiest >= 1).all()
    assert report.load <= SMALL.experts / SMALL.top_k


@pytest.mark.slow
def test_a_loss_or_a_bias_balances_a_skewed_model():
    sizes = {"layers": 2, "hidden": 32, "heads": 2, "experts": 8, "top_k": 2, "width": 16, "length": 32, "batch": 8}
    settings = tiny.Settings(**sizes, steps=300, rate=3e-3)
    reports = {balance: tiny.train(settings._replace(balance=balance), "cpu") for balance in tiny.BALANCES}
    assert reports["none"].load > 2.0
    for balance in ("loss", "bias"):
        assert reports[balance].load <= 1.5
        assert math.exp(reports[balance].loss - reports["none"].loss) <= 1.01
