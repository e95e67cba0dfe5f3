"""What steers the routers of a thread: a tape of what they chose, for a pass that is computed anew."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from numba_moe.reference.gating import TopK

_steered = threading.local()


def is_steered() -> bool:
    """Whether this thread's routers write their choices on a tape, or read them from one."""
    return getattr(_steered, "choose", None) is not None


def choose(select: Callable[[], TopK], weigh: Callable[[torch.Tensor], TopK]) -> TopK:
    """Return what the tape has for a router: `weigh` of ids that it has, or that `select` finds and it keeps."""
    return _steered.choose(select, weigh)


@contextlib.contextmanager
def _steering(chooser: Callable[..., TopK]) -> Iterator[None]:
    before = getattr(_steered, "choose", None)
    _steered.choose = chooser
    try:
        yield
    finally:
        _steered.choose = before


def same_routing() -> tuple[Any, Any]:
    """Make activation checkpointing recompute with the very experts of the forward pass, and count them once.

    Returns
    -------
    tuple of two contexts
        What `torch.utils.checkpoint.checkpoint` takes from its `context_fn`: of the forward pass and of the
        recomputation.

    Raises
    ------
    RuntimeError
        The recomputation asks more routers than the forward pass did.

    Notes
    -----
    In both passes a router weighs experts by the one kernel of `weigh_experts`, so what is saved and what is computed
    anew has the same bits.

    Examples
    --------
    >>> import torch, numba_moe
    >>> from torch.utils.checkpoint import checkpoint
    >>> block = numba_moe.MoEBlock(8, 4, num_experts=4, top_k=2)
    >>> rows = torch.randn(3, 8, requires_grad=True)
    >>> checkpoint(block, rows, use_reentrant=False, context_fn=same_routing).sum().backward()
    """
    kept: list[torch.Tensor] = []

    def keep(select: Callable[[], TopK], weigh: Callable[[torch.Tensor], TopK]) -> TopK:
        with torch.no_grad():
            kept.append(select().topk_ids)
        return weigh(kept[-1])

    @contextlib.contextmanager
    def recomputing() -> Iterator[None]:
        left = iter(kept)  # from the start, also where an earlier recomputation stopped before its end

        def again(_select: Callable[[], TopK], weigh: Callable[[torch.Tensor], TopK]) -> TopK:
            ids = next(left, None)
            if ids is None:
                raise RuntimeError(
                    f"a recomputation must ask the {len(kept)} routers that the forward pass did, got more"
                )
            return weigh(ids)

        with _steering(again):
            yield

    return _steering(keep), recomputing()
