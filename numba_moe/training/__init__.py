"""What training adds to routing: losses, balance without a loss, capacity, and recorded routing that is replayed."""

from numba_moe import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "ops.router_losses": "count_by_sequence router_losses",
        "reference.capacity": "ExpertChoice",
        "reference.training": "SequenceCounts",
        "training.balance": "update_correction_bias",
        "training.capacity": "apply_capacity expert_capacity expert_choice",
        "training.into_grad": "fused_experts_into_grad",
        "training.losses": "load_balancing_loss z_loss",
        "training.replay": "RoutingReplay",
        "training.rounding": "token_rounding",
        "training.tape": "same_routing",
    },
)
