"""vLLM's functions by their names and parameters, on our kernels, and `patch`, which puts them into an installed vLLM.

Signatures are those of release 0.33; what release 0.21 passes is a first part of them. Results are vLLM's but for what
a caller can rely on more: slots are in order inside an expert, ids that are no expert's are skipped everywhere, ties go
to the lower id, logits of 16 bits are scored in float32. `numba_moe.interop.vllm_ops` has the ops that write what they
are given.

With NUMBA_MOE_VLLM=1 in the environment vLLM patches itself, in every process, as this package registers a plugin.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import numba_moe
from numba_moe.interop import into, vllm_ops
from numba_moe.interop.composed import float32_bias, real_tokens, weighted_sum
from numba_moe.interop.patching import Patch
from numba_moe.interop.vllm_ops import scored_by_sigmoid, signed_ids
from numba_moe.ops.dispatch import dispatch_ids
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import apart

Blocks = tuple[torch.Tensor, ...]
# Experts of a token in DeepSeek V4, whose gate has no such parameter.
DSV4_TOP_K = 6


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> Blocks:
    """Group slots by expert, padded to blocks: `numba_moe.moe_align_block_size`.

    With `return_scatter_idx` a fourth result, int32 [num_slots, 1], has the number of each slot, -1 for one that is
    skipped.
    """
    options = (expert_map, pad_sorted_ids, ignore_invalid_experts, return_scatter_idx)
    return _align(-1, topk_ids, block_size, num_experts, *options)


def _align(
    inactive_expert_id: int,
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> Blocks:
    checks.boolean("return_scatter_idx", return_scatter_idx)
    ids = signed_ids(topk_ids)
    options: dict[str, Any] = {"inactive_expert_id": inactive_expert_id}
    if return_scatter_idx:
        if expert_map is not None and not ignore_invalid_experts:
            raise ValueError("`ignore_invalid_experts` must be True with `return_scatter_idx` and a map, got False")
        options["inv_sorted_idx"] = positions = torch.empty_like(ids, dtype=torch.int32)
    rules = (expert_map, pad_sorted_ids, ignore_invalid_experts)
    blocks = tuple(numba_moe.moe_align_block_size(ids, block_size, num_experts, *rules, **options))
    return (*blocks, vllm_ops.kept_slots(positions).view(-1, 1)) if return_scatter_idx else blocks


def _aligning(inactive_expert_id: int) -> Callable[..., Blocks]:
    """Return `moe_align_block_size` with another id past the last block in use."""

    @functools.wraps(moe_align_block_size)
    def align(*args: Any, **kwargs: Any) -> Blocks:
        return _align(inactive_expert_id, *args, **kwargs)

    return align


def fused_globalize_align_block_size(
    recv_topk_idx: torch.Tensor,
    psum_recv_per_rank: torch.Tensor,
    rank_expert_offset: int,
    global_num_experts: int,
    local_num_experts: int,
    block_size: int,
    return_scatter_idx: bool = False,
) -> Blocks:
    """Group the slots that a rank has received by its own experts, and make their ids global in place.

    `vllm_ops.fused_globalize_align_block_size` says which are kept. Returned are the ids, the three results of an
    alignment and, if asked for, what `moe_align_block_size` returns as the fourth.
    """
    checks.boolean("return_scatter_idx", return_scatter_idx)
    length, blocks, _ = numba_moe.align_sizes(recv_topk_idx.numel(), block_size, local_num_experts)
    lengths = (length, blocks, 1)
    found = [torch.empty(size, dtype=torch.int32, device=recv_topk_idx.device) for size in lengths]
    if return_scatter_idx:
        found.append(torch.empty((recv_topk_idx.numel(), 1), dtype=torch.int32, device=recv_topk_idx.device))
    vllm_ops.fused_globalize_align_block_size(
        *(recv_topk_idx, psum_recv_per_rank, rank_expert_offset, global_num_experts, local_num_experts, block_size),
        *found,
    )
    return (recv_topk_idx, *found)


def batched_moe_align_block_size(max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor) -> Blocks:
    """Align one batch for each expert: `numba_moe.batched_moe_align_block_size`."""
    return tuple(numba_moe.batched_moe_align_block_size(max_tokens_per_batch, block_size, expert_num_tokens))


def fused_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    scoring_func: str = "softmax",
) -> Blocks:
    """Choose experts by softmax or sigmoid scores; the third result numbers the slots column by column.

    Rows that vLLM's forward context calls padding get id -1 and weight 0, unless VLLM_MOE_SKIP_PADDING=0 says
    otherwise. By sigmoid scores a logit of +inf is not finite, and so comes last with weight 0.
    """
    _same_tokens(hidden_states, gating_output)
    if scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(f"Unsupported scoring function: {scoring_func}")
    as_int32 = indices_type in (None, torch.uint32)
    options: dict[str, Any] = {"renormalize": renormalize, "indices_dtype": torch.int32 if as_int32 else indices_type}
    options["is_padding"] = padding_of(gating_output.shape[0])
    logits = scored_by_sigmoid(gating_output) if scoring_func == "sigmoid" else gating_output
    found = numba_moe.select_experts(logits, topk, scoring_func=scoring_func, **options)
    topk_ids = found.topk_ids.view(torch.uint32) if indices_type == torch.uint32 else found.topk_ids
    return found.topk_weights, topk_ids, vllm_ops.slot_numbers(topk_ids)


def padding_of(num_tokens: int) -> torch.Tensor | None:
    """Return which tokens vLLM runs for their number alone, as graphs need it, where it says so and skips them."""
    envs, context = sys.modules.get("vllm.envs"), sys.modules.get("vllm.forward_context")
    if envs is None or context is None or not getattr(envs, "VLLM_MOE_SKIP_PADDING", False):
        return None
    if not context.is_forward_context_available():
        return None
    is_padding = getattr(context.get_forward_context(), "is_padding", None)
    return None if is_padding is None else is_padding[:num_tokens]


def dsv4_topk(
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    indices_dtype: torch.dtype,
    routed_scaling_factor: float,
    is_padding: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose six experts by the square roots of softplus scores and a bias, and renormalise: DeepSeek V4's gate.

    `vllm_ops.topk_hash_softplus_sqrt` says which tokens go by `bias_vl`.
    """
    options: dict[str, Any] = {"scoring_func": "softplus_sqrt", "renormalize": True, "is_padding": is_padding}
    options |= {"routed_scaling_factor": routed_scaling_factor, "indices_dtype": indices_dtype}
    by_bias = (correction_bias, bias_vl, image_sentinel_lo)
    found = vllm_ops.choose_by_bias_or_table(gating_output, DSV4_TOP_K, input_ids, None, *by_bias, **options)
    return found.topk_weights, found.topk_ids


@apart("expert_load_view")
def eplb_map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace ids by those of places, picked by a hash of the token's index, and count these in `expert_load_view`.

    Nothing is counted where `record_enabled` is False on the device, nor for tokens from `num_unpadded_tokens` on. Ids
    of no expert, and of experts without a place, become -1. vLLM's tables are made int32, and the mask is made, by
    torch.
    """
    ids = signed_ids(topk_ids)
    replicas = logical_replica_count.clamp(1, logical_to_physical_map.shape[1]).to(torch.int32)
    places = logical_to_physical_map.to(torch.int32).contiguous()
    physical = dispatch_ids(ids, places, replicas, algorithm="hash")
    counted = record_enabled.view(1, 1) != 0
    if num_unpadded_tokens is not None:
        counted = counted & real_tokens(physical, "num_unpadded_tokens", num_unpadded_tokens)
    expert_load_view += numba_moe.count_tokens_per_expert(torch.where(counted, physical, -1), len(expert_load_view))
    return physical.view(topk_ids.dtype)


def remap_topk_to_local(
    topk_ids: torch.Tensor, expert_map: torch.Tensor, *, out_dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Replace ids by those of this rank, -1 for experts of other ranks and for ids of no expert."""
    if out_dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`out_dtype` must be torch.int32 or torch.int64, got {out_dtype}")
    return dispatch_ids(signed_ids(topk_ids).to(out_dtype), expert_map.to(torch.int32))


@apart("outputs")
def moe_fused_mul_sum(
    inputs: torch.Tensor,
    topk_weights: torch.Tensor,
    outputs: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum each token's rows of `inputs`, [num_tokens, top_k, hidden], weighted, into `outputs` if there is such.

    Slots of ids below 0, and of experts that the map lacks or sends there, add nothing, whatever their rows hold.
    `outputs` keep the rows of tokens from `num_valid_tokens` on, a number on the device, and of those without an id of
    0 or more; these rows are zeros where none are given.
    """
    checks.holds("topk_ids", "given with `expert_map`", expert_map is None or topk_ids is not None, None)
    return weighted_sum(inputs, topk_weights, outputs, topk_ids, expert_map, num_valid_tokens)


def grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose groups and then experts: by the sum of a group's best two with a bias, by its best without one."""
    _same_tokens(hidden_states, gating_output)
    if scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(f"Unsupported scoring function: {scoring_func}")
    logits = scored_by_sigmoid(gating_output) if scoring_func == "sigmoid" else gating_output
    found = numba_moe.grouped_topk(
        *(logits, topk, num_expert_group, topk_group, renormalize),
        scoring_func=scoring_func,
        correction_bias=float32_bias(e_score_correction_bias),
        routed_scaling_factor=routed_scaling_factor,
    )
    return found.topk_weights, found.topk_ids


@apart("permuted_hidden_states")
def moe_permute(
    hidden_states: torch.Tensor,
    a1q_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: torch.Tensor | None = None,
    permuted_hidden_states: torch.Tensor | None = None,
    scratch: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy rows into expert order; scales of rows go with them. Slots of other ranks have row -1, their rows are 0.

    Indices and offsets are written into `scratch`, a MoEPermuteScratch of vLLM's, if there is one, and so are the rows
    where it has memory for them and none is given.
    """
    scales = a1q_scale if a1q_scale is not None and a1q_scale.dim() > 1 else None
    ids = signed_ids(topk_ids)
    local = vllm_ops.local_experts(n_expert, n_local_expert)
    memory = {} if permuted_hidden_states is None else {"permuted_hidden_states": permuted_hidden_states}
    if scratch is not None:
        _check_scratch(scratch, n_expert, local)
        _reserve(scratch, ids.numel())
        rows = getattr(scratch, "permuted_hidden_states", None)  # of a release before 0.33
        if rows is not None and permuted_hidden_states is None:
            shape = (ids.numel(), hidden_states.shape[1])
            memory["permuted_hidden_states"] = rows[: math.prod(shape)].view(shape)
        memory["expert_first_token_offset"] = scratch.expert_first_token_offset
        memory["inv_permuted_idx"] = scratch.inv_permuted_idx[: ids.numel()]
        memory["permuted_idx"] = scratch.permuted_idx[: ids.numel()]
    found = into.call(numba_moe.moe_permute, memory, hidden_states, ids, n_expert, expert_map, scales=scales)
    named = {"expert_first_token_offset": found.expert_first_token_offset[: local + 1]}
    named = found._asdict() | named | memory
    a1q_scale = a1q_scale if scales is None else found.permuted_scales
    moved = (named["permuted_hidden_states"], a1q_scale, named["expert_first_token_offset"])
    return *moved, named["inv_permuted_idx"].flatten(), named["permuted_idx"]


def moe_prepare_scatter(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, scratch: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the first row of each expert and the row of each slot into `scratch`, a MoEPermuteScratch, and return them.

    The order is that of `moe_permute`, whose sort alone this is; skipped slots have row -1.
    """
    _reserve(scratch, topk_ids.numel())
    offset = scratch.expert_first_token_offset
    rows = scratch.inv_permuted_idx[: topk_ids.numel()].view(topk_ids.shape)
    sizes = (scratch.num_experts, scratch.num_local_experts)
    vllm_ops.write_rows(topk_ids, expert_map, *sizes, offset, rows)
    return offset, rows


def _check_scratch(scratch: Any, n_expert: int, n_local_expert: int) -> None:
    """Check that scratch belongs to a layer with this number of experts."""
    for name, number in (("num_experts", n_expert), ("num_local_experts", n_local_expert)):
        given = getattr(scratch, name)
        checks.holds(f"scratch.{name}", f"that of the call, {number}", given == number, given)


def _reserve(scratch: Any, num_slots: int) -> None:
    """Make scratch long enough for a call; before release 0.33 it has its length from the start."""
    if hasattr(scratch, "reserve"):
        scratch.reserve(num_slots)
    else:
        checks.at_least("scratch.max_expanded_rows", scratch.max_expanded_rows, num_slots, "the slots of the call")


@apart("out")
def moe_unpermute(
    out: torch.Tensor,
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None = None,
) -> None:
    """Sum each token's rows, weighted, into `out`; rows past the last offset are not in use."""
    top_k = topk_weights.shape[1]
    vllm_ops.moe_unpermute(
        permuted_hidden_states, topk_weights, inv_permuted_idx, expert_first_token_offset, top_k, out
    )


def count_expert_num_tokens(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None
) -> torch.Tensor:
    """Count the slots of each of this rank's experts."""
    num_experts = num_local_experts if expert_map is None else max(num_local_experts, expert_map.shape[0])
    if expert_map is not None and expert_map.shape[0] < num_experts:  # more of this rank than there are in all
        expert_map = torch.nn.functional.pad(expert_map, (0, num_experts - expert_map.shape[0]), value=-1)
    return numba_moe.count_tokens_per_expert(topk_ids.contiguous(), num_experts, expert_map)[:num_local_experts]


def _same_tokens(hidden_states: torch.Tensor, gating_output: torch.Tensor) -> None:
    if hidden_states.shape[0] != gating_output.shape[0]:
        rule = f"of {hidden_states.shape[0]} tokens, like `hidden_states`"
        raise ValueError(f"`gating_output` must be {rule}, got {gating_output.shape[0]}")


LAYERS = "vllm.model_executor.layers.fused_moe"
PATCH = Patch(
    ["vllm"],
    {
        f"{LAYERS}.moe_align_block_size": {
            "moe_align_block_size": moe_align_block_size,
            "batched_moe_align_block_size": batched_moe_align_block_size,
        },
        f"{LAYERS}.fused_globalize_align_block_size": {
            "fused_globalize_align_block_size": fused_globalize_align_block_size
        },
        f"{LAYERS}.router.fused_topk_router": {"fused_topk": fused_topk},
        f"{LAYERS}.router.grouped_topk_router": {"grouped_topk": grouped_topk},
        f"{LAYERS}.router.dsv4_topk": {"dsv4_topk": dsv4_topk},
        f"{LAYERS}.router.base_router": {"eplb_map_to_physical_and_record": eplb_map_to_physical_and_record},
        f"{LAYERS}.moe_permute_unpermute": {
            "moe_permute": moe_permute,
            "moe_prepare_scatter": moe_prepare_scatter,
            "moe_unpermute": moe_unpermute,
        },
        f"{LAYERS}.moe_fused_mul_sum": {"moe_fused_mul_sum": moe_fused_mul_sum},
        f"{LAYERS}.utils": {
            "count_expert_num_tokens": count_expert_num_tokens,
            "remap_topk_to_local": remap_topk_to_local,
        },
        "vllm._custom_ops": {name: getattr(vllm_ops, name) for name in vllm_ops.OF_CUSTOM_OPS},
    },
)


def patch(names: Sequence[str] | None = None, *, inactive_expert_id: int = -1) -> list[str]:
    """Put our functions into the installed vLLM, wherever its modules hold its own.

    Parameters
    ----------
    names : sequence of str, optional
        Only these, "moe_align_block_size" for instance; by default all that this vLLM has.
    inactive_expert_id : int
        What `expert_ids` of an alignment hold past the last block in use: -1 as in release 0.21 and later, or 0 as
        in earlier ones.

    Returns
    -------
    list of str
        What was replaced, each by its module and name.

    Raises
    ------
    ImportError
        vLLM is not installed.
    ValueError
        A name that is not among the functions, that this vLLM lacks, or whose parameters here are unknown to ours.

    Notes
    -----
    Modules that are not loaded yet take what they import from those that are patched. Functions whose parameters are
    unknown to ours, as a later release may have them, stay vLLM's, and a warning is logged. A second call replaces what
    is new, and the alignments by those that write its `inactive_expert_id`. Results that differ by our contract are
    listed in docs/put-it-in.md.
    """
    tail = checks.integer("inactive_expert_id", inactive_expert_id, -(2**31))
    ours = (moe_align_block_size, vllm_ops.moe_align_block_size)
    instead = {} if tail == -1 else dict(zip(ours, (_aligning(tail), vllm_ops.aligning(tail)), strict=True))
    return PATCH.apply(names, instead)


def unpatch() -> None:
    """Put vLLM's own functions back."""
    PATCH.undo()


def plugin() -> Any:
    """Patch if NUMBA_MOE_VLLM=1 asks for it: what vLLM calls in every process that it starts."""
    return patch() if os.environ.get("NUMBA_MOE_VLLM") == "1" else None
