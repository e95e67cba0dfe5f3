"""A live balancer: experts follow a load that drifts, outputs stay what they were, and a rank may be lost.

Ranks are processes that meet at a store of the test's own. With ``-s`` the tests print the figures of docs/parallel.md.
"""

import collections
import itertools
import os
import re
import signal
import time
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numba_moe.reference import migration as twin
from numba_moe.reference.balancer import layers_worth_moving as worth_by_twin
from numba_moe.reference.experts import fused_experts, moe_activation, multiply_by_expert

from numba_moe import MoEBlock
from numba_moe.parallel import PeerTimeoutError, TokenDispatcher, expert_weights, gather_experts, shard_experts
from numba_moe.placement import (
    Balancer,
    BalancerLook,
    CorruptedWeightsError,
    ExpertDispatch,
    ExpertLocation,
    balancedness,
    layers_worth_moving,
    migration,
    pair_ranks,
    preserve_intragpu_slots,
    rank_loads,
    rebalance_experts,
)
from numba_moe.recorder import ExpertDistributionRecorder

NUM_LAYERS, TOP_K, HIDDEN, WIDTH, TOKENS = 3, 2, 8, 4, 64


def draw_locations(rng, num_layers=2):
    """Return two locations of random sizes: replicas, uneven ranks, ranks without experts in either."""
    num_gpus, num_experts = int(rng.integers(1, 7)), int(rng.integers(1, 9))
    sizes = rng.integers(1, 6, num_gpus)
    while sizes.sum() < num_experts:
        sizes[rng.integers(num_gpus)] += 1
    rank_of_slot = np.repeat(np.arange(num_gpus), sizes)

    def places():
        active = rng.random(num_gpus) < 0.8
        if sizes[active].sum() < num_experts:
            active[:] = True
        slots = rng.permutation(np.flatnonzero(active[rank_of_slot]))
        place = np.full(len(rank_of_slot), -1)
        place[slots] = rng.integers(0, num_experts, len(slots))
        place[slots[:num_experts]] = np.arange(num_experts)
        return place

    def make():
        return ExpertLocation.from_mapping(
            [places() for _ in range(num_layers)], num_experts, num_gpus, slots_per_rank=sizes
        )

    return make(), make()


def test_experts_that_stay_on_a_rank_keep_their_slots():
    rng = np.random.default_rng(0)
    saved = 0
    for _ in range(300):
        old, new = draw_locations(rng)
        kept = preserve_intragpu_slots(old, new)
        assert np.array_equal(kept.physical_to_logical_map, twin.preserve_intragpu_slots(old, new))
        for layer, rank in itertools.product(range(old.num_layers), range(old.num_gpus)):
            before, wanted, found = (
                place.physical_to_logical_map[layer, old.rank_of_slot == rank].tolist() for place in (old, new, kept)
            )
            assert sorted(found) == sorted(wanted)
            common = sum((collections.Counter(before) & collections.Counter(wanted)).values())
            assert sum(one == other for one, other in zip(before, found, strict=True)) == common, "as many as can be"
            saved += common - sum(one == other for one, other in zip(before, wanted, strict=True))
        assert preserve_intragpu_slots(old, kept) == kept
    assert saved > 300


def test_rounds_of_exchanges_by_hand():
    assert pair_ranks([[5]]).tolist() == [[-1]]
    assert pair_ranks([[0, 0], [3, 0]]).tolist() == [[-1, 0], [0, -1]]
    # The pair with most to send is first, and what goes the other way meanwhile costs nothing.
    assert pair_ranks([[0, 1, 4], [0, 0, 0], [4, 0, 0]]).tolist() == [[-1, 1, 0], [1, -1, -1], [0, -1, -1]]
    for num_ranks in range(2, 17):
        rounds = pair_ranks(1 - np.eye(num_ranks, dtype=int))
        assert rounds.max() + 1 == num_ranks - 1 + num_ranks % 2, "as few rounds as there can be"


def test_in_a_round_each_rank_has_one_peer():
    rng = np.random.default_rng(1)
    for _ in range(300):
        num_ranks = int(rng.integers(1, 12))
        size = rng.integers(0, 100, (num_ranks, num_ranks)) * (rng.random((num_ranks, num_ranks)) < rng.random())
        rounds = pair_ranks(size)
        assert np.array_equal(rounds, twin.pair_ranks(size))
        assert np.array_equal(rounds, rounds.T)
        apart = size + size.T > 0
        np.fill_diagonal(apart, False)
        assert np.array_equal(rounds >= 0, apart)
        for row in rounds:
            busy = row[row >= 0]
            assert len(set(busy)) == len(busy)
        assert rounds.max(initial=0) <= max(2 * apart.sum(axis=1).max() - 2, 0)


def test_layers_are_worth_what_they_gain_for_what_they_cost():
    rng = np.random.default_rng(2)
    numbers = collections.Counter()
    for _ in range(300):
        old, new = draw_locations(rng, num_layers=4)
        weight = rng.integers(0, 50, (4, old.num_logical_experts))
        min_gain, move_cost = float(rng.choice([0, 0.1, 0.4])), float(rng.choice([0, 1, 5]))
        found = layers_worth_moving(weight, old, new, min_gain=min_gain, move_cost=move_cost)
        assert np.array_equal(found, worth_by_twin(weight, old, new, min_gain=min_gain, move_cost=move_cost))
        net = {}
        for layer in range(4):
            before, after = (
                rank_loads(weight, place.physical_to_logical_map, old.num_gpus, slots_per_rank=old.slots_per_rank)
                for place in (old, new)
            )
            gain = before[layer].max() - after[layer].max()
            was, will = old.physical_to_logical_map[layer], new.physical_to_logical_map[layer]
            changed = (was != will) & (will >= 0)
            filled = [np.sum(changed[old.rank_of_slot == rank]) for rank in range(old.num_gpus)]
            if gain > move_cost * max(filled) and gain >= min_gain * before[layer].max():
                net[layer] = gain - move_cost * max(filled)
        assert found.tolist() == sorted(net, key=lambda layer: (-net[layer], layer))
        numbers[len(net)] += 1
    assert all(numbers[count] > 10 for count in range(3))


def drifting_ids(rng, number, kind, num_experts):
    """Return the choices of a pass, [layers, tokens, top_k]: few experts are busy, and others after a while."""
    ids = []
    for layer in range(NUM_LAYERS):
        center = 7 * layer + (number / 12 if kind == "slides" else 11 * (number // 40))
        away = np.abs((np.arange(num_experts) - center + num_experts / 2) % num_experts - num_experts / 2)
        weight = np.exp(-away / 2)
        gumbel = rng.gumbel(size=(TOKENS, num_experts))
        ids.append((np.log(weight) + gumbel).argsort(axis=1)[:, -TOP_K:])
    return np.stack(ids).astype(np.int64)


class Model:
    """Layers of experts over the ranks; the experts are the reference's, and so are those of one rank."""

    def __init__(self, rank, size, timeout=30.0, num_spare=1, **options):
        rng = np.random.default_rng(3)
        self.rank, self.num_experts = rank, 8 * size
        of_rank = np.arange(self.num_experts).reshape(size, 8)
        places = np.concatenate([of_rank, np.roll(of_rank, 1, axis=0)[:, :num_spare]], axis=1)
        self.start = ExpertLocation.from_mapping([places.ravel()] * NUM_LAYERS, self.num_experts, size)
        self.matrices = [
            {
                "up": rng.standard_normal((self.num_experts, 2 * WIDTH, HIDDEN), np.float32),
                "down": rng.standard_normal((self.num_experts, HIDDEN, WIDTH), np.float32),
            }
            for _ in range(NUM_LAYERS)
        ]
        self.dispatcher = TokenDispatcher(
            num_experts=self.num_experts, top_k=TOP_K, hidden=HIDDEN, max_tokens=TOKENS, dtype=torch.float32,
            location=self.start, reduce="source", timeout=timeout,
        )  # fmt: skip
        everyone = [{name: torch.from_numpy(part) for name, part in layer.items()} for layer in self.matrices]
        self.weights = [shard_experts(layer, self.dispatcher, number) for number, layer in enumerate(everyone)]
        self.recorder = ExpertDistributionRecorder(NUM_LAYERS, self.num_experts, mode="per_pass", device="cpu")
        self.recorder.start_record()
        self.counts = []
        options = {"every": 10, "algorithm": "deepseek", "timeout": timeout} | options
        self.balancer = Balancer(self.weights, self.recorder, self.dispatcher, **options)

    def run(self, number, kind="slides", check=True):
        """Run a pass, and check that each layer has the bits of one rank; return the layers that move after it."""
        rng = np.random.default_rng((number, self.rank))
        ids = drifting_ids(rng, number, kind, self.num_experts)
        rows = rng.standard_normal((TOKENS, HIDDEN), np.float32)
        weights = rng.random((TOKENS, TOP_K), np.float32)
        with self.recorder.with_forward_pass(number):
            for layer in range(NUM_LAYERS):
                with self.recorder.with_current_layer(layer):
                    self.recorder.on_select_experts(torch.from_numpy(ids[layer]))
                out = self.layer(layer, rows, ids[layer], weights)
                if check:
                    pair = self.matrices[layer]["up"], self.matrices[layer]["down"]
                    assert np.array_equal(out, fused_experts(rows, *pair, weights, ids[layer])), (number, layer)
        self.counts.append(np.stack([np.bincount(part.ravel(), minlength=self.num_experts) for part in ids]))
        return self.balancer.step()

    def layer(self, layer, rows, ids, weights):
        """Return what a layer makes of rows, by the reference's experts where they live now."""
        sent = self.dispatcher.dispatch(*map(torch.from_numpy, (rows, ids, weights)), layer=layer)
        offset = sent.expert_first_token_offset.numpy()
        held = {name: part.numpy() for name, part in self.weights[layer].items()}
        made = multiply_by_expert(sent.permuted_hidden_states.numpy(), held["up"], offset)
        made = multiply_by_expert(moe_activation(made, offset, activation="silu"), held["down"], offset)
        return self.dispatcher.combine(torch.from_numpy(made), sent).numpy()


def drifting(rank, size, kind="slides", **options):
    """Compare balancedness with a balancer, without it, and with an oracle that knows the next passes."""
    num_passes = 60 if size == 2 else 200
    model = Model(rank, size, chunk_layers=2, **options)
    balancer, every = model.balancer, 10
    places, moved = [], collections.Counter()
    for number in range(num_passes):
        places.append(balancer.location.physical_to_logical_map)
        before = balancer.location
        layers = model.run(number, kind)
        moved.update(layers)
        for layer in range(NUM_LAYERS):
            same = np.array_equal(*(where.physical_to_logical_map[layer] for where in (before, balancer.location)))
            assert same or layer in layers, "tables change with the weights alone"
    moved.update(balancer.finish())
    assert not balancer.is_moving
    assert balancer.location == model.dispatcher.location
    assert set(moved) == set(range(NUM_LAYERS))
    assert len(balancer.looks) == num_passes // every
    for layer in range(NUM_LAYERS):
        found = gather_experts(model.weights[layer], model.dispatcher, layer)
        for name, part in model.matrices[layer].items():
            assert np.array_equal(found[name].numpy(), part)

    counts = torch.from_numpy(np.stack(model.counts))
    dist.all_reduce(counts)
    counts = counts.numpy()
    sizes = model.start.num_physical_experts, 1, 1, size
    known = []
    for first in range(0, num_passes, every):
        placed = rebalance_experts(counts[first : first + every].sum(axis=0), *sizes)
        known += [placed.physical_to_logical_map] * every

    def score(locations):
        """Score the passes after the first look."""
        scores = [balancedness(*pair, size).mean() for pair in zip(counts, locations, strict=True)]
        return float(np.mean(scores[every:]))

    without, live, oracle = score([model.start.physical_to_logical_map] * num_passes), score(places), score(known)
    kept, filled = (sum(getattr(look, name) for look in balancer.looks) for name in ("num_kept", "num_filled"))
    most = NUM_LAYERS * options.get("max_moves", model.start.num_physical_experts)
    assert all(look.num_filled <= most for look in balancer.looks)
    if rank == 0:
        figures = f"without {without:.3f}, live {live:.3f}, oracle {oracle:.3f}"
        print(f"{size} ranks, a load that {kind}, {options}: {figures}; {filled} filled, {kept} saved", flush=True)
    assert without + 0.1 < live < oracle
    assert kept > 0 or options
    assert all(look.expected >= look.balancedness for look in balancer.looks)


def jumping(rank, size):
    drifting(rank, size, "jumps")


def refined(rank, size):
    drifting(rank, size, algorithm="refined", max_moves=4)
    drifting(rank, size, "jumps", algorithm="refined", max_moves=4)


def moving(rank, size, device="cpu"):
    """Move the experts of blocks of a model whose recorder is given slots, in one step."""
    experts = 4 * size
    start = ExpertLocation.trivial(2, experts, 5 * size, num_gpus=size)
    sizes = {"num_experts": experts, "top_k": 2, "hidden": 8, "max_tokens": 16, "dtype": torch.float32}
    dispatcher = TokenDispatcher(**sizes, location=start)
    torch.manual_seed(0)
    blocks = [MoEBlock(8, 4, num_experts=experts, top_k=2, dispatcher=dispatcher, layer=layer) for layer in range(2)]
    model = torch.nn.Sequential(*blocks).to(device)
    torch.manual_seed(0)
    whole = torch.nn.Sequential(*(MoEBlock(8, 4, num_experts=experts, top_k=2) for _ in range(2))).to(device)
    tables = ExpertDispatch(start, rank, device)
    recorder = ExpertDistributionRecorder(
        2, experts, mode="stat", device=device, physical_to_logical_map=start.physical_to_logical_map
    )
    recorder.start_record()

    def record(layer):
        def hook(_, __, routed):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(tables(routed.topk_ids, layer))

        return hook

    for layer, block in enumerate(blocks):
        block.router.register_forward_hook(record(layer))
    weights = expert_weights(model)
    address = [tensor.data_ptr() for held in weights for tensor in held.values()]
    told = []
    listener = types.SimpleNamespace(location=start, update=lambda *given: told.append(given))
    options = {"algorithm": "deepseek", "every": 3, "overlap": 0, "min_gain": 0.0, "physical_ids": True, "verify": True}
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(rank)).to(device) + 1
    with Balancer(weights, recorder, [dispatcher, tables, listener], **options) as balancer:
        moved = []
        for number in range(9):
            with recorder.with_forward_pass(number), torch.no_grad():
                torch.testing.assert_close(model(rows), whole(rows), rtol=1e-6, atol=1e-6)
            moved.append(balancer.step())
        assert any(moved)
        assert all(moved[number] == [] for number in range(9) if number % 3 != 2), "with no overlap a look does it all"
        assert tables.location == dispatcher.location == balancer.location != start
        assert [layers for _, layers in told] == [[layer] for layers in moved for layer in layers]
        assert address == [tensor.data_ptr() for held in expert_weights(model) for tensor in held.values()]
        assert balancer.looks[1].balancedness == pytest.approx(balancer.looks[0].expected), "the same load, moved"
        assert balancer.looks[-1].layers == [], "a load that stays asks for no more"
    with pytest.raises(RuntimeError, match="`step` must be called of a balancer without an error before") as found:
        balancer.step()
    assert "the balancer was closed" in str(found.value.__cause__)


def moving_on_gpus(rank, size):
    moving(rank, size, f"cuda:{rank}")


def noise(rank, size):
    """Let experts stay where they are: for noise, below a cost, above a threshold; and count passes over a window."""
    counts = np.zeros((NUM_LAYERS, 8 * size), np.int64)
    rng = np.random.default_rng(rank)
    even, busy = np.ones(8 * size), np.r_[np.full(4, 9.0), np.ones(8 * size - 4)]

    def looks(load, draw=True, steps=40, **options):
        model = Model(rank, size, num_spare=0, **options)
        model.recorder.stop_record()

        def counted():
            weight = load / load.sum() * 400
            return rng.poisson(weight, (4, *counts.shape)) if draw else np.tile(weight, (4, NUM_LAYERS, 1)).astype(int)

        with Balancer(
            model.weights, counted, model.dispatcher, **{"every": 4, "algorithm": "deepseek"} | options
        ) as it:
            for _ in range(steps):
                it.step()
            it.finish()
            assert it.looks[0].num_passes == 4
            assert all(look.num_passes % 4 == 0 for look in it.looks)
            model.balancer.close()
            return list(it.looks)

    assert all(not look.layers for look in looks(even)), "noise moves nothing"
    assert any(look.layers for look in looks(even, min_gain=0.0, window=1)), "but for a gain of next to nothing"
    moved = looks(busy)
    assert moved[0].layers == sorted(moved[0].layers, key=moved[0].layers.index)
    assert set(moved[0].layers) == set(range(NUM_LAYERS))
    assert moved[0].expected > moved[0].balancedness + 0.1
    assert not any(look.layers for look in moved[1:]), "once is enough"
    assert not any(look.layers for look in looks(busy, move_cost=1e6))
    assert not any(look.layers for look in looks(busy, threshold=moved[0].balancedness - 0.05))
    assert looks(busy, threshold=moved[0].balancedness + 0.05)[0].layers
    assert looks(busy, draw=False, preserve_intragpu_slots=False, steps=4)[0].num_kept == 0
    model = Model(rank, size, num_spare=0)
    both = np.tile(busy.astype(int), (2, NUM_LAYERS, 1))
    assert model.balancer._plan(both, 4).look.layers
    both[1] = 1
    assert not model.balancer._plan(both, 4).look.layers, "what odd passes do not bear out is noise"
    model.balancer.close()


def window(rank, size):
    """Add up the counts of the last looks, and forget those before."""
    model = Model(rank, size, num_spare=0)
    model.balancer.close()
    ones = np.ones((3, NUM_LAYERS, 8 * size), np.int64)
    numbers = itertools.count(1)
    options = {"algorithm": "deepseek", "every": 3, "window": 7, "threshold": 0.1}
    balancer = Balancer(model.weights, lambda: next(numbers) * ones, model.dispatcher, **options)
    seen = []
    plan = balancer._plan
    balancer._plan = lambda halves, *given: (seen.append(halves[:, 0, 0].tolist()), plan(halves, *given))[1]
    for _ in range(15):
        balancer.step()
    balancer.finish()
    sums = [1, 3, 6, 9, 12]
    assert seen == [[2 * size * total, size * total] for total in sums], "even passes, and odd ones, of all ranks"
    balancer.close()


def patience(size, seconds):
    """Return a timeout: four ranks share two cores with other tests, and come three times as late."""
    return seconds if size < 4 else 3 * seconds


def run(model, numbers):
    for number in numbers:
        model.run(number)


def agreement(rank, size):
    """Check errors of one rank that all get, while the model goes on with the old location."""
    model = Model(rank, size, timeout=patience(size, 5.0))
    for name, value in {"min_gain": 0.5, "every": 7, "overlap": 2}.items():
        options = {"algorithm": "deepseek"} | ({name: value} if rank == 1 else {})
        with pytest.raises(ValueError, match=r"`every` must be the same on every rank, got others on ranks \[1\] than"):
            Balancer(model.weights, model.recorder, model.dispatcher, **options)
    weights = [{"up": layer["up"].double() if rank == 1 else layer["up"]} for layer in model.weights]
    with pytest.raises(
        ValueError, match=r"`weights` must be the same on every rank, got others on ranks \[1\] than on"
    ):
        Balancer(weights, model.recorder, model.dispatcher, algorithm="deepseek")

    def fail(model, error, match):
        before = [{name: part.clone() for name, part in layer.items()} for layer in model.weights]
        with pytest.raises(error, match=match):
            run(model, range(30))
        assert model.balancer.location == model.start
        for found, wanted in zip(model.weights, before, strict=True):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), "nothing was written"
        with pytest.raises(RuntimeError, match="`step` must be called of a balancer without an error before"):
            model.run(30)

    model = Model(rank, size, timeout=patience(size, 5.0))
    place = model.balancer._place
    if rank == 1:
        model.balancer._place = lambda weight: place(weight[:, ::-1])
    fail(model, ValueError, r"`location` must be the same on every rank, got others on ranks \[\d.*\] than on rank 0")

    stage = migration.Migration.stage

    def damaging(self, layers):
        arrivals = stage(self, layers)
        arrivals[0].bytes[3] ^= 16
        return arrivals

    if rank == 1:
        migration.Migration.stage = damaging
    text = (
        "rank 1 received other weights for slot" if rank == 1 else r"ranks \[1\] received other weights than were sent"
    )
    fail(Model(rank, size, timeout=patience(size, 5.0), verify=True), CorruptedWeightsError, text)


def goes_on(model, size, lost):
    """Check that ranks that are left have the same location and weights, and serve with them without the lost one."""
    location = model.balancer.location
    model.dispatcher.active_ranks = [rank != lost for rank in range(size)]
    store = dist.distributed_c10d._get_default_store()
    store.set(f"after {model.rank}", location.physical_to_logical_map.tobytes())
    others = [rank for rank in range(size) if rank != lost]
    maps = [np.frombuffer(store.get(f"after {rank}"), np.int64) for rank in others]
    assert all(np.array_equal(maps[0], other) for other in maps)
    there = location.rank_of_slot != lost
    rng = np.random.default_rng((4, model.rank))
    rows, weights = rng.standard_normal((TOKENS, HIDDEN), np.float32), rng.random((TOKENS, TOP_K), np.float32)
    for layer in range(NUM_LAYERS):
        mine = location.rank_of_slot == model.rank
        held = location.physical_to_logical_map[layer, mine]
        for name, part in model.matrices[layer].items():
            assert np.array_equal(model.weights[layer][name].numpy(), part[held]), "slots hold what the tables say"
        alive = np.setdiff1d(
            location.physical_to_logical_map[layer, there], location.physical_to_logical_map[layer, ~there]
        )
        ids = rng.choice(alive, (TOKENS, TOP_K))
        pair = model.matrices[layer]["up"], model.matrices[layer]["down"]
        assert np.array_equal(model.layer(layer, rows, ids, weights), fused_experts(rows, *pair, weights, ids))
    return location


def lose(rank, size, until):
    """Lose rank 1 when it comes to `until`; the others learn who it is in time, and go on."""
    timeout = patience(size, 4.0)
    model = Model(rank, size, timeout=timeout, num_spare=1)
    balancer, last = model.balancer, 1

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == last:
        if until == "look":
            balancer._sum_counts = die
        elif until == "way":
            stage, times = balancer._stage, itertools.count()
            balancer._stage = lambda *given: die() if next(times) == 1 else stage(*given)
        else:
            together = balancer._together
            balancer._together = lambda phase, *given: die() if phase == "arrival" else together(phase, *given)
    moved, numbers = [], itertools.count()
    error = None
    while error is None:
        begin = time.monotonic()
        try:
            moved += model.run(next(numbers))
        except PeerTimeoutError as caught:
            error = caught
    phases = [error.phase]
    if error.phase in ("dispatch", "combine"):  # who is gone is missed there first, if there is a pass in between
        with pytest.raises(PeerTimeoutError) as found:
            balancer.finish()
        phases.append(found.value.phase)
        assert found.value.rank == last, found.value
    seconds = time.monotonic() - begin
    assert error.rank == last, error
    assert seconds < 1.5 * timeout * len(phases) + 3, seconds
    assert phases[-1] == {"look": "look", "way": "arrival", "arrival": "arrival"}[until]
    location = goes_on(model, size, last)
    assert (location != model.start) == bool(moved)
    assert len(set(moved)) == (1 if until == "way" else 0)
    os._exit(0)  # what is left of the group has nobody to say goodbye to


def lost_at_the_look(rank, size):
    lose(rank, size, "look")


def lost_on_the_way(rank, size):
    lose(rank, size, "way")


def lost_at_the_arrival(rank, size):
    lose(rank, size, "arrival")


def late(rank, size):
    """Let rank 1 be late for the arrival: it learns that it is, and all go on with the old location."""
    timeout = patience(size, 3.0)
    model = Model(rank, size, timeout=timeout)
    if rank == 1:
        together = model.balancer._together

        def slowly(phase, *given):
            time.sleep(2 * timeout if phase == "arrival" else 0.0)
            return together(phase, *given)

        model.balancer._together = slowly
    with pytest.raises(PeerTimeoutError) as found:
        run(model, range(60))
    assert found.value.phase == "arrival"
    assert found.value.rank == (1 if rank != 1 else 0)
    assert model.balancer.location == model.start
    dist.barrier()
    for number in range(60, 63):  # the model goes on, with all ranks
        with pytest.raises(RuntimeError, match="without an error before"):
            model.run(number)


def divided(rank, size):
    """Let rank 1 hear nobody at an arrival: whoever decides first decides for all, whether the others heard or not."""
    for first, moves in ((0, True), (1, False)):
        model = Model(rank, size, timeout=20.0)
        peers = model.balancer._peers
        tell, decide = peers.tell, peers.decide

        def told(phase, number, numbers, tell=tell):
            listen = tell(phase, number, numbers)

            def hear():
                found = listen()
                if rank == 1 and phase == "arrival":
                    raise PeerTimeoutError("ranks [0] were not in the arrival", 0, phase, number)
                return found

            return hear

        def decided(name, mine, decide=decide, first=first):
            time.sleep(0.0 if rank == first else 1.5)
            return decide(name, mine)

        peers.tell, peers.decide = told, decided
        moved = []
        if moves:
            while not moved:
                moved = model.run(len(model.counts))
        else:
            with pytest.raises(PeerTimeoutError if rank == 1 else RuntimeError, match="arrival"):
                run(model, range(60))
        assert (model.balancer.location != model.start) == moves
        dist.barrier()
        for layer in range(NUM_LAYERS):
            mine = model.balancer.location.physical_to_logical_map[layer, model.start.rank_of_slot == rank]
            for name, part in model.matrices[layer].items():
                assert np.array_equal(model.weights[layer][name].numpy(), part[mine])
        model.balancer.close()


def slow(rank, size):
    """Let the weights of rank 1 hang on their way while it serves: nothing moves, and who waited knows for whom."""
    timeout = patience(size, 3.0)
    model = Model(rank, size, timeout=timeout)
    if rank == 1:
        stage = model.balancer._stage
        model.balancer._stage = lambda *given: (time.sleep(1.4 * timeout), stage(*given))[1]
    with pytest.raises(RuntimeError) as found:
        run(model, range(60))
    text = f"rank 1 waited {timeout / 2} s in arrival" if rank == 1 else r"for rank \d|ranks .* failed in the arrival"
    assert re.search(text, str(found.value)), found.value
    if rank == 0:
        assert (type(found.value), found.value.rank) == (PeerTimeoutError, 1)
    assert model.balancer.location == model.start
    for number in range(60, 63):  # the model goes on, with all ranks
        with pytest.raises(RuntimeError, match="without an error before"):
            model.run(number)
    dist.barrier()


LOST = (lost_at_the_look, lost_on_the_way, lost_at_the_arrival)
QUICK_AND_SLOW = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", QUICK_AND_SLOW)
def test_experts_follow_a_load_that_drifts(size, run_ranks):
    assert run_ranks(drifting, size) == [0] * size


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("role", [jumping, refined])
def test_experts_follow_other_loads_and_algorithms(role, size, run_ranks):
    assert run_ranks(role, size) == [0] * size


@pytest.mark.parametrize("size", QUICK_AND_SLOW)
@pytest.mark.parametrize("role", [moving, window])
def test_ranks_move_together(role, size, run_ranks):
    assert run_ranks(role, size) == [0] * size


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_move_together_on_gpus(run_ranks):
    assert run_ranks(moving_on_gpus, 2, backend="nccl") == [0, 0]


def test_slots_move_beside_passes_at_the_same_addresses(device):
    """Let one rank exchange two of its slots: on a GPU over the balancer's stream, beside work that reads the slots."""
    old, new = (ExpertLocation.from_mapping([place] * 2) for place in ([0, 1, 2], [0, 2, 1]))
    rows = torch.tensor([[1.0], [2.0], [4.0]], device=device).repeat(1, 1 << 12)
    weights = [[rows.clone(), rows[:, 0].clone()], [rows.clone()]]
    first, number = weights[0]
    tables = ExpertDispatch(old, 0, device)
    balancer = Balancer(weights, lambda: np.ones((2, 3), int), tables, every=1, algorithm="deepseek")
    balancer._plan = lambda _, at: types.SimpleNamespace(location=new, look=BalancerLook(at, 0.5, 0.75, [1, 0], 4, 0))
    moved, seen = [], []
    for _ in range(6):
        seen.append(
            [float(layer[0][int(tables(torch.tensor([[2]], device=device), 0)[0, 0]), 7]) for layer in weights[:1]]
        )
        moved.append(balancer.step())
    assert moved == [[], [], [1], [0], [], []]
    assert seen == [[4.0]] * 6
    assert weights[0][0] is first
    assert first[:, 5].tolist() == number.tolist() == weights[1][0][:, 9].tolist() == [1, 4, 2]
    assert tables.location == new
    balancer.close()


@pytest.mark.parametrize("size", QUICK_AND_SLOW)
def test_noise_and_costs_leave_experts_where_they_are(size, run_ranks):
    assert run_ranks(noise, size) == [0] * size


@pytest.mark.slow
@pytest.mark.parametrize("role", [agreement, late, slow, divided])
@pytest.mark.parametrize("size", [2, 4])
def test_faults_of_one_rank_reach_all(role, size, run_ranks):
    assert run_ranks(role, size) == [0] * size


KILLED = [
    pytest.param(role, size, marks=[] if (role, size) == (lost_on_the_way, 2) else pytest.mark.slow)
    for role in LOST
    for size in (2, 4)
]


@pytest.mark.parametrize(("role", "size"), KILLED)
def test_a_killed_rank_is_named_and_the_others_go_on(role, size, run_ranks):
    assert run_ranks(role, size) == [0, -signal.SIGKILL, 0, 0][:size]


ONE = ExpertLocation.from_mapping([[0, 1, 2]])
TWO = ExpertLocation.from_mapping([[0, 1, 2, 0]], num_gpus=2)
UNEVEN = ExpertLocation.from_mapping([[0, 1, 2, 0]], num_gpus=2, slots_per_rank=[1, 3])
TABLES, WEIGHTS = ExpertDispatch(ONE, 0, "cpu"), [[torch.zeros(3, 2)]]
RECORDER = ExpertDistributionRecorder(1, 3, mode="stat", device="cpu")
BAD = {
    "recorder": ((WEIGHTS, 5, TABLES), {}, TypeError, "`recorder` must be an ExpertDistributionRecorder or a function, got int"),
    "a recorder of nothing": ((WEIGHTS, ExpertDistributionRecorder(1, 3, mode=None, device="cpu"), TABLES), {}, ValueError, "`recorder` must be one with a mode of .*, got None"),
    "a recorder of others": ((WEIGHTS, ExpertDistributionRecorder(1, 4, mode="stat", device="cpu"), TABLES), {}, ValueError, r"`recorder` must be of \(1, 3, 3\) layers, experts and ids, .* got \(1, 4, 4\)"),
    "slots": ((WEIGHTS, int, TABLES), {"physical_ids": True}, ValueError, "`physical_ids` must be False with a function as `recorder`, got True"),
    "dispatchers": ((WEIGHTS, RECORDER, [TABLES, 5]), {}, TypeError, "`dispatchers` must be of an ExpertDispatch or a TokenDispatcher, got int"),
    "no dispatchers": ((WEIGHTS, RECORDER, []), {}, ValueError, "`dispatchers` must be one or more, got none"),
    "two locations": ((WEIGHTS, RECORDER, [TABLES, ExpertDispatch(TWO, 0, "cpu")]), {}, ValueError, "`dispatchers` must be of one location, got"),
    "uneven": ((WEIGHTS, RECORDER, ExpertDispatch(UNEVEN, 0, "cpu")), {"algorithm": "deepseek"}, ValueError, "`dispatchers` must be of ranks with equally many experts, for 'deepseek', got"),
    "no group": (([[torch.zeros(2, 2)]], RECORDER, ExpertDispatch(TWO, 0, "cpu")), {}, ValueError, "`group` must be a process group, or None after"),
    "weights": (([], RECORDER, TABLES), {}, ValueError, "`weights` must be of 1 layers, those of `dispatchers`, got 0"),
    "every": ((WEIGHTS, RECORDER, TABLES), {"every": 0}, ValueError, "`every` must be at least 1, got 0"),
    "window": ((WEIGHTS, RECORDER, TABLES), {"window": 0}, ValueError, "`window` must be at least 1, got 0"),
    "threshold": ((WEIGHTS, RECORDER, TABLES), {"threshold": 0}, ValueError, "`threshold` must be above 0, got 0"),
    "algorithm": ((WEIGHTS, RECORDER, TABLES), {"algorithm": "greedy"}, ValueError, "`algorithm` must be one of 'deepseek', 'refined', got 'greedy'"),
    "max_moves": ((WEIGHTS, RECORDER, TABLES), {"algorithm": "deepseek", "max_moves": 3}, ValueError, "`max_moves` must be None with the algorithm 'deepseek', got 3"),
    "min_gain": ((WEIGHTS, RECORDER, TABLES), {"min_gain": -0.1}, ValueError, "`min_gain` must be at least 0, got -0.1"),
    "move_cost": ((WEIGHTS, RECORDER, TABLES), {"move_cost": "1"}, TypeError, "`move_cost` must be a number, got str"),
    "chunk_layers": ((WEIGHTS, RECORDER, TABLES), {"chunk_layers": 0}, ValueError, "`chunk_layers` must be at least 1, got 0"),
    "overlap": ((WEIGHTS, RECORDER, TABLES), {"overlap": -1}, ValueError, "`overlap` must be at least 0, got -1"),
    "verify": ((WEIGHTS, RECORDER, TABLES), {"verify": 1}, TypeError, "`verify` must be True or False, got 1"),
    "timeout": ((WEIGHTS, RECORDER, TABLES), {"timeout": 0}, ValueError, "`timeout` must be above 0, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        Balancer(*arguments, **options)


def test_bad_arguments_of_the_planners():
    with pytest.raises(ValueError, match=r"`size` must be of shape \(num_ranks, num_ranks\) = \(2, 2\), got shape"):
        pair_ranks([[0, 1, 2], [1, 0, 2]])
    with pytest.raises(ValueError, match="`size` must be at least 0, got -1 at sender 0, receiver 1"):
        pair_ranks([[0, -1], [1, 0]])
    with pytest.raises(ValueError, match="`new` must be of the same sizes, ranks and nodes"):
        preserve_intragpu_slots(ONE, TWO)
    with pytest.raises(ValueError, match=r"`weight` must be of shape \(num_layers, num_experts\) = \(1, 3\), got"):
        layers_worth_moving(np.ones((2, 3)), ONE, ONE)
    balancer = Balancer(WEIGHTS, lambda: np.ones((1, 4), int), TABLES, every=1, algorithm="deepseek")
    with pytest.raises(ValueError, match="`recorder` must be what returns counts of"):
        balancer.step()
    with pytest.raises(ValueError, match=r"`physical_to_logical_map` must be of shape \(L, P\) = \(1, 3\), got"):
        ONE.with_places([[0, 1]])
    with pytest.raises(ValueError, match="`module` must be what has one block with a dispatcher for each of 0 layers"):
        expert_weights(torch.nn.Linear(2, 2))
