"""Rows moved and combined into memory that is given, for callers whose own functions write what they are given.

Each does what the public function of its name does. Where a call is not for a kernel at once, as torch traces it, a
gradient is wanted or the reference answers, and where the memory is not what a kernel can write, the result is copied.
"""

import contextlib
from typing import Any

import torch

from numba_moe import permute
from numba_moe.reference.permute import PermutedTokens
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Tensor
from numba_moe.runtime.plans import layout

HERE = contextlib.nullcontext()


def kernel_writes(outs: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a kernel can write the memory, of torch's own tensors that nobody traces or differentiates."""
    if arrays.is_traced() or arrays.is_jit_tracing() or arrays.num_modes() or arrays.forward_ad._current_level >= 0:
        return False
    wants_gradient = torch.is_grad_enabled()
    for out in outs:
        if type(out) is not Tensor or not out.is_contiguous() or out.data_ptr() % 16:
            return False
        if wants_gradient and out.requires_grad:
            return False
    for array in inputs:
        if array is not None and (type(array) is not Tensor or (wants_gradient and array.requires_grad)):
            return False
    return not arrays.answered_by_reference(outs[0])


def on_device(tensor: torch.Tensor) -> Any:
    """Return a context in which a tensor's device is torch's current one."""
    device = tensor.get_device()
    return HERE if device < 0 or device == arrays.current_device() else torch.cuda.device(device)


def _check(out: torch.Tensor, expected: arrays.Contiguous) -> None:
    """Check that the memory is of the size of the result, and say to autograd that it is written."""
    checks.changeable("out", out)
    checks.array("out", layout(out), (expected.dtype,), (len(expected.shape),))
    checks.shape("out", layout(out), expected.shape, "that of the result")
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def moe_sum(
    out: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sum each token's rows into `out`, [num_tokens, hidden]: `numba_moe.moe_sum`."""
    if not kernel_writes((out,), (hidden_states, topk_ids)):
        options: dict[str, Any] = {"routed_scaling_factor": routed_scaling_factor, "out_dtype": out.dtype}
        out.copy_(permute.moe_sum(hidden_states, topk_ids, **options))
        return
    result, combine = permute.plan_sum(layout(hidden_states), layout(topk_ids), routed_scaling_factor, out.dtype)
    _check(out, result)
    with on_device(out):
        combine(rows=hidden_states, places=topk_ids, combined=out)


def moe_unpermute(
    out: torch.Tensor,
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sum each token's rows, weighted, into `out`, [num_tokens, hidden]: `numba_moe.moe_unpermute`."""
    if not kernel_writes((out,), (permuted, topk_weights, inv_permuted_idx)):
        options: dict[str, Any] = {"routed_scaling_factor": routed_scaling_factor, "out_dtype": out.dtype}
        out.copy_(permute.moe_unpermute(permuted, topk_weights, inv_permuted_idx, **options))
        return
    inputs = layout(permuted), layout(topk_weights), layout(inv_permuted_idx)
    result, combine = permute.plan_unpermute(*inputs, routed_scaling_factor, out.dtype)
    _check(out, result)
    with on_device(out):
        combine(rows=permuted, topk_weights=topk_weights, places=inv_permuted_idx, combined=out)


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
    if not kernel_writes((out,), (hidden_states, topk_ids, expert_map, scales)):
        found = permute.moe_permute(hidden_states, topk_ids, num_experts, expert_map, scales=scales)
        return found._replace(permuted_hidden_states=out.copy_(found.permuted_hidden_states))
    shape = (topk_ids.numel(), hidden_states.shape[-1])
    _check(out, arrays.contiguous(hidden_states.dtype, *shape))
    with on_device(out):
        return permute.permute_rows(hidden_states, topk_ids, num_experts, expert_map, scales, None, True, out)
