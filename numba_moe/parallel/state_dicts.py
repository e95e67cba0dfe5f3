"""Modules whose experts are spread over ranks: state dicts of all experts, and gradients of what ranks share."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from numba_moe.parallel.group_experts import gather_experts, local_experts, shard_experts
from numba_moe.runtime import checks

EXPERT_TENSORS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


def _spread(module: torch.nn.Module) -> Iterator[tuple[str, Any, dict[str, torch.nn.Parameter]]]:
    """Yield the prefix, the block and the expert tensors of each block with a dispatcher."""
    for name, block in module.named_modules():
        if getattr(block, "dispatcher", None) is not None:
            tensors = {key: getattr(block, key) for key in EXPERT_TENSORS}
            held = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            yield f"{name}." if name else "", block, held


def expert_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that belong to experts of this rank, which FSDP2 and DDP are to leave alone.

    Parameters
    ----------
    module : torch.nn.Module
        A `MoEBlock` with a dispatcher, or what holds some.

    Returns
    -------
    list of torch.nn.Parameter

    Examples
    --------
    >>> expert_parameters(torch.nn.Linear(2, 2))
    []
    """
    return [parameter for _, _, held in _spread(module) for parameter in held.values()]


def expert_weights(module: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of this rank's experts by layer, as `placement.migrate` and `placement.Balancer` take them.

    Parameters
    ----------
    module : torch.nn.Module
        What holds a `MoEBlock` with a dispatcher for each layer of its location.

    Returns
    -------
    list of dict of str to torch.Tensor
        The memory of the parameters; their first dimension is the slots of this rank.

    Raises
    ------
    ValueError
        A layer of the location without a block, or with two.

    Examples
    --------
    >>> from numba_moe import MoEBlock
    >>> from numba_moe.parallel import TokenDispatcher
    >>> dispatcher = TokenDispatcher(num_experts=4, top_k=2, hidden=8, max_tokens=16, dtype=torch.float32)
    >>> [sorted(layer) for layer in expert_weights(MoEBlock(8, 6, num_experts=4, top_k=2, dispatcher=dispatcher))]
    [['down_proj', 'gate_up_proj']]
    """
    found = {block.layer: held for _, block, held in _spread(module)}
    layers = sorted(block.layer for _, block, _ in _spread(module))
    num_layers = max((block.dispatcher.location.num_layers for _, block, _ in _spread(module)), default=0)
    rule = f"what has one block with a dispatcher for each of {num_layers} layers"
    checks.holds("module", rule, layers == list(range(num_layers)) and bool(layers), f"blocks of the layers {layers}")
    return [{name: tensor.detach() for name, tensor in found[layer].items()} for layer in layers]


def gather_state_dict(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict with the experts of all ranks, the same on every rank.

    Parameters
    ----------
    module : torch.nn.Module
        A `MoEBlock` with a dispatcher, or what holds some; every rank calls it.

    Returns
    -------
    dict of str to torch.Tensor
        What `MoEBlock.state_dict` has where one rank holds all experts.

    See Also
    --------
    load_gathered_state_dict : The other way, for any number of ranks.

    Examples
    --------
    >>> sorted(gather_state_dict(torch.nn.Linear(2, 2)))
    ['bias', 'weight']
    """
    state = dict(module.state_dict())
    for prefix, block, held in _spread(module):
        found = gather_experts(held, block.dispatcher, block.layer)
        state |= {prefix + key: tensor for key, tensor in found.items()}
    return state


def load_gathered_state_dict(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict with the experts of all ranks: each takes those that its slots hold.

    Parameters
    ----------
    module : torch.nn.Module
        A `MoEBlock` with a dispatcher, or what holds some.
    state : mapping of str to torch.Tensor
        As `gather_state_dict` returns it, from any number of ranks, or the state dict of blocks without a dispatcher.

    See Also
    --------
    gather_state_dict : The other way.

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 2)
    >>> load_gathered_state_dict(layer, gather_state_dict(layer))
    """
    mine = dict(state)
    for prefix, block, held in _spread(module):
        tensors = {
            key: mine[prefix + key] for key in held if prefix + key in mine
        }  # torch names those that are missing
        found = shard_experts(tensors, block.dispatcher, block.layer)
        mine |= {prefix + key: tensor for key, tensor in found.items()}
    module.load_state_dict(mine)


def sum_gradients(module: torch.nn.Module) -> None:
    """Add up the gradients of what several ranks hold: of replicas of experts, and of all other parameters.

    Call it after backward on every rank, with a loss that is the rank's part of the sum over all ranks. Beside DDP or
    FSDP2, which reduce the gradients of their own parameters, give it the blocks' experts alone.

    Parameters
    ----------
    module : torch.nn.Module
        A `MoEBlock` with a dispatcher, or what holds some of one group.

    Examples
    --------
    >>> sum_gradients(torch.nn.Linear(2, 2))
    """
    of_experts = set(expert_parameters(module))
    groups = {block.dispatcher.group for _, block, _ in _spread(module) if block.dispatcher.num_ranks > 1}
    for group in groups:
        for parameter in module.parameters():
            if parameter not in of_experts and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=group)
    for _, block, held in _spread(module):
        _sum_replicas(block, held)


def _sum_replicas(block: Any, held: Mapping[str, torch.nn.Parameter]) -> None:
    """Give each replica of an expert the sum of their gradients."""
    dispatcher, location = block.dispatcher, block.dispatcher.location
    several = location.logical_to_all_physical_map_num_valid[block.layer] > 1
    mine = local_experts(dispatcher, block.layer)
    for expert in several.nonzero()[0].tolist():
        slots = (mine == expert).nonzero()[:, 0].tolist()
        for parameter in held.values():
            grads = [] if parameter.grad is None else [parameter.grad[slot] for slot in slots]
            total = sum(grads, torch.zeros_like(parameter[0]))
            if dispatcher.num_ranks > 1:
                dist.all_reduce(total, group=dispatcher.group)
            for grad in grads:
                grad.copy_(total)
