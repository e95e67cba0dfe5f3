"""What a choice of experts needs beside its data: which kernel serves it, with what numbers."""

from typing import Any, NamedTuple

import torch

from numba_moe.gating import memory, octets, registers
from numba_moe.gating.rows import SCORING
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.parameters import COLUMNS, EXTENDED, PLAIN
from numba_moe.runtime.plans import Layout, planned
from numba_moe.runtime.primitives import WARP

GROUP_SCORES = ("max", "top2_sum", "topk_sum")

# From so many tokens on, and so many for each expert, eight lanes serve a token instead of 32. Measured on an H200 with
# 64 to 1024 experts: eight lanes take longer for one token, and less for many; without groups half as many are many if
# keys hold a whole rank, or if one row of counters is to be had for all, to which blocks then add what they counted.
MANY_TOKENS = 2048
MANY_TOKENS_PER_EXPERT = 32
# From so many tokens on, blocks of eight warps take less time than blocks of four (1 to 7 %), and before more.
TOKENS_FOR_EIGHT_WARPS = 256


class Extras(NamedTuple):
    """What a call asks for besides choosing and weighing, of which an array is there or not; see `extras`."""

    softcap: float = 0.0
    bias_in_logits: bool = False
    scalar_bytes: int = 0
    id_dtype: torch.dtype = torch.int32
    num_zero_experts: int = 0
    zero_expert_id: int = -1
    num_shared: int = 0
    shared_factor: float = 1.0
    table: tuple[int, ...] = (0, 0, 0, 0)  # rows and columns, the algorithm and its seed
    num_counts: int = 0
    count_rows: int = 1
    count_bytes: int = 0
    role: int = EXTENDED

    def numbers(self, num_experts: int) -> tuple[float, ...]:
        """Return what the kernels take last."""
        num_real = num_experts - self.num_zero_experts
        ids = (self.id_dtype.itemsize, num_real, self.zero_expert_id, self.num_shared, self.shared_factor)
        return (self.softcap, self.scalar_bytes, *ids, *self.table, self.num_counts, self.count_rows, self.count_bytes)


NO_EXTRAS = Extras(role=PLAIN)
# The kernels' arrays for extras.
EXTRA_ARRAYS = 9


class GatingPlan(NamedTuple):
    """The results, the launch, whether it is of the kernel for rows of any size, and the group scores of that one.

    And the numbers and choices of the launch, for a kernel that does the same and more.
    """

    topk_weights: arrays.Contiguous
    topk_ids: arrays.Contiguous
    choose: Launch
    in_memory: bool
    group_scores: arrays.Contiguous | None
    numbers: tuple[float, ...]
    choices: dict[str, Any]


def in_vectors(gating_output: Layout, group_size: int, size: int = 4) -> bool:
    """Whether the logits of every group can be read four at a time."""
    stride = gating_output.shape[1] if gating_output.strides is None else gating_output.strides[0]
    bytes_read = min(16, size * gating_output.dtype.itemsize)
    return not (group_size % size or stride % size or gating_output.address % bytes_read)


def _plan(
    gating_output: Layout,
    top_k: int,
    renormalize: bool,
    correction_bias: Layout | None,
    scoring_func: str,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_picks: int = 1,
    routed_scaling_factor: float = 1.0,
    extras: Extras | None = None,
    tiers: tuple[int, ...] = COLUMNS,
) -> GatingPlan:
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_tokens, num_experts = gating_output.shape
    checks.integer("num_experts (columns of `gating_output`)", num_experts, 1)
    top_k = checks.integer("top_k", top_k, 1, num_experts, f"num_experts = {num_experts}")
    checks.boolean("renormalize", renormalize)
    num_slots = top_k + (0 if extras is None else extras.num_shared)
    checks.fits_int32("gating_output", num_tokens * num_slots, "num_tokens * top_k")
    if correction_bias is not None:
        like = ("gating_output", gating_output)
        checks.array("correction_bias", correction_bias, (torch.float32,), (1,), like=like)
        checks.shape("correction_bias", correction_bias, (num_experts,), "(num_experts,)")

    dtype, device, group_size = gating_output.dtype, gating_output.device, num_experts // num_expert_group
    stride = num_experts if gating_output.strides is None else gating_output.strides[0]
    sizes = (num_tokens, num_experts, stride)
    scoring = SCORING.index(scoring_func)
    rules = (int(renormalize), float(routed_scaling_factor))
    groups = (num_expert_group, topk_group, group_picks)
    extra = NO_EXTRAS if extras is None else extras
    biased = correction_bias is not None and not extra.bias_in_logits
    last = extra.numbers(num_experts)
    absent = EXTRA_ARRAYS if extras is None else 0
    # Weights that sum to one, and a choice by logits, do without the sum of all exponentials.
    by_scores = biased or (num_expert_group > 1 and group_picks > 1)
    whole_softmax = scoring_func == "softmax" and (by_scores or not renormalize)
    vectors = in_vectors(gating_output, group_size)
    # Whether the bias can be read with the logits, and how many of them at a time.
    bias_too = vectors and (not biased or (correction_bias is not None and correction_bias.address == 0))
    together = 8 if bias_too and in_vectors(gating_output, group_size, 8) else 4 * int(bias_too)
    lane_bits = (WARP // num_expert_group).bit_length() - 1  # -1 if there are more groups than lanes
    exact = correction_bias is None and dtype.itemsize == 2 and not extra.softcap
    in_block = extra.num_counts if extra.count_rows == 1 and extra.num_counts <= octets.MOST_COUNTS_IN_BLOCK else 0
    per_expert = MANY_TOKENS_PER_EXPERT // (2 if num_expert_group == 1 and (exact or in_block) else 1)
    many = max(MANY_TOKENS, per_expert * num_experts)
    group_scores, shared_bytes = None, 0
    in_memory = lane_bits < 0 or tiers[-1] << lane_bits < group_size or (num_expert_group > 1 and group_picks > 2)
    if in_memory:
        if num_expert_group > 1:
            group_scores = arrays.contiguous(torch.float32, num_tokens, num_expert_group)
        whole_softmax = whole_softmax or (scoring_func == "softmax" and num_expert_group > 1)
        of_row = (*sizes, together, top_k, scoring, int(whole_softmax))
        numbers: tuple[float, ...] = (*of_row, *rules, *groups, *last)
        kernel, where = memory.choose_from_memory, (device, *warps(num_tokens, memory.WARPS_IN_BLOCK))
        choices: dict[str, Any] = {"gating_output": dtype, "role": extra.role}
    elif tiers is COLUMNS and num_tokens >= many and top_k <= octets.MOST_PICKS and num_expert_group in (1, 2, 4, 8):
        whole_softmax = whole_softmax or (scoring_func == "softmax" and num_expert_group > 1)
        mask = (1 << (num_experts - 1).bit_length()) - 1
        of_row = (*sizes, together, top_k, scoring, int(whole_softmax))
        of_keys = ((octets.LANES // num_expert_group).bit_length() - 1, mask, int(exact), in_block)
        where = (device, *warps(-(-num_tokens * octets.LANES // WARP), 8 if in_block else 4))
        shared_bytes = 4 * in_block
        numbers = (*of_row, *rules, *groups, group_size, *of_keys, *last)
        kernel, choices = octets.choose_for_many, {"gating_output": dtype, "role": extra.role}
    else:
        columns = next(columns for columns in tiers if columns << lane_bits >= group_size)
        aligned = vectors and columns >= 4
        ragged = num_experts != WARP * columns
        flags = (int(aligned), int(ragged), top_k, int(exact), scoring, int(whole_softmax))
        numbers = (*sizes, *flags, *rules, *groups, group_size, lane_bits, *last)
        warps_in_block = 8 if num_tokens >= TOKENS_FOR_EIGHT_WARPS else 4
        kernel, where = registers.choose_experts, (device, *warps(num_tokens, warps_in_block))
        choices = {"gating_output": dtype, "columns": columns, "role": extra.role}
    return GatingPlan(
        arrays.contiguous(torch.float32, num_tokens, num_slots),
        arrays.contiguous(extra.id_dtype, num_tokens, num_slots),
        Launch(kernel, *where, numbers, choices, shared_bytes, num_absent=absent),
        in_memory,
        group_scores,
        numbers,
        choices,
    )


@planned
def plan_topk(
    gating_output: Layout, top_k: int, renormalize: bool, correction_bias: Layout | None, scoring_func: str
) -> GatingPlan:
    return _plan(gating_output, top_k, renormalize, correction_bias, scoring_func)


def grouped_plan(
    gating_output: Layout,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    scoring_func: str,
    correction_bias: Layout | None,
    group_score: str | None,
    routed_scaling_factor: float,
    extras: Extras | None = None,
    tiers: tuple[int, ...] = COLUMNS,
) -> GatingPlan:
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_experts = gating_output.shape[1]
    limit = f"num_experts = {num_experts}"
    num_expert_group = checks.integer("num_expert_group", num_expert_group, 1, num_experts, limit)
    checks.divides("num_expert_group", num_expert_group, "num_experts", num_experts)
    limit = f"num_expert_group = {num_expert_group}"
    topk_group = checks.integer("topk_group", topk_group, 1, num_expert_group, limit)
    eligible = topk_group * (num_experts // num_expert_group)
    top_k = checks.integer("top_k", top_k, 1, eligible, f"the {eligible} experts of {topk_group} groups")
    checks.choice("scoring_func", scoring_func, SCORING)
    if group_score is None:
        moves_choice = correction_bias is not None and not (extras is not None and extras.bias_in_logits)
        group_score = "top2_sum" if moves_choice else "max"
    checks.choice("group_score", group_score, GROUP_SCORES)
    if group_score == "topk_sum":
        checks.at_least("top_k", top_k, topk_group, "topk_group")
    checks.number("routed_scaling_factor", routed_scaling_factor)
    picks = {"max": 1, "top2_sum": 2, "topk_sum": top_k // topk_group}[group_score]
    groups = (num_expert_group, topk_group, picks)
    rules = (top_k, renormalize, correction_bias, scoring_func, *groups, routed_scaling_factor)
    return _plan(gating_output, *rules, extras, tiers)


@planned
def plan_grouped(*arguments: Any) -> GatingPlan:
    return grouped_plan(*arguments)
