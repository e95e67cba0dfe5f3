"""Top-k of many tokens: eight lanes serve a token, so that a warp's instructions serve four.

Each lane takes eight experts at a time, sorts their keys (see `registers`) in a network of comparisons, and keeps the
best eight; then neighbours exchange their lists and keep the best eight of both. With groups, a group's experts lie
with lanes of its own.

Picks whose keys have the same upper bits are then ordered by rank. If some expert that was left out has the upper bits
of the last pick, the warp looks through the row for all that have them.
"""

from typing import NamedTuple

from numba_moe.gating.extras import (
    Extras,
    Tally,
    add_to_count,
    adjust,
    count_expert,
    counting_flag,
    is_padded,
    load_logit,
    write_choice,
    write_nothing,
    write_shared,
)
from numba_moe.gating.networks import highest_left_out, keep_best_eight, sort_eight
from numba_moe.gating.rows import (
    SMALLEST_SUM,
    SOFTMAX,
    Choice,
    Chosen,
    Rows,
    Scores,
    Weighing,
    has_no_softmax,
    load_first,
    lower_unscored,
    not_all_finite,
    rank_of,
    score_all,
    weight_of,
)
from numba_moe.runtime.dialect import cuda, float32, int32, int64, uint32
from numba_moe.runtime.parameters import COUNTING, EXTENDED, PLAIN, Int32, Role
from numba_moe.runtime.primitives import (
    ALL_LANES,
    HIGHEST_KEY,
    LOWEST_KEY,
    LOWEST_ORDER,
    NEGATIVE_INFINITY,
    chosen_index,
    count_lanes,
    divide,
    exp,
    fill,
    flat,
    larger,
    order,
    order_of_number,
    present,
    quotient,
    rank_key,
    value_of,
    warp_index,
    warp_max,
)

LANES = 8
MOST_PICKS = 8
# So many counters at most a block has of its own, to add its tokens at once to those that all blocks share.
MOST_COUNTS_IN_BLOCK = 2048


class OctetLanes(NamedTuple):
    """How experts lie with the eight lanes of a token, and what their keys hold."""

    lane_bits: Int32  # 1 << lane_bits lanes hold a group
    mask: Int32  # covers the ids of experts
    exact: Int32  # whether keys hold whole ranks, from which the mask takes nothing
    num_in_block: Int32  # num_counts where a block counts in shared memory first, else 0


@cuda.jit(device=True)
def in_octet(predicate):
    """Whether a predicate holds for a lane of this octet."""
    votes = cuda.ballot_sync(ALL_LANES, predicate)
    return (votes >> (cuda.laneid & 24)) & 0xFF != 0


@cuda.jit(device=True)
def softmax_of_octet(rows, start, first, end, step, adjusting, extended):
    """Return the largest logit of the octet's row and the sum of exponentials; 0 if the row has no softmax."""
    logits = cuda.local.array(8, float32)
    peak = float32(NEGATIVE_INFINITY)
    broken = False
    at = first
    while at < end:
        load_first(rows.gating_output, start + at, end - at, rows.vector, logits)
        if extended:
            adjust(logits, 8, at, end - at, adjusting)
        broken = has_no_softmax(logits, 8) or broken
        for i in range(8):
            peak = larger(peak, logits[i])
        at = int32(at + step)
    for distance in (1, 2, 4):
        peak = larger(peak, cuda.shfl_xor_sync(ALL_LANES, peak, distance))
    broken = in_octet(broken) or peak == float32(NEGATIVE_INFINITY)
    total = float32(0.0)
    at = first
    if broken:
        at = end
    while at < end:
        load_first(rows.gating_output, start + at, end - at, rows.vector, logits)
        if extended:
            adjust(logits, 8, at, end - at, adjusting)
        for i in range(8):
            total += exp(logits[i] - peak)
        at = int32(at + step)
    for distance in (1, 2, 4):
        total += cuda.shfl_xor_sync(ALL_LANES, total, distance)
    return peak, total


@cuda.jit(device=True)
def in_best_groups(best, second, with_second, lanes, topk_group):
    """Whether the group of this lane is among the best, by its best rank, or by its best two's sum."""
    distance = int32(1)
    while distance < lanes:
        other = cuda.shfl_xor_sync(ALL_LANES, best, distance)
        other_second = cuda.shfl_xor_sync(ALL_LANES, second, distance)
        second = max(min(best, other), max(second, other_second))
        best = max(best, other)
        distance = int32(distance << 1)
    if with_second and second > LOWEST_ORDER:
        best = order(value_of(best) + value_of(second))
    better = int32(0)
    distance = int32(lanes)
    while distance < LANES:
        other = cuda.shfl_xor_sync(ALL_LANES, best, distance)
        if other > best or (other == best and (cuda.laneid ^ distance) < cuda.laneid):
            better = int32(better + 1)
        distance = int32(distance + lanes)
    return better < topk_group


@cuda.jit(device=True)
def lane_of_pick(rank):
    """Return the lane of this octet whose expert this lane's pick should be, by ranks and then by lanes."""
    lane = int32(cuda.laneid)
    place = int32(0)
    for distance in range(1, LANES):
        other = cuda.shfl_xor_sync(ALL_LANES, rank, distance)
        if other > rank or (other == rank and lane ^ distance < lane):
            place = int32(place + 1)
    found = lane
    for distance in range(LANES):
        if cuda.shfl_xor_sync(ALL_LANES, place, distance) == lane & 7:
            found = int32(lane ^ distance)
    return found


@cuda.jit(device=True)
def choose_at_edge(rows, row, edge, wanted, groups, group_size, octet, scores, adjusting, extended):
    """Return in lane i, for i < wanted, the i-th best of a row's experts whose keys have the upper bits of `edge`.

    Here the whole warp serves one token; `groups` has the bits of the lanes that have experts to offer.
    """
    found = int32(0)
    last = int64(HIGHEST_KEY)
    logits = cuda.local.array(8, float32)
    for pick in range(wanted):
        best = int64(LOWEST_KEY)
        for base in range(0, rows.num_experts, 8 * 32):
            for i in range(8):
                expert = int32(base + 32 * i + cuda.laneid)
                expert = min(expert, int32(rows.num_experts - 1))
                logits[i] = load_logit(rows.gating_output, row, expert, adjusting, extended)
            for i in range(8):
                expert = int32(base + 32 * i + cuda.laneid)
                of_group = int32(quotient(expert, group_size) << octet.lane_bits)
                if expert < rows.num_experts and (groups >> of_group) & 1:
                    rank = order(rank_of(logits[i], expert, scores))
                    key = rank_key(rank, expert)
                    if (rank | octet.mask) == (edge | octet.mask) and key < last:
                        best = max(best, key)
        last = warp_max(best)
        if cuda.laneid == pick:
            found = chosen_index(last)
    return found


@cuda.jit
def choose_for_many(
    rows: Rows,
    choice: Choice,
    weighing: Weighing,
    octet: OctetLanes,
    chosen: Chosen,
    extras: Extras,
    role: Role,
):
    """Choose for a token, by eight lanes, so that a warp serves four; the grid has eight lanes per token.

    A group's score is its best rank, or the sum of its best two scores. Dynamic shared memory: an int32 for each of
    `num_in_block` counters.
    """
    in_block = flat(cuda.shared.array(0, int32))  # [num_in_block]
    bias, mask, num_in_block = choice.correction_bias, octet.mask, octet.num_in_block
    scoring_func, top_k = weighing.scoring_func, weighing.top_k
    extended = role == EXTENDED
    lane = int32(cuda.laneid)
    member = int32(lane & 7)
    token = int32(warp_index() * 4 + (lane >> 3))
    exists = token < rows.num_tokens
    token = min(token, int32(rows.num_tokens - 1))  # all lanes reach the warp operations
    lanes = int32(1 << octet.lane_bits)
    origin = int32((member >> octet.lane_bits) * choice.group_size)
    first = int32(origin + (member & (lanes - 1)) * 8)
    end = int32(origin + choice.group_size)
    stride = int32(lanes * 8)
    row = int64(token) * rows.row_stride

    peak = float32(0.0)
    total = float32(1.0)
    if choice.whole_softmax:
        peak, total = softmax_of_octet(rows, row, first, end, stride, extras.adjusting, extended)
    logits = cuda.local.array(8, float32)
    scores = cuda.local.array(8, float32)
    biases = cuda.local.array(8, float32)
    keys = cuda.local.array(8, int32)
    values = cuda.local.array(8, int32)
    best = cuda.local.array(8, int32)
    left_out = int32(LOWEST_ORDER)
    highest = int32(LOWEST_ORDER)
    second = int32(LOWEST_ORDER)
    broken = False
    at = first
    while at < end:
        count = int32(end - at)
        load_first(rows.gating_output, row + at, count, rows.vector, logits)
        if extended:
            adjust(logits, 8, at, count, extras.adjusting)
        if not_all_finite(logits, 8):
            broken = has_no_softmax(logits, 8) or broken
            lower_unscored(logits, 8, scoring_func)
        for i in range(8):
            keys[i] = order_of_number(logits[i])
        if total == float32(0.0):
            for i in range(8):
                keys[i] = 0
        if present(bias):
            score_all(logits, 8, scoring_func, peak, total, scores)
            load_first(bias, at, count, rows.vector, biases)
            for i in range(8):
                keys[i] = order(scores[i] + biases[i])
        if choice.num_expert_group > 1:
            if choice.group_picks > 1 and not present(bias):
                score_all(logits, 8, scoring_func, peak, total, scores)
                for i in range(8):
                    values[i] = order(scores[i])
            else:
                for i in range(8):
                    values[i] = keys[i]
            for i in range(8):
                if i < count:
                    second = max(second, min(highest, values[i]))
                    highest = max(highest, values[i])
        for i in range(8):
            keys[i] = int32((keys[i] | mask) - (at + i))
        if count < 8:
            for i in range(8):
                if i >= count:
                    keys[i] = LOWEST_ORDER
        sort_eight(keys)
        if at == first:
            for i in range(8):
                best[i] = keys[i]
        else:
            if not octet.exact:
                left_out = max(left_out, highest_left_out(best, keys))
            keep_best_eight(best, keys)
        at = int32(at + stride)
    # behind the loads of logits, which are to come first
    tally = Tally(extras.counting, counting_flag(extras.counting.counts_enabled), in_block, num_in_block)
    if role != PLAIN and num_in_block > 0:
        fill(in_block, num_in_block, 0, int32(cuda.threadIdx.x), int32(cuda.blockDim.x))
        cuda.syncthreads()
    offers = first < end
    if choice.num_expert_group > 1:
        chosen_group = in_best_groups(highest, second, choice.group_picks > 1, lanes, choice.topk_group)
        offers = offers and chosen_group
    if not offers:
        left_out = int32(LOWEST_ORDER)
        for i in range(8):
            best[i] = LOWEST_ORDER
    for distance in (1, 2, 4):
        for i in range(8):
            keys[i] = cuda.shfl_xor_sync(ALL_LANES, best[i], distance)
        if not octet.exact:
            left_out = max(left_out, cuda.shfl_xor_sync(ALL_LANES, left_out, distance))
            left_out = max(left_out, highest_left_out(best, keys))
        keep_best_eight(best, keys)

    key = best[0]
    for i in range(1, 8):
        if member == i:
            key = best[i]
    expert = int32(mask & ~key)
    logit = float32(NEGATIVE_INFINITY)
    if key > int32(LOWEST_ORDER | mask):
        logit = load_logit(rows.gating_output, row, expert, extras.adjusting, extended)
    if not octet.exact:
        rank = int32(LOWEST_ORDER)
        if key > int32(LOWEST_ORDER | mask):
            rank = order(rank_of(logit, expert, Scores(bias, scoring_func, peak, total)))
        next_rank = cuda.shfl_down_sync(ALL_LANES, rank, 1)
        if cuda.ballot_sync(ALL_LANES, member < 7 and rank < next_rank) != 0:
            source = lane_of_pick(rank)
            expert = cuda.shfl_sync(ALL_LANES, expert, source)
            logit = cuda.shfl_sync(ALL_LANES, logit, source)
        last = cuda.shfl_sync(ALL_LANES, key, (lane & 24) + top_k - 1)
        groups = uint32(cuda.ballot_sync(ALL_LANES, offers))
        votes = uint32(cuda.ballot_sync(ALL_LANES, member == 0 and (last | mask) == (left_out | mask)))
        while votes != 0:
            source = int32(cuda.ffs(votes) - 1)
            edge = cuda.shfl_sync(ALL_LANES, last, source)
            above = uint32(cuda.ballot_sync(ALL_LANES, (key | mask) > (edge | mask)))
            sure = count_lanes((above >> source) & 0xFF)  # picks before the edge
            row_there = cuda.shfl_sync(ALL_LANES, row, source)
            peak_there = cuda.shfl_sync(ALL_LANES, peak, source)
            scores_there = Scores(bias, scoring_func, peak_there, cuda.shfl_sync(ALL_LANES, total, source))
            found = choose_at_edge(
                *(rows, row_there, edge, int32(top_k - sure), groups >> source, choice.group_size, octet),
                *(scores_there, extras.adjusting, extended),
            )
            found = cuda.shfl_sync(ALL_LANES, found, (member - sure) & 7)
            if lane & 24 == source and member >= sure:
                expert = found
                logit = load_logit(rows.gating_output, row, expert, extras.adjusting, extended)
            votes = uint32(votes & (votes - 1))

    is_pick = member < top_k
    if scoring_func == SOFTMAX and not choice.whole_softmax:
        if in_octet(broken):
            expert = member
            total = float32(0.0)
        peak = cuda.shfl_sync(ALL_LANES, logit, lane & 24)
        if peak == float32(NEGATIVE_INFINITY):
            total = float32(0.0)
    weight = float32(0.0)
    if is_pick:
        weight = weight_of(logit, scoring_func, peak, total)
    scale = float32(weighing.routed_scaling_factor)
    if weighing.renormalize:
        weight_sum = weight
        for distance in (1, 2, 4):
            weight_sum += cuda.shfl_xor_sync(ALL_LANES, weight_sum, distance)
        if weight_sum > float32(SMALLEST_SUM):
            scale = divide(scale, weight_sum)
    if extended:
        num_slots = int32(top_k + extras.shared.num_shared)
        is_zero = is_pick and expert >= extras.zero.num_real
        shared = weight
        identity = weight if is_zero else float32(0.0)
        for distance in (1, 2, 4):
            shared += cuda.shfl_xor_sync(ALL_LANES, shared, distance)
            identity += cuda.shfl_xor_sync(ALL_LANES, identity, distance)
        if exists and is_padded(token, extras.padding):
            write_nothing(token, member, LANES, num_slots, chosen, extras)
            exists = False
        if exists:
            if is_pick:
                slot = int32(token * num_slots + member)
                write_choice(expert, slot, token, chosen.topk_ids, extras, tally)
                chosen.topk_weights[slot] = float32(0.0) if is_zero else weight * scale
            if weighing.renormalize:
                shared = float32(1.0)
            shared *= extras.shared.shared_factor
            write_shared(token, member, LANES, num_slots, shared, chosen, extras, tally)
            if member == 0 and present(extras.zero.identity_weights):
                extras.zero.identity_weights[token] = identity * scale
    elif is_pick and exists:
        slot = int32(token * top_k + member)
        chosen.topk_ids[slot] = expert
        chosen.topk_weights[slot] = weight * scale
        if role == COUNTING:
            count_expert(expert, token, tally)
    if role != PLAIN and num_in_block > 0:
        cuda.syncthreads()
        expert = int32(cuda.threadIdx.x)
        while expert < num_in_block:
            if in_block[expert] != 0:
                add_to_count(extras.counting, expert, in_block[expert])
            expert = int32(expert + cuda.blockDim.x)
