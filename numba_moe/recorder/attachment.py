"""What ties a recorder to a model: the forwards of its modules, which record what they choose and open passes.

A module's forward is replaced on the module itself, and not by a hook, as torch.compile notices that, also where the
module was compiled before. In compiled code two ops do what happens at run time. Both write a tensor, so they stay, and
in their order. An op learns the layer from the shape of a tensor without elements: torch compiles anew for each number
that a module has, and layers that are compiled one by one share their code.
"""

import inspect
import itertools
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from numba_moe.recorder.choosing import Layer, Reader, as_ids, reader_of
from numba_moe.runtime import arrays, torch_private

LEAST = 2  # torch compiles anew for sizes of 0 and 1
_numbers = itertools.count()
_attachments: "weakref.WeakValueDictionary[int, Attachment]" = weakref.WeakValueDictionary()

_library = torch.library.Library("numba_moe_recorder", "DEF")  # its ops are gone when it is
_library.define("chosen(Tensor topk_ids, Tensor? topk_weights, Tensor(a!) order, Tensor where) -> ()")
# Passes begin and end on the host, which a captured graph does not run.
_library.define(
    "pass_(Tensor(a!) order, SymInt number, SymInt place, bool begins) -> ()",
    tags=[tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None],
)


def _chosen(ids: torch.Tensor, weights: torch.Tensor | None, _order: torch.Tensor, where: torch.Tensor) -> None:
    attachment = _attachments.get(where.shape[0] - LEAST)
    if attachment is not None:
        attachment.chosen(where.shape[1] - LEAST, ids, weights)


def _pass(_order: torch.Tensor, number: int, place: int, begins: bool) -> None:
    attachment = _attachments.get(number)
    if attachment is not None and begins:
        attachment.begin(place, compiled=True)
    elif attachment is not None:
        attachment.end(place)


def _chosen_of_all(_info: Any, dims: Any, ids: torch.Tensor, weights: Any, order: Any, where: Any) -> tuple[None, None]:
    """Record what all calls of torch.vmap chose."""
    flat = [
        part if part is None or dim is None else part.movedim(dim, 0).flatten(0, -2)
        for part, dim in zip((ids, weights), dims, strict=False)
    ]
    _chosen(flat[0], flat[1], order, where)
    return None, None


for _name, _run in {"chosen": _chosen, "pass_": _pass}.items():
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"numba_moe_recorder::{_name}", lambda *_: None, lib=_library)
torch.library.register_vmap("numba_moe_recorder::chosen", _chosen_of_all, lib=_library)


def _goes_by_ops() -> bool:
    """Whether only an op sees the memory of tensors: code is traced, transformed or watched."""
    if arrays.is_traced() or torch.compiler.is_compiling():
        return True
    return bool(torch_private.is_transformed() or torch_private.num_modes())


class Attachment:
    """A recorder at a model: the state that its forwards share. It refers to none, so that a module is copied alone."""

    def __init__(self, recorder: Any, experts: list[int] | None, top_k: int | None) -> None:
        self.recorder, self.experts, self.top_k = recorder, experts, top_k
        self._begin()

    def _begin(self) -> None:
        self.number = next(_numbers)
        _attachments[self.number] = self
        self.forwards: weakref.WeakSet[Forward] = weakref.WeakSet()
        self.is_attached = True
        self._inside: list[tuple[int, bool]] = []  # forwards that run: their places, and whether compiled code does
        self._opened: ExitStack | None = None
        recorder = self.recorder
        recorder._attachment = self
        with torch.inference_mode(False):
            self.order = torch.zeros(1, dtype=torch.int32, device=recorder.device)
            self._kept: torch.Tensor | None = None
            if self.experts is not None:
                self._kept = torch.zeros(recorder.num_slots, dtype=torch.bool, device=recorder.device)
                self._kept[self.experts] = True
        if recorder.device.type == "cuda":
            torch_private.mark_static(self.order)

    def where(self, layer: int) -> torch.Tensor:
        """Return a tensor whose shape says which layer of which attachment it is."""
        with torch.inference_mode(False):
            shape = self.number + LEAST, layer + LEAST, 0
            return torch.empty(shape, dtype=torch.int32, device=self.recorder.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("recorder", "experts", "top_k")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def chosen(self, layer: int, ids: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Record what a layer chose; what autograd computes anew is recorded already."""
        recorder = self.recorder
        if torch_private.is_in_backward() or not recorder.takes_ids:
            return
        ids = as_ids(ids.detach(), recorder.num_slots, self.top_k)
        if weights is not None:
            same = weights.numel() == ids.numel() and weights.is_floating_point()
            weights = weights.detach().reshape(ids.shape).contiguous() if same else None
        if ids.device != recorder.device:  # of a model on several devices, or that has moved
            on_host = recorder.device.type == "cpu"  # where a copy that nobody waits for is not there yet
            ids = ids.to(recorder.device, non_blocking=not on_host)
            weights = None if weights is None else weights.to(recorder.device, non_blocking=not on_host)
        if self._kept is not None:
            known = (ids >= 0) & (ids < len(self._kept))
            ids = torch.where(known & self._kept[torch.where(known, ids, 0)], ids, -1)
        missing = (self.top_k or 0) - ids.shape[1]
        if missing > 0 and recorder.mode == "per_token":  # another layer has more
            ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
            weights = None if weights is None else torch.nn.functional.pad(weights, (0, missing))
        with recorder.with_current_layer(layer):
            recorder.on_select_experts(ids, weights)

    def begin(self, place: int, *, compiled: bool) -> bool:
        """Enter a forward; the outermost opens a pass if its caller has not. Return whether `end` must come.

        A compiled forward that failed has not ended: those at this place or further inside are over.
        """
        if torch_private.is_in_backward():
            return False
        while self._inside and self._inside[-1][1] and self._inside[-1][0] >= place:
            self.end(self._inside[-1][0])
        if not self._inside and not self.recorder.in_pass:
            self._opened = ExitStack()
            self._opened.enter_context(self.recorder.with_forward_pass(next(self.recorder.numbers)))
        self._inside.append((place, compiled))
        return True

    def end(self, place: int) -> None:
        """Leave the innermost forward of a place, and those further inside that did not end."""
        if torch_private.is_in_backward() or all(place != other for other, _ in self._inside):
            return
        while self._inside.pop()[0] != place:
            pass
        if not self._inside and self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()

    def detach(self) -> None:
        """Give the modules their forwards back."""
        self.is_attached = False
        _attachments.pop(self.number, None)
        while self._inside:
            self.end(self._inside[0][0])
        for forward in list(self.forwards):
            forward.remove()


class Forward:
    """The forward of a module while a recorder is attached."""

    def __init__(self, module: torch.nn.Module, attachment: Attachment) -> None:
        self.module, self.attachment = module, attachment
        self.before: Any = vars(module).get("forward")  # of the module itself and not of its class
        attachment.forwards.add(self)
        module.forward = self.installed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.attachment.forwards.add(self)

    def installed(self) -> Any:
        """Return what the module's forward becomes."""
        return self

    def own(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Give the module its forward back; where another has come around this one, this one does nothing."""
        if vars(self.module).get("forward") != self.installed():
            return
        before = self.before
        while isinstance(forward := _forward_of(before), Forward) and not forward.attachment.is_attached:
            before = forward.before
        del self.module.forward
        if before is not None:
            self.module.forward = before


class LayerForward(Forward):
    """The forward of a module that chooses experts, or is given them."""

    def __init__(self, module: torch.nn.Module, attachment: Attachment, layer: int, read: Reader) -> None:
        self.layer, self.read, self.where = layer, read, attachment.where(layer)
        super().__init__(module, attachment)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "where"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.where = self.attachment.where(self.layer)

    def installed(self) -> Any:
        return self.run  # a method, which torch compiles for its class and not for itself

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result = self.own(*args, **kwargs)
        attachment = self.attachment
        if attachment.is_attached:
            ids, weights = self.read(self.module, args, kwargs, result)
            if _goes_by_ops():
                weights = None if weights is None else weights.detach()
                torch.ops.numba_moe_recorder.chosen(ids, weights, attachment.order, self.where)
            else:
                attachment.chosen(self.layer, ids, weights)
        return result


class PassForward(Forward):
    """The forward of a module that all layers are in: a pass, if it is the outermost."""

    def __init__(self, module: torch.nn.Module, attachment: Attachment, place: int) -> None:
        super().__init__(module, attachment)
        self.place = place

    @property
    def __signature__(self) -> inspect.Signature:
        own = self.before
        return inspect.signature(type(self.module).forward.__get__(self.module) if own is None else own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attachment, place = self.attachment, self.place
        if not attachment.is_attached:
            return self.own(*args, **kwargs)
        if _goes_by_ops():
            order, number = attachment.order, attachment.number
            torch.ops.numba_moe_recorder.pass_(order, number, place, True)
            result = self.own(*args, **kwargs)
            torch.ops.numba_moe_recorder.pass_(order, number, place, False)
            return result
        begun = attachment.begin(place, compiled=False)
        try:
            return self.own(*args, **kwargs)
        finally:
            if begun:
                attachment.end(place)

    __code__ = __call__.__code__  # which torch.export reads


def tie(
    recorder: Any,
    model: torch.nn.Module,
    found: list[Layer],
    layers: list[int],
    experts: list[int] | None,
    ids: Reader | None,
) -> None:
    """Give the modules of a model forwards that record: those of `layers`, and those that open passes."""
    attachment = Attachment(recorder, experts, max((layer.top_k or 0 for layer in found), default=0) or None)
    for number in layers:
        layer = found[number]
        LayerForward(layer.module, attachment, number, reader_of(layer.module, layer.name, ids))
    within = [name for name, _ in model.named_modules() if all(_is_in(layer.name, name) for layer in found)]
    for place, name in enumerate(within):
        PassForward(model.get_submodule(name), attachment, place)


def _is_in(name: str, other: str) -> bool:
    """Whether one module is in another, or is it where it is the whole model."""
    return not other or name.startswith(f"{other}.")


def _forward_of(found: Any) -> Any:
    """Return the `Forward` that is, or has, what a module's forward is; anything else as it is."""
    return getattr(found, "__self__", found)


def ties_of(module: torch.nn.Module) -> Iterator[Attachment]:
    """Yield what ties recorders to a module."""
    forward = _forward_of(vars(module).get("forward"))
    while isinstance(forward, Forward):
        if forward.attachment.is_attached:
            yield forward.attachment
        forward = _forward_of(forward.before)
