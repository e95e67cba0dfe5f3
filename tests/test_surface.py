"""What others build on: names, signatures, schemas of ops, formats of files. A change of it is on purpose, or a fault.

`python tests/test_surface.py` writes what there is to tests/data/public_surface.json; the CHANGELOG says what changed.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parent / "data" / "public_surface.json"
PACKAGES = ("numba_moe", *(f"numba_moe.{name}" for name in ("lab", "parallel", "placement", "recorder", "training")))


def parameters(function: Any) -> list[str]:
    """Return a function's parameters with their defaults; annotations may change. Exceptions have none to speak of."""
    if isinstance(function, type) and issubclass(function, Exception):
        return []
    found = inspect.signature(function).parameters.values()
    return [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found]


def surface() -> dict[str, Any]:
    """Return what others build on, as JSON can hold it."""
    from numba_moe.interop import torch_ops  # noqa: F401 (which registers all)
    from numba_moe.recorder.dump_files import FORMATS
    from numba_moe.runtime import export, torch_library
    from numba_moe.runtime.declaration import DECLARATIONS

    names = {}
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            found = getattr(package, name)
            fields = getattr(found, "_fields", None)
            names[f"{package.__name__}.{name}"] = list(fields) if fields else parameters(found)
    variants = [one for declared in DECLARATIONS.values() for one in torch_library.variants(declared).values()]
    ours = {f"numba_moe::{variant.name}" for variant in variants}  # and no example's, which torch keeps for good
    schemas = sorted(str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name in ours)
    return {
        "names": names,
        "schemas": schemas,
        "dump formats": list(FORMATS),
        "manifest schema": export.SCHEMA,
    }


def test_what_others_build_on_is_as_written_down():
    written, found = json.loads(DATA.read_text()), json.loads(json.dumps(surface()))
    for part, wanted in written.items():
        assert found[part] == wanted, f"{part}: see this file's docstring"


if __name__ == "__main__":
    DATA.write_text(json.dumps(surface(), indent=1) + "\n")
