"""The package installs whole, imports light, and says the same thing twice."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import numba_moe
from numba_moe import parallel, placement, recorder, reference, training

ROOT = Path(__file__).parents[1]
FUNCTIONS = {
    name: package
    for package in (numba_moe, placement, recorder, training)
    for name in package.__all__
    if name[0].islower()
}
TOOLS = {
    "apply_capacity",
    "expert_capacity",
    "expert_choice",
    "follow",
    "load_balancing_loss",
    "make_app",
    "same_routing",
    "update_correction_bias",
    "z_loss",
    "align_sizes",
    "attach",
    "attached",
    "load",
    "merge",
    "migrate",
    "migrate_in_chunks",
    "set_log_level",
    "simulate",
}  # they serve ops, or use what ops compute
TWINS = {"fused_experts_into_grad": "fused_experts"}  # they differ in what backward writes
OPS = {name: package for name, package in FUNCTIONS.items() if name not in TOOLS} | {"dispatch_layout": parallel}


def test_import_is_light():
    program = (
        "import sys, time; begin = time.perf_counter(); import numba_moe; took = time.perf_counter() - begin;"
        "print(took, *sorted({'torch', 'numba', 'cuda'} & set(sys.modules)))"
    )
    took, *heavy = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert heavy == []
    assert float(took) < 0.3


@pytest.mark.slow
def test_placement_imports_numba_when_something_is_rebalanced(without_simulator):
    program = (
        "import sys; from numba_moe import placement; assert not {'torch', 'numba'} & set(sys.modules);"
        "location = placement.ExpertLocation.trivial(1, 2); placement.balancedness([[1, 2]], [[0, 1]], 2);"
        "assert 'numba' not in sys.modules; placement.rebalance_experts([[1, 2]], 2, 1, 1, 2);"
        "print('numba' in sys.modules)"
    )
    assert without_simulator(program) == "True\n"


@pytest.mark.slow
def test_torchs_compiler_is_imported_by_those_who_compile(without_simulator):
    program = (
        "import sys, torch; from numba_moe import MoEBlock, recorder;"
        "MoEBlock(8, 8, 4, 2)(torch.ones(3, 8)).sum().backward();"
        "recorder.ExpertDistributionRecorder(1, 4, mode='stat', device='cpu'); print('torch._dynamo' in sys.modules)"
    )
    assert without_simulator(program) == "False\n"


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'moe_sort'"):
        _ = numba_moe.moe_sort
    with pytest.raises(AttributeError, match="has no attribute 'migrate_all'"):
        _ = placement.migrate_all
    with pytest.raises(AttributeError, match="has no attribute 'record'"):
        _ = recorder.record
    assert set(numba_moe.__all__) <= set(dir(numba_moe))
    assert set(recorder.__all__) <= set(dir(recorder))
    assert set(placement.__all__) <= set(dir(placement))


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_its_twin_in_the_reference(name):
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    found, expected = parameters(getattr(OPS[name], name)), parameters(getattr(reference, TWINS.get(name, name)))
    if "out" not in [name for name, *_ in expected]:  # memory for a result says nothing of what the op computes
        found = [parameter for parameter in found if parameter[0] != "out"]
    assert found == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_have_their_sections(name):
    text = inspect.getdoc(getattr(FUNCTIONS[name], name))
    has_parameters = bool(inspect.signature(getattr(FUNCTIONS[name], name)).parameters)
    for section in (*["Parameters"] * has_parameters, "Returns", "Raises", "Notes", "Examples"):
        assert re.search(rf"^{section}\n-+$", text, re.MULTILINE), section
    for parameter in inspect.signature(getattr(FUNCTIONS[name], name)).parameters:
        assert re.search(rf"^((\w+, )*{parameter}(, \w+)* : |\*\*{parameter}$)", text, re.MULTILINE), parameter


def test_reference_uses_numpy_alone():
    for path in (ROOT / "reference").glob("*.py"):
        imported = set(re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE))
        assert {name for name in imported if not name.startswith("numba_moe.reference")} <= {
            "collections.abc",
            "math",
            "numpy",
            "typing",
        }


def test_reference_readme_names_every_op():
    text = (ROOT / "reference" / "README.md").read_text()
    assert [name for name in OPS if f"`{TWINS.get(name, name)}" not in text] == []


def test_wheel_holds_the_reference_and_no_top_level_package_of_that_name(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    for folder in ("numba_moe", "reference"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "numba_moe").rglob("*.py")} <= set(names)
    assert {f"numba_moe/reference/{path.name}" for path in (ROOT / "reference").glob("*.py")} <= set(names)
    assert "numba_moe/reference/README.md" in names
    assert "numba_moe/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"numba_moe", f"numba_moe-{numba_moe.__version__}.dist-info"}


# What makes tensors of torch's default dtype or on its default device, where a call does not say which.
FACTORIES = {
    "arange",
    "asarray",
    "as_tensor",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
}
FACTORIES |= {"ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"}
FACTORIES |= {"zeros", "FloatTensor", "Tensor"}
# It wraps arrays of a device, which have a dtype.
WRAPPING = ("runtime/arrays.py", "torch.as_tensor(array)")


def unsaid(source):
    """Yield the calls of torch's factories in a program that leave out dtype or device."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES:
            said = {keyword.arg for keyword in call.keywords}
            if ast.unparse(call.func.value) == "torch" and not {"dtype", "device"} <= said:
                yield ast.unparse(call)


def test_tensors_say_their_dtype_and_device():
    """No default that a user sets, as torch.set_default_dtype(torch.bfloat16) does, changes what the library makes."""
    assert list(unsaid("torch.zeros(2, device=device, **options)")) == ["torch.zeros(2, device=device, **options)"]
    root = Path(numba_moe.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 80
    found = [(str(file.relative_to(root)), call) for file in files for call in unsaid(file.read_text())]
    assert [entry for entry in found if entry != WRAPPING] == []
    assert not [file for file in files if "from torch import" in file.read_text()]
