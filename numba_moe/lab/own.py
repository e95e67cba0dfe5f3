"""A function or a kernel of one's own, called as the op that it is like: with tensors, and for a result of tensors."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from numba_moe.lab.bridge import as_device_array
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.declaration import DECLARATIONS, Declaration, flat, names_of, rebuild
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import Case

LIBRARIES = ("torch", "numpy", "numba", "cupy")  # whose arrays a function may want
Grid = Sequence[Any] | Callable[..., Sequence[Any]]
GRID = "(blocks, threads)"
MOST_THREADS = 1024  # of a block, on every GPU


def declaration_of(like: str) -> Declaration:
    """Return the declaration of an op by its name, of the library's or of one that somebody else declared."""
    declared = DECLARATIONS.get(like) if isinstance(like, str) and like not in verification.OPS else None
    if declared is not None and declared.twin is not None:
        return declared
    checks.choice("like", like, tuple(verification.OPS))
    return getattr(verification.OPS[like], like).declaration


def is_kernel(function: Any) -> bool:
    """Whether it is a `@cuda.jit` kernel, with a grid or without."""
    return hasattr(_without_grid(function), "py_func") and hasattr(_without_grid(function), "__getitem__")


def plain_function(function: Any) -> Any:
    """Return the function of Python that a kernel is made of, or a function itself."""
    return getattr(_without_grid(function), "py_func", function)


def _without_grid(function: Any) -> Any:
    return getattr(function, "dispatcher", function)  # of what `kernel[blocks, threads]` is on a GPU


def name_of(function: Any) -> str:
    """Return what tables call a function."""
    plain = plain_function(function)
    if isinstance(plain, functools.partial):
        return name_of(plain.func)
    return getattr(plain, "__name__", type(plain).__name__)


class Own:
    """A function of one's own, or a kernel with its grid.

    Parameters
    ----------
    function
        Takes arguments of the op by their names; or a kernel, which also takes the arrays of its result.
    like
        The name of the op.
    library
        Whose arrays it takes, one of `LIBRARIES`; None to find out.
    grid
        Of a kernel: blocks and threads, and maybe stream and bytes of shared memory; or a function of arguments.
    fill
        Of a kernel: what its results hold before the launch; None is poison.
    """

    def __init__(
        self,
        function: Any,
        like: str,
        library: str | None = None,
        grid: Grid | None = None,
        fill: float | None = None,
    ) -> None:
        if not callable(function) and not is_kernel(function):
            raise TypeError(f"`function` must be callable, got {type(function).__name__}")
        if library is not None:
            checks.choice("library", library, LIBRARIES)
        self.function, self.name, self.declaration = function, name_of(function), declaration_of(like)
        self.library = library or ("torch" if hasattr(function, "declaration") else None)  # an op takes all
        self._grid, self._fill = grid, fill
        self.is_kernel = is_kernel(function)
        self._check_launch()
        self._results = [name.rpartition(".")[2] for name in names_of(self.declaration.result, "result")]
        self.parameters = inspect.signature(plain_function(function)).parameters
        self._takes_all = any(one.kind is one.VAR_KEYWORD for one in self.parameters.values())
        if self.is_kernel:
            self.library = "numba"
            self._places = self._places_of_results()

    def _check_launch(self) -> None:
        """Check what says how a kernel is launched, which a function is given none of."""
        if not self.is_kernel:
            for name, value in (("grid", self._grid), ("fill", self._fill)):
                checks.holds(name, "None for a function, which launches its kernels itself", value is None, value)
            return
        checks.holds("library", "'numba' for a kernel", self.library in (None, "numba"), repr(self.library))
        if self._fill is not None and not isinstance(self._fill, int | float):
            raise TypeError(f"`fill` must be a number, got {type(self._fill).__name__}")
        has_grid = hasattr(self.function, "dispatcher") or getattr(self.function, "grid_dim", None) is not None
        if self._grid is not None and not callable(self._grid):
            _check_grid(self._grid)
        elif self._grid is None and not has_grid:
            raise TypeError(f"`grid` must be {GRID}, or a function that returns them, for a kernel, got None")

    def _places_of_results(self) -> dict[str, int]:
        """Return which of the result's arrays each of a kernel's own parameters is: by name, or by order."""
        named = {name: place for place, name in enumerate(self._results)}
        arguments = self.declaration.parameters.keys() - {self.declaration.out}
        own = [name for name in self.parameters if name not in arguments]
        if set(own) <= set(named):
            return {name: named[name] for name in own}
        if len(own) != len(self._results):
            rule = f"arguments of {self.declaration.name} ({', '.join(self.declaration.names)})"
            rule += f" and its results ({', '.join(self._results)})"
            raise TypeError(f"the parameters of `{self.name}` must be {rule}, got {', '.join(self.parameters)}")
        return {name: place for place, name in enumerate(own)}

    @property
    def options(self) -> list[str]:
        """The optional arguments of the op that it takes, but for those that a kernel's results are."""
        results = self._places if self.is_kernel else {}
        optional = self.declaration.defaults.keys() - {self.declaration.out} - results.keys()
        return [name for name in self.parameters if name in optional]

    def lacks(self, arguments: Mapping[str, Any]) -> list[str]:
        """Return the arguments of a call that it does not take, and of a kernel those it takes and the call has not."""
        lacks = [] if self._takes_all else [name for name in arguments if name not in self.parameters]
        if self.is_kernel:
            optional = [
                name for name in self.parameters if name in self.declaration.arrays and name not in self._places
            ]
            lacks += [f"no {name}" for name in optional if arguments.get(name) is None]
        return lacks

    def lacks_in(self, case: Case, seed: int = 0) -> list[str]:
        """Return what `lacks` does of a case."""
        return self.lacks(case.arguments(np.random.default_rng(seed)))

    def with_function(self, function: Any) -> "Own":
        """Return the same with another function, which takes the same arrays."""
        return Own(function, self.declaration.name, self.library, self._grid, self._fill)

    def find_library(self, cases: Iterable[Case], device: str) -> None:
        """Find out whose arrays it takes: of the first library with which it answers a plain case."""
        if self.library is not None:
            return
        wanted = ("torch", "numba", "numpy") if device == "cuda" else ("numpy", "torch", "numba")
        self.library = wanted[0]
        for case in cases:
            arguments = case.arguments(np.random.default_rng(0))
            is_plain = case.dtype in (None, "float32") and not case.strided and not self.lacks(arguments)
            if is_plain and all(value.size for value in arguments.values() if isinstance(value, np.ndarray)):
                for library in wanted:
                    if self._takes(library, verification.on_device(case, arguments, device)):
                        self.library = library
                        return
                return

    def _takes(self, library: str, arguments: Mapping[str, Any]) -> bool:
        """Whether it takes the arrays of a library; if it fails in another way, it takes them."""
        try:
            self._found(library, arguments)
        except Exception as error:
            refusals = (TypeError, AttributeError, NotImplementedError, BufferError)
            return not (isinstance(error, refusals) or type(error).__name__ == "TypingError")  # of Numba's compiler
        return True

    def case_for(self, case: Case) -> Case:
        """Return a case whose payload the library of its arrays has a dtype for: only torch has bfloat16."""
        return case._replace(dtype=None) if case.dtype == "bfloat16" and self.library != "torch" else case

    def __call__(self, **arguments: Any) -> Any:
        """Answer a call of the op with tensors."""
        assert self.library is not None
        found = self._found(self.library, arguments)
        out = arguments.get(self.declaration.out)
        return self._checked(out if found is None else found, self._wanted(arguments), arguments)

    def _found(self, library: str, arguments: Mapping[str, Any]) -> Any:
        """Return what it answers to the arrays of a library."""
        given = {name: arrays.each(lambda part: _in_library(part, library), value) for name, value in arguments.items()}
        with testing.poisoned_libraries():
            found = self._launched(arguments, given) if self.is_kernel else self.function(**given)
        if library == "numpy" and arguments[self.declaration.first].is_cuda:
            self._copy_back(arguments, given)
        return found

    def _copy_back(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Put what a function wrote to copies of arguments where the arguments are."""
        for name, value in arguments.items():
            for tensor, copy in zip(flat(value), flat(given[name]), strict=True):
                if isinstance(tensor, torch.Tensor):
                    tensor.copy_(torch.from_numpy(copy))

    def _wanted(self, arguments: Mapping[str, Any]) -> list[Any]:
        """Return the shapes and dtypes of the result's arrays, None for those that the call has not."""
        out = arguments.get(self.declaration.out)
        if out is not None:
            return [arrays.contiguous(tensor.dtype, *tensor.shape) for tensor in flat(out)]
        assert self.declaration.outputs is not None
        return flat(self.declaration.outputs(self.declaration.given_of(arguments)))

    def _launched(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """Launch a kernel by hand, into memory that is poisoned or filled, and return that."""
        device, out = arguments[self.declaration.first].device, arguments.get(self.declaration.out)
        memory = flat(out) if out is not None else [spec and _new(spec, device) for spec in self._wanted(arguments)]
        if out is None and self._fill is not None:
            memory = [tensor if tensor is None else tensor.fill_(self._fill) for tensor in memory]
        passed = [
            as_device_array(memory[self._places[name]]) if name in self._places else self._argument(name, given)
            for name in self.parameters
        ]
        configured = self._configured(given, device)
        if configured is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*under-utilization|.*Host array", module="numba")
                configured(*passed)
        return rebuild(self.declaration.result, iter(memory))

    def _argument(self, name: str, given: Mapping[str, Any]) -> Any:
        return given[name] if name in given else self.declaration.defaults[name]

    def _configured(self, given: Mapping[str, Any], device: torch.device) -> Any:
        """Return the kernel with its grid, None if that has no blocks."""
        if self._grid is None:
            return self.function
        grid = self._grid
        if callable(grid):
            wanted = inspect.signature(grid).parameters
            unknown = [name for name in wanted if name not in self.declaration.names]
            checks.holds("grid", f"a function of {', '.join(self.declaration.names)}", not unknown, ", ".join(unknown))
            grid = grid(**{name: self._argument(name, given) for name in wanted})
            if not _check_grid(grid, fewest=0):
                return None
        blocks, threads, *rest = grid
        if device.type == "cuda" and not rest:
            from numba import cuda

            rest = [cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)]
        configuration = (blocks, threads, *rest)
        return _without_grid(self.function)[configuration]

    def _checked(self, found: Any, wanted: list[Any], arguments: Mapping[str, Any]) -> Any:
        """Return a result as tensors on the device, in the op's own tuple; raise an error if it is of another kind."""
        leaves = _leaves(found)
        if found is None or len(leaves) != len(wanted):
            rule = "an array" if len(wanted) == 1 else f"a tuple of {len(wanted)} arrays ({', '.join(self._results)})"
            got = "None" if found is None else type(found).__name__
            got = f"a {got} of {len(leaves)}" if isinstance(found, tuple | list) else got
            raise TypeError(f"the result must be {rule}, got {got}")
        device = arguments[self.declaration.first].device
        named = zip(self._results, leaves, strict=True)
        tensors = [leaf if leaf is None else _dense(name, leaf).to(device) for name, leaf in named]
        for name, tensor, spec in zip(self._results, tensors, wanted, strict=True):
            if tensor is None or spec is None:
                checks.holds(
                    name, "an array" if spec else "None, as this call has no such result", tensor is spec, tensor
                )
                continue
            checks.dtype(name, tensor.dtype, (spec.dtype,))
            checks.holds(
                name, f"of shape {tuple(spec.shape)}", tensor.shape == spec.shape, f"shape {tuple(tensor.shape)}"
            )
        return rebuild(self.declaration.result, iter(tensors))


def _check_grid(grid: Any, fewest: int = 1) -> int:
    """Check blocks and threads, each a number or up to three; return how many blocks there are."""
    if not isinstance(grid, Sequence) or not 2 <= len(grid) <= 4:
        raise TypeError(f"`grid` must be {GRID}, got {grid!r}")
    numbers = []
    for what, part, least in (("blocks", grid[0], fewest), ("threads", grid[1], 1)):
        sizes = part if isinstance(part, Sequence) else (part,)
        checks.holds("grid", f"of one to three numbers of {what}", 1 <= len(sizes) <= 3, repr(grid))
        numbers.append(math.prod(checks.integer(f"grid: {what}", size, least) for size in sizes))
    checks.holds("grid", f"of at most {MOST_THREADS} threads to a block", numbers[1] <= MOST_THREADS, numbers[1])
    return numbers[0]


def _new(spec: Any, device: torch.device) -> torch.Tensor:
    return testing.poison(torch.empty(spec.shape, dtype=spec.dtype, device=device))


def _dense(name: str, array: Any) -> torch.Tensor:
    """Return an array of a result as a tensor whose memory can be compared."""
    tensor = arrays.to_tensor(name, array).detach()
    is_dense = tensor.layout is torch.strided and tensor.device.type != "meta"
    checks.holds(name, "an array whose every element is in memory", is_dense, f"{tensor.layout} on {tensor.device}")
    return tensor


def _leaves(found: Any) -> list[Any]:
    """Return the arrays of a result, whatever tuples or lists they are in."""
    if isinstance(found, tuple | list):
        return [leaf for part in found for leaf in _leaves(part)]
    return [found]


def _in_library(value: Any, library: str) -> Any:
    """Return a tensor's memory as an array of a library; NumPy's of a GPU is a copy. Other values stay."""
    if library == "torch" or not isinstance(value, torch.Tensor):
        return value
    if library == "numba":
        return as_device_array(value)
    return arrays.in_library(value.detach().cpu() if library == "numpy" else value, library)
