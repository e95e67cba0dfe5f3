"""Models of Hugging Face transformers on our experts agree with its eager ones: logits and gradients."""

import contextlib
import copy
import functools
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configurations; nothing is fetched
transformers = pytest.importorskip("transformers")

from transformers.activations import ACT2FN  # noqa: E402

from numba_moe.device import simulator  # noqa: E402
from numba_moe.interop import transformers as interop  # noqa: E402
from numba_moe.verify import testing  # noqa: E402

interop.register()

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
    ),
    "Olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 4}),
    "DeepseekV3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "GptOss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
GATES = {
    "Mixtral": interop.Gate("silu", False, float("inf"), None),
    "GptOss": interop.Gate("swiglu_oai", True, None, None),
}


def make(name, dtype=torch.float32, device="cpu"):
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # what models begin with as zeros would hide
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.to(device, dtype)


def logits_and_gradients(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.arange(40, device=model.device).reshape(2, 20) * 7 % 64
    logits = model(input_ids=ids).logits
    logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def error(got, wanted):
    """Return how far a result is from what it should be, relative to the largest."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())


def assert_agrees(model, tolerance):
    calls = []
    wanted, wanted_gradients = logits_and_gradients(model, "eager")
    own = interop.fused_experts

    def counted(*args, **options):
        calls.append(options)
        return own(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interop, "fused_experts", counted)
        got, gradients = logits_and_gradients(model, interop.NAME)
    assert calls, "the model ran something else"
    assert error(got, wanted) <= tolerance
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None and gradient.any():
            assert error(gradients[name], gradient) <= tolerance, name


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_agree_with_eager(name):
    assert_agrees(make(name), 1e-5)


@pytest.mark.parametrize("name", ["Mixtral", pytest.param("GptOss", marks=pytest.mark.slow)])
def test_kernels_agree_with_eager(name):
    with simulator.running() if simulator.ENABLED else contextlib.nullcontext():
        assert_agrees(make(name, device="cpu" if simulator.ENABLED else "cuda"), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_inference_in_bfloat16(name):
    model = make(name, torch.bfloat16)
    layer = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    torch.manual_seed(0)
    rows = torch.randn(12, 32, dtype=torch.bfloat16)
    ids = torch.rand(12, 4).topk(2).indices
    weights = torch.rand(12, 2)
    with torch.no_grad():
        results = {}
        for implementation in ("eager", interop.NAME):
            model.set_experts_implementation(implementation)
            results[implementation] = layer(rows, ids, weights.bfloat16())
        model.float().set_experts_implementation("eager")
        exact = layer(rows.float(), ids, weights.bfloat16().float())
    size = testing.EXPERT_ROUNDINGS * testing.largest_in_row(exact.numpy())
    comparison = testing.compare(results[interop.NAME], exact.numpy(), size=size)
    assert not comparison.mismatches, comparison
    assert error(results[interop.NAME], exact) <= error(results["eager"], exact)  # which rounds more often


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_recognised(name):
    model = make(name)
    layers = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    assert [interop.find_gate(layer) for layer in layers] == [GATES[name]] * 2


def test_limits_and_factors_are_found():
    layer = next(module for module in make("GptOss").modules() if hasattr(module, "_apply_gate"))
    layer.alpha, layer.limit = 1.25, 31.0
    assert interop.find_gate(layer) == interop.Gate("swiglu_oai", True, 31.0, 1.25)
    layer = next(module for module in make("Mixtral").modules() if hasattr(module, "_apply_gate"))
    layer.act_fn = torch.nn.GELU()
    assert interop.find_gate(layer) == interop.Gate("gelu", False, float("inf"), None)
    layer.act_fn = torch.nn.GELU(approximate="tanh")
    assert interop.find_gate(layer).activation == "gelu_tanh"


def bent(rows, bound):
    return bound * (rows / bound).tanh()


# Gates of models that this release of transformers lacks or makes slowly, by what a module has, and what they are.
OTHER_GATES = {
    "Step 3.7": (
        {"limit": 3.0},
        lambda layer, gate, up: layer.act_fn(gate).clamp(max=layer.limit) * up.clamp(-layer.limit, layer.limit),
        interop.Gate("swiglu_step", False, 3.0, None),
    ),
    "MiniMax-M3": (
        {"swiglu_limit": 5.0, "swiglu_alpha": 1.5},
        lambda layer, gate, up: (
            gate.clamp(max=5.0) * (1.5 * gate.clamp(max=5.0)).sigmoid() * (up.clamp(-5.0, 5.0) + 1.0)
        ),
        interop.Gate("swiglu_oai", False, 5.0, 1.5),
    ),
    "Kimi-K3": (
        {"situ_beta": 4.0, "situ_linear_beta": 25.0},
        lambda layer, gate, up: bent(gate, layer.situ_beta) * gate.sigmoid() * bent(up, layer.situ_linear_beta),
        interop.Gate("situ", False, float("inf"), None, None, 25.0),
    ),
    "SiTU without a second bound": (
        {"situ_beta": 1.5},
        lambda layer, gate, up: bent(gate, layer.situ_beta) * gate.sigmoid() * up,
        interop.Gate("situ", False, float("inf"), None, 1.5),
    ),
    "squares": (
        {},
        lambda layer, gate, up: gate.relu().square() * up,
        interop.Gate("relu2", False, float("inf"), None),
    ),
}


@pytest.mark.parametrize("name", OTHER_GATES)
def test_gates_of_other_models_are_recognised(name):
    model, layer = experts_of("Mixtral")
    numbers, apply, gate = OTHER_GATES[name]
    for attribute, number in numbers.items():
        setattr(layer, attribute, number)
    layer._apply_gate = lambda rows: apply(layer, *rows.chunk(2, -1))
    assert interop.find_gate(layer) == gate
    torch.testing.assert_close(*by_both(model, layer))


@pytest.mark.parametrize(
    ("activation", "found"), [("relu2", "relu2"), ("silu", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh")]
)
def test_experts_without_gates_are_recognised(activation, found):
    """Those of Nemotron-H, which have one half."""
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

    sizes = {"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_latent_size": None, "hidden_size": 32}
    config = transformers.NemotronHConfig(**sizes, mlp_hidden_act=activation)
    config._experts_implementation = interop.NAME
    torch.manual_seed(0)
    layer = nemotron.NemotronHExperts(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert interop.find_gate(layer) == interop.Gate(f"{found}_no_mul", False, float("inf"), None)
    rows, ids, weights = routed()
    result = layer(rows, ids, weights)
    config._experts_implementation = "batched_mm"
    torch.testing.assert_close(result, layer(rows, ids, weights))


class Scaled(torch.nn.Module):
    """An activation with a tensor of its own, which is that of silu at first."""

    def __init__(self, kind):
        super().__init__()
        factor = torch.ones(1)
        self.factor = torch.nn.Parameter(factor) if kind == "parameter" else None if kind == "buffer" else factor
        if kind == "buffer":
            del self.factor
            self.register_buffer("factor", factor)

    def forward(self, gate):
        return torch.nn.functional.silu(gate) * self.factor


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_a_tensor_of_an_activation_may_change(kind):
    model, layer = experts_of("Mixtral")
    layer.act_fn = Scaled(kind)
    torch.testing.assert_close(*by_both(model, layer))
    with torch.no_grad():
        layer.act_fn.factor += 1
    torch.testing.assert_close(*by_both(model, layer))


class Other(torch.nn.Module):
    """An activation that is none of ours."""

    def forward(self, gate):
        return torch.relu(gate) ** 3


def assert_layer_agrees(model, layer, rows, ids, weights):
    own, found = ids < len(layer.down_proj), {}
    # Not every version's eager experts leave out the ids of other ranks.
    arguments = {"eager": (ids.where(own, 0), weights.where(own, 0)), interop.NAME: (ids, weights)}
    for implementation, given in arguments.items():
        model.set_experts_implementation(implementation)
        result = layer(rows, *given)
        found[implementation] = (
            result,
            *torch.autograd.grad(result.square().sum(), [rows, weights, *layer.parameters()]),
        )
    for got, wanted in zip(found[interop.NAME], found["eager"], strict=True):
        assert got.isfinite().all()
        assert error(got, wanted) <= 1e-5


@pytest.mark.parametrize("with_own_gate", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.slow
def test_ids_of_other_ranks_and_gates_of_its_own(with_own_gate, with_norm):
    model = make("Mixtral")
    layer = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    if with_own_gate:
        layer.act_fn = Other()
        assert interop.find_gate(layer) is None
    rows = torch.randn(9, 32, requires_grad=True)
    weights = torch.rand(9, 2, requires_grad=True)
    ids = torch.rand(9, 5).topk(2).indices  # 4 stands for an expert of another rank
    if with_norm:
        layer.has_post_expert_norm, layer.post_expert_norm = True, torch.nn.Identity()
    with simulator.running() if simulator.ENABLED else contextlib.nullcontext():
        assert_layer_agrees(model, layer, rows, ids, weights)


def experts_of(name):
    model = make(name)
    return model, next(module for module in model.modules() if hasattr(module, "_apply_gate"))


def routed(tokens=9, experts=4, top_k=2):
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return torch.randn(tokens, 32, generator=generator), ids, torch.rand(tokens, top_k, generator=generator)


def by_both(model, layer, ours=None):
    found = []
    for implementation, call in (("batched_mm", layer), (interop.NAME, layer if ours is None else ours)):
        model.set_experts_implementation(implementation)
        found.append(call(*routed()))
    return found


# What a module may have between its matrices that changes later, and one of ours that it is then.
CHANGES = {
    "another activation": lambda layer: setattr(layer, "act_fn", torch.nn.GELU()),
    "an option of it": lambda layer: setattr(layer.act_fn, "approximate", "tanh"),
    "an unknown one": lambda layer: setattr(layer, "act_fn", torch.nn.Tanh()),
    "a function": lambda layer: (delattr(layer, "act_fn"), setattr(layer, "act_fn", torch.nn.functional.silu)),
    "a gate of its own": lambda layer: setattr(layer, "_apply_gate", lambda rows: rows.chunk(2, -1)[1].tanh()),
    "a hook": lambda layer: layer.act_fn.register_forward_hook(lambda module, given, result: result * 2),
    "one that drops": lambda layer: setattr(
        layer, "act_fn", torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(1.0))
    ),
}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("begin", [torch.nn.GELU(), torch.nn.Tanh()])
def test_a_change_of_the_activation_is_noticed(name, begin):
    model, layer = experts_of("Mixtral")
    layer.act_fn = copy.deepcopy(begin)
    torch.testing.assert_close(*by_both(model, layer))
    CHANGES[name](layer)
    torch.testing.assert_close(*by_both(model, layer))


def test_a_change_of_mode_limit_or_configuration_is_noticed():
    model, layer = experts_of("GptOss")
    torch.testing.assert_close(*by_both(model, layer))
    layer.limit, layer.alpha = 0.5, 1.25
    torch.testing.assert_close(*by_both(model, layer))
    model, layer = experts_of("Mixtral")
    layer.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(1.0)).eval()
    torch.testing.assert_close(*by_both(model, layer))
    layer.train()
    torch.testing.assert_close(*by_both(model, layer))
    model, layer = experts_of("Mixtral")
    layer.config.swiglu_limit = 0.25
    layer._apply_gate = lambda rows: layer.act_fn(rows[:, :48].clamp(max=layer.config.swiglu_limit)) * rows[:, 48:]
    torch.testing.assert_close(*by_both(model, layer))
    layer.config.swiglu_limit = 100.0
    torch.testing.assert_close(*by_both(model, layer))


def test_the_search_leaves_the_callers_generator_alone():
    _, layer = experts_of("Mixtral")
    layer.act_fn = torch.nn.RReLU()
    state = torch.random.get_rng_state()
    assert interop.find_gate(layer) is None
    assert torch.equal(torch.random.get_rng_state(), state)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "deterministic": lambda: torch.random.fork_rng(devices=[]),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("model", GATES)
def test_a_gate_is_found_whatever_the_callers_defaults_are(name, model):
    _, layer = experts_of(model)
    with DEFAULTS[name]():
        assert interop._gate_of(layer) == GATES[model]
    assert interop._gate_of(layer) == GATES[model]


@pytest.mark.parametrize("name", ["float64", "bfloat16", "meta"])
def test_a_model_runs_under_other_defaults(name):
    model = make("Mixtral")
    model.set_experts_implementation(interop.NAME)
    rows, ids, weights = routed()
    layer = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    with DEFAULTS[name]():
        found = layer(rows, ids, weights)
    assert torch.equal(found, layer(rows, ids, weights))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "Mixtral")]
)
def test_models_compile_whole_before_any_eager_call(name):
    model, given = make(name), torch.arange(12).reshape(2, 6) * 7 % 64
    wanted = model(input_ids=given).logits
    model.set_experts_implementation(interop.NAME)
    torch._dynamo.reset()
    backend = "aot_eager" if name == "Mixtral" else "eager"
    found = torch.compile(model, fullgraph=True, backend=backend)(input_ids=given).logits
    assert error(found, wanted) <= 1e-5
    found.sum().backward()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts_export_before_any_eager_call(name, strict):
    model, layer = experts_of(name)
    wanted = layer(*routed())
    model.set_experts_implementation(interop.NAME)
    exported = torch.export.export(layer, routed(), strict=strict)
    assert error(exported.module()(*routed()), wanted) <= 1e-5


@pytest.mark.sweep(10)
@pytest.mark.parametrize("name", [name for name in ACT2FN if name != "xielu"])
def test_every_activation_of_transformers(name):
    model, layer = experts_of("Mixtral")
    layer.act_fn = ACT2FN[name]
    wanted, found = by_both(model, layer)
    assert error(found, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["silu", "gelu_python", "quick_gelu", "laplace", "prelu"])
def test_activations_compile_before_any_eager_call(name):
    model, layer = experts_of("Mixtral")
    layer.act_fn = ACT2FN[name]
    torch._dynamo.reset()
    wanted, found = by_both(model, layer, torch.compile(layer, fullgraph=True, backend="eager"))
    assert error(found, wanted) <= 1e-5


def test_a_compiled_model_follows_a_change_of_its_activation():
    model, layer = experts_of("Mixtral")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for change in (
        lambda: None,
        *(functools.partial(CHANGES[name], layer) for name in ("another activation", "an option of it")),
    ):
        change()
        torch.testing.assert_close(*by_both(model, layer, compiled))


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.6.9", "5.6.0.dev0"])
def test_releases_that_know_no_implementation_of_others_are_refused(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # which imports of models may replace
    with pytest.raises(ImportError, match=f"^`transformers` must be at least 5.7, got {re.escape(version)}$"):
        interop.register("refused")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "refused" not in ALL_EXPERTS_FUNCTIONS.valid_keys()


@pytest.mark.parametrize("version", ["5.7.0", "5.7.0.dev0", "5.10.0", "6.0"])
def test_later_releases_are_taken(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # which imports of models may replace
    interop.register()


def test_the_oldest_release_is_the_declared_one():
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"transformers>={".".join(map(str, interop.OLDEST))}"' in declared


def test_a_name_of_ones_own():
    interop.register("another_name")
    make("Mixtral").set_experts_implementation("another_name")
    with pytest.raises(ValueError, match="is not supported"):
        make("Mixtral").set_experts_implementation("never_registered")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_agree_on_the_gpu(name):
    assert_agrees(make(name, device="cuda"), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_agrees_on_the_gpu(name):
    """Where eager in bfloat16 is from float32, ours is as near, by the tolerance table."""
    exact, exact_gradients = logits_and_gradients(make(name, device="cuda"), "eager")
    model = make(name, torch.bfloat16, "cuda")
    wanted, wanted_gradients = logits_and_gradients(model, "eager")
    got, gradients = logits_and_gradients(model, interop.NAME)
    slack = testing.TOLERANCES[torch.bfloat16][0]
    assert error(got, exact) <= error(wanted, exact) + slack
    for name, gradient in exact_gradients.items():
        if gradient is not None and gradient.any():
            assert error(gradients[name], gradient) <= 2 * error(wanted_gradients[name], gradient) + slack, name
