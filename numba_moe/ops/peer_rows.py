"""Kernels by which the GPUs of a host read each other's rows.

Each rank has a buffer that all others can read and write; it begins with signals, one for each phase and source. A rank
writes what others are to read, and then the number of the step into its signal at each of them; who waits for the
signal sees all that was written before. Steps are counted on the device, so that a captured graph can be replayed.

Nothing is overwritten too early: a rank dispatches again once all ranks have told it that they combined, which they do
behind, on their streams, what they read of the dispatch before; and the other way round.
"""

from typing import NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64, uint32
from numba_moe.device.instructions import (
    acquire_load,
    add_scaled,
    arrive,
    fence_system,
    floats_of,
    load_float,
    load_word,
    load_words,
    memory_at,
    nanoseconds,
    quotient,
    release_store,
    store_float,
    store_floats,
    store_word,
    wait_for_earlier,
)
from numba_moe.device.primitives import ALL_LANES, WARP, warp_index
from numba_moe.device.types import Float32Array, FloatArray, Int32, Int32Array, Int64, Int64Array, Words

MOST_THREADS = 512


class Ranks(NamedTuple):
    """The buffers of all ranks."""

    peers: Int64Array  # [num_ranks], addresses
    rank: Int32
    num_ranks: Int32


class Signals(NamedTuple):
    """What a rank counts of a phase, and where it tells others."""

    steps: Int32Array  # [2]: blocks that are done, and steps of this phase so far
    signals: Int64  # where in a buffer those of this phase are, [num_ranks] int32


class Patience(NamedTuple):
    """How long a rank waits for others, and what it says of one that does not come."""

    active: Int32Array  # [num_ranks], not 0 for ranks that take part
    status: Int32Array  # [4], 0 at first; written: 1 + the rank, the step waited for, the one that it had, the phase
    timeout: Int64  # ns
    phase: Int32


@cuda.jit(device=True)
def tell(ranks, told):
    """Tell all ranks, when all blocks are here, that what this rank has written for this step is there."""
    cuda.syncthreads()
    if cuda.threadIdx.x < WARP:
        lane = int32(cuda.laneid)
        before = int32(0)
        if lane == 0:
            fence_system()
            before = arrive(told.steps, 0, 1)
        before = int32(cuda.shfl_sync(ALL_LANES, before, 0))
        if before == cuda.gridDim.x - 1:
            step = int32(told.steps[1] + 1)
            cuda.syncwarp(ALL_LANES)
            fence_system()
            other = lane
            while other < ranks.num_ranks:
                release_store(ranks.peers[other] + told.signals + 4 * int64(ranks.rank), step)
                other = int32(other + WARP)
            cuda.syncwarp(ALL_LANES)
            if lane == 0:
                told.steps[0] = 0
                told.steps[1] = step


@cuda.jit(launch_bounds=WARP)
def wait_for_ranks(ranks: Ranks, signals: Signals, patience: Patience):
    """Wait until all active ranks have told of this step: one warp, a rank to a lane. A rank that was late is not."""
    wait_for_earlier()
    step = int32(signals.steps[1])
    rank = int32(cuda.laneid)
    while rank < ranks.num_ranks and patience.status[0] == 0:
        signal = ranks.peers[ranks.rank] + signals.signals + 4 * int64(rank)
        begin = nanoseconds()
        told = step
        if patience.active[rank] != 0:
            told = acquire_load(signal)
        while int32(told - step) < 0:
            if nanoseconds() - begin > patience.timeout:
                patience.status[1] = step
                patience.status[2] = told
                patience.status[3] = patience.phase
                patience.status[0] = int32(rank + 1)
                told = step
            else:
                told = acquire_load(signal)
        rank = int32(rank + WARP)


class Chosen(NamedTuple):
    """The slots of this rank's tokens, and who holds them."""

    slots: Int32Array  # [num_tokens, top_k]
    topk_weights: Float32Array  # [num_tokens, top_k]
    rank_of_slot: Int32Array  # [num_slots], -1 for a rank that takes no part
    num_tokens: Int32
    top_k: Int32
    num_slots: Int32
    max_tokens: Int32


class Published(NamedTuple):
    """Where in every buffer the ids and weights are, [num_ranks, max_tokens, top_k]."""

    first_slot: Int32Array  # [num_ranks], of each rank
    ids: Int64
    weights: Int64


@cuda.jit(launch_bounds=MOST_THREADS)
def publish(ranks: Ranks, signals: Signals, chosen: Chosen, where: Published):
    """Write the ids and weights of this rank's tokens to all ranks, -1 past the last token; a thread takes a slot."""
    wait_for_earlier()
    threads = int32(cuda.gridDim.x * cuda.blockDim.x)
    index = int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
    while index < chosen.max_tokens * chosen.top_k:
        rank = int32(-1)
        local = int32(-1)
        weight = float32(0.0)
        if index < chosen.num_tokens * chosen.top_k:
            slot = chosen.slots[index]
            weight = chosen.topk_weights[index]
            if slot >= 0 and slot < chosen.num_slots:
                rank = chosen.rank_of_slot[slot]
            if rank >= 0:
                local = int32(slot - where.first_slot[rank])
        place = int64(ranks.rank) * chosen.max_tokens * chosen.top_k + index
        for other in range(ranks.num_ranks):
            mine = int32(-1)
            if other == rank:
                mine = local
            memory_at(ranks.peers[other] + where.ids, chosen.slots)[place] = mine
            memory_at(ranks.peers[other] + where.weights, chosen.topk_weights)[place] = weight
        index = int32(index + threads)
    tell(ranks, signals)


@cuda.jit
def tell_ranks(ranks: Ranks, signals: Signals):
    """Tell all ranks that what kernels before this one wrote is there: one warp."""
    wait_for_earlier()
    tell(ranks, signals)


class Fetched(NamedTuple):
    """Rows that are in the buffers of all ranks, and where they go."""

    places: Int32Array  # [num_ranks * max_tokens, width], -1 for none
    permuted: Words  # [.., row_words]
    max_tokens: Int32
    width: Int32
    row_words: Int32
    rows: Int64  # where in a buffer the rows of its rank are, [max_tokens, row_words]
    parts: Int32  # warps that serve a row


@cuda.jit(launch_bounds=MOST_THREADS)
def fetch_rows(ranks: Ranks, fetched: Fetched):
    """Read rows where they are, once, and write each to its places here; `parts` warps take a row."""
    wait_for_earlier()
    lane = int32(cuda.laneid)
    warps = int32(cuda.gridDim.x * (cuda.blockDim.x >> 5))
    unit = warp_index()
    share = int32(quotient(int32(fetched.row_words + fetched.parts - 1), fetched.parts))
    while unit < ranks.num_ranks * fetched.max_tokens * fetched.parts:
        which = quotient(unit, fetched.parts)
        part = int32(unit - which * fetched.parts)
        token = quotient(which, ranks.num_ranks)
        source = int32(which - token * ranks.num_ranks + ranks.rank + 1)  # all ranks in turn
        if source >= ranks.num_ranks:
            source = int32(source - ranks.num_ranks)
        rows = memory_at(ranks.peers[source] + fetched.rows, fetched.permuted)
        base = int64(token) * fetched.row_words
        end = int32(min(fetched.row_words, (part + 1) * share))
        first = int32(0)
        while first < fetched.width:
            mine = int32(-1)
            if first + lane < fetched.width:
                mine = fetched.places[(int64(source) * fetched.max_tokens + token) * fetched.width + first + lane]
            wanted = uint32(cuda.ballot_sync(ALL_LANES, mine >= 0))
            start = int32(part * share)
            if wanted == 0:
                start = end
            while start < end:
                a = int32(start + lane)
                b = int32(a + WARP)
                c = int32(b + WARP)
                d = int32(c + WARP)
                last = int32(end - 1)
                word_a = load_word(rows, base + min(a, last))
                word_b = load_word(rows, base + min(b, last))
                word_c = load_word(rows, base + min(c, last))
                word_d = load_word(rows, base + min(d, last))
                todo = wanted
                while todo != 0:
                    lowest = int32(cuda.ffs(todo) - 1)
                    todo = uint32(todo & (todo - uint32(1)))
                    row = int64(cuda.shfl_sync(ALL_LANES, mine, lowest)) * fetched.row_words
                    if a < end:
                        store_word(fetched.permuted, row + a, word_a)
                    if b < end:
                        store_word(fetched.permuted, row + b, word_b)
                    if c < end:
                        store_word(fetched.permuted, row + c, word_c)
                    if d < end:
                        store_word(fetched.permuted, row + d, word_d)
                start = int32(start + 4 * WARP)
            first = int32(first + WARP)
        unit = int32(unit + warps)


class Summed(NamedTuple):
    """Rows that all ranks have for this rank's tokens, and their sums."""

    combined: FloatArray  # [num_tokens, hidden]
    hidden: Int32
    lanes: Int32  # elements that a thread loads at a time: 16 bytes, or one element
    by_slot: Int32  # a rank has a row for each slot, which is weighted here; otherwise one for each token
    rows: Int64  # where in a buffer they are, [num_ranks, max_tokens, hidden] or [num_ranks, max_tokens, top_k, hidden]


@cuda.jit(launch_bounds=MOST_THREADS)
def sum_rows(ranks: Ranks, chosen: Chosen, summed: Summed):
    """Sum the rows of a token where they are, in order of ranks, or of k with `by_slot`: a block takes a token."""
    wait_for_earlier()
    lane = int32(cuda.laneid)
    zeros = floats_of(summed.combined, (int32(0), int32(0), int32(0), int32(0)))
    token = int32(cuda.blockIdx.x)
    count = ranks.num_ranks
    if summed.by_slot:
        count = chosen.top_k
    while token < chosen.num_tokens:
        start = int32(0)
        while start < summed.hidden:
            column = int32(start + cuda.threadIdx.x * summed.lanes)
            total = float32(0.0)
            totals = zeros
            for index in range(count):
                rank = int32(-1)
                weight = float32(1.0)
                row = int64(ranks.rank) * chosen.max_tokens + token
                if summed.by_slot:
                    slot = chosen.slots[int64(token) * chosen.top_k + index]
                    if slot >= 0 and slot < chosen.num_slots:
                        rank = chosen.rank_of_slot[slot]
                    weight = chosen.topk_weights[int64(token) * chosen.top_k + index]
                    row = row * chosen.top_k + index
                else:
                    first = int32(0)
                    while first < chosen.top_k:
                        is_there = False
                        if first + lane < chosen.top_k:
                            slot = chosen.slots[int64(token) * chosen.top_k + first + lane]
                            if slot >= 0 and slot < chosen.num_slots:
                                is_there = chosen.rank_of_slot[slot] == index
                        if cuda.ballot_sync(ALL_LANES, is_there) != 0:
                            rank = int32(index)
                        first = int32(first + WARP)
                if rank >= 0 and column < summed.hidden:
                    rows = memory_at(ranks.peers[rank] + summed.rows, summed.combined)
                    if summed.lanes == 1:
                        total += weight * load_float(rows, row * summed.hidden + column)
                    else:
                        four = load_words(rows, row * summed.hidden + column)
                        totals = add_scaled(totals, weight, floats_of(summed.combined, four))
            if column < summed.hidden:
                if summed.lanes == 1:
                    store_float(summed.combined, int64(token) * summed.hidden + column, total)
                else:
                    store_floats(summed.combined, int64(token) * summed.hidden + column, totals)
            start = int32(start + cuda.blockDim.x * summed.lanes)
        token = int32(token + cuda.gridDim.x)
