"""The recorder: what it counts and keeps, through passes, maps, names, switches and dumps."""

import io
import tempfile
import threading

import numpy as np
import pytest
import torch

from numba_moe import reference
from numba_moe.device import simulator
from numba_moe.placement import ExpertLocation
from numba_moe.recorder import (
    ExpertDistributionRecorder,
    add_expert_counts,
    coactivation,
    expert_entropy,
    load,
    logical_counts,
    traffic_matrix,
    utilization,
)

LAYERS, EXPERTS = 3, 5
MAP = np.array([[0, 1, 2, 3, 4, 0]] * LAYERS)


def routing(rng, num_tokens, num_slots=EXPERTS, top_k=2):
    """Draw ids of every layer [L, T, K], an eighth of them none, and weights."""
    ids = rng.integers(0, num_slots, (LAYERS, num_tokens, top_k)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.125] = -1
    return ids, rng.random(ids.shape, np.float32)


def show(recorder, ids, weights=None, layers=range(LAYERS)):
    for layer in layers:
        with recorder.with_current_layer(layer):
            given = None if weights is None else torch.from_numpy(weights[layer]).to(recorder.device)
            recorder.on_select_experts(torch.from_numpy(ids[layer]).to(recorder.device), given)


def counted(ids, num_slots=EXPERTS):
    return np.stack([reference.add_expert_counts(rows, counts=np.zeros(num_slots, np.int64)) for rows in ids])


def make(mode, device="cpu", **options):
    return ExpertDistributionRecorder(LAYERS, EXPERTS, mode=mode, device=device, **options)


def dump(recorder):
    return recorder.dump_record(output_mode="object")


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("num_experts", [1, 257, 20000])  # the last are more than shared memory has
def test_counts(num_experts, dtype, device):
    rng = np.random.default_rng(0)
    ids = rng.integers(-2, num_experts + 2, (150, 2)).astype(dtype)
    expected = np.full(num_experts, 2**31, np.int64)
    counts = torch.from_numpy(expected.copy()).to(device)
    reference.add_expert_counts(ids, counts=expected)
    add_expert_counts(torch.from_numpy(ids).to(device), counts=counts)
    assert counts.tolist() == expected.tolist()
    on, off, few = (torch.tensor([number], dtype=torch.int32, device=device) for number in (1, 0, 103))
    add_expert_counts(torch.from_numpy(ids).to(device), counts=counts, enabled=off)
    assert counts.tolist() == expected.tolist()
    for first_row in (0, 100, 103, 200):
        options = {"enabled": on, "num_tokens": few, "first_row": first_row}
        add_expert_counts(torch.from_numpy(ids).to(device), counts=counts, **options)
        reference.add_expert_counts(ids[: max(103 - first_row, 0)], counts=expected)
        assert counts.tolist() == expected.tolist()


def test_stat(device):
    rng = np.random.default_rng(1)
    recorder = make("stat", device)
    passes = [routing(rng, tokens)[0] for tokens in (4, 0, 40)]
    show(recorder, passes[0])  # before start
    recorder.start_record()
    assert recorder.recording
    for number, ids in enumerate(passes):
        with recorder.with_forward_pass(number + 7):
            show(recorder, ids)
    recorder.stop_record()
    with recorder.with_forward_pass(99):
        show(recorder, passes[2])
    found = dump(recorder)
    assert found.forward_pass_id.tolist() == [7, 8, 9]
    assert found.logical_count.tolist() == [counted(ids).tolist() for ids in passes]
    assert found.rank_physical_count.tolist() == [sum(map(counted, passes)).tolist()]
    assert not recorder.recording
    with pytest.warns(RuntimeWarning, match="no pass was recorded"):
        assert dump(recorder).logical_count.shape == (0, LAYERS, EXPERTS)


def test_counts_pass_the_largest_int32(device):
    recorder = make("stat", device)
    recorder.start_record()
    recorder.layer_counts(1)[0, 2] = 2**31 - 1
    ids = np.full((LAYERS, 3, 2), 2, np.int32)
    with recorder.with_forward_pass(0):
        show(recorder, ids)
    assert dump(recorder).logical_count[0, 1, 2] == 2**31 + 5


@pytest.mark.parametrize("buffer_size", [1, 3, 130, 300, None])
def test_buffers_keep_the_last_passes(buffer_size):
    recorder = make("stat", buffer_size=buffer_size)
    recorder.start_record()
    for number in range(290):
        with recorder.with_forward_pass(number):
            recorder.layer_counts(0)[number % 5, 0] += number
    found = dump(recorder)
    first = max(290 - (buffer_size or 290), 0)
    assert found.forward_pass_id.tolist() == found.logical_count[:, 0, 0].tolist() == list(range(first, 290))


def test_padding_is_not_counted(device):
    rng = np.random.default_rng(2)
    ids, weights = routing(rng, 6)
    for mode in ("stat", "per_pass", "per_token"):
        recorder = make(mode, device)
        recorder.start_record()
        for number, num_tokens in enumerate((4, 0, None, 9)):
            with recorder.with_forward_pass(number, num_tokens):
                show(recorder, ids, weights)
        found = dump(recorder)
        assert found.logical_count.tolist() == [counted(ids[:, :n]).tolist() for n in (4, 0, 6, 9)]


def test_calls_of_a_layer_add_up_and_share_the_padding(device):
    ids, weights = routing(np.random.default_rng(3), 8)
    for mode in ("stat", "per_token"):
        recorder = make(mode, device)
        recorder.start_record()
        with recorder.with_forward_pass(0, num_tokens=7):
            for part in (slice(0, 5), slice(5, 8)):
                show(recorder, ids[:, part].copy(), weights[:, part].copy())
        found = dump(recorder)
        assert found.logical_count.tolist() == [counted(ids[:, :7]).tolist()]
        if mode == "per_token":
            assert found.topk_ids.transpose(1, 0, 2).tolist() == ids[:, :7].tolist()
            assert found.topk_weights.transpose(1, 0, 2).tolist() == weights[:, :7].tolist()


def test_per_pass_with_names_and_regions(device):
    rng = np.random.default_rng(4)
    recorder = make("per_pass", device)
    recorder.start_record()
    first, second, third = (routing(rng, 5)[0] for _ in range(3))
    with recorder.with_forward_pass(3):
        with recorder.with_debug_name("left"):
            show(recorder, first)
        with recorder.with_debug_name("right"):
            show(recorder, second)
        with recorder.disable_this_region():
            show(recorder, third)
    with recorder.with_forward_pass(4):
        show(recorder, third)
    found = dump(recorder)
    assert found.forward_pass_id.tolist() == [3, 3, 4]
    assert found.gatherer_key == ["left", "right", "primary"]
    assert found.logical_count.tolist() == [counted(ids).tolist() for ids in (first, second, third)]


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_per_token_keeps_everything(spilled, dtype, device, tmp_path):
    """Passes of several chunks; a layer that sees fewer tokens, one that sees none."""
    rng = np.random.default_rng(5)
    spill = tmp_path if spilled else None
    recorder = make("per_token", device, chunk_tokens=4, spill_directory=spill, top_k=3)
    recorder.start_record()
    expected = []
    for number, tokens in enumerate((3, 13, 0, 4, 8)):
        ids, weights = routing(rng, tokens, top_k=3)
        weights = torch.from_numpy(weights).to(dtype or torch.float32)
        with recorder.with_forward_pass(number):
            for layer in range(LAYERS if number < 4 else 1):
                rows = tokens if layer != 1 else tokens // 2
                given = weights[layer, :rows].to(device) if dtype else None
                with recorder.with_current_layer(layer):
                    recorder.on_select_experts(torch.from_numpy(ids[layer, :rows]).to(device), given)
        ids[1, tokens // 2 :], weights[1, tokens // 2 :] = -1, 0
        if number == 4:
            ids[1:], weights[1:] = -1, 0
        expected.append((ids, weights.float().numpy()))
    found = dump(recorder)
    assert found.num_tokens.tolist() == [3, 13, 0, 4, 8]
    records = found.records()
    for record, (ids, weights) in zip(records, expected, strict=True):
        assert record["topk_ids_of_layer"].tolist() == ids.tolist()
        assert record["logical_count"].tolist() == counted(ids).tolist()
        if dtype:
            assert record["topk_weights_of_layer"].tolist() == weights.tolist()
    assert (found.topk_weights is None) == (dtype is None)
    assert list(tmp_path.iterdir()) == []


def test_per_token_keeps_the_last_passes():
    recorder = make("per_token", buffer_size=2)
    recorder.start_record()
    for number in range(5):
        with recorder.with_forward_pass(number):
            show(recorder, np.full((LAYERS, number, 2), number % EXPERTS, np.int32))
    found = dump(recorder)
    assert found.forward_pass_id.tolist() == found.num_tokens.tolist() == [3, 4]
    assert found.topk_ids[:, 0, 0].tolist() == [3] * 3 + [4] * 4


def test_a_full_disk_is_said_until_a_reset(tmp_path, monkeypatch):
    recorder = make("per_token", spill_directory=tmp_path)
    recorder.start_record()
    ids, _ = routing(np.random.default_rng(0), 4)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda dir, buffering: io.FileIO("/dev/full", "r+"))
        for number in range(6):  # more than there are outboxes
            with recorder.with_forward_pass(number):
                show(recorder, ids)
        for _ in range(2):
            with pytest.raises(OSError, match=f"tokens were not spilled: No space left on device: '{tmp_path}'"):
                dump(recorder)
    recorder.reset()
    for number in (6, 7):
        with recorder.with_forward_pass(number):
            show(recorder, ids[:, number - 6 :])
    found = dump(recorder)
    assert found.forward_pass_id.tolist() == [6, 7]
    assert found.num_tokens.tolist() == [4, 3]
    assert found.topk_ids.transpose(1, 0, 2).tolist() == np.concatenate([ids, ids[:, 1:]], axis=1).tolist()


def test_maps_change_while_recording(device):
    rng = np.random.default_rng(6)
    other = np.array([[4, 1, 2, 3, 0, 1]] * LAYERS)
    for mode in ("stat", "per_pass", "per_token"):
        recorder = make(mode, device, physical_to_logical_map=MAP)
        recorder.start_record()
        shown = []
        for number, places in enumerate((MAP, MAP, other, MAP)):
            recorder.set_physical_to_logical_map(places if number else ExpertLocation.from_mapping(places))
            ids, _ = routing(rng, 6, num_slots=6)
            shown.append((ids, places))
            with recorder.with_forward_pass(number):
                show(recorder, ids)
                if number == 2:
                    recorder.set_physical_to_logical_map(MAP)  # from the next pass on
        found = dump(recorder)
        assert found.logical_count.tolist() == [
            reference.logical_counts(counted(ids, 6), places, EXPERTS).tolist() for ids, places in shown
        ]
        assert found.global_physical_count.tolist() == [counted(ids, 6).tolist() for ids, _ in shown]
        for record, (_, places) in zip(found.records(), shown, strict=True):
            assert record["physical_to_logical_map"].tolist() == places.tolist()
        with recorder.with_forward_pass(9):
            show(recorder, shown[0][0])
        assert dump(recorder).physical_to_logical_maps.tolist() == [MAP.tolist()]


@pytest.mark.parametrize("as_list", [False, True])
def test_dispatchers_counts(as_list, device):
    recorder = make("stat_approx", device, physical_to_logical_map=MAP)
    recorder.start_record()
    with recorder.with_forward_pass(0):
        show(recorder, np.zeros((LAYERS, 4, 2), np.int32))  # not what is counted here
        for counts, first in (([1, 2, 3, 4, 5, 6], None), ([10, -1], None), ([100, 0], 4)):
            with recorder.with_current_layer(1):
                given = counts if as_list else torch.tensor(counts, dtype=torch.int32, device=device)
                recorder.on_dispatch_counts(given, first)
    found = dump(recorder)
    assert found.global_physical_count.tolist() == [[[0] * 6, [11, 2, 3, 4, 105, 6], [0] * 6]]
    rule = r"`counts` must be in slots \[0, 6\), got 3 from slot 4 on"
    with recorder.with_current_layer(0), pytest.raises(ValueError, match=rule):
        recorder.on_dispatch_counts([1, 2, 3], 4)


def test_control_in_any_order():
    recorder = make("stat")
    ids, _ = routing(np.random.default_rng(0), 3)
    with pytest.warns(RuntimeWarning, match="`stop_record` changes nothing: recording is off already"):
        recorder.stop_record()
    recorder.reset()
    recorder.start_record()
    with pytest.warns(RuntimeWarning, match="`start_record` changes nothing: recording is on already"):
        recorder.start_record()
    with recorder.with_forward_pass(1):
        show(recorder, ids)
        recorder.stop_record()
        assert not recorder.recording
        show(recorder, ids)  # of the same pass
        with pytest.warns(RuntimeWarning, match="no pass was recorded"):
            dump(recorder)
        recorder.reset()
    with recorder.with_forward_pass(2):
        recorder.start_record()
        show(recorder, ids)  # recorded from the next pass on
    show(recorder, ids)  # outside of passes
    found = dump(recorder)
    assert found.forward_pass_id.tolist() == [1, -1]
    assert found.logical_count.tolist() == [(2 * counted(ids)).tolist(), counted(ids).tolist()]
    inside = pytest.raises(RuntimeError, match="`with_forward_pass` must not be inside another")
    with inside, recorder.with_forward_pass(3), recorder.with_forward_pass(4):
        pass
    with recorder.with_forward_pass(5):
        show(recorder, ids)
    assert dump(recorder).forward_pass_id.tolist() == [3, 5]


def test_no_mode_is_no_work():
    recorder = make(None)
    with pytest.warns(RuntimeWarning, match="the recorder's mode is None"):
        recorder.start_record()
    with recorder.with_forward_pass(0), recorder.with_current_layer(0):
        recorder.on_select_experts("nobody looks")
        recorder.on_dispatch_counts("nobody looks")
    recorder.reset()
    with pytest.warns(RuntimeWarning, match="the recorder's mode is None"):
        assert recorder.dump_record() is None
    assert not recorder.recording


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.filterwarnings("ignore:there is nothing to dump")
def test_control_from_another_thread(mode):
    """However control falls between hooks, a pass is in a dump whole, once, or not at all."""
    recorder = make(mode)
    ids, _ = routing(np.random.default_rng(0), 3)
    dumps = []
    stop = threading.Event()

    def control():
        while not stop.is_set():
            recorder.start_record()
            found = dump(recorder)
            recorder.stop_record()
            dumps.append(found)

    thread = threading.Thread(target=control)
    thread.start()
    for number in range(300):
        with recorder.with_forward_pass(number):
            show(recorder, ids)
    stop.set()
    thread.join()
    dumps.append(dump(recorder))
    seen = [number for found in dumps for number in found.forward_pass_id.tolist()]
    assert len(set(seen)) == len(seen)
    assert sorted(seen) == seen
    for found in dumps:
        assert (found.logical_count == counted(ids)).all()


def test_numpy_ids_are_answered_as_well():
    recorder = make("stat")
    recorder.start_record()
    with recorder.with_current_layer(0):
        recorder.on_select_experts(np.array([[0, 1], [1, -1]]))
    assert dump(recorder).logical_count[0, 0].tolist() == [1, 2, 0, 0, 0]


@pytest.mark.parametrize(("ranks", "gpus"), [(1, 1), (5, 5), (3, 1), (8, 1)])
def test_ranks_that_do_not_divide_the_slots_are_no_gpus_of_theirs(ranks, gpus, monkeypatch):
    monkeypatch.setattr("numba_moe.recorder.sums.place_in", lambda _group: (0, ranks))
    assert make("per_pass").num_gpus == gpus


BAD = {
    "mode": (lambda: make("all"), ValueError, "`mode` must be one of 'stat', 'stat_approx', 'per_pass', 'per_token', got 'all'"),
    "layers": (lambda: ExpertDistributionRecorder(0, 1, mode=None), ValueError, "`num_layers` must be at least 1, got 0"),
    "buffer": (lambda: make("stat", buffer_size=0), ValueError, "`buffer_size` must be at least 1, got 0"),
    "spill of counts": (lambda: make("stat", spill_directory="."), ValueError, "`spill_directory` must be None but for 'per_token'"),
    "map of other layers": (lambda: make("stat", physical_to_logical_map=MAP[:2]), ValueError, "`physical_to_logical_map` must be of 3 layers, got 2"),
    "map of other experts": (lambda: make("stat", physical_to_logical_map=MAP + 1), ValueError, r"`physical_to_logical_map` must be -1 or in \[0, num_experts\), got 5 at layer 0, slot 4"),
    "map of other slots": (lambda: make("stat").set_physical_to_logical_map(MAP), ValueError, r"must be of shape that of the map before = \(3, 5\), got shape \(3, 6\)"),
    "ranks": (lambda: make("stat", num_gpus=2), ValueError, "`num_gpus` must be a divisor of the number of slots = 5, got 2"),
    "layer": (lambda: make("stat").with_current_layer(3), ValueError, "`layer` must be at most num_layers - 1 = 2, got 3"),
    "no layer": (lambda: started().on_select_experts(IDS), RuntimeError, "hooks must be inside `with_current_layer`"),
    "floats": (lambda: in_layer(started(), IDS.float()), TypeError, "`topk_ids` must be of dtype int32 or int64, got float32"),
    "a list": (lambda: in_layer(started(), [[0]]), TypeError, "`topk_ids` must be a torch tensor"),
    "tokens outside of passes": (lambda: in_layer(started("per_token"), IDS), RuntimeError, "must be inside `with_forward_pass`"),
    "other top_k": (lambda: in_pass(started("per_token", top_k=3), IDS), ValueError, "`topk_ids` must be of top_k = 3 columns, got 2"),
    "weights of another shape": (lambda: in_pass(started("per_token"), IDS, torch.ones(1)), ValueError, r"`topk_weights` must be of shape `topk_ids`.shape"),
    "output mode": (lambda: make("stat").dump_record("text"), ValueError, "`output_mode` must be one of 'file', 'object', got 'text'"),
    "format": (lambda: make("stat").dump_record(format="xml"), ValueError, "`format` must be one of 'npz'"),
    "pass id": (lambda: in_pass(started(), IDS, number="1"), TypeError, "`forward_pass_id` must be an integer, got str"),
    "metrics of nothing": (lambda: started().metrics(), RuntimeError, "`metrics` must be asked after a pass was recorded"),
    "flag of no mode": (lambda: make(None).enabled, RuntimeError, "`enabled` must be asked of a recorder with a mode"),
    "counts of tokens": (lambda: make("per_token").layer_counts(0), RuntimeError, "`layer_counts` must be asked of a mode that counts, got 'per_token'"),
    "no window": (lambda: started().metrics(()), ValueError, "`windows` must be one window or more, got none"),
    "an empty window": (lambda: started().metrics((10, 0)), ValueError, "`windows` must be at least 1, got 0"),
    "half a window": (lambda: started().metrics((0.5,)), TypeError, "`windows` must be an integer, got float"),
    "a number of windows": (lambda: started().metrics(10), TypeError, "`windows` must be a sequence of integers, got int"),
    "no mode": (lambda: ExpertDistributionRecorder(1, 4), TypeError, r"ExpertDistributionRecorder.__init__\(\) missing 1 required keyword-only argument: 'mode'"),
    "unknown option": (lambda: make("stat", buffers=1), TypeError, r"ExpertDistributionRecorder.__init__\(\) got an unexpected keyword argument 'buffers'"),
    "counts of a dispatcher": (lambda: in_dispatch(started("stat_approx"), [0.5]), TypeError, "`counts` must be an array that converts to int64"),
    "a device": (lambda: ExpertDistributionRecorder(1, 4, mode="stat", device="nope"), ValueError, "`device` must be a CUDA device"),
    "a device without memory": (lambda: ExpertDistributionRecorder(1, 4, mode="stat", device="meta"), ValueError, "`device` must be"),
    "a kind of device": (lambda: ExpertDistributionRecorder(1, 4, mode="stat", device=0.5), TypeError, "`device` must be"),
    "a name that is a number": (lambda: make("per_pass").with_debug_name(3), TypeError, "`name` must be a str, got int"),
    "a slot by name": (lambda: in_dispatch(started("stat_approx"), [1], "0"), TypeError, "`first_slot` must be an integer, got str"),
    "metrics of tokens": (lambda: started("per_token").metrics(), RuntimeError, "`metrics` must be asked of a mode that counts, got 'per_token'"),
}  # fmt: skip
IDS = torch.zeros(4, 2, dtype=torch.int32)


def started(mode="stat", **options):
    recorder = make(mode, **options)
    recorder.start_record()
    return recorder


def in_layer(recorder, *given):
    with recorder.with_current_layer(0):
        recorder.on_select_experts(*given)


def in_dispatch(recorder, *given):
    with recorder.with_current_layer(0):
        recorder.on_dispatch_counts(*given)


def in_pass(recorder, *given, number=0):
    with recorder.with_forward_pass(number):
        in_layer(recorder, *given)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_dump_in_a_pass_leaves_it_its_map():
    other = np.array([[4, 1, 2, 3, 0, 1]] * LAYERS)
    for mode in ("stat", "per_token"):
        recorder = started(mode, physical_to_logical_map=other)
        in_pass(recorder, IDS)
        with recorder.with_forward_pass(1):
            in_layer(recorder, IDS)
            recorder.set_physical_to_logical_map(MAP)
            assert dump(recorder).logical_count[0, 0].tolist() == [0, 0, 0, 0, 8]
            in_layer(recorder, IDS)
        in_pass(recorder, IDS, number=2)
        assert dump(recorder).logical_count[:, 0].tolist() == [[0, 0, 0, 0, 16], [8, 0, 0, 0, 0]]


def test_weights_are_given_always_or_never():
    recorder = started("per_token")
    in_pass(recorder, IDS, torch.ones(4, 2))
    with pytest.raises(ValueError, match="`topk_weights` must be given, as before"):
        in_pass(recorder, IDS)


def test_metrics(device):
    recorder = make("stat", device, physical_to_logical_map=MAP, num_gpus=2)
    recorder.start_record()
    rng = np.random.default_rng(7)
    counts = []
    for number in range(12):
        ids, _ = routing(rng, 9, num_slots=6)
        with recorder.with_forward_pass(number):
            show(recorder, ids)
        counts.append(counted(ids, 6))
    found = recorder.metrics()
    counts = np.stack(counts)
    balance = reference.utilization(counts, 2)
    logical = reference.logical_counts(counts, MAP, EXPERTS).sum(axis=0)
    assert np.allclose(found.utilization.cpu(), balance[-1], rtol=1e-12)
    for window, value in found.balancedness.items():
        assert np.isclose(float(value), balance[-window:].mean(), rtol=1e-12)
    assert list(found.balancedness) == [10, 100, 1000]
    assert np.allclose(found.entropy.cpu(), reference.expert_entropy(logical))
    order = np.argsort(-logical, axis=1, kind="stable")
    assert found.hottest_experts.tolist() == order.tolist()
    assert found.hottest_counts.tolist() == np.take_along_axis(logical, order, 1).tolist()


def test_metrics_of_recurring_ids_go_by_the_map_of_each_pass():
    recorder = started("stat", physical_to_logical_map=MAP)
    in_pass(recorder, IDS, number=7)
    recorder.set_physical_to_logical_map(np.array([[4, 1, 2, 3, 0, 1]] * LAYERS))
    in_pass(recorder, IDS, number=7)
    in_pass(recorder, IDS, number=7)
    found = recorder.metrics()
    assert found.hottest_experts[0, :2].tolist() == [4, 0]
    assert found.hottest_counts[0, :2].tolist() == [16, 8]


def test_a_reset_in_a_pass_keeps_what_the_pass_has():
    for mode in ("stat", "per_pass", "per_token"):
        recorder = started(mode)
        in_pass(recorder, IDS)
        with recorder.with_forward_pass(1):
            in_layer(recorder, IDS)
            recorder.reset()
            in_layer(recorder, IDS[:1])
        found = dump(recorder)
        assert found.forward_pass_id.tolist() == [1]
        assert found.logical_count[0, 0].tolist() == [10, 0, 0, 0, 0]


HUGE = torch.full((2, 4), 2**62)
OVERFLOW = {
    "logical_counts": lambda: logical_counts(HUGE, torch.zeros(2, 4, dtype=torch.int64), 1),
    "traffic_matrix": lambda: traffic_matrix(HUGE[None], 2),
    "metrics": lambda: huge("stat").metrics(),
}


def huge(mode):
    recorder = started(mode)
    for number in range(2):
        with recorder.with_forward_pass(number):
            recorder.layer_counts(0)[0] += 2**62
    return recorder


@pytest.mark.parametrize("name", OVERFLOW)
def test_sums_past_int64_are_an_error(name):
    with pytest.raises(ValueError, match="must be small enough for sums to fit int64"):
        OVERFLOW[name]()


def test_ratios_of_huge_counts_are_right(device):
    assert utilization(HUGE.to(device), 2).tolist() == [1, 1]
    assert expert_entropy(HUGE.to(device)).tolist() == [1, 1]
    ragged = torch.tensor([[2**62, 2**62, 2**62, 0]], device=device)
    assert utilization(ragged, 2).tolist() == [0.75]
    assert np.allclose(expert_entropy(ragged).cpu(), np.log(3) / np.log(4), rtol=1e-12)
    assert logical_counts(HUGE.to(device), torch.arange(4).repeat(2, 1).to(device), 4).tolist() == HUGE.tolist()


OPTIONS = {
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "meta": lambda: torch.set_default_device("meta"),
}


@pytest.mark.parametrize("defaults", OPTIONS)
@pytest.mark.parametrize("spilled", [False, True])
def test_what_is_recorded_does_not_follow_torchs_defaults(defaults, spilled, tmp_path):
    ids, weights = routing(np.random.default_rng(8), 300)
    try:
        OPTIONS[defaults]()
        found = {}
        for mode in ("stat", "stat_approx", "per_pass", "per_token"):
            recorder = make(mode, spill_directory=tmp_path if spilled and mode == "per_token" else None)
            recorder.start_record()
            with recorder.with_forward_pass(0):
                show(recorder, ids, weights)
                with recorder.with_current_layer(0):
                    recorder.on_dispatch_counts([1] * EXPERTS)
            if mode != "per_token":
                recorder.metrics((1,))
            found[mode] = dump(recorder)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found["stat"].logical_count.tolist() == found["per_pass"].logical_count.tolist() == [counted(ids).tolist()]
    assert found["stat_approx"].logical_count[0, 0].tolist() == [1] * EXPERTS
    assert found["per_token"].topk_ids.transpose(1, 0, 2).tolist() == ids.tolist()
    assert np.array_equal(found["per_token"].topk_weights.transpose(1, 0, 2), weights)


@pytest.mark.parametrize("defaults", ["bfloat16", "autocast"])
def test_coactivation_counts_past_what_half_precision_holds(defaults, device):
    ids = torch.tensor([[0, 1]], device=device).repeat(777, 1)
    try:
        if defaults == "bfloat16":
            torch.set_default_dtype(torch.bfloat16)
        with torch.autocast(device, torch.bfloat16, enabled=defaults == "autocast"):
            found = coactivation(ids, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.tolist() == [[777, 777], [777, 777]]


ANSWERS = {
    "utilization": (utilization, (torch.tensor([[6, 2, 3, 1]]), 2)),
    "expert_entropy": (expert_entropy, (torch.tensor([[5, 2], [0, 7]]),)),
    "coactivation": (coactivation, (torch.tensor([[0, 1], [1, 2], [1, -1]]), 3)),
    "logical_counts": (logical_counts, (torch.tensor([[3, 1, 2]]), torch.tensor([[0, 1, 0]]), 2)),
    "traffic_matrix": (traffic_matrix, (torch.tensor([[[3, 1]], [[2, 5]]]), 2)),
}


class Tagged(torch.Tensor):
    """A tensor of another class."""


def kinds_of(value):
    yield value.int()
    yield torch.nn.Parameter(value, requires_grad=False)
    yield value.as_subclass(Tagged)


@pytest.mark.parametrize("name", ANSWERS)
def test_parameters_and_subclasses_are_answered(name):
    function, args = ANSWERS[name]
    expected = function(*args)
    assert np.array_equal(function(*(arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args)), expected)
    for kind in zip(*map(kinds_of, filter(torch.is_tensor, args)), strict=True):
        others = [arg for arg in args if not torch.is_tensor(arg)]
        assert torch.equal(torch.as_tensor(function(*kind, *others)), expected)


@pytest.mark.parametrize("name", ANSWERS)
def test_compiled_code_is_answered(name):
    function, args = ANSWERS[name]
    compiled = torch.compile(
        lambda *tensors: function(*tensors, *args[len(tensors) :]), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*filter(torch.is_tensor, args)), function(*args))


def test_hooks_in_compiled_code_are_refused_or_count_outside_of_it():
    recorder = started("stat")
    compiled = torch.compile(lambda ids: (in_layer(recorder, ids), ids + 1)[1], backend="eager")
    assert torch.equal(compiled(IDS), IDS + 1)
    assert dump(recorder).logical_count[0, 0].tolist() == [8, 0, 0, 0, 0]


def test_a_dump_is_a_file_whose_path_is_returned(tmp_path):
    recorder = started("per_pass")
    in_pass(recorder, IDS)
    path = recorder.dump_record(directory=tmp_path)
    assert path.name.startswith("expert_distribution_recorder_")
    assert path.name.endswith("_0.npz")
    assert load(path).logical_count[0, 0].tolist() == [8, 0, 0, 0, 0]
    with pytest.warns(RuntimeWarning, match="no pass was recorded"):
        assert recorder.dump_record(directory=tmp_path) is None
    in_pass(recorder, IDS)
    with pytest.raises(FileNotFoundError):
        recorder.dump_record(directory=tmp_path / "gone")
    assert load(recorder.dump_record(directory=tmp_path)).forward_pass_id.tolist() == [0]  # kept


def test_hooks_in_the_simulator_leave_the_reference_alone(device):
    if device == "cuda":
        pytest.skip("of the simulator")
    assert simulator.is_running()
    recorder = started("stat")
    in_pass(recorder, IDS)
    assert dump(recorder).logical_count[0, 0].tolist() == [8, 0, 0, 0, 0]
