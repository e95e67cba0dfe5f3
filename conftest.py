"""Where there is no CUDA device, tests run the kernels in Numba's simulator and skip what is marked gpu."""

import importlib.util

import pytest

from numba_moe.cli import use_simulator_without_gpu

use_simulator_without_gpu()  # before anything imports numba

# Numba's compiler, which its simulator does without; it has no examples.
collect_ignore = ["numba_moe/runtime/device.py"]

# Examples that need what is no dependency.
NEEDS = {"numba_moe.recorder.http.make_app": "starlette"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.name in NEEDS and importlib.util.find_spec(NEEDS[item.name]) is None:
            item.add_marker(pytest.mark.skip(reason=f"needs {NEEDS[item.name]}"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
