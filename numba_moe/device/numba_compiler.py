"""Numba's compiler, as kernels and device functions are given to it. Imported when a kernel is compiled."""

import collections
from typing import Any

from cuda.pathfinder import DynamicLibNotFoundError
from numba import cuda

if cuda.implementation == "Built-in":
    raise ImportError("`numba.cuda` must be numba-cuda, got Numba's own, which was imported before numba_moe")

from numba.cuda.compiler import compile_cuda
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.dispatcher import CUDADispatcher

# How everything is compiled, whatever NUMBA_OPT and NUMBA_CUDA_DEBUGINFO say: a key of the cache knows nothing of them,
# and Numba's debug mode stops a kernel where it divides by zero and leaves an error that nobody here would look for.
HOW = {"debug": False, "opt": True}


def jit(function: Any, options: dict[str, Any]) -> Any:
    """Return a function as a kernel, or as a device function if its options say so."""
    return DeviceFunction(function, options) if options.get("device") else cuda.jit(**HOW, **options)(function)


def compile_kernel(function: Any, signature: Any, capability: tuple[int, int], launch_bounds: Any) -> str:
    """Return the PTX of a kernel."""
    options = {"device": False, "abi": "numba", "cc": capability, "launch_bounds": launch_bounds}
    try:
        code, _ = cuda.compile(function, signature, **options, **HOW)
    except DynamicLibNotFoundError as error:
        ways = "install numba-moe[cu13] or numba-moe[cu12] in site-packages, or set CUDA_HOME to a CUDA toolkit"
        raise RuntimeError(f"CUDA's compiler was not found, {ways}: {error}") from error
    return code if isinstance(code, str) else code.decode()


class DeviceFunction(CUDADispatcher):
    """A device function that is compiled for whatever GPU the kernel that calls it is compiled for.

    Numba's own is compiled once, for the current device, even where the kernel is meant for another.
    """

    @property
    def overloads(self) -> Any:
        """What has been compiled for the GPU that is compiled for now, by the types of the arguments."""
        flags = ConfigStack.top_or_none()
        return self._of_capability[flags and flags.compute_capability]

    @overloads.setter
    def overloads(self, _empty: Any) -> None:
        self._of_capability: Any = collections.defaultdict(collections.OrderedDict)

    def compile_device(self, args: Any, return_type: Any = None) -> Any:
        """Compile the function for some types of arguments, where it has not been."""
        overloads = self.overloads
        if args not in overloads:
            capability = ConfigStack.top_or_none().compute_capability
            found = compile_cuda(self.py_func, return_type, args, cc=capability, nvvm_options={"opt": 3})
            overloads[args] = found
            found.target_context.insert_user_function(found.entry_point, found.fndesc, [found.library])
        return overloads[args]
