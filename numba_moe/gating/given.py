"""Weights of experts that are chosen already: recorded, or from a table that has some for each token id."""

from typing import NamedTuple

from numba_moe.gating.extras import (
    Extras,
    Tally,
    counting_flag,
    is_padded,
    load_integer,
    write_choice,
    write_nothing,
    write_rest,
)
from numba_moe.gating.memory import Source, load_one, scale_weights, softmax_from_memory
from numba_moe.gating.rows import SOFTMAX, Chosen, Rows, Weighing, weight_of
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.parameters import AnyIds, Int32, OptionalSizedArray
from numba_moe.runtime.primitives import WARP, present, warp_index


class Given(NamedTuple):
    """The experts of each token, or of each token id."""

    given_ids: AnyIds  # [num_given, top_k]
    input_ids: OptionalSizedArray  # [num_tokens]: the row of each token; absent where it is the token's index
    num_given: Int32
    input_bytes: Int32  # of an element of `input_ids`


@cuda.jit
def weigh_given(rows: Rows, given: Given, weighing: Weighing, chosen: Chosen, extras: Extras):
    """Weigh the experts of a token, by a warp, a lane every 32nd of them; the grid has a warp per token."""
    token = warp_index()
    if token >= rows.num_tokens:
        return
    tally = Tally(extras.counting, counting_flag(extras.counting.counts_enabled), extras.counting.counts, 0)
    num_slots = int32(weighing.top_k + extras.shared.num_shared)
    lane = int32(cuda.laneid)
    if is_padded(token, extras.padding):
        write_nothing(token, lane, WARP, num_slots, chosen, extras)
        return
    source = Source(rows.gating_output, int64(token) * rows.row_stride, rows.vector, extras.adjusting, True)
    peak = float32(0.0)
    total = float32(1.0)
    if weighing.scoring_func == SOFTMAX:
        peak, total = softmax_from_memory(source, rows.num_experts)

    given_row = int64(token)
    if present(given.input_ids):
        given_row = load_integer(given.input_ids, token, given.input_bytes)
    first_pick = int64(token) * num_slots
    weight_sum = float32(0.0)
    identity = float32(0.0)
    pick = lane
    while pick < weighing.top_k:
        expert = int64(-1)
        if given_row >= 0 and given_row < given.num_given:
            expert = int64(given.given_ids[given_row * weighing.top_k + pick])
        weight = float32(0.0)
        if expert >= 0 and expert < rows.num_experts:
            weight = weight_of(load_one(source, expert), weighing.scoring_func, peak, total)
        else:
            expert = int64(-1)
        weight_sum += weight
        slot = first_pick + pick
        write_choice(int32(expert), int32(slot), token, chosen.topk_ids, extras, tally)
        if expert >= extras.zero.num_real:
            identity += weight
            weight = float32(0.0)
        chosen.topk_weights[slot] = weight
        pick = int32(pick + WARP)
    scale = scale_weights(chosen.topk_weights, first_pick, weight_sum, weighing)
    write_rest(token, num_slots, scale, weight_sum, identity, weighing.renormalize, chosen, extras, tally)
