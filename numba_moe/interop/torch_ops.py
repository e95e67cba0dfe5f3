"""Registers every op under `torch.ops.numba_moe`: for a program that loads an exported one, or asks for ops by name.

A public function registers its op by itself where torch compiles, exports or traces. See `runtime.torch_library`.
"""

import importlib

from numba_moe.runtime import torch_library

for _module in (
    *("activation.activate", "align", "batched", "counting", "experts", "gating.choose", "gating.selection", "lora"),
    *("permute.layouts", "permute.permutation", "placement.dispatch", "ragged", "recorder.counting", "routing"),
):
    importlib.import_module(f"numba_moe.{_module}")
torch_library.register()
