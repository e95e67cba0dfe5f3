"""Switches in the environment, as they are at each call: a program may set them after it imported this package."""

import os
from typing import Any

# The dictionary inside os.environ, if it has one: encoding and decoding in os.environ takes 0.7 us.
_held: Any = getattr(os.environ, "_data", os.environ)


class Switch:
    """Whether an environment variable is "1" now.

    >>> example = Switch("NUMBA_MOE_EXAMPLE")
    >>> bool(example)
    False
    >>> os.environ["NUMBA_MOE_EXAMPLE"] = "1"
    >>> bool(example)
    True
    >>> del os.environ["NUMBA_MOE_EXAMPLE"]
    """

    __slots__ = ("_get", "_key", "_on")

    def __init__(self, name: str) -> None:
        encoded = _held is not os.environ
        self._get: Any = _held.get
        self._key: Any = os.environ.encodekey(name) if encoded else name
        self._on: Any = os.environ.encodevalue("1") if encoded else "1"

    def __bool__(self) -> bool:
        return self._get(self._key) == self._on
