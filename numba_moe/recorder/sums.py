"""Sums of counts: over slots and passes, and over ranks by torch.distributed."""

import collections
import contextlib
import errno
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.runtime import arrays, checks

LARGEST_INT64 = 2**63 - 1


def place_in(group: Any) -> tuple[int, int]:
    """Return this process's rank in a group, and the size of the group."""
    if group is None:
        return 0, 1
    import torch.distributed as dist

    rank = dist.get_rank(group)
    checks.holds("process_group", "a group that this process is in", rank >= 0, f"rank {rank}")
    return rank, dist.get_world_size(group)


def home_of(counts: torch.Tensor, group: Any) -> torch.Tensor:
    """Return counts where the group's backend wants them."""
    import torch.distributed as dist

    return counts if "nccl" in dist.get_backend(group) else counts.cpu()


def sum_counts(argument: str, counts: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum counts to int64; for sums past what that holds see `held`."""
    return held(argument, counts.sum(dim=dim, dtype=torch.int64), counts.sum(dim=dim, dtype=torch.float64))


def held(argument: str, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Return int64 sums that are right, given the same in float64.

    What int64 does not hold is an error on the CPU; on a device and in compiled code, which do not look at data, it is
    the largest int64.
    """
    past = (rounded >= 2.0**63) | ((rounded > 0) & (exact < 0))
    if not past.is_cuda and not arrays.is_traced():
        small = not bool(past.any())
        checks.holds(argument, "small enough for sums to fit int64", small, "more")
        return exact
    return exact.masked_fill(past, LARGEST_INT64)


@contextlib.contextmanager
def together(group: Any) -> Iterator[None]:
    """Let what fails on one rank fail on all, if there is a group."""
    try:
        yield
    except BaseException as error:
        if group is not None:
            code = error.errno or errno.EIO if isinstance(error, OSError) else None
            _everywhere((code, str(error) or type(error).__name__), group)
        raise
    if group is not None:
        for rank, failed in enumerate(_everywhere(None, group)):
            if failed is not None:
                code, text = failed
                text = f"it failed on rank {rank}: {text}"
                raise RuntimeError(text) if code is None else OSError(code, text)


def _everywhere(value: Any, group: Any) -> list[Any]:
    """Return what each rank gives."""
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


class Passes(NamedTuple):
    """Counts [N, ...] of passes, and of each its id and which of the maps was in force."""

    counts: torch.Tensor
    pass_ids: list[int]
    map_of_pass: list[int]


def by_pass(mine: Passes, maps: Sequence[np.ndarray] | np.ndarray, group: Any) -> Passes:
    """Sum the counts of passes of the same id and map over ranks; the maps must be the same on all.

    A pass that some ranks lack, or have less often, is the sum of the others.
    """
    import torch.distributed as dist

    keys = numbered(zip(mine.pass_ids, mine.map_of_pass, strict=True))
    most = int(mine.counts.max()) if mine.counts.numel() else 0
    digest = hashlib.sha256(np.asarray(maps).tobytes()).digest()
    everywhere = _everywhere((keys, most, digest), group)
    for rank, (_, _, other) in enumerate(everywhere):
        rule = "the same maps on all ranks"
        checks.holds("physical_to_logical_map", rule, other == everywhere[0][2], f"others on rank {rank}")
    most = sum(of_rank for _, of_rank, _ in everywhere)
    checks.holds("counts", "small enough for their sums over ranks to fit int64", most <= LARGEST_INT64, most)
    union, rows = places_of(of_rank for of_rank, _, _ in everywhere)
    counts = home_of(mine.counts, group)
    total = torch.zeros((len(union), *counts.shape[1:]), dtype=torch.int64, device=counts.device)
    total[torch.from_numpy(rows[dist.get_rank(group)]).to(total.device)] = counts
    if union:
        dist.all_reduce(total, group=group)
    return Passes(total, [pass_id for pass_id, _, _ in union], [index for _, index, _ in union])


def numbered(keys: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Tell equal keys apart: to each is added how many of the same were before it.

    >>> numbered([(7, 0), (8, 0), (7, 0)])
    [(7, 0, 0), (8, 0, 0), (7, 0, 1)]
    """
    seen: collections.Counter[tuple[Any, ...]] = collections.Counter()
    found = []
    for key in keys:
        found.append((*key, seen[key]))
        seen[key] += 1
    return found


def places_of(keys: Iterable[Sequence[Any]]) -> tuple[list[Any], list[np.ndarray]]:
    """Return the keys of all parts, each once, in the order in which they come, and the places there of each part's.

    >>> places_of([["a", "b"], ["b", "c"]])
    (['a', 'b', 'c'], [array([0, 1]), array([1, 2])])
    """
    place: dict[Any, int] = {}
    rows = [np.array([place.setdefault(key, len(place)) for key in part], np.int64) for part in keys]
    return list(place), rows


def add_rows(counts: Iterable[np.ndarray], rows: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Add the counts of parts; none has a row twice.

    >>> add_rows([np.array([[1], [2]]), np.array([[4]])], [np.array([0, 2]), np.array([2])], (3, 1)).ravel()
    array([1, 0, 6])
    """
    total = np.zeros(shape, np.int64)
    for part, into in zip(counts, rows, strict=True):
        total[into] += part
    return total
