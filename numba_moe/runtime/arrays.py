"""The bridge to array libraries: torch tensors inside, the caller's own kind of array outside, no copies.

Public functions are written for torch tensors. `public` lets them take NumPy arrays, CuPy arrays, Numba device
arrays and any other array that speaks DLPack: it wraps them as tensors over the same memory, calls the
function on the caller's stream, and wraps the results the same way back.
"""

import abc
import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.utils.dlpack

from numba_moe.device import simulator
from numba_moe.runtime import checks, observe, plans, torch_private

Tensor, is_traced = torch.Tensor, torch.compiler.is_dynamo_compiling
P = ParamSpec("P")
R = TypeVar("R")


class Array(Protocol):
    """An array of any library, in signatures: a torch tensor, or another that speaks DLPack; it is what results are."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


def _working_on(handle: int, device: torch.device) -> Any:
    """Make a stream of CUDA's torch's current one; torch's ExternalStream(0) is a new one (pytorch issue 182960)."""
    stream = torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)
    return torch.cuda.stream(stream)


class _Kind(abc.ABC):
    """How arrays of one library become tensors over the same memory, and back."""

    def wrap(self, array: Any) -> torch.Tensor:
        return torch.utils.dlpack.from_dlpack(array)

    @abc.abstractmethod
    def unwrap(self, tensor: torch.Tensor) -> Any: ...

    @contextlib.contextmanager
    def calling(self, _array: Any, tensor: torch.Tensor) -> Iterator[None]:
        """Make the array's device torch's current one, and the stream that the caller works on its current stream."""
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            yield


class _NumpyKind(_Kind):
    def wrap(self, array: Any) -> torch.Tensor:
        # A tensor can express none of these; the reference answers CPU arrays anyway.
        if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array)

    def unwrap(self, tensor: torch.Tensor) -> Any:
        return tensor.numpy()


class _NumbaKind(_Kind):
    def wrap(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array._ary) if simulator.ENABLED else torch.as_tensor(array)

    def unwrap(self, tensor: torch.Tensor) -> Any:
        from numba import cuda

        return simulator.device_array(tensor) if simulator.ENABLED else cuda.as_cuda_array(tensor)

    @contextlib.contextmanager
    def calling(self, array: Any, tensor: torch.Tensor) -> Iterator[None]:
        if simulator.ENABLED:
            with simulator.running():
                yield
        else:
            with _working_on(int(getattr(array.stream, "handle", array.stream) or 0), tensor.device):
                yield


class _CupyKind(_Kind):
    def unwrap(self, tensor: torch.Tensor) -> Any:
        return importlib.import_module("cupy").from_dlpack(tensor)

    @contextlib.contextmanager
    def calling(self, _array: Any, tensor: torch.Tensor) -> Iterator[None]:
        handle = importlib.import_module("cupy").cuda.get_current_stream(tensor.device.index).ptr
        with _working_on(handle, tensor.device):
            yield


class _DlpackKind(_Kind):
    """Any library with the array API's `from_dlpack`; DLPack itself orders the two libraries' streams."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def unwrap(self, tensor: torch.Tensor) -> Any:
        return self._namespace.from_dlpack(tensor)


def _kind(array: Any) -> _Kind | None:
    library = type(array).__module__.split(".")[0]
    if isinstance(array, np.ndarray):
        return None if isinstance(array, np.ma.MaskedArray) else _NumpyKind()  # a mask would be lost
    if library == "cupy":
        return _CupyKind()
    if hasattr(array, "copy_to_host"):
        return _NumbaKind()
    if hasattr(array, "__dlpack__") and hasattr(array, "__array_namespace__"):
        return _DlpackKind(array.__array_namespace__())
    return None


_KINDS = {"numpy": _NumpyKind(), "numba": _NumbaKind(), "cupy": _CupyKind()}


def in_library(tensor: torch.Tensor, library: str) -> Any:
    """Return an array of a library, one of `_KINDS`, over the memory of a tensor."""
    return _KINDS[library].unwrap(tensor)


def to_tensor(argument: str, array: Any) -> torch.Tensor:
    """Return a tensor over the memory of an array of any library."""
    if isinstance(array, Tensor):
        return array
    kind = _kind(array)
    if kind is None:
        raise TypeError(f"`{argument}` must be an array that has a dtype and memory, got {plans.kind_of(array)}")
    try:
        return kind.wrap(array)
    except Exception as error:
        checks.unwrapped(argument, array, error)


def each(convert: Callable[[Any], Any], result: Any) -> Any:
    """Convert a result, or each of the arrays in tuples of them; None stays."""
    if result is None:
        return None
    if isinstance(result, tuple):
        parts = [each(convert, part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return convert(result)


def _plain(value: Any) -> Any:
    """Return a parameter, or a tensor of a class that leaves memory to torch, as a tensor of torch's own class."""
    is_other = isinstance(value, Tensor) and type(value) is not Tensor and plans.is_plain(value)
    return value.detach().as_subclass(Tensor) if is_other else value


def apart(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: arrays given by these names share no memory with each other or with other arguments."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not is_traced():
                checks.apart({**dict(zip(parameters, args, strict=False)), **kwargs}, names)
            return function(*args, **kwargs)

        call.written = names  # type: ignore[attr-defined]
        return call

    return decorate


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of torch tensors that is no op take and return arrays of any library.

    Its first parameter decides which, and the function runs with its device as the current one.
    """
    parameters = inspect.signature(function).parameters
    first, name = next(iter(parameters)), function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        array: Any = args[0] if args else kwargs.get(first)
        if isinstance(array, Tensor):
            plain: Any = map(_plain, args)
            named: Any = {key: _plain(value) for key, value in kwargs.items()}
            with on_device(array), observe.range_of(name):
                return function(*plain, **named)
        return cast(R, _in_library(array, parameters, name, function, args, kwargs))

    return call


def on_device(array: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the device of a tensor is the current one."""
    return torch.cuda.device(array.device) if array.is_cuda else contextlib.nullcontext()


def bridged(declaration: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Answer a call of an op whose first array is of another library than torch."""
    place = declaration.names.index(declaration.first)
    array = args[place] if len(args) > place else kwargs.get(declaration.first)
    named = declaration.named(args, kwargs)
    if _kind(array) is not None:
        for keyword in declaration.written:
            checks.writable(keyword, named.get(keyword))
    return _in_library(array, declaration.parameters, declaration.name, declaration.answer, args, kwargs)


def _in_library(
    array: Any,
    parameters: Mapping[str, inspect.Parameter],
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a function of tensors with arrays of the library of one of them, and return such arrays."""
    kind = _kind(array)
    if kind is None:
        return function(*args, **kwargs)  # whose checks say what the argument must be

    def wrap(argument: str, value: Any) -> Any:
        if isinstance(value, tuple):
            parts = [wrap(argument, part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        same_library = type(value).__module__.split(".")[0] == type(array).__module__.split(".")[0]
        if not same_library or _kind(value) is None:
            return value
        try:
            return kind.wrap(value)
        except Exception as error:
            if isinstance(kind, _NumpyKind) and isinstance(error, TypeError):
                return value  # a dtype that torch lacks: the checks name the argument
            checks.unwrapped(argument, value, error)

    positional = [wrap(*pair) for pair in zip(parameters, args, strict=False)]
    named = {keyword: wrap(keyword, value) for keyword, value in kwargs.items()}
    tensor = wrap("", array)
    if not isinstance(tensor, torch.Tensor):
        return function(*positional, **named)
    with kind.calling(array, tensor), observe.range_of(name):
        return each(kind.unwrap, function(*positional, **named))


class Contiguous(NamedTuple):
    """What `empty` takes for a contiguous array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def contiguous(dtype: torch.dtype, *shape: int) -> Contiguous:
    """Describe a contiguous array, once for all the times that `empty(*description)` will allocate it."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Contiguous(shape, strides, dtype)


# Allocates every output and scratch of every op, on the current device, given shape, strides and dtype.
empty = torch_private.empty_strided


def answered_by_reference(tensor: torch.Tensor) -> bool:
    """Whether a call on this tensor is for the NumPy reference: it is on the CPU, and no simulation runs."""
    return not tensor.is_cuda and not simulator.is_running()


def _in_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return an array over the memory of a CPU tensor; FSDP2 can still free that of a parameter, by its resizing."""
    if tensor.dtype in (torch.float32, torch.float16):
        array = np.from_dlpack(tensor)
        if array.flags.writeable:  # older releases lend it to be read alone
            return array
    found: np.ndarray = tensor.numpy()  # from now on torch refuses to resize it
    return found


def by_reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the reference on CPU tensors and return CPU tensors."""

    def to_numpy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(to_numpy, value))
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().resolve_neg()
        return _in_numpy(value.float() if value.dtype == torch.bfloat16 else value)

    with torch_private.without_transforms():  # these tensors are no part of them
        arguments, named = [*map(to_numpy, args)], {name: to_numpy(value) for name, value in kwargs.items()}
    result = function(*arguments, **named)
    return each(torch.from_numpy, result)
