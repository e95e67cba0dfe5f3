"""The named cases: calls shaped like published models, calls that break kernels, a user's own routing.

Verification, tests and benchmarks all draw from here.
"""

from numba_moe.verify.cases.draws import Case
from numba_moe.verify.cases.edges import edge_cases
from numba_moe.verify.cases.inputs import input_cases
from numba_moe.verify.cases.models import model_cases, trained_cases, trained_routing
from numba_moe.verify.cases.simulated import few

__all__ = [
    "Case",
    "edge_cases",
    "few",
    "input_cases",
    "model_cases",
    "trained_cases",
    "trained_routing",
]
