"""What every kernel of gating does for a token before and after it picks experts; `lanes`, 8 or 32, serve a token."""

from numba_moe.device.dialect import cuda, float32, int32
from numba_moe.device.instructions import divide, present
from numba_moe.device.primitives import ALL_LANES, NEGATIVE_INFINITY, WARP
from numba_moe.device.types import COUNTING, EXTENDED
from numba_moe.ops.gating.extras import (
    Tally,
    count_expert,
    counting_flag,
    is_padded,
    write_choice,
    write_nothing,
    write_shared,
)
from numba_moe.ops.gating.scores import SMALLEST_SUM, weight_of


@cuda.jit(device=True)
def sum_over(value, lanes):
    """Sum over the lanes of a token, with the same bits in every lane and at every run."""
    distance = int32(1)
    while distance < lanes:
        value += cuda.shfl_xor_sync(ALL_LANES, value, distance)
        distance = int32(distance << 1)
    return value


@cuda.jit(device=True)
def count_slots(weighing, extras, role):
    """Return how many slots a token has."""
    return int32(weighing.top_k + extras.shared.num_shared if role == EXTENDED else weighing.top_k)


@cuda.jit(device=True)
def begin_counting(counting):
    """Return the counters, for a block that has none of its own."""
    return Tally(counting, counting_flag(counting.counts_enabled), counting.counts, 0)


@cuda.jit(device=True)
def leaves_out(token, member, lanes, num_slots, chosen, extras, role):
    """Whether a token is padding, for which this writes what there is to write."""
    if role == EXTENDED and is_padded(token, extras.padding):
        write_nothing(token, member, lanes, num_slots, chosen, extras)
        return True
    return False


@cuda.jit(device=True)
def softmax_of_chosen(logit, first, total):
    """Return the largest logit, that of the lane of the first pick, and a total, which is 0 if all logits are -inf."""
    peak = cuda.shfl_sync(ALL_LANES, logit, first)
    if peak == float32(NEGATIVE_INFINITY):
        total = float32(0.0)
    return peak, total


@cuda.jit(device=True)
def write_pick(expert, logit, slot, token, scores, chosen, extras, tally, role):
    """Write and count the expert of a pick; return its score, and the weights before scaling of it and of identity."""
    score = weight_of(logit, scores.scoring_func, scores.peak, scores.total)
    weight = score
    identity = float32(0.0)
    if role == EXTENDED:
        write_choice(expert, slot, token, chosen.topk_ids, extras, tally)
        if present(extras.scaling.expert_scale) and expert >= 0:
            weight *= extras.scaling.expert_scale[expert]
        if expert >= extras.zero.num_real:
            identity = weight
            weight = float32(0.0)
    else:
        chosen.topk_ids[slot] = expert
        if role == COUNTING:
            count_expert(expert, token, tally)
    return score, weight, identity


@cuda.jit(device=True)
def scale_of(score_sum, lanes, weighing, extras, role):
    """Return the factor of a token's weights, given each lane's sum of scores."""
    scale = float32(weighing.routed_scaling_factor)
    if weighing.renormalize:
        score_sum = sum_over(score_sum, lanes)
        if role == EXTENDED and extras.scaling.epsilon > float32(0.0):
            if score_sum > float32(0.0):
                scale = divide(scale, score_sum + extras.scaling.epsilon)
        elif score_sum > float32(SMALLEST_SUM):
            scale = divide(scale, score_sum)
    return scale


@cuda.jit(device=True)
def scale_weights(topk_weights, first_slot, top_k, scale):
    """Scale the weights of a token, each by the lane of the warp that wrote it."""
    for pick in range(cuda.laneid, top_k, WARP):
        topk_weights[int32(first_slot + pick)] *= scale


@cuda.jit(device=True)
def finish_token(token, member, lanes, exists, num_slots, score_sum, identity, scale, chosen, extras, tally):
    """Write what a token has beside its picks, given each lane's sums of the scores of all and of zero experts."""
    if extras.shared.num_shared > 0:
        shared = float32(extras.shared.shared_factor)
        if extras.shared.by_sum:
            shared *= sum_over(score_sum, lanes)
        if exists:
            write_shared(token, member, lanes, num_slots, shared, chosen, extras, tally)
    if present(extras.zero.identity_weights):
        identity = sum_over(identity, lanes)
        if exists and member == 0:
            extras.zero.identity_weights[token] = identity * scale
