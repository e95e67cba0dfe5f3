"""Functions of an installed package, replaced wherever its modules hold them, and put back."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

_log = logging.getLogger(__name__)

# Module -> name -> what takes its place: a function, or one for each form that releases have of it.
Replacements = Mapping[str, Mapping[str, Any]]


class Patch:
    """Functions of ours in the place of a package's own.

    A module that imported a function by its name holds the function itself, under any name. So all loaded modules of
    the packages are looked through, both ways; what is imported later comes from the defining module, where it is
    replaced too.

    A function is replaced by one of ours that has all its parameters, at the same places. Where the installed release
    has others, which is a release that ours do not know, it keeps its own.

    Parameters
    ----------
    packages : sequence of str
        Packages whose modules may hold the functions.
    replacements : mapping
        The functions of ours, by the module that defines a function and its name there; a tuple has one for each form.
    changed : callable, optional
        Called when functions have been replaced or put back: it makes the packages forget which they found before.
    optional : sequence of str
        More packages, whose functions are replaced where these can be imported.
    """

    def __init__(
        self,
        packages: Sequence[str],
        replacements: Replacements,
        changed: Callable[[], None] = lambda: None,
        optional: Sequence[str] = (),
    ) -> None:
        self._packages, self._replacements, self._changed = (*packages, *optional), replacements, changed
        self._optional = tuple(optional)
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
        found = self._fitting(names)
        if absent := set(names or ()) - {name for _, name, *_ in found}:
            raise ValueError(f"`names` must be functions of the installed release, got {sorted(absent)[0]!r}")
        replaced = []
        for module_name, name, original, ours in found:
            before = self._replaced.pop((module_name, name), (None, None))[1]
            new = self._for_one(instead.get(ours, ours), original)
            self._replaced[module_name, name] = original, new
            for old in (original, before):
                self._swap(old, new)
            replaced.append(f"{module_name}.{name}")
        self._changed()
        _log.info("Replaced %s", ", ".join(replaced) or "nothing")
        return replaced

    def _fitting(self, names: Sequence[str] | None) -> list[tuple[str, str, Any, Any]]:
        """Return module, name, original and ours of each function that is there and has a form that ours serve."""
        found = []
        self._import_packages()
        for module_name, functions in self._replacements.items():
            wanted = [name for name in functions if names is None or name in names]
            if not wanted or not _exists(module_name):
                continue
            module = importlib.import_module(module_name)
            for name in wanted:
                if not hasattr(module, name):
                    continue
                original, before = self._replaced.get((module_name, name), (None, None))
                now = getattr(module, name)
                original = original if now is before else now
                forms = functions[name] if isinstance(functions[name], tuple) else (functions[name],)
                ours = next((form for form in forms if not lacking(form, original)), None)
                if ours is not None:
                    found.append((module_name, name, original, ours))
                    continue
                others = ", ".join(f"`{other}`" for other in lacking(forms[0], original))
                rule = (
                    f"a function with the parameters of ours, which lack {others} of this release or have it elsewhere"
                )
                if names is not None:
                    raise ValueError(f"`names` must be of {rule}, got {name!r}")
                _log.warning("%s.%s stays as it is: to be replaced it must be %s", module_name, name, rule)
        return found

    def _for_one(self, ours: Any, original: Any) -> Any:
        """Return our function, or a copy if it already replaces another original: `undo` finds originals by it."""
        if all(new is not ours or old is original for old, new in self._replaced.values()):
            return ours
        parts = (ours.__code__, ours.__globals__, ours.__name__, ours.__defaults__, ours.__closure__)
        copied = types.FunctionType(*parts)
        copied.__kwdefaults__ = ours.__kwdefaults__
        return functools.update_wrapper(copied, ours)

    def _import_packages(self) -> None:
        """Import the packages that define functions and are installed, at least one."""
        defining = dict.fromkeys(name.partition(".")[0] for name in self._replacements)
        packages = [name for name in defining if name not in self._optional]
        installed = [name for name in packages if name in sys.modules or importlib.util.find_spec(name) is not None]
        if not installed:
            raise ImportError(f"{' or '.join(packages)} must be installed to be patched")
        for name in installed:
            importlib.import_module(name)
        for name in self._optional:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    def undo(self) -> None:
        """Put back what was replaced; what somebody else has put in our functions' places since stays."""
        for original, ours in self._replaced.values():
            self._swap(ours, original)
        self._replaced.clear()
        self._changed()

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


def lacking(ours: Callable[..., Any], theirs: Any) -> list[str]:
    """Return the parameters of a function that one of ours lacks, or has at another place.

    A function that takes whatever it is given, or does not say what, has none that could be compared.

    Examples
    --------
    >>> lacking(lambda ids, block, *, new=None: ids, lambda ids, size, *, newer=0: ids)
    ['size', 'newer']
    """
    try:
        wanted = inspect.signature(theirs).parameters.values()
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in wanted):
        return []
    parameters = inspect.signature(ours).parameters
    places = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    missing = []
    for place, parameter in enumerate(wanted):
        if parameter.kind is parameter.KEYWORD_ONLY:
            there = parameter.name in parameters
        elif parameter.kind is parameter.VAR_KEYWORD:
            there = True
        else:
            there = place < len(places) and places[place] == parameter.name
        if not there:
            missing.append(parameter.name)
    return missing


def _exists(module_name: str) -> bool:
    """Whether the packages that are imported have a module."""
    parts = module_name.split(".")
    if parts[0] not in sys.modules:
        return False
    for depth in range(2, len(parts) + 1):
        parent, name = ".".join(parts[: depth - 1]), ".".join(parts[:depth])
        if name in sys.modules:
            continue
        is_package = parent not in sys.modules or hasattr(sys.modules[parent], "__path__")
        if not is_package or importlib.util.find_spec(name) is None:
            return False
    return True
