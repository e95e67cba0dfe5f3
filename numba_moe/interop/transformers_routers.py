"""Routers of Hugging Face transformers (version 5) that choose by `numba_moe.select_experts`, in one launch.

A router's own forward is a product with its weight, and then a softmax or sigmoid, a top-k and more, each a launch of
torch's. Which of our gates does the same is found by trying them on a copy of the router with random weights, so a
router that does something else keeps its own.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from numba_moe.ops.gating.select import select_experts, weigh_experts
from numba_moe.reference.gating import TopK
from numba_moe.runtime.arrays import is_traced
from numba_moe.training import tape

# How near weights must be to the router's own.
SAME = 1e-5
TOKENS = 24
# What routers call what moves the choice alone, their groups, their factor, and whether they renormalise.
BIASES = ("e_score_correction_bias",)
GROUPS = (("num_group", "topk_group"), ("n_group", "topk_group"), ("num_expert_group", "topk_group"))
FACTOR, RENORMALISES = "routed_scaling_factor", "norm_topk_prob"


class Rule(NamedTuple):
    """How a router chooses; names are those of its attributes, which are read at every call."""

    linear_bias: str | None
    scoring_func: str
    correction_bias: str | None
    groups: tuple[str, str] | None
    factor: str | None
    renormalize: bool | str
    in_float32: bool = False  # the product with the weight
    logits_in_float32: bool = False  # what becomes of the product
    scores_like: str = "logits"  # whose dtype weights have: "logits", "rows", or "float32"
    others: tuple[tuple[str, Any], ...] = ()  # what else the router's own forward reads; with other values it runs


def route(router: Any, rule: Rule, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, weights and ids of experts, as a router of transformers does."""
    if any(getattr(router, name) != value for name, value in rule.others):
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = type(router).forward(router, hidden_states)
        return found
    rows = hidden_states.reshape(-1, router.weight.shape[1])
    bias = None if rule.linear_bias is None else getattr(router, rule.linear_bias)
    if rule.in_float32:
        rows, weight, bias = rows.float(), router.weight.float(), None if bias is None else bias.float()
    else:
        weight = router.weight
    logits = torch.nn.functional.linear(rows, weight, bias)
    if rule.logits_in_float32:
        logits = logits.float()
    options: dict[str, Any] = {"scoring_func": rule.scoring_func}
    name = rule.renormalize
    options["renormalize"] = bool(getattr(router, name)) if isinstance(name, str) else name
    if rule.correction_bias is not None:
        options["correction_bias"] = getattr(router, rule.correction_bias).float()
    if rule.groups is not None:
        options["num_expert_group"], options["topk_group"] = (getattr(router, name) for name in rule.groups)
        options["group_score"] = "max" if rule.correction_bias is None else "top2_sum"
    if rule.factor is not None:
        options["routed_scaling_factor"] = float(getattr(router, rule.factor))
    weighing = {
        name: options[name] for name in ("scoring_func", "renormalize", "routed_scaling_factor") if name in options
    }

    def select() -> TopK:
        return select_experts(logits, router.top_k, indices_dtype="int64", **options)

    def weigh(ids: torch.Tensor) -> TopK:
        return weigh_experts(logits, ids, indices_dtype="int64", **weighing)

    replay, layer = getattr(router, "replay", None) or (None, 0)
    if replay is not None and replay.is_active:
        chosen = replay.steer(layer, len(logits), select, weigh)
    else:
        chosen = tape.choose(select, weigh) if not is_traced() and tape.is_steered() else select()
    dtype = {"logits": logits.dtype, "rows": hidden_states.dtype, "float32": torch.float32}[rule.scores_like]
    return logits, chosen.topk_weights.to(dtype), chosen.topk_ids.to(torch.int64)


def _candidates(router: Any) -> Iterator[Rule]:
    """Yield rules; those that use more of a router's attributes come first."""

    def there(*names: str) -> tuple[str | None, ...]:
        return (*(name for name in names if getattr(router, name, None) is not None), None)

    groups = [pair for pair in GROUPS if all(getattr(router, name, None) for name in pair)]
    norms: list[bool | str] = [True, False] if getattr(router, RENORMALISES, None) is None else [RENORMALISES]
    yield from itertools.starmap(
        Rule,
        itertools.product(
            *(there("bias"), ("softmax", "sigmoid"), there(*BIASES)),
            *((*groups, None), there(FACTOR), norms),
        ),
    )


@torch.no_grad()
def find_rule(router: Any) -> Rule | None:
    """Return the rule that does what a router does, None if none does; it is tried on a copy on the CPU."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or type(getattr(router, "top_k", None)) is not int:
        return None
    own = copy.deepcopy(router).to("cpu", torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    for tensor in (*own.parameters(), *own.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
    own.weight /= weight.shape[1] ** 0.5
    rows = torch.randn(TOKENS, weight.shape[1], dtype=torch.float32, device="cpu", generator=generator)
    if isinstance(getattr(own, FACTOR, None), int | float):
        setattr(own, FACTOR, 1.75)
    wanted = _results(own, rows)
    if wanted is None:
        return None
    for rule in _candidates(own):
        try:
            found = route(own, rule, rows)
        except (ValueError, TypeError):  # no such groups, for instance
            continue
        if _same(wanted, found):
            rule = rule._replace(others=_others(router, rule))
            return _of_half(own.to(torch.bfloat16), rule, rows.to(torch.bfloat16))
    return None


def _others(router: Any, rule: Rule) -> tuple[tuple[str, Any], ...]:
    """Return the numbers that a router's own forward reads and a rule does not."""
    read = {"top_k", rule.factor, rule.renormalize, *(rule.groups or ())}
    code = getattr(inspect.unwrap(type(router).forward), "__code__", None)
    pairs = [(name, getattr(router, name, None)) for name in getattr(code, "co_names", ()) if name not in read]
    return tuple((name, value) for name, value in pairs if isinstance(value, bool | int | float))


def _of_half(router: Any, rule: Rule, rows: torch.Tensor) -> Rule | None:
    """Return a rule with the dtypes that a router in bfloat16 has between its steps."""
    wanted = _results(router, rows)
    if wanted is None:
        return None
    logits, weights, _ = wanted
    if weights.dtype != logits.dtype:
        rule = rule._replace(scores_like="rows" if weights.dtype == rows.dtype else "float32")
    if logits.dtype != torch.float32:
        return rule
    ways = [rule._replace(in_float32=wide, logits_in_float32=True) for wide in (False, True)]
    return min(ways, key=lambda way: float((route(router, way, rows)[0] - logits).abs().max()))


def _results(router: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Return the three results of a router's own forward; None if it takes or gives others."""
    try:
        with torch.random.fork_rng(devices=[]):  # for a router that draws
            found = type(router).forward(router, rows)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    shape = (len(rows), router.top_k)
    tensors = isinstance(found, tuple) and len(found) == 3 and all(isinstance(part, torch.Tensor) for part in found)
    return found if tensors and found[1].shape == found[2].shape == shape else None


def _same(wanted: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> bool:
    """Whether two choices are of the same experts with the same weights, in whichever order."""
    if wanted[0].shape != found[0].shape or not torch.allclose(wanted[0], found[0], rtol=SAME, atol=SAME):
        return False
    one, other = (
        torch.zeros_like(found[0]).scatter(1, ids, weights.to(found[0].dtype)) for _, weights, ids in (wanted, found)
    )
    same_ids = torch.equal(wanted[2].sort(1).values, found[2].sort(1).values)
    return same_ids and torch.allclose(one, other, rtol=SAME, atol=SAME)


def replace_routers(model: torch.nn.Module) -> list[str]:
    """Let the routers of a model choose by our kernel.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers, or any with modules whose class is called a router.

    Returns
    -------
    list of str
        The names of the routers that do; others keep their own forward.

    Notes
    -----
    Choices are those of the routers but for ties, which the lower id wins, and for rounding: logits of 16 bits are
    scored in float32. The expert that ranks best comes first. Gradients, hooks, torch.compile and recorded logits work
    as before. A second call looks at all routers again; `restore_routers` undoes it.
    """
    replaced = []
    rules: dict[Any, Rule | None] = {}
    for name, module in model.named_modules():
        if "router" not in type(module).__name__.lower():
            continue
        numbers = sorted((key, value) for key, value in vars(module).items() if isinstance(value, bool | int | float))
        alike = (type(module), getattr(getattr(module, "weight", None), "shape", None), *numbers)
        if alike not in rules:
            rules[alike] = find_rule(module)
        rule = rules[alike]
        if rule is not None:
            module.forward = functools.partial(route, module, rule)
            replaced.append(name)
    return replaced


def is_replaced(router: torch.nn.Module) -> bool:
    """Whether a router chooses by our kernel."""
    forward = vars(router).get("forward")
    return isinstance(forward, functools.partial) and forward.func is route


def restore_routers(model: torch.nn.Module) -> None:
    """Give the routers of a model their own forward back."""
    for module in model.modules():
        if is_replaced(module):
            del module.forward
