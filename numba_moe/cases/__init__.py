"""The named cases: calls shaped like published models, calls that break kernels, a user's own routing.

Verification, tests and benchmarks all draw from here.
"""

from collections.abc import Iterator

from numba_moe.cases import gating, grouping, moving
from numba_moe.cases.draws import Case
from numba_moe.cases.inputs import input_cases, load_routing
from numba_moe.cases.models import model_cases, trained_cases, trained_routing
from numba_moe.cases.simulated import few

__all__ = [
    "Case",
    "edge_cases",
    "few",
    "input_cases",
    "load_routing",
    "model_cases",
    "trained_cases",
    "trained_routing",
]


def edge_cases() -> Iterator[Case]:
    """Yield the cases that break kernels."""
    yield from grouping.edges()
    yield from moving.edges()
    yield from gating.edges()
