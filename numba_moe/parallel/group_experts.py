"""Experts whose matrices are spread over the ranks of a group, and state dicts of all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from numba_moe.ops.experts import check_experts, feed_forward
from numba_moe.ops.experts import fused_experts as on_one_rank
from numba_moe.ops.grouped_products import multiply_by_expert
from numba_moe.parallel.dispatcher import TokenDispatcher
from numba_moe.runtime import checks, plans


def fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    dispatcher: TokenDispatcher,
    *,
    layer: int = 0,
    activation: str = "silu",
    interleaved: bool | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    accumulate_into_grad: bool = False,
) -> torch.Tensor:
    """Send each token through its experts, wherever they are, and sum what they return, weighted.

    Every rank of the dispatcher calls it, with its own tokens, or with none.

    Parameters
    ----------
    hidden_states : tensor of the dtype of the dispatcher, shape [num_tokens, hidden]
        Rows of this rank's tokens.
    gate_up_proj : tensor, shape [num_local_experts, 2 * width, hidden]
        The first matrix of each expert of this rank, in order of its slots; of `width` rows for an activation without
        ups.
    down_proj : tensor, shape [num_local_experts, hidden, width]
        The second.
    topk_weights : tensor of float32, float16 or bfloat16, shape [num_tokens, top_k]
        What experts are weighted by.
    topk_ids : tensor of int32 or int64, shape [num_tokens, top_k]
        Experts of all ranks. Ids that are no expert's, -1 for instance, add nothing.
    dispatcher : TokenDispatcher
        The way to the other ranks.
    layer : int
        The layer of the dispatcher's location.
    activation, interleaved, limit, alpha, beta, linear_beta : optional
        What lies between the matrices, as in `numba_moe.fused_experts`.
    gate_up_bias : tensor, shape [num_local_experts, rows of `gate_up_proj`], optional
        Added after the first matrix.
    down_bias : tensor, shape [num_local_experts, hidden], optional
        Added after the second.
    accumulate_into_grad : bool
        Backward adds the gradients of both matrices to their `.grad` itself: `training.fused_experts_into_grad`.

    Returns
    -------
    tensor of the dtype of `hidden_states`, shape [num_tokens, hidden]

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, or mixed devices.
    RuntimeError
        `PeerTimeoutError`, where a rank is late or gone.

    Examples
    --------
    >>> dispatcher = TokenDispatcher(num_experts=4, top_k=1, hidden=2, max_tokens=8, dtype=torch.float32)
    >>> rows, ids, weights = torch.ones(3, 2), torch.tensor([[1], [0], [-1]]), torch.ones(3, 1)
    >>> fused_experts(rows, torch.ones(4, 2, 2), torch.ones(4, 2, 1), weights, ids, dispatcher)
    tensor([[3.5232, 3.5232],
            [3.5232, 3.5232],
            [0.0000, 0.0000]])
    """
    num_local = dispatcher.num_local_experts
    for name, matrix in {"gate_up_proj": gate_up_proj, "down_proj": down_proj}.items():
        rule = f"of num_local_experts = {num_local} matrices"
        checks.holds(name, rule, matrix.dim() == 3 and len(matrix) == num_local, f"shape {tuple(matrix.shape)}")
    numbers = {"interleaved": interleaved, "limit": limit, "alpha": alpha, "beta": beta, "linear_beta": linear_beta}
    options: dict[str, Any] = {"activation": activation, **numbers}
    arrays = (hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, gate_up_bias, down_bias)
    names = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "topk_ids", "gate_up_bias", "down_bias")
    described = {name: plans.layout(array) for name, array in zip(names, arrays, strict=True)}
    for name in names[1:]:  # which may be strided, as torch's products and `dispatch` take them
        if isinstance(described[name], plans.Layout):
            described[name] = described[name]._replace(strides=None)
    multiply: Callable[..., Any] = multiply_by_expert
    if accumulate_into_grad:
        from numba_moe.training import into_grad  # loads torch's compiler

        into_grad.check_leaves(hidden_states, gate_up_proj, down_proj)
        multiply = into_grad.multiply_into_grad  # which converts matrices
        described |= {name: described[name]._replace(dtype=hidden_states.dtype) for name in into_grad.MATRICES}
    check_experts(on_one_rank.declaration.given_of({**described, **options}))  # before other ranks are told anything
    sent = dispatcher.dispatch(hidden_states, topk_ids, topk_weights, layer=layer)
    biases = (gate_up_bias, down_bias)
    arrived = (sent.permuted_hidden_states, sent.expert_first_token_offset)
    try:
        rows = feed_forward(*arrived, gate_up_proj, down_proj, *biases, multiply, **options)
    except BaseException:
        dispatcher.release(sent)
        raise
    return dispatcher.combine(rows, sent)


def gather_experts(
    tensors: Mapping[str, torch.Tensor], dispatcher: TokenDispatcher, layer: int = 0
) -> dict[str, torch.Tensor]:
    """Collect what each rank has for its experts, for all experts on all ranks.

    Parameters
    ----------
    tensors : mapping of str to tensor, shape [num_local_experts, ...]
        What this rank has, in order of its slots; the same names, dtypes and other sizes on every rank.
    dispatcher : TokenDispatcher
        Says where experts are.
    layer : int
        The layer of its location.

    Returns
    -------
    dict of str to tensor, shape [num_experts, ...]
        The same on every rank; of an expert with replicas that in its first slot.

    Raises
    ------
    ValueError
        A tensor that is not of this rank's slots.

    Notes
    -----
    One all_gather for each tensor.

    Examples
    --------
    >>> dispatcher = TokenDispatcher(num_experts=2, top_k=1, hidden=2, max_tokens=8)
    >>> gather_experts({"bias": torch.tensor([1.5, 2.5])}, dispatcher)
    {'bias': tensor([1.5000, 2.5000])}
    """
    location, layer = dispatcher.location, _checked(layer, dispatcher)
    sizes = location.slots_per_rank
    most = int(sizes.max())
    slots = location.logical_to_all_physical_map[layer, :, 0]
    first = np.concatenate([[0], np.cumsum(sizes)])
    ranks = location.rank_of_slot[slots]
    rows = torch.from_numpy(ranks * most + slots - first[ranks])
    found = {}
    for name, tensor in tensors.items():
        _check_slots(name, tensor, dispatcher.num_local_experts)
        padded = tensor.detach().new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        every = [padded]
        if dispatcher.num_ranks > 1:
            every = [torch.empty_like(padded) for _ in range(dispatcher.num_ranks)]
            dist.all_gather(every, padded, group=dispatcher.group)
        found[name] = torch.cat(every)[rows.to(tensor.device)]
    return found


def shard_experts(
    tensors: Mapping[str, torch.Tensor], dispatcher: TokenDispatcher, layer: int = 0
) -> dict[str, torch.Tensor]:
    """Take what belongs to the experts of this rank, from the arrays of all experts.

    Parameters
    ----------
    tensors : mapping of str to tensor, shape [num_experts, ...]
        What there is for each expert.
    dispatcher : TokenDispatcher
        Says where experts are.
    layer : int
        The layer of its location.

    Returns
    -------
    dict of str to tensor, shape [num_local_experts, ...]
        Copies, in order of this rank's slots; zeros in a slot without an expert.

    Raises
    ------
    ValueError
        A tensor that is not of all experts.

    Examples
    --------
    >>> dispatcher = TokenDispatcher(num_experts=2, top_k=1, hidden=2, max_tokens=8)
    >>> shard_experts({"bias": torch.tensor([1.5, 2.5])}, dispatcher)
    {'bias': tensor([1.5000, 2.5000])}
    """
    experts = local_experts(dispatcher, layer)
    found = {}
    for name, tensor in tensors.items():
        _check_slots(name, tensor, dispatcher.num_experts)
        mine = experts.to(tensor.device)
        taken = tensor.detach()[mine.clamp(min=0)]
        taken[mine < 0] = 0
        found[name] = taken
    return found


def local_experts(dispatcher: TokenDispatcher, layer: int = 0) -> torch.Tensor:
    """Return the expert of each of this rank's slots, -1 for none: int64 [num_local_experts]."""
    location, layer = dispatcher.location, _checked(layer, dispatcher)
    return torch.from_numpy(location.physical_to_logical_map[layer, location.rank_of_slot == dispatcher.rank])


def _checked(layer: int, dispatcher: TokenDispatcher) -> int:
    """Return a layer of the dispatcher's location."""
    last = dispatcher.location.num_layers - 1
    return checks.integer("layer", layer, 0, last, f"num_layers - 1 = {last}")


def _check_slots(name: str, tensor: torch.Tensor, count: int) -> None:
    of_slots = tensor.dim() > 0 and len(tensor) == count
    checks.holds(f"tensors[{name!r}]", f"of {count} experts", of_slots, f"shape {tuple(tensor.shape)}")
