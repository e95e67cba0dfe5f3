"""Tensors that are not plain memory: torch.func's transforms, tracers, fake tensors, subclasses, other layouts."""

import functools
import re

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import numba_moe as moe
from numba_moe import parallel, placement, recorder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]
GENERATOR = torch.Generator().manual_seed(7)
LOGITS = torch.randn(4, 8, generator=GENERATOR)
ROWS = torch.randn(4, 16, generator=GENERATOR)
IDS = torch.tensor([[0, 1], [7, 3], [2, -1], [3, 0]], dtype=torch.int32)
WEIGHTS = torch.rand(4, 2, generator=GENERATOR)
GATE_UP = torch.randn(8, 8, 16, generator=GENERATOR) / 4
DOWN = torch.randn(8, 16, 4, generator=GENERATOR) / 2
COUNTS = torch.tensor([[3, 1, 2, 6]])

# Every public function: its arguments, of which the first tensors are those that are replaced here.
CALLS = {
    "moe_align_block_size": (IDS, 4, 8),
    "batched_moe_align_block_size": (4, 2, torch.tensor([1, 0, 3])),
    "moe_lora_align_block_size": (IDS, torch.tensor([0, 1, -1, 0], dtype=torch.int32), 4, 8, 2),
    "make_ragged_metadata": (torch.tensor([3, 0, 5]), 8),
    "count_tokens_per_expert": (IDS, 8),
    "expert_offsets": (torch.tensor([3, 0, 5]), 4),
    "topk_softmax": (LOGITS, 2),
    "topk_sigmoid": (LOGITS, 2, True),
    "topk_softplus_sqrt": (LOGITS, 2),
    "topk_raw": (LOGITS, 2),
    "grouped_topk": (LOGITS, 2, 4, 2),
    "select_experts": (LOGITS, 2),
    "weigh_experts": (LOGITS, IDS),
    "route": (LOGITS, 2, 4),
    "moe_permute": (ROWS, IDS, 8),
    "moe_permute_masked": (ROWS, IDS, 8, 4),
    "moe_reorder": (IDS, 8),
    "moe_sum": (ROWS.view(4, 2, 8),),
    "moe_unpermute": (ROWS.repeat(2, 1), WEIGHTS, torch.arange(8, dtype=torch.int32).view(4, 2)),
    "moe_activation": (ROWS,),
    "fused_experts": (ROWS, GATE_UP, DOWN, WEIGHTS, IDS),
    "constant_experts": (ROWS, WEIGHTS, IDS, 3),
    "dispatch_ids": (IDS, torch.arange(8, dtype=torch.int32)),
    "dispatch_layout": (IDS, torch.arange(8, dtype=torch.int32), 3),
    "add_expert_counts": (IDS,),
    "logical_counts": (COUNTS, torch.tensor([[0, 1, 0, 2]]), 3),
    "utilization": (COUNTS, 2),
    "expert_entropy": (COUNTS,),
    "coactivation": (IDS.long(), 8),
    "traffic_matrix": (COUNTS[None], 1),
}
PACKAGES = (moe, parallel, placement, recorder)
DIFFERENTIABLE = {
    **dict.fromkeys(("topk_softmax", "topk_sigmoid", "topk_softplus_sqrt", "topk_raw", "grouped_topk"), (0,)),
    **dict.fromkeys(("select_experts", "moe_permute", "moe_permute_masked", "moe_sum", "moe_activation"), (0,)),
    "moe_unpermute": (0, 1),
    "constant_experts": (0, 1),
    "fused_experts": (0, 1, 2, 3),
}
OPS = list(CALLS)


def function(name):
    found = next(getattr(package, name) for package in PACKAGES if name in package.__all__)
    more = {"counts": torch.zeros(8, dtype=torch.int64)} if name == "add_expert_counts" else {}
    return functools.partial(found, **more)


def first_tensor(name):
    return next(place for place, value in enumerate(CALLS[name]) if isinstance(value, torch.Tensor))


def replaced(name, value, place=None):
    place = first_tensor(name) if place is None else place
    return (*CALLS[name][:place], value, *CALLS[name][place + 1 :])


def leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, np.ndarray):
        return [torch.from_numpy(result)]
    return [leaf for part in result or () for leaf in leaves(part)]


def sum_of_floats(result):
    return sum(leaf.sin().sum() for leaf in leaves(result) if leaf.is_floating_point())


def test_every_function_is_here():
    takes_arrays = {
        name
        for package in PACKAGES
        for name in package.__all__
        if name[0].islower() and hasattr(getattr(package, name), "__wrapped__")
    }
    assert takes_arrays == set(CALLS)


def gradients(name):
    """Return what autograd says of a function's differentiable arguments."""
    given = [
        value.clone().requires_grad_() if place in DIFFERENTIABLE[name] else value
        for place, value in enumerate(CALLS[name])
    ]
    loss = sum_of_floats(function(name)(*given))
    return torch.autograd.grad(loss, [given[place] for place in DIFFERENTIABLE[name]])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_differentiates(name):
    found = torch.func.grad(lambda *given: sum_of_floats(function(name)(*given)), DIFFERENTIABLE[name])(*CALLS[name])
    for got, wanted in zip(found, gradients(name), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_maps_and_differentiates_each(name):
    place = DIFFERENTIABLE[name][0]
    batch = torch.stack([CALLS[name][place], CALLS[name][place] * 0.5, -CALLS[name][place]])

    def loss(value):
        return sum_of_floats(function(name)(*replaced(name, value, place)))

    wanted = torch.stack([torch.func.grad(loss)(value) for value in batch])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(batch), wanted)
    torch.testing.assert_close(torch.func.grad(lambda values: torch.vmap(loss)(values).sum())(batch), wanted)
    torch.testing.assert_close(torch.func.vjp(loss, batch[1])[1](torch.tensor(1.0))[0], wanted[1])
    torch.testing.assert_close(torch.func.jacrev(loss)(batch[2]), wanted[2])


@pytest.mark.parametrize("name", [name for name in OPS if name != "add_expert_counts" and name in moe.__all__])
def test_torch_func_maps(name):
    place = first_tensor(name)
    batch = torch.stack([CALLS[name][place]] * 3, dim=-1)  # whose elements are strided
    found = torch.vmap(lambda value: tuple(leaves(function(name)(*replaced(name, value)))), in_dims=-1)(batch)
    for got, wanted in zip(found, leaves(function(name)(*CALLS[name])), strict=True):
        assert torch.equal(got[2], wanted) or (got[2] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["moe_activation", "topk_softmax", "fused_experts"])
def test_torch_func_maps_over_nothing(name):
    place = first_tensor(name)
    batch = torch.stack([CALLS[name][place]] * 3, dim=1)[:, :0]
    found = torch.vmap(lambda value: tuple(leaves(function(name)(*replaced(name, value)))), in_dims=1)(batch)
    for got, wanted in zip(found, leaves(function(name)(*CALLS[name])), strict=True):
        assert got.shape == (0, *wanted.shape)
        assert got.dtype == wanted.dtype


def test_a_block_has_gradients_for_each_sample():
    block = moe.MoEBlock(16, 4, 8, 2, shared_size=4, bias=True)
    given = dict(block.named_parameters())

    def loss(parameters, rows):
        return torch.func.functional_call(block, parameters, (rows,)).square().sum()

    samples = torch.stack([ROWS, ROWS * 0.5])
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, samples)
    for sample in range(2):
        block.zero_grad()
        loss(given, samples[sample]).backward()
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(found[name][sample], parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_transformed_function_closes_over_is_read(dtype):
    weights = WEIGHTS.to(dtype)

    def loss(scale):
        counts = moe.count_tokens_per_expert(IDS, 8)
        combined = moe.moe_unpermute(
            ROWS.repeat(2, 1).to(dtype), weights, torch.arange(8, dtype=torch.int32).view(4, 2)
        )
        return scale * (combined.float().sum() + counts.sum())

    wanted = loss(torch.ones(()))
    assert torch.equal(torch.func.grad(loss)(torch.ones(())), wanted)
    assert torch.equal(torch.func.vmap(loss)(torch.ones(3)), wanted.expand(3))


def test_functionalized_code_sees_the_ops():
    assert torch.equal(
        torch.func.functionalize(lambda rows: moe.topk_softmax(rows, 2)[0])(LOGITS), moe.topk_softmax(LOGITS, 2)[0]
    )


@pytest.mark.parametrize("name", ["weigh_experts", "route"])
def test_torch_func_finds_the_gradient_of_autograd(name):
    def loss(rows):
        return (sum_of_floats(function(name)(*replaced(name, rows))) + 1) ** 2

    wanted = LOGITS.clone().requires_grad_()
    loss(wanted).backward()
    torch.testing.assert_close(torch.func.grad(loss)(LOGITS), wanted.grad)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_and_forward_derivatives_are_refused_by_name(name):
    place = DIFFERENTIABLE[name][0]
    argument = dict.fromkeys(("topk", "grou", "sele"), "gating_output") | dict.fromkeys(("moe_", "fuse", "cons"), "`")

    def loss(value):
        return sum_of_floats(function(name)(*replaced(name, value, place)))

    value, named = CALLS[name][place], argument[name[:4]]
    if name not in ("moe_sum", "constant_experts"):  # whose gradient is made of torch's own functions
        with pytest.raises(ValueError, match=r"`\w+` must be without a second derivative.*torch.func \(functorch\)"):
            torch.func.grad(lambda value: torch.func.grad(loss)(value).sum())(value)
    with pytest.raises(TypeError, match=f"{named}.*must be without a tangent.*torch.func.jvp"):
        torch.func.jvp(loss, (value,), (value,))
    with pytest.raises(TypeError, match=r"must be without a tangent"):
        torch.func.hessian(loss)(value)
    with forward_ad.dual_level(), pytest.raises(TypeError, match=f"{named}.*must be without a tangent"):
        loss(forward_ad.make_dual(value, torch.ones_like(value)))


def test_tangents_of_other_arguments_are_noticed():
    with forward_ad.dual_level():
        weights = forward_ad.make_dual(WEIGHTS, torch.ones_like(WEIGHTS))
        given = replaced("moe_unpermute", weights, 1)
        with pytest.raises(TypeError, match="`topk_weights` must be without a tangent"):
            moe.moe_unpermute(*given)
        assert moe.count_tokens_per_expert(IDS, 8).sum() == 7


def test_memory_to_write_is_refused_under_transforms():
    counts = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"`counts` must be None under the transforms of torch.func \(functorch\)"):
        torch.vmap(lambda rows: moe.select_experts(rows, 2, counts=counts)[0])(LOGITS[None])


@pytest.mark.parametrize("name", [name for name in OPS if name in moe.__all__])
def test_tracers_record_the_ops(name):
    place = first_tensor(name)

    def call(value):
        return tuple(leaves(function(name)(*replaced(name, value))))

    other = CALLS[name][place].flip(0).contiguous()
    wanted = call(other)
    for traced in (make_fx(call)(CALLS[name][place]), torch.jit.trace(call, CALLS[name][place], check_trace=False)):
        for got, part in zip(leaves(traced(other)), wanted, strict=True):
            torch.testing.assert_close(got, part)


class Other(torch.Tensor):
    """A class that leaves its memory to torch."""


@pytest.mark.parametrize("kind", ["parameter", "subclass"])
@pytest.mark.parametrize("name", OPS)
def test_parameters_and_subclasses_are_served(name, kind):
    value = CALLS[name][first_tensor(name)]
    given = torch.nn.Parameter(value, requires_grad=False) if kind == "parameter" else value.as_subclass(Other)
    for got, wanted in zip(
        leaves(function(name)(*replaced(name, given))), leaves(function(name)(*CALLS[name])), strict=True
    ):
        assert torch.equal(got.as_subclass(torch.Tensor), wanted)


def sparse(value):
    return value.to_sparse()


def compressed(value):
    return value.reshape(-1, value.shape[-1]).to_sparse_csr()


def nested(value):
    return torch.nested.nested_tensor([value, value])


def jagged(value):
    return torch.nested.nested_tensor([value, value], layout=torch.jagged)


def fake(value):
    return FakeTensorMode().from_tensor(value)


def quantized(value):
    return torch.quantize_per_tensor(value.float(), 1.0, 0, torch.qint8)


def conjugated(value):
    return value.to(torch.complex64).conj()


KINDS = {
    "sparse": sparse,
    "compressed": compressed,
    "nested": nested,
    "jagged": jagged,
    "quantized": quantized,
    "negated": lambda value: (1j * value).conj().imag,
    "conjugated": conjugated,
    "meta": lambda value: value.to("meta"),
    "functional": torch._to_functional_tensor,
    "zero": lambda value: torch._efficientzerotensor(value.shape),
    "memoryview": lambda value: memoryview(value.numpy()),
    "list": torch.Tensor.tolist,
    "objects": lambda value: value.numpy().astype(object),
    "dates": lambda value: (
        value.numpy().astype("M8[s]") if not value.is_floating_point() else value.numpy().astype("c16")
    ),
    "masked": lambda value: np.ma.masked_array(value.numpy(), value.numpy() > 0),
    "long double": lambda value: value.numpy().astype(np.longdouble),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPS)
def test_what_has_no_readable_memory_is_refused_by_name(name, kind):
    given = KINDS[kind](CALLS[name][first_tensor(name)])
    with pytest.raises((TypeError, ValueError), match=r"^`\w+` must be "):
        function(name)(*replaced(name, given))


@pytest.mark.parametrize("kind", ["sparse", "nested", "negated", "fake", "two", "memoryview", "objects", "meta"])
def test_the_second_array_is_refused_by_name_too(kind, device):
    bias = torch.zeros(8, device=device)
    made = {**KINDS, "fake": fake, "two": lambda value: TwoTensor(value, value)}[kind]
    given = made(bias) if kind not in ("memoryview", "objects") else made(bias.cpu())
    with pytest.raises((TypeError, ValueError), match=r"^`correction_bias` must be "):
        moe.topk_softmax(LOGITS.to(device), 2, False, given)


def test_fake_tensors_are_served_and_not_beside_others():
    mode = FakeTensorMode()
    logits, bias = mode.from_tensor(LOGITS), torch.zeros(8)
    assert moe.topk_softmax(logits, 2).topk_ids.shape == (4, 2)
    assert moe.topk_softmax(logits, 2, False, mode.from_tensor(bias)).topk_ids.shape == (4, 2)
    with pytest.raises(TypeError, match="`correction_bias` must be a fake tensor, as `gating_output` is"):
        moe.topk_softmax(logits, 2, False, bias)
    with mode, pytest.raises(TypeError, match="`gating_output` must be a fake tensor, as `correction_bias` is"):
        moe.topk_softmax(LOGITS, 2, False, mode.from_tensor(bias))


@pytest.mark.parametrize("name", [name for name in OPS if name in moe.__all__])
def test_big_endian_numpy_arrays_are_served(name):
    given = [value.numpy() if isinstance(value, torch.Tensor) else value for value in CALLS[name]]
    swapped = [
        value.astype(value.dtype.newbyteorder(">")) if isinstance(value, np.ndarray) else value for value in given
    ]
    for got, wanted in zip(leaves(function(name)(*swapped)), leaves(function(name)(*given)), strict=True):
        assert torch.equal(got, wanted)


def test_negated_views_are_read_as_what_they_say():
    assert torch.equal(moe.topk_softmax(torch._neg_view(LOGITS), 2).topk_ids, moe.topk_softmax(-LOGITS, 2).topk_ids)
    with pytest.raises(ValueError, match="`counts` must be a tensor that holds what it says, as it is written"):
        moe.moe_align_block_size(IDS, 4, 8, counts=torch._neg_view(torch.zeros(8, dtype=torch.int32)))


def test_messages_say_what_to_do():
    logits = LOGITS.numpy()
    for given, rule in (
        (logits.astype(np.float64), "got float64; convert it with `.astype(np.float32)` or `.to(torch.float32)`"),
        (np.asfortranarray(logits), "got strides (1, 4); copy it with `np.ascontiguousarray` or `.contiguous()`"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(rule)):
            moe.topk_softmax(given, 2)
    with pytest.raises(TypeError, match=re.escape("convert it with `.astype(np.int32)` or `.to(torch.int32)`")):
        moe.count_tokens_per_expert(IDS.numpy().astype(np.int16), 8)
    with pytest.raises(ValueError, match=re.escape("copy it with `np.ascontiguousarray` or `.contiguous()`")):
        moe.count_tokens_per_expert(IDS.numpy().T, 8)


class Tracer:
    """Stands for what jax.jit passes: an array by its methods, without data."""

    dtype = np.dtype(np.float32)

    def __dlpack__(self, **_):
        raise AttributeError("a tracer has no data")

    def __dlpack_device__(self):
        raise AttributeError("a tracer has no data")

    def __array_namespace__(self):
        return np


def test_tracers_of_other_libraries_are_refused_by_name():
    with pytest.raises(TypeError, match=r"`gating_output` must be an array with data .* outside of jax.jit.*Tracer"):
        moe.topk_softmax(Tracer(), 2)
    with pytest.raises(TypeError, match="`expert_num_tokens` must be an array with data"):
        moe.batched_moe_align_block_size(4, 2, Tracer())
