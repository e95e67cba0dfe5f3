"""What drop-ins need beside the ops: put together from torch's operations around them."""

from typing import Any

import torch

import numba_moe
from numba_moe.interop import into
from numba_moe.runtime import checks
from numba_moe.runtime.plans import layout


def float32_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def chosen_where(mask: torch.Tensor, one: numba_moe.TopK, other: numba_moe.TopK) -> numba_moe.TopK:
    """Return one choice for the tokens that the mask has, [num_tokens], and the other for the rest."""
    rows = mask[:, None]
    return numba_moe.TopK(*(torch.where(rows, *parts) for parts in zip(one, other, strict=True)))


def packed_ids(topk_weights: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return int32, in `out` if it is given, of ids in the upper half and the weights' bits in bfloat16 below.

    Examples
    --------
    >>> hex(packed_ids(torch.tensor([[1.0]]), torch.tensor([[3]], dtype=torch.int32)).item())
    '0x33f80'
    """
    if out is not None:
        checks.array("packed_out", layout(out), (torch.int32,), (2,), like=("topk_ids", layout(topk_ids)), rows=True)
        checks.shape("packed_out", layout(out), tuple(topk_ids.shape), "(num_tokens, topk)")
    bits = topk_weights.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    return torch.bitwise_or(topk_ids.to(torch.int32) << 16, bits & 0xFFFF, out=out)


def local_slots(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Return which slots have a valid id: 0 or more, and with a map an expert that the map sends to 0 or more."""
    known = topk_ids >= 0
    if expert_map is not None:
        known &= topk_ids < len(expert_map)
        known &= expert_map[topk_ids.where(known, 0).long()] >= 0
    return known


def real_tokens(tokens: torch.Tensor, argument: str, number: torch.Tensor) -> torch.Tensor:
    """Return which tokens are before a number on the device, which an argument has: bool [num_tokens, 1]."""
    given = layout(number)
    checks.array(argument, given, checks.IDS, (0, 1))
    checks.shape(argument, given, (1,) * number.dim(), "() or (1,)")
    return torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)[:, None] < number


def slots_of(rows: torch.Tensor) -> torch.Tensor:
    """Return the number of each slot of rows [num_tokens, top_k, hidden], int32."""
    num_tokens, top_k, _ = rows.shape
    return torch.arange(num_tokens * top_k, dtype=torch.int32, device=rows.device).view(num_tokens, top_k)


def weighted_sum(
    rows: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """Sum rows [num_tokens, top_k, hidden], weighted; `out` keeps the rows of tokens that are none or have no id."""
    hidden = rows.shape[2]
    places = slots_of(rows)
    kept: Any = None
    if topk_ids is not None:
        places = places.where(local_slots(topk_ids, expert_map), -1)
        kept = (topk_ids >= 0).any(1)
    if num_valid_tokens is not None:
        valid = real_tokens(rows, "num_valid_tokens", num_valid_tokens)
        places = places.where(valid, -1)
        kept = valid[:, 0] if kept is None else kept & valid[:, 0]
    rows = rows.reshape(-1, hidden)
    if out is not None and kept is None:
        into.moe_unpermute(out, rows, topk_weights, places)
        return out
    out_dtype = rows.dtype if out is None else out.dtype
    found: torch.Tensor = numba_moe.moe_unpermute(rows, topk_weights, places, out_dtype=out_dtype)
    return found if out is None else torch.where(kept[:, None], found, out, out=out)
