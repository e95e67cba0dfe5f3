"""Calls have names in profiles where that is asked for, and kernels in the log."""

import contextlib
import logging
from pathlib import Path

import pytest
import torch

import numba_moe as moe
from numba_moe.runtime import arrays, observe

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_nothing_is_wrapped_unless_asked_for():
    assert isinstance(observe.range_of("op"), contextlib.nullcontext)


def test_calls_are_ranges_in_the_profile(monkeypatch):
    monkeypatch.setattr(observe, "RANGES", True)

    @arrays.public
    def double(array):
        return array * 2

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
        assert double(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert "numba_moe::double" in {event.key for event in profiled.key_averages()}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_the_profile_example_shows_the_ops_by_name(without_simulator, compiled):
    program = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    sizes = ("--tokens", "5", "--experts", "8", "--hidden", "16", "--top-k", "2", "--calls", "2")
    table = without_simulator(program, str(SCRIPTS / "profile_ops.py"), *sizes, *["--compile"] * compiled)
    for name in ("topk_softmax", "moe_align_block_size", "moe_permute", "moe_unpermute"):
        assert f"numba_moe::{name} " in table


@pytest.fixture
def logger():
    found = logging.getLogger("numba_moe")
    before = found.level, found.handlers[:]
    yield found
    found.setLevel(before[0])
    found.handlers[:] = before[1]


def test_log_level(logger, monkeypatch):
    monkeypatch.setattr(logger, "propagate", False)  # pytest has handlers of its own at the root
    logger.handlers.clear()
    moe.set_log_level("DEBUG")
    moe.set_log_level(logging.INFO)
    assert logger.level == logging.INFO
    assert len(logger.handlers) == 1
    with pytest.raises(ValueError, match="LOUD"):
        moe.set_log_level("LOUD")


@pytest.mark.slow
def test_compiled_kernels_are_logged(without_simulator, tmp_path):
    program = (
        "import os, sys; os.environ['NUMBA_MOE_CACHE_DIR'] = sys.argv[1]\n"
        "import logging; logging.basicConfig(stream=sys.stdout); import numba_moe; numba_moe.set_log_level('DEBUG')\n"
        "from numba_moe.ops import count; from numba_moe.runtime import compile\n"
        "for _ in range(2): compile.compiled(count.scan_experts, ('int32', 'int64'), (9, 0))\n"
    )
    compiled, read = without_simulator(program, str(tmp_path)).splitlines()
    assert compiled.startswith("DEBUG:numba_moe.runtime.compile:Compiled scan_experts('int32', 'int64') for sm_90 in ")
    assert read == "DEBUG:numba_moe.runtime.compile:Read scan_experts('int32', 'int64') for sm_90"


@pytest.mark.parametrize("kind", ["tensor", "parameter", "array"])
def test_ranges_follow_the_environment(kind, monkeypatch):
    given = torch.tensor([[0, 1]])
    given = {"tensor": given, "parameter": torch.nn.Parameter(given, requires_grad=False), "array": given.numpy()}[kind]
    for asked in ("1", "0", "1"):
        monkeypatch.setenv("NUMBA_MOE_NVTX", asked)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
            moe.count_tokens_per_expert(given, 2)
        named = {event.key for event in profiled.key_averages()}
        assert ("numba_moe::count_tokens_per_expert" in named) == (asked == "1" or kind == "parameter")
