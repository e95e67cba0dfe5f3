"""The counting sort by every path: few slots and many, experts in chunks, counts by block summed early or late."""

import itertools

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.device.primitives import reciprocal_of
from numba_moe.ops.sort import counting_sort
from numba_moe.runtime import plans
from numba_moe.verify import testing

PATHS = {
    "clustered": {},
    "counted": {"CLUSTERS": ()},
    "scanned": {"CLUSTERS": (), "UNSCANNED_COUNTS": 0},
}
SLOW_PATHS = ["clustered", *(pytest.param(path, marks=pytest.mark.slow) for path in ("counted", "scanned"))]


@pytest.mark.parametrize("path", SLOW_PATHS)
@pytest.mark.parametrize("chunk", [1024, pytest.param(16, marks=pytest.mark.slow)])
def test_every_path(path, chunk, device, monkeypatch):
    if device == "cuda" and chunk != counting_sort.count_and_place.CHUNK:
        pytest.skip("the chunk is compiled into the kernels")
    if device == "cpu":
        monkeypatch.setattr(counting_sort.count_and_place, "CHUNK", chunk)
        monkeypatch.setattr(counting_sort.count_and_place, "TWO_CHUNKS", 2 * chunk)
    for name, value in PATHS[path].items():
        monkeypatch.setattr(counting_sort, name, value)
    plans.forget()
    rng = np.random.default_rng(0)
    for tokens, experts, top_k in [(0, 5, 1), (5, 60, 3), (70, 20, 2), (300, 60, 6)]:
        for routing in ("uniform", "one_hot"):
            ids = testing.random_ids(rng, tokens, experts, top_k, routing)
            ids[::7] = -1
            ours = torch.from_numpy(ids).to(device)
            blocks = moe.moe_align_block_size(ours, 16, experts)
            counts = moe.count_tokens_per_expert(ours, experts)
            expected = (
                *reference.moe_align_block_size(ids, 16, experts),
                reference.count_tokens_per_expert(ids, experts),
            )
            for got, wanted in zip((*blocks, counts), expected, strict=True):
                assert np.array_equal(got.cpu().numpy(), wanted), (tokens, experts, top_k, routing)
    plans.forget()


@pytest.mark.parametrize("path", SLOW_PATHS)
def test_ids_and_maps_past_int32_are_no_experts(path, device, monkeypatch, request):
    for name, value in PATHS[path].items():
        monkeypatch.setattr(counting_sort, name, value)
    plans.forget()
    request.addfinalizer(plans.forget)
    rng = np.random.default_rng(0)
    for tokens, experts in [(7, 12), (150, 20)]:
        ids = rng.integers(-2, experts + 2, (tokens, 8))
        ids[rng.random(ids.shape) < 0.2] = 2**32 + 1  # whose lower 32 bits are expert 1, as are those of the next
        ids[rng.random(ids.shape) < 0.1] = -(2**32) + 1
        local = np.arange(experts)
        local[1:9] = experts, experts + 1, -2, 2**32, -(2**32) + 2, 2**31, 2**63 - 1, 2**40 + 3
        names = [int(name) if 0 <= name < 2**31 else -1 for name in local]
        ours, ours_local = torch.from_numpy(ids).to(device), torch.from_numpy(local).to(device)
        blocks = moe.moe_align_block_size(ours, 4, experts, ours_local)
        wanted = reference.moe_align_block_size(ids, 4, experts, np.array(names))
        assert [part.tolist() for part in blocks] == [part.tolist() for part in wanted]
        assert (blocks.expert_ids == -1).any()
        known = [int(local[slot]) for slot in ids.ravel() if 0 <= slot < experts and 0 <= local[slot] < experts]
        assert 0 < len(known) < ids.size
        counts = moe.count_tokens_per_expert(ours, experts, ours_local)
        assert counts.tolist() == np.bincount(known, minlength=experts).tolist()
        inverse, wanted_inverse = torch.full_like(ours, 77, dtype=torch.int32), np.empty(ids.shape, np.int32)
        options = {"ignore_invalid_experts": True}
        blocks = moe.moe_align_block_size(ours, 4, experts, ours_local, inv_sorted_idx=inverse, **options)
        wanted = reference.moe_align_block_size(ids, 4, experts, local, inv_sorted_idx=wanted_inverse, **options)
        assert [part.tolist() for part in (*blocks, inverse)] == [part.tolist() for part in (*wanted, wanted_inverse)]
        assert blocks.num_tokens_post_padded.item() == sum(-(-count // 4) * 4 for count in counts.tolist())


@pytest.mark.parametrize("most_in_cluster", [*counting_sort.CLUSTERS, 0])
def test_grids_keep_within_what_a_block_has(most_in_cluster):
    sizes = [0, 1, 700, 1024, 1025, 2**15, 2**15 + 1, 10**6, 2**31 - 1], [1, 256, 1000, 20000], [0, 10**5, 2**31 - 1]
    for num_slots, num_experts, num_positions in itertools.product(*sizes):
        grid = counting_sort.grid_of(num_slots, num_experts, most_in_cluster, num_positions)
        assert grid.blocks * grid.threads * grid.items >= num_slots
        assert grid.threads <= counting_sort.count_and_place.MOST_THREADS
        assert grid.threads * grid.items < 2**15, "counts by warp and block are int16"
        assert grid.shared_bytes <= 64 * 1024
        assert not grid.one_cluster or grid.blocks <= most_in_cluster


def test_few_slots_share_shared_memory_with_no_warp_without_slots():
    grid = counting_sort.grid_of(100, 1000, 16)
    assert (grid.blocks, grid.chunk) == (1, 1000), "all experts at once"


def test_many_positions_are_filled_by_a_cluster():
    assert counting_sort.grid_of(100, 1000, 16, 20_000).blocks == 1
    assert counting_sort.grid_of(100, 1000, 16, 50_000).blocks == 6
    assert counting_sort.grid_of(100, 1000, 16, 10**6).blocks == 16
    assert counting_sort.grid_of(100, 1000, 0, 10**6).blocks == 1, "where there are no clusters"


@pytest.mark.parametrize("num_slots", [0, 1, 17, 33, 64])
def test_few_slots_are_compared_with_each_other(device, num_slots):
    rng = np.random.default_rng(5)
    for kind, map_of in itertools.product((np.int32, np.int64), ({}, {"ignore_invalid_experts": True})):
        ids = rng.integers(-2, 12, (num_slots, 1)).astype(kind)
        given = dict(map_of)
        if map_of:
            given["expert_map"] = np.array([3, -1, 0, 9, 1, -1, 2, -1, 4, 5], kind)
        inverse, wanted_inverse = torch.full(ids.shape, 77, dtype=torch.int32, device=device), np.empty(ids.shape, "i4")
        there = {name: testing.to_device(value, device) for name, value in given.items()}
        with testing.poisoned_memory():
            blocks = moe.moe_align_block_size(torch.from_numpy(ids).to(device), 5, 10, inv_sorted_idx=inverse, **there)
        wanted = reference.moe_align_block_size(ids, 5, 10, inv_sorted_idx=wanted_inverse, **given)
        assert [part.tolist() for part in (*blocks, inverse)] == [part.tolist() for part in (*wanted, wanted_inverse)]


def test_division_by_a_reciprocal_is_exact():
    numbers = np.concatenate([np.arange(5000), 2**31 - 1 - np.arange(5000)])
    for divisor in (1, 2, 3, 7, 16, 48, 64, 100, 128, 255, 641, 2**16 + 1, 10**9 + 7, 2**31 - 1):
        near = np.concatenate([numbers, np.clip(np.arange(1, 2000) * divisor, 0, 2**31 - 1)])
        reciprocal, shift = reciprocal_of(divisor)
        assert reciprocal * (2**31 - 1) < 2**63, "in 64 bits"
        for number in (near, np.maximum(near - 1, 0)):
            assert np.array_equal(number * reciprocal >> shift, number // divisor), divisor
