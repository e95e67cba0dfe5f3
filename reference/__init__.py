"""Mixture-of-Experts routing in NumPy: what every op of numba_moe computes, written to be read.

Start with `counting`, then `align`, `gating` and `permute`; `batched`, `lora` and `ragged` are kinds of alignment;
where experts live is in `deepseek`, `refine`, `forecast`, `rebalance`, `balancer` and `migration`, and `dispatch` sends
tokens there, which `parallel` follows through all ranks.
`recorder` says what counts of chosen experts mean; `training` has losses, `capacity` what experts take.
README.md beside this file has the contract.
"""

from numba_moe.reference.activation import moe_activation
from numba_moe.reference.align import AlignedBlocks, moe_align_block_size
from numba_moe.reference.balancer import layers_worth_moving
from numba_moe.reference.batched import batched_moe_align_block_size
from numba_moe.reference.capacity import ExpertChoice, apply_capacity, expert_capacity, expert_choice, token_rounding
from numba_moe.reference.counting import count_tokens_per_expert, expert_offsets
from numba_moe.reference.dispatch import DispatchTables, dispatch_ids
from numba_moe.reference.experts import fused_experts
from numba_moe.reference.gating import (
    TopK,
    grouped_topk,
    topk_raw,
    topk_sigmoid,
    topk_softmax,
    topk_softplus_sqrt,
)
from numba_moe.reference.lora import moe_lora_align_block_size
from numba_moe.reference.maps import make_expert_map
from numba_moe.reference.migration import pair_ranks, plan_migration, preserve_intragpu_slots
from numba_moe.reference.parallel import DispatchedTokens, DispatchLayout, dispatch_layout
from numba_moe.reference.permute import (
    MaskedTokens,
    PermutedTokens,
    ReorderedSlots,
    moe_permute,
    moe_permute_masked,
    moe_reorder,
    moe_sum,
    moe_unpermute,
)
from numba_moe.reference.ragged import RaggedMetadata, make_ragged_metadata
from numba_moe.reference.rebalance import RebalancedExperts, balancedness, rank_loads, rebalance_experts
from numba_moe.reference.recorder import (
    add_expert_counts,
    coactivation,
    expert_entropy,
    logical_counts,
    traffic_matrix,
    utilization,
)
from numba_moe.reference.routing import RoutedTokens, route
from numba_moe.reference.selection import select_experts, weigh_experts
from numba_moe.reference.training import (
    SequenceCounts,
    count_by_sequence,
    load_balancing_loss,
    router_losses,
    update_correction_bias,
    z_loss,
)
from numba_moe.reference.without_matrices import constant_experts

__all__ = [
    "AlignedBlocks",
    "DispatchLayout",
    "DispatchTables",
    "DispatchedTokens",
    "ExpertChoice",
    "MaskedTokens",
    "PermutedTokens",
    "RaggedMetadata",
    "RebalancedExperts",
    "ReorderedSlots",
    "RoutedTokens",
    "SequenceCounts",
    "TopK",
    "add_expert_counts",
    "apply_capacity",
    "balancedness",
    "batched_moe_align_block_size",
    "coactivation",
    "constant_experts",
    "count_by_sequence",
    "count_tokens_per_expert",
    "dispatch_ids",
    "dispatch_layout",
    "expert_capacity",
    "expert_choice",
    "expert_entropy",
    "expert_offsets",
    "fused_experts",
    "grouped_topk",
    "layers_worth_moving",
    "load_balancing_loss",
    "logical_counts",
    "make_expert_map",
    "make_ragged_metadata",
    "moe_activation",
    "moe_align_block_size",
    "moe_lora_align_block_size",
    "moe_permute",
    "moe_permute_masked",
    "moe_reorder",
    "moe_sum",
    "moe_unpermute",
    "pair_ranks",
    "plan_migration",
    "preserve_intragpu_slots",
    "rank_loads",
    "rebalance_experts",
    "route",
    "router_losses",
    "select_experts",
    "token_rounding",
    "topk_raw",
    "topk_sigmoid",
    "topk_softmax",
    "topk_softplus_sqrt",
    "traffic_matrix",
    "update_correction_bias",
    "utilization",
    "weigh_experts",
    "z_loss",
]
