"""Run the experts on all tokens: permute, GEMM, activation, GEMM, unpermute.

Where experts have few slots, tensor cores multiply at the speed of memory (`experts_by_tile.py`). Otherwise the GEMMs
are torch's own: its grouped one, where a device has it without the host reading the offsets, or one for each expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from numba_moe.ops.activation.activate import (
    activation_backward,
    check_rule,
    moe_activation,
    options_of,
    plan_activation,
)
from numba_moe.ops.activation.activate_rows import Rule
from numba_moe.ops.activation.weighted import weighted_activation_backward
from numba_moe.ops.experts_by_tile import TilePlan, plan_tiles, run_tiles, serves, tiles_for
from numba_moe.ops.grouped_products import is_grouped, multiply_by_expert, outer_by_expert, product_by_expert
from numba_moe.ops.permute.move_rows import Gather, gather, plan_combine, plan_gather
from numba_moe.ops.permute.permutation import moe_permute, moe_unpermute
from numba_moe.ops.permute.row_gradients import permute_backward, spread_rows, unpermute_backward
from numba_moe.ops.sort import counting_sort
from numba_moe.reference import experts as reference
from numba_moe.reference.activation import ACTIVATIONS, OPTIONS
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Layout


def _is_matrix_by_matrix(weights: Layout) -> bool:
    """Whether an array of matrices is contiguous, or the transpose of one that is."""
    _, height, width = weights.shape
    return weights.strides is None or weights.strides == (height * width, 1, height)


@op(reference.fused_experts, like=moe_activation)
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


def check_experts(given: Any) -> tuple[Rule, int]:
    """Check the arguments of a call; return the rule of its activation, and how many experts ids range over."""
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
    return kernel_rule, num_experts


@fused_experts.plan
def _(given: Any) -> ExpertsPlan | TilePlan:
    kernel_rule, num_experts = check_experts(given)
    if serves(given) and (tiles := tiles_for(given, num_experts)) is not None:
        return plan_tiles(given, kernel_rule, num_experts, tiles)
    num_tokens, top_k = given.topk_ids.shape
    num_slots, (num_local, hidden, width) = num_tokens * top_k, given.down_proj.shape

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
    between, last = (new(dtype, num_slots, columns) for columns in (given.gate_up_proj.shape[1], hidden))
    places = new(torch.int32, num_tokens, top_k)
    act = moe_activation.declaration.given_of
    options = {"activation": given.activation, **options_of(given)}
    first = {"gate_up": between, "expert_first_token_offset": offset, "bias": given.gate_up_bias, **options}
    second = {"gate_up": last, "expert_first_token_offset": offset, "bias": given.down_bias, "activation": "none"}
    second |= dict.fromkeys(OPTIONS)
    written = ("position_of_slot", "offset")
    return ExpertsPlan(
        num_experts,
        is_grouped(False, new(dtype, num_slots, hidden), given.gate_up_proj)
        and is_grouped(False, new(dtype, num_slots, width), given.down_proj),
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


class KeptExperts(NamedTuple):
    """The result of the experts, and what its gradients need of the steps."""

    combined: Any
    gate_up: Any
    expert_first_token_offset: Any
    inv_permuted_idx: Any


@op(like=fused_experts)
def fused_experts_keeping(
    hidden_states: Array,
    gate_up_proj: Array,
    down_proj: Array,
    topk_weights: Array,
    topk_ids: Array,
    expert_map: Array | None = None,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    activation: str = "silu",
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
) -> KeptExperts:
    """Do what `fused_experts` does, for which a gradient is wanted, and keep the results of the first matrix.

    Between the passes that is all of the size of the slots: the gradients gather the tokens again and compute the
    activation again, and those of the weights need no results of the second matrix. With row r of slot s of token t,

        grad_weight[s] = dot(grad[t], down[r]) = dot(activated[r], grad[t] @ down_proj) + dot(grad[t], bias)

    as SonicMoE (arXiv 2512.14080) has it.

    Parameters
    ----------
    expert_map : array of int32 or int64, shape [experts of all ranks], optional
        The index in the matrices of each expert of all ranks, -1 for one that is not there.

    Returns
    -------
    KeptExperts
        combined : the result of `fused_experts`. gate_up : [num_slots, columns], the rows of the first matrix in
        expert order, without bias. expert_first_token_offset : int64 [num_experts + 1]. inv_permuted_idx : int32
        [num_tokens, top_k], the row of each slot.
    """


@fused_experts_keeping.outputs
def _(given: Any) -> KeptExperts:
    num_local, columns, _ = given.gate_up_proj.shape
    num_tokens, top_k = given.topk_ids.shape
    return KeptExperts(
        contiguous(given.hidden_states.dtype, *given.hidden_states.shape),
        contiguous(given.hidden_states.dtype, num_tokens * top_k, columns),
        contiguous(torch.int64, num_local + 1),
        contiguous(torch.int32, num_tokens, top_k),
    )


@fused_experts_keeping.plan
def _(given: Any) -> None:
    check_experts(given)


@fused_experts_keeping.compute
def _(_plan: Any, given: Any) -> KeptExperts:
    num_local = given.down_proj.shape[0]
    num_experts = num_local if given.expert_map is None else given.expert_map.shape[0]
    permuted = moe_permute(given.hidden_states, given.topk_ids, num_experts, given.expert_map, zero_padding=False)
    offset, places = permuted.expert_first_token_offset[: num_local + 1], permuted.inv_permuted_idx
    ends = offset[1:].to(torch.int32)
    gate_up = multiply_by_expert(permuted.permuted_hidden_states, given.gate_up_proj, ends)
    rows = moe_activation(gate_up, offset, given.gate_up_bias, activation=given.activation, **options_of(given))
    rows = multiply_by_expert(rows, given.down_proj, ends)
    if given.down_bias is not None:
        rows = moe_activation(rows, offset, given.down_bias, activation="none")
    return KeptExperts(moe_unpermute(rows, given.topk_weights, places), gate_up, offset.contiguous(), places)


@fused_experts_keeping.saves
def _(ctx: Any, given: Any, _combined: Any, *kept: Any) -> None:
    matrices = (given.gate_up_proj, given.down_proj, given.gate_up_bias, given.down_bias)
    routing = (given.topk_weights, given.topk_ids if given.down_bias is not None else None, given.expert_map)
    ctx.save_for_backward(given.hidden_states, *matrices, *routing, *kept)
    ctx.activation, ctx.options = given.activation, options_of(given)


TENSORS = tuple(fused_experts_keeping.declaration.arrays)


@fused_experts_keeping.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    wanted = {name for name, needed in zip(TENSORS, ctx.needs_input_grad, strict=False) if needed}
    return differentiate(ctx, grad, wanted, lambda _, *factors: outer_by_expert(*factors))


def differentiate(ctx: Any, grad: torch.Tensor, wanted: set[str], by_matrix: Callable[..., Any]) -> dict[str, Any]:
    """Return the gradients that are wanted; `by_matrix` takes a matrix' name and the factors of its gradient."""
    hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias, *rest = ctx.saved_tensors
    topk_weights, topk_ids, expert_map, gate_up, offset, places = rest
    ends = offset[1:].to(torch.int32)
    slopes = spread_rows(grad, places)  # of the rows of the second matrix, without weights
    by_activated = multiply_by_expert(slopes, down_proj.transpose(1, 2), ends)
    of_first = weighted_activation_backward(
        *(gate_up, by_activated, topk_weights, places, offset, gate_up_bias, ctx.activation),
        of_bias="gate_up_bias" in wanted,
        **ctx.options,
    )
    grads: dict[str, Any] = {}
    if "gate_up_bias" in wanted:
        grads["gate_up_bias"] = of_first.bias
    if "topk_weights" in wanted:
        grads["topk_weights"] = of_first.weights
        if down_bias is not None:
            through = _through_bias(grad, down_bias, topk_ids, expert_map)
            grads["topk_weights"] = of_first.weights + through.to(topk_weights.dtype)
    if "down_proj" in wanted:
        grads["down_proj"] = by_matrix("down_proj", slopes, of_first.weighted, ends)
    if "down_bias" in wanted:
        weighted = unpermute_backward(slopes, topk_weights, places, grad, 1.0, True, False).rows
        options: dict[str, Any] = {**dict.fromkeys(OPTIONS), "activation": "none", "of_bias": True}
        grads["down_bias"] = activation_backward(weighted, weighted, offset, down_bias, **options).bias
    if "gate_up_proj" in wanted:
        grads["gate_up_proj"] = by_matrix("gate_up_proj", of_first.rows, spread_rows(hidden_states, places), ends)
    if "hidden_states" in wanted:
        rows = multiply_by_expert(of_first.rows, gate_up_proj.transpose(1, 2), ends)
        grads["hidden_states"] = permute_backward(places, rows)
    return grads


def _through_bias(grad: torch.Tensor, bias: torch.Tensor, topk_ids: torch.Tensor, expert_map: Any) -> torch.Tensor:
    """Return the part of the weights' gradient that comes from the second bias, in float32."""
    num_experts = len(bias) if expert_map is None else len(expert_map)
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    experts = torch.where(known, topk_ids, 0).long()
    if expert_map is not None:
        experts = expert_map[experts].long()
        known = known & (experts >= 0) & (experts < len(bias))
    dots = torch.mm(grad.float(), bias.float().T).gather(1, torch.where(known, experts, 0))
    return torch.where(known, dots, 0.0)


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
    """Answer a call of `fused_experts` for which a gradient is wanted."""
    checks.holds("out", "None where a gradient is wanted", out is None, "memory to write")
    num_local = down_proj.shape[0]
    if expert_map is not None and num_local < expert_map.shape[0]:
        expert_map = torch.where(expert_map < num_local, expert_map, -1)  # no GEMM computes rows of other places
    arguments = (hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, expert_map, gate_up_bias, down_bias)
    found: torch.Tensor = fused_experts_keeping(*arguments, **options).combined
    return found


def feed_forward(
    rows: torch.Tensor,
    offset: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    multiply: Callable[..., Any] = multiply_by_expert,
    **options: Any,
) -> torch.Tensor:
    """Return what experts make of rows in expert order, those of expert e from ``offset[e]`` on, with gradients."""
    ends = offset[1:].to(torch.int32)
    rows = multiply(rows, gate_up_proj, ends)
    rows = moe_activation(rows, offset, gate_up_bias, **options)
    rows = multiply(rows, down_proj, ends)
    return rows if down_bias is None else moe_activation(rows, offset, down_bias, activation="none")
