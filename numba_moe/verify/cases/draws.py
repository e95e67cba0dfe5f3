"""What cases are, and what draws their arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numba_moe import reference
from numba_moe.reference.activation import RULES
from numba_moe.reference.align import max_sorted_slots
from numba_moe.verify import testing

Draw = Callable[[np.random.Generator], Any]


class Case(NamedTuple):
    """One call of a public op."""

    op: str
    name: str
    arguments: Callable[[np.random.Generator], dict[str, Any]]
    dtype: str | None = None  # of the float payload on the device
    strided: bool = False  # rows of the payload lie inside wider ones


DTYPES = ("float32", "bfloat16", "float16")
DISPATCH = ("static", "dynamic", "hash", "fake")


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


def integers(lowest: int, after: int, *shape: int) -> Draw:
    return lambda rng: rng.integers(lowest, after, shape).astype(np.int32)


def integers_of(dtype: str, *shape: int) -> Draw:
    """Return any integers of a dtype."""
    return lambda rng: rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype)


def zeros(*shape: int, dtype: str = "int32") -> Draw:
    """Return what makes an array that a call may write."""
    return lambda rng: np.zeros(shape, dtype)


def lora_case(name: str, tokens: int, experts: int, top_k: int, block_size: int, max_loras: int) -> Case:
    """Return the alignment of tokens with `max_loras` adapters, one of them disabled, and of tokens without adapter."""
    arguments = given(
        topk_ids=ids(tokens, experts, top_k, "zipf"),
        token_lora_mapping=lambda rng: rng.integers(-1, max_loras, tokens),
        block_size=block_size,
        num_experts=experts,
        max_loras=max_loras,
        adapter_enabled=np.arange(max_loras + 1, dtype=np.int32),
    )
    return Case("moe_lora_align_block_size", name, arguments)


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
    """Return the activation of rows, `sizes` for each expert, with a bias, and of some unused rows."""
    offset = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    columns = RULES[options.get("activation", "silu")].halves * width
    rows = floats(int(offset[-1]) + spare, columns, dtype=dtype, scale=4.0)
    biased = {"expert_first_token_offset": offset, "bias": floats(len(sizes), columns, dtype=dtype)}
    return Case("moe_activation", name, given(gate_up=rows, **{**biased, **options}), dtype)


def experts_case(
    name: str, chosen: Any, local: int, hidden: int, width: int, dtype: str, bias: bool = False, **options: Any
) -> Case:
    """Return the feed-forward of tokens with ids of [num_tokens, top_k], or drawn so, through `local` experts."""
    tokens, top_k = chosen.shape if isinstance(chosen, np.ndarray) else chosen[:2]
    rows = RULES[options.get("activation", "silu")].halves * width
    biases = {"gate_up_bias": (local, rows), "down_bias": (local, hidden)} if bias else {}
    arguments = given(
        hidden_states=floats(tokens, hidden, dtype=dtype),
        gate_up_proj=floats(local, rows, hidden, dtype=dtype, scale=2.0 ** -(hidden.bit_length() // 2)),
        down_proj=floats(local, hidden, width, dtype=dtype, scale=2.0 ** -(width.bit_length() // 2)),
        topk_weights=uniform(tokens, top_k),
        topk_ids=chosen if isinstance(chosen, np.ndarray) else chosen[2],
        **{name: floats(*shape, dtype=dtype) for name, shape in biases.items()},
        **options,
    )
    return Case("fused_experts", name, arguments, dtype)


def constants_case(
    name: str, tokens: int, top_k: int, hidden: int, dtype: str, constants: int = 3, added: bool = True, **layout: bool
) -> Case:
    """Return what experts without matrices return, beside 4 with, 2 that return the token, and 2 that return zeros."""
    arguments = given(
        hidden_states=floats(tokens, hidden, dtype=dtype),
        topk_weights=uniform(tokens, top_k),
        topk_ids=lambda rng: rng.integers(-1, 8 + constants, (tokens, top_k)).astype(np.int32),
        num_experts=4,
        num_copies=2,
        constants=floats(constants, hidden, dtype=dtype) if constants else None,
        combined=floats(tokens, hidden, dtype=dtype) if added else None,
    )
    return Case("constant_experts", name, arguments, dtype, **layout)
