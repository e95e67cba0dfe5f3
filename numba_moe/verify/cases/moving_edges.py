"""Calls that break the kernels that move rows and run experts."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from numba_moe.verify.cases.draws import (
    DTYPES,
    Case,
    activation_case,
    constants_case,
    experts_case,
    floats,
    given,
    integers_of,
    permute_case,
    sum_case,
    uniform,
    unpermute_case,
)


def _permuting_edges() -> Iterator[Case]:
    for dtype in DTYPES:
        for hidden in (33, 48):  # the latter allows 16 bytes at a time
            yield permute_case(f"strided rows of {hidden} {dtype}", 9, 4, 2, hidden, dtype, strided=True)
            yield unpermute_case(f"strided rows of {hidden} {dtype}", 9, 2, hidden, dtype, strided=True)
            yield sum_case(f"strided rows of {hidden} {dtype}", 9, 2, hidden, dtype, strided=True)
    for top_k in (1, 5, 9, 40):
        yield permute_case(f"top {top_k}", 9, 64, top_k, 24, "bfloat16")
        yield unpermute_case(f"top {top_k}", 9, top_k, 24, "bfloat16")
        yield sum_case(f"top {top_k}", 9, top_k, 24, "bfloat16")
    yield permute_case("1030 columns", 3, 4, 2, 1030, "float32")
    yield unpermute_case("1030 columns", 3, 2, 1030, "float32")
    yield sum_case("1030 columns", 3, 2, 1030, "float32")
    yield sum_case("300 tokens", 300, 2, 4, "float32")
    yield permute_case("hidden 0", 9, 4, 2, 0, "float32")
    yield unpermute_case("zero tokens", 0, 2, 16, "float32")
    skipped = np.array([[0, -1, 5], [-1, -1, -1], [6, 2, 1], [3, 4, 2**31 - 1]], np.int32)
    indexed = {"permuted": floats(6, 40), "topk_weights": uniform(4, 3), "inv_permuted_idx": skipped}
    yield Case("moe_unpermute", "skipped slots", given(**indexed))
    yield Case("moe_unpermute", "scaled", given(**indexed, routed_scaling_factor=2.5))
    for dtype, hidden in itertools.product(DTYPES, (33, 48)):
        given_rows = {**indexed, "permuted": floats(6, hidden, dtype="float16")}
        yield Case("moe_unpermute", f"{hidden} float16 to {dtype}", given(**given_rows, out_dtype=dtype), "float16")
        rows = given(hidden_states=floats(5, 3, hidden), out_dtype=dtype, routed_scaling_factor=-0.5)
        yield Case("moe_sum", f"{hidden} float32 to {dtype}", rows)
    of_nan = floats(4, 3, 24)(np.random.default_rng(0))
    of_nan[1, :2] = np.nan
    for kind in (np.int32, np.int64):
        padded = np.array([[7, 0, -1], [-1, -5, 2], [-1, -1, -1], [0, 0, 0]], kind)
        yield Case("moe_sum", f"skipped slots of NaN {kind.__name__}", given(hidden_states=of_nan, topk_ids=padded))
    yield Case("moe_sum", "no slots", given(hidden_states=floats(4, 0, 24)))

    chosen = np.random.default_rng(0).integers(-1, 9, (30, 3)).astype(np.int32)
    half = np.array([-1, 0, 1, -1, 2, -1, 3, -1])
    options: dict[str, dict[str, Any]] = {
        "alignment 1": {"alignment": 1},
        "alignment 3": {"alignment": 3},
        "alignment 16 and expert_map": {"alignment": 16, "expert_map": half},
        "alignment 128": {"alignment": 128},
        "padding left": {"alignment": 16, "zero_padding": False, "scales": floats(30, 4)},
        "padding left and expert_map": {"expert_map": half, "zero_padding": False},
        "scales": {"scales": floats(30, 7)},
        "a scale a row": {"scales": floats(30), "alignment": 4},
        "scales of bytes": {"scales": integers_of("uint8", 30, 3)},
    }
    batches: dict[str, dict[str, Any]] = {
        "all rows": {"max_m": 30},
        "rows beyond max_m": {"max_m": 5},
        "one row": {"max_m": 1},
        "many rows": {"max_m": 300},
        "expert_map": {"max_m": 20, "expert_map": half, "num_local_experts": 4},
        "fewer batches": {"max_m": 11, "num_local_experts": 3},
        "padding left": {"max_m": 12, "zero_padding": False, "scales": floats(30, 4)},
        "scales": {"max_m": 9, "scales": floats(30)},
    }
    for rows in (floats(30, 32), integers_of("uint8", 30, 19), integers_of("int8", 30, 48)):
        kind = rows(np.random.default_rng(0)).dtype.name
        routed = {"hidden_states": rows, "topk_ids": chosen, "num_experts": 8}
        for name, option in options.items():
            yield Case("moe_permute", f"several tiles {name} {kind}", given(**routed, **option))
        for name, option in batches.items():
            yield Case("moe_permute_masked", f"several tiles {name} {kind}", given(**routed, **option))
    none = {"hidden_states": floats(0, 8), "topk_ids": np.zeros((0, 2), np.int32), "num_experts": 3}
    yield Case("moe_permute", "zero tokens aligned", given(**none, alignment=16))
    yield Case("moe_permute_masked", "zero tokens", given(**none, max_m=5))
    narrow = given(hidden_states=floats(30, 0), topk_ids=chosen, num_experts=8, alignment=8)
    yield Case("moe_permute", "hidden 0 aligned", narrow)
    few = {"hidden_states": floats(1, 40), "topk_ids": np.array([[3, 200]]), "num_experts": 300}
    yield Case("moe_permute", "fewer slots than experts", given(**few, alignment=128))
    yield Case("moe_permute_masked", "fewer slots than experts", given(**few, max_m=2))


def _expert_edges() -> Iterator[Case]:
    activations: dict[str, dict[str, Any]] = {
        "silu": {"activation": "silu"},
        "silu alpha": {"activation": "silu", "alpha": 0.5},
        "silu limit": {"activation": "silu", "limit": 1.5},
        "silu interleaved": {"activation": "silu", "interleaved": True},
        "gelu": {"activation": "gelu"},
        "gelu_tanh": {"activation": "gelu_tanh"},
        "swiglu_oai": {"activation": "swiglu_oai"},
        "swiglu_oai in halves": {"activation": "swiglu_oai", "interleaved": False, "limit": 3, "alpha": 1.5},
        "silu beta": {"beta": -0.5, "limit": 10.0, "alpha": 1.25},
        "swiglu_step": {"activation": "swiglu_step", "limit": 2.0},
        "situ": {"activation": "situ"},
        "situ linear_beta": {"activation": "situ", "beta": 1.5, "linear_beta": 3.0, "limit": 5.0},
        "situ interleaved": {"activation": "situ", "interleaved": True, "linear_beta": 25.0},
        "relu2": {"activation": "relu2", "limit": 4.0},
        **{f"{name}_no_mul": {"activation": f"{name}_no_mul"} for name in ("silu", "gelu", "gelu_tanh", "relu2")},
        "silu_no_mul limit": {"activation": "silu_no_mul", "limit": 1.5, "alpha": 0.5},
    }
    sizes = np.array([2, 0, 5, 0, 0, 1, 3, 0])
    plain: dict[str, Any] = {"bias": None, "expert_first_token_offset": None}
    for number, (name, options) in enumerate({**activations, "none": {"activation": "none"}}.items()):
        for step, width in enumerate((16, 40, 5)):
            dtype = DTYPES[(number + step) % len(DTYPES)]
            yield activation_case(f"{name} width {width} {dtype}", sizes, width, dtype, spare=2, **options)
        yield activation_case(f"{name} no bias", sizes, 24, "float32", spare=1, bias=None, **options)
        yield activation_case(f"{name} no offsets", sizes, 24, "float32", **plain, **options)
    yield activation_case("several runs of columns", sizes, 300, "bfloat16", spare=1)
    yield activation_case("several aligned runs of columns", sizes, 520, "float16", spare=1)
    yield activation_case("300 experts", np.arange(300) % 2, 3, "float32")
    yield activation_case("no rows", np.zeros(4, np.int32), 8, "float32")
    yield activation_case("no rows in use", np.zeros(4, np.int32), 8, "float32", spare=3)
    yield activation_case("no columns", sizes, 0, "float32")
    wild = np.array([[200.0, -200.0, 1e12, -1e12, 0.0, -0.0, 9.0, np.nan] + [2.0, -2.0] * 4], np.float32)
    for name, options in activations.items():
        yield Case("moe_activation", f"large gates {name}", given(gate_up=wild, **{**options, "interleaved": False}))

    skipping = np.array([[3, 1], [-1, -1], [7, 3], [0, 9], [-1, 2]], np.int32)
    for number, (name, options) in enumerate(activations.items()):
        dtype = DTYPES[number % len(DTYPES)]
        yield experts_case(f"{name} bias {dtype}", skipping, 8, 24, 16, dtype, bias=True, **options)
    yield experts_case("int64 ids past int32", np.array([[2**32 + 1, 2], [-(2**40), 0]]), 3, 8, 8, "float32")
    yield experts_case("zero tokens", np.zeros((0, 2), np.int32), 3, 8, 8, "float32")
    yield experts_case("one expert", np.zeros((5, 1), np.int32), 1, 8, 8, "bfloat16")
    yield experts_case("odd sizes", skipping, 8, 7, 5, "float32", bias=True)
    yield experts_case("all ids -1", np.full((4, 2), -1, np.int32), 3, 8, 8, "bfloat16", bias=True)
    expert_map = np.array([-1, 0, 1, -1, 2, -1, 3, -1])
    options = {"expert_map": expert_map, "bias": True}
    yield experts_case("expert_map", skipping, 4, 16, 8, "float32", **options)
    yield experts_case("expert_map bfloat16", skipping, 4, 16, 8, "bfloat16", **options)
    yield experts_case("one token float16", np.array([[3, -1, 9, 0]], np.int32), 8, 40, 24, "float16", bias=True)
    yield experts_case(
        "one token expert_map bfloat16", np.array([[3, 2, 9, 0, 1, 4]]), 4, 40, 24, "bfloat16", **options
    )
    yield experts_case("a second block of slots", np.zeros((9, 1), np.int32), 4, 72, 40, "bfloat16", bias=True)
    yield experts_case("expert_map of no expert", skipping, 4, 8, 8, "float32", expert_map=np.full(8, -1, np.int32))


def _constant_edges() -> Iterator[Case]:
    for number, hidden in enumerate((1, 40, 41, 264, 520)):
        dtype = DTYPES[number % len(DTYPES)]
        yield constants_case(f"{hidden} {dtype}", 7, 3, hidden, dtype)
        yield constants_case(f"{hidden} {dtype} copies alone", 7, 3, hidden, dtype, constants=0, added=False)
    yield constants_case("64 bfloat16 one token", 1, 12, 64, "bfloat16")
    yield constants_case("24 float16 zero tokens", 0, 2, 24, "float16")
    wide = {"num_experts": 3, "constants": floats(2, 16), "num_copies": 1}
    far = np.array([[3, 4, 2**32 + 3, -(2**40)], [5, 6, 2, 2**63 - 1]])
    rows = {"hidden_states": floats(2, 16), "topk_weights": uniform(2, 4), "topk_ids": far}
    yield Case("constant_experts", "int64 ids past int32", given(**rows, **wide))
    of_nan = {
        "hidden_states": np.full((2, 16), np.nan, np.float32),
        "topk_weights": np.full((2, 4), np.nan, np.float32),
    }
    none = given(**of_nan, topk_ids=np.array([[0, 1, 2, -1]] * 2), num_experts=3, combined=floats(2, 16))
    yield Case("constant_experts", "NaN that nobody asks for", none)


def edges() -> Iterator[Case]:
    """Yield them all."""
    yield from _permuting_edges()
    yield from _expert_edges()
    yield from _constant_edges()
