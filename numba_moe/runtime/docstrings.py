"""Docstrings of functions whose parameters are mostly another's: what they leave out is taken from there.

A docstring says what is its own. `help` has all of it: parameters in the order of the signature, results and errors.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

SECTIONS = ("Parameters", "Returns", "Raises", "See Also", "Notes", "Examples")
HEADING = re.compile(rf"^({'|'.join(SECTIONS)})\n-+\n", re.MULTILINE)
ENTRY = re.compile(r"^(?=[\w, ]+ : )", re.MULTILINE)
TAKEN = ("Returns", "Raises")


def sections(docstring: str) -> dict[str, str]:
    r"""Return the parts of a numpydoc docstring by their headings; what comes before has none.

    >>> sections("Add.\n\nReturns\n-------\nint")
    {'': 'Add.', 'Returns': 'int'}
    """
    first, *rest = HEADING.split(inspect.cleandoc(docstring))
    return {"": first.strip(), **{name: text.strip() for name, text in zip(rest[::2], rest[1::2], strict=True)}}


def parameters(text: str) -> dict[str, str]:
    r"""Return what is said of each parameter, by its name.

    >>> parameters("a, b : int\n    Sizes.\nc : float")
    {'a': 'a, b : int\n    Sizes.', 'b': 'a, b : int\n    Sizes.', 'c': 'c : float'}
    """
    entries = [entry.strip() for entry in ENTRY.split(text) if entry.strip()]
    return {name.strip(): entry for entry in entries for name in entry.partition(" : ")[0].split(",")}


def completed(function: Callable[..., Any], like: Callable[..., Any]) -> str | None:
    r"""Return the docstring of a function with what it leaves out, as another function's docstring has it.

    >>> add, multiply = (lambda a, b: a + b), (lambda b, a: a * b)
    >>> add.__doc__ = "Add.\n\nParameters\n----------\na : int\nb : int"
    >>> multiply.__doc__ = "Multiply.\n\nParameters\n----------\na : float"
    >>> completed(multiply, add).splitlines()
    ['Multiply.', '', 'Parameters', '----------', 'b : int', 'a : float']
    """
    if not function.__doc__ or not like.__doc__:  # as python -OO leaves them
        return function.__doc__
    own, other = sections(function.__doc__), sections(like.__doc__)
    said = parameters(other["Parameters"]) | parameters(own.get("Parameters", ""))
    own["Parameters"] = "\n".join(dict.fromkeys(said[name] for name in inspect.signature(function).parameters))
    own = {name: other[name] for name in TAKEN if name in other} | own
    parts = [f"{name}\n{'-' * len(name)}\n{own[name]}" for name in SECTIONS if name in own]
    return "\n\n".join([own[""], *parts]) + "\n"
