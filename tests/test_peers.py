"""Ours against the peers' released op libraries, and the comparison against results that it must refuse.

NUMBA_MOE_PEER_LIBS names the libraries, separated as in PATH; without it the tests that need them are skipped.
"""

import os
from pathlib import Path

import pytest

from numba_moe.bench import comparison, contenders

PAIRS = {pair.theirs: pair for pair in comparison.PAIRS}
SMALL = comparison.Shape(40, 16, 2, 16)


@pytest.fixture(scope="module")
def peers():
    libraries = os.environ.get("NUMBA_MOE_PEER_LIBS")
    if not libraries:
        pytest.skip("NUMBA_MOE_PEER_LIBS names no libraries")
    contenders.load_peers(None, [Path(name) for name in libraries.split(os.pathsep)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_a_peer_computes_the_same(name, peers):
    faults = [
        f"{shape} seed {seed}: {fault}"
        for pair, shape, seed in comparison.cases(0, comparison.CASES)
        if pair.theirs == name and (fault := comparison.compare(pair, shape, seed, "cuda"))
    ]
    assert faults == []


@pytest.mark.parametrize("name", PAIRS)
def test_ours_is_as_ours(name):
    for seed in range(6):
        assert comparison.compare(PAIRS[name], SMALL, seed, "cpu", PAIRS[name].ours) == ""


@pytest.mark.parametrize("name", PAIRS)
def test_a_wrong_result_is_found(name):
    pair = PAIRS[name]

    def wrong(*args):
        results = pair.ours(*args)
        made = pair.draw(comparison.np.random.default_rng(3), SMALL, "cpu")
        first = args[made.written[-1]] if made.written else results[1]
        first.view(-1)[0] += 1
        return results

    assert comparison.compare(pair, SMALL, 3, "cpu", wrong) != ""


def test_cases_are_the_benchs_and_as_many_more():
    found = comparison.cases(0, 100)
    assert len(found) == len(PAIRS) * len(contenders.ALIGN_SHAPES) + 100
    assert {pair.theirs for pair, *_ in found[-100:]} == set(PAIRS)
    assert found == comparison.cases(0, 100)
    assert all(shape.experts < 992 for _, shape, _ in found)


def test_nothing_to_compare_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare_peers.py"])
    monkeypatch.setattr(contenders, "is_registered", lambda name: False)
    monkeypatch.setattr(contenders, "load_peers", lambda *_: {})
    assert comparison.main() == 1
