"""Move rows into expert order, and combine them again."""

from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.align import max_sorted_slots, moe_align_block_size
from numba_moe.reference.counting import count_tokens_per_expert, expert_offsets


class PermutedTokens(NamedTuple):
    """Rows in expert order, and the indices to combine them; see `moe_permute`."""

    permuted_hidden_states: Any
    expert_first_token_offset: Any
    permuted_idx: Any
    inv_permuted_idx: Any
    counts: Any
    m_indices: Any = None
    permuted_scales: Any = None


class MaskedTokens(NamedTuple):
    """Rows in one batch per expert, and the indices to combine them; see `moe_permute_masked`."""

    permuted_hidden_states: Any
    masked_m: Any
    permuted_idx: Any
    inv_permuted_idx: Any
    permuted_scales: Any = None


class ReorderedSlots(NamedTuple):
    """Slots in expert order, with the names of SGLang's dispatcher; see `moe_reorder`."""

    reorder_topk_ids: Any
    src2dst: Any
    seg_indptr: Any


def gather(rows: np.ndarray | None, permuted_idx: np.ndarray, topk_ids: np.ndarray) -> np.ndarray | None:
    """Copy the row of each slot's token; a row without a slot becomes zeros.

    >>> gather(np.array([[1], [2]]), np.array([3, 0, 4]), np.zeros((2, 2)))
    array([[2],
           [1],
           [0]])
    """
    if rows is None:
        return None
    in_use = permuted_idx < topk_ids.size
    permuted = np.zeros((len(permuted_idx), *rows.shape[1:]), rows.dtype)
    permuted[in_use] = rows[permuted_idx[in_use] // topk_ids.shape[1]]
    return permuted


def moe_permute(
    hidden_states: np.ndarray,
    topk_ids: np.ndarray,
    num_experts: int,
    expert_map: np.ndarray | None = None,
    *,
    scales: np.ndarray | None = None,
    alignment: int | None = None,
    zero_padding: bool = True,
) -> PermutedTokens:
    """Copy each token's row once for each of its experts, in expert order.

    Parameters
    ----------
    hidden_states
        Any dtype, [num_tokens, hidden].
    topk_ids
        int32 or int64 [num_tokens, top_k]; ids outside ``[0, num_experts)`` are skipped.
    num_experts
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    expert_map
        int32 or int64 [num_experts]: this rank's id of each expert, -1 for an expert of another rank, whose slots
        are skipped.
    scales
        Any dtype, [num_tokens] or [num_tokens, groups]: scales of the rows, which move together with them.
    alignment
        The rows of each expert begin at a multiple of this, and `m_indices` gives the expert of each row.
    zero_padding
        Write zeros to rows without a slot. Otherwise these rows may hold anything.

    Returns
    -------
    PermutedTokens
        permuted_hidden_states: [num_rows, hidden] in the dtype of `hidden_states`. num_rows is ``num_tokens * top_k``,
        and with an alignment it is enough for any routing. expert_first_token_offset: int64 [num_experts + 1]; the rows
        of expert e begin at ``offset[e]``, and rows from ``offset[-1]`` on are unused. permuted_idx: int32 [num_rows],
        the slot of each row, num_slots for a row without a slot. inv_permuted_idx: int32 [num_tokens, top_k], the row
        of each slot, -1 for skipped slots. counts: int32 [num_experts], the number of slots of each expert. m_indices:
        int32 [num_rows], the expert of each row, -1 for a row without a slot; None without an alignment.
        permuted_scales: [num_rows] or [num_rows, groups], None without scales.

    Notes
    -----
    The order is stable: the rows of an expert ascend by slot.

    Examples
    --------
    >>> rows = np.array([[1.0], [2.0]], np.float32)
    >>> permuted = moe_permute(rows, np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> permuted.permuted_hidden_states.ravel()
    array([1., 2., 1., 0.], dtype=float32)
    >>> permuted.expert_first_token_offset
    array([0, 2, 3])
    >>> permuted.permuted_idx
    array([1, 3, 0, 4], dtype=int32)
    >>> permuted.inv_permuted_idx
    array([[ 2,  0],
           [-1,  1]], dtype=int32)
    >>> aligned = moe_permute(rows, np.array([[1, 0], [-1, 0]]), num_experts=2, alignment=3)
    >>> aligned.permuted_hidden_states.ravel()
    array([1., 2., 0., 1., 0., 0., 0., 0., 0.], dtype=float32)
    >>> aligned.m_indices
    array([ 0,  0, -1,  1, -1, -1, -1, -1, -1], dtype=int32)
    """
    block_size = alignment or 1
    num_rows = max_sorted_slots(topk_ids.size, block_size, num_experts, pad_sorted_ids=True)
    out = np.empty(num_rows, np.int32), np.empty(num_rows // block_size, np.int32), np.empty(1, np.int32)
    inv_permuted_idx = np.empty(topk_ids.shape, np.int32)
    permuted_idx, block_experts, _ = moe_align_block_size(
        topk_ids,
        block_size,
        num_experts,
        expert_map,
        ignore_invalid_experts=True,
        out=out,
        inv_sorted_idx=inv_permuted_idx,
    )
    counts = count_tokens_per_expert(topk_ids, num_experts, expert_map)
    m_indices = None
    if alignment is not None:
        experts = np.repeat(block_experts, block_size)
        m_indices = np.where(permuted_idx < topk_ids.size, experts, np.int32(-1))
    return PermutedTokens(
        gather(hidden_states, permuted_idx, topk_ids),
        expert_offsets(counts, block_size),
        permuted_idx,
        inv_permuted_idx,
        counts,
        m_indices,
        gather(scales, permuted_idx, topk_ids),
    )


def moe_permute_masked(
    hidden_states: np.ndarray,
    topk_ids: np.ndarray,
    num_experts: int,
    max_m: int,
    expert_map: np.ndarray | None = None,
    *,
    num_local_experts: int | None = None,
    scales: np.ndarray | None = None,
    zero_padding: bool = True,
) -> MaskedTokens:
    """Copy each token's row once for each of its experts, into one batch of rows per expert.

    Parameters
    ----------
    hidden_states
        Any dtype, [num_tokens, hidden].
    topk_ids
        int32 or int64 [num_tokens, top_k]; ids outside ``[0, num_experts)`` are skipped.
    num_experts
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    max_m
        Number of rows of a batch. Further slots of the expert are skipped.
    expert_map
        int32 or int64 [num_experts]: this rank's id of each expert, -1 for an expert of another rank, whose slots
        are skipped.
    num_local_experts
        Number of batches, by default num_experts. Slots of experts without a batch are skipped.
    scales
        Any dtype, [num_tokens] or [num_tokens, groups]: scales of the rows, which move together with them.
    zero_padding
        Write zeros to rows without a slot. Otherwise these rows may hold anything.

    Returns
    -------
    MaskedTokens
        permuted_hidden_states: [num_local_experts, max_m, hidden]. masked_m: int32 [num_local_experts], the number of
        rows in use of each batch. permuted_idx: int32 [num_local_experts, max_m], the slot of each row, num_slots for a
        row without a slot. inv_permuted_idx: int32 [num_tokens, top_k], ``expert * max_m + row`` of each slot, -1 for
        skipped slots. permuted_scales: [num_local_experts, max_m] or [num_local_experts, max_m, groups], None without
        scales.

    Notes
    -----
    The order is stable: the rows of an expert ascend by slot, and the first max_m stay.

    Examples
    --------
    >>> rows = np.array([[1.0], [2.0], [3.0]], np.float32)
    >>> masked = moe_permute_masked(rows, np.array([[1, 0], [-1, 0], [0, 1]]), num_experts=2, max_m=2)
    >>> masked.permuted_hidden_states.reshape(2, 2)
    array([[1., 2.],
           [1., 3.]], dtype=float32)
    >>> masked.masked_m
    array([2, 2], dtype=int32)
    >>> masked.inv_permuted_idx
    array([[ 2,  0],
           [-1,  1],
           [-1,  3]], dtype=int32)
    """
    num_slots = topk_ids.size
    batches = num_experts if num_local_experts is None else num_local_experts
    counts = count_tokens_per_expert(topk_ids, num_experts, expert_map)
    by_expert, _, _ = moe_align_block_size(topk_ids, 1, num_experts, expert_map, ignore_invalid_experts=True)
    permuted_idx = np.full((batches, max_m), num_slots, np.int32)
    inv_permuted_idx = np.full(num_slots, -1, np.int32)
    for expert, slots in enumerate(np.split(by_expert, np.cumsum(counts))[:batches]):
        slots = slots[:max_m]
        permuted_idx[expert, : len(slots)] = slots
        inv_permuted_idx[slots] = expert * max_m + np.arange(len(slots))

    def batched(rows: np.ndarray | None) -> np.ndarray | None:
        permuted = gather(rows, permuted_idx.ravel(), topk_ids)
        return None if permuted is None else permuted.reshape(batches, max_m, *permuted.shape[1:])

    return MaskedTokens(
        batched(hidden_states),
        np.minimum(counts[:batches], max_m).astype(np.int32),
        permuted_idx,
        inv_permuted_idx.reshape(topk_ids.shape),
        batched(scales),
    )


def moe_reorder(topk_ids: np.ndarray, num_experts: int, expert_map: np.ndarray | None = None) -> ReorderedSlots:
    """Order the slots by expert, and return the order in the form of SGLang's DeepEP dispatcher.

    Parameters
    ----------
    topk_ids
        int32 or int64 [num_tokens, top_k] or [num_slots]; ids outside ``[0, num_experts)`` are skipped.
    num_experts
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    expert_map
        int32 or int64 [num_experts]: this rank's id of each expert, -1 for an expert of another rank, whose slots
        are skipped.

    Returns
    -------
    ReorderedSlots
        reorder_topk_ids: int32 [num_slots], the expert of each row, -1 for unused rows at the end. src2dst: int32
        [num_slots], the row of each slot, -1 for skipped slots. seg_indptr: int64 [num_experts + 1]; expert e has the
        rows from ``seg_indptr[e]`` up to ``seg_indptr[e + 1]``.

    Notes
    -----
    The order is that of `moe_permute`.

    Examples
    --------
    >>> reordered = moe_reorder(np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> reordered.reorder_topk_ids
    array([ 0,  0,  1, -1], dtype=int32)
    >>> reordered.src2dst
    array([ 2,  0, -1,  1], dtype=int32)
    >>> reordered.seg_indptr
    array([0, 2, 3])
    """
    src2dst = np.empty(topk_ids.size, np.int32)
    _, reorder_topk_ids, _ = moe_align_block_size(
        topk_ids.ravel(), 1, num_experts, expert_map, ignore_invalid_experts=True, inv_sorted_idx=src2dst
    )
    seg_indptr = expert_offsets(count_tokens_per_expert(topk_ids, num_experts, expert_map))
    return ReorderedSlots(reorder_topk_ids, src2dst, seg_indptr)


def dtype_of_result(out_dtype: Any, dtype: np.dtype) -> Any:
    """Return the NumPy dtype of a result, which is float32 for bfloat16.

    >>> dtype_of_result(None, np.float16).__name__, dtype_of_result("bfloat16", np.float16)
    ('float16', 'float32')
    """
    return dtype if out_dtype is None else str(out_dtype).removeprefix("torch.").replace("bfloat16", "float32")


def moe_unpermute(
    permuted: np.ndarray,
    topk_weights: np.ndarray,
    inv_permuted_idx: np.ndarray,
    *,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = None,
) -> np.ndarray:
    """Sum the weighted rows of each token.

    Parameters
    ----------
    permuted
        float32 or float16 [num_rows, hidden], rows in expert order.
    topk_weights
        float32 or float16 [num_tokens, top_k].
    inv_permuted_idx
        int32 [num_tokens, top_k] or [num_tokens * top_k], the row of each slot. A slot whose index is outside ``[0,
        num_rows)`` adds nothing.
    routed_scaling_factor
        Factor of the sums.
    out_dtype
        Dtype of the result, by default that of `permuted`. NumPy lacks bfloat16 and returns float32 for it.

    Returns
    -------
    np.ndarray
        [num_tokens, hidden]: ``sum over k of topk_weights[t, k] * permuted[inv_permuted_idx[t, k]]``, times the factor.

    Examples
    --------
    >>> rows = np.array([[10.0], [20.0], [30.0]], np.float32)
    >>> weights = np.array([[0.5, 0.5], [1.0, 0.25]], np.float32)
    >>> moe_unpermute(rows, weights, np.array([[2, 0], [-1, 1]], np.int32))
    array([[20.],
           [ 5.]], dtype=float32)
    """
    num_tokens, top_k = topk_weights.shape
    combined = np.zeros((num_tokens, permuted.shape[1]), np.float64)
    for k in range(top_k):
        rows = inv_permuted_idx.reshape(num_tokens, top_k)[:, k]
        present = (rows >= 0) & (rows < len(permuted))
        weights = topk_weights[present, k, None].astype(np.float64)
        combined[present] += weights * permuted[rows[present]]
    return (combined * routed_scaling_factor).astype(dtype_of_result(out_dtype, permuted.dtype))


def unpermute_backward(
    permuted: np.ndarray,
    topk_weights: np.ndarray,
    inv_permuted_idx: np.ndarray,
    grad: np.ndarray,
    routed_scaling_factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of a loss by the rows and the weights of `moe_unpermute`, given the gradient by its result.

    Each row must belong to at most one slot, as `moe_permute` makes them.

    >>> rows, weights, index = np.array([[10.0], [20.0]]), np.array([[0.5, 2.0]]), np.array([[1, 0]])
    >>> grad_rows, grad_weights = unpermute_backward(rows, weights, index, np.array([[3.0]]))
    >>> grad_rows.ravel(), grad_weights.ravel()
    (array([6. , 1.5]), array([60., 30.]))
    """
    grad = grad.astype(np.float64) * routed_scaling_factor
    grad_rows = np.zeros(permuted.shape, np.float64)
    grad_weights = np.zeros(topk_weights.shape, np.float64)
    for k in range(topk_weights.shape[1]):
        rows = inv_permuted_idx.reshape(topk_weights.shape)[:, k]
        present = (rows >= 0) & (rows < len(permuted))
        grad_rows[rows[present]] = topk_weights[present, k, None] * grad[present]
        grad_weights[present, k] = (permuted[rows[present]] * grad[present]).sum(1)
    return grad_rows.astype(permuted.dtype), grad_weights.astype(topk_weights.dtype)


def spread_rows(rows: np.ndarray, inv_permuted_idx: np.ndarray) -> np.ndarray:
    """Copy the row of each token to the rows of its slots; rows without a slot are zeros.

    >>> spread_rows(np.array([[10.0], [20.0]]), np.array([[2, 0], [-1, 1]]))
    array([[10.],
           [20.],
           [10.],
           [ 0.]])
    """
    spread = np.zeros((inv_permuted_idx.size, rows.shape[1]), rows.dtype)
    for places in inv_permuted_idx.T:
        spread[places[places >= 0]] = rows[places >= 0]
    return spread


def moe_sum(
    hidden_states: np.ndarray,
    topk_ids: np.ndarray | None = None,
    *,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = None,
) -> np.ndarray:
    """Sum the rows of each token.

    Parameters
    ----------
    hidden_states
        float32 or float16 [num_tokens, top_k, hidden].
    topk_ids
        int32 or int64 [num_tokens, top_k], the experts of the slots. A slot with an id below 0 adds nothing.
    routed_scaling_factor
        Factor of the sums.
    out_dtype
        Dtype of the result, by default that of `hidden_states`. NumPy lacks bfloat16 and returns float32 for it.

    Returns
    -------
    np.ndarray
        [num_tokens, hidden].

    Examples
    --------
    >>> moe_sum(np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), np.array([[5, 0], [-1, 3]]), routed_scaling_factor=10.0)
    array([[30.],
           [40.]])
    """
    rows = hidden_states.astype(np.float64)
    if topk_ids is not None:
        rows = np.where((topk_ids >= 0)[..., None], rows, 0.0)
    return (rows.sum(1) * routed_scaling_factor).astype(dtype_of_result(out_dtype, hidden_states.dtype))
