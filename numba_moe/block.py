"""A feed-forward block of experts as a torch module: router, experts, shared expert."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from numba_moe.ops.activation.activate import moe_activation
from numba_moe.ops.activation.activate_rows import KINDS
from numba_moe.ops.experts import fused_experts
from numba_moe.ops.gating.select import select_experts
from numba_moe.reference.gating import SCORING, TopK
from numba_moe.runtime import checks


def _matrix(*shape: int, device: Any, dtype: torch.dtype | None) -> torch.nn.Parameter:
    """Draw weights as torch.nn.Linear does, whose inputs are the last dimension."""
    weights = torch.empty(*shape, device=device, dtype=dtype)
    bound = 1 / math.sqrt(shape[-1])
    return torch.nn.Parameter(torch.nn.init.uniform_(weights, -bound, bound))


def _matrices(shape: tuple[int, ...], experts: int, slots: Sequence[int] | None, **kind: Any) -> torch.nn.Parameter:
    """Draw a matrix for each expert; if this rank has slots for some, keep theirs: ranks with one seed then agree."""
    if slots is None:
        return _matrix(experts, *shape, **kind)
    kept = torch.zeros(len(slots), *shape, **kind)
    for expert in range(experts):
        matrix = _matrix(*shape, **kind).detach()
        for slot in (slot for slot, held in enumerate(slots) if held == expert):
            kept[slot] = matrix
    return torch.nn.Parameter(kept)


def _zeros(*shape: int, device: Any, dtype: torch.dtype | None) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))


class Router(torch.nn.Module):
    """The choice of experts for each token, from its hidden state.

    Its weight has shape [num_experts, hidden_size]; `correction_bias`, float32 [num_experts], is a buffer that moves
    the choice and not the weights, for balancing without a loss. It stays float32, with the same bits, whatever dtype
    the module is converted to. `options` are those of `select_experts`.
    """

    correction_bias: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        correction_bias: bool,
        options: dict[str, Any],
        **kind: Any,
    ) -> None:
        super().__init__()
        self.top_k, self.options = top_k, options
        self.weight = _matrix(num_experts, hidden_size, **kind)
        bias = torch.zeros(num_experts, dtype=torch.float32, device=kind["device"]) if correction_bias else None
        self.register_buffer("correction_bias", bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Router":
        """Convert or move the module, which is what `to`, `half`, `cuda` and others call; the bias only moves."""
        bias = self.correction_bias
        super()._apply(fn, recurse)
        moved = self.correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.correction_bias = bias.to(moved.device, torch.float32)
        return self

    def forward(self, hidden_states: torch.Tensor) -> TopK:
        logits = linear(hidden_states, self.weight)
        bias = self.correction_bias
        if bias is not None:
            bias = bias.float()  # a state dict that was assigned, and FSDP's buffer_dtype, bring other dtypes
        return select_experts(logits, self.top_k, correction_bias=bias, **self.options)

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        sizes = f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}"
        return sizes if self.correction_bias is None else f"{sizes}, correction_bias=True"


class MoEBlock(torch.nn.Module):
    """A feed-forward block of experts, of which each token visits `top_k`; it trains, on a GPU and on the CPU.

    Parameters
    ----------
    hidden_size : int
        Columns of the input and the output.
    intermediate_size : int
        Columns between the two matrices of an expert.
    num_experts : int
        Experts in all.
    top_k : int
        Experts of each token.
    activation : {"silu", "gelu", "gelu_tanh", "swiglu_oai"}
        As in `fused_experts`.
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt", "raw"}
        How experts are chosen and weighted: this and the next five as in `select_experts`.
    renormalize : bool
        Whether the weights of a token sum to 1.
    num_expert_group : int
        Groups of experts.
    topk_group : int
        Groups of each token.
    group_score : {"max", "top2_sum", "topk_sum"}, optional
        What the groups of a token are chosen by.
    routed_scaling_factor : float
        Multiplies the weights.
    correction_bias : bool
        The router has a buffer `correction_bias` that moves the choice; zeros at first.
    bias : bool
        Both matrices of the experts have biases; zeros at first.
    shared_size : int
        Columns between the matrices of an expert that every token visits; 0 for none.
    device : torch.device, optional
        Where parameters are.
    dtype : torch.dtype, optional
        float32, float16 or bfloat16, that of all parameters and of the input.
    dispatcher : TokenDispatcher, optional
        Spreads the experts over the ranks of a group (`numba_moe.parallel`): this rank then has matrices for its own
        slots alone, and each rank calls the block with tokens of its own, or none.
    layer : int
        The layer of the dispatcher's location.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        A size below 1, more experts for a token than there are, an unknown activation or `scoring_func`.

    Notes
    -----
    Parameters are named ``router.weight`` [num_experts, hidden], ``gate_up_proj`` [num_experts, 2 * width, hidden],
    ``down_proj`` [num_experts, hidden, width], ``gate_up_bias``, ``down_bias``, ``shared_gate_up`` and ``shared_down``.
    With a dispatcher their first dimension is that of its slots, and the rest is on every rank; with the same seed on
    all ranks an expert has the weights that it has on one. `numba_moe.parallel` has state dicts of all experts.
    A forward hook on ``router`` sees which experts are chosen. Under ``torch.autocast`` all GEMMs are of its dtype.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> block = MoEBlock(16, 8, num_experts=4, top_k=2, renormalize=True, shared_size=8)
    >>> block(torch.randn(3, 5, 16)).shape
    torch.Size([3, 5, 16])
    """

    @torch.inference_mode(False)  # what is made inside an inference mode can be trained, and moved, outside
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "silu",
        scoring_func: str = "softmax",
        renormalize: bool = False,
        num_expert_group: int = 1,
        topk_group: int = 1,
        group_score: str | None = None,
        routed_scaling_factor: float = 1.0,
        correction_bias: bool = False,
        bias: bool = False,
        shared_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dispatcher: Any = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        hidden = checks.integer("hidden_size", hidden_size, 1)
        width = checks.integer("intermediate_size", intermediate_size, 1)
        experts = checks.integer("num_experts", num_experts, 1)
        top_k = checks.integer("top_k", top_k, 1, experts, f"num_experts = {experts}")
        shared = checks.integer("shared_size", shared_size, 0)
        checks.choice("activation", activation, KINDS[:-1])
        checks.choice("scoring_func", scoring_func, tuple(SCORING))
        checks.number("routed_scaling_factor", routed_scaling_factor)
        options = {
            "scoring_func": scoring_func,
            "renormalize": renormalize,
            "num_expert_group": num_expert_group,
            "topk_group": topk_group,
            "group_score": group_score,
            "routed_scaling_factor": routed_scaling_factor,
        }
        if device is not None:
            device = checks.device("device", device, ("cpu", "cuda", "meta"))
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_size, self.intermediate_size, self.shared_size = hidden, width, shared
        self.num_experts = experts
        self.activation = activation
        self.dispatcher, self.layer = dispatcher, layer
        slots = None if dispatcher is None else self._slots(top_k)
        num_local = experts if slots is None else len(slots)
        self.router = Router(hidden, experts, top_k, correction_bias, options, **kind)
        self.gate_up_proj = _matrices((2 * width, hidden), experts, slots, **kind)
        self.down_proj = _matrices((hidden, width), experts, slots, **kind)
        self.gate_up_bias = _zeros(num_local, 2 * width, **kind) if bias else None
        self.down_bias = _zeros(num_local, hidden, **kind) if bias else None
        self.shared_gate_up = _matrix(2 * shared, hidden, **kind) if shared else None
        self.shared_down = _matrix(hidden, shared, **kind) if shared else None

    def _slots(self, top_k: int) -> Sequence[int]:
        """Return the expert of each slot of this rank."""
        from numba_moe.parallel.group_experts import local_experts

        sizes = {"num_experts": self.num_experts, "top_k": top_k, "hidden": self.hidden_size}
        for name, size in sizes.items():
            found = getattr(self.dispatcher, name)
            checks.holds("dispatcher", f"one of {name} = {size}", found == size, found)
        last = self.dispatcher.location.num_layers - 1
        checks.integer("layer", self.layer, 0, last, f"num_layers - 1 = {last}")
        slots: list[int] = local_experts(self.dispatcher, self.layer).tolist()
        return slots

    @property
    def top_k(self) -> int:
        """Experts of each token, as the router chooses them."""
        return self.router.top_k

    def extra_repr(self) -> str:
        sizes = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"
        experts = f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation!r}"
        bias = "" if self.gate_up_bias is None else ", bias=True"
        shared = f", shared_size={self.shared_size}" if self.shared_size else ""
        return f"{sizes}, {experts}{bias}{shared}"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the sum of what the experts of each token make of it: [..., hidden_size], as the input."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        rows = rows.to(dtype)
        weights, ids = self.router(rows)
        gate_up_bias, down_bias = (
            None if bias is None else bias.to(dtype) for bias in (self.gate_up_bias, self.down_bias)
        )
        experts: Callable[..., torch.Tensor] = fused_experts
        if self.dispatcher is not None:
            from numba_moe.parallel import group_experts

            experts = functools.partial(group_experts.fused_experts, dispatcher=self.dispatcher, layer=self.layer)
        combined = experts(
            *(rows, self.gate_up_proj.to(dtype), self.down_proj.to(dtype), weights, ids),
            activation=self.activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
        )
        if self.shared_gate_up is not None and self.shared_down is not None:
            shared = moe_activation(linear(rows, self.shared_gate_up), activation=self.activation)
            combined = combined + linear(shared, self.shared_down)
        return combined.reshape(hidden_states.shape)
