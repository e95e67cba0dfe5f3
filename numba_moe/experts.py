"""The feed-forward networks of the experts, over all tokens: permute, GEMM, activation, GEMM, unpermute.

The GEMMs are torch's own: its grouped one, where a device has it without the host reading the offsets, and otherwise
one for each expert.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from numba_moe import sorting
from numba_moe.activation import ActivationPlan, moe_activation, plan_activation
from numba_moe.activation.rows import KINDS
from numba_moe.permute import moe_permute, moe_unpermute
from numba_moe.permute.rows import Gather, gather, plan_combine, plan_gather
from numba_moe.reference import experts as reference
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.plans import Layout, layout, planned

# torch.nn.functional has it from 2.10 on.
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
GROUPED_ARCHITECTURES = (9, 10)
# There the gradient of a matrix without rows is not zero (torch 2.10).
WRONG_EMPTY_GRADIENTS = 10
ALIGNMENT = 16


class ExpertsPlan(NamedTuple):
    """How many experts ids range over, whether one grouped GEMM serves all, and the other steps."""

    num_experts: int
    grouped: bool
    indices: tuple[arrays.Contiguous, ...]
    sort: sorting.SortPlan
    gather: Gather
    activation: ActivationPlan
    add_bias: ActivationPlan | None
    combined: arrays.Contiguous
    combine: Launch


def multiply_by_expert(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Multiply rows up to ``ends[0]`` by ``weights[0].T``, and so on; what becomes of rows past the last is undefined.

    Parameters
    ----------
    rows : torch.Tensor of shape [num_rows, columns]
    weights : torch.Tensor of shape [num_experts, width, columns]
    ends : torch.Tensor of int32, shape [num_experts]
    grouped : bool
        In one GEMM. Otherwise the host reads `ends`.
    """
    if grouped:
        return _grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    last = ends.tolist()
    sizes = [end - begin for begin, end in zip([0, *last], [*last, rows.shape[0]], strict=True)]
    *parts, unused = rows.split(sizes)
    products = [torch.mm(part, weight.T) for part, weight in zip(parts, weights.unbind(), strict=True)]
    return torch.cat([*products, unused.new_zeros(sizes[-1], weights.shape[1])])


def outer_by_expert(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Return the gradient of the weights of `multiply_by_expert`: ``grad[begin:end].T @ rows[begin:end]`` of each.

    Parameters
    ----------
    grad : torch.Tensor of shape [num_rows, width]
    rows : torch.Tensor of shape [num_rows, columns]
    ends : torch.Tensor of int32, shape [num_experts]
    grouped : bool
        In one GEMM. Otherwise the host reads `ends`.
    """
    if grouped:
        return _grouped_mm(grad.T, rows, offs=ends)
    bounds = [0, *ends.tolist()]
    pairs = itertools.pairwise(bounds)
    return torch.stack([torch.mm(grad[begin:end].T, rows[begin:end]) for begin, end in pairs])


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


def is_grouped(
    hidden_states: Layout, gate_up_proj: Layout, down_proj: Layout, topk_ids: Layout, differentiable: bool
) -> bool:
    """Whether one grouped GEMM serves all experts."""
    _, hidden, width = down_proj.shape
    aligned = all(size * hidden_states.dtype.itemsize % ALIGNMENT == 0 for size in (hidden, width))
    aligned = aligned and gate_up_proj.address == down_proj.address == 0 and 0 not in (*topk_ids.shape, hidden, width)
    return aligned and has_grouped(hidden_states.dtype, hidden_states.device, differentiable)


@planned
def _plan(
    hidden_states: Layout,
    gate_up_proj: Layout,
    down_proj: Layout,
    topk_weights: Layout,
    topk_ids: Layout,
    expert_map: Layout | None,
    gate_up_bias: Layout | None,
    down_bias: Layout | None,
    activation: str,
    interleaved: bool | None,
    limit: float | None,
    alpha: float | None,
    differentiable: bool,
) -> ExpertsPlan:
    checks.array("hidden_states", hidden_states, checks.FLOATS, (2,), rows=True)
    checks.choice("activation", activation, KINDS[:-1])
    like = ("hidden_states", hidden_states)
    num_tokens, hidden = hidden_states.shape
    for name, weights in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        contiguous = weights._replace(strides=None) if isinstance(weights, Layout) else weights
        checks.array(name, contiguous, (hidden_states.dtype,), (3,), like=like)
        rule = "contiguous, or the transpose of what is"
        checks.holds(name, rule, _is_matrix_by_matrix(weights), f"strides {weights.strides}")
    num_local, _, width = down_proj.shape
    checks.integer("num_experts (of `down_proj`)", num_local, 1)
    checks.shape("down_proj", down_proj, (num_local, hidden, width), "(num_experts, hidden, width)")
    checks.shape("gate_up_proj", gate_up_proj, (num_local, 2 * width, hidden), "(num_experts, 2 * width, hidden)")
    for name, bias, columns in (("gate_up_bias", gate_up_bias, 2 * width), ("down_bias", down_bias, hidden)):
        if bias is not None:
            checks.array(name, bias, (hidden_states.dtype,), (2,), like=like)
            checks.shape(name, bias, (num_local, columns), "(num_experts, columns of its matrix)")
    num_experts = num_local
    if expert_map is not None:
        checks.array("expert_map", expert_map, checks.IDS, (1,), like=like)
        checks.at_least("len(expert_map)", expert_map.shape[0], num_local, "the experts of `down_proj`")
        num_experts = expert_map.shape[0]
    checks.routing(topk_ids, num_experts, expert_map, ndims=(2,), like=like)
    checks.array("topk_weights", topk_weights, checks.FLOATS, (2,), like=like)
    checks.shape("topk_ids", topk_ids, (num_tokens, topk_ids.shape[1]), "(num_tokens, top_k)")
    checks.shape("topk_weights", topk_weights, tuple(topk_ids.shape), "that of `topk_ids`")
    num_slots, top_k = topk_ids.shape.numel(), topk_ids.shape[1]

    def new(dtype: torch.dtype, *shape: int) -> Layout:
        return Layout(torch.Size(shape), dtype, hidden_states.device, None, 0)

    indices = (
        arrays.contiguous(torch.int64, num_experts + 1),
        arrays.contiguous(torch.int32, num_slots),
        arrays.contiguous(torch.int32, num_tokens, top_k),
        arrays.contiguous(torch.int32, num_local),
    )
    offset = new(torch.int64, num_local + 1)  # of the experts of this rank, which are the first
    between, last = (new(hidden_states.dtype, num_slots, columns) for columns in (2 * width, hidden))
    places = new(torch.int32, num_tokens, top_k)
    written = ("position_of_slot", "offset")
    return ExpertsPlan(
        num_experts,
        is_grouped(hidden_states, gate_up_proj, down_proj, topk_ids, differentiable),
        indices,
        sorting.plan_sort(
            *(topk_ids, num_experts, num_slots), expert_map=expert_map, written=written, num_local=num_local
        ),
        plan_gather(hidden_states, top_k, (num_slots,), zero_padding=False, num_ends=num_local),
        plan_activation(between, offset, gate_up_bias, activation, interleaved, limit, alpha),
        down_bias and plan_activation(last, offset, down_bias, "none", None, None, None),
        arrays.contiguous(hidden_states.dtype, num_tokens, hidden),
        plan_combine(last, num_tokens, top_k, topk_weights, places, True, 1.0, hidden_states.dtype),
    )


def compose(
    hidden_states: Any,
    gate_up_proj: Any,
    down_proj: Any,
    gate_up_bias: Any,
    down_bias: Any,
    topk_weights: Any,
    topk_ids: Any,
    expert_map: Any,
    num_experts: int,
    options: dict[str, Any],
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Compose `fused_experts`, for experts of all ranks that number num_experts, of functions with gradients."""
    num_local = down_proj.shape[0]
    if num_local < num_experts:  # a place past the matrices is none: no GEMM computes its rows
        expert_map = torch.where(expert_map < num_local, expert_map, -1)
    permuted = moe_permute(hidden_states, topk_ids, num_experts, expert_map, zero_padding=False)
    offset = permuted.expert_first_token_offset
    if num_local < num_experts:
        offset = offset[: num_local + 1]
    ends = offset[1:].to(torch.int32)
    rows = multiply(permuted.permuted_hidden_states, gate_up_proj, ends)
    rows = moe_activation(rows, offset, gate_up_bias, **options)
    rows = multiply(rows, down_proj, ends)
    if down_bias is not None:
        rows = moe_activation(rows, offset, down_bias, activation="none")
    return moe_unpermute(rows, topk_weights, permuted.inv_permuted_idx)


def _run(
    plan: ExpertsPlan,
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    offset, permuted_idx, inv_permuted_idx, ends = (arrays.empty(*indices) for indices in plan.indices)
    sorting.sort(*(plan.sort, topk_ids, permuted_idx, expert_map), position_of_slot=inv_permuted_idx, offset=offset)
    rows = gather(plan.gather, hidden_states, permuted_idx, inv_permuted_idx, None, None, offset, ends)
    rows = multiply_by_expert(rows, gate_up_proj, ends, plan.grouped)
    activated = arrays.empty(*plan.activation.activated)
    plan.activation.activate(gate_up=rows, offset=offset, bias=gate_up_bias, activated=activated)
    rows = multiply_by_expert(activated, down_proj, ends, plan.grouped)
    if plan.add_bias is not None:
        activated = arrays.empty(*plan.add_bias.activated)
        plan.add_bias.activate(gate_up=rows, offset=offset, bias=down_bias, activated=activated)
        rows = activated
    combined: torch.Tensor = arrays.empty(*plan.combined)
    plan.combine(rows=rows, topk_weights=topk_weights, places=inv_permuted_idx, combined=combined)
    return combined


@arrays.public
def fused_experts(
    hidden_states: Any,
    gate_up_proj: Any,
    down_proj: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    activation: str = "silu",
    expert_map: Any = None,
    gate_up_bias: Any = None,
    down_bias: Any = None,
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
) -> Any:
    """Send each token through its experts and sum what they return, weighted.

    Parameters
    ----------
    hidden_states : array of float32, float16 or bfloat16, shape [num_tokens, hidden]
        Rows may be strided.
    gate_up_proj : array of the dtype of `hidden_states`, shape [num_experts, 2 * width, hidden]
        The first matrix of each expert of this rank; contiguous, or the transpose of a contiguous
        [num_experts, hidden, 2 * width].
    down_proj : array of the dtype of `hidden_states`, shape [num_experts, hidden, width]
        The second; contiguous or transposed likewise.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        Contiguous.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids that are no expert's, -1 for instance, add nothing.
    activation : {"silu", "gelu", "gelu_tanh", "swiglu_oai"}
        What lies between the matrices, as in `moe_activation`.
    expert_map : array of int32 or int64, shape [experts of all ranks], optional
        The place in the matrices of each expert of all ranks, -1 or any other number outside ``[0, num_experts)`` for
        an expert of another rank, which adds nothing.
    gate_up_bias : array of the dtype of `hidden_states`, shape [num_experts, 2 * width], optional
        Added after the first matrix.
    down_bias : array of the dtype of `hidden_states`, shape [num_experts, hidden], optional
        Added after the second.
    interleaved : bool, optional
        Rows of the first matrix are gate, up, gate, up, ..., not all gates before all ups. By default for "swiglu_oai".
    limit : float, optional
        Gates are at most this, ups at most this in magnitude; 7 by default for "swiglu_oai", none for the others.
    alpha : float, optional
        Of "silu" and "swiglu_oai"; 1 and 1.702 by default.

    Returns
    -------
    array of the dtype of `hidden_states`, shape [num_tokens, hidden]

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, unknown activation, more slots than int32 counts.

    Notes
    -----
    For bfloat16 on compute capability 9.x, and 10.x without gradients, sizes and addresses being multiples of 16 bytes,
    the GEMMs are torch's grouped ones: nothing synchronises, and CUDA graphs capture. Elsewhere there is one for each
    expert, and the host reads where their rows begin. Results between the steps have the dtype of `hidden_states`;
    steps compute in float32. Runs on the caller's current stream. All arrays of floats have gradients, of first order.

    Examples
    --------
    >>> import numpy as np
    >>> gate_up_proj = np.array([[[1], [1]], [[1], [2]]], np.float32)
    >>> weights, ids = np.array([[0.5, 0.5], [1, 1]], np.float32), np.array([[0, 1], [-1, 2]])
    >>> fused_experts(np.array([[20], [30]], np.float32), gate_up_proj, np.ones((2, 1, 1), np.float32), weights, ids)
    array([[600.],
           [  0.]], dtype=float32)
    """
    tensors = (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias)
    differentiable = torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)
    plan = _plan(
        *(layout(hidden_states), layout(gate_up_proj), layout(down_proj), layout(topk_weights), layout(topk_ids)),
        *(layout(expert_map), layout(gate_up_bias), layout(down_bias), activation),
        interleaved,
        limit,
        alpha,
        differentiable,
    )
    if checks.VALIDATE:
        checks.ids(topk_ids, plan.num_experts)
    matrices = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    options = {"activation": activation, "interleaved": interleaved, "limit": limit, "alpha": alpha}
    if differentiable:
        multiply = functools.partial(multiply_by_expert, grouped=plan.grouped)
        numbers = (plan.num_experts, options)
        return compose(hidden_states, *matrices, topk_weights, topk_ids, expert_map, *numbers, multiply)
    if arrays.answered_by_reference(hidden_states):
        more = {"expert_map": expert_map, "gate_up_bias": gate_up_bias, "down_bias": down_bias, **options}
        arguments = (hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
        return arrays.by_reference(reference.fused_experts, *arguments, **more).to(hidden_states.dtype)
    return _run(plan, hidden_states, *matrices, topk_weights, topk_ids, expert_map)
