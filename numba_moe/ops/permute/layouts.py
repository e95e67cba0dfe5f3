"""Other layouts of expert order: `moe_permute_masked`, one batch per expert, and `moe_reorder`, SGLang's order."""

from typing import Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, int32
from numba_moe.device.instructions import quotient, wait_for_earlier
from numba_moe.device.types import Int32, Int32Array, Int64Array
from numba_moe.ops.count import count_tokens_per_expert
from numba_moe.ops.permute.move_rows import Gather, check_rows, deal, gather, permute_by_reference, plan_gather
from numba_moe.ops.permute.permutation import moe_permute
from numba_moe.ops.permute.row_gradients import permute_backward
from numba_moe.ops.sort import counting_sort
from numba_moe.reference import permute as reference
from numba_moe.reference.permute import MaskedTokens, ReorderedSlots
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.op import op
from numba_moe.sizes import num_elements


class Grouped(NamedTuple):
    """Slots in the order of experts."""

    sorted_slots: Int32Array  # [num_slots]
    offset: Int64Array  # [num_experts + 1]; where the slots of each expert begin, and where the last slots end
    num_slots: Int32


class Batches(NamedTuple):
    """A batch of max_m rows for each of the first num_batches experts."""

    inv_permuted_idx: Int32Array  # [num_slots]; written: the row of each sorted slot, -1 for a slot without a row
    permuted_idx: Int32Array  # [num_batches, max_m]; the slot of each row, num_slots for a row without a slot
    masked_m: Int32Array  # [num_batches]; rows in use
    num_batches: Int32
    max_m: Int32
    parts: Int32  # thread blocks that serve an expert


@cuda.jit
def lay_out_rows(grouped: Grouped, batches: Batches):
    """Give each sorted slot a row of its expert's batch; `parts` blocks, of any number of threads, serve an expert."""
    wait_for_earlier()
    expert = quotient(cuda.blockIdx.x, batches.parts)
    part = int32(cuda.blockIdx.x - expert * batches.parts)
    first = int32(grouped.offset[expert])
    count = int32(grouped.offset[expert + 1] - first)
    rows = batches.max_m if expert < batches.num_batches else int32(0)
    if part == 0 and cuda.threadIdx.x == 0 and expert < batches.num_batches:
        batches.masked_m[expert] = min(count, rows)
    row = int32(part * cuda.blockDim.x + cuda.threadIdx.x)
    while row < max(count, rows):
        slot = grouped.num_slots
        place = int32(-1)
        if row < rows:
            place = int32(expert * batches.max_m + row)
        if row < count:
            slot = grouped.sorted_slots[first + row]
            batches.inv_permuted_idx[slot] = place
        if row < rows:
            batches.permuted_idx[place] = slot
        row = int32(row + batches.parts * cuda.blockDim.x)


@op(reference.moe_permute_masked, absent={"permuted_scales": "scales"}, like=moe_permute)
def moe_permute_masked(
    hidden_states: Array,
    topk_ids: Array,
    num_experts: int,
    max_m: int,
    expert_map: Array | None = None,
    *,
    num_local_experts: int | None = None,
    scales: Array | None = None,
    zero_padding: bool = True,
    out: MaskedTokens | None = None,
) -> MaskedTokens:
    """Copy each token's row once for each of its experts, into one batch of rows per expert.

    Parameters
    ----------
    max_m : int
        Number of rows of a batch. Further slots of the expert are skipped. If the experts of each token are distinct,
        an expert never has more than num_tokens slots.
    num_local_experts : int, optional
        Number of batches, by default num_experts. Slots of experts without a batch are skipped.
    zero_padding : bool
        Write zeros to rows without a slot. Otherwise these rows are not written, so a batch costs only the rows in use.

    Returns
    -------
    MaskedTokens
        permuted_hidden_states : [num_local_experts, max_m, hidden] in the dtype of `hidden_states`. masked_m : int32
        [num_local_experts], the number of rows in use of each batch. permuted_idx : int32 [num_local_experts, max_m],
        the slot of each row, num_slots for a row without a slot. inv_permuted_idx : int32 [num_tokens, top_k], ``expert
        * max_m + row`` of each slot, -1 for skipped slots. permuted_scales : [num_local_experts, max_m] or
        [num_local_experts, max_m, groups], None without scales.

    Notes
    -----
    The order is stable: the rows of an expert ascend by slot, and the first max_m stay. The op runs on the caller's
    current stream without synchronising, and CUDA graphs can capture it. It takes one launch more than `moe_permute`.
    `moe_unpermute` combines the batches, flattened to rows. The rows have a gradient by `hidden_states`.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[1], [2], [3]], np.float32)
    >>> masked = moe_permute_masked(rows, np.array([[1, 0], [-1, 0], [0, 1]]), num_experts=2, max_m=2)
    >>> masked.permuted_hidden_states.reshape(2, 2)
    array([[1., 2.],
           [1., 3.]], dtype=float32)
    >>> masked.masked_m
    array([2, 2], dtype=int32)
    """


@moe_permute_masked.outputs
def _(given: Any) -> MaskedTokens:
    rows, scales, max_m = given.hidden_states, given.scales, given.max_m
    batches = given.num_experts if given.num_local_experts is None else given.num_local_experts
    return MaskedTokens(
        contiguous(rows.dtype, batches, max_m, rows.shape[1]),
        contiguous(torch.int32, batches),
        contiguous(torch.int32, batches, max_m),
        contiguous(torch.int32, *given.topk_ids.shape),
        None if scales is None else contiguous(scales.dtype, batches, max_m, *scales.shape[1:]),
    )


class MaskedPlan(NamedTuple):
    """The scratch of the sort, the sort, the launch that assigns rows, and the copies of rows and scales."""

    scratch: tuple[Contiguous, Contiguous]
    sort: counting_sort.SortPlan
    lay_out: Launch
    rows: Gather
    scales: Gather | None


@moe_permute_masked.plan
def _(given: Any) -> MaskedPlan:
    num_experts, top_k = check_rows(given)
    max_m = checks.integer("max_m", given.max_m, 1)
    batches = num_experts
    if given.num_local_experts is not None:
        limit = f"num_experts = {num_experts}"
        batches = checks.integer("num_local_experts", given.num_local_experts, 1, num_experts, limit)
    checks.fits_int32("max_m", batches * max_m, "the number of rows")
    topk_ids, num_slots = given.topk_ids, given.topk_ids.shape.numel()
    threads, parts = deal(num_experts, max_m)
    scratch = (contiguous(torch.int32, num_slots), contiguous(torch.int64, num_experts + 1))
    grouped = Grouped(*scratch, num_slots)
    into = Batches(torch.int32, torch.int32, torch.int32, num_batches=batches, max_m=max_m, parts=parts)
    written = ("position_of_slot", "offset")
    return MaskedPlan(
        scratch,
        counting_sort.plan_sort(topk_ids, num_experts, num_slots, expert_map=given.expert_map, written=written),
        Launch(lay_out_rows, topk_ids.device, num_experts * parts, threads, grouped, into),
        plan_gather(given.hidden_states, top_k, batches * max_m, given.zero_padding),
        given.scales and plan_gather(given.scales, top_k, batches * max_m, given.zero_padding),
    )


@moe_permute_masked.validate
def _(given: Any) -> None:
    checks.ids(given.topk_ids, given.num_experts)


@moe_permute_masked.on_cpu
def _(given: Any) -> MaskedTokens:
    found: MaskedTokens = permute_by_reference(reference.moe_permute_masked, given)
    return found


@moe_permute_masked.run
def _(plan: MaskedPlan, given: Any, *memory: Any) -> None:
    rows, masked_m, permuted_idx, inv_permuted_idx, moved_scales = memory
    sorted_slots, offset = (arrays.empty(*array) for array in plan.scratch)
    indices = {"position_of_slot": inv_permuted_idx, "offset": offset}
    counting_sort.sort(plan.sort, given.topk_ids, sorted_slots, given.expert_map, **indices)
    plan.lay_out(
        sorted_slots=sorted_slots,
        offset=offset,
        inv_permuted_idx=inv_permuted_idx,
        permuted_idx=permuted_idx,
        masked_m=masked_m,
    )
    gather(plan.rows, given.hidden_states, rows, permuted_idx, inv_permuted_idx)
    if plan.scales is not None:
        gather(plan.scales, given.scales, moved_scales, permuted_idx, inv_permuted_idx)


@moe_permute_masked.saves
def _(ctx: Any, _given: Any, *found: Any) -> None:
    ctx.save_for_backward(MaskedTokens(*found).inv_permuted_idx)


@moe_permute_masked.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    [inv_permuted_idx] = ctx.saved_tensors
    return {"hidden_states": permute_backward(inv_permuted_idx, grad)}


@op(reference.moe_reorder, like=count_tokens_per_expert)
def moe_reorder(
    topk_ids: Array, num_experts: int, expert_map: Array | None = None, *, out: ReorderedSlots | None = None
) -> ReorderedSlots:
    """Order the slots by expert, and return the order in the form of SGLang's DeepEP dispatcher.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_tokens, top_k] or [num_slots]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert, -1 for an expert of another rank, whose slots are skipped.
    out : tuple of three arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    ReorderedSlots
        reorder_topk_ids : int32 [num_slots], the expert of each row, -1 for unused rows at the end. src2dst : int32
        [num_slots], the row of each slot, -1 for skipped slots. seg_indptr : int64 [num_experts + 1]; expert e has the
        rows from ``seg_indptr[e]`` up to ``seg_indptr[e + 1]``.

    Notes
    -----
    The order is that of `moe_permute`; the op is its sort without the copies. It runs on the caller's current stream
    without synchronising, and CUDA graphs can capture it.

    Examples
    --------
    >>> import numpy as np
    >>> reordered = moe_reorder(np.array([[1, 0], [-1, 0]]), num_experts=2)
    >>> reordered.reorder_topk_ids
    array([ 0,  0,  1, -1], dtype=int32)
    >>> reordered.src2dst
    array([ 2,  0, -1,  1], dtype=int32)
    """


@moe_reorder.outputs
def _(given: Any) -> ReorderedSlots:
    slots = contiguous(torch.int32, num_elements(given.topk_ids))
    return ReorderedSlots(slots, slots, contiguous(torch.int64, given.num_experts + 1))


@moe_reorder.plan
def _(given: Any) -> tuple[counting_sort.SortPlan, Contiguous]:
    """Return the sort, and the scratch for the sorted slots."""
    num_experts = checks.routing(given.topk_ids, given.num_experts, given.expert_map)
    num_slots = given.topk_ids.shape.numel()
    written = ("position_of_slot", "offset", "expert_ids")
    sort = counting_sort.plan_sort(given.topk_ids, num_experts, num_slots, expert_map=given.expert_map, written=written)
    return sort, contiguous(torch.int32, num_slots)


@moe_reorder.validate
def _(given: Any) -> None:
    checks.ids(given.topk_ids, given.num_experts)


@moe_reorder.run
def _(plan: Any, given: Any, reorder_topk_ids: Any, src2dst: Any, seg_indptr: Any) -> None:
    sort, scratch = plan
    written = {"position_of_slot": src2dst, "offset": seg_indptr, "expert_ids": reorder_topk_ids}
    counting_sort.sort(sort, given.topk_ids, arrays.empty(*scratch), given.expert_map, **written)
