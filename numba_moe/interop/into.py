"""Our ops into memory that peers' functions are given: by `out=`, or copied where that cannot take it.

It takes contiguous memory of the result's dtype, in calls that want no gradient.
"""

from typing import Any

import torch

from numba_moe.ops.gating import select
from numba_moe.ops.permute import permutation
from numba_moe.reference.gating import TopK
from numba_moe.reference.permute import PermutedTokens

ID_DTYPES = (torch.int32, torch.int64)


def takes(outs: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether memory can be given as `out=` to a call."""
    wants_gradient = torch.is_grad_enabled()
    if not all(out.is_contiguous() and not (wants_gradient and out.requires_grad) for out in outs):
        return False
    return not wants_gradient or not any(array is not None and array.requires_grad for array in inputs)


def moe_sum(
    out: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sum each token's rows into `out`, [num_tokens, hidden]: `numba_moe.moe_sum`."""
    options: dict[str, Any] = {"routed_scaling_factor": routed_scaling_factor, "out_dtype": out.dtype}
    if takes((out,), (hidden_states,)):
        permutation.moe_sum(hidden_states, topk_ids, out=out, **options)
    else:
        out.copy_(permutation.moe_sum(hidden_states, topk_ids, **options))


def moe_unpermute(
    out: torch.Tensor,
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sum each token's rows, weighted, into `out`, [num_tokens, hidden]: `numba_moe.moe_unpermute`."""
    options: dict[str, Any] = {"routed_scaling_factor": routed_scaling_factor, "out_dtype": out.dtype}
    arrays = (permuted, topk_weights, inv_permuted_idx)
    if takes((out,), arrays):
        permutation.moe_unpermute(*arrays, out=out, **options)
    else:
        out.copy_(permutation.moe_unpermute(*arrays, **options))


def moe_permute(
    out: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> PermutedTokens:
    """Copy rows into expert order into `out`, [num_tokens * top_k, hidden], and return it with the rest.

    `numba_moe.moe_permute` is the rest.
    """
    arguments = (hidden_states, topk_ids, num_experts, expert_map)
    if not takes((out,), (hidden_states, scales)):
        found = permutation.moe_permute(*arguments, scales=scales)
        return found._replace(permuted_hidden_states=out.copy_(found.permuted_hidden_states))
    declaration = permutation.moe_permute.declaration
    named = dict(zip(declaration.names, arguments, strict=False)) | {"scales": scales}
    _, *others = declaration.new_results(declaration.given_of(named))
    return permutation.moe_permute(*arguments, scales=scales, out=PermutedTokens(out, *others))


def select_experts(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    *,
    correction_bias: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """Write the weights and ids of each token's experts, [num_tokens, top_k]: `numba_moe.select_experts`."""
    given = {"correction_bias": correction_bias, **options}
    outs, top_k = (topk_weights, topk_ids), topk_ids.shape[1]
    direct = topk_weights.dtype == torch.float32 and topk_ids.dtype in ID_DTYPES
    if direct and takes(outs, (gating_output, correction_bias)):
        indices = "int64" if topk_ids.dtype == torch.int64 else "int32"
        select.select_experts(gating_output, top_k, **given, indices_dtype=indices, out=TopK(*outs))
        return
    found = select.select_experts(gating_output, top_k, **given)
    topk_weights.copy_(found.topk_weights)
    topk_ids.copy_(found.topk_ids)
