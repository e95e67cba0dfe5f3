"""Where experts live: the slots and ranks that hold each expert, and those that should."""

from numba_moe import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "ops.dispatch": "dispatch_ids",
        "placement.balancer": "Balancer BalancerLook layers_worth_moving",
        "placement.expert_dispatch": "ExpertDispatch",
        "placement.location": "ExpertLocation",
        "placement.maps": "make_expert_map",
        "placement.migration": "CorruptedWeightsError migrate migrate_in_chunks pair_ranks plan_migration "
        "preserve_intragpu_slots",
        "placement.rebalance": "balancedness rank_loads rebalance_experts",
        "placement.simulation": "simulate",
        "reference.dispatch": "DispatchTables",
        "reference.rebalance": "RebalancedExperts",
    },
)
