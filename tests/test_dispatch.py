"""Dispatch: who sends where, how evenly, and what changes from one replay of a graph to the next."""

import numpy as np
import pytest
import torch
from numba_moe.reference.dispatch import dispatch_map, philox, static_map

from numba_moe import reference
from numba_moe.placement import ExpertDispatch, ExpertLocation, dispatch_ids

# Three nodes of two ranks of three slots; six experts.
MAP = np.array([[0, 1, 2, 0, 3, 3, 0, 4, 5, 1, 0, 2, 0, 3, 1, 5, 0, 4], [0, 1, 2, 3, 4, 5] * 3])
LOCATION = ExpertLocation.from_mapping(MAP, num_gpus=6, num_nodes=3)
ALGORITHMS = ("static", "dynamic", "hash", "fake")


def some_ids(num_tokens, num_experts, dtype=torch.int32):
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, num_experts, (num_tokens, 2))).to(dtype)
    ids[::5] = -1
    return ids


def test_philox_gives_the_known_answers():
    """The published vectors of Random123, philox4x32 with 10 rounds."""
    ones, pi = [0xFFFFFFFF] * 6, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    known = {
        (0,) * 6: [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        tuple(ones): [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        tuple(pi): [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    }
    for words, expected in known.items():
        assert [int(word) for word in philox(words[:4], words[4:])] == expected


def test_static_prefers_the_rank_then_the_node_then_deals_evenly():
    for seed in (0, 1, 2**32 - 1):
        chosen = static_map(LOCATION, seed)
        for layer, expert in np.ndindex(chosen.shape[:2]):
            slots = np.flatnonzero(MAP[layer] == expert)
            senders = dict.fromkeys(slots.tolist(), 0)
            for rank in range(6):
                slot = chosen[layer, expert, rank]
                senders[slot] += 1
                distances = [
                    0 if LOCATION.rank_of_slot[s] == rank else 1 + int(LOCATION.node_of_slot[s] != rank // 2)
                    for s in slots
                ]
                assert distances[slots.tolist().index(slot)] == min(distances)
            free = [rank for rank in range(6) if not any(LOCATION.node_of_slot[s] == rank // 2 for s in slots)]
            if len(free) == 4:  # all replicas on one node: nothing but the dealing decides
                assert max(senders.values()) - min(senders.values()) <= 1
    assert not np.array_equal(static_map(LOCATION, 0), static_map(LOCATION, 1))


def test_static_is_fair_where_nothing_is_near():
    """Two replicas on the first two ranks of 33: one serves 17 ranks, the other 16, and over experts neither more."""
    places = np.array([[*range(20), *range(20), *range(20, 51)]] * 3)
    location = ExpertLocation.from_mapping(places, num_gpus=33, slots_per_rank=[20, 20] + [1] * 31)
    chosen = static_map(location, 5)[:, :20]
    served = (chosen < 20).sum(axis=2)
    assert set(served.ravel().tolist()) == {16, 17}
    assert 15 < (served == 17).sum() < 45


def test_static_counts_what_near_ranks_send():
    """Of three replicas one serves a whole node of four; the ranks elsewhere go to the other two."""
    location = ExpertLocation.from_mapping([[0, 1, 2, 3, 0, 4, 0, 5, *range(6, 12)]], num_gpus=14, num_nodes=2)
    chosen = static_map(location)[0, 0]
    assert np.bincount(chosen).max() - np.bincount(chosen)[[0, 4, 6]].min() <= 1


def test_fake_goes_over_all_ranks_and_slots():
    deal, _ = dispatch_map(LOCATION, 0, "fake")
    assert deal[0].tolist() == [0, 3, 6, 9, 12, 15, 1, 4, 7, 10, 13, 16, 2, 5, 8, 11, 14, 17]
    heads = [dispatch_map(LOCATION, rank, "fake")[0][0, :3] for rank in range(6)]
    assert sorted(np.concatenate(heads).tolist()) == list(range(18)), "ranks begin at different slots"
    idle = ExpertLocation.from_mapping([[0, 1, -1, -1, 2, 0]], num_gpus=3)
    assert dispatch_map(idle, 0, "fake")[0].tolist() == [[0, 4, 1, 5, 0, 4]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_places_below_0_are_none(algorithm, device):
    places = torch.tensor([-1, -2, -(2**31), 5], dtype=torch.int32, device=device)
    options = {"algorithm": algorithm}
    if algorithm in ("dynamic", "hash"):
        places, options["num_valid"] = places[:, None].contiguous(), torch.ones_like(places)
    if algorithm == "dynamic":
        options["step"] = torch.zeros(1, dtype=torch.int64, device=device)
    ids = torch.tensor([0, 1, 2, 3, -1, 4, 2**32, -(2**32) + 3], device=device)
    counts = torch.zeros(6, dtype=torch.int32, device=device)
    found = dispatch_ids(ids, places, counts=counts, **options)
    assert found.tolist() == [-1, -1, -1, 5, -1, -1, -1, -1]
    assert counts.tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_slots_of_tokens_past_the_number_on_the_device_have_no_place(algorithm, kind, device):
    places, options = torch.tensor([4, 5, 6], dtype=torch.int32, device=device), {"algorithm": algorithm}
    if algorithm in ("dynamic", "hash"):
        places, options["num_valid"] = places[:, None].contiguous(), torch.ones_like(places)
    if algorithm == "dynamic":
        options["step"] = torch.zeros(1, dtype=torch.int64, device=device)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]], device=device)
    for real, shape in ((0, ()), (1, (1,)), (2, ()), (3, (1,)), (100, ())):
        counts = torch.zeros(7, dtype=torch.int32, device=device)
        number = torch.full(shape, real, dtype=kind, device=device)
        found = dispatch_ids(ids, places, num_token_non_padded=number, counts=counts, **options)
        assert (found >= 0).sum(dim=1).tolist() == [2 if token < real else 0 for token in range(3)]
        assert counts.sum() == 2 * min(real, 3)
        flat = dispatch_ids(ids.ravel(), places, num_token_non_padded=number, **options)
        assert (flat >= 0).tolist() == [slot < real for slot in range(6)]


@pytest.mark.parametrize("algorithm", ["dynamic", "hash"])
def test_turned_rows_hold_the_same_slots(algorithm):
    slots, count = LOCATION.logical_to_all_physical_map, LOCATION.logical_to_all_physical_map_num_valid
    firsts = []
    for rank in range(6):
        turned, num_valid = dispatch_map(LOCATION, rank, algorithm)
        assert num_valid.tolist() == count.tolist()
        assert np.sort(turned, axis=2).tolist() == np.sort(slots, axis=2).tolist()
        assert ((turned < 0) == (slots < 0)).all()
        firsts.append(int(turned[0, 0, 0]))
    assert sorted(firsts) == [0, 3, 6, 10, 12, 16]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_rank_dispatches_every_layer(algorithm, dtype, device):
    dispatch = ExpertDispatch(LOCATION, 3, device, algorithm=algorithm, seed=9)
    ids = some_ids(40, 6, dtype)
    counts = torch.zeros(2, 18, dtype=torch.int32, device=device)
    maps, num_valid = dispatch_map(LOCATION, 3, algorithm, 9)
    for layer in range(2):
        found = dispatch(ids.to(device), layer, counts=counts[layer]).cpu()
        options = {}
        if algorithm == "dynamic":
            options = {"seed": (3 << 32) + 9, "step": np.array([layer << 32])}
        valid = None if num_valid is None else num_valid[layer]
        expected = reference.dispatch_ids(ids.numpy(), maps[layer], valid, algorithm=algorithm, **options)
        assert found.dtype == dtype
        assert found.tolist() == expected.tolist()
        assert ((found < 0) == (ids < 0)).all()
        if algorithm != "fake":
            assert (torch.from_numpy(MAP[layer])[found.clamp(min=0)] == ids)[ids >= 0].all()
        assert counts[layer].tolist() == np.bincount(found[found >= 0], minlength=18).tolist()


def test_static_stays_on_its_rank(device):
    """Layer 1 has every expert on every second rank."""
    dispatch = ExpertDispatch(LOCATION, 4, device)
    found = dispatch(torch.arange(6, dtype=torch.int32, device=device), 1)
    assert LOCATION.node_of_slot[found.cpu()].tolist() == [2] * 6
    assert found.tolist() == [12, 13, 14, 15, 16, 17]


def draw(num_slots, num_replicas, step, seed=0):
    """Draw a replica for every slot."""
    replicas = np.arange(num_replicas, dtype=np.int32)[None]
    ids, valid = np.zeros(num_slots, np.int32), np.array([num_replicas], np.int32)
    return reference.dispatch_ids(ids, replicas, valid, algorithm="dynamic", seed=seed, step=np.array([step]))


def chi_square(counts):
    """Return how far counts are from equal ones, in standard deviations of chi-square from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_dynamic_is_uniform_and_independent():
    for num_replicas in (2, 3, 7, 33):
        drawn = [draw(100_000, num_replicas, step, seed) for step, seed in ((0, 0), (1, 0), (1 << 32, 0), (0, 1 << 32))]
        for one in drawn:
            assert abs(chi_square(np.bincount(one, minlength=num_replicas))) < 5
        for other in (*drawn[1:], np.roll(drawn[0], 1), np.roll(drawn[0], 8)):
            pairs = np.bincount(drawn[0] * num_replicas + other, minlength=num_replicas**2)
            assert abs(chi_square(pairs)) < 5
    assert abs(chi_square(np.array([50_600, 49_400]))) > 5, "a bias of 1.2 % would be seen"


def test_hash_is_that_of_vllm(device):
    """Its formula, for tokens whose product passes 32 bits."""
    tokens = 300
    ids = torch.zeros(tokens, 2, dtype=torch.int32, device=device)
    replicas = torch.arange(5, dtype=torch.int32, device=device)[None]
    valid = torch.full((1,), 5, dtype=torch.int32, device=device)
    found = dispatch_ids(ids, replicas, valid, algorithm="hash")
    assert found[:, 0].tolist() == [((token * 2654435769) & 0xFFFFFFFF) % 5 for token in range(tokens)]
    assert found[:, 1].tolist() == found[:, 0].tolist()
    assert abs(chi_square(np.bincount(found[:, 0].cpu(), minlength=5))) < 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_in_place_and_without(algorithm, device):
    dispatch = ExpertDispatch(LOCATION, 1, device, algorithm=algorithm)
    ids = some_ids(20, 6).to(device)
    before = ids.clone()
    found = dispatch(ids, 0)
    assert ids.equal(before)
    out = torch.empty_like(ids)
    assert dispatch(ids, 0, out=out) is out
    assert out.equal(found)
    assert dispatch(ids, 0, out=ids) is ids
    assert ids.equal(found)


def test_numpy_arrays_are_written_too():
    ids, table = np.array([[0, 1], [1, -1]]), np.array([2, 0], np.int32)
    counts, out = np.zeros(3, np.int64), np.zeros_like(ids)
    assert dispatch_ids(ids, table, counts=counts, out=out).tolist() == [[2, 0], [0, -1]]
    assert out.tolist() == [[2, 0], [0, -1]]
    assert counts.tolist() == [2, 0, 1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_update_keeps_the_tensors(algorithm, device):
    dispatch = ExpertDispatch(LOCATION, 2, device, algorithm=algorithm, seed=4)
    tensors = dispatch.physical_map, dispatch.num_valid
    ids = some_ids(40, 6).to(device)
    layers = [dispatch(ids, layer) for layer in range(2)]
    other = ExpertLocation.from_mapping(np.flip(MAP, axis=(0, 1)), num_gpus=6, num_nodes=3)
    dispatch.update(other, layers=[1])
    dispatch.update(other, layers=[])
    assert dispatch.location == LOCATION.update(other, [1])
    assert all(now is before for now, before in zip((dispatch.physical_map, dispatch.num_valid), tensors, strict=True))
    fresh = ExpertDispatch(dispatch.location, 2, device, algorithm=algorithm, seed=4)
    assert dispatch(ids, 0).equal(layers[0])
    assert dispatch(ids, 1).equal(fresh(ids, 1))
    if algorithm != "fake":
        assert not dispatch(ids, 1).equal(layers[1])
    dispatch.update(LOCATION)
    assert dispatch(ids, 1).equal(layers[1])


def test_advance_draws_anew_and_the_same_again(device):
    runs = []
    for _ in range(2):
        dispatch = ExpertDispatch(LOCATION, 0, device, algorithm="dynamic", seed=1)
        ids = torch.zeros(64, dtype=torch.int32, device=device)
        runs.append([])
        for _ in range(3):
            runs[-1] += [dispatch(ids, layer).tolist() for layer in range(2)]
            dispatch.advance()
    assert runs[0] == runs[1]
    assert len({tuple(drawn) for drawn in runs[0]}) == 6
    static = ExpertDispatch(LOCATION, 0, device)
    static.advance()
    assert static.step is None


BAD = {
    "no location": (lambda: ExpertDispatch(MAP, 0, "cpu"), TypeError, "`location` must be an ExpertLocation, got ndarray"),
    "a rank too many": (lambda: ExpertDispatch(LOCATION, 6, "cpu"), ValueError, "`rank` must be at most num_gpus - 1 = 5, got 6"),
    "another algorithm": (lambda: ExpertDispatch(LOCATION, 0, "cpu", algorithm="lp"), ValueError, "`algorithm` must be one of 'static', 'dynamic', 'hash', 'fake', got 'lp'"),
    "a long seed": (lambda: ExpertDispatch(LOCATION, 0, "cpu", seed=2**32), ValueError, "`seed` must be at most 4294967295, got 4294967296"),
    "a layer too many": (lambda: ExpertDispatch(LOCATION, 0, "cpu")(torch.tensor([[0]]), LOCATION.num_layers), ValueError, "`layer` must be at most num_layers - 1 = "),
    "a layer from the end": (lambda: ExpertDispatch(LOCATION, 0, "cpu").tables(-1), ValueError, "`layer` must be at least 0, got -1"),
    "another size": (lambda: ExpertDispatch(LOCATION, 0, "cpu").update(ExpertLocation.trivial(2, 6)), ValueError, "`other` must be of the same sizes, ranks and nodes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_at_each_replay():
    def forward(dispatch):
        out = [dispatch(ids, layer, counts=counts[layer]) for layer in range(2)]
        dispatch.advance()
        return out

    ids = torch.zeros(64, dtype=torch.int32, device="cuda")
    counts = torch.zeros(2, 18, dtype=torch.int32, device="cuda")
    eager = ExpertDispatch(LOCATION, 0, "cuda", algorithm="dynamic", seed=1)
    expected = [[part.tolist() for part in forward(eager)] for _ in range(4)]
    dispatch = ExpertDispatch(LOCATION, 0, "cuda", algorithm="dynamic", seed=1)
    counts.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward(dispatch)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append([part.tolist() for part in found])
    assert replayed == expected[:3], "capturing draws nothing"
    assert counts.sum(dim=1).tolist() == [3 * 64] * 2
    dispatch.update(ExpertLocation.from_mapping(MAP[::-1], num_gpus=6, num_nodes=3))
    graph.replay()
    assert (torch.from_numpy(MAP[1])[found[0].cpu()] == 0).all(), "the new location counts"


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_counters", [18, 40_000])
def test_many_slots_are_counted_exactly(algorithm, num_counters):
    dispatch = ExpertDispatch(LOCATION, 0, "cuda", algorithm=algorithm)
    for num_tokens in (512, 513, 5000, 300_000):
        ids = some_ids(num_tokens, 6)
        ids[ids == 3] = 0  # a hot expert
        counts = torch.full((num_counters,), 2**40, dtype=torch.int64, device="cuda")
        found = dispatch(ids.cuda(), 0, counts=counts).cpu()
        expected = ExpertDispatch(LOCATION, 0, "cpu", algorithm=algorithm)(ids, 0)
        assert found.equal(expected)
        assert (counts - 2**40).tolist() == np.bincount(expected[expected >= 0], minlength=num_counters).tolist()


@pytest.mark.parametrize("algorithm", ["static", "dynamic", "hash", "fake"])
def test_tables_made_in_inference_mode_change_outside_and_the_other_way_round(algorithm):
    locations = [ExpertLocation.from_mapping([slots], num_gpus=2) for slots in ([0, 1, 2, 0], [1, 1, 2, 0])]
    ids = torch.tensor([[0, 1], [2, 0]])
    with torch.inference_mode():
        inside = ExpertDispatch(locations[0], rank=1, device="cpu", algorithm=algorithm)
    outside = ExpertDispatch(locations[0], rank=1, device="cpu", algorithm=algorithm)
    inside.advance()
    inside.update(locations[1])
    with torch.inference_mode():
        outside.advance()
        outside.update(locations[1])
        counts = torch.zeros(4, dtype=torch.int64)
    found = inside(ids, 0, counts=counts)
    assert torch.equal(found, outside(ids, 0))
    assert counts.sum() == 4
    inside.update(locations[0])
    with torch.inference_mode():
        inside.update(locations[1])
        inside(ids, 0, out=ids)
    assert torch.equal(ids, found)
