"""Experts whose matrices' gradients are added to `.grad` by the products themselves."""

from typing import Any

import torch

from numba_moe.ops.experts import TENSORS, differentiate, fused_experts, fused_experts_keeping
from numba_moe.ops.grouped_products import add_outer_by_expert, multiply_by_expert, outer_by_expert
from numba_moe.runtime import checks, torch_library
from numba_moe.runtime.torch_private import Asked, asked_of, is_transformed

MATRICES = ("gate_up_proj", "down_proj")


def _accumulate(matrix: Any, grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> None:
    """Add the gradient of a matrix to its `main_grad`, or to its `grad`, as autograd would."""
    sums = getattr(matrix, "main_grad", None)
    if sums is not None:
        add_outer_by_expert(grad, rows, ends, sums)
        if hasattr(matrix, "grad_added_to_main_grad"):
            matrix.grad_added_to_main_grad = True
    elif matrix.grad is not None:
        add_outer_by_expert(grad, rows, ends, matrix.grad)
    else:
        made = outer_by_expert(grad, rows, ends).to(getattr(matrix, "grad_dtype", None) or matrix.dtype)
        is_alike = made.stride() == matrix.stride()
        matrix.grad = made if is_alike else torch.empty_like(matrix, dtype=made.dtype).copy_(made)


def _gradient(matrix: Any, asked: Asked, grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> Any:
    """Do what is asked with the gradient of a matrix: add it, return it, or nothing."""
    if asked is Asked.RETURN:
        return outer_by_expert(grad, rows, ends)
    if asked is Asked.ADD:
        _accumulate(matrix, grad, rows, ends)
    return None


class _IntoGrad(torch.autograd.Function):
    """The experts in torch's graph; backward returns no gradient of the matrices, and adds it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        *arrays, first, second, options = arguments
        declaration = fused_experts_keeping.declaration
        given: dict[str, Any] = {**dict(zip(TENSORS, arrays, strict=True)), **options}
        found = fused_experts_keeping(**given)
        assert declaration.saves is not None
        declaration.saves(ctx, declaration.given_of(given), *found)
        ctx.matrices = {"gate_up_proj": first, "down_proj": second}
        return found.combined

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch_library.of_first_order("fused_experts_into_grad", _backward)(ctx, grad)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    names = (*TENSORS[:1], "", "", *TENSORS[3:], *MATRICES)
    needed = {name for name, needs in zip(names, ctx.needs_input_grad, strict=False) if needs}
    asked = {name: asked_of(matrix) for name, matrix in ctx.matrices.items() if name in needed}
    wanted = {name for name in needed if asked.get(name) is not Asked.LEAVE}

    def by_matrix(name: str, by_products: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> Any:
        return _gradient(ctx.matrices[name], asked[name], by_products, rows, ends)

    found = differentiate(ctx, grad, wanted, by_matrix)
    return *(found.get(name) for name in names), None


def check_leaves(hidden_states: Any, *matrices: Any) -> None:
    """Check that backward can add to the gradients of matrices."""
    for name, array in zip(("hidden_states", *MATRICES), (hidden_states, *matrices), strict=True):
        checks.tensor(name, array)
    checks.holds("hidden_states", "outside of torch.func's transforms", not is_transformed(), "one within")
    for name, matrix in zip(MATRICES, matrices, strict=True):
        checks.holds(name, "a parameter, or another leaf of the graph", matrix.is_leaf, "the result of an operation")


class _ProductIntoGrad(torch.autograd.Function):
    """Rows times the matrices of their experts; backward adds the gradient of the matrices."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, matrix: Any) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, ends)
        ctx.matrix = matrix
        product: torch.Tensor = multiply_by_expert(rows, weights, ends)
        return product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch_library.of_first_order("multiply_into_grad", _backward_of_product)(ctx, grad)


def _backward_of_product(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (rows, weights, ends), grad = ctx.saved_tensors, grad.contiguous()
    by_rows, *_, by_matrix = ctx.needs_input_grad
    return (
        multiply_by_expert(grad, weights.transpose(1, 2), ends) if by_rows else None,
        None,
        None,
        _gradient(ctx.matrix, asked_of(ctx.matrix), grad, rows, ends) if by_matrix else None,
    )


@torch.compiler.disable
def multiply_into_grad(rows: torch.Tensor, matrix: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Do what `multiply_by_expert` does for a leaf of any dtype, to whose `.grad` backward adds the gradient itself."""
    product: torch.Tensor = _ProductIntoGrad.apply(rows, matrix.detach().to(rows.dtype), ends, matrix)
    return product


@torch.compiler.disable  # a graph that is compiled ahead writes no `.grad`
def fused_experts_into_grad(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
) -> torch.Tensor:
    """Do what `fused_experts` does; backward adds the gradients of both matrices to their `.grad` itself.

    Megatron-LM calls this gradient accumulation fusion, and TransformerEngine fused wgrad accumulation. Where several
    backward passes add up to one step, no second array of the size of the matrices is needed beside `.grad`.

    Parameters
    ----------
    hidden_states : tensor of float32, float16 or bfloat16, shape [num_tokens, hidden]
        As in `fused_experts`, as are `topk_weights`, `topk_ids`, and the others.
    gate_up_proj, down_proj : tensor of any of these dtypes
        The matrices: parameters, or other leaves of torch's graph. They are converted to the dtype of `hidden_states`.
    topk_weights, topk_ids : tensor, shape [num_tokens, top_k]
        The choice.
    activation : str
        The activation.
    expert_map, gate_up_bias, down_bias : tensor, optional
        Biases have gradients of the ordinary kind.
    interleaved, limit, alpha, beta, linear_beta : optional
        Options of the activation.

    Returns
    -------
    tensor of the dtype of `hidden_states`, shape [num_tokens, hidden]

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        As `fused_experts`; a matrix that is the result of an operation; a transform of torch.func.

    Notes
    -----
    - A matrix with an attribute `main_grad`, of any float dtype, has its gradient added there, and
      `grad_added_to_main_grad` becomes True if it is there too: Megatron-LM's names.
    - Otherwise it is added to `.grad`. The first pass makes it if it is None, of the dtype that autograd gives it.
    - One GEMM for each expert adds by itself where both dtypes are the same, in float32 with one rounding. torch's
      grouped GEMM cannot, so there the product is an array of the size of the matrix for a moment.
    - A hook of a matrix gets None and not the gradient. One after accumulation finds the sum (torch 2.13), so
      DistributedDataParallel and FSDP2 reduce it. `torch.autograd.grad` returns the gradients that it is asked for, and
      adds none.
    - torch.compile breaks its graph here, and refuses with ``fullgraph=True``. Activation checkpointing is served. A
      second derivative is an error.

    Examples
    --------
    >>> import torch
    >>> first, second = (torch.ones(1, *shape, requires_grad=True) for shape in ((2, 1), (1, 1)))
    >>> for _ in range(2):
    ...     rows, weights, ids = torch.ones(3, 1), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    ...     fused_experts_into_grad(rows, first, second, weights, ids, activation="relu2").sum().backward()
    >>> second.grad.flatten()
    tensor([6.])
    """
    matrices = (gate_up_proj, down_proj)
    check_leaves(hidden_states, gate_up_proj, down_proj)
    detached = (matrix.detach().to(hidden_states.dtype) for matrix in matrices)
    numbers = {"interleaved": interleaved, "limit": limit, "alpha": alpha, "beta": beta, "linear_beta": linear_beta}
    options: dict[str, Any] = {"activation": activation, **numbers}
    arrays = (hidden_states, *detached, topk_weights, topk_ids, expert_map, gate_up_bias, down_bias)
    if not torch_library.wanted(matrices):
        given: dict[str, Any] = dict(zip(TENSORS, arrays, strict=True))
        plain: torch.Tensor = fused_experts(**given, **options)
        return plain
    if expert_map is not None:
        num_local = down_proj.shape[0]
        arrays = (*arrays[:5], torch.where(expert_map < num_local, expert_map, -1), *arrays[6:])
    combined: torch.Tensor = _IntoGrad.apply(*arrays, *matrices, options)
    return combined
