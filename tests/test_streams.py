"""Many calls at once: threads, streams, graphs between eager calls, processes that fork."""

import os
import threading

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe.verify import testing

pytestmark = pytest.mark.gpu

CALLS = 10_000
# (tokens, experts, top_k, block_size): every path of the sort, rows in registers and in memory.
SHAPES = [
    *[(1, 8, 2, 16), (7, 60, 6, 16), (64, 256, 8, 16), (300, 64, 2, 64)],
    *[(700, 256, 8, 64), (5000, 128, 8, 128), (33, 1100, 4, 16)],
]


class Work:
    """Gating and alignment of one shape: inputs that differ from call to call, and what must come out."""

    def __init__(self, shape, seed, variants=3):
        tokens, experts, top_k, self.block_size = shape
        self.experts, self.top_k = experts, top_k
        generator = np.random.default_rng(seed)
        draws = [generator.standard_normal((tokens, experts), np.float32) for _ in range(variants)]
        self.inputs = [torch.from_numpy(logits).cuda() for logits in draws]
        self.expected = [self.call(logits.cpu()) for logits in self.inputs]  # by the reference
        self.expected = [[part.cuda() for part in result] for result in self.expected]

    def call(self, logits):
        weights, ids = moe.topk_softmax(logits, self.top_k, True)
        return (*moe.moe_align_block_size(ids, self.block_size, self.experts), ids, weights)

    def wrong(self, results, variant):
        """Return a device scalar: whether a result differs from the reference's."""
        *exact, weights = results
        *wanted, wanted_weights = self.expected[variant]
        relative, absolute = testing.TOLERANCES[torch.float32]
        differs = [(got != want).any() for got, want in zip(exact, wanted, strict=True)]
        far = (weights - wanted_weights).abs() > absolute + relative * wanted_weights.abs()
        return torch.stack([*differs, ~(weights == weights).all(), far.any()]).any()


def test_four_threads_on_four_streams():
    failures = []
    torch.cuda.synchronize()

    def work(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                works = [Work(shape, seed=number) for shape in SHAPES]
                wrong = torch.zeros((), dtype=torch.bool, device="cuda")
                order = np.random.default_rng(number).integers(0, len(works), CALLS)
                for step, chosen in enumerate(order):
                    variant = step % 3
                    wrong |= works[chosen].wrong(works[chosen].call(works[chosen].inputs[variant]), variant)
                assert not wrong.item(), f"thread {number}"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_graph_replays_between_eager_calls_of_other_shapes():
    works = [Work(shape, seed=9) for shape in SHAPES]
    for captured in (works[2], works[5]):
        slot = captured.inputs[0].clone()
        captured.call(slot)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = captured.call(slot)
        wrong = torch.zeros((), dtype=torch.bool, device="cuda")
        for step in range(1000):
            variant = step % 3
            slot.copy_(captured.inputs[variant])
            graph.replay()
            other = works[step % len(works)]
            wrong |= other.wrong(other.call(other.inputs[variant]), variant)
            wrong |= captured.wrong(results, variant)
        assert not wrong.item()


def test_bits_repeat_while_another_stream_is_busy():
    ids = torch.from_numpy(testing.random_ids(np.random.default_rng(1), 20000, 256, 8, "zipf")).cuda()
    noise = torch.randn(2048, 2048, device="cuda")
    first = moe.moe_align_block_size(ids, 128, 256)
    busy = torch.cuda.Stream()
    wrong = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        with torch.cuda.stream(busy):
            noise @ noise
        for part, wanted in zip(moe.moe_align_block_size(ids, 128, 256), first, strict=True):
            wrong |= (part != wanted).any()
    assert not wrong.item()


FORK = """
import os, sys
import numba_moe as moe
import torch
from numba_moe.runtime import launch  # imported before the fork, used after it
child = os.fork()
ids = torch.tensor([[2, 0], [0, 1], [2, 1]], dtype=torch.int32, device="cuda")
blocks = moe.moe_align_block_size(ids, 4, 3)
assert blocks.sorted_token_ids.tolist() == [1, 2, 6, 6, 3, 5, 6, 6, 0, 4, 6, 6, 6, 6, 6], blocks
if child:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_before_the_first_use(without_simulator):
    assert without_simulator(FORK).strip() == "0"


def test_two_streams_at_once_from_one_thread():
    works = [Work(shape, seed=4) for shape in SHAPES[2:6]]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in works]
    torch.cuda.synchronize()
    for step in range(500):
        for number, (work, stream) in enumerate(zip(works, streams, strict=True)):
            with torch.cuda.stream(stream):
                wrong[number] |= work.wrong(work.call(work.inputs[step % 3]), step % 3)
    torch.cuda.synchronize()
    assert not any(flag.item() for flag in wrong)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_of_another_device_than_the_current_one():
    works = [Work(shape, seed=5) for shape in SHAPES]
    for step in range(50):
        work = works[step % len(works)]
        logits = work.inputs[step % 3].to("cuda:1")
        torch.cuda.synchronize(1)
        results = work.call(logits)
        assert {part.get_device() for part in results} == {1}
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(1)
        assert not work.wrong([part.to("cuda:0") for part in results], step % 3).item()
