"""What counts say about experts and ranks; computed where the counts are, read when somebody asks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.recorder import sums
from numba_moe.reference import recorder as reference
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import layout

COUNTS = (torch.int64, torch.int32)
# Experts of a layer that `Metrics` names.
HOTTEST = 8
# Tokens whose pairs are counted together.
TOKENS_AT_ONCE = 8192


class Metrics(NamedTuple):
    """What the last passes say, as tensors on the device."""

    utilization: torch.Tensor  # float64 [L], of the last pass
    balancedness: dict[int, torch.Tensor]  # float64 [], by window: the mean over layers and so many last passes
    entropy: torch.Tensor  # float64 [L], over all passes in the largest window
    hottest_experts: torch.Tensor  # int64 [L, up to 8], the busiest first, the lower of equals
    hottest_counts: torch.Tensor  # int64 [L, up to 8]


def _check_counts(name: str, value: Any, ndims: tuple[int, ...]) -> None:
    checks.array(name, layout(value), COUNTS, ndims)


def _ranks(name: str, counts: Any, num_gpus: Any) -> int:
    num_gpus = checks.integer("num_gpus", num_gpus, 1)
    checks.divides("num_gpus", num_gpus, f"the slots of `{name}`", counts.shape[-1])
    return num_gpus


@arrays.public
def logical_counts(physical_count: Any, physical_to_logical_map: Any, num_experts: int) -> Any:
    """Sum the counts of the slots that hold an expert.

    Parameters
    ----------
    physical_count : array of int64 or int32, shape [L, P] or [steps, L, P]
        Counts of slots. Contiguous.
    physical_to_logical_map : array of int64 or int32, shape [L, P]
        The expert of each slot; counts of slots without one are left out.
    num_experts : int
        Experts of a layer (E).

    Returns
    -------
    array of int64, shape [L, E] or [steps, L, E]
        Counts of experts.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape, mixed devices, no experts.

    Notes
    -----
    Torch's kernels on the caller's current stream, without synchronising.

    Examples
    --------
    >>> import numpy as np
    >>> logical_counts(np.array([[3, 1, 2]]), np.array([[0, 1, 0]]), 2)
    array([[5, 1]])
    """
    _check_counts("physical_count", physical_count, (2, 3))
    like = ("physical_count", layout(physical_count))
    checks.array("physical_to_logical_map", layout(physical_to_logical_map), COUNTS, (2,), like=like)
    expected = tuple(physical_count.shape[-2:])
    checks.shape("physical_to_logical_map", layout(physical_to_logical_map), expected, "that of a step")
    experts = checks.integer("num_experts", num_experts, 1)
    if arrays.answered_by_reference(physical_count):
        return arrays.by_reference(reference.logical_counts, physical_count, physical_to_logical_map, experts)
    places = physical_to_logical_map.long()
    places = torch.where((places >= 0) & (places < experts), places, experts).expand(physical_count.shape)
    shape = (*physical_count.shape[:-1], experts + 1)
    counts = torch.zeros(shape, dtype=torch.int64, device=physical_count.device)
    return counts.scatter_add_(-1, places, physical_count.long())[..., :experts].contiguous()


@arrays.public
def utilization(physical_count: Any, num_gpus: int) -> Any:
    """Return the mean count of ranks over that of the busiest rank.

    Parameters
    ----------
    physical_count : array of int64 or int32, shape [L, P] or [steps, L, P]
        Counts of slots. Contiguous.
    num_gpus : int
        Ranks, each of P / num_gpus consecutive slots.

    Returns
    -------
    array of float64, shape [L] or [steps, L]
        ``(mean + 1e-5) / (max + 1e-5)``, 1 for perfect balance and for no tokens. Its mean over layers is SGLang's
        balancedness.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape, ranks that do not divide the slots.

    Notes
    -----
    Torch's kernels on the caller's current stream, without synchronising.

    Examples
    --------
    >>> import numpy as np
    >>> utilization(np.array([[6, 2, 3, 1]]), 2).round(4)
    array([0.75])
    """
    _check_counts("physical_count", physical_count, (2, 3))
    ranks = _ranks("physical_count", physical_count, num_gpus)
    if arrays.answered_by_reference(physical_count):
        return arrays.by_reference(reference.utilization, physical_count, ranks)
    loads = physical_count.unflatten(-1, (ranks, -1)).sum(dim=-1).double()
    return (loads.mean(dim=-1) + 1e-5) / (loads.amax(dim=-1) + 1e-5)


@arrays.public
def expert_entropy(counts: Any) -> Any:
    """Return the entropy of the choice of an expert, over that of an even choice.

    Parameters
    ----------
    counts : array of int64 or int32, shape [L, E] or [steps, L, E]
        Counts of experts. Contiguous.

    Returns
    -------
    array of float64, shape [L] or [steps, L]
        1 where all experts are equal; 0 where one has everything, or there is nothing or one expert.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape.

    Notes
    -----
    Torch's kernels on the caller's current stream, without synchronising.

    Examples
    --------
    >>> import numpy as np
    >>> expert_entropy(np.array([[5, 5], [0, 7], [0, 0]]))
    array([1., 0., 0.])
    """
    _check_counts("counts", counts, (2, 3))
    if arrays.answered_by_reference(counts):
        return arrays.by_reference(reference.expert_entropy, counts)
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1).double()
    return torch.special.entr(share).sum(dim=-1) / max(float(np.log(counts.shape[-1])), 1e-300)


@arrays.public
def coactivation(topk_ids: Any, num_experts: int) -> Any:
    """Count the tokens that chose two experts together.

    Parameters
    ----------
    topk_ids : array of int64 or int32, shape [num_tokens, top_k]
        Experts of tokens, distinct in a row; ids outside ``[0, num_experts)`` are skipped. Contiguous.
    num_experts : int
        Experts (E).

    Returns
    -------
    array of int64, shape [E, E]
        Symmetric; the diagonal counts the tokens of each expert.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape, no experts.

    Notes
    -----
    Torch's kernels on the caller's current stream, without synchronising: products of 0-1 matrices of 8,192 tokens,
    exact.

    Examples
    --------
    >>> import numpy as np
    >>> coactivation(np.array([[0, 1], [1, 2], [1, -1]]), 3)
    array([[1, 1, 0],
           [1, 3, 1],
           [0, 1, 1]])
    """
    _check_counts("topk_ids", topk_ids, (2,))
    experts = checks.integer("num_experts", num_experts, 1)
    if arrays.answered_by_reference(topk_ids):
        return arrays.by_reference(reference.coactivation, topk_ids, experts)
    pairs = torch.zeros((experts, experts), dtype=torch.int64, device=topk_ids.device)
    for ids in topk_ids.split(TOKENS_AT_ONCE):
        chosen = torch.zeros((len(ids), experts + 1), device=ids.device)
        chosen.scatter_(1, torch.where((ids >= 0) & (ids < experts), ids, experts).long(), 1.0)
        chosen = chosen[:, :experts]
        pairs += (chosen.T @ chosen).long()
    return pairs


@arrays.public
def traffic_matrix(physical_count: Any, num_gpus: int) -> Any:
    """Count the tokens' choices that go from each rank to each.

    Parameters
    ----------
    physical_count : array of int64 or int32, shape [sources, L, P]
        What the tokens of each rank chose: `Dump.rank_physical_count`. Contiguous.
    num_gpus : int
        Ranks, each of P / num_gpus consecutive slots.

    Returns
    -------
    array of int64, shape [L, sources, num_gpus]
        Choices by rank of the token and rank of the slot.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape, ranks that do not divide the slots.

    Notes
    -----
    Torch's kernels on the caller's current stream, without synchronising. A token with two experts on a rank counts
    twice.

    Examples
    --------
    >>> import numpy as np
    >>> traffic_matrix(np.array([[[3, 1]], [[2, 5]]]), 2)
    array([[[3, 1],
            [2, 5]]])
    """
    _check_counts("physical_count", physical_count, (3,))
    ranks = _ranks("physical_count", physical_count, num_gpus)
    if arrays.answered_by_reference(physical_count):
        return arrays.by_reference(reference.traffic_matrix, physical_count, ranks)
    return physical_count.long().unflatten(-1, (ranks, -1)).sum(dim=-1).transpose(0, 1).contiguous()


def measure(
    counts: torch.Tensor,
    pass_ids: list[int],
    map_of_pass: list[int],
    maps: list[np.ndarray],
    sizes: tuple[int, int],
    windows: Sequence[int],
    group: Any,
) -> Metrics:
    """Return the metrics of passes, oldest first: counts [N, L, P], experts and ranks in `sizes`."""
    num_experts, num_gpus = sizes
    map_of = dict(zip(pass_ids, map_of_pass, strict=True))
    if group is not None:
        counts, pass_ids = sums.by_pass(counts, pass_ids, None, group)
    if not pass_ids:
        raise RuntimeError("`metrics` must be asked after a pass was recorded")
    balance = utilization(counts, num_gpus)
    total = torch.zeros((counts.shape[1], num_experts), dtype=torch.int64, device=counts.device)
    used = [map_of.get(pass_id, len(maps) - 1) for pass_id in pass_ids]
    for index in sorted(set(used)):
        under = [number for number, map_index in enumerate(used) if map_index == index]
        places = torch.from_numpy(maps[index]).to(counts.device)
        total += logical_counts(counts[under].sum(dim=0), places, num_experts)
    hottest = total.sort(dim=1, descending=True, stable=True)
    return Metrics(
        balance[-1],
        {window: balance[-window:].mean() for window in windows},
        expert_entropy(total),
        hottest.indices[:, :HOTTEST],
        hottest.values[:, :HOTTEST],
    )
