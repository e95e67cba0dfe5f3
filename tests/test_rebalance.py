"""Balancing: answers typed by hand, the NumPy twins bit for bit, and what `refined` promises."""

import numpy as np
import pytest
from numba_moe.reference.deepseek import pack, replicate

from numba_moe import placement, reference
from numba_moe.placement import ExpertLocation, balancedness, rank_loads, rebalance_experts

# The published example: two layers, 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes.
PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def loads(rng, shape):
    """Return loads of some distribution: skewed, with ties, nearly all 0, or flat."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.pareto(1.2, shape)
    if kind == 1:
        return rng.permuted(np.broadcast_to(1e5 / np.arange(1, shape[-1] + 1) ** 0.9, shape), axis=-1)
    if kind == 2:
        return rng.uniform(0, 1, shape)
    if kind == 3:
        return rng.integers(0, 5, shape).astype(float)
    return rng.integers(0, 10000, shape) * (rng.random(shape) < 0.1)


def regular_sizes(rng):
    """Return (experts, replicas, groups, nodes, gpus) that divide as `deepseek` needs."""
    nodes, gpus_per_node = rng.integers(1, 5), rng.integers(1, 9)
    groups_per_node, group_size = rng.integers(1, 4), rng.integers(1, 9)
    experts_per_node, gpus = groups_per_node * group_size, nodes * gpus_per_node
    slots_per_gpu = -(-experts_per_node // gpus_per_node) + rng.integers(0, 3)
    groups = nodes * groups_per_node
    if rng.random() < 0.2:
        groups = 1  # no node can have as many groups as the others, so nodes do not matter
    return nodes * experts_per_node, slots_per_gpu * gpus, groups, nodes, gpus


def has_duplicates(place, rank_of_slot):
    pairs = [(rank, expert) for rank, expert in zip(rank_of_slot.tolist(), place.tolist(), strict=True) if expert >= 0]
    return len(pairs) != len(set(pairs))


def peaks(weight, places, num_gpus, **options):
    """Return what `refined` lowers, for each layer: the mean over steps of the busiest rank's load."""
    found = rank_loads(weight, places, num_gpus, **options).max(axis=-1)
    return found if found.ndim == 1 else found.mean(axis=0)


@pytest.mark.parametrize("function", [rebalance_experts, reference.rebalance_experts])
def test_published_example(function):
    places, slots, valid = function(np.array(PUBLISHED), 16, 4, 2, 8)
    assert places.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert valid.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert slots.shape == (2, 12, 5)
    assert slots[0, 5].tolist() == [0, 2, -1, -1, -1]
    assert slots[1, 8].tolist() == [3, 6, -1, -1, -1]
    assert places.dtype == slots.dtype == valid.dtype == np.int64


def test_ties_go_to_the_lower_expert_group_and_rank():
    # Packing equal weights goes round the packs; equal shares replicate from the first expert on.
    assert [part.tolist() for part in pack(np.ones(6), 3)] == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]]
    assert [part.tolist() for part in replicate(np.ones(3), 5)] == [[0, 1, 2, 0, 1], [2, 2, 1]]
    assert rebalance_experts(np.ones((1, 4)), 4, 1, 1, 2).physical_to_logical_map.tolist() == [[0, 2, 1, 3]]
    # One slot on each GPU is taken in order, whatever the weights.
    assert rebalance_experts([[1, 2, 3]], 4, 1, 1, 4).physical_to_logical_map.tolist() == [[0, 1, 2, 2]]


def test_deepseek_is_its_twin_bit_for_bit():
    rng = np.random.default_rng(0)
    hierarchical = 0
    for _ in range(1000):
        num_experts, *sizes = (int(size) for size in regular_sizes(rng))
        hierarchical += sizes[2] > 1 and sizes[1] % sizes[2] == 0
        weight = loads(rng, (2, num_experts) if rng.random() < 0.8 else (3, 2, num_experts))
        for found, expected in zip(
            rebalance_experts(weight, *sizes), reference.rebalance_experts(weight, *sizes), strict=True
        ):
            assert found.tolist() == expected.tolist()
    assert 300 < hierarchical < 900


def test_deepseek_is_its_twin_at_the_size_of_a_model():
    weight = np.random.default_rng(1).pareto(1.2, (3, 256))
    for sizes in ((288, 8, 4, 32), (288, 8, 18, 144)):
        found, expected = rebalance_experts(weight, *sizes), reference.rebalance_experts(weight, *sizes)
        assert found.physical_to_logical_map.tolist() == expected.physical_to_logical_map.tolist()


def random_options(rng, num_experts, num_replicas, num_gpus):
    """Return options of `refined` of every kind, and some of them."""
    options = {}
    if rng.random() < 0.4:
        extra = rng.multinomial(num_replicas - num_gpus, np.full(num_gpus, 1 / num_gpus))
        options["slots_per_rank"] = 1 + extra
    sizes = options.get("slots_per_rank", reference.rebalance.even_sizes(num_replicas, num_gpus))
    if rng.random() < 0.4:
        active = rng.random(num_gpus) < 0.8
        if sizes[active].sum() >= num_experts:
            options["active_ranks"] = active
    if rng.random() < 0.5:
        places = [np.r_[rng.permutation(num_experts), rng.integers(0, num_experts, num_replicas - num_experts)]]
        options["current"] = np.stack([rng.permutation(places[0]) for _ in range(2)])
        if rng.random() < 0.6:
            options["max_moves"] = int(rng.integers(0, 9))
    return options


def answer(function, *arguments, **options):
    """Return what a function returns as lists, or the message of its error."""
    try:
        return [part.tolist() for part in function(*arguments, **options)]
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_refined_is_its_twin_bit_for_bit():
    rng = np.random.default_rng(2)
    refused = 0
    for index in range(600):
        if index % 2:
            num_experts, *sizes = (int(size) for size in regular_sizes(rng))
            if sizes[0] > 40:
                continue
        else:
            num_experts, num_gpus = int(rng.integers(1, 16)), int(rng.integers(1, 7))
            num_groups, num_nodes = int(rng.integers(1, num_experts + 1)), int(rng.integers(1, num_gpus + 1))
            sizes = [max(num_experts, num_gpus) + int(rng.integers(0, 10)), num_groups, num_nodes, num_gpus]
        weight = loads(rng, (2, num_experts) if rng.random() < 0.8 else (3, 2, num_experts))
        options = random_options(rng, num_experts, sizes[0], sizes[3])
        found, expected = (
            answer(package.rebalance_experts, weight, *sizes, algorithm="refined", **options)
            for package in (placement, reference)
        )
        assert found == expected
        refused += isinstance(found, str)
    assert refused > 0


@pytest.mark.slow
def test_refined_is_its_twin_where_busy_ranks_are_few():
    rng = np.random.default_rng(13)
    for _ in range(500):
        num_experts, num_gpus = int(rng.integers(5, 12)), int(rng.integers(3, 5))
        num_slots = max(num_experts, 2 * num_gpus) + int(rng.integers(0, 3))
        weight = rng.integers(1, 40, (1, num_experts))
        arguments = (weight, num_slots, 1, 1, num_gpus)
        found = answer(rebalance_experts, *arguments, algorithm="refined")
        assert found == answer(reference.rebalance_experts, *arguments, algorithm="refined")


@pytest.mark.parametrize("shape", [(1, 64), (2, 1, 64)])
def test_refined_is_its_twin_when_it_has_a_way_to_go(shape):
    weight = np.random.default_rng(3).pareto(1.2, shape)
    found = rebalance_experts(weight, 80, 1, 1, 16, algorithm="refined").physical_to_logical_map
    assert found.tolist() == reference.rebalance_experts(weight, 80, 1, 1, 16, algorithm="refined")[0].tolist()


@pytest.mark.parametrize("sizes", [(256, 288, 8, 4, 32), (256, 320, 8, 8, 64), (128, 160, 1, 1, 32), (64, 96, 4, 2, 8)])
def test_refined_is_never_worse_than_deepseek(sizes):
    rng = np.random.default_rng(4)
    num_experts, *sizes = sizes
    weight = np.concatenate([loads(rng, (1, num_experts)) for _ in range(200)])
    published = rebalance_experts(weight, *sizes).physical_to_logical_map
    refined = rebalance_experts(weight, *sizes, algorithm="refined").physical_to_logical_map
    before, after = peaks(weight, published, sizes[-1]), peaks(weight, refined, sizes[-1])
    assert (after <= before).all()
    assert (after < before).mean() > 0.4
    rank_of_slot = np.repeat(np.arange(sizes[-1]), sizes[0] // sizes[-1])
    twice = [layer for layer in range(200) if has_duplicates(refined[layer], rank_of_slot)]
    assert len(twice) < 20
    assert refined[twice].tolist() == published[twice].tolist(), "only where nothing better was found"


def test_refined_keeps_groups_on_nodes():
    weight = np.random.default_rng(5).pareto(1.2, (20, 64))
    for options in ({}, {"slots_per_rank": [11, 13] * 4}, {"active_ranks": [True] * 7 + [False]}):
        placed = rebalance_experts(weight, 96, 8, 4, 8, algorithm="refined", **options)
        location = ExpertLocation.from_mapping(
            placed.physical_to_logical_map, 64, 8, 4, slots_per_rank=options.get("slots_per_rank")
        )
        for place in placed.physical_to_logical_map:
            nodes = [{int(n) for n in location.node_of_slot[place // 8 == group]} for group in range(8)]
            if "active_ranks" not in options:
                assert [len(found) for found in nodes] == [1] * 8
            else:  # 12 slots are not enough for 16 experts on the last node
                assert max(len(found) for found in nodes) > 1


def test_refined_takes_any_sizes_and_holds_no_expert_twice():
    rng = np.random.default_rng(6)
    for _ in range(300):
        num_experts, num_gpus = int(rng.integers(4, 40)), int(rng.integers(2, 9))
        extra = rng.integers(1, max(2, num_experts // 2), num_gpus)  # at most as many slots as experts
        while extra.sum() < num_experts or extra.min() == extra.max():
            extra[rng.integers(num_gpus)] += 1
        if extra.max() > num_experts:
            continue
        weight = loads(rng, (2, num_experts))
        groups = int(rng.integers(1, num_experts + 1))
        options = {"algorithm": "refined", "slots_per_rank": extra}
        placed = rebalance_experts(weight, int(extra.sum()), groups, num_gpus, num_gpus, **options)
        rank_of_slot = np.repeat(np.arange(num_gpus), extra)
        domains_fit = groups % num_gpus == 0  # a node is a rank here, with more slots than experts
        for place in placed.physical_to_logical_map:
            assert set(place.tolist()) == set(range(num_experts))
            if not domains_fit:
                assert not has_duplicates(place, rank_of_slot)


def test_a_rank_with_more_slots_than_experts_holds_all_of_them():
    placed = rebalance_experts([[5, 3, 1]], 9, 1, 1, 2, algorithm="refined", slots_per_rank=[7, 2])
    assert set(placed.physical_to_logical_map[0, :7].tolist()) == {0, 1, 2}
    assert len(set(placed.physical_to_logical_map[0, 7:].tolist())) == 2


def test_max_moves():
    rng = np.random.default_rng(7)
    gained = np.zeros(3)
    for _ in range(60):
        weight = loads(rng, (2, 32)) + 0.01
        current = np.stack([rng.permutation(np.r_[np.arange(32), rng.integers(0, 32, 8)]) for _ in range(2)])
        before = peaks(weight, current, 8)
        for index, max_moves in enumerate((0, 2, 8)):
            options = {"algorithm": "refined", "current": current, "max_moves": max_moves}
            placed = rebalance_experts(weight, 40, 1, 1, 8, **options).physical_to_logical_map
            after = peaks(weight, placed, 8)
            assert ((placed != current).sum(axis=1) <= max_moves).all()
            assert (after <= before).all()
            gained[index] += (before / after).sum()
    assert gained[0] == 120
    assert gained[2] > gained[1] > 1.05 * gained[0]


def test_a_current_location_is_neither_lost_nor_moved_for_nothing():
    weight = np.random.default_rng(8).pareto(1.2, (5, 32))
    first = ExpertLocation.from_counts(weight, 40, 1, 1, 8, algorithm="refined")
    again = rebalance_experts(weight, 40, 1, 1, 8, algorithm="refined", current=first)
    assert again.physical_to_logical_map.tolist() == first.physical_to_logical_map.tolist()
    # An expert that stays on its rank stays in its slot.
    other = np.random.default_rng(9).pareto(1.2, (5, 32))
    placed = rebalance_experts(other, 40, 1, 1, 8, algorithm="refined", current=first).physical_to_logical_map
    for layer in range(5):
        for rank in range(8):
            old, new = (
                first.physical_to_logical_map[layer, 5 * rank : 5 * rank + 5],
                placed[layer, 5 * rank : 5 * rank + 5],
            )
            for expert in set(old.tolist()) & set(new.tolist()):
                assert old.tolist().index(expert) == new.tolist().index(expert)


def test_ranks_that_leave_and_come_back():
    weight = np.random.default_rng(10).pareto(1.2, (4, 32))
    everyone = rebalance_experts(weight, 48, 1, 1, 8, algorithm="refined").physical_to_logical_map
    active = np.arange(8) != 3
    options = {"algorithm": "refined", "active_ranks": active, "current": everyone}
    placed = rebalance_experts(weight, 48, 1, 1, 8, **options)
    rank_of_slot = np.repeat(np.arange(8), 6)
    assert (placed.physical_to_logical_map[:, rank_of_slot == 3] == -1).all()
    assert (placed.physical_to_logical_map[:, rank_of_slot != 3] >= 0).all()
    assert (placed.logical_to_all_physical_map_num_valid >= 1).all()
    assert placed.logical_to_all_physical_map_num_valid.sum() == 4 * 42
    assert not np.isin(placed.logical_to_all_physical_map, np.flatnonzero(rank_of_slot == 3)).any()
    assert (balancedness(weight, placed.physical_to_logical_map, 8) > 0.8).all()

    lost = [np.setdiff1d(np.arange(32), place[rank_of_slot != 3]).size for place in everyone]
    assert max(lost) > 0
    with pytest.raises(ValueError, match=r"`max_moves` must be at least \d, the slots that have to change, got 0"):
        rebalance_experts(weight, 48, 1, 1, 8, **options, max_moves=0)
    few = rebalance_experts(weight, 48, 1, 1, 8, **options, max_moves=max(lost)).physical_to_logical_map
    moved = ((few != everyone) & (rank_of_slot != 3)).sum(axis=1)
    assert (moved <= max(lost)).all()
    assert (moved >= lost).all()

    options = {"algorithm": "refined", "current": few, "max_moves": 6}
    back = rebalance_experts(weight, 48, 1, 1, 8, **options).physical_to_logical_map
    assert (back >= 0).all()
    assert ((back != few) & (rank_of_slot != 3)).sum() == 0


def test_kinds_of_steps_are_balanced_each():
    # Experts 0 and 1 are busy in every other step, 2 and 3 in the others; the sums are all the same.
    weight = np.array([[[9.0, 9.0, 1.0, 1.0]], [[1.0, 1.0, 9.0, 9.0]]] * 4)
    together = rebalance_experts(weight, 4, 1, 1, 2).physical_to_logical_map
    assert rank_loads(weight, together, 2).max(axis=-1).ravel().tolist() == [10] * 8  # ties, by luck
    weight = weight[..., [0, 2, 1, 3]]
    together = rebalance_experts(weight, 4, 1, 1, 2).physical_to_logical_map
    assert rank_loads(weight, together, 2).max(axis=-1).ravel().tolist() == [18] * 8
    each = rebalance_experts(weight, 4, 1, 1, 2, algorithm="refined").physical_to_logical_map
    assert rank_loads(weight, each, 2).max(axis=-1).ravel().tolist() == [10] * 8


def test_few_steps_count_by_their_sum():
    weight = np.random.default_rng(11).pareto(1.2, (7, 10, 32))
    by_sum = rebalance_experts(weight.sum(axis=0), 48, 1, 1, 8, algorithm="refined").physical_to_logical_map
    by_step = rebalance_experts(weight, 48, 1, 1, 8, algorithm="refined").physical_to_logical_map
    assert by_step.tolist() == by_sum.tolist()


def next_steps(kind, rng, num_steps, shape):
    """Return steps of some law: noise around a mean, drifting, changed after a third, or of two kinds."""
    time = np.arange(num_steps)[:, None, None]
    change = {
        "noise": lambda: 1,
        "drift": lambda: np.exp(np.cumsum(rng.normal(0, 0.1, (num_steps, *shape)), axis=0)),
        "jump": lambda: np.where(time < num_steps // 3, *rng.lognormal(0, 0.7, (2, *shape))),
        "kinds": lambda: rng.lognormal(0, 0.7, (2, *shape))[rng.integers(0, 2, num_steps)],
        "counts": lambda: 1,
    }[kind]()
    loads = rng.lognormal(0, 1, shape) * change
    if kind == "counts":
        return rng.poisson(20 * np.broadcast_to(loads, (num_steps, *shape))).astype(float)
    return loads * rng.lognormal(0, 0.4, (num_steps, *shape))


@pytest.mark.parametrize(
    ("kind", "at_most"), [("noise", 1.0), ("counts", 1.0), ("drift", 0.99), ("jump", 0.92), ("kinds", 0.95)]
)
def test_refined_is_better_than_deepseek_on_the_next_steps(kind, at_most):
    """Both see the first half of the steps; the busiest rank of each step of the second half is compared."""
    ratios = []
    for num_experts, *sizes in ((64, 80, 4, 2, 8), (128, 128, 1, 1, 8), (128, 160, 1, 1, 32)):
        for seed in range(6):
            loads = next_steps(kind, np.random.default_rng(seed), 40, (3, num_experts))
            found = [
                peaks(loads[20:], rebalance_experts(loads[:20], *sizes, algorithm=name)[0], sizes[-1]).mean()
                for name in ("refined", "deepseek")
            ]
            ratios.append(found[0] / found[1])
    assert np.exp(np.mean(np.log(ratios))) <= at_most


def test_refined_is_its_twin_with_many_steps():
    several = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        weight = next_steps(("kinds", "drift", "kinds", "noise")[seed % 4], rng, 16, (4, 12))[:, :2]
        several += len(reference.forecast.forecast(weight, 16, 4).weight) > 1
        options = {"algorithm": "refined"}
        if seed % 2:
            current = rebalance_experts(weight[0], 16, 1, 1, 4)[0]
            options |= {"current": current, "max_moves": 4}
        found = rebalance_experts(weight, 16, 1, 1, 4, **options)
        expected = reference.rebalance_experts(weight, 16, 1, 1, 4, **options)
        assert found.physical_to_logical_map.tolist() == expected.physical_to_logical_map.tolist()
    assert several >= 2


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
@pytest.mark.parametrize("kind", ["nothing", "one expert", "two experts", "huge", "tiny", "one at a time"])
def test_forecasts_of_odd_steps_are_placed(kind, num_gpus):
    rng = np.random.default_rng(0)
    weight = {
        "nothing": np.zeros((10, 2, 4)),
        "one expert": np.ones((10, 2, 1)),
        "two experts": np.ones((9, 1, 2)),
        "huge": rng.pareto(0.3, (12, 2, 6)) * 1e280,
        "tiny": rng.pareto(1, (12, 2, 6)) * 1e-300,
        "one at a time": np.eye(8)[:, None],
    }[kind]
    found = rebalance_experts(weight, 8, 1, 1, num_gpus, algorithm="refined").physical_to_logical_map
    expected = reference.rebalance_experts(weight, 8, 1, 1, num_gpus, algorithm="refined").physical_to_logical_map
    assert found.tolist() == expected.tolist()
    assert all(set(place.tolist()) == set(range(weight.shape[2])) for place in found)


def test_balancedness_by_hand():
    weight = np.array([[6.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    places = np.array([[0, 1, 0, 2], [0, 1, 2, 0]])
    assert rank_loads(weight, places, 2).tolist() == [[6, 6], [0, 0]]
    assert balancedness(weight, places, 2).tolist() == [1, 1]
    assert rank_loads(weight, places, 2, slots_per_rank=[1, 3]).tolist() == [[3, 9], [0, 0]]
    assert balancedness(weight, places, 2, slots_per_rank=[1, 3])[0] == (6 + 1e-5) / (9 + 1e-5)
    idle = np.array([[0, 1, 2, -1, -1, -1]])
    assert balancedness(weight[:1], idle, 2).tolist() == [1], "a rank without experts is not counted"
    assert balancedness(weight[None, :, :], places, 2).shape == (1, 2)


def test_loads_of_other_kinds():
    torch = pytest.importorskip("torch")
    expected = rebalance_experts(PUBLISHED, 16, 4, 2, 8).physical_to_logical_map.tolist()
    for dtype in (torch.int32, torch.int64, torch.float32, torch.bfloat16):
        weight = torch.tensor(PUBLISHED).to(dtype)
        assert rebalance_experts(weight, 16, 4, 2, 8).physical_to_logical_map.tolist() == expected


def test_results_do_not_depend_on_threads(monkeypatch):
    weight = np.random.default_rng(12).pareto(1.2, (7, 48))
    found = []
    for cpus in (1, 2, 5):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)), raising=False)
        found.append(rebalance_experts(weight, 64, 1, 1, 8, algorithm="refined").physical_to_logical_map.tolist())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("damage", ["truncated", "noise"])
@pytest.mark.slow
def test_a_damaged_file_of_compiled_code_is_compiled_again(damage, tmp_path, monkeypatch, without_simulator):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    program = "import numpy as np; from numba_moe.placement import search; print(search.moves(np.arange(3), np.zeros(3, int)))"
    assert without_simulator(program) == "2\n"
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) == 2
    for path in files:
        path.write_bytes(path.read_bytes()[:50] if damage == "truncated" else bytes(range(256)))
        assert without_simulator(program) == "2\n"


W = np.ones((2, 12))
FULL = np.tile(np.r_[np.arange(12), np.arange(4)], (2, 1))
HOLE = FULL.copy()
HOLE[1, 5] = -1
LOST = FULL.copy()
LOST[1, 7] = 3


def bad(**changes):
    return {"weight": W, "num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8, **changes}


def at(place, value, array=W):
    array = array.copy()
    array[place] = value
    return array


R = {"algorithm": "refined"}
BAD = {
    "negative": (bad(weight=at((1, 3), -1)), ValueError, "`weight` must be at least 0, got -1.0 at layer 1, expert 3"),
    "NaN": (bad(weight=at((0, 2), np.nan)), ValueError, "`weight` must be finite, got nan at layer 0, expert 2"),
    "inf in a step": (bad(weight=at((0, 1, 4), np.inf, W[None])), ValueError, "got inf at step 0, layer 1, expert 4"),
    "text": (bad(weight=[["a"]]), TypeError, "`weight` must be an array that converts to float64, got list of dtype <U1"),
    "ragged": (bad(weight=[[1, 2], [1]]), TypeError, "`weight` must be an array that converts to float64, got list"),
    "one layer": (bad(weight=W[0]), ValueError, r"`weight` must be of 2 or 3 dimensions, got shape \(12,\)"),
    "no layers": (bad(weight=W[:0]), ValueError, r"`weight` must be without empty dimensions, got shape \(0, 12\)"),
    "few replicas": (bad(num_replicas=8), ValueError, "`num_replicas` must be at least num_experts = 12, got 8"),
    "half a replica": (bad(num_replicas=16.0), TypeError, "`num_replicas` must be an integer, got float"),
    "many GPUs": (bad(num_gpus=17), ValueError, "`num_gpus` must be at most num_replicas = 16, got 17"),
    "many nodes": (bad(num_nodes=9), ValueError, "`num_nodes` must be at most num_gpus = 8, got 9"),
    "many groups": (bad(num_groups=13), ValueError, "`num_groups` must be at most num_experts = 12, got 13"),
    "algorithm": (bad(algorithm="best"), ValueError, "`algorithm` must be one of 'deepseek', 'refined', got 'best'"),
    "GPUs do not divide": (bad(num_gpus=6), ValueError, "`num_gpus` must be a divisor of num_replicas = 16, got 6"),
    "nodes do not divide": (bad(num_replicas=20, num_gpus=5), ValueError, "`num_nodes` must be a divisor of num_gpus = 5, got 2"),
    "groups do not divide": (bad(num_groups=8), ValueError, "`num_groups` must be a divisor of num_experts = 12, got 8"),
    "option of the other": (bad(max_moves=3), ValueError, "`max_moves` must be None with the algorithm 'deepseek', got int"),
    "past float64": (bad(weight=[[1e308, 1e308, 1e308, 1]], num_replicas=4, num_groups=1, num_nodes=1, num_gpus=2), ValueError, "`weight` must be loads whose sum float64 holds, got inf"),
    "moves from nowhere": (bad(**R, max_moves=3), ValueError, "`current` must be given with `max_moves`, got None"),
    "negative moves": (bad(**R, max_moves=-1, current=FULL), ValueError, "`max_moves` must be at least 0, got -1"),
    "another map": (bad(**R, current=FULL[:1]), ValueError, r"`current` must be of shape \(num_layers, num_replicas\) = \(2, 16\), got shape \(1, 16\)"),
    "map of floats": (bad(**R, current=FULL * 1.0), TypeError, "`current` must be an array that converts to int64, got ndarray of dtype float64"),
    "unknown expert": (bad(**R, current=at((0, 3), 12, FULL)), ValueError, r"`current` must be -1 or an expert in \[0, num_experts = 12\), got 12 at layer 0, slot 3"),
    "hole": (bad(**R, current=HOLE), ValueError, "`current` must be -1 in all slots of a rank or in none, got -1 at layer 1, slot 5"),
    "lost expert": (bad(**R, current=LOST), ValueError, "`current` must be a map with slots for every expert, got 0 at layer 1, expert 7"),
    "too few active": (bad(**R, active_ranks=[True] * 5 + [False] * 3), ValueError, "`active_ranks` must be at least ranks with slots for num_experts = 12, got 10"),
    "active by name": (bad(**R, active_ranks=[0, 1]), TypeError, "`active_ranks` must be an array that converts to bool, got list of dtype int64"),
    "active of others": (bad(**R, active_ranks=[True]), ValueError, r"`active_ranks` must be of shape \(num_gpus,\) = \(8,\), got shape \(1,\)"),
    "slots of others": (bad(**R, slots_per_rank=[8, 8]), ValueError, r"`slots_per_rank` must be of shape \(num_gpus,\) = \(8,\)"),
    "a rank without slots": (bad(**R, slots_per_rank=[0, 4, 2, 2, 2, 2, 2, 2]), ValueError, "`slots_per_rank` must be at least 1, got 0 at rank 0"),
    "slots do not add up": (bad(**R, slots_per_rank=[2] * 7 + [3]), ValueError, "`slots_per_rank` must be 16 slots together, got 17"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        rebalance_experts(**arguments)


def test_bad_arguments_of_metrics():
    with pytest.raises(ValueError, match=r"`weight` must be of 2 layers, got shape \(1, 12\)"):
        balancedness(W[:1], FULL, 8)
    with pytest.raises(ValueError, match="`physical_to_logical_map` must be -1 in all slots of a rank or in none"):
        rank_loads(W, HOLE, 8)
