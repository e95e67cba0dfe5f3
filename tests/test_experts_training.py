"""A training pass of the experts: what it keeps between its passes, and the pass that computes the rest again."""

import contextlib

import numpy as np
import pytest
import torch
from numba_moe.reference.activation import moe_activation, weighted_activation_backward
from numba_moe.reference.permute import spread_rows as spread_by_reference

import numba_moe as moe
from numba_moe.bench.steps import kept_bytes
from numba_moe.device import simulator
from numba_moe.ops.activation.weighted import weighted_activation_backward as op
from numba_moe.ops.permute.row_gradients import spread_rows
from numba_moe.verify import testing

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"
OFFSET = np.array([0, 3, 3, 7])
OPTIONS = {
    "silu": {"activation": "silu", "alpha": 1.3},
    "gelu": {"activation": "gelu", "limit": 0.7},
    "swiglu_oai": {"activation": "swiglu_oai"},
    "interleaved": {"activation": "gelu_tanh", "interleaved": True},
    "situ": {"activation": "situ", "linear_beta": 2.0},
    "no ups": {"activation": "relu2_no_mul"},
}


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def drawn(seed, width, name="silu"):
    """Draw nine rows of three experts, of which seven are in use, for five tokens of two slots each."""
    halves = 1 if name == "no ups" else 2
    rng = np.random.default_rng(seed)
    places = np.full(10, -1, np.int32)
    places[rng.permutation(10)[:7]] = rng.permutation(7)
    gate_up, grad, bias = (
        rng.standard_normal(shape) for shape in ((9, halves * width), (9, width), (3, halves * width))
    )
    return gate_up, grad, rng.random((5, 2)) + 0.1, places.reshape(5, 2), bias


@pytest.mark.parametrize("name", OPTIONS)
def test_twin_by_finite_differences(name):
    gate_up, grad, weights, places, bias = drawn(0, 4, name)

    def loss(gate_up, weights, bias):
        rows, total = moe_activation(gate_up, OFFSET, bias, **OPTIONS[name]), 0.0
        for token, slot in zip(*np.nonzero(places >= 0), strict=True):
            total += weights[token, slot] * rows[places[token, slot]] @ grad[places[token, slot]]
        return total

    by_rows, weighted, by_weights = weighted_activation_backward(
        gate_up, grad, weights, places, OFFSET, bias, **OPTIONS[name]
    )
    rng = np.random.default_rng(1)
    for place, found in ((0, by_rows), (1, by_weights)):
        arguments = [gate_up, weights, bias]
        direction = rng.standard_normal(found.shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = list(arguments)
            moved[place] = arguments[place] + step * direction
            ends.append(loss(*moved))
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((found * direction).sum(), rel=1e-6)
    used = places[places >= 0]
    assert loss(gate_up, weights, bias) == pytest.approx((weighted[used] * grad[used]).sum())


@pytest.mark.sweep(18)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 8, 40])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernel_by_the_twin(name, width, dtype):
    gate_up, grad, weights, places, bias = drawn(width, width, name)
    arrays = [torch.from_numpy(part).to(dtype).to(DEVICE) for part in (gate_up, grad, bias)]
    slots = torch.from_numpy(weights).float().to(DEVICE), torch.from_numpy(places).to(DEVICE)
    arrays[0][7:] = torch.nan
    options = {**dict.fromkeys(("interleaved", "limit", "alpha", "beta", "linear_beta")), **OPTIONS[name]}
    with running(), testing.poisoned_memory():
        found = op(*arrays[:2], *slots, torch.from_numpy(OFFSET).to(DEVICE), arrays[2], **options, of_bias=True)
    exact = [testing.to_numpy(part).astype(np.float64) for part in (*arrays[:2], slots[0])]
    wanted = weighted_activation_backward(
        *exact, places, OFFSET, testing.to_numpy(arrays[2]).astype(np.float64), **options
    )
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    for got, expected, used in zip(found[:3], wanted, (slice(7), slice(7), slice(None)), strict=True):
        np.testing.assert_allclose(testing.to_numpy(got)[used], expected[used], rtol=tolerance, atol=tolerance)
    sums = [wanted[0][begin:end].sum(0) for begin, end in ((0, 3), (3, 3), (3, 7))]
    np.testing.assert_allclose(testing.to_numpy(found.bias), sums, rtol=8 * tolerance, atol=8 * tolerance)
    assert found.bias.dtype == found.rows.dtype == found.weighted.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [3, 8, 72])
def test_rows_are_spread_as_permuted(hidden, dtype):
    rows, (*_, places, _) = torch.randn(5, hidden, device=DEVICE).to(dtype), drawn(3, 1)
    strided = torch.stack([rows, rows], -1)[..., 0]
    wanted = spread_by_reference(testing.to_numpy(rows), places)
    for given in (rows, strided, rows[:1].expand(5, -1)):
        with running(), testing.poisoned_memory():
            found = spread_rows(given, torch.from_numpy(places).to(DEVICE))
        if given.stride(0):
            assert np.array_equal(testing.to_numpy(found)[:7], wanted[:7])
        else:
            assert bool((found[:7] == rows[0]).all())


@pytest.mark.parametrize("bias", [False, True])
def test_between_the_passes_are_the_input_and_the_first_results(bias):
    """The input, the first matrix' results and 2 % more, of a layer with the proportions of Qwen3-30B-A3B."""
    torch.manual_seed(0)
    tokens, hidden, width, experts, top_k = 64, 512, 192, 16, 8
    block = moe.MoEBlock(hidden, width, experts, top_k, renormalize=True, bias=bias).to(DEVICE, torch.bfloat16)
    rows = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    kept, result = kept_bytes(lambda: block(rows), [rows, *block.parameters()])
    first = tokens * top_k * 2 * width * 2
    assert first <= kept <= 1.02 * (first + rows.nbytes) - rows.nbytes
    result.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


ALL = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")


@pytest.mark.parametrize("frozen", [("gate_up_proj", "down_proj"), *((name,) for name in ALL)])
def test_what_is_frozen_has_no_gradient_and_others_are_the_same(frozen):
    torch.manual_seed(1)
    ids = torch.tensor([[0, 2], [1, -1], [2, 0]], dtype=torch.int32, device=DEVICE)
    shapes = {"hidden_states": (3, 8), "gate_up_proj": (4, 6, 8), "down_proj": (4, 8, 3), "topk_weights": (3, 2)}
    given = {name: torch.randn(shape, device=DEVICE).requires_grad_() for name, shape in shapes.items()}
    some = {name: part.detach().requires_grad_(name not in frozen) for name, part in given.items()}
    for arguments in (given, some):
        with running():
            moe.fused_experts(topk_ids=ids, **arguments).square().sum().backward()
    for name, part in some.items():
        assert part.grad is None if name in frozen else torch.equal(part.grad, given[name].grad)
