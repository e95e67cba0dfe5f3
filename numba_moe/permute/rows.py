"""The kernels that move rows, and how they are launched.

A row is read where its token is, once, and written to each of its places; or read at each of its places and written
once. A block serves a token, or a part of one where there are few, 16 bytes to a thread. Rows whose width, distance
or address does not allow that are moved in smaller words and summed by elements.
"""

import math
from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.runtime import arrays, checks, simulator
from numba_moe.runtime.dialect import cuda, float32, int32, int64
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.parameters import (
    LIKE,
    Float32,
    FloatArray,
    Int32,
    Int32Array,
    Int64,
    OptionalFloatArray,
    OptionalIds,
    OptionalInt32Array,
    OptionalInt64Array,
    Words,
)
from numba_moe.runtime.plans import Layout
from numba_moe.runtime.primitives import (
    ALL_LANES,
    WARP,
    add_scaled,
    clear_word,
    floats_of,
    load_float,
    load_word,
    load_words,
    present,
    quotient,
    store_float,
    store_floats,
    store_word,
)

MOST_THREADS = 256
# Threads of a block, and how many blocks are to fit on a multiprocessor. Told that, the compiler does not put off loads
# to save registers: on an H200 one token's row is copied to eight places in 3.2 us instead of 3.4 (with the sort), its
# eight rows are summed in 1.6 instead of 1.9.
GATHER_BOUNDS = (MOST_THREADS, 8)
COMBINE_BOUNDS = (MOST_THREADS, 6)
# Blocks enough to use all of a GPU; with fewer tokens each is served by several.
ENOUGH_BLOCKS = 1024
# Parts of rows that a block has at least where there are more blocks than that: on an H200 eight rows of 14 KiB of each
# of 512 tokens are summed in 17 us instead of 19 by four blocks to a token, not two, but two rows of 8 KiB are combined
# in up to 8 % more by two, not one.
ENOUGH_PARTS = 8
# Blocks that the rows of few tokens are spread over at least, with fewer threads: before the bounds above, on an H200
# one token's eight rows were summed in 1.9 us instead of 2.0.
FEW_BLOCKS = 32
WORDS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
# Rows of a token that a thread has on their way at once, 16 bytes of each.
ROW_BATCH = 4
ROW_BATCH_WORDS = 4 * ROW_BATCH


@cuda.jit(launch_bounds=GATHER_BOUNDS)
def gather_rows(
    hidden_states: Words,
    permuted_idx: Int32Array,
    inv_permuted_idx: Int32Array,
    block_experts: OptionalInt32Array,
    m_indices: OptionalInt32Array,
    permuted: Annotated[Any, LIKE, "hidden_states"],
    offset: OptionalInt64Array,
    ends: OptionalInt32Array,
    num_tokens: Int32,
    top_k: Int32,
    num_rows: Int32,
    row_words: Int32,
    row_stride: Int64,
    parts: Int32,
    share: Int32,
    alignment: Int32,
    zero_padding: Int32,
    num_ends: Int32,
):
    # hidden_states [num_tokens, row_words] with rows row_stride apart; permuted_idx and m_indices [num_rows];
    # inv_permuted_idx [num_tokens, top_k]; block_experts [num_rows / alignment]; permuted [num_rows, row_words];
    # `parts` blocks serve a token, and every block looks for rows without a slot among its `share` of at most 32;
    # ends [num_ends] are the elements of offset from the second on
    block = int32(cuda.blockIdx.x)
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    lane = int32(cuda.laneid)
    first_row = int64(block) * share
    if block == 0 and present(ends):
        expert = thread
        while expert < num_ends:
            ends[expert] = int32(offset[expert + 1])
            expert = int32(expert + threads)
    unused = False
    if lane < share and first_row + lane < num_rows:
        unused = permuted_idx[first_row + lane] == num_tokens * top_k
        if present(m_indices) and thread < WARP:
            expert = int32(-1)
            if not unused:
                expert = block_experts[quotient(first_row + lane, alignment)]
            m_indices[first_row + lane] = expert
    holes = cuda.ballot_sync(ALL_LANES, unused and zero_padding != 0)

    token = quotient(block, parts)
    if token < num_tokens and row_words > 0:
        source = int64(token) * row_stride
        first = int32(0)
        while first < top_k:
            mine = int32(-1)
            if first + lane < top_k:
                mine = inv_permuted_idx[int64(token) * top_k + first + lane]
            slots = int32(min(WARP, top_k - first))
            start = int32((block - token * parts) * threads)
            word = load_word(hidden_states, source + min(int32(start + thread), int32(row_words - 1)))
            if cuda.ballot_sync(ALL_LANES, mine >= 0) == 0:
                start = row_words
            while start < row_words:
                place = int32(start + thread)
                for k in range(slots):
                    row = int32(cuda.shfl_sync(ALL_LANES, mine, k))
                    if row >= 0 and place < row_words:
                        store_word(permuted, int64(row) * row_words + place, word)
                start = int32(start + parts * threads)
                if start < row_words:
                    word = load_word(hidden_states, source + min(int32(start + thread), int32(row_words - 1)))
            first = int32(first + WARP)

    if holes != 0:
        for hole in range(share):
            if (holes >> hole) & 1:
                place = thread
                while place < row_words:
                    clear_word(permuted, (first_row + hole) * row_words + place)
                    place = int32(place + threads)


@cuda.jit(device=True)
def place_of(places, slot, k, by_index, num_rows):
    """Return which row a slot adds, -1 for none: what an index says, or the k-th unless the slot's id is below 0."""
    row = int64(k)
    if present(places):
        place = int64(places[slot])
        if by_index or place < 0:
            row = place
    if row >= num_rows:
        row = int64(-1)
    return int32(max(row, int64(-1)))


@cuda.jit(launch_bounds=COMBINE_BOUNDS)
def combine_rows(
    rows: FloatArray,
    topk_weights: OptionalFloatArray,
    places: OptionalIds,
    combined: FloatArray,
    top_k: Int32,
    num_rows: Int32,
    hidden: Int32,
    row_stride: Int64,
    token_stride: Int64,
    by_index: Int32,
    factor: Float32,
    parts: Int32,
    lanes: Int32,
):
    # topk_weights and places [num_tokens, top_k]; combined [num_tokens, hidden]. By index, places are those of rows
    # [num_rows, hidden], row_stride apart; else rows are [num_tokens, top_k, hidden], and places below 0 are skipped.
    # `parts` blocks serve a token; a thread takes `lanes` elements, which are 16 bytes or one
    words = cuda.local.array(ROW_BATCH_WORDS, int32)
    thread = int32(cuda.threadIdx.x)
    lane = int32(cuda.laneid)
    token = quotient(cuda.blockIdx.x, parts)
    first_slot = int64(token) * top_k
    base = int64(token) * token_stride
    step = int32(parts * cuda.blockDim.x * lanes)
    start = int32((cuda.blockIdx.x - token * parts) * cuda.blockDim.x * lanes)
    zeros = floats_of(rows, (int32(0), int32(0), int32(0), int32(0)))
    while start < hidden:
        column = int32(start + thread * lanes)
        inside = column < hidden
        total = float32(0.0)
        totals = zeros
        first = int32(0)
        while first < top_k:
            mine = int32(-1)
            weight = float32(0.0)
            if first + lane < top_k:
                mine = place_of(places, first_slot + first + lane, int32(first + lane), by_index, num_rows)
            if mine >= 0:
                weight = float32(1.0)
                if present(topk_weights):
                    weight = load_float(topk_weights, first_slot + first + lane)
            slots = int32(min(WARP, top_k - first))
            k = int32(0)
            while k < slots:
                if lanes == 1:
                    row = int32(cuda.shfl_sync(ALL_LANES, mine, k))
                    of_row = cuda.shfl_sync(ALL_LANES, weight, k)
                    if row >= 0 and inside:
                        total += of_row * load_float(rows, base + row * row_stride + column)
                    k = int32(k + 1)
                else:
                    for i in range(ROW_BATCH):  # all on their way before the first is used
                        row = int32(cuda.shfl_sync(ALL_LANES, mine, k + i))
                        for word in range(4):
                            words[4 * i + word] = 0
                        if row >= 0 and inside:
                            four = load_words(rows, base + row * row_stride + column)
                            for word in range(4):
                                words[4 * i + word] = four[word]
                    for i in range(ROW_BATCH):
                        four = (words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
                        totals = add_scaled(totals, cuda.shfl_sync(ALL_LANES, weight, k + i), floats_of(rows, four))
                    k = int32(k + ROW_BATCH)
            first = int32(first + WARP)
        if inside:
            if lanes == 1:
                store_float(combined, int64(token) * hidden + column, total * float32(factor))
            else:
                store_floats(combined, int64(token) * hidden + column, add_scaled(zeros, float32(factor), totals))
        start = int32(start + step)


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


def check_rows(
    hidden_states: Layout,
    topk_ids: Layout,
    num_experts: int,
    expert_map: Layout | None,
    scales: Layout | None,
    zero_padding: bool,
) -> tuple[int, int]:
    """Check what is permuted; return the number of experts and top_k."""
    checks.array("hidden_states", hidden_states, (*checks.FLOATS, *checks.BYTES), (2,), rows=True)
    like = ("hidden_states", hidden_states)
    num_experts = checks.routing(topk_ids, num_experts, expert_map, ndims=(2,), like=like)
    top_k = checks.integer("top_k (columns of `topk_ids`)", topk_ids.shape[1], 1)
    num_tokens = hidden_states.shape[0]
    checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    if scales is not None:
        checks.array("scales", scales, (*checks.FLOATS, *checks.BYTES, torch.int32), (1, 2), like, rows=True)
        checks.shape("scales", scales, (num_tokens, *scales.shape[1:]), "(num_tokens, ...)")
    checks.boolean("zero_padding", zero_padding)
    return num_experts, top_k


def permute_by_reference(function: Any, hidden_states: torch.Tensor, *args: Any, scales: Any, **options: Any) -> Any:
    """Call a permutation of the reference, with rows as integers of their size: NumPy lacks some of the dtypes."""

    def as_integers(rows: torch.Tensor) -> torch.Tensor:
        return rows.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[rows.dtype.itemsize])

    moved = None if scales is None else as_integers(scales)
    found = arrays.by_reference(function, as_integers(hidden_states), *args, scales=moved, **options)
    rows = found.permuted_hidden_states.view(hidden_states.dtype)
    return found._replace(
        permuted_hidden_states=rows,
        permuted_scales=None if scales is None else found.permuted_scales.view(scales.dtype),
    )


class Gather(NamedTuple):
    """A copy of rows to their places: the result, and the words that it is made in."""

    permuted: arrays.Contiguous
    word: torch.dtype
    launch: Launch


def plan_gather(
    rows: Layout, top_k: int, shape: tuple[int, ...], zero_padding: bool, alignment: int = 1, num_ends: int = 0
) -> Gather:
    """Plan the copy of rows, [num_tokens] to places of some shape, in the widest words possible."""
    num_tokens, num_rows = rows.shape[0], math.prod(shape)
    row_bytes, stride_bytes = (rows.dtype.itemsize * n for n in (rows.shape[1:].numel(), stride_of(rows)))
    units = (row_bytes, stride_bytes, rows.address)
    word = next(word for word in WORDS if all(unit % word.itemsize == 0 for unit in units))
    row_words = row_bytes // word.itemsize
    threads, parts = deal(num_tokens, row_words, top_k)
    blocks = max(num_tokens * parts, -(-num_rows // WARP), min(1, num_ends))
    share = -(-num_rows // max(1, blocks))
    sizes = (num_tokens, top_k, num_rows, row_words, stride_bytes // word.itemsize)
    numbers = (*sizes, parts, share, alignment, int(zero_padding), num_ends)
    launch = Launch(gather_rows, rows.device, blocks, threads, numbers, {"hidden_states": word})
    return Gather(arrays.contiguous(rows.dtype, *shape, *rows.shape[1:]), word, launch)


def gather(
    plan: Gather,
    rows: torch.Tensor,
    permuted_idx: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    block_experts: torch.Tensor | None = None,
    m_indices: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """Allocate the places and copy rows there; name the expert of each, or where experts end, if asked to."""
    permuted: torch.Tensor = arrays.empty(*plan.permuted)
    source, target = rows, permuted
    if simulator.ENABLED:
        source, target = (array.view(plan.word) if array.numel() else array for array in (rows, permuted))
    plan.launch(source, permuted_idx, inv_permuted_idx, block_experts, m_indices, target, offset, ends)
    return permuted


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
    threads, parts = deal(num_tokens, -(-hidden // lanes), top_k)
    numbers = (top_k, rows.shape[0] if by_index else top_k, hidden, *strides, int(by_index), factor, parts, lanes)
    dtypes = {
        "rows": rows.dtype,
        "topk_weights": weights and weights.dtype,
        "places": places and places.dtype,
        "combined": out_dtype,
    }
    return Launch(combine_rows, rows.device, num_tokens * parts if hidden else 0, threads, numbers, dtypes)
