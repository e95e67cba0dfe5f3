"""What is particular to the variants of alignment: memory that is given, and every path of the sort with it."""

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.ops.sort import counting_sort
from numba_moe.runtime import arrays, plans
from numba_moe.verify import testing

PATHS = {
    "clustered": {},
    "counted": {"CLUSTERS": ()},
    "scanned": {"CLUSTERS": (), "UNSCANNED_COUNTS": 0},
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("path", PATHS)
def test_given_memory_is_all_that_is_written(path, device, monkeypatch, request):
    for name, value in PATHS[path].items():
        monkeypatch.setattr(counting_sort, name, value)
    plans.forget()
    request.addfinalizer(plans.forget)
    experts, block_size = 20, 16
    for tokens in (0, 5, 700):
        ids = testing.random_ids(np.random.default_rng(tokens), tokens, experts, 3, "zipf")
        ids[::7] = -1
        sizes = moe.align_sizes(ids.size, block_size, experts)
        assert (sizes.workspace > 0) == (tokens == 700)
        wanted_inverse, wanted_counts = np.empty_like(ids), np.empty(experts, np.int32)
        expected = reference.moe_align_block_size(
            ids, block_size, experts, inv_sorted_idx=wanted_inverse, counts=wanted_counts
        )
        allocator = moe.BumpAllocator(10000, "int32", device)
        allocator.buffer.fill_(77)
        out = moe.AlignedBlocks(*map(allocator.allocate, (*sizes[:2], 1)))
        inverse, counts = allocator.allocate(ids.shape), allocator.allocate(experts)
        workspace = allocator.allocate(sizes.workspace)
        ours = torch.from_numpy(ids).to(device)
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "empty", lambda *_, **__: pytest.fail("allocated"))
            blocks = moe.moe_align_block_size(
                *(ours, block_size, experts), out=out, inv_sorted_idx=inverse, counts=counts, workspace=workspace
            )
        assert all(part is given for part, given in zip(blocks, out, strict=True))
        for got, wanted in zip((*blocks, inverse, counts), (*expected, wanted_inverse, wanted_counts), strict=True):
            assert np.array_equal(got.cpu().numpy(), wanted), tokens
        for part in (*out, inverse, counts, workspace):
            part.fill_(77)
        assert (allocator.buffer == 77).all(), "something beside the given memory was written"


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", [60, 250, 500])
def test_counts_of_any_number_of_blocks(num_experts, device, monkeypatch, request):
    monkeypatch.setattr(counting_sort, "CLUSTERS", ())
    plans.forget()
    request.addfinalizer(plans.forget)
    for blocks in range(2, 8):  # which threads sum two, four or sixteen at a time
        ids = testing.random_ids(np.random.default_rng(blocks), 64 * blocks - 7, num_experts, 2, "zipf")
        expected = reference.moe_align_block_size(ids, 4, num_experts)
        found = moe.moe_align_block_size(torch.from_numpy(ids).to(device), 4, num_experts)
        for got, wanted in zip(found, expected, strict=True):
            assert np.array_equal(got.cpu().numpy(), wanted), blocks


@pytest.mark.parametrize("num_experts", [1, 256, 5000])
def test_a_workspace_suffices_for_fewer_slots(num_experts):
    most = moe.align_sizes(2**21, 128, num_experts)
    for num_slots in (*range(0, 2**21, 9973), 2**10 + 1, 2**15 + 1, counting_sort.FEW_SLOTS):
        sizes = moe.align_sizes(num_slots, 128, num_experts)
        assert all(size <= enough for size, enough in zip(sizes, most, strict=True)), num_slots
        plan = counting_sort.plan_sort(plans.layout(torch.empty(num_slots, dtype=torch.int32)), num_experts, num_slots)
        counts, offsets = (array.shape[0] if array else 0 for array in (plan.block_counts, plan.block_offsets))
        assert counts // 2 + offsets <= sizes.workspace
        assert counts % 8 == 0, "the sums begin at a multiple of 16 bytes"


def test_given_numpy_arrays_are_written():
    ids = np.array([[2, 0], [0, 1], [2, 1]])
    out = np.zeros(15, np.int32), np.zeros(4, np.int32), np.zeros(1, np.int32)
    counts = np.zeros(3, np.int32)
    blocks = moe.moe_align_block_size(ids, 4, 3, out=out, counts=counts)
    assert out[0].tolist() == [1, 2, 6, 6, 3, 5, 6, 6, 0, 4, 6, 6, 6, 6, 6]
    assert blocks.sorted_token_ids.ctypes.data == out[0].ctypes.data
    assert counts.tolist() == [2, 2, 2]


def test_given_cpu_tensors_are_written():
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    inverse = torch.zeros(3, 2, dtype=torch.int32)
    moe.moe_align_block_size(ids, 4, 3, inv_sorted_idx=inverse)
    assert inverse.tolist() == [[8, 0], [1, 4], [9, 5]]


def test_the_array_decides_wherever_it_stands():
    sizes = np.array([2, 0, 3])
    for blocks in (
        moe.batched_moe_align_block_size(3, 2, sizes),
        moe.batched_moe_align_block_size(3, 2, expert_num_tokens=sizes),
    ):
        assert isinstance(blocks.expert_ids, np.ndarray)
        assert blocks.expert_ids.tolist() == [0, 2, 2, -1, -1, -1]


@pytest.mark.gpu
def test_variants_capture_into_graphs_and_given_memory_allocates_nothing():
    rng = np.random.default_rng(0)
    draws = [torch.from_numpy(testing.random_ids(rng, 30000, 64, 4, "zipf")).cuda() for _ in range(3)]
    adapters = torch.from_numpy(rng.integers(-1, 4, 30000)).cuda()
    sizes = moe.align_sizes(120000, 64, 64)
    out = tuple(torch.empty(size, dtype=torch.int32, device="cuda") for size in (*sizes[:2], 1))
    counts, workspace = (torch.empty(size, dtype=torch.int32, device="cuda") for size in (64, sizes.workspace))
    ids = draws[0].clone()

    def work():
        moe.moe_align_block_size(ids, 64, 64, out=out, counts=counts, workspace=workspace)
        batched = moe.batched_moe_align_block_size(4096, 64, counts)
        ragged = moe.make_ragged_metadata(counts, 120000)
        return out, batched, ragged, moe.moe_lora_align_block_size(ids, adapters, 64, 64, 3)

    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        moe.moe_align_block_size(ids, 64, 64, out=out, counts=counts, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    for drawn in draws:
        ids.copy_(drawn)
        graph.replay()
        on_host = drawn.cpu().numpy()
        sizes_now = reference.count_tokens_per_expert(on_host, 64)
        expected = (
            reference.moe_align_block_size(on_host, 64, 64),
            reference.batched_moe_align_block_size(4096, 64, sizes_now),
            reference.make_ragged_metadata(sizes_now, 120000),
            reference.moe_lora_align_block_size(on_host, adapters.cpu().numpy(), 64, 64, 3),
        )
        for result, wanted in zip(results, expected, strict=True):
            for part, wanted_part in zip(result, wanted, strict=True):
                assert np.array_equal(part.cpu().numpy(), wanted_part)
