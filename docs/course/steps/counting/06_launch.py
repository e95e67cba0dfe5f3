"""Count the slots of each expert, step 6: the kernel of step 3, launched in a few microseconds.

New: nothing in the kernel. Numba's launch describes every array to the driver again, which takes 73 us of the host
(H200). `Launch` is told once what the kernel takes, and then passes addresses. A record says what a field can be.
From Hopper on its kernels also start while the one ahead of them ends.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import functools
from typing import NamedTuple

import torch

from numba_moe.device.dialect import cuda, int32
from numba_moe.device.instructions import add_to_global
from numba_moe.device.types import Ids, Int32, Int32Array
from numba_moe.runtime.launch import Launch


class Slots(NamedTuple):
    ids: Ids  # [num_slots]
    num_slots: Int32
    num_experts: Int32


class Counts(NamedTuple):
    counts: Int32Array  # [num_experts], zero before the launch


@cuda.jit
def count(slots: Slots, written: Counts):
    """Add one slot to its expert. A thread for each slot."""
    slot = int32(cuda.grid(1))
    if slot < slots.num_slots:
        expert = slots.ids[slot]
        if 0 <= expert < slots.num_experts:
            add_to_global(written.counts, int32(expert), int32(1))


@functools.cache
def planned(dtype, device, num_slots, num_experts):
    slots = Slots(dtype, num_slots, num_experts)
    return Launch(count, device, -(-num_slots // 128), 128, slots, Counts(torch.int32))


def count_tokens_per_expert(topk_ids, num_experts):
    ids = lab.as_tensor(topk_ids)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
    planned(ids.dtype, ids.device, ids.numel(), num_experts)(ids=ids, counts=counts)
    return counts


if __name__ == "__main__":
    assert lab.check(count_tokens_per_expert, like="count_tokens_per_expert", library="numba").passed
    lab.roofline(count_tokens_per_expert, like="count_tokens_per_expert", library="numba")
