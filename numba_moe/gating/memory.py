"""Top-k of rows of any size: a warp streams its row and keeps the best in its lanes.

Lane i holds the i-th best key so far, a key being a rank and an id upside down. At each step a lane ranks eight
experts, of which few reach the last of those wanted: after n of random ones the next does with a chance of top_k / n.
Those that do are inserted one by one, a lane's best first; at the first step the best of all lanes are sorted at once.
More than 32 picks take a stream each 32, of the keys below the last one that was picked.
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
from numba_moe.gating.rows import (
    SMALLEST_SUM,
    SOFTMAX,
    has_no_softmax,
    load_first,
    lower_unscored,
    not_all_finite,
    rank_of,
    score_all,
    score_of,
    weight_of,
)
from numba_moe.runtime.dialect import cuda, float32, int32, int64, uint32
from numba_moe.runtime.parameters import (
    COUNTING,
    EXTENDED,
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
    WARP,
    choice_key,
    chosen_index,
    count_lanes,
    divide,
    exp,
    larger,
    load_float,
    order,
    order_of_number,
    present,
    rank_key,
    warp_index,
    warp_max,
    warp_sum,
)

# Experts that a warp reads at a time, eight to a lane.
STEP = 8 * WARP
WARPS_IN_BLOCK = 4
# With how many blocks are to fit on a multiprocessor: 2 to 14 % less time for 16,384 tokens on an H200, measured when
# infinities were still told by a comparison for each logit.
BOUNDS = (WARPS_IN_BLOCK * WARP, 6)
# Below the key of any expert, and not below that of a place past the last one.
NO_EXPERT = (LOWEST_ORDER << 32) | 0x7FFFFFFF


@cuda.jit(device=True)
def load_logits(gating_output, row, expert, end, aligned, adjusting, logits):
    """Read the logits of eight experts, adjusted; -inf from `end` on."""
    extended, logit_bias, softcap = adjusting
    load_first(gating_output, row + expert, end - expert, aligned, logits)
    if extended:
        adjust(logits, 8, expert, end - expert, logit_bias, softcap)


@cuda.jit(device=True)
def load_logit(gating_output, row, expert, adjusting):
    extended, logit_bias, softcap = adjusting
    logit = load_float(gating_output, row + expert)
    if extended:
        logit = adjusted(logit, expert, logit_bias, softcap)
    return logit


@cuda.jit(device=True)
def softmax_from_memory(gating_output, row, num_experts, aligned, adjusting):
    """Return the largest logit of a row and the sum of exponentials; a sum of 0 if the row has no softmax."""
    logits = cuda.local.array(8, float32)
    peak = float32(NEGATIVE_INFINITY)
    total = float32(0.0)
    broken = False
    expert = int32(8 * cuda.laneid)
    while expert < num_experts:
        load_logits(gating_output, row, expert, num_experts, aligned, adjusting, logits)
        if not_all_finite(logits, 8):
            broken = has_no_softmax(logits, 8) or broken
        highest = peak
        for i in range(8):
            highest = larger(highest, logits[i])
        if highest > peak:
            total *= exp(peak - highest)
            peak = highest
        if peak > float32(NEGATIVE_INFINITY) and not broken:
            for i in range(8):
                total += exp(logits[i] - peak)
        expert = int32(expert + STEP)
    highest = warp_max(peak)
    if cuda.ballot_sync(ALL_LANES, broken) != 0 or highest == float32(NEGATIVE_INFINITY):
        return highest, float32(0.0)
    if peak < highest:
        total *= exp(peak - highest)
    return highest, warp_sum(total)


@cuda.jit(device=True)
def rank_all(logits, expert, end, aligned, rule, ranks):
    """Write the ranks of eight experts, as integers of the same order; LOWEST_ORDER from `end` on."""
    correction_bias, scoring_func, peak, total = rule
    if present(correction_bias):
        biases = cuda.local.array(8, float32)
        load_first(correction_bias, expert, end - expert, aligned, biases)
        score_all(logits, 8, scoring_func, peak, total, logits)
        for i in range(8):
            ranks[i] = order(logits[i] + biases[i])
    else:
        for i in range(8):
            ranks[i] = order_of_number(logits[i])
        if total == float32(0.0):
            for i in range(8):
                ranks[i] = 0
    if end - expert < 8:
        for i in range(8):
            if expert + i >= end:
                ranks[i] = LOWEST_ORDER


@cuda.jit(device=True)
def highest_below(ranks, expert, below):
    """Return the highest key below one of eight experts with these ranks, NO_EXPERT if there is none."""
    highest = int64(NO_EXPERT)
    for i in range(8):
        key = rank_key(ranks[i], expert + i)
        if key < below:
            highest = max(highest, key)
    return highest


@cuda.jit(device=True)
def sort_keys(key):
    """Sort the warp's keys, highest first, in a bitonic network."""
    lane = int32(cuda.laneid)
    for level in range(1, 6):
        for turn in range(level):
            distance = int32(1 << (level - 1 - turn))
            other = cuda.shfl_xor_sync(ALL_LANES, key, distance)
            keeps_higher = (lane & distance == 0) == (lane & (1 << level) == 0)
            key = max(key, other) if keeps_higher else min(key, other)
    return key


@cuda.jit(device=True)
def insert(best, key):
    """Insert a key, the same in all lanes, into the warp's sorted keys; the last one falls out."""
    lane = int32(cuda.laneid)
    place = count_lanes(cuda.ballot_sync(ALL_LANES, best > key))
    before = cuda.shfl_up_sync(ALL_LANES, best, 1)
    if lane == place:
        best = key
    elif lane > place:
        best = before
    return best


@cuda.jit(device=True)
def insert_all(best, ranks, expert, below, wanted):
    """Insert the keys of eight experts of each lane, those below `below`, as far as they are among so many best."""
    mine = highest_below(ranks, expert, below)
    if cuda.shfl_sync(ALL_LANES, best, 0) == NO_EXPERT:
        best = sort_keys(mine)
        mine = highest_below(ranks, expert, mine)
    votes = uint32(cuda.ballot_sync(ALL_LANES, mine > cuda.shfl_sync(ALL_LANES, best, wanted - 1)))
    while votes != 0:
        source = int32(cuda.ffs(votes) - 1)
        best = insert(best, cuda.shfl_sync(ALL_LANES, mine, source))
        if cuda.laneid == source:
            mine = highest_below(ranks, expert, mine)
        votes = uint32(cuda.ballot_sync(ALL_LANES, mine > cuda.shfl_sync(ALL_LANES, best, wanted - 1)))
    return best


@cuda.jit(device=True)
def keep_best(gating_output, row, first, end, aligned, adjusting, rule, below, wanted, best):
    """Return the warp's best keys after experts [first, end) too, and whether no logit is NaN or +inf.

    Keys from `below` on do not count; no more than `wanted` keys need be right.
    """
    _, scoring_func, _, _ = rule
    logits = cuda.local.array(8, float32)
    following = cuda.local.array(8, float32)
    ranks = cuda.local.array(8, int32)
    broken = False
    expert = int32(first + 8 * cuda.laneid)
    load_logits(gating_output, row, expert, end, aligned, adjusting, following)
    for _ in range(first, end, STEP):
        for i in range(8):
            logits[i] = following[i]
        load_logits(gating_output, row, expert + STEP, end, aligned, adjusting, following)
        if not_all_finite(logits, 8):
            broken = has_no_softmax(logits, 8) or broken
            lower_unscored(logits, 8, scoring_func)
        rank_all(logits, expert, end, aligned, rule, ranks)
        highest = ranks[0]
        for i in range(1, 8):
            highest = max(highest, ranks[i])
        last = cuda.shfl_sync(ALL_LANES, best, wanted - 1)
        if cuda.ballot_sync(ALL_LANES, highest > last >> 32) != 0:  # ids rise, so of equal ranks the first stay
            best = insert_all(best, ranks, expert, below, wanted)
        expert = int32(expert + STEP)
    return best, cuda.ballot_sync(ALL_LANES, broken) == 0


@cuda.jit(device=True)
def score_group(gating_output, row, first, size, aligned, adjusting, rule, group_picks):
    """Return the score of the group of experts [first, first + size): its best rank, or the sum of so many."""
    correction_bias, scoring_func, peak, total = rule
    value = float32(0.0)
    below = int64(HIGHEST_KEY)
    picks = int32(min(size, group_picks))
    while picks > 0:
        wanted = int32(min(picks, WARP))
        best, _ = keep_best(
            *(gating_output, row, first, first + size, aligned, adjusting, rule, below, wanted, int64(NO_EXPERT))
        )
        below = cuda.shfl_sync(ALL_LANES, best, wanted - 1)
        mine = float32(0.0)
        if cuda.laneid < wanted:
            expert = chosen_index(best)
            logit = load_logit(gating_output, row, expert, adjusting)
            if group_picks == 1 or present(correction_bias):
                mine = rank_of(logit, expert, correction_bias, scoring_func, peak, total)
            else:
                mine = score_of(logit, scoring_func, peak, total)
        if group_picks == 1:
            return cuda.shfl_sync(ALL_LANES, mine, 0)
        value += warp_sum(mine)
        picks = int32(picks - wanted)
    return value


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


@cuda.jit(device=True)
def scale_weights(topk_weights, first_pick, top_k, weight_sum, renormalize, routed_scaling_factor):
    """Scale the weights of a token, each by the lane that wrote it; return the factor."""
    scale = float32(routed_scaling_factor)
    if renormalize:
        weight_sum = warp_sum(weight_sum)
        if weight_sum > float32(SMALLEST_SUM):
            scale = divide(scale, weight_sum)
    for pick in range(cuda.laneid, top_k, WARP):
        topk_weights[first_pick + pick] *= scale
    return scale


@cuda.jit(launch_bounds=BOUNDS)
def choose_from_memory(
    gating_output: FloatArray,
    correction_bias: OptionalFloat32Array,
    group_scores: OptionalFloat32Array,
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
    # gating_output [num_tokens, num_experts] with rows row_stride apart, correction_bias [num_experts],
    # group_scores [num_tokens, num_expert_group], topk_weights and topk_ids [num_tokens, top_k]; a warp per token
    token = warp_index()
    if token >= num_tokens:
        return
    ids = (id_bytes, num_real, zero_expert_id)
    dispatch = (physical_map, num_valid, step, num_rows, width, algorithm, seed)
    counting = (counts, num_counts, count_rows, count_bytes, counting_flag(counts_enabled), counts, 0)
    extended = role == EXTENDED
    num_slots = int32(top_k + num_shared if extended else top_k)
    lane = int32(cuda.laneid)
    if extended and is_padded(token, num_token_non_padded, scalar_bytes, is_padding):
        write_nothing(token, lane, WARP, num_slots, topk_weights, topk_ids, ids, identity_weights)
        return
    row = int64(token) * row_stride
    adjusting = (extended, logit_bias, softcap)
    peak = float32(0.0)
    total = float32(1.0)
    if whole_softmax:
        peak, total = softmax_from_memory(gating_output, row, num_experts, aligned, adjusting)
    rule = (correction_bias, scoring_func, peak, total)

    groups = int64(token) * num_expert_group
    group_size = int32(num_experts // num_expert_group)
    last_group = int64(LOWEST_KEY)
    if present(group_scores):
        for group in range(num_expert_group):
            where = (gating_output, row, int32(group * group_size), group_size, aligned)
            value = score_group(*where, adjusting, rule, group_picks)
            if lane == 0:
                group_scores[groups + group] = value
        cuda.syncwarp()
        last_group = last_group_key(group_scores, groups, num_expert_group, topk_group)

    first_pick = int64(token) * num_slots
    below = int64(HIGHEST_KEY)
    weight_sum = float32(0.0)
    identity = float32(0.0)
    base = int32(0)
    while base < top_k:
        wanted = int32(min(top_k - base, WARP))
        best = int64(NO_EXPERT)
        usable = True
        for group in range(num_expert_group):
            eligible = True
            if present(group_scores):
                eligible = choice_key(group_scores[groups + group], group) >= last_group
            if eligible:
                where = (gating_output, row, int32(group * group_size), int32((group + 1) * group_size), aligned)
                best, finite = keep_best(*where, adjusting, rule, below, wanted, best)
                usable = usable and finite
        below = cuda.shfl_sync(ALL_LANES, best, wanted - 1)
        chosen = chosen_index(best)
        if scoring_func == SOFTMAX and not whole_softmax and (not usable or total == float32(0.0)):
            chosen = int32(base + lane)  # all experts of a row without a softmax have rank 0
            total = float32(0.0)
        logit = float32(NEGATIVE_INFINITY)
        if lane < wanted:
            logit = load_logit(gating_output, row, chosen, adjusting)
        if scoring_func == SOFTMAX and not whole_softmax and base == 0:
            peak = cuda.shfl_sync(ALL_LANES, logit, 0)
            if peak == float32(NEGATIVE_INFINITY):
                total = float32(0.0)
        if lane < wanted:
            slot = first_pick + (base + lane)
            weight = weight_of(logit, scoring_func, peak, total)
            weight_sum += weight
            if extended:
                write_choice(chosen, int32(slot), token, topk_ids, ids, dispatch, counting)
                if chosen >= num_real:
                    identity += weight
                    weight = float32(0.0)
            else:
                topk_ids[slot] = chosen
                if role == COUNTING:
                    count_expert(chosen, token, counting)
            topk_weights[slot] = weight
        base = int32(base + WARP)

    scale = scale_weights(topk_weights, first_pick, top_k, weight_sum, renormalize, routed_scaling_factor)
    if extended:
        rest = (num_slots, num_shared, shared_factor, topk_weights, topk_ids, identity_weights)
        write_rest(token, scale, weight_sum, identity, renormalize, rest, ids, dispatch, counting)
