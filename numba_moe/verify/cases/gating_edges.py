"""Calls that break the kernels of gating."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from numba_moe import reference
from numba_moe.verify import testing
from numba_moe.verify.cases.draws import Case, Draw, floats, given, integers, zeros

SCORING = tuple(reference.gating.SCORING)
# Scores of experts, and what makes that of a group of them.
GROUPED = (
    *itertools.product(("softmax", "sigmoid"), ("max", "top2_sum")),
    *(("softplus_sqrt", "topk_sum"), ("raw", "top2_sum")),
)


def _gating_edges() -> Iterator[Case]:
    non_finite = np.random.default_rng(0).standard_normal((7, 20), np.float32)
    non_finite[0] = np.nan
    non_finite[1, 3] = np.nan
    non_finite[2, 4] = np.inf
    non_finite[3, ::2] = -np.inf
    non_finite[4] = -np.inf
    non_finite[5, 1:4] = np.inf, -np.inf, np.nan
    kinds: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "zero tokens": (np.zeros((0, 8), np.float32), 2, {}),
        "one expert": (floats(3, 1), 1, {"renormalize": True}),
        "all logits equal": (np.zeros((3, 40), np.float32), 6, {}),
        "ties": (lambda rng: rng.integers(0, 3, (6, 60)).astype(np.float32), 8, {"renormalize": True}),
        "top_k is half the experts": (floats(2, 36), 18, {}),
        "300 tokens": (floats(300, 5), 2, {"renormalize": True}),
        "strided rows": (lambda rng: testing.separated_logits(rng, 4, 60), 4, {}),
        "signed zeros": (np.array([[0.0, -0.0] * 4, [-0.0, 0.0] * 4], np.float32), 3, {}),
        "saturated": (lambda rng: rng.choice([-200.0, 200.0, 0.0], (4, 20)).astype(np.float32), 5, {}),
        "non-finite logits": (non_finite, 6, {"renormalize": True}),
    }
    for (name, (logits, top_k, options)), biased in itertools.product(kinds.items(), (False, True)):
        experts = (logits(np.random.default_rng(0)) if callable(logits) else logits).shape[1]
        arguments = {"gating_output": logits, "top_k": top_k, **options}
        if biased:
            name, arguments["correction_bias"] = f"{name} bias", np.linspace(0, 1, experts, dtype=np.float32)
        strided = "strided" in name
        for scoring_func in SCORING:
            yield Case(f"topk_{scoring_func}", name, given(**arguments), strided=strided)
        if experts % 4 == 0:
            for scoring_func, group_score in GROUPED:
                grouped = {
                    "num_expert_group": 4,
                    "topk_group": 2,
                    "scoring_func": scoring_func,
                    "group_score": group_score,
                }
                label = f"{name} {scoring_func} {group_score}"
                yield Case("grouped_topk", label, given(**arguments, **grouped), strided=strided)

    def many(rng: np.random.Generator) -> np.ndarray:
        return testing.separated_logits(rng, 2, 2048)

    yield Case("topk_softmax", "2048 experts", given(gating_output=many, top_k=10))
    yield Case("topk_sigmoid", "2048 experts", given(gating_output=many, top_k=40))
    yield Case("topk_softplus_sqrt", "2048 experts", given(gating_output=many, top_k=10, renormalize=True))
    yield Case("topk_raw", "2048 experts", given(gating_output=many, top_k=40))


def _selection_edges() -> Iterator[Case]:
    options: dict[str, dict[str, Any]] = {
        "nothing but top_k": {},
        "renormalize": {"renormalize": True, "routed_scaling_factor": 2.5},
        "groups": {"num_expert_group": 8, "topk_group": 3, "scoring_func": "sigmoid"},
        "sums of one": {"num_expert_group": 8, "topk_group": 5, "group_score": "topk_sum"},
        "sums of three": {"num_expert_group": 8, "topk_group": 2, "group_score": "topk_sum", "renormalize": True},
        "sums of whole groups": {"num_expert_group": 16, "topk_group": 2, "group_score": "topk_sum"},
        "one group has no sum": {"group_score": "topk_sum", "scoring_func": "raw"},
    }
    for name, option in options.items():
        arguments = {"gating_output": floats(5, 48), "top_k": 6, **option}
        yield Case("select_experts", name, given(**arguments))
        biased = {**arguments, "correction_bias": floats(48, scale=0.3)}
        yield Case(
            "select_experts", f"{name} softplus_sqrt bias", given(**(biased | {"scoring_func": "softplus_sqrt"}))
        )


def option_cases(name: str, tokens: int, experts: int, top_k: int, **more: Any) -> Iterator[Case]:
    """Yield selections with each of the options besides choosing and weighing, and with many at once."""
    slots = experts + experts // 4 + 2
    places = integers(0, slots, experts + 2)
    replicas, num_valid = integers(-1, slots, experts + 2, 3), integers(0, 4, experts + 2)
    half = np.array([tokens // 2])
    flags = np.arange(tokens) % 3 == 1
    enabled, disabled = np.array([7], np.int32), np.array([0], np.int32)
    shared = {"num_fused_shared_experts": 2, "routed_scaling_factor": 2.5}
    zero = {"num_zero_experts": experts // 2, "identity_weights": zeros(tokens, dtype="float32")}
    options: dict[str, dict[str, Any]] = {
        "counts": {"counts": zeros(experts)},
        "counts int64 on": {"counts": zeros(experts, dtype="int64"), "counts_enabled": enabled},
        "counts off": {"counts": zeros(experts), "counts_enabled": disabled},
        "counts in rows": {"counts": zeros(32, experts, dtype="int64"), "counts_enabled": enabled},
        "counts in rows off": {"counts": zeros(2, experts), "counts_enabled": disabled},
        "counts in rows of shared experts": {**shared, "counts": zeros(4, experts + 2)},
        "fewer counters than experts": {"counts": zeros(3)},
        "more counters than a block has": {"counts": zeros(3000, dtype="int64")},
        "padding int64": {"num_token_non_padded": half, "counts": zeros(experts)},
        "padding int32 scalar": {"num_token_non_padded": half.astype(np.int32).reshape(())},
        "is_padding": {"is_padding": flags, "num_token_non_padded": half + 1},
        "ids int64": {"indices_dtype": "int64"},
        "ids int16": {"indices_dtype": "int16"},
        "softcap": {"softcap": 3.0},
        "softcap renormalize": {"softcap": 0.5, "renormalize": True},
        "bias in logits": {"correction_bias": floats(experts), "bias_mode": "logits"},
        "bias in capped logits": {
            "correction_bias": floats(experts),
            "bias_mode": "logits",
            "softcap": 5.0,
            "renormalize": True,
        },
        "shared experts": shared,
        "shared experts scaled later": {**shared, "apply_routed_scaling_factor_on_output": False},
        "shared experts renormalize": {**shared, "renormalize": True},
        "shared experts renormalize scaled later": {
            **shared,
            "renormalize": True,
            "apply_routed_scaling_factor_on_output": False,
        },
        "shared experts of one weight": {**shared, "shared_expert_weight": 0.25, "routed_scaling_factor": 2.5},
        "epsilon": {"renormalize": True, "renormalize_epsilon": 0.5},
        "scales of experts": {"expert_scale": floats(experts), "renormalize": True, "routed_scaling_factor": 2.5},
        "scales and zero experts": {**zero, "expert_scale": floats(experts), "renormalize_epsilon": 0.125},
        "zero experts": zero,
        "zero experts as 0": {**zero, "zero_expert_id": 0, "renormalize": True, "counts": zeros(experts)},
        "static": {"dispatch": lambda rng: (places(rng), None, "static", 0, None), "counts": zeros(slots)},
        "fake": {"dispatch": lambda rng: (places(rng), None, "fake", 0, None)},
        "hash": {"dispatch": lambda rng: (replicas(rng), num_valid(rng), "hash", 0, None), "counts": zeros(slots)},
        "dynamic": {
            "dispatch": lambda rng: (replicas(rng), num_valid(rng), "dynamic", 5, np.array([1 << 32 | 3])),
            "indices_dtype": "int16",
        },
        "many at once": {
            **shared,
            **zero,
            "dispatch": lambda rng: (places(rng), None, "static", 0, None),
            "counts": zeros(slots, dtype="int64"),
            "num_token_non_padded": half.astype(np.int32),
            "indices_dtype": "int64",
            "softcap": 20.0,
        },
    }
    for label, option in options.items():
        arguments = {"gating_output": floats(tokens, experts), "top_k": top_k, **more, **option}
        yield Case("select_experts", f"{name} {label}", given(**arguments))


def _option_edges() -> Iterator[Case]:
    some: tuple[str, ...] = ("softcap", "bias in logits", "shared experts", "zero experts as 0", "many at once")
    some = (*some, "epsilon", "scales of experts")
    groups = {"num_expert_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "group_score": "top2_sum"}
    yield from option_cases("softmax", 5, 24, 6)
    yield from option_cases("groups", 5, 24, 6, **groups)
    yield from (case for case in option_cases("no tokens", 0, 8, 2) if case.name.endswith(some))
    for name, experts, top_k, more in (
        ("many groups", 66, 6, {"num_expert_group": 33, "topk_group": 11}),
        ("many picks", 44, 34, {}),
    ):
        yield from (case for case in option_cases(name, 3, experts, top_k, **more) if case.name.endswith(some))
    yield from _route_edges(some)
    many: dict[str, Any] = {"gating_output": floats(3, 40), "num_token_non_padded": np.array([2])}
    for scoring_func in SCORING:
        given_ids = integers(-3, 45, 3, 5)
        arguments = {**many, "topk_ids": given_ids, "scoring_func": scoring_func, "counts": zeros(40)}
        yield Case("weigh_experts", f"{scoring_func}", given(**arguments))
        yield Case("weigh_experts", f"{scoring_func} renormalize", given(**arguments, renormalize=True))
    table = {"topk_ids": integers(0, 40, 9, 36), "input_ids": np.array([8, 9, -1]), "scoring_func": "softplus_sqrt"}
    yield Case("weigh_experts", "table", given(**(many | table), routed_scaling_factor=2.5))
    short = {"topk_ids": lambda rng: integers(0, 40, 3, 2)(rng).astype(np.int16), "softcap": 2.0}
    yield Case("weigh_experts", "int16", given(**(many | short), logit_bias=floats(40), num_fused_shared_experts=1))
    zero = {"topk_ids": integers(0, 40, 3, 6), "num_zero_experts": 20, "identity_weights": zeros(3, dtype="float32")}
    yield Case("weigh_experts", "zero experts", given(**(many | zero)))
    scaled = {"expert_scale": floats(40), "renormalize": True, "renormalize_epsilon": 0.5, "shared_expert_weight": 3.0}
    yield Case("weigh_experts", "scales of experts", given(**(many | zero | scaled), num_fused_shared_experts=2))
    yield Case("weigh_experts", "no tokens", given(gating_output=floats(0, 4), topk_ids=integers(0, 4, 0, 2)))
    non_finite = np.array([[np.nan, 1, 2], [np.inf, 0, 1], [-np.inf] * 3, [1, -np.inf, 3]], np.float32)
    ids = np.array([[1, 2], [0, 1], [0, 1], [1, 2]])
    for scoring_func in SCORING:
        arguments = {"gating_output": non_finite, "topk_ids": ids, "scoring_func": scoring_func, "softcap": 9.0}
        yield Case("weigh_experts", f"non-finite logits {scoring_func}", given(**arguments))


def _route_edges(some: tuple[str, ...]) -> Iterator[Case]:
    """Yield calls of gating and alignment at once, in one launch and in several."""
    local = np.array([3, -1, 0, 1, 2**40, 2, -7, 4])
    options: dict[str, dict[str, Any]] = {
        "one token": {"gating_output": floats(1, 8)},
        "no tokens": {"gating_output": floats(0, 8)},
        "one expert": {"gating_output": floats(9, 1), "top_k": 1},
        "more tokens than warps": {"gating_output": floats(15, 8)},
        "a cluster": {"gating_output": floats(28, 24), "top_k": 4, "counts": zeros(24)},
        "a cluster of few slots": {"gating_output": floats(17, 200), "top_k": 1, "block_size": 16},
        "a larger cluster": {"gating_output": floats(61, 40), "top_k": 8, "num_fused_shared_experts": 1},
        "more experts than threads": {"gating_output": floats(3, 200), "top_k": 9, "block_size": 16},
        "several launches": {"gating_output": floats(70, 12), "top_k": 3, "block_size": 16},
        "more experts than in one launch": {"gating_output": floats(2, 520)},
        "strided bias": {"gating_output": floats(5, 8), "correction_bias": floats(8), "scoring_func": "sigmoid"},
        "groups": {"gating_output": floats(5, 48), "num_expert_group": 8, "topk_group": 2, "top_k": 6},
        "expert_map": {"expert_map": local.astype(np.int32), "inactive_expert_id": 0},
        "ignore_invalid_experts": {"expert_map": local, "ignore_invalid_experts": True, "pad_sorted_ids": True},
        "block_size 1": {"block_size": 1},
        "non-finite logits": {"gating_output": np.array([[np.nan, 1, 2, 3], [np.inf, 1, -np.inf, 0]], np.float32)},
    }
    for name, option in options.items():
        arguments = {"gating_output": floats(7, 8), "top_k": 2, "block_size": 4, "renormalize": True, **option}
        yield Case("route", name, given(**arguments), strided="strided" in name)
    more = ("int16", "int64", "is_padding", "hash", "counts")
    for case in option_cases("options", 5, 24, 6):
        if case.name.endswith((*some, *more)):
            places = {"num_physical_experts": 32} if case.name.endswith(("hash", "many at once")) else {}
            yield Case("route", case.name, functools.partial(_routed, case.arguments, places))


def _routed(draw: Draw, places: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**draw(rng), **places, "block_size": 4}


def edges() -> Iterator[Case]:
    """Yield them all."""
    yield from _gating_edges()
    yield from _selection_edges()
    yield from _option_edges()
