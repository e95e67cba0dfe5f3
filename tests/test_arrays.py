"""Arrays of every library go in and come out as they are, without a copy, on the caller's stream."""

import contextlib
import types

import numpy as np
import pytest
import torch
from numba import cuda

import numba_moe as moe
from numba_moe import reference
from numba_moe.device import simulator
from numba_moe.runtime import arrays, observe, op

IDS = np.array([[3, 1], [0, 3], [-1, 2]], np.int32)


def test_numpy_is_answered_by_the_reference_in_numpy():
    blocks = moe.moe_align_block_size(IDS, 4, 4)
    expected = reference.moe_align_block_size(IDS, 4, 4)
    for part, wanted in zip(blocks, expected, strict=True):
        assert isinstance(part, np.ndarray)
        assert part.dtype == wanted.dtype
        assert part.tolist() == wanted.tolist()


def test_cpu_tensors_are_answered_in_tensors():
    counts = moe.count_tokens_per_expert(torch.from_numpy(IDS), 4)
    assert isinstance(counts, torch.Tensor)
    assert counts.tolist() == [1, 1, 1, 2]


def test_cpu_bfloat16_comes_back_as_bfloat16():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16)
    permuted = moe.moe_permute(rows, torch.from_numpy(IDS), 4)
    assert permuted.permuted_hidden_states.dtype == torch.bfloat16
    assert permuted.permuted_hidden_states[:, 0].tolist() == [3.0, 1.0, 5.0, 1.0, 3.0, 0.0]
    weights = torch.ones(3, 2)
    combined = moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)
    assert combined.dtype == torch.bfloat16
    assert combined.tolist() == [[2.0, 4.0], [6.0, 8.0], [5.0, 6.0]]


def test_read_only_and_reversed_numpy_arrays_work():
    frozen = IDS.copy()
    frozen.flags.writeable = False
    assert moe.count_tokens_per_expert(frozen, 4).tolist() == [1, 1, 1, 2]
    assert moe.count_tokens_per_expert(IDS[::-1], 4).tolist() == [1, 1, 1, 2]
    logits = np.broadcast_to(np.array([0, 3, 1, 2], np.float32), (2, 4))
    assert moe.topk_softmax(logits, 2).topk_ids.tolist() == [[1, 3], [1, 3]]


def test_first_argument_by_name():
    assert moe.count_tokens_per_expert(num_experts=4, topk_ids=IDS).tolist() == [1, 1, 1, 2]


def test_tensors_that_require_grad_route_too():
    logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    assert moe.topk_softmax(logits, 1).topk_ids.tolist() == [[2]]
    assert moe.topk_softmax(torch.nn.Parameter(logits.detach()), 1).topk_ids.tolist() == [[2]]


def test_numba_device_arrays_run_the_kernels_and_come_back_as_such():
    ids = cuda.to_device(IDS)
    blocks = moe.moe_align_block_size(ids, 4, 4, expert_map=cuda.to_device(np.arange(4, dtype=np.int32)))
    for part, wanted in zip(blocks, reference.moe_align_block_size(IDS, 4, 4), strict=True):
        assert type(part) is type(ids)
        assert part.copy_to_host().tolist() == wanted.tolist()


class OtherArray:
    """An array of a library that speaks DLPack and the array API only."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return OtherLibrary


class OtherLibrary:
    """The array API namespace of that library."""

    @staticmethod
    def from_dlpack(array):
        return OtherArray(np.from_dlpack(array))


def test_any_dlpack_array_comes_back_in_its_own_kind():
    weights, ids = moe.topk_softmax(OtherArray(np.log(np.array([[0.1, 0.6, 0.3]], np.float32))), 2)
    assert isinstance(ids, OtherArray)
    assert ids.array.tolist() == [[1, 2]]
    assert weights.array.round(4).tolist() == [[np.float32(0.6), np.float32(0.3)]]


def test_wrapping_copies_nothing():
    seen = []

    @arrays.public
    def look(array):
        seen.append(array)
        return array

    given = np.arange(3)
    returned = look(given)
    assert seen[0].data_ptr() == given.ctypes.data == returned.ctypes.data


def test_simulation_is_asked_for_only_where_it_exists(monkeypatch):
    monkeypatch.setattr(simulator, "ENABLED", False)
    with pytest.raises(RuntimeError, match="NUMBA_ENABLE_CUDASIM=1"), simulator.running():
        pass


def test_the_default_stream_has_no_handle_for_torch_to_wrap(monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    device = torch.device("cuda", 1)
    assert arrays._working_on(0, device) == ("default", device)
    assert arrays._working_on(2, device) == (2, device)


def test_an_array_of_any_library_runs_on_its_device(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def on(device):
        entered.append(device)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", on)
    for kind in (arrays._DlpackKind(OtherLibrary), arrays._NumpyKind()):
        for on_gpu, seen in ((True, ["cuda:1", None]), (False, [])):
            entered.clear()
            with kind.calling(None, types.SimpleNamespace(is_cuda=on_gpu, device="cuda:1")):
                assert entered == seen[:1]
            assert entered == seen


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_arrays_on_another_device_than_the_current_one_stay_there():
    class OnDevice(OtherArray):
        def __array_namespace__(self):
            return types.SimpleNamespace(from_dlpack=lambda tensor: tensor)

    ids = torch.from_numpy(IDS).to("cuda:1")
    with torch.cuda.device(0):
        for given in (OnDevice(ids), ids, torch.nn.Parameter(ids, requires_grad=False)):
            blocks = moe.moe_align_block_size(given, 4, 4)
            for part, wanted in zip(blocks, reference.moe_align_block_size(IDS, 4, 4), strict=True):
                assert part.device == torch.device("cuda:1")
                assert part.tolist() == wanted.tolist()
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_cupy_arrays_run_on_their_stream_without_copies():
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        ids = cupy.asarray(IDS)
        blocks = moe.moe_align_block_size(ids, 4, 4)
        stream.synchronize()
    for part, wanted in zip(blocks, reference.moe_align_block_size(IDS, 4, 4), strict=True):
        assert isinstance(part, cupy.ndarray)
        assert cupy.asnumpy(part).tolist() == wanted.tolist()


@pytest.mark.gpu
def test_jax_arrays_come_back_as_such():
    jax = pytest.importorskip("jax")
    counts = moe.count_tokens_per_expert(jax.device_put(IDS, jax.devices("gpu")[0]), 4)
    assert isinstance(counts, jax.Array)
    assert counts.tolist() == [1, 1, 1, 2]


@pytest.mark.gpu
def test_results_lie_on_the_device_of_the_input():
    counts = moe.count_tokens_per_expert(torch.from_numpy(IDS).cuda(), 4)
    assert counts.device == torch.device("cuda", torch.cuda.current_device())


def test_what_has_a_gradient_is_answered_on_the_device_of_its_array(monkeypatch):
    inside, seen = [], []
    apply = op._Differentiable.apply

    @contextlib.contextmanager
    def on_device(_):
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(observe, "RANGES", True)  # which takes the way of a call on another device
    monkeypatch.setattr(arrays, "on_device", on_device)
    monkeypatch.setattr(op._Differentiable, "apply", lambda *values: seen.append(bool(inside)) or apply(*values))
    moe.topk_softmax(torch.randn(3, 4, requires_grad=True), 2).topk_weights.sum().backward()
    assert seen == [True]
