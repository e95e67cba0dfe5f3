"""What every op stands on: array bridge, argument checks, compiler, launcher, device functions, simulator."""

import contextlib
import importlib

from numba_moe.runtime import cache as cache  # before any kernel: it notes which sources are imported

# By this `numba.cuda` is numba-cuda. A .pth file does it, but not in a folder made by `pip install --target`.
with contextlib.suppress(ModuleNotFoundError):
    importlib.import_module("_numba_cuda_redirector")
