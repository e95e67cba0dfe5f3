"""Every op takes memory for its result: the same bits, nothing of it allocated, and what does not fit is refused."""

import numpy as np
import pytest
import torch

from numba_moe.device import simulator
from numba_moe.runtime import arrays
from numba_moe.verify import cases, testing
from numba_moe.verify.verification import OPS

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"


def call_of(name, device):
    """Return an op, and arguments without `out`: those of its first case that takes results, and has tokens."""
    for case in cases.edge_cases():
        drawn = case.arguments(np.random.default_rng(0))
        sizes = [value.size for value in drawn.values() if isinstance(value, np.ndarray)]
        if case.op == name and "out" not in drawn and sizes and 0 < min(sizes) and max(sizes) < 4000:
            return getattr(OPS[name], name), {key: testing.to_device(value, device) for key, value in drawn.items()}
    raise AssertionError(f"{name} has no such case")


def leaves(result):
    return [leaf for part in result for leaf in leaves(part)] if isinstance(result, tuple) else [result]


def rebuilt(result, make):
    if isinstance(result, tuple):
        return type(result)(*(rebuilt(part, make) for part in result))
    return None if result is None else make(result)


def bits(result):
    return [None if part is None else testing.to_numpy(part).tobytes() for part in leaves(result)]


WITH_OUT = [name for name in OPS if getattr(OPS[name], name).declaration.has_out and name != "add_expert_counts"]


def test_every_op_is_here():
    assert set(OPS) - set(WITH_OUT) == {"add_expert_counts"}  # whose result is what it is given to add to


@pytest.mark.sweep(20)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", WITH_OUT)
def test_results_go_into_memory_that_is_given(name, kernels, offset, monkeypatch):
    if not kernels and ON_GPU:
        pytest.skip("the reference answers on the CPU alone")
    op, arguments = call_of(name, DEVICE)
    with simulator.running() if kernels and not ON_GPU else testing.poisoned_memory():
        expected = op(**arguments)

        def memory(part):
            """Poisoned memory like a part of the result, `offset` elements behind a multiple of 16 bytes."""
            room = torch.full((part.numel() * part.itemsize + 64,), 0xAB, dtype=torch.uint8, device=part.device)
            first = offset * part.itemsize
            return room[first : first + part.numel() * part.itemsize].view(part.dtype).view(part.shape)

        out = rebuilt(expected, memory)
        _, again = call_of(name, DEVICE)
        if offset == 0 and kernels:
            allocated, empty = [], arrays.empty
            monkeypatch.setattr(arrays, "empty", lambda *spec: allocated.append(spec) or empty(*spec))
            shapes = [(tuple(part.shape), part.dtype) for part in leaves(expected) if part is not None]
        result = op(**again, out=out)
        if offset == 0 and kernels:
            assert not [spec for spec in allocated if (tuple(spec[0]), spec[2]) in shapes and name != "moe_reorder"]
    assert type(result) is type(expected)
    for part, given in zip(leaves(result), leaves(out), strict=True):
        assert part is given
    assert bits(result) == bits(expected)


@pytest.mark.parametrize("name", [name for name in WITH_OUT if name != "moe_align_block_size"])  # which takes more
def test_memory_that_does_not_fit_is_refused(name):
    op, arguments = call_of(name, "cpu")
    expected = op(**arguments)
    longer = rebuilt(expected, lambda part: part.new_empty((part.shape[0] + 1, *part.shape[1:])))
    other = rebuilt(expected, lambda part: part.new_empty(part.shape, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"`out[.\w]*` must be of shape"):
        op(**arguments, out=longer)
    with pytest.raises(TypeError, match=r"`out[.\w]*` must be of dtype"):
        op(**arguments, out=other)


def test_a_gradient_and_memory_exclude_each_other():
    logits = torch.randn(3, 4, requires_grad=True)
    topk_softmax = OPS["topk_softmax"].topk_softmax
    out = topk_softmax(logits.detach(), 2)
    with pytest.raises(ValueError, match="`gating_output` must be without a gradient"):
        topk_softmax(logits, 2, out=out)
