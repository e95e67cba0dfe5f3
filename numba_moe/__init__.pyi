from numba_moe import reference as reference
from numba_moe.block import MoEBlock as MoEBlock
from numba_moe.ops.activation.activate import moe_activation as moe_activation
from numba_moe.ops.align import align_sizes as align_sizes
from numba_moe.ops.align import moe_align_block_size as moe_align_block_size
from numba_moe.ops.align_adapters import moe_lora_align_block_size as moe_lora_align_block_size
from numba_moe.ops.align_batches import batched_moe_align_block_size as batched_moe_align_block_size
from numba_moe.ops.count import count_tokens_per_expert as count_tokens_per_expert
from numba_moe.ops.count import expert_offsets as expert_offsets
from numba_moe.ops.experts import fused_experts as fused_experts
from numba_moe.ops.gating.choose import grouped_topk as grouped_topk
from numba_moe.ops.gating.choose import topk_raw as topk_raw
from numba_moe.ops.gating.choose import topk_sigmoid as topk_sigmoid
from numba_moe.ops.gating.choose import topk_softmax as topk_softmax
from numba_moe.ops.gating.choose import topk_softplus_sqrt as topk_softplus_sqrt
from numba_moe.ops.gating.select import select_experts as select_experts
from numba_moe.ops.gating.select import weigh_experts as weigh_experts
from numba_moe.ops.permute.layouts import moe_permute_masked as moe_permute_masked
from numba_moe.ops.permute.layouts import moe_reorder as moe_reorder
from numba_moe.ops.permute.permutation import moe_permute as moe_permute
from numba_moe.ops.permute.permutation import moe_sum as moe_sum
from numba_moe.ops.permute.permutation import moe_unpermute as moe_unpermute
from numba_moe.ops.ragged import make_ragged_metadata as make_ragged_metadata
from numba_moe.ops.route import route as route
from numba_moe.ops.without_matrices import constant_experts as constant_experts
from numba_moe.reference.align import AlignedBlocks as AlignedBlocks
from numba_moe.reference.gating import TopK as TopK
from numba_moe.reference.permute import MaskedTokens as MaskedTokens
from numba_moe.reference.permute import PermutedTokens as PermutedTokens
from numba_moe.reference.permute import ReorderedSlots as ReorderedSlots
from numba_moe.reference.ragged import RaggedMetadata as RaggedMetadata
from numba_moe.reference.routing import RoutedTokens as RoutedTokens
from numba_moe.runtime.observe import set_log_level as set_log_level
from numba_moe.runtime.workspace import BumpAllocator as BumpAllocator

__all__: list[str]
__version__: str
