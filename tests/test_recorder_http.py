"""Control over HTTP, by a client that asks the app itself."""

import asyncio
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from numba_moe.recorder import ExpertDistributionRecorder, load
from numba_moe.recorder.dump_files import FORMATS
from numba_moe.recorder.http import make_app

pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.filterwarnings("ignore:there is nothing to dump", "ignore:.*changes nothing")


def make(mode="stat"):
    return ExpertDistributionRecorder(1, 3, mode=mode, device="cpu")


def count(recorder, number=0):
    with recorder.with_forward_pass(number), recorder.with_current_layer(0):
        recorder.on_select_experts(torch.tensor([[0, 2], [2, -1]]))


def ask(app, *paths, method="POST", at_once=False):
    async def talk():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://recorder") as client:
            calls = [client.request(method, path) for path in paths]
            return await asyncio.gather(*calls) if at_once else [await call for call in calls]

    return asyncio.run(talk())


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("format", ["npz", "csv"])
def test_record_and_dump(method, format, tmp_path):
    recorder = make()
    app = make_app(recorder, tmp_path)
    (answer,) = ask(app, "/start_expert_distribution_record", method=method)
    assert (answer.status_code, answer.json()) == (200, {"recording": True})
    count(recorder)
    answers = ask(
        app,
        "/stop_expert_distribution_record",
        f"/dump_expert_distribution_record?format={format}",
        "/dump_expert_distribution_record",
        method=method,
    )
    assert answers[0].json() == {"recording": False}
    assert load(tmp_path / answers[1].json()["file"]).logical_count.tolist() == [[[1, 0, 2]]]
    assert answers[2].json() == {"file": None}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
def test_other_methods_do_nothing(method, tmp_path):
    """A health probe or the preview of a link asks with HEAD."""
    recorder = make()
    app = make_app(recorder, tmp_path)
    names = ("start", "dump", "stop")
    (answer,) = ask(app, "/start_expert_distribution_record", method=method)
    assert not recorder.recording
    recorder.start_record()
    count(recorder)
    answers = ask(app, *[f"/{name}_expert_distribution_record" for name in names], method=method)
    assert [answer.status_code, *(other.status_code for other in answers)] == [405] * 4
    assert set(answer.headers["allow"].split(", ")) == {"GET", "POST"}
    assert recorder.recording
    assert list(tmp_path.iterdir()) == []
    assert recorder.dump_record(output_mode="object").logical_count.tolist() == [[[1, 0, 2]]]


TRICKS = [
    "/dump_expert_distribution_record?directory=/tmp",
    "/dump_expert_distribution_record?format=../../npz",
    "/dump_expert_distribution_record?format=npz&path=/etc/passwd",
    "/dump_expert_distribution_record?format=/../../x.npz",
    "/dump_expert_distribution_record?format=npz%00",
    "/dump_expert_distribution_record?format=",
    "/dump_expert_distribution_record/..%2f..%2fx",
    "/../dump_expert_distribution_record/../../x",
    "/dump_expert_distribution_record%2f..%2fx",
]


@pytest.mark.parametrize("trick", TRICKS)
def test_requests_name_no_places(trick, tmp_path):
    (tmp_path / "dumps").mkdir()
    recorder = make()
    app = make_app(recorder, tmp_path / "dumps")
    recorder.start_record()
    count(recorder)
    (answer,) = ask(app, trick)
    assert answer.status_code in (400, 404)
    assert [path.name for path in tmp_path.rglob("*")] == ["dumps"]
    assert recorder.dump_record(output_mode="object").logical_count.tolist() == [[[1, 0, 2]]]  # nothing was lost


def test_calls_at_once_beside_a_model(tmp_path):
    """Every pass that was recorded is in one dump, whole."""
    recorder = make()
    app = make_app(recorder, tmp_path)
    recorder.start_record()
    stop = threading.Event()

    def model():
        number = 0
        while not stop.is_set():
            count(recorder, number)
            number += 1

    thread = threading.Thread(target=model)
    thread.start()
    names = ["start", "dump", "stop", "dump", "start", "dump"] * 5
    answers = ask(app, *[f"/{name}_expert_distribution_record" for name in names], at_once=True)
    stop.set()
    thread.join()
    assert Counter(answer.status_code for answer in answers) == {200: 30}
    files = [answer.json()["file"] for answer in answers if answer.json().get("file")]
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    dumps = [load(tmp_path / name) for name in files]
    seen = np.concatenate([dump.forward_pass_id for dump in dumps] or [np.empty(0)])
    assert len(np.unique(seen)) == len(seen)
    for dump in dumps:
        assert (dump.logical_count == [[1, 0, 2]]).all()


def test_a_full_disk_is_an_answer(tmp_path, monkeypatch):
    recorder = make()
    app = make_app(recorder, tmp_path)
    recorder.start_record()
    count(recorder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("os.replace", fail)
        (answer,) = ask(app, "/dump_expert_distribution_record")
    assert (answer.status_code, answer.json()) == (500, {"error": "the dump was not written: No space left on device"})
    (answer,) = ask(app, "/dump_expert_distribution_record")
    assert load(tmp_path / answer.json()["file"]).logical_count.tolist() == [[[1, 0, 2]]]


@pytest.mark.parametrize("format", FORMATS)
def test_an_error_without_a_number_is_an_answer(format, tmp_path, monkeypatch):
    recorder = make()
    app = make_app(recorder, tmp_path)
    recorder.start_record()
    count(recorder)

    def fail(*_):
        raise OSError("the network is gone")

    monkeypatch.setattr("os.replace", fail)
    (answer,) = ask(app, f"/dump_expert_distribution_record?format={format}")
    assert (answer.status_code, answer.json()) == (500, {"error": "the dump was not written: the network is gone"})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["stat", "per_token", None])
def test_warnings_that_are_errors_are_no_errors_of_the_server(mode, tmp_path):
    recorder = make(mode)
    app = make_app(recorder, tmp_path)
    names = ("stop", "dump", "start", "start", "dump", "stop")
    answers = ask(app, *[f"/{name}_expert_distribution_record" for name in names])
    on = mode is not None
    expected = [{"recording": False}, {"file": None}, {"recording": on}, {"recording": on}, {"file": None}]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert [answer.json() for answer in answers] == [*expected, {"recording": False}]
    if on:
        recorder.start_record()
        count(recorder)
        (answer,) = ask(app, "/dump_expert_distribution_record")
        assert load(tmp_path / answer.json()["file"]).logical_count.tolist() == [[[1, 0, 2]]]


def test_a_directory_that_becomes_a_link_is_not_followed(tmp_path):
    (tmp_path / "dumps").mkdir()
    (tmp_path / "elsewhere").mkdir()
    recorder = make()
    app = make_app(recorder, tmp_path / "dumps")
    recorder.start_record()
    count(recorder)
    (tmp_path / "dumps").rmdir()
    (tmp_path / "dumps").symlink_to("elsewhere")
    (answer,) = ask(app, "/dump_expert_distribution_record")
    assert answer.status_code == 500
    assert "the directory is a link to another one now" in answer.json()["error"]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "dumps").unlink()
    (tmp_path / "dumps").mkdir()
    (answer,) = ask(app, "/dump_expert_distribution_record")
    assert load(tmp_path / "dumps" / answer.json()["file"]).logical_count.tolist() == [[[1, 0, 2]]]


def test_the_directory_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="`directory` must be a directory"):
        make_app(make(), tmp_path / "gone")


def test_no_mode_is_an_answer(tmp_path):
    with pytest.warns(RuntimeWarning, match="mode is None"):
        (answer,) = ask(make_app(make(None), tmp_path), "/start_expert_distribution_record")
    assert answer.json() == {"recording": False}
