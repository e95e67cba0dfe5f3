"""Gradients of the weights: the reference by finite differences, the kernel by the reference and by torch's graph."""

import contextlib
import functools

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.device import simulator
from numba_moe.verify import testing

SCORING = tuple(reference.gating.SCORING)
ON_GPU = torch.cuda.is_available() and not simulator.ENABLED


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def torch_weights(logits, topk_ids, scoring_func, renormalize, factor):
    """Return the weights as a graph of torch's own functions."""
    functions = {
        "softmax": functools.partial(torch.softmax, dim=1),
        "sigmoid": torch.sigmoid,
        "softplus_sqrt": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
        "raw": lambda logits: logits,
    }
    weights = functions[scoring_func](logits).gather(1, topk_ids.long())
    return factor * (weights / weights.sum(1, keepdim=True) if renormalize else weights)


class ByHand(torch.autograd.Function):
    """What a function returns, of tensors, with the gradients that another makes of them and of that of its first."""

    @staticmethod
    def forward(ctx, function, differentiate, *tensors):
        found = function(*tensors)
        parts = found if isinstance(found, tuple) else (found,)
        ctx.differentiate = differentiate
        ctx.save_for_backward(*tensors, *(part for part in parts if part is not None))
        ctx.mark_non_differentiable(*(part for part in parts[1:] if part is not None))
        return parts

    @staticmethod
    def backward(ctx, grad, *_):
        return None, None, *ctx.differentiate(*ctx.saved_tensors, grad)


def double(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).requires_grad_()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
def test_reference_by_finite_differences(scoring_func, renormalize):
    logits = double(5, 7)
    ids = torch.from_numpy(reference.gating.best(logits.detach().numpy(), 3))

    def choose(logits):
        scores = reference.gating.SCORING[scoring_func](logits.detach().numpy())
        return torch.from_numpy(reference.gating.weights_of(scores, ids.numpy(), renormalize, 2.5)), ids

    def differentiate(logits, _, ids, grad_weights):
        arrays = (value.detach().numpy() for value in (logits, ids, grad_weights))
        return (torch.from_numpy(reference.gating.gating_backward(*arrays, scoring_func, renormalize, 2.5)),)

    assert torch.autograd.gradcheck(lambda logits: ByHand.apply(choose, differentiate, logits)[0], logits)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
def test_reference_by_torch(scoring_func, renormalize):
    logits = double(20, 12)
    ids = torch.from_numpy(reference.gating.best(logits.detach().numpy(), 4))
    grad_weights = double(20, 4).detach()
    torch_weights(logits, ids, scoring_func, renormalize, 1.5).backward(grad_weights)
    got = reference.gating.gating_backward(
        *(value.detach().numpy() for value in (logits, ids, grad_weights)), scoring_func, renormalize, 1.5
    )
    np.testing.assert_allclose(got, logits.grad, rtol=1e-12, atol=1e-15)


def on_device(values, dtype="float32", strided=False):
    return testing.to_device(values, "cuda" if ON_GPU else "cpu", dtype, strided).requires_grad_()


def assert_gradient_as_reference(logits, scoring_func, renormalize, call, factor=1.0, **chosen):
    """Compare the gradient of a call where kernels run with the reference's, for random gradients of the weights."""
    with running(), testing.poisoned_memory():
        weights, ids = call(logits)
        grad_weights = on_device(np.random.default_rng(1).standard_normal(weights.shape).astype(np.float32)).detach()
        (grad,) = torch.autograd.grad(weights, logits, grad_weights, retain_graph=True)
        (again,) = torch.autograd.grad(weights, logits, grad_weights)
    assert ids.dtype == torch.int32
    assert not ids.requires_grad
    assert grad.dtype == logits.dtype
    assert testing.to_numpy(grad).tobytes() == testing.to_numpy(again).tobytes()
    values = (testing.to_numpy(value) for value in (logits, ids, grad_weights))
    wanted = reference.gating.gating_backward(*values, scoring_func, renormalize, factor)
    comparison = testing.compare(grad, wanted)
    assert not comparison.mismatches, comparison


SHAPES = ((3, 8, 2), (2, 60, 6), (5, 33, 33), (2, 300, 40), (1, 1, 1), (0, 8, 2))


@pytest.mark.sweep(10)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_reference(shape, scoring_func, renormalize):
    num_tokens, num_experts, top_k = shape
    logits = testing.random_floats(np.random.default_rng(0), (num_tokens, num_experts))
    op = getattr(moe, f"topk_{scoring_func}")
    call = functools.partial(op, top_k=top_k, renormalize=renormalize)
    assert_gradient_as_reference(on_device(logits), scoring_func, renormalize, call)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("factor", [2.5, -1.0, 0.0])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.sweep(8)
def test_groups_factors_and_dtypes(scoring_func, renormalize, factor, dtype):
    logits = testing.random_floats(np.random.default_rng(0), (3, 32), dtype)
    bias = on_device(np.linspace(-1, 1, 32, dtype=np.float32)).detach()
    rules = {"scoring_func": scoring_func, "routed_scaling_factor": factor, "correction_bias": bias}
    call = functools.partial(
        moe.grouped_topk, top_k=4, num_expert_group=8, topk_group=3, renormalize=renormalize, **rules
    )
    rows = on_device(logits, dtype, strided=True)
    assert_gradient_as_reference(rows, scoring_func, renormalize, call, factor)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
def test_rows_with_weights_of_zero(scoring_func, renormalize):
    logits = np.zeros((6, 12), np.float32)
    logits[0, 3] = np.nan
    logits[1, 4] = np.inf
    logits[2] = -np.inf
    logits[3, 1:] = -np.inf
    logits[4] = np.nan
    logits[5, :3] = 60.0
    call = functools.partial(getattr(moe, f"topk_{scoring_func}"), top_k=3, renormalize=renormalize)
    assert_gradient_as_reference(on_device(logits), scoring_func, renormalize, call)


def test_scores_too_small_to_count():
    """A bias chooses experts whose softmax is too small for a float32."""
    logits = np.zeros((2, 8), np.float32)
    logits[:, 2] = 80.0, 100.0
    bias = on_device(np.linspace(2, 4, 8, dtype=np.float32)).detach()
    for renormalize in (False, True):
        call = functools.partial(moe.topk_softmax, top_k=2, renormalize=renormalize, correction_bias=bias)
        with running():
            values = on_device(logits)
            call(values).topk_weights.sum().backward()
        assert values.grad.abs().max() < 1e-6


@pytest.mark.parametrize("op", [moe.topk_softmax, moe.topk_sigmoid])
def test_cpu_tensors_are_answered_by_the_reference(op):
    logits = torch.tensor([[0.5, 2.0, -1.0]], dtype=torch.bfloat16, requires_grad=True)
    weights, ids = op(logits, 2)
    assert ids.tolist() == [[1, 0]]
    weights[:, 0].sum().backward()
    scoring_func = op.__name__.removeprefix("topk_")
    values = (testing.to_numpy(logits), ids.numpy(), np.array([[1.0, 0.0]]))
    assert not testing.compare(logits.grad, reference.gating.gating_backward(*values, scoring_func)).mismatches


def test_a_graph_only_where_one_is_wanted():
    logits = torch.zeros(2, 4, requires_grad=True)
    assert moe.topk_softmax(logits, 2).topk_weights.requires_grad
    assert type(moe.topk_softmax(logits, 2)) is reference.TopK
    with torch.no_grad():
        assert not moe.topk_softmax(logits, 2).topk_weights.requires_grad
    assert not moe.topk_softmax(logits.detach(), 2).topk_weights.requires_grad
    assert not moe.topk_softmax(logits, 2).topk_ids.requires_grad


def test_no_second_derivative():
    logits = torch.zeros(1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(moe.topk_softmax(logits, 2).topk_weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize("shape", [(4097, 128, 8), (1000, 257, 6), (64, 2048, 40), (100, 384, 8)], ids=str)
def test_kernel_by_torch_on_the_gpu(shape, scoring_func, renormalize, dtype):
    num_tokens, num_experts, top_k = shape
    logits = on_device(testing.random_floats(np.random.default_rng(0), (num_tokens, num_experts)), dtype)
    weights, ids = getattr(moe, f"topk_{scoring_func}")(logits, top_k, renormalize)
    grad_weights = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, logits, grad_weights)
    exact = logits.detach().double().requires_grad_()
    wanted = torch_weights(exact, ids, scoring_func, renormalize, 1.0)
    assert torch.allclose(weights.double(), wanted, rtol=1e-5, atol=1e-6)
    wanted.backward(grad_weights.double())
    comparison = testing.compare(grad, exact.grad.cpu().numpy())
    assert not comparison.mismatches, comparison


@pytest.mark.gpu
def test_gradients_on_another_stream():
    logits = on_device(testing.random_floats(np.random.default_rng(0), (512, 64)))
    wanted = torch.autograd.grad(moe.topk_softmax(logits, 6).topk_weights[:, 0].sum(), logits)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = torch.autograd.grad(moe.topk_softmax(logits, 6).topk_weights[:, 0].sum(), logits)[0]
    stream.synchronize()
    assert torch.equal(got, wanted)
