"""Our ops into memory that peers' functions are given: by `out=`, or copied where that cannot take it.

It takes contiguous memory of the result's dtype, in calls that want no gradient.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from numba_moe.ops.gating import select
from numba_moe.ops.permute import permutation
from numba_moe.reference.gating import TopK
from numba_moe.runtime.arrays import Contiguous

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


def call(op: Any, memory: Mapping[str, torch.Tensor], *arguments: Any, **options: Any) -> Any:
    """Call an op that returns several arrays, and write some of them, by name, into memory that is given.

    Offsets, which ops return as int64, may be fewer, or int32; they are copied, and so is all where a gradient is
    wanted.
    """
    tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
    if memory and takes(tuple(memory.values()), tuple(tensors)):
        declaration = op.declaration
        kind = declaration.result.kind
        specs = declaration.outputs(declaration.given_of(declaration.named(arguments, options)))
        named = zip(kind._fields, specs, strict=True)
        out = kind(*(spec and _fitting(memory.get(name), spec, tensors[0]) for name, spec in named))
        found = op(*arguments, **options, out=out)
    else:
        found = op(*arguments, **options)
    for name, given in memory.items():
        part = getattr(found, name)
        if part.data_ptr() != given.data_ptr():
            part = part[: given.numel()] if part.dtype == torch.int64 else part
            given.copy_(part.view(given.shape))
    return found


def _fitting(given: torch.Tensor | None, spec: Contiguous, like: torch.Tensor) -> torch.Tensor:
    """Return given memory in the shape of a result, or new memory."""
    if given is not None and given.dtype == spec.dtype and given.numel() == math.prod(spec.shape):
        return given.view(spec.shape)
    if given is None or spec.dtype == torch.int64:
        return like.new_empty(spec.shape, dtype=spec.dtype)
    return given  # which the op refuses


def select_experts(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    *,
    correction_bias: torch.Tensor | None = None,
    num_fused_shared_experts: int = 0,
    **options: Any,
) -> None:
    """Write the weights and ids of each token's slots, [num_tokens, num_slots]: `numba_moe.select_experts`."""
    given = {"correction_bias": correction_bias, "num_fused_shared_experts": num_fused_shared_experts, **options}
    outs, top_k = (topk_weights, topk_ids), topk_ids.shape[1] - num_fused_shared_experts
    direct = topk_weights.dtype == torch.float32 and topk_ids.dtype in ID_DTYPES
    if direct and takes(outs, (gating_output, correction_bias)):
        indices = "int64" if topk_ids.dtype == torch.int64 else "int32"
        select.select_experts(gating_output, top_k, **given, indices_dtype=indices, out=TopK(*outs))
        return
    found = select.select_experts(gating_output, top_k, **given)
    topk_weights.copy_(found.topk_weights)
    topk_ids.copy_(found.topk_ids)
