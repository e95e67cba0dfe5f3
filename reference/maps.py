"""The experts of a rank where each expert is on one rank."""

import numpy as np


def make_expert_map(num_experts: int, num_ranks: int, rank: int, strategy: str = "linear") -> np.ndarray:
    """Return a rank's own id of each expert, -1 for an expert of another rank.

    Parameters
    ----------
    num_experts
        Experts of the model; the first ranks have one more where they are no multiple of the ranks.
    num_ranks
        Ranks that share the experts.
    rank
        The rank, from 0 on.
    strategy
        "linear": consecutive experts are on one rank. "round_robin": expert e is on rank ``e % num_ranks``.

    Returns
    -------
    np.ndarray
        int32 [num_experts].

    Examples
    --------
    >>> make_expert_map(5, num_ranks=2, rank=1)
    array([-1, -1, -1,  0,  1], dtype=int32)
    """
    experts = np.arange(num_experts)
    experts = np.array_split(experts, num_ranks)[rank] if strategy == "linear" else experts[rank::num_ranks]
    found = np.full(num_experts, -1, np.int32)
    found[experts] = np.arange(len(experts))
    return found
