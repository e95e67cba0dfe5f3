"""Let the modules of unpacked vLLM and SGLang wheels be imported where much of what they need is not installed.

What an import of theirs needs and lacks is made up: other packages, compiled extensions, and names of those of their
modules that break half-way for want of these. Optional imports, inside a `try`, fail as they would.
"""

import ast
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PEERS = ("vllm", "sglang", "sgl_kernel", "flashinfer")


class _Made(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not Stub:
            return super().__call__(*args, **kwargs)
        decorates = len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType | type)
        return args[0] if decorates else Stub

    def __bool__(cls) -> bool:
        return cls is not Stub

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())


class Stub(metaclass=_Made):
    """A name that is made up: it can be called, subclassed, subscribed, and used as a decorator; it is false."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Take whatever a class statement says."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        import pydantic_core

        return pydantic_core.core_schema.any_schema()


class Struct:
    """`msgspec.Struct`, with as much of it as a dataclass has."""

    def __init_subclass__(cls, frozen: bool = False, kw_only: bool = True, **others: Any) -> None:
        for name, kind in vars(cls).get("__annotations__", {}).items():
            value = vars(cls).get(name)
            if isinstance(value, list | dict | set) and "ClassVar" not in str(kind):
                setattr(cls, name, dataclasses.field(default_factory=value.copy))
        made: Any = dataclasses.dataclass(frozen=frozen, kw_only=kw_only)(cls)
        made.__struct_fields__ = tuple(field.name for field in dataclasses.fields(made))


# What stands in for a package is these names, and stubs.
STAND_INS: dict[str, dict[str, Any]] = {"msgspec": {"Struct": Struct}, "common_ops": {"__file__": "common_ops.so"}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_kept: list[Any] = []
made_up: set[str] = set()  # modules that nothing here has
broken: dict[str, str] = {}  # peers' modules that are theirs as far as they could be run, and what stopped them


class _Loader(importlib.abc.Loader):
    def __init__(self, real: Any = None) -> None:
        self._real = real

    def create_module(self, spec: Any) -> None:  # noqa: ARG002
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        if self._real is None:
            vars(module).update(STAND_INS.get(module.__name__, {}))
            module.__getattr__ = _stub_of  # type: ignore[method-assign]
            return
        try:
            self._real.exec_module(module)
        except Exception as error:
            broken[module.__name__] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            module.__getattr__ = _stub_of  # type: ignore[method-assign]

    def get_source(self, name: str) -> Any:
        return self._real.get_source(name) if self._real else ""  # which Triton's kernels are compiled from


def _stub_of(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Stub


class _Theirs(importlib.abc.MetaPathFinder):
    """Finds peers' modules first: those keep what they have defined where they break."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002
        if name.partition(".")[0] not in PEERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Absent(importlib.abc.MetaPathFinder):
    """Finds last what peers import without a `try`, and nothing has."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002
        if name not in STAND_INS and name.rpartition(".")[0] not in made_up and not self._must_be_there():
            return None
        made_up.add(name)
        return importlib.machinery.ModuleSpec(name, _Loader(), is_package=True)

    def _must_be_there(self) -> bool:
        frame: Any = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None or frame.f_globals.get("__name__", "").partition(".")[0] not in PEERS:
            return False
        return frame.f_lineno in unguarded_imports(frame.f_code.co_filename)


@functools.cache
def unguarded_imports(file: str) -> frozenset[int]:
    """Return the lines of a file's imports that are not inside a `try`."""
    lines: set[int] = set()

    def look(node: ast.AST, guarded: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = guarded or (isinstance(node, ast.Try) and child in node.body)
            if isinstance(child, ast.Import | ast.ImportFrom) and not inside:
                lines.update(range(child.lineno, (child.end_lineno or child.lineno) + 1))
            look(child, inside)

    look(ast.parse(Path(file).read_text()), False)
    return frozenset(lines)


def find(trees: Sequence[Path]) -> None:
    """Let modules be imported from folders that each hold what an unpacked wheel holds.

    It comes before any import of Triton, which looks at the environment then.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # functions that peers compile are run as they are written
    sys.path[:0] = [str(tree) for tree in trees]
    sys.meta_path.insert(0, _Theirs())
    sys.meta_path.append(_Absent())
    if DEVICE == "cpu":
        _pretend()
    if any((tree / "vllm").is_dir() for tree in trees):
        _choose_cuda_for_vllm()


class OnDevice(torch.Tensor):
    """A tensor of the CPU that says it were on a CUDA device, as call sites ask."""

    is_cuda = property(lambda self: True)


def _pretend() -> None:
    """Let peers take the way of an H100, and Triton interpret its kernels, which it does for tensors of the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 << 30)
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "NVIDIA H100"}
    answers |= {"get_device_capability": (9, 0), "get_device_properties": properties, "is_initialized": True}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    torch.version.cuda = "13.0"
    if not hasattr(torch.ops._moe_C, "moe_permute_sort_workspace_size"):  # of scratch that vLLM's callers bring
        library = torch.library.Library("_moe_C", "FRAGMENT")
        _kept.append(library)
        library.define("moe_permute_sort_workspace_size(int rows, int experts) -> int")
        library.impl("moe_permute_sort_workspace_size", lambda rows, experts: 8 * rows, "CompositeImplicitAutograd")
    register = torch.library.Library.impl

    def for_any_device(self: Any, name: Any, function: Any, dispatch_key: str = "", **options: Any) -> Any:
        key = "CPU" if dispatch_key == "CUDA" and self.ns in PEERS else dispatch_key
        return register(self, name, function, key, **options)

    torch.library.Library.impl = for_any_device  # type: ignore[method-assign, assignment]
    try:
        import triton.language as tl
    except ImportError:
        return
    for name in ("gdc_wait", "gdc_launch_dependents"):  # which the interpreter does not know, and may do nothing
        setattr(tl.extra.cuda, name, lambda *args, **options: None)


def _choose_cuda_for_vllm() -> None:
    """Let vLLM run for CUDA whether or not it finds a driver."""
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class Platform(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            from vllm.platforms.interface import DeviceCapability

            return DeviceCapability(*torch.cuda.get_device_capability(device_id))

    vllm.platforms._current_platform = Platform()
