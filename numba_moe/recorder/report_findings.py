"""What a dump says, as numbers: who is busy, how balanced GPUs are, what changes over time, and what would help."""

from typing import NamedTuple

import numpy as np

from numba_moe.placement import balancedness, rank_loads
from numba_moe.placement.rebalance import ALGORITHMS, Tick, place
from numba_moe.recorder.dump_files import Dump
from numba_moe.reference.recorder import utilization

MOST_BINS = 240  # passes are drawn in at most this number of parts
MOST_STEPS = 48  # parts that placements are chosen by
MORE_SLOTS = (0, 1, 2)  # on each GPU, that placements are tried with
HOTTEST = 20
PAIRS = 20  # of experts chosen together
MOST_TOKENS = 50_000  # whose pairs are counted
MOST_PAIRED = 1024  # experts of a layer whose pairs are counted


class Placement(NamedTuple):
    """A placement and how balanced it is; `held_out` where it is placed by the first half and scored on the second."""

    name: str
    slots_per_gpu: int
    balance: float  # mean over layers, all passes together: in hindsight
    worst: float  # of the least balanced layer
    held_out: float | None
    changed: int | None  # slots that would hold another expert
    loads: np.ndarray  # [L, R]


class Pair(NamedTuple):
    """Two experts that tokens choose together."""

    layer: int
    first: int
    second: int
    tokens: int
    expected: float  # tokens, if experts were chosen independently


class Together(NamedTuple):
    """What tokens choose together, and of how many of the recorded tokens that is known."""

    pairs: list[Pair]
    layer: int  # that of the first pair, or 0
    ratio: np.ndarray  # [E, E], tokens of this layer that chose both, over those expected; 0 on the diagonal
    counted: int
    recorded: int


def bounds(num_parts: int, most: int) -> np.ndarray:
    """Return the first index of each of at most `most` parts of equal sizes, and the end.

    >>> bounds(5, 2).tolist(), bounds(2, 8).tolist()
    ([0, 2, 5], [0, 1, 2])
    """
    parts = min(num_parts, most)
    return np.arange(parts + 1) * num_parts // max(parts, 1)


def in_bins(values: np.ndarray, most: int) -> np.ndarray:
    """Sum values [steps, ...] over at most `most` parts of the steps: float64."""
    return np.add.reduceat(values, bounds(len(values), most)[:-1], axis=0, dtype=np.float64)


def over_mean(counts: np.ndarray) -> np.ndarray:
    """Divide counts [..., E] by the mean of their row; a row of nothing is 0.

    >>> over_mean(np.array([[3, 1], [0, 0]])).tolist()
    [[1.5, 0.5], [0.0, 0.0]]
    """
    mean = counts.mean(axis=-1, keepdims=True)
    return np.divide(counts, mean, out=np.zeros(counts.shape), where=mean > 0)


class Findings:
    """The numbers of a report; layers in which nothing was counted are left out of means."""

    def __init__(self, dump: Dump, num_gpus: int) -> None:
        self.dump, self.num_gpus = dump, num_gpus
        self.total = dump.logical_count.sum(axis=0)  # [L, E]
        self.used = np.flatnonzero(self.total.any(axis=1))  # layers
        self.load = over_mean(self.total)
        physical = dump.global_physical_count.sum(axis=0)
        self.rank_load = physical.reshape(*physical.shape[:1], num_gpus, -1).sum(axis=-1)  # [L, R]
        self.balance = utilization(physical, num_gpus)  # [L]
        self.replicas = slots_of(dump)  # [L, E]

    @property
    def hottest(self) -> list[tuple[int, int]]:
        """Layer and expert of the busiest experts, over the mean of their layer."""
        order = np.argsort(-self.load, axis=None, kind="stable")[:HOTTEST]
        places = np.stack(np.unravel_index(order, self.load.shape), axis=1).tolist()
        return [(layer, expert) for layer, expert in places if self.total[layer, expert]]

    @property
    def dead(self) -> list[tuple[int, list[int]]]:
        """Layers with experts that nothing chose, and these experts."""
        found = [(int(layer), np.flatnonzero(self.total[layer] == 0).tolist()) for layer in self.used]
        return [(layer, experts) for layer, experts in found if experts]

    def sorted_shares(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the share of the busiest 0, 1, ... E experts: the mean of layers, and the most uneven layer."""
        share = np.sort(self.total[self.used] / self.total[self.used].sum(axis=1, keepdims=True), axis=1)[:, ::-1]
        curves = np.pad(np.cumsum(share, axis=1), ((0, 0), (1, 0)))
        return curves.mean(axis=0), curves[curves.sum(axis=1).argmax()]

    def balance_over_time(self) -> list[float | None]:
        """Return the balancedness of each part of the passes: mean over its passes and their layers with counts."""
        physical = self.dump.global_physical_count
        counted = physical.any(axis=2)
        found = np.where(counted, utilization(physical, self.num_gpus), 0)
        sums, numbers = (in_bins(part.sum(axis=1), MOST_BINS) for part in (found, counted))
        return [float(s / n) if n else None for s, n in zip(sums, numbers, strict=True)]

    def drift(self) -> tuple[list[float | None], list[float | None]]:
        """Return how far the choices of each part of the passes are from the first, and from the part before.

        That is the part of the choices that went to another expert, mean over layers.
        """
        counts = in_bins(self.dump.logical_count, MOST_BINS)
        sums = counts.sum(axis=2, keepdims=True)
        share = np.divide(counts, sums, out=np.zeros_like(counts), where=sums > 0)

        def distances(before: np.ndarray) -> list[float | None]:
            both = share.any(axis=2) & before.any(axis=2)
            apart = np.abs(share - before).sum(axis=2) / 2
            return [float(row[known].mean()) if known.any() else None for row, known in zip(apart, both, strict=True)]

        start = int(share.any(axis=(1, 2)).argmax())
        since = distances(np.broadcast_to(share[start], share.shape))
        since[start] = None  # it is the first
        return since, [None, *distances(np.roll(share, 1, axis=0))[1:]]

    def over_time(self, layer: int, expert: int) -> list[float | None]:
        """Return the load of an expert over the mean of its layer, in each part of the passes."""
        counts = in_bins(self.dump.logical_count[:, layer], MOST_BINS)
        return [float(row[expert] / row.mean()) if row.any() else None for row in counts]

    @property
    def layers_to_place(self) -> int:
        """The number of ticks of `placements`."""
        return 2 * len(MORE_SLOTS) * len(ALGORITHMS) * len(self.total)

    def placements(self, algorithm: str, tick: Tick = lambda: None) -> list[Placement]:
        """Return the placement as recorded, and those that an algorithm chooses, with the same slots and with more.

        All are of the counts of experts, in parts of the passes; but "as recorded" is what GPUs had.
        """
        steps = in_bins(self.dump.logical_count, MOST_STEPS)
        places = self.dump.last_physical_to_logical_map
        slots = places.shape[1]
        half = len(steps) // 2
        later = in_bins(self.dump.global_physical_count, MOST_STEPS)[half:].sum(axis=0)
        seen = steps[half:].sum(axis=0)
        can_hold_out = half > 0 and bool(steps[:half].any()) and bool(seen.any())

        def mean(of_layers: np.ndarray, counts: np.ndarray) -> float:
            return float(of_layers[counts.any(axis=1)].mean())

        after = mean(utilization(later, self.num_gpus), later) if can_hold_out else None
        now, worst = mean(self.balance, self.total), float(self.balance[self.used].min())
        loads = self.rank_load.astype(np.float64)
        found = [Placement("as recorded", slots // self.num_gpus, now, worst, after, None, loads)]
        for more in MORE_SLOTS:
            size = slots + more * self.num_gpus
            for name in (algorithm, *(other for other in ALGORITHMS if other != algorithm)):
                placed = place(steps, size, 1, 1, self.num_gpus, name, {}, tick)
                balance = balancedness(self.total, placed.physical_to_logical_map, self.num_gpus)
                held_out = None
                if can_hold_out:
                    by_half = place(steps[:half], size, 1, 1, self.num_gpus, name, {}, tick)
                    held_out = mean(balancedness(seen, by_half.physical_to_logical_map, self.num_gpus), seen)
                changed = int((placed.physical_to_logical_map != places).sum()) if more == 0 else None
                loads = rank_loads(self.total, placed.physical_to_logical_map, self.num_gpus)
                worst = float(balance[self.used].min())
                per_gpu = size // self.num_gpus
                found.append(Placement(name, per_gpu, mean(balance, self.total), worst, held_out, changed, loads))
        return found

    def together(self) -> Together | None:
        """Return the pairs of experts that most exceed what independent choices would give, where ids were recorded."""
        ids, num_tokens = self.dump.topk_ids, self.dump.num_tokens
        if ids is None or num_tokens is None or not len(ids) or ids.shape[2] < 2 or self.dump.num_experts > MOST_PAIRED:
            return None
        every = -(-len(ids) // MOST_TOKENS)
        map_of_token = np.repeat(self.dump.map_of_pass, num_tokens)[::every]
        ids = ids[::every]
        pairs: list[Pair] = []
        for layer in range(ids.shape[1]):
            counts, expected = self._counted(ids[:, layer], map_of_token, layer)
            over = np.triu(counts - expected, 1)
            order = np.argsort(-over, axis=None, kind="stable")[:PAIRS]
            places = np.stack(np.unravel_index(order, over.shape), axis=1).tolist()
            pairs += [
                Pair(layer, first, second, int(counts[first, second]), float(expected[first, second]))
                for first, second in places
                if over[first, second] > 0
            ]
        pairs = sorted(pairs, key=lambda pair: pair.expected - pair.tokens)[:PAIRS]
        layer = pairs[0].layer if pairs else 0
        counts, expected = self._counted(ids[:, layer], map_of_token, layer)
        ratio = np.divide(counts, expected, out=np.zeros_like(expected), where=expected > 0)
        return Together(pairs, layer, ratio, len(ids), int(num_tokens.sum()))

    def _counted(self, slots: np.ndarray, map_of_token: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that chose two experts of a layer [E, E], and those expected; 0 on the diagonal."""
        num_experts = self.dump.num_experts
        experts = self.dump.physical_to_logical_maps[map_of_token[:, None], layer, slots]
        chosen = np.where(slots >= 0, experts, -1)
        first, second = (chosen[:, places] for places in np.triu_indices(chosen.shape[1], 1))
        real = (first >= 0) & (second >= 0) & (first != second)
        together = np.bincount(first[real] * num_experts + second[real], minlength=num_experts**2)
        together = together.reshape(num_experts, num_experts)
        often = np.bincount(chosen[chosen >= 0], minlength=num_experts).astype(float)
        expected = np.outer(often, often) / max((chosen >= 0).any(axis=1).sum(), 1)
        np.fill_diagonal(expected, 0)
        return together + together.T, expected


def slots_of(dump: Dump) -> np.ndarray:
    """Return how many slots hold each expert under the last map: [L, E]."""
    places = dump.last_physical_to_logical_map
    found = np.zeros((len(places), dump.num_experts), np.int64)
    layers, slots = np.nonzero(places >= 0)
    np.add.at(found, (layers, places[layers, slots]), 1)
    return found
