"""Top-k of rows of any size: a warp streams its row and keeps the best in its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by an inverted id. At each step a lane ranks eight
experts, and few of them are among the best: after n random experts the next one is with a chance of top_k / n. These
are inserted one by one, a lane's best first. The first step sorts the best keys of all lanes at once. More than 32
picks take one stream for every 32 picks, of the keys below the last pick.
"""

from numba_moe.device.dialect import cuda, float32, int32, int64, uint32
from numba_moe.device.instructions import larger, present, wait_for_earlier
from numba_moe.device.primitives import (
    ALL_LANES,
    HIGHEST_KEY,
    LOWEST_KEY,
    LOWEST_ORDER,
    NEGATIVE_INFINITY,
    WARP,
    choice_key,
    chosen_index,
    count_lanes,
    exp,
    rank_key,
    warp_index,
    warp_max,
    warp_sum,
)
from numba_moe.device.types import EXTENDED, OptionalFloat32Array, Role
from numba_moe.ops.gating.extras import Extras, Source, load_logits, load_one
from numba_moe.ops.gating.picks import lower_missing, rank_eight
from numba_moe.ops.gating.scores import (
    SOFTMAX,
    Choice,
    Chosen,
    Rows,
    Scores,
    Weighting,
    has_no_softmax,
    lower_broken,
    not_all_finite,
    rank_of,
    score_of,
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

# Experts that a warp reads at a time, eight to a lane.
STEP = 8 * WARP
WARPS_IN_BLOCK = 4
# With the number of blocks that must fit on a multiprocessor: H200, 16,384 tokens take 2 to 14 % less time.
BOUNDS = (WARPS_IN_BLOCK * WARP, 6)
# Below the key of any expert, and not below that of a place past the last one.
NO_EXPERT = (LOWEST_ORDER << 32) | 0x7FFFFFFF


@cuda.jit(device=True)
def softmax_from_memory(source, num_experts):
    """Return the largest logit of a row and the sum of exponentials; a sum of 0 if the row has no softmax."""
    logits = cuda.local.array(8, float32)
    peak = float32(NEGATIVE_INFINITY)
    total = float32(0.0)
    broken = False
    expert = int32(8 * cuda.laneid)
    while expert < num_experts:
        load_logits(source, expert, num_experts - expert, logits)
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
    """Insert the keys of eight experts of each lane that are below `below` and among the `wanted` best."""
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
def keep_best(source, first, end, scores, below, wanted, best):
    """Return the warp's best keys after experts [first, end) too, and whether no logit is NaN or +inf.

    Keys from `below` on do not count; no more than `wanted` keys need be right.
    """
    logits = cuda.local.array(8, float32)
    following = cuda.local.array(8, float32)
    ranks = cuda.local.array(8, int32)
    broken = False
    expert = int32(first + 8 * cuda.laneid)
    load_logits(source, expert, end - expert, following)
    for _ in range(first, end, STEP):
        for i in range(8):
            logits[i] = following[i]
        load_logits(source, expert + STEP, end - expert - STEP, following)
        broken = lower_broken(logits, 8, scores.scoring_func) or broken
        rank_eight(logits, expert, end - expert, source.vector, scores, ranks)
        lower_missing(ranks, 8, end - expert)
        highest = ranks[0]
        for i in range(1, 8):
            highest = max(highest, ranks[i])
        last = cuda.shfl_sync(ALL_LANES, best, wanted - 1)
        if cuda.ballot_sync(ALL_LANES, highest > last >> 32) != 0:  # ids rise, so of equal ranks the first stay
            best = insert_all(best, ranks, expert, below, wanted)
        expert = int32(expert + STEP)
    return best, cuda.ballot_sync(ALL_LANES, broken) == 0


@cuda.jit(device=True)
def score_group(source, first, size, scores, group_picks):
    """Return the score of the group of experts [first, first + size): its best rank, or the sum of its best few."""
    value = float32(0.0)
    below = int64(HIGHEST_KEY)
    picks = int32(min(size, group_picks))
    while picks > 0:
        wanted = int32(min(picks, WARP))
        best, _ = keep_best(source, first, first + size, scores, below, wanted, int64(NO_EXPERT))
        below = cuda.shfl_sync(ALL_LANES, best, wanted - 1)
        mine = float32(0.0)
        if cuda.laneid < wanted:
            expert = chosen_index(best)
            logit = load_one(source, expert)
            if group_picks == 1 or present(scores.correction_bias):
                mine = rank_of(logit, expert, scores)
            else:
                mine = score_of(logit, scores.scoring_func, scores.peak, scores.total)
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


@cuda.jit(launch_bounds=BOUNDS)
def choose_from_memory(
    rows: Rows,
    choice: Choice,
    group_scores: OptionalFloat32Array,
    weighing: Weighting,
    chosen: Chosen,
    extras: Extras,
    role: Role,
):
    """Choose for a token, by a warp that streams its row; the grid has a warp per token.

    `group_scores` [num_tokens, num_expert_group] is scratch, absent where there is one group.
    """
    wait_for_earlier()
    token = warp_index()
    if token >= rows.num_tokens:
        return
    tally = begin_counting(extras.counting)
    scoring_func, top_k = weighing.scoring_func, weighing.top_k
    num_slots = count_slots(weighing, extras, role)
    lane = int32(cuda.laneid)
    if leaves_out(token, lane, WARP, num_slots, chosen, extras, role):
        return
    row = int64(token) * rows.row_stride
    source = Source(rows.gating_output, row, rows.vector, extras.adjusting, role == EXTENDED)
    peak = float32(0.0)
    total = float32(1.0)
    if choice.whole_softmax:
        peak, total = softmax_from_memory(source, rows.num_experts)
    scores = Scores(choice.correction_bias, scoring_func, peak, total)

    num_groups, group_size = choice.num_expert_group, choice.group_size
    groups = int64(token) * num_groups
    last_group = int64(LOWEST_KEY)
    if present(group_scores):
        for group in range(num_groups):
            value = score_group(source, int32(group * group_size), group_size, scores, choice.group_picks)
            if lane == 0:
                group_scores[groups + group] = value
        cuda.syncwarp()
        last_group = last_group_key(group_scores, groups, num_groups, choice.topk_group)

    first_slot = int32(token * num_slots)
    below = int64(HIGHEST_KEY)
    score_sum = float32(0.0)
    identity = float32(0.0)
    base = int32(0)
    while base < top_k:
        wanted = int32(min(top_k - base, WARP))
        best = int64(NO_EXPERT)
        usable = True
        for group in range(num_groups):
            eligible = True
            if present(group_scores):
                eligible = choice_key(group_scores[groups + group], group) >= last_group
            if eligible:
                first, end = int32(group * group_size), int32((group + 1) * group_size)
                best, finite = keep_best(source, first, end, scores, below, wanted, best)
                usable = usable and finite
        below = cuda.shfl_sync(ALL_LANES, best, wanted - 1)
        expert = chosen_index(best)
        if scoring_func == SOFTMAX and not choice.whole_softmax and (not usable or total == float32(0.0)):
            expert = int32(base + lane)  # all experts of a row without a softmax have rank 0
            total = float32(0.0)
        logit = float32(NEGATIVE_INFINITY)
        if lane < wanted:
            logit = load_one(source, expert)
        if scoring_func == SOFTMAX and not choice.whole_softmax and base == 0:
            peak, total = softmax_of_chosen(logit, 0, total)
        if lane < wanted:
            slot = int32(first_slot + base + lane)
            final = Scores(choice.correction_bias, scoring_func, peak, total)
            score, weight, of_zero = write_pick(expert, logit, slot, token, final, chosen, extras, tally, role)
            score_sum += score
            identity += of_zero
            chosen.topk_weights[slot] = weight
        base = int32(base + WARP)

    scale = scale_of(score_sum, WARP, weighing, extras, role)
    scale_weights(chosen.topk_weights, first_slot, top_k, scale)
    if role == EXTENDED:
        finish_token(
            *(token, lane, WARP, True, num_slots, score_sum, identity, scale),
            *(chosen, extras, tally),
        )
