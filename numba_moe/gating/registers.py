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

from numba_moe.gating.extras import (
    adjust,
    adjusted,
    count_expert,
    counting_flag,
    is_padded,
    write_choice,
    write_nothing,
    write_rest,
)
from numba_moe.gating.networks import keep_best_four, put_in_order, sort_four
from numba_moe.gating.rows import (
    SMALLEST_SUM,
    SOFTMAX,
    has_no_softmax,
    lower_unscored,
    not_all_finite,
    rank_of,
    score_all,
    weight_of,
)
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.parameters import (
    COUNTING,
    EXTENDED,
    Columns,
    Float32,
    Float32Array,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFlags,
    OptionalFloat32Array,
    OptionalInt32Array,
    OptionalInt64Array,
    OptionalSizedArray,
    Role,
)
from numba_moe.runtime.primitives import (
    ALL_LANES,
    LOWEST_ORDER,
    NEGATIVE_INFINITY,
    WARP,
    divide,
    exp,
    first_lane,
    larger,
    load_float,
    load_floats,
    order,
    order_of_number,
    present,
    value_of,
    warp_highest,
    warp_index,
    warp_sum,
)


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
def score_group(ranks, count, columns, lanes, with_second):
    """Return the rank of the group that this lane and its neighbours share: of its best, or of its best two's sum."""
    best = int32(LOWEST_ORDER)
    second = int32(LOWEST_ORDER)
    for column in range(columns):
        if column < count:
            second = max(second, min(best, ranks[column]))
            best = max(best, ranks[column])
    distance = int32(1)
    while distance < lanes:
        other = cuda.shfl_xor_sync(ALL_LANES, best, distance)
        other_second = cuda.shfl_xor_sync(ALL_LANES, second, distance)
        second = max(min(best, other), max(second, other_second))
        best = max(best, other)
        distance = int32(distance << 1)
    if with_second and second > LOWEST_ORDER:
        best = order(value_of(best) + value_of(second))
    return best


@cuda.jit(device=True)
def in_chosen_group(rank, group, topk_group):
    """Whether the group of this lane is among the best; lanes of one group are neighbours with the same rank.

    Lanes behind the last group have no experts, and so the lowest rank, below that of any group.
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
def lane_of_pick(rank, picks):
    """Return the lane whose expert this lane's pick should be, by ranks and then by lanes."""
    lane = int32(cuda.laneid)
    place = int32(0)
    for other in range(picks):
        other_rank = cuda.shfl_sync(ALL_LANES, rank, other)
        if other_rank > rank or (other_rank == rank and other < lane):
            place = int32(place + 1)
    found = lane
    for pick in range(picks):
        source = first_lane(place == pick)
        if lane == pick:
            found = source
    return found


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
def choose_for_token(token, own, arrays, rows, rules, groups, extras, columns, role):
    """Choose and weigh the experts of a token, for which the whole warp works.

    `own` arrays have `columns` elements of a lane's own; the other tuples have the parameters of `choose_experts`.
    """
    logits, ranks, scores = own
    gating_output, correction_bias, topk_weights, topk_ids = arrays
    row_stride, aligned, ragged = rows
    top_k, exact, scoring_func, whole_softmax, renormalize, routed_scaling_factor = rules
    num_expert_group, topk_group, group_picks, group_size, lane_bits = groups
    adjusting, padding, ids, dispatch, counters, more = extras
    logit_bias, softcap = adjusting
    num_token_non_padded, scalar_bytes, is_padding = padding
    _, num_real, _ = ids
    counts, num_counts, count_rows, count_bytes, counts_enabled = counters
    num_shared, shared_factor, identity_weights = more
    extended = role == EXTENDED
    num_slots = int32(top_k + num_shared if extended else top_k)
    lane = int32(cuda.laneid)
    if extended and is_padded(token, num_token_non_padded, scalar_bytes, is_padding):
        write_nothing(token, lane, WARP, num_slots, topk_weights, topk_ids, ids, identity_weights)
        return
    group = int32(lane >> lane_bits)
    lanes = int32(1 << lane_bits)
    in_group = int32(int32(lane & (lanes - 1)) * int32(columns))
    first = int32(group * group_size + in_group)
    count = int32(columns)
    if ragged:
        count = int32(min(group_size - in_group, columns))
        if group >= num_expert_group:
            count = int32(0)
    row = int64(token) * row_stride
    load_row(gating_output, row + first, count, aligned, columns, logits)
    counting = (counts, num_counts, count_rows, count_bytes, counting_flag(counts_enabled), counts, 0)
    if extended:
        adjust(logits, columns, first, count, logit_bias, softcap)
    peak = float32(0.0)
    total = float32(1.0)
    broken = False
    if not_all_finite(logits, columns):
        broken = has_no_softmax(logits, columns)
        lower_unscored(logits, columns, scoring_func)
    if scoring_func == SOFTMAX:
        if cuda.ballot_sync(ALL_LANES, broken) != 0:
            total = float32(0.0)
        elif whole_softmax:
            peak, total = sum_exponentials(logits, columns)
    for column in range(columns):
        ranks[column] = order_of_number(logits[column])
    if total == float32(0.0):
        for column in range(columns):
            ranks[column] = 0
    if present(correction_bias) or (num_expert_group > 1 and group_picks > 1):
        score_all(logits, columns, scoring_func, peak, total, logits)
    if present(correction_bias):
        for column in range(columns):
            if column < count:
                ranks[column] = order(logits[column] + correction_bias[first + column])
    if num_expert_group > 1:
        if group_picks == 1 or present(correction_bias):
            rank = score_group(ranks, count, columns, lanes, group_picks > 1)
        else:
            for column in range(columns):
                scores[column] = order(logits[column])
            rank = score_group(scores, count, columns, lanes, True)
        if not in_chosen_group(rank, group, topk_group):
            count = int32(0)
    if ragged or num_expert_group > 1:
        for column in range(columns):
            if column >= count:
                ranks[column] = LOWEST_ORDER

    chosen = int32(0)
    logit = float32(NEGATIVE_INFINITY)
    decided = False
    if top_k < WARP:
        best = cuda.local.array(4, int32)
        best_four(ranks, columns, first, best)
        key, picks, decided = pick_keys(ranks, columns, first, best, top_k, top_k if exact else int32(WARP))
        decided = decided or exact
        chosen = int32(int32(WARP * columns - 1) & ~key)
        if lane < picks:
            logit = load_float(gating_output, row + chosen)
            if extended:
                logit = adjusted(logit, chosen, logit_bias, softcap)
        if not exact:
            rank = int32(LOWEST_ORDER)
            if lane < picks:
                rank = order(rank_of(logit, chosen, correction_bias, scoring_func, peak, total))
            next_rank = cuda.shfl_down_sync(ALL_LANES, rank, 1)
            if cuda.ballot_sync(ALL_LANES, int32(lane + 1) < picks and rank < next_rank) != 0:
                source = lane_of_pick(rank, picks)
                chosen = cuda.shfl_sync(ALL_LANES, chosen, source)
                logit = cuda.shfl_sync(ALL_LANES, logit, source)

    first_slot = int32(token * num_slots)
    weight_sum = float32(0.0)
    weight = float32(0.0)
    identity = float32(0.0)
    base = int32(0)
    while base < top_k:
        pick = int32(base + lane)
        is_mine = pick < top_k
        if not decided:
            chosen = choose_one_by_one(ranks, columns, first, min(int32(top_k - base), int32(WARP)))
            if is_mine:
                logit = load_float(gating_output, row + chosen)
                if extended:
                    logit = adjusted(logit, chosen, logit_bias, softcap)
        if scoring_func == SOFTMAX and not whole_softmax and base == 0:
            peak = cuda.shfl_sync(ALL_LANES, logit, 0)
            if peak == float32(NEGATIVE_INFINITY):
                total = float32(0.0)
        weight = float32(0.0)
        if is_mine:
            weight = weight_of(logit, scoring_func, peak, total)
            slot = int32(first_slot + pick)
            if extended:
                write_choice(chosen, slot, token, topk_ids, ids, dispatch, counting)
            else:
                topk_ids[slot] = chosen
                if role == COUNTING:
                    count_expert(chosen, token, counting)
            if top_k > WARP:
                topk_weights[slot] = weight
        weight_sum += weight
        if extended and is_mine and chosen >= num_real:
            identity += weight
            weight = float32(0.0)
            if top_k > WARP:
                topk_weights[int32(first_slot + pick)] = weight
        base = int32(base + WARP)

    scale = float32(routed_scaling_factor)
    if renormalize:
        lanes = int32(min(top_k, WARP))
        distance = int32(1)
        while distance < lanes:
            weight_sum += cuda.shfl_xor_sync(ALL_LANES, weight_sum, distance)
            distance = int32(distance << 1)
        if weight_sum > float32(SMALLEST_SUM):
            scale = divide(scale, weight_sum)
    if top_k > WARP:
        for pick in range(lane, top_k, WARP):  # the lane that wrote this pick
            topk_weights[int32(first_slot + pick)] *= scale
    elif lane < top_k:
        topk_weights[int32(first_slot + lane)] = weight * scale
    if extended:
        rest = (num_slots, num_shared, shared_factor, topk_weights, topk_ids, identity_weights)
        write_rest(token, scale, weight_sum, identity, renormalize, rest, ids, dispatch, counting)


@cuda.jit
def choose_experts(
    gating_output: FloatArray,
    correction_bias: OptionalFloat32Array,
    topk_weights: Float32Array,
    topk_ids: Int32Array,
    logit_bias: OptionalFloat32Array,
    num_token_non_padded: OptionalSizedArray,
    is_padding: OptionalFlags,
    physical_map: OptionalInt32Array,
    num_valid: OptionalInt32Array,
    step: OptionalInt64Array,
    counts: OptionalSizedArray,
    counts_enabled: OptionalInt32Array,
    identity_weights: OptionalFloat32Array,
    num_tokens: Int32,
    num_experts: Int32,
    row_stride: Int64,
    aligned: Int32,
    ragged: Int32,
    top_k: Int32,
    exact: Int32,
    scoring_func: Int32,
    whole_softmax: Int32,
    renormalize: Int32,
    routed_scaling_factor: Float32,
    num_expert_group: Int32,
    topk_group: Int32,
    group_picks: Int32,
    group_size: Int32,
    lane_bits: Int32,
    softcap: Float32,
    scalar_bytes: Int32,
    id_bytes: Int32,
    num_real: Int32,
    zero_expert_id: Int32,
    num_shared: Int32,
    shared_factor: Float32,
    num_rows: Int32,
    width: Int32,
    algorithm: Int32,
    seed: Int64,
    num_counts: Int32,
    count_rows: Int32,
    count_bytes: Int32,
    columns: Columns,
    role: Role,
):
    # gating_output [num_tokens, num_experts] with rows row_stride apart, correction_bias [num_experts], topk_weights
    # and topk_ids [num_tokens, top_k]; a warp per token, 1 << lane_bits lanes of it for a group, whose score is the
    # best rank or the sum of the best two
    own = (
        cuda.local.array(columns, float32),
        cuda.local.array(columns, int32),
        cuda.local.array(columns, int32),
    )
    arrays = (gating_output, correction_bias, topk_weights, topk_ids)
    rows = (row_stride, aligned, ragged)
    rules = (top_k, exact, scoring_func, whole_softmax, renormalize, routed_scaling_factor)
    groups = (num_expert_group, topk_group, group_picks, group_size, lane_bits)
    extras = (
        (logit_bias, softcap),
        (num_token_non_padded, scalar_bytes, is_padding),
        (id_bytes, num_real, zero_expert_id),
        (physical_map, num_valid, step, num_rows, width, algorithm, seed),
        (counts, num_counts, count_rows, count_bytes, counts_enabled),
        (num_shared, shared_factor, identity_weights),
    )
    token = warp_index()
    if token < num_tokens:
        choose_for_token(token, own, arrays, rows, rules, groups, extras, columns, role)
