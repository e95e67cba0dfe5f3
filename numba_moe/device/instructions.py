"""Short functions that Numba has no name for: those of intrinsics.py, and in its simulator their twins."""

from typing import Any

from numba_moe.device import simulator, twins
from numba_moe.device.dialect import Deferred


def __getattr__(name: str) -> Any:
    twin = getattr(twins, name)
    return twin if simulator.ENABLED else Deferred("numba_moe.device.intrinsics", name)
