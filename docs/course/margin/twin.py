"""The twin: what the op promises, in NumPy. It came first, as one line: ordered[:, k - 1] - ordered[:, k]."""

from typing import Any, NamedTuple

import numpy as np

from numba_moe import reference


class TopKWithMargin(NamedTuple):
    topk_weights: Any
    topk_ids: Any
    margin: Any


def topk_softmax_with_margin(gating_output: np.ndarray, top_k: int, renormalize: bool = False) -> TopKWithMargin:
    """Choose experts, and say how far the last chosen logit is above the best of the others; inf if there is none.

    A row with NaN or +inf, or of -inf alone, has margin 0: nothing decided there.

    >>> topk_softmax_with_margin(np.array([[1.0, 4.0, 2.5]], np.float32), 2).margin
    array([1.5], dtype=float32)
    """
    weights, ids = reference.topk_softmax(gating_output, top_k, renormalize)
    _, ranks = reference.gating.score_and_rank(gating_output, "softmax")
    padded = np.concatenate([ranks, np.full((len(ranks), 1), -np.inf)], axis=1)
    ordered = np.sort(padded, axis=1)[:, ::-1]
    last, after = ordered[:, top_k - 1], ordered[:, top_k]
    margin = np.subtract(last, after, out=np.zeros(len(last)), where=last != after)
    return TopKWithMargin(weights, ids, margin.astype(np.float32))
