"""Pages run and build, and docstrings keep numpydoc's rules."""

import doctest
import inspect
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import numba_moe
from numba_moe import lab, parallel, placement, recorder, training
from numba_moe.interop import sglang, sglang_srt, vllm

ROOT = Path(__file__).parents[1]
PACKAGES = (numba_moe, parallel, placement, recorder, training, lab)
NAMES = [f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__]
# Left out: an extended summary and other functions to see, where there is nothing to say; and that descriptions begin
# with a capital letter and stand beside every result's type, as they may begin with the name of a field or dtype.
LEFT_OUT = {"ES01", "SA01", "PR08", "RT03", "RT04"}
# NamedTuples and exceptions are described where they are returned or raised.
LEFT_OUT_OF_CLASSES = {"EX01", "PR01"}


@pytest.fixture
def peers():
    """Put packages that hold what is replaced where imports look."""
    for patch in (vllm.PATCH, sglang.PATCH):
        for name, functions in patch._replacements.items():
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                module = types.ModuleType(".".join(parts[:depth]))
                module.__path__ = []
                sys.modules.setdefault(module.__name__, module)
            vars(sys.modules[name]).update(dict.fromkeys(functions, print))
    yield
    torch._dynamo.reset()  # which otherwise outlives what a page defines
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("vllm", "sgl_kernel", "sglang", "flashinfer")
    ]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "from-sglang.md",
        "models.md",
        "parallel.md",
        "put-it-in.md",
        "recorder.md",
        "training.md",
        pytest.param("use.md", marks=pytest.mark.slow),
    ],
)
def test_examples_run(name, peers):
    pytest.importorskip("transformers")
    page = ROOT / "docs" / name
    test = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    found = doctest.DocTestRunner().run(test, clear_globs=False)  # which torch's compiler holds on to
    assert found.attempted > 10
    assert found.failed == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="one of them turns the simulator on")
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("verify.md", "[1 2 3 4 0 4 4]"),
        ("your-own-in-the-lab.md", "27 passed, 0 failed, 1 left out"),
        ("your-own-kernel.md", "[1, 0, 2]"),
    ],
)
def test_the_program_of_a_page_runs(name, printed, tmp_path, capsys):
    text = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL))
    program = tmp_path / "program.py"
    program.write_text(text)  # where Numba finds the source
    runpy.run_path(str(program))
    assert printed in capsys.readouterr().out


def test_every_function_of_sglangs_slice_is_there_and_has_its_test():
    page = (ROOT / "docs" / "from-sglang.md").read_text().partition("## Function by function")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "::" in line]
    for names, _, test in rows:
        file, _, function = test.strip(" |`").partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            owners = (sglang_srt, sglang_srt.ExpertDistributionRecorder, sglang)
            parameters = {*inspect.signature(sglang_srt.select_experts).parameters, *sglang_srt.MODES}
            parameters |= set(inspect.signature(sglang.moe_align_block_size_with_counters).parameters)
            assert any(hasattr(owner, name) for owner in owners) or name in parameters | {"sgl_kernel"}
    functions = [value for value in vars(sglang_srt).values() if inspect.isfunction(value) and value.__name__[0] != "_"]
    made_here = {
        function.__name__ for function in functions if function.__module__.startswith("numba_moe.interop.sglang")
    }
    assert {name for name in made_here if name not in page} == set()


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "kept"), "docs"]
    done = subprocess.run([*command, str(tmp_path / "pages")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "moe_align_block_size" in (tmp_path / "pages" / "api.html").read_text()
    lesson = (tmp_path / "pages" / "course" / "built" / "05_counting_and_atomics.html").read_text()
    assert "<svg" in lesson
    assert "1 passed, 1 failed" in lesson
    course = (tmp_path / "pages" / "course" / "index.html").read_text()
    assert "_downloads" not in course  # links lead to the pages of lessons and steps, not to their files


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_are_numpydocs(name):
    validate = pytest.importorskip("numpydoc.validate").validate
    value = getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2])
    allowed = LEFT_OUT | (LEFT_OUT_OF_CLASSES if isinstance(value, type) else set())
    assert [error for error in validate(name)["errors"] if error[0] not in allowed] == []
