"""What gating can do besides choosing and weighing: counts, other logits, other ids, padding.

The kernels of gating have calls that count where they are compiled for that role, and the others where they are
compiled for every one; what a call has no use for is an absent array or a 0.
"""

from numba_moe.placement.dispatch import physical_of
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.primitives import (
    LARGEST_FLOAT,
    WARP,
    add_to_global,
    as_int16,
    as_int64,
    atomic_add,
    divide_rounded,
    larger,
    present,
    tanh,
    warp_sum,
)

LARGEST_INT16 = 2**15 - 1


@cuda.jit(device=True)
def adjusted(logit, expert, logit_bias, softcap):
    """Return a logit, if finite kept within the cap, and with its expert's bias."""
    if softcap > float32(0.0) and larger(logit, -logit) <= float32(LARGEST_FLOAT):
        logit = float32(softcap) * tanh(divide_rounded(logit, softcap))
    if present(logit_bias):
        logit += logit_bias[expert]
    return logit


@cuda.jit(device=True)
def adjust(logits, columns, first, count, logit_bias, softcap):
    """Adjust the logits of experts first, first + 1, ..., of which `count` are there."""
    if softcap > float32(0.0) or present(logit_bias):
        for column in range(columns):
            if column < count:
                logits[column] = adjusted(logits[column], first + column, logit_bias, softcap)


@cuda.jit(device=True)
def load_integer(array, index, size):
    """Read an int32, or an int64 if that is the size in bytes."""
    if size == 8:
        return as_int64(array)[index]
    return int64(array[index])


@cuda.jit(device=True)
def is_padded(token, num_token_non_padded, scalar_bytes, is_padding):
    """Whether a token is padding, by the number of those that are not, or by its flag."""
    if present(num_token_non_padded) and token >= load_integer(num_token_non_padded, 0, scalar_bytes):
        return True
    return present(is_padding) and is_padding[token] != 0


@cuda.jit(device=True)
def store_id(topk_ids, slot, expert, id_bytes):
    if id_bytes == 8:
        as_int64(topk_ids)[slot] = int64(expert)
    elif id_bytes == 2:
        as_int16(topk_ids)[slot] = expert
    else:
        topk_ids[slot] = expert


@cuda.jit(device=True)
def load_id(topk_ids, slot, id_bytes):
    if id_bytes == 2:
        return int64(as_int16(topk_ids)[slot])
    return load_integer(topk_ids, slot, id_bytes)


@cuda.jit(device=True)
def counting_flag(counts_enabled):
    """Return 0 while counting is switched off on the device; read early, it is there when it is used."""
    if present(counts_enabled):
        return counts_enabled[0]
    return int32(1)


@cuda.jit(device=True)
def add_to_count(counts, expert, count, count_bytes):
    if count_bytes == 8:
        add_to_global(as_int64(counts), expert, int64(count))
    else:
        add_to_global(counts, expert, int32(count))


@cuda.jit(device=True)
def count_expert(expert, token, counting):
    """Count an expert if it has a counter: one of the block's own, or in the row of the token."""
    counts, num_counts, count_rows, count_bytes, flag, in_block, num_in_block = counting
    if expert >= 0 and expert < num_counts and flag != 0:
        if num_in_block > 0:
            atomic_add(in_block, expert, 1)
        else:
            row = int32(token & (count_rows - 1))
            add_to_count(counts, int32(row * num_counts + expert), 1, count_bytes)


@cuda.jit(device=True)
def write_expert(expert, slot, token, topk_ids, ids, dispatch, counting):
    """Write an expert, or the place that its slot goes to, and count what is written.

    dispatch has the tables and numbers of `physical_of`; the table is absent where experts keep their ids.
    """
    id_bytes, _, _ = ids
    physical_map = dispatch[0]
    if present(physical_map):
        expert = physical_of(expert, slot, token, *dispatch)
        if id_bytes == 2 and expert > LARGEST_INT16:
            expert = int32(-1)
    store_id(topk_ids, slot, expert, id_bytes)
    count_expert(expert, token, counting)


@cuda.jit(device=True)
def write_choice(expert, slot, token, topk_ids, ids, dispatch, counting):
    """Write the expert of a pick, which may be a zero expert: it has no place, and is not counted."""
    id_bytes, num_real, zero_expert_id = ids
    if expert >= num_real:
        store_id(topk_ids, slot, zero_expert_id, id_bytes)
    else:
        write_expert(expert, slot, token, topk_ids, ids, dispatch, counting)


@cuda.jit(device=True)
def write_shared(token, lane, lanes, width, num_shared, weight, topk_weights, topk_ids, ids, dispatch, counting):
    """Write the shared experts of a token, the last of its slots, whose lanes these are."""
    _, num_real, _ = ids
    shared = int32(lane)
    while shared < num_shared:
        slot = int64(token) * width + (width - num_shared + shared)
        write_expert(int32(num_real + shared), int32(slot), token, topk_ids, ids, dispatch, counting)
        topk_weights[slot] = weight
        shared = int32(shared + lanes)


@cuda.jit(device=True)
def write_rest(token, scale, weight_sum, identity, renormalize, rest, ids, dispatch, counting):
    """Write what a token that a warp serves has beside its picks, given the lanes' sums of weights."""
    width, num_shared, shared_factor, topk_weights, topk_ids, identity_weights = rest
    lane = int32(cuda.laneid)
    if num_shared > 0:
        shared = float32(shared_factor)
        if not renormalize:
            shared *= warp_sum(weight_sum)
        where = (token, lane, WARP, width, num_shared, shared, topk_weights, topk_ids)
        write_shared(*where, ids, dispatch, counting)
    if present(identity_weights):
        identity = warp_sum(identity)
        if lane == 0:
            identity_weights[token] = identity * scale


@cuda.jit(device=True)
def write_nothing(token, lane, lanes, width, topk_weights, topk_ids, ids, identity_weights):
    """Write what a token of padding has: no experts, and weights of 0."""
    id_bytes, _, _ = ids
    pick = int32(lane)
    while pick < width:
        slot = int64(token) * width + pick
        store_id(topk_ids, slot, int32(-1), id_bytes)
        topk_weights[slot] = float32(0.0)
        pick = int32(pick + lanes)
    if lane == 0 and present(identity_weights):
        identity_weights[token] = float32(0.0)
