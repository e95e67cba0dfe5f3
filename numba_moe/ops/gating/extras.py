"""The options of gating besides choosing and weighing: counts, adjusted logits, mapped ids, padding.

The kernels of gating have calls that count where they are compiled for that role, and the others where they are
compiled for every one; what a call has no use for is an absent array or a 0.
"""

from typing import Any, NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import (
    add_to_global,
    as_int16,
    as_int64,
    atomic_add,
    divide_rounded,
    larger,
    load_float,
    present,
    tanh,
)
from numba_moe.device.primitives import LARGEST_FLOAT, load_integer
from numba_moe.device.types import (
    Float32,
    Int32,
    OptionalFlags,
    OptionalFloat32Array,
    OptionalInt32Array,
    OptionalSizedArray,
)
from numba_moe.ops.dispatch import Dispatch, physical_of
from numba_moe.ops.gating.scores import load_first

LARGEST_INT16 = 2**15 - 1


class Adjusting(NamedTuple):
    """How logits change before they are scored."""

    logit_bias: OptionalFloat32Array  # [num_experts]
    softcap: Float32  # 0 for none


class Padding(NamedTuple):
    """Which tokens are padding."""

    num_token_non_padded: OptionalSizedArray  # [1]
    scalar_bytes: Int32  # of an element of it
    is_padding: OptionalFlags  # [num_tokens]


class ZeroExperts(NamedTuple):
    """The experts from `num_real` on, which return a token unchanged."""

    num_real: Int32
    zero_expert_id: Int32  # written in their place
    identity_weights: OptionalFloat32Array  # [num_tokens], written: the sum of the weights of a token's zero experts


class SharedExperts(NamedTuple):
    """The experts of every token, in slots after those that are chosen; their ids are num_real, num_real + 1, ..."""

    num_shared: Int32
    shared_factor: Float32  # their weight, or what the sum of a token's scores is multiplied by
    by_sum: Int32


class Scaling(NamedTuple):
    """How weights are scaled beside the factor of all."""

    expert_scale: OptionalFloat32Array  # [num_experts]
    epsilon: Float32  # added to the sum by which weights are divided


class Counting(NamedTuple):
    """Counters of experts; token t adds to row t % count_rows."""

    counts: OptionalSizedArray  # [count_rows, num_counts], added to
    counts_enabled: OptionalInt32Array  # [1]
    num_counts: Int32
    count_rows: Int32  # a power of two
    count_bytes: Int32  # of a counter


class Extras(NamedTuple):
    """What a call asks for besides choosing and weighing."""

    adjusting: Adjusting
    padding: Padding
    zero: ZeroExperts
    shared: SharedExperts
    scaling: Scaling
    dispatch: Dispatch
    counting: Counting
    id_bytes: Int32  # of an element of `topk_ids`


class Tally(NamedTuple):
    """The counters, and those that a block has of its own."""

    counting: Counting
    flag: Any  # 0 while nothing is counted
    in_block: Any  # [num_in_block]
    num_in_block: Any  # num_counts, or 0 for none


class Source(NamedTuple):
    """A token's row, and how its logits are read."""

    gating_output: Any  # [num_tokens, num_experts]
    row: Any  # where it begins
    vector: Any
    adjusting: Any
    extended: Any  # whether logits are adjusted


@cuda.jit(device=True)
def adjusted(logit, expert, adjusting):
    """Return a logit, if finite kept within the cap, and with its expert's bias."""
    softcap = adjusting.softcap
    if softcap > float32(0.0) and larger(logit, -logit) <= float32(LARGEST_FLOAT):
        logit = float32(softcap) * tanh(divide_rounded(logit, softcap))
    if present(adjusting.logit_bias):
        logit += adjusting.logit_bias[expert]
    return logit


@cuda.jit(device=True)
def adjust(logits, columns, first, count, adjusting):
    """Adjust the logits of experts first, first + 1, ..., `count` in all."""
    if adjusting.softcap > float32(0.0) or present(adjusting.logit_bias):
        for column in range(columns):
            if column < count:
                logits[column] = adjusted(logits[column], first + column, adjusting)


@cuda.jit(device=True)
def load_logits(source, expert, count, logits):
    """Read the logits of the first `count` of eight experts, adjusted; -inf for the others."""
    load_first(source.gating_output, source.row + expert, count, source.vector, logits)
    if source.extended:
        adjust(logits, 8, expert, count, source.adjusting)


@cuda.jit(device=True)
def load_one(source, expert):
    """Read the logit of an expert, adjusted."""
    logit = load_float(source.gating_output, source.row + expert)
    if source.extended:
        logit = adjusted(logit, expert, source.adjusting)
    return logit


@cuda.jit(device=True)
def is_padded(token, padding):
    """Whether a token is padding, by the number of those that are not, or by its flag."""
    scalar = padding.num_token_non_padded
    if present(scalar) and token >= load_integer(scalar, 0, padding.scalar_bytes):
        return True
    return present(padding.is_padding) and padding.is_padding[token] != 0


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
def add_to_count(counting, index, count):
    if counting.count_bytes == 8:
        add_to_global(as_int64(counting.counts), index, int64(count))
    else:
        add_to_global(counting.counts, index, int32(count))


@cuda.jit(device=True)
def count_expert(expert, token, tally):
    """Count an expert if it has a counter: one of the block's own, or in the row of the token."""
    if expert >= 0 and expert < tally.counting.num_counts and tally.flag != 0:
        if tally.num_in_block > 0:
            atomic_add(tally.in_block, expert, 1)
        else:
            row = int32(token & (tally.counting.count_rows - 1))
            add_to_count(tally.counting, int32(row * tally.counting.num_counts + expert), 1)


@cuda.jit(device=True)
def write_expert(expert, slot, token, topk_ids, extras, tally):
    """Write an expert, or the place that its slot goes to, and count what is written."""
    if present(extras.dispatch.physical_map):
        expert = physical_of(expert, slot, token, extras.dispatch)
        if extras.id_bytes == 2 and expert > LARGEST_INT16:
            expert = int32(-1)
    store_id(topk_ids, slot, expert, extras.id_bytes)
    count_expert(expert, token, tally)


@cuda.jit(device=True)
def write_choice(expert, slot, token, topk_ids, extras, tally):
    """Write the expert of a pick, which may be a zero expert: it has no place, and is not counted."""
    if expert >= extras.zero.num_real:
        store_id(topk_ids, slot, extras.zero.zero_expert_id, extras.id_bytes)
    else:
        write_expert(expert, slot, token, topk_ids, extras, tally)


@cuda.jit(device=True)
def write_shared(token, lane, lanes, num_slots, weight, chosen, extras, tally):
    """Write the shared experts of a token, the last of its slots, whose lanes these are."""
    num_shared = extras.shared.num_shared
    shared = int32(lane)
    while shared < num_shared:
        slot = int64(token) * num_slots + (num_slots - num_shared + shared)
        write_expert(int32(extras.zero.num_real + shared), int32(slot), token, chosen.topk_ids, extras, tally)
        chosen.topk_weights[slot] = weight
        shared = int32(shared + lanes)


@cuda.jit(device=True)
def write_nothing(token, lane, lanes, num_slots, chosen, extras):
    """Write what a token of padding has: no experts, and weights of 0."""
    pick = int32(lane)
    while pick < num_slots:
        slot = int64(token) * num_slots + pick
        store_id(chosen.topk_ids, slot, int32(-1), extras.id_bytes)
        chosen.topk_weights[slot] = float32(0.0)
        pick = int32(pick + lanes)
    if lane == 0 and present(extras.zero.identity_weights):
        extras.zero.identity_weights[token] = float32(0.0)
