"""A recorder on a model in one line: what it counts is what the model chose, however the model runs."""

import contextlib
import copy
import importlib
import inspect
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import numba_moe
from numba_moe.block import Router
from numba_moe.device import simulator
from numba_moe.recorder import ExpertDistributionRecorder, attach, attached
from numba_moe.recorder.choosing import as_ids, find_layers, is_given_experts
from numba_moe.tiny import Settings, TinyModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning"),  # of transformers
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # of inductor
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # of torch's compiler
]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configurations; nothing is fetched

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
DEEPSEEK = {
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
}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8}
# The class, its configuration, and what a recorder reads off it: layers, experts, top_k.
MODELS = {
    "tiny": (None, {}, (2, 6, 2)),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, (2, 4, 2)),
    "Qwen3Moe": ("Qwen3Moe", QWEN, (2, 8, 3)),
    "Qwen3Moe with a dense layer": ("Qwen3Moe", {**QWEN, "num_hidden_layers": 3, "mlp_only_layers": [1]}, (2, 8, 3)),
    "Olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 4}, (2, 8, 4)),
    "DeepseekV3": ("DeepseekV3", DEEPSEEK, (1, 8, 3)),
    "GptOss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, (2, 4, 2)),
}
IDS = torch.arange(40).reshape(2, 20) * 7 % 64
FAST_OR_SLOW = [name if name == "tiny" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def make(name, device="cpu"):
    """Return a model, and what runs it."""
    kind, options, _ = MODELS[name]
    torch.manual_seed(0)
    if kind is None:
        model = TinyModel(Settings(layers=2, hidden=16, heads=2, experts=6, top_k=2, width=8, length=20))
    else:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.to(device)


def run(model, ids=IDS):
    """Return the logits of ids."""
    is_tiny = isinstance(getattr(model, "_orig_mod", model), TinyModel)
    return model(ids) if is_tiny else model(input_ids=ids, use_cache=False).logits


def chosen(model, call):
    """Return how often each layer chose each expert during a call, by hooks of torch's own: [L, E]."""
    counts = []

    def count(ids, into):
        into += np.bincount(ids.cpu().numpy().ravel(), minlength=len(into))

    hooks = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts") or isinstance(module, Router):
            counts.append(np.zeros(len(module.weight) if isinstance(module, Router) else module.num_experts, np.int64))
            if isinstance(module, Router):
                hook = module.register_forward_hook(lambda _, __, found, into=counts[-1]: count(found.topk_ids, into))
            else:
                hook = module.register_forward_pre_hook(lambda _, args, into=counts[-1]: count(args[1], into))
            hooks.append(hook)
    call()
    for hook in hooks:
        hook.remove()
    return np.stack(counts)


def counted(recorder, call):
    """Return the counts of each pass that a call records, [N, L, E]."""
    with recorder.recording():
        call()
    return recorder.dump_record("object").logical_count


def assert_nothing_in(recorder):
    with pytest.warns(RuntimeWarning, match="nothing to dump"):
        assert recorder.dump_record() is None


def compiled(model, **options):
    torch.compiler.reset()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("grouped_mm")  # transformers' own loop over experts asks what data say
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_eagerly(name):
    model = make(name)
    wanted = chosen(model, lambda: run(model))
    recorder = attach(model, mode="per_pass")
    assert (recorder.num_layers, recorder.num_experts, recorder._top_k) == MODELS[name][2]
    assert wanted.sum(axis=1).tolist() == [IDS.numel() * recorder._top_k] * recorder.num_layers
    assert np.array_equal(counted(recorder, lambda: run(model)), wanted[None])
    with torch.inference_mode():
        assert np.array_equal(counted(recorder, lambda: [run(model), run(model)]), [wanted, wanted])
    recorder.detach()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.sweep(3)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tiny"])
def test_what_checkpointing_computes_anew_counts_once(name, use_reentrant):
    model = make(name).train()
    wanted = chosen(model, lambda: run(model))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert not np.array_equal(chosen(model, lambda: run(model).sum().backward()), wanted)  # it is computed anew
    recorder = attach(model, mode="per_pass")
    assert np.array_equal(counted(recorder, lambda: run(model).sum().backward()), wanted[None])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_of_blocks_computes_anew_counts_once(use_reentrant):
    model = make("tiny")
    layers = model.layers
    rows = torch.randn(2, 20, 16, requires_grad=True)

    def passes():
        checkpoint(layers, rows, use_reentrant=use_reentrant).sum().backward()

    wanted = chosen(layers, lambda: layers(rows))
    recorder = attach(layers, mode="per_pass")  # the model is what is computed anew
    assert np.array_equal(counted(recorder, lambda: [passes(), passes()]), [wanted, wanted])


@pytest.mark.parametrize("name", FAST_OR_SLOW)
def test_every_model_compiled(name):
    model = make(name)
    wanted = chosen(model, lambda: run(model))
    recorder = attach(model, mode="per_pass")
    fast = compiled(model, backend="eager" if name == "tiny" else "aot_eager")
    assert np.array_equal(counted(recorder, lambda: [run(fast), run(fast)]), [wanted, wanted])
    with torch.inference_mode():
        assert np.array_equal(counted(recorder, lambda: run(fast)), wanted[None])
    run(fast)
    assert_nothing_in(recorder)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_compiled_with_checkpoints(name):
    model = make(name).train()
    wanted = chosen(model, lambda: run(model))
    if name != "tiny":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    recorder = attach(model, mode="per_pass")
    fast = compiled(model, backend="inductor" if name == "tiny" else "aot_eager")
    assert np.array_equal(counted(recorder, lambda: run(fast).sum().backward()), wanted[None])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_every_mode_with_inductor(mode):
    model = make("tiny")
    wanted = chosen(model, lambda: run(model))
    recorder = attach(model, mode=mode)
    fast = compiled(model, backend="inductor")
    with recorder.recording():
        for call in (fast, model, fast):
            run(call)
    found = recorder.dump_record("object")
    assert np.array_equal(found.logical_count, [wanted] * 3)
    if mode == "per_token":
        assert found.num_tokens.tolist() == [40] * 3
        assert np.array_equal(found.topk_ids[:40], found.topk_ids[40:80])
        weights = found.topk_weights.reshape(3, 40, 2, 2)
        assert np.array_equal(weights[0], weights[2])
        assert np.allclose(weights[0], weights[1], atol=1e-6)  # inductor rounds in other places
        assert np.allclose(found.topk_weights.sum(axis=2), 1, atol=1e-6)


@pytest.mark.slow
def test_a_model_that_was_compiled_before():
    model = make("tiny")
    fast = compiled(model, backend="eager")
    wanted = chosen(model, lambda: run(model))
    run(fast)
    recorder = attach(fast, mode="per_pass")  # what torch.compile returns serves as well
    assert np.array_equal(counted(recorder, lambda: run(fast)), wanted[None])
    recorder.detach()
    recorder.start_record()
    run(fast)
    assert_nothing_in(recorder)
    recorder.stop_record()
    recorder.attach(model)
    assert np.array_equal(counted(recorder, lambda: run(fast)), wanted[None])


def test_layers_that_are_compiled_one_by_one_share_their_code():
    torch.compiler.reset()
    blocks = [numba_moe.MoEBlock(8, 4, num_experts=4, top_k=2) for _ in range(12)]  # more than torch compiles anew
    model = torch.nn.Sequential(*blocks)
    rows = torch.randn(3, 8)
    wanted = chosen(model, lambda: model(rows))
    recorder = attach(model, mode="per_pass")
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    assert np.array_equal(counted(recorder, lambda: [model(rows), model(rows)]), [wanted, wanted])


class Picking(torch.nn.Module):
    """Takes some of its rows, and fails if there are not so many."""

    def __init__(self):
        super().__init__()
        self.block = numba_moe.MoEBlock(8, 4, num_experts=4, top_k=2)

    def forward(self, rows, picked):
        return self.block(rows[picked])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_forward_that_fails_ends_its_pass(is_compiled):
    model = Picking()
    recorder = attach(model, mode="per_pass")
    call = compiled(model) if is_compiled else model
    rows, good, wrong = torch.randn(4, 8), torch.tensor([0, 3]), torch.tensor([0, 9])
    with recorder.recording():
        for picked in (good, wrong, wrong, good):
            with contextlib.suppress(IndexError, RuntimeError):
                call(rows, picked)
        model(rows, good)
    found = recorder.dump_record("object")
    assert found.forward_pass_id.tolist() == [0, 1, 2, 3, 4]
    assert found.logical_count.sum(axis=(1, 2)).tolist() == [4, 0, 0, 4, 4]


def test_passes_are_those_of_the_outermost_forward_or_of_the_caller():
    model = make("Mixtral")
    recorder = attach(model, mode="per_pass")
    with recorder.recording():
        run(model)
        run(model)
        model.model(input_ids=IDS)  # all layers are in here
        with recorder.with_forward_pass(77):
            run(model)
            run(model)
        model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False)
    found = recorder.dump_record("object")
    assert found.forward_pass_id.tolist() == [0, 1, 2, 77, 3, 4, 5]
    assert found.logical_count.sum(axis=(1, 2)).tolist() == [160, 160, 160, 320, 16, 4, 4]


def test_subsets_keep_their_numbers():
    model = make("Qwen3Moe")
    wanted = chosen(model, lambda: run(model))
    recorder = attach(model, mode="per_token", layers=[1], experts=[7, 0, 2])
    with recorder.recording():
        run(model)
    found = recorder.dump_record("object")
    of_subset = np.zeros_like(wanted)
    of_subset[1, [0, 2, 7]] = wanted[1, [0, 2, 7]]
    assert np.array_equal(found.logical_count, of_subset[None])
    assert set(np.unique(found.topk_ids[:, 0])) == {-1}
    assert set(np.unique(found.topk_ids[:, 1])) == {-1, 0, 2, 7}


class Gate(torch.nn.Module):
    """Returns what somebody's own gate does."""

    def __init__(self, dtype, shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 8))
        self.dtype, self.shape = dtype, shape

    def forward(self, rows):
        scores = (rows @ self.weight.T).softmax(-1)
        weights, ids = scores.topk(2, -1)
        return scores, weights, ids.to(self.dtype).reshape(*self.shape, 2)


class OwnLayer(torch.nn.Module):
    """Has a gate of somebody's own."""

    def __init__(self, *kind):
        super().__init__()
        self.gate = Gate(*kind)

    def forward(self, rows):
        _, weights, ids = self.gate(rows)
        return rows * weights.sum(-1, keepdim=True) + ids.reshape(len(rows), 2).sum(-1, keepdim=True)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape", "pattern"),
    [
        (torch.int64, (6,), "*.gate"),
        (torch.int64, (2, 3), re.compile(r"\d+\.gate")),
        (torch.int32, (6,), "?.gate"),
        (torch.int16, (2, 3), "*.gate"),
        (torch.uint8, (6,), "*.gate"),
    ],
)
def test_a_name_pattern(dtype, shape, pattern, is_compiled):
    torch.manual_seed(0)
    model = torch.nn.Sequential(OwnLayer(dtype, shape), torch.nn.Linear(8, 8), OwnLayer(dtype, shape))
    rows = torch.randn(6, 8)
    seen = []
    hooks = [model[i].gate.register_forward_hook(lambda _, __, found: seen.append(found[2])) for i in (0, 2)]
    model(rows)
    for hook in hooks:
        hook.remove()
    recorder = attach(model, mode="per_token", pattern=pattern)
    assert (recorder.num_layers, recorder.num_experts) == (2, 5)
    call = compiled(model, backend="eager") if is_compiled else model
    with recorder.recording():
        call(rows)
    found = recorder.dump_record("object")
    for layer, ids in enumerate(seen):
        assert found.topk_ids[:, layer].tolist() == ids.reshape(6, 2).tolist()
    assert found.topk_weights is None or found.topk_weights.shape == (6, 2, 2)


def test_ids_that_are_read_by_hand():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 5) if i % 2 else torch.nn.Linear(5, 8) for i in range(4)))
    recorder = attach(
        model, pattern="[13]", num_experts=5, ids=lambda gate, args, kwargs, result: result.topk(2).indices
    )
    rows = torch.randn(6, 5)
    wanted = [np.bincount(part.topk(2).indices.ravel(), minlength=5) for part in (model[:2](rows), model[:4](rows))]
    assert np.array_equal(counted(recorder, lambda: model(rows)), [wanted])


def test_one_hot_rows_are_ids():
    rows = torch.tensor([[[0, 1, 0]], [[0, 0, 0]], [[1, 0, 0]]])
    assert as_ids(rows, 3, 1).tolist() == [[1], [-1], [0]]
    assert as_ids(torch.tensor([2, 0], dtype=torch.uint8), 3, 1).tolist() == [[2], [0]]


@pytest.mark.slow
def test_experts_of_every_model_of_transformers_are_found():
    transformers = pytest.importorskip("transformers")
    found = 0
    for path in sorted(Path(transformers.__path__[0]).glob("models/*/modeling_*.py")):
        if "use_experts_implementation" not in path.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and hasattr(kind, "_apply_gate"):
                experts = kind.__new__(kind)
                torch.nn.Module.__init__(experts)
                experts.num_experts = 4
                assert is_given_experts(experts), kind
                found += 1
    assert found > 50


def test_a_switch_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    torch.manual_seed(0)
    model = transformers.SwitchTransformersModel(config).eval()
    seen = []
    names = [name for name, module in model.named_modules() if name.endswith("router")]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, __, found: seen.append(found[0]))
    recorder = attach(model, mode="stat")
    assert recorder.num_layers == len(names)
    found = counted(recorder, lambda: model(input_ids=IDS, decoder_input_ids=IDS[:, :5]))
    assert np.array_equal(found, [[part.sum((0, 1)).tolist() for part in seen]])


def test_a_llama_4():
    """Its router returns scores and logits, and its experts are given rows alone; the page says how to read them."""
    transformers = pytest.importorskip("transformers")
    sizes = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 16, "head_dim": 8}
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, interleave_moe_layer_step=2)).eval()
    recorder = attach(
        model,
        pattern="*.router",
        ids=lambda router, args, kwargs, result: result[1].topk(router.top_k).indices,
    )
    assert (recorder.num_layers, recorder.num_experts) == (1, 4)
    seen = []
    [name] = [name for name, _ in model.named_modules() if name.endswith(".router")]
    model.get_submodule(name).register_forward_hook(lambda _, __, found: seen.append(found[0] > 0))
    found = counted(recorder, lambda: model(input_ids=IDS))
    assert np.array_equal(found, [[seen[0].sum(0).tolist()]])  # scores of the others are 0


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["tiny", "Mixtral"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_model_has_a_recorder_of_its_own_that_is_empty_and_off(way, name):
    model = make(name)
    wanted = chosen(model, lambda: run(model))
    recorder = attach(model, mode="per_pass", layers=[1])
    wanted[0] = 0
    recorder.start_record()
    run(model)
    other = COPIES[way](model)
    assert attached(model) == [recorder]
    [own] = attached(other)
    assert own is not recorder
    assert not own.recording
    assert np.array_equal(counted(own, lambda: run(other)), wanted[None])
    assert np.array_equal(recorder.dump_record("object").logical_count, wanted[None])
    own.detach()
    assert attached(other) == []
    assert attached(model) == [recorder]
    part = COPIES[way](model.layers[1] if name == "tiny" else model.model.layers[1])
    assert len(pickle.dumps(part)) < len(pickle.dumps(model)) / 1.5  # it does not take the model along


def test_a_copy_of_a_recorder():
    recorder = ExpertDistributionRecorder(
        2, 4, mode="per_token", top_k=3, buffer_size=7, device="cpu", physical_to_logical_map=[[0, 1, 2, 3, 0, -1]] * 2
    )
    recorder.start_record()
    for other in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert other._settings().keys() == recorder._settings().keys()
        assert str(other._settings()) == str(recorder._settings())
        assert not other.recording


def test_two_recorders_are_independent():
    model = make("tiny")
    wanted = chosen(model, lambda: run(model))
    one, other = attach(model), attach(model, mode="per_token")
    assert set(map(id, attached(model))) == {id(one), id(other)}
    assert np.array_equal(counted(one, lambda: run(model)), wanted[None])
    assert np.array_equal(counted(other, lambda: run(model)), wanted[None])
    one.detach()  # the other's forwards are around those of this one
    assert attached(model) == [other]
    assert np.array_equal(counted(other, lambda: run(model)), wanted[None])
    other.detach()
    assert attached(model) == []
    assert not any("forward" in vars(module) for module in model.modules())


def test_transforms_of_torch_func():
    model = torch.nn.Sequential(*(numba_moe.MoEBlock(8, 4, num_experts=4, top_k=2) for _ in range(2)))
    rows = torch.randn(3, 5, 8)
    wanted = chosen(model, lambda: model(rows))
    recorder = attach(model)
    weights = dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, (rows,)).sum()

    assert np.array_equal(counted(recorder, lambda: torch.func.grad(loss)(weights)), wanted[None])
    assert np.array_equal(counted(recorder, lambda: torch.vmap(model)(rows)), wanted[None])


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_counts(strict):
    model = torch.nn.Sequential(*(numba_moe.MoEBlock(8, 4, num_experts=4, top_k=2) for _ in range(2)))
    rows = torch.randn(5, 8)
    wanted = chosen(model, lambda: model(rows))
    recorder = attach(model)
    program = torch.export.export(model, (rows,), strict=strict).module()
    assert np.array_equal(counted(recorder, lambda: program(rows)), wanted[None])


def test_signatures_stay():
    model = make("Mixtral")
    before = inspect.signature(model.forward)
    attach(model)
    assert inspect.signature(model.forward) == before


BLOCK = numba_moe.MoEBlock(8, 4, num_experts=4, top_k=2)
WRONG = {
    "dense": (lambda: attach(torch.nn.Linear(2, 2)), ValueError, "`model` must be of modules that choose experts"),
    "no such name": (
        lambda: attach(BLOCK, pattern="*.gate"),
        ValueError,
        "`model` must be one with modules that match '*.gate'",
    ),
    "a model": (lambda: attach(3), TypeError, "`model` must be a Module, got int"),
    "a kind of pattern": (lambda: attach(BLOCK, pattern=3), TypeError, "`pattern` must be a str, a regular expression"),
    "a kind of ids": (lambda: attach(BLOCK, ids=3), TypeError, "`ids` must be a function of a module and its call"),
    "layers": (lambda: attach(BLOCK, layers=[1]), ValueError, "`layers` must be"),
    "no layer": (lambda: attach(BLOCK, layers=[]), ValueError, "`layers` must be one number or more"),
    "experts": (lambda: attach(BLOCK, experts=[-1]), ValueError, "`experts` must be"),
    "a kind of expert": (lambda: attach(BLOCK, experts=[0.5]), TypeError, "`experts` must be"),
    "mode": (lambda: attach(BLOCK, mode="all"), ValueError, "`mode` must be"),
    "stat_approx": (lambda: attach(BLOCK, mode="stat_approx"), RuntimeError, "stat_approx"),
    "option": (lambda: attach(BLOCK, size=3), TypeError, "size"),
    "no size": (lambda: attach(torch.nn.ReLU(), pattern="*"), ValueError, "`num_experts` must be given"),
    "sizes": (
        lambda: ExpertDistributionRecorder(2, 4, mode="stat", device="cpu").attach(BLOCK),
        ValueError,
        "`model` must be of num_layers = 2",
    ),
    "fewer experts": (
        lambda: ExpertDistributionRecorder(1, 3, mode="stat", device="cpu").attach(BLOCK),
        ValueError,
        "`model` must be of num_experts = 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_attached(name):
    call, error, text = WRONG[name]
    with pytest.raises(error, match=re.escape(text)):
        call()
    assert attached(BLOCK) == []


def test_modules_without_ids_say_so():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    attach(model, pattern="0")
    with pytest.raises(TypeError, match="`pattern` must be of modules that return or are given ids of experts, got 0"):
        model(torch.randn(2, 8))


@pytest.mark.parametrize("found", [None, [[0, 1]], torch.tensor([[0.5]]), (torch.tensor([[0]]), None, None)], ids=repr)
def test_what_a_function_reads_is_ids(found):
    recorder = attach(model := make("tiny"), ids=lambda *_: found)
    with recorder.recording(), pytest.raises(TypeError, match="`ids` must return a tensor of integers, or that and"):
        model(torch.zeros((1, 4), dtype=torch.int64))
    assert not recorder.in_pass
    recorder.detach()


def test_a_recorder_is_attached_once():
    recorder = attach(make("tiny"))
    with pytest.raises(RuntimeError, match="`attach` must come after `detach`"):
        recorder.attach(BLOCK)
    recorder.detach()
    recorder.detach()


def test_without_a_mode_a_model_stays_as_it_is():
    model = make("tiny")
    attach(model, mode=None)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_of_unlike_sizes():
    model = torch.nn.Sequential(BLOCK, numba_moe.MoEBlock(8, 4, num_experts=6, top_k=3))
    rows = torch.randn(5, 8)
    assert [(layer.num_experts, layer.top_k) for layer in find_layers(model)] == [(4, 2), (6, 3)]
    recorder = attach(model, mode="per_token")
    with recorder.recording():
        model(rows)
    found = recorder.dump_record("object")
    assert found.topk_ids.shape == (5, 2, 3)
    assert found.logical_count.sum(axis=2).tolist() == [[10, 15]]
    recorder.detach()


@pytest.mark.gpu
@pytest.mark.skipif(simulator.ENABLED, reason="graphs are of a device")
@pytest.mark.parametrize("mode", ["stat", "per_token"])
@pytest.mark.parametrize("name", ["tiny", "Mixtral"])
def test_cuda_graphs(name, mode):
    """Captured by hand, whose replays no module sees, and by torch's compiler, between whose graphs passes begin."""
    model = make(name, "cuda").eval()
    if name != "tiny":
        model.set_experts_implementation("grouped_mm")
    ids = IDS.cuda()
    with torch.no_grad():
        wanted = chosen(model, lambda: run(model, ids))
        recorder = attach(model, mode=mode)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run(model, ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(model, ids)
        with recorder.recording():
            for number in range(3):
                with recorder.with_forward_pass(number):
                    graph.replay()
        assert np.array_equal(recorder.dump_record("object").logical_count, [wanted] * 3)
        fast = compiled(model, backend="inductor", mode="reduce-overhead")
        for _ in range(3):
            run(fast, ids)
        assert np.array_equal(counted(recorder, lambda: [run(fast, ids) for _ in range(3)]), [wanted] * 3)
