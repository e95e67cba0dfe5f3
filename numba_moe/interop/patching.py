"""Functions of an installed package, replaced wherever its modules hold them, and put back."""

import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

_log = logging.getLogger(__name__)

# Module -> name -> what takes its place.
Replacements = Mapping[str, Mapping[str, Any]]


class Patch:
    """Functions of ours in the place of a package's own.

    Whoever imported a function by its name holds it himself, under any name. So all loaded modules of the packages are
    looked through, both ways; what is imported later comes from the defining module, where it is replaced too.

    Parameters
    ----------
    packages : sequence of str
        Packages whose modules may hold the functions.
    replacements : mapping
        The functions of ours, by the module that defines a function and its name there.
    """

    def __init__(self, packages: Sequence[str], replacements: Replacements) -> None:
        self._packages, self._replacements = tuple(packages), replacements
        self._replaced: dict[tuple[str, str], tuple[Any, Any]] = {}  # the package's own and ours, by module and name

    def apply(
        self, names: Sequence[str] | None = None, instead: Mapping[Any, Any] = types.MappingProxyType({})
    ) -> list[str]:
        """Replace the functions of these names, or all; return the module and name of each that was there.

        In the place of some of ours come others, which `instead` has for them. A module that was loaded anew, or
        patched by somebody else since the last call, has another original, which is what `undo` puts back.
        """
        known = {name for functions in self._replacements.values() for name in functions}
        if unknown := set(names or ()) - known:
            rule = "one of " + ", ".join(map(repr, sorted(known)))
            raise ValueError(f"`names` must be {rule}, got {sorted(unknown)[0]!r}")
        replaced = []
        for module_name, functions in self._replacements.items():
            wanted = [name for name in functions if names is None or name in names]
            if not wanted or not _exists(module_name):
                continue
            module = importlib.import_module(module_name)
            for name in wanted:
                if hasattr(module, name):
                    original, ours = self._replaced.get((module_name, name), (None, None))
                    now = getattr(module, name)
                    if now is not ours:
                        original = now
                    new = instead.get(functions[name], functions[name])
                    self._replaced[module_name, name] = original, new
                    for old in (original, ours):
                        self._swap(old, new)
                    replaced.append(f"{module_name}.{name}")
        _log.info("Replaced %s", ", ".join(replaced) or "nothing")
        return replaced

    def undo(self) -> None:
        """Put back what was replaced; what somebody else has put in our functions' places since stays."""
        for original, ours in self._replaced.values():
            self._swap(ours, original)
        self._replaced.clear()

    def _swap(self, old: Any, new: Any) -> None:
        """Put a function in the place of another wherever modules of the packages hold it."""
        if old is None:
            return
        for module in self._modules():
            for alias, value in list(vars(module).items()):
                if value is old:
                    setattr(module, alias, new)

    def _modules(self) -> Iterator[ModuleType]:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in self._packages and isinstance(module, ModuleType):
                yield module


def _exists(module_name: str) -> bool:
    """Whether a package has a module; the package itself has to be there."""
    package, _, rest = module_name.partition(".")
    importlib.import_module(package)
    parts = rest.split(".") if rest else []
    for depth in range(1, len(parts) + 1):
        name = ".".join([package, *parts[:depth]])
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            return False
    return True
