"""Mixture-of-Experts routing in NumPy: what every op of numba_moe computes, written to be read.

Start with `counting`, then `align`, `gating` and `permute`; README.md beside this file has the contract.
"""

from numba_moe.reference.align import AlignedBlocks, moe_align_block_size
from numba_moe.reference.counting import count_tokens_per_expert, expert_offsets
from numba_moe.reference.gating import TopK, grouped_topk, topk_sigmoid, topk_softmax
from numba_moe.reference.permute import PermutedTokens, moe_permute, moe_unpermute

__all__ = [
    "AlignedBlocks",
    "PermutedTokens",
    "TopK",
    "count_tokens_per_expert",
    "expert_offsets",
    "grouped_topk",
    "moe_align_block_size",
    "moe_permute",
    "moe_unpermute",
    "topk_sigmoid",
    "topk_softmax",
]
