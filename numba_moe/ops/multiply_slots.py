"""The rows of slots times the matrices of their experts, where experts have few: at the speed of memory.

Items are tiles: some rows of an expert's matrix by a block of its slots, as `moe_align_block_size` makes them. They are
dealt to a grid of blocks that all fit on the device, so that nobody needs to know how many there are. A block reads its
part of the matrix straight into the registers that the tensor cores multiply, a chunk of depth ahead, and gathers the
rows of the slots through shared memory. The order of depth within a dot product is free: 16 bytes of a row of the
matrix are multiplied as they lie, by 16 bytes of a token that lie likewise. Sums stay in float32 until the bias is
added and the activation applied; parts of a sum are added in an order that is always the same.
"""

from typing import Annotated, Any, NamedTuple

from numba_moe.device.dialect import cuda, float32, int16, int32, int64
from numba_moe.device.instructions import (
    add_scaled,
    flat,
    load_eight,
    present,
    quotient,
    store_eight,
    wait_for_earlier,
)
from numba_moe.device.primitives import load_integer
from numba_moe.device.tensor_cores import (
    commit_copies,
    copy_ahead,
    let_next_start,
    load_matrix,
    matrix_places,
    multiply,
    multiply_and_load,
    no_sums,
    of_tile,
    store_sums,
    wait_for_copies,
)
from numba_moe.device.tiles import BOUNDS, MOST_TOKENS, STAGES, TileNumber
from numba_moe.device.types import LIKE, OTHERS, Family, Int32, Int64, OptionalInt32Array, OptionalSizedArray
from numba_moe.ops.activation.activate_rows import Rule, activation_of

AHEAD = STAGES - 1
RUN = 8
NEVER = 1 << 62

Halves = Annotated[Any, "float16", "bfloat16"]
LikeRows = Annotated[Any, LIKE, "rows"]
OptionalLikeRows = Annotated[Any, LIKE, "rows", None]


class Factors(NamedTuple):
    """What is multiplied; columns are those of the products, before an activation."""

    rows: Halves  # [num_rows, depth], row_stride apart
    matrices: LikeRows  # [num_experts, columns, depth], or [num_experts, depth, columns] for a transposed tile
    bias: OptionalLikeRows  # [num_experts, columns]
    row_stride: Int64
    depth: Int32
    columns: Int32
    slots_of_row: Int32


class Blocks(NamedTuple):
    """Slots in blocks of one expert each, `tokens` of the tile at a time."""

    sorted_slots: OptionalInt32Array  # [num_blocks * tokens], filled up with num_slots; absent where a slot is a block
    block_experts: OptionalInt32Array  # [num_blocks]
    num_padded: OptionalInt32Array  # [1]
    num_slots: Int32


class Chosen(NamedTuple):
    """The expert of each slot, where a slot is a block, and those of this rank."""

    topk_ids: OptionalSizedArray  # [num_slots]
    expert_map: OptionalSizedArray  # [num_ids]
    placed: OptionalInt32Array  # [num_slots]; written if it is there: the expert, or -1
    id_bytes: Int32
    map_bytes: Int32
    num_ids: Int32
    num_experts: Int32


class Products(NamedTuple):
    """What is written, and how."""

    products: LikeRows  # [num_slots, width]
    width: Int32  # columns, or half of them: gates alone
    row_tiles: Int32  # tiles that an expert's matrix has
    is_second: Int32  # the rows are written by the kernel ahead, the matrices and blocks before it


@cuda.jit(device=True)
def expert_of(block, blocks, chosen):
    """Return the expert of a block, -1 for none of this rank's."""
    if present(blocks.block_experts):
        return blocks.block_experts[block]
    expert = load_integer(chosen.topk_ids, block, chosen.id_bytes)
    num_experts = chosen.num_ids
    if present(chosen.expert_map) and expert >= 0 and expert < num_experts:
        expert = load_integer(chosen.expert_map, expert, chosen.map_bytes)
        num_experts = chosen.num_experts
    if expert < 0 or expert >= num_experts:
        expert = int64(-1)
    return int32(expert)


@cuda.jit(device=True)
def matrix_row(place, row_tile, rows, products, rule):
    """Return the matrix row of a tile row; gates and ups of a tile are equal in number, interleaved or in halves."""
    if rule.halves == 1 or rule.interleaved:
        return int32(row_tile * rows + place)
    half = int32(rows >> 1)
    if place < half:
        return int32(row_tile * half + place)
    return int32(products.width + row_tile * half + place - half)


@cuda.jit(device=True)
def lane_places(factors, expert, row_tile, products, rule, tile):
    """Return where this lane reads the matrix of an expert, at depth 0."""
    lane = int32(cuda.laneid)
    warp = quotient(cuda.threadIdx.x >> 5, of_tile(tile, "along_depth"))
    first = int32(warp * of_tile(tile, "row_tiles") * 16)
    base = int64(expert) * factors.columns * factors.depth
    if of_tile(tile, "transposed"):
        row = matrix_row(int32(first + RUN * (lane >> 2)), row_tile, of_tile(tile, "rows"), products, rule)
        row = min(row, int32(factors.columns - RUN))
        return matrix_places(tile, base + row, int64(factors.columns), int64(NEVER))
    row = matrix_row(int32(first + (lane >> 2)), row_tile, of_tile(tile, "rows"), products, rule)
    last = base + int64(factors.columns - 1) * factors.depth
    return matrix_places(tile, base + int64(row) * factors.depth, int64(RUN) * factors.depth, last)


@cuda.jit(device=True)
def copy_tokens(factors, starts, tokens, step, stage, tile):
    """Begin to copy a chunk of the rows of a block's slots; a thread copies 16 bytes at a time."""
    pieces = int32(of_tile(tile, "depth") // RUN)
    piece = int32(cuda.threadIdx.x)
    while piece < of_tile(tile, "tokens") * pieces:
        row = quotient(piece, pieces)
        column = int32((piece - row * pieces) * RUN)
        start = starts[row]
        depth = int32(step * of_tile(tile, "depth") + column)
        whole = start >= 0 and depth < factors.depth
        if not whole:
            start = int64(0)
            depth = int32(0)
        to = int32(stage * of_tile(tile, "stage") + row * of_tile(tile, "pitch") + column)
        copy_ahead(tokens, to, factors.rows, start + depth, whole)
        piece = int32(piece + of_tile(tile, "threads"))


@cuda.jit(device=True)
def sum_parts(sums, at, factors, expert, row, tile):
    """Add eight sums of the warps that share rows along the depth, and the bias."""
    total = load_eight(sums, at)
    for part in range(1, of_tile(tile, "along_depth")):
        total = add_scaled(total, float32(1.0), load_eight(sums, at + part * of_tile(tile, "part")))
    if present(factors.bias):
        total = add_scaled(total, float32(1.0), load_eight(factors.bias, int64(expert) * factors.columns + row))
    return total


@cuda.jit(device=True)
def activated(gate, up, rule, family):
    """Return the activation of eight gates and ups."""
    return (
        activation_of(gate[0], up[0], rule, family),
        activation_of(gate[1], up[1], rule, family),
        activation_of(gate[2], up[2], rule, family),
        activation_of(gate[3], up[3], rule, family),
        activation_of(gate[4], up[4], rule, family),
        activation_of(gate[5], up[5], rule, family),
        activation_of(gate[6], up[6], rule, family),
        activation_of(gate[7], up[7], rule, family),
    )


@cuda.jit(device=True)
def no_ups():
    zero = float32(0.0)
    return (zero, zero, zero, zero, zero, zero, zero, zero)


@cuda.jit(device=True)
def separated(low, high):
    """Return gates and ups, given both in turns."""
    gates = (low[0], low[2], low[4], low[6], high[0], high[2], high[4], high[6])
    ups = (low[1], low[3], low[5], low[7], high[1], high[3], high[5], high[7])
    return gates, ups


@cuda.jit(device=True)
def write_products(sums, slots, factors, blocks, expert, row_tile, rule, products, tile, family):
    """Write the products of an item, eight columns of a slot to a thread at a time."""
    rows = of_tile(tile, "rows")
    gated = rule.halves == 2
    columns = int32(rows >> 1) if gated else rows
    runs = int32(columns >> 3)
    unit = int32(cuda.threadIdx.x)
    while unit < of_tile(tile, "tokens") * runs:
        token = quotient(unit, runs)
        run = int32((unit - token * runs) * RUN)
        slot = slots[token]
        column = int32(row_tile * columns + run)
        if slot < blocks.num_slots and column < products.width:
            second = int32(columns + run)
            if gated and rule.interleaved:
                run = int32(2 * run)
                second = int32(run + RUN)
            first = int32(token * of_tile(tile, "sums_pitch"))
            row = matrix_row(run, row_tile, rows, products, rule)
            values = sum_parts(sums, first + run, factors, expert, row, tile)
            if gated:
                row = matrix_row(second, row_tile, rows, products, rule)
                others = sum_parts(sums, first + second, factors, expert, row, tile)
                if rule.interleaved:
                    values, others = separated(values, others)
                values = activated(values, others, rule, family)
            elif family == OTHERS:
                values = activated(values, no_ups(), rule, family)
            store_eight(products.products, int64(slot) * products.width + column, values)
        unit = int32(unit + of_tile(tile, "threads"))


@cuda.jit(launch_bounds=BOUNDS)
def multiply_slots(
    factors: Factors,
    blocks: Blocks,
    chosen: Chosen,
    rule: Rule,
    products: Products,
    tile: TileNumber,
    family: Family,
):
    """Write a row of products for each slot; a block takes an item after another, any grid covers them.

    It waits for the kernel ahead where its results are read, and not before.
    """
    tokens = flat(cuda.shared.array(0, int16))
    sums = flat(cuda.shared.array(0, float32))  # the same memory, once a block has multiplied
    slots = flat(cuda.shared.array(MOST_TOKENS, int32))
    starts = flat(cuda.shared.array(MOST_TOKENS, int64))
    thread = int32(cuda.threadIdx.x)
    lane = int32(cuda.laneid)
    warp = int32(thread >> 5)
    across = quotient(warp, of_tile(tile, "along_depth"))
    behind = int32(warp - across * of_tile(tile, "along_depth"))
    lane_depth = int32(behind * 32 * of_tile(tile, "steps") + RUN * (lane & 3))
    lane_at = int32((lane >> 2) * of_tile(tile, "pitch") + lane_depth)
    row_of_lane = int32((lane >> 2) * (RUN if of_tile(tile, "transposed") else 1))
    first_sum = int32((behind * of_tile(tile, "tokens") + 2 * (lane & 3)) * of_tile(tile, "sums_pitch"))
    first_sum = int32(first_sum + across * of_tile(tile, "row_tiles") * 16 + row_of_lane)
    chunks = quotient(factors.depth + of_tile(tile, "depth") - 1, of_tile(tile, "depth"))
    stride = int64(factors.columns) if of_tile(tile, "transposed") else int64(1)
    if not products.is_second:
        wait_for_earlier()
        let_next_start()
    num_blocks = int32(blocks.num_slots)
    if present(blocks.num_padded):
        num_blocks = quotient(blocks.num_padded[0], of_tile(tile, "tokens"))
    items = int32(num_blocks * products.row_tiles)
    item = int32(cuda.blockIdx.x)
    while item < items:
        row_tile = quotient(item, num_blocks)
        block = int32(item - row_tile * num_blocks)
        item = int32(item + cuda.gridDim.x)
        expert = expert_of(block, blocks, chosen)
        if present(chosen.placed) and row_tile == 0 and thread == 0:
            chosen.placed[block] = expert
        if expert >= 0:
            places = lane_places(factors, expert, row_tile, products, rule, tile)
            words = load_matrix(tile, factors.matrices, places, lane_depth, factors.depth, stride)
            wait_for_earlier()
            cuda.syncthreads()  # all have read the sums of the item before
            if thread < of_tile(tile, "tokens"):
                slot = int32(blocks.num_slots)
                if present(blocks.sorted_slots):
                    slot = blocks.sorted_slots[block * of_tile(tile, "tokens") + thread]
                elif thread == 0:
                    slot = block
                slots[thread] = slot
                start = int64(-1)
                if slot < blocks.num_slots:
                    start = quotient(slot, factors.slots_of_row) * factors.row_stride
                starts[thread] = start
            cuda.syncthreads()
            for step in range(AHEAD):
                if step < chunks:
                    copy_tokens(factors, starts, tokens, int32(step), int32(step), tile)
                commit_copies()
            totals = no_sums(tile)
            depth = lane_depth
            stage = int32(0)
            next_stage = int32(AHEAD)
            step = int32(0)
            while step < chunks:
                wait_for_copies()
                cuda.syncthreads()
                if step + AHEAD < chunks:
                    copy_tokens(factors, starts, tokens, int32(step + AHEAD), next_stage, tile)
                commit_copies()
                at = int32(lane_at + stage * of_tile(tile, "stage"))
                depth = int32(depth + of_tile(tile, "depth"))
                step = int32(step + 1)
                if step < chunks:
                    totals, words = multiply_and_load(
                        tile, totals, words, tokens, at, factors.matrices, places, depth, factors.depth, stride
                    )
                else:
                    totals = multiply(tile, totals, words, tokens, at, factors.matrices)
                stage = next_of(stage)
                next_stage = next_of(next_stage)
            cuda.syncthreads()
            store_sums(tile, totals, sums, first_sum)
            cuda.syncthreads()
            write_products(sums, slots, factors, blocks, expert, row_tile, rule, products, tile, family)
    wait_for_earlier()
    if products.is_second:
        let_next_start()


@cuda.jit(device=True)
def next_of(stage):
    """Return the stage after another."""
    return int32(0) if stage == STAGES - 1 else int32(stage + 1)
