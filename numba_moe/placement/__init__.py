"""Where experts live: which slot of which rank holds which expert, and which should.

Public names load on first use; Numba is imported when something is rebalanced.
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULE_OF = {
    "CorruptedWeightsError": "numba_moe.placement.migration",
    "DispatchTables": "numba_moe.reference.dispatch",
    "ExpertDispatch": "numba_moe.placement.dispatch",
    "ExpertLocation": "numba_moe.placement.location",
    "RebalancedExperts": "numba_moe.reference.rebalance",
    "balancedness": "numba_moe.placement.rebalance",
    "dispatch_ids": "numba_moe.placement.dispatch",
    "make_expert_map": "numba_moe.placement.maps",
    "migrate": "numba_moe.placement.migration",
    "migrate_in_chunks": "numba_moe.placement.migration",
    "plan_migration": "numba_moe.placement.migration",
    "rank_loads": "numba_moe.placement.rebalance",
    "rebalance_experts": "numba_moe.placement.rebalance",
    "simulate": "numba_moe.placement.simulation",
}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from numba_moe.placement.dispatch import ExpertDispatch as ExpertDispatch
    from numba_moe.placement.dispatch import dispatch_ids as dispatch_ids
    from numba_moe.placement.location import ExpertLocation as ExpertLocation
    from numba_moe.placement.maps import make_expert_map as make_expert_map
    from numba_moe.placement.migration import CorruptedWeightsError as CorruptedWeightsError
    from numba_moe.placement.migration import migrate as migrate
    from numba_moe.placement.migration import migrate_in_chunks as migrate_in_chunks
    from numba_moe.placement.migration import plan_migration as plan_migration
    from numba_moe.placement.rebalance import balancedness as balancedness
    from numba_moe.placement.rebalance import rank_loads as rank_loads
    from numba_moe.placement.rebalance import rebalance_experts as rebalance_experts
    from numba_moe.placement.simulation import simulate as simulate
    from numba_moe.reference.dispatch import DispatchTables as DispatchTables
    from numba_moe.reference.rebalance import RebalancedExperts as RebalancedExperts


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
