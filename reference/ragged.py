"""Schedule GEMM blocks over slices of rows: where each slice begins, and the slice of each block."""

from typing import Any, NamedTuple

import numpy as np

BLOCK_SIZES = (16, 32, 64, 128)


class RaggedMetadata(NamedTuple):
    """The arrays that a grouped GEMM over slices of rows reads, for each block size; see `make_ragged_metadata`."""

    slice_sizes: Any
    slice_offsets: Any
    block_offsets: Any
    block_schedule: Any


def max_blocks(num_slices: int, num_rows: int) -> int:
    """Return the length of a block schedule, which is enough for any slices with `num_rows` rows in total.

    Blocks of 16 rows need the most entries, and they need the most where every slice except one has a single row.

    >>> max_blocks(4, 159), max_blocks(4, 3), max_blocks(4, 4), max_blocks(0, 0)
    (13, 3, 4, 0)
    """
    if num_rows <= num_slices:
        return num_rows
    return 0 if num_slices == 0 else num_slices - 1 + -(-(num_rows - num_slices + 1) // BLOCK_SIZES[0])


def schedule_shift(num_slices: int, num_rows: int) -> int:
    """Return by how many bits a schedule shifts the block: 16 if block and slice both fit 16 bits, otherwise 32.

    >>> schedule_shift(256, 524_288), schedule_shift(256, 524_289), schedule_shift(65_537, 1)
    (16, 32, 32)
    """
    return 16 if num_slices <= 2**16 and num_rows <= 2**15 * BLOCK_SIZES[0] else 32


def make_ragged_metadata(slice_sizes: np.ndarray, num_rows: int) -> RaggedMetadata:
    """Compute where each slice of rows begins, and a schedule of its blocks, for blocks of 16, 32, 64 and 128 rows.

    Parameters
    ----------
    slice_sizes
        int32 or int64 [num_slices]: the number of rows of each slice, for example the tokens of each expert. A negative
        size counts as 0. The sum must fit int32.
    num_rows
        An upper bound of the sum of `slice_sizes`. If the sum is larger, the schedule lacks its last blocks.

    Returns
    -------
    RaggedMetadata
        slice_sizes: int32 [num_slices]. slice_offsets: int32 [num_slices + 1], exclusive sums of the sizes.
        block_offsets: int32 [4, num_slices + 1], for each block size the exclusive sums of ``ceil(size / block_size)``.
        block_schedule: [4, max_blocks], for each block size the blocks of slice 0, then those of slice 1, and so on. An
        entry is ``block << 16 | slice`` in int32, where block counts from 0 in each slice; unused entries are -1. With
        more than 65,536 slices or 524,288 rows an entry is ``block << 32 | slice`` in int64.

    Examples
    --------
    Three slices have 20, 0 and 3 rows. In blocks of 16 rows the first slice has two blocks and the last has one:

    >>> ragged = make_ragged_metadata(np.array([20, 0, 3]), num_rows=30)
    >>> ragged.slice_offsets
    array([ 0, 20, 20, 23], dtype=int32)
    >>> ragged.block_offsets
    array([[0, 2, 2, 3],
           [0, 1, 1, 2],
           [0, 1, 1, 2],
           [0, 1, 1, 2]], dtype=int32)
    >>> ragged.block_schedule[0] & 0xFFFF, ragged.block_schedule[0] >> 16  # slices and blocks; 65535 and -1 are unused
    (array([    0,     0,     2, 65535], dtype=int32), array([ 0,  1,  0, -1], dtype=int32))
    """
    sizes = np.maximum(slice_sizes, 0).astype(np.int64)
    num_slices = len(sizes)
    shift = schedule_shift(num_slices, num_rows)
    length = max_blocks(num_slices, num_rows)
    block_offsets = np.zeros((len(BLOCK_SIZES), num_slices + 1), np.int64)
    block_schedule = np.full((len(BLOCK_SIZES), length), -1, np.int32 if shift == 16 else np.int64)
    for block_size, offsets, schedule in zip(BLOCK_SIZES, block_offsets, block_schedule, strict=True):
        offsets[1:] = np.cumsum(-(-sizes // block_size))
        positions = np.arange(min(offsets[-1], length))
        slices = np.searchsorted(offsets[1:], positions, side="right")
        schedule[: len(positions)] = positions - offsets[slices] << shift | slices
    slice_offsets = np.concatenate([[0], np.cumsum(sizes)])
    return RaggedMetadata(*(part.astype(np.int32) for part in (sizes, slice_offsets, block_offsets)), block_schedule)
