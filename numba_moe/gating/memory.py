"""Top-k of rows of any size: the row is read again for each pick."""

from numba_moe.gating.rows import SMALLEST_SUM, SOFTMAX, rank_of, score_of, weight_of
from numba_moe.runtime.dialect import cuda, float32, int64
from numba_moe.runtime.parameters import (
    Float32,
    Float32Array,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFloat32Array,
)
from numba_moe.runtime.primitives import (
    HIGHEST_KEY,
    LARGEST_FLOAT,
    LOWEST_KEY,
    NEGATIVE_INFINITY,
    WARP,
    choice_key,
    chosen_index,
    exp,
    load_float,
    present,
    store_float,
    warp_index,
    warp_max,
    warp_sum,
)


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
def score_group(gating_output, row, first, size, correction_bias, scoring_func, group_picks, peak, total):
    """Return the score of the group of experts [first, first + size): its best rank, or the sum of so many."""
    group_value = float32(0.0)
    last = int64(HIGHEST_KEY)
    for _ in range(min(size, group_picks)):
        key = int64(LOWEST_KEY)
        for expert in range(first + cuda.laneid, first + size, WARP):
            candidate = choice_key(
                rank_of(load_float(gating_output, row + expert), expert, correction_bias, scoring_func, peak, total),
                expert,
            )
            if candidate < last:
                key = max(key, candidate)
        last = warp_max(key)
        best = chosen_index(last)
        if group_picks == 1 or present(correction_bias):
            value = rank_of(load_float(gating_output, row + best), best, correction_bias, scoring_func, peak, total)
        else:
            value = score_of(load_float(gating_output, row + best), scoring_func, peak, total)
        group_value += value
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
    routed_scaling_factor: Float32,
    num_expert_group: Int32,
    topk_group: Int32,
    group_picks: Int32,
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
                gating_output, row, first, group_size, correction_bias, scoring_func, group_picks, peak, total
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
                    rank_of(
                        load_float(gating_output, row + expert), expert, correction_bias, scoring_func, peak, total
                    ),
                    expert,
                )
                if candidate < last:
                    key = max(key, candidate)
        last = warp_max(key)
        chosen = chosen_index(last)
        weight = weight_of(load_float(gating_output, row + chosen), scoring_func, peak, total)
        weight_sum += weight
        if lane == pick % WARP:
            topk_ids[first_pick + pick] = chosen
            store_float(topk_weights, first_pick + pick, weight)

    scale = float32(routed_scaling_factor)
    if renormalize and weight_sum > float32(SMALLEST_SUM):
        scale = scale / weight_sum
    for pick in range(lane, top_k, WARP):  # the lane that wrote this pick
        topk_weights[first_pick + pick] *= scale
