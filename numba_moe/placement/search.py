"""The compiled half of `rebalance_experts`: what the reference defines, layer by layer, in Numba on the CPU.

`deepseek` packs and replicates. `refine` takes the best of a few placements of a layer and changes one slot, or swaps
two, as long as that takes load off the busiest rank. Loads are summed in slot order, so both give the reference's
bits; a cheap bound sorts out most changes before they are summed.

One file, because Numba's disk cache notices edits to the file of a function alone. Importing it imports Numba.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from numba_moe.runtime import cache

GAIN = 1e-6
CLOSE = 1e-3
CHANGES_PER_SLOT = 4
MARGIN = 1 + 1e-9  # between a bound computed by differences and a load summed in order


def compiled(function: Any) -> Any:
    """Compile a function that runs without Python's lock; keep it on disk unless nothing there may be written."""
    options = {"nogil": True, "error_model": "numpy"}
    if not cache.enabled():
        return njit(**options)(function)
    try:
        kept = njit(**options, cache=True)(function)
    except RuntimeError:
        return njit(**options)(function)

    # Numba fails on a damaged file; here it is compiled again.
    load = kept._cache.load_overload

    def load_or_forget(signature: Any, context: Any) -> Any:
        try:
            return load(signature, context)
        except Exception:
            kept._cache.flush()
            return None

    kept._cache.load_overload = load_or_forget
    return kept


class Machine(NamedTuple):
    """Where slots are and which experts belong together."""

    rank_of_slot: Any  # [P]
    first_slot: Any  # [R + 1]
    node_of_rank: Any  # [R]
    active: Any  # [R]
    group_of_expert: Any  # [E], all 0 where groups may be on several nodes
    num_groups: Any
    num_nodes: Any  # 1 where groups may be on several nodes


class State(NamedTuple):
    """A placement of one layer and what follows from it; `update` keeps the first four in step, `refresh` the rest."""

    place: Any  # [P], the expert of each slot, -1 for none
    weight: Any  # [S, E]
    risk: Any  # [S, E]
    count: Any  # [E], replicas
    holds: Any  # [R, E], replicas on a rank
    share: Any  # [S, E], load of one replica
    load: Any  # [S, R]
    by_load: Any  # [S, R], busiest rank first
    first_member: Any  # [E + 1]
    members: Any  # [P], slots of expert e: first_member[e] up to first_member[e + 1]
    touched: Any  # [R], scratch of `outcome`


@compiled
def heaviest_first(weight):
    return np.argsort(-weight, kind="mergesort")


@compiled
def pack(weight, num_packs):
    num_items = len(weight)
    size = num_items // num_packs
    pack_of_item = np.arange(num_items)
    place_in_pack = np.zeros(num_items, np.int64)
    if size == 1:
        return pack_of_item, place_in_pack
    load = np.zeros(num_packs)
    held = np.zeros(num_packs, np.int64)
    for item in heaviest_first(weight):
        lightest = -1
        for candidate in range(num_packs):
            if held[candidate] < size and (lightest < 0 or load[candidate] < load[lightest]):
                lightest = candidate
        pack_of_item[item] = lightest
        place_in_pack[item] = held[lightest]
        load[lightest] += weight[item]
        held[lightest] += 1
    return pack_of_item, place_in_pack


@compiled
def replicate(weight, num_replicas, most):
    """Return the expert of each replica and the replicas of each expert, at most `most`."""
    num_experts = len(weight)
    expert_of_replica = np.arange(num_replicas)
    count = np.ones(num_experts, np.int64)
    share = weight.copy()
    for replica in range(num_experts, num_replicas):
        heaviest = -1
        for expert in range(num_experts):
            if count[expert] < most and (heaviest < 0 or share[expert] > share[heaviest]):
                heaviest = expert
        expert_of_replica[replica] = heaviest
        count[heaviest] += 1
        share[heaviest] = weight[heaviest] / count[heaviest]
    return expert_of_replica, count


@compiled
def deepseek(weight, num_groups, num_nodes, num_gpus, place):
    # weight [E], place [P]
    num_experts, num_replicas = len(weight), len(place)
    group_size = num_experts // num_groups
    experts_per_node = num_experts // num_nodes
    replicas_per_node = num_replicas // num_nodes
    gpus_per_node = num_gpus // num_nodes
    slots_per_gpu = num_replicas // num_gpus

    group_weight = np.zeros(num_groups)
    for expert in range(num_experts):
        group_weight[expert // group_size] += weight[expert]
    node_of_group, place_in_node = pack(group_weight, num_nodes)
    expert_at = np.empty(num_experts, np.int64)
    for group in range(num_groups):
        first = node_of_group[group] * experts_per_node + place_in_node[group] * group_size
        for member in range(group_size):
            expert_at[first + member] = group * group_size + member

    for node in range(num_nodes):
        experts = expert_at[node * experts_per_node : (node + 1) * experts_per_node]
        replicas, count = replicate(weight[experts], replicas_per_node, replicas_per_node)
        gpu, position = pack((weight[experts] / count)[replicas], gpus_per_node)
        for replica in range(replicas_per_node):
            slot = (node * gpus_per_node + gpu[replica]) * slots_per_gpu + position[replica]
            place[slot] = experts[replicas[replica]]


@compiled
def deepseek_layer(weight, num_groups, num_nodes, num_gpus, layer, place):
    # weight [L, E], place [L, P]
    deepseek(weight[layer], num_groups, num_nodes, num_gpus, place[layer])


@compiled
def node_sizes(machine):
    """Return the active ranks and active slots of each node."""
    ranks = np.zeros(machine.num_nodes, np.int64)
    slots = np.zeros(machine.num_nodes, np.int64)
    for rank in range(len(machine.active)):
        if machine.active[rank]:
            ranks[machine.node_of_rank[rank]] += 1
            slots[machine.node_of_rank[rank]] += machine.first_slot[rank + 1] - machine.first_slot[rank]
    return ranks, slots


@compiled
def groups_to_nodes(weight, machine):
    """Return the node of each group: heaviest first, each to the node with the least load per active rank."""
    ranks, _ = node_sizes(machine)
    quota = machine.num_groups // machine.num_nodes
    group_weight = np.zeros(machine.num_groups)
    for expert in range(len(weight)):
        group_weight[machine.group_of_expert[expert]] += weight[expert]
    load = np.zeros(machine.num_nodes)
    held = np.zeros(machine.num_nodes, np.int64)
    node_of_group = np.zeros(machine.num_groups, np.int64)
    for group in heaviest_first(group_weight):
        best = -1
        for node in range(machine.num_nodes):
            if held[node] == quota or ranks[node] == 0:
                continue
            if best < 0 or load[node] / ranks[node] < load[best] / ranks[best]:
                best = node
        if best < 0:
            node_of_group[:] = -1
            return node_of_group
        node_of_group[group] = best
        load[best] += group_weight[group]
        held[best] += 1
    return node_of_group


@compiled
def home_nodes(place, machine):
    """Return the node of each group in a placement, -1 throughout if a group is on several nodes or on none."""
    node_of_group = np.full(machine.num_groups, -1)
    for slot in range(len(place)):
        if place[slot] >= 0:
            node = machine.node_of_rank[machine.rank_of_slot[slot]]
            group = machine.group_of_expert[place[slot]]
            if node_of_group[group] >= 0 and node_of_group[group] != node:
                node_of_group[:] = -1
                return node_of_group
            node_of_group[group] = node
    if node_of_group.min() < 0:
        node_of_group[:] = -1
    return node_of_group


@compiled
def domains(node_of_group, machine):
    """Return the domain of each rank (-1 if inactive) and expert: its node, or 0 if the groups do not fit on nodes."""
    _, slots = node_sizes(machine)
    num_experts = len(machine.group_of_expert)
    domain_of_expert = np.zeros(num_experts, np.int64)
    fits = node_of_group[0] >= 0
    if fits:
        experts = np.zeros(machine.num_nodes, np.int64)
        for expert in range(num_experts):
            domain_of_expert[expert] = node_of_group[machine.group_of_expert[expert]]
            experts[domain_of_expert[expert]] += 1
        for node in range(machine.num_nodes):
            fits = fits and experts[node] <= slots[node] and (experts[node] > 0 or slots[node] == 0)
    if not fits:
        domain_of_expert[:] = 0
    domain_of_rank = np.full(len(machine.active), -1)
    for rank in range(len(machine.active)):
        if machine.active[rank]:
            domain_of_rank[rank] = machine.node_of_rank[rank] if fits else 0
    return domain_of_rank, domain_of_expert


@compiled
def spread(weight, machine, domain_of_rank, domain_of_expert, place):
    """Place the replicas of each domain, heaviest first, on its lightest rank with room that lacks the expert."""
    num_experts, num_ranks = len(weight), len(domain_of_rank)
    count = np.ones(num_experts, np.int64)
    for domain in range(domain_of_rank.max() + 1):
        experts = np.flatnonzero(domain_of_expert == domain)
        num_slots = 0
        for rank in range(num_ranks):
            if domain_of_rank[rank] == domain:
                num_slots += machine.first_slot[rank + 1] - machine.first_slot[rank]
        most = (domain_of_rank == domain).sum()
        if most * len(experts) < num_slots:
            most = num_slots
        if len(experts) > 0:
            count[experts] = replicate(weight[experts], num_slots, most)[1]
    share = weight / count
    replicas = np.repeat(np.arange(num_experts), count)
    load = np.zeros(num_ranks)
    free = machine.first_slot[:-1].copy()
    holds = np.zeros((num_ranks, num_experts), np.bool_)
    place[:] = -1
    for replica in heaviest_first(share[replicas]):
        expert = replicas[replica]
        best = -1
        for rank in range(num_ranks):
            if domain_of_rank[rank] != domain_of_expert[expert] or free[rank] == machine.first_slot[rank + 1]:
                continue
            if best < 0 or (holds[rank, expert], load[rank]) < (holds[best, expert], load[best]):
                best = rank
        place[free[best]] = expert
        free[best] += 1
        load[best] += share[expert]
        holds[best, expert] = True


@compiled
def share_of(weight, risk, count):
    """Return the load of one of the replicas: what is uncertain about it counts by its variance."""
    return weight / count + risk / (count * count)


@compiled
def load_of_rank(place, share, machine, rank):
    load = 0.0
    for slot in range(machine.first_slot[rank], machine.first_slot[rank + 1]):
        if place[slot] >= 0:
            load += share[place[slot]]
    return load


@compiled
def peak_of(place, weight, risk, machine):
    """Return the sum over steps of the load of the busiest rank."""
    count = np.zeros(weight.shape[1], np.int64)
    for slot in range(len(place)):
        if place[slot] >= 0:
            count[place[slot]] += 1
    peak = 0.0
    for step in range(len(weight)):
        share = share_of(weight[step], risk[step], np.maximum(count, 1))
        top = 0.0
        for rank in range(len(machine.active)):
            top = max(top, load_of_rank(place, share, machine, rank))
        peak += top
    return peak


@compiled
def new_state(place, weight, risk, machine):
    num_steps, num_experts = weight.shape
    num_ranks = len(machine.active)
    state = State(
        place,
        weight,
        risk,
        np.zeros(num_experts, np.int64),
        np.zeros((num_ranks, num_experts), np.int32),
        np.empty((num_steps, num_experts)),
        np.empty((num_steps, num_ranks)),
        np.empty((num_steps, num_ranks), np.int64),
        np.empty(num_experts + 1, np.int64),
        np.empty(len(place), np.int64),
        np.zeros(num_ranks, np.bool_),
    )
    for slot in range(len(place)):
        if place[slot] >= 0:
            state.count[place[slot]] += 1
            state.holds[machine.rank_of_slot[slot], place[slot]] += 1
    refresh(state, machine)
    return state


@compiled
def refresh(state, machine):
    for step in range(len(state.weight)):
        for expert in range(len(state.count)):
            count = max(state.count[expert], 1)
            state.share[step, expert] = share_of(state.weight[step, expert], state.risk[step, expert], count)
        for rank in range(len(machine.active)):
            load = load_of_rank(state.place, state.share[step], machine, rank)
            before = rank
            while before > 0 and state.load[step, state.by_load[step, before - 1]] < load:
                state.by_load[step, before] = state.by_load[step, before - 1]
                before -= 1
            state.by_load[step, before] = rank
            state.load[step, rank] = load
    state.first_member[0] = 0
    for expert in range(len(state.count)):
        state.first_member[expert + 1] = state.first_member[expert] + state.count[expert]
    after = state.first_member[:-1].copy()
    for slot in range(len(state.place)):
        expert = state.place[slot]
        if expert >= 0:
            state.members[after[expert]] = slot
            after[expert] += 1


@compiled
def update(state, machine, slot, expert):
    old = state.place[slot]
    rank = machine.rank_of_slot[slot]
    if old >= 0:
        state.count[old] -= 1
        state.holds[rank, old] -= 1
    state.count[expert] += 1
    state.holds[rank, expert] += 1
    state.place[slot] = expert


@compiled
def outcome(state, machine, hot, worst):
    """Return the sum over steps of the busiest rank, of the busiest rank concerned, and of the latter before.

    `place` and `share` hold the change and `load` what was before; `touched` marks the ranks that may differ. Concerned
    are `hot` and the ranks that do differ. A sum of the busiest past `worst` is infinity.
    """
    peak, local, before = 0.0, 0.0, 0.0
    for step in range(len(state.weight)):
        top, concerned, was = 0.0, 0.0, 0.0
        for rank in state.by_load[step]:
            if not state.touched[rank]:
                top = state.load[step, rank]
                break
        for rank in range(len(state.touched)):
            if state.touched[rank]:
                load = load_of_rank(state.place, state.share[step], machine, rank)
                top = max(top, load)
                if rank == hot or load != state.load[step, rank]:
                    concerned = max(concerned, load)
                    was = max(was, state.load[step, rank])
        peak += top
        local += concerned
        before += was
        if peak > worst:
            return np.inf, np.inf, np.inf
    return peak, local, before


@compiled
def outcome_of_swap(state, machine, hot, slot, other, worst):
    place, touched = state.place, state.touched
    rank = machine.rank_of_slot[other]
    place[slot], place[other] = place[other], place[slot]
    touched[hot] = touched[rank] = True
    result = outcome(state, machine, hot, worst)
    touched[hot] = touched[rank] = False
    place[slot], place[other] = place[other], place[slot]
    return result


@compiled
def set_share(state, machine, expert, count, touched):
    for step in range(len(state.weight)):
        state.share[step, expert] = share_of(state.weight[step, expert], state.risk[step, expert], max(count, 1))
    for member in range(state.first_member[expert], state.first_member[expert + 1]):
        state.touched[machine.rank_of_slot[state.members[member]]] = touched


@compiled
def outcome_of_replacement(state, machine, hot, slot, expert, worst):
    old, rank = state.place[slot], machine.rank_of_slot[slot]
    state.place[slot] = expert
    set_share(state, machine, expert, state.count[expert] + 1, True)
    if old >= 0:
        set_share(state, machine, old, state.count[old] - 1, True)
    state.touched[rank] = True
    if hot >= 0:
        state.touched[hot] = True
    result = outcome(state, machine, hot, worst)
    state.touched[rank] = False
    if hot >= 0:
        state.touched[hot] = False
    set_share(state, machine, expert, state.count[expert], False)
    if old >= 0:
        set_share(state, machine, old, state.count[old], False)
    state.place[slot] = old
    return result


@compiled
def moves(place, current):
    moved = 0
    for slot in range(len(place)):
        moved += place[slot] != current[slot]
    return moved


@compiled
def fill(state, machine, slots, experts, domain_of_rank, domain_of_expert):
    """Give one of the slots to one of the experts, whichever leaves the least load; False if none may be given.

    A slot may be given if it is empty or its expert has another; an expert may come to a rank that lacks it.
    """
    best = (np.inf, np.inf)
    best_slot, best_expert = -1, -1
    for slot in slots:
        rank, old = machine.rank_of_slot[slot], state.place[slot]
        if old >= 0 and state.count[old] < 2:
            continue
        for expert in experts:
            if domain_of_rank[rank] != domain_of_expert[expert] or state.holds[rank, expert]:
                continue
            peak, local, _ = outcome_of_replacement(state, machine, -1, slot, expert, best[0])
            if (peak, local) < best:
                best = (peak, local)
                best_slot, best_expert = slot, expert
    if best_slot < 0:
        return False
    update(state, machine, best_slot, best_expert)
    refresh(state, machine)
    return True


@compiled
def complete(state, machine, domain_of_rank, domain_of_expert):
    """Give every expert a slot, heaviest first, and then every empty slot of an active rank an expert."""
    slots, experts = np.arange(len(state.place)), np.arange(len(state.count))
    total = state.weight[0].copy()
    for step in range(1, len(state.weight)):
        total += state.weight[step]
    for expert in heaviest_first(total):
        if state.count[expert] == 0:
            fill(state, machine, slots, experts[expert : expert + 1], domain_of_rank, domain_of_expert)
    for slot in slots:
        if state.place[slot] < 0 and domain_of_rank[machine.rank_of_slot[slot]] >= 0:
            here = slots[slot : slot + 1]
            if not fill(state, machine, here, experts, domain_of_rank, domain_of_expert):
                domain = domain_of_rank[machine.rank_of_slot[slot]]
                update(state, machine, slot, np.flatnonzero(domain_of_expert == domain)[0])
                refresh(state, machine)


@compiled
def separate(state, machine, domain_of_rank, domain_of_expert, current, max_moves):
    """Where a rank holds an expert twice, give the later slot to an expert that the rank lacks."""
    slots, experts = np.arange(len(state.place)), np.arange(len(state.count))
    for slot in slots:
        place, rank = state.place, machine.rank_of_slot[slot]
        if place[slot] < 0 or state.holds[rank, place[slot]] < 2:
            continue
        if not (place[machine.first_slot[rank] : slot] == place[slot]).any():
            continue
        if moves(place, current) + (place[slot] == current[slot]) <= max_moves:
            fill(state, machine, slots[slot : slot + 1], experts, domain_of_rank, domain_of_expert)


@compiled
def enough(state, domain_of_rank):
    """Return a peak that is as good as any: just above the mean of the busiest domain, summed over steps."""
    total = 0.0
    for step in range(len(state.weight)):
        top = 0.0
        for domain in range(domain_of_rank.max() + 1):
            load, ranks = 0.0, 0
            for rank in range(len(domain_of_rank)):
                if domain_of_rank[rank] == domain:
                    load += state.load[step, rank]
                    ranks += 1
            if ranks > 0:
                top = max(top, load / ranks)
        total += top
    return total * (1 + CLOSE)


@compiled
def cutoffs(peak, second_load, best):
    """Return the loads past which a rank rules a change out: if the change leaves the second busiest alone, or not.

    For a single step. The busiest rank has to get less. A change that leaves the second busiest alone cannot lower the
    peak below that; if the best change so far is there already, the ranks concerned have to get less than with that.
    """
    enough = peak * (1 - GAIN)
    alone = best[0] if second_load < best[0] else best[1]
    return min(enough, alone) * MARGIN, min(enough, best[0]) * MARGIN


@compiled
def exceeds(load, change, limit):
    """Whether a load exceeds a limit after a change; False for a change so small that it may be none."""
    return load + change > limit and abs(change) * 1e9 > load


@compiled
def swap_exceeds(state, hot, rank, give, take, limit):
    """Whether a swap of experts of two ranks leaves a peak, summed over kinds of steps, past a limit for certain."""
    peak = 0.0
    for kind in range(len(state.weight)):
        load, extra = state.load[kind], state.share[kind, take] - state.share[kind, give]
        top = max(load[hot] + extra, load[rank] - extra)
        for other in state.by_load[kind, :3]:
            if other not in (hot, rank):
                top = max(top, load[other])
                break
        peak += top
        if peak > limit:
            return True
    return False


@compiled
def replacement_exceeds(state, machine, hot, slot, expert, limit):
    """Whether another expert in a slot leaves a peak, summed over kinds of steps, past a limit for certain."""
    rank, old = machine.rank_of_slot[slot], state.place[slot]
    count, holds = state.count, state.holds
    peak = 0.0
    for kind in range(len(state.weight)):
        load, share, weight, risk = state.load[kind], state.share[kind], state.weight[kind], state.risk[kind]
        new = share_of(weight[expert], risk[expert], count[expert] + 1)
        rise = share_of(weight[old], risk[old], count[old] - 1) - share[old]
        top = load[rank] + new - share[old] + rise * (holds[rank, old] - 1)
        for other in (hot, state.by_load[kind, 0], state.by_load[kind, min(1, len(load) - 1)]):
            if other != rank:
                change = rise * holds[other, old] + (new - share[expert]) * holds[other, expert]
                top = max(top, load[other] + change)
        for member in range(state.first_member[old], state.first_member[old + 1]):
            other = machine.rank_of_slot[state.members[member]]
            if other != rank:
                change = rise * holds[other, old] + (new - share[expert]) * holds[other, expert]
                top = max(top, load[other] + change)
        peak += top
        if peak > limit:
            return True
    return False


@compiled
def better(result, best, peak):
    """Whether a change takes load off the busiest rank, and more than the best so far."""
    after, local, before = result
    return (after, local) < best and (after < peak * (1 - GAIN) or local < before * (1 - GAIN))


@compiled
def improve(state, machine, hot, peak, domain_of_rank, domain_of_expert, current, max_moves):
    """Make the best change that takes load off a rank; False if there is none."""
    place, holds, count = state.place, state.holds, state.count
    load, share, weight, risk = state.load[0], state.share[0], state.weight[0], state.risk[0]
    single = len(state.weight) == 1
    second = state.by_load[0, min(1, len(load) - 1)]
    moved = moves(place, current)
    best = (np.inf, np.inf)
    best_slot, best_other, best_expert = np.int64(-1), np.int64(-1), np.int64(-1)
    limits = cutoffs(peak, load[second], best)
    first, after = machine.first_slot[hot], machine.first_slot[hot + 1]

    share_at, load_at = share[place], load[machine.rank_of_slot]  # of each slot
    for slot in range(first, after):
        give = place[slot]
        for other in range(len(place)):
            # A swap with the second busiest rank is no exception: one of the two gets more than that has now.
            extra = share_at[other] - share_at[slot]
            if single and (load[hot] + extra > limits[0] or load_at[other] - extra > limits[0]):
                continue
            rank, take = machine.rank_of_slot[other], place[other]
            if rank == hot or domain_of_rank[rank] != domain_of_rank[hot]:
                continue
            if holds[hot, take] or holds[rank, give]:
                continue
            change = np.int64(give != current[other]) - np.int64(take != current[other])
            change += np.int64(take != current[slot]) - np.int64(give != current[slot])
            if moved + change > max_moves:
                continue
            limit = min(peak, best[0])
            if not single and swap_exceeds(state, hot, rank, give, take, limit * MARGIN):
                continue
            result = outcome_of_swap(state, machine, hot, slot, other, limit)
            if better(result, best, peak):
                best = result[:2]
                best_slot, best_other = slot, other
                limits = cutoffs(peak, load[second], best)

    on_hot = np.unique(place[first:after])
    everything = np.arange(len(count))
    grown = share_of(weight, risk, count + 1)
    for slot in range(len(place)):
        rank, old = machine.rank_of_slot[slot], place[slot]
        if domain_of_rank[rank] != domain_of_rank[hot] or count[old] < 2:
            continue
        rise = share_of(weight[old], risk[old], count[old] - 1) - share[old]
        # A rank that cannot take the rise, unless it has the expert whose share falls.
        full = np.int64(-1)
        for member in range(state.first_member[old], state.first_member[old + 1]):
            other = machine.rank_of_slot[state.members[member]]
            if single and other != rank and exceeds(load[other], rise, limits[1]):
                full = other
                break
        for expert in everything if rank == hot else on_hot:
            if full >= 0 and not holds[full, expert]:
                continue
            if holds[rank, expert] or domain_of_expert[expert] != domain_of_rank[hot]:
                continue
            if single:
                new = grown[expert]
                fall = share[expert] - new
                touched = rank == second or holds[second, old] > 0 or holds[second, expert] > 0
                limit = limits[1] if touched else limits[0]
                if exceeds(load[rank], new - share[old], limit):
                    continue
                if rank != hot and load[hot] - fall * holds[hot, expert] > limit:
                    continue
                fits = True
                for member in range(state.first_member[old], state.first_member[old + 1]):
                    other = machine.rank_of_slot[state.members[member]]
                    if other != rank and exceeds(load[other], rise - fall * holds[other, expert], limit):
                        fits = False
                        break
                if not fits:
                    continue
            if moved + np.int64(expert != current[slot]) - np.int64(old != current[slot]) > max_moves:
                continue
            limit = min(peak, best[0])
            if not single and replacement_exceeds(state, machine, hot, slot, expert, limit * MARGIN):
                continue
            result = outcome_of_replacement(state, machine, hot, slot, expert, limit)
            if better(result, best, peak):
                best = result[:2]
                best_slot, best_other, best_expert = slot, np.int64(-1), expert
                limits = cutoffs(peak, load[second], best)

    if best_slot < 0:
        return False
    if best_other >= 0:
        give, take = place[best_slot], place[best_other]
        update(state, machine, best_slot, take)
        update(state, machine, best_other, give)
    else:
        update(state, machine, best_slot, best_expert)
    refresh(state, machine)
    return True


@compiled
def descend(state, machine, domain_of_rank, domain_of_expert, current, max_moves, goal):
    """Take load off the busiest rank, change by change, until that is enough or there is no such change."""
    for _ in range(CHANGES_PER_SLOT * len(state.place)):
        peak = 0.0
        heat = np.zeros(len(domain_of_rank))
        for step in range(len(state.weight)):
            hot = state.by_load[step, 0]
            peak += state.load[step, hot]
            heat[hot] += state.load[step, hot]
        if peak <= min(enough(state, domain_of_rank), goal):
            return
        improved = False
        while not improved and heat.max() > 0:
            hot = np.argmax(heat)
            heat[hot] = 0.0
            improved = improve(state, machine, hot, peak, domain_of_rank, domain_of_expert, current, max_moves)
        if not improved:
            return


@compiled
def arrange(place, machine, current):
    """Reorder the slots of each rank so that an expert that the rank already holds keeps its slot."""
    for rank in range(len(machine.active)):
        first, after = machine.first_slot[rank], machine.first_slot[rank + 1]
        for slot in range(first, after):
            for other in range(first, after):
                if place[other] == current[slot] and place[other] != current[other]:
                    place[slot], place[other] = place[other], place[slot]
                    break


@compiled
def refine(weight, risk, machine, regular, current, max_moves, place):
    """Place one layer; return the number of slots that have to change if that is more than `max_moves`, else 0.

    weight [S, E]; current [P], -1 throughout for none; max_moves, -1 for no limit; place [P], the result.
    """
    num_slots, num_ranks, num_experts = len(place), len(machine.active), weight.shape[1]
    total = weight[0].copy()
    for step in range(1, len(weight)):
        total += weight[step]
    now = current.copy()
    for slot in range(num_slots):
        if not machine.active[machine.rank_of_slot[slot]]:
            now[slot] = -1
    limit = max_moves if max_moves >= 0 else num_slots

    goal = np.inf
    as_it_was = np.empty(num_slots, np.int64)
    peaks = np.full(3, np.inf)
    starts = np.empty((3, num_slots), np.int64)
    domain_of_rank = np.empty((3, num_ranks), np.int64)
    domain_of_expert = np.empty((3, num_experts), np.int64)
    for kind in range(3):
        start = starts[kind]
        start[:] = now
        if kind == 0:
            if max_moves < 0 and current.max() < 0:
                continue
            node_of_group = home_nodes(start, machine)
        elif max_moves >= 0 or (kind == 1 and not regular):
            continue
        elif kind == 1:
            deepseek(total, machine.num_groups, machine.num_nodes, num_ranks, start)
            node_of_group = home_nodes(start, machine)
        else:
            node_of_group = groups_to_nodes(total, machine)
        domain_of_rank[kind], domain_of_expert[kind] = domains(node_of_group, machine)
        if kind == 2:
            spread(total, machine, domain_of_rank[kind], domain_of_expert[kind], start)
        state = new_state(start, weight, risk, machine)
        missing = 0
        if kind == 0:
            complete(state, machine, domain_of_rank[kind], domain_of_expert[kind])
            missing = moves(start, now)
            if missing > limit:
                return missing
        if kind < 2 and missing == 0 and peak_of(start, weight, risk, machine) < goal:
            goal = peak_of(start, weight, risk, machine)
            as_it_was[:] = start
        separate(state, machine, domain_of_rank[kind], domain_of_expert[kind], now, limit)
        peaks[kind] = peak_of(start, weight, risk, machine)

    best_peak = np.inf
    for kind in np.argsort(peaks, kind="mergesort"):
        if peaks[kind] < np.inf and (best_peak == np.inf or best_peak > goal):
            state = new_state(starts[kind], weight, risk, machine)
            descend(state, machine, domain_of_rank[kind], domain_of_expert[kind], now, limit, goal)
            arrange(state.place, machine, now)
            peak = peak_of(state.place, weight, risk, machine)
            if peak < best_peak:
                best_peak = peak
                place[:] = state.place
    if goal < best_peak:
        place[:] = as_it_was
    return 0


@compiled
def refine_layer(weight, risk, machine, regular, current, max_moves, layer, place, missing):
    # weight, risk [L, K, E], current [L, P], place [L, P], missing [L]
    missing[layer] = refine(weight[layer], risk[layer], machine, regular, current[layer], max_moves, place[layer])
