"""Gating and alignment in one call: a layer needs both before its experts can run."""

from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.align import AlignedBlocks, moe_align_block_size
from numba_moe.reference.gating import TopK
from numba_moe.reference.selection import select_experts


class RoutedTokens(NamedTuple):
    """The chosen experts of each token, and the slots grouped by expert."""

    topk: TopK
    blocks: AlignedBlocks


def route(
    gating_output: np.ndarray,
    top_k: int,
    block_size: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    correction_bias: np.ndarray | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
    expert_scale: np.ndarray | None = None,
    softcap: float = 0.0,
    bias_mode: str = "choice",
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    zero_expert_id: int = -1,
    identity_weights: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
    dispatch: Any = None,
    counts: np.ndarray | None = None,
    counts_enabled: np.ndarray | None = None,
    indices_dtype: Any = "int32",
    expert_map: np.ndarray | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    inactive_expert_id: int = -1,
    num_physical_experts: int | None = None,
) -> RoutedTokens:
    """Choose the experts of each token, and group the slots by expert.

    The parameters are those of `select_experts`, which chooses, and of `moe_align_block_size`, which groups the chosen
    slots. The slots are grouped by `num_physical_experts` if that is given, and otherwise by all real and shared
    experts.

    Examples
    --------
    >>> topk, blocks = route(np.array([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), 2, block_size=2)
    >>> topk.topk_ids
    array([[0, 1],
           [2, 1]], dtype=int32)
    >>> blocks.sorted_token_ids
    array([0, 4, 1, 3, 2, 4, 4], dtype=int32)
    """
    topk = select_experts(
        *(gating_output, top_k),
        scoring_func=scoring_func,
        renormalize=renormalize,
        renormalize_epsilon=renormalize_epsilon,
        correction_bias=correction_bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        group_score=group_score,
        routed_scaling_factor=routed_scaling_factor,
        expert_scale=expert_scale,
        softcap=softcap,
        bias_mode=bias_mode,
        num_fused_shared_experts=num_fused_shared_experts,
        shared_expert_weight=shared_expert_weight,
        apply_routed_scaling_factor_on_output=apply_routed_scaling_factor_on_output,
        num_zero_experts=num_zero_experts,
        zero_expert_id=zero_expert_id,
        identity_weights=identity_weights,
        num_token_non_padded=num_token_non_padded,
        is_padding=is_padding,
        dispatch=dispatch,
        counts=counts,
        counts_enabled=counts_enabled,
        indices_dtype=indices_dtype,
    )
    num_sorted = gating_output.shape[1] - num_zero_experts + num_fused_shared_experts
    rules = (expert_map, pad_sorted_ids, ignore_invalid_experts)
    blocks = moe_align_block_size(
        *(topk.topk_ids, block_size, num_physical_experts or num_sorted, *rules), inactive_expert_id=inactive_expert_id
    )
    return RoutedTokens(topk, blocks)
