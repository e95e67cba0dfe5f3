"""Pad tokens that lie in one batch per expert to whole GEMM blocks."""

import numpy as np
from numba_moe.reference.align import AlignedBlocks
from numba_moe.reference.counting import expert_offsets


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: np.ndarray
) -> AlignedBlocks:
    """Align tokens that lie in one batch per expert, as expert-parallel communication delivers them.

    Parameters
    ----------
    max_tokens_per_batch
        Number of rows of a batch, in use or not.
    block_size
        Rows of one GEMM block.
    expert_num_tokens
        int32 or int64 [num_experts]: the number of rows in use of each batch. A number below 0 counts as 0, and a
        number above `max_tokens_per_batch` counts as `max_tokens_per_batch`.

    Returns
    -------
    AlignedBlocks
        sorted_token_ids: int32 [num_experts * R], where R is `max_tokens_per_batch` rounded up to whole blocks. Row i
        of expert e is ``e * max_tokens_per_batch + i``, and padding is ``num_experts * max_tokens_per_batch``.
        expert_ids: int32 [num_experts * R / block_size], the expert of each block, -1 for unused blocks.
        num_tokens_post_padded: int32 [1], the number of positions in use.

    Examples
    --------
    Expert 0 has 2 of 3 possible rows, expert 1 has none, and expert 2 has all 3. The number 9 is padding:

    >>> blocks = batched_moe_align_block_size(3, 2, np.array([2, 0, 3]))
    >>> blocks.sorted_token_ids
    array([0, 1, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9], dtype=int32)
    >>> blocks.expert_ids
    array([ 0,  2,  2, -1, -1, -1], dtype=int32)
    >>> blocks.num_tokens_post_padded
    array([6], dtype=int32)
    """
    num_experts = len(expert_num_tokens)
    sizes = np.clip(expert_num_tokens, 0, max_tokens_per_batch)
    offsets = expert_offsets(sizes, block_size)
    num_blocks = num_experts * -(-max_tokens_per_batch // block_size)
    sorted_token_ids = np.full(num_blocks * block_size, num_experts * max_tokens_per_batch, np.int32)
    expert_ids = np.full(num_blocks, -1, np.int32)
    for expert, (size, first) in enumerate(zip(sizes, offsets, strict=False)):
        sorted_token_ids[first : first + size] = expert * max_tokens_per_batch + np.arange(size)
        expert_ids[first // block_size : offsets[expert + 1] // block_size] = expert
    return AlignedBlocks(sorted_token_ids, expert_ids, offsets[-1:].astype(np.int32))
