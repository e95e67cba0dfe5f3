"""Plans: what a call needs beside its data, worked out once for each layout of its arguments.

A public function first makes a plan, from what is known without the data: shapes, dtypes, strides, devices,
numbers. It checks them, and chooses sizes and launches. Then the function allocates and runs the launches. Plans are
remembered, so that a call with a layout that was seen before pays for none of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

new_tuple = tuple.__new__  # of a NamedTuple and its fields: two thirds of the time that calling it takes
_remembered: list[Any] = []


class Layout(NamedTuple):
    """A tensor but for its data; strides are None where it is contiguous, the address is modulo 16."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...] | None
    address: int


def layout(value: Any) -> Any:
    """Return the layout of a tensor, and anything else as it is: None, or what the checks will refuse."""
    if not isinstance(value, torch.Tensor):
        return value
    strides = None if value.is_contiguous() else value.stride()
    return new_tuple(Layout, (value.shape, value.dtype, value.device, strides, value.data_ptr() % 16))


def planned(function: Callable[P, R]) -> Callable[P, R]:
    """Remember what a function of layouts and numbers returns."""
    remembered = functools.lru_cache(maxsize=4096, typed=True)(function)
    _remembered.append(remembered)

    @functools.wraps(function)
    def plan(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return remembered(*args, **kwargs)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # of a check, which will say so again, or of an argument that cannot be a key
            return function(*args, **kwargs)

    return plan


def forget() -> None:
    """Forget all plans, for tests that replace a kernel."""
    for plan in _remembered:
        plan.cache_clear()
