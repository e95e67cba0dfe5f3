"""The worked example of the course, a new op outside of the package, is an op like the library's own."""

import contextlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import numba_moe
from numba_moe import lab
from numba_moe.device import simulator
from numba_moe.runtime import declaration

FOLDER = Path(__file__).parents[1] / "docs" / "course" / "margin"
NAME = "topk_softmax_with_margin"


@pytest.fixture(scope="module")
def margin():
    """Import the example, and let the verification know it; afterwards nobody does."""
    sys.path.insert(0, str(FOLDER))
    import cases
    import op
    import twin

    found = types.SimpleNamespace(cases=cases.margin_cases(), op=getattr(op, NAME), twin=getattr(twin, NAME))
    yield found
    sys.path.remove(str(FOLDER))
    declaration.DECLARATIONS.pop(NAME)
    for name in ("cases", "kernel", "op", "twin"):
        del sys.modules[name]


def test_it_is_short():
    files = sorted(FOLDER.glob("*.*"))
    assert len(files) == 5
    assert sum(len(file.read_text().splitlines()) for file in files if file.suffix == ".py") <= 150


def test_every_case_passes(margin):
    report = lab.check(margin.op, like=NAME, cases=margin.cases, show=False)
    assert report.passed, report.failed
    assert len(report.outcomes) > 10
    with pytest.raises(ValueError, match="`cases` must be given for topk_softmax_with_margin"):
        lab.check(margin.op, like=NAME)

    def forgets_an_option(gating_output, top_k, renormalize=False):
        return margin.twin(gating_output, top_k)

    wrong = lab.check(forgets_an_option, like=NAME, cases=margin.cases, show=False)
    assert 0 < len(wrong.failed) < len(wrong.outcomes)
    messages = [outcome.message for outcome in wrong.outcomes if not outcome.passed]
    assert all(message.startswith("topk_weights first at") for message in messages)


def test_the_program_of_the_page_runs_its_kernel(margin, capsys):
    program = (FOLDER / "index.md").read_text().partition("```python\n")[2].partition("```")[0]
    with lab.counting() if simulator.ENABLED else contextlib.nullcontext() as counts:
        exec(program, {})
    printed = capsys.readouterr().out
    assert printed.startswith("[1.5]\n")
    assert f"{len(margin.cases)} passed, 0 failed" in printed
    assert counts is None or counts.launches >= 2 * (len(margin.cases) - 1)  # one has no tokens


def test_its_choice_and_its_gradient_are_those_of_topk_softmax(margin, device):
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(device)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights, ids, gap = margin.op(one, 3, renormalize=True)
    expected = numba_moe.topk_softmax(other, 3, renormalize=True)
    assert torch.equal(ids, expected.topk_ids)
    factors = torch.arange(15.0, device=device).view(5, 3)
    (weights * factors).sum().backward()
    (expected.topk_weights * factors).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    ordered = logits.sort(dim=1, descending=True).values
    torch.testing.assert_close(gap, ordered[:, 2] - ordered[:, 3])


def test_arrays_and_errors_are_as_of_any_op(margin):
    found = margin.op(np.array([[1, 4, 2.5]], np.float32), 2)
    assert found.margin.tolist() == [1.5]
    with pytest.raises(ValueError, match="`top_k` must be at most the number of experts, got 4"):
        margin.op(np.zeros((1, 3), np.float32), 4)


@pytest.mark.slow
def test_torch_exports_a_program_with_it(margin):
    class Router(torch.nn.Module):
        def forward(self, logits):
            return margin.op(logits, 2)

    logits = torch.randn(4, 6)
    program = torch.export.export(Router(), (logits,))
    assert NAME in str(program.graph)
    assert torch.equal(program.module()(logits)[2], margin.op(logits, 2).margin)


@pytest.mark.slow
def test_its_kernel_compiles_for_a_gpu_that_is_not_here(without_simulator):
    program = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import kernel; from numba_moe.runtime import compile;"
        "print([len(compile.ptx(kernel.choose_with_margin, one, (9, 0))) > 1000"
        " for one in compile.specialisations(kernel.choose_with_margin)])"
    )
    assert without_simulator(program) == "[True, True, True]\n"
