"""What is private in torch is used in one file, and nothing fails where it is gone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from numba_moe.device import simulator
from numba_moe.runtime import torch_private

ROOT = Path(__file__).parents[1]
NAMES = (
    *("current_device", "current_stream", "is_capturing", "empty_strided", "in_transform", "is_wrapped_by_transform"),
    *("is_jit_tracing", "num_modes", "is_functional", "is_transformed", "FakeTensor", "group_store", "_graph_task"),
    *("reshaped", "_will_execute", "set_eval_frame", "without_transforms"),
)
# Kernels, gradients, compiled code, the bridge and the recorder.
CORE = (
    "test_align.py",
    "test_arrays.py",
    "test_launch.py",
    "test_recorder.py::test_stat",
    "test_recorder_gpu.py",
    "test_streams.py",
    "test_torch_ops.py::test_a_block_compiles_whole_and_once_for_any_number_of_tokens",
    "test_torch_ops.py::test_a_gradient_that_is_wanted_later_is_there",
)


def private_names(source):
    """Return names of torch, in dotted form, that begin with an underscore and do not end with one.

    An op library of a peer is none, and neither are names in quotes, as files have them.
    """
    found = re.findall(r"(?<![\"'])\btorch(?:\.\w+)*?\._(?!_)\w+", source)
    return [name for name in found if name != "torch.ops._moe_C"]


def test_private_names_are_in_one_file():
    assert private_names("torch._C.f(torch.a._b, torch.ops._moe_C.c)") == ["torch._C", "torch.a._b"]
    found = {
        path.name: names for path in (ROOT / "numba_moe").rglob("*.py") if (names := private_names(path.read_text()))
    }
    assert found == {}
    source = (ROOT / "numba_moe" / "runtime" / "torch_private.py").read_text()
    assert {name for name in NAMES if f"\n{name} = _private(" in source} == set(NAMES)
    assert source.count(" = _private(") == len(NAMES)


def test_a_public_name_serves_where_a_private_one_is_absent():
    assert torch_private._private("_C._no_such_name", int) is int
    assert torch_private._private("_no_such_module.name", int) is int
    assert torch_private._private("_C._are_functorch_transforms_active", int)() is False
    if simulator.ENABLED:
        made = torch_private._empty_strided((2, 3), (4, 1), torch.float16)
        wanted = torch_private.empty_strided((2, 3), (4, 1), torch.float16)
        for array in (made, wanted):
            assert (array.shape, array.stride(), array.dtype) == ((2, 3), (4, 1), torch.float16)
            assert array.device.type == "cpu"


@pytest.mark.gpu
def test_public_names_say_the_same_on_a_gpu():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch_private._current_stream(0) == torch_private.current_stream(0) == stream.cuda_stream
    assert torch_private.current_device() == torch.cuda.current_device()
    assert torch_private.is_capturing() == torch.cuda.is_current_stream_capturing()
    made, wanted = (
        allocate((2, 3), (4, 1), torch.float16)
        for allocate in (torch_private._empty_strided, torch_private.empty_strided)
    )
    assert (made.stride(), made.dtype, made.device) == (wanted.stride(), wanted.dtype, wanted.device)


@pytest.mark.skipif(not torch_private.ALLOWED, reason="this is the run without them")
@pytest.mark.slow
def test_the_core_runs_without_private_names():
    program = (
        "import sys, pytest, torch; from numba_moe.runtime import torch_private as p; assert not p.ALLOWED;"
        "assert p.current_device is torch.cuda.current_device; assert p.empty_strided is p._empty_strided;"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--all', '-k', 'not inductor', *sys.argv[1:]]))"
    )
    tests = [f"tests/{name}" for name in CORE]
    environment = {**os.environ, "NUMBA_MOE_TORCH_PRIVATE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, *tests], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
