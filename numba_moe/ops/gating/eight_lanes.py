"""Top-k of many tokens: eight lanes serve a token, so that a warp's instructions serve four.

Each lane takes eight experts at a time, sorts their keys (see `warp_per_token`) in a network of comparisons, and keeps
the best eight; then neighbours exchange their lists and keep the best eight of both. With groups, a group's experts
lie with lanes of its own.

Picks whose keys have the same upper bits are then ordered by rank. If some expert that was left out has the upper bits
of the last pick, the warp looks through the row for all that have them.
"""

from typing import Any, NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64, uint32
from numba_moe.device.instructions import flat, larger, present, quotient, wait_for_earlier
from numba_moe.device.primitives import (
    ALL_LANES,
    HIGHEST_KEY,
    LOWEST_KEY,
    LOWEST_ORDER,
    NEGATIVE_INFINITY,
    chosen_index,
    count_lanes,
    exp,
    fill,
    order,
    rank_key,
    warp_index,
    warp_max,
)
from numba_moe.device.types import EXTENDED, PLAIN, Int32, Role
from numba_moe.ops.gating.extras import (
    Extras,
    Source,
    Tally,
    add_to_count,
    counting_flag,
    is_padded,
    load_logits,
    load_one,
    write_nothing,
)
from numba_moe.ops.gating.networks import highest_left_out, keep_best_eight, sort_eight
from numba_moe.ops.gating.picks import best_two, lower_missing, order_picks, rank_eight, rank_group
from numba_moe.ops.gating.scores import (
    SOFTMAX,
    Choice,
    Chosen,
    Rows,
    Scores,
    Weighting,
    has_no_softmax,
    lower_broken,
    rank_of,
    score_all,
)
from numba_moe.ops.gating.token import count_slots, finish_token, scale_of, softmax_of_chosen, sum_over, write_pick

LANES = 8
MOST_PICKS = 8
# A block has up to this many counters in shared memory, which it adds to the shared counters of all blocks at once.
MOST_COUNTS_IN_BLOCK = 2048


class OctetLanes(NamedTuple):
    """How experts lie with the eight lanes of a token, and what their keys hold."""

    lane_bits: Int32  # 1 << lane_bits lanes hold a group
    mask: Int32  # covers the ids of experts
    exact: Int32  # whether keys hold whole ranks, from which the mask takes nothing
    num_in_block: Int32  # num_counts where a block counts in shared memory first, else 0


class Span(NamedTuple):
    """Which experts of a row a lane takes: eight from `first` on, from `first` + `stride` on, and so up to `end`."""

    first: Any
    end: Any
    stride: Any


@cuda.jit(device=True)
def in_octet(predicate):
    """Whether a predicate holds for a lane of this octet."""
    votes = cuda.ballot_sync(ALL_LANES, predicate)
    return (votes >> (cuda.laneid & 24)) & 0xFF != 0


@cuda.jit(device=True)
def softmax_of_octet(source, span):
    """Return the largest logit of the octet's row and the sum of exponentials; 0 if the row has no softmax."""
    logits = cuda.local.array(8, float32)
    peak = float32(NEGATIVE_INFINITY)
    broken = False
    at = span.first
    while at < span.end:
        load_logits(source, at, span.end - at, logits)
        broken = has_no_softmax(logits, 8) or broken
        for i in range(8):
            peak = larger(peak, logits[i])
        at = int32(at + span.stride)
    for distance in (1, 2, 4):
        peak = larger(peak, cuda.shfl_xor_sync(ALL_LANES, peak, distance))
    broken = in_octet(broken) or peak == float32(NEGATIVE_INFINITY)
    total = float32(0.0)
    at = span.first
    if broken:
        at = span.end
    while at < span.end:
        load_logits(source, at, span.end - at, logits)
        for i in range(8):
            total += exp(logits[i] - peak)
        at = int32(at + span.stride)
    return peak, sum_over(total, LANES)


@cuda.jit(device=True)
def in_best_groups(rank, lanes, topk_group):
    """Whether the group of this lane, which has this rank, is among the best of the octet."""
    better = int32(0)
    distance = int32(lanes)
    while distance < LANES:
        other = cuda.shfl_xor_sync(ALL_LANES, rank, distance)
        if other > rank or (other == rank and (cuda.laneid ^ distance) < cuda.laneid):
            better = int32(better + 1)
        distance = int32(distance + lanes)
    return better < topk_group


@cuda.jit(device=True)
def choose_at_edge(source, num_experts, edge, wanted, groups, group_size, octet, scores):
    """Return in lane i, for i < wanted, the i-th best of a row's experts whose keys have the upper bits of `edge`.

    Here the whole warp serves one token; `groups` has the bits of the lanes that have experts to offer.
    """
    found = int32(0)
    last = int64(HIGHEST_KEY)
    logits = cuda.local.array(8, float32)
    for pick in range(wanted):
        best = int64(LOWEST_KEY)
        for base in range(0, num_experts, 8 * 32):
            for i in range(8):
                expert = int32(base + 32 * i + cuda.laneid)
                expert = min(expert, int32(num_experts - 1))
                logits[i] = load_one(source, expert)
            for i in range(8):
                expert = int32(base + 32 * i + cuda.laneid)
                of_group = int32(quotient(expert, group_size) << octet.lane_bits)
                if expert < num_experts and (groups >> of_group) & 1:
                    rank = order(rank_of(logits[i], expert, scores))
                    key = rank_key(rank, expert)
                    if (rank | octet.mask) == (edge | octet.mask) and key < last:
                        best = max(best, key)
        last = warp_max(best)
        if cuda.laneid == pick:
            found = chosen_index(last)
    return found


@cuda.jit(device=True)
def sort_own(source, span, scores, choice, octet, best):
    """Write the best eight keys of this lane, sorted, to `best`.

    Return the highest key that was left out, the lane's best two ranks, and whether some logit is NaN or +inf.
    """
    logits = cuda.local.array(8, float32)
    keys = cuda.local.array(8, int32)
    values = cuda.local.array(8, int32)
    left_out = int32(LOWEST_ORDER)
    highest = int32(LOWEST_ORDER)
    second = int32(LOWEST_ORDER)
    broken = False
    at = span.first
    while at < span.end:
        count = int32(span.end - at)
        load_logits(source, at, count, logits)
        broken = lower_broken(logits, 8, scores.scoring_func) or broken
        rank_eight(logits, at, count, source.vector, scores, keys)
        if choice.num_expert_group > 1:
            if choice.group_picks > 1 and not present(scores.correction_bias):
                score_all(logits, 8, scores.scoring_func, scores.peak, scores.total, logits)
                for i in range(8):
                    values[i] = order(logits[i])
                highest, second = best_two(values, 8, count, highest, second)
            else:
                highest, second = best_two(keys, 8, count, highest, second)
        for i in range(8):
            keys[i] = int32((keys[i] | octet.mask) - (at + i))
        lower_missing(keys, 8, count)
        sort_eight(keys)
        if at == span.first:
            for i in range(8):
                best[i] = keys[i]
        else:
            if not octet.exact:
                left_out = max(left_out, highest_left_out(best, keys))
            keep_best_eight(best, keys)
        at = int32(at + span.stride)
    return left_out, highest, second, broken


@cuda.jit(device=True)
def merge_octet(best, left_out, exact):
    """Let `best` be the best eight keys of the octet, in every lane; return the highest one that was left out."""
    keys = cuda.local.array(8, int32)
    for distance in (1, 2, 4):
        for i in range(8):
            keys[i] = cuda.shfl_xor_sync(ALL_LANES, best[i], distance)
        if not exact:
            left_out = max(left_out, cuda.shfl_xor_sync(ALL_LANES, left_out, distance))
            left_out = max(left_out, highest_left_out(best, keys))
        keep_best_eight(best, keys)
    return left_out


@cuda.jit(device=True)
def count_block(tally):
    """Add what the block counted in shared memory to the counters."""
    cuda.syncthreads()
    expert = int32(cuda.threadIdx.x)
    while expert < tally.num_in_block:
        if tally.in_block[expert] != 0:
            add_to_count(tally.counting, expert, tally.in_block[expert])
        expert = int32(expert + cuda.blockDim.x)


@cuda.jit
def choose_for_many(
    rows: Rows,
    choice: Choice,
    weighing: Weighting,
    octet: OctetLanes,
    chosen: Chosen,
    extras: Extras,
    role: Role,
):
    """Choose for a token, by eight lanes, so that a warp serves four; the grid has eight lanes per token.

    A group's score is its best rank, or the sum of its best two scores. Dynamic shared memory: an int32 for each of
    `num_in_block` counters.
    """
    wait_for_earlier()
    in_block = flat(cuda.shared.array(0, int32))  # [num_in_block]
    mask, num_in_block = octet.mask, octet.num_in_block
    scoring_func, top_k = weighing.scoring_func, weighing.top_k
    lane = int32(cuda.laneid)
    member = int32(lane & 7)
    token = int32(warp_index() * 4 + (lane >> 3))
    exists = token < rows.num_tokens
    token = min(token, int32(rows.num_tokens - 1))  # all lanes reach the warp operations
    lanes = int32(1 << octet.lane_bits)
    origin = int32((member >> octet.lane_bits) * choice.group_size)
    first = int32(origin + (member & (lanes - 1)) * 8)
    end = int32(origin + choice.group_size)
    row = int64(token) * rows.row_stride
    source = Source(rows.gating_output, row, rows.vector, extras.adjusting, role == EXTENDED)
    span = Span(first, end, int32(lanes * 8))

    peak = float32(0.0)
    total = float32(1.0)
    if choice.whole_softmax:
        peak, total = softmax_of_octet(source, span)
    scores = Scores(choice.correction_bias, scoring_func, peak, total)
    best = cuda.local.array(8, int32)
    left_out, highest, second, broken = sort_own(source, span, scores, choice, octet, best)
    # behind the loads of logits, which are to come first
    tally = Tally(extras.counting, counting_flag(extras.counting.counts_enabled), in_block, num_in_block)
    if role != PLAIN and num_in_block > 0:
        fill(in_block, num_in_block, 0, int32(cuda.threadIdx.x), int32(cuda.blockDim.x))
        cuda.syncthreads()
    offers = first < end
    if choice.num_expert_group > 1:
        rank = rank_group(highest, second, lanes, choice.group_picks > 1)
        of_best_group = in_best_groups(rank, lanes, choice.topk_group)
        offers = offers and of_best_group
    if not offers:
        left_out = int32(LOWEST_ORDER)
        for i in range(8):
            best[i] = LOWEST_ORDER
    left_out = merge_octet(best, left_out, octet.exact)

    key = best[0]
    for i in range(1, 8):
        if member == i:
            key = best[i]
    expert = int32(mask & ~key)
    logit = float32(NEGATIVE_INFINITY)
    if key > int32(LOWEST_ORDER | mask):
        logit = load_one(source, expert)
    if not octet.exact:
        rank = int32(LOWEST_ORDER)
        if key > int32(LOWEST_ORDER | mask):
            rank = order(rank_of(logit, expert, scores))
        expert, logit = order_picks(expert, logit, rank, LANES, LANES)
        last = cuda.shfl_sync(ALL_LANES, key, (lane & 24) + top_k - 1)
        groups = uint32(cuda.ballot_sync(ALL_LANES, offers))
        votes = uint32(cuda.ballot_sync(ALL_LANES, member == 0 and (last | mask) == (left_out | mask)))
        while votes != 0:
            there = int32(cuda.ffs(votes) - 1)
            edge = cuda.shfl_sync(ALL_LANES, last, there)
            above = uint32(cuda.ballot_sync(ALL_LANES, (key | mask) > (edge | mask)))
            sure = count_lanes((above >> there) & 0xFF)  # picks before the edge
            row_there = cuda.shfl_sync(ALL_LANES, row, there)
            source_there = Source(source.gating_output, row_there, source.vector, source.adjusting, source.extended)
            peak_there = cuda.shfl_sync(ALL_LANES, peak, there)
            total_there = cuda.shfl_sync(ALL_LANES, total, there)
            scores_there = Scores(scores.correction_bias, scoring_func, peak_there, total_there)
            found = choose_at_edge(
                *(source_there, rows.num_experts, edge, int32(top_k - sure), groups >> there, choice.group_size),
                *(octet, scores_there),
            )
            found = cuda.shfl_sync(ALL_LANES, found, (member - sure) & 7)
            if lane & 24 == there and member >= sure:
                expert = found
                logit = load_one(source, expert)
            votes = uint32(votes & (votes - 1))

    if scoring_func == SOFTMAX and not choice.whole_softmax:
        if in_octet(broken):
            expert = member
            total = float32(0.0)
        peak, total = softmax_of_chosen(logit, lane & 24, total)
    num_slots = count_slots(weighing, extras, role)
    if role == EXTENDED and exists and is_padded(token, extras.padding):
        write_nothing(token, member, LANES, num_slots, chosen, extras)
        exists = False
    score = float32(0.0)
    weight = float32(0.0)
    identity = float32(0.0)
    slot = int32(token * num_slots + member)
    is_mine = exists and member < top_k
    if is_mine:
        final = Scores(scores.correction_bias, scoring_func, peak, total)
        score, weight, identity = write_pick(expert, logit, slot, token, final, chosen, extras, tally, role)
    scale = scale_of(score, LANES, weighing, extras, role)
    if is_mine:
        chosen.topk_weights[slot] = weight * scale
    if role == EXTENDED:
        finish_token(
            *(token, member, LANES, exists, num_slots, score, identity, scale),
            *(chosen, extras, tally),
        )
    if role != PLAIN and num_in_block > 0:
        count_block(tally)
