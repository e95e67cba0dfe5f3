"""The script that reaches our functions from peers' own call sites, on trees of stand-ins."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
SUM = """
    import not_installed_anywhere
    from not_installed_anywhere.deeper import thing

    try:
        import neither_installed
    except ImportError:
        neither_installed = None


    @thing.decorated
    def moe_fused_mul_sum(
        inputs, topk_weights, outputs=None, topk_ids=None, expert_map=None, routed_scaling_factor=None, is_ep=False
    ):
        assert neither_installed is None
        kept = (topk_ids >= 0) * topk_weights * (routed_scaling_factor or 1)
        outputs.copy_((inputs.float() * kept[..., None]).sum(1){wrong})
        return outputs
"""
RUNNER = """
    from sglang.kernels.ops.moe.moe_fused_mul_sum import moe_fused_mul_sum as add

    HummingMethod = HummingGemmType = None


    class HummingRunnerCore:
        def _run_indexed_gemm(self, hidden_states, topk_weights, topk_ids):
            buffers = self.prepare_buffers()
            rows = buffers["down_output"].view(*topk_ids.shape, -1)
            add(rows, topk_weights, buffers["outputs" if {later} else "output"], topk_ids, routed_scaling_factor=2.5)


    def of_a_later_release(rows, weights):
        {call}


    raise RuntimeError("what is defined so far stays")
"""


def plant(tree, wrong="", call="add(inputs=rows, topk_weights=weights)", later=False):
    """Write a tree with one function, and what calls it."""
    files = {
        "sglang/kernels/ops/moe/moe_fused_mul_sum.py": SUM.format(wrong=wrong),
        "sglang/srt/layers/moe/moe_runner/humming.py": RUNNER.format(call=call, later=later),
    }
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        for folder in (folder for folder in path.parents if folder.is_relative_to(tree / "sglang")):
            (folder / "__init__.py").touch()


def tried(tree):
    """Return the status, and what the script prints."""
    command = [sys.executable, SCRIPTS / "try_peers.py", tree]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("try_peers")


CALLER = "sglang/srt/layers/moe/moe_runner/humming.py"


def test_call_sites_are_found_by_reading_and_their_forms_compared(tmp_path, script):
    def ours(inputs, topk_weights, outputs=None, topk_ids=None, routed_scaling_factor=None):
        """Take the place of one of ours."""

    def theirs(inputs, topk_weights, outputs=None, topk_ids=None, routed_scaling_factor=None, new=0):
        """Take the place of theirs."""

    def found(call):
        plant(tmp_path, call=call)
        reader = script.Reader([tmp_path])
        return reader.sites("sglang.kernels.ops.moe.moe_fused_mul_sum", "moe_fused_mul_sum", ours, theirs)

    first = (CALLER, 11, True, "")
    assert found("add(rows, weights)") == [first, (CALLER, 15, True, "")]
    assert found("add(rows, weights, new=1)")[1].fault == "got an unexpected keyword argument 'new'"
    assert found("add(*rows, **weights)")[1].fault == ""
    assert found("add(rows, weights, newer=1)")[1].fault == ""  # theirs do not take it either
    assert found("add = None") == [first]
    assert found("from elsewhere import add; add(rows)") == [first]
    assert found("find('sglang.kernels.ops.moe.moe_fused_mul_sum:moe_fused_mul_sum')")[1] == (CALLER, 15, False, "")
    through = "from sglang.kernels.ops.moe import moe_fused_mul_sum as m; m.moe_fused_mul_sum(rows, rows, new=1)"
    assert found(through)[1].fault


def test_a_watched_function_gets_copies_and_says_what_differs(script):
    def ours(rows, out):
        out.copy_(rows + 1)
        return out

    def theirs(rows, out):
        out.copy_(rows + step)
        rows.fill_(0)
        return out

    rows, out, step = torch.arange(4.0), torch.full((4,), torch.nan), 1
    watch = script.Watch("peer.module.add", ours, theirs)
    assert watch.stand_in()(rows, out) is out  # ours, into the caller's memory
    assert (rows.tolist(), out.tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4])
    ((file, _),) = watch.compared
    assert file == __file__
    assert list(watch.reached.values()) == ["tensor 1 differs"]  # an input, which ours leaves as it is
    watch, step = script.Watch("peer.module.add", ours, lambda rows, out: out.copy_(rows + step)), 2
    watch.stand_in()(rows, out=out)
    assert list(watch.reached.values()) == ["tensor 0 differs"]
    watch = script.Watch("peer.module.add", ours, lambda rows, out: None.run)
    watch.stand_in()(rows, out)
    assert not watch.compared
    assert watch.absent == "AttributeError: 'NoneType' object has no attribute 'run'"


@pytest.mark.slow
def test_a_function_is_reached_from_its_call_sites_and_compared(tmp_path):
    plant(tmp_path)
    status, said = tried(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| moe")]
    expected = ["moe_fused_mul_sum", "sglang.kernels.ops.moe.moe_fused_mul_sum"]
    assert rows == [[*expected, f"{CALLER}:11", "compared", ""], [*expected, f"{CALLER}:15", "form read", ""]]
    assert said.splitlines()[-1] == "1 functions, 1 reached, 0 differ; 0 without a call site in these trees"
    assert "humming is the peer's own in part alone: RuntimeError: what is defined so far stays" in said
    assert status == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said", "counted"),
    [
        ({"wrong": " + 1"}, "tensor 0 differs", "1 reached, 1 differ"),
        ({"later": True}, "A caller fails: sglang_humming_sum of 12 tokens: KeyError", "0 reached, 0 differ"),
    ],
)
def test_what_differs_or_is_not_reached_is_said(tmp_path, options, said, counted):
    plant(tmp_path, **options)
    status, printed = tried(tmp_path)
    assert said in printed
    assert f"1 functions, {counted}" in printed
    assert status == 1
