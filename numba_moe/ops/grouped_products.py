"""Rows in expert order times the matrices of their experts, with gradients.

torch's grouped GEMM takes them, where a device has it without the host reading where the rows of experts end;
otherwise one GEMM for each expert does.
"""

import itertools
from typing import Any

import torch

from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Layout, layout

# torch.nn.functional has it from 2.10 on.
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
GROUPED_ARCHITECTURES = (9, 10)
# There the gradient of a matrix without rows is not zero (torch 2.10).
WRONG_EMPTY_GRADIENTS = 10
ALIGNMENT = 16


def has_grouped(dtype: torch.dtype, device: torch.device, differentiable: bool) -> bool:
    """Whether the device has a grouped GEMM for which the host need not read where the rows of experts begin."""
    if _grouped_mm is None or device.type != "cuda" or dtype != torch.bfloat16:
        return False
    major = torch.cuda.get_device_capability(device)[0]
    return major in GROUPED_ARCHITECTURES and not (differentiable and major == WRONG_EMPTY_GRADIENTS)


def product_by_expert(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Return rows times the transposed matrices of their experts, in one GEMM or one for each expert."""
    if grouped:
        return _grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    last = ends.tolist()
    sizes = [end - begin for begin, end in zip([0, *last], [*last, rows.shape[0]], strict=True)]
    *parts, unused = rows.split(sizes)
    products = [torch.mm(part, weight.T) for part, weight in zip(parts, weights.unbind(), strict=True)]
    return torch.cat([*products, unused.new_zeros(sizes[-1], weights.shape[1])])


def is_grouped(differentiable: bool, *matrices: Layout) -> bool:
    """Whether one grouped GEMM takes these matrices."""
    first = matrices[0]
    aligned = all(
        matrix.address % ALIGNMENT == 0
        and all(size * matrix.dtype.itemsize % ALIGNMENT == 0 for size in matrix.shape[-2:])
        for matrix in matrices
        if len(matrix.shape) == 3
    )
    wide = all(
        matrix.shape.numel() and matrix.shape[-1] * matrix.dtype.itemsize % ALIGNMENT == 0 for matrix in matrices
    )
    return aligned and wide and has_grouped(first.dtype, first.device, differentiable)


@op()
def multiply_by_expert(rows: Array, weights: Array, ends: Array) -> Any:
    """Multiply rows up to ``ends[0]`` by ``weights[0].T``, and so on; what becomes of rows past the last is undefined.

    Parameters
    ----------
    rows : array, shape [num_rows, columns]
        Rows in expert order.
    weights : array, shape [num_experts, width, columns]
        The matrix of each expert.
    ends : array of int32, shape [num_experts]
        Where the rows of each expert end. The host reads it unless one grouped GEMM serves.

    Returns
    -------
    array of the dtype of `rows`, shape [num_rows, width]
    """


@multiply_by_expert.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.rows.dtype, given.rows.shape[0], given.weights.shape[1])


@multiply_by_expert.plan
def _(given: Any) -> bool:
    return is_grouped(False, given.rows, given.weights)


@multiply_by_expert.compute
def _(grouped: bool, given: Any) -> torch.Tensor:
    return product_by_expert(given.rows, given.weights, given.ends, grouped)


@multiply_by_expert.saves
def _(ctx: Any, given: Any, _product: Any) -> None:
    ctx.save_for_backward(given.rows, given.weights, given.ends)


@multiply_by_expert.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    rows, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    by_rows, by_weights = ctx.needs_input_grad[:2]
    return {
        "rows": multiply_by_expert(grad, weights.transpose(1, 2), ends) if by_rows else None,
        "weights": outer_by_expert(grad, rows, ends) if by_weights else None,
    }


@op(is_gradient=True)
def outer_by_expert(grad: Array, rows: Array, ends: Array) -> Any:
    """Return the gradient of the weights of `multiply_by_expert`: ``grad[begin:end].T @ rows[begin:end]`` of each.

    Parameters
    ----------
    grad : array, shape [num_rows, width]
        The gradient by the products.
    rows : array, shape [num_rows, columns]
        What was multiplied.
    ends : array of int32, shape [num_experts]
        Where the rows of each expert end. The host reads it unless one grouped GEMM serves.

    Returns
    -------
    array of the dtype of `rows`, shape [num_experts, width, columns]
    """


@outer_by_expert.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.rows.dtype, given.ends.shape[0], given.grad.shape[1], given.rows.shape[1])


@outer_by_expert.plan
def _(given: Any) -> bool:
    return is_grouped(True, given.grad, given.rows)


@outer_by_expert.compute
def _(grouped: bool, given: Any) -> torch.Tensor:
    if grouped:
        return _grouped_mm(given.grad.T, given.rows, offs=given.ends)
    products = given.rows.new_empty(len(given.ends), given.grad.shape[1], given.rows.shape[1])
    for product, rows in zip(products, rows_of_experts(given.ends), strict=True):
        torch.mm(given.grad[rows].T, given.rows[rows], out=product)
    return products


def rows_of_experts(ends: torch.Tensor) -> list[slice]:
    """Return where the rows of each expert are; the host waits for the device."""
    return [slice(*pair) for pair in itertools.pairwise([0, *ends.tolist()])]


def add_outer_by_expert(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, sums: torch.Tensor) -> None:
    """Add what `outer_by_expert` returns to sums of any float dtype, without its memory but for the grouped GEMM's."""
    if is_grouped(True, *map(layout, (grad, rows))):
        sums += outer_by_expert(grad, rows, ends)  # torch's adds to nothing
        return
    for products, own in zip(sums, rows_of_experts(ends), strict=True):
        if sums.dtype == rows.dtype:
            products.addmm_(grad[own].T, rows[own])
        else:
            products += torch.mm(grad[own].T, rows[own])
