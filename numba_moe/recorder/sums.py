"""Counts of all ranks together, over torch.distributed."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from numba_moe.runtime import checks

if TYPE_CHECKING:
    from numba_moe.recorder.files import Dump


def place_in(group: Any) -> tuple[int, int]:
    """Return this process's rank in a group, and the size of the group."""
    if group is None:
        return 0, 1
    import torch.distributed as dist

    rank = dist.get_rank(group)
    checks.holds("process_group", "a group that this process is in", rank >= 0, f"rank {rank}")
    return rank, dist.get_world_size(group)


def _home(counts: torch.Tensor, group: Any) -> torch.Tensor:
    """Return counts where the group's backend wants them."""
    import torch.distributed as dist

    return counts if "nccl" in dist.get_backend(group) else counts.cpu()


def by_pass(counts: torch.Tensor, pass_ids: list[int], about: Any, group: Any) -> tuple[torch.Tensor, list[int]]:
    """Sum the counts of passes of the same id over ranks: [N, ...] and ids; `about` must be the same on all.

    A pass that some ranks lack, or have less often, is the sum of the others.
    """
    import torch.distributed as dist

    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, (pass_ids, about), group=group)
    for rank, (_, other) in enumerate(everywhere):
        rule = "the same maps, in force for the same passes, on all ranks"
        checks.holds("physical_to_logical_map", rule, other == everywhere[0][1], f"others on rank {rank}")
    keys = [_numbered(ids) for ids, _ in everywhere]
    union = list(dict.fromkeys(key for of_rank in keys for key in of_rank))
    place = {key: index for index, key in enumerate(union)}
    mine = [place[key] for key in _numbered(pass_ids)]
    counts = _home(counts, group)
    total = torch.zeros((len(union), *counts.shape[1:]), dtype=torch.int64, device=counts.device)
    total[mine] = counts
    if len(union):
        dist.all_reduce(total, group=group)
    return total, [pass_id for pass_id, _ in union]


def _numbered(ids: list[int]) -> list[tuple[int, int]]:
    """Tell passes of the same id apart."""
    seen: dict[int, int] = {}
    found = []
    for pass_id in ids:
        seen[pass_id] = seen.get(pass_id, -1) + 1
        found.append((pass_id, seen[pass_id]))
    return found


def over_ranks(dump: "Dump", counts: torch.Tensor, group: Any) -> "Dump":
    """Return a dump with counts [N, L, P] of all ranks, the sums of each rank among them."""
    import torch.distributed as dist

    maps = dump.physical_to_logical_maps
    of_pass = dict(zip(dump.forward_pass_id.tolist(), dump.map_of_pass.tolist(), strict=True))
    total, pass_ids = by_pass(counts, dump.forward_pass_id.tolist(), maps.tobytes(), group)
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, of_pass, group=group)
    merged = {pass_id: index for ranks in everywhere for pass_id, index in ranks.items()}
    mine = _home(counts, group).sum(dim=0)
    parts = [torch.empty_like(mine) for _ in everywhere]
    dist.all_gather(parts, mine, group=group)
    found = dataclasses.replace(
        dump,
        forward_pass_id=np.array(pass_ids, np.int64),
        gatherer_key=["primary"] * len(pass_ids),
        map_of_pass=np.array([merged[pass_id] for pass_id in pass_ids], np.int64),
    ).with_counts(total.cpu().numpy())
    return dataclasses.replace(found, rank_physical_count=torch.stack(parts).cpu().numpy())
