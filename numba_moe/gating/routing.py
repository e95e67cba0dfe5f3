"""Gating and alignment of few tokens in one launch: a block, or a cluster, chooses experts; the first sorts the slots.

A warp chooses for a token after the other, as in `registers`. Then a thread takes a slot: it sets its lane's bit in the
mask of its warp and expert, so that the slots before it are the bits below its own, and those in earlier warps.
"""

from numba_moe.gating.extras import load_id, load_integer
from numba_moe.gating.registers import choose_for_token
from numba_moe.runtime.dialect import cuda, float32, int32, int64, uint32
from numba_moe.runtime.parameters import (
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
    RouteColumns,
)
from numba_moe.runtime.primitives import (
    LARGEST_INT32,
    WARP,
    atomic_or,
    block_sums,
    cluster_arrive,
    cluster_wait,
    count_lanes,
    divided,
    fill,
    fill_words,
    flat,
    lanes_below,
)

MOST_THREADS = 1024
MOST_EXPERTS = 512


@cuda.jit(launch_bounds=MOST_THREADS)
def route_tokens(
    gating_output: FloatArray,
    correction_bias: OptionalFloat32Array,
    expert_map: OptionalSizedArray,
    topk_weights: Float32Array,
    topk_ids: Int32Array,
    sorted_slots: Int32Array,
    expert_ids: Int32Array,
    num_padded: Int32Array,
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
    num_sorted: Int32,
    map_bytes: Int32,
    by_map: Int32,
    num_positions: Int32,
    num_words: Int32,
    num_names: Int32,
    block_size: Int32,
    reciprocal: Int64,
    shift: Int32,
    inactive_expert_id: Int32,
    columns: RouteColumns,
    role: Role,
):
    # arrays of choose_experts; expert_map [num_sorted], by which slots are sorted (by_map), or experts named;
    # sorted_slots [num_positions], num_words of 16 bytes, expert_ids [num_names], num_padded [1]; blocks of a thread
    # a slot at least, in one cluster
    masks = flat(cuda.shared.array(0, uint32))  # [warps, num_sorted]
    places = flat(cuda.shared.array(MOST_EXPERTS, int32))
    warp_sums = flat(cuda.shared.array(WARP, int32))
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
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    block = int32(cuda.blockIdx.x)
    blocks = int32(cuda.gridDim.x)
    warp = int32(thread >> 5)
    num_slots = int32(num_tokens * (top_k + num_shared))
    warps = int32((num_slots + WARP - 1) >> 5)
    fill(masks, int32(warps * num_sorted) if block == 0 else int32(0), uint32(0), thread, threads)
    index = int32(block * threads + thread)
    fill_words(sorted_slots, num_words, num_positions, num_slots, index, int32(blocks * threads))
    token = int32(blocks * warp + block)
    while token < num_tokens:
        choose_for_token(token, own, arrays, rows, rules, groups, extras, columns, role)
        token = int32(token + blocks * (threads >> 5))
    if blocks > 1:
        cluster_arrive()
        cluster_wait()
        if block > 0:
            return
    else:
        cuda.syncthreads()

    expert = int64(-1)
    if thread < num_slots:
        expert = load_id(topk_ids, thread, id_bytes)
        if by_map and expert >= 0 and expert < num_sorted:
            expert = load_integer(expert_map, expert, map_bytes)
    is_placed = expert >= 0 and expert < num_sorted
    cell = int32(warp * num_sorted + (expert if is_placed else 0))
    if is_placed:
        atomic_or(masks, cell, uint32(1 << cuda.laneid))
    cuda.syncthreads()
    rank = int32(0)
    if is_placed:
        rank = count_lanes(masks[cell] & lanes_below())
    cuda.syncthreads()

    base = int32(0)
    first = int32(0)
    while first < num_sorted:
        mine = int32(first + thread)
        count = int32(0)
        if mine < num_sorted:
            for other in range(warps):
                place = int32(other * num_sorted + mine)
                before = count
                count = int32(count + count_lanes(masks[place]))
                masks[place] = uint32(before)
        padded = int32(divided(int32(count + block_size - 1), reciprocal, shift) * block_size)
        upto, of_all = block_sums(padded, warp_sums, int32)
        if mine < num_sorted:
            places[mine] = int32(base + upto - padded)
        base = int32(base + of_all)
        first = int32(first + threads)
    cuda.syncthreads()

    if is_placed:
        position = int32(places[int32(expert)] + int32(masks[cell]) + rank)
        sorted_slots[position] = thread
        name_index = divided(position, reciprocal, shift)
        if int32(name_index * block_size) == position:
            name = expert
            if map_bytes and not by_map:
                name = load_integer(expert_map, expert, map_bytes)
                if name < 0 or name > LARGEST_INT32:
                    name = int64(-1)
            expert_ids[name_index] = int32(name)
    fill(expert_ids, num_names, inactive_expert_id, int32(divided(base, reciprocal, shift) + thread), threads)
    if thread == 0:
        num_padded[0] = base
