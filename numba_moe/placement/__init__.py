"""Where experts live: the slots and ranks that hold each expert, and those that should."""

from numba_moe import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "ops.dispatch": "dispatch_ids",
        "placement.expert_dispatch": "ExpertDispatch",
        "placement.location": "ExpertLocation",
        "placement.maps": "make_expert_map",
        "placement.migration": "CorruptedWeightsError migrate migrate_in_chunks plan_migration",
        "placement.rebalance": "balancedness rank_loads rebalance_experts",
        "placement.simulation": "simulate",
        "reference.dispatch": "DispatchTables",
        "reference.rebalance": "RebalancedExperts",
    },
)
