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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np
import torch
import torch.utils.dlpack

from numba_moe.runtime import checks, observe, plans, simulator, torch_private

# What eager calls pay for, 0.1 us together: is torch compiling, is torch.jit tracing, and how many dispatch modes (of
# make_fx, FakeTensorMode, counters of flops) want to see each op. All of them are told of ops by torch's dispatcher.
Tensor, is_traced = torch.Tensor, torch.compiler.is_dynamo_compiling
is_jit_tracing, num_modes, forward_ad = torch_private.is_jit_tracing, torch_private.num_modes, torch_private.forward_ad
# Whether a transform of torch.func is at work; asked where a tensor has no memory to read, as those it passes have not.
is_transformed = torch_private.is_transformed
current_device = torch_private.current_device
P = ParamSpec("P")
R = TypeVar("R")


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
    def calling(self, array: Any, tensor: torch.Tensor) -> Iterator[None]:
        """Make the array's device torch's current one, and the stream that the caller works on its current stream."""
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            yield


class _NumpyKind(_Kind):
    def wrap(self, array: Any) -> torch.Tensor:
        # A tensor can express none of these; the reference answers CPU arrays anyway.
        if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return torch.from_numpy(array)

    def unwrap(self, tensor: torch.Tensor) -> Any:
        return tensor.numpy()


class _NumbaKind(_Kind):
    def wrap(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array._ary) if simulator.ENABLED else torch.as_tensor(array)

    def unwrap(self, tensor: torch.Tensor) -> Any:
        from numba import cuda

        return cuda.to_device(tensor.numpy()) if simulator.ENABLED else cuda.as_cuda_array(tensor)

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
    def calling(self, array: Any, tensor: torch.Tensor) -> Iterator[None]:
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


def _each(convert: Callable[[Any], Any], result: Any) -> Any:
    """Convert a result, or each of the arrays in tuples of them; None stays."""
    if result is None:
        return None
    if isinstance(result, tuple):
        parts = [_each(convert, part) for part in result]
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


def _writing(function: Callable[P, R], names: tuple[str, ...]) -> Callable[P, R]:
    """Check that the tensors that a function is given to write can be, and tell autograd afterwards that they were."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        written = []
        for name in names:
            value: Any = kwargs.get(name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    checks.changeable(name, part)
                    if not part.is_inference():  # such a tensor has no version
                        written.append(part)
        result = function(*args, **kwargs)
        if written:
            torch.autograd.graph.increment_version(written)
        return result

    return call


def public(function: Callable[P, R], written: tuple[str, ...] = ()) -> Callable[P, R]:
    """Let a function of torch tensors take and return arrays of any library.

    Its first array, which is its first parameter annotated `Any`, decides which, and the function runs with its device
    as the current one. Arrays given by the keywords `written`, alone or in a tuple, are written, and autograd is told.
    """
    plain = function
    function = _writing(plain, written) if written else plain
    writes = frozenset(written)
    parameters = inspect.signature(function).parameters
    annotated = (name for name, parameter in parameters.items() if parameter.annotation is Any)
    first = next(annotated, next(iter(parameters)))
    place = list(parameters).index(first)
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        array = args[place] if len(args) > place else kwargs.get(first)
        if type(array) is Tensor and not (
            is_traced() or is_jit_tracing() or num_modes() or forward_ad._current_level >= 0
        ):
            run = function if writes and not writes.isdisjoint(kwargs) else plain
            if observe.RANGES:
                run = observe.named(run)
            device = array.get_device()
            try:
                if device < 0 or device == current_device():
                    return run(*args, **kwargs)
                with torch.cuda.device(device):
                    return run(*args, **kwargs)
            except checks.UnreadableError:
                if not is_transformed():
                    raise
        if isinstance(array, Tensor):  # whatever torch.compile sees, fake tensors, parameters, others' subclasses
            from numba_moe.interop import torch_ops  # which torch.compile does too, and so registers the ops

            if name in torch_ops.OPS:
                return torch_ops.call(name, args, kwargs)
            run = observe.named(function)
            return run(*map(_plain, args), **{key: _plain(value) for key, value in kwargs.items()})
        kind = _kind(array)
        if kind is None:
            return function(*args, **kwargs)  # whose checks say what the argument must be

        def wrap(argument: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(wrap(argument, part) for part in value)
            same_library = type(value).__module__.split(".")[0] == type(array).__module__.split(".")[0]
            if not same_library or _kind(value) is None:
                return value
            try:
                return kind.wrap(value)
            except Exception as error:
                if isinstance(kind, _NumpyKind) and isinstance(error, TypeError):
                    return value  # a dtype that torch lacks: the checks name the argument
                checks.unwrapped(argument, value, error)

        for keyword in written:
            checks.writable(keyword, kwargs.get(keyword))
        positional: Any = [wrap(*pair) for pair in zip(parameters, args, strict=False)]
        named: Any = {keyword: wrap(keyword, value) for keyword, value in kwargs.items()}
        tensor = positional[place] if len(positional) > place else named[first]
        if not isinstance(tensor, torch.Tensor):
            return function(*positional, **named)
        with kind.calling(array, tensor):
            return cast(R, _each(kind.unwrap, observe.named(function)(*positional, **named)))

    return call


def public_writing(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return `public` for a function that writes the arrays given by these keywords."""
    return functools.partial(public, written=names)


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


def by_reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the reference on CPU tensors and return CPU tensors."""

    def to_numpy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(to_numpy, value))
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().resolve_neg()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    result = function(*map(to_numpy, args), **{name: to_numpy(value) for name, value in kwargs.items()})
    return _each(torch.from_numpy, result)
