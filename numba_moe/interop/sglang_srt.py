"""SGLang's MoE slice as its developers call it: routing, DeepEP's rows, the allocator and the recorder, by their names.

Parameters are those of `sglang.srt` at the time of its first expert distribution recorder (April 2025), in that order;
what later releases have is by keyword. docs/from-sglang.md lists each function with a call. Nothing of SGLang's is
needed or replaced: `numba_moe.interop.sglang` does that.

Routed weights are multiplied by `routed_scaling_factor` only with `apply_routed_scaling_factor_on_output`, as there.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import numba_moe
from numba_moe.interop import into
from numba_moe.interop.composed import float32_bias, packed_ids, real_tokens
from numba_moe.interop.sglang_recorder import (  # noqa: F401 (callers find all names of the slice here)
    DIRECTORY,
    MODES,
    ExpertDistributionRecorder,
    add_cli_args,
    get_global_expert_distribution_recorder,
    recorder_from_args,
    set_global_expert_distribution_recorder,
)
from numba_moe.ops.dispatch import dispatch_ids
from numba_moe.reference.dispatch import DispatchTables
from numba_moe.runtime import checks, workspace
from numba_moe.runtime.arrays import apart
from numba_moe.runtime.plans import layout

Choice = tuple[torch.Tensor, torch.Tensor]

# What `select_experts` takes of a `topk_config`.
CONFIGURED = (
    *("top_k", "use_grouped_topk", "topk_group", "num_expert_group", "renormalize", "num_fused_shared_experts"),
    *("custom_routing_function", "correction_bias", "torch_native", "routed_scaling_factor"),
    *("apply_routed_scaling_factor_on_output", "scoring_func"),
)


class StandardTopKOutput(NamedTuple):
    """What `select_experts` returns for a `topk_config`."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


@apart("packed_out")
def fused_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    *,
    correction_bias: torch.Tensor | None = None,
    scoring_func: str = "softmax",
    routed_scaling_factor: float | None = None,
    apply_routed_scaling_factor_on_output: bool = False,
    num_fused_shared_experts: int = 0,
    packed_out: torch.Tensor | None = None,
    num_token_non_padded: int | torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> Choice:
    """Choose experts by softmax or sigmoid scores, or by the square roots of softplus: "sqrtsoftplus".

    A bias of any float dtype moves the choice alone. `packed_out`, int32 [num_tokens, topk], gets ``id << 16`` with the
    bits of the weight in bfloat16 below, which torch puts together. The rest is as in `biased_grouped_topk`.

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    >>> fused_topk(torch.zeros(2, 8), logits, 1, True, num_token_non_padded=1)
    (tensor([[1.],
            [0.]]), tensor([[ 2],
            [-1]], dtype=torch.int32))
    """
    names = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "softplus_sqrt"}
    checks.choice("scoring_func", scoring_func, tuple(names))
    _same_tokens(hidden_states, "gating_output", gating_output)
    weights, ids = _choose(
        *(gating_output, topk, renormalize, routed_scaling_factor, apply_routed_scaling_factor_on_output),
        *(_shared(0, num_fused_shared_experts), num_token_non_padded, expert_location_dispatch_info),
        scoring_func=names[scoring_func],
        correction_bias=float32_bias(correction_bias),
    )
    if packed_out is not None:
        packed_ids(weights, ids, packed_out)
    return weights, ids


def grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    n_share_experts_fusion: int = 0,
    routed_scaling_factor: float | None = None,
    num_token_non_padded: int | torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
    *,
    num_fused_shared_experts: int = 0,
    apply_routed_scaling_factor_on_output: bool = False,
    scoring_func: str = "softmax",
) -> Choice:
    """Choose groups by their best expert, and then experts, by softmax or sigmoid scores.

    The rest is as in `biased_grouped_topk`.
    """
    checks.choice("scoring_func", scoring_func, ("softmax", "sigmoid"))
    _same_tokens(hidden_states, "gating_output", gating_output)
    num_shared = _shared(n_share_experts_fusion, num_fused_shared_experts)
    return _choose(
        *(gating_output, topk, renormalize, routed_scaling_factor, apply_routed_scaling_factor_on_output),
        *(num_shared, num_token_non_padded, expert_location_dispatch_info),
        scoring_func=scoring_func,
        group_score="max",
        num_expert_group=num_expert_group,
        topk_group=topk_group,
    )


def biased_grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    compiled: bool = True,
    n_share_experts_fusion: int = 0,
    routed_scaling_factor: float | None = None,
    num_token_non_padded: int | torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
    *,
    num_fused_shared_experts: int = 0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> Choice:
    """Choose groups by their best two ``score + bias``, and then experts, by sigmoid scores.

    Parameters
    ----------
    hidden_states : tensor, shape [num_tokens, any]
        Its number of tokens is checked, and nothing else is looked at.
    gating_output : tensor of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits.
    correction_bias : tensor of any float dtype, shape [num_experts]
        Moves the choice alone.
    topk : int
        Slots of a token, with that of a shared expert.
    renormalize : bool
        Divide the weights by the sum of those of routed experts.
    num_expert_group, topk_group : int
        Groups of consecutive experts, and how many of them are chosen.
    compiled : bool
        True or False: SGLang compiles its own function or does not; ours is a kernel in either case.
    n_share_experts_fusion, num_fused_shared_experts : int
        Replicas of the shared expert, by its older and its newer name. The last slot is one of them, at random for each
        token by torch's generator: expert ``num_experts`` or a later one. Its weight is the sum of the other weights
        divided by `routed_scaling_factor`.
    routed_scaling_factor : float, optional
        See there, and `apply_routed_scaling_factor_on_output`.
    num_token_non_padded : int, or tensor of int32 or int64, shape [] or [1], optional
        Tokens from there on get ids -1 and weights 0.
    expert_location_dispatch_info : object, optional
        Ids become those of places: by `DispatchTables` of ours, or by SGLang's object of this name where its algorithm
        is "static".
    apply_routed_scaling_factor_on_output : bool
        Multiply the weights by the factor.

    Returns
    -------
    topk_weights, topk_ids : tensors of float32 and int32, shape [num_tokens, topk]

    Raises
    ------
    TypeError
        Wrong kind of argument or dtype.
    ValueError
        Other numbers of tokens, shared experts without a factor, what `select_experts` of ours refuses.
    """
    checks.boolean("compiled", compiled)
    _same_tokens(hidden_states, "gating_output", gating_output)
    num_shared = _shared(n_share_experts_fusion, num_fused_shared_experts)
    return _choose(
        *(gating_output, topk, renormalize, routed_scaling_factor, apply_routed_scaling_factor_on_output),
        *(num_shared, num_token_non_padded, expert_location_dispatch_info),
        scoring_func="sigmoid",
        group_score="top2_sum",
        correction_bias=float32_bias(correction_bias),
        num_expert_group=num_expert_group,
        topk_group=topk_group,
    )


def select_experts(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    top_k: int | None = None,
    use_grouped_topk: bool = False,
    renormalize: bool = True,
    topk_group: int | None = None,
    num_expert_group: int | None = None,
    custom_routing_function: Callable[..., Choice] | None = None,
    correction_bias: torch.Tensor | None = None,
    torch_native: bool = False,
    routed_scaling_factor: float | None = None,
    num_token_non_padded: int | torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
    *,
    n_share_experts_fusion: int = 0,
    num_fused_shared_experts: int = 0,
    apply_routed_scaling_factor_on_output: bool = False,
    scoring_func: str = "softmax",
    topk_config: Any = None,
    layer_id: int | None = None,
) -> Choice | StandardTopKOutput:
    """Choose experts the way that the arguments ask for, and tell the recorder.

    `use_grouped_topk` is `biased_grouped_topk`, or without a bias `grouped_topk`; otherwise it is `fused_topk`.
    `custom_routing_function` is called with ``hidden_states, gating_output, topk, renormalize`` by keyword where groups
    are not asked for; padding and places are put on its ids afterwards, by torch and `placement.dispatch_ids`.
    `torch_native` is True or False as `compiled` is there. The global recorder gets the ids that are returned, as those
    of `layer_id` if that is given.

    Later releases have sizes and rules in one object: `topk_config`, in the place of `top_k` and what is after it but
    for padding and places. Then the result has the logits too.

    Examples
    --------
    >>> def route(hidden_states, gating_output, topk, renormalize):
    ...     best = gating_output.topk(topk)
    ...     return best.values, best.indices.int()
    >>> logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    >>> select_experts(logits, logits, 1, False, True, custom_routing_function=route, num_token_non_padded=1)
    (tensor([[3.],
            [0.]]), tensor([[ 2],
            [-1]], dtype=torch.int32))
    """
    if topk_config is not None:
        checks.holds("top_k", "None with `topk_config`", top_k is None, top_k)
        rules = {name: getattr(topk_config, name) for name in CONFIGURED}
        of_call: dict[str, Any] = {"num_token_non_padded": num_token_non_padded, "layer_id": layer_id}
        of_call["expert_location_dispatch_info"] = expert_location_dispatch_info
        found = select_experts(hidden_states, router_logits, **rules, **of_call)
        return StandardTopKOutput(found[0], found[1], router_logits)
    top_k = checks.integer("top_k", top_k, 1)
    checks.boolean("use_grouped_topk", use_grouped_topk)
    checks.boolean("torch_native", torch_native)
    _same_tokens(hidden_states, "router_logits", router_logits)
    num_shared = _shared(n_share_experts_fusion, num_fused_shared_experts)
    if not use_grouped_topk:
        for name, value in (("num_expert_group", num_expert_group), ("topk_group", topk_group)):
            checks.holds(name, "None without `use_grouped_topk`", value in (None, 0, 1), value)
    common: dict[str, Any] = {
        "routed_scaling_factor": routed_scaling_factor,
        "num_token_non_padded": num_token_non_padded,
        "expert_location_dispatch_info": expert_location_dispatch_info,
        "num_fused_shared_experts": num_shared,
        "apply_routed_scaling_factor_on_output": apply_routed_scaling_factor_on_output,
    }
    first = (hidden_states, router_logits)
    if use_grouped_topk:
        for name, value in (("num_expert_group", num_expert_group), ("topk_group", topk_group)):
            checks.holds(name, "given with `use_grouped_topk`", value is not None, value)
        common |= {"num_expert_group": num_expert_group, "topk_group": topk_group}
        if correction_bias is None:
            weights, ids = grouped_topk(*first, top_k, renormalize, scoring_func=scoring_func, **common)
        else:
            checks.choice("scoring_func", scoring_func, ("softmax", "sigmoid"))  # the former is only the default
            weights, ids = biased_grouped_topk(*first, correction_bias, top_k, renormalize, **common)
    elif custom_routing_function is None:
        common |= {"correction_bias": correction_bias, "scoring_func": scoring_func}
        weights, ids = fused_topk(*first, top_k, renormalize, **common)
    else:
        checks.holds("num_fused_shared_experts", "0 with `custom_routing_function`", num_shared == 0, num_shared)
        rule = "left out with `custom_routing_function`, which does not get it"
        checks.holds("correction_bias", rule, correction_bias is None, "a bias")
        checks.holds("scoring_func", rule, scoring_func == "softmax", repr(scoring_func))
        weights, ids = custom_routing_function(
            hidden_states=hidden_states, gating_output=router_logits, topk=top_k, renormalize=renormalize
        )
        if apply_routed_scaling_factor_on_output and routed_scaling_factor is not None:
            weights = weights * routed_scaling_factor
        weights, ids = _finished(weights, ids, num_token_non_padded, expert_location_dispatch_info)
    found_recorder = get_global_expert_distribution_recorder()
    with contextlib.nullcontext() if layer_id is None else found_recorder.with_current_layer(layer_id):
        found_recorder.on_select_experts(ids)
    return weights, ids


@apart("topk_ids", "topk_weights")
def simulate_balanced_routing(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    *,
    random: bool,
    num_ranks: int = 1,
    layer_id: int | None = None,
    seed: int | None = None,
    num_token_non_padded: int | torch.Tensor | None = None,
    weight_scale: float = 1.0,
) -> None:
    """Write a choice that is balanced, to measure what follows routing: experts in turn, or from a random one on.

    Slots in turn go to the ranks in turn, and on each to its ``num_experts / num_ranks`` experts in turn, beginning
    `layer_id` later. With `random` a token begins at any expert, drawn by torch from `seed`, or torch's own generator,
    and its experts are ``num_experts // top_k`` apart. Weights are ``weight_scale / top_k``; tokens from
    `num_token_non_padded` on get ids -1 and weights 0. All is on the device, by torch.

    Examples
    --------
    >>> ids, weights = torch.empty(2, 2, dtype=torch.int32), torch.empty(2, 2)
    >>> simulate_balanced_routing(ids, weights, 4, random=False, num_ranks=2)
    >>> ids.tolist(), weights.tolist()
    ([[0, 2], [1, 3]], [[0.5, 0.5], [0.5, 0.5]])
    """
    checks.boolean("random", random)
    num_experts = checks.integer("num_experts", num_experts, 1)
    num_ranks = checks.integer("num_ranks", num_ranks, 1)
    checks.divides("num_ranks", num_ranks, "num_experts", num_experts)
    first = 0 if layer_id is None else checks.integer("layer_id", layer_id, 0)
    ids, weights = layout(topk_ids), layout(topk_weights)
    checks.array("topk_ids", ids, checks.IDS, (2,), rows=True)
    checks.array("topk_weights", weights, checks.FLOATS, (2,), like=("topk_ids", ids), rows=True)
    checks.shape("topk_weights", weights, tuple(ids.shape), "`topk_ids`.shape")
    checks.number("weight_scale", weight_scale)
    num_tokens, top_k = topk_ids.shape
    rule = f"of at most num_experts = {num_experts} columns"
    checks.holds("topk_ids", rule, top_k <= num_experts, top_k)
    device = topk_ids.device
    if random:
        generator = None if seed is None else torch.Generator(device).manual_seed(checks.integer("seed", seed, 0))
        base = torch.randint(num_experts, (num_tokens, 1), dtype=torch.int64, device=device, generator=generator)
        steps = torch.arange(top_k, dtype=torch.int64, device=device) * max(num_experts // top_k, 1)
        found = (base + steps) % num_experts
    else:
        checks.holds("seed", "None but for `random`", seed is None, seed)
        turn = torch.arange(first, first + num_tokens * top_k, dtype=torch.int64, device=device)
        turn = turn.view(num_tokens, top_k)
        each = num_experts // num_ranks
        found = turn % num_ranks * each + turn // num_ranks % each
    scaled, found = _finished(torch.full_like(topk_weights, weight_scale / top_k), found, num_token_non_padded, None)
    topk_ids.copy_(found)
    topk_weights.copy_(scaled)


def _shared(older: int, newer: int) -> int:
    """Return the number of shared experts' replicas, which has two names."""
    checks.integer("n_share_experts_fusion", older, 0)
    checks.integer("num_fused_shared_experts", newer, 0)
    checks.holds("num_fused_shared_experts", "0 with `n_share_experts_fusion`", not (older and newer), newer)
    return older or newer


def _same_tokens(hidden_states: torch.Tensor, name: str, logits: torch.Tensor) -> None:
    tokens = hidden_states.shape[0]
    checks.holds(name, f"of {tokens} tokens, like `hidden_states`", logits.shape[0] == tokens, logits.shape[0])


def _choose(
    logits: torch.Tensor,
    topk: int,
    renormalize: bool,
    factor: float | None,
    on_output: bool,
    num_shared: int,
    num_token_non_padded: Any,
    info: Any,
    **options: Any,
) -> Choice:
    """Choose in one launch; a shared expert's slot is torch's, in front of what is done to all ids."""
    checks.boolean("apply_routed_scaling_factor_on_output", on_output)
    if factor is not None:
        checks.number("routed_scaling_factor", factor)
    options |= {"renormalize": renormalize, "routed_scaling_factor": 1.0 if factor is None or not on_output else factor}
    if not num_shared:
        padding = _on_device(num_token_non_padded, logits)
        found = numba_moe.select_experts(logits, topk, num_token_non_padded=padding, dispatch=_tables(info), **options)
        return found.topk_weights, found.topk_ids
    if not factor:
        raise ValueError(f"`routed_scaling_factor` must be a number other than 0 with shared experts, got {factor}")
    weights, ids = numba_moe.select_experts(logits, checks.integer("topk", topk, 2) - 1, **options)
    num_experts, (num_tokens, _) = logits.shape[1], ids.shape
    last = num_experts + num_shared
    shared = torch.randint(num_experts, last, (num_tokens, 1), dtype=ids.dtype, device=ids.device)
    weights = torch.cat([weights, weights.sum(1, keepdim=True) / factor], 1)
    ids = torch.cat([ids, shared], 1)
    return _finished(weights, ids, num_token_non_padded, info)


def _finished(weights: torch.Tensor, ids: torch.Tensor, num_token_non_padded: Any, info: Any) -> Choice:
    """Return ids of places, with padding left out."""
    tables = _tables(info)
    if tables is not None:
        places, replicas, algorithm, seed, step = tables
        ids = dispatch_ids(ids.contiguous(), places, replicas, algorithm=algorithm, seed=seed, step=step)
    limit = _on_device(num_token_non_padded, ids)
    if limit is not None:
        padded = ~real_tokens(ids, "num_token_non_padded", limit)
        weights, ids = weights.masked_fill(padded, 0), ids.masked_fill(padded, -1)
    return weights, ids


def _on_device(number: Any, like: torch.Tensor) -> torch.Tensor | None:
    """Return a number of tokens as a tensor."""
    if number is None or isinstance(number, torch.Tensor):
        return number
    number = checks.integer("num_token_non_padded", number, 0)
    return torch.full((1,), number, dtype=torch.int32, device=like.device)


def _tables(info: Any) -> DispatchTables | None:
    """Return the tables of a dispatch, ours or SGLang's."""
    if info is None or isinstance(info, DispatchTables):
        return info
    algorithm = getattr(info, "ep_dispatch_algorithm", type(info).__name__)
    static = algorithm == "static"
    checks.holds("expert_location_dispatch_info", "DispatchTables, or SGLang's of 'static'", static, algorithm)
    return DispatchTables(info.partial_logical_to_rank_dispatch_physical_map.to(torch.int32).contiguous())


def deepep_run_moe_deep_preprocess(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order slots by expert, as DeepEP's dispatcher in SGLang has it.

    Parameters
    ----------
    topk_ids : tensor of int32 or int64, shape [num_tokens, top_k]
        Experts of this rank, -1 for none.
    num_experts : int
        Number of experts. Valid ids are 0 to ``num_experts - 1``.

    Returns
    -------
    reorder_topk_ids : int64, the expert of each row that is in use, and of no more
    src2dst : int64 [num_tokens * top_k], the row of each slot, -1 for none
    seg_indptr : int64 [num_experts + 1], where the rows of each expert begin

    Notes
    -----
    Synchronises, as the length of the first result is that of the data: `numba_moe.moe_reorder` does not.

    Examples
    --------
    >>> deepep_run_moe_deep_preprocess(torch.tensor([[1, 0], [-1, 0]]), 2)
    (tensor([0, 0, 1]), tensor([ 2,  0, -1,  1]), tensor([0, 2, 3]))
    """
    experts, rows, starts = numba_moe.moe_reorder(topk_ids.contiguous(), num_experts)
    return experts[: int(starts[-1])].to(torch.int64), rows.to(torch.int64), starts


def deepep_permute(
    hidden_states: torch.Tensor,
    topk_idx: torch.Tensor,
    num_experts: int,
    fp8_dtype: torch.dtype | None = None,
    use_fp8_w8a8: bool = False,
    use_block_quant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy rows into expert order: reorder_topk_ids, src2dst and seg_indptr as above, and the rows that are in use.

    With `use_fp8_w8a8` and without `use_block_quant` the rows are those of `fp8_dtype`, which torch rounds to. Rows of
    no tokens are none. Synchronises.
    """
    checks.boolean("use_fp8_w8a8", use_fp8_w8a8)
    checks.boolean("use_block_quant", use_block_quant)
    if use_fp8_w8a8 and not use_block_quant:
        hidden_states = hidden_states.to(checks.dtype("fp8_dtype", fp8_dtype))
    found = numba_moe.moe_permute(hidden_states, topk_idx.contiguous(), num_experts, alignment=1, zero_padding=False)
    length = int(found.expert_first_token_offset[-1])
    experts = found.m_indices[:length].to(torch.int64)
    src2dst = found.inv_permuted_idx.ravel().to(torch.int64)
    return experts, src2dst, found.expert_first_token_offset, found.permuted_hidden_states[:length]


@apart("gateup_input")
def pre_reorder_for_cutlass_moe(
    input: torch.Tensor,
    gateup_input: torch.Tensor,
    src2dst: torch.Tensor,
    topk_ids: torch.Tensor,
    a1_scales: torch.Tensor | None,
    num_local_experts: int,
    topk: int,
    num_tokens: int,
    hidden_size: int,
) -> None:
    """Write each token's row, divided by `a1_scales` if that is given, to the rows that `src2dst` has for its slots.

    The scales are one number. Slots of ids outside ``[0, num_local_experts)`` have no row; rows of no slot keep what
    they hold. By torch alone, as `moe_permute` finds rows by itself.
    """
    _check_sizes(input, topk_ids, topk, num_tokens, hidden_size)
    rows = _rows_of(src2dst, topk_ids, num_local_experts)
    if a1_scales is not None:
        checks.holds("a1_scales", "of one number", a1_scales.numel() == 1, f"shape {tuple(a1_scales.shape)}")
    if not num_tokens:
        return
    num_rows = gateup_input.shape[0]
    slots = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=input.device)
    numbers = torch.arange(rows.numel(), dtype=torch.int64, device=input.device)
    slots[torch.where(rows >= 0, rows, num_rows).ravel().long()] = numbers
    slots = slots[:num_rows, None]
    moved = input.float() if a1_scales is None else input.float() / a1_scales.float()
    moved = moved.to(gateup_input.dtype)[slots.ravel().clamp(min=0) // topk]
    torch.where(slots >= 0, moved, gateup_input, out=gateup_input)


@apart("output")
def post_reorder_for_cutlass_moe(
    down_output: torch.Tensor,
    output: torch.Tensor,
    src2dst: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_local_experts: int,
    topk: int,
    num_tokens: int,
    hidden_size: int,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sum each token's rows, weighted, times the factor, into `output`, but for slots of other ranks' experts."""
    _check_sizes(output, topk_ids, topk, num_tokens, hidden_size)
    rows = _rows_of(src2dst, topk_ids, num_local_experts)
    into.moe_unpermute(output, down_output, topk_weights.contiguous(), rows, routed_scaling_factor)


@apart("output")
def deepep_post_reorder(
    down_output: torch.Tensor,
    output: torch.Tensor,
    src2dst: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    topk: int,
    hidden_size: int,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sum each token's rows, weighted, times the factor, into `output`; slots whose `src2dst` is below 0 add nothing.

    Sums are in float32 and rounded once, and not in the dtype of the rows.
    """
    sizes = (topk, topk_ids.shape[0], hidden_size)
    post_reorder_for_cutlass_moe(
        *(down_output, output, src2dst, topk_ids, topk_weights, checks.LARGEST_INT32, *sizes, routed_scaling_factor)
    )


def _rows_of(src2dst: torch.Tensor, topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the row of each slot, int32 [num_tokens, top_k], -1 where its id is no expert of this rank."""
    local = (topk_ids >= 0) & (topk_ids < num_experts)
    length = topk_ids.numel()
    checks.holds("src2dst", f"of {length} slots, as `topk_ids`", src2dst.numel() == length, src2dst.numel())
    return torch.where(local, src2dst.view(topk_ids.shape), -1).to(torch.int32)


def _check_sizes(rows: torch.Tensor, topk_ids: torch.Tensor, topk: int, num_tokens: int, hidden_size: int) -> None:
    """Check sizes that shapes say as well."""
    for name, value, size in (
        ("topk", topk, topk_ids.shape[1]),
        ("num_tokens", num_tokens, topk_ids.shape[0]),
        ("hidden_size", hidden_size, rows.shape[1]),
    ):
        checks.holds(name, f"that of the tensors, {size}", value == size, value)


class BumpAllocator(workspace.BumpAllocator):
    """Hand out views of one buffer, each directly after the previous one.

    Parameters
    ----------
    buffer_size : int
        Elements of the buffer.
    dtype : torch.dtype or str
        Of the buffer and of every view.
    device : torch.device, str or int
        A CUDA device or the CPU.
    clear : bool
        Begin with zeros; otherwise the buffer holds what was in memory, and there is no fill.

    Examples
    --------
    >>> allocator = BumpAllocator(buffer_size=3, dtype=torch.float32, device="cpu")
    >>> [allocator.allocate(1).item() for _ in range(3)]
    [0.0, 0.0, 0.0]
    """

    @torch.inference_mode(False)
    def __init__(
        self, buffer_size: int, dtype: torch.dtype | str, device: torch.device | str | int, *, clear: bool = True
    ) -> None:
        self.size = checks.integer("buffer_size", buffer_size, 1, 2**63 - 1)
        checks.boolean("clear", clear)
        make = torch.zeros if clear else torch.empty
        self.buffer = make(self.size, dtype=checks.dtype("dtype", dtype), device=checks.device("device", device))
        self.used, self._step = 0, 1
