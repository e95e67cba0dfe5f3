"""The simulation: numbers by hand and by loops, scenarios replayed with public functions, files and the command."""

import contextlib
import json

import numpy as np
import pytest
import torch

from numba_moe.cli import main
from numba_moe.placement import ExpertLocation, balancedness, plan_migration, rank_loads, rebalance_experts, simulate
from numba_moe.placement.simulate_command import lines_of, over_time, table, verdict
from numba_moe.placement.simulation import count_moves, replay, steps_to_pay
from numba_moe.placement.traces import load_trace

# Experts 0 and 1 have all the load, and share a rank where expert i is in slot i.
PAIR = np.tile([6.0, 6.0, 0.0, 0.0], (3, 1, 1))


def test_replay_by_hand():
    weight = np.array([[[8.0, 4.0, 2.0, 2.0]]])
    found = replay(weight, ExpertLocation.trivial(1, 4, num_gpus=4, num_nodes=2))
    assert found.balancedness.tolist() == [[(4 + 1e-5) / (8 + 1e-5)]]
    assert found.rank_load.tolist() == [[8, 4, 2, 2]]
    assert found.busiest.tolist() == [8]
    assert found.crossing_gpus.tolist() == [12], "three of four tokens live elsewhere"
    assert found.crossing_nodes.tolist() == [8]

    # Expert 0 is on every rank; 1 on the first and the last, one on each node; 2 and 3 on one.
    spread = ExpertLocation.from_mapping([[0, 1, 0, 2, 0, 3, 0, 1]], num_gpus=4, num_nodes=2)
    found = replay(np.concatenate([weight, 2 * weight]), spread)
    assert found.balancedness.tolist() == [[1], [1]]
    assert found.rank_load.tolist() == [[4] * 4, [8] * 4]
    assert found.crossing_gpus.tolist() == [0 + 2 + 1.5 + 1.5, 10]
    assert found.crossing_nodes.tolist() == [0 + 0 + 1 + 1, 4]


def test_tokens_that_live_on_known_ranks_by_hand():
    weight = np.array([[[[3.0, 1.0], [0.0, 4.0]]]])  # expert 0: three tokens of rank 0, one of rank 1
    assert replay(weight, ExpertLocation.trivial(1, 2, num_gpus=2)).crossing_gpus.tolist() == [1]
    both = replay(weight, ExpertLocation.trivial(1, 2, 4, num_gpus=2, num_nodes=2))
    assert both.crossing_gpus.tolist() == [1 + 2], "a replica takes half, of its rank first"
    assert both.crossing_nodes.tolist() == [3]
    assert both.busiest.tolist() == [4]


def random_location(rng, num_layers, num_experts, num_gpus):
    num_slots = max(num_experts, num_gpus) + int(rng.integers(0, 8))
    places = np.r_[np.arange(num_experts), rng.integers(0, num_experts, num_slots - num_experts)]
    places = [rng.permutation(places) for _ in range(num_layers)]
    sizes = 1 + rng.multinomial(num_slots - num_gpus, np.full(num_gpus, 1 / num_gpus))
    num_nodes = int(rng.integers(1, num_gpus + 1))
    return ExpertLocation.from_mapping(places, num_experts, num_gpus, num_nodes, slots_per_rank=sizes)


def crossing_by_loops(tokens, place, location):
    """Hand out the tokens of one expert [R] to its slots: own rank first, then own node; count what is left."""
    slots = np.flatnonzero(place)
    room = dict.fromkeys(slots.tolist(), tokens.sum() / len(slots))
    node_of = {int(rank): int(node) for rank, node in zip(location.rank_of_slot, location.node_of_slot, strict=True)}
    left, crossing = tokens.astype(float), []
    for near in (
        lambda slot, rank: location.rank_of_slot[slot] == rank,
        lambda slot, rank: node_of[rank] == location.node_of_slot[slot],
    ):
        for rank in range(len(left)):
            for slot in room:
                if near(slot, rank):
                    served = min(left[rank], room[slot])
                    left[rank] -= served
                    room[slot] -= served
        crossing.append(left.sum())
    return crossing


@pytest.mark.parametrize("known_ranks", [False, True])
def test_replay_by_loops(known_ranks):
    rng = np.random.default_rng(0)
    for _ in range(60):
        num_layers, num_experts, num_gpus = 2, int(rng.integers(1, 9)), int(rng.integers(1, 6))
        location = random_location(rng, num_layers, num_experts, num_gpus)
        tokens = rng.integers(0, 30, (3, num_layers, num_experts, num_gpus)).astype(float)
        if not known_ranks:
            tokens[:] = tokens[..., :1]
        total = tokens.sum(axis=3)
        found = replay(tokens if known_ranks else total, location)
        places, sizes = location.physical_to_logical_map, location.slots_per_rank
        loads = rank_loads(total, places, num_gpus, slots_per_rank=sizes)
        np.testing.assert_allclose(found.balancedness, balancedness(total, places, num_gpus, slots_per_rank=sizes))
        np.testing.assert_allclose(found.rank_load, loads.sum(axis=1))
        np.testing.assert_allclose(found.busiest, loads.max(axis=2).sum(axis=1))
        expected = np.zeros((3, 2))
        for step, layer, expert in np.ndindex(total.shape):
            expected[step] += crossing_by_loops(tokens[step, layer, expert], places[layer] == expert, location)
        np.testing.assert_allclose(found.crossing_gpus, expected[:, 0], atol=1e-9)
        np.testing.assert_allclose(found.crossing_nodes, expected[:, 1], atol=1e-9)


def test_moves_by_hand():
    # Rank 0 needs expert 2 in two slots, from rank 1 of its node; rank 2 needs 0 and 1, from the other node.
    old = ExpertLocation.from_mapping([[0, 1, 2, 3, 3, 2], [0, 1, 2, 3, 3, 2]], num_gpus=3, num_nodes=2)
    new = ExpertLocation.from_mapping([[2, 2, 2, 3, 0, 1], [1, 0, 2, 3, 3, 2]], num_gpus=3, num_nodes=2)
    assert old.node_of_slot.tolist() == [0, 0, 0, 0, 1, 1]
    assert count_moves(old, new) == (3, 2, 2)
    assert count_moves(old, old) == (0, 0, 0)
    # The only replica of expert 0 goes to three ranks.
    old = ExpertLocation.from_mapping([[0, 1, 2, 3, 2, 3, 2, 3]], num_gpus=4)
    new = ExpertLocation.from_mapping([[0, 1, 0, 2, 0, 3, 0, 3]], num_gpus=4)
    assert count_moves(old, new) == (3, 0, 3)


def test_steps_to_pay():
    assert steps_to_pay(20, 30, 2) == 2
    assert steps_to_pay(30, 30, 2) == 2
    assert steps_to_pay(31, 30, 2) == 3
    assert steps_to_pay(0, -5, 2) == 0
    assert steps_to_pay(1, 0, 2) is None


def test_scenarios_by_hand():
    options = {"bytes_per_expert": 10**9, "step_ms": 15.0, "bandwidth": 25}
    found = simulate(PAIR, 4, 1, 2, 2, algorithms=["refined"], intervals=[0, 1, 2], **options)
    stay, once, every, late = found.scenarios
    assert stay.step_time.tolist() == [2, 2, 2]
    assert (stay.bytes_moved, stay.move_ms, stay.saved_ms, stay.pays_after) == (0, 0, 0, None)
    assert stay.rank_load.tolist() == [[2, 0]] * 3
    assert [s.step_time.tolist() for s in (once, every, late)] == [[1, 1, 1], [2, 1, 1], [2, 2, 1]]
    assert [[r.step for r in s.rebalances] for s in (once, every, late)] == [[0], [1, 2], [2]]
    # Two experts change places: each rank sends one and receives one, 1 GB at 25 GB/s.
    assert once.rebalances[0][:5] == (0, 2, 2, 1, 40.0)
    assert once.saved_ms == pytest.approx(45)
    assert once.pays_after == 3
    assert every.rebalances[1] == (2, 0, 0, 0, 0.0, 0.0, 0)
    assert (every.bytes_moved, every.move_ms, every.pays_after) == (2 * 10**9, 40, 3)
    assert every.saved_ms == pytest.approx(30)
    assert late.rebalances[0].saved_ms == pytest.approx(15)
    assert late.pays_after == 3
    assert found.best is once
    assert [s.time for s in found.scenarios] == pytest.approx([2, 1, 4 / 3, 5 / 3])
    assert stay.location == ExpertLocation.trivial(1, 4, num_gpus=2, num_nodes=2)
    for scenario in (once, every, late):
        assert replay(PAIR, scenario.location).busiest.tolist() == [6, 6, 6]
    assert [s.held_out for s in found.scenarios] == [2, 1, 1, 1.5], "of the last two steps"
    assert {s.bytes_per_rank for s in found.scenarios} == {2 * 10**9}
    assert verdict(found, 3).splitlines() == [
        "Best: refined, 4 slots, once, 1.000 times the time of perfect balance in hindsight. It pays after 3 steps.",
        "On steps that it is not fitted to it takes 1.000, and staying 2.000.",
    ]


def test_a_move_that_costs_more_than_it_saves():
    options = {"algorithms": ["refined"], "bytes_per_expert": 10**9, "step_ms": 15}
    found = simulate(PAIR[:1], 4, 1, 1, 2, **options)  # 20 ms to move, 15 ms saved
    assert found.best is found.scenarios[0]
    assert found.scenarios[1].pays_after == 2
    expected = "Best over 1 step: stay, 4 slots. With more like these, refined, 4 slots, once pays after 2."
    assert verdict(found, 1) == expected
    balanced = simulate(np.ones((2, 1, 4)), 4, 1, 1, 2, **{**options, "algorithms": ["deepseek"]})
    assert balanced.scenarios[1].rebalances[0].num_moved > 0
    assert balanced.scenarios[1].pays_after is None
    assert verdict(balanced, 2) == "Best: stay, 4 slots. No rebalance takes less time."


def test_without_costs_the_time_alone_counts():
    found = simulate(PAIR, 4, 1, 1, 2, algorithms=["refined"])
    assert found.best is found.scenarios[1]
    assert found.best[10:14] == (None, None, None, None)
    assert found.best.rebalances[0][4:] == (None, None, None)
    assert "give --bytes-per-expert and --step-ms" in verdict(found, 3)


@pytest.mark.parametrize("algorithm", ["deepseek", "refined"])
def test_scenarios_are_what_public_functions_say(algorithm):
    rng = np.random.default_rng(1)
    loads = rng.integers(0, 100, (5, 3, 8)).astype(float)
    costs = {"bytes_per_expert": 3 * 10**6, "step_ms": 2.0, "bandwidth": 10.0}
    current = ExpertLocation.from_mapping([rng.permutation(np.r_[:8, :4]) for _ in range(3)], 8, 4, 2)
    found = simulate(loads, 12, 2, 2, 4, algorithms=[algorithm], intervals=[2], current=current, **costs)
    location, expected = current, [current] * 2
    for first in (0, 2, 3):
        options = {"current": location} if algorithm == "refined" else {}
        weight = loads[first : first + 2].sum(axis=0)
        location = ExpertLocation.from_counts(weight, 12, 2, 2, 4, algorithm=algorithm, **options)
        expected += [location] * (2 if first == 0 else 1)
    scenario = found.scenarios[1]
    assert scenario.location == expected.pop()
    peaks = np.zeros((2, 5))
    for step, (weight, now) in enumerate(zip(loads, expected, strict=True)):
        for index, places in enumerate((current.physical_to_logical_map, now.physical_to_logical_map)):
            peaks[index, step] = rank_loads(weight, places, 4).max(axis=1).sum()
        np.testing.assert_allclose(scenario.balancedness[step], balancedness(weight, now.physical_to_logical_map, 4))
        summed = rank_loads(weight, now.physical_to_logical_map, 4).sum(axis=0)
        np.testing.assert_allclose(scenario.rank_load[step], summed / summed.mean())
    np.testing.assert_allclose(scenario.step_time, peaks[1] / (loads.sum(axis=(1, 2)) / 4))
    assert scenario.time == pytest.approx(peaks[1].sum() / (loads.sum() / 4))
    ms = 2.0 / (loads.sum() / 4 / 5)
    assert scenario.saved_ms == pytest.approx((peaks[0] - peaks[1]).sum() * ms)

    assert [r.step for r in scenario.rebalances] == [2, 4]
    for rebalance, old, new in zip(
        scenario.rebalances, (expected[0], expected[2]), (expected[2], expected[4]), strict=True
    ):
        sent, received, across = np.zeros(4, int), np.zeros(4, int), 0
        for layer in range(3):
            plan = plan_migration(old, new, layer)
            for rank, source in {(slot // 3, int(source)) for slot, source in enumerate(plan)}:
                sent[source // 3] += rank != source // 3
                received[rank] += rank != source // 3
                across += rank // 2 != source // 6
        assert rebalance[1:4] == (received.sum(), across, max(sent.max(), received.max()))
        assert rebalance.move_ms == pytest.approx(rebalance.busiest_rank * 3e6 / 10e9 * 1e3)
        steps = slice(rebalance.step, rebalance.step + 2)
        before = sum(rank_loads(w, old.physical_to_logical_map, 4).max(axis=1).sum() for w in loads[steps])
        assert rebalance.saved_ms == pytest.approx((before - peaks[1, steps].sum()) * ms)
    assert scenario.bytes_moved == 3 * 10**6 * sum(r.num_moved for r in scenario.rebalances)


def test_one_rebalance_and_then_staying():
    loads = np.concatenate([PAIR, PAIR[..., ::-1]])  # experts 0 and 1 are busy for three steps, then 2 and 3
    options = {"algorithms": ["deepseek"], "intervals": [2], "bytes_per_expert": 10**9, "step_ms": 15.0}
    _, every, once = simulate(loads, 4, 1, 1, 2, once_after=[2], **options).scenarios
    assert (once.then_stays, once.interval, once.name) == (True, 2, "deepseek, 4 slots, once after 2 steps")
    assert [r.step for r in once.rebalances] == [2]
    assert [r.step for r in every.rebalances] == [2, 4]
    placed = ExpertLocation.from_counts(loads[:2].sum(axis=0), 4, 1, 1, 2)
    assert once.location.physical_to_logical_map.tolist() == placed.physical_to_logical_map.tolist()
    assert once.step_time.tolist() == [2, 2, 1, 1, 1, 1]
    assert once.held_out == 1
    with pytest.raises(ValueError, match="`once_after` must be at most the number of steps - 1 = 5, got 6"):
        simulate(loads, 4, 1, 1, 2, once_after=[6])
    with pytest.raises(ValueError, match="`once_after` must be at least 1, got 0"):
        simulate(loads, 4, 1, 1, 2, once_after=[0])


@pytest.mark.parametrize("algorithm", ["deepseek", "refined"])
def test_held_out_is_what_public_functions_say(algorithm):
    rng = np.random.default_rng(4)
    loads = rng.pareto(1, (20, 2, 16)) + 0.1
    stay, once = simulate(loads, 20, 1, 1, 4, algorithms=[algorithm]).scenarios
    options = {"current": ExpertLocation.trivial(2, 16, 20, num_gpus=4)} if algorithm == "refined" else {}
    mean = loads[10:].sum() / 4
    for scenario, weight in ((stay, None), (once, loads[:10])):
        places = ExpertLocation.trivial(2, 16, 20, num_gpus=4).physical_to_logical_map
        if weight is not None:
            places = rebalance_experts(weight, 20, 1, 1, 4, algorithm=algorithm, **options).physical_to_logical_map
        assert scenario.held_out == pytest.approx(rank_loads(loads[10:], places, 4).max(axis=2).sum() / mean)
    assert simulate(loads[:1], 20, 1, 1, 4).best.held_out is None


def test_the_verdict_says_what_more_slots_cost():
    loads = np.tile([1.0, 1.0, 9.0, 1.0], (4, 1, 1))
    found = simulate(loads, [4, 6], 1, 1, 2, algorithms=["deepseek"], bytes_per_expert=10**9, step_ms=1000.0)
    best, held_out, memory = verdict(found, 4).splitlines()
    assert best.startswith("Best: deepseek, 6 slots, once, 1.167 times")
    assert held_out == "On steps that it is not fitted to it takes 1.167, and staying 1.667."
    assert memory == (
        "It needs 2 more slots of a layer than 4, 1.00 GB on each GPU; without them the best is stay, 4 slots, with 1.667."
    )


def test_the_verdict_says_if_deepseek_is_no_worse():
    found = simulate(PAIR, 4, 1, 1, 2)
    refined = found._replace(best=found.scenarios[2])
    assert verdict(refined, 3).splitlines()[-1] == "Deepseek is no worse: 1.000."
    one = simulate(PAIR[:1], 4, 1, 1, 2)
    assert verdict(one, 1).splitlines()[-1] == "There are no other steps to try it on: record more than one."


@pytest.mark.parametrize("width", [70, 90, 120, None])
def test_the_table_fits_a_terminal(width):
    costs = {"bytes_per_expert": 10**9, "step_ms": 15.0}
    for options in ({}, costs):
        text = table(simulate(PAIR, 4, 1, 1, 2, **options), float(PAIR.sum()), width)
        assert width is None or max(map(len, text.splitlines())) <= width
        assert ("(no room for off node," in text) == (width in ((70, 90, 120) if options else (70, 90)))
        header = " ".join(text.splitlines()[:3])
        assert ("weights" in header) == bool(options), "only columns with something in them"
        assert "not" in header
        assert "fitted" in header


def test_a_picture_has_room_for_few_lines():
    loads = np.random.default_rng(5).pareto(1, (16, 1, 8)) + 0.1
    found = simulate(loads, [8, 12, 16], 1, 1, 4, intervals=[1, 2, 4], once_after=[4])
    drawn = lines_of(found)
    assert len(drawn) == 6 < len(found.scenarios)
    assert drawn == [scenario for scenario in found.scenarios if any(scenario is other for other in drawn)]
    assert any(scenario is found.best for scenario in drawn)
    left = [s.held_out for s in found.scenarios if all(s is not other for other in drawn)]
    assert max(s.held_out for s in drawn[1:] if s.interval is not None) <= min(left)


def test_the_ticks_of_a_simulation_are_as_many_as_it_says(monkeypatch):
    told = []

    @contextlib.contextmanager
    def ticking(total, noun):
        told.append((total, noun))
        yield lambda: told.append(1)

    monkeypatch.setattr("numba_moe.placement.simulation.ticking", ticking)
    loads = np.random.default_rng(6).pareto(1, (9, 3, 8)) + 0.1
    simulate(loads, [8, 12], 1, 1, 4, intervals=[0, 2], once_after=[3], progress=True)
    total = 2 * 2 * 3 * (2 + 5 + 1)
    assert told == [(total, "layer"), *[1] * total]


def test_every_number_of_slots_is_compared_with_staying():
    found = simulate(PAIR, [4, 6], 1, 1, 2, intervals=[1, 2])
    names = [(s.algorithm, s.num_replicas, s.interval) for s in found.scenarios]
    tried = [("deepseek", 1), ("deepseek", 2), ("refined", 1), ("refined", 2)]
    assert names == [(a, size, i) for size in (4, 6) for a, i in [("stay", None), *tried]]
    assert found.scenarios[5].location.num_physical_experts == 6


def test_max_moves():
    rng = np.random.default_rng(2)
    loads = rng.pareto(1, (1, 2, 16))
    current = ExpertLocation.trivial(2, 16, 20, num_gpus=4)
    found = simulate(loads, 20, 1, 1, 4, algorithms=["refined"], current=current, max_moves=2)
    changed = found.scenarios[1].location.physical_to_logical_map != current.physical_to_logical_map
    assert (changed.sum(axis=1) <= 2).all()
    assert changed.any()


def test_steps_without_load_are_balanced():
    loads = np.concatenate([PAIR[:1], 0 * PAIR[:1]])
    stay = simulate(loads, 4, 1, 1, 2).scenarios[0]
    assert stay.step_time.tolist() == [2, 1]
    assert stay.rank_load.tolist() == [[2, 0], [1, 1]]
    assert stay.time == 2


SHORT = ExpertLocation.trivial(1, 4, num_gpus=2)
IDLE = ExpertLocation.from_mapping([[0, 1, 2, 3, -1]], 4, 2, slots_per_rank=[4, 1])
BAD = {
    "no load": ({"weight": np.zeros((1, 4))}, ValueError, "`weight` must be above 0 somewhere, got 0 everywhere"),
    "negative": ({"weight": -PAIR}, ValueError, "`weight` must be at least 0, got -6.0 at step 0, layer 0, expert 0"),
    "negative of a rank": ({"weight": -PAIR[..., None]}, ValueError, "got -6.0 at step 0, layer 0, expert 0, rank 0"),
    "other ranks": ({"weight": np.ones((1, 1, 4, 3))}, ValueError, r"`weight` must be of 2 ranks, got shape \(1, 1, 4, 3\)"),
    "algorithm": ({"algorithms": ["best"]}, ValueError, "`algorithms` must be one of 'deepseek', 'refined', got 'best'"),
    "a long interval": ({"intervals": [3]}, ValueError, "`intervals` must be at most the number of steps - 1 = 2, got 3"),
    "few slots": ({"num_replicas": [4, 3]}, ValueError, "`num_replicas` must be at least num_experts = 4, got 3"),
    "sizes that do not divide": ({"num_replicas": 5}, ValueError, "`num_gpus` must be a divisor of num_replicas = 5, got 2"),
    "bytes": ({"bytes_per_expert": 0}, ValueError, "`bytes_per_expert` must be at least 1, got 0"),
    "time": ({"step_ms": -1}, ValueError, "`step_ms` must be above 0, got -1"),
    "bandwidth": ({"bandwidth": "fast"}, TypeError, "`bandwidth` must be a number, got str"),
    "current": ({"current": SHORT, "num_replicas": 6}, ValueError, r"`current` must be of \(layers, experts, slots, ranks, nodes\) = \(1, 4, 6, 2, 1\), got \(1, 4, 4, 2, 1\)"),
    "no slots": ({"num_replicas": []}, ValueError, "`num_replicas` must be one number or more, got none"),
    "one interval": ({"intervals": 1}, TypeError, "`intervals` must be a sequence, got int"),
    "one algorithm": ({"algorithms": "refined"}, TypeError, "`algorithms` must be a sequence, got str"),
    "idle ranks": ({"current": IDLE, "num_replicas": 5}, ValueError, "`current` must be a location with experts on every rank, got"),
    "no location": ({"current": [[0]]}, TypeError, "`current` must be an ExpertLocation, got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changes, error, message = BAD[name]
    sizes = {"num_replicas": 4, "num_groups": 1, "num_nodes": 1, "num_gpus": 2}
    with pytest.raises(error, match=message):
        simulate(**{"weight": PAIR, **sizes, **changes})


def test_a_move_that_pays_after_more_steps_than_there_are_numbers_never_pays():
    best = simulate(PAIR, 4, 1, 1, 2, step_ms=1e-300, bytes_per_expert=2**60).best
    assert best.pays_after is None


IDS = np.array([[[0, 1], [1, 2], [2, -1]], [[3, 0], [3, 1], [3, 7]]])  # [L, T, K]
COUNTS = [[1, 2, 2, 0], [1, 1, 0, 3]]


def test_traces_by_hand(tmp_path):
    np.savez(tmp_path / "counts.npz", logical_count=np.array([COUNTS]))
    torch.save({"logical_count": torch.tensor(COUNTS)}, tmp_path / "counts.pt")
    (tmp_path / "ids.json").write_text(json.dumps({"topk_ids": IDS.tolist()}))
    np.savez(tmp_path / "layers.npz", first=IDS[0], second=IDS[1].astype(np.int16), logits=np.ones((3, 4)))
    assert load_trace(tmp_path / "counts.npz").tolist() == [COUNTS]
    assert load_trace(tmp_path / "counts.pt").tolist() == [COUNTS]
    assert load_trace(tmp_path / "ids.json", num_experts=4).tolist() == [COUNTS]
    assert load_trace(tmp_path / "layers.npz", num_experts=4).tolist() == [COUNTS]
    assert load_trace(tmp_path / "ids.json").shape == (1, 2, 8)
    halves = load_trace(tmp_path / "ids.json", num_experts=4, tokens_per_step=2)
    assert halves.tolist() == [[[1, 2, 1, 0], [1, 1, 0, 2]], [[0, 0, 1, 0], [0, 0, 0, 1]]]

    np.savez(tmp_path / "homes.npz", topk_ids=np.stack([IDS, IDS]), rank_of_token=[0, 1, 1])
    found = load_trace(tmp_path / "homes.npz", num_experts=4, num_gpus=3)
    assert found.shape == (2, 2, 4, 3)
    assert found[1, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 2, 0], [0, 0, 0]]
    cut = load_trace(tmp_path / "homes.npz", num_experts=4, num_gpus=2, tokens_per_step=2)
    assert cut[:, 0].sum(axis=2).tolist() == [[1, 2, 1, 0], [0, 0, 1, 0]] * 2
    assert cut[1, 0, 2].tolist() == [0, 1]


def test_traces_that_are_none(tmp_path):
    np.savez(tmp_path / "counts.npz", logical_count=np.array(COUNTS))
    with pytest.raises(ValueError, match=r"`num_experts` must be left out for counts\.npz, which has counts, got 4"):
        load_trace(tmp_path / "counts.npz", num_experts=4)
    np.savez(tmp_path / "homes.npz", topk_ids=IDS, rank_of_token=[0, 2, 1])
    with pytest.raises(ValueError, match=r"`rank_of_token` must be in \[0, 2\), got 2 at step 0, token 1"):
        load_trace(tmp_path / "homes.npz", num_gpus=2)
    np.savez(tmp_path / "homes.npz", topk_ids=IDS, rank_of_token=[[0, 1]])
    with pytest.raises(
        ValueError, match=r"`rank_of_token` must be of shape \(steps, tokens\) = \(1, 3\), got shape \(1, 2\)"
    ):
        load_trace(tmp_path / "homes.npz")
    np.savez(tmp_path / "layers.npz", first=IDS[0], second=IDS[1, :2])
    with pytest.raises(ValueError, match=r"all of a shape, got layers\.npz with shapes \[\(2, 2\), \(3, 2\)\]"):
        load_trace(tmp_path / "layers.npz")
    (tmp_path / "map.json").write_text('{"physical_to_logical_map": [[0]]}')
    with pytest.raises(ValueError, match=r"`path` must be a file with logical_count or topk_ids, got map\.json"):
        load_trace(tmp_path / "map.json")


def test_periods():
    lines = over_time({"a": np.arange(17.0)}, "balance").splitlines()
    assert lines[0].split() == ["balance", "0-2", "3-4", "5-6", "7-8", "9-10", "11-12", "13-14", "15-16"]
    assert lines[2].split() == ["a", "1.000", "3.500", "5.500", "7.500", "9.500", "11.500", "13.500", "15.500"]


@pytest.fixture
def dump(tmp_path):
    np.savez(tmp_path / "dump.npz", logical_count=PAIR.astype(int))
    return tmp_path / "dump.npz"


def test_command(dump, tmp_path, capsys):
    out, numbers = tmp_path / "best.json", tmp_path / "numbers.json"
    options = "--gpus 2 --nodes 2 --algorithm refined --interval once,1 --bytes-per-expert 1e9 --step-ms 15 --detail"
    assert main(["rebalance", str(dump), *options.split(), "--json", str(numbers), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert printed.startswith("dump.npz: 3 steps, 1 layer, 4 experts\n")
    for row in (
        "stay 4 - 0.500 0.500 2.000 50.0 50.0 0 0 0.00 0.0 0.0 - 2.000 2.00",
        "refined 4 once 1.000 1.000 1.000 50.0 50.0 1 2 2.00 20.0 45.0 2 1.000 2.00",
        "refined 4 1 0.833 0.833 1.333 50.0 50.0 2 2 2.00 20.0 30.0 2 1.000 2.00",
    ):
        assert row.split() in rows
    assert ["refined,", "4", "slots,", "every", "1", "step", "0.500", "1.000", "1.000"] in rows
    assert ["rank", "0", "2.000", "2.000", "2.000"] in rows
    assert ["rank", "0", "1.000", "1.000", "1.000"] in rows
    *_, best, held_out = printed.splitlines()
    assert best.endswith("once, 1.000 times the time of perfect balance in hindsight. It pays after 2 steps.")
    assert held_out == "On steps that it is not fitted to it takes 1.000, and staying 2.000."
    location = ExpertLocation.load(out)
    assert (location.num_gpus, location.num_nodes) == (2, 2)
    assert rank_loads(PAIR[0], location.physical_to_logical_map, 2).tolist() == [[6, 6]]
    report = json.loads(numbers.read_text())
    assert report["scenarios"][report["best"]]["step_time"] == [1, 1, 1]
    assert report["scenarios"][2]["rebalances"][0]["move_ms"] == 20


@pytest.mark.parametrize(
    ("dtype", "count"), [("uint8", 255), ("int16", 30_000), ("uint32", 2**32 - 1), ("int64", 2**63 // 24)]
)
def test_percentages_are_of_counts_of_any_size(dtype, count, tmp_path, capsys):
    """No sum is in the dtype of the file, where it would wrap round."""
    np.savez(tmp_path / "counts.npz", logical_count=np.full((3, 1, 8), count, dtype))
    assert main(["rebalance", str(tmp_path / "counts.npz"), "--gpus", "2", "--algorithm", "refined"]) == 0
    [stay] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("stay  ")]
    assert stay[2:8] == ["-", "1.000", "1.000", "1.000", "50.0", "0.0"]


def test_command_goes_on_from_a_location(dump, tmp_path, capsys):
    spread = ExpertLocation.from_mapping([[0, 2, 3, 1, 2, 3]], num_gpus=2)
    spread.save(tmp_path / "now.npz")
    options = ["--gpus", "2", "--location", str(tmp_path / "now.npz"), "--out", str(tmp_path / "best.pt")]
    assert main(["rebalance", str(dump), *options]) == 0
    assert "Best: stay, 6 slots. No rebalance takes less time." in capsys.readouterr().out
    assert ExpertLocation.load(tmp_path / "best.pt") == spread


def test_command_searches(dump, capsys):
    assert main(["rebalance", str(dump), "--gpus", "2", "--search", "--algorithm", "deepseek"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    for row in (["stay", "4", "-"], ["deepseek", "6", "1"], ["deepseek", "8", "1"]):
        assert row in rows
    assert not any(row[2:] == ["once"] for row in rows)


def test_command_takes_whole_floats_and_one_rebalance(tmp_path, capsys):
    np.savez(tmp_path / "floats.npz", logical_count=PAIR)
    assert main(["rebalance", str(tmp_path / "floats.npz"), "--gpus", "2", "--once-after", "1"]) == 0
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert ["deepseek", "4", "once", "after", "1"] in rows
    assert not any(row[2:4] == ["once", "1.000"] for row in rows)
    np.savez(tmp_path / "halves.npz", logical_count=PAIR + 0.5)
    assert main(["rebalance", str(tmp_path / "halves.npz"), "--gpus", "2"]) == 2
    assert "`logical_count` must be whole numbers, got 6.5" in capsys.readouterr().err


def test_command_draws(dump, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert main(["rebalance", str(dump), "--gpus", "2", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_matplotlib_is_imported_for_plots_alone(dump, without_simulator):
    program = "import sys; from numba_moe.cli import main; main(sys.argv[1:]); print('matplotlib' in sys.modules)"
    assert without_simulator(program, "rebalance", str(dump), "--gpus", "2").endswith("\nFalse\n")


WRONG = {
    "no file": (["nothing.npz", "--gpus", "2"], "No such file"),
    "another kind": (["dump.txt", "--gpus", "2"], "`DUMP` must be a .npy, .npz, .safetensors, .pt, .json or .csv file, got dump.txt"),
    "no header": (["dump.csv", "--gpus", "2"], "`DUMP` must be a file with the header layer_id,expert_id,count"),
    "no folder": (["dump.npz", "--gpus", "2", "--json", "gone/x.json"], "`--json` must be in a folder, got no folder for gone/x.json"),
    "a folder": (["dump.npz", "--gpus", "2", "--json", "."], "`--json` must be a file, got the folder ."),
    "plot": (["dump.npz", "--gpus", "2", "--plot", "x.txt"], "`--plot` must be one of '.png', '.svg', '.pdf', got '.txt'"),
    "nodes": (["dump.npz", "--gpus", "2", "--nodes", "0"], "`--nodes` must be at least 1, got 0"),
    "groups": (["dump.npz", "--gpus", "2", "--groups", "0"], "`--groups` must be at least 1, got 0"),
    "replicas": (["dump.npz", "--gpus", "2", "--replicas", "3"], "`--replicas` must be at least num_experts = 4, got 3"),
    "moves": (["dump.npz", "--gpus", "2", "--max-moves", "-1"], "`--max-moves` must be at least 0, got -1"),
    "time": (["dump.npz", "--gpus", "2", "--step-ms", "nan"], "`--step-ms` must be a finite number that float32 holds, got nan"),
    "bandwidth": (["dump.npz", "--gpus", "2", "--bandwidth", "inf"], "`--bandwidth` must be a finite number that float32 holds, got inf"),
    "experts": (["dump.npz", "--gpus", "2", "--num-experts", "0"], "`--num-experts` must be at least 1, got 0"),
    "steps of tokens": (["dump.npz", "--gpus", "2", "--tokens-per-step", "2"], "`--tokens-per-step` must be left out for dump.npz"),
    "location": (["dump.npz", "--gpus", "2", "--location", "dump.txt"], "`--location` must be one of"),
    "counts as a location": (["dump.npz", "--gpus", "2", "--location", "dump.npz"], "`--location` must be a file with physical_to_logical_map, got dump.npz"),
    "zeros": (["zeros.npz", "--gpus", "2"], "`DUMP` must be above 0 somewhere, got 0 everywhere"),
    "an overflow": (["large.npz", "--gpus", "2"], "`logical_count` must be counts whose sum is at most"),
    "out": (["dump.npz", "--gpus", "2", "--out", "x.csv"], "`--out` must be one of '.json', '.npz', '.pt', got '.csv'"),
    "many GPUs": (["dump.npz", "--gpus", "100000"], "`--gpus` must be few enough for 4 experts"),
    "many slots": (["dump.npz", "--gpus", "2", "--replicas", "100000"], "`--replicas` must be few enough for 4 experts"),
    "GPUs": (["dump.npz", "--gpus", "0"], "`--gpus` must be at least 1, got 0"),
    "interval": (["dump.npz", "--gpus", "2", "--interval", "5"], "`--interval` must be at most the number of steps - 1 = 2"),
    "algorithm": (["dump.npz", "--gpus", "2", "--algorithm", "best"], "`--algorithm` must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_command_refuses(name, dump, monkeypatch, capsys):
    monkeypatch.chdir(dump.parent)
    for file in ("dump.csv", "dump.txt"):
        (dump.parent / file).write_text("1")
    np.savez(dump.parent / "zeros.npz", logical_count=np.zeros((1, 4), int))
    np.savez(dump.parent / "large.npz", logical_count=np.full((1, 4), 2**62))
    arguments, message = WRONG[name]
    assert main(["rebalance", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("numba-moe rebalance: ")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize("named", [True, False])
def test_the_ranks_of_a_map_alone_are_those_of_the_command(named, dump, capsys):
    places, path = [[3, 2, 1, 0]], dump.parent / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": places} if named else places))
    assert ExpertLocation.load(path, num_gpus=2).physical_to_logical_map.tolist() == places
    assert main(["rebalance", str(dump), "--gpus", "2", "--location", str(path)]) == 0
    assert capsys.readouterr().out.startswith("dump.npz: ")
    assert main(["rebalance", str(dump), "--gpus", "5", "--location", str(path)]) == 2
    assert "`--gpus` must be at most the number of slots = 4, got 5" in capsys.readouterr().err


def test_command_reads_our_csv(tmp_path, capsys):
    (tmp_path / "dump.csv").write_text("layer_id,expert_id,count\n0,0,6\n0,1,6\n0,2,1\n")
    sizes = ["--num-layers", "2", "--num-experts", "4"]
    assert main(["rebalance", str(tmp_path / "dump.csv"), "--gpus", "2", *sizes]) == 0
    assert capsys.readouterr().out.startswith("dump.csv: 1 step, 2 layers, 4 experts\n")


@pytest.mark.parametrize("size", ["inf", "nan", "1e400", "x"])
def test_command_refuses_sizes_that_are_none(size, dump, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["rebalance", str(dump), "--gpus", "2", "--bytes-per-expert", size])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert f"argument --bytes-per-expert: invalid size value: '{size}'" in printed
    assert len(printed.splitlines()) == 1


def test_command_refuses_lists_that_are_none(dump, capsys):
    with pytest.raises(SystemExit):
        main(["rebalance", str(dump), "--gpus", "2", "--interval", "often"])
    assert "must be whole numbers, or once, with commas between, got 'often'" in capsys.readouterr().err
