"""Tensor cores, and what is done ahead of time: tensor_core_intrinsics.py, and in the simulator its twins."""

from typing import Any

from numba_moe.device import simulator, tensor_core_twins
from numba_moe.device.dialect import Deferred


def __getattr__(name: str) -> Any:
    twin = getattr(tensor_core_twins, name)
    return twin if simulator.ENABLED else Deferred("numba_moe.device.tensor_core_intrinsics", name)
