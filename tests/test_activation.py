"""The activation between the matrices: the reference by finite differences and by torch, gradients by the reference."""

import contextlib
import math

import numpy as np
import pytest
import torch
from numba_moe.reference.activation import moe_activation_backward, sum_rows

import numba_moe as moe
from numba_moe import reference
from numba_moe.device import simulator
from numba_moe.ops.activation.activate import activation_backward
from numba_moe.ops.activation.activate_rows import KINDS
from numba_moe.verify import testing

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"
OPTIONS = {
    "silu": {"activation": "silu"},
    "silu alpha": {"activation": "silu", "alpha": 0.5},
    "silu without alpha": {"activation": "silu", "alpha": 0.0},
    "silu limit": {"activation": "silu", "limit": 1.0},
    "silu interleaved": {"activation": "silu", "interleaved": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "swiglu_oai": {"activation": "swiglu_oai"},
    "swiglu_oai limit": {"activation": "swiglu_oai", "limit": 0.75, "interleaved": False},
    "none": {"activation": "none"},
    "silu beta": {"activation": "silu", "beta": -0.5, "limit": 1.0},
    "swiglu_oai beta": {"activation": "swiglu_oai", "beta": 0.25},
    "swiglu_step": {"activation": "swiglu_step", "limit": 0.75},
    "swiglu_step interleaved": {"activation": "swiglu_step", "limit": 1.0, "alpha": 0.5, "interleaved": True},
    "relu2": {"activation": "relu2"},
    "relu2 limit": {"activation": "relu2", "limit": 1.0, "interleaved": True},
    "situ": {"activation": "situ"},
    "situ linear": {"activation": "situ", "beta": 0.5, "linear_beta": 0.75},
    "situ limit": {"activation": "situ", "beta": 1.5, "linear_beta": 25.0, "limit": 1.0, "interleaved": True},
    "silu_no_mul": {"activation": "silu_no_mul"},
    "silu_no_mul limit": {"activation": "silu_no_mul", "alpha": 0.5, "limit": 1.0, "interleaved": False},
    "gelu_no_mul": {"activation": "gelu_no_mul"},
    "gelu_tanh_no_mul": {"activation": "gelu_tanh_no_mul"},
    "relu2_no_mul": {"activation": "relu2_no_mul"},
}
SIZES = np.array([3, 0, 6, 1, 0])
OFFSET = np.concatenate([[0], np.cumsum(SIZES)])
SPARE = 2


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def by_torch(rows, activation, interleaved=None, limit=None, alpha=None, beta=None, linear_beta=None):
    """Return the activation of rows as a graph of torch's own functions."""
    oai, step = activation == "swiglu_oai", activation == "swiglu_step"
    if activation == "none":
        return rows
    limit = (7.0 if oai or step else math.inf) if limit is None else limit
    if activation.endswith("_no_mul"):
        gate, up = rows, torch.ones_like(rows)
    else:
        interleaved = oai if interleaved is None else interleaved
        gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=1)
        up = up.clamp(-limit, limit)
    gate = gate if step else gate.clamp(max=limit)
    if activation.startswith("gelu"):
        return torch.nn.functional.gelu(gate, approximate="tanh" if "tanh" in activation else "none") * up
    if activation.startswith("relu2"):
        return gate.relu().square() * up
    if activation == "situ":
        beta = beta or 4.0
        up = linear_beta * torch.tanh(up / linear_beta) if linear_beta else up
        return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up
    gate = gate * torch.sigmoid((alpha if alpha is not None else 1.702 if oai else 1.0) * gate)
    if step:
        gate = gate.clamp(max=limit)
    return gate * (up + (beta if beta is not None else oai))


def drawn(width, dtype="float32", seed=0):
    """Draw rows, their biases and a gradient; rows that are not in use hold NaN."""
    rng = np.random.default_rng(seed)
    rows = testing.random_floats(rng, (OFFSET[-1] + SPARE, 2 * width), dtype)
    rows[OFFSET[-1] :] = np.nan
    bias = testing.random_floats(rng, (len(SIZES), 2 * width), dtype)
    return rows, bias, rng


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_by_torch(name):
    rows, bias, rng = drawn(6)
    used = int(OFFSET[-1])
    exact = torch.from_numpy(rows[:used].astype(np.float64)).requires_grad_()
    biases = torch.from_numpy(bias.astype(np.float64)).requires_grad_()
    wanted = by_torch(exact + biases.repeat_interleave(torch.from_numpy(SIZES), 0), **OPTIONS[name])
    got = reference.moe_activation(rows.astype(np.float64), OFFSET, bias, **OPTIONS[name])
    np.testing.assert_allclose(got[:used], wanted.detach().numpy(), rtol=1e-12, atol=1e-15)
    assert not got[used:].any()
    grad = rng.standard_normal(got.shape)
    wanted.backward(torch.from_numpy(grad[:used]))
    grad[used:] = np.nan
    grad_rows = moe_activation_backward(rows.astype(np.float64), grad, OFFSET, bias, **OPTIONS[name])
    np.testing.assert_allclose(grad_rows[:used], exact.grad.numpy(), rtol=1e-12, atol=1e-15)
    assert not grad_rows[used:].any()
    np.testing.assert_allclose(sum_rows(grad_rows, OFFSET), biases.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradients_by_finite_differences(name):
    rows, _, rng = drawn(3)
    rows, step = rows[: OFFSET[-1]].astype(np.float64), 1e-5
    grad = rng.standard_normal(reference.moe_activation(rows, **OPTIONS[name]).shape)
    found = moe_activation_backward(rows, grad, **OPTIONS[name])
    for column in range(rows.shape[1]):
        moved = step * (np.arange(rows.shape[1]) == column)
        up, down = (reference.moe_activation(rows + sign * moved, **OPTIONS[name]) for sign in (1, -1))
        by_differences = ((up - down) / (2 * step) * grad).sum(1)
        np.testing.assert_allclose(found[:, column], by_differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["silu", "silu alpha", "gelu_tanh", "swiglu_oai"])
def test_digits_are_kept_far_below_zero(name):
    """Against torch's sigmoid in float64, whose relative error is that of the last digit."""
    gate = torch.linspace(-100, 100, 2001, dtype=torch.float64).requires_grad_()
    alpha, shift = {"silu": (1.0, 0.0), "silu alpha": (0.5, 0.0), "swiglu_oai": (1.702, 1.0)}.get(name, (None, 0.0))
    inside = alpha * gate if alpha else math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)
    wanted = gate * torch.sigmoid(inside) * (1.0 + shift)
    (slope,) = torch.autograd.grad(wanted.sum(), gate)
    rows = torch.stack([gate.detach(), torch.ones_like(gate)], 1).numpy()
    options = OPTIONS[name] | {"limit": 1e30}
    found = reference.moe_activation(rows, **options)[:, 0]
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-12)
    grad = moe_activation_backward(rows, np.ones((len(rows), 1)), **options)
    np.testing.assert_allclose(grad[:, 1], found / (1.0 + shift), rtol=1e-12)
    turning = slope.abs() < 1e-3 * torch.sigmoid(inside)  # where the slope's two terms cancel
    np.testing.assert_allclose(grad[~turning, 0], slope[~turning].numpy(), rtol=1e-10)
    narrow = rows.astype(np.float32)[:: 40 if simulator.ENABLED else 1]
    exact = reference.moe_activation(narrow.astype(np.float64), **options)[:, 0]
    rounded = reference.moe_activation(narrow, **options)[:, 0]
    np.testing.assert_allclose(rounded, exact, rtol=1e-7, atol=np.finfo(np.float32).smallest_subnormal)
    with running():
        on_device = moe.moe_activation(torch.from_numpy(narrow.copy()).to(DEVICE), **options).cpu().numpy()[:, 0]
    normal = np.abs(exact) > 100 * np.finfo(np.float32).tiny  # where the share of the gate is no less than that
    np.testing.assert_allclose(on_device[normal], exact[normal], rtol=3e-5)


@pytest.mark.parametrize("offset", [[2, 4, 7], [0, 4, 30], [-3, 4, 7], [0, 0, -1]])
def test_offsets_count_within_the_rows(offset):
    rows, bias, _ = drawn(6)
    rows, offset = np.nan_to_num(rows)[:7], np.array(offset)
    with running():
        given = (torch.from_numpy(part).to(DEVICE) for part in (rows, offset, bias[:2]))
        found = moe.moe_activation(*given).cpu().numpy()
    expert = np.repeat([0, 1], [4, 3])
    used = np.arange(7)[:, None] < offset[-1]
    wanted = np.where(used, reference.moe_activation(rows + bias[expert]), 0)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(reference.moe_activation(rows, offset, bias[:2]), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_what_lies_at_its_limit_has_a_gradient(activation):
    """A clamp's edge belongs to what it leaves alone, as in torch."""
    rows = torch.tensor([[2.0, 2.0], [2.0, -2.0], [1.0, 2.5], [2.5, 1.0]])
    options = {"activation": activation, "limit": 2.0, "alpha": 1.0, "interleaved": False}
    exact = rows.double().requires_grad_()
    by_torch(exact, **options).sum().backward()
    gate = torch.nn.functional.silu(torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert torch.allclose(exact.grad[:2, 1], gate)
    found = [torch.from_numpy(moe_activation_backward(rows.numpy(), np.ones((4, 1), np.float32), **options))]
    with running():
        leaf = rows.to(DEVICE).requires_grad_()
        found += torch.autograd.grad(moe.moe_activation(leaf, **options).sum(), leaf)
    for grad in found:
        assert torch.allclose(grad.cpu().double(), exact.grad, rtol=1e-5, atol=0)
        assert grad[2, 1] == grad[3, 0] == 0


def assert_gradients_as_reference(width, dtype, options, seed=0):
    rows, bias, rng = drawn(width, dtype, seed)
    gate_up, biases = (testing.to_device(part, DEVICE, dtype).requires_grad_() for part in (rows, bias))
    offset = torch.from_numpy(OFFSET).to(DEVICE)
    with running(), testing.poisoned_memory():
        activated = moe.moe_activation(gate_up, offset, biases, **options)
        grad = testing.to_device(testing.random_floats(rng, tuple(activated.shape), dtype), DEVICE, dtype)
        grad[OFFSET[-1] :] = torch.nan
        found = torch.autograd.grad(activated, (gate_up, biases), grad, retain_graph=True)
        again = torch.autograd.grad(activated, (gate_up, biases), grad)
        (alone,) = torch.autograd.grad(moe.moe_activation(gate_up, offset, biases.detach(), **options), gate_up, grad)
    for part, same in zip((*found, found[0]), (*again, alone), strict=True):
        assert testing.to_numpy(part).tobytes() == testing.to_numpy(same).tobytes()
    arguments = (rows, testing.to_numpy(grad), OFFSET, bias)
    wanted = moe_activation_backward(*arguments, **options)
    comparison = testing.compare(found[0], wanted)
    assert not comparison.mismatches, comparison
    # the bias' gradient is a sum of gradients that were rounded
    comparison = testing.compare(found[1], sum_rows(testing.to_numpy(found[0]), OFFSET))
    assert not comparison.mismatches, comparison


@pytest.mark.sweep(12)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernel_gradients_equal_the_reference(name, width, dtype):
    assert_gradients_as_reference(width, dtype, OPTIONS[name])


@pytest.mark.parametrize("width", [pytest.param(300, marks=pytest.mark.slow), 264])
def test_gradients_over_several_runs_of_columns(width):
    assert_gradients_as_reference(width, "bfloat16", OPTIONS["swiglu_oai"])


def test_gradients_without_offsets():
    gate_up = testing.to_device(np.linspace(-3, 3, 32, dtype=np.float32).reshape(2, 16), DEVICE).requires_grad_()
    with running():
        moe.moe_activation(gate_up).sum().backward()
    wanted = moe_activation_backward(testing.to_numpy(gate_up), np.ones((2, 8)))
    assert not testing.compare(gate_up.grad, wanted).mismatches


@pytest.mark.parametrize("kind", KINDS)
def test_cpu_tensors_are_answered_by_the_reference(kind):
    rows, bias, _ = drawn(4)
    gate_up, biases = (torch.from_numpy(part).bfloat16().requires_grad_() for part in (rows, bias))
    offset = torch.from_numpy(OFFSET)
    activated = moe.moe_activation(gate_up, offset, biases, activation=kind)
    assert activated.dtype == torch.bfloat16
    activated.sum().backward()
    assert gate_up.grad.dtype == biases.grad.dtype == torch.bfloat16
    assert gate_up.grad.isfinite().all()
    assert (biases.grad[[1, 4]] == 0).all()


def test_a_strided_gradient():
    gate_up = testing.to_device(drawn(8)[0][: OFFSET[-1]], DEVICE).requires_grad_()
    grad = torch.ones(OFFSET[-1], 9, device=DEVICE)
    with running():
        activated = moe.moe_activation(gate_up)
        (found,) = torch.autograd.grad(activated, gate_up, grad[:, 1:], retain_graph=True)
        (flat,) = torch.autograd.grad(
            activated, gate_up, grad.ravel()[1 : 1 + 8 * OFFSET[-1]].view(-1, 8), retain_graph=True
        )
        (wanted,) = torch.autograd.grad(activated, gate_up, torch.ones_like(activated))
    assert torch.equal(found, wanted)
    assert torch.equal(flat, wanted)


def test_no_second_derivative():
    gate_up = torch.ones(1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(moe.moe_activation(gate_up).square().sum(), gate_up, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_graph_only_where_one_is_wanted():
    gate_up = torch.ones(1, 4, requires_grad=True)
    assert moe.moe_activation(gate_up).grad_fn is not None
    with torch.no_grad():
        assert not moe.moe_activation(gate_up).requires_grad
    assert not moe.moe_activation(gate_up.detach()).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernel_by_torch_on_the_gpu(name, dtype):
    torch.manual_seed(0)
    sizes = torch.randint(0, 300, (128,), device="cuda")
    offset = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    rows = (2 * torch.randn(int(offset[-1]), 1536, device="cuda")).to(getattr(torch, dtype)).requires_grad_()
    bias = torch.randn(128, 1536, device="cuda", dtype=rows.dtype).requires_grad_()
    activated = moe.moe_activation(rows, offset, bias, **OPTIONS[name])
    grad = torch.randn_like(activated)
    found = torch.autograd.grad(activated, (rows, bias), grad)
    # the sums as kernels have them, so that what lies at a limit lies on the same side
    added = rows.detach().float() + bias.detach().float().repeat_interleave(sizes, 0)
    exact = added.double().requires_grad_()
    wanted = by_torch(exact, **OPTIONS[name])
    assert not testing.compare(activated, testing.to_numpy(wanted)).mismatches
    wanted.backward(grad.double())
    assert not testing.compare(found[0], testing.to_numpy(exact.grad)).mismatches
    sums = torch.zeros(128, 1536, dtype=torch.float64, device="cuda").index_add_(
        0, torch.arange(128, device="cuda").repeat_interleave(sizes), found[0].double()
    )
    wanted = testing.to_numpy(sums)
    comparison = testing.compare(found[1], wanted, size=testing.largest_in_row(wanted))
    assert not comparison.mismatches, comparison


@pytest.mark.parametrize("compiled", [False, True])
def test_options_go_by_their_names(compiled):
    given = {"alpha": 0.5, "limit": 1.5, "interleaved": True, "activation": "silu"}
    rows = torch.from_numpy(drawn(8)[0][:4]).requires_grad_()
    call = moe.moe_activation
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(moe.moe_activation, backend="aot_eager", fullgraph=True)
    results = []
    for options in (given, dict(reversed(given.items()))):
        with contextlib.nullcontext() if compiled else running():
            activated = call(rows, **options)
            results.append((activated, *torch.autograd.grad(activated.square().sum(), rows)))
    wanted = by_torch(rows, **given)
    for result in results:
        torch.testing.assert_close(result[0], wanted)
        torch.testing.assert_close(result[1], *torch.autograd.grad(wanted.square().sum(), rows, retain_graph=True))
    with running():
        arrays = (rows.detach(), torch.ones_like(wanted), None, None)
        given |= {"beta": None, "linear_beta": None}
        one = activation_backward(*arrays, of_bias=False, **given).rows
        assert torch.equal(one, activation_backward(*arrays, of_bias=False, **dict(reversed(given.items()))).rows)
