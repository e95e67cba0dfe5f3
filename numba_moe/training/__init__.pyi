from numba_moe.ops.router_losses import count_by_sequence as count_by_sequence
from numba_moe.ops.router_losses import router_losses as router_losses
from numba_moe.reference.training import SequenceCounts as SequenceCounts
from numba_moe.training.balance import update_correction_bias as update_correction_bias
from numba_moe.training.losses import load_balancing_loss as load_balancing_loss
from numba_moe.training.losses import z_loss as z_loss
