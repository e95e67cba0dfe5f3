"""The worked example of the course, a new op outside of the package, is an op like the library's own."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import numba_moe
from numba_moe import reference
from numba_moe.runtime import declaration
from numba_moe.verify import verification

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


def test_every_case_passes(margin, monkeypatch):
    monkeypatch.setattr(reference, NAME, margin.twin, raising=False)
    monkeypatch.setitem(verification.OPS, NAME, types.SimpleNamespace(**{NAME: margin.op}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outcomes = [verification.run_case(case, 0, device) for case in margin.cases]
    assert len(outcomes) > 10
    assert [outcome for outcome in outcomes if not outcome.passed] == []


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
