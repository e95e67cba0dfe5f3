"""vLLM's ops that write what they are given, in the argument order of `torch.ops._moe_C` and `vllm._custom_ops`.

Arguments behind those of release 0.21 are of later ones. `numba_moe.interop.vllm` has the functions that allocate.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

import numba_moe
from numba_moe.reference.align import max_sorted_slots
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import apart


def signed_ids(topk_ids: torch.Tensor) -> torch.Tensor:
    """Return contiguous ids of 32 bits as int32."""
    ids = topk_ids.view(torch.int32) if topk_ids.dtype == torch.uint32 else topk_ids
    return ids.contiguous()


def float32_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def scored_by_sigmoid(gating_output: torch.Tensor) -> torch.Tensor:
    """Return logits that our sigmoid scores as vLLM does: an infinite one counts as NaN, is last and weighs 0."""
    return gating_output.nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=-torch.inf)


def align_into(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """Align into memory as peers allocate it, who leave out a last block that is not whole, or have one more."""
    given = -(-sorted_token_ids.numel() // block_size) if block_size else 0
    length = experts_ids.numel()
    names = experts_ids if length == given else experts_ids.new_empty(given)
    if length < given:
        needed = max_sorted_slots(topk_ids.numel(), block_size, num_experts) // block_size
        checks.at_least("len(experts_ids)", length, needed, "the blocks that any routing fills")
    out = (sorted_token_ids, names, num_tokens_post_pad)
    numba_moe.moe_align_block_size(topk_ids, block_size, num_experts, expert_map, out=out, **options)
    if names is not experts_ids:
        experts_ids[:given].copy_(names[:length])
        experts_ids[given:].fill_(options.get("inactive_expert_id", -1))


def slot_numbers(like: torch.Tensor) -> torch.Tensor:
    """Return the numbers of slots counted column by column, ``k * num_tokens + token``: int32 [num_tokens, top_k]."""
    num_tokens, top_k = like.shape
    return torch.arange(num_tokens * top_k, dtype=torch.int32, device=like.device).view(top_k, num_tokens).t()


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """Group slots by expert, by this rank's ids if there is a map.

    `scatter_idx`, if given, gets the number of each slot, -1 for one that is skipped.
    """
    outputs = (sorted_token_ids, experts_ids, num_tokens_post_pad)
    _align(-1, topk_ids, num_experts, block_size, *outputs, expert_map, scatter_idx)


def aligning(inactive_expert_id: int) -> Callable[..., None]:
    """Return `moe_align_block_size` with another id past the last block in use."""

    @functools.wraps(moe_align_block_size)
    def align(*args: Any, **kwargs: Any) -> None:
        _align(inactive_expert_id, *args, **kwargs)

    return align


@apart("sorted_token_ids", "experts_ids", "num_tokens_post_pad", "scatter_idx")
def _align(
    inactive_expert_id: int,
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    ids = signed_ids(topk_ids)
    inverse = None if scatter_idx is None else torch.empty_like(ids, dtype=torch.int32)
    align_into(
        *(ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad, expert_map),
        ignore_invalid_experts=True,
        inactive_expert_id=inactive_expert_id,
        inv_sorted_idx=inverse,
    )
    if scatter_idx is not None and inverse is not None:
        slots = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
        scatter_idx.copy_(torch.where(inverse.ravel() < 0, -1, slots).view(scatter_idx.shape))


@apart("sorted_ids", "expert_ids", "num_tokens_post_pad")
def batched_moe_align_block_size(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: torch.Tensor,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> None:
    """Align one batch for each expert."""
    found = numba_moe.batched_moe_align_block_size(max_tokens_per_batch, block_size, expert_num_tokens)
    for given, part in zip((sorted_ids, expert_ids, num_tokens_post_pad), found, strict=True):
        given.copy_(part)


@apart("sorted_token_ids", "experts_ids", "num_tokens_post_pad")
def moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    adapter_enabled: torch.Tensor,
    lora_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Align the slots of each adapter's tokens; rows of adapters that are not in use are padding, and written too."""
    found = numba_moe.moe_lora_align_block_size(
        *(signed_ids(topk_ids), token_lora_mapping, block_size, num_experts, max_loras),
        *(adapter_enabled, lora_ids, expert_map),
    )
    given = sorted_token_ids.view(max_loras, max_num_tokens_padded), experts_ids.view(max_loras, max_num_m_blocks)
    for rows, part, padding in zip(given, found, (topk_ids.numel(), -1), strict=False):
        length = min(rows.shape[1], part.shape[1])
        rows[:, :length].copy_(part[:, :length])
        rows[:, length:].fill_(padding)
    num_tokens_post_pad.copy_(found.num_tokens_post_padded)


def _write_choice(
    found: numba_moe.TopK, topk_weights: torch.Tensor, topk_ids: torch.Tensor, token_expert_indices: torch.Tensor
) -> None:
    topk_weights.copy_(found.topk_weights)
    topk_ids.copy_(found.topk_ids)
    token_expert_indices.copy_(slot_numbers(topk_ids))


@apart("topk_weights", "topk_ids", "token_expert_indices")
def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """Choose experts by softmax scores; rows that `is_padding` marks get id -1 and weight 0."""
    bias = float32_bias(e_score_correction_bias)
    options: dict[str, Any] = {"renormalize": renormalize, "correction_bias": bias, "is_padding": is_padding}
    found = numba_moe.select_experts(gating_output, topk_ids.shape[1], **options)
    _write_choice(found, topk_weights, topk_ids, token_expert_indices)


@apart("topk_weights", "topk_ids", "token_expert_indices")
def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """Choose experts by sigmoid scores; rows that `is_padding` marks get id -1 and weight 0.

    A logit of +inf is not finite, and so comes last with weight 0.
    """
    bias = float32_bias(e_score_correction_bias)
    options: dict[str, Any] = {"renormalize": renormalize, "correction_bias": bias, "is_padding": is_padding}
    logits = scored_by_sigmoid(gating_output)
    found = numba_moe.select_experts(logits, topk_ids.shape[1], scoring_func="sigmoid", **options)
    _write_choice(found, topk_weights, topk_ids, token_expert_indices)


@apart("topk_weights", "topk_indices", "token_expert_indices")
def topk_hash_softplus_sqrt(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
    input_tokens: torch.Tensor | None = None,
    hash_indices_table: torch.Tensor | None = None,
) -> None:
    """Choose experts by the square roots of softplus scores, or weigh those that a table has for each input token."""
    options: dict[str, Any] = {"renormalize": renormalize, "routed_scaling_factor": routed_scaling_factor}
    if input_tokens is not None and hash_indices_table is not None:
        table = hash_indices_table.contiguous()
        found = numba_moe.weigh_experts(
            gating_output, table, input_ids=input_tokens, scoring_func="softplus_sqrt", **options
        )
    else:
        options["correction_bias"] = float32_bias(e_score_correction_bias)
        top_k = topk_indices.shape[1]
        found = numba_moe.select_experts(gating_output, top_k, scoring_func="softplus_sqrt", **options)
    _write_choice(found, topk_weights, topk_indices, token_expert_indices)


topk_softplus_sqrt = topk_hash_softplus_sqrt  # what `torch.ops._moe_C` calls it


@apart("output")
def moe_sum(
    input: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Sum each token's rows; those of ids below 0, or that the map lacks or sends there, add nothing."""
    if topk_ids is not None and expert_map is not None:
        known = (topk_ids >= 0) & (topk_ids < len(expert_map))
        local = expert_map[topk_ids.where(known, 0).long()]
        topk_ids = torch.where(known & (local >= 0), 0, -1).to(topk_ids.dtype)
    output.copy_(numba_moe.moe_sum(input, topk_ids, out_dtype=output.dtype))


def grouped_topk(
    scores: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor,
    scoring_func: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose groups by the sum of their best two ``score + bias``, then experts; with 1, `scores` are logits."""
    logits = scored_by_sigmoid(scores) if scoring_func == 1 else scores
    found = numba_moe.grouped_topk(
        *(logits, topk, num_expert_group, topk_group, renormalize),
        scoring_func=("raw", "sigmoid")[scoring_func],
        correction_bias=float32_bias(bias),
        group_score="top2_sum",
        routed_scaling_factor=routed_scaling_factor,
    )
    return found.topk_weights, found.topk_ids


@apart("permuted_hidden_states", "expert_first_token_offset", "inv_permuted_idx", "permuted_idx")
def moe_permute(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    expert_map: torch.Tensor | None,
    n_expert: int,
    n_local_expert: int,
    topk: int,
    permuted_hidden_states: torch.Tensor,
    expert_first_token_offset: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    permuted_idx: torch.Tensor,
) -> None:
    """Copy rows into expert order; `token_expert_indices` and `topk` say nothing that shapes do not."""
    from numba_moe.interop import vllm

    given = permuted_hidden_states
    parts = vllm.moe_permute(hidden_states, None, topk_ids, n_expert, n_local_expert, expert_map, given)
    expert_first_token_offset.copy_(parts[2])
    inv_permuted_idx.copy_(parts[3].view(inv_permuted_idx.shape))
    permuted_idx.copy_(parts[4])


@apart("hidden_states")
def moe_unpermute(
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None,
    topk: int,
    hidden_states: torch.Tensor,
) -> None:
    """Sum each token's rows, weighted, into the last argument; rows past the last offset are not in use."""
    index = inv_permuted_idx.view(-1, topk)
    if expert_first_token_offset is not None:  # vLLM's own index has rows for slots of other ranks, behind all others
        index = torch.where(index < expert_first_token_offset[-1], index, -1)
    hidden_states.copy_(numba_moe.moe_unpermute(permuted_hidden_states, topk_weights.contiguous(), index.contiguous()))


# What of this is in `vllm._custom_ops`, by the same name and with the same arguments.
OF_CUSTOM_OPS = (
    *("moe_align_block_size", "batched_moe_align_block_size", "moe_lora_align_block_size"),
    *("topk_softmax", "topk_sigmoid", "topk_hash_softplus_sqrt", "grouped_topk", "moe_sum"),
)
