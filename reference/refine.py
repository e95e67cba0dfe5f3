"""The `refined` algorithm of `rebalance_experts`, for one layer.

1. Start from the best of a few placements.
2. Find the busiest rank. A change swaps one of its experts with an expert of another rank, or gives a slot to another
   expert if the slot's own expert has more slots. Make the change that leaves the lowest load of the busiest rank.
3. Repeat step 2 until that load is close to the mean, or until no change helps.

With several kinds of steps, the algorithm lowers the sum over kinds of the load of the busiest rank. The load of an
expert is shared by its replicas, and so is its risk, which is a variance: by the square of their number.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numba_moe.reference.deepseek import deepseek, heaviest_first, replicate

GAIN = 1e-6  # a change must lower the load by more than this part of it
CLOSE = 1e-3  # a busiest rank whose load exceeds the mean by this part is good enough
CHANGES_PER_SLOT = 4  # a bound of the number of changes


class Machine(NamedTuple):
    """The rank of each slot, the node of each rank, the ranks in use, and the group of each expert."""

    rank_of_slot: np.ndarray
    node_of_rank: np.ndarray
    active: np.ndarray
    group_of_expert: np.ndarray

    @property
    def regular(self) -> bool:
        """Whether `deepseek` applies: ranks, nodes and groups have equal sizes, and all ranks are active."""
        sizes = (self.rank_of_slot, self.node_of_rank, self.group_of_expert)
        return self.active.all() and all(len(set(np.bincount(part).tolist())) == 1 for part in sizes)


class Layer(NamedTuple):
    """The loads of one layer, and the domains: a rank may hold only experts of its own domain."""

    weight: np.ndarray  # [K, E], of each kind of steps
    risk: np.ndarray  # [K, E]
    machine: Machine
    domain_of_rank: np.ndarray  # -1 if inactive
    domain_of_expert: np.ndarray


class Outcome(NamedTuple):
    """The loads after a change, each summed over steps; lower is better, and the first field counts most."""

    busiest: float
    busiest_concerned: float  # load of the busiest rank among those that the change concerns
    before: float  # the same before the change


def count_replicas(place: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(place[place >= 0], minlength=num_experts)


def loads_of(place: np.ndarray, weight: np.ndarray, risk: np.ndarray, machine: Machine) -> np.ndarray:
    """Return the load of each rank in each kind of steps [K, R]."""
    count = np.maximum(count_replicas(place, weight.shape[1]), 1)
    share = weight / count + risk / (count * count)
    experts, ranks = place[place >= 0], machine.rank_of_slot[place >= 0]
    return np.stack([np.bincount(ranks, weights=row[experts], minlength=len(machine.active)) for row in share])


def busiest(load: np.ndarray) -> float:
    """Sum the load of the busiest rank over the steps, in order."""
    return np.cumsum(load.max(axis=1))[-1]


def outcome(layer: Layer, before: np.ndarray, place: np.ndarray, hot: int | None = None) -> Outcome:
    """Compare a placement with the loads before it; the change concerns `hot` and all ranks whose load differs."""
    after = loads_of(place, layer.weight, layer.risk, layer.machine)
    concerned = after != before
    if hot is not None:
        concerned[:, hot] = True
    return Outcome(busiest(after), busiest(np.where(concerned, after, 0)), busiest(np.where(concerned, before, 0)))


def groups_to_nodes(weight: np.ndarray, machine: Machine) -> np.ndarray | None:
    """Return the node of each group: heaviest first, each group to the node with the least load per active rank.

    All nodes get the same number of groups. Return None if a node without active ranks would need a group.
    """
    num_nodes, num_groups = machine.node_of_rank.max() + 1, machine.group_of_expert.max() + 1
    ranks = np.bincount(machine.node_of_rank[machine.active], minlength=num_nodes)
    group_weight = np.bincount(machine.group_of_expert, weights=weight)
    load, held = np.zeros(num_nodes), np.zeros(num_nodes, int)
    node_of_group = np.empty(num_groups, int)
    for group in heaviest_first(group_weight):
        possible = (held < num_groups // num_nodes) & (ranks > 0)
        if not possible.any():
            return None
        node = np.argmin(np.where(possible, load / np.maximum(ranks, 1), np.inf))
        node_of_group[group] = node
        load[node] += group_weight[group]
        held[node] += 1
    return node_of_group


def home_nodes(place: np.ndarray, machine: Machine) -> np.ndarray | None:
    """Return the node of each group in a placement, None if a group is on several nodes or on none."""
    groups = machine.group_of_expert[place[place >= 0]]
    nodes = machine.node_of_rank[machine.rank_of_slot[place >= 0]]
    pairs = sorted(set(zip(groups.tolist(), nodes.tolist(), strict=True)))
    if [group for group, _ in pairs] != list(range(machine.group_of_expert.max() + 1)):
        return None
    return np.array([node for _, node in pairs])


def domains(node_of_group: np.ndarray | None, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Return the domain of each rank and expert: its node, or one common domain if the groups do not fit onto nodes."""
    num_experts, num_nodes = len(machine.group_of_expert), machine.node_of_rank.max() + 1
    domain_of_expert, node_of_rank = np.zeros(num_experts, int), np.zeros_like(machine.node_of_rank)
    if node_of_group is not None:
        experts = np.bincount(node_of_group[machine.group_of_expert], minlength=num_nodes)
        active_slots = machine.active[machine.rank_of_slot]
        slots = np.bincount(machine.node_of_rank[machine.rank_of_slot[active_slots]], minlength=num_nodes)
        if ((experts <= slots) & ((experts > 0) | (slots == 0))).all():
            domain_of_expert, node_of_rank = node_of_group[machine.group_of_expert], machine.node_of_rank
    return np.where(machine.active, node_of_rank, -1), domain_of_expert


def spread(layer: Layer) -> np.ndarray:
    """Replicate in each domain as `deepseek` does, but if possible no expert more often than the domain has ranks.

    Then place the replicas, heaviest first, each on the lightest rank that has room and lacks the expert.
    """
    weight, machine = np.cumsum(layer.weight, axis=0)[-1], layer.machine
    num_ranks, num_experts = len(machine.active), len(weight)
    count = np.ones(num_experts, int)
    for domain in np.unique(layer.domain_of_expert):
        experts = np.flatnonzero(layer.domain_of_expert == domain)
        num_slots = np.count_nonzero(layer.domain_of_rank[machine.rank_of_slot] == domain)
        ranks = np.count_nonzero(layer.domain_of_rank == domain)
        most = ranks if ranks * len(experts) >= num_slots else num_slots
        count[experts] = replicate(weight[experts], num_slots, most)[1]

    share = weight / count
    replicas = np.repeat(np.arange(num_experts), count)
    place = np.full(len(machine.rank_of_slot), -1)
    load = np.zeros(num_ranks)
    free = np.where(machine.active, np.bincount(machine.rank_of_slot, minlength=num_ranks), 0)
    for expert in replicas[heaviest_first(share[replicas])]:
        possible = np.flatnonzero((free > 0) & (layer.domain_of_rank == layer.domain_of_expert[expert]))
        holders = machine.rank_of_slot[place == expert]
        rank = min(possible, key=lambda rank: (rank in holders, load[rank]))
        place[np.flatnonzero((machine.rank_of_slot == rank) & (place < 0))[0]] = expert
        load[rank] += share[expert]
        free[rank] -= 1
    return place


def may_hold(layer: Layer, place: np.ndarray, slot: int, expert: int) -> bool:
    """Return whether the slot's rank is in the expert's domain and lacks the expert."""
    rank = layer.machine.rank_of_slot[slot]
    same_domain = layer.domain_of_rank[rank] == layer.domain_of_expert[expert]
    return bool(same_domain and expert not in place[layer.machine.rank_of_slot == rank])


def may_lose(place: np.ndarray, slot: int) -> bool:
    """Return whether the slot is empty, or its expert has another slot."""
    return place[slot] < 0 or np.count_nonzero(place == place[slot]) > 1


def changed(place: np.ndarray, slot: int, expert: int) -> np.ndarray:
    place = place.copy()
    place[slot] = expert
    return place


def fill(layer: Layer, place: np.ndarray, slots: Iterable[int], experts: Iterable[int]) -> np.ndarray:
    """Give one of the slots to one of the experts so that the load is lowest; change nothing if that is not allowed."""
    before = loads_of(place, layer.weight, layer.risk, layer.machine)
    options = [
        changed(place, slot, expert)
        for slot in slots
        if may_lose(place, slot)
        for expert in experts
        if may_hold(layer, place, slot, expert)
    ]
    return min(options, key=lambda option: outcome(layer, before, option)[:2], default=place)


def complete(layer: Layer, place: np.ndarray) -> np.ndarray:
    """Give every expert a slot, heaviest first, and then every empty slot of an active rank an expert."""
    num_experts = layer.weight.shape[1]
    for expert in heaviest_first(np.cumsum(layer.weight, axis=0)[-1]):
        if expert not in place:
            place = fill(layer, place, range(len(place)), [expert])
    for slot, rank in enumerate(layer.machine.rank_of_slot):
        if place[slot] < 0 and layer.machine.active[rank]:
            place = fill(layer, place, [slot], range(num_experts))
        if place[slot] < 0 and layer.machine.active[rank]:  # the rank holds every expert
            first = np.flatnonzero(layer.domain_of_expert == layer.domain_of_rank[rank])[0]
            place = changed(place, slot, first)
    return place


def separate(layer: Layer, place: np.ndarray, current: np.ndarray, most_changed: int) -> np.ndarray:
    """Where a rank holds an expert twice, give the later slot to an expert that the rank lacks."""
    rank_of_slot = layer.machine.rank_of_slot
    for slot in range(len(place)):
        again = place[slot] >= 0 and place[slot] in place[:slot][rank_of_slot[:slot] == rank_of_slot[slot]]
        if again and np.count_nonzero(place != current) + (place[slot] == current[slot]) <= most_changed:
            place = fill(layer, place, [slot], range(layer.weight.shape[1]))
    return place


def changes(layer: Layer, place: np.ndarray, hot: int) -> Iterator[np.ndarray]:
    """Yield changes that can lower the load of a rank: swaps with other ranks, then one slot with another expert."""
    rank_of_slot, num_slots = layer.machine.rank_of_slot, len(place)
    domain = layer.domain_of_rank[hot]
    same_domain = layer.domain_of_rank[rank_of_slot] == domain
    for slot in np.flatnonzero(rank_of_slot == hot):
        for other in np.flatnonzero(same_domain & (rank_of_slot != hot)):
            give, take = place[slot], place[other]
            if may_hold(layer, place, slot, take) and may_hold(layer, place, other, give):
                yield changed(changed(place, slot, take), other, give)
    for slot in np.flatnonzero(same_domain & [may_lose(place, slot) for slot in range(num_slots)]):
        here = rank_of_slot[slot] == hot
        for expert in range(layer.weight.shape[1]) if here else np.unique(place[rank_of_slot == hot]):
            if may_hold(layer, place, slot, expert):
                yield changed(place, slot, expert)


def good_enough(layer: Layer, load: np.ndarray) -> float:
    """Return a load of the busiest rank that needs no improvement: just above the mean of the busiest domain."""
    ranks_of = [np.flatnonzero(layer.domain_of_rank == domain) for domain in np.unique(layer.domain_of_expert)]
    means = np.stack([np.cumsum(load[:, ranks], axis=1)[:, -1] / len(ranks) for ranks in ranks_of], axis=1)
    return busiest(means) * (1 + CLOSE)


def improve(layer: Layer, place: np.ndarray, current: np.ndarray, most_changed: int, goal: float) -> np.ndarray | None:
    """Return the placement after the best change that takes load off a busiest rank, None if there is none.

    With several kinds of steps several ranks can be the busiest. The heat of a rank is the sum of its loads in the
    kinds in which it is the busiest, and the hottest rank that a change can help is served.
    """
    load = loads_of(place, layer.weight, layer.risk, layer.machine)
    now = busiest(load)
    if now <= min(good_enough(layer, load), goal):
        return None
    heat = np.bincount(load.argmax(axis=1), weights=load.max(axis=1))
    for hot in heaviest_first(heat)[: np.count_nonzero(heat)]:
        best, best_key = None, (np.inf, np.inf)
        for option in changes(layer, place, hot):
            if np.count_nonzero(option != current) > most_changed:
                continue
            after = outcome(layer, load, option, hot)
            helps = after.busiest < now * (1 - GAIN) or after.busiest_concerned < after.before * (1 - GAIN)
            if after.busiest <= now and helps and after[:2] < best_key:
                best, best_key = option, after[:2]
        if best is not None:
            return best
    return None


def descend(layer: Layer, place: np.ndarray, current: np.ndarray, most_changed: int, goal: float) -> np.ndarray:
    """Make changes as long as they are needed and help."""
    for _ in range(CHANGES_PER_SLOT * len(place)):
        better = improve(layer, place, current, most_changed, goal)
        if better is None:
            break
        place = better
    return place


def arrange(place: np.ndarray, current: np.ndarray, machine: Machine) -> np.ndarray:
    """Reorder the slots of each rank so that an expert that the rank already holds keeps its slot."""
    place = place.copy()
    for slot, rank in enumerate(machine.rank_of_slot):
        for other in np.flatnonzero((machine.rank_of_slot == rank) & (place == current[slot]) & (place != current)):
            place[slot], place[other] = place[other], place[slot]
            break
    return place


def refine(
    weight: np.ndarray, risk: np.ndarray, machine: Machine, current: np.ndarray | None, max_moves: int | None
) -> np.ndarray:
    """Return the expert of each slot of one layer.

    The search starts from the current placement, from `deepseek` and from `spread`; with `max_moves` from the current
    one only. First every start loses its experts that a rank holds twice. This can cost balance, but the result must
    not be worse than the unchanged current placement and `deepseek`. If the best start does not reach this goal, the
    search tries the other starts. Those two unchanged placements take part in the final choice.
    """
    num_slots = len(machine.rank_of_slot)
    now = np.full(num_slots, -1) if current is None else np.where(machine.active[machine.rank_of_slot], current, -1)
    most_changed = num_slots if max_moves is None else max_moves
    total = np.cumsum(weight, axis=0)[-1]
    starts, as_they_were = [], []
    if current is not None:
        layer = Layer(weight, risk, machine, *domains(home_nodes(now, machine), machine))
        start = complete(layer, now)
        missing = np.count_nonzero(start != now)
        if missing > most_changed:
            raise ValueError(f"`max_moves` must be at least {missing}, the slots that have to change, got {max_moves}")
        starts.append((layer, start))
        if not missing:
            as_they_were.append(now)
    if max_moves is None:
        if machine.regular:
            num_groups, num_nodes = machine.group_of_expert.max() + 1, machine.node_of_rank.max() + 1
            start = deepseek(total, num_slots, num_groups, num_nodes, len(machine.active))
            starts.append((Layer(weight, risk, machine, *domains(home_nodes(start, machine), machine)), start))
            as_they_were.append(start)
        layer = Layer(weight, risk, machine, *domains(groups_to_nodes(total, machine), machine))
        starts.append((layer, spread(layer)))

    def peak(place: np.ndarray) -> float:
        return busiest(loads_of(place, weight, risk, machine))

    goal = min(map(peak, as_they_were), default=np.inf)
    apart = [(layer, separate(layer, start, now, most_changed)) for layer, start in starts]
    found = []
    for layer, place in sorted(apart, key=lambda start: peak(start[1])):
        found.append(arrange(descend(layer, place, now, most_changed, goal), now, machine))
        if peak(found[-1]) <= goal:
            break
    return min([*found, *as_they_were], key=peak)
