"""Gradients of weights with every option of a selection: the twin by torch in float64, kernels by the twin."""

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.placement import DispatchTables
from numba_moe.verify import testing

TOKENS, EXPERTS, TOP_K = 5, 12, 3
PLACES = torch.full((EXPERTS + 2, 2), -1, dtype=torch.int32)
PLACES[:, 0] = torch.arange(EXPERTS + 2, dtype=torch.int32).flip(0) + 4
PLACES[:4, 1] = torch.arange(4)
VALID = (PLACES >= 0).sum(1).int()
BIAS = torch.linspace(-0.4, 0.4, EXPERTS)

SCALE = torch.from_numpy(np.random.default_rng(5).uniform(-2, 2, EXPERTS).astype(np.float32))
# Options of select_experts and route, by what they are about.
PLACED = {"dispatch": DispatchTables(PLACES, VALID, "hash")}
LATER = {"routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": False}
OPTIONS = {
    "plain": {},
    "renormalize": {"renormalize": True, "routed_scaling_factor": 2.5},
    "softcap": {"softcap": 1.5},
    "no cap": {"softcap": float("inf")},
    "correction_bias": {"correction_bias": BIAS, "renormalize": True},
    "groups": {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": -2.0, "softcap": 2.0},
    "bias in logits": {"correction_bias": BIAS, "bias_mode": "logits", "renormalize": True},
    "bias and cap": {"correction_bias": BIAS, "bias_mode": "logits", "softcap": 1.5},
    "shared": {"num_fused_shared_experts": 2, "routed_scaling_factor": 2.5},
    "shared, factor later": {"num_fused_shared_experts": 1, **LATER},
    "shared, renormalised": {"num_fused_shared_experts": 1, "renormalize": True},
    "factor of 0": {"num_fused_shared_experts": 1, "routed_scaling_factor": 0.0},
    "shared, of one weight": {"num_fused_shared_experts": 2, "shared_expert_weight": 0.25, **LATER},
    "epsilon": {"renormalize": True, "renormalize_epsilon": 0.5, "routed_scaling_factor": 2.5},
    "scales": {"expert_scale": SCALE, "renormalize": True, "num_fused_shared_experts": 1},
    "scales, not renormalised": {"expert_scale": SCALE, "correction_bias": BIAS, "bias_mode": "logits", "softcap": 2.0},
    "scales of zero experts": {"expert_scale": SCALE, "num_zero_experts": 4, "renormalize_epsilon": 0.25, **PLACED},
    "zero experts": {"num_zero_experts": 4, "renormalize": True},
    "zero experts, not renormalised": {"num_zero_experts": 4, "zero_expert_id": 0, "softcap": 3.0},
    "num_token_non_padded": {"num_token_non_padded": torch.tensor([3])},
    "is_padding": {"is_padding": torch.arange(TOKENS) % 2 == 1, "num_fused_shared_experts": 1},
    "dispatch": {**PLACED, "num_fused_shared_experts": 2},
    "int64": {"indices_dtype": "int64"},
    "int16": {"indices_dtype": "int16", "renormalize": True},
    "counts": {"counts": torch.zeros(EXPERTS, dtype=torch.int64)},
    "counts of places": {"counts": torch.zeros(2, 20, dtype=torch.int32), **PLACED, "renormalize": True},
}  # fmt: skip
SCORING = tuple(reference.gating.SCORING)
SCORES = {
    "softmax": lambda x: x.softmax(1),
    "sigmoid": torch.sigmoid,
    "softplus_sqrt": lambda x: torch.nn.functional.softplus(x).sqrt(),
    "raw": lambda x: x,
}


def drawn(seed=0, tokens=TOKENS):
    """Draw positive logits, so that the sums of raw ones are too."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 3.0, (tokens, EXPERTS)).astype(np.float32))


def by_torch(logits, topk_ids, bias, options):
    """Weigh chosen experts, -1 for none, by torch's own functions."""
    softcap = options.get("softcap", 0.0)
    if 0 < softcap < float("inf"):
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    num_real = EXPERTS - options.get("num_zero_experts", 0)
    known = (topk_ids >= 0) & (topk_ids < EXPERTS)
    ids = topk_ids.long().clamp(0, EXPERTS - 1)
    chosen = torch.where(known, SCORES[options["scoring_func"]](logits).gather(1, ids), 0.0)
    total = chosen.sum(1, keepdim=True)
    weights, shared = chosen, total
    if options.get("renormalize"):
        divisor = torch.where(total == 0, 1.0, total + options.get("renormalize_epsilon", 0.0))
        weights, shared = chosen / divisor, torch.ones_like(total)
    if options.get("expert_scale") is not None:
        weights = weights * options["expert_scale"].to(weights)[ids]
    factor = options.get("routed_scaling_factor", 1.0)
    if options.get("apply_routed_scaling_factor_on_output", True):
        weights = weights * factor
    else:
        shared = shared / factor
    if options.get("shared_expert_weight") is not None:
        shared = torch.full_like(shared, options["shared_expert_weight"])
    weights = torch.where(known & (ids < num_real), weights, 0.0)
    shared = torch.where(known.any(1, keepdim=True), shared, 0.0)
    return torch.cat([weights, shared.expand(-1, options.get("num_fused_shared_experts", 0))], 1)


def chosen_by(options):
    """Choose the experts of each token, before they are sent anywhere."""
    kept = ("scoring_func", "correction_bias", "bias_mode", "softcap", "num_expert_group", "topk_group")
    kept += ("num_token_non_padded", "is_padding")
    return moe.select_experts(drawn(), TOP_K, **{name: options[name] for name in kept if name in options}).topk_ids


def given_to(options, device="cpu"):
    """Copy what a call writes, and put everything where it runs."""

    def move(value):
        return value.clone().to(device) if isinstance(value, torch.Tensor) else value

    return {
        name: DispatchTables(*map(move, value)) if isinstance(value, tuple) else move(value)
        for name, value in options.items()
    }


def ops(options):
    """Yield calls of logits: of the three ops."""
    yield "select_experts", lambda logits, given: moe.select_experts(logits, TOP_K, **given)
    places = {"num_physical_experts": 18} if "dispatch" in options else {}

    def route(logits, given):
        return moe.route(logits, TOP_K, block_size=4, **given, **places).topk

    yield "route", route
    ids = chosen_by(options)

    def weigh(logits, given):
        given = dict(given)
        for name in ("num_expert_group", "topk_group", "correction_bias", "bias_mode"):
            value = given.pop(name, None)
            if name == "correction_bias" and options.get("bias_mode") == "logits":
                given["logit_bias"] = value
        return moe.weigh_experts(logits, ids.to(logits.device), **given)

    yield "weigh_experts", weigh


def check(options, call, device="cpu", tolerance=1e-5):
    logits = drawn().to(device).requires_grad_()
    given = given_to(options, device)
    with_bias = options.get("bias_mode") == "logits"
    wanted_bias = options["correction_bias"].double().requires_grad_() if with_bias else None
    if with_bias:
        given["correction_bias"].requires_grad_()
    exact_options = options
    if "expert_scale" in options:
        given["expert_scale"].requires_grad_()
        exact_options = {**options, "expert_scale": options["expert_scale"].double().requires_grad_()}
    found = call(logits, given)
    grad = torch.from_numpy(np.random.default_rng(1).standard_normal(found.topk_weights.shape)).float().to(device)
    found.topk_weights.backward(grad)
    exact = drawn().double().requires_grad_()
    weights = by_torch(exact, chosen_by(options), wanted_bias, exact_options)
    torch.testing.assert_close(found.topk_weights.double().cpu(), weights, rtol=1e-5, atol=1e-6)
    weights.backward(grad.double().cpu())
    scale = exact.grad.abs().max().clamp_min(1e-30)
    assert (logits.grad.cpu() - exact.grad).abs().max() <= tolerance * scale
    if with_bias:
        bias = given["correction_bias"].grad.double().cpu()
        torch.testing.assert_close(bias, wanted_bias.grad, rtol=1e-4, atol=1e-5 * float(scale))
    if "expert_scale" in options:
        by_scale = given["expert_scale"].grad.double().cpu()
        torch.testing.assert_close(by_scale, exact_options["expert_scale"].grad, rtol=1e-4, atol=1e-5)
    if "counts" in options:
        again = given_to(options)
        moe.select_experts(drawn(), TOP_K, **again)
        assert torch.equal(given["counts"].cpu(), again["counts"])
        assert again["counts"].sum() == TOKENS * TOP_K


@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_by_torch_in_float64(name, scoring_func):
    options = {"scoring_func": scoring_func, **OPTIONS[name]}
    for _, call in ops(options):
        check(options, call)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_as_eager(name):
    options = {"scoring_func": SCORING[sum(map(ord, name)) % 4], **OPTIONS[name]}
    for op, call in ops(options):
        if op == "select_experts" or name in ("dispatch", "counts of places", "bias and cap"):
            torch._dynamo.reset()
            check(options, torch.compile(call, backend="aot_eager", fullgraph=True))


KERNELS = [
    *(pytest.param(name, SCORING[place % 4], id=f"{name}-{SCORING[place % 4]}") for place, name in enumerate(OPTIONS)),
    *(pytest.param(name, one, marks=pytest.mark.slow, id=f"{name}-{one}") for name in OPTIONS for one in SCORING),
]


@pytest.mark.sweep(8)
@pytest.mark.parametrize(("name", "scoring_func"), KERNELS)
def test_kernels_by_torch_in_float64(name, scoring_func, device):
    options = {"scoring_func": scoring_func, **OPTIONS[name]}
    for op, call in ops(options):
        if op == "weigh_experts" or name in ("dispatch", "counts", "zero experts"):
            check(options, call, device)


@pytest.mark.parametrize("scoring_func", SCORING)
def test_given_experts_that_are_none_or_come_twice(scoring_func, device):
    ids = torch.tensor([[0, 0, 5], [-1, 3, 99], [-1, -1, -1], [2, 7, 2], [1, 2, 3]], dtype=torch.int32, device=device)
    for renormalize in (False, True):
        options = {"scoring_func": scoring_func, "renormalize": renormalize}
        logits = drawn().to(device).requires_grad_()
        weights = moe.weigh_experts(logits, ids, **options).topk_weights
        grad = torch.linspace(-1, 2, 15, device=device).view(5, 3)
        weights.backward(grad)
        exact = drawn().double().requires_grad_()
        by_torch(exact, ids.cpu(), None, options).backward(grad.double().cpu())
        torch.testing.assert_close(logits.grad.double().cpu(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("experts", [12, 301])
def test_dtypes_and_strides(dtype, experts, device):
    logits = testing.random_floats(np.random.default_rng(0), (3, experts), dtype)
    rows = testing.to_device(logits, device, dtype, strided=True).requires_grad_()
    found = moe.select_experts(rows, 4, softcap=2.0, num_fused_shared_experts=1)
    grad = np.random.default_rng(1).standard_normal(found.topk_weights.shape).astype(np.float32)
    (by_logits,) = torch.autograd.grad(found.topk_weights, rows, torch.from_numpy(grad).to(device))
    ids = testing.to_numpy(found.topk_ids)
    wanted = reference.selection.selection_backward(
        testing.to_numpy(rows), ids, grad, softcap=2.0, num_fused_shared_experts=1
    )
    assert by_logits.dtype == rows.dtype
    assert not testing.compare(by_logits, wanted).mismatches


def test_by_the_id_of_a_token(device):
    table = torch.tensor([[0, 1, 2], [5, 4, 3], [9, 10, 11]], device=device)
    tokens = torch.tensor([2, 0, 1, 7, 1], device=device)
    logits = drawn().to(device).requires_grad_()
    moe.weigh_experts(logits, table, input_ids=tokens, renormalize=True).topk_weights[:, 0].sum().backward()
    exact = drawn().double().requires_grad_()
    ids = torch.where((tokens < 3)[:, None], table[tokens.clamp_max(2)], -1).cpu()
    by_torch(exact, ids, None, {"scoring_func": "softmax", "renormalize": True})[:, 0].sum().backward()
    torch.testing.assert_close(logits.grad.double().cpu(), exact.grad, rtol=1e-5, atol=1e-6)


def test_second_derivatives_and_memory_are_refused():
    logits = drawn().requires_grad_()
    weights = moe.select_experts(logits, TOP_K, softcap=2.0).topk_weights
    (grad,) = torch.autograd.grad(weights.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
    out = reference.TopK(torch.zeros(TOKENS, TOP_K), torch.zeros(TOKENS, TOP_K, dtype=torch.int32))
    with pytest.raises(ValueError, match="`gating_output` must be without a gradient for these options"):
        moe.select_experts(logits, TOP_K, softcap=2.0, out=out)
    with pytest.raises(ValueError, match="`identity_weights` must be None where a"):
        moe.select_experts(logits, TOP_K, num_zero_experts=2, identity_weights=torch.zeros(TOKENS))


def test_transforms_of_torch_func():
    grad = torch.func.grad(lambda x: moe.select_experts(x, TOP_K, softcap=2.0).topk_weights[:, 0].sum())(drawn())
    logits = drawn().requires_grad_()
    moe.select_experts(logits, TOP_K, softcap=2.0).topk_weights[:, 0].sum().backward()
    assert torch.equal(grad, logits.grad)
