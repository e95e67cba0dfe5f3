"""What a choice of experts needs beside its data: which kernel serves it, with what numbers."""

from typing import Any, NamedTuple

import torch

from numba_moe.gating import memory, octets, registers
from numba_moe.gating.rows import SCORING
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.parameters import COLUMNS
from numba_moe.runtime.plans import Layout, planned
from numba_moe.runtime.primitives import WARP

GROUP_SCORES = ("max", "top2_sum", "topk_sum")

# From so many tokens on, and so many for each expert, eight lanes serve a token instead of 32. Measured on an H200 with
# 64 to 1024 experts: eight lanes take longer for one token, and less for many; with groups twice as many are many.
MANY_TOKENS = 2048
MANY_TOKENS_PER_EXPERT = 16


class GatingPlan(NamedTuple):
    """The results, the launch, whether it is of the kernel for rows of any size, and the group scores of that one."""

    topk_weights: arrays.Contiguous
    topk_ids: arrays.Contiguous
    choose: Launch
    in_memory: bool
    group_scores: arrays.Contiguous | None


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
) -> GatingPlan:
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_tokens, num_experts = gating_output.shape
    checks.integer("num_experts (columns of `gating_output`)", num_experts, 1)
    top_k = checks.integer("top_k", top_k, 1, num_experts, f"num_experts = {num_experts}")
    checks.boolean("renormalize", renormalize)
    checks.fits_int32("gating_output", num_tokens * top_k, "num_tokens * top_k")
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
    # Weights that sum to one, and a choice by logits, do without the sum of all exponentials.
    by_scores = correction_bias is not None or (num_expert_group > 1 and group_picks > 1)
    whole_softmax = scoring_func == "softmax" and (by_scores or not renormalize)
    vectors = not (group_size % 4 or stride % 4 or gating_output.address % (4 * dtype.itemsize))
    lane_bits = (WARP // num_expert_group).bit_length() - 1  # -1 if there are more groups than lanes
    many = max(MANY_TOKENS, MANY_TOKENS_PER_EXPERT * num_experts * (1 if num_expert_group == 1 else 2))
    group_scores = None
    in_memory = lane_bits < 0 or COLUMNS[-1] << lane_bits < group_size or (num_expert_group > 1 and group_picks > 2)
    if in_memory:
        if num_expert_group > 1:
            group_scores = arrays.contiguous(torch.float32, num_tokens, num_expert_group)
        numbers: tuple[float, ...] = (*sizes, top_k, scoring, *rules, *groups)
        choose = Launch(memory.choose_from_memory, device, *warps(num_tokens), numbers, {"gating_output": dtype})
    elif num_tokens >= many and top_k <= octets.MOST_PICKS and num_expert_group in (1, 2, 4, 8):
        aligned = vectors and (correction_bias is None or correction_bias.address == 0)
        whole_softmax = whole_softmax or (scoring_func == "softmax" and num_expert_group > 1)
        mask = (1 << (num_experts - 1).bit_length()) - 1
        exact = correction_bias is None and dtype.itemsize == 2
        of_row = (*sizes, int(aligned), top_k, scoring, int(whole_softmax))
        of_keys = ((octets.LANES // num_expert_group).bit_length() - 1, mask, int(exact))
        where = (device, *warps(-(-num_tokens * octets.LANES // WARP)))
        numbers = (*of_row, *rules, *groups, group_size, *of_keys)
        choose = Launch(octets.choose_for_many, *where, numbers, {"gating_output": dtype})
    else:
        columns = next(columns for columns in COLUMNS if columns << lane_bits >= group_size)
        aligned = vectors and columns >= 4
        ragged = num_experts != WARP * columns
        flags = (int(aligned), int(ragged), top_k, scoring, int(whole_softmax))
        numbers = (*sizes, *flags, *rules, *groups, group_size, lane_bits)
        choices: dict[str, Any] = {"gating_output": dtype, "columns": columns}
        choose = Launch(registers.choose_experts, device, *warps(num_tokens), numbers, choices)
    return GatingPlan(
        arrays.contiguous(torch.float32, num_tokens, top_k),
        arrays.contiguous(torch.int32, num_tokens, top_k),
        choose,
        in_memory,
        group_scores,
    )


@planned
def plan_topk(
    gating_output: Layout, top_k: int, renormalize: bool, correction_bias: Layout | None, scoring_func: str
) -> GatingPlan:
    return _plan(gating_output, top_k, renormalize, correction_bias, scoring_func)


@planned
def plan_grouped(
    gating_output: Layout,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    scoring_func: str,
    correction_bias: Layout | None,
    group_score: str | None,
    routed_scaling_factor: float,
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
        group_score = "max" if correction_bias is None else "top2_sum"
    checks.choice("group_score", group_score, GROUP_SCORES)
    if group_score == "topk_sum":
        checks.at_least("top_k", top_k, topk_group, "topk_group")
    checks.number("routed_scaling_factor", routed_scaling_factor)
    picks = {"max": 1, "top2_sum": 2, "topk_sum": top_k // topk_group}[group_score]
    groups = (num_expert_group, topk_group, picks)
    return _plan(*(gating_output, top_k, renormalize, correction_bias, scoring_func, *groups, routed_scaling_factor))
