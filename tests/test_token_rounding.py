"""Token rounding: each expert has a multiple of a tile of tokens, by hand and in the block."""

import functools

import numpy as np
import pytest
import torch
from numba_moe.reference import capacity as twin
from numba_moe.reference.capacity import ROUNDINGS
from torch.utils.checkpoint import checkpoint

import numba_moe as moe
from numba_moe import training
from numba_moe.verify import testing

TOKENS, EXPERTS, TOP_K = 37, 6, 2


def scored(tokens=TOKENS, experts=EXPERTS, picks=EXPERTS, seed=0):
    """Return weights and ids of a token's best experts, of scores with ties, and skewed towards the first experts."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(np.round(rng.standard_normal((tokens, experts)), 1) - 0.4 * np.arange(experts)).float()
    return moe.topk_softmax(logits, picks)


def as_published(scores, top_k, tile, rounding):
    """Round as SonicMoE's benchmark: return a table of who is in, bool [num_tokens, num_experts], and how many are."""
    values, chosen = scores.topk(top_k, dim=1)
    numbers = torch.bincount(chosen.flatten(), minlength=scores.shape[1])
    tiles = {"up": lambda x: x.ceil(), "down": lambda x: x.floor(), "nearest": lambda x: x.round()}[rounding]
    rounded = tiles(numbers / tile).int() * tile
    preference = (scores - 1).scatter(1, chosen, values)
    order = preference.argsort(dim=0, descending=True, stable=True)
    first = torch.arange(len(scores))[:, None] < rounded
    return torch.zeros_like(first).scatter(0, order, first), rounded.clamp(max=len(scores))


def table_of(found, experts=EXPERTS):
    ids = found.topk_ids.long()
    return torch.zeros(len(ids), experts + 1, dtype=torch.bool).scatter(1, ids % (experts + 1), True)[:, :experts]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("tile", [1, 2, 4, 5, 64])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_with_all_experts_as_picks_it_is_sonic_moes(top_k, tile, rounding):
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3)).double().softmax(1).float()
    weights, ids = scores.sort(1, descending=True)
    found = training.token_rounding(weights, ids, EXPERTS, tile, top_k=top_k, rounding=rounding)
    wanted, numbers = as_published(scores, top_k, tile, rounding)
    assert torch.equal(table_of(found), wanted)
    assert torch.equal(table_of(found).sum(0), numbers.long())
    assert torch.equal(found.topk_weights, torch.where(found.topk_ids >= 0, weights, 0))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("tile", [1, 3, 4, 8, 100])
@pytest.mark.parametrize("picks", [TOP_K, TOP_K + 1, EXPERTS])
def test_as_the_twin(picks, tile, rounding):
    weights, ids = scored(picks=picks)
    ids[::7] = -1  # padding
    ids[3, 0] = EXPERTS
    found = training.token_rounding(weights, ids.long(), EXPERTS, tile, top_k=TOP_K, rounding=rounding)
    wanted = twin.token_rounding(weights.numpy(), ids.numpy(), EXPERTS, tile, top_k=TOP_K, rounding=rounding)
    assert found.topk_ids.dtype == torch.int64
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))
    numbers, before = table_of(found).sum(0), table_of(moe.reference.TopK(weights, ids[:, :TOP_K])).sum(0)
    possible = table_of(moe.reference.TopK(weights, ids)).sum(0)
    assert ((numbers % tile == 0) | (numbers == possible)).all()
    if rounding == "down":
        assert (numbers == before // tile * tile).all()
    elif rounding == "up":
        assert (numbers >= before).all()
    assert not found.topk_ids[::7].ge(0).any()


def test_the_kernels_choose_as_the_twin(device):
    weights, ids = scored(tokens=11, picks=TOP_K + 1)
    with testing.poisoned_memory():
        found = training.token_rounding(weights.to(device), ids.to(device), EXPERTS, 3, top_k=TOP_K)
    wanted = twin.token_rounding(weights.numpy(), ids.numpy(), EXPERTS, 3, top_k=TOP_K)
    assert all(np.array_equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))


def test_no_picks_are_spare_by_default_and_a_tile_of_one_changes_nothing():
    weights, ids = scored(picks=TOP_K)
    assert torch.equal(training.token_rounding(weights, ids, EXPERTS, 1).topk_ids, ids)
    down = training.token_rounding(weights, ids, EXPERTS, 4, rounding="down")
    for rounding in ("up", "nearest"):
        found = table_of(training.token_rounding(weights, ids, EXPERTS, 4, rounding=rounding)).sum(0)
        assert (found >= table_of(down).sum(0)).all()
    assert torch.equal(training.token_rounding(weights, ids, EXPERTS, 4, rounding="up").topk_ids, ids)


def test_of_two_multiples_as_near_the_even_one():
    for number, wanted in ((2, 0), (6, 8), (10, 8), (14, 16)):
        ids = torch.cat([torch.zeros(number, 1), torch.full((20, 1), -1)]).int()
        ids = torch.cat([ids, torch.where(ids == 0, -1, 0)], 1)  # every other token is spare
        found = training.token_rounding(torch.rand(ids.shape), ids, 3, 4, top_k=1)
        assert int((found.topk_ids == 0).sum()) == wanted, number
        host = twin.token_rounding(np.ones(ids.shape), ids.numpy(), 3, 4, top_k=1)
        assert int((host.topk_ids == 0).sum()) == wanted, number


def test_all_tokens_at_one_expert_and_none():
    ids = torch.zeros(10, 1, dtype=torch.int32)
    weights = torch.arange(10.0)[:, None]
    kept = training.token_rounding(weights, ids, 3, 4).topk_ids.flatten()
    assert kept.tolist() == [-1, -1, *[0] * 8]
    assert training.token_rounding(weights, ids, 3, 16, rounding="up").topk_ids.eq(0).all()
    assert training.token_rounding(weights, ids, 3, 32).topk_ids.eq(-1).all()
    none = training.token_rounding(weights[:0], ids[:0], 3, 4)
    assert none.topk_ids.shape == none.topk_weights.shape == (0, 1)


def test_gradients_of_added_slots_and_none_of_dropped_ones():
    weights, ids = scored(picks=TOP_K + 1)
    given = weights.requires_grad_()
    found = training.token_rounding(given, ids, EXPERTS, 5, top_k=TOP_K)
    found.topk_weights.sum().backward()
    assert torch.equal(given.grad != 0, found.topk_ids >= 0)
    assert (found.topk_ids[:, TOP_K] >= 0).any()
    assert (found.topk_ids[:, :TOP_K] < 0).any()


def block(**options):
    torch.manual_seed(0)
    return moe.MoEBlock(16, 8, EXPERTS, TOP_K, token_rounding=4, **options)


def rows(tokens=TOKENS):
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("options", [{}, {"renormalize": True, "scoring_func": "sigmoid", "correction_bias": True}])
def test_a_block_rounds_what_its_router_chooses(options, rounding):
    made = block(rounding=rounding, spare_picks=EXPERTS, count_tokens=True, **options)
    if "correction_bias" in options:
        made.router.correction_bias.copy_(torch.randn(EXPERTS) / 4)
    weights, ids = made.router(rows())
    choosing = {"scoring_func": options.get("scoring_func", "softmax"), "correction_bias": made.router.correction_bias}
    logits = made.router.logits(rows())
    scores, picks = moe.select_experts(logits, made.router.picks, **choosing)
    first = moe.select_experts(logits, TOP_K, **choosing).topk_ids
    assert torch.equal(picks[:, :TOP_K], first)
    wanted = training.token_rounding(scores, picks, EXPERTS, 4, top_k=TOP_K, rounding=rounding)
    assert torch.equal(ids, wanted.topk_ids)
    assert made.router.picks == (TOP_K if rounding == "down" else EXPERTS)
    numbers = torch.bincount(ids[ids >= 0], minlength=EXPERTS)
    assert (numbers % 4 == 0).all() or rounding == "up"
    assert torch.equal(made.router.tokens_per_expert, torch.bincount(first.flatten(), minlength=EXPERTS))
    if options:
        torch.testing.assert_close(weights.sum(1), (ids >= 0).any(1).float())
    else:
        torch.testing.assert_close(weights, wanted.topk_weights)
    by_hand = moe.fused_experts(rows(), made.gate_up_proj, made.down_proj, weights, ids)
    torch.testing.assert_close(made(rows()), by_hand)


def test_the_routers_gradient_is_that_of_torch_with_the_same_choice():
    made = block(spare_picks=3)
    logits = made.router.logits(rows()).detach().requires_grad_()
    ids = made.router(rows()).topk_ids
    made.router.logits = lambda _: logits
    direction = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))
    (made.router(rows()).topk_weights * direction).sum().backward()
    plain = logits.detach().double().requires_grad_()
    weights = torch.where(ids >= 0, plain.softmax(1).gather(1, ids.long().clamp(min=0)), 0)
    (weights * direction).sum().backward()
    torch.testing.assert_close(logits.grad.double(), plain.grad, rtol=1e-5, atol=1e-7)
    assert (ids[:, TOP_K:] >= 0).any()


@pytest.mark.slow
def test_compiled_as_eager():
    made = block(count_tokens=True)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)(rows())
    torch.testing.assert_close(compiled, made(rows()))
    assert int(made.router.tokens_per_expert.sum()) == 2 * TOKENS * TOP_K


def test_checkpointed_replayed_and_counted_once():
    made = block(count_tokens=True)
    wanted = made(rows())
    made.router.tokens_per_expert.zero_()
    given = rows().requires_grad_()
    made(given).square().sum().backward()
    grads, given.grad = given.grad, None
    for context in ({}, {"context_fn": training.same_routing}):
        out = checkpoint(made, given, use_reentrant=False, **context)
        out.square().sum().backward()
        torch.testing.assert_close(given.grad, grads)
        given.grad = None
    assert int(made.router.tokens_per_expert.sum()) == 3 * TOKENS * TOP_K
    replay = training.RoutingReplay(1, TOKENS, made.router.picks, EXPERTS)
    replay.attach(made)
    with replay.recording():
        sampled = made(rows())
    torch.testing.assert_close(sampled, wanted)
    with replay.replaying():
        assert torch.equal(made(rows()), sampled)


def test_spare_picks_leave_the_choice_of_groups_as_it_is():
    options = {"num_expert_group": 4, "topk_group": 2, "group_score": "topk_sum", "token_rounding": 4}
    made = moe.MoEBlock(16, 8, 16, 4, spare_picks=9, **options)
    assert made.router.picks == 5
    assert moe.MoEBlock(16, 8, 16, 4, spare_picks=9, **{**options, "group_score": "max"}).router.picks == 8
    logits = torch.randn(50, 16)
    choose = functools.partial(moe.select_experts, num_expert_group=4, topk_group=2, group_score="topk_sum")
    assert torch.equal(choose(logits, 5).topk_ids[:, :4], choose(logits, 4).topk_ids)
    assert made(rows()).isfinite().all()


ONE = torch.ones(1)
BAD = {
    "tile": ({"tile": 0}, ValueError, "`tile` must be at least 1, got 0"),
    "float tile": ({"tile": 1.5}, TypeError, "`tile` must be an integer"),
    "rounding": ({"rounding": "floor"}, ValueError, "`rounding` must be one of 'nearest', 'up', 'down'"),
    "top_k": ({"top_k": 3}, ValueError, "`top_k` must be at most the picks of a token, 2, got 3"),
    "shape": ({"topk_weights": torch.ones(4, 1)}, ValueError, "`topk_weights` must be of the shape of `topk_ids`"),
    "dims": ({"topk_ids": ONE.int(), "topk_weights": ONE}, ValueError, "`topk_ids` must be of 2 dimensions"),
    "dtype": ({"topk_ids": torch.ones(4, 2)}, TypeError, "topk_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changed, kind, message = BAD[name]
    given = {"topk_weights": torch.ones(4, 2), "topk_ids": torch.ones(4, 2, dtype=torch.int32), "tile": 4}
    with pytest.raises(kind, match=message):
        training.token_rounding(num_experts=3, **{**given, **changed})
    with pytest.raises(ValueError, match="`capacity_factor` must be None with `token_rounding`"):
        block(capacity_factor=1.0)
    with pytest.raises(ValueError, match="`rounding` must be one of"):
        block(rounding="none")
