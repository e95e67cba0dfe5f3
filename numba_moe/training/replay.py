"""Routing that is recorded in rollouts and replayed in training (routing replay, R3).

A policy that is trained with other experts than it sampled with drifts from what it sampled. So the experts of each
token are kept, and the training pass weighs those: gradients go to the router through their weights.
"""

import base64
import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from numba_moe.block import Router
from numba_moe.reference.gating import TopK
from numba_moe.runtime import checks

# Up to how many experts each dtype has an id left over that says that there is none.
DTYPES = ((255, torch.uint8), (2**15, torch.int16), (2**31 - 1, torch.int32))
NO_EXPERT = -1
LAYOUTS = ("vllm", "sglang", "megatron")
WIRE_DTYPES = ("uint8", "uint16", "int16", "int32", "int64")


def smallest_dtype(num_experts: int) -> torch.dtype:
    """Return the smallest dtype that holds the ids of all experts, and one more number for none: -1, or 255.

    >>> smallest_dtype(255), smallest_dtype(256), smallest_dtype(2**15 + 1)
    (torch.uint8, torch.int16, torch.int32)
    """
    return next(dtype for most, dtype in DTYPES if num_experts <= most)


class RoutingReplay:
    """The experts of each token in each layer, as they were chosen, for a pass that is to choose them again.

    Parameters
    ----------
    num_layers : int
        Layers with experts.
    max_tokens : int
        Tokens of a pass, at most.
    top_k : int
        Experts of each token.
    num_experts : int
        Their number, by which the smallest dtype is chosen: uint8 up to 255, int16, int32.
    with_weights : bool
        Keep what experts weighed too. A replay then has those very weights, and the gradient of the router's own.
    own_choice : bool
        A token without a record is routed by the router's own choice. Otherwise it has no experts.
    device : torch.device, optional
        Where passes are recorded: that of the model.

    Attributes
    ----------
    ids : tensor, shape [num_layers, max_tokens, top_k]
        What is recorded of the pass, or to be replayed.
    weights : tensor of float32, shape [num_layers, max_tokens, top_k], optional
        The same for weights.
    requests : dict
        Records of requests on the host, by key: int32 [num_tokens, num_layers, top_k], -1 for none.

    Raises
    ------
    TypeError
        A value that is not an integer.
    ValueError
        A size below 1.

    Notes
    -----
    Memory is allocated once, and a layer is recorded by one copy on the current stream, which CUDA graphs capture; the
    host reads nothing until `put`, `pack` or `get`. In a pass that is recorded, blocks weigh experts by the kernel of
    `weigh_experts`, as in the replay, so that both have the same bits.

    Examples
    --------
    >>> import torch, numba_moe
    >>> block = numba_moe.MoEBlock(8, 4, num_experts=4, top_k=2)
    >>> replay = RoutingReplay(1, 16, 2, 4)
    >>> replay.attach(block)
    1
    >>> rows = torch.randn(5, 8)
    >>> with replay.recording():
    ...     sampled = block(rows)
    >>> with replay.replaying():
    ...     torch.equal(block(rows), sampled)
    True
    """

    def __init__(
        self,
        num_layers: int,
        max_tokens: int,
        top_k: int,
        num_experts: int,
        *,
        with_weights: bool = False,
        own_choice: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "max_tokens": max_tokens, "top_k": top_k, "num_experts": num_experts}
        shape = [checks.integer(name, size, 1) for name, size in sizes.items()]
        self.num_experts, self.own_choice = shape.pop(), own_choice
        where = torch.device("cpu") if device is None else checks.device("device", device)
        self.none = 255 if smallest_dtype(self.num_experts) == torch.uint8 else NO_EXPERT
        self.ids = torch.full(shape, self.none, dtype=smallest_dtype(self.num_experts), device=where)
        self.weights = torch.zeros(shape, dtype=torch.float32, device=where) if with_weights else None
        self.requests: dict[Hashable, np.ndarray] = {}
        self._mode: str | None = None
        self._first = 0

    def attach(self, model: torch.nn.Module) -> int:
        """Let the routers of a model, in their order, record here and be replayed from here; return their number.

        They are those of `MoEBlock`, and those of transformers that `replace_routers` replaced.
        """
        routers = [module for module in model.modules() if isinstance(module, Router) or _is_replaced(module)]
        num_layers = len(self.ids)
        checks.holds("model", f"of num_layers = {num_layers} routers", len(routers) == num_layers, len(routers))
        for router in routers:
            if isinstance(router, Router):
                sizes = (router.picks, len(router.weight))
                wanted = (self.ids.shape[2], self.num_experts)
                rule = f"of routers with top_k = {wanted[0]} picks of num_experts = {wanted[1]}"
                checks.holds("model", rule, sizes == wanted, f"{sizes[0]} of {sizes[1]}")
        for layer, router in enumerate(routers):
            router.replay = (self, layer)  # type: ignore[assignment]
        return num_layers

    @staticmethod
    def detach(model: torch.nn.Module) -> None:
        """Let the routers of a model choose by themselves again."""
        for module in model.modules():
            vars(module).pop("replay", None)

    @contextlib.contextmanager
    def _in_mode(self, mode: str, first_token: int) -> Iterator[None]:
        before = self._mode, self._first
        self._mode, self._first = mode, checks.integer("first_token", first_token, 0, self.ids.shape[1])
        try:
            yield
        finally:
            self._mode, self._first = before

    def recording(self, first_token: int = 0) -> contextlib.AbstractContextManager[None]:
        """Return a context in which routers that are attached record; the first row of a call is this token."""
        return self._in_mode("record", first_token)

    def replaying(self, first_token: int = 0) -> contextlib.AbstractContextManager[None]:
        """Return a context in which they have the experts that are recorded."""
        return self._in_mode("replay", first_token)

    @property
    def is_active(self) -> bool:
        """Whether routers record or replay just now."""
        return self._mode is not None

    def record(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor | None = None, first_token: int = 0
    ) -> None:
        """Record a layer's choice for tokens from one on: by hand, for a model of whatever kind."""
        rows = self._rows(layer, first_token, len(topk_ids))
        if topk_ids.shape != (len(topk_ids), self.ids.shape[2]):
            rule = f"of shape (num_tokens, top_k = {self.ids.shape[2]})"
            checks.holds("topk_ids", rule, False, f"shape {tuple(topk_ids.shape)}")
        self.ids[rows].copy_(topk_ids)  # -1 becomes 255 in uint8
        if self.weights is not None:
            given = topk_weights is not None
            checks.holds("topk_weights", "given where weights are recorded", given, None)
            assert topk_weights is not None
            self.weights[rows].copy_(topk_weights.detach())

    def choice(self, layer: int, num_tokens: int, first_token: int = 0) -> torch.Tensor:
        """Return the experts of a layer's tokens, int32 [num_tokens, top_k], -1 for none."""
        ids = self.ids[self._rows(layer, first_token, num_tokens)].to(torch.int32)
        return ids if self.none == NO_EXPERT else torch.where(ids == self.none, NO_EXPERT, ids)

    def _rows(self, layer: int, first_token: int, num_tokens: int) -> tuple[int, slice]:
        num_layers, most, _ = self.ids.shape
        if not (0 <= layer < num_layers and 0 <= first_token <= most - num_tokens):  # messages cost more than a copy
            checks.integer("layer", layer, 0, num_layers - 1, f"num_layers - 1 = {num_layers - 1}")
            checks.integer("first_token", first_token, 0)
            rule = f"at least the {first_token + num_tokens} tokens of a pass"
            checks.holds("max_tokens", rule, first_token + num_tokens <= most, most)
        return layer, slice(first_token, first_token + num_tokens)

    def steer(self, layer: int, num_tokens: int, select: Any, weigh: Any) -> TopK:
        """Return a router's choice as the mode has it: `select` chooses, `weigh` weighs given experts."""
        first = self._first
        if self._mode == "record":
            with torch.no_grad():
                ids = select().topk_ids
            found = weigh(ids)
            self.record(layer, ids, found.topk_weights, first)
            return found
        ids = self.choice(layer, num_tokens, first)
        is_recorded = None
        if self.own_choice:
            is_recorded = (ids != NO_EXPERT).any(1, keepdim=True)
            with torch.no_grad():
                ids = torch.where(is_recorded, ids, select().topk_ids.to(torch.int32))
        found = weigh(ids)
        if self.weights is None:
            return found
        weights = self.weights[self._rows(layer, first, num_tokens)]
        if is_recorded is not None:
            weights = torch.where(is_recorded, weights, found.topk_weights.detach())
        own = found.topk_weights
        return TopK(weights + (own - own.detach()), found.topk_ids)  # 0 is added, which has the gradient

    def clear(self) -> None:
        """Forget what is recorded of a pass; requests stay."""
        self.ids.fill_(self.none)
        if self.weights is not None:
            self.weights.zero_()

    # Requests, on the host.

    def put(self, request: Hashable, num_tokens: int, *, row: int = 0, first_token: int = 0) -> None:
        """Keep rows of the pass, from `row` on, for a request, as its tokens from `first_token` on."""
        ids = torch.stack([self.choice(layer, num_tokens, row) for layer in range(len(self.ids))], 1)
        self.stitch(request, ids.cpu().numpy(), first_token)

    def stitch(self, request: Hashable, topk_ids: np.ndarray, first_token: int = 0) -> None:
        """Keep [num_tokens, num_layers, top_k] for a request from a token on: a prefix that was cached elsewhere, say.

        Tokens in between that nobody recorded are -1.
        """
        num_layers, _, top_k = self.ids.shape
        topk_ids, first_token = np.asarray(topk_ids), checks.integer("first_token", first_token, 0)
        expected = (len(topk_ids), num_layers, top_k)
        checks.holds("topk_ids", f"of shape {expected}", topk_ids.shape == expected, f"shape {topk_ids.shape}")
        self._check_ids("topk_ids", topk_ids)
        before = self.requests.get(request, np.empty((0, num_layers, top_k), np.int32))
        length = max(len(before), first_token + len(topk_ids))
        whole = np.full((length, num_layers, top_k), NO_EXPERT, np.int32)
        whole[: len(before)] = before
        whole[first_token : first_token + len(topk_ids)] = topk_ids
        self.requests[request] = whole

    def get(self, request: Hashable, num_tokens: int | None = None) -> np.ndarray:
        """Return the experts of a request's tokens, int32 [num_tokens, num_layers, top_k]; -1 for those not recorded.

        The token that was sampled last, for instance, never went through the model.
        """
        found = self.requests[request]
        if num_tokens is None or num_tokens <= len(found):
            return found[:num_tokens]
        missing = np.full((num_tokens - len(found), *found.shape[1:]), NO_EXPERT, np.int32)
        return np.concatenate([found, missing])

    def fill(self, requests: Sequence[Hashable | None], num_tokens: Sequence[int]) -> None:
        """Lay out requests for a pass to replay, one after another, each with its `num_tokens`; None is padding."""
        num_layers, most, top_k = self.ids.shape
        rule = f"a number for each of {len(requests)} requests"
        checks.holds("num_tokens", rule, len(num_tokens) == len(requests), len(num_tokens))
        checks.holds("num_tokens", f"{most} at most together", sum(num_tokens) <= most, sum(num_tokens))
        self.clear()
        padding = [np.full((count, num_layers, top_k), NO_EXPERT, np.int32) for count in num_tokens]
        parts = [
            empty if request is None else self.get(request, len(empty))
            for request, empty in zip(requests, padding, strict=True)
        ]
        if parts:
            rows = torch.from_numpy(np.concatenate(parts)).to(self.ids.device)
            self.ids[:, : len(rows)].copy_(rows.transpose(0, 1))

    # Layouts of others.

    def pack(self, request: Hashable, layout: str) -> Any:
        """Return a request's experts as another project has them.

        "vllm": an array [num_tokens, num_layers, top_k] of uint8, of uint16 from 257 experts on, of int32 where a token
        has none. "sglang": the fields `routed_experts`, base64 of int32, and `routed_experts_dtype` of `meta_info`.
        "megatron": a list of a tensor of int64 [num_tokens, top_k] for each layer, as `RouterReplay.set_replay_data`
        takes them.
        """
        checks.choice("layout", layout, LAYOUTS)
        ids = self.get(request)
        if layout == "vllm":
            small = np.uint8 if self.num_experts <= 256 else np.uint16 if self.num_experts <= 2**16 else np.int32
            return ids.astype(np.int32 if (ids < 0).any() else small)
        if layout == "sglang":
            text = base64.b64encode(np.ascontiguousarray(ids, "<i4").tobytes()).decode()
            return {"routed_experts": text, "routed_experts_dtype": "int32"}
        return [torch.from_numpy(rows.astype(np.int64)) for rows in ids.transpose(1, 0, 2)]

    def unpack(self, request: Hashable, packed: Any, layout: str, first_token: int = 0) -> None:
        """Keep what another project recorded for a request, from a token on."""
        checks.choice("layout", layout, LAYOUTS)
        num_layers, _, top_k = self.ids.shape
        if layout == "sglang":
            fields: Mapping[str, Any] = packed.get("meta_info", packed)
            dtype = fields.get("routed_experts_dtype") or "int32"
            checks.choice("routed_experts_dtype", dtype, WIRE_DTYPES)
            flat = np.frombuffer(base64.b64decode(fields["routed_experts"]), np.dtype(dtype).newbyteorder("<"))
            rule = f"of a multiple of num_layers * top_k = {num_layers * top_k} ids"
            checks.holds("routed_experts", rule, flat.size % (num_layers * top_k) == 0, flat.size)
            ids = flat.reshape(-1, num_layers, top_k)
        elif layout == "megatron":
            ids = np.stack([rows.cpu().numpy() for rows in packed], 1)
        else:
            ids = np.asarray(packed)
        self._check_ids("packed", ids)
        self.stitch(request, ids.astype(np.int32), first_token)

    def _check_ids(self, argument: str, ids: np.ndarray) -> None:
        checks.holds(argument, "of integers", ids.dtype.kind in "iu", ids.dtype)
        ids = ids.astype(np.int64)
        good = (ids >= NO_EXPERT) & (ids < self.num_experts)
        checks.every(argument, f"-1 or below num_experts = {self.num_experts}", good, ids, ("token", "layer", "pick"))


def _is_replaced(module: torch.nn.Module) -> bool:
    """Whether a router of transformers chooses by our kernel."""
    from numba_moe.interop import transformers_routers

    return transformers_routers.is_replaced(module)
