"""Calls of vLLM's and SGLang's own callers of what our patches replace, each with small random arguments.

What those callers do beside is left out: matrix products, quantisation and activations do nothing here.
"""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peer_imports import DEVICE, OnDevice, Stub

TOKENS, EXPERTS, TOP_K, HIDDEN, BLOCK = 12, 128, 6, 64, 16
MOE = "vllm.model_executor.layers.fused_moe"
RUNNER = "sglang.srt.layers.moe"
Route = Callable[[], None]
ROUTES: dict[str, list[Route]] = {"vllm": [], "sglang": []}


def route(peer: str) -> Callable[[Route], Route]:
    """Add a function that calls callers of a peer's."""

    def add(function: Route) -> Route:
        ROUTES[peer].append(function)
        return function

    return add


class NotThereError(Exception):
    """A release lacks a caller, as earlier ones may."""


def module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotThereError(f"{name}, {error}") from error


def of(where: str, name: str) -> Any:
    if not hasattr(module(where), name):
        raise NotThereError(f"{where}.{name}")
    return getattr(module(where), name)


def given_to(function: Any, **arguments: Any) -> Any:
    """Call a function with those of the arguments that it knows, as releases differ, and None for what it needs."""
    parameters = inspect.signature(function).parameters
    needed = {name for name, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
    known = {name: value for name, value in arguments.items() if name in parameters}
    return function(**{**dict.fromkeys(sorted(needed), None), **known})


def anything(**given: Any) -> Any:
    """Return an object with these attributes; all others are stubs, which do nothing."""
    made = type("Anything", (), {"__getattr__": lambda self, name: Stub})()
    vars(made).update(given)
    return made


@contextlib.contextmanager
def instead(where: str, **names: Any) -> Iterator[None]:
    """Give a module other values of some of its names for a while."""
    found = module(where)
    before = {name: vars(found)[name] for name in names if name in vars(found)}
    vars(found).update(names)
    try:
        yield
    finally:
        for name in names:
            vars(found).pop(name, None)
        vars(found).update(before)


class EnoughError(Exception):
    """A caller has come as far as it should."""


@contextlib.contextmanager
def until(where: str, name: str) -> Iterator[None]:
    """Let callers run until they call a function of a module."""

    def stop(*_: Any, **__: Any) -> None:
        raise EnoughError

    with instead(where, **{name: stop}), contextlib.suppress(EnoughError):
        yield


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of what a caller does beside."""


def ids(tokens: int | None = None, experts: int = EXPERTS, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.rand(TOKENS if tokens is None else tokens, experts, device=DEVICE).topk(TOP_K).indices.to(dtype)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, -77, dtype=dtype, device=DEVICE)


def weights() -> torch.Tensor:
    return torch.rand(TOKENS, TOP_K, device=DEVICE)


def half_map() -> torch.Tensor:
    """Return a map that has the odd experts on this rank."""
    numbers = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE)
    return torch.where(numbers % 2 == 1, numbers // 2, -1)


def logits(experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    return floats(TOKENS, HIDDEN, dtype=torch.bfloat16), floats(TOKENS, experts)


GATED = ("hidden_states", "router_logits")
SIZES = {"top_k": TOP_K, "global_num_experts": EXPERTS}


# ---- vLLM -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def padding_of_vllm() -> Iterator[None]:
    """Say in vLLM's forward context that the last tokens are padding."""
    mask = torch.arange(TOKENS, device=DEVICE) >= TOKENS - 3
    with instead("vllm.forward_context", _forward_context=types.SimpleNamespace(is_padding=mask)):
        yield


@route("vllm")
def vllm_plain_gates() -> None:
    router = of(f"{MOE}.router.fused_topk_router", "FusedTopKRouter")
    for scoring, dtype in (("softmax", None), ("sigmoid", torch.int64), ("softmax", torch.uint32)):
        given_to(router, **SIZES, scoring_func=scoring)._compute_routing(*logits(), dtype)
    with padding_of_vllm():
        given_to(router, **SIZES, renormalize=False)._compute_routing(*logits(), torch.int32)


@route("vllm")
def vllm_gates_with_a_bias() -> None:
    router = of(f"{MOE}.router.fused_topk_bias_router", "FusedTopKBiasRouter")
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        rules = {"e_score_correction_bias": floats(EXPERTS) / 8, "scoring_func": scoring, "routed_scaling_factor": 2.5}
        made = given_to(router, **SIZES, **rules, renormalize=True)
        for context in (contextlib.nullcontext(), padding_of_vllm()):
            with context:
                made._compute_routing(*logits(), torch.int32)


@route("vllm")
def vllm_deepseek_v4() -> None:
    router = of(f"{MOE}.router.fused_topk_bias_router", "FusedTopKBiasRouter")
    common: dict[str, Any] = {"top_k": 6, "global_num_experts": 256, "renormalize": True}
    common |= {"routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus"}
    by_bias, table = {"e_score_correction_bias": floats(256) / 8}, {"hash_indices_table": ids(9, 256)}
    images = {"bias_vl": floats(256), "image_sentinel_lo": 3}
    tokens = torch.arange(TOKENS, device=DEVICE) % 9
    for rules in (by_bias, by_bias | images, table, table | images):
        made = given_to(router, **common, **rules)
        given_to(made._compute_routing, **dict(zip(GATED, logits(256), strict=True)), input_ids=tokens)


@route("vllm")
def vllm_groups() -> None:
    router = of(f"{MOE}.router.grouped_topk_router", "GroupedTopKRouter")
    layer = of(f"{MOE}.router.grouped_topk_router", "GroupedTopk")
    for scoring, bias in (("softmax", None), ("sigmoid", floats(EXPERTS) / 8)):
        rules: dict[str, Any] = {"scoring_func": scoring, "routed_scaling_factor": 2.5}
        groups: dict[str, Any] = {"num_expert_group": 8, "topk_group": 4, "e_score_correction_bias": bias}
        given_to(router, **SIZES, **groups, **rules, renormalize=True)._compute_routing(*logits(), torch.int32)
        made = anything(native_impl=of(f"{MOE}.router.grouped_topk_router", "grouped_topk"), topk=TOP_K, **rules)
        vars(made).update(renormalize=True, num_expert_group=8, topk_group=4)
        layer.forward_native(made, *logits(), bias)
    of(f"{MOE}.router.grouped_topk_router", "fused_grouped_topk")(*logits(), TOP_K, True, bias, 8, 4, "sigmoid", 2.5)


@route("vllm")
def vllm_balancer() -> None:
    base = of(f"{MOE}.router.base_router", "BaseRouter")
    places = torch.randperm(2 * EXPERTS, device=DEVICE).view(EXPERTS, 2)
    state = types.SimpleNamespace(
        expert_load_view=torch.zeros(2 * EXPERTS, dtype=torch.int32, device=DEVICE),
        logical_to_physical_map=places,
        logical_replica_count=torch.randint(1, 3, (EXPERTS,), device=DEVICE),
        should_record_tensor=torch.ones((), dtype=torch.bool, device=DEVICE),
        num_unpadded_tokens_tensors=[torch.tensor(TOKENS - 3, dtype=torch.int32, device=DEVICE)],
    )
    for chosen in (ids(), ids(dtype=torch.int64)):
        base._apply_eplb_mapping(types.SimpleNamespace(eplb_state=state, enable_eplb=True), chosen)


@route("vllm")
def vllm_triton_experts() -> None:
    prepare = of(f"{MOE}.fused_moe", "_prepare_expert_assignment")
    config = {"BLOCK_SIZE_M": BLOCK}
    common: dict[str, Any] = {"use_int8_w8a16": False, "use_int4_w4a16": False, "block_shape": None}
    for expert_map in (None, half_map()):
        for skip in (True, False):
            prepare(ids(), config, TOKENS, TOP_K, EXPERTS, expert_map, **common, ignore_invalid_experts=skip)
    add = of(f"{MOE}.topk_weight_and_reduce", "TopKWeightAndReduceContiguous")()
    add.apply(None, floats(TOKENS * TOP_K, HIDDEN, dtype=torch.bfloat16), weights(), ids(), False)
    experts = of(f"{MOE}.experts.triton_moe", "TritonExperts")
    rows = floats(TOKENS, TOP_K, HIDDEN, dtype=torch.bfloat16)
    out = torch.full_like(rows[:, 0].contiguous(), torch.nan)
    experts.moe_sum(anything(), rows, out)
    with contextlib.suppress(TypeError):  # a release that sums all slots
        experts.moe_sum(anything(), rows, out, ids(), half_map())


@route("vllm")
def vllm_marlin_experts() -> None:
    counts = torch.randint(0, 9, (4,), dtype=torch.int32, device=DEVICE)
    kind = of("vllm.scalar_type", "scalar_types").uint4b8
    packed: dict[str, Any] = {"dtype": torch.int32, "device": DEVICE}
    w1, w2 = torch.empty(4, HIDDEN // 16, 256, **packed), torch.empty(4, 8, HIDDEN * 2, **packed)
    with instead(f"{MOE}.experts.marlin_moe", _fused_marlin_moe=lambda **given: given["hidden_states"]):
        rest = (w1, w2, None, None, floats(1), floats(1), kind.id)
        batched = of(f"{MOE}.experts.marlin_moe", "batched_fused_marlin_moe")
        batched(floats(4, 8, HIDDEN, dtype=torch.bfloat16), counts, *rest)


def scratch_of_vllm(local_experts: int) -> Any:
    """Return scratch for permutations, as its releases want to be asked for it."""
    sizes = {"num_experts": EXPERTS, "num_local_experts": local_experts, "device": torch.device(DEVICE)}
    more = {"max_num_tokens": TOKENS, "topk": TOP_K, "max_expanded_rows": TOKENS * TOP_K}
    return given_to(of(f"{MOE}.moe_permute_unpermute", "MoEPermuteScratch"), **sizes, **more)


@route("vllm")
def vllm_cutlass_experts() -> None:
    fp8: dict[str, Any] = {"dtype": torch.float8_e4m3fn}
    rows = floats(TOKENS, HIDDEN, **fp8)
    for expert_map, local in ((None, EXPERTS), (half_map(), EXPERTS // 2)):
        w1, w2 = floats(local, 64, HIDDEN, **fp8), floats(local, HIDDEN, 32, **fp8)
        space = [torch.empty(TOKENS * TOP_K * HIDDEN, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        space[1].normal_()
        given: dict[str, Any] = {
            "output": torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device=DEVICE),
            "hidden_states": rows,
            "w1": w1,
            "w2": w2,
            "topk_ids": ids(),
            "topk_weights": weights(),
            "global_num_experts": EXPERTS,
            "expert_map": expert_map,
            "w1_scale": floats(local, 1),
            "w2_scale": floats(local, 1),
            "a1q_scale": floats(TOKENS, 1),
            "a2_scale": None,
            "workspace13": space[0],
            "workspace2": space[1],
            "expert_num_tokens": None,
            "out_dtype": torch.bfloat16,
            "per_act_token": True,
            "per_out_ch": True,
            "use_batched_format": False,
        }
        run = of(f"{MOE}.experts.cutlass_moe", "run_cutlass_moe_fp8")
        known = run.__code__.co_varnames[: run.__code__.co_argcount]
        given |= {name: anything(is_gated=True) for name in known if name not in given}
        if "permute_scratch" in known:
            given["permute_scratch"] = scratch_of_vllm(local)
        quiet: dict[str, Any] = dict.fromkeys(
            ("cutlass_moe_mm", "get_cutlass_moe_mm_problem_sizes_from_expert_offsets"), nothing
        )
        quiet["scaled_fp8_quant"] = lambda *args, **options: (options["output"], None)
        with instead("vllm._custom_ops", **quiet), instead(run.__module__, apply_moe_activation=nothing):
            run(**{name: value for name, value in given.items() if name in known})
    of(f"{MOE}.experts.cutlass_moe", "_prepare_topk_ids_for_cutlass_fp4_moe")(ids(), half_map())


@route("vllm")
def vllm_gpt_oss_experts() -> None:
    experts = of(f"{MOE}.experts.gpt_oss_triton_kernels_moe", "OAITritonExperts")
    maker = anything(quant_config=None, _make_routing_data=lambda *args: (None, None, None))
    with instead(f"{MOE}.experts.gpt_oss_triton_kernels_moe", triton_kernel_fused_experts=nothing):
        tensors = (floats(TOKENS, HIDDEN), floats(TOKENS, HIDDEN), floats(64, 1), floats(64, 1))
        experts.apply(maker, *tensors, weights(), ids(), None, EXPERTS, half_map(), *[None] * 5, False)


def humming(where: str, kind: str) -> Any:
    """Return experts of vLLM's Humming kernels, which do nothing."""
    made = of(where, kind)
    own = {name: getattr(made, name) for name in ("prepare_humming_moe_kwargs",) if hasattr(made, name)}
    buffers = {"down_output": floats(TOKENS * TOP_K, HIDDEN, dtype=torch.bfloat16), "quanted_down_input": None}
    buffers |= {"activation_output": None, "output": floats(TOKENS, HIDDEN, dtype=torch.bfloat16)}
    buffers |= {"gate_up_output": None, "quanted_gate_up_input": floats(TOKENS * TOP_K, HIDDEN, dtype=torch.bfloat16)}
    tuned = [(0, 1 << 30, {"block_shape": (BLOCK, 1, 1)})]
    self = anything(num_experts=EXPERTS // 2, global_num_experts=EXPERTS, w13_tuning_config=tuned)
    vars(self).update(w2_tuning_config=[(0, 1 << 30, {"block_shape": (32, 1, 1)})], humming_forward=nothing)
    vars(self).update(estimate_local_valid_shape_m=lambda chosen: chosen.numel() // 2)
    vars(self).update(prepare_buffers=lambda *args: buffers, process_input=lambda *args, **given: (None, None, None))
    vars(self).update(_get_permute_scratch=lambda: scratch_of_vllm(EXPERTS // 2))
    vars(self).update({name: types.MethodType(method, self) for name, method in own.items()})
    vars(self).update(layer=anything(expert_map=half_map()))
    apply = types.MethodType(getattr(made, "main_apply", made.apply), self)  # the former in release 0.21
    return functools.partial(given_to, apply)


@route("vllm")
def vllm_humming_experts() -> None:
    rows, out = (floats(TOKENS, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    meta = anything(
        rank_expert_offset=EXPERTS // 2,
        psum_recv_per_rank=torch.tensor([3, TOKENS - 2], dtype=torch.int32, device=DEVICE),
    )
    local = ids(experts=EXPERTS // 2, dtype=torch.int64)
    rest: dict[str, Any] = {
        "output": out,
        "hidden_states": rows,
        "w1": None,
        "w2": None,
        "topk_weights": weights(),
        "activation": None,
        "global_num_experts": EXPERTS,
        "a2_scale": None,
        "workspace13": None,
        "workspace2": None,
        "apply_router_weight_on_input": False,
    }
    upper = torch.arange(-EXPERTS // 2, EXPERTS // 2, dtype=torch.int32, device=DEVICE).clamp(min=-1)
    where = f"{MOE}.experts.fused_humming_moe"
    where = where if importlib.util.find_spec(where) else f"{MOE}.fused_humming_moe"
    method = anything(may_quant_input=lambda **given: (None, None), forward_layer=nothing)  # before release 0.33
    holder = "vllm.utils.humming" if importlib.util.find_spec("vllm.utils.humming") else where
    with instead(where, num_compute_units=lambda index: 4), instead(holder, HummingMethod=method):
        for received, expert_map, tokens_meta in ((ids(), half_map(), None), (local, upper, meta)):
            given = {"topk_ids": received, "expert_map": expert_map, "expert_tokens_meta": tokens_meta}
            humming(where, "HummingIndexedExperts")(**rest, **given, a1q_scale=None)
        for scale in (None, floats(TOKENS, 4)):
            given = {"topk_ids": ids(), "expert_map": half_map(), "expert_tokens_meta": None}
            humming(where, "HummingGroupedExperts")(**rest, **given, a1q_scale=scale)


@route("vllm")
def vllm_deep_gemm_experts() -> None:
    permute = of(f"{MOE}.deep_gemm_utils", "deepgemm_moe_permute")
    rows = floats(TOKENS, 128, dtype=torch.float8_e4m3fn)
    names = {"get_mk_alignment_for_contiguous_layout": lambda *args: [128, 128], "ep_scatter": nothing}
    with instead(f"{MOE}.deep_gemm_utils", **names):
        permute(rows, floats(TOKENS, 1), ids(), EXPERTS, None, None)
        permute(rows, floats(TOKENS, 1), ids(), EXPERTS // 2, half_map(), None)


@route("vllm")
def vllm_adapters() -> None:
    wrapper = of("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU")
    mapping = torch.randint(-1, 2, (TOKENS,), dtype=torch.int32, device=DEVICE)
    names = torch.tensor([0, 1, -1], dtype=torch.int32, device=DEVICE)
    meta = types.SimpleNamespace(meta_args=lambda *args: (mapping, None, None, None, names, None, None))
    self = anything(token_mapping_meta=meta, lora_config=anything(specialize_active_lora=False))
    enabled = torch.ones(3, dtype=torch.int32, device=DEVICE)
    wrapper.moe_lora_align_block_size(self, ids(), TOKENS, BLOCK, EXPERTS, 2, enabled)
    with contextlib.suppress(TypeError):
        wrapper.moe_lora_align_block_size(self, ids(), TOKENS, BLOCK, EXPERTS, 2, enabled, half_map(), True)


# ---- SGLang ---------------------------------------------------------------------------------------------------------
KERNELS = "sglang.kernels.ops.moe"


@route("sglang")
def sglang_plain_gates() -> None:
    choose, bias = of(f"{RUNNER}.topk", "fused_topk"), floats(EXPERTS).bfloat16()
    choose(*logits(), TOP_K, True)
    choose(*logits(), TOP_K, False, None, "sigmoid")
    choose(*logits(), TOP_K, True, bias, "sigmoid", 2.5, True)
    with instead(f"{RUNNER}.topk", _is_cuda=False):
        choose(*logits(), TOP_K, True)
        with contextlib.suppress(NameError):  # imported where there is no CUDA alone
            choose(*logits(), TOP_K, True, bias.float(), "sigmoid", 2.5, True)


@route("sglang")
def sglang_gates_with_a_bias() -> None:
    topk = module(f"{RUNNER}.topk")
    bias, real = floats(EXPERTS) / 8, torch.tensor([TOKENS - 3], dtype=torch.int32, device=DEVICE)
    impl = topk.biased_topk_jit_kernel_impl
    takes_16_bits = "packed_out" in inspect.signature(impl).parameters
    for scoring, shared in (("sigmoid", 0), ("sqrtsoftplus", 0), ("sigmoid", 1)):
        packed = ints(TOKENS, TOP_K) if not shared else None
        options: dict[str, Any] = {"num_fused_shared_experts": shared, "routed_scaling_factor": 1.5}
        options |= {"num_token_non_padded": real, "packed_out": packed, "scoring_func": scoring, "topk": TOP_K}
        states, given = logits()
        options |= {
            "correction_bias": bias.bfloat16() if takes_16_bits else bias,
            "renormalize": True,
            "hidden_states": states,
        }
        given_to(impl, gating_output=given, **options)
    groups = topk.biased_grouped_topk_gpu
    with instead(f"{RUNNER}.topk", fused_topk_deepseek=None):
        groups(*logits(), bias, TOP_K, True, 8, 4, 0, 2.5, True)
        groups(*logits(), bias, TOP_K, True, 8, 4, 1, 2.5)
        groups(*logits(), bias, TOP_K, True, 1, 1, 0, 2.5)
        groups(*logits(384), floats(384), TOP_K, True, 1, 1, 0, 2.5)
        with instead(f"{RUNNER}.route_quant_handoff", try_route_quant_fused=nothing):
            states, given = logits(896)
            groups(states, given.bfloat16(), floats(896) / 8, 16, True, 1, 1, 0, 2.5, True)


@route("sglang")
def sglang_gates_of_flashinfer() -> None:
    groups = of(f"{RUNNER}.topk", "biased_grouped_topk_gpu")  # FlashInfer's if it is among the trees
    for shared in (0, 1):
        groups(*logits(), floats(EXPERTS) / 8, TOP_K + shared, True, 8, 4, shared, 2.5, True)
    groups(*logits(), floats(EXPERTS) / 8, TOP_K, True, 1, 1, 0, 2.5)


@route("sglang")
def sglang_grouped_gate_of_choice() -> None:
    flag = getattr(of("sglang.srt.environ", "envs"), "SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK", None)
    with contextlib.nullcontext() if flag is None else flag.override(True):
        of(f"{RUNNER}.topk", "biased_grouped_topk_gpu")(*logits(), floats(EXPERTS) / 8, TOP_K, True, 8, 4, 1, 2.5)


@route("sglang")
def sglang_padding() -> None:
    chosen = ids().as_subclass(OnDevice)
    mask = of(f"{RUNNER}.topk", "_mask_topk_ids_padded_region")
    mask(chosen, torch.tensor([TOKENS - 3], dtype=torch.int32, device=DEVICE))


@route("sglang")
def sglang_images() -> None:
    config = anything(top_k=TOP_K, num_shared_topk_slots=0, renormalize=True, routed_scaling_factor=1.5)
    vars(config).update(
        apply_routed_scaling_factor_on_output=False,
        runner_backend=anything(is_flashinfer_mxfp4=lambda: True),
    )
    real = torch.tensor([TOKENS - 3], dtype=torch.int32, device=DEVICE)
    moe = anything(
        topk=anything(routing_inputs=lambda: (real, None), topk_config=config),
        gate=anything(e_score_correction_bias=floats(EXPERTS) / 8, e_score_correction_bias_vl=floats(EXPERTS)),
        config=anything(image_token_id=5),
    )
    where = "sglang.srt.multimodal.dsv41.vl_routing"
    quiet: dict[str, Any] = {
        "_finish_vision_topk": lambda moe, logits, weights, indices, *args, **options: (weights, indices)
    }
    quiet |= {"get_moe_a2a_backend": lambda: anything(is_megamoe=lambda: False)}
    quiet |= {"routing_simulation_enabled": lambda: False}
    quiet |= {"transform_select_experts_inputs": lambda logits, bias, info: (logits, bias)}
    with instead(where, **quiet):
        of(where, "vision_topk")(moe, logits()[1], torch.arange(TOKENS, device=DEVICE) % 7)


@route("sglang")
def sglang_tables() -> None:
    hashed, where = of(f"{RUNNER}.hash_topk", "HashTopK"), f"{RUNNER}.hash_topk"
    self = anything(tid2eid=ids(9), routed_scaling_factor=1.5, score_func="sqrtsoftplus", layer_id=None)
    vars(self).update(apply_routed_scaling_factor_on_output=False, is_draft=False)
    quiet: dict[str, Any] = {"resolve_routing_inputs": lambda **given: (None, None)}
    for shared in (0, 1):
        vars(self).update(num_shared_topk_slots=shared, num_fused_shared_experts=shared)
        with instead(where, **quiet), until(where, "topk_ids_logical_to_physical"):
            hashed.forward(self, *logits(), torch.arange(TOKENS, device=DEVICE) % 9)


@route("sglang")
def sglang_gemma() -> None:
    made: dict[str, Any] = {}
    of(f"{KERNELS}.gemma4_routing", "gemma4_fused_routing")
    layer = of("sglang.srt.models.gemma4_causal", "Gemma4MoE")
    config = anything(num_experts=EXPERTS, top_k_experts=TOP_K, moe_intermediate_size=32)
    where = "sglang.srt.models.gemma4_causal"
    names = {"TopK": lambda **given: made.update(given) or anything(), "get_moe_impl_class": lambda quant: anything}
    names |= {"get_exec": lambda: anything(moe=anything(ep_num_redundant_experts=0)), "add_prefix": lambda *args: ""}
    with instead(where, **names):
        layer(HIDDEN, 0, config)
    states, given = logits()
    made["custom_routing_function"](states, given.as_subclass(OnDevice), TOP_K, True)


@route("sglang")
def sglang_alignment() -> None:
    align = of(f"{RUNNER}.moe_runner.triton_utils.moe_align_block_size", "moe_align_block_size")
    chosen, few = ids(40), ids(4)
    few[1, 2] = chosen[3, 1] = -1
    for given in (chosen, few):
        for option in ("", "return_inactive_prefix_count", "pad_expert_ids", "ignore_invalid_expert"):
            given_to(align, topk_ids=given, block_size=BLOCK, num_experts=EXPERTS, **({option: True} if option else {}))
    runner = of(f"{RUNNER}.moe_runner.humming", "HummingRunnerCore")
    tuned = {"w13_tuning_config": [(0, 1 << 30, {"block_shape": (BLOCK, 1, 1)})], "compute_config_str": ""}
    tuned |= {"w13_tuning_config_str": "", "w2_tuning_config_str": ""}
    self = anything(num_experts=EXPERTS, get_humming_gemm_configs=lambda kind: tuned)
    vars(self).update(estimate_local_valid_shape_m=lambda given: given.numel())
    with instead(f"{RUNNER}.moe_runner.humming", HummingGemmType=anything()):
        runner._prepare_indexed_gemm_kwargs(self, chosen)


@route("sglang")
def sglang_humming_sum() -> None:
    runner = of(f"{RUNNER}.moe_runner.humming", "HummingRunnerCore")
    buffers = {"down_output": floats(TOKENS * TOP_K, HIDDEN, dtype=torch.bfloat16), "gate_up_output": None}
    for total in (EXPERTS, 2 * EXPERTS):
        buffers |= {"activation_output": None, "output": floats(TOKENS, HIDDEN, dtype=torch.bfloat16)}
        self = anything(
            num_experts=EXPERTS, global_num_experts=total, prepare_buffers=lambda buffers=buffers, **given: buffers
        )
        vars(self).update(_prepare_indexed_gemm_kwargs=lambda chosen: ({}, {}), apply_activation=nothing)
        vars(self).update(config=anything(routed_scaling_factor=2.5))
        method = anything(may_quant_input=lambda **given: (None, None), forward_layer=nothing)
        chosen = ids()
        chosen[-1, 1] = -1 if total > EXPERTS else chosen[-1, 1]
        with instead(f"{RUNNER}.moe_runner.humming", HummingMethod=method, HummingGemmType=anything()):
            runner._run_indexed_gemm(self, floats(TOKENS, HIDDEN), weights(), chosen)


@route("sglang")
def sglang_marlin() -> None:
    where = f"{RUNNER}.fused_moe_triton.fused_marlin_moe"
    bits: dict[str, Any] = {"dtype": torch.int32, "device": DEVICE}
    w1, w2 = torch.empty(EXPERTS, HIDDEN // 16, 256, **bits), torch.empty(EXPERTS, 4, HIDDEN * 4, **bits)
    scale = floats(EXPERTS, 1, 1, dtype=torch.bfloat16)
    four_bits = torch.empty(EXPERTS, 4, HIDDEN * 2, **bits), scale.abs().to(torch.float8_e8m0fnu), {"num_bits": 4}
    quiet = {"moe_wna16_marlin_gemm": lambda rows, out, *rest, **options: out.normal_(), "silu_and_mul": nothing}
    with instead(where, **quiet):
        for tokens, (down, scales, more) in itertools.product((1, TOKENS), ((w2, scale, {}), four_bits)):
            states, gate = floats(tokens, HIDDEN, dtype=torch.bfloat16), floats(tokens, EXPERTS)
            space = {
                "workspace": torch.zeros(64, **bits),
                "routed_scaling_factor": None if tokens == 1 else 2.5,
                **more,
            }
            given = (states, w1, down, scales, scales, gate, weights()[:tokens], ids(tokens))
            of(where, "fused_marlin_moe")(*given, **space)


@route("sglang")
def sglang_sums() -> None:
    rows, out = floats(TOKENS, TOP_K, HIDDEN, dtype=torch.bfloat16), floats(TOKENS, HIDDEN, dtype=torch.bfloat16)
    of(f"{RUNNER}.paged_experts.runners", "MarlinContract")._sum_top_k(anything(), rows, out, 2.5)
    where = f"{RUNNER}.moe_runner.triton_utils.fused_moe"
    for few in (False, True):
        with instead(where, _use_moe_sum_reduce_torch_compile=lambda tokens, few=few: few):
            of(where, "moe_combine_topk")(rows, out, 2.5)


@route("sglang")
def sglang_gguf() -> None:
    where = "sglang.srt.layers.quantization.gguf"
    quiet: dict[str, Any] = {"MMVQ_QUANT_TYPES": {1}, "MMQ_QUANT_TYPES": set(), "apply_gguf_moe_weights": nothing}
    quiet |= {"ggml_moe_a8_vec": lambda rows, *rest: floats(TOKENS * TOP_K, HIDDEN, dtype=torch.bfloat16)}
    with instead(where, **quiet, silu_and_mul=lambda rows: rows):
        states, matrices = floats(TOKENS, HIDDEN, dtype=torch.bfloat16), floats(EXPERTS, HIDDEN, 1)
        of(where, "fused_moe_gguf")(states, matrices, matrices, weights(), ids(), 1, 1, "silu")


@route("sglang")
def sglang_cutlass() -> None:
    offsets, sizes1, sizes2 = ints(EXPERTS + 1), ints(EXPERTS, 3), ints(EXPERTS, 3)
    written = {"expert_offsets": offsets, "problem_sizes1": sizes1, "problem_sizes2": sizes2}
    common = {"a": floats(TOKENS, 128, dtype=torch.bfloat16), "topk_weights": weights(), "topk_ids": ids(), **written}
    fp8: dict[str, Any] = {"dtype": torch.float8_e4m3fn}
    scales, rows = floats(EXPERTS, 1, 1), torch.empty(EXPERTS, 1, device=DEVICE)
    strides = {f"{name}_strides{number}": rows for name in "abc" for number in (1, 2)}
    given = {"w1_q": floats(EXPERTS, 128, 128, **fp8), "w2_q": floats(EXPERTS, 64, 128, **fp8)}
    run, where = of(f"{RUNNER}.cutlass_moe", "cutlass_fused_experts_fp8"), "quantization.fp8_kernel"
    is_new = importlib.util.find_spec("sglang.kernels")
    where = f"sglang.kernels.ops.{where}" if is_new else f"sglang.srt.layers.{where}"
    with until(where, "sglang_per_token_group_quant_fp8"):
        given_to(run, **common, **given, w1_scale=scales, w2_scale=scales, **strides)
    if not is_new:
        return  # the other one makes its maps itself
    packed: dict[str, Any] = {"dtype": torch.int8, "device": DEVICE}
    given = {"w1_q": torch.empty(EXPERTS, 128, 64, **packed), "w2_q": torch.empty(EXPERTS, 128, 32, **packed)}
    run, a1 = of(f"{RUNNER}.cutlass_w4a8_moe", "cutlass_w4a8_moe"), torch.ones(1, device=DEVICE)
    with until(run.__module__, "pre_reorder_for_cutlass_moe"):
        given_to(run, **common, **given, w1_scale=scales, w2_scale=scales, **strides, a1_scale=a1)
