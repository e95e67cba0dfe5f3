"""Launches on a GPU: streams, graphs, threads, reproducible bits, large addresses."""

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference, testing

pytestmark = pytest.mark.gpu


def routing(seed, tokens=700, experts=60, top_k=6):
    ids = testing.random_ids(np.random.default_rng(seed), tokens, experts, top_k, "zipf")
    return torch.from_numpy(ids).cuda(), reference.moe_align_block_size(ids, 16, experts)


def assert_equal(blocks, expected):
    for part, wanted in zip(blocks, expected, strict=True):
        assert torch.equal(part.cpu(), torch.from_numpy(wanted))


def whole_block(hidden, logits):
    """Gating, alignment, permutation and combination, as a model calls them."""
    weights, ids = moe.topk_softmax(logits, 8, True)
    blocks = moe.moe_align_block_size(ids, 16, logits.shape[1])
    permuted = moe.moe_permute(hidden, ids, logits.shape[1])
    combined = moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)
    return (weights, ids, *blocks, *permuted[:5], combined)


def test_a_graph_replays_with_new_inputs():
    hidden = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(300, 64, device="cuda")
    whole_block(hidden, logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_block(hidden, logits)
    for _ in range(20):
        hidden.normal_()
        logits.normal_()
        graph.replay()
        for part, wanted in zip(captured, whole_block(hidden, logits), strict=True):
            assert torch.equal(part, wanted)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_synchronises():
    hidden = torch.randn(300, 256, device="cuda")
    logits = torch.randn(300, 64, device="cuda")
    whole_block(hidden, logits)
    try:
        torch.cuda.set_sync_debug_mode("error")
        whole_block(hidden, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used():
    stream = torch.cuda.Stream()
    ids, expected = routing(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.full_like(ids, -1)
        torch.cuda._sleep(20_000_000)
        late.copy_(ids)
        blocks = moe.moe_align_block_size(late, 16, 60)
    stream.synchronize()
    assert_equal(blocks, expected)


def test_bits_repeat():
    ids, _ = routing(3, tokens=20000)
    hidden = torch.randn(20000, 64, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(20000, 60, device="cuda")
    first = (*moe.moe_align_block_size(ids, 16, 60), *whole_block(hidden, logits))
    for _ in range(20):
        again = (*moe.moe_align_block_size(ids, 16, 60), *whole_block(hidden, logits))
        assert all(map(torch.equal, first, again))


def test_payload_past_int32_elements():
    tokens, hidden = 150_000, 16_384  # 2.5e9 elements: int32 addresses would wrap
    rows = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.arange(tokens, device="cuda", dtype=torch.int32).flip(0).remainder(16)[:, None].contiguous()
    permuted = moe.moe_permute(rows, ids, 16)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(permuted.permuted_idx.long(), order)
    for begin in range(0, tokens, 30_000):
        part = slice(begin, begin + 30_000)
        assert torch.equal(permuted.permuted_hidden_states[part], rows[order[part]])
    weights = torch.ones(tokens, 1, device="cuda")
    combined = moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)
    assert torch.equal(combined, rows)


@pytest.mark.filterwarnings("ignore")  # Numba's advice on small grids
def test_kernels_launch_by_hand_on_numba_arrays():
    from numba import cuda

    from numba_moe.counting import Counts, Offsets, scan_experts

    counts = cuda.to_device(np.array([3, 0, 5], np.int32))
    offset = cuda.device_array(4, np.int64)
    scan_experts[1, 32](Counts(counts, 3), Offsets(offset, 4))
    assert offset.copy_to_host().tolist() == [0, 4, 4, 12]
