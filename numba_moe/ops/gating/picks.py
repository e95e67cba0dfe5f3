"""Ranks, groups and the order of picks, as the algorithms that pick experts share them."""

from numba_moe.device.dialect import cuda, float32, int32
from numba_moe.device.instructions import present
from numba_moe.device.primitives import ALL_LANES, LOWEST_ORDER, order, order_of_number, value_of
from numba_moe.ops.gating.scores import load_first, score_all


@cuda.jit(device=True)
def rank_eight(logits, expert, count, vector, scores, ranks):
    """Write the ranks of eight experts, the first `count` of which exist, as integers of the same order.

    With a bias their scores take the place of the logits.
    """
    if present(scores.correction_bias):
        biases = cuda.local.array(8, float32)
        load_first(scores.correction_bias, expert, count, vector, biases)
        score_all(logits, 8, scores.scoring_func, scores.peak, scores.total, logits)
        for i in range(8):
            ranks[i] = order(logits[i] + biases[i])
    else:
        for i in range(8):
            ranks[i] = order_of_number(logits[i])
        if scores.total == float32(0.0):
            for i in range(8):
                ranks[i] = 0


@cuda.jit(device=True)
def lower_missing(ranks, columns, count):
    """Let the ranks from `count` on be below all others."""
    if count < columns:
        for column in range(columns):
            if column >= count:
                ranks[column] = LOWEST_ORDER


@cuda.jit(device=True)
def best_two(ranks, columns, count, best, second):
    """Return the best two of two ranks and `count` others."""
    for column in range(columns):
        if column < count:
            second = max(second, min(best, ranks[column]))
            best = max(best, ranks[column])
    return best, second


@cuda.jit(device=True)
def rank_group(best, second, lanes, with_second):
    """Return the rank of the group that `lanes` neighbours share: of its best, or of its best two's sum.

    Each lane gives the best two of its own.
    """
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
def order_picks(expert, logit, rank, picks, lanes):
    """Return the expert and the logit of this lane's pick, when the first `picks` of a token's lanes are in order.

    Ranks decide, and where they are equal lanes do.
    """
    lane = int32(cuda.laneid)
    member = int32(lane & (lanes - 1))
    first = int32(lane - member)
    next_rank = cuda.shfl_down_sync(ALL_LANES, rank, 1)
    if cuda.ballot_sync(ALL_LANES, int32(member + 1) < picks and rank < next_rank) != 0:
        place = int32(0)
        for other in range(picks):
            other_rank = cuda.shfl_sync(ALL_LANES, rank, first + other)
            if other_rank > rank or (other_rank == rank and other < member):
                place = int32(place + 1)
        source = lane
        for other in range(picks):
            if cuda.shfl_sync(ALL_LANES, place, first + other) == member:
                source = int32(first + other)
        expert = cuda.shfl_sync(ALL_LANES, expert, source)
        logit = cuda.shfl_sync(ALL_LANES, logit, source)
    return expert, logit
