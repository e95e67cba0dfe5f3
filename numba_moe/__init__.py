"""Mixture-of-Experts routing in Python: Numba CUDA kernels, each beside a NumPy reference that defines it.

Public names load on first use: importing the package imports neither torch nor CUDA.
"""

from numba_moe import lazy

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "block": "MoEBlock",
        "ops.activation.activate": "moe_activation",
        "ops.align": "align_sizes moe_align_block_size",
        "ops.align_adapters": "moe_lora_align_block_size",
        "ops.align_batches": "batched_moe_align_block_size",
        "ops.count": "count_tokens_per_expert expert_offsets",
        "ops.experts": "fused_experts",
        "ops.gating.choose": "grouped_topk topk_raw topk_sigmoid topk_softmax topk_softplus_sqrt",
        "ops.gating.select": "select_experts weigh_experts",
        "ops.permute.layouts": "moe_permute_masked moe_reorder",
        "ops.permute.permutation": "moe_permute moe_sum moe_unpermute",
        "ops.ragged": "make_ragged_metadata",
        "ops.route": "route",
        "ops.without_matrices": "constant_experts",
        "reference.align": "AlignedBlocks",
        "reference.gating": "TopK",
        "reference.permute": "MaskedTokens PermutedTokens ReorderedSlots",
        "reference.ragged": "RaggedMetadata",
        "reference.routing": "RoutedTokens",
        "runtime.observe": "set_log_level",
        "runtime.workspace": "BumpAllocator",
    },
)
