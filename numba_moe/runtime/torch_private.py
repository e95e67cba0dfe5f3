"""Every private name of torch that the package uses, each beside a public one that serves where it is absent.

`NUMBA_MOE_TORCH_PRIVATE=0` uses the public ones alone. They do the same and take longer: an allocation takes 3.1 us
instead of 1.3 (CPU, torch 2.13).
"""

import contextlib
import enum
import importlib
import os
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from numba_moe.device import simulator

Function = TypeVar("Function", bound=Callable[..., Any])
ALLOWED = os.environ.get("NUMBA_MOE_TORCH_PRIVATE", "1") != "0"


def _private(path: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch has at a path, or the fallback; what is of CUDA is absent from torch's CPU build."""
    found: Any = torch if ALLOWED else None
    for name in path.split("."):
        found = getattr(found, name, None)
    return fallback if found is None else found


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu" if simulator.ENABLED else "cuda")


def _perhaps() -> bool:
    return True


# The index of the current device.
current_device = _private("_C._cuda_getDevice", torch.cuda.current_device)

# The handle of the current stream of a device, given by its index.
current_stream = _private("_C._cuda_getCurrentRawStream", _current_stream)

# Whether the current stream is captured into a CUDA graph.
is_capturing = _private("_C._cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)

# Allocates an array on the current device, for the simulator on the CPU, given shape, strides and dtype: what torch's
# compiler calls in the code that it writes. 0.75 us where Tensor.new_empty takes 1.45 (H200, torch 2.11).
empty_strided = _private(f"_C._dynamo.guards._empty_strided_{'cpu' if simulator.ENABLED else 'cuda'}", _empty_strided)

# Whether one of torch.func's transforms is active. There is no public name, and an op's overload that has a gradient
# is right for all of them.
in_transform = _private("_C._are_functorch_transforms_active", _perhaps)

# The same for eager calls, which are outside of transforms unless torch says otherwise.
is_transformed = _private("_C._are_functorch_transforms_active", bool)

# Whether a tensor is one that a transform of torch.func made.
is_wrapped_by_transform = _private("_C._functorch.is_functorch_wrapped_tensor", lambda tensor: False)

# A context in which torch.func's transforms do not wrap what is computed. There is no public name.
without_transforms = _private("_C._DisableFuncTorch", contextlib.nullcontext)

# Whether torch.jit.trace is at work.
is_jit_tracing = _private("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]

# How many dispatch modes want to see each op. There is no public name; without it modes see what ops are made of.
num_modes = _private("_C._len_torch_dispatch_stack", int)

# Its `_current_level` is -1 where no forward gradients are computed. There is no public name.
forward_ad: Any = torch.autograd.forward_ad if ALLOWED else None
if not hasattr(forward_ad, "_current_level"):
    forward_ad = types.SimpleNamespace(_current_level=-1)


def assume_constant_result(function: Function) -> Function:
    """Mark a function as torch.compiler's own does, which loads all of torch's compiler: that takes a second."""
    if not ALLOWED:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Says what compiles frames from now on, None for nothing, and returns what did.
set_eval_frame = _private("_C._dynamo.eval_frame.set_eval_frame", lambda callback: None)


class Untraced:
    """Within it torch.compile traces nothing: past a break of its graph it goes on with each function called."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = set_eval_frame(None)

    def __exit__(self, *_: object) -> None:
        set_eval_frame(self._before)


# Whether torch's functionalisation made a tensor.
is_functional = _private("_is_functional_tensor", lambda tensor: False)

# The class of tensors without data by which torch traces.
FakeTensor = _private("_subclasses.fake_tensor.FakeTensor", type(None))

# The store that a process group was made with; public from torch 2.9 on.
group_store = _private("distributed.distributed_c10d._get_process_group_store", lambda group: group.get_group_store())
# The number of the backward pass that runs in this thread, -1 for none. There is no public name; without it a forward
# pass that is computed anew is one like any other.
_graph_task = _private("_C._current_graph_task_id", lambda: -1)


def is_in_backward() -> bool:
    """Whether autograd runs backward in this thread, and computes a forward pass anew if it does that at all."""
    return _graph_task() != -1


# The same memory in another shape, as a result of its own and no view: FSDP2 warns of modules that return views.
reshaped = _private("ops.aten._unsafe_view", torch.Tensor.view)

# Whether the backward pass that runs will come to a node. There is no public name; without it all nodes are ones that
# it comes to.
_will_execute = _private("_C._will_engine_execute_node", lambda node: True)


class Asked(enum.Enum):
    """What the backward pass that runs does with the gradient of a leaf."""

    ADD = "add it to `.grad`"
    RETURN = "return it, as torch.autograd.grad does"
    LEAVE = "leave it alone"


def asked_of(leaf: torch.Tensor) -> Asked:
    """Return what the backward pass that runs in this thread does with the gradient of a leaf."""
    try:
        adds = _will_execute(torch.autograd.graph.get_gradient_edge(leaf).node)
    except RuntimeError:  # how torch says that the leaf's gradient is to be returned
        return Asked.RETURN
    return Asked.ADD if adds else Asked.LEAVE


def mark_static(tensor: torch.Tensor) -> None:
    """Say that a tensor stays where it is, for the CUDA graphs of torch's compiler, which else refuse to write it."""
    if ALLOWED:
        importlib.import_module("torch._dynamo").mark_static_address(tensor)


def symmetric_memory() -> Any:
    """Return the module of memory that all GPUs of a host can reach; there is no public one."""
    if not ALLOWED:
        raise ImportError("torch's symmetric memory is private")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # rows are read by their addresses alone
    return importlib.import_module("torch.distributed._symmetric_memory")
