"""Permutation beyond what verification compares: dtypes that NumPy lacks, gradients, memory, large rows."""

import contextlib

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.device import simulator
from numba_moe.interop import into
from numba_moe.ops.permute.move_rows import WORDS, plan_gather
from numba_moe.runtime import arrays, plans
from numba_moe.verify import testing

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DTYPES = ("float32", "float16", "bfloat16")
IDS = np.random.default_rng(0).integers(-1, 7, (11, 3)).astype(np.int32)


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def on_device(values, dtype=None, strided=False):
    return testing.to_device(values, "cuda" if ON_GPU else "cpu", dtype, strided)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(got, wanted):
    comparison = testing.compare(got, wanted)
    assert not comparison.mismatches, comparison


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("where", ["reference", "kernels"])
def test_bytes_and_their_scales_move_unchanged(where, dtype):
    rows = on_device(np.random.default_rng(0).integers(0, 256, (11, 40), np.uint8)).view(getattr(torch, dtype))
    scales = on_device(numbers(11, 5)).to(torch.bfloat16)
    ids = on_device(IDS)
    with running() if where == "kernels" else contextlib.nullcontext():
        if where == "reference":
            rows, scales, ids = rows.cpu(), scales.cpu(), ids.cpu()
        permuted = moe.moe_permute(rows, ids, 7, scales=scales, alignment=4)
        masked = moe.moe_permute_masked(rows, ids, 7, 4, scales=scales)
    for result in (permuted, masked):
        assert result.permuted_hidden_states.dtype == rows.dtype
        assert result.permuted_scales.dtype == torch.bfloat16
        slots = result.permuted_idx.flatten().long()
        in_use = slots < IDS.size
        got = result.permuted_hidden_states.view(torch.uint8).reshape(-1, 40)
        assert torch.equal(got[in_use], rows.view(torch.uint8)[slots[in_use] // 3])
        assert not got[~in_use].any()
        got = result.permuted_scales.reshape(-1, 5)
        assert torch.equal(got[in_use], scales[slots[in_use] // 3])


def test_words_are_the_widest_that_fit():
    def word(shape, dtype, offset=0, step=1):
        memory = torch.empty(1000, dtype=dtype)[offset:]
        rows = memory[: shape[0] * shape[1] * step].view(shape[0], -1)[:, : shape[1]]
        return plan_gather(plans.layout(rows), 2, 8, True).word

    assert word((4, 8), torch.bfloat16) == WORDS[0]
    assert word((4, 4), torch.bfloat16) == WORDS[1]
    assert word((4, 8), torch.bfloat16, offset=4) == WORDS[1]
    assert word((4, 6), torch.bfloat16) == WORDS[2]
    assert word((4, 7), torch.bfloat16) == WORDS[3]
    assert word((4, 7), torch.uint8) == WORDS[4]
    assert word((4, 8), torch.float32, offset=1) == WORDS[2]
    assert word((4, 4), torch.float32, step=2) == WORDS[0]


@pytest.mark.parametrize("offset", range(4))
def test_rows_at_any_address(offset):
    memory = on_device(numbers(600))
    rows = memory[offset : offset + 11 * 16].view(11, 16)
    weights = on_device(numbers(11, 3))
    with running():
        permuted = moe.moe_permute(rows, on_device(IDS), 7)
        shifted = memory[300 + offset : 300 + offset + 33 * 8].view(33, 8)
        combined = moe.moe_unpermute(shifted, weights, permuted.inv_permuted_idx)
    expected = reference.moe_permute(testing.to_numpy(rows), IDS, 7)
    assert np.array_equal(testing.to_numpy(permuted.permuted_hidden_states), expected.permuted_hidden_states)
    wanted = reference.moe_unpermute(*map(testing.to_numpy, (shifted, weights)), expected.inv_permuted_idx)
    assert_close(combined, wanted)


@pytest.mark.parametrize("name", ["moe_permute", "moe_permute_masked"])
def test_padding_is_left_as_it_is(name, monkeypatch):
    options = {"alignment": 4} if name == "moe_permute" else {"max_m": 6}
    with running(), testing.poisoned_memory():
        permuted = getattr(moe, name)(on_device(numbers(11, 8)), on_device(IDS), 7, zero_padding=False, **options)
    unused = permuted.permuted_idx == IDS.size
    assert unused.any()
    assert permuted.permuted_hidden_states[unused].isnan().all()
    assert not permuted.permuted_hidden_states[~unused].isnan().any()


def test_results_of_other_libraries():
    permuted = moe.moe_permute(numbers(11, 8), IDS, 7)
    assert permuted.m_indices is None
    assert permuted.permuted_scales is None
    assert all(isinstance(part, np.ndarray) for part in permuted[:5])
    combined = moe.moe_unpermute(permuted.permuted_hidden_states, numbers(11, 3), permuted.inv_permuted_idx)
    assert combined.dtype == np.float32
    assert moe.moe_sum(numbers(2, 3, 8), out_dtype=torch.float16).dtype == np.float16
    assert moe.moe_sum(torch.ones(2, 3, 8), out_dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_sum_of_strided_slots(transposed):
    rows = on_device(numbers(3, 11, 16) if transposed else numbers(11, 6, 16))
    rows = rows.transpose(0, 1) if transposed else rows[:, ::2]
    with running():
        got = moe.moe_sum(rows, on_device(IDS.astype(np.int64)))
    assert_close(got, reference.moe_sum(testing.to_numpy(rows), IDS))


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


def double(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).requires_grad_()


def test_permutation_by_finite_differences():
    def permute(rows):
        found = reference.moe_permute(rows.detach().numpy(), IDS, 7, alignment=4)
        parts = (None if part is None else torch.from_numpy(part) for part in found)
        return reference.PermutedTokens(*parts)

    def differentiate(rows, *found):
        index, grad = found[3], found[-1]
        ones = np.ones(index.shape)
        return (torch.from_numpy(reference.moe_unpermute(grad.numpy(), ones, index.numpy())),)

    assert torch.autograd.gradcheck(lambda rows: ByHand.apply(permute, differentiate, rows)[0], double(11, 4))


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_combination_by_finite_differences(factor):
    index = torch.from_numpy(reference.moe_permute(numbers(11, 4), IDS, 7, alignment=4).inv_permuted_idx)

    def unpermute(rows, weights):
        arguments = (value.detach().numpy() for value in (rows, weights, index))
        return torch.from_numpy(reference.moe_unpermute(*arguments, routed_scaling_factor=factor))

    def differentiate(rows, weights, _, grad):
        arguments = (value.detach().numpy() for value in (rows, weights, index, grad))
        return tuple(map(torch.from_numpy, reference.permute.unpermute_backward(*arguments, factor)))

    def combine(rows, weights):
        return ByHand.apply(unpermute, differentiate, rows, weights)[0]

    assert torch.autograd.gradcheck(combine, (double(54, 4), double(11, 3, seed=1)))


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["moe_permute", "moe_permute_masked"])
def test_gradient_of_permutation(name, dtype, width):
    options = {"alignment": 4} if name == "moe_permute" else {"max_m": 3}
    rows = on_device(numbers(11, width), dtype, strided=True).requires_grad_()
    with running(), testing.poisoned_memory():
        permuted = getattr(moe, name)(rows, on_device(IDS), 7, **options)
        assert type(permuted).__name__ == ("PermutedTokens" if name == "moe_permute" else "MaskedTokens")
        grad = on_device(numbers(*permuted.permuted_hidden_states.shape, seed=1), dtype)
        (got,) = torch.autograd.grad(permuted.permuted_hidden_states, rows, grad)
    assert not any(part.requires_grad for part in permuted[1:] if part is not None)
    index = testing.to_numpy(permuted.inv_permuted_idx)
    wanted = reference.moe_unpermute(testing.to_numpy(grad).reshape(-1, width), np.ones(IDS.shape), index)
    assert got.dtype == rows.dtype
    assert_close(got, wanted)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_combination(dtype, out_dtype, width):
    index = reference.moe_permute(numbers(11, 4), IDS, 7, alignment=4).inv_permuted_idx
    rows = on_device(numbers(54, width), dtype, strided=True).requires_grad_()
    weights = on_device(numbers(11, 3, seed=1), dtype).requires_grad_()
    with running(), testing.poisoned_memory():
        combined = moe.moe_unpermute(rows, weights, on_device(index), routed_scaling_factor=2.5, out_dtype=out_dtype)
        grad = on_device(numbers(11, width, seed=2), out_dtype or dtype)
        got = torch.autograd.grad(combined, (rows, weights), grad, retain_graph=True)
        alone = [torch.autograd.grad(combined, one, grad, retain_graph=True)[0] for one in (rows, weights)]
    wanted = reference.permute.unpermute_backward(
        *map(testing.to_numpy, (rows, weights)), index, testing.to_numpy(grad), 2.5
    )
    for found, again, right, of in zip(got, alone, wanted, (rows, weights), strict=True):
        assert found.dtype == of.dtype
        assert testing.to_numpy(found).tobytes() == testing.to_numpy(again).tobytes()
        assert_close(found, right)


def test_gradient_of_a_sum():
    rows = on_device(numbers(11, 3, 8)).requires_grad_()
    with running():
        moe.moe_sum(rows, on_device(IDS), routed_scaling_factor=2.0).sum().backward()
    assert torch.equal(rows.grad.cpu(), 2.0 * (torch.from_numpy(IDS) >= 0)[..., None].expand(11, 3, 8))


def test_a_graph_only_where_one_is_wanted():
    rows, weights = torch.zeros(11, 4, requires_grad=True), torch.zeros(11, 3, requires_grad=True)
    ids = torch.from_numpy(IDS)
    permuted = moe.moe_permute(rows, ids, 7)
    assert permuted.permuted_hidden_states.requires_grad
    assert moe.moe_unpermute(permuted.permuted_hidden_states.detach(), weights, permuted.inv_permuted_idx).requires_grad
    with torch.no_grad():
        assert not moe.moe_permute(rows, ids, 7).permuted_hidden_states.requires_grad
    assert not moe.moe_permute(rows.detach(), ids, 7).permuted_hidden_states.requires_grad


def test_no_second_derivative():
    rows = torch.ones(11, 4, requires_grad=True)
    permuted = moe.moe_permute(rows, torch.from_numpy(IDS), 7).permuted_hidden_states
    (grad,) = torch.autograd.grad(permuted.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 7168, 256, 8), (64, 7168, 256, 8), (1000, 2048, 128, 8), (333, 2880, 32, 4), (50, 77, 8, 2)]
)
def test_gradients_by_torch(shape, dtype):
    tokens, hidden, experts, top_k = shape
    ids = on_device(testing.random_ids(np.random.default_rng(0), tokens, experts, top_k, "zipf"))
    ids[::5, 0] = -1
    rows = on_device(numbers(tokens, hidden), dtype).requires_grad_()
    weights = on_device(numbers(tokens, top_k, seed=1)).requires_grad_()
    permuted = moe.moe_permute(rows, ids, experts, alignment=16)
    work = permuted.permuted_hidden_states * 0.5
    combined = moe.moe_unpermute(work, weights, permuted.inv_permuted_idx, routed_scaling_factor=2.0)
    grad = on_device(numbers(tokens, hidden, seed=2), dtype)
    combined.backward(grad)
    exact_rows, exact_weights = (value.detach().double().requires_grad_() for value in (rows, weights))
    slots = exact_rows[:, None].expand(-1, top_k, -1) * 0.5
    wanted = 2.0 * (slots * (exact_weights * (ids >= 0))[..., None]).sum(1)
    wanted.backward(grad.double())
    relative = testing.TOLERANCES[rows.dtype][0]
    products = (2.0 * slots * grad.double()[:, None]).norm(dim=-1).max()  # of which the sums may cancel
    for got, right, size in (
        (combined, wanted, wanted.abs().max()),
        (rows.grad, exact_rows.grad, exact_rows.grad.abs().max()),
        (weights.grad, exact_weights.grad, products),
    ):
        # gradients of rows are rounded before they are summed
        assert (got.double() - right).abs().max() <= 2 * relative * size


@pytest.mark.gpu
def test_a_training_step_repeats_in_a_graph():
    rows = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(300, 3, device="cuda", requires_grad=True)
    ids = torch.randint(-1, 16, (300, 3), device="cuda", dtype=torch.int32)
    grad = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)

    def step():
        permuted = moe.moe_permute(rows, ids, 16, alignment=8)
        combined = moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)
        return combined, *torch.autograd.grad(combined, (rows, weights), grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = [part.detach() for part in step()]  # so that no node of this stream stays
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(10):
        graph.replay()
        assert all(map(torch.equal, captured, wanted))


@pytest.mark.gpu
def test_a_million_rows_of_7168():
    tokens, hidden = 1_000_000, 7168  # 14 GB each way
    rows = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.randint(0, 16, (tokens, 1), device="cuda", dtype=torch.int32)
    permuted = moe.moe_permute(rows, ids, 16)
    order = ids.flatten().argsort(stable=True)
    for begin in range(0, tokens, 100_000):
        part = slice(begin, begin + 100_000)
        assert torch.equal(permuted.permuted_hidden_states[part], rows[order[part]])
    weights = torch.ones(tokens, 1, device="cuda")
    assert torch.equal(moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx), rows)


def test_rows_are_combined_by_a_flat_index_as_by_that_of_slots(device):
    ids = torch.tensor([[1, 0], [-1, 1], [0, 1]], dtype=torch.int32, device=device)
    src2dst = moe.moe_reorder(ids, 2).src2dst
    rows = torch.randn(6, 16, device=device, requires_grad=True)
    weights = torch.rand(3, 2, device=device, requires_grad=True)
    results = []
    for index in (src2dst, src2dst.view(3, 2)):
        combined = moe.moe_unpermute(rows, weights, index)
        results.append([combined, *torch.autograd.grad(combined.square().sum(), (rows, weights))])
    assert all(map(torch.equal, *results))
    with pytest.raises(ValueError, match=r"`inv_permuted_idx` must be of shape \(num_tokens \* top_k,\) = \(6,\), got"):
        moe.moe_unpermute(rows, weights, src2dst[:4])


MEMORY = {
    "given": lambda out: out,
    "strided": lambda out: out.new_empty(len(out), 2 * out.shape[1])[:, ::2],
    "between words": lambda out: out.new_empty(out.numel() + 1)[1:].view(out.shape),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_into_memory_that_is_given(device, memory, dtype, monkeypatch):
    ids = torch.tensor([[1, 0], [-1, 1], [0, 1]], dtype=torch.int32, device=device)
    tokens = torch.randn(3, 16, device=device).to(dtype)
    weights = torch.rand(3, 2, device=device)
    expected = moe.moe_permute(tokens, ids, 2)
    rows, places = expected.permuted_hidden_states, expected.inv_permuted_idx
    slots = tokens.repeat(2, 1).view(3, 2, 16)
    calls = {
        "moe_permute": ((tokens, ids, 2), rows),
        "moe_unpermute": (
            (rows, weights, places, 2.0),
            moe.moe_unpermute(rows, weights, places, routed_scaling_factor=2),
        ),
        "moe_sum": ((slots, ids, 2.0), moe.moe_sum(slots, ids, routed_scaling_factor=2)),
    }
    allocated, empty = [], arrays.empty
    monkeypatch.setattr(arrays, "empty", lambda *what: allocated.append((tuple(what[0]), what[2])) or empty(*what))
    for name, (arguments, wanted) in calls.items():
        out = MEMORY[memory](torch.full_like(wanted, torch.nan))
        allocated.clear()
        version = out._version
        if name == "moe_permute":
            into.call(moe.moe_permute, {"permuted_hidden_states": out}, *arguments)
        else:
            getattr(into, name)(out, *arguments)
        assert torch.equal(out, wanted)
        assert out._version > version
        assert ((tuple(wanted.shape), dtype) in allocated) == (memory != "given")


def test_memory_of_another_size_or_dtype_is_refused(device):
    slots = torch.randn(3, 2, 16, device=device)
    with pytest.raises(ValueError, match=r"`out` must be of shape that of the result = \(3, 16\), got shape \(4, 16\)"):
        into.moe_sum(torch.empty(4, 16, device=device), slots)
    ids = torch.zeros(3, 2, dtype=torch.int32, device=device)
    memory = {"permuted_hidden_states": torch.empty(6, 16, device=device, dtype=torch.float16)}
    with pytest.raises(TypeError, match=r"`out\.permuted_hidden_states` must be of dtype float32, got float16"):
        into.call(moe.moe_permute, memory, slots[:, 0], ids, 2)


def test_rows_in_given_memory_are_compiled_and_differentiated_by_copies():
    slots, out = torch.randn(3, 2, 16, requires_grad=True), torch.zeros(3, 16)
    given = out.clone()
    into.moe_sum(given, slots)
    assert given.grad_fn is not None
    with torch.no_grad():
        torch.compile(into.moe_sum, fullgraph=True, backend="eager")(out, slots.detach())
    torch.testing.assert_close(out, slots.detach().sum(1))
