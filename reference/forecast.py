"""What the recorded steps say about the next ones, for the `refined` algorithm of `rebalance_experts`.

A placement that fits every recorded step fits their noise too, and balances the next steps no better. So `forecast`
keeps of the steps only what is likely to come again:

1. The mean of each expert. Recent steps count more, if that predicts later steps better within the record.
2. The variance of each expert. Where steps are few, it is nearer to what other experts of the layer have. A rank whose
   load varies is the busiest more often, and replicas of an expert divide its variance by the square of their number.
3. Kinds of steps, for example prompts and answers. Steps are grouped by half of the experts, and the groups count
   only if they also explain the loads of the other half, which noise does not.
"""

from typing import NamedTuple

import numpy as np

RISK = 0.15  # part of the variance in the bound of the expected largest load that is charged
FEWEST_STEPS = 8  # fewer steps say nothing but their sum
MOST_KINDS = 3
EXPLAINED = 0.1  # part of the variance that another kind of steps must explain
PRIOR_STEPS = 10  # what other experts say about the variance counts as this number of steps
ROUNDS = 20  # of k-means


class Forecast(NamedTuple):
    """The load of each expert in each kind of steps, and what its variance costs; weighted by the kinds' frequency."""

    weight: np.ndarray  # [K, L, E]
    risk: np.ndarray  # [K, L, E], divided by the square of an expert's replicas


def over_sum(loads: np.ndarray) -> np.ndarray:
    """Divide loads [..., E] by their sum.

    >>> over_sum(np.array([[1.0, 3.0], [0.0, 0.0]]))
    array([[0.25, 0.75],
           [0.  , 0.  ]])
    """
    total = loads.sum(axis=-1, keepdims=True)
    return np.divide(loads, total, out=np.zeros_like(loads), where=total > 0)


def fading(num_steps: int, half_life: float) -> np.ndarray:
    """Return the weight of each step: 1 for the last, and half of it one half-life before.

    >>> fading(3, 1)
    array([0.25, 0.5 , 1.  ])
    """
    return np.asarray(0.5 ** (np.arange(num_steps)[::-1] / half_life))


def half_life(share: np.ndarray) -> float:
    """Return the half-life whose mean of earlier steps predicts later steps best; infinity for the mean of all.

    share [S, N]. A shorter half-life has to be better by 3 percent.

    >>> steps = np.arange(16.0)[:, None]
    >>> half_life(steps), half_life(steps % 2)
    (1.0, inf)
    """
    num_steps = len(share)
    tried = [np.inf, *(num_steps / parts for parts in (2, 4, 8, 16) if parts <= num_steps)]
    error = np.zeros(len(tried))
    for now in sorted({num_steps * part // 8 for part in (4, 5, 6, 7)}):
        faded = np.stack([fading(now, life) for life in tried])
        predicted = faded @ share[:now] / faded.sum(axis=1, keepdims=True)
        error += ((predicted - share[now:].mean(axis=0)) ** 2).sum(axis=1)
    best = 0
    for number in range(1, len(tried)):
        if error[number] < 0.97 * error[best]:
            best = number
    return float(tried[best])


def group(points: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the group of each point by k-means, which starts from points that are far apart.

    >>> group(np.array([[0.0], [9.0], [1.0], [8.0]]), 2)
    array([0, 1, 0, 1])
    """

    def distances(centres: np.ndarray) -> np.ndarray:
        return np.stack([((points - centre) ** 2).sum(axis=1) for centre in centres])

    centres = points[[distances(points.mean(axis=0, keepdims=True)).argmax()]]
    while len(centres) < num_groups:
        centres = np.concatenate([centres, points[[distances(centres).min(axis=0).argmax()]]])
    for _ in range(ROUNDS):
        nearest = distances(centres).argmin(axis=0)
        members = [points[nearest == number] for number in range(num_groups)]
        moved = np.stack([part.mean(axis=0) if len(part) else old for part, old in zip(members, centres, strict=True)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return nearest


def explained(points: np.ndarray, kinds: np.ndarray) -> float:
    """Return the part of the variance that kinds of steps explain, less what they would explain by chance.

    >>> explained(np.array([[0.0], [9.0], [1.0], [8.0]]), np.array([0, 1, 0, 1])).__round__(2)
    0.98
    """
    num_steps, present = len(points), np.unique(kinds)
    within = sum(((points[kinds == kind] - points[kinds == kind].mean(axis=0)) ** 2).sum() for kind in present)
    total = ((points - points.mean(axis=0)) ** 2).sum()
    if total == 0 or len(present) == num_steps:
        return 0.0
    return float(1 - within / total * (num_steps - 1) / (num_steps - len(present)))


def kinds_of_steps(share: np.ndarray) -> np.ndarray:
    """Return the kind of each step [S], found by the even experts and confirmed by the odd ones.

    share [S, L, E]

    >>> kinds_of_steps(np.array([[[0.4, 0.1, 0.4, 0.1]], [[0.1, 0.4, 0.1, 0.4]]] * 3))
    array([0, 1, 0, 1, 0, 1])
    """
    num_steps = len(share)
    even, odd = (share[..., first::2].reshape(num_steps, -1) for first in (0, 1))
    kinds, best = np.zeros(num_steps, int), 0.0
    for number in range(2, MOST_KINDS + 1):
        found = group(even, number)
        if (now := explained(odd, found)) < best + EXPLAINED:
            break
        kinds, best = found, now
    return kinds


def forecast(loads: np.ndarray, num_slots: int, num_ranks: int) -> Forecast:
    """Say what the next steps may be like.

    Parameters
    ----------
    loads
        [S, L, E], in the order of time.
    num_slots, num_ranks
        Slots of a layer, and ranks, which say how much of the variance a rank has.

    Returns
    -------
    Forecast
        The sum of the steps, without risk, if they are few.

    Examples
    --------
    >>> forecast(np.array([[[6.0, 2.0]], [[5.0, 1.0]]]), 2, 2)
    Forecast(weight=array([[[11.,  3.]]]), risk=array([[[0., 0.]]]))
    >>> forecast(np.array([[[6.0, 2.0]], [[2.0, 2.0]]] * 4), 2, 2).weight.round(3).tolist()
    [[[0.5, 0.167]], [[0.167, 0.167]]]
    """
    num_steps, _, num_experts = loads.shape
    if num_steps < FEWEST_STEPS:
        return Forecast(np.cumsum(loads, axis=0)[-1:], np.zeros_like(loads[:1]))
    share = over_sum(loads)
    matters = loads.reshape(num_steps, -1).sum(axis=1) * fading(num_steps, half_life(share.reshape(num_steps, -1)))
    matters = matters / max(matters.sum(), np.finfo(float).tiny)
    kinds = kinds_of_steps(share)
    weights, risks = [], []
    for kind in np.unique(kinds):
        chosen = np.flatnonzero((kinds == kind) & (matters > 0))
        if not len(chosen):
            continue
        often = matters[chosen].sum()
        part = matters[chosen] / often
        mean = np.tensordot(part, share[chosen], 1)
        variance = np.tensordot(part, (share[chosen] - mean) ** 2, 1)
        enough = 1 / (part**2).sum()  # steps of equal weight that say the same
        variance *= enough / max(enough - 1, 1)
        squares = (mean**2).sum(axis=1, keepdims=True)
        usual = np.divide(variance.sum(axis=1, keepdims=True), squares, out=np.zeros_like(squares), where=squares > 0)
        variance = (enough * variance + PRIOR_STEPS * usual * mean**2) / (enough + PRIOR_STEPS)
        # Of R independent ranks of this variance, the largest is at most sqrt(2 log(R) variance) above the mean.
        of_rank = variance.sum(axis=1, keepdims=True) / num_ranks * num_experts / num_slots
        rate = np.sqrt(np.divide(2 * np.log(num_ranks), of_rank, out=np.zeros_like(of_rank), where=of_rank > 0))
        weights.append(often * mean)
        risks.append(often * RISK * rate * variance)
    if not weights:
        return Forecast(np.zeros_like(loads[:1]), np.zeros_like(loads[:1]))
    return Forecast(np.stack(weights), np.stack(risks))
