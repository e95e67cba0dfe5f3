"""Which modules of a model choose experts, or are given a choice: found by what they do, or by their names."""

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from numba_moe.block import Router
from numba_moe.runtime import checks

# What the second parameter of a forward is called if it has the experts of tokens.
IDS = re.compile(r"(top_?k|router|routing|selected|expert)\w*_(index|indices|idx|ids|mask|experts)|topk_?ids?")
# What modules and configurations call their numbers; one that counts experts without weights too comes first.
EXPERTS = ("total_experts", "num_experts", "n_routed_experts", "num_routed_experts", "num_local_experts")
TOP_K = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")

Reader = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class Layer(NamedTuple):
    """A module that chooses experts or is given them, and its sizes."""

    name: str
    module: torch.nn.Module
    num_experts: int | None  # None: nothing in the model says it, as in the next
    top_k: int | None


def find_layers(model: torch.nn.Module, pattern: str | re.Pattern[str] | None = None) -> list[Layer]:
    """Return the layers of a model in its order: those whose names match, or those that have a choice.

    The routers of `MoEBlock` have a choice, and so have experts that are given rows, experts and weights, as those of
    transformers are. Dense layers have none.
    """
    checks.instance("model", model, torch.nn.Module)
    if not isinstance(pattern, str | re.Pattern | None):
        raise TypeError(f"`pattern` must be a str, a regular expression or None, got {type(pattern).__name__}")
    names = re.compile(fnmatch.translate(pattern)) if isinstance(pattern, str) else pattern
    found = []
    for name, module in model.named_modules():
        if names.fullmatch(name) if names is not None else isinstance(module, Router) or is_given_experts(module):
            around = list(_around(model, name))
            own = len(module.weight) if isinstance(module, Router) else _size([module], EXPERTS)
            found.append(Layer(name, module, own or _size(around, EXPERTS) or _rows(module), _size(around, TOP_K)))
    given = getattr(pattern, "pattern", pattern)
    what = "of modules that choose experts" if names is None else f"one with modules that match {given!r}"
    checks.holds("model", what, bool(found), type(model).__name__)
    return found


def is_given_experts(module: torch.nn.Module) -> bool:
    """Whether a module's forward takes rows and the experts of each, and holds the experts."""
    names = _parameters(module)
    has_ids = len(names) > 1 and IDS.fullmatch(names[1]) is not None
    return has_ids and (_size([module], EXPERTS) or _rows(module)) is not None


def _parameters(module: torch.nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _around(model: torch.nn.Module, name: str) -> Iterator[torch.nn.Module]:
    """Yield a module, and then, from the inside out, each that it is in and those beside it."""
    yield model.get_submodule(name)
    while name:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        yield parent
        if not isinstance(parent, torch.nn.ModuleList | torch.nn.Sequential):
            yield from parent.children()


def _size(modules: list[torch.nn.Module], names: tuple[str, ...]) -> int | None:
    """Return the first number of one of these names that a module has, or the configuration of one."""
    for holder in (*modules, *(getattr(module, "config", None) for module in modules)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _rows(module: torch.nn.Module) -> int | None:
    """Return the first size of a router's weight, or of the matrices of all experts."""
    return max((len(part) for part in module.parameters(recurse=False) if part.dim() > 1), default=None)


def reader_of(module: torch.nn.Module, name: str, ids: Reader | None) -> Reader:
    """Return what reads ids, or ids and weights, from what a module is given and what it returns."""
    if ids is not None:
        return Own(ids)
    if isinstance(module, Router):
        return _of_router
    return Given(_parameters(module)[1:3]) if is_given_experts(module) else Searched(name)


def _of_router(_module: Any, _args: Any, _kwargs: Any, result: Any) -> Any:
    return result.topk_ids, result.topk_weights


class Own:
    """Reads what a function of the caller's says."""

    def __init__(self, read: Reader) -> None:
        self.read = read

    def __call__(self, *call: Any) -> Any:
        found = self.read(*call)
        ids, *others = found if isinstance(found, tuple) else (found,)
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex() or len(others) > 1:
            got = getattr(ids, "dtype", type(ids).__name__)
            raise TypeError(f"`ids` must return a tensor of integers, or that and weights, got {got}")
        return ids, others[0] if others else None


class Given:
    """Reads the second and the third argument of experts."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _result: Any) -> Any:
        found = [*args[1:3], *(kwargs[name] for name in self.names[max(len(args) - 1, 0) :] if name in kwargs)]
        return found[0], found[1] if len(found) > 1 else None


class Searched:
    """Reads the first integers of two or more dimensions that a module returns or is given."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        for values in (result if isinstance(result, tuple | list) else (result,), (*args, *kwargs.values())):
            tensors = [value for value in values if isinstance(value, torch.Tensor) and value.dim() > 1]
            for ids in tensors:
                if not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
                    same = [part for part in tensors if part.is_floating_point() and part.shape == ids.shape]
                    return ids, same[0] if same else None
        raise TypeError(f"`pattern` must be of modules that return or are given ids of experts, got {self.name}")


def as_ids(ids: torch.Tensor, num_experts: int, top_k: int | None) -> torch.Tensor:
    """Return ids [tokens, top_k] as kernels take them; one-hot rows [..., num_experts] become the ids that they are."""
    if ids.dim() > 2 and ids.shape[-1] == num_experts and top_k != num_experts:
        ids = torch.where(ids.any(-1), ids.argmax(-1), -1)
    ids = ids.reshape(-1, ids.shape[-1]) if ids.dim() > 1 else ids.reshape(-1, 1)
    return ids.contiguous() if ids.dtype in checks.IDS else ids.to(torch.int64).contiguous()
