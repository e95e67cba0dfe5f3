"""Every argument check of the public functions, and every error message.

Checks read types, shapes, dtypes, strides and devices, never data, so they cost no synchronisation. A wrong type
is a TypeError, a wrong value, shape or device a ValueError; the message reads
"`<argument>` must be <rule>, got <value>".

With NUMBA_MOE_VALIDATE=1 in the environment a pass over the data, which does synchronise, names the first bad token.
"""

import contextlib
import importlib.util
import itertools
import math
import operator
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from numba_moe.runtime import environment
from numba_moe.runtime.plans import Foreign, Layout, Parts, Unreadable, kind_of, layout

LARGEST_INT32 = 2**31 - 1
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
LARGEST_INT64 = 2**63 - 1
MOST_SECONDS = 10**9  # 31 years, which timers of every kind can hold
VALIDATE = environment.Switch("NUMBA_MOE_VALIDATE")
IDS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TO_CONTIGUOUS = "copy it with `np.ascontiguousarray` or `.contiguous()`"
BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class UnreadableError(TypeError):
    """A tensor is given whose memory no kernel can read: torch's dispatcher may know what to do with it."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrong_type(argument: str, rule: str, value: Any) -> NoReturn:
    raise TypeError(f"`{argument}` must be {rule}, got {value}")


def _wrong_value(argument: str, rule: str, value: Any) -> NoReturn:
    if isinstance(value, int) and value.bit_length() > 128:  # Python writes no integer of thousands of digits
        value = f"an integer of {value.bit_length()} bits"
    raise ValueError(f"`{argument}` must be {rule}, got {value}")


def integer(argument: str, value: Any, lowest: int, highest: int = LARGEST_INT32, because: str = "") -> int:
    """Return an integer within its bounds; `because` says where the upper bound comes from."""
    try:
        if isinstance(value, (torch.Tensor, np.bool_)):
            raise TypeError  # to ask a tensor would synchronise; NumPy before 2.3 takes its bools for numbers
        number = operator.index(value)
    except TypeError:
        _wrong_type(argument, "an integer", type(value).__name__)
    if isinstance(value, bool):
        _wrong_type(argument, "an integer", "bool")
    if number < lowest:
        _wrong_value(argument, f"at least {lowest}", number)
    if number > highest:
        _wrong_value(argument, f"at most {because or highest}", number)
    return number


def subset(argument: str, numbers: Any, size: int) -> list[int]:
    """Check that numbers are below a size, and return them in order, each once; None means all.

    >>> subset("layers", [2, 0, 2], 3), subset("layers", None, 3)
    ([0, 2], [0, 1, 2])
    """
    if numbers is None:
        return list(range(size))
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        _wrong_type(argument, "a sequence of integers", numbers)
    found = sorted({integer(argument, number, 0, size - 1) for number in numbers})
    holds(argument, "one number or more", bool(found), "none")
    return found


def instance(argument: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        _wrong_type(argument, f"{article} {kind.__name__}", type(value).__name__)


def boolean(argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        _wrong_type(argument, "True or False", repr(value))


def number(argument: str, value: Any, infinite: bool = False) -> None:
    """Check a number that kernels take as float32: no NaN, and infinity only if it means no limit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        _wrong_type(argument, "a number", type(value).__name__)
    if not (abs(value) <= LARGEST_FLOAT32 or (infinite and value in (math.inf, -math.inf))):
        _wrong_value(argument, "a finite number that float32 holds" + ", or infinity" * infinite, value)


def seconds(argument: str, value: Any) -> float:
    """Return a time that something may take or wait."""
    number(argument, value)
    holds(argument, "above 0", value > 0, value)
    holds(argument, f"at most {MOST_SECONDS} seconds", value <= MOST_SECONDS, value)
    return float(value)


def path(argument: str, value: Any) -> Path:
    """Return a path, given by itself or as text."""
    if not isinstance(value, str | os.PathLike):
        _wrong_type(argument, "a str or a path", type(value).__name__)
    return Path(value)


def choice(argument: str, value: Any, options: Sequence[str]) -> None:
    rule = "one of " + ", ".join(map(repr, options))
    if not isinstance(value, str):
        _wrong_type(argument, rule, type(value).__name__)
    if value not in options:
        _wrong_value(argument, rule, repr(value))


def dtype(argument: str, value: Any, dtypes: Sequence[torch.dtype] | None = None) -> torch.dtype:
    """Return a torch dtype, given by itself or by its name, that is one of some."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        rule = "a torch dtype or the name of one"
        if isinstance(value, str):
            _wrong_value(argument, rule, repr(value))
        _wrong_type(argument, rule, type(value).__name__)
    if dtypes is not None and found not in dtypes:
        _wrong_value(argument, "one of " * (len(dtypes) > 1) + ", ".join(map(_name, dtypes)), _name(found))
    return found


def device(argument: str, value: Any, kinds: Sequence[str] = ("cpu", "cuda")) -> torch.device:
    """Return a device, given by itself, by its name, or by the ordinal of a CUDA device."""
    if isinstance(value, int):
        return torch.device("cuda", integer(argument, value, 0))
    rule = "a CUDA device, an ordinal of one, or the CPU"
    found = value
    if isinstance(value, str):
        try:
            found = torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"`{argument}` must be {rule}, got {value!r}") from error
    if not isinstance(found, torch.device):
        _wrong_type(argument, rule, type(value).__name__)
    if found.type not in kinds:
        _wrong_value(argument, rule, found)
    return found


def readable(argument: str, value: Any) -> None:
    """Check that an argument, given by its layout, is no tensor without memory."""
    if isinstance(value, Unreadable):
        raise UnreadableError(f"`{argument}` must be a tensor with memory to read, got {value.what}")


def tensor(argument: str, value: Any, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """Check that a value itself is a tensor of torch, of one of some dtypes; code that torch compiles can call it."""
    if not isinstance(value, torch.Tensor):
        _wrong_type(argument, "a tensor", type(value).__name__)
    if dtypes is not None and value.dtype not in dtypes:
        _wrong_type(argument, "of dtype " + " or ".join(map(_name, dtypes)), _name(value.dtype))


def array(
    argument: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    ndims: Sequence[int],
    like: tuple[str, Any] | None = None,
    rows: bool = False,
) -> None:
    """Check the kind, dtype, rank, strides and device of an array, given by its layout.

    Parameters
    ----------
    like
        Name and layout of the array whose library and device this one must share.
    rows
        The last dimension must be contiguous, the rows may be strided; otherwise the whole array must be contiguous.
    """
    readable(argument, value)
    if not isinstance(value, Layout):
        kinds = "a torch tensor, or a NumPy, CuPy, Numba device or DLPack array, of dtype "
        rule = f"of the same library as `{like[0]}`" if like else kinds + " or ".join(map(_name, dtypes))
        _wrong_type(argument, rule, value.what if isinstance(value, Foreign) else kind_of(value))
    if value.dtype not in dtypes:
        hint = ""
        if dtypes[0] in (*IDS, torch.float32) and not value.dtype.is_complex:
            name = _name(dtypes[0])
            hint = f"; convert it with `.astype(np.{name})` or `.to(torch.{name})`"
        _wrong_type(argument, "of dtype " + " or ".join(map(_name, dtypes)), _name(value.dtype) + hint)
    if len(value.shape) not in ndims:
        shape = tuple(value.shape)
        _wrong_value(argument, "of " + " or ".join(map(str, ndims)) + " dimensions", f"shape {shape}")
    if rows:
        if value.strides is not None and value.strides[-1] != 1 and value.shape[-1] > 1:
            _wrong_value(argument, "contiguous in its last dimension", f"strides {value.strides}; {TO_CONTIGUOUS}")
    elif value.strides is not None:
        found = f"shape {tuple(value.shape)} with strides {value.strides}; {TO_CONTIGUOUS}"
        _wrong_value(argument, "contiguous", found)
    if value.device.type not in ("cpu", "cuda"):
        _wrong_value(argument, "on a CUDA device or the CPU", str(value.device))
    if like is not None and value.device != like[1].device:
        _wrong_value(argument, f"on the device of `{like[0]}`, {like[1].device}", str(value.device))


def shape(argument: str, value: Layout, expected: tuple[int, ...], because: str) -> None:
    if tuple(value.shape) != expected:
        _wrong_value(argument, f"of shape {because} = {expected}", f"shape {tuple(value.shape)}")


def fits_int32(argument: str, count: int, what: str) -> None:
    """Check that a number of slots or positions that follows from the shapes fits the int32 that index them."""
    if count > LARGEST_INT32:
        _wrong_value(argument, f"small enough for {what} to fit int32 ({LARGEST_INT32})", f"{what} = {count}")


def routing(
    topk_ids: Any,
    num_experts: Any,
    expert_map: Any,
    ndims: Sequence[int] = (1, 2),
    like: tuple[str, Any] | None = None,
) -> int:
    """Check the arguments by which every grouping op is told its slots; return the number of experts."""
    array("topk_ids", topk_ids, IDS, ndims, like=like)
    experts = integer("num_experts", num_experts, 1)
    fits_int32("topk_ids", topk_ids.shape.numel(), "the number of slots")
    if expert_map is not None:
        array("expert_map", expert_map, IDS, (1,), like=("topk_ids", topk_ids))
        shape("expert_map", expert_map, (experts,), "(num_experts,)")
    return experts


def _first(bad: torch.Tensor) -> str | None:
    """Name the first True of a mask of rows, or None."""
    found = bad.nonzero()
    names = ("slot",) if bad.dim() == 1 else ("token", "k")
    return ", ".join(f"{name} {int(i)}" for name, i in zip(names, found[0], strict=True)) if len(found) else None


def ids(topk_ids: torch.Tensor, num_experts: int) -> None:
    """Check that ids are -1 or experts, none of them twice for a token."""
    if place := _first((topk_ids < -1) | (topk_ids >= num_experts)):
        _wrong_value("topk_ids", f"-1 or in [0, num_experts = {num_experts})", f"another id at {place}")
    if topk_ids.dim() == 2:
        ordered, order = topk_ids.sort(dim=1, stable=True)
        again = torch.zeros_like(topk_ids, dtype=torch.bool)
        again.scatter_(1, order[:, 1:], (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
        if place := _first(again):
            _wrong_value("topk_ids", "distinct experts for each token", f"an expert again at {place}")


def logits(argument: str, value: torch.Tensor) -> None:
    """Check that logits are finite."""
    if place := _first(~value.isfinite()):
        _wrong_value(argument, "finite", f"another value at {place.replace(', k ', ', expert ')}")


def unwrapped(argument: str, value: Any, error: Exception) -> NoReturn:
    """Refuse an array that its library does not hand over: a tracer of jax.jit has no data, for instance."""
    rule = "an array with data to hand over, which tracers have not: call this outside of jax.jit and the like"
    raise TypeError(f"`{argument}` must be {rule}, got {kind_of(value)} ({error})") from error


def tuple_of(argument: str, value: Any, length: int) -> None:
    """Check that an argument, given by its layouts, is a tuple of this length."""
    rule = f"a tuple of {length} arrays"
    if not isinstance(value, Parts):
        _wrong_type(argument, rule, "an array" if isinstance(value, Layout) else value.what)
    if len(value.values) != length:
        _wrong_value(argument, rule, f"{len(value.values)}")


def aligned(argument: str, value: Layout) -> None:
    """Check that an array may be read 16 bytes at a time."""
    if value.address:
        _wrong_value(argument, "at an address that is a multiple of 16 bytes", f"{value.address} more")


def writable(argument: str, value: Any) -> None:
    """Check that NumPy arrays, in a tuple or alone, can be written in place; others cannot become tensors."""
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, np.ndarray) and not (part.flags.writeable and part.flags.c_contiguous):
            _wrong_value(argument, "writable and contiguous", "an array that is read-only or strided")
        if isinstance(part, np.ndarray) and not part.dtype.isnative:
            _wrong_value(argument, "of this machine's byte order", f"dtype {part.dtype.str}")


class _Addresses:
    """An array over the addresses of a tensor, for NumPy to compare; nobody reads the memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.itemsize
        strides = tuple(size * stride for stride in tensor.stride())
        where = {"data": (tensor.data_ptr(), True), "shape": tuple(tensor.shape), "strides": strides}
        self.__array_interface__ = {**where, "typestr": f"|V{size}", "version": 3}


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor and the end of its memory; 0 and 0 for a tensor without readable memory."""
    if isinstance(layout(tensor), Unreadable):
        return 0, 0
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize * (tensor.numel() > 0)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors whose extents overlap have an element in common."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    try:
        first, second = (np.asarray(_Addresses(tensor)) for tensor in (one, other))
        return np.shares_memory(first, second, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _surely_apart(values: Iterable[Any]) -> bool:
    """Whether these arguments are contiguous tensors, tuples of them or others, and no two overlap: the usual case."""
    spans = []
    for value in values:
        for part in value if isinstance(value, tuple) else (value,):
            if type(part) is torch.Tensor:
                if not part.is_contiguous() or not part.numel():
                    return False
                begin = part.data_ptr()
                spans.append((begin, begin + part.nbytes))
            elif isinstance(part, torch.Tensor | tuple):
                return False
    spans.sort()
    last = 0
    for begin, end in spans:
        if begin < last:
            return False
        last = end
    return True


def tensors(argument: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an argument, which is one or a tuple of them, with a name for each."""
    if isinstance(value, torch.Tensor):
        yield argument, value
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        for index, part in enumerate(value):
            name = f"{argument}[{index}]" if fields is None else f"{argument}.{fields[index]}"
            yield from tensors(name, part)


def apart(
    arguments: Mapping[str, Any], written: Sequence[str], onto: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Check that arrays that are written share no memory with each other or with others.

    Parameters
    ----------
    arguments
        All arguments of a call; those that are no tensors are left to other checks.
    written
        Names of the arguments that are written.
    onto
        For some of these, the argument that it may be itself.
    """
    try:
        if _surely_apart(arguments.values()):
            return
    except RuntimeError:  # torch's own, of a tensor without memory, which other checks refuse
        pass
    named = [
        (*_extent(tensor), name, argument, tensor)
        for argument, value in arguments.items()
        for name, tensor in tensors(argument, value)
    ]
    for one, other in itertools.combinations(named, 2):
        pair = sorted((one, other), key=lambda item: item[3] not in written)
        (begin, end, name, argument, tensor), (first, last, other_name, other_argument, other_tensor) = pair
        if argument not in written or begin == end or first == last or end <= first or last <= begin:
            continue
        if onto.get(argument) == other_argument and (begin, end) == (first, last):
            continue
        if _share_memory(tensor, other_tensor):
            _wrong_value(name, "in memory of its own", f"an array that overlaps `{other_name}`")


def changeable(argument: str, tensor: torch.Tensor) -> None:
    """Check that a tensor can be written: what is written could have no gradient."""
    if tensor.requires_grad and torch.is_grad_enabled():
        _wrong_value(argument, "without a gradient, as it is written", "one that requires it")
    if tensor.is_neg():
        _wrong_value(argument, "a tensor that holds what it says, as it is written", "a negated view")


def divides(argument: str, divisor: int, whole: str, number: int) -> None:
    if number % divisor:
        _wrong_value(argument, f"a divisor of {whole} = {number}", divisor)


NUMBERS = {"float64": "iuf", "int64": "iu", "bool": "b"}


def host_array(argument: str, value: Any, dtype: str, ndims: Sequence[int], empty: bool = False) -> np.ndarray:
    """Return an array, a tensor or nested lists as a contiguous NumPy array; floats do not become integers."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    try:
        found = np.asarray(value)
    except ValueError:  # lists of several lengths
        found = np.asarray(None)
    if found.dtype.kind not in NUMBERS[dtype]:
        _wrong_type(argument, f"an array that converts to {dtype}", f"{type(value).__name__} of dtype {found.dtype}")
    if found.ndim not in ndims:
        _wrong_value(argument, "of " + " or ".join(map(str, ndims)) + " dimensions", f"shape {found.shape}")
    if 0 in found.shape and not empty:
        _wrong_value(argument, "without empty dimensions", f"shape {found.shape}")
    if dtype == "int64" and found.dtype == np.uint64 and found.max(initial=0) > LARGEST_INT64:
        _wrong_value(argument, f"at most {LARGEST_INT64}", found.max())
    return found.astype(dtype, order="C", copy=False)


def every(argument: str, rule: str, good: np.ndarray, values: np.ndarray, axes: Sequence[str]) -> None:
    """Check that a rule holds for every element; the error names the first that breaks it."""
    if not good.all():
        index = tuple(np.argwhere(~good)[0].tolist())
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
        _wrong_value(argument, rule, f"{values[index]} at {place}")


def counts(argument: str, value: np.ndarray) -> None:
    """Check that int64 counts are not negative, and that no sum of some of them overflows."""
    if value.size and value.min() < 0:
        _wrong_value(argument, "at least 0", f"{value.min()} at {tuple(np.argwhere(value < 0)[0].tolist())}")
    # In two parts, whose sums cannot overflow.
    total = (int((value >> 32).sum()) << 32) + int((value & 0xFFFFFFFF).sum())
    if total > LARGEST_INT64:
        _wrong_value(argument, f"counts whose sum is at most {LARGEST_INT64}", total)


def host_shape(argument: str, value: np.ndarray, expected: tuple[int, ...], because: str) -> None:
    if value.shape != expected:
        _wrong_value(argument, f"of shape {because} = {expected}", f"shape {value.shape}")


def at_least(argument: str, number: int, lowest: int, because: str) -> None:
    if number < lowest:
        _wrong_value(argument, f"at least {because} = {lowest}", number)


def installed(what: str, extra: str, *libraries: str) -> None:
    """Check that the libraries are there that something of the command line needs."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}: pip install numba-moe[{extra}]")


@contextlib.contextmanager
def under_names(**names: str) -> Iterator[None]:
    """Call arguments in errors what a command calls them.

    >>> with under_names(num_gpus="--gpus"):
    ...     integer("num_gpus", 0, 1)
    Traceback (most recent call last):
    ValueError: `--gpus` must be at least 1, got 0
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, given in names.items():
            text = text.replace(f"`{name}`", f"`{given}`")
        raise ValueError(text) from error


def holds(argument: str, rule: str, true: bool, value: Any) -> None:
    """Check a rule that needs no computing of its own."""
    if not true:
        _wrong_value(argument, rule, value)
