"""`fused_experts` where torch compiles: one op, or where gradients are wanted its steps, each an op.

One op is what the host has least to do for: it counts for few tokens. The steps have their gradients, and there the
GEMMs by expert are torch's grouped one, which the compiler knows, where it is known as torch traces that it serves.
Otherwise they are ops of their own, which choose between it and one GEMM for each expert when they run.
"""

from collections.abc import Callable
from typing import Any

import torch

from numba_moe.activation import activation_backward
from numba_moe.experts import ALIGNMENT, compose, has_grouped, multiply_by_expert, outer_by_expert
from numba_moe.interop import torch_gradients
from numba_moe.runtime import arrays

OPS = torch.ops.numba_moe


def _is_grouped(differentiable: bool, *matrices: torch.Tensor) -> bool:
    first = matrices[0]
    aligned = all(
        matrix.data_ptr() % ALIGNMENT == 0
        and all(size * matrix.dtype.itemsize % ALIGNMENT == 0 for size in matrix.shape[-2:])
        for matrix in matrices
        if matrix.ndim == 3
    )
    wide = all(matrix.numel() and matrix.shape[-1] * matrix.dtype.itemsize % ALIGNMENT == 0 for matrix in matrices)
    return aligned and wide and has_grouped(first.dtype, first.device, differentiable)


@torch.compiler.assume_constant_result
def _device_has_grouped(dtype: torch.dtype, device: torch.device, differentiable: bool) -> bool:
    return has_grouped(dtype, device, differentiable)


def multiply(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _, *sizes = weights.shape
    if (
        not arrays.is_transformed()
        and all(type(size) is int for size in sizes)
        and weights.numel()
        and rows.shape[0] > 0
    ):
        aligned = all(size * weights.dtype.itemsize % ALIGNMENT == 0 for size in sizes)
        if aligned and _device_has_grouped(rows.dtype, rows.device, torch.is_grad_enabled()):
            return multiply_by_expert(rows, weights, ends, grouped=True)
    return torch_gradients.call("multiply_by_expert", rows, weights, ends)


def _multiply(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return multiply_by_expert(rows, weights, ends, _is_grouped(False, rows, weights))


def _outer(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return outer_by_expert(grad, rows, ends, _is_grouped(True, grad, rows))


def _activation_backward(
    gate_up: torch.Tensor,
    grad_activated: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    of_bias: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    by_rows, by_bias = activation_backward(gate_up, grad_activated, offset, bias, of_bias, **options)
    return by_rows, by_rows.new_empty(0) if by_bias is None else by_bias


def _product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], weights.shape[1]))


def _outer_product(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((ends.shape[0], grad.shape[1], rows.shape[1]))


def _differentiated(gate_up: torch.Tensor, *, bias: torch.Tensor | None, of_bias: bool, **_: Any) -> Any:
    return torch.empty_like(gate_up), torch.empty_like(bias) if of_bias and bias is not None else gate_up.new_empty(0)


# Name, schema, what computes it, and tensors like its results.
Step = tuple[str, str, Callable[..., Any], Callable[..., Any]]
STEPS: tuple[Step, ...] = (
    ("multiply_by_expert", "(Tensor rows, Tensor weights, Tensor ends) -> Tensor", _multiply, _product),
    ("outer_by_expert", "(Tensor grad, Tensor rows, Tensor ends) -> Tensor", _outer, _outer_product),
    (
        "activation_backward",
        "(Tensor gate_up, Tensor grad_activated, Tensor? offset, Tensor? bias, str activation, bool? interleaved,"
        " float? limit, float? alpha, bool of_bias) -> (Tensor, Tensor)",
        _activation_backward,
        _differentiated,
    ),
)


def fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return the public function's result, by ops; each checks its own arguments when it runs."""
    floats = (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias)
    if not (torch_gradients.wanted(*floats) or arrays.is_transformed()):
        more = {"expert_map": expert_map, "gate_up_bias": gate_up_bias, "down_bias": down_bias, **options}
        op = torch_gradients.overload(OPS.fused_experts)
        return op(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, **more)
    num_experts = down_proj.shape[0] if expert_map is None else expert_map.shape[0]
    matrices = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    choice = (topk_weights, topk_ids, expert_map)
    return compose(hidden_states, *matrices, *choice, num_experts, options, multiply)
