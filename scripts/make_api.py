"""Write docs/api.md: every public name with its signature and docstring. --check only says whether it is current."""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numba_moe
from numba_moe import placement, recorder

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def signature(name: str, value: Any) -> str:
    """Return a call with names and defaults, docstrings say the types; an exception is its name alone."""
    if isinstance(value, type) and issubclass(value, Exception):
        return name
    parameters = inspect.signature(value).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return f"{name}{inspect.Signature(plain)}"


def entry(name: str, value: Any) -> str:
    """Return the text of one name: how it is called, and its docstring as it is."""
    text = inspect.getdoc(value) or ""
    summary, _, rest = text.partition("\n\n")
    body = f"\n\n{rest}" if rest else ""
    return f"### `{name}`\n\n```text\n{signature(name, value)}\n\n{summary}{body}\n```\n"


def page() -> str:
    """Return the whole page."""
    parts = ["# API\n\nMade from the docstrings by `scripts/make_api.py`.\n"]
    for package in (numba_moe, placement, recorder):
        parts.append(f"## {package.__name__}\n")
        parts += [entry(name, getattr(package, name)) for name in package.__all__]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not current")
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
