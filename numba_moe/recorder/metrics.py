"""What counts say about experts and ranks; computed where the counts are, read when somebody asks."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.recorder import sums
from numba_moe.recorder.passes import to_device
from numba_moe.reference import recorder as reference
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import Layout, layout

COUNTS = (torch.int64, torch.int32)
# Experts of a layer that `Metrics` names.
HOTTEST = 8
# Tokens whose pairs are counted together.
TOKENS_AT_ONCE = 8192


class Metrics(NamedTuple):
    """What the last passes say, as tensors on the device."""

    utilization: torch.Tensor  # float64 [L], of the last pass
    balancedness: dict[int, torch.Tensor]  # float64 [], by window: the mean over layers and the last `window` passes
    entropy: torch.Tensor  # float64 [L], over all passes in the largest window
    hottest_experts: torch.Tensor  # int64 [L, up to 8], the busiest first, the lower of equals
    hottest_counts: torch.Tensor  # int64 [L, up to 8]


def _layout(value: Any) -> Any:
    """Return a layout, of what torch.compile traces as well, which has no address; torch's code takes any strides."""
    if arrays.is_traced() and isinstance(value, torch.Tensor):
        return Layout(value.shape, value.dtype, value.device, None, 0)
    return layout(value)


def _check_counts(name: str, value: Any, ndims: tuple[int, ...]) -> None:
    checks.array(name, _layout(value), COUNTS, ndims)


def _by_reference(value: torch.Tensor) -> bool:
    return not arrays.is_traced() and arrays.answered_by_reference(value)


def check_windows(windows: Any) -> tuple[int, ...]:
    """Return the windows of `Metrics`."""
    if isinstance(windows, str) or not isinstance(windows, Sequence):
        raise TypeError(f"`windows` must be a sequence of integers, got {type(windows).__name__}")
    checks.holds("windows", "one window or more", len(windows) > 0, "none")
    return tuple(checks.integer("windows", window, 1, sums.LARGEST_INT64) for window in windows)


def _ranks(name: str, counts: Any, num_gpus: Any) -> int:
    num_gpus = checks.integer("num_gpus", num_gpus, 1)
    checks.divides("num_gpus", num_gpus, f"the slots of `{name}`", counts.shape[-1])
    return num_gpus


@arrays.public
def logical_counts(physical_count: Any, physical_to_logical_map: Any, num_experts: int) -> Any:
    """Sum, for each expert, the counts of the slots that hold it.

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
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape, mixed devices, no experts; on the CPU, sums that int64 does not hold.

    Notes
    -----
    Torch's kernels on the caller's current stream, without synchronising: there a sum past int64 is 2**63 - 1.

    Examples
    --------
    >>> import numpy as np
    >>> logical_counts(np.array([[3, 1, 2]]), np.array([[0, 1, 0]]), 2)
    array([[5, 1]])
    """
    _check_counts("physical_count", physical_count, (2, 3))
    like = ("physical_count", _layout(physical_count))
    checks.array("physical_to_logical_map", _layout(physical_to_logical_map), COUNTS, (2,), like=like)
    expected = tuple(physical_count.shape[-2:])
    checks.shape("physical_to_logical_map", _layout(physical_to_logical_map), expected, "that of a step")
    experts = checks.integer("num_experts", num_experts, 1)
    if _by_reference(physical_count):
        return arrays.by_reference(reference.logical_counts, physical_count, physical_to_logical_map, experts)
    places = physical_to_logical_map.long()
    places = torch.where((places >= 0) & (places < experts), places, experts).expand(physical_count.shape)
    shape = (*physical_count.shape[:-1], experts + 1)
    exact, rounded = (
        torch.zeros(shape, dtype=kind, device=physical_count.device).scatter_add_(-1, places, physical_count.to(kind))
        for kind in (torch.int64, torch.float64)
    )
    return sums.held("physical_count", exact[..., :experts], rounded[..., :experts]).contiguous()


@arrays.public
def utilization(physical_count: Any, num_gpus: int) -> Any:
    """Return the mean count of the ranks divided by the count of the busiest rank.

    Parameters
    ----------
    physical_count : array of int64 or int32, shape [L, P] or [steps, L, P]
        Counts of slots. Contiguous.
    num_gpus : int
        Number of ranks. Each has P / num_gpus consecutive slots.

    Returns
    -------
    array of float64, shape [L] or [steps, L]
        ``(mean + 1e-5) / (max + 1e-5)``, which is 1 for perfect balance and for no tokens. Its mean over layers is
        SGLang's balancedness.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
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
    if _by_reference(physical_count):
        return arrays.by_reference(reference.utilization, physical_count, ranks)
    loads = physical_count.unflatten(-1, (ranks, -1)).sum(dim=-1, dtype=torch.float64)
    return (loads.mean(dim=-1) + 1e-5) / (loads.amax(dim=-1) + 1e-5)


@arrays.public
def expert_entropy(counts: Any) -> Any:
    """Return the entropy of the choice of an expert, divided by the entropy of an even choice.

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
        An array or a dtype of the wrong kind.
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
    if _by_reference(counts):
        return arrays.by_reference(reference.expert_entropy, counts)
    share = counts / counts.sum(dim=-1, keepdim=True, dtype=torch.float64).clamp(min=1)
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
        An array or a dtype of the wrong kind.
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
    if _by_reference(topk_ids):
        return arrays.by_reference(reference.coactivation, topk_ids, experts)
    pairs = torch.zeros((experts, experts), dtype=torch.int64, device=topk_ids.device)
    for ids in topk_ids.split(TOKENS_AT_ONCE):
        chosen = torch.zeros((len(ids), experts + 1), dtype=torch.float32, device=ids.device)
        chosen.scatter_(1, torch.where((ids >= 0) & (ids < experts), ids, experts).long(), 1.0)
        chosen = chosen[:, :experts]
        with torch.autocast(ids.device.type, enabled=False):  # products of fewer bits would not be exact
            pairs += (chosen.T @ chosen).long()
    return pairs


@arrays.public
def traffic_matrix(physical_count: Any, num_gpus: int) -> Any:
    """Count the slots that go from each rank to each rank.

    Parameters
    ----------
    physical_count : array of int64 or int32, shape [sources, L, P]
        What the tokens of each rank chose: `Dump.rank_physical_count`. Contiguous.
    num_gpus : int
        Number of ranks. Each has P / num_gpus consecutive slots.

    Returns
    -------
    array of int64, shape [L, sources, num_gpus]
        Choices by rank of the token and rank of the slot.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape, ranks that do not divide the slots; on the CPU, sums that int64 does not hold.

    Notes
    -----
    Torch's kernels on the caller's current stream, without synchronising: there a sum past int64 is 2**63 - 1. A token
    with two experts on a rank counts twice.

    Examples
    --------
    >>> import numpy as np
    >>> traffic_matrix(np.array([[[3, 1]], [[2, 5]]]), 2)
    array([[[3, 1],
            [2, 5]]])
    """
    _check_counts("physical_count", physical_count, (3,))
    ranks = _ranks("physical_count", physical_count, num_gpus)
    if _by_reference(physical_count):
        return arrays.by_reference(reference.traffic_matrix, physical_count, ranks)
    of_ranks = physical_count.unflatten(-1, (ranks, -1))
    return sums.sum_counts("physical_count", of_ranks, -1).transpose(0, 1).contiguous()


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
    passes = sums.Passes(counts, pass_ids, map_of_pass)
    if group is not None:
        passes = sums.by_pass(passes, maps, group)
    if not passes.pass_ids:
        raise RuntimeError("`metrics` must be asked after a pass was recorded")
    counts = passes.counts
    balance = utilization(counts, num_gpus)
    parts = []
    runs = itertools.groupby(enumerate(passes.map_of_pass), operator.itemgetter(1))
    for index, run in runs:
        numbers = [number for number, _ in run]
        under = sums.sum_counts("counts", counts[numbers[0] : numbers[-1] + 1], 0)
        parts.append(logical_counts(under, to_device(maps[index], counts.device), num_experts))
    total = sums.sum_counts("counts", torch.stack(parts), 0)
    hottest = total.sort(dim=1, descending=True, stable=True)
    return Metrics(
        balance[-1],
        {window: balance[-window:].mean() for window in windows},
        expert_entropy(total),
        hottest.indices[:, :HOTTEST],
        hottest.values[:, :HOTTEST],
    )
