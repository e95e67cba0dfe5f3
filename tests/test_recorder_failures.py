"""The recorder when things fail: exceptions at any line, disks that are full or slow, processes that fork."""

import itertools
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import numba_moe
from numba_moe.recorder import ExpertDistributionRecorder, dump_files, load

PACKAGE = str(Path(numba_moe.__file__).parent)
MODES = ("stat", "stat_approx", "per_pass", "per_token")
IDS = torch.tensor([[0, 1], [1, 2], [3, -1]])
WEIGHTS = torch.tensor([[0.5, 0.25], [0.75, 0.125], [1.0, 0.0]])
COUNTS = [1, 2, 1, 1]  # of IDS by expert
pytestmark = pytest.mark.filterwarnings("ignore:.* changes nothing", "ignore:there is nothing to dump")


def make(mode, chunk_tokens=2, **options):
    recorder = ExpertDistributionRecorder(2, 4, mode=mode, device="cpu", chunk_tokens=chunk_tokens, **options)
    recorder.start_record()
    return recorder


def show(recorder, layers=(0, 1)):
    for layer in layers:
        with recorder.with_current_layer(layer):
            if recorder.mode == "stat_approx":
                recorder.on_dispatch_counts(COUNTS)
            else:
                recorder.on_select_experts(IDS, WEIGHTS)


def run_pass(recorder, number):
    with recorder.with_forward_pass(number):
        show(recorder)


def rich_pass(recorder, number):
    """Run a pass with everything that a model may do."""
    with recorder.with_forward_pass(number, num_tokens=2):
        with recorder.disable_this_region():
            show(recorder)
        with recorder.with_debug_name("one"):
            show(recorder, [0])
        with recorder.with_debug_name("two"):
            show(recorder, [1])


def dump(recorder):
    return recorder.dump_record("object")


def stopped_at_each_line(prepare, action, error=KeyboardInterrupt):
    """Yield what `prepare` makes, after an error at the first line of the package that `action` runs, the second, ...

    The last time there is no such line, and nothing fails.
    """
    for stop in itertools.count(1):
        given = prepare()
        stopped = stopped_at_line(stop, action, given, error)
        yield given
        if not stopped:
            assert stop > 5
            return


def stopped_at_line(stop, action, given, error):
    """Run an action and raise an error at a line of the package; return whether it came that far."""
    seen = 0

    def at_line(frame, event, argument):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == stop:
                raise error
        return at_line

    def at_call(frame, event, argument):
        return at_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        action(given)
    except error:
        return True
    finally:
        sys.settrace(before)
    return False


def counts_of_passes(found):
    """Return the counts of each record [L, E] by pass id and name; for tokens check that they say the same."""
    counts = {}
    for record in found.records():
        key = record["forward_pass_id"], record["gatherer_key"]
        assert key not in counts, "counted twice"
        counts[key] = record["logical_count"].tolist()
        if found.mode == "per_token":
            ids = record["topk_ids_of_layer"]
            assert counts[key] == [np.bincount(of_layer[of_layer >= 0], minlength=4).tolist() for of_layer in ids]
    return counts


@pytest.mark.sweep(2)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(("mode", "spilled"), [*((mode, False) for mode in MODES), ("per_token", True)])
def test_a_pass_that_stops_at_any_line_loses_and_doubles_nothing(mode, spilled, error, tmp_path):
    whole, nothing = [COUNTS, COUNTS], [[0] * 4] * 2

    def prepare():
        recorder = make(mode, chunk_tokens=4, spill_directory=tmp_path if spilled else None)
        run_pass(recorder, 0)
        return recorder

    for recorder in stopped_at_each_line(prepare, lambda recorder: run_pass(recorder, 1), error):
        run_pass(recorder, 2)
        counts = counts_of_passes(dump(recorder))
        assert counts.pop((0, "primary")) == counts.pop((2, "primary")) == whole
        assert set(counts) <= {(1, "primary")}
        # Layers are counted one after the other, each whole or not at all.
        assert all(of_pass in (nothing, [COUNTS, [0] * 4], whole) for of_pass in counts.values())


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", MODES)
def test_a_pass_that_stops_leaves_no_setting_behind(mode):
    """No name, no region that is off, no number of tokens of it holds in the next pass."""
    whole = [COUNTS, COUNTS]

    def prepare():
        recorder = make(mode)
        rich_pass(recorder, 0)
        return recorder

    for recorder in stopped_at_each_line(prepare, lambda recorder: rich_pass(recorder, 1)):
        run_pass(recorder, 2)
        if mode != "stat_approx":
            outside = pytest.raises(RuntimeError, match="hooks must be inside `with_current_layer`")
            with outside, recorder.with_forward_pass(3):
                recorder.on_select_experts(IDS, WEIGHTS)
        counts = counts_of_passes(dump(recorder))
        assert counts[2, "primary"] == whole
        if mode == "per_pass":
            assert counts[0, "one"] == [[1, 2, 1, 0], [0] * 4]
            assert counts[0, "two"] == [[0] * 4, [1, 2, 1, 0]]


# Python runs the line of a `with` again before it closes the file.
@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("output", ["object", "npz", "json", "pt"])
@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_a_dump_that_stops_at_any_line_gives_out_nothing(mode, output, spilled, tmp_path):
    if spilled and (mode != "per_token" or output != "object"):
        pytest.skip("of tokens")
    out = tmp_path / "dumps"
    out.mkdir()

    def prepare():
        recorder = make(mode, spill_directory=tmp_path if spilled else None)
        for number in (7, 8):
            run_pass(recorder, number)
        if mode != "per_token":
            show(recorder, [0])  # outside of passes
        return recorder

    def action(recorder):
        if output == "object":
            given_out.append(recorder.dump_record("object"))
        else:
            given_out.append(recorder.dump_record(format=output, directory=out))

    expected = {(7, "primary"): [COUNTS, COUNTS], (8, "primary"): [COUNTS, COUNTS]}
    if mode != "per_token":
        expected[-1, "primary"] = [COUNTS, [0] * 4]
    given_out = []
    for recorder in stopped_at_each_line(prepare, action):
        if given_out:
            break
        assert list(out.iterdir()) == []
        assert counts_of_passes(dump(recorder)) == expected
        run_pass(recorder, 9)
        assert counts_of_passes(dump(recorder)) == {(9, "primary"): [COUNTS, COUNTS]}
    if output == "object":
        assert counts_of_passes(given_out[0]) == expected
    elif output == "pt" and mode == "stat":
        assert load(given_out[0]).logical_count.tolist() == list(expected.values())
    else:
        assert counts_of_passes(load(given_out[0])) == expected


CONTROL = {
    "start": lambda recorder: recorder.start_record(),
    "stop": lambda recorder: recorder.stop_record(),
    "reset": lambda recorder: recorder.reset(),
    "close": lambda recorder: recorder.close(),
    "metrics": lambda recorder: recorder.metrics((1, 10)),
}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.parametrize("name", CONTROL)
def test_control_that_stops_at_any_line_leaves_a_recorder_that_counts(name, mode):
    if name == "metrics" and mode == "per_token":
        pytest.skip("metrics are of counts")
    whole = [COUNTS, COUNTS]

    def prepare():
        recorder = make(mode)
        run_pass(recorder, 0)
        if name == "start":
            recorder.stop_record()
        return recorder

    for recorder in stopped_at_each_line(prepare, CONTROL[name]):
        run_pass(recorder, 1)
        if not recorder.recording:
            recorder.start_record()
        run_pass(recorder, 2)
        counts = counts_of_passes(dump(recorder))
        assert counts[2, "primary"] == whole
        assert all(of_pass == whole for of_pass in counts.values())
        assert set(counts) <= {(number, "primary") for number in range(3)}
        if name not in ("reset", "close"):
            assert (0, "primary") in counts


def test_an_error_at_the_end_of_a_pass_costs_this_pass_alone(monkeypatch):
    recorder = make("stat")
    run_pass(recorder, 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "sum", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            run_pass(recorder, 1)
    run_pass(recorder, 2)
    whole = [COUNTS, COUNTS]
    assert counts_of_passes(dump(recorder)) == {(0, "primary"): whole, (2, "primary"): whole}


class Writer:
    """Stands for a slow disk: writing goes on when it is told to, and fails if it is to."""

    def __init__(self, monkeypatch, error=None):
        self.begun, self.go_on, self._error = threading.Event(), threading.Event(), error
        self._write = dump_files._WRITERS[".npz"]
        monkeypatch.setitem(dump_files._WRITERS, ".npz", self)

    def __call__(self, file, dump):
        self.begun.set()
        assert self.go_on.wait(30)
        self._write(file, dump)
        if self._error is not None:
            raise self._error


def in_thread(call):
    """Run a call in a thread; return a function that waits for what it returns or raises."""
    found = []

    def run():
        try:
            found.append((call(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(30)
        value, error = found[0]
        if error is not None:
            raise error
        return value

    return result


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.parametrize("fails", [False, True])
def test_passes_and_control_go_on_while_a_dump_is_written(mode, fails, spilled, tmp_path, monkeypatch):
    if spilled and mode != "per_token":
        pytest.skip("of tokens")
    recorder = make(mode, spill_directory=tmp_path if spilled else None)
    for number in (0, 1):
        run_pass(recorder, number)
    writer = Writer(monkeypatch, OSError(28, "No space left on device") if fails else None)
    writing = in_thread(lambda: recorder.dump_record(directory=tmp_path))
    assert writer.begun.wait(30)
    for number in (2, 3):  # none of these waits for the disk
        run_pass(recorder, number)
        recorder.stop_record()
        recorder.start_record()
    recorder.set_physical_to_logical_map([[3, 2, 1, 0]] * 2)
    if mode != "per_token":
        recorder.metrics((1,))
    run_pass(recorder, 4)
    writer.go_on.set()
    if fails:
        with pytest.raises(OSError, match="No space left on device"):
            writing()
    else:
        assert load(writing()).forward_pass_id.tolist() == [0, 1]
    found = dump(recorder)
    assert found.forward_pass_id.tolist() == [*((0, 1) if fails else ()), 2, 3, 4]
    assert found.logical_count.tolist() == [[COUNTS, COUNTS]] * (len(found.forward_pass_id) - 1) + [[COUNTS[::-1]] * 2]
    if mode == "per_token":
        tokens = found.topk_ids.reshape(-1, 3, 2, 2)
        assert (tokens == IDS.numpy()[:, None]).all()
        assert np.array_equal(found.topk_weights.reshape(-1, 3, 2, 2)[-1, :, 0], WEIGHTS)


@pytest.mark.parametrize("mode", ["stat", "per_token"])
def test_a_failed_dump_keeps_the_last_passes_in_order(mode, tmp_path, monkeypatch):
    recorder = make(mode, buffer_size=3)
    for number in range(3):
        run_pass(recorder, number)
    writer = Writer(monkeypatch, OSError(5, "Input/output error"))
    writing = in_thread(lambda: recorder.dump_record(directory=tmp_path))
    assert writer.begun.wait(30)
    for number in (3, 4):
        run_pass(recorder, number)
    writer.go_on.set()
    with pytest.raises(OSError, match="Input/output error"):
        writing()
    assert list(tmp_path.iterdir()) == []
    assert dump(recorder).forward_pass_id.tolist() == [2, 3, 4]


def test_two_dumps_at_once_share_the_passes(tmp_path, monkeypatch):
    recorder = make("per_pass")
    run_pass(recorder, 0)
    writer = Writer(monkeypatch)
    first = in_thread(lambda: recorder.dump_record(directory=tmp_path))
    assert writer.begun.wait(30)
    run_pass(recorder, 1)
    second = in_thread(lambda: dump(recorder))  # waits for the first
    writer.go_on.set()
    assert load(first()).forward_pass_id.tolist() == [0]
    assert second().forward_pass_id.tolist() == [1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_reset_while_a_dump_is_written_is_of_everything(fails, tmp_path, monkeypatch):
    recorder = make("per_pass")
    run_pass(recorder, 0)
    writer = Writer(monkeypatch, OSError(5, "Input/output error") if fails else None)
    writing = in_thread(lambda: recorder.dump_record(directory=tmp_path))
    assert writer.begun.wait(30)
    run_pass(recorder, 1)
    recorder.reset()
    run_pass(recorder, 2)
    writer.go_on.set()
    if fails:
        with pytest.raises(OSError, match="Input/output error"):
            writing()
    else:
        assert load(writing()).forward_pass_id.tolist() == [0]
    assert dump(recorder).forward_pass_id.tolist() == [2]


def test_json_is_written_in_parts_that_are_the_whole(tmp_path):
    """While one call makes the text of a large array, no other thread can run Python."""
    for array in (np.arange(70_000).reshape(7, 100, 100), np.zeros((0, 2, 3)), np.arange(70_000.0).reshape(70_000, 1)):
        parts = list(dump_files._json_of(array))
        assert "".join(parts) == json.dumps(array.tolist())
        assert max(part.count(",") for part in parts) < dump_files.NUMBERS_AT_ONCE
    recorder = make("per_pass")
    run_pass(recorder, 0)
    assert counts_of_passes(load(recorder.dump_record(format="json", directory=tmp_path))) == {
        (0, "primary"): [COUNTS, COUNTS]
    }


FORK = """
import os, signal, sys, threading, warnings
import torch
from numba_moe.recorder import ExpertDistributionRecorder

warnings.simplefilter("ignore")
ids = torch.tensor([[0, 1]] * 50)


def hook(recorder):
    with recorder.with_current_layer(0):
        if recorder.mode == "stat_approx":
            recorder.on_dispatch_counts([50, 50, 0, 0])
        else:
            recorder.on_select_experts(ids)


def run_pass(recorder, number):
    with recorder.with_forward_pass(number):
        hook(recorder)


def fork(recorder, passes, go_on):
    if os.fork():
        os.wait()
        return
    signal.alarm(60)  # what hangs is killed
    go_on()
    for number in range(20, 23):
        run_pass(recorder, number)
    found = recorder.dump_record("object")
    counts = found.logical_count.tolist()
    right = found.forward_pass_id.tolist() == [*passes, 20, 21, 22] and counts == [[[50, 50, 0, 0]]] * len(counts)
    print("RIGHT" if right else f"{found.forward_pass_id} {counts}", flush=True)
    os._exit(0)


def beside_a_thread(recorder):
    locked, stop = threading.Event(), threading.Event()

    def other():
        with recorder.with_forward_pass(3), recorder._lock, recorder._dumping:
            hook(recorder)
            locked.set()
            stop.wait()

    thread = threading.Thread(target=other)
    thread.start()
    locked.wait()
    fork(recorder, [], lambda: None)
    stop.set()
    thread.join()


for mode in sys.argv[2:]:
    recorder = ExpertDistributionRecorder(1, 4, mode=mode, device="cpu")
    recorder.start_record()
    for number in range(3):
        run_pass(recorder, number)
    if sys.argv[1] == "inside a pass":
        opened = recorder.with_forward_pass(3)

        def end():
            hook(recorder)
            opened.__exit__(None, None, None)

        opened.__enter__()
        hook(recorder)
        fork(recorder, [3], end)
        opened.__exit__(None, None, None)
    elif sys.argv[1] == "beside a thread":
        beside_a_thread(recorder)
    else:
        fork(recorder, [], lambda: None)
        run_pass(recorder, 3)
    found = recorder.dump_record("object")
    print(found.forward_pass_id.tolist(), found.logical_count.sum())
"""


@pytest.mark.sweep(1)
@pytest.mark.parametrize("where", ["between passes", "inside a pass", "beside a thread"])
def test_a_forked_child_has_an_empty_recorder_that_works(where, without_simulator):
    printed = without_simulator(FORK, where, *MODES).splitlines()
    assert printed == ["RIGHT", "[0, 1, 2, 3] 400"] * len(MODES)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("numba-moe-recorder")]


def test_the_recorders_thread_ends_with_it():
    before = threads()
    with make("per_token") as recorder:
        run_pass(recorder, 0)
        assert dump(recorder).forward_pass_id.tolist() == [0]
        (thread,) = set(threads()) - set(before)
        run_pass(recorder, 1)
    assert not thread.is_alive()
    assert not recorder.recording
    recorder.start_record()  # with a new thread
    run_pass(recorder, 2)
    assert dump(recorder).forward_pass_id.tolist() == [2]
    (thread,) = set(threads()) - set(before)
    del recorder
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", [None, *MODES])
def test_close_is_for_every_mode_and_not_inside_a_pass(mode):
    recorder = ExpertDistributionRecorder(2, 4, mode=mode, device="cpu")
    recorder.close()
    recorder.close()
    if mode is not None:
        recorder.start_record()
        inside = pytest.raises(RuntimeError, match="`close` must not be called inside a pass")
        with recorder.with_forward_pass(0), inside:
            recorder.close()


INFERENCE = ("made", "first pass", "second pass", "control")


@pytest.mark.parametrize(
    "inside", [c for n in range(5) for c in itertools.combinations(INFERENCE, n)], ids=" and ".join
)
@pytest.mark.parametrize("mode", MODES)
def test_inference_mode_is_no_obstacle(mode, inside):
    """Whatever of a recorder's life happens in torch.inference_mode, and whatever outside."""
    with torch.inference_mode("made" in inside):
        recorder = ExpertDistributionRecorder(2, 4, mode=mode, device="cpu", chunk_tokens=2)
    with torch.inference_mode("control" in inside):
        recorder.start_record()
    for number, name in enumerate(("first pass", "second pass", "first pass")):
        with torch.inference_mode(name in inside):
            rich_pass(recorder, number)
            run_pass(recorder, number + 10)
    with torch.inference_mode("control" in inside):
        if mode != "per_token":
            recorder.metrics((1, 2))
        counts = counts_of_passes(dump(recorder))
        recorder.reset()
        recorder.stop_record()
    assert all(counts[number, "primary"] == [COUNTS, COUNTS] for number in (10, 11, 12))


def test_weights_with_a_gradient_are_recorded():
    recorder = make("per_token")
    for number in range(2):
        with recorder.with_forward_pass(number), recorder.with_current_layer(0):
            recorder.on_select_experts(IDS, WEIGHTS.clone().requires_grad_())
    assert np.array_equal(dump(recorder).topk_weights[:3, 0], WEIGHTS)
