"""Mixture-of-Experts routing in Python: Numba CUDA kernels, each beside a NumPy reference that defines it.

Public names load on first use: importing the package imports neither torch nor CUDA.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULE_OF = {
    "AlignedBlocks": "reference.align",
    "BumpAllocator": "runtime.workspace",
    "MoEBlock": "block",
    "MaskedTokens": "reference.permute",
    "PermutedTokens": "reference.permute",
    "RaggedMetadata": "reference.ragged",
    "ReorderedSlots": "reference.permute",
    "RoutedTokens": "reference.routing",
    "TopK": "reference.gating",
    "align_sizes": "align",
    "batched_moe_align_block_size": "batched",
    "count_tokens_per_expert": "counting",
    "expert_offsets": "counting",
    "fused_experts": "experts",
    "grouped_topk": "gating.choose",
    "make_ragged_metadata": "ragged",
    "moe_activation": "activation.activate",
    "moe_align_block_size": "align",
    "moe_lora_align_block_size": "lora",
    "moe_permute": "permute.permutation",
    "moe_permute_masked": "permute.layouts",
    "moe_reorder": "permute.layouts",
    "moe_sum": "permute.permutation",
    "moe_unpermute": "permute.permutation",
    "route": "routing",
    "select_experts": "gating.selection",
    "set_log_level": "runtime.observe",
    "topk_raw": "gating.choose",
    "topk_sigmoid": "gating.choose",
    "topk_softmax": "gating.choose",
    "topk_softplus_sqrt": "gating.choose",
    "weigh_experts": "gating.selection",
}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:  # for type checkers and editors, which do not follow __getattr__
    from numba_moe import reference as reference  # which mypy otherwise loses where modules import each other
    from numba_moe.activation.activate import moe_activation as moe_activation
    from numba_moe.align import align_sizes as align_sizes
    from numba_moe.align import moe_align_block_size as moe_align_block_size
    from numba_moe.batched import batched_moe_align_block_size as batched_moe_align_block_size
    from numba_moe.block import MoEBlock as MoEBlock
    from numba_moe.counting import count_tokens_per_expert as count_tokens_per_expert
    from numba_moe.counting import expert_offsets as expert_offsets
    from numba_moe.experts import fused_experts as fused_experts
    from numba_moe.gating.choose import grouped_topk as grouped_topk
    from numba_moe.gating.choose import topk_raw as topk_raw
    from numba_moe.gating.choose import topk_sigmoid as topk_sigmoid
    from numba_moe.gating.choose import topk_softmax as topk_softmax
    from numba_moe.gating.choose import topk_softplus_sqrt as topk_softplus_sqrt
    from numba_moe.gating.selection import select_experts as select_experts
    from numba_moe.gating.selection import weigh_experts as weigh_experts
    from numba_moe.lora import moe_lora_align_block_size as moe_lora_align_block_size
    from numba_moe.permute.layouts import moe_permute_masked as moe_permute_masked
    from numba_moe.permute.layouts import moe_reorder as moe_reorder
    from numba_moe.permute.permutation import moe_permute as moe_permute
    from numba_moe.permute.permutation import moe_sum as moe_sum
    from numba_moe.permute.permutation import moe_unpermute as moe_unpermute
    from numba_moe.ragged import make_ragged_metadata as make_ragged_metadata
    from numba_moe.reference.align import AlignedBlocks as AlignedBlocks
    from numba_moe.reference.gating import TopK as TopK
    from numba_moe.reference.permute import MaskedTokens as MaskedTokens
    from numba_moe.reference.permute import PermutedTokens as PermutedTokens
    from numba_moe.reference.permute import ReorderedSlots as ReorderedSlots
    from numba_moe.reference.ragged import RaggedMetadata as RaggedMetadata
    from numba_moe.reference.routing import RoutedTokens as RoutedTokens
    from numba_moe.routing import route as route
    from numba_moe.runtime.observe import set_log_level as set_log_level
    from numba_moe.runtime.workspace import BumpAllocator as BumpAllocator


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
