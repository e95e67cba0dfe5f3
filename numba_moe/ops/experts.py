"""Run the experts on all tokens: permute, GEMM, activation, GEMM, unpermute.

Where experts have few slots, tensor cores multiply at the speed of memory (`experts_by_tile.py`). Otherwise the GEMMs
are torch's own: its grouped one, where a device has it without the host reading the offsets, or one for each expert.
"""

import itertools
from typing import Any, NamedTuple

import torch

from numba_moe.ops.activation.activate import check_rule, moe_activation, options_of, plan_activation
from numba_moe.ops.experts_by_tile import TilePlan, plan_tiles, run_tiles, serves, tiles_for
from numba_moe.ops.permute.move_rows import Gather, gather, plan_combine, plan_gather
from numba_moe.ops.permute.permutation import moe_permute, moe_unpermute
from numba_moe.ops.sort import counting_sort
from numba_moe.reference import experts as reference
from numba_moe.reference.activation import ACTIVATIONS, OPTIONS
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous, is_traced
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Layout, is_plain
from numba_moe.runtime.torch_private import is_transformed

# torch.nn.functional has it from 2.10 on.
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
GROUPED_ARCHITECTURES = (9, 10)
# There the gradient of a matrix without rows is not zero (torch 2.10).
WRONG_EMPTY_GRADIENTS = 10
ALIGNMENT = 16


def _is_matrix_by_matrix(weights: Layout) -> bool:
    """Whether an array of matrices is contiguous, or the transpose of one that is."""
    _, height, width = weights.shape
    return weights.strides is None or weights.strides == (height * width, 1, height)


def has_grouped(dtype: torch.dtype, device: torch.device, differentiable: bool) -> bool:
    """Whether the device has a grouped GEMM for which the host need not read where the rows of experts begin."""
    if _grouped_mm is None or device.type != "cuda" or dtype != torch.bfloat16:
        return False
    major = torch.cuda.get_device_capability(device)[0]
    return major in GROUPED_ARCHITECTURES and not (differentiable and major == WRONG_EMPTY_GRADIENTS)


def is_grouped(hidden_states: Layout, gate_up_proj: Layout, down_proj: Layout, topk_ids: Layout) -> bool:
    """Whether one grouped GEMM serves all experts, where no gradient is wanted."""
    _, hidden, width = down_proj.shape
    aligned = all(size * hidden_states.dtype.itemsize % ALIGNMENT == 0 for size in (hidden, width))
    aligned = aligned and gate_up_proj.address == down_proj.address == 0 and 0 not in (*topk_ids.shape, hidden, width)
    return aligned and has_grouped(hidden_states.dtype, hidden_states.device, False)


@op(reference.fused_experts)
def fused_experts(
    hidden_states: Array,
    gate_up_proj: Array,
    down_proj: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    activation: str = "silu",
    expert_map: Array | None = None,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
    out: Array | None = None,
) -> Any:
    """Send each token through its experts and sum what they return, weighted.

    Parameters
    ----------
    hidden_states : array of float32, float16 or bfloat16, shape [num_tokens, hidden]
        Rows may be strided.
    gate_up_proj : array of the dtype of `hidden_states`, shape [num_experts, 2 * width, hidden]
        The first matrix of each expert of this rank; contiguous, or the transpose of a contiguous
        [num_experts, hidden, 2 * width]. For an activation whose name ends in "_no_mul" it has `width` rows.
    down_proj : array of the dtype of `hidden_states`, shape [num_experts, hidden, width]
        The second matrix of each expert; contiguous, or a transpose like the first.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        Contiguous.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. An id outside the experts, such as -1, adds nothing.
    activation : str
        The step between the matrices, any of `moe_activation` but "none".
    expert_map : array of int32 or int64, shape [experts of all ranks], optional
        The index in the matrices of each expert of all ranks. -1 or any other number outside ``[0, num_experts)`` means
        an expert of another rank, which adds nothing.
    gate_up_bias : array of the dtype of `hidden_states`, shape [num_experts, rows of `gate_up_proj`], optional
        Added after the first matrix.
    down_bias : array of the dtype of `hidden_states`, shape [num_experts, hidden], optional
        Added after the second.
    interleaved : bool, optional
        True if the rows of the first matrix are gate, up, gate, up, ..., False if all gates come before all ups. By
        default True for "swiglu_oai" only.
    limit, alpha, beta, linear_beta : float, optional
        The numbers of the activation, as in `moe_activation`.
    out : array of the dtype of `hidden_states`, shape [num_tokens, hidden], optional
        Written: memory for the result.

    Returns
    -------
    array of the dtype of `hidden_states`, shape [num_tokens, hidden]

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, an unknown activation, a number that it does not have, or more slots
        than int32 can count.

    Notes
    -----
    There are three ways:

    - Kernels for tensor cores, as fast as the matrices in use are read. They serve float16 and bfloat16 from compute
      capability 8.0 on, with at most 40 slots per expert on average, sizes that are multiples of 8 and addresses that
      are multiples of 16 bytes. They round after the activation and after the second bias.
    - torch's grouped GEMM, for bfloat16 with more slots, on compute capability 9.x, and 10.x without gradients.
    - One GEMM for each expert in all other cases. The host then reads where the rows of each expert begin.

    The first two do not synchronise, and CUDA graphs can capture them. Results between the steps have the dtype of
    `hidden_states`; each step computes in float32. The op runs on the caller's current stream. All float arrays have
    first-order gradients.

    Examples
    --------
    >>> import numpy as np
    >>> gate_up_proj = np.array([[[1], [1]], [[1], [2]]], np.float32)
    >>> weights, ids = np.array([[0.5, 0.5], [1, 1]], np.float32), np.array([[0, 1], [-1, 2]])
    >>> fused_experts(np.array([[20], [30]], np.float32), gate_up_proj, np.ones((2, 1, 1), np.float32), weights, ids)
    array([[600.],
           [  0.]], dtype=float32)
    """


@fused_experts.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.hidden_states.dtype, *given.hidden_states.shape)


class ExpertsPlan(NamedTuple):
    """How many experts ids range over, whether one grouped GEMM serves all, and the other steps."""

    num_experts: int
    grouped: bool
    indices: tuple[Contiguous, ...]
    sort: counting_sort.SortPlan
    permuted: Contiguous
    gather: Gather
    activated: Contiguous
    activate: Launch
    biased: Contiguous
    add_bias: Launch | None
    combine: Launch


@fused_experts.plan
def _(given: Any) -> ExpertsPlan | TilePlan:
    checks.array("hidden_states", given.hidden_states, checks.FLOATS, (2,), rows=True)
    checks.choice("activation", given.activation, ACTIVATIONS)
    kernel_rule = check_rule(given)
    like = ("hidden_states", given.hidden_states)
    num_tokens, hidden = given.hidden_states.shape
    for name, weights in (("gate_up_proj", given.gate_up_proj), ("down_proj", given.down_proj)):
        whole = weights._replace(strides=None) if isinstance(weights, Layout) else weights
        checks.array(name, whole, (given.hidden_states.dtype,), (3,), like=like)
        rule = "contiguous, or the transpose of what is"
        checks.holds(name, rule, _is_matrix_by_matrix(weights), f"strides {weights.strides}")
    num_local, _, width = given.down_proj.shape
    checks.integer("num_experts (of `down_proj`)", num_local, 1)
    checks.shape("down_proj", given.down_proj, (num_local, hidden, width), "(num_experts, hidden, width)")
    rows = kernel_rule.halves * width
    named = "(num_experts, 2 * width, hidden)" if kernel_rule.halves == 2 else "(num_experts, width, hidden)"
    checks.shape("gate_up_proj", given.gate_up_proj, (num_local, rows, hidden), named)
    for name, bias, columns in (
        ("gate_up_bias", given.gate_up_bias, rows),
        ("down_bias", given.down_bias, hidden),
    ):
        if bias is not None:
            checks.array(name, bias, (given.hidden_states.dtype,), (2,), like=like)
            checks.shape(name, bias, (num_local, columns), "(num_experts, columns of its matrix)")
    num_experts = num_local
    if given.expert_map is not None:
        checks.array("expert_map", given.expert_map, checks.IDS, (1,), like=like)
        checks.at_least("len(expert_map)", given.expert_map.shape[0], num_local, "the experts of `down_proj`")
        num_experts = given.expert_map.shape[0]
    checks.routing(given.topk_ids, num_experts, given.expert_map, ndims=(2,), like=like)
    checks.array("topk_weights", given.topk_weights, checks.FLOATS, (2,), like=like)
    checks.shape("topk_ids", given.topk_ids, (num_tokens, given.topk_ids.shape[1]), "(num_tokens, top_k)")
    checks.shape("topk_weights", given.topk_weights, tuple(given.topk_ids.shape), "`topk_ids`.shape")
    if serves(given) and (tiles := tiles_for(given, num_experts)) is not None:
        return plan_tiles(given, kernel_rule, num_experts, tiles)
    num_slots, top_k = given.topk_ids.shape.numel(), given.topk_ids.shape[1]

    def new(dtype: torch.dtype, *shape: int) -> Layout:
        return Layout(torch.Size(shape), dtype, given.hidden_states.device, None, 0)

    indices = (
        contiguous(torch.int64, num_experts + 1),
        contiguous(torch.int32, num_slots),
        contiguous(torch.int32, num_tokens, top_k),
        contiguous(torch.int32, num_local),
    )
    dtype = given.hidden_states.dtype
    offset = new(torch.int64, num_local + 1)  # of the experts of this rank, which are the first
    between, last = (new(dtype, num_slots, columns) for columns in (rows, hidden))
    places = new(torch.int32, num_tokens, top_k)
    act = moe_activation.declaration.given_of
    options = {"activation": given.activation, **options_of(given)}
    first = {"gate_up": between, "expert_first_token_offset": offset, "bias": given.gate_up_bias, **options}
    second = {"gate_up": last, "expert_first_token_offset": offset, "bias": given.down_bias, "activation": "none"}
    second |= dict.fromkeys(OPTIONS)
    written = ("position_of_slot", "offset")
    return ExpertsPlan(
        num_experts,
        is_grouped(given.hidden_states, given.gate_up_proj, given.down_proj, given.topk_ids),
        indices,
        counting_sort.plan_sort(
            *(given.topk_ids, num_experts, num_slots),
            expert_map=given.expert_map,
            written=written,
            num_local=num_local,
        ),
        contiguous(dtype, num_slots, hidden),
        plan_gather(given.hidden_states, top_k, num_slots, zero_padding=False, num_ends=num_local),
        contiguous(dtype, num_slots, width),
        plan_activation(act(first)),
        contiguous(dtype, num_slots, hidden),
        None if given.down_bias is None else plan_activation(act(second)),
        plan_combine(last, num_tokens, top_k, given.topk_weights, places, True, 1.0, dtype),
    )


@fused_experts.validate
def _(given: Any) -> None:
    expert_map, down_proj = given.expert_map, given.down_proj
    checks.ids(given.topk_ids, down_proj.shape[0] if expert_map is None else expert_map.shape[0])


@fused_experts.run
def _(plan: ExpertsPlan | TilePlan, given: Any, combined: torch.Tensor) -> None:
    if isinstance(plan, TilePlan):
        run_tiles(plan, given, combined)
        return
    offset, permuted_idx, inv_permuted_idx, ends = (arrays.empty(*indices) for indices in plan.indices)
    indices = {"position_of_slot": inv_permuted_idx, "offset": offset}
    counting_sort.sort(plan.sort, given.topk_ids, permuted_idx, given.expert_map, **indices)
    rows = arrays.empty(*plan.permuted)
    gather(plan.gather, given.hidden_states, rows, permuted_idx, inv_permuted_idx, None, None, offset, ends)
    rows = product_by_expert(rows, given.gate_up_proj, ends, plan.grouped)
    activated = arrays.empty(*plan.activated)
    plan.activate(gate_up=rows, offset=offset, bias=given.gate_up_bias, activated=activated)
    rows = product_by_expert(activated, given.down_proj, ends, plan.grouped)
    if plan.add_bias is not None:
        biased = arrays.empty(*plan.biased)
        plan.add_bias(gate_up=rows, offset=offset, bias=given.down_bias, activated=biased)
        rows = biased
    plan.combine(rows=rows, topk_weights=given.topk_weights, places=inv_permuted_idx, combined=combined)


@fused_experts.composed
def compose(
    hidden_states: Any,
    gate_up_proj: Any,
    down_proj: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    expert_map: Any = None,
    gate_up_bias: Any = None,
    down_bias: Any = None,
    out: Any = None,
    **options: Any,
) -> torch.Tensor:
    """Compose `fused_experts` of ops that have gradients; each checks its own arguments when it runs."""
    checks.holds("out", "None where a gradient is wanted", out is None, "memory to write")
    num_local = down_proj.shape[0]
    num_experts = num_local if expert_map is None else expert_map.shape[0]
    if num_local < num_experts:  # a place past the matrices is none: no GEMM computes its rows
        expert_map = torch.where(expert_map < num_local, expert_map, -1)
    permuted = moe_permute(hidden_states, topk_ids, num_experts, expert_map, zero_padding=False)
    offset = permuted.expert_first_token_offset
    if num_local < num_experts:
        offset = offset[: num_local + 1]
    matrices = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    rows = feed_forward(permuted.permuted_hidden_states, offset, *matrices, **options)
    return moe_unpermute(rows, topk_weights, permuted.inv_permuted_idx)


def feed_forward(
    rows: torch.Tensor,
    offset: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """Return what experts make of rows in expert order, those of expert e from ``offset[e]`` on, with gradients."""
    ends = offset[1:].to(torch.int32)
    rows = multiply(rows, gate_up_proj, ends)
    rows = moe_activation(rows, offset, gate_up_bias, **options)
    rows = multiply(rows, down_proj, ends)
    return rows if down_bias is None else moe_activation(rows, offset, down_bias, activation="none")


def multiply(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply rows by the matrices of their experts: by torch's grouped GEMM, where it serves, or by an op of ours."""
    _, *sizes = weights.shape
    if not is_transformed() and all(type(size) is int for size in sizes) and weights.numel() and rows.shape[0] > 0:
        aligned = all(size * weights.dtype.itemsize % ALIGNMENT == 0 for size in sizes)
        if not is_traced() and is_plain(weights):
            aligned = aligned and weights.data_ptr() % ALIGNMENT == 0
        if aligned and _device_has_grouped(rows.dtype, rows.device, torch.is_grad_enabled()):
            return _grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    return multiply_by_expert(rows, weights, ends)


@torch.compiler.assume_constant_result
def _device_has_grouped(dtype: torch.dtype, device: torch.device, differentiable: bool) -> bool:
    return has_grouped(dtype, device, differentiable)


def product_by_expert(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Return rows times the transposed matrices of their experts, in one GEMM or one for each expert."""
    if grouped:
        return _grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    last = ends.tolist()
    sizes = [end - begin for begin, end in zip([0, *last], [*last, rows.shape[0]], strict=True)]
    *parts, unused = rows.split(sizes)
    products = [torch.mm(part, weight.T) for part, weight in zip(parts, weights.unbind(), strict=True)]
    return torch.cat([*products, unused.new_zeros(sizes[-1], weights.shape[1])])


def _is_grouped(differentiable: bool, *matrices: Layout) -> bool:
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
    return _is_grouped(False, given.rows, given.weights)


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
    return _is_grouped(True, given.grad, given.rows)


@outer_by_expert.compute
def _(grouped: bool, given: Any) -> torch.Tensor:
    if grouped:
        return _grouped_mm(given.grad.T, given.rows, offs=given.ends)
    pairs = itertools.pairwise([0, *given.ends.tolist()])
    return torch.stack([torch.mm(given.grad[begin:end].T, given.rows[begin:end]) for begin, end in pairs])
