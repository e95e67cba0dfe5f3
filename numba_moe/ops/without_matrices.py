"""Experts without matrices: what they return, weighted, in one pass over the tokens.

LongCat has experts that return the token, and pruned models have some that return a constant. Gating chooses them like
the others. Their ids are past those of the matrices, so `fused_experts` leaves them out, and `constant_experts` adds
what they return. A warp takes a run of columns of a token.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import load_float, present, wait_for_earlier
from numba_moe.device.primitives import WARP, load_integer
from numba_moe.device.types import LIKE, FloatArray, Int32, Int64, Run, SizedArray
from numba_moe.ops.activation.activate_rows import RUN, add_run, place_of, store_run
from numba_moe.ops.gating.which_kernel import sized
from numba_moe.ops.permute.move_rows import stride_of
from numba_moe.reference import without_matrices as reference
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.op import op

OptionalLikeRows = Annotated[Any, LIKE, "hidden_states", None]


class Tokens(NamedTuple):
    """Rows of tokens, what is added to them, and how warps share them."""

    hidden_states: FloatArray  # [num_tokens, hidden], row_stride apart
    combined: OptionalLikeRows  # [num_tokens, hidden]
    row_stride: Int64
    num_tokens: Int32
    hidden: Int32
    segments: Int32  # warps that serve a token


class Slots(NamedTuple):
    """The experts of each token, and their weights."""

    topk_weights: FloatArray  # [num_tokens, top_k]
    topk_ids: SizedArray  # [num_tokens, top_k]
    id_bytes: Int32
    top_k: Int32


class Constants(NamedTuple):
    """Which experts return the token, and which a constant: their ids follow each other."""

    constants: OptionalLikeRows  # [num_constants, hidden]
    num_experts: Int32  # with matrices
    num_copies: Int32
    num_constants: Int32


@cuda.jit(device=True)
def add_weighted(array, first, weight, totals, items):
    """Add a run of a row, times a weight, to sums."""
    values = cuda.local.array(items, float32)
    for item in range(items):
        values[item] = float32(0.0)
    add_run(array, first, values, items)
    for item in range(items):
        totals[item] += weight * values[item]


@cuda.jit
def combine_constants(
    tokens: Tokens,
    slots: Slots,
    constant: Constants,
    returned: Annotated[Any, LIKE, "hidden_states"],  # [num_tokens, hidden]
    items: Run,
):
    """Write what a token's experts without matrices return; the grid has `segments` independent warps for a token."""
    wait_for_earlier()
    token, column = place_of(tokens.segments, items)
    if token >= tokens.num_tokens or column >= tokens.hidden:
        return
    totals = cuda.local.array(items, float32)
    for item in range(items):
        totals[item] = float32(0.0)
    if present(tokens.combined):
        add_run(tokens.combined, int64(token) * tokens.hidden + column, totals, items)
    of_token = int64(token) * tokens.row_stride + column
    pick = int32(0)
    while pick < slots.top_k:
        slot = int32(token * slots.top_k + pick)
        place = load_integer(slots.topk_ids, slot, slots.id_bytes) - constant.num_experts
        if 0 <= place < constant.num_copies:
            add_weighted(tokens.hidden_states, of_token, load_float(slots.topk_weights, slot), totals, items)
        place -= constant.num_copies
        if 0 <= place < constant.num_constants:
            row = place * tokens.hidden + column
            add_weighted(constant.constants, row, load_float(slots.topk_weights, slot), totals, items)
        pick = int32(pick + 1)
    store_run(returned, int64(token) * tokens.hidden + column, totals, items)


@op(reference.constant_experts)
def constant_experts(
    hidden_states: Array,
    topk_weights: Array,
    topk_ids: Array,
    num_experts: int,
    *,
    num_copies: int = 0,
    constants: Array | None = None,
    combined: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Sum what experts without matrices return for each token, weighted: the token itself, or a constant.

    Parameters
    ----------
    hidden_states : array of float32, float16 or bfloat16, shape [num_tokens, hidden]
        Rows may be strided.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        Contiguous.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. The ids from `num_experts` on are those of experts without matrices: first those that return the
        token, then those that return a constant. All other ids add nothing.
    num_experts : int
        Number of experts with matrices, on all ranks.
    num_copies : int
        Number of experts that return the token.
    constants : array of the dtype of `hidden_states`, shape [num_constants, hidden], optional
        What each of the next experts returns; contiguous.
    combined : array of the dtype of `hidden_states`, shape [num_tokens, hidden], optional
        What the other experts returned, for instance the result of `fused_experts`. It is added.
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
        A wrong shape or layout, mixed devices, or more slots than int32 can count.

    Notes
    -----
    The op sums in float32, `combined` first and then in slot order, and rounds once. It is one launch on the caller's
    current stream, and CUDA graphs can capture it. All float arrays have first-order gradients.

    Examples
    --------
    Expert 2 returns the token, expert 3 a constant, and expert 4, which has none, zeros:

    >>> import numpy as np
    >>> tokens, weights = np.array([[1, 2], [3, 4]], np.float32), np.array([[0.5, 0.5], [0.25, 0.75]], np.float32)
    >>> ids, constants = np.array([[2, 3], [0, 4]]), np.array([[10, 20]], np.float32)
    >>> constant_experts(tokens, weights, ids, num_experts=2, num_copies=1, constants=constants)
    array([[ 5.5, 11. ],
           [ 0. ,  0. ]], dtype=float32)
    """


@constant_experts.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.hidden_states.dtype, *given.hidden_states.shape)


@constant_experts.plan
def _(given: Any) -> Launch:
    rows, topk_ids, constants, combined = given.hidden_states, given.topk_ids, given.constants, given.combined
    checks.array("hidden_states", rows, checks.FLOATS, (2,), rows=True)
    like = ("hidden_states", rows)
    num_tokens, hidden = rows.shape
    checks.array("topk_ids", topk_ids, checks.IDS, (2,), like=like)
    top_k = topk_ids.shape[1]
    checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    checks.array("topk_weights", given.topk_weights, checks.FLOATS, (2,), like=like)
    checks.shape("topk_weights", given.topk_weights, tuple(topk_ids.shape), "`topk_ids`.shape")
    checks.fits_int32("topk_ids", topk_ids.shape.numel(), "the number of slots")
    num_experts = checks.integer("num_experts", given.num_experts, 0, checks.LARGEST_INT32)
    num_copies = checks.integer("num_copies", given.num_copies, 0, checks.LARGEST_INT32)
    num_constants = 0
    if constants is not None:
        checks.array("constants", constants, (rows.dtype,), (2,), like=like)
        num_constants = constants.shape[0]
        checks.shape("constants", constants, (num_constants, hidden), "(num_constants, hidden)")
    if combined is not None:
        checks.array("combined", combined, (rows.dtype,), (2,), like=like)
        checks.shape("combined", combined, (num_tokens, hidden), "`hidden_states`.shape")
    read = (rows, constants, combined)
    aligned = not any(array.address for array in read if array is not None)
    items = RUN if aligned and hidden % RUN == stride_of(rows) % RUN == 0 else 1
    segments = -(-hidden // (WARP * items))
    checks.fits_int32("hidden_states", num_tokens * segments * WARP, "the number of threads")
    records = (
        Tokens(rows, combined, stride_of(rows), num_tokens, hidden, segments),
        Slots(given.topk_weights, sized(topk_ids), topk_ids.dtype.itemsize, top_k),
        Constants(constants, num_experts, num_copies, num_constants),
    )
    return Launch(combine_constants, rows.device, *warps(num_tokens * segments), *records, rows.dtype, items=items)


@constant_experts.run
def _(combine: Launch, given: Any, returned: torch.Tensor) -> None:
    names = ("hidden_states", "topk_weights", "topk_ids", "constants", "combined")
    combine(**{name: getattr(given, name) for name in names}, returned=returned)


@constant_experts.saves
def _(ctx: Any, given: Any, _returned: Any) -> None:
    ctx.save_for_backward(given.hidden_states, given.topk_weights, given.topk_ids, given.constants)
    ctx.num_experts, ctx.num_copies, ctx.adds = given.num_experts, given.num_copies, given.combined is not None


@constant_experts.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    """Return the gradients, by torch's operations in float32: sums of few terms, and products of matrices."""
    rows, weights, topk_ids, constants = ctx.saved_tensors
    num_experts, num_copies = ctx.num_experts, ctx.num_copies
    by_rows, by_weights, *_ = ctx.needs_input_grad
    found: dict[str, Any] = {"combined": grad} if ctx.adds else {}
    places, exact = topk_ids.to(torch.int64) - num_experts, grad.to(torch.float32)
    is_copy = (places >= 0) & (places < num_copies)
    if by_rows:
        found["hidden_states"] = (exact * torch.where(is_copy, weights, 0.0).sum(1, keepdim=True)).to(rows.dtype)
    if by_weights:
        found["topk_weights"] = torch.where(is_copy, (exact * rows).sum(1, keepdim=True), 0.0)
    if constants is not None and len(constants):
        places = places - num_copies
        known = (places >= 0) & (places < len(constants))
        places = torch.where(known, places, 0)
        if by_weights:
            of_constants = (exact @ constants.to(torch.float32).T).gather(1, places)
            found["topk_weights"] = found["topk_weights"] + torch.where(known, of_constants, 0.0)
        dense = exact.new_zeros(len(rows), len(constants))
        dense = dense.scatter_add(1, places, torch.where(known, weights, 0.0).to(torch.float32))
        found["constants"] = (dense.T @ exact).to(constants.dtype)
    if by_weights:
        found["topk_weights"] = found["topk_weights"].to(weights.dtype)
    return found
