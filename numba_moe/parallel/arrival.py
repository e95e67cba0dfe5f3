"""Received tokens put in the layout that experts take."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from numba_moe.ops.permute.layouts import moe_permute_masked
from numba_moe.ops.permute.permutation import moe_permute
from numba_moe.ops.permute.row_gradients import permute_backward
from numba_moe.reference.parallel import DispatchedTokens
from numba_moe.reference.permute import MaskedTokens, PermutedTokens
from numba_moe.runtime import checks

LAYOUTS = ("permuted", "masked", "tokens")


class PickRows(torch.autograd.Function):
    """Rows of tokens, copied to some places; the gradient is summed in order of a token's places."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return permute_backward(ctx.saved_tensors[0], grad), None, None


def pick_rows(rows: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Copy the row of a token to each of its places: `tokens` [num_rows] has whose, `places` [num_tokens, ..] where."""
    if not rows.requires_grad:
        words = rows.view(torch.uint8) if rows.dtype in checks.BYTES else rows  # torch indexes no floats of a byte
        return words.index_select(0, tokens).view(rows.dtype)
    picked: torch.Tensor = PickRows.apply(rows, tokens, places)
    return picked


def lay_out(
    received: DispatchedTokens, num_local: int, layout: str, alignment: int | None, capacity: int | None
) -> DispatchedTokens:
    """Put the rows of received tokens in a layout, as the function of the reference does."""
    ids, rows, scales = received.topk_ids, received.hidden_states, received.scales
    if layout == "tokens":
        return received._replace(num_dropped=ids.new_zeros(1))
    found: PermutedTokens | MaskedTokens
    if layout == "masked":
        found = moe_permute_masked(rows, ids, num_local, capacity or max(len(ids), 1), scales=scales)
    elif capacity is None:
        found = moe_permute(rows, ids, num_local, scales=scales, alignment=alignment)
    else:
        found = _first_rows(rows, ids, num_local, scales, alignment, capacity)
    num_dropped = ((ids >= 0) & (found.inv_permuted_idx < 0)).sum(dtype=torch.int32).reshape(1)
    return received._replace(hidden_states=None, scales=None, num_dropped=num_dropped, **found._asdict())


def _first_rows(
    rows: torch.Tensor,
    ids: torch.Tensor,
    num_local: int,
    scales: torch.Tensor | None,
    alignment: int | None,
    capacity: int,
) -> PermutedTokens:
    """Permute to the first rows alone, without memory for more."""
    index = first_rows(moe_permute(rows.detach()[:, :0], ids, num_local, alignment=alignment), capacity)
    slots, places = index.permuted_idx, index.inv_permuted_idx
    unused, tokens = slots == ids.numel(), torch.clamp(slots // ids.shape[1], max=max(len(ids) - 1, 0))

    def moved(values: torch.Tensor) -> torch.Tensor:
        if not len(values):  # there is nothing to pick, and a gradient all the same
            return torch.cat([values, values.new_zeros(len(slots), *values.shape[1:])])
        picked, mask = pick_rows(values, tokens, places), unused.view(-1, *(1,) * (values.dim() - 1))
        if values.dtype in checks.BYTES:
            return picked.view(torch.uint8).masked_fill(mask, 0).view(values.dtype)
        return picked.masked_fill(mask, 0)

    return index._replace(permuted_hidden_states=moved(rows), permuted_scales=None if scales is None else moved(scales))


def first_rows(index: PermutedTokens, capacity: int) -> PermutedTokens:
    """Keep the first rows of an index, and skip the slots of others."""
    offset = index.expert_first_token_offset.clamp(max=capacity)
    return index._replace(
        expert_first_token_offset=offset,
        permuted_idx=index.permuted_idx[:capacity],
        inv_permuted_idx=torch.where(index.inv_permuted_idx < capacity, index.inv_permuted_idx, -1),
        counts=torch.minimum(index.counts, offset.diff().to(torch.int32)),
        m_indices=None if index.m_indices is None else index.m_indices[:capacity],
    )
