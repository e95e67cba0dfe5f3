"""`numba-moe serve-demo`, as people try it: its own process, a server on a port, and another rank."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from numba_moe import cli
from numba_moe.recorder import load

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
DEFAULT_INTERRUPTS = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
RUN = [sys.executable, "-c", DEFAULT_INTERRUPTS + "from numba_moe.cli import run; sys.exit(run(sys.argv[1:]))"]


def path(name):
    return f"/{name}_expert_distribution_record"


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@POSIX
def test_a_session_with_two_ranks(tmp_path):
    options = ["--port", "0", "--ranks", "2", "--seconds", "0.02", "--timeout", "20", "--directory", str(tmp_path)]
    process = subprocess.Popen([*RUN, "serve-demo", *options, "--token", "word"], stdout=subprocess.PIPE, text=True)
    with process:
        try:
            other = int(process.stdout.readline().removeprefix("rank 1 is process "))
            address = process.stdout.readline().strip().removesuffix(path("status"))
            with httpx.Client(base_url=address, timeout=60) as client:
                assert client.get(path("status")).status_code == 401
                client.headers["authorization"] = "Bearer word"

                def status():
                    return client.get(path("status")).json()

                until(lambda: all(rank["last_pass"] for rank in status()["ranks"]))
                assert [client.head(path(name)).status_code for name in ("start", "stop", "dump")] == [405] * 3
                assert client.get(path("start")).status_code == 405
                begin = client.post(path("start")).json()["from_pass"]
                until(lambda: min(rank["passes"] for rank in status()["ranks"]) > 3)
                end = client.post(path("stop")).json()["from_pass"]
                until(lambda: not status()["recording"])
                dump = load(tmp_path / client.post(path("dump"), json={"format": "json"}).json()["file"])
                assert begin <= min(dump.forward_pass_id) <= max(dump.forward_pass_id) < end
                assert dump.rank_physical_count.shape == (2, 2, 8)
                assert (dump.rank_physical_count.sum(axis=2) > 0).all()
                os.kill(other, signal.SIGKILL)
                process.send_signal(signal.SIGINT)
            assert process.stdout.read() == ""
        finally:
            if process.poll() is None:
                process.kill()
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "`--port` must be at most 65535, got 70000"),
        (["--host", ""], "`--host` must be a name or an address, got none"),
        (["--host", "a" * 70], "`--host` and `--port` must be free, got aaa"),
        (["--port", "-1"], "`--port` must be at least 0, got -1"),
        (["--ranks", "0"], "`--ranks` must be at least 1, got 0"),
        (["--ranks", "99"], "`--ranks` must be at most 16, got 99"),
        (["--seconds", "0"], "`--seconds` must be above 0, got 0.0"),
        (["--timeout", "nan"], "`--timeout` must be a finite number"),
        (["--token", ""], "`--token` must be of printable characters, at least one, got another"),
        (["--directory", "/nonexistent"], "`--directory` must be a folder that can be written, got /nonexistent"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys):
    assert cli.main(["serve-demo", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"numba-moe serve-demo: {message}")
    assert len(printed.err.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["serve-demo", "--port", str(port)]) == 2
    expected = f"numba-moe serve-demo: `--host` and `--port` must be free, got 127.0.0.1:{port} ("
    assert capsys.readouterr().err.startswith(expected)
