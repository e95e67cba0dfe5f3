"""The experts of a rank where each expert is on one rank: what alignment and permutation take as `expert_map`."""

import numpy as np

from numba_moe.reference import maps as reference
from numba_moe.runtime import checks

STRATEGIES = ("linear", "round_robin")


def make_expert_map(num_experts: int, num_ranks: int, rank: int, strategy: str = "linear") -> np.ndarray:
    """Return the id of each expert on a rank, -1 for an expert of another rank.

    Parameters
    ----------
    num_experts : int
        Number of experts of the model. If it is no multiple of the ranks, the first ranks have one expert more.
    num_ranks : int
        Number of ranks that share the experts.
    rank : int
        The rank, from 0 to ``num_ranks - 1``.
    strategy : {"linear", "round_robin"}
        "linear": consecutive experts are on one rank. "round_robin": expert e is on rank ``e % num_ranks``, so that
        groups of experts are spread over ranks. Both are vLLM's.

    Returns
    -------
    np.ndarray
        int32 [num_experts].

    Raises
    ------
    TypeError
        A value that is not an integer.
    ValueError
        No experts or ranks, a rank past the last, an unknown strategy.

    Notes
    -----
    Computed on the host, by the reference. An `ExpertLocation` has experts on several ranks, and moves them.

    Examples
    --------
    >>> make_expert_map(5, num_ranks=2, rank=1)
    array([-1, -1, -1,  0,  1], dtype=int32)
    >>> make_expert_map(5, num_ranks=2, rank=1, strategy="round_robin")
    array([-1,  0, -1,  1, -1], dtype=int32)
    """
    num_experts = checks.integer("num_experts", num_experts, 1)
    num_ranks = checks.integer("num_ranks", num_ranks, 1)
    rank = checks.integer("rank", rank, 0, num_ranks - 1, f"num_ranks - 1 = {num_ranks - 1}")
    checks.choice("strategy", strategy, STRATEGIES)
    return reference.make_expert_map(num_experts, num_ranks, rank, strategy)
