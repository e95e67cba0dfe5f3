"""Top-k of many tokens: eight lanes serve a token, so that a warp's instructions serve four.

Each lane takes eight experts at a time, sorts their keys (see `registers`) in a network of comparisons, and keeps the
best eight; then neighbours exchange their lists and keep the best eight of both. With groups, a group's experts lie
with lanes of its own.

Picks whose keys have the same upper bits are then ordered by rank. If some expert that was left out has the upper bits
of the last pick, the warp looks through the row for all that have them.
"""

from numba_moe.gating.extras import (
    add_to_count,
    adjust,
    adjusted,
    count_expert,
    counting_flag,
    is_padded,
    write_choice,
    write_nothing,
    write_shared,
)
from numba_moe.gating.networks import highest_left_out, keep_best_eight, sort_eight
from numba_moe.gating.rows import (
    SMALLEST_SUM,
    SOFTMAX,
    has_no_softmax,
    load_first,
    lower_unscored,
    not_all_finite,
    rank_of,
    score_all,
    weight_of,
)
from numba_moe.runtime.dialect import cuda, float32, int32, int64, uint32
from numba_moe.runtime.parameters import (
    COUNTING,
    EXTENDED,
    PLAIN,
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
    load_float,
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


@cuda.jit(device=True)
def in_octet(predicate):
    """Whether a predicate holds for a lane of this octet."""
    votes = cuda.ballot_sync(ALL_LANES, predicate)
    return (votes >> (cuda.laneid & 24)) & 0xFF != 0


@cuda.jit(device=True)
def softmax_of_octet(gating_output, start, first, end, step, aligned, extended, logit_bias, softcap):
    """Return the largest logit of the octet's row and the sum of exponentials; 0 if the row has no softmax."""
    logits = cuda.local.array(8, float32)
    peak = float32(NEGATIVE_INFINITY)
    broken = False
    at = first
    while at < end:
        load_first(gating_output, start + at, end - at, aligned, logits)
        if extended:
            adjust(logits, 8, at, end - at, logit_bias, softcap)
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
        load_first(gating_output, start + at, end - at, aligned, logits)
        if extended:
            adjust(logits, 8, at, end - at, logit_bias, softcap)
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
def choose_at_edge(
    gating_output,
    correction_bias,
    row,
    edge,
    mask,
    wanted,
    groups,
    num_experts,
    group_size,
    lanes,
    scoring_func,
    peak,
    total,
    extended,
    logit_bias,
    softcap,
):
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
                logits[i] = load_float(gating_output, row + expert)
                if extended:
                    logits[i] = adjusted(logits[i], expert, logit_bias, softcap)
            for i in range(8):
                expert = int32(base + 32 * i + cuda.laneid)
                if expert < num_experts and (groups >> (quotient(expert, group_size) * lanes)) & 1:
                    rank = order(rank_of(logits[i], expert, correction_bias, scoring_func, peak, total))
                    key = rank_key(rank, expert)
                    if (rank | mask) == (edge | mask) and key < last:
                        best = max(best, key)
        last = warp_max(best)
        if cuda.laneid == pick:
            found = chosen_index(last)
    return found


@cuda.jit
def choose_for_many(
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
    top_k: Int32,
    scoring_func: Int32,
    whole_softmax: Int32,
    renormalize: Int32,
    routed_scaling_factor: Float32,
    num_expert_group: Int32,
    topk_group: Int32,
    group_picks: Int32,
    group_size: Int32,
    lane_bits: Int32,
    mask: Int32,
    exact: Int32,
    num_in_block: Int32,
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
    role: Role,
):
    # gating_output [num_tokens, num_experts] with rows row_stride apart, correction_bias [num_experts], topk_weights
    # and topk_ids [num_tokens, top_k]; eight lanes a token, 1 << lane_bits of them a group,
    # whose score is the best rank or the sum of the best two; mask covers the ids, and takes nothing from the
    # ranks if they are exact so; in_block [num_in_block], which is num_counts, or 0 if a block has none of its own
    in_block = flat(cuda.shared.array(0, int32))
    extended = role == EXTENDED
    lane = int32(cuda.laneid)
    member = int32(lane & 7)
    token = int32(warp_index() * 4 + (lane >> 3))
    exists = token < num_tokens
    token = min(token, int32(num_tokens - 1))  # all lanes reach the warp operations
    lanes = int32(1 << lane_bits)
    origin = int32((member >> lane_bits) * group_size)
    first = int32(origin + (member & (lanes - 1)) * 8)
    end = int32(origin + group_size)
    stride = int32(lanes * 8)
    row = int64(token) * row_stride

    peak = float32(0.0)
    total = float32(1.0)
    if whole_softmax:
        peak, total = softmax_of_octet(gating_output, row, first, end, stride, aligned, extended, logit_bias, softcap)
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
        load_first(gating_output, row + at, count, aligned, logits)
        if extended:
            adjust(logits, 8, at, count, logit_bias, softcap)
        if not_all_finite(logits, 8):
            broken = has_no_softmax(logits, 8) or broken
            lower_unscored(logits, 8, scoring_func)
        for i in range(8):
            keys[i] = order_of_number(logits[i])
        if total == float32(0.0):
            for i in range(8):
                keys[i] = 0
        if present(correction_bias):
            score_all(logits, 8, scoring_func, peak, total, scores)
            load_first(correction_bias, at, count, aligned, biases)
            for i in range(8):
                keys[i] = order(scores[i] + biases[i])
        if num_expert_group > 1:
            if group_picks > 1 and not present(correction_bias):
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
            if not exact:
                left_out = max(left_out, highest_left_out(best, keys))
            keep_best_eight(best, keys)
        at = int32(at + stride)
    # behind the loads of logits, which are to come first
    flag = counting_flag(counts_enabled)
    counting = (counts, num_counts, count_rows, count_bytes, flag, in_block, num_in_block)
    if role != PLAIN and num_in_block > 0:
        fill(in_block, num_in_block, 0, int32(cuda.threadIdx.x), int32(cuda.blockDim.x))
        cuda.syncthreads()
    offers = first < end
    if num_expert_group > 1:
        chosen_group = in_best_groups(highest, second, group_picks > 1, lanes, topk_group)
        offers = offers and chosen_group
    if not offers:
        left_out = int32(LOWEST_ORDER)
        for i in range(8):
            best[i] = LOWEST_ORDER
    for distance in (1, 2, 4):
        for i in range(8):
            keys[i] = cuda.shfl_xor_sync(ALL_LANES, best[i], distance)
        if not exact:
            left_out = max(left_out, cuda.shfl_xor_sync(ALL_LANES, left_out, distance))
            left_out = max(left_out, highest_left_out(best, keys))
        keep_best_eight(best, keys)

    key = best[0]
    for i in range(1, 8):
        if member == i:
            key = best[i]
    chosen = int32(mask & ~key)
    logit = float32(NEGATIVE_INFINITY)
    if key > int32(LOWEST_ORDER | mask):
        logit = load_float(gating_output, row + chosen)
        if extended:
            logit = adjusted(logit, chosen, logit_bias, softcap)
    if not exact:
        rank = int32(LOWEST_ORDER)
        if key > int32(LOWEST_ORDER | mask):
            rank = order(rank_of(logit, chosen, correction_bias, scoring_func, peak, total))
        next_rank = cuda.shfl_down_sync(ALL_LANES, rank, 1)
        if cuda.ballot_sync(ALL_LANES, member < 7 and rank < next_rank) != 0:
            source = lane_of_pick(rank)
            chosen = cuda.shfl_sync(ALL_LANES, chosen, source)
            logit = cuda.shfl_sync(ALL_LANES, logit, source)
        last = cuda.shfl_sync(ALL_LANES, key, (lane & 24) + top_k - 1)
        groups = uint32(cuda.ballot_sync(ALL_LANES, offers))
        votes = uint32(cuda.ballot_sync(ALL_LANES, member == 0 and (last | mask) == (left_out | mask)))
        while votes != 0:
            source = int32(cuda.ffs(votes) - 1)
            edge = cuda.shfl_sync(ALL_LANES, last, source)
            above = uint32(cuda.ballot_sync(ALL_LANES, (key | mask) > (edge | mask)))
            sure = count_lanes((above >> source) & 0xFF)  # picks before the edge
            found = choose_at_edge(
                *(gating_output, correction_bias, cuda.shfl_sync(ALL_LANES, row, source)),
                *(edge, mask, int32(top_k - sure), groups >> source, num_experts, group_size, lanes),
                *(scoring_func, cuda.shfl_sync(ALL_LANES, peak, source), cuda.shfl_sync(ALL_LANES, total, source)),
                *(extended, logit_bias, softcap),
            )
            found = cuda.shfl_sync(ALL_LANES, found, (member - sure) & 7)
            if lane & 24 == source and member >= sure:
                chosen = found
                logit = load_float(gating_output, row + chosen)
                if extended:
                    logit = adjusted(logit, chosen, logit_bias, softcap)
            votes = uint32(votes & (votes - 1))

    is_pick = member < top_k
    if scoring_func == SOFTMAX and not whole_softmax:
        if in_octet(broken):
            chosen = member
            total = float32(0.0)
        peak = cuda.shfl_sync(ALL_LANES, logit, lane & 24)
        if peak == float32(NEGATIVE_INFINITY):
            total = float32(0.0)
    weight = float32(0.0)
    if is_pick:
        weight = weight_of(logit, scoring_func, peak, total)
    scale = float32(routed_scaling_factor)
    if renormalize:
        weight_sum = weight
        for distance in (1, 2, 4):
            weight_sum += cuda.shfl_xor_sync(ALL_LANES, weight_sum, distance)
        if weight_sum > float32(SMALLEST_SUM):
            scale = divide(scale, weight_sum)
    if extended:
        ids = (id_bytes, num_real, zero_expert_id)
        dispatch = (physical_map, num_valid, step, num_rows, width, algorithm, seed)
        num_slots = int32(top_k + num_shared)
        is_zero = is_pick and chosen >= num_real
        shared = weight
        identity = weight if is_zero else float32(0.0)
        for distance in (1, 2, 4):
            shared += cuda.shfl_xor_sync(ALL_LANES, shared, distance)
            identity += cuda.shfl_xor_sync(ALL_LANES, identity, distance)
        if exists and is_padded(token, num_token_non_padded, scalar_bytes, is_padding):
            write_nothing(token, member, LANES, num_slots, topk_weights, topk_ids, ids, identity_weights)
            exists = False
        if exists:
            if is_pick:
                slot = int32(token * num_slots + member)
                write_choice(chosen, slot, token, topk_ids, ids, dispatch, counting)
                topk_weights[slot] = float32(0.0) if is_zero else weight * scale
            if renormalize:
                shared = float32(1.0)
            where = (token, member, LANES, num_slots, num_shared, shared * shared_factor, topk_weights, topk_ids)
            write_shared(*where, ids, dispatch, counting)
            if member == 0 and present(identity_weights):
                identity_weights[token] = identity * scale
    elif is_pick and exists:
        slot = int32(token * top_k + member)
        topk_ids[slot] = chosen
        topk_weights[slot] = weight * scale
        if role == COUNTING:
            count_expert(chosen, token, counting)
    if role != PLAIN and num_in_block > 0:
        cuda.syncthreads()
        expert = int32(cuda.threadIdx.x)
        while expert < num_in_block:
            if in_block[expert] != 0:
                add_to_count(counts, expert, in_block[expert], count_bytes)
            expert = int32(expert + cuda.blockDim.x)
