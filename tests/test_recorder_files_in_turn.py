"""Recording as a context, files that rotate, and their sum: nothing is lost and nothing is there twice."""

import contextlib
import os
import threading
import warnings

import numpy as np
import pytest
import torch

from numba_moe import cli
from numba_moe.recorder import Dump, ExpertDistributionRecorder, load, merge
from numba_moe.recorder.dump_files import FORMATS

LAYERS, EXPERTS = 2, 5
MAPS = [np.array([[0, 1, 2, 3, 4, 0]] * LAYERS), np.array([[4, 3, 2, 1, 0, -1]] * LAYERS)]


def make(mode, **options):
    return ExpertDistributionRecorder(LAYERS, EXPERTS, mode=mode, device="cpu", **options)


def draw(number, rank=0, num_tokens=4, num_slots=EXPERTS):
    return np.random.default_rng([number, rank]).integers(0, num_slots, (LAYERS, num_tokens, 2))


def run(recorder, numbers, rank=0, num_slots=EXPERTS):
    for number in numbers:
        ids = torch.from_numpy(draw(number, rank, 4 + rank, num_slots))
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(number))
        with recorder.with_forward_pass(number):
            for layer in range(LAYERS):
                with recorder.with_current_layer(layer):
                    recorder.on_select_experts(ids[layer], weights[layer])


def counted(ids, num_slots=EXPERTS):
    return np.stack([np.bincount(rows.ravel(), minlength=num_slots) for rows in ids])


def wanted(numbers, ranks=(0,)):
    return np.stack([sum(counted(draw(number, rank, 4 + rank)) for rank in ranks) for number in numbers])


def files(folder):
    return sorted(folder.iterdir())


def test_recording_is_a_state_and_a_context():
    recorder = make("stat")
    assert not recorder.recording
    assert recorder.recording == False  # noqa: E712, as a bool is compared
    with recorder.recording() as same:
        assert same is recorder
        assert recorder.recording
        assert recorder.recording == True  # noqa: E712
        run(recorder, range(2))
        with recorder.recording():  # one inside another leaves it on
            run(recorder, [2])
        assert recorder.recording
    assert not recorder.recording
    run(recorder, [3])
    assert np.array_equal(recorder.dump_record("object").logical_count, wanted(range(3)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_at_the_end(format, tmp_path):
    path = tmp_path / f"counts.{format}"
    recorder = make("per_pass")
    with contextlib.suppress(KeyError), recorder.recording(path):
        run(recorder, range(3))
        raise KeyError  # what an exception ends is written too
    found = load(path, num_layers=LAYERS, num_experts=EXPERTS)
    assert np.array_equal(found.logical_count.sum(axis=0), wanted(range(3)).sum(axis=0))
    assert files(tmp_path) == [path]


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_rotation_by_passes(mode, tmp_path):
    recorder = make(mode)
    for numbers in (range(5), range(5, 12)):  # a second run goes on with the numbers
        with recorder.recording(tmp_path, rotate_passes=2):
            run(recorder, numbers)
    dumps = [load(path) for path in files(tmp_path)]
    assert [path.name for path in files(tmp_path)] == [f"expert_distribution_{i:06d}.npz" for i in range(7)]
    assert [dump.forward_pass_id.tolist() for dump in dumps] == [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9, 10], [11]]
    merged = merge(files(tmp_path))
    assert np.array_equal(merged.logical_count, wanted(range(12)))
    assert merged.rank_physical_count.shape[0] == 1
    if mode == "per_token":
        assert np.array_equal(merged.topk_ids, np.concatenate([draw(i).transpose(1, 0, 2) for i in range(12)]))


def test_rotation_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("numba_moe.recorder.recording.time.monotonic", lambda: now[0])
    recorder = make("stat")
    with recorder.recording(tmp_path, format="json", rotate_seconds=10):
        for number in range(6):
            now[0] += 4
            run(recorder, [number])
    assert [load(path).forward_pass_id.tolist() for path in files(tmp_path)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("mode", ["stat", "per_token"])
def test_a_disk_that_fails_loses_and_doubles_nothing(mode, tmp_path, monkeypatch):
    recorder = make(mode)
    own, calls = os.replace, []

    def fail(*args):
        calls.append(args)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        own(*args)

    monkeypatch.setattr("os.replace", fail)
    with warnings.catch_warnings(record=True) as seen, recorder.recording(tmp_path, rotate_passes=2):
        warnings.simplefilter("always")
        run(recorder, range(9))
    assert ["No space left" in str(warning.message) for warning in seen] == [True] * 2
    dumps = [load(path) for path in files(tmp_path)]
    assert [dump.forward_pass_id.tolist() for dump in dumps] == [[0, 1], [2, 3, 4, 5, 6, 7], [8]]
    assert np.array_equal(merge(dumps).logical_count, wanted(range(9)))


def test_the_last_file_that_fails_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    recorder = make("per_pass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"), recorder.recording(tmp_path / "x.npz"):
            run(recorder, range(3))
    assert files(tmp_path) == []
    assert not recorder.recording
    assert np.array_equal(recorder.dump_record("object").logical_count, wanted(range(3)))


def test_a_folder_that_is_away_for_a_while_stops_no_pass(tmp_path):
    folder, recorder = tmp_path / "here", make("stat")
    folder.mkdir()
    with recorder.recording(folder, rotate_passes=1):
        run(recorder, [0])
        folder.rename(tmp_path / "away")
        with pytest.warns(RuntimeWarning, match="they are kept for the next"):
            run(recorder, [1])
        (tmp_path / "away").rename(folder)
        run(recorder, [2])
    merged = merge(files(folder))
    assert merged.forward_pass_id.tolist() == [0, 1, 2]
    assert (merged.logical_count == wanted(range(3))).all()


def test_recordings_into_one_folder_take_names_of_their_own(tmp_path):
    recorders = make("stat"), make("per_pass")
    with contextlib.ExitStack() as recording:
        for recorder in recorders:
            recording.enter_context(recorder.recording(tmp_path, rotate_passes=1))
        for number in range(3):
            for recorder in recorders:
                run(recorder, [number])
    dumps = [load(path) for path in files(tmp_path)]
    assert sorted(dump.forward_pass_id.tolist() for dump in dumps) == [[0], [0], [1], [1], [2], [2]]
    assert sorted(dump.mode for dump in dumps) == ["per_pass"] * 3 + ["stat"] * 3


def test_a_name_that_another_process_is_about_to_write_is_left_to_it(tmp_path):
    (tmp_path / ".expert_distribution_000001").touch()
    recorder = make("stat")
    with recorder.recording(tmp_path, rotate_passes=1):
        run(recorder, range(3))
    names = [path.name for path in files(tmp_path)]
    assert names == [".expert_distribution_000001", *(f"expert_distribution_00000{n}.npz" for n in (0, 2, 3))]


def test_numbers_go_on_where_files_are_taken_away(tmp_path):
    recorder = make("stat")
    with recorder.recording(tmp_path, rotate_passes=1):
        run(recorder, [0])
        files(tmp_path)[0].unlink()
        run(recorder, [1])
    assert [path.name for path in files(tmp_path)] == ["expert_distribution_000001.npz"]


def test_a_file_that_was_there_outlives_a_write_that_fails(tmp_path, monkeypatch):
    path, recorder = tmp_path / "x.npz", make("stat")
    with recorder.recording(path):
        run(recorder, [0])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"), recorder.recording(path):
        run(recorder, [1])
    assert load(path).forward_pass_id.tolist() == [0]
    monkeypatch.undo()
    assert recorder.dump_record("object").forward_pass_id.tolist() == [1]


def test_other_threads_that_dump_and_switch_while_files_rotate(tmp_path):
    recorder = make("per_pass")
    other, done = [], threading.Event()

    def dump():
        while not done.is_set():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other.append(recorder.dump_record("object"))

    thread = threading.Thread(target=dump)
    with recorder.recording(tmp_path, rotate_passes=3):
        thread.start()
        run(recorder, range(60))
        done.set()
        thread.join()
    found = merge([*files(tmp_path), *(dump for dump in other if len(dump.forward_pass_id))])
    order = np.argsort(found.forward_pass_id)
    assert found.forward_pass_id[order].tolist() == list(range(60))
    assert np.array_equal(found.logical_count[order], wanted(range(60)))


WRONG = {
    "no folder": ({"path": "gone/x.npz"}, ValueError, "`path` must be in a folder"),
    "suffix": ({"path": "x.txt"}, ValueError, "`path` must be one of"),
    "format": ({"path": ".", "format": "xml"}, ValueError, "`format` must be one of"),
    "no path": ({"rotate_passes": 2}, ValueError, "`path` must be a folder"),
    "a file": ({"path": "x.npz", "rotate_passes": 2}, ValueError, "`path` must be a folder"),
    "passes": ({"path": ".", "rotate_passes": 0}, ValueError, "`rotate_passes` must be at least 1"),
    "a kind of passes": ({"path": ".", "rotate_passes": 1.5}, TypeError, "`rotate_passes` must be an integer"),
    "more passes than are kept": ({"path": ".", "rotate_passes": 9}, ValueError, "at most buffer_size = 8"),
    "seconds": ({"path": ".", "rotate_seconds": 0}, ValueError, "`rotate_seconds` must be above 0"),
    "a kind of seconds": ({"path": ".", "rotate_seconds": "1"}, TypeError, "`rotate_seconds` must be"),
    "seconds of a buffer": ({"path": ".", "rotate_seconds": 1}, ValueError, "None with a buffer_size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_recorded_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, error, text = WRONG[name]
    recorder = make("per_pass", buffer_size=8)
    with pytest.raises(error, match=text), recorder.recording(**options):
        pytest.fail("it went on")
    assert not recorder.recording


def dumps_of_ranks(mode, num_ranks=3, maps=MAPS):
    """Return a dump of each rank: three passes, of which each rank lacks one, and a new map before the last."""
    found = []
    for rank in range(num_ranks):
        recorder = make(mode, physical_to_logical_map=maps[0], num_gpus=3)
        recorder.rank = rank
        recorder.start_record()
        run(recorder, [number for number in range(2) if number != rank], rank, 6)
        recorder.set_physical_to_logical_map(maps[1])
        run(recorder, [2], rank, 6)
        found.append(recorder.dump_record("object"))
    return found


@pytest.mark.parametrize("format", ["object", *(name for name in FORMATS if name != "csv")])
@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_dumps_of_ranks(mode, format, tmp_path):
    dumps = dumps_of_ranks(mode)
    given = dumps
    if format != "object":
        given = [tmp_path / f"{rank}.{format}" for rank in range(3)]
        for dump, path in zip(dumps, given, strict=True):
            dump.save(path)
    found = merge(given[::-1])  # the order is that of ranks, not of files
    by_pass = dict(zip(found.forward_pass_id.tolist(), range(3), strict=True))
    assert sorted(by_pass) == [0, 1, 2]
    for number, row in by_pass.items():
        ranks = [rank for rank in range(3) if number != rank or number == 2]
        slots = sum(counted(draw(number, rank, 4 + rank, 6), 6) for rank in ranks)
        assert np.array_equal(found.global_physical_count[row], slots)
        places = found.physical_to_logical_maps[found.map_of_pass[row]]
        assert np.array_equal(places, MAPS[number == 2])
        logical = [[slots[layer][places[layer] == e].sum() for e in range(EXPERTS)] for layer in range(LAYERS)]
        assert found.logical_count[row].tolist() == logical
        if mode == "per_token":
            tokens = np.concatenate([draw(number, rank, 4 + rank, 6).transpose(1, 0, 2) for rank in ranks])
            end = found.num_tokens[: row + 1].sum()
            assert np.array_equal(found.topk_ids[end - found.num_tokens[row] : end], tokens)
            assert found.topk_weights.shape == found.topk_ids.shape
    assert np.array_equal(found.physical_to_logical_maps[-1], MAPS[1])
    assert found.mode == mode
    of_ranks = [dump.global_physical_count.sum(axis=0) for dump in dumps]
    assert np.array_equal(found.rank_physical_count, of_ranks)


def test_a_csv_of_each_rank(tmp_path):
    paths = [tmp_path / f"{rank}.csv" for rank in range(3)]
    for dump, path in zip(dumps_of_ranks("stat"), paths, strict=True):
        dump.save(path)
    found = merge(paths, num_layers=LAYERS, num_experts=EXPERTS)
    assert np.array_equal(
        found.logical_count[0],
        sum(load(path, num_layers=LAYERS, num_experts=EXPERTS).logical_count[0] for path in paths),
    )


def test_debug_names_and_counts_outside_of_passes():
    dumps = []
    for rank in range(2):
        recorder = make("per_pass")
        recorder.rank = rank
        recorder.start_record()
        with recorder.with_forward_pass(3):
            for name in ("a", "b"):
                with recorder.with_debug_name(name), recorder.with_current_layer(0):
                    recorder.on_select_experts(torch.tensor([[rank, 4]]))
        with recorder.with_current_layer(1):
            recorder.on_select_experts(torch.tensor([[rank, 3]]))
        dumps.append(recorder.dump_record("object"))
    found = merge(dumps)
    named = dict(
        zip(
            zip(found.forward_pass_id.tolist(), found.gatherer_key, strict=True),
            found.logical_count.tolist(),
            strict=True,
        )
    )
    assert named[3, "a"] == named[3, "b"] == [[1, 1, 0, 0, 2], [0] * 5]
    assert named[-1, "primary"] == [[0] * 5, [1, 1, 0, 2, 0]]


def test_files_of_other_ranks_do_not_move_the_numbers(tmp_path):
    (tmp_path / "expert_distribution_000004_1.npz").touch()
    recorder = make("per_pass")
    recorder.rank, recorder.num_ranks = 0, 2
    for _ in range(2):
        with recorder.recording(tmp_path, rotate_passes=2):
            run(recorder, range(3), 0)
    assert [path.name for path in files(tmp_path)] == [
        *(f"expert_distribution_{number:06d}_0.npz" for number in range(4)),
        "expert_distribution_000004_1.npz",
    ]


def of_group(rank, _size, folder):
    for mode in ("stat", "per_pass", "per_token"):
        recorder = make(mode, process_group=torch.distributed.group.WORLD, num_gpus=1)
        with recorder.recording(folder / mode, rotate_passes=2):
            run(recorder, range(5), rank)


@pytest.mark.slow
def test_ranks_rotate_together_and_merge_to_what_they_sum(run_ranks, tmp_path):
    for mode in ("stat", "per_pass", "per_token"):
        (tmp_path / mode).mkdir()
    assert run_ranks(of_group, 2, tmp_path) == [0, 0]
    summed = merge(files(tmp_path / "stat"))
    assert [path.name for path in files(tmp_path / "per_pass")][:3] == [
        "expert_distribution_000000_0.npz",
        "expert_distribution_000000_1.npz",
        "expert_distribution_000001_0.npz",
    ]
    for mode in ("stat", "per_pass", "per_token"):
        assert len(files(tmp_path / mode)) == (3 if mode == "stat" else 6)
        found = merge(files(tmp_path / mode))
        assert np.array_equal(found.logical_count, wanted(range(5), (0, 1)))
        assert np.array_equal(found.rank_physical_count, summed.rank_physical_count)


def dump_of(counts, **changes):
    counts = np.array(counts, np.int64)
    base = Dump(
        "stat",
        0,
        counts.shape[2],
        1,
        np.arange(len(counts)),
        ["primary"] * len(counts),
        np.zeros(len(counts), int),
        np.arange(counts.shape[2])[None, None],
    )
    dump = base.with_counts(counts)
    for name, value in changes.items():
        object.__setattr__(dump, name, value)
    return dump


ONE = dump_of([[[1, 2]]])
UNFIT = {
    "none": ([], ValueError, "`dumps` must be one dump or more"),
    "a path": ("x.npz", TypeError, "`dumps` must be a sequence"),
    "mode": ([ONE, dump_of([[[1, 2]]], mode="per_pass")], ValueError, "of one mode"),
    "experts": ([ONE, dump_of([[[1, 2, 3]]])], ValueError, "of one num_experts, 2 as in dump 0, got 3 in dump 1"),
    "gpus": ([dump_of([[[1, 2]]], num_gpus=2), dump_of([[[1, 2]]], num_gpus=4)], ValueError, "of one num_gpus"),
    "map": (
        [ONE, dump_of([[[1, 2]]], physical_to_logical_maps=np.array([[[1, 0]]]))],
        ValueError,
        "of one map of pass 0",
    ),
    "sums": ([dump_of([[[2**62, 1]]]), dump_of([[[2**62, 1]]])], ValueError, "whose sums fit int64"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_dumps_that_do_not_fit(name):
    dumps, error, text = UNFIT[name]
    with pytest.raises(error, match=text):
        merge(dumps)


def test_the_command(tmp_path, capsys):
    paths = [str(tmp_path / f"{rank}.npz") for rank in range(3)]
    for dump, path in zip(dumps_of_ranks("per_pass"), paths, strict=True):
        dump.save(path)
    assert cli.main(["merge", *paths, "--out", str(tmp_path / "all.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/all.json: 3 passes of 3 ranks, from 3 files\n"
    assert np.array_equal(load(tmp_path / "all.json").logical_count, merge(paths).logical_count)
