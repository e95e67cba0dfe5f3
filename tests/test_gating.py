"""Gating: every kernel on every case, and the rows where keys do not decide."""

import contextlib

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import cases, reference, testing, verification
from numba_moe.gating import plans as gating_plans
from numba_moe.runtime import plans, simulator

CASES = [case for case in cases.edge_cases() if case.op in testing.GATING]
ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
MANY = 32 if simulator.ENABLED else 5000


@pytest.fixture(params=["warps", "octets"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(gating_plans, "MANY_TOKENS", 0 if request.param == "octets" else 2**31)
    monkeypatch.setattr(gating_plans, "MANY_TOKENS_PER_EXPERT", 0)
    plans.forget()
    yield request.param
    plans.forget()


def run(op, *args, **kwargs):
    """Call an op where kernels run, on NumPy arrays."""

    def give(value):
        return torch.from_numpy(value).to("cuda" if ON_GPU else "cpu") if isinstance(value, np.ndarray) else value

    with simulator.running() if simulator.ENABLED else contextlib.nullcontext():
        return getattr(moe, op)(*map(give, args), **{name: give(value) for name, value in kwargs.items()})


def assert_as_reference(op, *args, **kwargs):
    result = run(op, *args, **kwargs)
    wanted = getattr(reference, op)(*args, **kwargs)
    assert np.array_equal(testing.to_numpy(result.topk_ids), wanted.topk_ids)
    comparison = testing.compare(result.topk_weights, wanted.topk_weights)
    assert not comparison.mismatches, comparison


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_octets_equal_the_reference(case, monkeypatch, request):
    monkeypatch.setattr(gating_plans, "MANY_TOKENS", 0)
    monkeypatch.setattr(gating_plans, "MANY_TOKENS_PER_EXPERT", 0)
    plans.forget()
    request.addfinalizer(plans.forget)
    outcome = verification.run_case(case, seed=1, device="cuda" if ON_GPU else "cpu")
    assert outcome.passed, outcome


def nearly_tied(experts, bits):
    """Return logits that differ in their lowest bits alone: keys with ids of more bits cannot tell them apart."""
    rng = np.random.default_rng(0)
    words = np.float32(1.0).view(np.int32) + rng.integers(0, 1 << bits, (MANY, experts))
    return words.astype(np.int32).view(np.float32)


@pytest.mark.parametrize("experts", [20, 64, 200])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_ranks_that_differ_in_their_lowest_bits(kernel, experts, top_k):
    assert_as_reference("topk_softmax", nearly_tied(experts, 9), top_k, True)


@pytest.mark.parametrize("values", [1, 2, 5])
def test_a_few_values_only(kernel, values):
    logits = np.random.default_rng(values).integers(0, values, (MANY, 96)).astype(np.float32)
    assert_as_reference("topk_softmax", logits, 6, True)
    grouped = {"scoring_func": "sigmoid", "group_score": "max"}
    assert_as_reference("grouped_topk", logits, 6, 8, 3, True, **grouped)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring_func", ["softplus_sqrt", "raw"])
def test_other_scores(kernel, scoring_func, biased):
    rng = np.random.default_rng(3)
    logits = 5 * rng.standard_normal((MANY, 64), np.float32)
    logits[rng.random(logits.shape) < 0.1] = np.inf
    logits[rng.random(logits.shape) < 0.1] = np.nan
    bias = np.linspace(0, 2, 64, dtype=np.float32) if biased else None
    arguments = {"gating_output": logits, "top_k": 6, "scoring_func": scoring_func, "correction_bias": bias}
    for groups in ({}, {"num_expert_group": 8, "topk_group": 3, "group_score": "top2_sum"}):
        result, wanted = run("select_experts", **arguments, **groups), reference.select_experts(**arguments, **groups)
        for comparison in testing.compare_results("select_experts", result, wanted, {**arguments, **groups}):
            assert not comparison.mismatches, comparison


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_softplus_is_precise_for_any_size_of_logits(kernel, scale):
    logits = np.linspace(-scale, scale, MANY * 8, dtype=np.float32).reshape(MANY, 8)
    assert_as_reference("topk_softplus_sqrt", logits, 8, True)


def test_one_lane_has_all_the_best(kernel):
    logits = np.random.default_rng(2).standard_normal((MANY, 256)).astype(np.float32)
    logits[:, 72:80] += 20.0  # neighbours, that lie with one lane
    assert_as_reference("topk_softmax", logits, 8, True)
    assert_as_reference("topk_sigmoid", logits, 8)
