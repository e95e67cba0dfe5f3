"""Experts of Hugging Face transformers (version 5) that run on `numba_moe.fused_experts`.

transformers looks up how experts run by name. `register` adds one; a model is then told to use it, when it is made or
later::

    numba_moe.interop.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="numba_moe")
    model.set_experts_implementation("numba_moe")

Each module's own activation is compared with ours on some numbers, once and again whenever the module has changed. If
one of ours gives the same results, it replaces the module's. Otherwise, and in compiled or exported code, the module's
own activation runs between our permutation and torch's GEMMs.
"""

import itertools
import math
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from numba_moe.ops.activation.activate import moe_activation
from numba_moe.ops.experts import fused_experts
from numba_moe.ops.grouped_products import multiply_by_expert
from numba_moe.ops.permute.permutation import moe_permute, moe_unpermute
from numba_moe.reference.activation import ACTIVATIONS, RULES

NAME = "numba_moe"
OLDEST = (5, 7)  # transformers whose models take any implementation that is registered
# An activation replaces the module's own if their float32 results differ by at most this.
SAME = 1e-5
WITH_ALPHA = tuple(name for name, rule in RULES.items() if rule.alpha is not None)
LARGEST_LIMIT = 1000
# What is known of modules: the state in which each was, and the gate that was found then.
_gates: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, "Gate | None"]] = weakref.WeakKeyDictionary()


class Gate(NamedTuple):
    """Arguments of `fused_experts` that do what a module's own gate or activation does."""

    activation: str
    interleaved: bool
    limit: float | None
    alpha: float | None
    beta: float | None = None
    linear_beta: float | None = None


def _numbers(experts: torch.nn.Module) -> list[float]:
    """Return the numbers among a module's attributes; some may be limits or factors."""
    values = vars(experts).values()
    return sorted({float(value) for value in values if type(value) in (int, float) and 0 < value <= LARGEST_LIMIT})


def _candidates(numbers: list[float], has_gate: bool) -> Iterator[Gate]:
    """Yield gates; those of "silu" have no other beta than the default."""
    for name in ACTIVATIONS:
        rule = RULES[name]
        if rule.halves != (2 if has_gate else 1):
            continue
        alphas, betas = ((None, *numbers) if name in names else (None,) for names in (WITH_ALPHA, ("situ",)))
        layouts = (False, True) if has_gate else (False,)
        limits = (math.inf, *(() if rule.limit == math.inf else (None,)), *(() if name == "situ" else numbers))
        for choice in itertools.product(layouts, limits, alphas, betas, betas):
            yield Gate(name, *choice)


def find_gate(experts: torch.nn.Module) -> Gate | None:
    """Return the arguments that make `fused_experts` do what a module does between its matrices, None if none do.

    They are tried on the CPU, so nothing waits for a device; a module whose gate reads tensors of its own, which may
    change, or has hooks, keeps it.
    """
    if any(map(_has_hooks, _activation_modules(experts))):
        return None
    # A thread of its own knows nothing of the caller's default device, autocast, inference or fake tensor mode.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_search, experts).result()


@torch.no_grad()
def _search(experts: torch.nn.Module) -> Gate | None:
    numbers = _numbers(experts)
    spread = torch.linspace(-6, 6, 96, dtype=torch.float32, device="cpu").reshape(12, 8)
    spread = spread * torch.tensor([1, -0.7, 0.3, 0.9, -0.1, 1.1, 0.5, -1], dtype=torch.float32, device="cpu")
    rows = torch.cat([spread, spread * max([1.0, *numbers])])  # past every limit, on both sides
    own: Any = experts._apply_gate if experts.has_gate else experts.act_fn
    try:
        with torch.random.fork_rng(devices=[]), _Reading(experts) as reading:  # the caller's generator draws as before
            wanted = own(rows).float()
    except RuntimeError:  # it takes rows of its own width or device only, so it runs on those
        return None
    if reading.has_read:
        return None
    for gate in _candidates(numbers, bool(experts.has_gate)):
        found = moe_activation(rows, **gate._asdict())
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=SAME, atol=SAME):
            return gate
    return None


class _Reading(TorchFunctionMode):
    """Notice whether torch's functions are called with tensors that belong to a module."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        held = [value for part in experts.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
        self._own = {id(tensor) for tensor in (*experts.parameters(), *experts.buffers(), *held)}
        self.has_read = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.has_read |= any(id(value) in self._own for value in (*args, *kwargs.values()))
        return function(*args, **kwargs)


def _activation_modules(experts: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the module of the activation and those inside it; none if it is a function."""
    act_fn = getattr(experts, "act_fn", None)
    return list(act_fn.modules()) if isinstance(act_fn, torch.nn.Module) else []


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _state(experts: torch.nn.Module) -> tuple[Any, ...]:
    """Return what the gate of a module may depend on: its class, and the numbers, texts and functions that it holds."""
    activation = _activation_modules(experts)
    config = getattr(experts, "config", None)
    held = []
    for part in (experts, *activation, *(() if config is None else (config,))):
        for name, value in vars(part).items():
            if value is None or isinstance(value, bool | int | float | str):
                held.append((name, value))
            elif callable(value) and not isinstance(value, torch.nn.Module):
                held.append((name, getattr(value, "__func__", value)))
    kinds = [type(part) for part in activation]
    return type(experts), getattr(type(experts), "_apply_gate", None), *kinds, *map(_has_hooks, activation), *held


def _gate_of(experts: torch.nn.Module) -> Gate | None:
    state = _state(experts)
    known = _gates.get(experts)
    if known is None or known[0] != state:
        known = _gates[experts] = (state, find_gate(experts))
    return known[1]


def _has_norm(experts: torch.nn.Module) -> bool:
    return getattr(experts, "has_post_expert_norm", False)  # which transformers knows since 5.20


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run the experts of a transformers module; ids from its number of experts on are other ranks' and add nothing."""
    up, down = self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj
    up_bias = down_bias = None
    if self.has_bias:
        up_bias, down_bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    rows, ids = hidden_states.to(up.dtype), top_k_index.contiguous()  # autocast leaves them in other dtypes
    weights = top_k_weights.contiguous()
    gate = None if torch.compiler.is_compiling() or _has_norm(self) else _gate_of(self)
    if gate is None:
        combined = _with_own_gate(self, rows, up, down, weights, ids, up_bias, down_bias)
    else:
        options: dict[str, Any] = {"gate_up_bias": up_bias, "down_bias": down_bias, **gate._asdict()}
        combined = fused_experts(rows, up, down, weights, ids, **options)
    return combined.to(hidden_states.dtype)


def _with_own_gate(
    self: Any,
    hidden_states: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `fused_experts` would, with what the module has between and after its matrices."""
    permuted = moe_permute(hidden_states, topk_ids, len(up))
    offset = permuted.expert_first_token_offset
    ends = offset[1:].to(torch.int32)
    unused = torch.arange(topk_ids.numel(), dtype=torch.int64, device=offset.device).unsqueeze(1) >= offset[-1]

    def by_expert(rows: torch.Tensor, weights: torch.Tensor, bias: Any) -> torch.Tensor:  # torch 2.9 traces no union
        rows = multiply_by_expert(rows, weights, ends).masked_fill(unused, 0)
        return rows if bias is None else moe_activation(rows, offset, bias, activation="none")

    rows = by_expert(permuted.permuted_hidden_states, up, up_bias)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = by_expert(rows, down, down_bias)
    if _has_norm(self):
        rows = self.post_expert_norm(rows)
    return moe_unpermute(rows, topk_weights, permuted.inv_permuted_idx)


def register(name: str = NAME) -> None:
    """Make an experts implementation of this name valid for every transformers model whose experts have a choice.

    Parameters
    ----------
    name : str
        What models are given as ``experts_implementation``.

    Raises
    ------
    ImportError
        transformers is not installed, or is older than 5.7: its models know no implementations but their own.
    """
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[: len(OLDEST)])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"`transformers` must be at least {oldest}, got {transformers.__version__}")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
