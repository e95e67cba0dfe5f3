"""All calls that break kernels."""

from collections.abc import Iterator

from numba_moe.verify.cases import gating_edges, grouping_edges, moving_edges
from numba_moe.verify.cases.draws import Case


def edge_cases() -> Iterator[Case]:
    """Yield the cases that break kernels."""
    yield from grouping_edges.edges()
    yield from moving_edges.edges()
    yield from gating_edges.edges()
