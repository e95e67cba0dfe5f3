"""A feed-forward block of experts as a torch module: router, experts, shared expert."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from numba_moe.ops.activation.activate import check_rule, moe_activation
from numba_moe.ops.count import count_tokens_per_expert
from numba_moe.ops.experts import fused_experts
from numba_moe.ops.gating.select import options_of, plan_selection, select_experts, weigh_experts
from numba_moe.reference.activation import ACTIVATIONS, OPTIONS, RULES
from numba_moe.reference.capacity import DROP_POLICIES, ROUNDINGS, expert_capacity
from numba_moe.reference.gating import TopK
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import is_traced
from numba_moe.runtime.plans import Layout
from numba_moe.runtime.torch_private import is_in_backward, reshaped
from numba_moe.training import tape
from numba_moe.training.capacity import apply_capacity
from numba_moe.training.rounding import token_rounding as round_tokens

CPU = torch.device("cpu")
# Options of the choice that the weights of given experts depend on.
WEIGHING = ("scoring_func", "renormalize", "routed_scaling_factor")


class Numerics(NamedTuple):
    """How a router computes its logits, and what becomes of its choice, as `MoEBlock` is told."""

    router_dtype: torch.dtype | None = None
    jitter: float = 0.0
    input_scale: float = 1.0
    capacity_factor: float | None = None
    drop_policy: str = "probs"
    token_rounding: int | None = None
    rounding: str = "nearest"
    spare_picks: int = 0
    count_tokens: bool = False


class Routed(NamedTuple):
    """A router's choice, and the logits that it was made by."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


def _parameter(*shape: int, device: Any, dtype: torch.dtype | None) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))


def _draw(weights: torch.Tensor | None) -> None:
    """Draw weights as torch.nn.Linear does, whose inputs are the last dimension.

    Those that are spread over ranks are drawn whole: ranks with one seed then have what one process has.
    """
    if weights is None:
        return
    bound, mesh = 1 / math.sqrt(weights.shape[-1]), getattr(weights, "device_mesh", None)
    if mesh is None:
        torch.nn.init.uniform_(weights, -bound, bound)
        return
    from torch.distributed.tensor import distribute_tensor

    whole = torch.nn.init.uniform_(
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device), -bound, bound
    )
    placements: Any = weights.placements  # type: ignore[attr-defined]
    weights.detach().copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))


def _draw_matrices(weights: torch.Tensor, experts: int, slots: Sequence[int] | None) -> None:
    """Draw a matrix for each expert; if this rank has slots for some, keep theirs: ranks with one seed then agree."""
    if slots is None:
        _draw(weights)
        return
    kept = weights.detach().zero_()
    for expert in range(experts):
        matrix = kept.new_empty(kept.shape[1:])
        _draw(matrix)
        for slot in (slot for slot, held in enumerate(slots) if held == expert):
            kept[slot] = matrix


def _clear(values: torch.Tensor | None) -> None:
    if values is not None:
        torch.nn.init.zeros_(values)


class Router(torch.nn.Module):
    """The choice of experts for each token, from its hidden state.

    Its weight has shape [num_experts, hidden_size]; `correction_bias`, float32 [num_experts], is a buffer that moves
    the choice and not the weights, for balancing without a loss. It stays float32, with the same bits, whatever dtype
    the module is converted to. `tokens_per_expert`, int64 [num_experts], counts what the router chooses while it is
    trained, if it is to: `numba_moe.training.update_correction_bias` moves the bias by it. `options` are those of
    `select_experts`.
    """

    correction_bias: torch.Tensor | None
    tokens_per_expert: torch.Tensor | None
    replay: Any = None  # a RoutingReplay and the layer that this router is, where one is attached

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        correction_bias: bool,
        options: dict[str, Any],
        numerics: Numerics = Numerics(),  # noqa: B008, a tuple of numbers
        **kind: Any,
    ) -> None:
        super().__init__()
        self.top_k, self.options, self.numerics = top_k, options, numerics
        self.weight = _parameter(num_experts, hidden_size, **kind)
        where = kind["device"]
        bias = torch.zeros(num_experts, dtype=torch.float32, device=where) if correction_bias else None
        counts = torch.zeros(num_experts, dtype=torch.int64, device=where) if numerics.count_tokens else None
        self.register_buffer("correction_bias", bias)
        self.register_buffer("tokens_per_expert", counts, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, and zero the bias and the counts."""
        _draw(self.weight)
        _clear(self.correction_bias)
        _clear(self.tokens_per_expert)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Router":
        """Convert or move the module, which is what `to`, `half`, `cuda` and others call; the bias only moves."""
        bias = self.correction_bias
        super()._apply(fn, recurse)
        moved = self.correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.correction_bias = bias.to(moved.device, torch.float32)
        return self

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits by which tokens choose."""
        numerics, rows = self.numerics, hidden_states
        weight: torch.Tensor = self.weight
        if numerics.router_dtype is not None:
            rows, weight = rows.to(numerics.router_dtype), weight.to(numerics.router_dtype)
        if numerics.input_scale != 1.0:
            rows = rows * numerics.input_scale
        if numerics.jitter and self.training:
            rows = rows * torch.empty_like(rows).uniform_(1 - numerics.jitter, 1 + numerics.jitter)
        if numerics.router_dtype is None:
            return linear(rows, weight)
        with torch.autocast(rows.device.type, enabled=False):
            return linear(rows, weight)

    def forward(self, hidden_states: torch.Tensor, return_logits: bool = False) -> TopK | Routed:
        logits = self.logits(hidden_states)
        found = self._choose(logits)
        factor, num_experts = self.numerics.capacity_factor, len(self.weight)
        if factor is not None:
            capacity = expert_capacity(len(logits), self.top_k, num_experts, factor)
            weights, ids = found
            found = apply_capacity(weights, ids, num_experts, capacity, drop_policy=self.numerics.drop_policy)
        return Routed(found.topk_weights, found.topk_ids, logits) if return_logits else found

    def _choose(self, logits: torch.Tensor) -> TopK:
        bias = self.correction_bias
        if bias is not None:
            bias = bias.float()  # a state dict that was assigned, and FSDP's buffer_dtype, bring other dtypes
        # What autograd computes anew is counted already.
        counts = self.tokens_per_expert if self.training and (is_traced() or not is_in_backward()) else None

        def weigh(ids: torch.Tensor) -> TopK:
            return weigh_experts(logits, ids, **{name: self.options[name] for name in WEIGHING})

        def select() -> TopK:
            if self.numerics.token_rounding is None:
                return select_experts(logits, self.top_k, correction_bias=bias, counts=counts, **self.options)
            return weigh(self._rounded(logits.detach(), bias, counts))

        if self.replay is not None and self.replay[0].is_active:
            replay, layer = self.replay
            return replay.steer(layer, len(logits), select, weigh)
        if not is_traced() and tape.is_steered():
            return tape.choose(select, weigh)
        return select()

    def _rounded(self, logits: torch.Tensor, bias: Any, counts: torch.Tensor | None) -> torch.Tensor:
        """Return the experts of tokens, each expert's number rounded: `picks` of them, -1 for none."""
        num_experts, numerics = len(self.weight), self.numerics
        options = self.options | {"renormalize": False, "routed_scaling_factor": 1.0}
        scores, ids = select_experts(logits, self.picks, correction_bias=bias, **options)
        if counts is not None:
            counts += count_tokens_per_expert(ids[:, : self.top_k].contiguous(), num_experts)
        tile = numerics.token_rounding
        assert tile is not None
        return round_tokens(scores, ids, num_experts, tile, top_k=self.top_k, rounding=numerics.rounding).topk_ids

    @property
    def picks(self) -> int:
        """Columns of the choice: `top_k`, and with token rounding the spare ones."""
        return self.top_k + self.numerics.spare_picks

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        sizes = f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}"
        if self.correction_bias is not None:
            sizes += ", correction_bias=True"
        defaults = Numerics._field_defaults
        told = ((name, value) for name, value in self.numerics._asdict().items() if value != defaults[name])
        return ", ".join([sizes, *(f"{name}={value}" for name, value in told)])


class MoEBlock(torch.nn.Module):
    """A feed-forward block of experts; each token visits `top_k` of them. It trains on a GPU and on the CPU.

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
    activation : str
        As in `fused_experts`.
    activation_options : dict, optional
        Its numbers and layout by name, for instance ``{"beta": 4.0, "linear_beta": 25.0}`` for "situ".
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
    router_dtype : torch.dtype, optional
        The router's product is of this dtype, also under autocast: torch.float32, where choices are to be stable.
    jitter : float
        In training the router's input is multiplied by random numbers within this of 1 (Switch Transformer).
    input_scale : float
        Multiplies the router's input.
    capacity_factor : float, optional
        Experts take their even share times this of the slots, and drop the others: `training.apply_capacity`.
    drop_policy : {"probs", "position"}
        Which slots they keep: those that weigh most, or the first.
    token_rounding : int, optional
        A tile: each expert has a multiple of it of tokens, which are ranked by score (`training.token_rounding`).
    rounding : {"nearest", "up", "down"}
        To which multiple.
    spare_picks : int
        How many experts past `top_k` a token may be added to; none with "down". Each is a column of the choice, and
        takes memory.
    count_tokens : bool
        While the block is trained, ``router.tokens_per_expert`` counts the slots of each expert, once where activations
        are computed anew.
    apply_router_weight_on_input : bool
        The weights multiply the experts' input instead of their output, as in Llama 4 and Megatron-LM; with a
        dispatcher only where `top_k` is 1.
    accumulate_into_grad : bool
        Backward adds the gradients of the experts' matrices to their `.grad` itself, or to `main_grad`, and their hooks
        get None: `training.fused_experts_into_grad`.
    return_router_logits : bool
        Calls return the router's logits beside the output, unless they say otherwise.
    device : torch.device, optional
        Where parameters are.
    dtype : torch.dtype, optional
        float32, float16 or bfloat16, that of all parameters and of the input; by default torch's own default.
    dispatcher : TokenDispatcher, optional
        Spreads the experts over the ranks of a group (`numba_moe.parallel`): this rank then has matrices for its own
        slots alone, and each rank calls the block with tokens of its own, or none.
    layer : int
        The layer of the dispatcher's location.

    Raises
    ------
    TypeError
        A value of another type than is asked for.
    ValueError
        A size below 1, more experts or groups for a token than there are, a name or a number that does not exist, a
        dtype that is not served.

    Notes
    -----
    Parameters are named ``router.weight`` [num_experts, hidden], ``gate_up_proj`` [num_experts, 2 * width, hidden] (of
    `width` rows for an activation without ups), ``down_proj`` [num_experts, hidden, width], ``gate_up_bias``,
    ``down_bias``, ``shared_gate_up`` and ``shared_down``.
    With a dispatcher their first dimension is that of its slots, and the rest is on every rank; with the same seed on
    all ranks an expert has the weights that it has on one. `numba_moe.parallel` has state dicts of all experts.
    A forward hook on ``router`` sees which experts are chosen. Groups that are whole nodes limit how many nodes a token
    visits: ``num_expert_group`` nodes, ``group_score="topk_sum"``. What is made on the meta device has values after
    ``to_empty`` and ``reset_parameters``. Under ``torch.autocast`` all GEMMs are of its dtype.

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
        activation_options: dict[str, Any] | None = None,
        scoring_func: str = "softmax",
        renormalize: bool = False,
        num_expert_group: int = 1,
        topk_group: int = 1,
        group_score: str | None = None,
        routed_scaling_factor: float = 1.0,
        correction_bias: bool = False,
        bias: bool = False,
        shared_size: int = 0,
        router_dtype: torch.dtype | None = None,
        jitter: float = 0.0,
        input_scale: float = 1.0,
        capacity_factor: float | None = None,
        drop_policy: str = "probs",
        token_rounding: int | None = None,
        rounding: str = "nearest",
        spare_picks: int = 2,
        count_tokens: bool = False,
        apply_router_weight_on_input: bool = False,
        accumulate_into_grad: bool = False,
        return_router_logits: bool = False,
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
        checks.choice("activation", activation, ACTIVATIONS)
        for name in activation_options or {}:
            checks.choice("activation_options", name, OPTIONS)
        check_rule(moe_activation.declaration.given_of({"activation": activation, **(activation_options or {})}))
        flags = {"bias": bias, "correction_bias": correction_bias, "count_tokens": count_tokens}
        flags |= {"apply_router_weight_on_input": apply_router_weight_on_input}
        flags |= {"accumulate_into_grad": accumulate_into_grad}
        for name, flag in {**flags, "return_router_logits": return_router_logits}.items():
            checks.boolean(name, flag)
        if dtype is not None:
            dtype = checks.dtype("dtype", dtype, checks.FLOATS)
        if router_dtype is not None:
            router_dtype = checks.dtype("router_dtype", router_dtype, checks.FLOATS)
        checks.number("jitter", jitter)
        checks.holds("jitter", "from 0 up to 1", 0 <= jitter < 1, jitter)
        checks.number("input_scale", input_scale)
        if capacity_factor is not None:
            checks.number("capacity_factor", capacity_factor)
            checks.holds("capacity_factor", "above 0", capacity_factor > 0, capacity_factor)
        checks.choice("drop_policy", drop_policy, DROP_POLICIES)
        options = {
            "scoring_func": scoring_func,
            "renormalize": renormalize,
            "num_expert_group": num_expert_group,
            "topk_group": topk_group,
            "group_score": group_score,
            "routed_scaling_factor": routed_scaling_factor,
        }
        logits, moved = (Layout(torch.Size(shape), torch.float32, CPU, None, 0) for shape in ((1, experts), (experts,)))
        arrays = {"gating_output": logits, "correction_bias": moved if correction_bias else None}
        choosing = select_experts.declaration.given_of({**arrays, "top_k": top_k, **options})
        plan_selection(choosing, options_of(choosing))  # which checks how experts are chosen
        checks.choice("rounding", rounding, ROUNDINGS)
        spare = checks.integer("spare_picks", spare_picks, 0)
        if token_rounding is not None:
            token_rounding = checks.integer("token_rounding", token_rounding, 1)
            checks.holds("capacity_factor", "None with `token_rounding`", capacity_factor is None, capacity_factor)
        if token_rounding is None or rounding == "down":
            spare = 0
        else:
            spare = min(spare, experts // num_expert_group * topk_group - top_k)
            if group_score == "topk_sum":  # which sums the best top_k // topk_group
                spare = min(spare, topk_group - 1 - top_k % topk_group)
        limits = (capacity_factor, drop_policy, token_rounding, rounding, spare)
        numerics = Numerics(router_dtype, jitter, input_scale, *limits, count_tokens)
        checks.integer("layer", layer, 0)
        checks.holds("layer", "0 without a dispatcher", dispatcher is not None or layer == 0, layer)
        if device is not None:
            device = checks.device("device", device, ("cpu", "cuda", "meta"))
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_size, self.intermediate_size, self.shared_size = hidden, width, shared
        self.num_experts = experts
        self.activation, self.activation_options = activation, dict(activation_options or {})
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.accumulate_into_grad = accumulate_into_grad
        self.return_router_logits = return_router_logits
        self.dispatcher, self.layer = dispatcher, layer
        num_local = experts if dispatcher is None else self._check_dispatcher(top_k + spare)
        self.router = Router(hidden, experts, top_k, correction_bias, options, numerics, **kind)
        halves = RULES[activation].halves
        self.gate_up_proj = _parameter(num_local, halves * width, hidden, **kind)
        self.down_proj = _parameter(num_local, hidden, width, **kind)
        self.gate_up_bias = _parameter(num_local, halves * width, **kind) if bias else None
        self.down_bias = _parameter(num_local, hidden, **kind) if bias else None
        self.shared_gate_up = _parameter(halves * shared, hidden, **kind) if shared else None
        self.shared_down = _parameter(hidden, shared, **kind) if shared else None
        self._reset_experts()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, the router's among them, and zero biases: after `to_empty`, for instance."""
        self.router.reset_parameters()
        self._reset_experts()

    def _reset_experts(self) -> None:
        slots = None
        if self.dispatcher is not None:
            from numba_moe.parallel.group_experts import local_experts

            slots = local_experts(self.dispatcher, self.layer).tolist()  # where experts are now: they move
        _draw_matrices(self.gate_up_proj, self.num_experts, slots)
        _draw_matrices(self.down_proj, self.num_experts, slots)
        _draw(self.shared_gate_up)
        _draw(self.shared_down)
        _clear(self.gate_up_bias)
        _clear(self.down_bias)

    def _check_dispatcher(self, top_k: int) -> int:
        """Check that the dispatcher has this block's sizes; return the number of this rank's slots."""
        from numba_moe.parallel.dispatcher import TokenDispatcher

        if not isinstance(self.dispatcher, TokenDispatcher):
            raise TypeError(f"`dispatcher` must be a TokenDispatcher, got {type(self.dispatcher).__name__}")
        sizes = {"num_experts": self.num_experts, "top_k": top_k, "hidden": self.hidden_size}
        for name, size in sizes.items():
            found = getattr(self.dispatcher, name)
            checks.holds("dispatcher", f"one of {name} = {size}", found == size, found)
        rule = "False with a dispatcher, unless top_k is 1"  # it would send a row for each slot
        on_input = self.apply_router_weight_on_input
        checks.holds("apply_router_weight_on_input", rule, not on_input or top_k == 1, on_input)
        last = self.dispatcher.location.num_layers - 1
        checks.integer("layer", self.layer, 0, last, f"num_layers - 1 = {last}")
        num_local: int = self.dispatcher.num_local_experts
        return num_local

    @property
    def top_k(self) -> int:
        """Experts of each token, as the router chooses them."""
        return self.router.top_k

    def extra_repr(self) -> str:
        sizes = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"
        experts = f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation!r}"
        bias = "" if self.gate_up_bias is None else ", bias=True"
        shared = f", shared_size={self.shared_size}" if self.shared_size else ""
        names = ("apply_router_weight_on_input", "accumulate_into_grad", "return_router_logits")
        told = "".join(f", {name}=True" for name in names if getattr(self, name))
        if self.activation_options:
            told = f", activation_options={self.activation_options}{told}"
        return f"{sizes}, {experts}{bias}{shared}{told}"

    def forward(self, hidden_states: torch.Tensor, return_router_logits: bool | None = None) -> Any:
        """Return the sum of what the experts of each token make of it: [..., hidden_size], as the input.

        With `return_router_logits`, a tuple of that and the logits [num_tokens, num_experts].
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        dtype = rows.dtype
        if torch.amp.is_autocast_available(rows.device.type) and torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        rows = rows.to(dtype)
        if rows.stride(1) != 1:  # as transposing leaves it: kernels read rows
            rows = rows.contiguous()
        with_logits = self.return_router_logits if return_router_logits is None else return_router_logits
        weights, ids, *logits = self.router(rows, True) if with_logits else self.router(rows)
        given, own = rows, (weights, ids)
        if self.apply_router_weight_on_input:
            given = (rows.unsqueeze(1) * weights.unsqueeze(2)).to(dtype).flatten(0, 1)
            own = (torch.ones_like(weights).flatten().unsqueeze(1), ids.flatten().unsqueeze(1))
        gate_up_bias, down_bias = (
            None if bias is None else bias.to(dtype) for bias in (self.gate_up_bias, self.down_bias)
        )
        experts: Callable[..., torch.Tensor] = fused_experts
        if self.dispatcher is not None:
            from numba_moe.parallel import group_experts

            where = {"dispatcher": self.dispatcher, "layer": self.layer}
            experts = functools.partial(
                group_experts.fused_experts, **where, accumulate_into_grad=self.accumulate_into_grad
            )
        elif self.accumulate_into_grad:
            from numba_moe.training.into_grad import fused_experts_into_grad  # loads torch's compiler

            experts = fused_experts_into_grad
        matrices: tuple[torch.Tensor, ...] = (self.gate_up_proj, self.down_proj)
        if not self.accumulate_into_grad:
            matrices = tuple(matrix.to(dtype) for matrix in matrices)
        combined = experts(
            *(given, *matrices, *own),
            activation=self.activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            **self.activation_options,
        )
        if self.apply_router_weight_on_input:
            combined = combined.view(*weights.shape, self.hidden_size).sum(1)
        if self.shared_gate_up is not None and self.shared_down is not None:
            shared = linear(rows, self.shared_gate_up)
            shared = moe_activation(shared, activation=self.activation, **self.activation_options)
            combined = combined + linear(shared, self.shared_down)
        combined = reshaped(combined.contiguous(), hidden_states.shape)
        return (combined, *logits) if with_logits else combined
