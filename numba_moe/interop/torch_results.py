"""Tensors like those that ops return, but for what they hold: sizes follow from shapes, which may be symbols."""

from typing import Any

import torch

from numba_moe.reference.ragged import BLOCK_SIZES, schedule_shift


def int32(like: torch.Tensor, *shape: Any) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def smaller(one: Any, other: Any) -> Any:
    """Return the smaller of two numbers, of symbols without comparing them."""
    # As dynamo traces, symbols are integers and it minds them itself; not every version traces sym_min of others.
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else torch.sym_min(one, other)


def sorted_slots(num_slots: Any, block_size: Any, num_experts: Any, pad_sorted_ids: bool) -> Any:
    """Return what the reference's `max_sorted_slots` does, for symbols too.

    >>> sorted_slots(100, 16, 8, False), sorted_slots(100, 16, 8, True), sorted_slots(3, 16, 8, False)
    (220, 224, 48)
    """
    length = num_slots + smaller(num_slots, num_experts) * (block_size - 1)
    return -(-length // block_size) * block_size if pad_sorted_ids else length


def scheduled_blocks(num_slices: Any, num_rows: Any) -> Any:
    """Return what the reference's `max_blocks` does, for symbols too.

    >>> scheduled_blocks(4, 159), scheduled_blocks(4, 3), scheduled_blocks(0, 9)
    (13, 3, 0)
    """
    if isinstance(num_slices, int) and num_slices == 0:
        return min(num_rows, 0)
    first = smaller(num_slices, num_rows)
    return first + (num_rows - first) // BLOCK_SIZES[0]


def align(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    **_: Any,
) -> Any:
    length = sorted_slots(topk_ids.numel(), block_size, num_experts, pad_sorted_ids)
    return tuple(int32(topk_ids, size) for size in (length, -(-length // block_size), 1))


def batched(max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor) -> Any:
    num_blocks = expert_num_tokens.shape[0] * -(-max_tokens_per_batch // block_size)
    return tuple(int32(expert_num_tokens, size) for size in (num_blocks * block_size, num_blocks, 1))


def lora(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    block_size: int,
    num_experts: int,
    max_loras: int,
    adapter_enabled: torch.Tensor | None = None,
    lora_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    **_: Any,
) -> Any:
    length = sorted_slots(topk_ids.numel(), block_size, num_experts, pad_sorted_ids)
    shapes = (max_loras, length), (max_loras, -(-length // block_size)), (max_loras,)
    return tuple(int32(topk_ids, *shape) for shape in shapes)


def ragged(slice_sizes: torch.Tensor, num_rows: int) -> Any:
    num_slices, kinds = slice_sizes.shape[0], len(BLOCK_SIZES)
    dtype = torch.int32 if schedule_shift(num_slices, num_rows) == 16 else torch.int64
    schedule = slice_sizes.new_empty((kinds, scheduled_blocks(num_slices, num_rows)), dtype=dtype)
    shapes = (num_slices,), (num_slices + 1,), (kinds, num_slices + 1)
    return *(int32(slice_sizes, *shape) for shape in shapes), schedule


def choice(gating_output: torch.Tensor, top_k: int, **_: Any) -> Any:
    shape = (gating_output.shape[0], top_k)
    return gating_output.new_empty(shape, dtype=torch.float32), int32(gating_output, *shape)


def selection(
    gating_output: torch.Tensor,
    top_k: Any,
    *,
    num_fused_shared_experts: int = 0,
    indices_dtype: str = "int32",
    **_: Any,
) -> Any:
    shape = (gating_output.shape[0], top_k + num_fused_shared_experts)
    ids = gating_output.new_empty(shape, dtype=getattr(torch, indices_dtype))
    return gating_output.new_empty(shape, dtype=torch.float32), ids


def weighing(gating_output: torch.Tensor, topk_ids: torch.Tensor, **options: Any) -> Any:
    return selection(gating_output, topk_ids.shape[1], **options)


def routed(
    gating_output: torch.Tensor,
    top_k: Any,
    block_size: Any,
    *,
    num_physical_experts: Any = None,
    pad_sorted_ids: bool = False,
    num_fused_shared_experts: Any = 0,
    num_zero_experts: Any = 0,
    **options: Any,
) -> Any:
    weights, ids = selection(gating_output, top_k, num_fused_shared_experts=num_fused_shared_experts, **options)
    num_sorted = num_physical_experts
    if num_sorted is None:
        num_sorted = gating_output.shape[1] - num_zero_experts + num_fused_shared_experts
    return weights, ids, *align(ids, block_size, num_sorted, pad_sorted_ids=pad_sorted_ids)


def _scales(scales: torch.Tensor | None, like: torch.Tensor, *rows: Any) -> torch.Tensor:
    return like.new_empty(0) if scales is None else scales.new_empty((*rows, *scales.shape[1:]))


def permuted(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    alignment: int | None = None,
    zero_padding: bool = True,
) -> Any:
    rows = sorted_slots(topk_ids.numel(), alignment or 1, num_experts, pad_sorted_ids=True)
    return (
        hidden_states.new_empty((rows, hidden_states.shape[1])),
        hidden_states.new_empty(num_experts + 1, dtype=torch.int64),
        int32(topk_ids, rows),
        int32(topk_ids, *topk_ids.shape),
        int32(topk_ids, num_experts),
        hidden_states.new_empty(0) if alignment is None else int32(topk_ids, rows),
        _scales(scales, hidden_states, rows),
    )


def masked(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    max_m: int,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
    scales: torch.Tensor | None = None,
    zero_padding: bool = True,
) -> Any:
    batches = num_experts if num_local_experts is None else num_local_experts
    return (
        hidden_states.new_empty((batches, max_m, hidden_states.shape[1])),
        int32(topk_ids, batches),
        int32(topk_ids, batches, max_m),
        int32(topk_ids, *topk_ids.shape),
        _scales(scales, hidden_states, batches, max_m),
    )


def reordered(topk_ids: torch.Tensor, num_experts: int, **_: Any) -> Any:
    slots = topk_ids.numel()
    return int32(topk_ids, slots), int32(topk_ids, slots), topk_ids.new_empty(num_experts + 1, dtype=torch.int64)


def combined(
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    routed_scaling_factor: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return permuted.new_empty((topk_weights.shape[0], permuted.shape[1]), dtype=out_dtype or permuted.dtype)


def summed(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    shape = (hidden_states.shape[0], hidden_states.shape[2])
    return hidden_states.new_empty(shape, dtype=out_dtype or hidden_states.dtype)


def counts(topk_ids: torch.Tensor, num_experts: int, **_: Any) -> torch.Tensor:
    return int32(topk_ids, num_experts)


def offsets(counts: torch.Tensor, **_: Any) -> torch.Tensor:
    return counts.new_empty(counts.shape[0] + 1, dtype=torch.int64)


def choice_backward(gating_output: torch.Tensor, **_: Any) -> torch.Tensor:
    return gating_output.new_empty(gating_output.shape)


def permuted_backward(inv_permuted_idx: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return grad.new_empty((inv_permuted_idx.shape[0], grad.shape[-1]))


def combined_backward(
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    grad: torch.Tensor,
    routed_scaling_factor: float,
    by_rows: bool,
    by_weights: bool,
) -> Any:
    parts = ((permuted, by_rows), (topk_weights, by_weights))
    return tuple(part.new_empty(part.shape if wanted else 0) for part, wanted in parts)


def dispatched(topk_ids: torch.Tensor, physical_map: Any = None, num_valid: Any = None, **_: Any) -> Any:
    return topk_ids.new_empty(topk_ids.shape)


def nothing(**_: Any) -> None:
    return None


def experts(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def activated(gate_up: torch.Tensor, *_: Any, activation: str = "silu", **__: Any) -> torch.Tensor:
    rows, columns = gate_up.shape
    return gate_up.new_empty((rows, columns if activation == "none" else columns // 2))
