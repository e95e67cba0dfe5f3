"""vLLM's functions by their names and parameters, on our kernels, and `patch`, which puts them into an installed vLLM.

Signatures are those of release 0.21, with what later ones add behind. Results are vLLM's but for what a caller can rely
on more: slots are in order inside an expert, ids that are no expert's are skipped everywhere, ties go to the lower id,
logits of 16 bits are scored in float32. `numba_moe.interop.vllm_ops` has the ops that write what they are given.

With NUMBA_MOE_VLLM=1 in the environment vLLM patches itself, in every process, as this package registers a plugin.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

import numba_moe
from numba_moe.interop import vllm_ops
from numba_moe.interop.patching import Patch
from numba_moe.interop.vllm_ops import float32_bias, scored_by_sigmoid, signed_ids
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import apart

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> Blocks:
    """Group slots by expert, padded to blocks: `numba_moe.moe_align_block_size`."""
    options = (expert_map, pad_sorted_ids, ignore_invalid_experts)
    return tuple(numba_moe.moe_align_block_size(signed_ids(topk_ids), block_size, num_experts, *options))


def _aligning(inactive_expert_id: int) -> Callable[..., Blocks]:
    """Return `moe_align_block_size` with another id past the last block in use."""

    @functools.wraps(moe_align_block_size)
    def align(topk_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Blocks:
        kwargs["inactive_expert_id"] = inactive_expert_id
        return tuple(numba_moe.moe_align_block_size(signed_ids(topk_ids), *args, **kwargs))

    return align


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

    By sigmoid scores a logit of +inf is not finite, and so comes last with weight 0.
    """
    _same_tokens(hidden_states, gating_output)
    if scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(f"Unsupported scoring function: {scoring_func}")
    as_int32 = indices_type in (None, torch.uint32)
    options: dict[str, Any] = {"renormalize": renormalize, "indices_dtype": torch.int32 if as_int32 else indices_type}
    logits = scored_by_sigmoid(gating_output) if scoring_func == "sigmoid" else gating_output
    found = numba_moe.select_experts(logits, topk, scoring_func=scoring_func, **options)
    topk_ids = found.topk_ids.view(torch.uint32) if indices_type == torch.uint32 else found.topk_ids
    return found.topk_weights, topk_ids, vllm_ops.slot_numbers(topk_ids)


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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy rows into expert order; scales of rows go with them. Slots of other ranks have row -1, their rows are 0."""
    scales = a1q_scale if a1q_scale is not None and a1q_scale.dim() > 1 else None
    ids = signed_ids(topk_ids)
    found = numba_moe.moe_permute(hidden_states, ids, n_expert, expert_map, scales=scales)
    rows, offset = found.permuted_hidden_states, found.expert_first_token_offset
    if permuted_hidden_states is not None:
        rows = permuted_hidden_states.copy_(rows)
    if n_local_expert != -1:
        offset = offset[: n_local_expert + 1]
    a1q_scale = a1q_scale if scales is None else found.permuted_scales
    return rows, a1q_scale, offset, found.inv_permuted_idx.flatten(), found.permuted_idx


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
        rule = f"of as many tokens as `hidden_states`, {hidden_states.shape[0]}"
        raise ValueError(f"`gating_output` must be {rule}, got {gating_output.shape[0]}")


LAYERS = "vllm.model_executor.layers.fused_moe"
PATCH = Patch(
    ["vllm"],
    {
        f"{LAYERS}.moe_align_block_size": {
            "moe_align_block_size": moe_align_block_size,
            "batched_moe_align_block_size": batched_moe_align_block_size,
        },
        f"{LAYERS}.router.fused_topk_router": {"fused_topk": fused_topk},
        f"{LAYERS}.router.grouped_topk_router": {"grouped_topk": grouped_topk},
        f"{LAYERS}.moe_permute_unpermute": {"moe_permute": moe_permute, "moe_unpermute": moe_unpermute},
        f"{LAYERS}.utils": {"count_expert_num_tokens": count_expert_num_tokens},
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
        A name that is not among the functions.

    Notes
    -----
    Modules that are not loaded yet take what they import from those that are patched. A second call replaces what is
    new, and the alignments by those that write its `inactive_expert_id`. Results that differ by our contract are listed
    in docs/put-it-in.md.
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
