"""Fixtures: a device on which public functions run the kernels."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from numba_moe.device import simulator, sources
from numba_moe.verify import verification
from numba_moe.verify.cases import Case, few

# JAX would take most of the GPU's memory at its first call, and other tests find none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where the simulator runs cases, mark as slow those that launch only what smaller ones of the test do."""
    if not simulator.ENABLED:
        return
    by_test: dict[Any, list[pytest.Item]] = {}
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if isinstance(case, Case):
            by_test.setdefault(item.function, []).append(item)
    for found in by_test.values():
        kept = few([item.callspec.params["case"] for item in found], verification.call, least=1, most_threads=1024)
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
