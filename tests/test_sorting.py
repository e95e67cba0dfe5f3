"""The barriers and the carries of the sort: cases that come out wrong without one."""

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.ops.sort import count_and_place, counting_sort
from numba_moe.runtime.launch import Launch, warps
from numba_moe.verify import testing


def test_warps_take_turns_with_the_counts_of_their_slots(device):
    """Four experts for 2,000 slots, four to a thread: every lane counts what another of its warp counts next."""
    ids = np.random.default_rng(0).integers(0, 4, (1000, 2)).astype(np.int32)
    if device == "cpu":
        assert counting_sort.grid_of(ids.size, 4, 8).items == 4, "one slot to a thread is ranked by other means"
    found = moe.moe_align_block_size(torch.from_numpy(ids).to(device), 16, 4)
    for got, wanted in zip(found, reference.moe_align_block_size(ids, 16, 4), strict=True):
        assert np.array_equal(got.cpu().numpy(), wanted)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_block_counts_more_experts_than_it_holds_at_a_time(blocks, device):
    num_experts, threads = 2 * count_and_place.CHUNK + 300, 128
    ids = testing.random_ids(np.random.default_rng(blocks), threads * blocks // 2, num_experts, 2, "uniform")
    given = torch.from_numpy(ids).to(device)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
    slots = count_and_place.Slots(
        given, expert_map=None, num_slots=ids.size, num_experts=num_experts, num_local=num_experts
    )
    counted = count_and_place.Counted(block_counts=None, counts=counts, stride=-(-num_experts // 8) * 8)
    cleared = count_and_place.Cleared(sorted_slots=None, num_positions=0, num_words=0)
    Launch(count_and_place.count_slots, counts.device, blocks, threads, slots, counted, cleared, items=1)(
        topk_ids=given, counts=counts
    )
    assert np.array_equal(counts.cpu().numpy(), reference.count_tokens_per_expert(ids, num_experts))


@pytest.mark.parametrize("num_blocks", [1, 32, 33, 70, 129])
def test_sums_over_blocks_go_on_after_every_warp_of_them(num_blocks, device):
    num_experts, stride = 5, 8
    rng = np.random.default_rng(num_blocks)
    counts = rng.integers(1, 4096, (num_blocks, stride)).astype(np.int16)
    given = torch.from_numpy(counts).to(device)
    offsets = torch.full((num_blocks + 1, num_experts), -7, dtype=torch.int32, device=device)
    by_block = count_and_place.BlockCounts(given, num_blocks, stride)
    before = count_and_place.BlockOffsets(offsets, num_experts)
    scan = Launch(count_and_place.scan_blocks, given.device, *warps(num_experts), by_block, before)
    scan(block_counts=given, offsets=offsets)
    expected = np.vstack([np.zeros((1, stride), np.int64), counts.astype(np.int64).cumsum(axis=0)])
    assert np.array_equal(offsets.cpu().numpy(), expected[:, :num_experts])
