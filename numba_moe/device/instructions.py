"""Short functions that Numba has no name for: those of intrinsics.py, and in its simulator their twins."""

from typing import Any

from numba_moe.device import dialect, twins

__getattr__: Any = dialect.either(twins, "numba_moe.device.intrinsics")
