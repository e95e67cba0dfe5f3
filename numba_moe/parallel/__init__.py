"""Experts on several ranks: tokens go to them and come back."""

from numba_moe import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "ops.destinations": "dispatch_layout",
        "parallel.dispatcher": "PendingDispatch TokenDispatcher",
        "parallel.group_experts": "fused_experts gather_experts shard_experts",
        "parallel.memory": "emulate",
        "parallel.peers": "PeerTimeoutError",
        "parallel.state_dicts": "expert_parameters expert_weights gather_state_dict load_gathered_state_dict "
        "sum_gradients",
        "reference.parallel": "DispatchLayout DispatchedTokens",
    },
)
