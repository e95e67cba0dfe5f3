"""Schedule GEMM blocks over slices of rows without padding: `make_ragged_metadata`.

One launch serves all block sizes. Each thread block sums the GEMM blocks of all slices at one block size. Then it finds
the slice of each entry in its share of the schedule by bisection.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, int32, int64
from numba_moe.device.instructions import flat, quotient, wait_for_earlier
from numba_moe.device.primitives import WARP, block_sums, first_above
from numba_moe.device.types import Ids, Int32, Int32Array
from numba_moe.reference import ragged as reference
from numba_moe.reference.ragged import BLOCK_SIZES, RaggedMetadata
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, by_reference, contiguous
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op
from numba_moe.sizes import scheduled_blocks

THREADS = 512
# A thread writes ENTRIES entries of a schedule. It writes more where the grid would have over MOST_BLOCKS blocks.
ENTRIES = 4
MOST_BLOCKS = 1024
# The block sizes are powers of two, each twice the one before.
FIRST_LOG = BLOCK_SIZES[0].bit_length() - 1


class Slices(NamedTuple):
    """Slices of rows, and the results that do not depend on the block size."""

    sizes: Ids  # [num_slices]; a negative size counts as 0
    slice_sizes: Int32Array  # [num_slices]
    slice_offsets: Int32Array  # [num_slices + 1]
    num_slices: Int32


class Schedule(NamedTuple):
    """The blocks of all slices, for each of the block sizes."""

    block_offsets: Int32Array  # [block sizes, num_slices + 1]
    block_schedule: Ids  # [block sizes, length]
    length: Int32
    shift: Int32  # an entry is block << shift | slice
    share: Int32  # entries that a thread block writes
    shares: Int32  # thread blocks for each block size


@cuda.jit(launch_bounds=THREADS)
def schedule_blocks(slices: Slices, schedule: Schedule):
    """Write the schedules; a thread block writes one share of one block size, and each size has `shares` blocks."""
    wait_for_earlier()
    starts = flat(cuda.shared.array(THREADS, int32))
    ends = flat(cuda.shared.array(THREADS, int32))
    warp_sums = flat(cuda.shared.array(WARP, int32))
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    level = quotient(cuda.blockIdx.x, schedule.shares)
    mine = int32(cuda.blockIdx.x - level * schedule.shares)
    log = int32(FIRST_LOG + level)
    first_entry = int64(level) * schedule.length
    first_offset = int64(level) * (slices.num_slices + 1)
    position = int64(mine) * schedule.share + thread
    share_end = min(int64(mine + 1) * schedule.share, int64(schedule.length))
    base = int32(0)
    rows_base = int32(0)
    first = int32(0)
    while first < slices.num_slices:
        index = int32(first + thread)
        rows = int64(0)
        if index < slices.num_slices:
            rows = max(int64(slices.sizes[index]), int64(0))
        blocks = int32((rows + (1 << log) - 1) >> log)
        upto, of_chunk = block_sums(blocks, warp_sums, int32)  # its barrier: all threads are done with `ends`
        starts[thread] = base + upto - blocks
        ends[thread] = base + upto
        if mine == 0 and index < slices.num_slices:
            schedule.block_offsets[first_offset + index] = base + upto - blocks
        if cuda.blockIdx.x == 0:
            rows_upto, rows_of_chunk = block_sums(int32(rows), warp_sums, int32)
            if index < slices.num_slices:
                slices.slice_sizes[index] = rows
                slices.slice_offsets[index] = rows_base + rows_upto - int32(rows)
            rows_base = int32(rows_base + rows_of_chunk)
        cuda.syncthreads()
        base = int32(base + of_chunk)
        end = min(share_end, int64(base))
        while position < end:
            found = first_above(ends, min(threads, int32(slices.num_slices - first)), position)
            block = position - starts[found]
            schedule.block_schedule[first_entry + position] = (block << schedule.shift) | int64(first + found)
            position += threads
        first = int32(first + threads)
    while position < share_end:
        schedule.block_schedule[first_entry + position] = -1
        position += threads
    if thread == 0 and mine == 0:
        schedule.block_offsets[first_offset + slices.num_slices] = base
        if level == 0:
            slices.slice_offsets[slices.num_slices] = rows_base


@op(reference.make_ragged_metadata)
def make_ragged_metadata(slice_sizes: Array, num_rows: int, *, out: RaggedMetadata | None = None) -> RaggedMetadata:
    """Compute where each slice of rows begins, and a schedule of its blocks, for blocks of 16, 32, 64 and 128 rows.

    Parameters
    ----------
    slice_sizes : array of int32 or int64, shape [num_slices]
        Number of rows of each slice, for example the tokens of each expert. A negative size counts as 0. The sum must
        fit int32.
    num_rows : int
        An upper bound of the sum of `slice_sizes`, which the caller knows without reading the device. If the sum is
        larger, the schedule lacks its last blocks.
    out : tuple of four arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    RaggedMetadata
        slice_sizes : int32 [num_slices]. slice_offsets : int32 [num_slices + 1], exclusive sums of the sizes.
        block_offsets : int32 [4, num_slices + 1], for each block size the exclusive sums of ``ceil(size /
        block_size)``. block_schedule : [4, max_blocks], for each block size the blocks of slice 0, then those of slice
        1, and so on. An entry is ``block << 16 | slice`` in int32, where block counts from 0 in each slice; unused
        entries are -1. With more than 65,536 slices or 524,288 rows an entry is ``block << 32 | slice`` in int64.
        max_blocks is num_rows if ``num_rows <= num_slices``, and otherwise ``num_slices - 1 + ceil((num_rows -
        num_slices + 1) / 16)``.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, or `num_rows` below 0. On the CPU also sizes whose sum does not fit int32.

    Notes
    -----
    The op is one launch on the caller's current stream, and CUDA graphs can capture it. It allocates the results only.
    The formulas are those of triton_kernels' ragged metadata. On the GPU the host does not read the sizes: if their sum
    does not fit int32, the offsets are its lower 32 bits, and nothing is read or written out of bounds.
    NUMBA_MOE_VALIDATE=1 makes this an error.

    Examples
    --------
    >>> import numpy as np
    >>> ragged = make_ragged_metadata(np.array([20, 0, 3]), num_rows=30)
    >>> ragged.slice_offsets
    array([ 0, 20, 20, 23], dtype=int32)
    >>> ragged.block_schedule[0] & 0xFFFF, ragged.block_schedule[0] >> 16  # slices and blocks; 65535 and -1 are unused
    (array([    0,     0,     2, 65535], dtype=int32), array([ 0,  1,  0, -1], dtype=int32))
    """


@make_ragged_metadata.outputs
def _(given: Any) -> tuple[Contiguous, ...]:
    num_slices, kinds = given.slice_sizes.shape[0], len(BLOCK_SIZES)
    dtype = torch.int32 if reference.schedule_shift(num_slices, given.num_rows) == 16 else torch.int64
    shapes = (num_slices,), (num_slices + 1,), (kinds, num_slices + 1)
    length = scheduled_blocks(num_slices, given.num_rows)
    return *(contiguous(torch.int32, *shape) for shape in shapes), contiguous(dtype, kinds, length)


@make_ragged_metadata.plan
def _(given: Any) -> Launch:
    checks.array("slice_sizes", given.slice_sizes, checks.IDS, (1,))
    num_rows = checks.integer("num_rows", given.num_rows, 0)
    num_slices = given.slice_sizes.shape[0]
    length = reference.max_blocks(num_slices, num_rows)
    shift = reference.schedule_shift(num_slices, num_rows)
    threads = block_threads(THREADS)
    share = max(ENTRIES * threads, -(-length * len(BLOCK_SIZES) // MOST_BLOCKS))
    shares = max(1, -(-length // share))
    where = (given.slice_sizes.device, len(BLOCK_SIZES) * shares, threads)
    slices = Slices(given.slice_sizes, torch.int32, torch.int32, num_slices)
    of_schedule = torch.int32 if shift == 16 else torch.int64
    schedule = Schedule(torch.int32, of_schedule, length, shift, share, shares)
    return Launch(schedule_blocks, *where, slices, schedule)


@make_ragged_metadata.validate
def _(given: Any) -> None:
    total = int(given.slice_sizes.long().clamp(0, 2**31).sum())
    rule = f"of no more rows together than int32 holds ({checks.LARGEST_INT32})"
    checks.holds("slice_sizes", rule, total <= checks.LARGEST_INT32, f"{total} or more")


@make_ragged_metadata.on_cpu
def _(given: Any) -> RaggedMetadata:
    assert make_ragged_metadata.declaration.validate is not None
    make_ragged_metadata.declaration.validate(given)
    found: RaggedMetadata = by_reference(reference.make_ragged_metadata, given.slice_sizes, given.num_rows)
    return found


@make_ragged_metadata.run
def _(schedule: Any, given: Any, slice_sizes: Any, slice_offsets: Any, block_offsets: Any, block_schedule: Any) -> None:
    schedule(
        sizes=given.slice_sizes,
        slice_sizes=slice_sizes,
        slice_offsets=slice_offsets,
        block_offsets=block_offsets,
        block_schedule=block_schedule,
    )
