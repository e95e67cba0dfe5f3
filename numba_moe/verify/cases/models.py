"""Calls shaped like published models, and the routing of a model that was trained."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numba_moe.verify import testing
from numba_moe.verify.cases.draws import (
    DISPATCH,
    DTYPES,
    Case,
    activation_case,
    counts,
    dispatch_case,
    experts_case,
    floats,
    given,
    ids,
    lora_case,
    permute_case,
    recording_case,
    sum_case,
    unpermute_case,
)


class Model(NamedTuple):
    """Routing dimensions of a published model, from the configuration it is published with."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    groups: tuple[int, int] | None = None


MODELS = (
    Model("Mixtral-8x7B", 8, 2, 4096),
    Model("OLMoE", 64, 8, 2048),
    Model("Qwen3-30B-A3B", 128, 8, 2048),
    Model("gpt-oss-120b", 128, 4, 2880),
    Model("DeepSeek-V3", 256, 8, 7168, (8, 4)),
    Model("Kimi-K2", 384, 8, 7168),
)


class Router(NamedTuple):
    """How a published model chooses experts, where that is all that is new about it."""

    name: str
    num_experts: int
    top_k: int
    scoring_func: str
    biased: bool = False
    routed_scaling_factor: float = 1.0
    scaled: bool = False  # each expert's weight by a factor of its own


ROUTERS = (
    Router("Llama-4-Scout", 16, 1, "sigmoid"),
    Router("gpt-oss-20b", 32, 4, "softmax"),
    Router("GLM-5", 288, 8, "sigmoid", True, 2.5),
    Router("DeepSeek-V4", 256, 6, "softplus_sqrt", True, 1.5),
    Router("DeepSeek-V4.1", 384, 6, "softplus_sqrt", True, 1.5),
    Router("Qwen3.8", 512, 10, "softmax"),
    Router("Gemma-4", 128, 8, "softmax", scaled=True),
    Router("Nemotron-3", 512, 22, "sigmoid", True, 2.5),
    Router("Kimi-K3", 896, 16, "sigmoid", True, 2.5),
)
TOKENS = {
    "simulator": (3,),
    "quick": (1, 100),
    "default": (1, 100, 4096),
    "full": (1, 7, 64, 512, 4096, 16384, 65536),
}
LONGEST_BATCH = 2048  # rows of an expert in batched alignment
LARGEST_ROWS = 1 << 28  # elements of the permuted rows of one case: the reference holds them in float64
# Routing of the tiny model that scripts/train_tiny_moe.py trains, where the repository is at hand.
TRAINED_ROUTING = Path(__file__).parents[3] / "tests" / "data" / "tiny_moe_routing.npz"


def model_cases(level: str) -> Iterator[Case]:
    """Yield the cases shaped like published models, with the token counts of a level of `TOKENS`."""
    for number, (name, experts, top_k, model_hidden, groups) in enumerate(MODELS):
        for step, tokens in enumerate(TOKENS[level]):
            block_size = 16 if tokens < 512 else 64 if tokens < 16384 else 128
            dtype = DTYPES[(number + step) % len(DTYPES)]
            label = f"{name} {tokens} tokens"
            for routing in testing.ROUTINGS:
                chosen = ids(tokens, experts, top_k, routing)
                align = given(topk_ids=chosen, block_size=block_size, num_experts=experts)
                yield Case("moe_align_block_size", f"{label} {routing}", align)
            count = given(topk_ids=ids(tokens, experts, top_k, "zipf"), num_experts=experts)
            yield Case("count_tokens_per_expert", f"{label} zipf", count)
            offsets = given(counts=counts(tokens, experts, top_k), alignment=block_size)
            yield Case("expert_offsets", f"{label} zipf", offsets)
            ragged = given(slice_sizes=counts(tokens, experts, top_k), num_rows=tokens * top_k)
            yield Case("make_ragged_metadata", f"{label} zipf", ragged)
            most = min(tokens, LONGEST_BATCH)
            batched = given(
                max_tokens_per_batch=most, block_size=block_size, expert_num_tokens=counts(tokens, experts, top_k)
            )
            yield Case("batched_moe_align_block_size", f"{label} zipf", batched)
            yield lora_case(f"{label} 4 adapters zipf", tokens, experts, top_k, block_size, 4)
            yield recording_case(f"{label} zipf", ids(tokens, experts, top_k, "zipf"), experts, num_tokens=tokens // 2)
            algorithm = DISPATCH[(number + step) % len(DISPATCH)]
            yield dispatch_case(f"{label} {algorithm}", ids(tokens, experts, top_k, "zipf"), experts, algorithm)
            yield gating_case(f"{label} {dtype}", tokens, experts, top_k, groups, dtype)
            hidden = 64 if level == "simulator" else model_hidden
            if tokens * top_k * hidden <= LARGEST_ROWS:
                yield permute_case(f"{label} {dtype}", tokens, experts, top_k, hidden, dtype)
                yield unpermute_case(f"{label} {dtype}", tokens, top_k, hidden, dtype)
                yield sum_case(f"{label} {dtype}", tokens, top_k, hidden, dtype)
            if tokens <= 512:  # the reference multiplies in float64
                drawn = (tokens, top_k, ids(tokens, experts, top_k, "zipf"))
                yield experts_case(f"{label} {dtype}", drawn, experts, 64, 32, dtype)
            sizes = counts(tokens, experts, top_k)(np.random.default_rng(0))
            if tokens <= 4096:
                yield activation_case(f"{label} {dtype}", sizes, 32 if level == "simulator" else 720, dtype)
    yield from router_cases(level)
    yield from trained_cases(8 if level == "simulator" else 4096)
    if level != "simulator":  # which takes minutes
        many = given(slice_sizes=np.arange(1, 2**16 + 2, dtype=np.int32) % 2, num_rows=40)
        yield Case("make_ragged_metadata", "int64 schedule by slices", many)


def router_cases(level: str) -> Iterator[Case]:
    """Yield the gating of `ROUTERS`, and on a device the alignment of what they choose, for one token and for many."""
    for number, (name, experts, top_k, scoring_func, biased, factor, scaled) in enumerate(ROUTERS):
        for tokens in sorted({TOKENS[level][0], TOKENS[level][-1]}):
            dtype = DTYPES[number % len(DTYPES)]
            options: dict[str, Any] = {"scoring_func": scoring_func, "renormalize": True, "top_k": top_k}
            options |= {"correction_bias": floats(experts, scale=0.1)} if biased else {}
            options |= {"expert_scale": floats(experts)} if scaled else {}
            logits = floats(tokens, experts, dtype=dtype)
            arguments = given(gating_output=logits, routed_scaling_factor=factor, **options)
            yield Case("select_experts", f"{name} {tokens} tokens {dtype}", arguments, dtype)
            if level != "simulator":
                align = given(topk_ids=ids(tokens, experts, top_k, "zipf"), block_size=16, num_experts=experts)
                yield Case("moe_align_block_size", f"{name} {tokens} tokens zipf", align)


def gating_case(name: str, tokens: int, experts: int, top_k: int, groups: tuple[int, int] | None, dtype: str) -> Case:
    """Return the gating of a model: grouped where it has groups, biased sigmoid above 256 experts, else softmax."""
    logits: dict[str, Any] = {"gating_output": floats(tokens, experts, dtype=dtype), "top_k": top_k}
    biased = {**logits, "correction_bias": floats(experts, scale=0.1)}
    if groups is not None:
        grouped = {"num_expert_group": groups[0], "topk_group": groups[1], "scoring_func": "sigmoid"}
        return Case(
            "grouped_topk", name, given(**biased, **grouped, renormalize=True, routed_scaling_factor=2.5), dtype
        )
    if experts > 256:
        return Case("topk_sigmoid", f"{name} bias", given(**biased, renormalize=True), dtype)
    return Case("topk_softmax", name, given(**logits, renormalize=True), dtype)


def trained_routing() -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield what layers of a trained model chose, [tokens, top_k], at its first and last step, and of how many experts.

    There is none where the file with it is not at hand.
    """
    if not TRAINED_ROUTING.exists():
        return
    with np.load(TRAINED_ROUTING, allow_pickle=False) as trace:
        num_experts, steps = int(trace["num_experts"]), trace["topk_ids"].astype(np.int32)
    for step, layer in itertools.product((0, len(steps) - 1), range(steps.shape[1])):
        yield f"trained step {step} layer {layer}", np.ascontiguousarray(steps[step, layer]), num_experts


def trained_cases(most_tokens: int) -> Iterator[Case]:
    """Yield cases of the routing of a trained model, of at most `most_tokens` tokens."""
    for label, routing, num_experts in trained_routing():
        chosen = routing[:most_tokens]
        for block_size in (16, 64):
            arguments = given(topk_ids=chosen, block_size=block_size, num_experts=num_experts)
            yield Case("moe_align_block_size", f"{label} block {block_size}", arguments)
        yield Case("count_tokens_per_expert", label, given(topk_ids=chosen, num_experts=num_experts))
        rows = floats(len(chosen), 24, dtype="bfloat16")
        arguments = given(hidden_states=rows, topk_ids=chosen, num_experts=num_experts)
        yield Case("moe_permute", label, arguments, "bfloat16")
        yield experts_case(label, chosen, num_experts, 24, 16, "bfloat16")
