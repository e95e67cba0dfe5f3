"""Weights of experts that are chosen already: recorded, or from a table that has some for each token id."""

from typing import NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import present, wait_for_earlier
from numba_moe.device.primitives import NEGATIVE_INFINITY, WARP, load_integer, warp_index
from numba_moe.device.types import EXTENDED, AnyIds, Int32, OptionalSizedArray
from numba_moe.ops.gating.extras import Extras, Source, load_one
from numba_moe.ops.gating.long_rows import softmax_from_memory
from numba_moe.ops.gating.scores import SOFTMAX, Chosen, Rows, Scores, Weighting
from numba_moe.ops.gating.token import (
    begin_counting,
    count_slots,
    finish_token,
    leaves_out,
    scale_of,
    scale_weights,
    write_pick,
)


class Given(NamedTuple):
    """The experts of each token, or of each token id."""

    given_ids: AnyIds  # [num_given, top_k]
    input_ids: OptionalSizedArray  # [num_tokens]: the row of each token; absent where it is the token's index
    num_given: Int32
    input_bytes: Int32  # of an element of `input_ids`


@cuda.jit
def weigh_given(rows: Rows, given: Given, weighing: Weighting, chosen: Chosen, extras: Extras):
    """Weigh the experts of a token, by a warp, a lane every 32nd of them; the grid has a warp per token."""
    wait_for_earlier()
    token = warp_index()
    if token >= rows.num_tokens:
        return
    tally = begin_counting(extras.counting)
    num_slots = count_slots(weighing, extras, EXTENDED)
    lane = int32(cuda.laneid)
    if leaves_out(token, lane, WARP, num_slots, chosen, extras, EXTENDED):
        return
    source = Source(rows.gating_output, int64(token) * rows.row_stride, rows.vector, extras.adjusting, True)
    peak = float32(0.0)
    total = float32(1.0)
    if weighing.scoring_func == SOFTMAX:
        peak, total = softmax_from_memory(source, rows.num_experts)

    given_row = int64(token)
    if present(given.input_ids):
        given_row = load_integer(given.input_ids, token, given.input_bytes)
    scores = Scores(None, weighing.scoring_func, peak, total)
    first_slot = int32(token * num_slots)
    score_sum = float32(0.0)
    identity = float32(0.0)
    pick = lane
    while pick < weighing.top_k:
        expert = int64(-1)
        if given_row >= 0 and given_row < given.num_given:
            expert = int64(given.given_ids[given_row * weighing.top_k + pick])
        logit = float32(NEGATIVE_INFINITY)
        if expert >= 0 and expert < rows.num_experts:
            logit = load_one(source, expert)
        else:
            expert = int64(-1)
        slot = int32(first_slot + pick)
        score, weight, of_zero = write_pick(int32(expert), logit, slot, token, scores, chosen, extras, tally, EXTENDED)
        score_sum += score
        identity += of_zero
        chosen.topk_weights[slot] = weight
        pick = int32(pick + WARP)
    scale = scale_of(score_sum, WARP, weighing, extras, EXTENDED)
    scale_weights(chosen.topk_weights, first_slot, weighing.top_k, scale)
    finish_token(
        *(token, lane, WARP, True, num_slots, score_sum, identity, scale),
        *(chosen, extras, tally),
    )
