"""The kernels that move rows, and how they are launched.

Permutation reads each token's row once and writes it to each of its places. Combination reads the row at each place and
writes the sum once. A block serves a token, or a part of a token if tokens are few, and a thread moves 16 bytes at a
time. Rows whose width, stride or address does not allow this are moved in smaller words and summed by elements.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device import simulator
from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import (
    add_scaled,
    clear_word,
    floats_of,
    let_next_start,
    load_float,
    load_word,
    load_words,
    present,
    quotient,
    store_float,
    store_floats,
    store_word,
    wait_for_earlier,
)
from numba_moe.device.primitives import ALL_LANES, MOST_BLOCKS_BESIDE, WARP, divided, reciprocal_of
from numba_moe.device.types import (
    BATCHES,
    LIKE,
    Batch,
    Float32,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFloat32Array,
    OptionalFloatArray,
    OptionalIds,
    OptionalInt32Array,
    OptionalInt64Array,
    Words,
)
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.plans import Layout

MOST_THREADS = 256
# (Threads of a block, blocks that must fit on a multiprocessor). With the latter the compiler does not delay loads to
# save registers. H200, with and without: one token's row goes to eight places in 3.2 and 3.4 us (with the sort), and
# its eight rows are summed in 1.6 and 1.9 us.
GATHER_BOUNDS = (MOST_THREADS, 8)
COMBINE_BOUNDS = (MOST_THREADS, 6)
ADD_BOUNDS = (MOST_THREADS, 4)
# Threads of a block if sums have few 16-byte words; each word has its own thread.
MOST_WORDS = 4 * BATCHES[-1]
ADD_THREADS = 128
WORDS_OF_FEW = 2**14
# This many blocks use all of a GPU. With fewer tokens several blocks serve a token.
ENOUGH_BLOCKS = 1024
# The least number of parts of rows for a block if more blocks share a token. H200, 512 tokens with eight rows of 14
# KiB: 17 us with four blocks for a token, 19 us with two. Two rows of 8 KiB take up to 8 % more time with two blocks
# than with one.
ENOUGH_PARTS = 8
# The rows of few tokens are spread over at least this many blocks, with fewer threads: one token's eight rows take 5 %
# less time on an H200.
FEW_BLOCKS = 32
WORDS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
# Number of rows of a token from which a thread loads 16 bytes at once.
ROW_BATCH = 4
ROW_BATCH_WORDS = 4 * ROW_BATCH


class Tokens(NamedTuple):
    """Rows of tokens, in the widest words that their layout allows."""

    hidden_states: Words  # [num_tokens, row_words], rows row_stride apart
    num_tokens: Int32
    row_words: Int32
    row_stride: Int64


class Index(NamedTuple):
    """Which slot has which row."""

    permuted_idx: Int32Array  # [num_rows]; the slot of a row, num_slots for a row without a slot
    inv_permuted_idx: Int32Array  # [num_tokens, top_k]; the row of a slot, -1 for a slot without a row
    num_rows: Int32
    top_k: Int32


class RowNames(NamedTuple):
    """The expert of each row, if it is asked for."""

    block_experts: OptionalInt32Array  # [num_rows / alignment]
    m_indices: OptionalInt32Array  # [num_rows]; written: the expert of a row, -1 for a row without a slot
    alignment: Int32


class Ends(NamedTuple):
    """Where the rows of each expert end, in 32 bits, if it is asked for."""

    offset: OptionalInt64Array  # [num_ends + 1]
    ends: OptionalInt32Array  # [num_ends]; written: the elements of offset from the second on
    num_ends: Int32


class Permuted(NamedTuple):
    """Rows in their places, and how the work is dealt."""

    permuted: Annotated[Any, LIKE, "hidden_states"]  # [num_rows, row_words]
    zero_padding: Int32  # whether rows without a slot are written with zeros
    parts: Int32  # thread blocks that serve a token
    share: Int32  # rows, at most 32, that each block looks at for those without a slot


@cuda.jit(launch_bounds=GATHER_BOUNDS)
def gather_rows(tokens: Tokens, index: Index, names: RowNames, experts: Ends, target: Permuted):
    """Copy each token's row to its places: `parts` blocks serve a token, a thread takes a word after another.

    Each block also looks at its share of the rows, and the grid covers all of both.
    """
    wait_for_earlier()
    block = int32(cuda.blockIdx.x)
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    lane = int32(cuda.laneid)
    first_row = int64(block) * target.share
    if block == 0 and present(experts.ends):
        expert = thread
        while expert < experts.num_ends:
            experts.ends[expert] = int32(experts.offset[expert + 1])
            expert = int32(expert + threads)
    unused = False
    if lane < target.share and first_row + lane < index.num_rows:
        unused = index.permuted_idx[first_row + lane] == tokens.num_tokens * index.top_k
        if present(names.m_indices) and thread < WARP:
            expert = int32(-1)
            if not unused:
                expert = names.block_experts[quotient(first_row + lane, names.alignment)]
            names.m_indices[first_row + lane] = expert
    holes = cuda.ballot_sync(ALL_LANES, unused and target.zero_padding != 0)

    token = quotient(block, target.parts)
    if token < tokens.num_tokens and tokens.row_words > 0:
        source = int64(token) * tokens.row_stride
        first = int32(0)
        while first < index.top_k:
            mine = int32(-1)
            if first + lane < index.top_k:
                mine = index.inv_permuted_idx[int64(token) * index.top_k + first + lane]
            slots = int32(min(WARP, index.top_k - first))
            start = int32((block - token * target.parts) * threads)
            word = load_word(tokens.hidden_states, source + min(int32(start + thread), int32(tokens.row_words - 1)))
            if cuda.ballot_sync(ALL_LANES, mine >= 0) == 0:
                start = tokens.row_words
            while start < tokens.row_words:
                place = int32(start + thread)
                for k in range(slots):
                    row = int32(cuda.shfl_sync(ALL_LANES, mine, k))
                    if row >= 0 and place < tokens.row_words:
                        store_word(target.permuted, int64(row) * tokens.row_words + place, word)
                start = int32(start + target.parts * threads)
                if start < tokens.row_words:
                    word = load_word(
                        tokens.hidden_states, source + min(int32(start + thread), int32(tokens.row_words - 1))
                    )
            first = int32(first + WARP)

    if holes != 0:
        for hole in range(target.share):
            if (holes >> hole) & 1:
                place = thread
                while place < tokens.row_words:
                    clear_word(target.permuted, (first_row + hole) * tokens.row_words + place)
                    place = int32(place + threads)


@cuda.jit(device=True)
def place_of(slots, slot, k, num_rows):
    """Return which row a slot adds, -1 for none: what an index says, or the k-th unless the slot's id is below 0."""
    row = int64(k)
    if present(slots.places):
        place = int64(slots.places[slot])
        if slots.by_index or place < 0:
            row = place
    if row >= num_rows:
        row = int64(-1)
    return int32(max(row, int64(-1)))


class Source(NamedTuple):
    """Rows to be summed: [num_rows, hidden] by index, row_stride apart, and else [num_tokens, top_k, hidden]."""

    rows: FloatArray
    num_rows: Int32  # top_k where they are not by index
    hidden: Int32
    row_stride: Int64
    token_stride: Int64  # 0 by index
    lanes: Int32  # elements that a thread loads at a time: 16 bytes, or one element


class Summands(NamedTuple):
    """Which rows each token sums, and with what weights."""

    topk_weights: OptionalFloatArray  # [num_tokens, top_k]
    places: OptionalIds  # [num_tokens, top_k]; rows by index; otherwise ids, and slots with an id below 0 are skipped
    by_index: Int32
    top_k: Int32


class Combined(NamedTuple):
    """The sums, and how the work is dealt."""

    combined: FloatArray  # [num_tokens, hidden]
    factor: Float32  # factor of the sums
    parts: Int32  # thread blocks that serve a token


@cuda.jit(launch_bounds=COMBINE_BOUNDS)
def combine_rows(source: Source, slots: Summands, result: Combined):
    """Sum each token's rows; `parts` blocks of the grid serve a token, and a thread takes `lanes` columns at a time."""
    wait_for_earlier()
    words = cuda.local.array(ROW_BATCH_WORDS, int32)
    thread = int32(cuda.threadIdx.x)
    lane = int32(cuda.laneid)
    token = quotient(cuda.blockIdx.x, result.parts)
    first_slot = int64(token) * slots.top_k
    base = int64(token) * source.token_stride
    step = int32(result.parts * cuda.blockDim.x * source.lanes)
    start = int32((cuda.blockIdx.x - token * result.parts) * cuda.blockDim.x * source.lanes)
    zeros = floats_of(source.rows, (int32(0), int32(0), int32(0), int32(0)))
    while start < source.hidden:
        column = int32(start + thread * source.lanes)
        inside = column < source.hidden
        total = float32(0.0)
        totals = zeros
        first = int32(0)
        while first < slots.top_k:
            mine = int32(-1)
            weight = float32(0.0)
            if first + lane < slots.top_k:
                mine = place_of(slots, first_slot + first + lane, int32(first + lane), source.num_rows)
            if mine >= 0:
                weight = float32(1.0)
                if present(slots.topk_weights):
                    weight = load_float(slots.topk_weights, first_slot + first + lane)
            count = int32(min(WARP, slots.top_k - first))
            k = int32(0)
            while k < count:
                if source.lanes == 1:
                    row = int32(cuda.shfl_sync(ALL_LANES, mine, k))
                    of_row = cuda.shfl_sync(ALL_LANES, weight, k)
                    if row >= 0 and inside:
                        total += of_row * load_float(source.rows, base + row * source.row_stride + column)
                    k = int32(k + 1)
                else:
                    for i in range(ROW_BATCH):  # all on their way before the first is used
                        row = int32(cuda.shfl_sync(ALL_LANES, mine, k + i))
                        for word in range(4):
                            words[4 * i + word] = 0
                        if row >= 0 and inside:
                            four = load_words(source.rows, base + row * source.row_stride + column)
                            for word in range(4):
                                words[4 * i + word] = four[word]
                    for i in range(ROW_BATCH):
                        four = (words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
                        totals = add_scaled(
                            totals, cuda.shfl_sync(ALL_LANES, weight, k + i), floats_of(source.rows, four)
                        )
                    k = int32(k + ROW_BATCH)
            first = int32(first + WARP)
        if inside:
            if source.lanes == 1:
                store_float(result.combined, int64(token) * source.hidden + column, total * float32(result.factor))
            else:
                store_floats(
                    result.combined,
                    int64(token) * source.hidden + column,
                    add_scaled(zeros, float32(result.factor), totals),
                )
        start = int32(start + step)


class WideRows(NamedTuple):
    """Rows as in `Source`, read 16 bytes at a time."""

    rows: FloatArray
    num_rows: Int32
    row_words: Int32  # of 16 bytes
    row_stride: Int64  # in elements
    token_stride: Int64
    lanes: Int32  # elements of 16 bytes


class Picked(NamedTuple):
    """Which rows each token adds, where `Summands` are of these dtypes."""

    topk_weights: OptionalFloat32Array  # [num_tokens, top_k]
    places: OptionalInt32Array  # [num_tokens, top_k]; as in `Summands`
    by_index: Int32
    top_k: Int32


class Added(NamedTuple):
    """The sums, in the dtype of the rows, and 16 bytes of them to a thread."""

    combined: Annotated[Any, LIKE, "rows"]  # [num_tokens, hidden]
    factor: Float32  # factor of the sums
    num_words: Int32  # words of 16 bytes of all sums
    reciprocal: Int64  # see `primitives.reciprocal_of`
    shift: Int32


@cuda.jit(launch_bounds=ADD_BOUNDS)
def add_rows(source: WideRows, slots: Picked, result: Added, batch: Batch):
    """Sum each token's rows, `batch` of them at a time; the grid has a thread for each 16 bytes of the sums.

    Every lane finds its rows by itself, so that no load waits for another lane's. There is a row at least: it is read
    in the place of one that is skipped, without a branch before the loads that follow.
    """
    wait_for_earlier()
    if int32(cuda.gridDim.x) <= MOST_BLOCKS_BESIDE:
        let_next_start()
    words = cuda.local.array(MOST_WORDS, int32)
    weights = cuda.local.array(batch, float32)
    rows = cuda.local.array(batch, int32)
    index = int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
    if index >= result.num_words:
        return
    token = divided(index, result.reciprocal, result.shift)
    column = int32(int32(index - token * source.row_words) * source.lanes)
    base = int64(token) * source.token_stride + column
    first_slot = int32(token * slots.top_k)
    last = int32(slots.top_k - 1)
    zeros = floats_of(source.rows, (int32(0), int32(0), int32(0), int32(0)))
    totals = zeros
    first = int32(0)
    while first <= last:
        for i in range(batch):
            k = min(int32(first + i), last)
            row = k
            if present(slots.places):
                place = slots.places[int32(first_slot + k)]
                row = place if slots.by_index or place < 0 else k
            weights[i] = float32(1.0)
            if present(slots.topk_weights):
                weights[i] = slots.topk_weights[int32(first_slot + k)]
            rows[i] = row if int32(first + i) <= last and row < source.num_rows else int32(-1)
        for i in range(batch):  # all on their way before the first is used
            four = load_words(source.rows, base + int64(max(rows[i], int32(0))) * source.row_stride)
            for word in range(4):
                words[4 * i + word] = four[word]
        for i in range(batch):
            skipped = rows[i] < 0  # whatever its row holds
            for word in range(4):
                words[4 * i + word] = int32(0) if skipped else words[4 * i + word]
            four = (words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
            weight = float32(0.0) if skipped else weights[i]
            totals = add_scaled(totals, weight, floats_of(source.rows, four))
        first = int32(first + batch)
    sums = add_scaled(zeros, float32(result.factor), totals)
    store_floats(result.combined, int64(index) * source.lanes, sums)


def stride_of(rows: Layout, axis: int = 0) -> int:
    """Return how far apart the parts of an array along an axis are, in elements."""
    return rows.shape[axis + 1 :].numel() if rows.strides is None else rows.strides[axis]


def deal(num_tokens: int, per_row: int, num_rows: int = 1) -> tuple[int, int]:
    """Return the threads of a block, and the blocks that share a token, for so much of each of its rows to be done."""
    rounds = max(-(-per_row // MOST_THREADS), -(-FEW_BLOCKS // max(1, num_tokens)))
    threads = block_threads(max(32, -(-per_row // (32 * rounds)) * 32))
    rounds = -(-per_row // threads)
    parts = min(rounds, max(-(-ENOUGH_BLOCKS // max(1, num_tokens)), rounds * num_rows // ENOUGH_PARTS))
    return threads, max(1, parts)


def check_rows(given: Any) -> tuple[int, int]:
    """Check what is permuted; return the number of experts and top_k."""
    hidden_states, topk_ids, scales = given.hidden_states, given.topk_ids, given.scales
    checks.array("hidden_states", hidden_states, (*checks.FLOATS, *checks.BYTES), (2,), rows=True)
    like = ("hidden_states", hidden_states)
    num_experts = checks.routing(topk_ids, given.num_experts, given.expert_map, ndims=(2,), like=like)
    top_k = checks.integer("top_k (columns of `topk_ids`)", topk_ids.shape[1], 1)
    num_tokens = hidden_states.shape[0]
    checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    if scales is not None:
        checks.array("scales", scales, (*checks.FLOATS, *checks.BYTES, torch.int32), (1, 2), like, rows=True)
        checks.shape("scales", scales, (num_tokens, *scales.shape[1:]), "(num_tokens, ...)")
    checks.boolean("zero_padding", given.zero_padding)
    return num_experts, top_k


def permute_by_reference(twin: Any, given: Any) -> Any:
    """Answer a permutation by the reference, with rows as integers of their size: NumPy lacks some of the dtypes."""

    def as_integers(rows: torch.Tensor) -> torch.Tensor:
        return rows.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[rows.dtype.itemsize])

    arguments = given._asdict()
    rows, scales, _ = arguments.pop("hidden_states"), arguments.pop("scales"), arguments.pop("out")
    moved = None if scales is None else as_integers(scales)
    found = arrays.by_reference(twin, as_integers(rows), scales=moved, **arguments)
    return found._replace(
        permuted_hidden_states=found.permuted_hidden_states.view(rows.dtype),
        permuted_scales=None if scales is None else found.permuted_scales.view(scales.dtype),
    )


class Gather(NamedTuple):
    """A copy of rows to their places, and the words that it is made in."""

    word: torch.dtype
    launch: Launch


def plan_gather(
    rows: Layout,
    top_k: int,
    num_rows: int,
    zero_padding: bool,
    *,
    alignment: int = 1,
    named: bool = False,
    num_ends: int = 0,
) -> Gather:
    """Plan the copy of the rows of tokens to num_rows places, in the widest words possible.

    If `named`, it writes the expert of each row too, given those of blocks of `alignment` rows. With `num_ends` it
    writes where the rows of each of that number of experts end.
    """
    num_tokens = rows.shape[0]
    row_bytes, stride_bytes = (rows.dtype.itemsize * n for n in (rows.shape[1:].numel(), stride_of(rows)))
    units = (row_bytes, stride_bytes, rows.address)
    word = next(word for word in WORDS if all(unit % word.itemsize == 0 for unit in units))
    row_words = row_bytes // word.itemsize
    threads, parts = deal(num_tokens, row_words, top_k)
    blocks = max(num_tokens * parts, -(-num_rows // WARP), min(1, num_ends))
    share = -(-num_rows // max(1, blocks))
    index_dtype = torch.int32
    launch = Launch(
        *(gather_rows, rows.device, blocks, threads),
        Tokens(word, num_tokens, row_words, row_stride=stride_bytes // word.itemsize),
        Index(index_dtype, index_dtype, num_rows, top_k),
        RowNames(index_dtype, index_dtype, alignment) if named else RowNames(None, None, alignment),
        Ends(torch.int64, torch.int32, num_ends) if num_ends else Ends(None, None, num_ends),
        Permuted(word, int(zero_padding), parts=parts, share=share),
    )
    return Gather(word, launch)


def gather(
    plan: Gather,
    rows: torch.Tensor,
    permuted: torch.Tensor,
    permuted_idx: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    block_experts: torch.Tensor | None = None,
    m_indices: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> None:
    """Copy rows to their places; name the expert of each, or where experts end, if that was planned."""
    source, target = rows, permuted
    if simulator.ENABLED:
        source, target = (array.view(plan.word) if array.numel() else array for array in (rows, permuted))
    plan.launch(
        hidden_states=source,
        permuted=target,
        permuted_idx=permuted_idx,
        inv_permuted_idx=inv_permuted_idx,
        block_experts=block_experts,
        m_indices=m_indices,
        offset=offset,
        ends=ends,
    )


def plan_combine(
    rows: Layout,
    num_tokens: int,
    top_k: int,
    weights: Layout | None,
    places: Layout | None,
    by_index: bool,
    factor: float,
    out_dtype: torch.dtype,
) -> Launch:
    """Plan the sums of rows, which are [num_rows, hidden] by index, otherwise [num_tokens, top_k, hidden]."""
    hidden = rows.shape[-1]
    strides = (stride_of(rows), 0) if by_index else (stride_of(rows, 1), stride_of(rows))
    lanes = 16 // rows.dtype.itemsize
    if rows.address or any(number % lanes for number in (hidden, *strides)):
        lanes = 1
    num_rows = rows.shape[0] if by_index else top_k
    row_words = hidden // lanes
    num_words = num_tokens * row_words
    usual = (
        lanes > 1
        and out_dtype == rows.dtype
        and all(
            array is None or array.dtype == dtype for array, dtype in ((weights, torch.float32), (places, torch.int32))
        )
    )
    in_int32 = max(num_words, num_tokens * top_k) <= 2**31 - MOST_THREADS
    if usual and in_int32 and num_words and rows.shape.numel():
        threads = block_threads(ADD_THREADS if num_words <= WORDS_OF_FEW else MOST_THREADS)
        rounds = -(-top_k // BATCHES[-1])
        return Launch(
            *(add_rows, rows.device, -(-num_words // threads), threads),
            WideRows(rows, num_rows, row_words, *strides, lanes),
            Picked(weights, places, int(by_index), top_k),
            Added(rows.dtype, factor, num_words, *reciprocal_of(row_words)),
            batch=-(-top_k // rounds),
        )
    threads, parts = deal(num_tokens, -(-hidden // lanes), top_k)
    return Launch(
        *(combine_rows, rows.device, num_tokens * parts if hidden else 0, threads),
        Source(rows, num_rows, hidden, *strides, lanes),
        Summands(weights, places, int(by_index), top_k),
        Combined(out_dtype, factor, parts),
    )
