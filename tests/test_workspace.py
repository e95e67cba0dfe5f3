"""The bump allocator: aligned, disjoint, bounded, cleared in one fill; right in CUDA graphs and between streams."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numba_moe import align_sizes, moe_align_block_size
from numba_moe.runtime.workspace import BumpAllocator

DTYPES = ("bool", "uint8", "float16", "bfloat16", "int32", "float32", "int64", "float64", "complex128")


def extent(tensor):
    """Return the addresses of the first byte and of the one after the last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("alignment", [16, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view_is_aligned(dtype, alignment):
    allocator = BumpAllocator(40_000, dtype, "cpu", alignment=alignment)
    assert allocator.buffer.data_ptr() % alignment == 0
    for count in (1, 3, 8, 1, 5):
        view = allocator.allocate(count)
        assert view.data_ptr() % alignment == 0
        assert view.dtype == getattr(torch, dtype)
        assert view.shape == (count,)
        assert view.is_contiguous()


def test_memory_that_torch_did_not_align(monkeypatch):
    whole = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(torch, "zeros", lambda count, **_: whole[3 : 3 + count])
    allocator = BumpAllocator(32, "uint8", "cpu")
    assert allocator.allocate(32).data_ptr() == whole.data_ptr() + 16


def test_alignment_of_one_element_leaves_no_gaps():
    allocator = BumpAllocator(6, torch.int64, "cpu", alignment=8)
    views = [allocator.allocate(count) for count in (1, 2, 3)]
    assert [view.data_ptr() - allocator.buffer.data_ptr() for view in views] == [0, 8, 24]
    assert allocator.used == allocator.size == 6


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize("dtype", ["int32", torch.int32])
def test_names_and_objects_of_torch(dtype, device):
    allocator = BumpAllocator(np.int64(12), dtype, device)
    assert (allocator.size, allocator.used) == (12, 0)
    assert allocator.buffer.shape == (12,)
    assert allocator.buffer.dtype == torch.int32
    assert allocator.buffer.device == torch.device("cpu")


def test_the_buffer_starts_zeroed():
    torch.full((1000,), 7, dtype=torch.int32)  # whose memory is likely given out next
    assert not BumpAllocator(1000, "int32", "cpu").allocate(1000).any()


def test_shapes():
    allocator = BumpAllocator(64, "float32", "cpu")
    for shape in [(2, 3), [4, 2], torch.Size([1, 1, 5]), (7,), ()]:
        view = allocator.allocate(shape)
        assert view.shape == tuple(shape)
        assert view.is_contiguous()
    assert allocator.used == 8 + 8 + 8 + 8 + 1


def test_views_hold_what_was_written_to_each():
    allocator = BumpAllocator(100, "int32", "cpu")
    views = [allocator.allocate(count).fill_(number) for number, count in enumerate((5, 1, 30, 17), 1)]
    for number, view in enumerate(views, 1):
        assert view.unique().tolist() == [number]
    assert allocator.buffer.bincount().tolist()[1:] == [5, 1, 30, 17]


def test_no_elements_are_legal_at_any_time():
    allocator = BumpAllocator(5, "int32", "cpu")
    assert allocator.allocate(0).shape == (0,)
    assert allocator.used == 0
    allocator.allocate(5)  # ends past the last aligned address
    assert allocator.allocate((3, 0)).shape == (3, 0)
    assert allocator.used == 5


def test_exhaustion_names_what_is_left_and_what_was_asked():
    allocator = BumpAllocator(64, "int32", "cpu")
    allocator.allocate(30)
    with pytest.raises(ValueError, match=r"^`n` must be at most the 32 elements left of 64, got 33$"):
        allocator.allocate(33)
    with pytest.raises(ValueError, match=r"^`n` must be at most the 32 elements left of 64, got 35$"):
        allocator.allocate((5, 7))
    assert allocator.used == 30  # a refused request takes nothing
    allocator.allocate(32)
    with pytest.raises(ValueError, match=r"^`n` must be at most the 0 elements left of 64, got 1$"):
        allocator.allocate(1)


def test_zero_clears_what_was_handed_out_and_nothing_else():
    allocator = BumpAllocator(32, "int32", "cpu")
    first, second = allocator.allocate(3), allocator.allocate((2, 3))
    allocator.buffer.fill_(9)
    allocator.zero()
    assert not first.any()
    assert not second.any()
    assert allocator.buffer[10:].tolist() == [9] * 22
    allocator.buffer.fill_(8)
    allocator.reset()
    allocator.zero()
    assert allocator.buffer.tolist() == [8] * 32
    allocator.allocate(5)
    allocator.zero()
    assert allocator.buffer.tolist() == [0] * 5 + [8] * 27


def test_zero_is_one_fill(monkeypatch):
    allocator = BumpAllocator(32, "int32", "cpu")
    views = [allocator.allocate(3).fill_(1) for _ in range(4)]
    fills = []
    zero_ = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: (fills.append(tensor.numel()), zero_(tensor))[1])
    allocator.zero()
    assert fills == [15]
    assert not any(view.any() for view in views)


def test_reset_hands_the_same_memory_out_again():
    allocator = BumpAllocator(32, "int32", "cpu")
    before = [allocator.allocate(n).fill_(4).data_ptr() for n in (3, 20)]
    allocator.reset()
    assert allocator.used == 0
    again = [allocator.allocate(n) for n in (3, 20)]
    assert [view.data_ptr() for view in again] == before
    assert again[0].tolist() == [4, 4, 4]  # reset clears nothing


def test_a_view_keeps_the_memory():
    view = BumpAllocator(1 << 20, "int32", "cpu").allocate(1 << 20).fill_(5)
    others = [torch.zeros(1 << 20, dtype=torch.int32) for _ in range(4)]
    assert int(view.sum()) == 5 << 20
    assert not any(other.any() for other in others)


BAD = {
    "size 0": ((0, "int32", "cpu"), {}, ValueError, "`size` must be at least 1, got 0"),
    "size -1": ((-1, "int32", "cpu"), {}, ValueError, "`size` must be at least 1, got -1"),
    "size True": ((True, "int32", "cpu"), {}, TypeError, "`size` must be an integer, got bool"),
    "half a size": ((1.5, "int32", "cpu"), {}, TypeError, "`size` must be an integer, got float"),
    "no such dtype": ((8, "int33", "cpu"), {}, ValueError, "`dtype` must be a torch dtype or .*, got 'int33'"),
    "a function's name": ((8, "zeros", "cpu"), {}, ValueError, "`dtype` must be a torch dtype or .*, got 'zeros'"),
    "dtype of NumPy": ((8, np.int32, "cpu"), {}, TypeError, "`dtype` must be a torch dtype or .*, got type"),
    "no such device": ((8, "int32", "gpu"), {}, ValueError, "`device` must be a CUDA device, .*, got 'gpu'"),
    "device without memory": ((8, "int32", "meta"), {}, ValueError, "`device` must be a CUDA device, .*, got meta"),
    "no device": ((8, "int32", None), {}, TypeError, "`device` must be a CUDA device, .*, got NoneType"),
    "device -1": ((8, "int32", -1), {}, ValueError, "`device` must be at least 0, got -1"),
    "device True": ((8, "int32", True), {}, TypeError, "`device` must be an integer, got bool"),
    "alignment 0": ((8, "int32", "cpu"), {"alignment": 0}, ValueError, "`alignment` must be at least 1, got 0"),
    "alignment 24": ((8, "int32", "cpu"), {"alignment": 24}, ValueError, "`alignment` must be a power of two, got 24"),
    "alignment 4": ((8, "int64", "cpu"), {"alignment": 4}, ValueError, "`alignment` must be at least 8, .*, got 4"),
    "alignment True": ((8, "int8", "cpu"), {"alignment": True}, TypeError, "`alignment` must be an integer, got bool"),
    "alignment of text": ((8, "int8", "cpu"), {"alignment": "16"}, TypeError, "`alignment` must be an .*, got str"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_construction(name, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("allocated before checking"))
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        BumpAllocator(*arguments, **options)


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (-1, ValueError, "`n` must be at least 0, got -1"),
        ((-2, -3), ValueError, "`n` must be at least 0, got -2"),
        (True, TypeError, "`n` must be an integer, got bool"),
        ((2, True), TypeError, "`n` must be an integer, got bool"),
        (2.0, TypeError, "`n` must be an integer, got float"),
        ("2", TypeError, "`n` must be an integer, got str"),
        (None, TypeError, "`n` must be an integer, got NoneType"),
        ((2**40, 2**40), ValueError, "`n` must be at most the 8 elements left of 8, got 1208925819614629174706176"),
    ],
)
def test_bad_requests(n, error, message):
    allocator = BumpAllocator(8, "int32", "cpu")
    with pytest.raises(error, match=message):
        allocator.allocate(n)
    assert allocator.used == 0


REQUESTS = st.integers(0, 40) | st.lists(st.integers(0, 6), max_size=3).map(tuple)


@settings(deadline=None)
@given(
    size=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    alignment=st.sampled_from([16, 32, 128, 1024]),
    steps=st.lists(REQUESTS | st.just("reset"), max_size=30),
)
def test_views_never_overlap_nor_leave_the_buffer(size, dtype, alignment, steps):
    allocator = BumpAllocator(size, dtype, "cpu", alignment=alignment)
    first, after = extent(allocator.buffer)
    handed_out = []
    for step in steps:
        if step == "reset":
            allocator.reset()
            handed_out = []
            continue
        count = math.prod(step) if isinstance(step, tuple) else step
        # The least address that is aligned and behind every view: a request is refused if and only if it ends late.
        begin = -(-max([first, *(end for _, end in handed_out)]) // alignment) * alignment
        if count and begin + count * allocator.buffer.element_size() > after:
            with pytest.raises(ValueError, match=f"left of {size}, got {count}$"):
                allocator.allocate(step)
            continue
        view = allocator.allocate(step)
        assert view.shape == (step if isinstance(step, tuple) else (step,))
        if count:
            low, high = extent(view)
            assert low % alignment == 0
            assert first <= low < high <= after
            assert all(high <= other_low or other_high <= low for other_low, other_high in handed_out)
            handed_out.append((low, high))
        assert allocator.used * view.element_size() == max([first, *(end for _, end in handed_out)]) - first


@pytest.mark.gpu
def test_devices_by_name_object_and_ordinal():
    here = torch.device("cuda", torch.cuda.current_device())
    for device in ("cuda", here, here.index, str(here)):
        view = BumpAllocator(8, "int32", device).allocate(8)
        assert view.device == here
        assert view.data_ptr() % 16 == 0
        assert not view.any()


def captured(work):
    """Capture a function; return the graph and what the function returned."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


@pytest.mark.gpu
def test_a_graph_uses_an_allocator_made_before():
    allocator = BumpAllocator(1 << 16, "int32", "cuda")
    source = torch.zeros(1 << 15, dtype=torch.int32, device="cuda")

    def work():
        allocator.reset()
        total, tail = allocator.allocate(1 << 15), allocator.allocate((3, 100))
        allocator.zero()
        total += source
        tail += 7
        return total, tail

    work()
    graph, (total, tail) = captured(work)
    others = []
    for step in range(20):
        source.random_(1 << 20)
        others.append(torch.full((1 << 16,), step, dtype=torch.int32, device="cuda"))
        graph.replay()
        assert torch.equal(total, source)
        assert tail.unique().tolist() == [7]
    assert [other.unique().tolist() for other in others] == [[step] for step in range(20)]


@pytest.mark.gpu
def test_a_graph_without_a_captured_clear_goes_on_from_the_last_replay():
    allocator = BumpAllocator(64, "int32", "cuda")
    counter = allocator.allocate(1)
    graph, _ = captured(lambda: counter.add_(1))
    for step in range(1, 6):
        graph.replay()
        assert counter.tolist() == [step]
    allocator.zero()
    graph.replay()
    assert counter.tolist() == [1]


@pytest.mark.gpu
def test_a_graph_keeps_an_allocator_made_inside():
    source = torch.zeros(1 << 15, dtype=torch.int32, device="cuda")
    out = torch.empty_like(source)

    def work():
        total = BumpAllocator(1 << 16, "int32", "cuda").allocate(1 << 15)
        total += source
        out.copy_(total)

    graph, _ = captured(work)  # the allocator and its view are gone
    others = []
    for step in range(20):
        source.random_(1 << 20)
        others.append(torch.full((1 << 16,), step, dtype=torch.int32, device="cuda"))
        graph.replay()
        assert torch.equal(out, source)  # not a sum: the fill is captured
    assert [other.unique().tolist() for other in others] == [[step] for step in range(20)]


@pytest.mark.gpu
def test_two_streams_hand_a_view_over():
    count = 1 << 20
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    allocator = BumpAllocator(2 * count, "int32", "cuda")
    outs = torch.empty(10, count, dtype=torch.int32, device="cuda")
    for stream in (writer, reader):
        stream.wait_stream(torch.cuda.current_stream())
    for step in range(10):
        allocator.reset()
        with torch.cuda.stream(writer):
            view = allocator.allocate(count)
            torch.cuda._sleep(2_000_000)
            allocator.zero()
            view += step + 1
        reader.wait_stream(writer)
        with torch.cuda.stream(reader):
            torch.cuda._sleep(2_000_000)
            outs[step].copy_(view)
        writer.wait_stream(reader)  # the next round writes the same memory
    torch.cuda.synchronize()
    assert [out.unique().tolist() for out in outs] == [[step + 1] for step in range(10)]


@pytest.mark.gpu
def test_memory_recorded_for_another_stream_is_not_given_away_early():
    count = 1 << 22
    reader = torch.cuda.Stream()
    out = torch.empty(count, dtype=torch.int32, device="cuda")
    allocator = BumpAllocator(count, "int32", "cuda")
    view = allocator.allocate(count).fill_(5)
    reader.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(reader):
        torch.cuda._sleep(50_000_000)
        out.copy_(view)
    allocator.buffer.record_stream(reader)
    del allocator, view
    others = [torch.full((count,), 6, dtype=torch.int32, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert out.unique().tolist() == [5]
    assert all(other.unique().tolist() == [6] for other in others)


def test_an_allocator_made_in_inference_mode_is_written_outside_and_the_other_way_round():
    with torch.inference_mode():
        inside = BumpAllocator(64, "int32", "cpu")
        first = inside.allocate(4)
        first += 1
    first += 1
    second = inside.allocate((2, 2))
    second += 1
    assert (first.tolist(), second.tolist()) == ([2, 2, 2, 2], [[1, 1], [1, 1]])
    inside.zero()
    with torch.inference_mode():
        second += 1
        inside.zero()
        inside.reset()
    assert (first.tolist(), second.tolist()) == ([0, 0, 0, 0], [[0, 0], [0, 0]])
    ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    size = align_sizes(4, 2, 3).workspace
    workspace = inside.allocate(max(size, 1))
    with torch.inference_mode():
        moe_align_block_size(ids, 2, 3, workspace=workspace)
    moe_align_block_size(ids, 2, 3, workspace=workspace)
