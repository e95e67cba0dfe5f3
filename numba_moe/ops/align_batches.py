"""Pad tokens that lie in one batch per expert to whole GEMM blocks: `batched_moe_align_block_size`.

The tokens are sorted already, so the padded sizes of the batches determine every position. Each thread block sums the
padded sizes, takes its share of the positions, and finds the batch of each position by bisection.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, int32, int64
from numba_moe.device.instructions import flat, quotient, wait_for_earlier
from numba_moe.device.primitives import WARP, block_sums, first_above
from numba_moe.device.types import Ids, Int32, Int32Array
from numba_moe.reference import batched as reference
from numba_moe.reference.align import AlignedBlocks
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op

THREADS = 512
# A thread writes POSITIONS positions. It writes more where the grid would have over MOST_BLOCKS blocks.
POSITIONS = 4
MOST_BLOCKS = 1024


class Batches(NamedTuple):
    """Tokens in one batch per expert."""

    expert_num_tokens: Ids  # [num_batches]
    num_batches: Int32
    max_tokens: Int32  # rows of a batch, in use or not


class Blocks(NamedTuple):
    """The GEMM blocks, which the kernel writes."""

    sorted_slots: Int32Array  # [num_positions]
    expert_ids: Int32Array  # [num_positions / block_size]
    num_padded: Int32Array  # [1]
    num_positions: Int32
    block_size: Int32
    share: Int32  # positions that a thread block writes


@cuda.jit(launch_bounds=THREADS)
def fill_batches(batches: Batches, blocks: Blocks):
    """Each thread block writes its share of the positions; the grid covers all positions."""
    wait_for_earlier()
    starts = flat(cuda.shared.array(THREADS, int32))
    filled = flat(cuda.shared.array(THREADS, int32))
    ends = flat(cuda.shared.array(THREADS, int32))
    warp_sums = flat(cuda.shared.array(WARP, int32))
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    position = int64(cuda.blockIdx.x) * blocks.share + thread
    share_end = min(int64(cuda.blockIdx.x + 1) * blocks.share, int64(blocks.num_positions))
    base = int32(0)
    first = int32(0)
    while first < batches.num_batches:
        batch = int32(first + thread)
        tokens = int32(0)
        if batch < batches.num_batches:
            tokens = int32(min(max(int64(batches.expert_num_tokens[batch]), int64(0)), int64(batches.max_tokens)))
        padded = int32(quotient(int32(tokens + blocks.block_size - 1), blocks.block_size) * blocks.block_size)
        upto, of_chunk = block_sums(padded, warp_sums, int32)  # its barrier: all threads are done with `ends`
        starts[thread] = base + upto - padded
        filled[thread] = base + upto - padded + tokens
        ends[thread] = base + upto
        cuda.syncthreads()
        base = int32(base + of_chunk)
        end = min(share_end, int64(base))
        while position < end:
            index = first_above(ends, min(threads, int32(batches.num_batches - first)), position)
            slot = int32(batches.num_batches * batches.max_tokens)
            if position < filled[index]:
                slot = int32((first + index) * batches.max_tokens + position - starts[index])
            blocks.sorted_slots[position] = slot
            block = quotient(position, blocks.block_size)
            if int32(block * blocks.block_size) == position:
                blocks.expert_ids[block] = first + index
            position += threads
        first = int32(first + threads)
    while position < share_end:
        blocks.sorted_slots[position] = int32(batches.num_batches * batches.max_tokens)
        block = quotient(position, blocks.block_size)
        if int32(block * blocks.block_size) == position:
            blocks.expert_ids[block] = -1
        position += threads
    if cuda.blockIdx.x == 0 and thread == 0:
        blocks.num_padded[0] = base


@op(reference.batched_moe_align_block_size)
def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: Array, *, out: AlignedBlocks | None = None
) -> AlignedBlocks:
    """Align tokens that lie in one batch per expert, as expert-parallel communication delivers them.

    Parameters
    ----------
    max_tokens_per_batch : int
        Number of rows of a batch, in use or not.
    block_size : int
        Rows of one GEMM block.
    expert_num_tokens : array of int32 or int64, shape [num_experts]
        Number of rows in use of each batch. A number below 0 counts as 0, and a number above `max_tokens_per_batch`
        counts as `max_tokens_per_batch`.
    out : tuple of three arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    AlignedBlocks
        sorted_token_ids : int32 [num_experts * R], where R is `max_tokens_per_batch` rounded up to whole blocks. Row i
        of expert e is ``e * max_tokens_per_batch + i``, and padding is ``num_experts * max_tokens_per_batch``.
        expert_ids : int32 [num_experts * R / block_size], the expert of each block, -1 for unused blocks.
        num_tokens_post_padded : int32 [1], the number of positions in use.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, `block_size` below 1, or more positions than int32 can index.

    Notes
    -----
    The op is one launch on the caller's current stream, and CUDA graphs can capture it. It allocates the results only.
    The signature is that of vLLM's function of this name (release 0.21).

    Examples
    --------
    >>> import numpy as np
    >>> blocks = batched_moe_align_block_size(3, 2, np.array([2, 0, 3]))
    >>> blocks.sorted_token_ids
    array([0, 1, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9], dtype=int32)
    >>> blocks.expert_ids
    array([ 0,  2,  2, -1, -1, -1], dtype=int32)
    """


@batched_moe_align_block_size.outputs
def _(given: Any) -> tuple[Contiguous, ...]:
    num_blocks = given.expert_num_tokens.shape[0] * -(-given.max_tokens_per_batch // given.block_size)
    return tuple(contiguous(torch.int32, size) for size in (num_blocks * given.block_size, num_blocks, 1))


@batched_moe_align_block_size.plan
def _(given: Any) -> Launch:
    checks.array("expert_num_tokens", given.expert_num_tokens, checks.IDS, (1,))
    max_tokens = checks.integer("max_tokens_per_batch", given.max_tokens_per_batch, 0)
    block_size = checks.integer("block_size", given.block_size, 1)
    num_batches = given.expert_num_tokens.shape[0]
    num_positions = num_batches * -(-max_tokens // block_size) * block_size
    checks.fits_int32("expert_num_tokens", num_positions, "the number of padded positions")
    threads = block_threads(THREADS)
    share = max(POSITIONS * threads, -(-num_positions // MOST_BLOCKS))
    batches = Batches(given.expert_num_tokens, num_batches, max_tokens)
    blocks = Blocks(torch.int32, torch.int32, torch.int32, num_positions, block_size, share)
    where = (given.expert_num_tokens.device, max(1, -(-num_positions // share)), threads)
    return Launch(fill_batches, *where, batches, blocks)


@batched_moe_align_block_size.run
def _(fill_batches: Any, given: Any, sorted_token_ids: Any, expert_ids: Any, num_tokens_post_padded: Any) -> None:
    fill_batches(
        expert_num_tokens=given.expert_num_tokens,
        sorted_slots=sorted_token_ids,
        expert_ids=expert_ids,
        num_padded=num_tokens_post_padded,
    )
