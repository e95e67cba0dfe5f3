"""The course runs: steps pass the cases of their ops, lessons run, and checks tell right solutions from wrong ones."""

import importlib.util
import sys
from pathlib import Path

import pytest

import numba_moe
from numba_moe import lab
from numba_moe.device import simulator

ROOT = Path(__file__).parents[1]
COURSE = ROOT / "docs" / "course"
STEPS = sorted(COURSE.glob("steps/*/*.py"))
# Of each op some cases, which are small and differ.
CASES = {
    "count_tokens_per_expert": ["Mixtral", "-1 rows", "zero", "hot", "int64", "1100"],
    "moe_align_block_size": ["Mixtral-8x7B 3 tokens zipf", "-1 rows", "zero tokens", "hot", "block_size 3"],
    "topk_softmax": ["Mixtral", "Qwen3", "ties", "non-finite", "signed", "strided", "zero tokens", "saturated"],
    "moe_sum": ["top 5", "strided rows of 33 float32", "48 float16", "OLMoE"],
    "moe_permute": ["top 5", "strided rows of 33 float32", "-1 rows", "hidden 0", "OLMoE", "zero tokens"],
}
LONGEST = 80  # lines of a step
FAILS = "03_atomics_lose_the_order"


def load(path):
    spec = importlib.util.spec_from_file_location(f"course_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def label(path):
    return f"{path.parent.name}/{path.stem}"


QUICK = ("counting/03_atomics", "gating/03_warp_per_token", "moe_sum/02_thread_per_element", f"alignment/{FAILS}")


@pytest.mark.parametrize(
    "path", [path if label(path) in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in STEPS], ids=label
)
def test_a_step_passes_the_cases_of_its_op(path):
    module = load(path)
    [op] = [name for name in CASES if hasattr(module, name)]
    assert len(path.read_text().splitlines()) <= LONGEST
    if path.stem.endswith("shipped"):
        assert getattr(module, op) is getattr(numba_moe, op)
        return
    report = lab.check(getattr(module, op), like=op, cases=CASES[op], library="numba", show=False)
    if path.stem == FAILS:
        assert "one hot expert" in report.failed
    else:
        assert report.passed, report.failed
        assert len(report.outcomes) > 3


def test_every_family_ends_with_what_is_shipped():
    families = {path.parent for path in STEPS}
    assert len(families) == 5
    for family in families:
        assert sorted(family.glob("*.py"))[-1].stem.endswith("shipped")


@pytest.mark.slow
@pytest.mark.skipif(not simulator.ENABLED, reason="on a GPU times are measured by hand")
def test_the_script_shows_every_step(capsys):
    sys.path.insert(0, str(ROOT / "scripts"))
    import course_times

    assert course_times.main(["counting", "moe_sum"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("counting ") == 7
    assert course_times.main(["nothing"]) == 2
