"""Routers as they are trained: numerics, capacity, counts, what is computed anew, and starts without memory."""

import functools
import math

import numpy as np
import pytest
import torch
from numba_moe.reference import capacity as twin
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import numba_moe as moe
from numba_moe import training
from numba_moe.interop import torch_ops as torch_ops  # which registers all

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 8, 6, 2


def block(**options):
    torch.manual_seed(0)
    return moe.MoEBlock(HIDDEN, WIDTH, EXPERTS, TOP_K, **options)


def rows(tokens=9):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))


def megatron_dropping(probs, routing_map, capacity, drop_policy):
    """Megatron-LM's apply_router_token_dropping, of which ties are left to torch.topk."""
    by = probs if drop_policy == "probs" else routing_map.int()
    kept = torch.topk(by, k=min(capacity, len(probs)), dim=0, sorted=False).indices
    mask = torch.zeros_like(probs).scatter(0, kept, 1).bool()
    return probs * (routing_map & mask), routing_map & mask


@pytest.mark.parametrize("drop_policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [0, 1, 4, 100])
def test_capacity_as_the_twin_and_megatron_have_it(drop_policy, capacity):
    logits = torch.randn(20, EXPERTS, generator=torch.Generator().manual_seed(2))
    weights, ids = moe.topk_softmax(logits, TOP_K)
    found = training.apply_capacity(weights, ids, EXPERTS, capacity, drop_policy=drop_policy)
    wanted = twin.apply_capacity(weights.numpy(), ids.numpy(), EXPERTS, capacity, drop_policy=drop_policy)
    assert found.topk_ids.dtype == ids.dtype
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))
    routing_map = torch.zeros_like(logits).scatter(1, ids.long(), 1).bool()
    probs, mask = megatron_dropping(logits.softmax(1) * routing_map, routing_map, capacity, drop_policy)
    dense = torch.zeros(20, EXPERTS + 1).scatter_add(1, found.topk_ids.long() % (EXPERTS + 1), found.topk_weights)
    assert torch.equal(dense[:, :EXPERTS] > 0, mask if drop_policy == "probs" else dense[:, :EXPERTS] > 0)
    if drop_policy == "probs":
        torch.testing.assert_close(dense[:, :EXPERTS], probs)
    assert (torch.bincount(found.topk_ids[found.topk_ids >= 0], minlength=EXPERTS) <= capacity).all()


def test_of_equals_the_first_are_kept_and_gradients_go_on(device):
    weights = torch.full((8, 1), 0.5, device=device, requires_grad=True)
    ids = torch.zeros(8, 1, dtype=torch.int32, device=device)
    found = training.apply_capacity(weights, ids, 3, 3)
    assert found.topk_ids.flatten().tolist() == [0, 0, 0, -1, -1, -1, -1, -1]
    found.topk_weights.sum().backward()
    assert weights.grad.flatten().tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_rows_padded_to_the_capacity():
    weights, ids = moe.topk_softmax(torch.randn(20, EXPERTS, generator=torch.Generator().manual_seed(2)), TOP_K)
    capacity = training.expert_capacity(20, TOP_K, EXPERTS, 1.0)
    assert capacity == math.ceil(40 / 6) == twin.expert_capacity(20, TOP_K, EXPERTS, 1.0)
    ids = training.apply_capacity(weights, ids, EXPERTS, capacity).topk_ids
    masked = moe.moe_permute_masked(rows(20), ids, EXPERTS, capacity)
    assert masked.permuted_hidden_states.shape == (EXPERTS, capacity, HIDDEN)
    assert masked.masked_m.sum() == (ids >= 0).sum()  # nothing is dropped any more


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_experts_choose_as_in_the_twin(scoring_func, padded):
    logits = torch.randn(11, EXPERTS, generator=torch.Generator().manual_seed(2)).requires_grad_()
    padding = torch.arange(11) % 3 == 0 if padded else None
    found = training.expert_choice(logits, 9, scoring_func=scoring_func, is_padding=padding)
    options = {"scoring_func": scoring_func, "is_padding": None if padding is None else padding.numpy()}
    wanted = twin.expert_choice(logits.detach().numpy(), 9, **options)
    assert np.array_equal(found.token_ids, wanted.token_ids)
    np.testing.assert_allclose(found.topk_weights.detach(), wanted.topk_weights, rtol=1e-6)
    assert (found.token_ids == -1).sum() == (EXPERTS * 2 if padded else 0)
    (found.topk_weights * torch.arange(1, EXPERTS + 1)[:, None]).sum().backward()
    assert logits.grad.any(1).tolist() == [not (padded and token % 3 == 0) for token in range(11)]
    equal = training.expert_choice(torch.zeros(5, 2), 3)
    assert equal.token_ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_logits_in_float32_and_on_request():
    made = block(router_dtype=torch.float32, dtype=torch.bfloat16)
    given = rows().bfloat16()
    out, logits = made(given, return_router_logits=True)
    assert torch.equal(logits, given.float() @ made.router.weight.float().T)
    assert torch.equal(out, made(given))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(given, return_router_logits=True)[1].dtype == torch.float32
    made = block(return_router_logits=True)
    out, logits = made(rows())
    assert torch.equal(made(rows(), return_router_logits=False), out)
    weights, ids = moe.select_experts(logits, TOP_K)
    assert torch.equal(moe.fused_experts(rows(), made.gate_up_proj, made.down_proj, weights, ids), out)
    loss = training.load_balancing_loss(logits, ids) + training.z_loss(logits)
    loss.backward()
    assert made.router.weight.grad.any()


def test_jitter_and_scale_are_of_the_router_alone():
    made, plain = block(jitter=0.3), block()
    torch.manual_seed(5)
    logits = made.router.logits(rows())
    torch.manual_seed(5)
    noise = torch.empty(9, HIDDEN).uniform_(0.7, 1.3)
    torch.testing.assert_close(logits, (rows() * noise) @ made.router.weight.T)
    assert torch.equal(made.eval()(rows()), plain(rows()))
    scaled = block(input_scale=0.25)
    torch.testing.assert_close(scaled.router.logits(rows()), plain.router.logits(rows()) * 0.25)


def test_weights_on_the_input():
    made = block(apply_router_weight_on_input=True)
    weights, ids = made.router(rows())
    wanted = torch.zeros(9, HIDDEN)
    one = torch.ones(1, 1)
    for token, pick in np.ndindex(9, TOP_K):
        given = rows()[token : token + 1] * weights[token, pick]
        expert = ids[token, pick].view(1, 1)
        wanted[token] += moe.fused_experts(given, made.gate_up_proj, made.down_proj, one, expert)[0]
    torch.testing.assert_close(made(rows()), wanted)


@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 1.0}, {"token_rounding": 4}, {"accumulate_into_grad": True}]
)
def test_no_tokens_with_weights_on_the_input(options):
    made = block(apply_router_weight_on_input=True, **options)
    out = made(rows(0))
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert not made.down_proj.grad.any()


def test_a_block_of_a_capacity():
    made = block(capacity_factor=0.5, drop_policy="position")
    weights, ids = made.router(rows())
    capacity = training.expert_capacity(9, TOP_K, EXPERTS, 0.5)
    assert torch.bincount(ids[ids >= 0], minlength=EXPERTS).max() == capacity == 2
    assert not weights[ids < 0].any()
    made(rows()).sum().backward()
    assert made.router.weight.grad.isfinite().all()


def test_groups_that_are_nodes_limit_how_many_a_token_visits():
    torch.manual_seed(0)
    options = {"num_expert_group": 8, "topk_group": 4, "group_score": "topk_sum", "scoring_func": "sigmoid"}
    made = moe.MoEBlock(HIDDEN, WIDTH, 64, 8, correction_bias=True, **options)
    ids = made.router(rows(50)).topk_ids
    assert max(len(set(row)) for row in (ids // 8).tolist()) == 4


class Stack(torch.nn.Module):
    """Blocks one behind another, each called through a function."""

    def __init__(self, wrap, **options):
        super().__init__()
        self.blocks = torch.nn.ModuleList(block(count_tokens=True, **options) for _ in range(2))
        self.wrap = wrap

    def forward(self, given):
        for one in self.blocks:
            given = given + self.wrap(one, given)
        return given


WRAPS = {
    "plain": lambda one, given: checkpoint(one, given, use_reentrant=False),
    "reentrant": lambda one, given: checkpoint(one, given, use_reentrant=True),
    "same routing": lambda one, given: checkpoint(one, given, use_reentrant=False, context_fn=training.same_routing),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_computed_anew_chooses_the_same_and_counts_once(wrap):
    wanted, found = Stack(lambda one, given: one(given), jitter=0.1), Stack(WRAPS[wrap], jitter=0.1)
    results = []
    for model in (wanted, found):
        given = rows().requires_grad_()
        torch.manual_seed(7)
        out = model(given)
        out.square().sum().backward()
        results.append((out, given.grad, *(p.grad for p in model.parameters())))
        assert [int(one.router.tokens_per_expert.sum()) for one in model.blocks] == [9 * TOP_K] * 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    model = wanted.eval()
    model(rows())
    assert int(model.blocks[0].router.tokens_per_expert.sum()) == 9 * TOP_K


def test_the_same_experts_though_the_bias_moves_before_backward():
    made = block(correction_bias=True, scoring_func="sigmoid", count_tokens=True)
    given = rows().requires_grad_()
    made(given).square().sum().backward()
    wanted, given.grad = given.grad, None
    out = checkpoint(made, given, use_reentrant=False, context_fn=training.same_routing)
    made.router.correction_bias.copy_(torch.randn(EXPERTS) * 10)
    out.square().sum().backward(retain_graph=True)
    torch.testing.assert_close(given.grad, wanted)
    assert int(made.router.tokens_per_expert.sum()) == 2 * 9 * TOP_K


def test_selective_checkpointing_keeps_the_choice():
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append((context.is_recompute, op))
        keeps = op is torch.ops.numba_moe.select_experts.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    made = block()
    given = rows().requires_grad_()
    made(given).square().sum().backward()
    wanted, given.grad = given.grad, None
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(made, given, use_reentrant=False, context_fn=context).square().sum().backward()
    torch.testing.assert_close(given.grad, wanted)
    assert (False, torch.ops.numba_moe.select_experts.default) in seen
    ours = {op for _, op in seen if "numba_moe" in str(op)}
    assert len(ours) > 1, ours


def test_a_start_on_the_meta_device():
    options = {"bias": True, "shared_size": 4, "correction_bias": True, "count_tokens": True}
    wanted = block(**options)
    made = moe.MoEBlock(HIDDEN, WIDTH, EXPERTS, TOP_K, device="meta", **options).to_empty(device="cpu")
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data.fill_(77)
    torch.manual_seed(0)
    made.reset_parameters()
    for name, tensor in (*wanted.named_parameters(), *wanted.named_buffers()):
        assert torch.equal(dict((*made.named_parameters(), *made.named_buffers()))[name], tensor), name
    assert "tokens_per_expert" not in str(list(made.state_dict()))


def test_a_block_says_its_numerics():
    made = block(router_dtype=torch.float32, jitter=0.1, capacity_factor=1.25, return_router_logits=True)
    assert "router_dtype=torch.float32, jitter=0.1, capacity_factor=1.25" in repr(made.router)
    assert "return_router_logits=True" in repr(made)
    assert repr(block().router) == f"Router(hidden_size={HIDDEN}, num_experts={EXPERTS}, top_k={TOP_K})"


@pytest.mark.parametrize(
    "options", [{}, {"router_dtype": torch.float32, "count_tokens": True, "return_router_logits": True}]
)
def test_compiled_as_eager_with_hooks(options):
    made = block(**options)
    chosen = []
    made.router.register_forward_hook(lambda router, given, found: chosen.append(found[1]))
    found = torch.compile(made, backend="aot_eager", fullgraph=True)(rows())
    wanted = made(rows())
    torch.testing.assert_close(found, wanted)
    assert torch.equal(*chosen)
    if options:
        assert int(made.router.tokens_per_expert.sum()) == 2 * 9 * TOP_K


BAD = {
    "jitter": ({"jitter": 1.0}, ValueError, "`jitter` must be from 0 up to 1, got 1.0"),
    "dtype": ({"router_dtype": torch.int32}, ValueError, "`router_dtype` must be one of float32"),
    "factor": ({"capacity_factor": 0.0}, ValueError, "`capacity_factor` must be above 0, got 0.0"),
    "policy": ({"drop_policy": "last"}, ValueError, "`drop_policy` must be one of 'probs', 'position'"),
    "option": ({"activation_options": {"limit": -1.0}}, ValueError, "`limit` must be above 0, got -1.0"),
    "its kind": (
        {"activation": "gelu", "activation_options": {"beta": 1.0}},
        ValueError,
        "`beta` must be None for 'ge",
    ),
    "groups": ({"num_expert_group": 5}, ValueError, "`num_expert_group` must be a divisor of num_experts"),
    "score": ({"group_score": "least"}, ValueError, "`group_score` must be one of 'max', 'top2_sum', 'topk_sum'"),
    "scoring": ({"scoring_func": "exp"}, ValueError, "`scoring_func` must be one of 'softmax', "),
    "flag": ({"correction_bias": 1}, TypeError, "`correction_bias` must be True or False, got 1"),
    "of parameters": (
        {"dtype": torch.float64},
        ValueError,
        "`dtype` must be one of float32, float16, bfloat16, got float64",
    ),
    "layer": ({"layer": 1}, ValueError, "`layer` must be 0 without a dispatcher, got 1"),
    "dispatcher": ({"dispatcher": 5}, TypeError, "`dispatcher` must be a TokenDispatcher, got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        block(**options)


def test_transposed_tokens_are_served():
    made, given = block(), torch.randn(2, HIDDEN, 5)
    assert torch.equal(made(given.transpose(1, 2)), made(given.transpose(1, 2).contiguous()))
    assert torch.equal(made(given[0].T), made(given[0].T.contiguous()))


def test_a_block_on_the_meta_device_says_where_it_runs():
    with pytest.raises(ValueError, match="`gating_output` must be on a CUDA device or the CPU, got meta"):
        block(device="meta")(torch.empty(3, HIDDEN, device="meta"))


def test_bad_arguments_of_capacities():
    with pytest.raises(ValueError, match="`capacity` must be at most num_tokens = 3, got 4"):
        training.expert_choice(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="`topk_weights` must be of the shape of `topk_ids`"):
        training.apply_capacity(torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int32), 4, 1)
    with pytest.raises(TypeError, match="`topk_weights` must be a tensor, got ndarray"):
        training.apply_capacity(np.zeros((3, 2)), np.zeros((3, 2), np.int32), 4, 1)
    with pytest.raises(TypeError, match="`gating_output` must be a tensor, got list"):
        training.expert_choice([[0.0]], 1)
    with pytest.raises(TypeError, match="`is_padding` must be of dtype bool, got int64"):
        training.expert_choice(torch.zeros(3, 2), 1, is_padding=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`is_padding` must be of shape"):
        training.expert_choice(torch.zeros(3, 2), 1, is_padding=torch.zeros(2, dtype=torch.bool))
