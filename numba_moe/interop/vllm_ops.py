"""vLLM's ops that write what they are given, in the argument order of `torch.ops._moe_C` and `vllm._custom_ops`.

Signatures are those of release 0.33; what release 0.21 passes is a first part of them. `numba_moe.interop.vllm` has the
functions that allocate.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

import numba_moe
from numba_moe.interop import into
from numba_moe.interop.composed import chosen_where, float32_bias, local_slots
from numba_moe.interop.into import select_experts as choose_into
from numba_moe.reference.align import max_sorted_slots
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import apart

# vLLM marks the tokens of an image by this many ids, from `image_sentinel_lo` on.
IMAGE_IDS = 5


def signed_ids(topk_ids: torch.Tensor) -> torch.Tensor:
    """Return contiguous ids of 32 bits as int32."""
    ids = topk_ids.view(torch.int32) if topk_ids.dtype == torch.uint32 else topk_ids
    return ids.contiguous()


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


def slot_numbers(like: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the numbers of slots counted column by column, ``k * num_tokens + token``: int32 [num_tokens, top_k]."""
    num_tokens, top_k = like.shape
    numbers = torch.arange(num_tokens * top_k, dtype=torch.int32, device=like.device).view(top_k, num_tokens).t()
    return numbers if out is None else out.copy_(numbers)


def local_experts(n_expert: int, n_local_expert: int) -> int:
    """Return how many experts a rank has; -1 are all of them."""
    return n_expert if n_local_expert == -1 else n_local_expert


def kept_slots(positions: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the number of each slot, or -1 for one without a position, int32, in `out` if it is given."""
    slots = torch.arange(positions.numel(), dtype=torch.int32, device=positions.device, out=out)
    return slots.masked_fill_(positions.ravel() < 0, -1)


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
        kept_slots(inverse, scatter_idx.view(-1))


@apart("sorted_ids", "expert_ids", "num_tokens_post_pad", "scatter_idx")
def fused_globalize_align_block_size(
    topk_idx: torch.Tensor,
    psum: torch.Tensor,
    rank_expert_offset: int,
    global_num_experts: int,
    local_num_experts: int,
    block_size: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """Group the slots that a rank has received by its own experts, and make their ids global in place.

    Ids are those of this rank, of rows below the last number of `psum`; all other ids become -1, and so do those whose
    global id, `rank_expert_offset` more, is not below `global_num_experts`. `scatter_idx`, if given, gets the number of
    each slot, -1 for one that is skipped. Masking is by torch, in front of the one alignment.
    """
    rows = torch.arange(topk_idx.shape[0], dtype=torch.int32, device=topk_idx.device)[:, None]
    last = min(local_num_experts, global_num_experts - rank_expert_offset)
    received = (topk_idx >= 0) & (topk_idx < last) & (rows < psum[-1])
    local = torch.where(received, topk_idx, -1)
    outputs = (sorted_ids, expert_ids, num_tokens_post_pad)
    _align(-1, local, local_num_experts, block_size, *outputs, None, scatter_idx)
    topk_idx.add_(rank_expert_offset).masked_fill_(~received, -1)


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
    memory = {"sorted_token_ids": sorted_ids, "expert_ids": expert_ids, "num_tokens_post_padded": num_tokens_post_pad}
    into.call(numba_moe.batched_moe_align_block_size, memory, max_tokens_per_batch, block_size, expert_num_tokens)


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
    slot_numbers(topk_ids, token_expert_indices)


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
    choose_into(topk_weights, topk_ids, gating_output, **options)
    slot_numbers(topk_ids, token_expert_indices)


@apart("topk_weights", "topk_ids", "token_expert_indices")
def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: torch.Tensor | None = None,
) -> None:
    """Choose experts by sigmoid scores; rows that `is_padding` marks get id -1 and weight 0.

    A logit of +inf is not finite, and so comes last with weight 0.
    """
    options: dict[str, Any] = {"renormalize": renormalize, "routed_scaling_factor": routed_scaling_factor}
    options |= {"correction_bias": float32_bias(e_score_correction_bias), "is_padding": is_padding}
    logits = scored_by_sigmoid(gating_output)
    choose_into(topk_weights, topk_ids, logits, scoring_func="sigmoid", **options)
    slot_numbers(topk_ids, token_expert_indices)


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
    is_padding: torch.Tensor | None = None,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
) -> None:
    """Choose experts by the square roots of softplus scores, or weigh those that a table has for each input token.

    Tokens of an image, which `image_sentinel_lo` and the next four ids are, go by `bias_vl` instead; 0 is no such id.
    Rows that `is_padding` marks get id -1 and weight 0.
    """
    options: dict[str, Any] = {"renormalize": renormalize, "routed_scaling_factor": routed_scaling_factor}
    options |= {"scoring_func": "softplus_sqrt", "is_padding": is_padding}
    by_bias = (e_score_correction_bias, bias_vl, image_sentinel_lo)
    found = choose_by_bias_or_table(
        gating_output, topk_indices.shape[1], input_tokens, hash_indices_table, *by_bias, **options
    )
    _write_choice(found, topk_weights, topk_indices, token_expert_indices)


def choose_by_bias_or_table(
    gating_output: torch.Tensor,
    top_k: int,
    input_tokens: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bias_vl: torch.Tensor | None,
    image_sentinel_lo: int,
    **options: Any,
) -> numba_moe.TopK:
    """Return the experts by the table if there is one, else by the bias; those of an image's tokens by `bias_vl`.

    The choice by `bias_vl` is a second launch, as ours takes one bias.
    """
    given = input_tokens is not None
    checks.holds("input_tokens", "given with `bias_vl`", given or bias_vl is None, input_tokens)
    if given and table is not None:
        found = numba_moe.weigh_experts(gating_output, table.contiguous(), input_ids=input_tokens, **options)
    else:
        found = numba_moe.select_experts(gating_output, top_k, correction_bias=float32_bias(bias), **options)
    first = checks.integer("image_sentinel_lo", image_sentinel_lo, 0)
    if input_tokens is None or bias_vl is None or first == 0:
        return found
    of_images = numba_moe.select_experts(gating_output, top_k, correction_bias=float32_bias(bias_vl), **options)
    return chosen_where((input_tokens >= first) & (input_tokens < first + IMAGE_IDS), of_images, found)


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
        topk_ids = torch.where(local_slots(topk_ids, expert_map), 0, -1).to(topk_ids.dtype)
    into.moe_sum(output, input, topk_ids)


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
    checks.holds("topk", f"the columns of `topk_ids`, {topk_ids.shape[1]}", topk == topk_ids.shape[1], topk)
    memory = {
        "permuted_hidden_states": permuted_hidden_states,
        "expert_first_token_offset": _offsets(expert_first_token_offset, n_expert, n_local_expert),
        "inv_permuted_idx": inv_permuted_idx,
        "permuted_idx": permuted_idx,
    }
    into.call(numba_moe.moe_permute, memory, hidden_states, signed_ids(topk_ids), n_expert, expert_map)


def moe_permute_with_scratch(
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
    sort_workspace: torch.Tensor,
    permuted_experts_id: torch.Tensor,
    sorted_row_idx: torch.Tensor,
    topk_ids_for_sort: torch.Tensor,
) -> None:
    """Copy rows into expert order: `moe_permute`. The last four are vLLM's scratch, which holds nothing afterwards."""
    outputs = (permuted_hidden_states, expert_first_token_offset, inv_permuted_idx, permuted_idx)
    moe_permute(*(hidden_states, topk_ids, token_expert_indices, expert_map, n_expert, n_local_expert, topk), *outputs)


@apart("expert_first_token_offset", "scatter_idx")
def moe_prepare_scatter(
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    expert_map: torch.Tensor | None,
    n_expert: int,
    n_local_expert: int,
    expert_first_token_offset: torch.Tensor,
    scatter_idx: torch.Tensor,
    sort_workspace: torch.Tensor,
    permuted_experts_id: torch.Tensor,
    sorted_row_idx: torch.Tensor,
    topk_ids_for_sort: torch.Tensor,
) -> None:
    """Write the row of each slot in expert order, -1 for one that is skipped, and the first row of each expert.

    The last four are vLLM's scratch, which holds nothing afterwards.
    """
    write_rows(topk_ids, expert_map, n_expert, n_local_expert, expert_first_token_offset, scatter_idx)


def write_rows(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    n_expert: int,
    n_local_expert: int,
    expert_first_token_offset: torch.Tensor,
    scatter_idx: torch.Tensor,
) -> None:
    """Write where experts begin, and the row of each slot."""
    offset = _offsets(expert_first_token_offset, n_expert, n_local_expert)
    memory = {"seg_indptr": offset, "src2dst": scatter_idx}
    into.call(numba_moe.moe_reorder, memory, signed_ids(topk_ids), n_expert, expert_map)


def _offsets(given: torch.Tensor, n_expert: int, n_local_expert: int) -> torch.Tensor:
    """Return memory for the first row of each of this rank's experts, and where the last one's end."""
    length = 1 + local_experts(n_expert, n_local_expert)
    checks.holds("len(expert_first_token_offset)", f"{length}, one more than experts", len(given) == length, len(given))
    return given


@apart("hidden_states")
def moe_unpermute(
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None,
    topk: int,
    hidden_states: torch.Tensor,
) -> None:
    """Sum each token's rows, weighted, into the last argument; rows past the last offset are not in use.

    The rows may be in any shape: callers view them as [num_tokens, topk, hidden] too.
    """
    rows = permuted_hidden_states.reshape(-1, permuted_hidden_states.shape[-1])
    index = inv_permuted_idx.view(-1, topk)
    if expert_first_token_offset is not None:  # vLLM's own index has rows for slots of other ranks, after all others
        index = torch.where(index < expert_first_token_offset[-1], index, -1)
    into.moe_unpermute(hidden_states, rows, topk_weights.contiguous(), index.contiguous())


# What of this is in `vllm._custom_ops`, by the same name and with the same arguments.
OF_CUSTOM_OPS = (
    *("moe_align_block_size", "batched_moe_align_block_size", "moe_lora_align_block_size"),
    *("topk_softmax", "topk_sigmoid", "topk_hash_softplus_sqrt", "grouped_topk", "moe_sum"),
    "fused_globalize_align_block_size",
)
