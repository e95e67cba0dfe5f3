"""Routing that is recorded and replayed: the same bits, gradients of torch, requests, and the layouts of others."""

import base64
import copy

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import numba_moe as moe
from numba_moe import training
from numba_moe.interop import transformers_routers

HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS, TOKENS = 16, 8, 6, 2, 2, 7
GROUPED = {"num_expert_group": 3, "topk_group": 2, "scoring_func": "sigmoid", "correction_bias": True}
OPTIONS = {"softmax": {}, "renormalize": {"renormalize": True}, "grouped": {**GROUPED, "routed_scaling_factor": 2.5}}


def stack(**options):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(moe.MoEBlock(HIDDEN, WIDTH, EXPERTS, TOP_K, **options) for _ in range(LAYERS)))


def rows(tokens=TOKENS):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))


def replay_of(model, **options):
    found = training.RoutingReplay(LAYERS, 16, TOP_K, EXPERTS, **options)
    assert found.attach(model) == LAYERS
    return found


def disturb(model):
    """Move the routers so far that they would choose others."""
    with torch.no_grad():
        for one in model:
            one.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(9)))
    return model


@pytest.mark.sweep(1)
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_replay_has_the_bits_of_what_was_recorded(name, with_weights, device):
    model = stack(**OPTIONS[name]).to(device)
    given = rows().to(device)
    wanted = model(given)
    replay = replay_of(model, with_weights=with_weights, device=device)
    with replay.recording():
        recorded = model(given)
    torch.testing.assert_close(recorded, wanted)
    with replay.replaying():
        assert torch.equal(model(given), recorded)
        assert torch.equal(disturb(model)(given), recorded) == with_weights
        assert [one.router(given).topk_ids.tolist() for one in model] == [
            replay.choice(layer, TOKENS).tolist() for layer in range(LAYERS)
        ]
    training.RoutingReplay.detach(model)
    assert all(one.router.replay is None for one in model)


def test_the_gradient_is_that_of_torch_with_the_same_choice(device):
    model = stack(renormalize=True).to(device)
    given = rows().to(device)
    replay = replay_of(model, device=device)
    with replay.recording():
        model(given)
    disturb(model)
    with replay.replaying():
        model(given).square().sum().backward()
    exact = copy.deepcopy(stack(renormalize=True)).double()
    exact.load_state_dict({name: value.double().cpu() for name, value in model.state_dict().items()})
    out = rows().double()
    for layer, one in enumerate(exact):
        ids = replay.choice(layer, TOKENS).long().cpu()
        scores = (out @ one.router.weight.T).softmax(1).gather(1, ids)
        weights = scores / scores.sum(1, keepdim=True)
        gate, up = torch.einsum("tkwh,th->tkw", one.gate_up_proj[ids], out).chunk(2, -1)
        expert = torch.einsum("tkhw,tkw->tkh", one.down_proj[ids], torch.nn.functional.silu(gate) * up)
        out = (expert * weights[..., None]).sum(1)
    out.square().sum().backward()
    for one, other in zip(model, exact, strict=True):
        wanted = other.router.weight.grad
        assert wanted.any()
        found = one.router.weight.grad.double().cpu()
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_recorded_weights_are_used_and_the_own_have_the_gradient():
    model = stack()
    replay = replay_of(model, with_weights=True)
    with replay.recording():
        model(rows())
    disturb(model)
    with replay.replaying():
        weights, ids = model[0].router(rows())
    assert torch.equal(weights, replay.weights[0, :TOKENS])
    grad = torch.randn(weights.shape)
    weights.backward(grad)
    found = model[0].router.weight.grad
    logits = (rows() @ model[0].router.weight.detach().T).requires_grad_()
    moe.weigh_experts(logits, ids).topk_weights.backward(grad)
    torch.testing.assert_close(found, logits.grad.T @ rows())


@pytest.mark.sweep(1)
@pytest.mark.parametrize("with_weights", [False, True])
def test_compiled_models_record_and_replay(with_weights):
    model = stack()
    replay = replay_of(model, with_weights=with_weights)
    with replay.recording():
        wanted = model(rows())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with replay.replaying():
        found = compiled(rows())
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert model[0].router.weight.grad.any()
    chosen = replay.choice(0, TOKENS)
    replay.clear()
    with replay.recording():
        torch.testing.assert_close(compiled(rows()), wanted)
    assert torch.equal(replay.choice(0, TOKENS), chosen)


def test_tokens_without_a_record():
    model = stack()
    wanted = model(rows())
    for own_choice in (False, True):
        replay = replay_of(model, own_choice=own_choice)
        with replay.recording():
            model(rows())
        replay.ids[:, 3] = replay.none
        with replay.replaying():
            found = model(rows())
        same = torch.isclose(found, wanted).all(1)
        assert same.tolist() == [own_choice or token != 3 for token in range(TOKENS)]
        assert own_choice or not found[3].any()


@pytest.mark.parametrize(
    ("experts", "dtype"), [(255, torch.uint8), (256, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)]
)
def test_the_smallest_dtype_holds_every_expert_and_none(experts, dtype):
    replay = training.RoutingReplay(1, 4, 3, experts)
    ids = torch.tensor([[0, experts - 1, -1], [-1, -1, -1]], dtype=torch.int32)
    replay.record(0, ids, first_token=1)
    assert replay.ids.dtype == dtype
    assert replay.choice(0, 4).tolist() == [[-1] * 3, *ids.tolist(), [-1] * 3]


def test_chunks_of_a_pass_and_its_bounds():
    model = stack()
    replay = replay_of(model)
    whole = rows(10)
    with replay.recording():
        wanted = model(whole)
    for first, part in ((0, whole[:4]), (4, whole[4:])):
        with replay.replaying(first_token=first):
            torch.testing.assert_close(model(part), wanted[first : first + len(part)])
    with (
        replay.recording(first_token=10),
        pytest.raises(ValueError, match="`max_tokens` must be at least the 20 tokens"),
    ):
        model(whole)
    assert not replay.is_active
    with pytest.raises(ValueError, match="`model` must be of num_layers = 2 routers, got 1"):
        replay.attach(model[0])


def test_checkpointing_within_a_replay():
    model = stack(count_tokens=True)
    replay = replay_of(model)
    with replay.recording():
        model(rows())
    disturb(model)
    given = rows().requires_grad_()
    with replay.replaying():
        model(given).square().sum().backward()
        wanted, given.grad = given.grad, None
        checkpoint(model, given, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(given.grad, wanted)
    assert [int(one.router.tokens_per_expert.sum()) for one in model] == [TOKENS * TOP_K] * LAYERS


def drawn(tokens, seed=0):
    ids = np.random.default_rng(seed).random((tokens, LAYERS, EXPERTS)).argsort(2)[:, :, :TOP_K]
    return ids.astype(np.int32)


def test_requests_are_stitched_and_laid_out():
    replay = training.RoutingReplay(LAYERS, 16, TOP_K, EXPERTS)
    prefix, rest = drawn(4), drawn(3, seed=1)
    replay.stitch("a", rest, first_token=4)
    assert (replay.get("a")[:4] == -1).all()
    replay.stitch("a", prefix)  # cached by another request
    assert np.array_equal(replay.get("a"), np.concatenate([prefix, rest]))
    assert (replay.get("a", 9)[7:] == -1).all()
    replay.stitch("b", rest)
    replay.fill(["b", None, "a"], [4, 2, 8])
    laid = np.stack([replay.choice(layer, 16).numpy() for layer in range(LAYERS)], 1)
    wanted = np.full((16, LAYERS, TOP_K), -1)
    wanted[:3], wanted[6:13] = rest, replay.get("a")
    assert np.array_equal(laid, wanted)
    replay.put("c", 7, row=6)
    assert np.array_equal(replay.get("c"), replay.get("a"))
    with pytest.raises(ValueError, match="`num_tokens` must be 16 at most together, got 17"):
        replay.fill(["a", "b"], [8, 9])
    with pytest.raises(ValueError, match=r"`topk_ids` must be of shape \(3, 2, 2\), got shape \(3, 2, 1\)"):
        replay.stitch("d", rest[:, :, :1])


@pytest.mark.parametrize("layout", ["vllm", "sglang", "megatron"])
@pytest.mark.parametrize("experts", [6, 256, 300, 70000])
def test_layouts_of_others(layout, experts):
    replay = training.RoutingReplay(LAYERS, 16, TOP_K, experts)
    ids = np.random.default_rng(0).integers(0, experts, (5, LAYERS, TOP_K)).astype(np.int32)
    ids[0, 0, 0] = experts - 1
    replay.stitch("a", ids)
    packed = replay.pack("a", layout)
    if layout == "vllm":
        assert packed.dtype == {6: np.uint8, 256: np.uint8, 300: np.uint16, 70000: np.int32}[experts]
        assert np.array_equal(packed, ids)
    elif layout == "sglang":  # as SGLang's extract_routed_experts_from_meta_info reads it
        flat = np.frombuffer(base64.b64decode(packed["routed_experts"]), np.int32)
        assert np.array_equal(flat.reshape(-1, LAYERS, TOP_K), ids)
    else:  # as RouterReplay gathers scores by it
        assert [rows.tolist() for rows in packed] == ids.transpose(1, 0, 2).tolist()
        torch.zeros(5, experts).gather(1, packed[0])
    replay.unpack("b", packed, layout, first_token=2)
    assert np.array_equal(replay.get("b")[2:], ids)
    replay.stitch("a", np.full((1, LAYERS, TOP_K), -1, np.int32), first_token=5)
    replay.unpack("c", replay.pack("a", layout), layout)
    assert np.array_equal(replay.get("c"), replay.get("a"))


def test_what_others_send_is_checked():
    replay = training.RoutingReplay(LAYERS, 16, TOP_K, EXPERTS)
    ids = drawn(3)
    ids[1, 0, 1] = 6
    with pytest.raises(ValueError, match="`packed` must be -1 or below num_experts = 6, got 6 at token 1, layer 0, p"):
        replay.unpack("a", ids, "vllm")
    small = base64.b64encode(drawn(3).astype(np.uint8).tobytes()).decode()
    replay.unpack("a", {"meta_info": {"routed_experts": small, "routed_experts_dtype": "uint8"}}, "sglang")
    assert np.array_equal(replay.get("a"), drawn(3))
    with pytest.raises(ValueError, match="`routed_experts` must be of a multiple of num_layers"):
        replay.unpack("a", {"routed_experts": base64.b64encode(bytes(4)).decode()}, "sglang")
    with pytest.raises(ValueError, match="`routed_experts_dtype` must be one of"):
        replay.unpack("a", {"routed_experts": small, "routed_experts_dtype": "float32"}, "sglang")


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    assert len(transformers_routers.replace_routers(model)) == LAYERS
    replay = replay_of(model)
    tokens = torch.arange(TOKENS)[None]
    with replay.recording():
        wanted = model(tokens).logits
    routers = [module for module in model.modules() if transformers_routers.is_replaced(module)]
    chosen = replay.choice(0, TOKENS)
    assert (chosen >= 0).all()
    with replay.replaying():
        assert torch.equal(model(tokens).logits, wanted)
        for router in routers:
            torch.nn.init.normal_(router.weight)
        loss = model(tokens).logits.square().sum()
        assert torch.equal(routers[0](rows(TOKENS).repeat(1, 2))[2].int(), chosen)
    loss.backward()
    assert all(router.weight.grad.any() for router in routers)


BAD_CALLS = {
    "other picks": (lambda replay: replay.record(0, torch.zeros(3, 1)), "`topk_ids` must be of shape"),
    "layer": (lambda replay: replay.record(2, torch.zeros(3, 2)), "`layer` must be at most num_layers - 1 = 1, got 2"),
    "last layer": (lambda replay: replay.choice(-1, 3), "`layer` must be at least 0, got -1"),
    "row": (lambda replay: replay.choice(0, 3, -1), "`first_token` must be at least 0, got -1"),
    "token": (lambda replay: replay.stitch("a", drawn(3), -1), "`first_token` must be at least 0, got -1"),
    "id": (lambda replay: replay.stitch("a", drawn(3) + 9), "`topk_ids` must be -1 or below num_experts = 6"),
    "floats": (lambda replay: replay.stitch("a", drawn(3) / 2), "`topk_ids` must be of integers, got float64"),
    "numbers": (
        lambda replay: replay.fill(["a"], [1, 2]),
        "`num_tokens` must be a number for each of 1 requests, got 2",
    ),
    "router's picks": (
        lambda replay: replay.attach(blocks(token_rounding=4)),
        "`model` must be of routers with top_k = 2 picks of num_experts = 6, got 4 of 6",
    ),
    "router's experts": (
        lambda _: training.RoutingReplay(LAYERS, 16, TOP_K, 5).attach(blocks()),
        "`model` must be of routers with top_k = 2 picks of num_experts = 5, got 2 of 6",
    ),
}


def blocks(**options):
    return torch.nn.Sequential(*(moe.MoEBlock(8, 4, EXPERTS, TOP_K, **options) for _ in range(LAYERS)))


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_fits_no_record_is_refused_by_name(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(training.RoutingReplay(LAYERS, 16, TOP_K, EXPERTS))
