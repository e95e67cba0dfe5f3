"""Top-k of rows that fit the registers of a warp: the fast path of gating.

One warp serves one token. Its lanes hold neighbouring experts, those of one group in lanes of their own, and ranks
become integers of the same order, so that the best of a row is one `redux.sync` away.

1. A key is a rank with its lowest bits replaced by the expert's id, upside down: no two keys are equal, and the lower
   id wins. Each lane sorts its four best keys; a pick is the highest of the lanes' first, and its lane moves up.
2. Experts whose keys have the same upper bits may be in the wrong order (few rows in a thousand of random float32
   logits have such), so there are picks until the upper bits change, and then all of them are ordered by rank. Keys
   of 16-bit logits hold the whole rank and are exact.

More than 31 picks, or more experts than that with the same upper bits, go by ranks from the start.

Experts rank by their logits, or by score + bias where there is a correction bias.
"""

from typing import Any, NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import (
    larger,
    let_next_start,
    load_float,
    load_floats,
    present,
    wait_for_earlier,
    warp_highest,
)
from numba_moe.device.primitives import (
    ALL_LANES,
    LOWEST_ORDER,
    MOST_BLOCKS_BESIDE,
    NEGATIVE_INFINITY,
    WARP,
    exp,
    first_lane,
    order,
    order_of_number,
    value_of,
    warp_index,
    warp_sum,
)
from numba_moe.device.types import EXTENDED, Columns, Int32, Role
from numba_moe.ops.gating.extras import Extras, Source, adjust, load_one
from numba_moe.ops.gating.networks import keep_best_four, put_in_order, sort_four
from numba_moe.ops.gating.picks import best_two, lower_missing, order_picks, rank_group
from numba_moe.ops.gating.scores import (
    SOFTMAX,
    Choice,
    Chosen,
    Rows,
    Scores,
    Weighting,
    lower_broken,
    rank_of,
    score_all,
)
from numba_moe.ops.gating.token import (
    begin_counting,
    count_slots,
    finish_token,
    leaves_out,
    scale_of,
    scale_weights,
    softmax_of_chosen,
    write_pick,
)


class WarpLanes(NamedTuple):
    """How experts lie with the lanes of a warp."""

    lane_bits: Int32  # 1 << lane_bits lanes hold a group
    exact: Int32  # whether keys hold whole ranks


class Own(NamedTuple):
    """Arrays of a lane's own, with an element for each of its experts."""

    logits: Any
    ranks: Any
    scores: Any


@cuda.jit(device=True)
def load_row(gating_output, start, count, aligned, columns, logits):
    """Read this lane's `count` logits; -inf past them."""
    if aligned:
        for group in range(columns // 4):
            for i in range(4):
                logits[4 * group + i] = float32(NEGATIVE_INFINITY)
            if 4 * group < count:
                four = load_floats(gating_output, start + 4 * group)
                for i in range(4):
                    logits[4 * group + i] = four[i]
    else:
        for column in range(columns):
            logits[column] = float32(NEGATIVE_INFINITY)
            if column < count:
                logits[column] = load_float(gating_output, start + column)


@cuda.jit(device=True)
def sum_exponentials(logits, columns):
    """Return the largest logit of the warp's row, and the sum of exponentials, 0 if all logits are -inf."""
    peak = logits[0]
    for column in range(1, columns):
        peak = larger(peak, logits[column])
    peak = value_of(warp_highest(order(peak)))
    total = float32(0.0)
    if peak > float32(NEGATIVE_INFINITY):
        for column in range(columns):
            total += exp(logits[column] - peak)
        total = warp_sum(total)
    return peak, total


@cuda.jit(device=True)
def in_chosen_group(rank, group, topk_group):
    """Whether the group of this lane is among the best; lanes of one group are neighbours with the same rank.

    Lanes after the last group have no experts, and so the lowest rank, below that of any group.
    """
    chosen = False
    for _ in range(topk_group):
        winner = cuda.shfl_sync(ALL_LANES, group, first_lane(rank == warp_highest(rank)))
        if group == winner:
            chosen = True
            rank = int32(LOWEST_ORDER)
    return chosen


@cuda.jit(device=True)
def best_four(ranks, columns, first, best):
    """Write the keys of this lane's four best experts, highest first, to `best`."""
    mask = WARP * columns - 1
    four = cuda.local.array(4, int32)
    for column in range(0, columns, 4):
        for i in range(4):
            four[i] = LOWEST_ORDER
            if column + i < columns:
                four[i] = int32((ranks[column + i] | mask) - (first + column + i))
        if columns > 2:
            sort_four(four, 0)
        else:
            put_in_order(four, 0, 1)
        if column > 0:
            keep_best_four(best, four)
        else:
            for i in range(4):
                best[i] = four[i]


@cuda.jit(device=True)
def highest_below(ranks, columns, first, key):
    """Return the key of this lane's best expert after the one with a key, LOWEST_ORDER if there is none."""
    mask = WARP * columns - 1
    highest = int32(LOWEST_ORDER)
    for column in range(columns):
        other = int32((ranks[column] | mask) - (first + column))
        if other < key:
            highest = max(highest, other)
    return highest


@cuda.jit(device=True)
def pick_keys(ranks, columns, first, best, top_k, most):
    """Return the key that this lane's pick chooses, the number of picks, and whether there were enough.

    There are up to `most`, more than top_k, while the upper bits stay the same: those experts may belong further up.
    """
    mask = WARP * columns - 1
    lane = int32(cuda.laneid)
    depth = min(columns, 4)
    mine = int32(LOWEST_ORDER)
    last = int32(LOWEST_ORDER)
    pick = int32(0)
    winning = warp_highest(best[0])
    while pick < top_k or (pick < most and (winning | mask) == (last | mask)):
        last = winning
        if lane == pick:
            mine = winning
        moves_up = best[0] == winning
        for i in range(depth - 1):
            best[i] = best[i + 1] if moves_up else best[i]
        best[depth - 1] = LOWEST_ORDER if moves_up else best[depth - 1]
        if columns > depth and moves_up and best[0] == LOWEST_ORDER:
            best[0] = highest_below(ranks, columns, first, winning)
        pick = int32(pick + 1)
        winning = warp_highest(best[0])
    return mine, pick, (winning | mask) != (last | mask)


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
def choose_one_by_one(ranks, columns, first, picks):
    """Return the expert that this lane's pick chooses, by whole ranks."""
    lane = int32(cuda.laneid)
    chosen = int32(0)
    highest = int32(LOWEST_ORDER)
    for column in range(columns):
        highest = max(highest, ranks[column])
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
    return chosen


@cuda.jit(device=True)
def choose_for_token(token, own, rows, choice, weighing, lanes_of, chosen, extras, columns, role):
    """Choose and weigh the experts of a token, for which the whole warp works."""
    logits, ranks = own.logits, own.ranks
    bias, scoring_func, top_k = choice.correction_bias, weighing.scoring_func, weighing.top_k
    extended = role == EXTENDED
    num_slots = count_slots(weighing, extras, role)
    lane = int32(cuda.laneid)
    if leaves_out(token, lane, WARP, num_slots, chosen, extras, role):
        return
    group = int32(lane >> lanes_of.lane_bits)
    lanes = int32(1 << lanes_of.lane_bits)
    in_group = int32(int32(lane & (lanes - 1)) * int32(columns))
    first = int32(group * choice.group_size + in_group)
    count = int32(columns)
    ragged = rows.num_experts != WARP * columns
    if ragged:
        count = int32(min(choice.group_size - in_group, columns))
        if group >= choice.num_expert_group:
            count = int32(0)
    row = int64(token) * rows.row_stride
    source = Source(rows.gating_output, row, rows.vector, extras.adjusting, extended)
    load_row(rows.gating_output, row + first, count, columns >= 4 and rows.vector, columns, logits)
    tally = begin_counting(extras.counting)
    if extended:
        adjust(logits, columns, first, count, extras.adjusting)
    peak = float32(0.0)
    total = float32(1.0)
    broken = lower_broken(logits, columns, scoring_func)
    if scoring_func == SOFTMAX:
        if cuda.ballot_sync(ALL_LANES, broken) != 0:
            total = float32(0.0)
        elif choice.whole_softmax:
            peak, total = sum_exponentials(logits, columns)
    for column in range(columns):
        ranks[column] = order_of_number(logits[column])
    if total == float32(0.0):
        for column in range(columns):
            ranks[column] = 0
    if present(bias) or (choice.num_expert_group > 1 and choice.group_picks > 1):
        score_all(logits, columns, scoring_func, peak, total, logits)
    if present(bias):
        for column in range(columns):
            if column < count:
                ranks[column] = order(logits[column] + bias[first + column])
    if choice.num_expert_group > 1:
        lowest = int32(LOWEST_ORDER)
        if choice.group_picks == 1 or present(bias):
            best, second = best_two(ranks, columns, count, lowest, lowest)
        else:
            for column in range(columns):
                own.scores[column] = order(logits[column])
            best, second = best_two(own.scores, columns, count, lowest, lowest)
        rank = rank_group(best, second, lanes, choice.group_picks > 1)
        if not in_chosen_group(rank, group, choice.topk_group):
            count = int32(0)
    if ragged or choice.num_expert_group > 1:
        lower_missing(ranks, columns, count)

    expert = int32(0)
    logit = float32(NEGATIVE_INFINITY)
    decided = False
    if top_k < WARP:
        exact = lanes_of.exact
        four = cuda.local.array(4, int32)
        best_four(ranks, columns, first, four)
        key, picks, decided = pick_keys(ranks, columns, first, four, top_k, top_k if exact else int32(WARP))
        decided = decided or exact
        expert = int32(int32(WARP * columns - 1) & ~key)
        if lane < picks:
            logit = load_one(source, expert)
        if not exact:
            rank = int32(LOWEST_ORDER)
            if lane < picks:
                rank = order(rank_of(logit, expert, Scores(bias, scoring_func, peak, total)))
            expert, logit = order_picks(expert, logit, rank, picks, WARP)

    first_slot = int32(token * num_slots)
    score_sum = float32(0.0)
    weight = float32(0.0)
    identity = float32(0.0)
    base = int32(0)
    while base < top_k:
        pick = int32(base + lane)
        is_mine = pick < top_k
        if not decided:
            expert = choose_one_by_one(ranks, columns, first, min(int32(top_k - base), int32(WARP)))
            if is_mine:
                logit = load_one(source, expert)
        if scoring_func == SOFTMAX and not choice.whole_softmax and base == 0:
            peak, total = softmax_of_chosen(logit, 0, total)
        if is_mine:
            slot = int32(first_slot + pick)
            scores = Scores(bias, scoring_func, peak, total)
            score, weight, of_zero = write_pick(expert, logit, slot, token, scores, chosen, extras, tally, role)
            score_sum += score
            identity += of_zero
            if top_k > WARP:
                chosen.topk_weights[slot] = weight
        base = int32(base + WARP)

    scale = scale_of(score_sum, min(top_k, int32(WARP)), weighing, extras, role)
    if top_k > WARP:
        scale_weights(chosen.topk_weights, first_slot, top_k, scale)
    elif lane < top_k:
        chosen.topk_weights[int32(first_slot + lane)] = weight * scale
    if extended:
        finish_token(
            *(token, lane, WARP, True, num_slots, score_sum, identity, scale),
            *(chosen, extras, tally),
        )


@cuda.jit
def choose_experts(
    rows: Rows,
    choice: Choice,
    weighing: Weighting,
    lanes: WarpLanes,
    chosen: Chosen,
    extras: Extras,
    columns: Columns,
    role: Role,
):
    """Choose for a token, by a warp whose lanes hold `columns` neighbours each; the grid has a warp per token.

    A group's score is its best rank, or the sum of its best two scores.
    """
    wait_for_earlier()
    if int32(cuda.gridDim.x) <= MOST_BLOCKS_BESIDE:
        let_next_start()
    own = Own(
        cuda.local.array(columns, float32),
        cuda.local.array(columns, int32),
        cuda.local.array(columns, int32),
    )
    token = warp_index()
    if token < rows.num_tokens:
        choose_for_token(token, own, rows, choice, weighing, lanes, chosen, extras, columns, role)
