"""Count the slots of each expert, and sum the counts to find where each expert's rows begin."""

from typing import Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, int64
from numba_moe.device.instructions import flat, wait_for_earlier
from numba_moe.device.primitives import WARP, block_sums
from numba_moe.device.types import Ids, Int32, Int64Array
from numba_moe.ops.sort import count_and_place, counting_sort
from numba_moe.reference import counting as reference
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op


class Counts(NamedTuple):
    """The number of slots of each expert; none is negative."""

    counts: Ids  # [num_experts]
    num_experts: Int32


class Offsets(NamedTuple):
    """Where the rows of each expert begin, and where the last rows end."""

    offset: Int64Array  # [num_experts + 1]
    alignment: Int32  # each expert begins at a multiple of it


@cuda.jit
def scan_experts(slots: Counts, rows: Offsets):
    """Sum the padded counts in one block of whole warps; a thread takes one expert of each chunk."""
    wait_for_earlier()
    warp_sums = flat(cuda.shared.array(WARP, int64))
    base = int64(0)
    first = 0
    while first < slots.num_experts:
        expert = first + cuda.threadIdx.x
        padded = int64(0)
        if expert < slots.num_experts:
            padded = (int64(slots.counts[expert]) + rows.alignment - 1) // rows.alignment * rows.alignment
        upto, group_sum = block_sums(padded, warp_sums, int64)
        if expert < slots.num_experts:
            rows.offset[expert] = base + upto - padded
        base += group_sum
        first += cuda.blockDim.x
    if cuda.threadIdx.x == 0:
        rows.offset[slots.num_experts] = base


@op(reference.count_tokens_per_expert)
def count_tokens_per_expert(
    topk_ids: Array, num_experts: int, expert_map: Array | None = None, *, out: Array | None = None
) -> Any:
    """Count the slots of each expert.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_slots] or [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts. Valid ids are 0 to ``num_experts - 1``.
    expert_map : array of int32 or int64, shape [num_experts], optional
        The id under which this rank counts each expert, -1 for an expert that it does not count.
    out : array of int32, shape [num_experts], optional
        Written: memory for the result.

    Returns
    -------
    array of int32, shape [num_experts]

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, or more slots than int32 can count.

    Notes
    -----
    The op runs on the caller's current stream without synchronising, and CUDA graphs can capture it. It allocates the
    result only.

    Examples
    --------
    >>> import numpy as np
    >>> count_tokens_per_expert(np.array([[0, 2], [2, -1]]), 4)
    array([1, 0, 2, 0], dtype=int32)
    """


@count_tokens_per_expert.outputs
def _(given: Any) -> Contiguous:
    return contiguous(torch.int32, given.num_experts)


@count_tokens_per_expert.plan
def _(given: Any) -> tuple[bool, Launch]:
    """Return whether counts must start at zero, and the launch."""
    num_experts = checks.routing(given.topk_ids, given.num_experts, given.expert_map)
    num_slots = given.topk_ids.shape.numel()
    grid = counting_sort.grid_to_count(num_slots, num_experts)
    slots = count_and_place.Slots(given.topk_ids, given.expert_map, num_slots, num_experts, num_experts)
    counted = count_and_place.Counted(block_counts=None, counts=torch.int32, stride=grid.stride)
    cleared = count_and_place.Cleared(sorted_slots=None, num_positions=0, num_words=0)
    where = (given.topk_ids.device, grid.blocks, grid.threads)
    return grid.blocks > 1, Launch(count_and_place.count_slots, *where, slots, counted, cleared, items=grid.items)


@count_tokens_per_expert.validate
def _(given: Any) -> None:
    checks.ids(given.topk_ids, given.num_experts)


@count_tokens_per_expert.run
def _(plan: Any, given: Any, counts: torch.Tensor) -> None:
    several_blocks, count_slots = plan
    if several_blocks:
        counts.zero_()
    count_slots(topk_ids=given.topk_ids, expert_map=given.expert_map, counts=counts)


@op(reference.expert_offsets)
def expert_offsets(counts: Array, alignment: int = 1, *, out: Array | None = None) -> Any:
    """Sum the counts of the experts before each expert, after rounding each count up to a multiple of `alignment`.

    Parameters
    ----------
    counts : array of int32 or int64, shape [num_experts]
        Number of slots of each expert, at least 0.
    alignment : int
        The rows of an expert are padded to a multiple of this. An expert without rows gets no padding.
    out : array of int64, shape [num_experts + 1], optional
        Written: memory for the result.

    Returns
    -------
    array of int64, shape [num_experts + 1]
        Expert e has the rows from ``offsets[e]`` up to ``offsets[e + 1]``.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, or `alignment` below 1.

    Notes
    -----
    The op is one launch on the caller's current stream. It allocates the result only.

    Examples
    --------
    >>> import numpy as np
    >>> expert_offsets(np.array([3, 0, 5]), alignment=4)
    array([ 0,  4,  4, 12])
    """


@expert_offsets.outputs
def _(given: Any) -> Contiguous:
    return contiguous(torch.int64, given.counts.shape[0] + 1)


@expert_offsets.plan
def _(given: Any) -> Launch:
    checks.array("counts", given.counts, checks.IDS, (1,))
    alignment = checks.integer("alignment", given.alignment, 1)
    slots = Counts(given.counts, given.counts.shape[0])
    where = (given.counts.device, 1, block_threads(count_and_place.MOST_THREADS))
    return Launch(scan_experts, *where, slots, Offsets(torch.int64, alignment))


@expert_offsets.run
def _(scan_experts: Any, given: Any, offset: torch.Tensor) -> None:
    scan_experts(counts=given.counts, offset=offset)
