"""Fixtures: a device on which public functions run the kernels."""

import importlib.util
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from numba_moe.device import simulator, sources
from numba_moe.verify import verification
from numba_moe.verify.cases import Case, few

# JAX would take most of the GPU's memory at its first call, and other tests find none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `sweep` leaves out, and in the simulator cases that launch only what smaller ones do."""
    by_test: dict[Any, list[pytest.Item]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            by_test.setdefault(item.function, []).append(item)
    for found in by_test.values():
        kept = list(range(len(found)))
        if simulator.ENABLED and isinstance(found[0].callspec.params.get("case"), Case):
            cases = [item.callspec.params["case"] for item in found]
            kept = few(cases, verification.call, least=1, most_threads=1024)
        if sweep := found[0].get_closest_marker("sweep"):
            marked = [{"gpu", "slow"} & {mark.name for mark in item.iter_markers()} for item in found]
            drawn = [number for number in kept if not marked[number]]
            kept = random.Random(len(found)).sample(drawn, min(*sweep.args, len(drawn)))
        for number in set(range(len(found))) - set(kept):
            found[number].add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tables be as wide as they are: a terminal's width, which pytest-xdist sets for its workers, cuts them."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def device() -> Iterator[str]:
    """Name the device whose tensors are answered by kernels: "cuda", or "cpu" in the simulator."""
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with simulator.running():
            yield "cpu"


PROCESSES = multiprocessing.get_context("forkserver")


def be_rank(role: Callable[..., None], rank: int, size: int, port: int, backend: str, *arguments: Any) -> None:
    """Be a rank: a fork of a process that has imported everything."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    role(rank, size, *arguments)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[int | None]]:
    """Return a function that runs `role(rank, size, *arguments)` in a process for each rank; it returns their statuses.

    A server forks them, which finds this folder where it runs; spawned processes look for it in `sys.path` alone.
    """

    def run(role: Callable[..., None], size: int, *arguments: Any, backend: str = "gloo") -> list[int | None]:
        PROCESSES.set_forkserver_preload([role.__module__])
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        given = (size, store.port, backend, *arguments)
        ranks = [PROCESSES.Process(target=be_rank, args=(role, rank, *given)) for rank in range(size)]
        try:
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(timeout=180)
            return [rank.exitcode for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()

    return run


@pytest.fixture(scope="session")
def without_simulator() -> Callable[..., str]:
    """Return a function that runs a program in a process of its own, with Numba's compiler, and returns its output."""

    def run(program: str, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """Copy the package to a folder of its own, and return where it is: the folder above can be put on the path."""
    package = tmp_path / "copy" / "numba_moe"
    reference = importlib.util.find_spec("numba_moe.reference")
    assert reference is not None
    assert reference.origin is not None
    for source, target in ((sources.PACKAGE, package), (Path(reference.origin).parent, package / "reference")):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return package
