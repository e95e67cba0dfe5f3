"""Fixtures: a device on which public functions run the kernels."""

from collections.abc import Iterator

import pytest
import torch

from numba_moe.runtime import simulator


@pytest.fixture
def device() -> Iterator[str]:
    """Name the device whose tensors are answered by kernels: "cuda", or "cpu" in the simulator."""
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with simulator.running():
            yield "cpu"
