"""Group slots by LoRA adapter and expert: one alignment for each adapter."""

import numpy as np
from numba_moe.reference.align import AlignedBlocks, max_sorted_slots, moe_align_block_size


def moe_lora_align_block_size(
    topk_ids: np.ndarray,
    token_lora_mapping: np.ndarray,
    block_size: int,
    num_experts: int,
    max_loras: int,
    adapter_enabled: np.ndarray | None = None,
    lora_ids: np.ndarray | None = None,
    expert_map: np.ndarray | None = None,
    pad_sorted_ids: bool = False,
    *,
    inactive_expert_id: int = -1,
) -> AlignedBlocks:
    """Align the slots of each LoRA adapter's tokens separately.

    Parameters
    ----------
    topk_ids
        int32 or int64 [num_tokens, top_k]; ids outside ``[0, num_experts)`` are skipped.
    token_lora_mapping
        int32 or int64 [num_tokens]: the adapter of each token. A number outside ``[0, max_loras)``, such as -1, means
        no adapter, and the token is skipped.
    block_size
        Rows of one GEMM block.
    num_experts
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    max_loras
        Number of adapters.
    adapter_enabled
        int32 [max_loras] or longer: 0 for an adapter whose tokens are skipped.
    lora_ids
        int32 [any]: the adapters in use, in any order; -1 names none. Tokens of all other adapters are skipped.
    expert_map
        int32 or int64 [num_experts]: this rank's id of each expert, -1 for an expert of another rank, whose slots are
        skipped. Slots are grouped by this rank's ids.
    pad_sorted_ids
        Round the row length of `sorted_token_ids` up to a multiple of the block size.
    inactive_expert_id
        Value of `expert_ids` after the last block in use.

    Returns
    -------
    AlignedBlocks
        The results of `moe_align_block_size` for the slots of each adapter, one row per adapter. sorted_token_ids:
        int32 [max_loras, max_sorted_slots]. expert_ids: int32 [max_loras, ceil(max_sorted_slots / block_size)].
        num_tokens_post_padded: int32 [max_loras]. The row of an adapter without slots is all padding.

    Examples
    --------
    Tokens 0 and 2 use adapter 1, and token 1 uses none. Slots 0 and 5 go to expert 0, slots 1 and 4 to expert 1:

    >>> ids = np.array([[0, 1], [0, 1], [1, 0]])
    >>> blocks = moe_lora_align_block_size(ids, np.array([1, -1, 1]), 2, 2, max_loras=2)
    >>> blocks.sorted_token_ids
    array([[6, 6, 6, 6, 6, 6, 6, 6],
           [0, 5, 1, 4, 6, 6, 6, 6]], dtype=int32)
    >>> blocks.expert_ids
    array([[-1, -1, -1, -1],
           [ 0,  1, -1, -1]], dtype=int32)
    >>> blocks.num_tokens_post_padded
    array([0, 4], dtype=int32)
    """
    length = max_sorted_slots(topk_ids.size, block_size, num_experts, pad_sorted_ids)
    shapes = (max_loras, length), (max_loras, -(-length // block_size)), (max_loras, 1)
    out = AlignedBlocks(*(np.empty(shape, np.int32) for shape in shapes))
    for adapter, rows in enumerate(zip(*out, strict=True)):
        in_use = lora_ids is None or adapter in lora_ids
        enabled = adapter_enabled is None or adapter_enabled[adapter] != 0
        of_adapter = (token_lora_mapping == adapter) & in_use & enabled
        ids = np.where(of_adapter[:, None], topk_ids, -1)
        options = (expert_map, pad_sorted_ids, expert_map is not None)
        moe_align_block_size(ids, block_size, num_experts, *options, inactive_expert_id=inactive_expert_id, out=rows)
    return out._replace(num_tokens_post_padded=out.num_tokens_post_padded.ravel())
