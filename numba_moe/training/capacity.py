"""How many tokens an expert takes: slots past its capacity are dropped, or experts choose their tokens."""

from typing import Any

import torch

from numba_moe.ops.permute.layouts import moe_reorder
from numba_moe.reference.capacity import DROP_POLICIES, ExpertChoice
from numba_moe.reference.capacity import expert_capacity as expert_capacity
from numba_moe.reference.gating import TopK
from numba_moe.runtime import checks

SCORING = ("softmax", "sigmoid")


def apply_capacity(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    capacity: int,
    *,
    drop_policy: str = "probs",
) -> TopK:
    """Drop the slots of each expert past its capacity: their ids become -1 and their weights 0.

    Parameters
    ----------
    topk_weights : tensor of float32, float16 or bfloat16, shape [num_tokens, top_k]
        What slots weigh.
    topk_ids : tensor of int32 or int64, of the same shape
        Contiguous. Ids that are no expert's are dropped too.
    num_experts : int
        Number of experts.
    capacity : int
        Slots that an expert keeps; `expert_capacity` computes it from a factor.
    drop_policy : {"probs", "position"}
        "probs": those that weigh most are kept, of equals the first. "position": the first.

    Returns
    -------
    TopK
        Of the shapes and dtypes that are given.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape or layout, unknown `drop_policy`, a negative capacity.

    Notes
    -----
    The same slots at every run. The weights that are kept have their gradient. Nothing synchronises with the host. Rows
    padded to the capacity, as Megatron-LM has them, are what ``moe_permute_masked(..., max_m=capacity)`` makes of the
    ids: every expert then has `capacity` rows.

    Examples
    --------
    >>> import torch
    >>> weights, ids = torch.tensor([[0.5], [0.7], [0.9]]), torch.tensor([[1], [1], [0]])
    >>> apply_capacity(weights, ids, 2, 1).topk_ids.flatten()
    tensor([-1,  1,  0])
    """
    checks.choice("drop_policy", drop_policy, DROP_POLICIES)
    capacity = checks.integer("capacity", capacity, 0)
    check_choice(topk_weights, topk_ids)
    order = None
    if drop_policy == "probs":
        order = topk_weights.detach().reshape(-1).sort(descending=True, stable=True).indices
    limits = torch.full((num_experts,), capacity, dtype=torch.int64, device=topk_ids.device)
    return keep_first(topk_weights, topk_ids, limits, order)


def check_choice(topk_weights: Any, topk_ids: Any) -> None:
    """Check that weights and ids are tensors of one shape."""
    checks.tensor("topk_weights", topk_weights)
    checks.tensor("topk_ids", topk_ids)
    rule = f"of the shape of `topk_ids`, {tuple(topk_ids.shape)}"
    checks.holds("topk_weights", rule, topk_weights.shape == topk_ids.shape, tuple(topk_weights.shape))


def keep_first(topk_weights: torch.Tensor, topk_ids: torch.Tensor, limits: torch.Tensor, order: Any) -> TopK:
    """Keep the first slots of each expert, in an order of the slots or in their own, up to the limit of the expert."""
    ids = topk_ids.reshape(-1) if order is None else topk_ids.reshape(-1)[order]
    num_experts = len(limits)
    reordered = moe_reorder(ids, num_experts)
    places = reordered.src2dst.to(torch.int64)
    experts = ids.to(torch.int64).clamp(0, num_experts - 1)
    kept = (places >= 0) & (places - reordered.seg_indptr[experts] < limits[experts])
    if order is not None:
        kept = torch.zeros_like(kept).scatter(0, order, kept)
    kept = kept.view(topk_ids.shape)
    return TopK(torch.where(kept, topk_weights, 0.0), torch.where(kept, topk_ids, -1))


def expert_choice(
    gating_output: torch.Tensor,
    capacity: int,
    *,
    scoring_func: str = "softmax",
    is_padding: torch.Tensor | None = None,
) -> ExpertChoice:
    """Let each expert choose its tokens (expert choice routing).

    Parameters
    ----------
    gating_output : tensor of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits.
    capacity : int
        Tokens of each expert, at most num_tokens; ``num_tokens * top_k / num_experts`` for as much work as with top_k.
    scoring_func : {"softmax", "sigmoid"}
        How logits become scores: softmax is over the experts of a token.
    is_padding : tensor of bool, shape [num_tokens], optional
        Tokens that are chosen where there is no other, as -1 with weight 0.

    Returns
    -------
    ExpertChoice
        topk_weights : float32 [num_experts, capacity], best first. token_ids : int32 of the same shape.

    Raises
    ------
    TypeError
        `capacity` is no integer.
    ValueError
        Wrong shape, unknown `scoring_func`, a capacity above the number of tokens.

    Notes
    -----
    The lower token wins a tie, so the same tokens are chosen at every run. The weights have a gradient. The choice of a
    token depends on other tokens of its batch, also on later ones, so the router is not causal.

    Examples
    --------
    >>> import torch
    >>> expert_choice(torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0]]).log(), 2).token_ids.tolist()
    [[0, 1], [2, 1]]
    """
    checks.choice("scoring_func", scoring_func, SCORING)
    checks.tensor("gating_output", gating_output)
    checks.holds("gating_output", "of 2 dimensions", gating_output.dim() == 2, f"shape {tuple(gating_output.shape)}")
    num_tokens = gating_output.shape[0]
    capacity = checks.integer("capacity", capacity, 1, num_tokens, f"num_tokens = {num_tokens}")
    if is_padding is not None:
        checks.tensor("is_padding", is_padding, (torch.bool,))
        shape = tuple(is_padding.shape)
        checks.holds("is_padding", f"of shape (num_tokens,) = ({num_tokens},)", shape == (num_tokens,), shape)
    logits = gating_output.float()
    scores = (logits.softmax(1) if scoring_func == "softmax" else logits.sigmoid()).nan_to_num(0.0).T
    ranks = scores.detach()
    if is_padding is not None:
        ranks = ranks.masked_fill(is_padding, -torch.inf)
    tokens = ranks.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    weights = scores.gather(1, tokens)
    if is_padding is not None:
        padded = is_padding[tokens]
        weights, tokens = weights.masked_fill(padded, 0.0), tokens.masked_fill(padded, -1)
    return ExpertChoice(weights, tokens.to(torch.int32))
