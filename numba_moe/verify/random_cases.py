"""Random cases: calls of the public ops with everything about them drawn, and their comparison with the reference.

A case follows from its seed and index alone, so that any that fails can be run again by itself. To add an op, write a
function that draws its arguments, and name it in `DRAWS`.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from numba_moe import align_sizes
from numba_moe.reference.activation import ACTIVATIONS, RULES
from numba_moe.reference.dispatch import DispatchTables
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import Case
from numba_moe.verify.verification import Outcome

BLOCK_SIZES = (1, 3, 4, 16, 32, 64, 100, 128, 256)
NO_EXPERT = (-1, -1, -2, -(2**31), 2**31 - 1)
# The lower 32 bits of these are an expert.
PAST_INT32 = (2**32, 2**32 + 1, -(2**32), 2**40, -(2**63))
SOFTCAPS = (0, 3, np.inf, 1e-40)
FAILURES_SHOWN = 10


class Limits(NamedTuple):
    """The largest cases, how many of the largest are drawn, and the cases of a run unless told otherwise."""

    slots: int
    experts: int
    share_of_largest: float
    cases: int


ON_GPU = Limits(2**17, 2048, 0.02, 20_000)
IN_SIMULATOR = Limits(400, 40, 0.0, 100)


def number(rng: np.random.Generator, lowest: int, highest: int) -> int:
    """Draw an integer of its bounds, small ones as likely as large ones by order of magnitude."""
    return round((lowest + 1) * ((highest + 1) / (lowest + 1)) ** rng.random()) - 1


def slots(rng: np.random.Generator, limits: Limits) -> int:
    """Draw a number of slots, now and then a large one."""
    highest = limits.slots
    return 8 * highest if rng.random() < limits.share_of_largest else number(rng, 0, highest)


def dtype(rng: np.random.Generator) -> str:
    return str(rng.choice(["int32", "int64"]))


def outside(rng: np.random.Generator, kind: str, count: int, size: Any) -> np.ndarray:
    """Draw integers that are not in ``[0, count)``, past int32 too if the dtype is that wide."""
    return rng.choice([*NO_EXPERT, count, *(PAST_INT32 if kind == "int64" else ())], size)


def shares(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Draw numbers below `count`: of one popularity, skewed, or nearly all the same."""
    skew = rng.choice([1, 1, 3, 50])
    return rng.permutation(count)[(count * rng.random(size) ** skew).astype(np.int64)]


def routing(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    """Draw which experts tokens choose: skewed or not, with ids that are no expert's or without."""
    num_experts = number(rng, 1, limits.experts)
    top_k = number(rng, 1, 16)
    tokens = slots(rng, limits) // top_k
    ids, kind = shares(rng, tokens * top_k, num_experts), dtype(rng)
    invalid = rng.random(ids.size) < rng.choice([0, 0, 0.02, 0.5, 1], p=[0.3, 0.3, 0.2, 0.18, 0.02])
    ids[invalid] = outside(rng, kind, num_experts, ids.size)[invalid]
    return {"topk_ids": ids.reshape(tokens, top_k).astype(kind), "num_experts": num_experts}


def expert_map(rng: np.random.Generator, num_experts: int) -> np.ndarray | None:
    """Draw no map, or one that gives this rank some of the experts, and now and then ids that are no expert's."""
    if rng.random() < 0.5:
        return None
    local = np.where(rng.random(num_experts) < rng.random(), rng.permutation(num_experts), -1)
    invalid, kind = rng.random(num_experts) < rng.choice([0, 0.1]), dtype(rng)
    local[invalid] = outside(rng, kind, num_experts + int(rng.integers(2)), num_experts)[invalid]
    return local.astype(kind)


def flag(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def memory(*shape: int) -> np.ndarray:
    """Return memory to be written, with something in it."""
    return np.full(shape, 0x5EADBEEF, np.int32)


def align(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits)
    ids, num_experts = drawn["topk_ids"], drawn["num_experts"]
    sizes = (ids.size, int(rng.choice(BLOCK_SIZES)), num_experts, flag(rng))
    drawn |= {"block_size": sizes[1], "pad_sorted_ids": sizes[3], "expert_map": expert_map(rng, num_experts)}
    drawn |= {"ignore_invalid_experts": flag(rng), "inactive_expert_id": int(rng.integers(-1, 2))}
    if flag(rng):
        drawn["topk_ids"] = ids = ids.ravel()
    if flag(rng):
        drawn |= {"inv_sorted_idx": memory(*ids.shape), "counts": memory(num_experts)}
    if flag(rng):
        enough = align_sizes(*sizes)
        length = enough.sorted_token_ids + int(rng.choice([0, number(rng, 0, 1000)]))
        drawn["out"] = memory(length), memory(-(-length // sizes[1])), memory(1)
        drawn["workspace"] = memory(enough.workspace) if flag(rng) else None
    return drawn


def count(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits)
    return drawn | {"expert_map": expert_map(rng, drawn["num_experts"])}


def rows(rng: np.random.Generator, limits: Limits, lowest: int = 0) -> np.ndarray:
    """Draw how many rows each expert has, `lowest` or more."""
    num_experts = number(rng, 0, limits.experts)
    sizes = np.bincount(shares(rng, slots(rng, limits), max(1, num_experts)), minlength=num_experts)[:num_experts]
    sizes[rng.random(num_experts) < rng.choice([0, 0.2])] = lowest
    return sizes.astype(dtype(rng))


def past_int32(rng: np.random.Generator, counts: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Put large values among some counts if they are int64."""
    if counts.dtype == np.int64 and flag(rng):
        counts[rng.random(counts.size) < 0.2] = rng.choice(values)
    return counts


def layout(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits)
    num_ranks, kind = number(rng, 1, 72), "int32"
    ranks = shares(rng, drawn.pop("num_experts"), num_ranks).astype(kind)
    invalid = rng.random(ranks.size) < rng.choice([0, 0.1])
    ranks[invalid] = outside(rng, kind, num_ranks, ranks.size)[invalid]
    return drawn | {"rank_of_expert": ranks, "num_ranks": num_ranks}


def offsets(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    counts = past_int32(rng, rows(rng, limits), (2**32, 2**40 + 1))
    return {"counts": counts, "alignment": int(rng.choice(BLOCK_SIZES))}


def batched(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    sizes = past_int32(rng, rows(rng, limits, lowest=-3), PAST_INT32)
    return {
        "max_tokens_per_batch": number(rng, 0, 8 * limits.slots // (len(sizes) + 1)),
        "block_size": int(rng.choice(BLOCK_SIZES)),
        "expert_num_tokens": sizes,
    }


def lora(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits._replace(slots=limits.slots // 4, experts=min(256, limits.experts)))
    max_loras = number(rng, 1, 16)
    adapters = rng.integers(-1, max_loras + 1, len(drawn["topk_ids"])).astype(dtype(rng))
    return drawn | {
        "token_lora_mapping": past_int32(rng, adapters, PAST_INT32),
        "block_size": int(rng.choice(BLOCK_SIZES)),
        "max_loras": max_loras,
        "adapter_enabled": rng.integers(0, 2, max_loras + 1).astype(np.int32) if flag(rng) else None,
        "lora_ids": rng.permutation(np.arange(-1, max_loras, dtype=np.int32))[flag(rng) :] if flag(rng) else None,
        "expert_map": expert_map(rng, drawn["num_experts"]),
        "pad_sorted_ids": flag(rng),
        "inactive_expert_id": int(rng.integers(-1, 2)),
    }


def ragged(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    sizes = rows(rng, limits, lowest=-3)
    spare = int(rng.choice([0, number(rng, 0, limits.slots)]))
    return {"slice_sizes": sizes, "num_rows": int(np.maximum(sizes, 0).sum()) + spare}


def payload(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw rows of floats or of bytes."""
    if rng.random() < 0.3:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32).astype(rng.choice(["float32", "float16"]))


def permuting(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits)
    tokens, num_experts = len(drawn["topk_ids"]), drawn["num_experts"]
    width = number(rng, 0, 64)
    return drawn | {
        "hidden_states": payload(rng, tokens, width * int(rng.choice([1, 8]))),
        "expert_map": expert_map(rng, num_experts),
        "scales": payload(rng, *(tokens, number(rng, 0, 9))[: int(rng.integers(1, 3))]) if flag(rng) else None,
        "zero_padding": flag(rng),
    }


def permuted(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    alignment = int(rng.choice([1, 3, 16, 128])) if flag(rng) else None
    # The most experts and alignment would be a quarter of a million rows of padding.
    few = limits if alignment is None or alignment < 16 else limits._replace(experts=min(256, limits.experts))
    return permuting(rng, few) | {"alignment": alignment}


def masked(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = permuting(rng, limits._replace(slots=limits.slots // 4, experts=min(256, limits.experts)))
    batches = number(rng, 1, drawn["num_experts"]) if flag(rng) else None
    return drawn | {"max_m": number(rng, 1, 200), "num_local_experts": batches}


def unpermuted(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    top_k, width = number(rng, 1, 40), number(rng, 0, 64) * int(rng.choice([1, 8]))
    tokens = slots(rng, limits) // top_k
    num_rows = tokens * top_k + number(rng, 0, 100)
    index = rng.permutation(num_rows)[: tokens * top_k].astype(np.int32)
    invalid = rng.random(index.size) < rng.choice([0, 0.02, 0.5])
    index[invalid] = rng.choice([*NO_EXPERT, num_rows], index.size)[invalid]
    kind = rng.choice(["float32", "float16"])
    return {
        "permuted": rng.standard_normal((num_rows, width), np.float32).astype(kind),
        "topk_weights": rng.random((tokens, top_k), np.float32).astype(kind),
        "inv_permuted_idx": index.reshape(tokens, top_k),
        "routed_scaling_factor": float(rng.choice([1, 2.5])),
        "out_dtype": "float32" if flag(rng) else None,
    }


def summed(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits)
    width = number(rng, 0, 64) * int(rng.choice([1, 8]))
    return {
        "hidden_states": rng.standard_normal((*drawn["topk_ids"].shape, width), np.float32),
        "topk_ids": drawn["topk_ids"] if flag(rng) else None,
        "routed_scaling_factor": float(rng.choice([1, 2.5])),
    }


def logits(rng: np.random.Generator, tokens: int, num_experts: int) -> np.ndarray:
    """Draw logits: with ties or without, with some that are not finite or without."""
    drawn = rng.standard_normal((tokens, num_experts)) * rng.choice([1, 5])
    drawn = np.round(drawn) if flag(rng) else drawn
    special = rng.random(drawn.shape) < rng.choice([0, 0, 1 / (4 * num_experts), 0.3])
    drawn[special] = rng.choice([np.nan, np.inf, -np.inf], drawn.shape)[special]
    return drawn.astype(rng.choice(["float32", "float16"]))


def selection(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    groups = int(rng.choice([1, 1, 2, 3, 4, 8, 33]))
    group_size = number(rng, 1, max(1, limits.experts // groups))
    topk_group = number(rng, 1, groups)
    top_k = number(rng, 1, min(40, topk_group * group_size))
    num_experts = groups * group_size
    rules = ["max", "top2_sum"] if top_k < topk_group else ["max", "top2_sum", "topk_sum"]
    drawn = logits(rng, slots(rng, limits) // max(8, num_experts), num_experts)
    scoring_func, renormalize = str(rng.choice(["softmax", "sigmoid", "softplus_sqrt", "raw"])), flag(rng)
    chosen = {
        # Where scores of both signs cancel, their sum has no digits left to divide by.
        "gating_output": np.abs(drawn) if scoring_func == "raw" and renormalize else drawn,
        "top_k": top_k,
        "scoring_func": scoring_func,
        "renormalize": renormalize,
        "correction_bias": rng.standard_normal(num_experts).astype(np.float32) if flag(rng) else None,
        "num_expert_group": groups,
        "topk_group": topk_group,
        "group_score": str(rng.choice(rules)) if flag(rng) else None,
        "routed_scaling_factor": float(rng.choice([1, 2.5])),
    }
    if flag(rng):
        return lowered(rng, chosen)
    if scoring_func != "raw" and flag(rng):
        chosen |= {"softcap": float(rng.choice(SOFTCAPS)), "bias_mode": str(rng.choice(["choice", "logits"]))}
    # Rows that hang on the rounding of scores may choose, and so count, other experts.
    biased = chosen["correction_bias"] is not None and chosen.get("bias_mode") != "logits"
    exact = not (biased or chosen.get("softcap") or chosen["group_score"] in ("top2_sum", "topk_sum"))
    return lowered(rng, chosen | options(rng, len(drawn), num_experts, scoring_func != "raw", exact))


def lowered(rng: np.random.Generator, drawn: dict[str, Any]) -> dict[str, Any]:
    """Lower logits now and then, until scores sum to next to nothing; then no identity weights are compared."""
    if drawn["scoring_func"] in ("sigmoid", "softplus_sqrt") and drawn.get("identity_weights") is None:
        drawn["gating_output"] -= drawn["gating_output"].dtype.type(rng.choice([0, 0, 0, 60, 84]))
    return drawn


def options(
    rng: np.random.Generator, tokens: int, num_experts: int, positive: bool = True, exact: bool = True
) -> dict[str, Any]:
    """Draw what gating does besides choosing.

    Weights are summed only where all are positive, and slots counted where ids are exact.
    """
    num_zero = number(rng, 0, num_experts - 1) if rng.random() < 0.2 else 0
    num_shared = int(rng.choice([0, 0, 1, 3])) if positive else 0
    drawn: dict[str, Any] = {
        "num_fused_shared_experts": num_shared,
        "apply_routed_scaling_factor_on_output": flag(rng),
        "num_zero_experts": num_zero,
        "zero_expert_id": int(rng.integers(-1, 1)),
        "indices_dtype": str(rng.choice(["int32", "int64", "int16"])),
    }
    if flag(rng):
        drawn["renormalize_epsilon"] = float(rng.choice([1e-20, 0.5]))
    if flag(rng):
        drawn["expert_scale"] = rng.standard_normal(num_experts).astype(np.float32)
    if flag(rng):
        drawn["shared_expert_weight"] = float(rng.choice([1, 0.25]))
    if flag(rng):
        real = np.array([number(rng, 0, tokens + 1)]).astype(dtype(rng))
        drawn["num_token_non_padded"] = past_int32(rng, real, PAST_INT32)
    if flag(rng):
        drawn["is_padding"] = rng.random(tokens) < 0.3
    known = num_experts - num_zero + num_shared
    if flag(rng):
        drawn["dispatch"] = tables(rng, known)
    if exact and flag(rng):
        rows = [2 ** number(rng, 0, 6)] if flag(rng) else []
        drawn["counts"] = np.zeros((*rows, number(rng, 0, 2 * known)), dtype(rng))
        drawn["counts_enabled"] = rng.integers(0, 2, 1).astype(np.int32) if flag(rng) else None
    if exact and positive and flag(rng):
        drawn["identity_weights"] = np.zeros(tokens, np.float32)
    return drawn


def tables(rng: np.random.Generator, num_experts: int) -> tuple[Any, ...]:
    """Draw the places of experts, and how to pick among them."""
    algorithm = str(rng.choice(["static", "dynamic", "hash", "fake"]))
    places = rng.integers(-1, 2 * num_experts, (num_experts, 3)).astype(np.int32)
    places[places < 0] = rng.choice([-1, -2, -(2**31)])
    if algorithm in ("static", "fake"):
        return places[:, 0].copy(), None, algorithm, 0, None
    step = rng.integers(-(2**63), 2**63 - 1, 1) if algorithm == "dynamic" else None
    return places, rng.integers(-1, 5, num_experts).astype(np.int32), algorithm, int(rng.integers(2**40)), step


def dispatched(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    """Draw slots to be dispatched."""
    num_experts, top_k, kind = number(rng, 1, limits.experts), number(rng, 1, 10), dtype(rng)
    tokens = slots(rng, limits) // top_k
    ids = rng.integers(0, num_experts, (tokens, top_k)).astype(kind)
    unknown = rng.random(ids.shape) < 0.2
    ids[unknown] = outside(rng, kind, num_experts, int(unknown.sum()))
    places = DispatchTables(*tables(rng, num_experts))._asdict()
    drawn = {"topk_ids": ids if flag(rng) else ids.ravel(), **places}
    if flag(rng):
        drawn["num_token_non_padded"] = np.array(number(rng, 0, tokens + 1), dtype(rng))
    if flag(rng):
        drawn["counts"] = np.zeros(number(rng, 0, 2 * num_experts), dtype(rng))
    return drawn


def given_experts(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    num_experts, top_k = number(rng, 1, limits.experts), number(rng, 1, 40)
    drawn = logits(rng, slots(rng, limits) // max(8, num_experts), num_experts)
    tokens, rows = len(drawn), number(rng, 0, 100)
    by_table = flag(rng)
    ids = rng.integers(-2, num_experts + 2, (rows if by_table else tokens, top_k))
    ids = ids.astype(str(rng.choice(["int16", "int32", "int64"])))
    input_ids = past_int32(rng, rng.integers(-1, rows + 1, tokens).astype(dtype(rng)), PAST_INT32)
    given = {
        "gating_output": drawn,
        "topk_ids": past_int32(rng, ids.ravel(), PAST_INT32).reshape(ids.shape),
        "input_ids": input_ids if by_table else None,
        "scoring_func": str(rng.choice(["softmax", "sigmoid", "softplus_sqrt"])),
        "renormalize": flag(rng),
        "routed_scaling_factor": float(rng.choice([1, 2.5])),
        "softcap": float(rng.choice(SOFTCAPS)),
        "logit_bias": rng.standard_normal(num_experts).astype(np.float32) if flag(rng) else None,
        **options(rng, tokens, num_experts),
    }
    return lowered(rng, given)


def decode(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    """Draw gating and alignment at once, of few tokens as a rule."""
    drawn = selection(rng, limits._replace(experts=min(600, limits.experts)))
    tokens, num_experts = drawn["gating_output"].shape
    few = min(tokens, number(rng, 0, 80)) if rng.random() < 0.9 else tokens
    for name in ("gating_output", "is_padding", "identity_weights"):
        if drawn.get(name) is not None:
            drawn[name] = drawn[name][:few].copy()
    sorted_by = num_experts - drawn.get("num_zero_experts", 0) + drawn.get("num_fused_shared_experts", 0)
    if "dispatch" in drawn:
        sorted_by = drawn["num_physical_experts"] = number(rng, 1, 2 * sorted_by)
    return drawn | {
        "block_size": int(rng.choice(BLOCK_SIZES)),
        "expert_map": expert_map(rng, sorted_by),
        "pad_sorted_ids": flag(rng),
        "ignore_invalid_experts": flag(rng),
        "inactive_expert_id": int(rng.integers(-1, 2)),
    }


def activation_options(rng: np.random.Generator, names: tuple[str, ...]) -> dict[str, Any]:
    """Draw an activation, and the numbers that it has."""
    name = str(rng.choice(names))
    rule = RULES[name]
    drawn: dict[str, Any] = {"activation": name}
    if rule.halves == 2 and flag(rng):
        drawn["interleaved"] = bool(flag(rng))
    choices = {"limit": [0.5, 7], "alpha": [0, 0.5, 1.702], "beta": [0.5, 4], "linear_beta": [0.5, 25]}
    for option, values in choices.items():
        if getattr(rule, option) is not None and flag(rng):
            drawn[option] = float(rng.choice(values))
    return drawn


def activation(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    sizes = np.append(rows(rng, limits._replace(slots=limits.slots // 16)), 1)
    offset = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    options = activation_options(rng, tuple(RULES))
    columns = number(rng, 0, 100) * int(rng.choice([1, 8])) * RULES[options["activation"]].halves
    drawn = (3 * rng.standard_normal((offset[-1] + number(rng, 0, 9), columns))).astype(
        rng.choice(["float32", "float16"])
    )
    drawn[rng.random(drawn.shape) < 0.01] *= 20
    return {
        "gate_up": drawn,
        "expert_first_token_offset": offset,
        "bias": rng.standard_normal((len(sizes), columns)).astype(drawn.dtype) if flag(rng) else None,
        **options,
    }


def experts(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits._replace(slots=min(limits.slots, 2**13), experts=min(limits.experts, 256)))
    ids, num_experts = drawn["topk_ids"], drawn.pop("num_experts")
    local = num_experts
    if flag(rng):
        local = number(rng, 1, num_experts)
        kind = dtype(rng)
        places = outside(rng, kind, local, num_experts)
        places[rng.permutation(num_experts)[:local]] = rng.permutation(local)
        drawn["expert_map"] = places.astype(kind)
    hidden, width = (number(rng, 1, 24) * int(rng.choice([1, 8])) for _ in range(2))
    # Where few terms make a result, it may be as small as the roundings of float16 before it, and with a bias, which
    # may take away nearly all of a term, as those of float32.
    few = min(hidden, width) < 16
    kind = "float32" if few else rng.choice(["float32", "float16"])

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / max(1, shape[-1]) ** 0.5).astype(kind)

    options = activation_options(rng, ACTIVATIONS)
    rows = RULES[options["activation"]].halves * width
    drawn |= {
        "hidden_states": (rng.standard_normal((len(ids), hidden))).astype(kind),
        "gate_up_proj": normal(local, rows, hidden),
        "down_proj": normal(local, hidden, width),
        "topk_weights": rng.random(ids.shape, np.float32),
        **options,
    }
    if flag(rng) and not few:
        drawn |= {"gate_up_bias": normal(local, rows), "down_bias": normal(local, hidden)}
    return drawn


def constants(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    drawn = routing(rng, limits._replace(slots=min(limits.slots, 2**13), experts=min(limits.experts, 256)))
    ids, num_experts = drawn["topk_ids"], drawn["num_experts"]
    hidden = number(rng, 1, 24) * int(rng.choice([1, 8]))
    kind = rng.choice(["float32", "float16"])
    first, copies, constants = (number(rng, 0, num_experts) for _ in range(3))

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(kind)

    return {
        "hidden_states": normal(len(ids), hidden),
        "topk_weights": rng.random(ids.shape, np.float32),
        "topk_ids": ids,
        "num_experts": first,
        "num_copies": copies,
        "constants": normal(constants, hidden) if flag(rng) else None,
        "combined": normal(len(ids), hidden) if flag(rng) else None,
    }


DRAWS: Mapping[str, Callable[[np.random.Generator, Limits], dict[str, Any]]] = {
    "moe_align_block_size": align,
    "count_tokens_per_expert": count,
    "dispatch_layout": layout,
    "expert_offsets": offsets,
    "batched_moe_align_block_size": batched,
    "moe_lora_align_block_size": lora,
    "make_ragged_metadata": ragged,
    "select_experts": selection,
    "moe_permute": permuted,
    "moe_permute_masked": masked,
    "moe_reorder": count,
    "moe_unpermute": unpermuted,
    "moe_sum": summed,
    "dispatch_ids": dispatched,
    "weigh_experts": given_experts,
    "route": decode,
    "moe_activation": activation,
    "fused_experts": experts,
    "constant_experts": constants,
}


def random_case(index: int, limits: Limits) -> Case:
    """Return one of the cases: they take turns in their ops; the rest comes from the generator."""
    op = tuple(DRAWS)[index % len(DRAWS)]
    return Case(op, f"index {index}", lambda rng: DRAWS[op](rng, limits))


def describe(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of a call, arrays as their dtype and shape."""

    def short(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(map(short, value))})"
        return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)

    return ", ".join(f"{name}={short(value)}" for name, value in arguments.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a run."""
    defaults = f"{ON_GPU.cases}, or {IN_SIMULATOR.cases} smaller ones in the simulator"
    parser.add_argument("--cases", type=int, metavar="N", help=f"how many (default {defaults})")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default 0)")
    parser.add_argument("--index", type=int, metavar="I", help="run this case alone, and show its arguments")
    parser.add_argument("--op", action="append", metavar="PATTERN", help="only these ops; * and ? match")


def run(options: argparse.Namespace) -> int:
    """Run the cases, print a table, and return the exit status: 1 if a case failed or nothing ran."""
    on_gpu = torch.cuda.is_available()
    limits = ON_GPU if on_gpu else IN_SIMULATOR
    if options.index is None:
        indices = list(range(limits.cases if options.cases is None else options.cases))
    else:
        indices = [options.index]
    where = verification.environment(on_gpu)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    chosen = [(index, random_case(index, limits)) for index in indices]
    chosen = [(index, case) for index, case in chosen if testing.matches(case.op, options.op)]
    outcomes: list[Outcome] = []
    failures = 0
    for index, case in tqdm(chosen, unit="case", disable=not sys.stderr.isatty(), leave=False):
        seed = (options.seed, index)
        outcome = verification.run_case(case, seed, "cuda" if on_gpu else "cpu", timed=False)
        outcomes.append(outcome)
        failures += not outcome.passed
        if options.index is not None or (not outcome.passed and failures <= FAILURES_SHOWN):
            print(f"{case.op}({describe(case.arguments(np.random.default_rng(seed)))})")
        if not outcome.passed and failures <= FAILURES_SHOWN:
            print(f"  FAILED {outcome.message or 'repeats differ, or arguments are not left as they should be'}")
            print(f"  again: python scripts/random_cases.py --seed {options.seed} --index {index}")
    print(verification.summary(outcomes))
    print(f"{len(chosen) - failures} passed, {failures} failed")
    return 1 if failures or not chosen else 0
