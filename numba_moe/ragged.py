"""Rows in slices of any lengths: where slices begin, and which block of which slice a GEMM block computes.

One launch for all block sizes. Every block of threads sums, for itself, the blocks of all slices at one block size, and
finds the slices of its share of that schedule by bisection.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.reference import ragged as reference
from numba_moe.reference.ragged import BLOCK_SIZES, RaggedMetadata
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, int32, int64
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.parameters import Ids, Int32, Int32Array
from numba_moe.runtime.plans import Layout, layout, planned
from numba_moe.runtime.primitives import WARP, block_sums, first_above, flat, quotient

THREADS = 512
# Entries of a schedule that a thread writes, and blocks in the grid from which on each writes more instead.
ENTRIES = 4
MOST_BLOCKS = 1024
# The block sizes are powers of two, each twice the one before.
FIRST_LOG = BLOCK_SIZES[0].bit_length() - 1


@cuda.jit(launch_bounds=THREADS)
def schedule_blocks(
    sizes: Ids,
    slice_sizes: Int32Array,
    slice_offsets: Int32Array,
    block_offsets: Int32Array,
    block_schedule: Ids,
    num_slices: Int32,
    length: Int32,
    shift: Int32,
    share: Int32,
    shares: Int32,
):
    # sizes and slice_sizes [num_slices], slice_offsets [num_slices + 1], block_offsets [block sizes, num_slices + 1],
    # block_schedule [block sizes, length]; `shares` blocks per block size, for `share` entries each
    starts = flat(cuda.shared.array(THREADS, int32))
    ends = flat(cuda.shared.array(THREADS, int32))
    warp_sums = flat(cuda.shared.array(WARP, int32))
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    level = quotient(cuda.blockIdx.x, shares)
    mine = int32(cuda.blockIdx.x - level * shares)
    log = int32(FIRST_LOG + level)
    schedule = int64(level) * length
    offsets = int64(level) * (num_slices + 1)
    position = int64(mine) * share + thread
    share_end = min(int64(mine + 1) * share, int64(length))
    base = int32(0)
    rows_base = int32(0)
    first = int32(0)
    while first < num_slices:
        index = int32(first + thread)
        rows = int64(0)
        if index < num_slices:
            rows = max(int64(sizes[index]), int64(0))
        blocks = int32((rows + (1 << log) - 1) >> log)
        upto, of_chunk = block_sums(blocks, warp_sums, int32)  # which all threads reach when they are done with `ends`
        starts[thread] = base + upto - blocks
        ends[thread] = base + upto
        if mine == 0 and index < num_slices:
            block_offsets[offsets + index] = base + upto - blocks
        if cuda.blockIdx.x == 0:
            rows_upto, rows_of_chunk = block_sums(int32(rows), warp_sums, int32)
            if index < num_slices:
                slice_sizes[index] = rows
                slice_offsets[index] = rows_base + rows_upto - int32(rows)
            rows_base = int32(rows_base + rows_of_chunk)
        cuda.syncthreads()
        base = int32(base + of_chunk)
        end = min(share_end, int64(base))
        while position < end:
            found = first_above(ends, min(threads, int32(num_slices - first)), position)
            block = position - starts[found]
            block_schedule[schedule + position] = (block << shift) | int64(first + found)
            position += threads
        first = int32(first + threads)
    while position < share_end:
        block_schedule[schedule + position] = -1
        position += threads
    if thread == 0 and mine == 0:
        block_offsets[offsets + num_slices] = base
        if level == 0:
            slice_offsets[num_slices] = rows_base


class RaggedPlan(NamedTuple):
    """The outputs, and the launch."""

    outputs: tuple[arrays.Contiguous, ...]
    schedule: Launch


@planned
def _plan(slice_sizes: Layout, num_rows: int) -> RaggedPlan:
    checks.array("slice_sizes", slice_sizes, checks.IDS, (1,))
    num_rows = checks.integer("num_rows", num_rows, 0)
    num_slices = slice_sizes.shape[0]
    length = reference.max_blocks(num_slices, num_rows)
    shift = reference.schedule_shift(num_slices, num_rows)
    dtype = torch.int32 if shift == 16 else torch.int64
    threads = block_threads(THREADS)
    share = max(ENTRIES * threads, -(-length * len(BLOCK_SIZES) // MOST_BLOCKS))
    shares = max(1, -(-length // share))
    numbers = (num_slices, length, shift, share, shares)
    choices = {"sizes": slice_sizes.dtype, "block_schedule": dtype}
    where = (slice_sizes.device, len(BLOCK_SIZES) * shares, threads)
    shapes = ((num_slices,), (num_slices + 1,), (len(BLOCK_SIZES), num_slices + 1))
    outputs = (
        *(arrays.contiguous(torch.int32, *shape) for shape in shapes),
        arrays.contiguous(dtype, len(BLOCK_SIZES), length),
    )
    return RaggedPlan(outputs, Launch(schedule_blocks, *where, numbers, choices))


@arrays.public
def make_ragged_metadata(slice_sizes: Any, num_rows: int) -> RaggedMetadata:
    """Say where slices of rows begin, and which blocks they consist of, for blocks of 16, 32, 64 and 128 rows.

    Parameters
    ----------
    slice_sizes : array of int32 or int64, shape [num_slices]
        Rows of each slice, the tokens of each expert for instance; less than 0 counts as 0. Together they fit int32.
    num_rows : int
        Rows in all, or more: what the caller knows without asking the device. If there are more than this, the
        schedule ends early.

    Returns
    -------
    RaggedMetadata
        slice_sizes : int32 [num_slices]. slice_offsets : int32 [num_slices + 1], exclusive sums of them.
        block_offsets : int32 [4, num_slices + 1], for each block size exclusive sums of ``ceil(size / block_size)``.
        block_schedule : [4, max_blocks], for each block size the blocks of slice 0, of slice 1, ...: int32
        ``block << 16 | slice``, block counting from 0 in every slice, and -1 past the last. With more than 65,536
        slices or 524,288 rows it is int64 ``block << 32 | slice``. max_blocks is num_rows if that is no more than
        num_slices, or else ``num_slices - 1 + ceil((num_rows - num_slices + 1) / 16)``.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, negative num_rows; on the CPU, slices of more rows together than int32 holds.

    Notes
    -----
    One launch on the caller's current stream, which captures into CUDA graphs; allocates the results only. The
    formulas are those of triton_kernels' ragged metadata. On the GPU nobody reads sizes beforehand: of more rows than
    int32 holds, offsets are the lower 32 bits there, and nothing is read or written out of bounds;
    NUMBA_MOE_VALIDATE=1 makes them an error.

    Examples
    --------
    >>> import numpy as np
    >>> ragged = make_ragged_metadata(np.array([20, 0, 3]), num_rows=30)
    >>> ragged.slice_offsets
    array([ 0, 20, 20, 23], dtype=int32)
    >>> ragged.block_schedule[0] & 0xFFFF, ragged.block_schedule[0] >> 16  # slices and blocks; 65535 and -1 are unused
    (array([    0,     0,     2, 65535], dtype=int32), array([ 0,  1,  0, -1], dtype=int32))
    """
    plan = _plan(layout(slice_sizes), num_rows)
    by_reference = arrays.answered_by_reference(slice_sizes)
    if by_reference or checks.VALIDATE:
        total = int(slice_sizes.long().clamp(0, 2**31).sum())
        rule = f"of no more rows together than int32 holds ({checks.LARGEST_INT32})"
        checks.holds("slice_sizes", rule, total <= checks.LARGEST_INT32, f"{total} or more")
    if by_reference:
        return arrays.by_reference(reference.make_ragged_metadata, slice_sizes, num_rows)
    outputs = [arrays.empty(*output) for output in plan.outputs]
    plan.schedule(slice_sizes, *outputs)
    return RaggedMetadata(*outputs)
