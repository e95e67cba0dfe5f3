"""Registers every op under `torch.ops.numba_moe`: for a program that loads an exported one, or asks for ops by name.

A public function registers its op by itself where torch compiles, exports or traces. See `runtime.torch_library`.
"""

import collections

from numba_moe import lazy
from numba_moe.runtime import torch_library

collections.deque(lazy.modules_of("numba_moe.ops"), maxlen=0)  # each op declares itself when its module is imported
torch_library.register()
