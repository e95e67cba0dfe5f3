"""Ours against the peers' released op libraries, and the comparison against results that it must refuse.

NUMBA_MOE_PEER_LIBS names the libraries, separated as in PATH; without it the tests that need them are skipped.
"""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

from numba_moe.bench import comparison, contenders, measure, patched, ratios
from numba_moe.commands import bench_options

OPS = {pair.theirs: pair for pair in comparison.PAIRS}
PAIRS = OPS | {pair.theirs: pair for pair in comparison.MODULE_PAIRS}
SMALL = comparison.Shape(40, 16, 2, 16)


@pytest.fixture(scope="module")
def peers():
    libraries = os.environ.get("NUMBA_MOE_PEER_LIBS")
    if not libraries:
        pytest.skip("NUMBA_MOE_PEER_LIBS names no libraries")
    contenders.load_peers(None, [Path(name) for name in libraries.split(os.pathsep)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
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
        returned = results if isinstance(results, tuple) else (results,)
        first = args[made.written[-1]] if made.written else returned[-1]
        first[(0,) * first.dim()] += 1
        return results

    assert comparison.compare(pair, SMALL, 3, "cpu", wrong) != ""


def test_cases_are_the_benchs_and_as_many_more():
    found = comparison.cases(0, 100)
    assert len(found) == len(OPS) * len(contenders.ALIGN_SHAPES) + 100
    assert {pair.theirs for pair, *_ in found[-100:]} == set(OPS)
    assert found == comparison.cases(0, 100)
    assert all(shape.experts < 992 for _, shape, _ in found)


def test_nothing_to_compare_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare_peers.py"])
    monkeypatch.setattr(contenders, "is_registered", lambda name: False)
    monkeypatch.setattr(contenders, "load_peers", lambda *_: {})
    assert comparison.main() == 1


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_patched_is_timed_beside_the_peers_own(name, monkeypatch):
    monkeypatch.setattr(measure, "device_time", lambda call: (call(), 2.0)[1])
    monkeypatch.setattr(measure, "host_time", lambda call: (call(), 3.0)[1])
    monkeypatch.setattr(comparison, "peers_own", lambda found: PAIRS[name].ours if found == name else None)
    for shape in (SMALL, SMALL._replace(tokens=1, hidden=32)):
        ours, theirs = patched.rows_of(PAIRS[name], shape, "cpu")
        assert (ours.implementation, theirs.implementation) == (contenders.OURS, patched.THEIRS)
        assert [(row.op, row.device_us, row.host_us, row.message) for row in (ours, theirs)] == [
            (name, 2.0, 3.0, "")
        ] * 2
        assert ratios.ratios([ours, theirs]) == {ours.key: (1.0, 1.0)}
    wrong = PAIRS[name]._replace(fault=lambda *given: "the peer's differs")
    assert [row.message for row in patched.rows_of(wrong, SMALL, "cpu")] == ["", "the peer's differs"]
    assert list(patched.rows_of(PAIRS[name]._replace(theirs="json.absent.nothing"), SMALL, "cpu")) == []


def test_a_peers_function_is_an_op_or_one_of_a_module():
    assert comparison.peers_own("aten.topk") is torch.ops.aten.topk
    assert comparison.peers_own("_no_such_C.topk") is None
    assert comparison.peers_own("json.decoder.scanstring") is json.decoder.scanstring
    assert comparison.peers_own("json.decoder.nothing") is None
    assert comparison.peers_own("no_such_package.decoder.scanstring") is None
    sort = torch.ops.aten.sort.default
    made = comparison.as_called(sort, comparison.Call((torch.zeros(2), 0), (), {}))
    assert made.args[1:] == (0, False)  # what the op has behind the arguments, as it is without


def test_patched_functions_are_chosen_by_name_and_size():
    parser = argparse.ArgumentParser()
    bench_options(parser)
    chosen = patched.select_pairs(parser.parse_args(["--patched", "--op", "moe_align*", "--shape", "4096x"]))
    assert {shape.tokens for _, shape in chosen} == {4096}
    assert len(chosen) == 4
    with pytest.raises(ValueError, match="no function and shape is called that"):
        patched.select_pairs(parser.parse_args(["--patched", "--op", "nothing"]))
