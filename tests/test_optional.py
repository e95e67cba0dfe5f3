"""Tests of what needs a library that is no dependency skip where it is absent, and no others do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "cupy",
    "httpx",
    "jax",
    "matplotlib",
    "numpydoc",
    "prometheus_client",
    "starlette",
    "transformers",
    "uvicorn",
)
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # as if they were not installed
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_no_test_imports_an_optional_library_without_asking():
    imports = re.compile(rf"^(?:import|from) (?:{'|'.join(OPTIONAL)})\b(?!.*# noqa: E402)", re.MULTILINE)
    found = {path.name: imports.findall(path.read_text()) for path in (ROOT / "tests").glob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.slow
def test_tests_skip_what_is_not_installed():
    asking = re.compile(rf"importorskip\(\"(?:{'|'.join(OPTIONAL)})\b")
    asked = [path for path in (ROOT / "tests").glob("*.py") if asking.search(path.read_text())]
    assert len(asked) > 8
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "--all",
        "-k",
        "not kernels and not the_same_is_found",
        *map(str, asked),
        "numba_moe/recorder",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" in done.stdout
