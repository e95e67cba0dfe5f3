"""Which experts are chosen while a model runs, and what that says about where they should live.

Public names load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULE_OF = {
    "Dump": "files",
    "ExpertDistributionRecorder": "control",
    "Metrics": "metrics",
    "add_expert_counts": "counting",
    "coactivation": "metrics",
    "expert_entropy": "metrics",
    "load": "files",
    "logical_counts": "metrics",
    "traffic_matrix": "metrics",
    "utilization": "metrics",
}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from numba_moe.recorder.control import ExpertDistributionRecorder as ExpertDistributionRecorder
    from numba_moe.recorder.counting import add_expert_counts as add_expert_counts
    from numba_moe.recorder.files import Dump as Dump
    from numba_moe.recorder.files import load as load
    from numba_moe.recorder.metrics import Metrics as Metrics
    from numba_moe.recorder.metrics import coactivation as coactivation
    from numba_moe.recorder.metrics import expert_entropy as expert_entropy
    from numba_moe.recorder.metrics import logical_counts as logical_counts
    from numba_moe.recorder.metrics import traffic_matrix as traffic_matrix
    from numba_moe.recorder.metrics import utilization as utilization


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
