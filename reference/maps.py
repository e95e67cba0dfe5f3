"""The experts of a rank if each expert is on exactly one rank."""

import numpy as np


def make_expert_map(num_experts: int, num_ranks: int, rank: int, strategy: str = "linear") -> np.ndarray:
    """Return the id of each expert on a rank, -1 for an expert of another rank.

    Parameters
    ----------
    num_experts
        Number of experts of the model. If it is no multiple of the ranks, the first ranks have one expert more.
    num_ranks
        Number of ranks that share the experts.
    rank
        The rank, from 0 to ``num_ranks - 1``.
    strategy
        "linear": each rank has consecutive experts. "round_robin": expert e is on rank ``e % num_ranks``.

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
