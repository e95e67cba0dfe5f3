"""Plans: what a call needs beside its data, worked out once for each layout of its arguments.

A public function first makes a plan, from what is known without the data: shapes, dtypes, strides, devices,
numbers. It checks them, and chooses sizes and launches. Then the function allocates and runs the launches. Plans are
remembered, so that a call with a layout that was seen before pays for none of it.
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from numba_moe.runtime import torch_private

P = ParamSpec("P")
R = TypeVar("R")

Tensor = torch.Tensor
new_tuple = tuple.__new__  # of a NamedTuple and its fields: two thirds of the time that calling it takes
_remembered: list[Any] = []


class Layout(NamedTuple):
    """A tensor but for its data; strides are None where it is contiguous, the address is modulo 16."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...] | None
    address: int


class Unreadable(NamedTuple):
    """A tensor whose memory nobody can read; the checks refuse it."""

    what: str


class Foreign(NamedTuple):
    """A value that is neither a tensor nor None; the checks refuse it. The value itself might not be hashable."""

    what: str


def kind_of(value: Any) -> str:
    """Return what an error message calls a value that is no tensor."""
    name = f"{type(value).__module__}.{type(value).__name__}"
    return name if getattr(value, "dtype", None) is None else f"{name} of dtype {value.dtype}"


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the class of a tensor leaves its memory to torch, as parameters do and fake tensors do not."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _without_memory(tensor: torch.Tensor) -> str:
    """Return what an error message calls a tensor whose memory torch does not give."""
    if torch_private.is_wrapped_by_transform(tensor):
        return "one that a transform of torch.func (functorch) made"
    if tensor.is_nested:
        return "a nested one"
    return "one without" if tensor.layout is torch.strided else f"one of layout {tensor.layout}"


def layout(value: Any) -> Any:
    """Return the layout of a tensor, None for None, and for anything else what the checks will refuse."""
    if type(value) is not Tensor:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return Foreign(kind_of(value))
        if not is_plain(value):
            return Unreadable(f"one of class {type(value).__name__}")
    try:
        strides = None if value.is_contiguous() else value.stride()
        address = value.data_ptr()
        shape = value.shape
    except RuntimeError:  # torch's own, of sparse and nested tensors, and of what torch.func's transforms pass
        return Unreadable(_without_memory(value))
    if (
        strides is not None and value.is_neg()
    ):  # as the imaginary part of a conjugate is, in which nothing is contiguous
        return Unreadable("a negated view")
    if not address and shape.numel() and value.device.type != "meta":
        return Unreadable(_without_memory(value))
    return new_tuple(Layout, (shape, value.dtype, value.device, strides, address % 16))


class Parts(NamedTuple):
    """The layouts of the arrays in a tuple, and its other values, with the types that tell 1, 1.0 and True apart."""

    values: tuple[Any, ...]
    types: tuple[type, ...]


def layouts(value: Any) -> Any:
    """Return the layout of a tensor, and of a tuple those of its parts."""
    if value is None or not isinstance(value, tuple):
        return layout(value)
    described = tuple(
        part if isinstance(part, str | int | float) else layouts(part)  # what is written in a table beside its arrays
        for part in value
    )
    return Parts(described, tuple(map(type, value)))


class _NotAKeyError(Exception):
    """Arguments hold numbers within a tuple, where a key of the cache would not tell 1, 1.0 and True apart."""


def planned(function: Callable[P, R]) -> Callable[P, R]:
    """Remember what a function of layouts and numbers returns for equal arguments of equal types.

    Numbers must be separate arguments: a call with a number inside a tuple is planned again each time.
    """

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if _holds_a_number(args) or _holds_a_number(tuple(kwargs.values())):
            raise _NotAKeyError
        return function(*args, **kwargs)

    remembered = functools.lru_cache(maxsize=4096, typed=True)(made)
    _remembered.append(remembered)

    @functools.wraps(function)
    def plan(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return remembered(*args, **kwargs)  # type: ignore[arg-type]
        except _NotAKeyError:
            pass
        except (TypeError, ValueError):  # of a check, or of an argument without a hash, whose check is still to come
            if _is_key((args, tuple(kwargs.values()))):
                raise
        return function(*args, **kwargs)

    return plan


def _holds_a_number(values: tuple[Any, ...]) -> bool:
    """Whether a tuple among some values, other than a layout, holds a number."""
    tuples = [value for value in values if isinstance(value, tuple) and not isinstance(value, Layout | Parts)]
    return any(isinstance(part, numbers.Number) for parts in tuples for part in parts) or any(
        map(_holds_a_number, tuples)
    )


def _is_key(value: Any) -> bool:
    try:
        hash(value)
    except (TypeError, ValueError):  # the latter from memoryviews
        return False
    return True


def forget() -> None:
    """Forget all plans, for tests that replace a kernel."""
    for plan in _remembered:
        plan.cache_clear()
