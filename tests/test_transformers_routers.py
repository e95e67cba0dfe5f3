"""Routers of transformers that choose by our kernel choose as they did."""

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from numba_moe.interop import transformers_routers as routers  # noqa: E402

SIZES = {"hidden_size": 32, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
ROUTERS = {
    "qwen3_moe.Qwen3MoeTopKRouter": ("Qwen3MoeConfig", {"num_experts": 8, "norm_topk_prob": True}),
    "olmoe.OlmoeTopKRouter": ("OlmoeConfig", {"num_experts": 8, "norm_topk_prob": False}),
    "mixtral.MixtralTopKRouter": ("MixtralConfig", {"num_local_experts": 8}),
    "gpt_oss.GptOssTopKRouter": ("GptOssConfig", {"num_local_experts": 8}),
    "deepseek_v3.DeepseekV3TopkRouter": ("DeepseekV3Config", GROUPS),
    "glm4_moe.Glm4MoeTopkRouter": ("Glm4MoeConfig", GROUPS),
    "granitemoe.GraniteMoeTopKRouter": ("GraniteMoeConfig", {"num_local_experts": 8}),
    "laguna.LagunaTopKRouter": ("LagunaConfig", {"num_experts": 8}),
}


def make_router(name, dtype=torch.float32):
    module, _, router = name.partition(".")
    config, options = ROUTERS[name]
    found = getattr(pytest.importorskip(f"transformers.models.{module}.modeling_{module}"), router, None)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {router}")
    made = found(getattr(transformers, config)(**SIZES, **options))
    torch.manual_seed(4)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.normal_()
    return made.to(dtype)


def sorted_by_id(found):
    order = found[2].argsort(1)
    return found[0], found[1].gather(1, order), found[2].gather(1, order)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_chooses_as_it_did(name, dtype):
    router = make_router(name, dtype)
    rows = torch.randn(5, 32).to(dtype)
    expected = sorted_by_id(router(rows))
    assert routers.replace_routers(torch.nn.Sequential(router)) == ["0"]
    for part, wanted in zip(sorted_by_id(router(rows)), expected, strict=True):
        assert part.dtype == wanted.dtype
        torch.testing.assert_close(part, wanted)
    routers.restore_routers(router)
    assert "forward" not in vars(router)


def test_attributes_are_read_at_every_call():
    router = make_router("deepseek_v3.DeepseekV3TopkRouter")
    own = copy.deepcopy(router)
    routers.replace_routers(router)
    rows = torch.randn(5, 32)
    for changed in (router, own):
        changed.routed_scaling_factor, changed.norm_topk_prob, changed.topk_group = 4.0, not changed.norm_topk_prob, 3
        changed.e_score_correction_bias.neg_()
    for part, wanted in zip(sorted_by_id(router(rows)), sorted_by_id(own(rows)), strict=True):
        torch.testing.assert_close(part, wanted)


@pytest.mark.parametrize("wrap", [lambda router: router, lambda router: torch.compile(router, backend="eager")])
def test_a_number_that_no_rule_has_is_noticed(wrap):
    router = make_router("laguna.LagunaTopKRouter")
    own, rows = copy.deepcopy(router), torch.randn(5, 32)
    assert routers.replace_routers(torch.nn.Sequential(router)) == ["0"]
    called = wrap(router)
    for cap in (0.0, 0.5, 0.0):
        router.router_logit_softcapping = own.router_logit_softcapping = cap
        for part, wanted in zip(sorted_by_id(called(rows)), sorted_by_id(own(rows)), strict=True):
            torch.testing.assert_close(part, wanted)


def test_a_rule_is_found_under_another_default_dtype():
    router = make_router("mixtral.MixtralTopKRouter")
    expected = routers.find_rule(router)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert routers.find_rule(router) == expected is not None
    finally:
        torch.set_default_dtype(before)


def test_weights_have_gradients_as_before():
    router = make_router("qwen3_moe.Qwen3MoeTopKRouter")
    own = copy.deepcopy(router)
    routers.replace_routers(router)
    rows = torch.randn(5, 32)
    for part in (router, own):
        part(rows)[1].square().sum().backward()
    torch.testing.assert_close(router.weight.grad, own.weight.grad)


def test_a_replaced_router_compiles_and_is_copied():
    router = make_router("mixtral.MixtralTopKRouter")
    routers.replace_routers(router)
    rows = torch.randn(5, 32)
    with torch.no_grad():
        expected = router(rows)
        compiled = torch.compile(router, fullgraph=True, backend="eager")(rows)
        other = copy.deepcopy(router)
        assert all(map(torch.equal, compiled, expected))
        other.weight.zero_()
        assert other(rows)[0].eq(0).all()
        assert all(map(torch.equal, router(rows), expected))
        assert all(map(torch.equal, pickle.loads(pickle.dumps(router))(rows), expected))


class NoisyRouter(torch.nn.Module):
    """A router that no gate of ours is."""

    top_k = 2

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 32))

    def forward(self, rows):
        logits = rows @ self.weight.t()
        best = logits.square().topk(2)
        return logits, best.values, best.indices


class OtherRouter(NoisyRouter):
    """A router with other results."""

    def forward(self, rows):
        return rows


@pytest.mark.parametrize("kind", [NoisyRouter, OtherRouter, torch.nn.Linear])
def test_a_router_of_another_kind_keeps_its_own(kind):
    module = kind(32, 8) if kind is torch.nn.Linear else kind()
    before, state = dict(vars(module)), torch.random.get_rng_state()
    assert routers.replace_routers(torch.nn.Sequential(module)) == []
    assert vars(module).keys() == before.keys()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_has_the_logits_it_had():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(tokens, output_router_logits=True)
        assert len(routers.replace_routers(model)) == 2
        found = model(tokens, output_router_logits=True)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.router_logits, expected.router_logits)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
