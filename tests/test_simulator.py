"""The simulator's warp operations do what CUDA's do, and what would hang or corrupt a GPU is an error."""

import gc

import numpy as np
import pytest
import torch
from numba import cuda

from numba_moe.device import simulator
from numba_moe.device.dialect import int64
from numba_moe.device.primitives import block_sums, choice_key, chosen_index, warp_inclusive_sum, warp_sum

pytestmark = pytest.mark.skipif(not simulator.ENABLED, reason="needs Numba's CUDA simulator")
ALL = 0xFFFFFFFF


def run(kernel, threads, *arrays):
    simulator.launch(kernel, tuple(map(torch.from_numpy, arrays)), 1, threads)
    return arrays[-1]


def test_shuffles():
    @cuda.jit
    def kernel(out):
        lane = cuda.laneid
        out[lane] = cuda.shfl_sync(ALL, lane, 5)
        out[32 + lane] = cuda.shfl_up_sync(ALL, lane, 3)
        out[64 + lane] = cuda.shfl_down_sync(ALL, lane, 3)
        out[96 + lane] = cuda.shfl_xor_sync(ALL, lane, 9)

    got = run(kernel, 32, np.zeros(128, np.int64)).reshape(4, 32)
    lanes = np.arange(32)
    assert got[0].tolist() == [5] * 32
    assert got[1].tolist() == np.where(lanes < 3, lanes, lanes - 3).tolist()
    assert got[2].tolist() == np.where(lanes > 28, lanes, lanes + 3).tolist()
    assert got[3].tolist() == (lanes ^ 9).tolist()


def test_votes_and_matches():
    @cuda.jit
    def kernel(values, out):
        lane = cuda.laneid
        value = values[lane]
        out[lane] = cuda.match_any_sync(ALL, value)
        out[32] = cuda.ballot_sync(ALL, value == 2)
        out[33] = cuda.any_sync(ALL, value == 7)
        out[34] = cuda.all_sync(ALL, value < 3)
        mask, same = cuda.match_all_sync(ALL, value)
        out[35] = mask + same
        out[36] = cuda.activemask()
        out[37] = cuda.eq_sync(ALL, value < 3)

    values = np.arange(32) % 3
    got = run(kernel, 32, values, np.zeros(38, np.int64))
    masks = [sum(1 << lane for lane in range(32) if lane % 3 == value) for value in range(3)]
    assert got[:32].tolist() == [masks[value] for value in values]
    assert got[32:].tolist() == [masks[2], 0, 1, 0, ALL, 1]


def test_part_of_a_warp():
    @cuda.jit
    def kernel(out):
        lane = cuda.laneid
        if lane < 8:
            out[lane] = cuda.match_any_sync(0xFF, lane // 4)
        else:
            out[lane] = cuda.shfl_xor_sync(0xFFFFFF00, lane, 1)

    got = run(kernel, 32, np.zeros(32, np.int64))
    assert got.tolist() == [0x0F] * 4 + [0xF0] * 4 + [lane ^ 1 for lane in range(8, 32)]


def test_sums():
    @cuda.jit
    def kernel(values, out):
        thread = cuda.threadIdx.x
        sums = cuda.shared.array(32, np.int64)
        out[thread] = warp_inclusive_sum(values[thread], int64)
        out[64 + thread] = warp_sum(values[thread])
        out[128 + thread], out[192 + thread] = block_sums(values[thread], sums, int64)

    values = np.random.default_rng(0).integers(-9, 9, 64)
    got = run(kernel, 64, values, np.zeros(256, np.int64)).reshape(4, 64)
    halves = values.reshape(2, 32)
    assert got[0].tolist() == np.cumsum(halves, axis=1).ravel().tolist()
    assert got[1].tolist() == np.repeat(halves.sum(1), 32).tolist()
    assert got[2].tolist() == np.cumsum(values).tolist()
    assert set(got[3].tolist()) == {values.sum()}


def test_choice_keys_order_by_value_then_by_lower_index():
    values = np.array([-np.inf, -1e30, -1.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, 2.0, np.inf], np.float32)
    keys = [choice_key(value, index) for index, value in enumerate(values)]
    order = sorted(range(len(keys)), key=lambda index: -keys[index])
    assert order == [9, 7, 8, 6, 4, 5, 3, 2, 1, 0]
    assert [chosen_index(key) for key in keys] == list(range(len(keys)))
    assert choice_key(np.float32(np.nan), 3) == choice_key(np.float32(-np.inf), 3)


def test_a_barrier_that_some_threads_never_reach_is_an_error():
    @cuda.jit
    def kernel(out):
        if cuda.laneid < 16:
            cuda.syncwarp()
        else:  # the rest wait for lane 0 elsewhere
            out[cuda.laneid] = cuda.ballot_sync(0xFFFF0001, 1)

    for _ in range(5):
        with pytest.raises(RuntimeError, match="deadlock: threads wait for others that never arrive"):
            run(kernel, 32, np.zeros(32, np.int64))
    gc.collect()
    begun = [thread for thread in gc.get_objects() if type(thread) is simulator._Thread and thread]
    assert begun == [], "threads that waited have been ended"


def test_a_lane_outside_the_mask_is_an_error():
    @cuda.jit
    def kernel(out):
        out[cuda.laneid] = cuda.ballot_sync(0xFF, 1)

    with pytest.raises(RuntimeError, match="mask 0xff leaves it out"):
        run(kernel, 32, np.zeros(32, np.int64))


@pytest.mark.parametrize("index", [-1, 32])
def test_an_access_outside_an_array_is_an_error(index):
    @cuda.jit
    def kernel(out):
        if cuda.laneid == 7:
            out[index] = 1

    with pytest.raises(IndexError, match=f"index {index} is outside an array of 32 elements"):
        run(kernel, 32, np.zeros(32, np.int64))


def test_a_missing_barrier_gives_a_wrong_answer():
    @cuda.jit
    def kernel(out):
        shared = cuda.shared.array(64, np.int64)
        shared[cuda.threadIdx.x] = cuda.threadIdx.x
        out[cuda.threadIdx.x] = shared[63 - cuda.threadIdx.x]

    poison = np.zeros(64, np.int64)
    assert run(kernel, 64, poison).tolist() != list(range(63, -1, -1))


def test_blocks_go_on_after_a_failed_one():
    test_an_access_outside_an_array_is_an_error(-1)
    test_sums()
    test_a_barrier_that_some_threads_never_reach_is_an_error()
    test_shuffles()


def test_a_cluster_goes_on_after_a_failed_block():
    @cuda.jit
    def fails(out):
        cuda.syncthreads()
        if cuda.threadIdx.x == cuda.blockDim.x - 1:
            raise ValueError
        cuda.syncthreads()

    @cuda.jit
    def counts(out):
        cuda.syncthreads()
        out[cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x] += 1

    out = np.zeros(3 * 64, np.int64)
    for _ in range(5):
        with pytest.raises(ValueError, match="thread 63 of block 0"):
            run(fails, 64, out)
        simulator.launch(counts, (torch.from_numpy(out),), 3, 64, one_cluster=True)
    assert out.tolist() == [5] * (3 * 64)
