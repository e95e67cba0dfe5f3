"""The named cases: calls shaped like published models, calls that break kernels, a user's own routing.

Verification, tests and benchmarks all draw from here.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe import align_sizes, reference, testing
from numba_moe.reference.align import max_sorted_slots

Draw = Callable[[np.random.Generator], Any]


class Case(NamedTuple):
    """One call of a public op."""

    op: str
    name: str
    arguments: Callable[[np.random.Generator], dict[str, Any]]
    dtype: str | None = None  # of the float payload on the device
    strided: bool = False  # rows of the payload lie inside wider ones


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
TOKENS = {
    "simulator": (3,),
    "quick": (1, 100),
    "default": (1, 100, 4096),
    "full": (1, 7, 64, 512, 4096, 16384, 65536),
}
SCORING = tuple(reference.gating.SCORING)
# Scores of experts, and what makes that of a group of them.
GROUPED = (
    *itertools.product(("softmax", "sigmoid"), ("max", "top2_sum")),
    *(("softplus_sqrt", "topk_sum"), ("raw", "top2_sum")),
)
DISPATCH = ("static", "dynamic", "hash", "fake")
DTYPES = ("float32", "bfloat16", "float16")
LONGEST_BATCH = 2048  # rows of an expert in batched alignment
# Routing of the tiny model that scripts/train_tiny_moe.py trains, where the repository is at hand.
TRAINED_ROUTING = Path(__file__).parents[1] / "tests" / "data" / "tiny_moe_routing.npz"
LARGEST_ROWS = 1 << 28  # elements of the permuted rows of one case: the reference holds them in float64


def given(**arguments: Any) -> Callable[[np.random.Generator], dict[str, Any]]:
    """Return what makes a call's arguments: values as they are, functions called with the random generator."""
    return lambda rng: {name: value(rng) if callable(value) else value for name, value in arguments.items()}


def ids(tokens: int, experts: int, top_k: int, routing: str) -> Draw:
    return lambda rng: testing.random_ids(rng, tokens, experts, top_k, routing)


def floats(*shape: int, dtype: str = "float32", scale: float = 1.0) -> Draw:
    return lambda rng: (
        testing.random_floats(rng, shape, dtype)
        * np.float32(scale).astype("float16" if dtype == "float16" else "float32")
    )


def uniform(*shape: int, dtype: str = "float32") -> Draw:
    return lambda rng: rng.random(shape, np.float32).astype("float16" if dtype == "float16" else "float32")


def permutation(*shape: int) -> Draw:
    return lambda rng: rng.permutation(int(np.prod(shape))).astype(np.int32).reshape(shape)


def counts(tokens: int, experts: int, top_k: int, routing: str = "zipf") -> Draw:
    return lambda rng: reference.count_tokens_per_expert(ids(tokens, experts, top_k, routing)(rng), experts)


def empty(*shape: int) -> Draw:
    """Return memory to be written, with something in it."""
    return lambda rng: np.full(shape, 0x5EADBEEF, np.int32)


def align_out(num_slots: int, block_size: int, experts: int, spare: int = 0) -> Draw:
    """Return memory for the result of an alignment, `spare` positions longer than needed."""
    length = max_sorted_slots(num_slots, block_size, experts) + spare
    return lambda rng: tuple(empty(size)(rng) for size in (length, -(-length // block_size), 1))


def lora_case(name: str, tokens: int, experts: int, top_k: int, block_size: int, max_loras: int) -> Case:
    """Return the alignment of tokens of as many adapters, one of them disabled, and of none."""
    arguments = given(
        topk_ids=ids(tokens, experts, top_k, "zipf"),
        token_lora_mapping=lambda rng: rng.integers(-1, max_loras, tokens),
        block_size=block_size,
        num_experts=experts,
        max_loras=max_loras,
        adapter_enabled=np.arange(max_loras + 1, dtype=np.int32),
    )
    return Case("moe_lora_align_block_size", name, arguments)


def integers(lowest: int, after: int, *shape: int) -> Draw:
    return lambda rng: rng.integers(lowest, after, shape).astype(np.int32)


def integers_of(dtype: str, *shape: int) -> Draw:
    """Return any integers of a dtype."""
    return lambda rng: rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype)


def zeros(*shape: int, dtype: str = "int32") -> Draw:
    """Return what makes an array that a call may write."""
    return lambda rng: np.zeros(shape, dtype)


def dispatch_case(name: str, topk_ids: Any, num_experts: int, algorithm: str, **options: Any) -> Case:
    """Return a dispatch with counts, by random tables: an eighth more slots than experts, up to four for an expert."""
    slots = num_experts + -(-num_experts // 8)
    tables: dict[str, Any] = {"physical_map": integers(0, slots, slots if algorithm == "fake" else num_experts)}
    if algorithm in ("dynamic", "hash"):
        tables = {"physical_map": integers(0, slots, num_experts, 4), "num_valid": integers(1, 5, num_experts)}
    if algorithm == "dynamic":
        tables |= {"seed": 2**62 + 5, "step": np.array([3 << 32 | 7])}
    arguments = {"topk_ids": topk_ids, **tables, "algorithm": algorithm, "counts": zeros(slots), **options}
    return Case("dispatch_ids", name, given(**arguments))


def recording_case(name: str, topk_ids: Any, num_experts: int, **scalars: int) -> Case:
    """Return counting onto counters past int32; `scalars` are what the device has to read."""
    read = {name: np.array([value], np.int32) for name, value in scalars.items() if name != "first_row"}
    first = {name: value for name, value in scalars.items() if name == "first_row"}
    counts = np.full(num_experts, 2**31)
    return Case("add_expert_counts", name, given(topk_ids=topk_ids, counts=counts, **read, **first))


def permute_case(name: str, tokens: int, experts: int, top_k: int, hidden: int, dtype: str, **layout: Any) -> Case:
    rows, chosen = floats(tokens, hidden, dtype=dtype), ids(tokens, experts, top_k, "zipf")
    return Case("moe_permute", name, given(hidden_states=rows, topk_ids=chosen, num_experts=experts), dtype, **layout)


def sum_case(name: str, tokens: int, top_k: int, hidden: int, dtype: str, **layout: Any) -> Case:
    return Case("moe_sum", name, given(hidden_states=floats(tokens, top_k, hidden, dtype=dtype)), dtype, **layout)


def unpermute_case(name: str, tokens: int, top_k: int, hidden: int, dtype: str, **layout: Any) -> Case:
    arguments = given(
        permuted=floats(tokens * top_k, hidden, dtype=dtype),
        topk_weights=uniform(tokens, top_k, dtype=dtype),
        inv_permuted_idx=permutation(tokens, top_k),
    )
    return Case("moe_unpermute", name, arguments, dtype, **layout)


def activation_case(name: str, sizes: Any, width: int, dtype: str, spare: int = 0, **options: Any) -> Case:
    """Return the activation of rows of so many for each expert, with a bias, and of some that are not in use."""
    offset = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    columns = width if options.get("activation") == "none" else 2 * width
    rows = floats(int(offset[-1]) + spare, columns, dtype=dtype, scale=4.0)
    biased = {"expert_first_token_offset": offset, "bias": floats(len(sizes), columns, dtype=dtype)}
    return Case("moe_activation", name, given(gate_up=rows, **{**biased, **options}), dtype)


def experts_case(
    name: str, chosen: Any, local: int, hidden: int, width: int, dtype: str, bias: bool = False, **options: Any
) -> Case:
    """Return the feed-forward of tokens with ids of [num_tokens, top_k], or drawn so, through `local` experts."""
    tokens, top_k = chosen.shape if isinstance(chosen, np.ndarray) else chosen[:2]
    biases = {"gate_up_bias": (local, 2 * width), "down_bias": (local, hidden)} if bias else {}
    arguments = given(
        hidden_states=floats(tokens, hidden, dtype=dtype),
        gate_up_proj=floats(local, 2 * width, hidden, dtype=dtype, scale=2.0 ** -(hidden.bit_length() // 2)),
        down_proj=floats(local, hidden, width, dtype=dtype, scale=2.0 ** -(width.bit_length() // 2)),
        topk_weights=uniform(tokens, top_k),
        topk_ids=chosen if isinstance(chosen, np.ndarray) else chosen[2],
        **{name: floats(*shape, dtype=dtype) for name, shape in biases.items()},
        **options,
    )
    return Case("fused_experts", name, arguments, dtype)


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
    yield from trained_cases(8 if level == "simulator" else 4096)
    if level != "simulator":  # which takes minutes
        many = given(slice_sizes=np.arange(1, 2**16 + 2, dtype=np.int32) % 2, num_rows=40)
        yield Case("make_ragged_metadata", "int64 schedule by slices", many)


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


def edge_cases() -> Iterator[Case]:
    """Yield the cases that break kernels."""
    yield from _grouping_edges()
    yield from _permuting_edges()
    yield from _written_edges()
    yield from _variant_edges()
    yield from _recording_edges()
    yield from _gating_edges()
    yield from _selection_edges()
    yield from _option_edges()
    yield from _expert_edges()


def _permuting_edges() -> Iterator[Case]:
    for dtype in DTYPES:
        for hidden in (33, 48):  # the latter allows 16 bytes at a time
            yield permute_case(f"strided rows of {hidden} {dtype}", 9, 4, 2, hidden, dtype, strided=True)
            yield unpermute_case(f"strided rows of {hidden} {dtype}", 9, 2, hidden, dtype, strided=True)
            yield sum_case(f"strided rows of {hidden} {dtype}", 9, 2, hidden, dtype, strided=True)
    for top_k in (1, 5, 40):
        yield permute_case(f"top {top_k}", 9, 64, top_k, 24, "bfloat16")
        yield unpermute_case(f"top {top_k}", 9, top_k, 24, "bfloat16")
        yield sum_case(f"top {top_k}", 9, top_k, 24, "bfloat16")
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


def _grouping_edges() -> Iterator[Case]:
    kinds: dict[str, np.ndarray] = {
        "zero tokens": np.zeros((0, 2), np.int32),
        "one slot": np.array([[5]], np.int32),
        "-1 rows": np.repeat([[3, 1], [-1, -1], [7, 3]], 9, axis=0).astype(np.int32),
        "all ids -1": np.full((40, 2), -1, np.int32),
        "ids out of range": np.tile([[8, 2], [-7, 2**31 - 1], [0, -(2**31)]], (12, 1)).astype(np.int32),
        "int64 ids past int32": np.tile([[2**32 + 1, 2], [-(2**40), 5]], (12, 1)),
        "one hot expert": np.full((70, 2), 6, np.int32),
        "empty experts": np.tile([[1, 6], [6, 6]], (35, 1)).astype(np.int32),
        "several tiles": np.random.default_rng(0).integers(-1, 9, (400, 2)).astype(np.int32),
    }
    for name, chosen in kinds.items():
        yield Case("moe_align_block_size", name, given(topk_ids=chosen, block_size=4, num_experts=8))
        yield Case("count_tokens_per_expert", name, given(topk_ids=chosen, num_experts=8))
        yield recording_case(name, chosen, 8)
        rows = floats(len(chosen), 20)
        yield Case("moe_permute", name, given(hidden_states=rows, topk_ids=chosen, num_experts=8))
        yield Case("moe_reorder", name, given(topk_ids=chosen, num_experts=8))

    expert_map = np.array([-1, 0, 1, -1, 2, -1, 3, -1], np.int32)
    reverse = np.arange(8, dtype=np.int32)[::-1].copy()
    options: dict[str, dict[str, Any]] = {
        "expert_map": {"expert_map": expert_map},
        "expert_map int64": {"expert_map": expert_map.astype(np.int64)},
        "expert_map ignore_invalid_experts": {"expert_map": expert_map, "ignore_invalid_experts": True},
        "expert_map reversed": {"expert_map": reverse, "ignore_invalid_experts": True},
        "expert_map of no expert": {"expert_map": np.full(8, -1, np.int32), "ignore_invalid_experts": True},
        "pad_sorted_ids": {"pad_sorted_ids": True},
        "inactive_expert_id 0": {"inactive_expert_id": 0},
        "block_size 1": {"block_size": 1},
        "block_size 3": {"block_size": 3},
        "block_size above the slots": {"block_size": 1024},
    }
    chosen = kinds["several tiles"][:25]
    for name, option in options.items():
        arguments = {"topk_ids": chosen, "block_size": 4, "num_experts": 8, **option}
        yield Case("moe_align_block_size", name, given(**arguments))
    yield Case("moe_align_block_size", "one dimension", given(topk_ids=chosen.ravel(), block_size=4, num_experts=8))
    mapped = given(topk_ids=chosen, num_experts=8, expert_map=expert_map)
    yield Case("count_tokens_per_expert", "expert_map", mapped)
    rows = floats(len(chosen), 20)
    mapped = given(hidden_states=rows, topk_ids=chosen, num_experts=8, expert_map=expert_map)
    yield Case("moe_permute", "expert_map", mapped)
    yield Case("moe_reorder", "expert_map", given(topk_ids=chosen, num_experts=8, expert_map=expert_map))
    yield Case("moe_reorder", "one dimension", given(topk_ids=chosen.ravel(), num_experts=8))
    for name, tokens, experts, top_k in (
        ("one expert", 40, 1, 1),
        ("257 experts", 30, 257, 10),
        ("2048 experts", 20, 2048, 8),
    ):
        drawn = ids(tokens, experts, top_k, "half_empty")
        yield Case("moe_align_block_size", name, given(topk_ids=drawn, block_size=16, num_experts=experts))
    yield from _dispatch_edges(kinds)
    yield Case("expert_offsets", "no experts", given(counts=np.zeros(0, np.int32)))
    yield Case("expert_offsets", "int64 counts past int32", given(counts=np.full(5, 2**31, np.int64)))
    yield Case("expert_offsets", "2048 experts", given(counts=np.arange(2048) % 99, alignment=7))


def _written_edges() -> Iterator[Case]:
    """Yield alignments into memory that is given."""
    chosen = np.random.default_rng(0).integers(-1, 9, (25, 2)).astype(np.int32)
    some = np.array([-1, 0, 1, -1, 2, -1, 3, -1])
    sizes = align_sizes(chosen.size, 4, 8)
    both = {"inv_sorted_idx": empty(25, 2), "counts": empty(8)}
    options: dict[str, dict[str, Any]] = {
        "out": {"out": align_out(50, 4, 8)},
        "out longer than needed": {"out": align_out(50, 4, 8, spare=33), "inactive_expert_id": -7},
        "inv_sorted_idx": {"inv_sorted_idx": empty(25, 2)},
        "counts": {"counts": empty(8)},
        "everything given": {"out": align_out(50, 4, 8), "workspace": empty(sizes.workspace + 8), **both},
        "counts and inverse by this rank's ids": {"expert_map": some, "ignore_invalid_experts": True, **both},
        "counts and inverse by every rank's ids": {"expert_map": some, **both},
    }
    for name, option in options.items():
        arguments = {"topk_ids": chosen, "block_size": 4, "num_experts": 8, **option}
        yield Case("moe_align_block_size", name, given(**arguments))
    many = {"topk_ids": ids(150, 20, 2, "zipf"), "block_size": 16, "num_experts": 20}
    written = {"out": align_out(300, 16, 20, spare=50), "inv_sorted_idx": empty(150, 2), "counts": empty(20)}
    yield Case("moe_align_block_size", "several tiles given", given(**many, **written))
    none = {"topk_ids": np.zeros((0, 2), np.int32), "block_size": 4, "num_experts": 3}
    written = {"out": align_out(0, 4, 3, spare=9), "inv_sorted_idx": empty(0, 2), "counts": empty(3)}
    yield Case("moe_align_block_size", "zero tokens given", given(**none, **written))


def _variant_edges() -> Iterator[Case]:
    batches: dict[str, tuple[Any, int, int]] = {
        "no batches": ([], 5, 4),
        "no rows": ([0, 0], 0, 4),
        "one row": ([1], 1, 16),
        "empty batches": ([0, 3, 0, 0, 5, 0], 5, 4),
        "full batches": ([16] * 6, 16, 16),
        "counts out of range": ([-3, 9, 2**31 - 1, -(2**31), 4], 7, 4),
        "block_size 1": ([2, 0, 3], 3, 1),
        "block_size 3": ([7, 1, 0, 6], 7, 3),
        "300 batches": (np.arange(300) % 7, 6, 4),
    }
    for name, (sizes, most, block_size) in batches.items():
        batched = given(max_tokens_per_batch=most, block_size=block_size, expert_num_tokens=np.array(sizes, np.int32))
        yield Case("batched_moe_align_block_size", name, batched)
    past = given(max_tokens_per_batch=6, block_size=4, expert_num_tokens=np.array([2**32 + 1, 2, -(2**40)]))
    yield Case("batched_moe_align_block_size", "int64 counts past int32", past)

    slices: dict[str, tuple[Any, int]] = {
        "no slices": ([], 0),
        "no rows": ([0, 0, 0], 0),
        "published example": ([15, 17, 0, 127], 159),
        "rows to spare": ([15, 17, 0, 127], 5000),
        "a slice a row": ([1] * 40, 40),
        "fewer rows than slices": ([1, 0, 0, 1], 2),
        "whole blocks": ([128, 16, 64, 32], 240),
        "negative sizes": ([-5, 20, -(2**31), 3], 30),
        "more rows than said": ([100, 300], 90),
        "300 slices": (np.arange(300) % 50, 7350),
        "int64 schedule by rows": ([3, 70], 2**19 + 1),
    }
    for name, (rows, num_rows) in slices.items():
        ragged = given(slice_sizes=np.array(rows, np.int32), num_rows=num_rows)
        yield Case("make_ragged_metadata", name, ragged)
    yield Case("make_ragged_metadata", "int64 sizes", given(slice_sizes=np.array([40, -1, 3]), num_rows=50))

    rng = np.random.default_rng(0)
    tokens: dict[str, Any] = {
        "topk_ids": rng.integers(-1, 9, (40, 2)),
        "token_lora_mapping": rng.integers(-1, 4, 40).astype(np.int32),
        "block_size": 4,
        "num_experts": 8,
        "max_loras": 3,
    }
    some = np.array([-1, 0, 1, -1, 2, -1, 3, -1], np.int32)
    variants: dict[str, dict[str, Any]] = {
        "all adapters": {},
        "one adapter": {"max_loras": 1},
        "adapters without tokens": {"max_loras": 6},
        "disabled adapters": {"adapter_enabled": np.array([1, 0, 7], np.int32)},
        "all adapters disabled": {"adapter_enabled": np.zeros(4, np.int32)},
        "lora_ids": {"lora_ids": np.array([-1, 2, 0, 99], np.int32)},
        "no lora_ids": {"lora_ids": np.zeros(0, np.int32)},
        "disabled and not in lora_ids": {
            "adapter_enabled": np.array([1, 0, 1], np.int32),
            "lora_ids": np.array([0, 1], np.int32),
        },
        "no token with an adapter": {"token_lora_mapping": np.full(40, -1, np.int32)},
        "adapters out of range": {"token_lora_mapping": np.tile([2**40, -(2**40), 3, 1], 10)},
        "expert_map": {"expert_map": some},
        "pad_sorted_ids": {"pad_sorted_ids": True, "inactive_expert_id": 5},
        "zero tokens": {"topk_ids": np.zeros((0, 2), np.int32), "token_lora_mapping": np.zeros(0, np.int32)},
        "fewer slots than experts": {"topk_ids": np.array([[3]]), "token_lora_mapping": np.array([2])},
        "block_size 3": {"block_size": 3},
    }
    for name, option in variants.items():
        yield Case("moe_lora_align_block_size", name, given(**{**tokens, **option}))
    yield lora_case("many virtual experts", 50, 257, 2, 16, 9)


def _dispatch_edges(kinds: dict[str, np.ndarray]) -> Iterator[Case]:
    for algorithm in DISPATCH:
        for name in ("zero tokens", "-1 rows", "ids out of range", "int64 ids past int32", "several tiles"):
            yield dispatch_case(f"{name} {algorithm}", kinds[name], 8, algorithm)
        chosen = kinds["-1 rows"]
        yield dispatch_case(f"one dimension {algorithm}", chosen.ravel(), 8, algorithm, counts=None)
        yield dispatch_case(f"out {algorithm}", chosen, 8, algorithm, out=zeros(*chosen.shape))
    chosen = kinds["several tiles"]
    few = zeros(3, dtype="int64")
    many = zeros(20000, dtype="int64")
    places = np.array([[-1, 2], [3, -1], [0, 1]], np.int32)
    for algorithm, options in (("hash", {}), ("dynamic", {"step": np.array([-1]), "seed": 0})):
        gaps = {**options, "physical_map": places, "num_valid": np.array([2, 0, 9], np.int32)}
        yield dispatch_case(f"tables with gaps {algorithm}", chosen, 3, algorithm, **gaps)
        yield dispatch_case(f"fewer counters than ids {algorithm}", chosen, 8, algorithm, counts=few)
        yield dispatch_case(f"more counters than shared memory has {algorithm}", chosen, 8, algorithm, counts=many)


def _recording_edges() -> Iterator[Case]:
    chosen = np.random.default_rng(0).integers(-1, 9, (400, 2))
    options: dict[str, dict[str, int]] = {
        "off": {"enabled": 0},
        "on": {"enabled": 1},
        "padding": {"num_tokens": 303, "enabled": -1},
        "padding from before": {"num_tokens": 303, "first_row": 5},
        "padding throughout": {"num_tokens": 3, "first_row": 5},
        "more tokens than rows": {"num_tokens": 2**31 - 1},
        "tokens below 0": {"num_tokens": -(2**31), "first_row": 2**31 - 1},
    }
    for name, scalars in options.items():
        yield recording_case(f"several tiles {name}", chosen, 8, **scalars)
    yield recording_case("one dimension", chosen.ravel(), 8, num_tokens=303)
    yield recording_case("more counters than shared memory has", chosen, 20000)


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
    some = ("softcap", "bias in logits", "shared experts", "zero experts as 0", "many at once")
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
    yield experts_case("expert_map of no expert", skipping, 4, 8, 8, "float32", expert_map=np.full(8, -1, np.int32))


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
    """Yield cases of the routing of a trained model, of so many tokens at most."""
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


def input_cases(path: Path, num_experts: int | None, top_k: int, block_size: int) -> Iterator[Case]:
    """Yield every op that applies to a user's own routing; nothing in the file is executed."""
    for name, array in load_routing(path).items():
        label = f"{path.name}: {name}"
        if np.issubdtype(array.dtype, np.floating):
            # float16 keeps its dtype; the rest becomes float32 before either side sees it
            logits = array if array.dtype == np.float16 else array.astype(np.float32)
            experts = logits.shape[1]
            count = min(top_k, experts)
            for op in ("topk_softmax", "topk_sigmoid"):
                yield Case(op, label, given(gating_output=logits, top_k=count, renormalize=True))
            chosen = reference.topk_softmax(logits, count).topk_ids
        else:
            chosen = array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)
            experts = num_experts or int(chosen.max(initial=0)) + 1
        align = given(topk_ids=chosen, block_size=block_size, num_experts=experts)
        yield Case("moe_align_block_size", label, align)
        yield Case("count_tokens_per_expert", label, given(topk_ids=chosen, num_experts=experts))
        if chosen.ndim == 2:
            rows = floats(len(chosen), 64)
            yield Case("moe_permute", label, given(hidden_states=rows, topk_ids=chosen, num_experts=experts))


def load_routing(path: Path) -> dict[str, np.ndarray]:
    """Read topk_ids and gating logits from .npy, .npz, .safetensors or .pt, without running code from the file."""
    loaded: Any
    if path.suffix == ".npy":
        loaded = {"array": np.load(path, allow_pickle=False)}
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            loaded = dict(file)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        loaded = load_file(path)
    elif path.suffix in (".pt", ".pth"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        loaded = loaded if isinstance(loaded, dict) else {"tensor": loaded}
    else:
        raise ValueError(f"`--input` must be a .npy, .npz, .safetensors or .pt file, got {path.name}")
    usable = {}
    for name, value in loaded.items():
        array = testing.to_numpy(value) if isinstance(value, torch.Tensor) else value
        if isinstance(array, np.ndarray) and (
            (np.issubdtype(array.dtype, np.integer) and array.ndim in (1, 2))
            or (np.issubdtype(array.dtype, np.floating) and array.ndim == 2)
        ):
            usable[str(name)] = np.ascontiguousarray(array)
    if not usable:
        raise ValueError(f"{path.name} holds no topk_ids (integers, 1 or 2 dimensions) and no logits (floats, 2)")
    return usable
