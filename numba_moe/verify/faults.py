"""Faults that are planted in the library's kernels, one at a time, to see whether the cases catch them.

Each is a piece of a kernel's text and what stands there instead.
"""

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

from numba_moe.device.dialect import cuda
from numba_moe.ops.gating import which_kernel
from numba_moe.runtime import plans

# Name: module, function, what stands there, what is planted.
FAULTS = {
    "no-op": (
        "ops.sort.count_and_place",
        "write_places",
        "sorted_slots[position] = slot",
        "sorted_slots[position] = slots.num_slots",
    ),
    "off by one": (
        "ops.sort.count_and_place",
        "write_places",
        "position = int32(tables.places",
        "position = int32(1 + tables.places",
    ),
    "swapped pair": (
        "ops.sort.count_and_place",
        "write_places",
        "sorted_slots[position] = slot",
        "sorted_slots[position] = slot ^ 1",
    ),
    "unstable order": ("ops.sort.count_and_place", "place_slots", "items + cuda.laneid)", "items + 31 - cuda.laneid)"),
    "unwritten tail": (
        "ops.sort.count_and_place",
        "place_slots",
        "placed.num_words, placed.num_positions, slots.num_slots",
        "0, slots.num_slots, slots.num_slots",
    ),
    "wrong block name": ("ops.sort.count_and_place", "place_slots", "gemm.inactive_expert_id, int32(", "0, int32("),
    "other blocks forgotten": ("ops.sort.count_and_place", "start_of_experts", "int32(begin + before)", "begin"),
    "another expert": (
        "ops.gating.warp_per_token",
        "choose_for_token",
        "write_pick(expert, logit,",
        "write_pick(rows.num_experts - 1 - expert, logit,",
    ),
    "not renormalised": (
        "ops.gating.warp_per_token",
        "choose_for_token",
        "scale_of(score_sum,",
        "scale_of(float32(0.0),",
    ),
    "picked twice": ("ops.gating.lanes", "choose_by_turns", "struck = own if expert == winner else", "struck ="),
    "a slot left out": ("ops.gating.lanes", "place_of", "int32(place + 1)", "int32(place + 2)"),
    "weight of another lane": (
        "ops.gating.lanes",
        "choose_by_lanes",
        "chosen.topk_weights[slot]",
        "chosen.topk_weights[slot ^ 1]",
    ),
    "row off by one": ("ops.permute.move_rows", "gather_rows", "source + min(", "source + min(1 + "),
    "last slot not moved": ("ops.permute.move_rows", "gather_rows", "in range(slots)", "in range(slots - 1)"),
    "padding not zeroed": ("ops.permute.move_rows", "gather_rows", "if holes != 0:", "if holes > 0xFFFFFFFF:"),
    "padding named": ("ops.permute.move_rows", "gather_rows", "if not unused:", "if True:"),
    "a row of the last batch left out": (
        "ops.permute.move_rows",
        "add_rows",
        "if int32(first + i) <= last and",
        "if int32(first + i) < last and",
    ),
    "a row added twice": ("ops.permute.move_rows", "add_rows", "if int32(first + i) <= last and", "if"),
    "weights of another row": (
        "ops.permute.move_rows",
        "add_rows",
        "slots.topk_weights[int32(first_slot + k)]",
        "slots.topk_weights[first_slot]",
    ),
    "skipped rows added": ("ops.permute.move_rows", "add_rows", "skipped = rows[i] < 0", "skipped = False"),
    "few slots in another order": ("ops.sort.few_slots", "place_few", "if other < slot:", "if other > slot:"),
    "rows of few slots not padded": (
        "ops.sort.few_slots",
        "place_few",
        "int32(num_blocks * padding.block_size) if",
        "alike if",
    ),
    "blocks of few slots without a name": ("ops.sort.few_slots", "place_few", "block + PARTS", "block + 2 * PARTS"),
    "last slot left out": (
        "ops.permute.move_rows",
        "combine_rows",
        "if first + lane < slots.top_k:",
        "if first + lane < slots.top_k - 1:",
    ),
    "weights of another slot": (
        "ops.permute.move_rows",
        "combine_rows",
        "(ALL_LANES, weight, k",
        "(ALL_LANES, weight, 1 ^ k",
    ),
    "more rows than a batch has": ("ops.permute.layouts", "lay_out_rows", "min(count, rows)", "count"),
    "one row too many": ("ops.align_batches", "fill_batches", "position < filled[index]", "position <= filled[index]"),
    "another adapter": (
        "ops.align_adapters",
        "pair_slots",
        "adapter * slots.num_experts",
        "(adapters.max_loras - 1 - adapter) * slots.num_experts",
    ),
    "rows not padded": ("ops.align_adapters", "spread_adapters", "if used else grouped.num_slots", "if used else 0"),
    "blocks counted on": ("ops.ragged", "schedule_blocks", "(block << schedule.shift)", "(position << schedule.shift)"),
    "another place": ("ops.dispatch", "map_ids", "slots.out[slot] = physical", "slots.out[slot] = physical ^ 1"),
    "counted twice": (
        "ops.dispatch",
        "map_ids",
        "add_to_global(counted.counts, physical, 1)",
        "add_to_global(counted.counts, physical, 2)",
    ),
    "no counts of a block": ("ops.dispatch", "map_ids", "if count > 0:", "if count > 1000:"),
    "padding recorded": (
        "ops.record",
        "count_ids",
        "real_rows(switch, routed)",
        "int64(routed.num_rows)",
    ),
    "recorded twice": (
        "ops.record",
        "count_ids",
        "atomic_add(in_block, expert, 1)",
        "atomic_add(in_block, expert, 2)",
    ),
    "recorded when off": (
        "ops.record",
        "count_ids",
        "if is_off(switch.enabled):",
        "if not is_off(switch.enabled):",
    ),
    "bias of another expert": (
        "ops.activation.activate_rows",
        "activate_rows",
        "rule, row, column",
        "rule, row * 0, column",
    ),
    "no shift": ("ops.activation.activate_rows", "activation_of", "(up + rule.shift)", "up"),
    "unused rows left": ("ops.activation.activate_rows", "activate_rows", "store_run(", "if used: store_run("),
    "padding miscounted": (
        "ops.sort.count_and_place",
        "start_of_experts",
        "total + padding.block_size - 1",
        "total + padding.block_size",
    ),
}
# Device functions, and the kernel that calls each.
KERNEL_OF = {
    "activation_of": "activate_rows",
    "choose_by_turns": "choose_by_lanes",
    "place_of": "choose_by_lanes",
    "choose_for_token": "choose_experts",
    "start_of_experts": "place_slots",
    "write_places": "place_slots",
}
# Modules, and the ops whose cases look at their kernels.
OPS_OF = {
    "ops.activation.activate_rows": ["moe_activation", "fused_experts"],
    "ops.align": ["moe_align_block_size"],
    "ops.align_batches": ["batched_moe_align_block_size"],
    "ops.sort.few_slots": ["moe_align_block_size"],
    "ops.sort.count_and_place": ["moe_align_block_size", "count_tokens_per_expert", "moe_permute"],
    "ops.gating.lanes": ["topk_softmax"],
    "ops.gating.warp_per_token": ["topk_softmax"],
    "ops.align_adapters": ["moe_lora_align_block_size"],
    "ops.ragged": ["make_ragged_metadata"],
    "ops.permute.layouts": ["moe_permute_masked"],
    "ops.permute.move_rows": ["moe_permute", "moe_unpermute"],
    "ops.dispatch": ["dispatch_ids"],
    "ops.record": ["add_expert_counts"],
}
WRITES_OUTSIDE = ("off by one", "padding miscounted")
# In the simulator, whose blocks are small, these cases need several of them; on a GPU one is enough.
NEEDS_BLOCKS = ("other blocks forgotten", "no counts of a block", "recorded twice")


def ops_of(fault: str) -> list[str]:
    """Return the ops whose cases look at a fault."""
    return OPS_OF[FAULTS[fault][0]]


def kernel_of(fault: str) -> str:
    """Return the kernel that a fault is in."""
    function = FAULTS[fault][1]
    return KERNEL_OF.get(function, function)


def broken(home: Any, kernel: str, function: str, old: str, new: str) -> Any:
    """Compile a kernel again, with a fault in it or in a device function that it calls."""
    names = dict(vars(home))
    for name in dict.fromkeys((function, kernel)):
        original = getattr(home, name)
        text = inspect.getsource(original.py_func)
        source = text[text.index("def ") :]
        if name == function:
            if old not in source:
                raise ValueError(f"the kernel changed: {old!r} is not in {name}")
            source = source.replace(old, new)
        exec(source, names)
        names[name].__annotations__ = dict(original.py_func.__annotations__)
        names[name] = cuda.jit(names[name], device=name != kernel)
    return names[kernel]


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Let the library's ops run with one of these faults."""
    module, function, old, new = FAULTS[fault]
    home, kernel = importlib.import_module(f"numba_moe.{module}"), kernel_of(fault)
    kernels = module.removeprefix("ops.gating.")
    preferred = contextlib.nullcontext() if kernels == module else which_kernel.preferring(kernels)
    plans.forget()
    try:
        with mock.patch.object(home, kernel, broken(home, kernel, function, old, new)), preferred:
            yield
    finally:
        plans.forget()
