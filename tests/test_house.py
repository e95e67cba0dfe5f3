"""The house: floors, names of files, what `__init__.py` may hold, and that types and names at its doors agree."""

import ast
import collections
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "numba_moe"
FILES = sorted(ROOT.rglob("*.py"))
# Each imports from itself and from floors before it; those of one line may import each other, in no circle.
FLOORS = [
    {"lazy"},
    {"sizes", "device"},
    {"runtime"},
    {"ops"},
    {"block", "tiny", "tiny_rollouts", "training", "placement", "parallel", "recorder", "interop"},
    {"verify", "bench", "serve_demo"},
    {"lab"},
    {"kernel_commands", "commands"},
    {"cli"},
]
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor}


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports_of(path, at_once=False):
    """Yield the modules of the package that a file imports: all of them, or those that it needs to be imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield name


@pytest.fixture(scope="module")
def graph():
    return {module_of(path): set(imports_of(path)) - {"numba_moe", module_of(path)} for path in FILES}


def test_imports_make_no_circle(graph):
    left = dict(graph)
    while left:
        imported = set().union(*left.values())
        ends = {module for module, needed in left.items() if not needed & left.keys() or module not in imported}
        assert ends, f"these import each other: {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in ends}


def test_a_file_imports_from_floors_below_its_own(graph):
    climbing = [
        f"{module} imports {needed}"
        for module, all_needed in graph.items()
        if module != "numba_moe"
        for needed in all_needed
        if not needed.startswith("numba_moe.reference")
        and FLOOR_OF[needed.split(".")[1]] > FLOOR_OF[module.split(".")[1]]
    ]
    assert climbing == []


def test_no_two_files_have_one_name():
    names = collections.Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=module_of)
def test_a_package_has_names_and_no_code(path):
    """Allowed are a docstring, imports of names, plain constants, and names that load on first use."""
    for node in ast.parse(path.read_text()).body[1:]:
        loads = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if loads:
            assert ast.unparse(node.value.func) == "lazy.attach", ast.unparse(node)
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)), ast.unparse(node)
            assert not any(isinstance(part, (ast.Call, ast.Lambda)) for part in ast.walk(node)), ast.unparse(node)


@pytest.mark.parametrize("stub", sorted(ROOT.rglob("*.pyi")), ids=lambda path: path.parent.name)
def test_stubs_have_the_names_that_load_on_first_use(stub):
    package = importlib.import_module(module_of(stub.with_suffix(".py")))
    found = {
        name.asname: f"{node.module}.{name.name}"
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    found.pop("reference", None)
    assert sorted(found) == package.__all__
    for name, origin in found.items():
        module, _, attribute = origin.rpartition(".")
        assert getattr(package, name) is getattr(importlib.import_module(module), attribute)
