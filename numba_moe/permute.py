"""Rows moved into expert order, and combined again.

The counting sort of `numba_moe.counting` finds the row of each slot; `gather_rows` then moves whole rows, one
block each, as machine words whatever their dtype; `combine_rows` sums each token's rows in float32, in slot order.
"""

from typing import Any, NamedTuple

import torch

from numba_moe import counting
from numba_moe.reference import permute as reference
from numba_moe.reference.permute import PermutedTokens
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, float32, int64
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.parameters import FloatArray, Int32, Int32Array, Int64, Words
from numba_moe.runtime.plans import Layout, layout, planned
from numba_moe.runtime.primitives import load_float, store_float

THREADS = 256
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@cuda.jit
def gather_rows(
    hidden_states: Words,
    permuted_idx: Int32Array,
    permuted: Words,
    num_slots: Int32,
    top_k: Int32,
    row_words: Int64,
    row_stride: Int64,
):
    # hidden_states [num_tokens, row_words] with rows row_stride apart, permuted_idx [num_slots],
    # permuted [num_slots, row_words]; a block per row of permuted
    row = int64(cuda.blockIdx.x)
    slot = permuted_idx[row]
    if slot < num_slots:
        source = int64(slot // top_k) * row_stride
        for word in range(cuda.threadIdx.x, row_words, cuda.blockDim.x):
            permuted[row * row_words + word] = hidden_states[source + word]
    else:
        for word in range(cuda.threadIdx.x, row_words, cuda.blockDim.x):
            permuted[row * row_words + word] = 0


@cuda.jit
def combine_rows(
    permuted: FloatArray,
    topk_weights: FloatArray,
    inv_permuted_idx: Int32Array,
    combined: FloatArray,
    num_rows: Int32,
    top_k: Int32,
    hidden: Int64,
    row_stride: Int64,
):
    # permuted [num_rows, hidden] with rows row_stride apart, topk_weights and inv_permuted_idx [num_tokens, top_k],
    # combined [num_tokens, hidden]; a block per token
    token = int64(cuda.blockIdx.x)
    first = token * top_k
    for column in range(cuda.threadIdx.x, hidden, cuda.blockDim.x):
        total = float32(0.0)
        for slot in range(first, first + top_k):
            row = int64(inv_permuted_idx[slot])
            if row >= 0 and row < num_rows:
                total += load_float(topk_weights, slot) * load_float(permuted, row * row_stride + column)
        store_float(combined, token * hidden + column, total)


class PermutePlan(NamedTuple):
    """The results, the sort, and the copy of rows as machine words of a dtype."""

    outputs: tuple[arrays.Contiguous, ...]
    sort: counting.SortPlan
    word: torch.dtype
    gather: Launch


@planned
def _plan_permute(hidden_states: Layout, topk_ids: Layout, num_experts: int, expert_map: Layout | None) -> PermutePlan:
    checks.array("hidden_states", hidden_states, checks.FLOATS, (2,), rows=True)
    num_experts = checks.routing(topk_ids, num_experts, expert_map, ndims=(2,), like=("hidden_states", hidden_states))
    num_tokens, hidden = hidden_states.shape
    top_k = checks.integer("top_k (columns of `topk_ids`)", topk_ids.shape[1], 1)
    checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    num_slots = topk_ids.shape.numel()
    # The widest words that fit rows, strides and addresses.
    stride = hidden if hidden_states.strides is None else hidden_states.strides[0]
    size = hidden_states.dtype.itemsize
    units = (hidden * size, stride * size, hidden_states.address)
    word = next(word for word in WORDS if all(unit % word.itemsize == 0 for unit in units))
    sizes = (num_slots, top_k, hidden * size // word.itemsize, stride * size // word.itemsize)
    gather = Launch(
        *(gather_rows, hidden_states.device, num_slots, block_threads(THREADS), sizes),
        {"hidden_states": word, "permuted": word},
    )
    sort = counting.plan_sort(topk_ids, num_experts, num_slots, expert_map=expert_map)
    outputs = (
        arrays.contiguous(hidden_states.dtype, num_slots, hidden),
        arrays.contiguous(torch.int64, num_experts + 1),
        arrays.contiguous(torch.int32, num_slots),
        arrays.contiguous(torch.int32, num_tokens, top_k),
    )
    return PermutePlan(outputs, sort, word, gather)


@planned
def _plan_unpermute(
    permuted: Layout, topk_weights: Layout, inv_permuted_idx: Layout
) -> tuple[arrays.Contiguous, Launch]:
    checks.array("permuted", permuted, checks.FLOATS, (2,), rows=True)
    like = ("permuted", permuted)
    checks.array("topk_weights", topk_weights, checks.FLOATS, (2,), like=like)
    checks.array("inv_permuted_idx", inv_permuted_idx, (torch.int32,), (2,), like=like)
    checks.shape("inv_permuted_idx", inv_permuted_idx, tuple(topk_weights.shape), "that of `topk_weights`")
    num_rows, hidden = permuted.shape
    num_tokens, top_k = inv_permuted_idx.shape
    checks.fits_int32("permuted", num_rows, "the number of rows")
    stride = hidden if permuted.strides is None else permuted.strides[0]
    launch = Launch(
        *(combine_rows, permuted.device, num_tokens if hidden else 0, block_threads(THREADS)),
        (num_rows, top_k, hidden, stride),
        {"permuted": permuted.dtype, "topk_weights": topk_weights.dtype, "combined": permuted.dtype},
    )
    return arrays.contiguous(permuted.dtype, num_tokens, hidden), launch


@arrays.public
def moe_permute(hidden_states: Any, topk_ids: Any, num_experts: int, expert_map: Any = None) -> PermutedTokens:
    """Copy each token's row once for each of its experts, in expert order.

    Parameters
    ----------
    hidden_states : array of float32, float16 or bfloat16, shape [num_tokens, hidden]
        Rows may be strided.
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts that ids range over.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert, -1 for an expert of another rank, whose slots are skipped.

    Returns
    -------
    PermutedTokens
        permuted_hidden_states : [num_tokens * top_k, hidden] in the dtype of `hidden_states`, zeros past the last
        row in use. expert_first_token_offset : int64 [num_experts + 1]; rows of expert e are ``offset[e]`` up to
        ``offset[e + 1]``. permuted_idx : int32 [num_tokens * top_k], the slot of each row, num_slots for unused
        rows. inv_permuted_idx : int32 [num_tokens, top_k], the row of each slot, -1 for skipped slots.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, more slots than int32 counts.

    Notes
    -----
    Stable: rows of one expert ascend by slot. Rows are addressed in 64 bits. Runs on the caller's current stream
    without synchronising and captures into CUDA graphs. Allocates the results, and scratch as
    `count_tokens_per_expert` does.

    Examples
    --------
    >>> import numpy as np
    >>> permuted = moe_permute(np.array([[1], [2]], np.float32), np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> permuted.permuted_hidden_states.ravel()
    array([1., 2., 1., 0.], dtype=float32)
    >>> permuted.inv_permuted_idx
    array([[ 2,  0],
           [-1,  1]], dtype=int32)
    """
    plan = _plan_permute(layout(hidden_states), layout(topk_ids), num_experts, layout(expert_map))
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    if arrays.answered_by_reference(hidden_states):
        rows, *indices = arrays.by_reference(reference.moe_permute, hidden_states, topk_ids, num_experts, expert_map)
        return PermutedTokens(rows.to(hidden_states.dtype), *indices)
    rows, offset, permuted_idx, inv_permuted_idx = (arrays.empty(*output) for output in plan.outputs)
    counting.sort(plan.sort, topk_ids, expert_map, None, permuted_idx, inv_permuted_idx, None, offset)
    if rows.numel():
        plan.gather(hidden_states.view(plan.word), permuted_idx, rows.view(plan.word))
    return PermutedTokens(rows, offset, permuted_idx, inv_permuted_idx)


@arrays.public
def moe_unpermute(permuted: Any, topk_weights: Any, inv_permuted_idx: Any) -> Any:
    """Sum each token's rows, weighted.

    Parameters
    ----------
    permuted : array of float32, float16 or bfloat16, shape [num_rows, hidden]
        Rows in expert order; rows may be strided.
    topk_weights : array of float32, float16 or bfloat16, shape [num_tokens, top_k]
        Contiguous.
    inv_permuted_idx : array of int32, shape [num_tokens, top_k]
        The row of each slot. A slot whose index is outside ``[0, num_rows)`` adds nothing.

    Returns
    -------
    array of the dtype of `permuted`, shape [num_tokens, hidden]
        ``sum over k of topk_weights[t, k] * permuted[inv_permuted_idx[t, k]]``.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices.

    Notes
    -----
    Summed in float32 in slot order, without atomics, and rounded once: the same bits at every run. Rows are
    addressed in 64 bits. One launch on the caller's current stream; allocates the result only.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[10], [20], [30]], np.float32)
    >>> weights = np.array([[0.5, 0.5], [1.0, 0.25]], np.float32)
    >>> moe_unpermute(rows, weights, np.array([[2, 0], [-1, 1]], np.int32))
    array([[20.],
           [ 5.]], dtype=float32)
    """
    result, combine = _plan_unpermute(layout(permuted), layout(topk_weights), layout(inv_permuted_idx))
    if arrays.answered_by_reference(permuted):
        combined = arrays.by_reference(reference.moe_unpermute, permuted, topk_weights, inv_permuted_idx)
        return combined.to(permuted.dtype)
    out = arrays.empty(*result)
    combine(permuted, topk_weights, inv_permuted_idx, out)
    return out
