"""Calls that break the kernels that group and count slots."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from numba_moe import align_sizes
from numba_moe.verify.cases.draws import (
    DISPATCH,
    Case,
    align_out,
    dispatch_case,
    empty,
    floats,
    given,
    ids,
    lora_case,
    recording_case,
    zeros,
)


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
        "1100 slots": np.random.default_rng(1).integers(-1, 9, (550, 2)).astype(np.int32),
        "several tiles": np.random.default_rng(0).integers(-1, 9, (400, 2)).astype(np.int32),
    }
    for name, chosen in kinds.items():
        yield Case("moe_align_block_size", name, given(topk_ids=chosen, block_size=4, num_experts=8))
        yield Case("count_tokens_per_expert", name, given(topk_ids=chosen, num_experts=8))
        yield recording_case(name, chosen, 8)
        ranks = np.array([0, 2, 2, -1, 1, 5, 0, 3], np.int32)
        yield Case("dispatch_layout", name, given(topk_ids=chosen, rank_of_expert=ranks, num_ranks=4))
        rows = floats(len(chosen), 20)
        yield Case("moe_permute", name, given(hidden_states=rows, topk_ids=chosen, num_experts=8))
        yield Case("moe_reorder", name, given(topk_ids=chosen, num_experts=8))

    many = np.random.default_rng(1).integers(-1, 71, (9, 40)).astype(np.int32)
    spread = np.random.default_rng(2).integers(0, 40, 70).astype(np.int32)
    yield Case("dispatch_layout", "40 of 70 on 40 ranks", given(topk_ids=many, rank_of_expert=spread, num_ranks=40))
    wide = np.zeros(60_000, np.int32)
    yield Case("dispatch_layout", "60000 experts", given(topk_ids=many, rank_of_expert=wide, num_ranks=1))

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
        yield Case("count_tokens_per_expert", name, given(topk_ids=drawn, num_experts=experts))
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
        for tokens, kind in ((0, "int32"), (3, "int64"), (2**40, "int64")):
            real = {"num_token_non_padded": np.array([tokens], kind)}
            yield dispatch_case(f"{tokens} real tokens {algorithm}", chosen, 8, algorithm, **real)
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


def edges() -> Iterator[Case]:
    """Yield them all."""
    yield from _grouping_edges()
    yield from _written_edges()
    yield from _variant_edges()
    yield from _recording_edges()
