"""Random cases follow from seed and index, run, and say how to run a failing one again."""

import argparse

import numpy as np
import pytest
import torch

import numba_moe
from numba_moe import reference
from numba_moe.verify import random_cases, verification
from numba_moe.verify.random_cases import DRAWS, IN_SIMULATOR, ON_GPU


def run(*arguments):
    parser = argparse.ArgumentParser()
    random_cases.add_arguments(parser)
    return random_cases.run(parser.parse_args(arguments))


@pytest.mark.slow
def test_a_few(capsys):
    assert run("--cases", str(2 * len(DRAWS)), "--seed", "5") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{2 * len(DRAWS)} passed, 0 failed"
    assert {line.split()[0] for line in printed} >= set(DRAWS)
    assert set(DRAWS) <= set(verification.OPS)


@pytest.mark.parametrize("limits", [pytest.param(ON_GPU, marks=pytest.mark.slow), IN_SIMULATOR], ids=["large", "small"])
def test_draws_are_legal_and_repeat(limits):
    for index in range(20 * len(DRAWS)):
        case = random_cases.random_case(index, limits)
        drawn, again = (case.arguments(np.random.default_rng((3, index))) for _ in range(2))
        assert random_cases.describe(drawn) == random_cases.describe(again)
        given = {name: verification.testing.to_device(value, "cpu") for name, value in again.items()}
        expected = getattr(reference, case.op)(**drawn)
        got = getattr(verification.OPS[case.op], case.op)(**given)  # checks everything
        assert type(got) is (type(expected) if isinstance(expected, tuple) else torch.Tensor)


def test_a_failing_case_says_how_to_run_it_again(monkeypatch, capsys):
    monkeypatch.setattr(numba_moe, "expert_offsets", lambda counts, alignment: 1 / 0)
    offsets = list(DRAWS).index("expert_offsets")
    assert run("--cases", str(len(DRAWS)), "--op", "expert_*", "--op", "no_such_op") == 1
    printed = capsys.readouterr().out
    assert "FAILED ZeroDivisionError" in printed
    assert f"again: python scripts/random_cases.py --seed 0 --index {offsets}\n" in printed
    assert printed.splitlines()[-1] == "0 passed, 1 failed"
    monkeypatch.undo()
    assert run("--index", str(offsets)) == 0
    assert "expert_offsets(counts=int" in capsys.readouterr().out


def test_nothing_selected_is_a_failure():
    assert run("--cases", "3", "--op", "no_such_op") == 1
