"""The experts of each token, and how much each weighs: softmax, sigmoid and grouped top-k.

One warp serves one token, and keeps its row in registers: lane l has experts l * columns and the next few. Ranks
become integers of the same order, and a pick is a maximum over the warp. Few experts can be chosen at all: those
that rank no lower than the top_k-th of the lanes' highest. If these candidates are no more than a warp has lanes,
they are gathered, one to a lane; otherwise each pick strikes its expert out of the lane that has it. With groups, the
ranks pass through shared memory, where a few lanes share a group; experts of other groups rank lowest from then on.

Experts rank by their logits, or by score + bias where there is a correction bias.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.reference import gating as reference
from numba_moe.reference.gating import TopK
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.parameters import (
    COLUMNS,
    Columns,
    Float32Array,
    Float64,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFloat32Array,
)
from numba_moe.runtime.plans import Layout, layout, new_tuple, planned
from numba_moe.runtime.primitives import (
    ALL_LANES,
    HIGHEST_KEY,
    INFINITY,
    LARGEST_FLOAT,
    LOWEST_KEY,
    LOWEST_ORDER,
    NEGATIVE_INFINITY,
    WARP,
    choice_key,
    chosen_index,
    divide,
    exp,
    first_lane,
    flat,
    load_float,
    load_floats,
    offset,
    order,
    present,
    quotient,
    store_float,
    value_of,
    warp_highest,
    warp_inclusive_sum,
    warp_index,
    warp_max,
    warp_sum,
)

SCORING = ("softmax", "sigmoid")
SOFTMAX = 0
GROUP_SCORES = ("max", "top2_sum")
MAX = 0


# A row of more experts than this, or of more groups than lanes, is read again for each pick.
MOST_IN_REGISTERS = 1024
# Ranks and experts of 32 candidates for each of a block's four warps.
CANDIDATES = 4 * 2 * 32


@cuda.jit(device=True)
def load_row(gating_output, row, first, num_experts, aligned, columns, logits):
    """Read this lane's experts, from `first` on; -inf past the last."""
    if aligned:
        for group in range(columns // 4):
            expert = int32(first + 4 * group)
            for i in range(4):
                logits[4 * group + i] = float32(NEGATIVE_INFINITY)
            if expert < num_experts:
                four = load_floats(gating_output, row + expert)
                for i in range(4):
                    logits[4 * group + i] = four[i]
    else:
        for column in range(columns):
            logits[column] = float32(NEGATIVE_INFINITY)
            if first + column < num_experts:
                logits[column] = load_float(gating_output, row + first + column)


@cuda.jit(device=True)
def softmax_of_row(logits, columns):
    """Return the largest logit of the warp's row and the sum of exponentials; 0 if the row has no softmax."""
    highest = int32(LOWEST_ORDER)
    for column in range(columns):
        highest = max(highest, order(logits[column], INFINITY))  # NaN as +inf: neither has a softmax
    highest = warp_highest(highest)
    peak = value_of(highest)
    total = float32(0.0)
    if peak > float32(NEGATIVE_INFINITY) and peak < float32(INFINITY):
        for column in range(columns):
            total += exp(logits[column] - peak)
        total = warp_sum(total)
    return peak, total


@cuda.jit(device=True)
def score_of(logit, scoring_func, peak, total):
    if scoring_func != SOFTMAX:
        if logit != logit:
            return float32(0.0)
        return divide(float32(1.0), float32(1.0) + exp(-logit))
    if total == float32(0.0):
        return float32(0.0)
    return divide(exp(logit - peak), total)


@cuda.jit(device=True)
def score_groups(values, shift, num_experts, num_expert_group, lanes, group_score):
    """Return the score of this lane's group, from values[shift : shift + num_experts]; `lanes` share a group."""
    size = quotient(num_experts, num_expert_group)
    group = quotient(cuda.laneid, lanes)
    best = float32(NEGATIVE_INFINITY)
    second = float32(NEGATIVE_INFINITY)
    if group < num_expert_group:
        member = int32(cuda.laneid - group * lanes)
        while member < size:
            value = values[shift + group * size + member]
            second = max(second, min(best, value))
            best = max(best, value)
            member = int32(member + lanes)
    distance = int32(1)
    while distance < lanes:
        other = cuda.shfl_xor_sync(ALL_LANES, best, distance)
        other_second = cuda.shfl_xor_sync(ALL_LANES, second, distance)
        second = max(min(best, other), max(second, other_second))
        best = max(best, other)
        distance = int32(distance << 1)
    if group_score == MAX or size == 1:
        return best
    return best + second


@cuda.jit(device=True)
def choose_groups(score, num_expert_group, topk_group, lanes):
    """Return the chosen groups as a mask of the lanes that come first in each."""
    rank = order(score, NEGATIVE_INFINITY)
    if cuda.laneid >= num_expert_group * lanes:
        rank = int32(LOWEST_ORDER)
    chosen = 0
    for _ in range(topk_group):
        winner = first_lane(rank == warp_highest(rank))
        chosen |= 1 << winner
        if quotient(cuda.laneid, lanes) == quotient(winner, lanes):
            rank = int32(LOWEST_ORDER)
    return chosen


@cuda.jit(device=True)
def lowest_candidate(highest, top_k):
    """Return a rank that top_k of the lanes' highest reach, LOWEST_ORDER if there are no so many."""
    lowest = int32(LOWEST_ORDER)
    pick = int32(0)
    while pick < top_k:
        lowest = warp_highest(highest)
        if highest == lowest:  # lanes with the same rank go together, so the rank may be lower than it need be
            highest = int32(LOWEST_ORDER)
        pick = int32(pick + 1)
    return lowest


@cuda.jit(device=True)
def gather_candidates(ranks, columns, first, threshold, candidates):
    """Write ranks from a threshold on to candidates[:32], their experts, ascending, behind; return how many."""
    mine = int32(0)
    for column in range(columns):
        if ranks[column] >= threshold:
            mine = int32(mine + 1)
    upto = warp_inclusive_sum(mine, int32)
    count = cuda.shfl_sync(ALL_LANES, upto, WARP - 1)
    if count <= WARP:
        place = int32(upto - mine)
        for column in range(columns):
            if ranks[column] >= threshold:
                candidates[place] = ranks[column]
                candidates[WARP + place] = first + column
                place = int32(place + 1)
        cuda.syncwarp()
    return count


@cuda.jit(device=True)
def choose_among(candidates, count, top_k):
    """Return the expert that this lane's pick chooses among few candidates."""
    lane = int32(cuda.laneid)
    rank = int32(LOWEST_ORDER)
    if lane < count:
        rank = candidates[lane]
    chosen = int32(0)
    pick = int32(0)
    while pick < top_k:
        winner = first_lane(rank == warp_highest(rank))
        if lane == winner:
            rank = int32(LOWEST_ORDER)
        if lane == pick:
            chosen = winner
        pick = int32(pick + 1)
    return candidates[WARP + chosen]


@cuda.jit(device=True)
def strike_out(ranks, columns, highest):
    """Strike out this lane's first expert of the highest rank; return its column, and the highest rank of the rest."""
    struck = int32(0)
    for column in range(columns):
        if ranks[columns - 1 - column] == highest:
            struck = int32(columns - 1 - column)
    rest = int32(LOWEST_ORDER)
    for column in range(columns):
        if column == struck:
            ranks[column] = LOWEST_ORDER
        rest = max(rest, ranks[column])
    return struck, rest


@cuda.jit(device=True)
def choose_one_by_one(ranks, columns, first, highest, picks):
    """Return the expert that this lane's pick chooses, and the highest rank that stays with this lane."""
    lane = int32(cuda.laneid)
    chosen = int32(0)
    pick = int32(0)
    while pick < picks:
        winning = warp_highest(highest)
        winner = first_lane(highest == winning)
        column = int32(0)
        if lane == winner:
            column, highest = strike_out(ranks, columns, winning)
        expert = cuda.shfl_sync(ALL_LANES, int32(first + column), winner)
        if lane == pick:
            chosen = expert
        pick = int32(pick + 1)
    return chosen, highest


@cuda.jit
def choose_experts(
    gating_output: FloatArray,
    correction_bias: OptionalFloat32Array,
    topk_weights: Float32Array,
    topk_ids: Int32Array,
    num_tokens: Int32,
    num_experts: Int32,
    row_stride: Int64,
    aligned: Int32,
    top_k: Int32,
    scoring_func: Int32,
    renormalize: Int32,
    routed_scaling_factor: Float64,
    num_expert_group: Int32,
    topk_group: Int32,
    group_score: Int32,
    lanes_per_group: Int32,
    columns: Columns,
):
    # gating_output [num_tokens, num_experts] with rows row_stride apart, correction_bias [num_experts], topk_weights
    # and topk_ids [num_tokens, top_k]; a warp per token; shared, with groups: [warps, num_experts]
    token = warp_index()
    if token >= num_tokens:
        return
    lane = int32(cuda.laneid)
    first = int32(lane * columns)
    row = int64(token) * row_stride
    logits = cuda.local.array(columns, float32)
    ranks = cuda.local.array(columns, int32)
    load_row(gating_output, row, first, num_experts, aligned, columns, logits)
    peak = float32(0.0)
    total = float32(1.0)
    if scoring_func == SOFTMAX:
        peak, total = softmax_of_row(logits, columns)

    if total == float32(0.0):
        for column in range(columns):
            ranks[column] = 0
    else:
        for column in range(columns):
            ranks[column] = order(logits[column], NEGATIVE_INFINITY)
    if present(correction_bias):
        for column in range(columns):
            if first + column < num_experts:
                rank = score_of(logits[column], scoring_func, peak, total) + correction_bias[first + column]
                ranks[column] = order(rank, NEGATIVE_INFINITY)
    highest = int32(LOWEST_ORDER)
    for column in range(columns):
        if first + column >= num_experts:
            ranks[column] = LOWEST_ORDER
        highest = max(highest, ranks[column])

    if num_expert_group > 1:
        values = flat(cuda.shared.array(0, float32))
        shift = int32((cuda.threadIdx.x >> 5) * num_experts)
        for column in range(columns):
            expert = int32(first + column)
            if expert < num_experts:
                value = value_of(ranks[column])
                if group_score != MAX and not present(correction_bias):
                    value = score_of(logits[column], scoring_func, peak, total)
                values[shift + expert] = value
        cuda.syncwarp()
        score = score_groups(values, shift, num_experts, num_expert_group, lanes_per_group, group_score)
        chosen_groups = choose_groups(score, num_expert_group, topk_group, lanes_per_group)
        size = quotient(num_experts, num_expert_group)
        highest = int32(LOWEST_ORDER)
        for column in range(columns):
            group = quotient(int32(first + column), size)
            if not (chosen_groups >> (group * lanes_per_group)) & 1:
                ranks[column] = LOWEST_ORDER
            highest = max(highest, ranks[column])

    count = int32(WARP + 1)
    candidates = offset(flat(cuda.shared.array(CANDIDATES, int32)), (cuda.threadIdx.x >> 5) * (2 * WARP))
    if top_k <= WARP:
        threshold = lowest_candidate(highest, top_k)
        if threshold > LOWEST_ORDER:
            count = gather_candidates(ranks, columns, first, threshold, candidates)

    first_pick = int64(token) * top_k
    weight_sum = float32(0.0)
    weight = float32(0.0)
    for base in range(0, top_k, WARP):
        if count <= WARP:
            chosen = choose_among(candidates, count, top_k)
        else:
            chosen, highest = choose_one_by_one(ranks, columns, first, highest, int32(min(top_k - base, WARP)))
        weight = float32(0.0)
        if base + lane < top_k:
            weight = score_of(load_float(gating_output, row + chosen), scoring_func, peak, total)
            topk_ids[first_pick + base + lane] = chosen
            if top_k > WARP:
                topk_weights[first_pick + base + lane] = weight
        weight_sum += weight

    scale = float32(routed_scaling_factor)
    if renormalize:
        weight_sum = warp_sum(weight_sum)
        if weight_sum > float32(0.0):
            scale = divide(scale, weight_sum)
    if top_k > WARP:
        for pick in range(lane, top_k, WARP):  # the lane that wrote this pick
            topk_weights[first_pick + pick] *= scale
    elif lane < top_k:
        topk_weights[first_pick + lane] = weight * scale


@cuda.jit(device=True)
def softmax_from_memory(gating_output, row, num_experts):
    """Return the largest logit of a row and the sum of exponentials; a sum of 0 if the row has no softmax."""
    peak = float32(NEGATIVE_INFINITY)
    broken = 0
    for expert in range(cuda.laneid, num_experts, WARP):
        logit = load_float(gating_output, row + expert)
        if logit > peak:
            peak = logit
        if not logit <= float32(LARGEST_FLOAT):  # NaN or +inf
            broken = 1
    peak = warp_max(peak)
    broken = warp_max(broken)
    total = float32(0.0)
    if broken == 0 and peak > float32(NEGATIVE_INFINITY):
        for expert in range(cuda.laneid, num_experts, WARP):
            total += exp(load_float(gating_output, row + expert) - peak)
    return peak, warp_sum(total)


@cuda.jit(device=True)
def rank_of(gating_output, row, expert, correction_bias, scoring_func, peak, total):
    logit = load_float(gating_output, row + expert)
    if present(correction_bias):
        return score_of(logit, scoring_func, peak, total) + correction_bias[expert]
    if scoring_func == SOFTMAX and total == float32(0.0):
        return float32(0.0)
    return logit


@cuda.jit(device=True)
def score_group(gating_output, row, first, size, correction_bias, scoring_func, group_score, peak, total):
    """Return the score of the group of experts [first, first + size)."""
    group_value = float32(0.0)
    last = int64(HIGHEST_KEY)
    for _ in range(1 if group_score == MAX else min(size, 2)):
        key = int64(LOWEST_KEY)
        for expert in range(first + cuda.laneid, first + size, WARP):
            candidate = choice_key(
                rank_of(gating_output, row, expert, correction_bias, scoring_func, peak, total), expert
            )
            if candidate < last:
                key = max(key, candidate)
        last = warp_max(key)
        best = chosen_index(last)
        if group_score == MAX or present(correction_bias):
            value = rank_of(gating_output, row, best, correction_bias, scoring_func, peak, total)
        else:
            value = score_of(load_float(gating_output, row + best), scoring_func, peak, total)
        group_value = value if group_score == MAX else group_value + value
    return group_value


@cuda.jit(device=True)
def last_group_key(group_scores, row, num_expert_group, topk_group):
    """Return the key of the last group that is chosen."""
    last = int64(HIGHEST_KEY)
    for _ in range(topk_group):
        key = int64(LOWEST_KEY)
        for group in range(cuda.laneid, num_expert_group, WARP):
            candidate = choice_key(group_scores[row + group], group)
            if candidate < last:
                key = max(key, candidate)
        last = warp_max(key)
    return last


@cuda.jit
def choose_from_memory(
    gating_output: FloatArray,
    correction_bias: OptionalFloat32Array,
    group_scores: OptionalFloat32Array,
    topk_weights: Float32Array,
    topk_ids: Int32Array,
    num_tokens: Int32,
    num_experts: Int32,
    row_stride: Int64,
    top_k: Int32,
    scoring_func: Int32,
    renormalize: Int32,
    routed_scaling_factor: Float64,
    num_expert_group: Int32,
    topk_group: Int32,
    group_score: Int32,
):
    # gating_output [num_tokens, num_experts] with rows row_stride apart, correction_bias [num_experts],
    # group_scores [num_tokens, num_expert_group], topk_weights and topk_ids [num_tokens, top_k]; a warp
    # per token, which reads its row again for each pick
    token = warp_index()
    if token >= num_tokens:
        return
    lane = cuda.laneid
    row = int64(token) * row_stride
    peak = float32(0.0)
    total = float32(0.0)
    if scoring_func == SOFTMAX:
        peak, total = softmax_from_memory(gating_output, row, num_experts)

    groups = int64(token) * num_expert_group
    group_size = num_experts // num_expert_group
    last_group = int64(LOWEST_KEY)
    if present(group_scores):
        for group in range(num_expert_group):
            first = group * group_size
            value = score_group(
                gating_output, row, first, group_size, correction_bias, scoring_func, group_score, peak, total
            )
            if lane == 0:
                group_scores[groups + group] = value
        cuda.syncwarp()
        last_group = last_group_key(group_scores, groups, num_expert_group, topk_group)

    first_pick = int64(token) * top_k
    last = int64(HIGHEST_KEY)
    weight_sum = float32(0.0)
    for pick in range(top_k):
        key = int64(LOWEST_KEY)
        for expert in range(lane, num_experts, WARP):
            eligible = True
            if present(group_scores):
                group = expert // group_size
                eligible = choice_key(group_scores[groups + group], group) >= last_group
            if eligible:
                candidate = choice_key(
                    rank_of(gating_output, row, expert, correction_bias, scoring_func, peak, total), expert
                )
                if candidate < last:
                    key = max(key, candidate)
        last = warp_max(key)
        chosen = chosen_index(last)
        weight = score_of(load_float(gating_output, row + chosen), scoring_func, peak, total)
        weight_sum += weight
        if lane == pick % WARP:
            topk_ids[first_pick + pick] = chosen
            store_float(topk_weights, first_pick + pick, weight)

    scale = float32(routed_scaling_factor)
    if renormalize and weight_sum > float32(0.0):
        scale = scale / weight_sum
    for pick in range(lane, top_k, WARP):  # the lane that wrote this pick
        topk_weights[first_pick + pick] *= scale


class GatingPlan(NamedTuple):
    """The results, the launch, whether it is of the kernel for rows of any size, and the group scores of that one."""

    topk_weights: arrays.Contiguous
    topk_ids: arrays.Contiguous
    choose: Launch
    in_memory: bool
    group_scores: arrays.Contiguous | None


def _plan_gating(
    gating_output: Layout,
    top_k: int,
    renormalize: bool,
    correction_bias: Layout | None,
    scoring_func: str,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
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

    stride = num_experts if gating_output.strides is None else gating_output.strides[0]
    where = (gating_output.device, *warps(num_tokens))
    rules = (top_k, SCORING.index(scoring_func), int(renormalize), float(routed_scaling_factor))
    groups = (num_expert_group, topk_group, GROUP_SCORES.index(group_score))
    sizes = (num_tokens, num_experts, stride)
    dtype = gating_output.dtype
    topk_weights = arrays.contiguous(torch.float32, num_tokens, top_k)
    topk_ids = arrays.contiguous(torch.int32, num_tokens, top_k)
    if num_experts > MOST_IN_REGISTERS or num_expert_group > WARP:
        scores = arrays.contiguous(torch.float32, num_tokens, num_expert_group) if num_expert_group > 1 else None
        launch = Launch(choose_from_memory, *where, (*sizes, *rules, *groups), {"gating_output": dtype})
        return GatingPlan(topk_weights, topk_ids, launch, True, scores)
    columns = next(columns for columns in COLUMNS if WARP * columns >= num_experts)
    aligned = columns >= 4 and not (num_experts % 4 or stride % 4 or gating_output.address % (4 * dtype.itemsize))
    lanes_per_group = 1 << (WARP // num_expert_group).bit_length() - 1
    launch = Launch(
        *(choose_experts, *where, (*sizes, int(aligned), *rules, *groups, lanes_per_group)),
        {"gating_output": dtype, "columns": columns},
        shared_bytes=4 * num_experts * where[2] // WARP if num_expert_group > 1 else 0,
    )
    return GatingPlan(topk_weights, topk_ids, launch, False, None)


@planned
def _plan_topk(
    gating_output: Layout, top_k: int, renormalize: bool, correction_bias: Layout | None, scoring_func: str
) -> GatingPlan:
    return _plan_gating(gating_output, top_k, renormalize, correction_bias, scoring_func)


@planned
def _plan_grouped(
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
    checks.number("routed_scaling_factor", routed_scaling_factor)
    groups = (num_expert_group, topk_group, group_score)
    return _plan_gating(
        *(gating_output, top_k, renormalize, correction_bias, scoring_func, *groups, routed_scaling_factor)
    )


def _choose(plan: GatingPlan, gating_output: torch.Tensor, correction_bias: torch.Tensor | None) -> TopK:
    topk_weights = arrays.empty(*plan.topk_weights)
    topk_ids = arrays.empty(*plan.topk_ids)
    if not plan.in_memory:
        plan.choose(gating_output, correction_bias, topk_weights, topk_ids)
    else:
        scores = arrays.empty(*plan.group_scores) if plan.group_scores else None
        plan.choose(gating_output, correction_bias, scores, topk_weights, topk_ids)
    return new_tuple(TopK, (topk_weights, topk_ids))


def _topk(scoring_func: str, gating_output: Any, top_k: int, renormalize: bool, correction_bias: Any) -> TopK:
    plan = _plan_topk(layout(gating_output), top_k, renormalize, layout(correction_bias), scoring_func)
    if checks.VALIDATE:
        checks.logits("gating_output", gating_output)
    if arrays.answered_by_reference(gating_output):
        function = getattr(reference, f"topk_{scoring_func}")
        return arrays.by_reference(function, gating_output, top_k, renormalize, correction_bias)
    return _choose(plan, gating_output, correction_bias)


@arrays.public
def topk_softmax(gating_output: Any, top_k: int, renormalize: bool = False, correction_bias: Any = None) -> TopK:
    """Choose the experts of each token by softmax scores.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Experts per token, at most num_experts.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is 0).
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice alone; the weights stay the scores.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k], best first. topk_ids : int32 of the same shape, distinct in
        each row.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, top_k above num_experts.

    Notes
    -----
    The lower id wins a tie. Without a bias experts are compared by their logits, which no rounding of scores can
    make equal. A row with NaN or +inf has scores 0 throughout. Runs on the caller's current stream without
    synchronising, captures into CUDA graphs, allocates the results only.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_softmax(np.log(np.array([[0.1, 0.6, 0.3]], np.float32)), 2)
    >>> ids, weights.round(4)
    (array([[1, 2]], dtype=int32), array([[0.6, 0.3]], dtype=float32))
    """
    return _topk("softmax", gating_output, top_k, renormalize, correction_bias)


@arrays.public
def topk_sigmoid(gating_output: Any, top_k: int, renormalize: bool = False, correction_bias: Any = None) -> TopK:
    """Choose the experts of each token by sigmoid scores.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Experts per token, at most num_experts.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is 0).
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice alone; the weights stay the scores.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k], best first. topk_ids : int32 of the same shape, distinct in
        each row.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, top_k above num_experts.

    Notes
    -----
    The lower id wins a tie. A NaN logit scores 0 and, without a bias, ranks last. Runs on the caller's current
    stream without synchronising, captures into CUDA graphs, allocates the results only.

    Examples
    --------
    >>> import numpy as np
    >>> weights, ids = topk_sigmoid(np.array([[0, 2, -2]], np.float32), 2)
    >>> ids, weights.round(4)
    (array([[1, 0]], dtype=int32), array([[0.8808, 0.5   ]], dtype=float32))
    """
    return _topk("sigmoid", gating_output, top_k, renormalize, correction_bias)


@arrays.public
def grouped_topk(
    gating_output: Any,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = False,
    *,
    scoring_func: str = "softmax",
    correction_bias: Any = None,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
) -> TopK:
    """Choose groups of experts first, then experts inside the chosen groups (DeepSeek-V2 and -V3).

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Experts per token, at most those of `topk_group` groups.
    num_expert_group : int
        Number of groups; consecutive experts form a group, all of one size.
    topk_group : int
        Groups per token.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is 0).
    scoring_func : {"softmax", "sigmoid"}
        How logits become scores.
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice of groups and experts alone; the weights stay the scores.
    group_score : {"max", "top2_sum"}, optional
        "max": the best rank of the group; "top2_sum": the sum of its two best ``score + bias``. By default
        "top2_sum" with a bias and "max" without one, as vLLM and SGLang do.
    routed_scaling_factor : float
        Multiplies the weights, after renormalising.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k], best first. topk_ids : int32 of the same shape, distinct in
        each row.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, experts not divisible by groups, more groups or experts asked for
        than there are, unknown `scoring_func` or `group_score`.

    Notes
    -----
    The lower group and the lower expert win a tie. Runs on the caller's current stream without synchronising,
    captures into CUDA graphs, allocates the results only (above 1024 experts
    or 32 groups also one float32 per token and group).

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, -3, 1, 2]], np.float32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="top2_sum").topk_ids
    array([[3]], dtype=int32)
    >>> grouped_topk(logits, 1, 2, 1, scoring_func="sigmoid", group_score="max").topk_ids
    array([[0]], dtype=int32)
    """
    rules = (renormalize, scoring_func, layout(correction_bias), group_score, routed_scaling_factor)
    plan = _plan_grouped(layout(gating_output), top_k, num_expert_group, topk_group, *rules)
    if checks.VALIDATE:
        checks.logits("gating_output", gating_output)
    if arrays.answered_by_reference(gating_output):
        return arrays.by_reference(
            reference.grouped_topk,
            *(gating_output, top_k, num_expert_group, topk_group, renormalize),
            scoring_func=scoring_func,
            correction_bias=correction_bias,
            group_score=group_score,
            routed_scaling_factor=routed_scaling_factor,
        )
    return _choose(plan, gating_output, correction_bias)
