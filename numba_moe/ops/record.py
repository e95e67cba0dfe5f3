"""Count slots by expert and copy routed tokens while a flag on the device is on: the kernels of the recorder's hooks.

A thread takes one slot. Each block counts in shared memory first and then adds to the int64 counters, so that threads
do not wait for a busy expert's counter. Kernels read the flag and the number of real tokens on the device, so a
captured graph follows them at every replay.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import (
    add_to_global,
    atomic_add,
    flat,
    load_float,
    present,
    quotient,
    wait_for_earlier,
)
from numba_moe.device.primitives import fill
from numba_moe.device.types import (
    Ids,
    Int32,
    Int32Array,
    Int64Array,
    OptionalFloat32Array,
    OptionalFloatArray,
    OptionalInt32Array,
)
from numba_moe.reference import recorder as reference
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array
from numba_moe.runtime.compile import MOST_SHARED_BYTES
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Layout, planned

MOST_THREADS = 1024
# Two blocks for each multiprocessor of an H200.
MOST_BLOCKS = 264


class Routed(NamedTuple):
    """The experts of the tokens in one call."""

    topk_ids: Ids  # [num_rows, top_k]
    num_rows: Int32
    top_k: Int32
    first_row: Int32  # the number of this call's first row in the pass
    num_experts: Int32


class Switch(NamedTuple):
    """The state of recording, on the device."""

    enabled: OptionalInt32Array  # [1]; 0 for off
    num_tokens: OptionalInt32Array  # [1]; rows of the pass that are tokens and not padding


class Counters(NamedTuple):
    """The counters that a kernel adds to."""

    counts: Int64Array  # [num_experts]
    num_in_shared: Int32  # num_experts if a block counts in shared memory first, otherwise 0


class Addition(NamedTuple):
    """Counts that a kernel adds to counters."""

    given: Ids  # [num_experts]; less than 0 counts as 0
    counts: Int64Array  # [num_experts]
    num_experts: Int32


class Stage(NamedTuple):
    """Where a layer's tokens go: arrays of all layers that begin at this layer, written from row to_row on."""

    ids: Int32Array  # [rows, num_layers, top_k]
    weights: OptionalFloat32Array  # [rows, num_layers, top_k], where there are topk_weights
    stored: Int32Array  # [num_layers]; rows of the pass that a layer has
    to_row: Int32
    num_layers: Int32


@cuda.jit(device=True)
def is_off(enabled):
    """Return whether recording is switched off; without a flag it is on."""
    return present(enabled) and enabled[0] == 0


@cuda.jit(device=True)
def real_rows(switch, routed):
    """Return the number of rows of a call that are tokens and not padding."""
    rows = int64(routed.num_rows)
    if present(switch.num_tokens):
        rows = min(rows, max(int64(switch.num_tokens[0]) - routed.first_row, int64(0)))
    return rows


@cuda.jit(launch_bounds=MOST_THREADS)
def count_ids(routed: Routed, switch: Switch, counters: Counters):
    """Count slots by expert; a thread takes one slot of each grid-sized stretch.

    Shared memory of a block: int32 [num_in_shared].
    """
    wait_for_earlier()
    in_block = flat(cuda.shared.array(0, int32))
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    slot = int64(cuda.blockIdx.x) * threads + thread
    last = int64(routed.num_rows) * routed.top_k - 1
    expert = int64(routed.topk_ids[min(slot, last)])  # this load runs while the flag is read
    if is_off(switch.enabled):
        return
    fill(in_block, counters.num_in_shared, 0, thread, threads)
    cuda.syncthreads()
    num_slots = real_rows(switch, routed) * routed.top_k
    while slot < num_slots:
        if expert >= 0 and expert < routed.num_experts:
            if counters.num_in_shared > 0:
                atomic_add(in_block, expert, 1)
            else:
                add_to_global(counters.counts, expert, 1)
        slot += int64(cuda.gridDim.x) * threads
        if slot < num_slots:
            expert = int64(routed.topk_ids[slot])
    cuda.syncthreads()
    index = thread
    while index < counters.num_in_shared:
        count = in_block[index]
        if count > 0:
            add_to_global(counters.counts, index, int64(count))
        index = int32(index + threads)


@cuda.jit(launch_bounds=MOST_THREADS)
def add_counts(
    addition: Addition,
    enabled: OptionalInt32Array,  # [1]; 0 for off
):
    """Add counts to counters; a thread takes one expert."""
    wait_for_earlier()
    index = int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
    if index < addition.num_experts and not is_off(enabled):
        addition.counts[index] += max(int64(addition.given[index]), int64(0))


@cuda.jit(launch_bounds=MOST_THREADS)
def store_tokens(
    routed: Routed,
    topk_weights: OptionalFloatArray,  # [num_rows, top_k]
    switch: Switch,
    stage: Stage,
):
    """Copy the slots of tokens to the layer's rows; a thread takes one slot of each grid-sized stretch."""
    wait_for_earlier()
    if is_off(switch.enabled):
        return
    real = real_rows(switch, routed)
    thread = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    if thread == 0 and real > 0:
        stage.stored[0] = int32(routed.first_row + real)
    slot = thread
    while slot < real * routed.top_k:
        row = quotient(int32(slot), routed.top_k)
        place = (int64(stage.to_row) + row) * stage.num_layers * routed.top_k + slot - int64(row) * routed.top_k
        expert = int64(routed.topk_ids[slot])
        if expert < 0 or expert >= routed.num_experts:
            expert = int64(-1)
        stage.ids[place] = int32(expert)
        if present(topk_weights):
            stage.weights[place] = float32(load_float(topk_weights, slot))
        slot += int64(cuda.gridDim.x) * cuda.blockDim.x


def _grid(num_slots: int) -> tuple[int, int]:
    threads = block_threads(min(MOST_THREADS, -(-num_slots // 32) * 32))
    return min(-(-num_slots // threads) if num_slots else 0, MOST_BLOCKS), threads


def _check_ids(topk_ids: Any) -> tuple[int, int]:
    checks.array("topk_ids", topk_ids, checks.IDS, (1, 2))
    checks.fits_int32("topk_ids", topk_ids.shape.numel(), "the number of slots")
    return topk_ids.shape[0], topk_ids.shape[1] if len(topk_ids.shape) == 2 else 1


@planned
def plan_count(
    topk_ids: Layout, num_experts: int, first_row: int, where: torch.device, switched: bool, limited: bool
) -> Launch:
    """Plan to count slots in counters on the device `where`, with or without a flag and a number of tokens."""
    num_rows, top_k = _check_ids(topk_ids)
    here = topk_ids.device
    checks.holds("topk_ids", f"on the device of the counters, {where}", here == where, str(here))
    first_row = checks.integer("first_row", first_row, 0)
    checks.fits_int32("counts", num_experts, "the number of counters")
    blocks, threads = _grid(num_rows * top_k)
    in_shared = blocks > 1 and 4 * num_experts <= MOST_SHARED_BYTES
    num_in_shared = num_experts if in_shared else 0
    routed = Routed(topk_ids, num_rows, top_k, first_row, num_experts)
    switch = Switch(torch.int32 if switched else None, torch.int32 if limited else None)
    counters = Counters(torch.int64, num_in_shared)
    return Launch(
        *(count_ids, topk_ids.device, blocks, threads, routed, switch, counters), shared_bytes=4 * num_in_shared
    )


@planned
def plan_add(given: Layout, counts: Layout) -> Launch:
    checks.array("counts", given, checks.IDS, (1,), like=("the recorder's counters", counts))
    num_experts = given.shape[0]
    threads = block_threads(128)
    addition = Addition(given, counts, num_experts)
    return Launch(add_counts, given.device, -(-num_experts // threads), threads, addition, torch.int32)


@planned
def plan_store(
    topk_ids: Layout,
    topk_weights: Layout | None,
    staging: Layout,
    first_row: int,
    to_row: int,
    num_experts: int,
) -> Launch:
    num_rows, top_k = _check_ids(topk_ids)
    checks.holds("topk_ids", f"of top_k = {staging.shape[2]} columns", top_k == staging.shape[2], top_k)
    checks.array("topk_ids", topk_ids, checks.IDS, (1, 2), like=("the recorder", staging))
    if topk_weights is not None:
        checks.array("topk_weights", topk_weights, checks.FLOATS, (1, 2), like=("topk_ids", topk_ids))
        checks.shape("topk_weights", topk_weights, tuple(topk_ids.shape), "`topk_ids`.shape")
    blocks, threads = _grid(num_rows * top_k)
    weights = None if topk_weights is None else torch.float32
    routed = Routed(topk_ids, num_rows, top_k, first_row, num_experts)
    switch = Switch(enabled=torch.int32, num_tokens=torch.int32)
    stage = Stage(torch.int32, weights, torch.int32, to_row=to_row, num_layers=staging.shape[1])
    return Launch(store_tokens, topk_ids.device, blocks, threads, routed, topk_weights, switch, stage)


@op(reference.add_expert_counts, out="counts", own_out=True)
def add_expert_counts(
    topk_ids: Array,
    *,
    counts: Array,
    enabled: Array | None = None,
    num_tokens: Array | None = None,
    first_row: int = 0,
) -> Any:
    """Add the number of slots of each expert to the expert's counter.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_slots] or [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are not counted.
    counts : array of int64, shape [num_experts]
        Written: 1 is added to the counter of each slot's expert.
    enabled : array of int32, shape [1], optional
        A switch on the device: nothing is counted while it holds 0.
    num_tokens : array of int32, shape [1], optional
        Number of real tokens of the pass, on the device. Later rows are padding and are not counted.
    first_row : int
        Number of the first row of `topk_ids` in the pass whose tokens `num_tokens` counts.

    Returns
    -------
    array of int64, shape [num_experts]
        `counts` itself.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, or mixed devices.

    Notes
    -----
    The op is one launch on the caller's current stream without synchronising or allocating. CUDA graphs can capture it,
    and then read `enabled` and `num_tokens` at each replay. Every run gives the same counts.

    Examples
    --------
    >>> import numpy as np
    >>> counts = np.array([10, 0, 0])
    >>> add_expert_counts(np.array([[0, 2], [2, -1], [2, 1]], np.int32), counts=counts)
    array([11,  1,  3])
    >>> add_expert_counts(np.array([[0, 2], [2, -1]]), counts=counts, num_tokens=np.array([1], np.int32))
    array([12,  1,  4])
    """


@add_expert_counts.plan
def _(given: Any) -> Launch:
    checks.array("counts", given.counts, (torch.int64,), (1,))
    for name, value in (("enabled", given.enabled), ("num_tokens", given.num_tokens)):
        if value is not None:
            checks.array(name, value, (torch.int32,), (1,), like=("counts", given.counts))
            checks.shape(name, value, (1,), "(1,)")
    where = (given.counts.shape[0], given.first_row, given.counts.device)
    switched, limited = given.enabled is not None, given.num_tokens is not None
    return plan_count(given.topk_ids, *where, switched=switched, limited=limited)


@add_expert_counts.run
def _(count_ids: Any, given: Any, counts: torch.Tensor) -> None:
    count_ids(topk_ids=given.topk_ids, enabled=given.enabled, num_tokens=given.num_tokens, counts=counts)
