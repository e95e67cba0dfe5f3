"""Slow tests are left out unless something asks for them, and nothing else is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE, SLOW = "tests/test_random_cases.py", "test_a_few"
QUICK = {"test_nothing_selected_is_a_failure", "test_a_failing_case_says_how_to_run_it_again"}


def collected(*arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {line.split("::")[1] for line in done.stdout.splitlines() if "::" in line}


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--all"], ["-m", "slow"], ["-m", "not gpu"]], ids=" ".join)
def test_slow_tests_run_where_they_are_asked_for(options):
    assert SLOW in collected(FILE, *options)


@pytest.mark.slow
def test_a_slow_test_runs_where_it_is_named():
    assert collected(f"{FILE}::{SLOW}") == {SLOW}
    assert collected(f"{FILE}::test_a") == set()
    found = collected(FILE)
    assert SLOW not in found
    assert found > QUICK


@pytest.mark.slow
def test_ci_runs_every_test():
    assert "pytest -n 2 --all\n" in (ROOT / ".ci" / "run").read_text()
    everything = collected("--all")
    assert everything == collected("-m", "slow") | collected()
    assert everything > collected()
