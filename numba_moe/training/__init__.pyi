from numba_moe.ops.router_losses import count_by_sequence as count_by_sequence
from numba_moe.ops.router_losses import router_losses as router_losses
from numba_moe.reference.capacity import ExpertChoice as ExpertChoice
from numba_moe.reference.training import SequenceCounts as SequenceCounts
from numba_moe.training.balance import update_correction_bias as update_correction_bias
from numba_moe.training.capacity import apply_capacity as apply_capacity
from numba_moe.training.capacity import expert_capacity as expert_capacity
from numba_moe.training.capacity import expert_choice as expert_choice
from numba_moe.training.into_grad import fused_experts_into_grad as fused_experts_into_grad
from numba_moe.training.losses import load_balancing_loss as load_balancing_loss
from numba_moe.training.losses import z_loss as z_loss
from numba_moe.training.replay import RoutingReplay as RoutingReplay
from numba_moe.training.rounding import token_rounding as token_rounding
from numba_moe.training.tape import same_routing as same_routing

__all__: list[str]
