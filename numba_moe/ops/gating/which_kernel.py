"""Plan a choice of experts: which kernel serves a call, and with which records."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from numba_moe.device.primitives import WARP
from numba_moe.device.types import COLUMNS, LANE_COLUMNS, PLAIN
from numba_moe.ops.dispatch import Dispatch
from numba_moe.ops.gating import eight_lanes, lane_table, lanes, long_rows, warp_per_token
from numba_moe.ops.gating.extras import Adjusting, Counting, Extras, Padding, Scaling, SharedExperts, ZeroExperts
from numba_moe.ops.gating.scores import SCORING, Choice, Chosen, Rows, Weighting
from numba_moe.runtime import arrays, checks, plans
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.plans import Layout

GROUP_SCORES = ("max", "top2_sum", "topk_sum")

# Eight lanes instead of 32 serve a token from these numbers of tokens, and of tokens per expert, on (H200, 64 to 1024
# experts). Without groups half of them is enough if keys hold a whole rank, or if all blocks share one row of counters.
MANY_TOKENS = 2048
MANY_TOKENS_PER_EXPERT = 32
# From this number of tokens on, blocks of eight warps take 1 to 7 % less time than blocks of four.
TOKENS_FOR_EIGHT_WARPS = 256
# What a row needs to rank and weigh its experts: their logits, all exponentials of a softmax, or all scores and biases.
# One neighbour more counts like a difference of this power of two in experts or picks.
LOGITS, SOFTMAX, BIASED = 0, 1, 2
UNLIKE = 0.75
# A line with fewer picks counts as this many times less alike: its lanes may be too few.
FEWER_PICKS = 2.2


NO_DISPATCH = Dispatch(None, None, None, 0, 0, 0, 0)
NO_EXTRAS = Extras(
    Adjusting(None, 0.0),
    Padding(None, 0, None),
    ZeroExperts(0, -1, None),
    SharedExperts(0, 1.0, 0),
    Scaling(None, 0.0),
    NO_DISPATCH,
    Counting(None, None, 0, 1, 0),
    torch.int32.itemsize,
)
KERNELS = ("warp_per_token", "eight_lanes", "long_rows", "lanes")
_preferred: str | None = None
_preferred_lanes: tuple[int, int] | None = None


@contextlib.contextmanager
def preferring(kernel: str, lanes_and_warps: tuple[int, int] | None = None) -> Iterator[None]:
    """Let one of KERNELS serve every call that it can, for tests and measurements.

    Of `lanes` it may say how many lanes serve a token, 0 for another kernel, and how many warps a block has.
    """
    global _preferred, _preferred_lanes
    checks.choice("kernel", kernel, KERNELS)
    before, _preferred, _preferred_lanes = (_preferred, _preferred_lanes), kernel, lanes_and_warps
    plans.forget()
    try:
        yield
    finally:
        _preferred, _preferred_lanes = before
        plans.forget()


class GatingPlan(NamedTuple):
    """The results, the launch, and the group scores that rows read from memory need.

    It also has the records and constants of a launch of `warp_per_token`, for a kernel that does the same and more;
    `columns` is None where rows do not fit, or tokens are many.
    """

    choose: Launch
    group_scores: arrays.Contiguous | None
    records: tuple[Any, ...]
    columns: int | None
    role: int


def in_vectors(gating_output: Layout, group_size: int, size: int = 4) -> bool:
    """Whether the logits of every group can be read four at a time."""
    stride = gating_output.shape[1] if gating_output.strides is None else gating_output.strides[0]
    bytes_read = min(16, size * gating_output.dtype.itemsize)
    return not (group_size % size or stride % size or gating_output.address % bytes_read)


def sized(array: Any) -> torch.dtype | None:
    """Return what a record of a `Launch` has for integers of any size: kernels are told the size by a number."""
    return None if array is None else torch.int32


def padding_of(given: Any, num_tokens: int, like: tuple[str, Any]) -> Padding:
    """Check which tokens of a call are padding, and describe it for kernels."""
    scalar_bytes = 0
    if given.num_token_non_padded is not None:
        checks.array("num_token_non_padded", given.num_token_non_padded, checks.IDS, (0, 1), like=like)
        one = (1,) * len(given.num_token_non_padded.shape)
        checks.shape("num_token_non_padded", given.num_token_non_padded, one, "() or (1,)")
        scalar_bytes = given.num_token_non_padded.dtype.itemsize
    if given.is_padding is not None:
        checks.array("is_padding", given.is_padding, (torch.bool,), (1,), like=like)
        checks.shape("is_padding", given.is_padding, (num_tokens,), "(num_tokens,)")
    return Padding(sized(given.num_token_non_padded), scalar_bytes, given.is_padding and torch.uint8)


def check_bias(correction_bias: Layout | None, gating_output: Layout) -> None:
    if correction_bias is not None:
        num_experts = gating_output.shape[1]
        like = ("gating_output", gating_output)
        checks.array("correction_bias", correction_bias, (torch.float32,), (1,), like=like)
        checks.shape("correction_bias", correction_bias, (num_experts,), "(num_experts,)")


def rows_of(gating_output: Layout, vector: int) -> Rows:
    num_tokens, num_experts = gating_output.shape
    stride = num_experts if gating_output.strides is None else gating_output.strides[0]
    return Rows(gating_output, num_tokens, num_experts, stride, vector)


@functools.lru_cache(maxsize=1024)
def lanes_by_tokens(num_experts: int, top_k: int, needs: int) -> tuple[tuple[int, int, int], ...]:
    """Return the lines of what was measured that is most like a call: up to how many tokens, lanes and warps."""

    def distance(measured: tuple[int, int, int]) -> float:
        experts, picks, needed = measured
        more_picks = math.log2(picks / top_k)
        of_picks = max(more_picks, -FEWER_PICKS * more_picks)
        return abs(math.log2(experts / num_experts)) + of_picks + UNLIKE * abs(needed - needs)

    return lane_table.LANES[min(lane_table.LANES, key=distance)]


def lanes_for(num_tokens: int, num_experts: int, top_k: int, needs: int) -> tuple[int, int]:
    """Return how many lanes hold the row of a token, 0 if another kernel takes less time, and the warps of a block."""
    lines = lanes_by_tokens(num_experts, top_k, needs)
    number, in_block = next((number, in_block) for tokens, number, in_block in lines if num_tokens <= tokens)
    if _preferred == "lanes":
        number, in_block = _preferred_lanes or (number or WARP, in_block)
    while 0 < number <= WARP and (number < top_k or number * LANE_COLUMNS[-1] < num_experts):
        number *= 2
    return (number if number <= WARP else 0), in_block


def columns_for(number: int, num_experts: int) -> int:
    """Return the number of experts of each lane; with one expert, slots are counted, which needs some lanes."""
    choices = LANE_COLUMNS if number >= lanes.LEAST_TO_COUNT else LANE_COLUMNS[1:]
    return next(columns for columns in choices if columns * number >= num_experts)


def kernel_for(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    num_expert_group: int,
    group_picks: int,
    few_per_expert: bool,
    needs: int,
) -> str:
    """Return which of KERNELS serves a call.

    `few_per_expert` tells that eight lanes pay from half the tokens on; `needs` is LOGITS, SOFTMAX or BIASED.
    """
    lane_bits = (WARP // num_expert_group).bit_length() - 1  # -1 if there are more groups than lanes
    by_lanes = num_expert_group == 1 and _preferred in (None, "lanes")
    if by_lanes and lanes_for(num_tokens, num_experts, top_k, needs)[0]:
        return "lanes"
    fits = lane_bits >= 0 and COLUMNS[-1] << lane_bits >= num_experts // num_expert_group
    if not fits or (num_expert_group > 1 and group_picks > 2) or _preferred == "long_rows":
        return "long_rows"
    many = max(MANY_TOKENS, MANY_TOKENS_PER_EXPERT * num_experts) // (2 if few_per_expert else 1)
    eight = num_tokens >= many if _preferred in (None, "lanes") else _preferred == "eight_lanes"
    return (
        "eight_lanes"
        if eight and top_k <= eight_lanes.MOST_PICKS and num_expert_group in (1, 2, 4, 8)
        else "warp_per_token"
    )


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
    extras: Extras = NO_EXTRAS,
    role: int = PLAIN,
) -> GatingPlan:
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_tokens, num_experts = gating_output.shape
    checks.integer("num_experts (columns of `gating_output`)", num_experts, 1)
    top_k = checks.integer("top_k", top_k, 1, num_experts, f"num_experts = {num_experts}")
    checks.boolean("renormalize", renormalize)
    num_slots = top_k + extras.shared.num_shared
    checks.fits_int32("gating_output", num_tokens * num_slots, "num_tokens * top_k")
    check_bias(correction_bias, gating_output)

    dtype, device, group_size = gating_output.dtype, gating_output.device, num_experts // num_expert_group
    biased, grouped, softmax = correction_bias is not None, num_expert_group > 1, scoring_func == "softmax"
    adjusting, counting = extras.adjusting, extras.counting
    # Weights that sum to one, and a choice by logits, do without the sum of all exponentials.
    by_scores = biased or (grouped and group_picks > 1) or extras.scaling.epsilon > 0
    whole_softmax = softmax and (by_scores or not renormalize)
    # Whether the bias can be read with the logits, and how many of them at a time.
    bias_too = in_vectors(gating_output, group_size) and (correction_bias is None or correction_bias.address == 0)
    together = 8 if bias_too and in_vectors(gating_output, group_size, 8) else 4 * int(bias_too)
    lane_bits = (WARP // num_expert_group).bit_length() - 1
    exact = int(not biased and adjusting.logit_bias is None and dtype.itemsize == 2 and not adjusting.softcap)
    counts_fit = counting.count_rows == 1 and counting.num_counts <= eight_lanes.MOST_COUNTS_IN_BLOCK
    in_block = counting.num_counts if counts_fit else 0
    few_per_expert, needs = not grouped and bool(exact or in_block), BIASED if biased else SOFTMAX * int(whole_softmax)
    kernel = kernel_for(*(num_tokens, num_experts, top_k, num_expert_group, group_picks, few_per_expert, needs))
    if kernel in ("eight_lanes", "long_rows"):
        whole_softmax = whole_softmax or (softmax and grouped)
    rows = rows_of(gating_output, together)
    groups = (num_expert_group, topk_group, group_picks, group_size)
    choice = Choice(correction_bias, int(whole_softmax), *groups)
    weighing = Weighting(top_k, SCORING.index(scoring_func), int(renormalize), float(routed_scaling_factor))
    chosen = Chosen(torch.float32, sized(gating_output))
    group_scores, columns = None, None
    if kernel == "long_rows":
        if grouped:
            group_scores = arrays.contiguous(torch.float32, num_tokens, num_expert_group)
        records: tuple[Any, ...] = (rows, choice, group_scores, weighing, chosen, extras)
        where = (device, *warps(num_tokens, long_rows.WARPS_IN_BLOCK))
        choose = Launch(long_rows.choose_from_memory, *where, *records, role=role)
    elif kernel == "eight_lanes":
        mask = (1 << (num_experts - 1).bit_length()) - 1
        octet = eight_lanes.OctetLanes((eight_lanes.LANES // num_expert_group).bit_length() - 1, mask, exact, in_block)
        records = (rows, choice, weighing, octet, chosen, extras)
        where = (device, *warps(-(-num_tokens * eight_lanes.LANES // WARP), 8 if in_block else 4))
        choose = Launch(eight_lanes.choose_for_many, *where, *records, shared_bytes=4 * in_block, role=role)
    else:
        columns = next(columns for columns in COLUMNS if columns << lane_bits >= group_size)
        by_fours = rows_of(gating_output, 4 * in_vectors(gating_output, group_size))
        records = (by_fours, choice, weighing, warp_per_token.WarpLanes(lane_bits, exact), chosen, extras)
        if kernel == "lanes":
            number, warps_in_block = lanes_for(num_tokens, num_experts, top_k, needs)
            in_block = in_block if num_tokens >= MANY_TOKENS else 0
            of_lanes = lanes.LaneChoice(correction_bias, int(whole_softmax), number.bit_length() - 1, in_block)
            warps_in_block = max(8, warps_in_block) if in_block else warps_in_block
            where = (device, *warps(-(-num_tokens * number // WARP), warps_in_block))
            choose = Launch(
                *(lanes.choose_by_lanes, *where, rows, of_lanes, weighing, chosen, extras),
                shared_bytes=4 * in_block,
                columns=columns_for(number, num_experts),
                role=role,
            )
        else:
            where = (device, *warps(num_tokens, 8 if num_tokens >= TOKENS_FOR_EIGHT_WARPS else 4))
            choose = Launch(warp_per_token.choose_experts, *where, *records, columns=columns, role=role)
    return GatingPlan(choose, group_scores, records, columns, role)


def topk_plan(
    gating_output: Layout, top_k: int, renormalize: bool, correction_bias: Layout | None, scoring_func: str
) -> GatingPlan:
    """Check a choice by scores, and plan it."""
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
    extras: Extras = NO_EXTRAS,
    role: int = PLAIN,
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
    rules = (top_k, renormalize, correction_bias, scoring_func, *groups, routed_scaling_factor)
    return _plan(gating_output, *rules, extras, role)
