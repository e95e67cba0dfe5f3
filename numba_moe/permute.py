"""Rows moved into expert order, and combined again.

The counting sort of `numba_moe.counting` finds the row of each slot; `gather_rows` then moves whole rows, one
block each, as machine words whatever their dtype; `combine_rows` sums each token's rows in float32, in slot order.
"""

from typing import Any

import torch

from numba_moe import counting
from numba_moe.reference import permute as reference
from numba_moe.reference.permute import PermutedTokens
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, float32, int64
from numba_moe.runtime.launch import block_threads, launch
from numba_moe.runtime.parameters import FloatArray, Int32, Int32Array, Int64, Words
from numba_moe.runtime.primitives import load_float, store_float

THREADS = 256
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@cuda.jit
def gather_rows(
    hidden_states: Words,
    permuted_idx: Int32Array,
    num_slots: Int32,
    top_k: Int32,
    row_words: Int64,
    row_stride: Int64,
    permuted: Words,
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
    num_rows: Int32,
    top_k: Int32,
    hidden: Int64,
    row_stride: Int64,
    combined: FloatArray,
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


def _as_words(*rows: torch.Tensor) -> list[torch.Tensor]:
    """View matrices of one dtype as matrices of the widest words that fit their rows, strides and addresses."""
    size = rows[0].element_size()
    units = [extent * size for matrix in rows for extent in (matrix.shape[1], matrix.stride(0))]
    units += [matrix.data_ptr() for matrix in rows]
    word = next(word for word in WORDS if all(unit % word.itemsize == 0 for unit in units))
    return [matrix.view(word) for matrix in rows]


def _launch_permute(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    scratch: counting.SortScratch,
    out: PermutedTokens,
) -> None:
    num_slots, top_k = topk_ids.numel(), topk_ids.shape[1]
    offset = out.expert_first_token_offset
    counting.launch_sort(
        *(topk_ids, offset.numel() - 1, 1, scratch, out.permuted_idx),
        expert_map=expert_map,
        position_of_slot=out.inv_permuted_idx,
        offset=offset,
    )
    if out.permuted_hidden_states.numel():
        source, target = _as_words(hidden_states, out.permuted_hidden_states)
        sizes = (num_slots, top_k, source.shape[1], source.stride(0))
        launch(gather_rows, num_slots, block_threads(THREADS), source, out.permuted_idx, *sizes, target)


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
    checks.array("hidden_states", hidden_states, checks.FLOATS, (2,), rows=True)
    num_experts = checks.routing(topk_ids, num_experts, expert_map, ndims=(2,), like=("hidden_states", hidden_states))
    num_tokens, hidden = hidden_states.shape
    top_k = checks.integer("top_k (columns of `topk_ids`)", topk_ids.shape[1], 1)
    checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    dtype, num_slots = hidden_states.dtype, topk_ids.numel()
    if arrays.answered_by_reference(hidden_states):
        rows, *indices = arrays.by_reference(reference.moe_permute, hidden_states, topk_ids, num_experts, expert_map)
        return PermutedTokens(rows.to(dtype), *indices)
    out = PermutedTokens(
        arrays.empty((num_slots, hidden), dtype, hidden_states),
        arrays.empty(num_experts + 1, torch.int64, hidden_states),
        arrays.empty(num_slots, torch.int32, hidden_states),
        arrays.empty((num_tokens, top_k), torch.int32, hidden_states),
    )
    _launch_permute(hidden_states, topk_ids, expert_map, counting.sort_scratch(topk_ids, num_experts), out)
    return out


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
    checks.array("permuted", permuted, checks.FLOATS, (2,), rows=True)
    like = ("permuted", permuted)
    checks.array("topk_weights", topk_weights, checks.FLOATS, (2,), like=like)
    checks.array("inv_permuted_idx", inv_permuted_idx, (torch.int32,), (2,), like=like)
    checks.shape("inv_permuted_idx", inv_permuted_idx, tuple(topk_weights.shape), "that of `topk_weights`")
    num_rows, hidden = permuted.shape
    num_tokens, top_k = inv_permuted_idx.shape
    checks.fits_int32("permuted", num_rows, "the number of rows")
    if arrays.answered_by_reference(permuted):
        combined = arrays.by_reference(reference.moe_unpermute, permuted, topk_weights, inv_permuted_idx)
        return combined.to(permuted.dtype)
    out = arrays.empty((num_tokens, hidden), permuted.dtype, permuted)
    sizes = (num_rows, top_k, hidden, permuted.stride(0))
    blocks = num_tokens if hidden else 0
    launch(combine_rows, blocks, block_threads(THREADS), permuted, topk_weights, inv_permuted_idx, *sizes, out)
    return out
