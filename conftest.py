"""Where there is no CUDA device, tests run the kernels in Numba's simulator and skip what is marked gpu."""

import pytest

from numba_moe.cli import use_simulator_without_gpu

use_simulator_without_gpu()  # before anything imports numba


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
