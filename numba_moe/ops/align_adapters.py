"""Group slots by LoRA adapter and expert, padded to GEMM blocks for each adapter: `moe_lora_align_block_size`.

1. `pair_slots` combines the adapter and the expert of each slot into one number, a virtual expert.
2. The sort of `numba_moe.ops.sort` groups the slots by virtual expert, so the slots of an adapter lie together.
3. `spread_adapters` copies the slots of each adapter to a row of the result, and pads the row.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, int64
from numba_moe.device.instructions import present, quotient, wait_for_earlier
from numba_moe.device.types import Ids, Int32, Int32Array, Int64Array, OptionalInt32Array
from numba_moe.ops.align import moe_align_block_size
from numba_moe.ops.sort import counting_sort
from numba_moe.ops.sort.count_and_place import Slots
from numba_moe.reference import lora as reference
from numba_moe.reference.align import AlignedBlocks, max_sorted_slots
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Layout
from numba_moe.sizes import num_elements, sorted_slots

THREADS = 256


class Adapters(NamedTuple):
    """The adapter of each token, and which adapters are in use."""

    token_lora_mapping: Ids  # [num_slots / top_k]
    adapter_enabled: OptionalInt32Array  # [max_loras]; 0 for an adapter whose tokens are skipped
    lora_ids: OptionalInt32Array  # [num_lora_ids]; tokens of adapters outside this list are skipped
    top_k: Int32
    max_loras: Int32
    num_lora_ids: Int32  # -1 without lora_ids, because an empty array has no address either


class Grouped(NamedTuple):
    """Slots sorted by virtual expert."""

    sorted_slots: Int32Array  # [positions]
    block_experts: Int32Array  # [positions / block_size], the virtual expert of each block
    offset: Int64Array  # [max_loras * num_experts + 1]
    num_slots: Int32
    num_experts: Int32


class Spread(NamedTuple):
    """The GEMM blocks: one row for each adapter."""

    sorted_token_ids: Int32Array  # [max_loras, length]
    expert_ids: Int32Array  # [max_loras, num_blocks]
    num_padded: Int32Array  # [max_loras]
    max_loras: Int32
    length: Int32
    num_blocks: Int32
    block_size: Int32
    inactive_expert_id: Int32


@cuda.jit(device=True)
def holds(array, size, value):
    """Return whether a value is in array[:size]."""
    found = False
    for index in range(size):
        if array[index] == value:
            found = True
    return found


@cuda.jit
def pair_slots(
    slots: Slots,
    adapters: Adapters,
    virtual_ids: Int32Array,  # [num_slots]
):
    """Write the virtual expert of each slot, -1 for a skipped slot; a thread takes one slot."""
    wait_for_earlier()
    slot = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    if slot >= slots.num_slots:
        return
    expert = int64(slots.topk_ids[slot])
    known = expert >= 0 and expert < slots.num_experts
    if known and present(slots.expert_map):
        expert = int64(slots.expert_map[expert])
        known = expert >= 0 and expert < slots.num_local
    adapter = int64(adapters.token_lora_mapping[quotient(slot, adapters.top_k)])
    active = adapter >= 0 and adapter < adapters.max_loras
    if active and present(adapters.adapter_enabled):
        active = adapters.adapter_enabled[adapter] != 0
    if active and adapters.num_lora_ids >= 0:
        active = holds(adapters.lora_ids, adapters.num_lora_ids, adapter)
    virtual_ids[slot] = adapter * slots.num_experts + expert if known and active else -1


@cuda.jit
def spread_adapters(grouped: Grouped, spread: Spread):
    """Copy the slots of each adapter to its row, and pad the row; a thread writes one element of sorted_token_ids."""
    wait_for_earlier()
    index = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    if index < spread.max_loras:
        last = grouped.offset[(index + 1) * grouped.num_experts]
        spread.num_padded[index] = last - grouped.offset[index * grouped.num_experts]
    if index >= int64(spread.max_loras) * spread.length:
        return
    adapter = int64(quotient(index, spread.length))
    position = index - adapter * spread.length
    first = grouped.offset[adapter * grouped.num_experts]
    used = position < grouped.offset[(adapter + 1) * grouped.num_experts] - first
    spread.sorted_token_ids[index] = grouped.sorted_slots[first + position] if used else grouped.num_slots
    block = int64(quotient(position, spread.block_size))
    if block * spread.block_size == position:
        expert = int64(spread.inactive_expert_id)
        if used:
            block_of_sort = quotient(first + position, spread.block_size)
            expert = grouped.block_experts[block_of_sort] - adapter * grouped.num_experts
        spread.expert_ids[adapter * spread.num_blocks + block] = expert


@op(reference.moe_lora_align_block_size, like=moe_align_block_size)
def moe_lora_align_block_size(
    topk_ids: Array,
    token_lora_mapping: Array,
    block_size: int,
    num_experts: int,
    max_loras: int,
    adapter_enabled: Array | None = None,
    lora_ids: Array | None = None,
    expert_map: Array | None = None,
    pad_sorted_ids: bool = False,
    *,
    inactive_expert_id: int = -1,
    out: AlignedBlocks | None = None,
) -> AlignedBlocks:
    """Align the slots of each LoRA adapter's tokens separately.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are skipped.
    token_lora_mapping : array of int32 or int64, shape [num_tokens]
        The adapter of each token. A number outside ``[0, max_loras)``, such as -1, means no adapter, and the token is
        skipped.
    max_loras : int
        Number of adapters.
    adapter_enabled : array of int32, shape [max_loras] or longer, optional
        0 for an adapter whose tokens are skipped.
    lora_ids : array of int32, one dimension, optional
        The adapters in use, in any order; -1 names none. Tokens of all other adapters are skipped.
    expert_map : array of int32 or int64, shape [num_experts], optional
        This rank's id of each expert, -1 for an expert of another rank, whose slots are skipped. Slots are grouped by
        this rank's ids.
    pad_sorted_ids : bool
        Round the row length of `sorted_token_ids` up to a multiple of the block size.
    out : tuple of three arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    AlignedBlocks
        The results of `moe_align_block_size` for the slots of each adapter, one row per adapter. sorted_token_ids :
        int32 [max_loras, max_sorted_slots]. expert_ids : int32 [max_loras, ceil(max_sorted_slots / block_size)].
        num_tokens_post_padded : int32 [max_loras]. The row of an adapter without slots is all padding.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, `block_size` or `max_loras` below 1, or more positions than int32 can
        index.

    Notes
    -----
    The order is stable, so every run gives the same bits. The op runs on the caller's current stream without
    synchronising, and CUDA graphs can capture it. It takes two launches more than `moe_align_block_size`, for any
    number of adapters. It allocates the results, and scratch for one alignment with ``max_loras * num_experts``
    experts. vLLM's op of this name (release 0.21) differs: it writes these rows into flat arrays, its `adapter_enabled`
    and `lora_ids` have at least one more element, and it does not write the rows of unused adapters.

    Examples
    --------
    >>> import numpy as np
    >>> ids = np.array([[0, 1], [0, 1], [1, 0]])
    >>> blocks = moe_lora_align_block_size(ids, np.array([1, -1, 1]), 2, 2, max_loras=2)
    >>> blocks.sorted_token_ids
    array([[6, 6, 6, 6, 6, 6, 6, 6],
           [0, 5, 1, 4, 6, 6, 6, 6]], dtype=int32)
    >>> blocks.num_tokens_post_padded
    array([0, 4], dtype=int32)
    """


@moe_lora_align_block_size.outputs
def _(given: Any) -> tuple[Contiguous, ...]:
    block_size, max_loras = given.block_size, given.max_loras
    length = sorted_slots(num_elements(given.topk_ids), block_size, given.num_experts, given.pad_sorted_ids)
    shapes = (max_loras, length), (max_loras, -(-length // block_size)), (max_loras,)
    return tuple(contiguous(torch.int32, *shape) for shape in shapes)


class LoraPlan(NamedTuple):
    """The scratch for the sort of virtual experts, and the launches."""

    scratch: tuple[Contiguous, ...]
    pair: Launch
    sort: counting_sort.SortPlan
    spread: Launch


@moe_lora_align_block_size.plan
def _(given: Any) -> LoraPlan:
    num_experts = checks.routing(given.topk_ids, given.num_experts, given.expert_map, ndims=(2,))
    num_tokens, top_k = given.topk_ids.shape
    num_slots = num_tokens * top_k
    like = ("topk_ids", given.topk_ids)
    checks.array("token_lora_mapping", given.token_lora_mapping, checks.IDS, (1,), like=like)
    checks.shape("token_lora_mapping", given.token_lora_mapping, (num_tokens,), "(num_tokens,)")
    block_size = checks.integer("block_size", given.block_size, 1)
    max_loras = checks.integer("max_loras", given.max_loras, 1)
    if given.adapter_enabled is not None:
        checks.array("adapter_enabled", given.adapter_enabled, (torch.int32,), (1,), like=like)
        checks.at_least("len(adapter_enabled)", given.adapter_enabled.shape[0], max_loras, "max_loras")
    if given.lora_ids is not None:
        checks.array("lora_ids", given.lora_ids, (torch.int32,), (1,), like=like)
    checks.boolean("pad_sorted_ids", given.pad_sorted_ids)
    inactive_expert_id = checks.integer("inactive_expert_id", given.inactive_expert_id, -(2**31))
    num_virtual = max_loras * num_experts
    num_sorted = max_sorted_slots(num_slots, block_size, num_virtual)
    length = max_sorted_slots(num_slots, block_size, num_experts, given.pad_sorted_ids)
    num_blocks = -(-length // block_size)
    checks.fits_int32("max_loras", num_virtual, "max_loras * num_experts")
    checks.fits_int32("topk_ids", max(num_sorted, max_loras * length), "the number of padded positions")

    threads = block_threads(THREADS)
    device = given.topk_ids.device
    virtual_ids = Layout(torch.Size([num_slots]), torch.int32, device, None, 0)
    adapters = Adapters(
        given.token_lora_mapping,
        given.adapter_enabled,
        given.lora_ids,
        top_k=top_k,
        max_loras=max_loras,
        num_lora_ids=-1 if given.lora_ids is None else given.lora_ids.shape[0],
    )
    slots = Slots(given.topk_ids, given.expert_map, num_slots, num_experts, num_experts)
    pair = Launch(pair_slots, device, -(-num_slots // threads), threads, slots, adapters, virtual_ids)
    written = ("offset", "expert_ids")
    sort = counting_sort.plan_sort(virtual_ids, num_virtual, num_sorted, block_size, written=written)
    scratch = (
        contiguous(torch.int32, num_slots),
        contiguous(torch.int32, num_sorted),
        contiguous(torch.int32, -(-num_sorted // block_size)),
        contiguous(torch.int64, num_virtual + 1),
    )
    grouped = Grouped(torch.int32, torch.int32, torch.int64, num_slots, num_experts)
    into = Spread(
        torch.int32,
        torch.int32,
        torch.int32,
        max_loras=max_loras,
        length=length,
        num_blocks=num_blocks,
        block_size=block_size,
        inactive_expert_id=inactive_expert_id,
    )
    elements = max(max_loras * length, max_loras)
    spread = Launch(spread_adapters, device, -(-elements // threads), threads, grouped, into)
    return LoraPlan(scratch, pair, sort, spread)


@moe_lora_align_block_size.validate
def _(given: Any) -> None:
    checks.ids(given.topk_ids, given.num_experts)


@moe_lora_align_block_size.run
def _(plan: Any, given: Any, sorted_token_ids: Any, expert_ids: Any, num_tokens_post_padded: Any) -> None:
    virtual_ids, sorted_slots, block_experts, offset = (arrays.empty(*array) for array in plan.scratch)
    plan.pair(
        topk_ids=given.topk_ids,
        token_lora_mapping=given.token_lora_mapping,
        adapter_enabled=given.adapter_enabled,
        lora_ids=given.lora_ids,
        expert_map=given.expert_map,
        virtual_ids=virtual_ids,
    )
    counting_sort.sort(plan.sort, virtual_ids, sorted_slots, offset=offset, expert_ids=block_experts)
    plan.spread(
        sorted_slots=sorted_slots,
        block_experts=block_experts,
        offset=offset,
        sorted_token_ids=sorted_token_ids,
        expert_ids=expert_ids,
        num_padded=num_tokens_post_padded,
    )
