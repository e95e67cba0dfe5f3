"""Top-k of few experts, or of few picks: 1 to 32 lanes serve a token.

Lanes hold a token's row in their registers. Lane i takes the i-th eight experts of each stretch of 8 * lanes experts,
so that the lanes read neighbouring 16 bytes. For a pick, each lane finds its own best expert, and neighbours exchange
these. The lane of the best expert strikes it out, and lane i of a token keeps pick i. A pick costs a pass over all
columns of a lane, so the other kernels are faster for many picks of many experts.

If each lane has at most one expert, nothing is struck out: the slot of an expert is the number of experts before it.

Experts rank by their logits, or by score + bias where there is a correction bias: by value, so that no two are
confused, and by the lower id where they are equal.
"""

from typing import NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64, uint32
from numba_moe.device.instructions import flat, larger, let_next_start, present, wait_for_earlier, warp_highest
from numba_moe.device.primitives import (
    ALL_LANES,
    INFINITY,
    LARGEST_INT32,
    MOST_BLOCKS_BESIDE,
    NEGATIVE_INFINITY,
    WARP,
    exp,
    fill,
    order_of_number,
    value_of,
    warp_index,
)
from numba_moe.device.types import EXTENDED, PLAIN, Int32, LaneColumns, OptionalFloat32Array, Role
from numba_moe.ops.gating.eight_lanes import count_block
from numba_moe.ops.gating.extras import Extras, Source, Tally, adjust, counting_flag, load_logits, load_one
from numba_moe.ops.gating.scores import SOFTMAX, Chosen, Rows, Scores, Weighting, load_first, lower_broken, score_all
from numba_moe.ops.gating.token import (
    count_slots,
    finish_token,
    leaves_out,
    scale_of,
    softmax_of_chosen,
    sum_over,
    write_pick,
)
from numba_moe.ops.gating.warp_per_token import load_row

# The least number of lanes that find an expert's slot by counting.
LEAST_TO_COUNT = 8
# Large blocks pay where few of them serve all tokens: a small grid lets the next kernel start (see runtime.compile).
MOST_WARPS_IN_BLOCK = 16


class LaneChoice(NamedTuple):
    """How experts are chosen, and by how many lanes."""

    correction_bias: OptionalFloat32Array  # [num_experts]
    whole_softmax: Int32  # whether ranks or weights need the sum over the whole row
    lane_bits: Int32  # 1 << lane_bits lanes serve a token: one for each pick at least
    num_in_block: Int32  # num_counts where a block counts in shared memory first, else 0


@cuda.jit(device=True)
def load_columns(source, first, count, lanes, columns, logits):
    """Read the adjusted logits of a lane's columns; the first column is `count` experts before the row's end."""
    if columns < 8:
        load_row(source.gating_output, source.row + first, count, columns == 4 and source.vector, columns, logits)
        if source.extended:
            adjust(logits, columns, first, count, source.adjusting)
    else:
        eight = cuda.local.array(8, float32)
        for part in range(columns // 8):
            passed = int32(8 * part * lanes)
            load_logits(source, first + passed, int32(count - passed), eight)
            for i in range(8):
                logits[8 * part + i] = eight[i]


@cuda.jit(device=True)
def load_biases(correction_bias, first, count, lanes, aligned, columns, biases):
    """Read the correction biases of a lane's columns."""
    if columns < 8:
        load_row(correction_bias, first, count, columns == 4 and aligned, columns, biases)
    else:
        eight = cuda.local.array(8, float32)
        for part in range(columns // 8):
            passed = int32(8 * part * lanes)
            load_first(correction_bias, first + passed, int32(count - passed), aligned, eight)
            for i in range(8):
                biases[8 * part + i] = eight[i]


@cuda.jit(device=True)
def columns_with_experts(count, lanes, columns):
    """Return the bits of a lane's columns that have experts."""
    width = min(columns, 8)
    free = uint32(0)
    for part in range(columns // width):
        there = max(int32(0), min(int32(count - width * part * lanes), int32(width)))
        free = uint32(free | (((1 << there) - 1) << (width * part)))
    return free


@cuda.jit(device=True)
def lanes_with(predicate, lanes):
    """Return the bits of a token's lanes, the first one lowest, for which a predicate holds."""
    votes = uint32(cuda.ballot_sync(ALL_LANES, predicate))
    first = uint32(cuda.laneid & ~(lanes - 1))
    return uint32(votes >> first) & uint32((1 << lanes) - 1)


@cuda.jit(device=True)
def softmax_of_lanes(logits, columns, lanes):
    """Return the largest logit of a token, and the sum of exponentials, 0 if the former is infinite."""
    peak = logits[0]
    for column in range(1, columns):
        peak = larger(peak, logits[column])
    if lanes == WARP:
        peak = value_of(warp_highest(order_of_number(peak)))
    else:
        distance = int32(1)
        while distance < lanes:
            peak = larger(peak, cuda.shfl_xor_sync(ALL_LANES, peak, distance))
            distance = int32(distance << 1)
    total = float32(0.0)
    if float32(NEGATIVE_INFINITY) < peak < float32(INFINITY):
        for column in range(columns):
            total += exp(logits[column] - peak)
    return peak, sum_over(total, lanes)


@cuda.jit(device=True)
def best_column(ranks, free, columns):
    """Return a lane's highest rank and the first column that has it; -1 if no column is free.

    Columns that are not free have rank -inf.
    """
    best = float32(NEGATIVE_INFINITY)
    found = int32(cuda.ffs(free) - 1)
    for column in range(columns):
        if ranks[column] > best:
            best = ranks[column]
            found = int32(column)
    return best, found


@cuda.jit(device=True)
def best_of_lanes(rank, expert, lanes):
    """Return the highest rank of a token's lanes, and its expert, the lowest of those that have it."""
    if lanes == WARP:  # two steps that a warp has as one instruction each, for the ten of lanes that exchange
        own = order_of_number(rank)
        highest = warp_highest(own)
        lowest = warp_highest(int32(-expert if own == highest else -LARGEST_INT32))
        return value_of(highest), int32(-lowest)
    distance = int32(1)
    while distance < lanes:
        other = cuda.shfl_xor_sync(ALL_LANES, rank, distance)
        other_expert = cuda.shfl_xor_sync(ALL_LANES, expert, distance)
        if other > rank or (other == rank and other_expert < expert):
            rank = other
            expert = other_expert
        distance = int32(distance << 1)
    return rank, expert


@cuda.jit(device=True)
def choose_by_turns(ranks, first, count, lanes, top_k, columns):
    """Return the expert and the rank of this lane's pick."""
    member = int32(cuda.laneid & (lanes - 1))
    free = columns_with_experts(count, lanes, columns)
    chosen = int32(0)
    chosen_rank = float32(NEGATIVE_INFINITY)
    pick = int32(0)
    struck = int32(-1)
    while pick < top_k:
        if struck >= 0:
            free = uint32(free & ~(1 << struck))
        if pick > 0:
            for column in range(columns):  # each is written: one that is found at run time would need memory
                ranks[column] = float32(NEGATIVE_INFINITY) if column == struck else ranks[column]
        rank, own = best_column(ranks, free, columns)
        expert = int32(LARGEST_INT32)
        if own >= 0:
            expert = int32(first + (own & 7) + (own >> 3) * 8 * lanes)
        best, winner = best_of_lanes(rank, expert, lanes)
        if member == pick:
            chosen = winner
            chosen_rank = best
        struck = own if expert == winner else int32(-1)
        pick = int32(pick + 1)
    return chosen, chosen_rank


@cuda.jit(device=True)
def place_of(rank, lanes):
    """Return how many lanes of a token have an expert that comes before this one's; lanes without one have -inf."""
    member = int32(cuda.laneid & (lanes - 1))
    place = int32(0)
    base = int32(0)
    while base < lanes:
        for i in range(LEAST_TO_COUNT):
            other = int32(member ^ (base + i))
            other_rank = cuda.shfl_xor_sync(ALL_LANES, rank, base + i)
            if other_rank > rank or (other_rank == rank and other < member):
                place = int32(place + 1)
        base = int32(base + LEAST_TO_COUNT)
    return place


@cuda.jit(launch_bounds=WARP * MOST_WARPS_IN_BLOCK)
def choose_by_lanes(
    rows: Rows,
    choice: LaneChoice,
    weighing: Weighting,
    chosen: Chosen,
    extras: Extras,
    columns: LaneColumns,
    role: Role,
):
    """Choose for a token, by lanes that hold `columns` experts each; the grid has those lanes for each token.

    With one column there are 8 lanes at least. Dynamic shared memory: an int32 for each of `num_in_block` counters.
    """
    wait_for_earlier()
    if int32(cuda.gridDim.x) <= MOST_BLOCKS_BESIDE:
        let_next_start()
    in_block = flat(cuda.shared.array(0, int32))  # [num_in_block]
    num_in_block, bias = choice.num_in_block, choice.correction_bias
    scoring_func, top_k = weighing.scoring_func, weighing.top_k
    lanes = int32(1 << choice.lane_bits)
    lane = int32(cuda.laneid)
    member = int32(lane & (lanes - 1))
    token = int32((warp_index() << (5 - choice.lane_bits)) + (lane >> choice.lane_bits))
    exists = token < rows.num_tokens
    token = min(token, int32(rows.num_tokens - 1))  # all lanes reach the warp operations
    first = int32(member * min(columns, 8))
    count = int32(rows.num_experts - first)
    row = int64(token) * rows.row_stride
    source = Source(rows.gating_output, row, rows.vector, extras.adjusting, role == EXTENDED)
    ranks = cuda.local.array(columns, float32)
    biases = cuda.local.array(columns, float32)
    load_columns(source, first, count, lanes, columns, ranks)
    if present(bias):
        load_biases(bias, first, count, lanes, rows.vector, columns, biases)
    # behind the loads of logits, which are to come first
    tally = Tally(extras.counting, counting_flag(extras.counting.counts_enabled), in_block, num_in_block)
    if role != PLAIN and num_in_block > 0:
        fill(in_block, num_in_block, 0, int32(cuda.threadIdx.x), int32(cuda.blockDim.x))
        cuda.syncthreads()

    peak = float32(0.0)
    total = float32(1.0)
    broken = lower_broken(ranks, columns, scoring_func)
    if scoring_func == SOFTMAX:
        broken = lanes_with(broken, lanes) != 0
        if choice.whole_softmax:
            peak, total = softmax_of_lanes(ranks, columns, lanes)
        if broken:
            total = float32(0.0)
            for column in range(columns):
                ranks[column] = float32(NEGATIVE_INFINITY)
    if present(bias):
        score_all(ranks, columns, scoring_func, peak, total, ranks)
        for column in range(columns):
            there = int32((column & 7) + (column >> 3) * 8 * lanes) < count
            rank = larger(ranks[column] + biases[column], float32(NEGATIVE_INFINITY))
            ranks[column] = rank if there else float32(NEGATIVE_INFINITY)

    if columns == 1:
        place = place_of(ranks[0], lanes)
        expert = member
        logit = ranks[0]
        leader = int32(cuda.ffs(lanes_with(place == 0, lanes)) - 1)
    else:
        place = member
        expert, logit = choose_by_turns(ranks, first, count, lanes, top_k, columns)
        leader = int32(0)
    is_mine = exists and place < top_k
    if present(bias) and is_mine:
        logit = load_one(source, expert)
    if scoring_func == SOFTMAX and not choice.whole_softmax:
        peak, total = softmax_of_chosen(logit, int32(lane - member + leader), total)
    num_slots = count_slots(weighing, extras, role)
    if exists and leaves_out(token, member, lanes, num_slots, chosen, extras, role):
        exists = False
        is_mine = False
    score = float32(0.0)
    weight = float32(0.0)
    identity = float32(0.0)
    slot = int32(token * num_slots + place)
    if is_mine:
        final = Scores(bias, scoring_func, peak, total)
        score, weight, identity = write_pick(expert, logit, slot, token, final, chosen, extras, tally, role)
    # Lanes of picks are the first ones, or any where experts are counted, and then a single pick is its own sum.
    anywhere = columns == 1 and (top_k > 1 or role == EXTENDED)
    scale = scale_of(score, lanes if anywhere else min(top_k, lanes), weighing, extras, role)
    if is_mine:
        chosen.topk_weights[slot] = weight * scale
    if role == EXTENDED:
        finish_token(
            *(token, member, lanes, exists, num_slots, score, identity, scale),
            *(chosen, extras, tally),
        )
    if role != PLAIN and num_in_block > 0:
        count_block(tally)
