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
    app = make_app(recorder, tmp_path, allow_get=method == "GET")
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


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
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
    assert answer.headers["allow"] == "POST"
    if method != "HEAD":
        assert answer.json() == {"error": f"{method} does nothing here; send POST"}
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
    if not on:
        expected[2:4] = [{"error": "nothing is recorded: the recorder's mode is None"}] * 2
    assert [answer.status_code for answer in answers] == [200, 200, *[200 if on else 409] * 2, 200, 200]
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


DUMP, STATUS = "/dump_expert_distribution_record", "/status_expert_distribution_record"


def test_the_status(tmp_path):
    recorder = make()
    app = make_app(recorder, tmp_path)
    before, head = (ask(app, STATUS, method=method)[0] for method in ("GET", "HEAD"))
    assert (head.status_code, head.text) == (200, "")
    of_rank = {"rank": 0, "mode": "stat", "recording": False, "passes": 0, "last_pass": None}
    expected = {"recording": False, "mode": "stat", "ranks": [{**of_rank, "in_pass": False, "pending": []}]}
    assert before.json() == expected
    recorder.start_record()
    count(recorder, 7)
    with recorder.with_forward_pass(8):
        (answer,) = ask(app, STATUS, method="GET")
    about = {**of_rank, "recording": True, "passes": 1, "last_pass": 8, "in_pass": True, "pending": []}
    assert answer.json() == {**expected, "recording": True, "ranks": [about]}
    assert ask(app, STATUS, method="POST")[0].status_code == 405


def send(app, path=DUMP, method="POST", **request):
    async def talk():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://recorder") as client:
            return await client.request(method, path, **request)

    return asyncio.run(talk())


def test_parameters_are_in_a_body_too(tmp_path):
    recorder = make()
    app = make_app(recorder, tmp_path)
    recorder.start_record()
    for request in ({"json": {"format": "csv"}}, {"params": {"format": "csv", "partial": "true"}}):
        count(recorder)
        answer = send(app, **request)
        assert answer.json()["file"].endswith(".csv")
    count(recorder)
    typed = {"content-type": "Application/JSON; charset=utf-8"}
    assert send(app, content=b'{"format": "json", "partial": false}', headers=typed).json()["file"].endswith(".json")
    for empty in ({}, {"json": {}}, {"content": b" \n"}, {"content": b"", "headers": {"content-type": "text/plain"}}):
        assert send(app, **empty).json() == {"file": None}


WRONG = {
    "unknown": ({"params": {"forma": "csv"}}, 400, "the parameter 'forma' is unknown; known are format, partial"),
    "unknown in JSON": ({"json": {"path": "x"}}, 400, "the parameter 'path' is unknown; known are format, partial"),
    "none known": (
        {"path": STATUS, "method": "GET", "params": {"x": ""}},
        400,
        "the parameter 'x' is unknown; none is",
    ),
    "twice": ({"params": [("format", "npz"), ("format", "csv")]}, 400, "the parameter 'format' is there twice"),
    "twice in JSON": ({"content": b'{"format": "npz", "format": "csv"}'}, 400, "the key 'format' is there twice"),
    "in both": ({"params": {"format": "npz"}, "json": {"format": "npz"}}, 400, "the parameter 'format' is there twice"),
    "value": ({"json": {"format": "txt"}}, 400, "`format` must be one of npz, safetensors, json, csv, pt, got"),
    "type": ({"json": {"format": 7}}, 400, "`format` must be one of npz, "),
    "a number": ({"json": {"partial": 1}}, 400, "`partial` must be one of false, true, got 1"),
    "a word": ({"params": {"partial": "yes"}}, 400, "`partial` must be one of false, true, got"),
    "null": ({"json": {"format": None}}, 400, "`format` must be one of npz, "),
    "a list": ({"json": ["format"]}, 400, "the body must be a JSON object, got list"),
    "not JSON": ({"content": b"format=npz"}, 400, "the body must be JSON: "),
    "not text": ({"content": b"\xff\xfe{}"}, 400, "the body must be JSON: "),
    "deep": ({"content": b"[" * 60000}, 400, "the body must be JSON: "),
    "a form": (
        {"data": {"format": "npz"}},
        415,
        "the body must be application/json, got application/x-www-form-urlenc",
    ),
    "large": ({"content": b" " * 70000}, 413, "the body must have at most 65536 bytes"),
    "no path": ({"path": "/nothing"}, 404, "Not Found"),
    "a slash": ({"path": DUMP + "/"}, 404, "Not Found"),
    "a method": ({"method": "PUT"}, 405, "PUT does nothing here; send POST"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_line_of_json(name, tmp_path):
    request, status, message = WRONG[name]
    recorder = make()
    recorder.start_record()
    count(recorder)
    answer = send(make_app(recorder, tmp_path), **request)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert message in answer.json()["error"]
    assert answer.text.endswith("\n")
    assert len(answer.text.splitlines()) == 1
    assert len(recorder.dump_record(output_mode="object").forward_pass_id) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_is_a_line_of_json_and_an_exception(tmp_path, monkeypatch):
    app = make_app(make(), tmp_path)
    monkeypatch.setattr(ExpertDistributionRecorder, "_finished", lambda _: [][0])
    answer = send(app)
    assert (answer.status_code, answer.json()) == (500, {"error": "IndexError: list index out of range"})

    async def talk():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://recorder") as client:
            await client.post(DUMP)

    with pytest.raises(IndexError):
        asyncio.run(talk())


@pytest.mark.parametrize("token", ["secret", "se cret", "gehe\u00edm"])
def test_a_token_is_asked_for(token, tmp_path):
    recorder = make()
    app = make_app(recorder, tmp_path, token=token)
    wrong = ["", "Bearer", "Bearer ", "Bearer secre", f"Bearer {token} ", f"Basic {token}", f"Bearer {token}x", token]
    wrong = [[("authorization", value.encode())] for value in wrong]
    wrong += [[], [("authorization", f"Bearer {token}".encode())] * 2]
    for path, method in ((DUMP.replace("dump", "start"), "POST"), (STATUS, "GET")):
        for headers in wrong:
            answer = send(app, path, method, headers=headers)
            assert answer.status_code == 401, headers
            assert answer.headers["www-authenticate"] == "Bearer"
            assert token not in answer.text
        assert not recorder.recording
        for kind in ("Bearer", "bearer"):
            right = [("authorization", f"{kind} {token}".encode())]
            assert send(app, path, method, headers=right).status_code == 200
        recorder.stop_record()


def test_two_commands_do_not_mix(tmp_path):
    recorder = make()
    app = make_app(recorder, tmp_path, timeout=0.2)
    with recorder._member.ranks._leading:
        answer = send(app)
    assert (answer.status_code, answer.json()) == (503, {"error": "another command is at work for more than 0.2 s"})
    with recorder._dumping:
        answer = send(app)
    assert (answer.status_code, answer.json()["missing"]) == (504, [0])
    assert "is writing another dump" in answer.json()["error"]
    assert send(app).status_code == 200


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": 0}, ValueError, "`timeout` must be above 0, got 0"),
        ({"timeout": 1e10}, ValueError, "`timeout` must be at most 1000000000 seconds, got 10000000000.0"),
        ({"timeout": float("nan")}, ValueError, "`timeout` must be a finite number"),
        ({"timeout": "1"}, TypeError, "`timeout` must be a number, got str"),
        ({"allow_get": 1}, TypeError, "`allow_get` must be"),
        ({"token": ""}, ValueError, "`token` must be"),
        ({"token": "two\nlines"}, ValueError, "`token` must be"),
        ({"token": b"secret"}, TypeError, "`token` must be a str or None, got bytes"),
        ({"directory": None}, TypeError, "`directory` must be a str or a path, got NoneType"),
        ({"recorder": None}, TypeError, "`recorder` must be an ExpertDistributionRecorder, got NoneType"),
    ],
)
def test_wrong_options(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_app(**{"recorder": make(), "directory": tmp_path, **options})


def test_two_apps_of_a_recorder_are_of_one_mind(tmp_path):
    recorder = make()
    one, other = (make_app(recorder, tmp_path) for _ in range(2))
    ask(one, "/start_expert_distribution_record")
    count(recorder)
    assert send(other, STATUS, "GET").json()["ranks"][0]["passes"] == 1
    assert len(load(tmp_path / send(other).json()["file"]).forward_pass_id) == 1


def test_no_mode_is_an_answer(tmp_path):
    (answer,) = ask(make_app(make(None), tmp_path), "/start_expert_distribution_record")
    assert (answer.status_code, answer.json()) == (409, {"error": "nothing is recorded: the recorder's mode is None"})
