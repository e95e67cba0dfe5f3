"""Public names of a package that load on first use, and all modules of one at once."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any


def attach(
    package: str, names_of: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package, from the names that each module below it has."""
    namespace = vars(sys.modules[package])
    module_of = {name: module for module, names in names_of.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value = getattr(importlib.import_module(f"numba_moe.{module_of[name]}"), name)
        return value

    return load, lambda: sorted({*namespace, *module_of}), sorted(module_of)


def modules_of(name: str) -> Iterator[ModuleType]:
    """Import a module, and every module below it if it is a package; yield each."""
    module = importlib.import_module(name)
    yield module
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}."):
        yield importlib.import_module(found.name)
