"""Gating with all options in one launch: capped logits, mapped ids, padding, counts; and weights of given experts."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.device.types import COUNTING, EXTENDED, PLAIN
from numba_moe.ops.dispatch import check_dispatch
from numba_moe.ops.gating import choose, which_kernel
from numba_moe.ops.gating import given as already_given
from numba_moe.ops.gating.extras import Adjusting, Counting, Extras, Scaling, SharedExperts, ZeroExperts
from numba_moe.ops.gating.option_gradients import selection_backward
from numba_moe.ops.gating.scores import SCORING, Chosen, Weighting
from numba_moe.reference import selection as reference
from numba_moe.reference.dispatch import DispatchTables
from numba_moe.reference.gating import TopK
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, by_reference, contiguous
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Layout

BIAS_MODES = ("choice", "logits")
ID_DTYPES = {"int32": torch.int32, "int64": torch.int64, "int16": torch.int16}
# Kernels work with ids of 32 bits, whatever they write.
LARGEST_IDS = {"int32": checks.LARGEST_INT32, "int64": checks.LARGEST_INT32, "int16": 2**15 - 1}
SMALLEST_EPSILON = 1e-30  # whose inverse is a float32
GIVEN_IDS = (torch.int32, torch.int64, torch.int16)


class Options(NamedTuple):
    """What is asked for besides choosing and weighing, by the names of `select_experts`, with layouts of arrays."""

    softcap: Any = 0.0
    num_fused_shared_experts: Any = 0
    apply_routed_scaling_factor_on_output: Any = True
    num_zero_experts: Any = 0
    zero_expert_id: Any = -1
    identity_weights: Any = None
    num_token_non_padded: Any = None
    is_padding: Any = None
    dispatch: Any = None
    counts: Any = None
    counts_enabled: Any = None
    indices_dtype: Any = "int32"
    renormalize_epsilon: Any = 0.0
    expert_scale: Any = None
    shared_expert_weight: Any = None


NONE = Options()
# What a gradient depends on beside the choice, and what the choice itself does.
RULES = (
    *("scoring_func", "renormalize", "routed_scaling_factor", "softcap", "num_fused_shared_experts"),
    *("apply_routed_scaling_factor_on_output", "num_zero_experts", "renormalize_epsilon", "shared_expert_weight"),
)
# What weights hang on before the scales of experts.
UNSCALED = (
    *("scoring_func", "renormalize", "renormalize_epsilon", "routed_scaling_factor", "softcap"),
    *("apply_routed_scaling_factor_on_output", "num_zero_experts"),
)
PADDING = ("num_token_non_padded", "is_padding")
CHOOSING = (
    *("scoring_func", "correction_bias", "num_expert_group", "topk_group", "group_score", "softcap", "bias_mode"),
    *PADDING,
)


def options_of(given: Any) -> Options:
    """Return the options of a call, their numbers checked: what equals a default may be no such number."""
    options = Options(*(getattr(given, name) for name in Options._fields))
    _check_numbers(*options[:5])
    _check_weights(options.renormalize_epsilon, options.shared_expert_weight)
    options = options._replace(indices_dtype=str(options.indices_dtype).removeprefix("torch."))
    return options._replace(softcap=0.0) if options.softcap == math.inf else options


def extra_arrays(given: Any) -> dict[str, torch.Tensor | None]:
    """Return the arrays of a call's options, by the names that kernels have for them."""
    found = {
        "identity_weights": given.identity_weights,
        "num_token_non_padded": given.num_token_non_padded,
        "is_padding": given.is_padding,
        "counts": given.counts,
        "counts_enabled": given.counts_enabled,
        "expert_scale": given.expert_scale,
    }
    if given.dispatch is not None:
        found["physical_map"], found["num_valid"], _, _, found["step"] = given.dispatch
    return found


def outputs_of(given: Any, top_k: Any) -> tuple[Contiguous, Contiguous]:
    """Return the shapes and dtypes of weights and ids."""
    shape = (given.gating_output.shape[0], top_k + given.num_fused_shared_experts)
    id_dtype = ID_DTYPES[str(given.indices_dtype).removeprefix("torch.")]
    return contiguous(torch.float32, *shape), contiguous(id_dtype, *shape)


def _check_numbers(softcap: Any, num_shared: Any, on_output: Any, num_zero: Any, zero_expert_id: Any) -> None:
    """Check what options say without arrays, as far as it hangs on nothing else."""
    checks.number("softcap", softcap, infinite=True)
    checks.holds("softcap", "0 or more", softcap >= 0, softcap)
    checks.holds("softcap", "0, or what float32 holds above 0", softcap == 0 or np.float32(softcap) > 0, softcap)
    checks.integer("num_fused_shared_experts", num_shared, 0)
    checks.boolean("apply_routed_scaling_factor_on_output", on_output)
    checks.integer("num_zero_experts", num_zero, 0)
    checks.integer("zero_expert_id", zero_expert_id, -1)


def _check_weights(epsilon: Any, shared_weight: Any) -> None:
    """Check the numbers of weights."""
    checks.number("renormalize_epsilon", epsilon)
    rule = f"0, or at least {SMALLEST_EPSILON}"
    checks.holds("renormalize_epsilon", rule, epsilon == 0 or epsilon >= SMALLEST_EPSILON, epsilon)
    if shared_weight is not None:
        checks.number("shared_expert_weight", shared_weight)


def _check(
    gating_output: Layout,
    top_k: int,
    renormalize: bool,
    routed_scaling_factor: float,
    logit_bias: Layout | None,
    options: Options,
) -> Extras:
    """Check options; return what of them kernels are told."""
    like = ("gating_output", gating_output)
    num_tokens, num_experts = gating_output.shape
    name = options.indices_dtype
    checks.choice("indices_dtype", name, tuple(ID_DTYPES))
    checks.number("routed_scaling_factor", routed_scaling_factor)
    weight = options.shared_expert_weight
    divides = bool(options.num_fused_shared_experts) and not options.apply_routed_scaling_factor_on_output
    divides = divides and weight is None
    checks.holds(
        "routed_scaling_factor",
        "other than 0 where shared experts' weights are divided by it",
        not divides or routed_scaling_factor != 0,
        routed_scaling_factor,
    )
    shared_factor = 1.0 / routed_scaling_factor if divides else 1.0 if weight is None else float(weight)
    finite = abs(shared_factor) <= checks.LARGEST_FLOAT32
    rule = "large enough for float32 to hold 1 over it, by which shared experts' weights are multiplied"
    checks.holds("routed_scaling_factor", rule, finite, routed_scaling_factor)
    limit = f"num_experts = {num_experts}"
    num_zero = checks.integer("num_zero_experts", options.num_zero_experts, 0, num_experts, limit)
    largest = LARGEST_IDS[name]
    limit = f"{largest}, the largest {name}"
    zero_expert_id = checks.integer("zero_expert_id", options.zero_expert_id, -1, largest, limit)
    most_shared = checks.LARGEST_INT32 - num_experts
    num_shared = checks.integer("num_fused_shared_experts", options.num_fused_shared_experts, 0, most_shared)
    last = num_experts - num_zero + num_shared - 1
    checks.holds("indices_dtype", f"wide enough for expert {last}", last <= largest, name)
    if options.identity_weights is not None:
        checks.array("identity_weights", options.identity_weights, (torch.float32,), (1,), like=like)
        checks.shape("identity_weights", options.identity_weights, (num_tokens,), "(num_tokens,)")
    if options.expert_scale is not None:
        checks.array("expert_scale", options.expert_scale, (torch.float32,), (1,), like=like)
        checks.shape("expert_scale", options.expert_scale, (num_experts,), "(num_experts,)")
    padding = which_kernel.padding_of(options, num_tokens, like)
    dispatch = which_kernel.NO_DISPATCH
    if options.dispatch is not None:
        checks.tuple_of("dispatch", options.dispatch, 5)
        tables = DispatchTables(*options.dispatch.values)
        ids = Layout(torch.Size((num_tokens, top_k + num_shared)), torch.int32, gating_output.device, None, 0)
        dispatch = check_dispatch(ids, tables)
        if tables.algorithm != "fake":
            num_real = num_experts - num_zero
            checks.at_least("len(dispatch.physical_map)", dispatch.num_rows, num_real + num_shared, "experts")
    counters = (0, 1, 0)
    if options.counts is not None:
        checks.array("counts", options.counts, checks.IDS, (1, 2), like=like)
        *rows, num_counts = options.counts.shape
        count_rows = rows[0] if rows else 1
        checks.holds("counts", "of a power of two of rows", count_rows.bit_count() == 1, f"{count_rows} rows")
        checks.fits_int32("counts", count_rows * num_counts, "the number of counters")
        counters = (num_counts, count_rows, options.counts.dtype.itemsize)
    if options.counts_enabled is not None:
        checks.array("counts_enabled", options.counts_enabled, (torch.int32,), (1,), like=like)
        checks.shape("counts_enabled", options.counts_enabled, (1,), "(1,)")
    return Extras(
        Adjusting(logit_bias, float(options.softcap)),
        padding,
        ZeroExperts(num_experts - num_zero, zero_expert_id, options.identity_weights),
        SharedExperts(num_shared, shared_factor, int(not renormalize and weight is None)),
        Scaling(options.expert_scale, float(options.renormalize_epsilon)),
        dispatch,
        Counting(which_kernel.sized(options.counts), options.counts_enabled, *counters),
        ID_DTYPES[name].itemsize,
    )


def plan_selection(given: Any, options: Options) -> which_kernel.GatingPlan:
    """Check everything about a selection, and plan it."""
    gating_output, factor = given.gating_output, given.routed_scaling_factor
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    top_k = checks.integer("top_k", given.top_k, 1)
    checks.choice("bias_mode", given.bias_mode, BIAS_MODES)
    logit_bias, correction_bias = biases_of(given)
    extras = _check(gating_output, top_k, given.renormalize, factor, logit_bias, options)
    which_kernel.check_bias(logit_bias, gating_output)
    rules = (
        *(gating_output, top_k, given.num_expert_group, given.topk_group, given.renormalize, given.scoring_func),
        *(correction_bias, given.group_score, factor if options.apply_routed_scaling_factor_on_output else 1.0),
    )
    if options == NONE and logit_bias is None:
        return which_kernel.grouped_plan(*rules)
    only_counts = logit_bias is None and options._replace(counts=None, counts_enabled=None) == NONE
    return which_kernel.grouped_plan(*rules, extras, COUNTING if only_counts else EXTENDED)


def biases_of(given: Any) -> tuple[Any, Any]:
    """Return the bias that is added to logits, and the one that moves the choice alone."""
    bias = given.correction_bias
    return (bias, None) if given.bias_mode == "logits" else (None, bias)


def check_data(given: Any) -> None:
    """Check the logits of tokens that are no padding, and the places that ids may become."""
    check_places(given)
    padded = torch.zeros(len(given.gating_output), dtype=torch.bool, device=given.gating_output.device)
    if given.num_token_non_padded is not None:
        rows = torch.arange(len(padded), dtype=torch.int64, device=padded.device)
        padded |= rows >= given.num_token_non_padded
    if given.is_padding is not None:
        padded |= given.is_padding
    checks.logits("gating_output", given.gating_output.masked_fill(padded[:, None], 0))


def check_places(given: Any) -> None:
    """Check that the dtype of ids holds every place that they may become; this reads the map of places."""
    if given.dispatch is not None:
        name = str(given.indices_dtype).removeprefix("torch.")
        places = given.dispatch[0].cpu().numpy()
        rule = f"at most {LARGEST_IDS[name]}, the largest {name}, which `indices_dtype` is"
        checks.every("dispatch.physical_map", rule, places <= LARGEST_IDS[name], places, ("row", "column"))


def answer_by(twin: Callable[..., Any], given: Any) -> Any:
    """Answer a call of the CPU by the reference."""
    check_places(given)
    arguments = given._asdict()
    del arguments["out"]
    arguments["indices_dtype"] = str(given.indices_dtype).removeprefix("torch.")
    if given.softcap == math.inf:
        arguments["softcap"] = 0.0
    return by_reference(twin, **arguments)


@op(reference.select_experts, writes=("identity_weights", "counts"), tallies=("counts",), like=choose.grouped_topk)
def select_experts(
    gating_output: Array,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    correction_bias: Array | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
    expert_scale: Array | None = None,
    softcap: float = 0.0,
    bias_mode: str = "choice",
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    zero_expert_id: int = -1,
    identity_weights: Array | None = None,
    num_token_non_padded: Array | None = None,
    is_padding: Array | None = None,
    dispatch: DispatchTables | None = None,
    counts: Array | None = None,
    counts_enabled: Array | None = None,
    indices_dtype: Any = "int32",
    out: TopK | None = None,
) -> TopK:
    """Choose the experts of each token; one function has the options of all kinds of gating.

    Parameters
    ----------
    renormalize_epsilon : float
        Added to the sum that `renormalize` divides by, if that sum is positive: 0, or at least 1e-30.
    num_expert_group : int
        Number of groups. Consecutive experts form a group, and all groups have the same size. The best `topk_group`
        groups of a token are chosen first.
    group_score : {"max", "top2_sum", "topk_sum"}, optional
        How a group is scored, as in `grouped_topk`. It has no effect with one group.
    expert_scale : array of float32, shape [num_experts], optional
        Factors of the experts' weights, applied after renormalising, as in Gemma 4.
    softcap : float
        Cap of the logits: a finite logit x becomes ``softcap * tanh(x / softcap)``. 0 and infinity mean no cap.
    bias_mode : {"choice", "logits"}
        "choice": the correction bias changes which experts are chosen, not their weights. "logits": it is added to the
        logits after the cap, so it changes the weights too, as in SGLang's softmax gating.
    num_fused_shared_experts : int
        Number of shared-expert slots appended to each token. Their ids are num_real, num_real + 1, ..., where num_real
        is ``num_experts - num_zero_experts``. Each has the sum of the token's chosen scores as its weight, or 1 with
        `renormalize`.
    shared_expert_weight : float, optional
        The weight of each shared expert, instead of the sum or 1, and divided by nothing.
    apply_routed_scaling_factor_on_output : bool
        Multiply the weights by `routed_scaling_factor`. Otherwise the caller scales the layer's output by it, and the
        weights of shared experts are divided by it here.
    num_zero_experts : int
        Number of zero experts, the last ones. A zero expert returns a token unchanged. Its slots get the id
        `zero_expert_id` and weight 0.
    zero_expert_id : int
        Id written for a zero expert: -1, or the id of a real expert, whose output then has weight 0 (vLLM writes 0).
    identity_weights : array of float32, shape [num_tokens], optional
        Written: the sum of the weights of each token's zero experts.
    num_token_non_padded : array of int32 or int64, shape [1] or [], optional
        Number of real tokens, on the device. The tokens after them are padding and get ids of -1 and weights of 0.
    is_padding : array of bool, shape [num_tokens], optional
        True for each token that is padding.
    dispatch : DispatchTables, optional
        Return physical ids: the ids are mapped as `placement.dispatch_ids` maps them with these tables.
        `ExpertDispatch.tables` makes them for a layer. Zero experts are not mapped.
    counts : array of int32 or int64, shape [any] or [rows, any], optional
        Written: 1 is added to the counter of each slot's returned id, if that id has a counter. Padding and zero
        experts are not counted. Token t adds to row ``t % rows``, and `rows` must be a power of two. With 32 rows fewer
        threads add to the same counter at once, which is faster for many tokens.
    counts_enabled : array of int32, shape [1], optional
        A switch on the device: nothing is counted while it holds 0.
    indices_dtype : {"int32", "int64", "int16"}
        Dtype of `topk_ids`: its name, or a dtype object of that name. A physical id of `dispatch` that it cannot hold
        is an error on the CPU, and -1, for no place, on the GPU, where nobody reads the map beforehand.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k + num_fused_shared_experts], best first, then shared experts.
        topk_ids : of the same shape, distinct in each row except for ids that mean no expert.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape or layout, mixed devices, experts not divisible by groups, more groups or experts than exist,
        unknown names, ids that `indices_dtype` cannot hold, numbers past float32, `identity_weights` where a gradient
        is wanted, arrays to be written that share memory with each other or another argument.

    Notes
    -----
    The lower group and the lower expert win a tie. Capped logits, and logits with a bias, are compared as float32. The
    op is one launch on the caller's current stream without synchronising. CUDA graphs can capture it, and it reads
    padding, tables and flags on the device. It allocates the results only (above 1024 experts or 32 groups, and for a
    "topk_sum" of more than two, also one float32 per token and group). The weights have a gradient by logits that
    require one, of first order, with every option, and by a bias that is added to logits; one that moves the choice has
    none. To count for a recorder, pass ``counts=recorder.layer_counts(layer), counts_enabled=recorder.enabled``.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, -3, 1, 2]], np.float32)
    >>> select_experts(logits, 2, scoring_func="raw", renormalize=True)
    TopK(topk_weights=array([[0.6, 0.4]], dtype=float32), topk_ids=array([[0, 3]], dtype=int32))
    >>> counts = np.zeros(4, np.int64)
    >>> select_experts(logits, 2, counts=counts, indices_dtype="int64").topk_ids, counts
    (array([[0, 3]]), array([1, 0, 0, 1]))
    """


@select_experts.outputs
def _(given: Any) -> tuple[Contiguous, Contiguous]:
    return outputs_of(given, given.top_k)


@select_experts.plan
def _(given: Any) -> which_kernel.GatingPlan:
    return plan_selection(given, options_of(given))


@select_experts.validate
def _(given: Any) -> None:
    check_data(given)


@select_experts.on_cpu
def _(given: Any) -> Any:
    return answer_by(reference.select_experts, given)


@select_experts.run
def _(plan: which_kernel.GatingPlan, given: Any, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    logit_bias, correction_bias = biases_of(given)
    extras = {} if plan.role == PLAIN else {"logit_bias": logit_bias, **extra_arrays(given)}
    choose.choose(plan, given.gating_output, correction_bias, topk_weights, topk_ids, **extras)


@select_experts.saves
def keep_selection(ctx: Any, given: Any, topk_weights: Any, topk_ids: Any, *_: Any) -> None:
    """Keep what the gradient of a selection needs."""
    if _is_plain(given):
        rules = (given.scoring_func, given.renormalize, given.routed_scaling_factor)
        choose.keep(ctx, given.gating_output, topk_weights, topk_ids, *rules)
    else:
        keep_choice(ctx, given, topk_ids, biases_of(given)[0], _choose_again)


@select_experts.backward
def backward(ctx: Any, grad_weights: torch.Tensor) -> dict[str, Any]:
    """Return the gradient by the logits, and by a bias that is added to them, of what was kept."""
    if len(ctx.rules) == 3:
        return choose.backward(ctx, grad_weights)
    logits, picked, logit_bias, expert_scale = ctx.saved_tensors
    rules, name = ctx.rules
    arguments, rules = (logits, picked, grad_weights), {**rules, "logit_bias": logit_bias, "expert_scale": expert_scale}
    found: dict[str, Any] = {"gating_output": selection_backward(*arguments, **rules)}
    if name is not None:
        found[name] = selection_backward(*arguments, by_adjusted=True, **rules).sum(0)
    if ctx.scale_has_gradient:
        found["expert_scale"] = _by_expert_scale(*arguments, logit_bias, rules)
    return found


def _by_expert_scale(logits: Any, picked: Any, grad_weights: Any, logit_bias: Any, rules: dict[str, Any]) -> Any:
    """Return the gradient by the scales of experts: that by each weight, times the weight before its scale."""
    top_k = grad_weights.shape[1] - rules["num_fused_shared_experts"]
    picked, bias = picked[:, :top_k].contiguous(), None if logit_bias is None else logit_bias.detach()
    weights = weigh_experts(logits.detach(), picked, logit_bias=bias, **{name: rules[name] for name in UNSCALED})
    by_pick, num_experts = weights.topk_weights * grad_weights[:, :top_k], logits.shape[1]
    places = torch.where(picked < 0, num_experts, picked).to(torch.int64)
    return by_pick.new_zeros(len(picked), num_experts + 1).scatter_add(1, places, by_pick).sum(0)[:num_experts]


@select_experts.refuse
def refuse(given: Any) -> None:
    """Refuse what has no gradient where one is wanted."""
    rule = "None where a gradient is wanted, as what is written has none"
    checks.holds("identity_weights", rule, given.identity_weights is None, "memory to write")


def _is_plain(given: Any) -> bool:
    """Whether a selection has no option that its gradient depends on."""
    defaults = {**NONE._asdict(), "bias_mode": "choice", "counts": given.counts, "counts_enabled": given.counts_enabled}
    return all(
        getattr(given, name) is default or (default is not None and getattr(given, name) == default)
        for name, default in defaults.items()
    )


def keep_choice(ctx: Any, given: Any, topk_ids: Any, logit_bias: Any, again: Callable[[Any], torch.Tensor]) -> None:
    """Keep what the gradient with options needs; `again` chooses once more where ids are not those of experts."""
    picked = topk_ids
    if given.dispatch is not None or given.num_zero_experts:
        picked = again(given)
    if picked.dtype != torch.int32:
        picked = picked.to(torch.int32)
    ctx.save_for_backward(given.gating_output, picked, logit_bias, given.expert_scale)
    rules = {name: getattr(given, name) for name in RULES}
    if given.softcap == math.inf:
        rules["softcap"] = 0.0
    has_gradient = logit_bias is not None and logit_bias.requires_grad
    name = "correction_bias" if "correction_bias" in given._fields else "logit_bias"
    ctx.rules = (rules, name if has_gradient else None)
    ctx.scale_has_gradient = given.expert_scale is not None and given.expert_scale.requires_grad


def _choose_again(given: Any) -> torch.Tensor:
    arguments = {name: getattr(given, name) for name in CHOOSING}
    return select_experts(given.gating_output.detach(), given.top_k, **arguments).topk_ids


def _give_again(given: Any) -> torch.Tensor:
    padding = {name: getattr(given, name) for name in ("input_ids", *PADDING)}
    return weigh_experts(given.gating_output.detach(), given.topk_ids, **padding).topk_ids


@op(reference.weigh_experts, writes=("identity_weights", "counts"), tallies=("counts",), like=select_experts)
def weigh_experts(
    gating_output: Array,
    topk_ids: Array,
    *,
    input_ids: Array | None = None,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    routed_scaling_factor: float = 1.0,
    expert_scale: Array | None = None,
    softcap: float = 0.0,
    logit_bias: Array | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    zero_expert_id: int = -1,
    identity_weights: Array | None = None,
    num_token_non_padded: Array | None = None,
    is_padding: Array | None = None,
    dispatch: DispatchTables | None = None,
    counts: Array | None = None,
    counts_enabled: Array | None = None,
    indices_dtype: Any = "int32",
    out: TopK | None = None,
) -> TopK:
    """Weigh experts that were chosen before: recorded ones, or those that a table lists for each token id.

    Parameters
    ----------
    topk_ids : array of int32, int64 or int16, shape [num_tokens, top_k]
        The experts. Ids outside ``[0, num_experts)`` become -1 with weight 0.
    input_ids : array of int32 or int64, shape [num_tokens], optional
        The row of `topk_ids` that each token takes (hash routing). `topk_ids` is then a table [any, top_k]. A token
        whose row is outside the table has no experts.
    logit_bias : array of float32, shape [num_experts], optional
        Added to the logits, after the cap.

    Returns
    -------
    TopK
        topk_weights : float32 [num_tokens, top_k + num_fused_shared_experts]. topk_ids : of the same shape, in the
        order in which they are given.

    Notes
    -----
    The op is one launch on the caller's current stream without synchronising, and CUDA graphs can capture it. It
    allocates the results only.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, -3, 1, 2], [1, 1, 2, 0]], np.float32)
    >>> weigh_experts(logits, np.array([[2, 0], [1, -1]]), scoring_func="raw", renormalize=True)
    TopK(topk_weights=array([[0.25, 0.75],
           [1.  , 0.  ]], dtype=float32), topk_ids=array([[ 2,  0],
           [ 1, -1]], dtype=int32))
    """


@weigh_experts.outputs
def _(given: Any) -> tuple[Contiguous, Contiguous]:
    return outputs_of(given, given.topk_ids.shape[1])


@weigh_experts.plan
def _(given: Any) -> Launch:
    options, gating_output, topk_ids = options_of(given), given.gating_output, given.topk_ids
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    like = ("gating_output", gating_output)
    num_tokens, num_experts = gating_output.shape
    checks.integer("num_experts (columns of `gating_output`)", num_experts, 1)
    checks.array("topk_ids", topk_ids, GIVEN_IDS, (2,), like=like)
    num_given, top_k = topk_ids.shape
    checks.integer("top_k (columns of `topk_ids`)", top_k, 1)
    checks.fits_int32("topk_ids", num_given, "the number of rows")
    if given.input_ids is not None:
        checks.array("input_ids", given.input_ids, checks.IDS, (1,), like=like)
        checks.shape("input_ids", given.input_ids, (num_tokens,), "(num_tokens,)")
    else:
        checks.shape("topk_ids", topk_ids, (num_tokens, top_k), "(num_tokens, top_k)")
    checks.choice("scoring_func", given.scoring_func, SCORING)
    checks.boolean("renormalize", given.renormalize)
    if given.logit_bias is not None:
        checks.array("logit_bias", given.logit_bias, (torch.float32,), (1,), like=like)
        checks.shape("logit_bias", given.logit_bias, (num_experts,), "(num_experts,)")
    factor = given.routed_scaling_factor
    extras = _check(gating_output, top_k, given.renormalize, factor, given.logit_bias, options)
    checks.fits_int32("gating_output", num_tokens * (top_k + extras.shared.num_shared), "num_tokens * top_k")
    on_output = factor if options.apply_routed_scaling_factor_on_output else 1.0
    rows = which_kernel.rows_of(gating_output, 4 * which_kernel.in_vectors(gating_output, num_experts))
    id_bytes = given.input_ids.dtype.itemsize if given.input_ids else 0
    already = already_given.Given(topk_ids, which_kernel.sized(given.input_ids), num_given, id_bytes)
    weighing = Weighting(top_k, SCORING.index(given.scoring_func), int(given.renormalize), float(on_output))
    records = (rows, already, weighing, Chosen(torch.float32, torch.int32), extras)
    return Launch(already_given.weigh_given, gating_output.device, *warps(num_tokens), *records)


@weigh_experts.validate
def _(given: Any) -> None:
    check_data(given)
    checks.ids(given.topk_ids, given.gating_output.shape[1])


@weigh_experts.on_cpu
def _(given: Any) -> Any:
    return answer_by(reference.weigh_experts, given)


@weigh_experts.run
def _(weigh: Any, given: Any, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    weigh(
        gating_output=given.gating_output,
        given_ids=given.topk_ids,
        input_ids=given.input_ids,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        logit_bias=given.logit_bias,
        **extra_arrays(given),
    )


@weigh_experts.saves
def _(ctx: Any, given: Any, _: Any, topk_ids: Any) -> None:
    keep_choice(ctx, given, topk_ids, given.logit_bias, _give_again)


weigh_experts.backward(backward)
weigh_experts.refuse(refuse)
