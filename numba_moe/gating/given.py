"""Weights of experts that are chosen already: recorded, or from a table that has some for each token id."""

from numba_moe.gating.extras import counting_flag, is_padded, load_integer, write_choice, write_nothing, write_rest
from numba_moe.gating.memory import load_logit, scale_weights, softmax_from_memory
from numba_moe.gating.rows import SOFTMAX, weight_of
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.parameters import (
    AnyIds,
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
)
from numba_moe.runtime.primitives import WARP, present, warp_index


@cuda.jit
def weigh_given(
    gating_output: FloatArray,
    given_ids: AnyIds,
    input_ids: OptionalSizedArray,
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
    num_given: Int32,
    input_bytes: Int32,
    top_k: Int32,
    scoring_func: Int32,
    renormalize: Int32,
    routed_scaling_factor: Float32,
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
):
    # gating_output [num_tokens, num_experts] with rows row_stride apart, given_ids [num_given, top_k], input_ids
    # [num_tokens], topk_weights and topk_ids [num_tokens, top_k]; a warp per token
    token = warp_index()
    if token >= num_tokens:
        return
    ids = (id_bytes, num_real, zero_expert_id)
    dispatch = (physical_map, num_valid, step, num_rows, width, algorithm, seed)
    counting = (counts, num_counts, count_rows, count_bytes, counting_flag(counts_enabled), counts, 0)
    num_slots = int32(top_k + num_shared)
    lane = int32(cuda.laneid)
    if is_padded(token, num_token_non_padded, scalar_bytes, is_padding):
        write_nothing(token, lane, WARP, num_slots, topk_weights, topk_ids, ids, identity_weights)
        return
    row = int64(token) * row_stride
    adjusting = (True, logit_bias, softcap)
    peak = float32(0.0)
    total = float32(1.0)
    if scoring_func == SOFTMAX:
        peak, total = softmax_from_memory(gating_output, row, num_experts, aligned, adjusting)

    given = int64(token)
    if present(input_ids):
        given = load_integer(input_ids, token, input_bytes)
    first_pick = int64(token) * num_slots
    weight_sum = float32(0.0)
    identity = float32(0.0)
    pick = lane
    while pick < top_k:
        expert = int64(-1)
        if given >= 0 and given < num_given:
            expert = int64(given_ids[given * top_k + pick])
        weight = float32(0.0)
        if expert >= 0 and expert < num_experts:
            weight = weight_of(load_logit(gating_output, row, expert, adjusting), scoring_func, peak, total)
        else:
            expert = int64(-1)
        weight_sum += weight
        slot = first_pick + pick
        write_choice(int32(expert), int32(slot), token, topk_ids, ids, dispatch, counting)
        if expert >= num_real:
            identity += weight
            weight = float32(0.0)
        topk_weights[slot] = weight
        pick = int32(pick + WARP)
    scale = scale_weights(topk_weights, first_pick, top_k, weight_sum, renormalize, routed_scaling_factor)
    rest = (num_slots, num_shared, shared_factor, topk_weights, topk_ids, identity_weights)
    write_rest(token, scale, weight_sum, identity, renormalize, rest, ids, dispatch, counting)
