"""Tensor cores, and what is done ahead of time: tensor_core_intrinsics.py, and in the simulator its twins."""

from typing import Any

from numba_moe.device import dialect, tensor_core_twins

__getattr__: Any = dialect.either(tensor_core_twins, "numba_moe.device.tensor_core_intrinsics")
