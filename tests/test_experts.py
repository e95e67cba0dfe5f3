"""The experts' feed-forward: against the reference in cases, its gradients and those of the block against torch's."""

import contextlib
import itertools

import pytest
import torch
from numba_moe.reference.activation import ACTIVATIONS, RULES

import numba_moe as moe
from numba_moe.device import simulator
from numba_moe.ops import grouped_products
from numba_moe.runtime import plans
from numba_moe.verify import testing

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def activated(gate_up, activation):
    if activation == "swiglu_oai":
        gate, up = gate_up[:, ::2].clamp(max=7), gate_up[:, 1::2].clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
        "swiglu_step": lambda gate: torch.nn.functional.silu(gate).clamp(max=7),
        "relu2": lambda gate: gate.relu().square(),
        "situ": lambda gate: 4 * torch.tanh(gate / 4) * torch.sigmoid(gate),
    }
    if activation.endswith("_no_mul"):
        return functions[activation.removesuffix("_no_mul")](gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return functions[activation](gate) * (up.clamp(-7, 7) if activation == "swiglu_step" else up)


def by_torch(rows, gate_up_proj, down_proj, weights, ids, activation="silu", gate_up_bias=None, down_bias=None):
    """Run the experts one after the other, on the tokens of each."""
    combined = torch.zeros_like(rows)
    for expert in range(len(gate_up_proj)):
        tokens, choice = torch.where(ids == expert)
        gate_up = rows[tokens] @ gate_up_proj[expert].T
        if gate_up_bias is not None:
            gate_up = gate_up + gate_up_bias[expert]
        down = activated(gate_up, activation) @ down_proj[expert].T
        if down_bias is not None:
            down = down + down_bias[expert]
        combined = combined.index_add(0, tokens, (down * weights[tokens, choice, None]).to(rows.dtype))
    return combined


def drawn(tokens, num_experts, top_k, hidden, width, bias, device=DEVICE, dtype=torch.float32, halves=2):
    """Draw the arguments of a call; one expert gets nothing, and some ids are no expert's."""
    torch.manual_seed(0)
    ids = torch.rand(tokens, num_experts - 1).topk(top_k).indices.int()
    ids[torch.rand(ids.shape) < 0.1] = -1
    found = {
        "hidden_states": torch.randn(tokens, hidden),
        "gate_up_proj": torch.randn(num_experts, halves * width, hidden) / hidden**0.5,
        "down_proj": torch.randn(num_experts, hidden, width) / width**0.5,
    }
    if bias:
        found["gate_up_bias"] = torch.randn(num_experts, halves * width)
        found["down_bias"] = torch.randn(num_experts, hidden)
    found = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in found.items()}
    return {**found, "topk_weights": torch.rand(tokens, top_k, device=device).requires_grad_()}, ids.to(device)


def gradients(result, arguments):
    grad = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).reshape(result.shape)
    return torch.autograd.grad(result, list(arguments.values()), grad.to(result))


def assert_close(got, wanted, tolerance):
    """Compare with what is exact, relative to the largest."""
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance, float(error)


def assert_as_torch(arguments, ids, tolerance, **options):
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in arguments.items()}
    order = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")
    named = {name: tensor for name, tensor in exact.items() if name not in order}
    wanted = by_torch(*(exact[name] for name in order), ids, **named, **options)
    result = moe.fused_experts(topk_ids=ids, **arguments, **options)
    assert result.dtype == arguments["hidden_states"].dtype
    assert_close(result, wanted, tolerance)
    for got, grad in zip(gradients(result, arguments), gradients(wanted, exact), strict=True):
        assert_close(got, grad, tolerance)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_torch(activation, bias):
    arguments, ids = drawn(9, 4, 2, 16, 8, bias, halves=RULES[activation].halves)
    with running():
        assert_as_torch(arguments, ids, 2e-6, activation=activation)


def test_gradients_on_the_cpu():
    arguments, ids = drawn(9, 4, 2, 7, 5, bias=True, device="cpu")
    assert_as_torch(arguments, ids, 2e-6)


def test_no_gradient_for_what_is_not_chosen():
    arguments, ids = drawn(9, 4, 2, 16, 8, bias=True)
    with running(), testing.poisoned_memory():
        found = dict(zip(arguments, gradients(moe.fused_experts(topk_ids=ids, **arguments), arguments), strict=True))
    assert all(grad.isfinite().all() for grad in found.values())
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert not found[name][-1].any()
    assert not found["topk_weights"][ids < 0].any()


def test_transposed_matrices_are_the_same():
    arguments, ids = drawn(9, 4, 2, 16, 8, bias=False)
    with running():
        wanted = moe.fused_experts(topk_ids=ids, **arguments)
        for name in ("gate_up_proj", "down_proj"):
            arguments[name] = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        assert_as_torch(arguments, ids, 2e-6)
        assert torch.allclose(moe.fused_experts(topk_ids=ids, **arguments), wanted, rtol=1e-5, atol=1e-6)


def test_experts_of_ranks_add_up():
    arguments, ids = drawn(9, 4, 2, 16, 8, bias=True)
    shared = {"hidden_states", "topk_weights"}
    total = 0
    with running():
        wanted = moe.fused_experts(topk_ids=ids, **arguments)
        for rank in range(2):
            own = torch.arange(rank, 4, 2, device=DEVICE)
            places = torch.full((4,), -1, device=DEVICE)
            places[own] = torch.arange(2, device=DEVICE)
            local = {name: part if name in shared else part[own] for name, part in arguments.items()}
            total = total + moe.fused_experts(topk_ids=ids, expert_map=places, **local)
        assert torch.allclose(total, wanted, rtol=1e-5, atol=1e-6)
        for got, grad in zip(gradients(total, arguments), gradients(wanted, arguments), strict=True):
            assert torch.allclose(got, grad, rtol=1e-5, atol=1e-6)


def grouped_with_undefined_rows(rows, weights, offs):
    """Multiply as torch's grouped GEMM does where it is in one launch: rows past the last end are left as they were."""
    if weights.dim() == 2:  # of a gradient of matrices
        bounds = [0, *offs.tolist()]
        return torch.stack([rows[:, a:b] @ weights[a:b] for a, b in itertools.pairwise(bounds)])
    products = torch.full((len(rows), weights.shape[2]), torch.nan)
    for expert, (begin, end) in enumerate(itertools.pairwise([0, *offs.tolist()])):
        products[begin:end] = rows[begin:end] @ weights[expert]
    return products


def assert_places_past_the_matrices_add_nothing(bias, dtype=torch.float32):
    arguments, ids = drawn(300 if ON_GPU else 9, 8, 2, 16, 8, bias=bias, dtype=dtype)
    shared = {"hidden_states", "topk_weights"}
    local = {name: part if name in shared else part.detach()[:3].requires_grad_() for name, part in arguments.items()}
    past = torch.tensor([1, 3, 0, 5, -1, 7, 2, 2**32], device=DEVICE)
    with running():
        wanted = moe.fused_experts(topk_ids=ids, expert_map=torch.where(past < 3, past, -1), **local)
        wanted_gradients = gradients(wanted, local)
        for places in (past, past.where(past < 2**31, 9).int()):
            with testing.poisoned_memory():
                found = moe.fused_experts(topk_ids=ids, expert_map=places, **local)
                with torch.no_grad():
                    plain = moe.fused_experts(topk_ids=ids, expert_map=places, **local)
            assert torch.equal(found, wanted)
            assert torch.allclose(plain, wanted, rtol=1e-5, atol=1e-6)
            for got, grad in zip(gradients(found, local), wanted_gradients, strict=True):
                assert got.isfinite().all()
                assert torch.allclose(got, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grouped", [False, pytest.param(True, marks=pytest.mark.skipif(ON_GPU, reason="below"))])
def test_places_past_the_matrices_add_nothing(grouped, bias, monkeypatch, request):
    if grouped:
        monkeypatch.setattr(grouped_products, "_grouped_mm", grouped_with_undefined_rows)
        monkeypatch.setattr(grouped_products, "has_grouped", lambda *_: True)
        plans.forget()
        request.addfinalizer(plans.forget)
    assert_places_past_the_matrices_add_nothing(bias)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_places_past_the_matrices_add_nothing_to_grouped_gemms(bias):
    assert_places_past_the_matrices_add_nothing(bias, torch.bfloat16)


def test_no_tokens_have_gradients_of_zero():
    arguments, _ = drawn(3, 4, 2, 16, 8, bias=False)
    arguments["hidden_states"] = arguments["hidden_states"].detach()[:0].requires_grad_()
    arguments["topk_weights"] = arguments["topk_weights"].detach()[:0].requires_grad_()
    with running():
        result = moe.fused_experts(topk_ids=torch.zeros(0, 2, dtype=torch.int32, device=DEVICE), **arguments)
        found = gradients(result, arguments)
    assert result.shape == (0, 16)
    assert not any(grad.any() for grad in found)


BLOCKS = {
    "softmax": {},
    "renormalised": {"renormalize": True, "shared_size": 12},
    "grouped sigmoid": {"scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 2, "correction_bias": True},
    "gpt-oss": {"activation": "swiglu_oai", "bias": True, "renormalize": True},
    "Nemotron": {"activation": "relu2_no_mul", "scoring_func": "sigmoid", "bias": True, "shared_size": 4},
    "Kimi-K3": {"activation": "situ", "activation_options": {"beta": 2.0, "linear_beta": 5.0}, "shared_size": 4},
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_learns(name):
    """Its loss falls, and every parameter has a part in that."""
    torch.manual_seed(0)
    block = moe.MoEBlock(8, 8, 8, 2, **BLOCKS[name]).to(DEVICE)
    rows, wanted = torch.randn(2, 16, 8, device=DEVICE), torch.randn(2, 16, 8, device=DEVICE)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    optimizer = torch.optim.Adam(block.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = (block(rows) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, parameter in block.named_parameters() if torch.equal(parameter, before[name])] == []


def test_a_block_is_its_parts():
    torch.manual_seed(0)
    block = moe.MoEBlock(8, 4, 6, 2, renormalize=True, shared_size=4)
    rows = torch.randn(5, 8)
    seen = []
    block.router.register_forward_hook(lambda router, arguments, chosen: seen.append(chosen))
    with torch.no_grad():
        got = block(rows)
        weights, ids = moe.topk_softmax(rows @ block.router.weight.T, 2, True)
        wanted = by_torch(rows, block.gate_up_proj, block.down_proj, weights, ids)
        shared = activated(rows @ block.shared_gate_up.T, "silu") @ block.shared_down.T
    assert torch.allclose(got, wanted + shared, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[0].topk_ids, ids)
    assert set(block.state_dict()) == {
        *("router.weight", "gate_up_proj", "down_proj", "shared_gate_up", "shared_down"),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_gemms_by_torch_on_the_gpu(activation, transposed, monkeypatch):
    arguments, ids = drawn(1000, 16, 4, 256, 128, bias=activation == "swiglu_oai", dtype=torch.bfloat16)
    if transposed:
        for name in ("gate_up_proj", "down_proj"):
            arguments[name] = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    tolerance = testing.EXPERT_ROUNDINGS * testing.TOLERANCES[torch.bfloat16][0]
    with testing.poisoned_memory():
        assert_as_torch(arguments, ids, tolerance, activation=activation)
    if torch.cuda.get_device_capability()[0] == 9:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda *_: pytest.fail("the host read device data"))
        moe.fused_experts(topk_ids=ids, **arguments, activation=activation)


@pytest.mark.gpu
def test_a_graph_captures():
    if torch.cuda.get_device_capability()[0] not in grouped_products.GROUPED_ARCHITECTURES:
        pytest.skip("torch's grouped GEMM reads the offsets here")
    arguments, ids = drawn(64, 16, 4, 256, 128, bias=False, dtype=torch.bfloat16)
    arguments = {name: tensor.detach() for name, tensor in arguments.items()}
    moe.fused_experts(topk_ids=ids, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = moe.fused_experts(topk_ids=ids, **arguments)
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(result, moe.fused_experts(topk_ids=ids, **arguments))


@pytest.mark.gpu
def test_matrices_without_rows_have_gradients_of_zero_on_the_gpu():
    arguments, ids = drawn(300, 32, 4, 256, 128, bias=False, dtype=torch.bfloat16)
    ids[ids > 5] = -1
    for _ in range(3):  # what earlier gradients left in memory must not come back
        found = dict(zip(arguments, gradients(moe.fused_experts(topk_ids=ids, **arguments), arguments), strict=True))
        for name in ("gate_up_proj", "down_proj"):
            assert not found[name][6:].any()
            assert found[name].isfinite().all()


CONVERSIONS = {
    "to": lambda block: block.to(torch.bfloat16),
    "to a device": lambda block: block.to(DEVICE, torch.bfloat16),
    "half": lambda block: block.half(),
    "type": lambda block: block.type(torch.bfloat16),
    "inside another module": lambda block: torch.nn.Sequential(block).bfloat16()[0],
    "there and back": lambda block: block.bfloat16().float(),
}


def biased_block(value=6.817, **options):
    block = moe.MoEBlock(16, 8, 4, 2, scoring_func="sigmoid", correction_bias=True, **options)
    block.router.correction_bias.fill_(value)
    return block


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_bias_of_a_block_keeps_its_bits_in_every_dtype(name):
    block = biased_block()
    bits = block.router.correction_bias.clone()
    block = CONVERSIONS[name](block)
    assert torch.equal(block.router.correction_bias.cpu(), bits)
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert block(rows.to(block.down_proj)).isfinite().all()


def test_the_bias_of_a_block_in_float64_is_float32_still():
    assert biased_block().double().router.correction_bias.dtype == torch.float32
    meta = moe.MoEBlock(16, 8, 4, 2, correction_bias=True, device="meta").bfloat16()
    assert meta.to_empty(device="cpu").router.correction_bias.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_a_bias_of_another_dtype_in_a_state_dict_is_taken(assign):
    block, saved = biased_block(), {name: value.bfloat16() for name, value in biased_block().state_dict().items()}
    block = block.bfloat16()
    block.load_state_dict(saved, assign=assign)
    assert block(torch.ones(3, 16, dtype=torch.bfloat16)).isfinite().all()
    bias = block.float().router.correction_bias
    assert torch.equal(bias, torch.full((4,), 6.817).bfloat16().float())


def test_a_bias_that_a_wrapper_converts_is_taken():
    block = biased_block(0.25).bfloat16()
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = block(rows)
    block.router.correction_bias.data = block.router.correction_bias.bfloat16()  # as FSDP does by its buffer_dtype
    assert torch.equal(block(rows), wanted)


def test_a_block_says_its_sizes():
    block = moe.MoEBlock(16, 8, 4, 2, bias=True, correction_bias=True, shared_size=6)
    assert (block.hidden_size, block.intermediate_size, block.num_experts, block.top_k) == (16, 8, 4, 2)
    text = repr(block)
    for part in ("hidden_size=16", "intermediate_size=8", "num_experts=4", "top_k=2", "bias=True", "shared_size=6"):
        assert part in text
    block.router.top_k = 1
    assert block.top_k == 1
    assert "correction_bias" not in repr(moe.MoEBlock(16, 8, 4, 2))


def test_a_block_made_in_inference_mode_trains_outside():
    with torch.inference_mode():
        block = moe.MoEBlock(16, 8, 4, 2, correction_bias=True, shared_size=4)
        block(torch.ones(3, 16))
    block(torch.ones(3, 16)).sum().backward()
    assert block.down_proj.grad is not None
    block.router.correction_bias += 1
    with torch.inference_mode():
        block.router.correction_bias += 1
        inside = block(torch.ones(3, 16))
    torch.testing.assert_close(inside, block(torch.ones(3, 16)))
