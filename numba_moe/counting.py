"""How many slots each expert has, and where the rows of each begin."""

from typing import Any, NamedTuple

import torch

from numba_moe import sorting
from numba_moe.reference import counting as reference
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.dialect import cuda, int64
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.parameters import Ids, Int32, Int64Array
from numba_moe.runtime.plans import Layout, layout, planned
from numba_moe.runtime.primitives import WARP, block_sums, flat
from numba_moe.sorting import kernels


@cuda.jit
def scan_experts(
    counts: Ids,
    offset: Int64Array,
    num_experts: Int32,
    alignment: Int32,
):
    # counts [num_experts], offset [num_experts + 1]; one block
    warp_sums = flat(cuda.shared.array(WARP, int64))
    base = int64(0)
    first = 0
    while first < num_experts:
        expert = first + cuda.threadIdx.x
        padded = int64(0)
        if expert < num_experts:
            padded = (int64(counts[expert]) + alignment - 1) // alignment * alignment
        upto, group_sum = block_sums(padded, warp_sums, int64)
        if expert < num_experts:
            offset[expert] = base + upto - padded
        base += group_sum
        first += cuda.blockDim.x
    if cuda.threadIdx.x == 0:
        offset[num_experts] = base


class CountPlan(NamedTuple):
    """The result, whether it must start at zero, and the launch."""

    counts: arrays.Contiguous
    several_blocks: bool
    launch: Launch


@planned
def _plan_count(topk_ids: Layout, num_experts: int, expert_map: Layout | None) -> CountPlan:
    num_experts = checks.routing(topk_ids, num_experts, expert_map)
    num_slots = topk_ids.shape.numel()
    grid = sorting.grid_to_count(num_slots, num_experts)
    where = (topk_ids.device, grid.blocks, grid.threads)
    ids = sorting.choices_of(topk_ids, expert_map, grid)
    launch = Launch(kernels.count_slots, *where, (num_slots, num_experts, num_experts, grid.stride, 0, 0), ids)
    return CountPlan(arrays.contiguous(torch.int32, num_experts), grid.blocks > 1, launch)


@planned
def _plan_offsets(counts: Layout, alignment: int) -> tuple[arrays.Contiguous, Launch]:
    checks.array("counts", counts, checks.IDS, (1,))
    alignment = checks.integer("alignment", alignment, 1)
    where = (counts.device, 1, block_threads(kernels.MOST_THREADS))
    launch = Launch(scan_experts, *where, (counts.shape[0], alignment), {"counts": counts.dtype})
    return arrays.contiguous(torch.int64, counts.shape[0] + 1), launch


@arrays.public
def count_tokens_per_expert(topk_ids: Any, num_experts: int, expert_map: Any = None) -> Any:
    """Count the slots of each expert.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_slots] or [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    num_experts : int
        Number of experts that ids range over.
    expert_map : array of int32 or int64, shape [num_experts], optional
        The id under which this rank counts each expert, -1 for none.

    Returns
    -------
    array of int32, shape [num_experts]

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, mixed devices, more slots than int32 counts.

    Notes
    -----
    Runs on the caller's current stream without synchronising and captures into CUDA graphs. Allocates the result
    only.

    Examples
    --------
    >>> import numpy as np
    >>> count_tokens_per_expert(np.array([[0, 2], [2, -1]]), 4)
    array([1, 0, 2, 0], dtype=int32)
    """
    plan = _plan_count(layout(topk_ids), num_experts, layout(expert_map))
    if checks.VALIDATE:
        checks.ids(topk_ids, num_experts)
    if arrays.answered_by_reference(topk_ids):
        return arrays.by_reference(reference.count_tokens_per_expert, topk_ids, num_experts, expert_map)
    counts = arrays.empty(*plan.counts)
    if plan.several_blocks:
        counts.zero_()
    plan.launch(topk_ids, expert_map, None, counts, None)
    return counts


@arrays.public
def expert_offsets(counts: Any, alignment: int = 1) -> Any:
    """Sum the counts before each expert, every count rounded up to a multiple of the alignment.

    Parameters
    ----------
    counts : array of int32 or int64, shape [num_experts]
        Slots of each expert, none negative.
    alignment : int
        Rows of an expert are padded to a multiple of this; an expert without rows keeps none.

    Returns
    -------
    array of int64, shape [num_experts + 1]
        Rows of expert e are ``offsets[e]`` up to ``offsets[e + 1]``.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        Wrong shape or layout, alignment below 1.

    Notes
    -----
    One launch on the caller's current stream; allocates the result only.

    Examples
    --------
    >>> import numpy as np
    >>> expert_offsets(np.array([3, 0, 5]), alignment=4)
    array([ 0,  4,  4, 12])
    """
    result, scan = _plan_offsets(layout(counts), alignment)
    if arrays.answered_by_reference(counts):
        return arrays.by_reference(reference.expert_offsets, counts, alignment)
    offset = arrays.empty(*result)
    scan(counts, offset)
    return offset
