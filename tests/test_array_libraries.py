"""Every op takes and returns arrays of CuPy, JAX and Numba on the GPU: zero-copy, on their streams."""

import importlib

import numpy as np
import pytest

import numba_moe as moe
from numba_moe import reference
from numba_moe.verify import testing

RNG = np.random.default_rng(5)
IDS = testing.random_ids(RNG, 33, 16, 2, "zipf")
LOGITS = testing.separated_logits(RNG, 33, 16)
ROWS = testing.random_floats(RNG, (33, 24))
CALLS = {
    "moe_align_block_size": (IDS, 4, 16),
    "batched_moe_align_block_size": (5, 4, np.arange(6, dtype=np.int32)),
    "moe_lora_align_block_size": (IDS, np.arange(33, dtype=np.int32) % 3 - 1, 4, 16, 2),
    "make_ragged_metadata": (np.arange(9, dtype=np.int32), 60),
    "count_tokens_per_expert": (IDS, 16),
    "expert_offsets": (np.arange(9, dtype=np.int32), 4),
    "topk_softmax": (LOGITS, 2, True),
    "topk_sigmoid": (LOGITS, 2),
    "topk_softplus_sqrt": (LOGITS, 2),
    "topk_raw": (LOGITS, 2),
    "grouped_topk": (LOGITS, 2, 4, 2),
    "select_experts": (LOGITS, 3),
    "weigh_experts": (LOGITS, IDS),
    "moe_permute": (ROWS, IDS, 16),
    "moe_permute_masked": (ROWS, IDS, 16, 7),
    "moe_reorder": (IDS, 16),
    "moe_sum": (ROWS.reshape(11, 3, 24),),
    "moe_unpermute": (ROWS, RNG.random((11, 3), np.float32), RNG.permutation(33).astype(np.int32).reshape(11, 3)),
    "moe_activation": (ROWS,),
    "fused_experts": (
        ROWS,
        testing.random_floats(RNG, (16, 16, 24)) / 5,
        testing.random_floats(RNG, (16, 24, 8)) / 3,
        RNG.random((33, 2), np.float32),
        IDS,
    ),
    "constant_experts": (ROWS, RNG.random((33, 2), np.float32), IDS, 8),
    "route": (LOGITS, 2, 4),
}


def arrays_of(result):
    """Return the arrays of a result, those of its parts, and none for those it lacks."""
    parts = result if isinstance(result, tuple) else ()
    return [array for part in parts for array in arrays_of(part)] if parts else [result]


def assert_as_reference(name, result, to_numpy):
    expected = getattr(reference, name)(*CALLS[name])
    for part, wanted in zip(arrays_of(result), arrays_of(expected), strict=True):
        assert (part is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_allclose(to_numpy(part), wanted, rtol=1e-5, atol=1e-5)


def test_every_op_is_called():
    known = {name for name in moe.__all__ if name[0].islower() and hasattr(reference, name)}
    assert set(CALLS) == known


@pytest.mark.parametrize("name", CALLS)
def test_numpy(name):
    result = getattr(moe, name)(*CALLS[name])
    assert_as_reference(name, result, lambda part: part)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_cupy(name):
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        given = [cupy.asarray(value) if isinstance(value, np.ndarray) else value for value in CALLS[name]]
        result = getattr(moe, name)(*given)
        stream.synchronize()
    assert all(part is None or isinstance(part, cupy.ndarray) for part in arrays_of(result))
    assert_as_reference(name, result, cupy.asnumpy)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_jax(name):
    jax = pytest.importorskip("jax")
    gpu = jax.devices("gpu")[0]
    given = [jax.device_put(value, gpu) if isinstance(value, np.ndarray) else value for value in CALLS[name]]
    result = getattr(moe, name)(*given)
    assert all(part is None or isinstance(part, jax.Array) for part in arrays_of(result))
    assert_as_reference(name, result, np.asarray)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_numba(name):
    cuda = importlib.import_module("numba.cuda")
    stream = cuda.stream()
    given = [cuda.to_device(value, stream) if isinstance(value, np.ndarray) else value for value in CALLS[name]]
    result = getattr(moe, name)(*given)
    stream.synchronize()
    assert_as_reference(name, result, lambda part: part.copy_to_host())


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "numba"])
def test_the_default_stream_is_the_callers_own(library):
    cupy, cuda = pytest.importorskip("cupy"), importlib.import_module("numba.cuda")
    slow = cupy.ones((4096, 4096), np.float32)
    turns = [IDS, (IDS + 5) % 16]
    array = cupy.asarray if library == "cupy" else cuda.to_device
    given = [array(ids) for ids in turns]
    poison, counts = array(np.full(16, 77, np.int32)), array(np.zeros(16, np.int32))
    for turn in range(20):
        cupy.matmul(slow, slow)
        if library == "cupy":  # a call that did not wait for it would be undone by it
            counts[:] = poison
        else:
            counts.copy_to_device(poison)
        moe.moe_align_block_size(given[turn % 2], 4, 16, counts=counts)
        found = cupy.asnumpy(counts) if library == "cupy" else counts.copy_to_host()
        assert found.tolist() == reference.count_tokens_per_expert(turns[turn % 2], 16).tolist()


@pytest.mark.gpu
def test_what_is_given_to_be_written_is_written_in_place():
    cupy = pytest.importorskip("cupy")
    ids, counts = cupy.asarray(IDS), cupy.zeros(16, cupy.int32)
    moe.moe_align_block_size(ids, 4, 16, counts=counts)
    assert cupy.asnumpy(counts).tolist() == reference.count_tokens_per_expert(IDS, 16).tolist()
