"""Tokens between ranks: every rank's results against the reference of all ranks, faults, gradients, training.

Ranks are processes that meet at a store of the test's own.
"""

import copy
import os
import signal
import sys
import time
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numba_moe.reference import parallel as twin
from numba_moe.reference.dispatch import static_map

import numba_moe
from numba_moe import MoEBlock, reference
from numba_moe.interop import sglang_dispatch, vllm_dispatch
from numba_moe.ops.experts import compose
from numba_moe.parallel import (
    DispatchedTokens,
    PeerTimeoutError,
    TokenDispatcher,
    fused_experts,
    gather_experts,
    gather_state_dict,
    load_gathered_state_dict,
    shard_experts,
    sum_gradients,
)
from numba_moe.placement import ExpertLocation, migrate_in_chunks

CASES = {2: 12, 3: 60, 4: 60}
TIMEOUT = 30.0
MAX_TOKENS = 12


def draw_location(rng, num_ranks, num_experts, num_layers=2):
    """Return replicas, uneven ranks, and ranks without experts."""
    sizes = rng.integers(1, 5, num_ranks)
    while sizes.sum() < num_experts:
        sizes[rng.integers(num_ranks)] += 1
    rank_of_slot = np.repeat(np.arange(num_ranks), sizes)
    layers = []
    for _ in range(num_layers):
        active = rng.random(num_ranks) < 0.8
        if sizes[active].sum() < num_experts:
            active[:] = True
        slots = rng.permutation(np.flatnonzero(active[rank_of_slot]))
        place = np.full(len(rank_of_slot), -1)
        place[slots] = rng.integers(0, num_experts, len(slots))
        place[slots[:num_experts]] = np.arange(num_experts)
        layers.append(place)
    return ExpertLocation.from_mapping(layers, num_experts, num_ranks, slots_per_rank=sizes)


def draw_tokens(rng, num_ranks, num_experts, top_k, hidden, dtype):
    """Return the rows, ids and weights of all ranks."""
    found = []
    for _ in range(num_ranks):
        count = int(rng.choice([0, 1, rng.integers(MAX_TOKENS + 1), MAX_TOKENS]))
        rows = rng.integers(0, 256, (count, hidden)) if dtype == "uint8" else rng.standard_normal((count, hidden))
        ids = rng.random((count, max(top_k, num_experts))).argsort(1)[:, :top_k] % num_experts
        ids[rng.random(ids.shape) < rng.choice([0, 0.3, 1], p=[0.5, 0.4, 0.1])] = rng.choice([-1, num_experts, -7])
        found.append(
            (rows.astype(dtype), ids.astype(rng.choice(["int32", "int64"])), rng.random(ids.shape, np.float32))
        )
    return [list(part) for part in zip(*found, strict=True)]


def experts(received, case):
    """Stand in for the experts of a rank: the same bits from NumPy and torch."""
    layout, dtype = case["layout"], "float32" if case["dtype"] == "uint8" else case["dtype"]
    source = received.hidden_states if layout == "tokens" else received.permuted_hidden_states
    made = torch.as_tensor(source).to(getattr(torch, dtype)) * 0.375
    if layout == "tokens" and case["reduce"] == "source":
        made = made[:, None].expand(-1, case["sizes"]["top_k"], -1)
    return made


def check_rows(found, wanted, layout):
    """Compare what a rank received with the reference, but for rows that hold anything."""
    assert isinstance(found, DispatchedTokens)
    for name, part in wanted._asdict().items():
        mine = getattr(found, name)
        if name == "way":
            continue
        if part is None:
            assert mine is None, name
        else:
            assert np.array_equal(mine.numpy(), part), (name, mine, part)
            assert mine.numpy().dtype == part.dtype, name


def draw_case(rng, size):
    dtype = str(rng.choice(["float32", "float16", "uint8"]))
    num_experts, top_k = int(rng.integers(1, 9)), int(rng.choice([1, 2, 5, 40], p=[0.3, 0.4, 0.2, 0.1]))
    hidden = int(rng.choice([0, 1, 7, 8], p=[0.1, 0.2, 0.3, 0.4]))
    layout = str(rng.choice(["permuted", "masked", "tokens"]))
    padded = bool(rng.random() < 0.3)
    bounded = layout != "tokens" and (rng.random() < 0.4 or (padded and layout == "masked"))
    return {
        "sizes": {"num_experts": num_experts, "top_k": top_k, "hidden": hidden, "max_tokens": MAX_TOKENS},
        "dtype": dtype,
        "location": draw_location(rng, size, num_experts) if rng.random() < 0.7 else None,
        "reduce": str(rng.choice(["rank", "source"])),
        "padded": padded,
        "layout": layout,
        "alignment": int(rng.choice([1, 3])) if layout == "permuted" and rng.random() < 0.4 else None,
        "capacity": int(rng.integers(1, 30)) if bounded else None,
        "scales": rng.choice([None, 0, 3]),
        "seed": int(rng.integers(100)),
    }


def run_case(rng, rank, size, case):
    """Send drawn tokens there and back; each rank knows what all others send."""
    sizes, location, layout = case["sizes"], case["location"], case["layout"]
    options = {name: case[name] for name in ("reduce", "padded", "capacity", "seed")}
    dtype = getattr(torch, case["dtype"])
    dispatcher = TokenDispatcher(**sizes, dtype=dtype, location=location, timeout=TIMEOUT, **options)
    where = dispatcher.location
    for step in range(2):
        rows, ids, weights = draw_tokens(
            rng, size, sizes["num_experts"], sizes["top_k"], sizes["hidden"], case["dtype"]
        )
        groups = () if case["scales"] == 0 else (case["scales"],)
        scales = None if case["scales"] is None else [rng.random((len(r), *groups), np.float32) for r in rows]
        layer = min(step, where.num_layers - 1)
        table = static_map(where, case["seed"])[layer].astype(np.int32)
        slots = [reference.dispatch_ids(i, table[:, source]) for source, i in enumerate(ids)]
        shape = {name: case[name] for name in ("layout", "alignment", "capacity")}
        given = rows, slots, weights
        if case["padded"]:  # tokens that go nowhere take part

            def pad(parts, value):
                return [
                    np.concatenate([p, np.full((MAX_TOKENS - len(p), *p.shape[1:]), value, p.dtype)]) for p in parts
                ]

            given = pad(rows, 0), pad(slots, -1), pad(weights, 0)
        wanted = twin.dispatch(
            *given,
            where.rank_of_slot,
            scales=scales if not case["padded"] or scales is None else pad(scales, 0),
            **shape,
        )
        mine = [torch.from_numpy(part[rank]) for part in (rows, ids, weights)]
        sent = dispatcher.dispatch(
            *mine,
            None if scales is None else torch.from_numpy(scales[rank]),
            layout=layout,
            alignment=case["alignment"],
            layer=layer,
            wait=bool(step),
        )
        sent = sent if step else sent.wait()
        if case["padded"]:
            check_padded(sent, wanted[rank], layout)
        else:
            check_rows(sent, wanted[rank], layout)

        made = [experts(received, case).numpy() for received in wanted]
        expected = twin.combine(made, wanted, [len(g) for g in given[0]], case["reduce"])[rank][: len(rows[rank])]
        out = dispatcher.combine(experts(sent, case), sent)
        assert np.array_equal(out.numpy(), expected), (case, step)
        assert out.numpy().dtype == expected.dtype


def check_padded(found, wanted, layout):
    """Compare what a rank received where every rank sends max_tokens: the tokens of others are there, unused."""
    here = (found.topk_ids >= 0).any(1)
    assert np.array_equal(found.topk_ids[here].numpy(), wanted.topk_ids)
    assert np.array_equal(found.topk_weights[here].numpy(), wanted.topk_weights)
    assert found.num_dropped.tolist() == wanted.num_dropped.tolist()
    if layout == "tokens":
        assert np.array_equal(found.hidden_states[here].numpy(), wanted.hidden_states)
    elif layout == "permuted":
        assert np.array_equal(found.counts.numpy(), wanted.counts)
        used = int(wanted.expert_first_token_offset[-1])
        assert np.array_equal(found.expert_first_token_offset.numpy(), wanted.expert_first_token_offset)
        assert np.array_equal(found.permuted_hidden_states[:used].numpy(), wanted.permuted_hidden_states[:used])
    else:
        assert np.array_equal(found.masked_m.numpy(), wanted.masked_m)
        rows = wanted.permuted_hidden_states.shape[1]
        for batch, count in enumerate(wanted.masked_m.tolist()):
            mine = found.permuted_hidden_states[batch, :count].numpy()
            assert np.array_equal(mine, wanted.permuted_hidden_states[batch, :count]), rows


def random_cases(rank, size):
    for index in range(CASES[size]):
        rng = np.random.default_rng((size, index))
        run_case(rng, rank, size, draw_case(rng, size))


def gradients(rank, size):
    """Compare gradients with the sum that they are of: out[t] = sum of w[t, k] * factor[expert] * row[t]."""
    for case, reduce, padded in ((0, "rank", False), (1, "source", False), (2, "rank", True), (3, "source", True)):
        rng = np.random.default_rng((9, case))
        location = draw_location(rng, size, 5)
        tokens = draw_tokens(rng, size, 5, 3, 8, "float32")
        options = {"num_experts": 5, "top_k": 3, "hidden": 8, "max_tokens": MAX_TOKENS, "dtype": torch.float32}
        dispatcher = TokenDispatcher(**options, location=location, reduce=reduce, padded=padded, timeout=TIMEOUT)
        rows, ids, weights = (torch.from_numpy(part[rank]) for part in tokens)
        factors = torch.arange(1.0, 6.0, requires_grad=True)
        local = torch.from_numpy(location.physical_to_logical_map[1, location.rank_of_slot == rank])
        for layout in ("permuted", "masked", "tokens"):
            mine = [part.clone().requires_grad_() for part in (rows, weights)]
            sent = dispatcher.dispatch(mine[0], ids, mine[1], layout=layout, layer=1)
            if layout == "tokens":
                of_slot = torch.where(sent.topk_ids >= 0, factors[local[sent.topk_ids.clamp(min=0).long()]], 0.0)
                made = sent.hidden_states[:, None] * of_slot[..., None]
            else:
                counts = sent.counts if layout == "permuted" else torch.full((len(local),), len(sent.permuted_idx[0]))
                factor = factors[local].repeat_interleave(counts)
                received = sent.permuted_hidden_states.flatten(0, -2)
                made = received * torch.nn.functional.pad(factor, (0, len(received) - len(factor)))[:, None]
                made = made.view(sent.permuted_hidden_states.shape)
            out = dispatcher.combine(made, sent)
            slopes = torch.from_numpy(np.random.default_rng(rank).standard_normal(out.shape).astype(np.float32))
            factors.grad = None
            found = torch.autograd.grad(out, [*mine, factors], slopes, allow_unused=True)
            again = [part.clone().requires_grad_() for part in (rows, weights)]
            known = (ids >= 0) & (ids < 5)
            of_slot = torch.where(known, factors.detach()[ids.clamp(0, 4).long()], 0.0)
            (again[0] * (again[1] * of_slot).sum(1, keepdim=True)).backward(slopes)
            for mine_grad, one in zip(found, again, strict=False):
                torch.testing.assert_close(mine_grad, one.grad)
            assert not len(rows) or not known.any() or found[1].abs().max() > 0


def gradients_of_some_ranks(rank, size):
    """Want gradients by rows or by weights on rank 0 alone: the others take part in them."""
    sizes = {"num_experts": 4, "top_k": 2, "hidden": 8, "max_tokens": 3, "dtype": torch.float32}
    ids = torch.tensor([[0, 3], [1, 2], [3, 1]])[: 3 - rank]
    for reduce, by_rows in ((reduce, by_rows) for reduce in ("rank", "source") for by_rows in (True, False)):
        dispatcher = TokenDispatcher(**sizes, reduce=reduce, timeout=TIMEOUT)
        rows = torch.rand(len(ids), 8, requires_grad=by_rows and not rank)
        weights = torch.rand(len(ids), 2, requires_grad=not by_rows and not rank)
        factor = torch.tensor(3.0, requires_grad=rank == 1)
        sent = dispatcher.dispatch(rows, ids, weights)
        dispatcher.combine(sent.permuted_hidden_states * factor, sent).sum().backward()
        if rank == 0:
            found, other = (rows.grad, weights) if by_rows else (weights.grad, rows)
            torch.testing.assert_close(found, 3 * other.detach().sum(1, keepdim=True).expand_as(found))
        assert rank != 1 or factor.grad > 0


def batches(size, steps, tokens):
    """Return what all ranks learn from: rows for each rank, some with none, and what they shall become."""
    rng = np.random.default_rng(5)
    for step in range(steps):
        counts = [tokens if (rank + step) % 3 else 0 for rank in range(size)]
        rows = torch.from_numpy(rng.standard_normal((sum(counts), 16)).astype(np.float32))
        yield counts, rows, 0.5 * rows


def learn(block, rows_of, steps, size, finish=lambda block: None):
    optimizer = torch.optim.SGD(block.parameters(), lr=2.0)
    losses = []
    for counts, rows, wanted in batches(size, steps, 8):
        mine = rows_of(counts)
        loss = (block(rows[mine]) - wanted[mine]).square().sum() / rows.numel()
        optimizer.zero_grad()
        loss.backward()
        finish(block)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def training(rank, size):
    """Train a block over all ranks, and one on one rank: the losses are the same, and so are the weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 6, "top_k": 2, "renormalize": True}
    places = ExpertLocation.from_mapping([[*range(6), *[0, 5][: 2 * (size > 2)]]], 6, size)
    for location, reduce in ((None, "rank"), (places, "source")):
        options = {"num_experts": 6, "top_k": 2, "hidden": 16, "max_tokens": 8, "dtype": torch.float32}
        dispatcher = TokenDispatcher(**options, location=location, reduce=reduce, timeout=TIMEOUT)
        torch.manual_seed(3)
        whole = MoEBlock(**sizes, bias=True, shared_size=8)
        torch.manual_seed(3)
        block = MoEBlock(**sizes, bias=True, shared_size=8, dispatcher=dispatcher)
        for name, tensor in gather_state_dict(block).items():
            assert torch.equal(tensor, whole.state_dict()[name]), name

        def own(counts):
            return slice(sum(counts[:rank]), sum(counts[: rank + 1]))

        steps = 12 if size == 2 else 25
        mine = learn(block, own, steps, size, sum_gradients)
        dist.all_reduce(mine)
        expected = learn(whole, lambda counts: slice(None), steps, size)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
        assert expected[-5:].mean() < 0.95 * expected[:5].mean()
        for name, tensor in gather_state_dict(block).items():
            torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-4, atol=1e-5)
        again = MoEBlock(**sizes, bias=True, shared_size=8, dispatcher=dispatcher)
        load_gathered_state_dict(again, whole.state_dict())
        for name, tensor in gather_state_dict(again).items():
            assert torch.equal(tensor, whole.state_dict()[name]), name


def faults(rank, size):
    """Check errors of one rank that all get, a rank that is late, and ranks that go on without another."""
    sizes = {"num_experts": size, "top_k": 1, "hidden": 4, "max_tokens": 3, "dtype": torch.float32}
    for name, value in {"hidden": 5, "max_tokens": 4, "top_k": 2, "dtype": torch.float16, "timeout": 2.0}.items():
        message = f"`{name}` must be the same on every rank.*, got others on ranks .1. than on rank 0"
        with pytest.raises(ValueError, match=message):
            TokenDispatcher(**sizes | ({name: value} if rank == 1 else {}))
    rows = torch.full((size, 4), float(rank + 1))[:3]
    ids, weights = torch.arange(size)[:3, None], torch.ones(size, 1)[:3]
    dispatcher = TokenDispatcher(**sizes, timeout=1.5)

    def there_and_back():
        sent = dispatcher.dispatch(rows, ids, weights)
        return dispatcher.combine(sent.permuted_hidden_states * (rank + 1), sent)

    all_ranks = (rank + 1) * torch.arange(1.0, size + 1)[:3, None].expand(-1, 4)
    assert torch.equal(there_and_back(), all_ranks)
    backward = TokenDispatcher(**sizes, timeout=1.5)
    sent = backward.dispatch(rows.requires_grad_(), ids, weights)
    combined = backward.combine(sent.permuted_hidden_states, sent).sum()
    rows = rows.detach()
    if rank != 1:
        with pytest.raises(PeerTimeoutError, match=r"ranks \[1\] were not in gradient of combine 0 together with"):
            combined.backward()
    dist.barrier()
    if rank == 1:
        time.sleep(3.5)
        with pytest.raises(PeerTimeoutError, match=r"ranks \[0, 2\] were not in dispatch 1 together with rank 1"):
            there_and_back()
        return
    begin = time.monotonic()
    with pytest.raises(
        PeerTimeoutError, match=r"ranks \[1\] were not in dispatch 1 together with rank . within 1\.5 s"
    ) as found:
        there_and_back()
    assert (found.value.rank, found.value.phase, found.value.step) == (1, "dispatch", 1)
    assert 1.4 < time.monotonic() - begin < 3
    dispatcher.active_ranks = [other != 1 for other in range(size)]
    for _ in range(3):
        out = there_and_back()
        assert torch.equal(out[1], torch.zeros(4)), "the expert of rank 1 adds nothing"
        assert torch.equal(out[[0, 2]], all_ranks[[0, 2]])


def late_to_combine(rank, size):
    """Lose rank 1 between dispatch and combine: the others learn of it there, in time."""
    sizes = {"num_experts": 2 * size, "top_k": 2, "hidden": 4, "max_tokens": 3, "dtype": torch.float32}
    dispatcher = TokenDispatcher(**sizes, timeout=2.0)
    rows, ids = torch.ones(3, 4), torch.tensor([[0, 2], [1, 3], [2, 2 * size - 1]])
    sent = dispatcher.dispatch(rows, ids, torch.ones(3, 2))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(PeerTimeoutError, match=r"ranks \[1\] were not in combine 0 together with rank . within 2 s"):
        dispatcher.combine(sent.permuted_hidden_states, sent)
    assert time.monotonic() - begin < 4
    dispatcher.active_ranks = [other != 1 for other in range(size)]
    sent = dispatcher.dispatch(rows, ids, torch.ones(3, 2))
    out = dispatcher.combine(sent.permuted_hidden_states, sent)
    assert out[:, 0].tolist() == [1, 1, 1 if size == 3 else 0]
    os._exit(0)  # what is left of the group has nobody to say goodbye to


def moving(rank, size):
    """Move experts between steps: outputs stay what they were, layer by layer."""
    old = ExpertLocation.from_mapping(np.tile(np.arange(2 * size), (3, 1)), num_gpus=size)
    new = ExpertLocation.from_mapping(np.roll(old.physical_to_logical_map, 1, axis=1), num_gpus=size)
    sizes = {"num_experts": 2 * size, "top_k": 2, "hidden": 8, "max_tokens": 6, "dtype": torch.float32}
    dispatcher = TokenDispatcher(**sizes, location=old, timeout=TIMEOUT)
    rng = torch.Generator().manual_seed(4)
    every = [torch.randn(2 * size, *shape, generator=rng) for shape in ((8, 8), (8, 4)) * 3]
    layers = [
        shard_experts({"up": up, "down": down}, dispatcher, layer)
        for layer, (up, down) in enumerate(zip(every[::2], every[1::2], strict=True))
    ]
    rows = torch.randn(6, 8, generator=rng) + rank
    ids = torch.rand(6, 2 * size, generator=rng).argsort(1)[:, :2].contiguous()
    weights = torch.rand(6, 2, generator=rng)
    wanted = [numba_moe.fused_experts(rows, *pair, weights, ids) for pair in zip(every[::2], every[1::2], strict=True)]

    def check():
        for layer, held in enumerate(layers):
            out = fused_experts(rows, held["up"], held["down"], weights, ids, dispatcher, layer=layer)
            torch.testing.assert_close(out, wanted[layer])

    check()
    for moved in migrate_in_chunks(layers, old, new):
        dispatcher.update(new, moved)
        check()
    assert dispatcher.location == new
    for layer, held in enumerate(layers):
        assert torch.equal(gather_experts(held, dispatcher, layer)["up"], every[2 * layer])

    shape = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 2 * size, "top_k": 2}
    block = MoEBlock(**shape, dispatcher=dispatcher)
    dispatcher.update(old)
    for made in (whole := MoEBlock(**shape), block):
        torch.manual_seed(5)
        made.reset_parameters()
    for name, tensor in gather_state_dict(block).items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def everything(rank, size):
    """Run what needs no ranks that are lost, in one process each."""
    random_cases(rank, size)
    gradients(rank, size)
    gradients_of_some_ranks(rank, size)
    training(rank, size)
    moving(rank, size)


@pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.slow) if n > 2 else n for n in (2, 3, 4)])
def test_ranks_do_what_the_reference_does(size, run_ranks):
    assert run_ranks(everything, size) == [0] * size


@pytest.mark.slow
def test_faults_of_one_rank(run_ranks):
    assert run_ranks(faults, 3) == [0] * 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_is_named_and_the_others_go_on(size, run_ranks):
    assert run_ranks(late_to_combine, size) == [0, -signal.SIGKILL, 0][:size]


SIZES = {"num_experts": 4, "top_k": 2, "hidden": 8, "max_tokens": 5, "dtype": torch.float32}
ROWS, IDS, WEIGHTS = torch.ones(3, 8), torch.tensor([[0, 1], [3, 2], [-1, 0]]), torch.ones(3, 2)
TWO = ExpertLocation.trivial(1, 4, num_gpus=2)
BAD = {
    "transport": ({"transport": "mpi"}, ValueError, "`transport` must be one of 'auto', .*, got 'mpi'"),
    "reduce": ({"reduce": "sum"}, ValueError, "`reduce` must be one of 'rank', 'source', got 'sum'"),
    "top_k": ({"top_k": 0}, ValueError, "`top_k` must be at least 1, got 0"),
    "dtype": ({"dtype": torch.int64}, ValueError, "`dtype` must be one of float32, .*, got int64"),
    "timeout": ({"timeout": 0}, ValueError, "`timeout` must be above 0, got 0"),
    "capacity": ({"capacity": 0}, ValueError, "`capacity` must be at least 1, got 0"),
    "padded": ({"padded": 1}, TypeError, "`padded` must be True or False, got 1"),
    "location": ({"location": TWO}, ValueError, "`location` must be of num_experts = 4 experts on 1 ranks, .*, got Ex"),
    "device": (
        {"transport": "nccl", "device": "cpu"},
        ValueError,
        "`device` must be of type 'cuda', for the transport",
    ),
}
BAD_CALLS = {
    "rows": ((ROWS.double(), IDS, WEIGHTS), {}, TypeError, "`hidden_states` must be of dtype float32, got float64"),
    "columns": ((ROWS[:, :7], IDS, WEIGHTS), {}, ValueError, r"`hidden_states` must be of shape .* = \(3, 8\), got"),
    "tokens": (
        (torch.ones(6, 8), IDS, WEIGHTS),
        {},
        ValueError,
        "`hidden_states` must be tokens of at most .* = 5, got 6",
    ),
    "ids": ((ROWS, IDS[:2], WEIGHTS), {}, ValueError, r"`topk_ids` must be of shape \(num_tokens, top_k\) = \(3, 2\)"),
    "floats": ((ROWS, WEIGHTS, WEIGHTS), {}, TypeError, "`topk_ids` must be of dtype int32 or int64, got float32"),
    "weights": ((ROWS, IDS, WEIGHTS[:, :1]), {}, ValueError, "`topk_weights` must be of shape"),
    "scales": ((ROWS, IDS, WEIGHTS, WEIGHTS[:2]), {}, ValueError, "`scales` must be of shape"),
    "layout": (
        (ROWS, IDS, WEIGHTS),
        {"layout": "rows"},
        ValueError,
        "`layout` must be one of 'permuted', .*, got 'rows'",
    ),
    "aligned batches": (
        (ROWS, IDS, WEIGHTS),
        {"layout": "masked", "alignment": 4},
        ValueError,
        "`alignment` must be None",
    ),
    "layer": ((ROWS, IDS, WEIGHTS), {"layer": 1}, ValueError, "`layer` must be at most num_layers - 1 = 0, got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sizes(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        TokenDispatcher(**SIZES | options)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_tokens(name):
    arguments, options, error, message = BAD_CALLS[name]
    dispatcher = TokenDispatcher(**SIZES)
    with pytest.raises(error, match=message):
        dispatcher.dispatch(*arguments, **options)
    dispatcher.combine(ROWS[:0].new_zeros(6, 8), dispatcher.dispatch(ROWS, IDS, WEIGHTS))


def test_dispatch_and_combine_take_turns():
    dispatcher = TokenDispatcher(**SIZES, slots=2)
    one, two = (dispatcher.dispatch(row * ROWS, IDS, WEIGHTS) for row in (1, 2))
    with pytest.raises(
        RuntimeError, match=r"`dispatch` must be followed by `combine` or `release`: \[0, 1\] are under"
    ):
        dispatcher.dispatch(ROWS, IDS, WEIGHTS)
    assert dispatcher.combine(two.permuted_hidden_states, two)[:, 0].tolist() == [4, 4, 2]
    with pytest.raises(RuntimeError, match="`sent` must be of a dispatch that is under way, got one that was combined"):
        dispatcher.combine(two.permuted_hidden_states, two)
    with pytest.raises(ValueError, match=r"`rows` must be of shape \(6, 3\), got shape \(5, 3\)"):
        dispatcher.combine(torch.ones(5, 3), one)
    dispatcher.release(one)
    pending = dispatcher.dispatch(ROWS, IDS, WEIGHTS, wait=False)
    assert pending.wait() is pending.wait()
    with pytest.raises(TypeError, match="`sent` must be what `dispatch` returned, got PendingDispatch"):
        dispatcher.combine(ROWS, pending)


BAD_EXPERTS = {
    "matrix": ({"down_proj": torch.ones(4, 8, 5)}, ValueError, r"`gate_up_proj` must be of shape .* = \(4, 10, 8\)"),
    "dtype": ({"gate_up_proj": torch.ones(4, 8, 8).half()}, TypeError, "`gate_up_proj` must be of dtype float32, got"),
    "bias": ({"down_bias": torch.ones(3, 8)}, ValueError, "`down_bias` must be of shape"),
    "number": ({"alpha": "1"}, TypeError, "`alpha` must be a number, got str"),
    "activation": ({"activation": "none"}, ValueError, "`activation` must be one of 'silu', .*, got 'none'"),
}


@pytest.mark.parametrize("name", BAD_EXPERTS)
def test_bad_experts_are_refused_before_tokens_are_sent(name):
    bad, error, message = BAD_EXPERTS[name]
    dispatcher = TokenDispatcher(**SIZES)
    matrices = {"gate_up_proj": torch.ones(4, 8, 8), "down_proj": torch.ones(4, 8, 4)}
    with pytest.raises(error, match=message):
        fused_experts(hidden_states=ROWS, topk_ids=IDS, topk_weights=WEIGHTS, dispatcher=dispatcher, **matrices | bad)
    assert next(dispatcher._steps) == 0


def test_weights_on_the_input_are_sent_for_one_expert_alone():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 4, "apply_router_weight_on_input": True}
    with pytest.raises(ValueError, match="`apply_router_weight_on_input` must be False with a dispatcher, unless"):
        MoEBlock(**sizes, top_k=2, dispatcher=TokenDispatcher(**SIZES))
    spread = MoEBlock(**sizes, top_k=1, dispatcher=TokenDispatcher(**SIZES | {"top_k": 1}))
    whole = MoEBlock(**sizes, top_k=1)
    whole.load_state_dict(spread.state_dict())
    torch.testing.assert_close(spread(ROWS), whole(ROWS))


def test_experts_that_fail_let_go_of_their_tokens(monkeypatch):
    dispatcher, matrices = TokenDispatcher(**SIZES), (torch.ones(4, 8, 8), torch.ones(4, 8, 4))
    with monkeypatch.context() as patched:
        patched.setattr("numba_moe.parallel.group_experts.feed_forward", _fail)
        with pytest.raises(MemoryError):
            fused_experts(ROWS, *matrices, WEIGHTS, IDS, dispatcher)
    fused_experts(ROWS, *matrices, WEIGHTS, IDS, dispatcher)
    with monkeypatch.context() as patched:
        patched.setattr(dispatcher._end, "dispatch", lambda *_: _fail)
        pending = dispatcher.dispatch(ROWS, IDS, WEIGHTS, wait=False)
    for _ in range(2):
        with pytest.raises(MemoryError):
            pending.wait()
    sent = dispatcher.dispatch(ROWS, IDS, WEIGHTS)
    with pytest.raises(TypeError, match=r"`rows` must be a torch tensor, .*, got builtins\.NoneType"):
        dispatcher.combine(None, sent)


def _fail(*_, **__):
    raise MemoryError


def test_strided_matrices_and_choices_are_taken():
    dispatcher, matrices = TokenDispatcher(**SIZES), (torch.randn(8, 8, 8)[::2], torch.randn(4, 4, 8).transpose(1, 2))
    strided = (torch.cat([part, part], 1)[:, :2] for part in (WEIGHTS, IDS))
    wanted = fused_experts(ROWS, *(matrix.contiguous() for matrix in matrices), WEIGHTS, IDS, dispatcher)
    torch.testing.assert_close(fused_experts(ROWS, *matrices, *strided, dispatcher), wanted)


def test_layers_and_state_dicts_that_do_not_fit_are_named():
    dispatcher = TokenDispatcher(**SIZES)
    for move, layer in ((gather_experts, 1), (shard_experts, 1), (gather_experts, -1), (shard_experts, -1)):
        with pytest.raises(ValueError, match=r"`layer` must be at (least 0|most num_layers - 1 = 0), got"):
            move({"bias": torch.zeros(4)}, dispatcher, layer)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict.*gate_up_proj"):
        load_gathered_state_dict(MoEBlock(8, 4, 4, 2, dispatcher=dispatcher), {})


def test_a_copy_of_a_block_has_the_same_dispatcher():
    block = MoEBlock(8, 4, 4, 2, dispatcher=TokenDispatcher(**SIZES))
    other = copy.deepcopy(block)
    assert other.dispatcher is block.dispatcher
    assert torch.equal(other(ROWS), block(ROWS))
    assert other.down_proj is not block.down_proj


def test_dropped_slots_are_the_same_each_time_and_can_be_an_error():
    dispatcher = TokenDispatcher(**SIZES, capacity=3, raise_on_drop=True)
    for _ in range(2):
        sent = dispatcher.dispatch(ROWS, IDS, WEIGHTS, alignment=2)
        assert sent.num_dropped.tolist() == [2]
        assert sent.inv_permuted_idx.tolist() == [[0, 2], [-1, -1], [-1, 1]]
        out = dispatcher.combine(sent.permuted_hidden_states, sent)
        assert out[:, 0].tolist() == [2, 0, 1]
        with pytest.raises(
            ValueError, match=r"`capacity` must be enough for all slots, .*, got 3, past which 2 were, of"
        ):
            dispatcher.check()


def test_one_rank_has_the_bits_of_the_ops_that_it_is_composed_of():
    torch.manual_seed(0)
    matrices, ids = (torch.randn(4, 12, 8), torch.randn(4, 8, 6)), torch.randint(-1, 4, (5, 2))
    rows, weights = torch.randn(5, 8), torch.rand(5, 2)
    for reduce in ("rank", "source"):
        dispatcher = TokenDispatcher(**SIZES, reduce=reduce)
        out = fused_experts(rows, *matrices, weights, ids, dispatcher)
        assert torch.equal(out, compose(rows, *matrices, weights, ids))


def test_vllms_kernels_take_a_dispatcher(monkeypatch):
    """Follow vLLM's classes: rows with ids of all experts go to its kernels, and their weighted sums come back."""

    class Base:
        pass

    class Contiguous:
        def apply(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input):
            assert output is None
            weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
            return (fused_expert_output * weights[..., None]).sum(1)

    kernels = types.ModuleType(vllm_dispatch.KERNELS)
    kernels.FusedMoEPrepareAndFinalizeModular = Base
    kernels.FusedMoEActivationFormat = types.SimpleNamespace(Standard="standard")
    reducing = types.ModuleType(vllm_dispatch.REDUCING)
    reducing.TopKWeightAndReduceDelegate = type("Delegate", (), {})
    reducing.TopKWeightAndReduceContiguous = Contiguous
    monkeypatch.setitem(sys.modules, vllm_dispatch.KERNELS, kernels)
    monkeypatch.setitem(sys.modules, vllm_dispatch.REDUCING, reducing)
    dispatcher = TokenDispatcher(**SIZES)
    ours = vllm_dispatch.prepare_and_finalize(dispatcher)
    assert isinstance(ours, Base)
    assert (ours.activation_format, ours.num_dispatchers(), ours.max_num_tokens_per_rank()) == ("standard", 1, 5)
    ids = torch.tensor([[0, 1], [3, 2], [1, 0]])
    rows, _, _, found, weights = ours.prepare(ROWS, WEIGHTS / 4, ids, 4, None, False, None, False)
    assert torch.equal(found, ids)
    made, delegate, out = (
        rows[:, None] * (found[..., None] + 1),
        reducing.TopKWeightAndReduceDelegate(),
        torch.empty(3, 8),
    )
    ours.finalize(out, made, weights, found, False, delegate)
    assert out[:, 0].tolist() == [0.75, 1.75, 0.75]
    quantised = types.SimpleNamespace(quant_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="`quant_config` must be without a dtype for rows, unless deferred"):
        ours.prepare(ROWS, WEIGHTS, ids, 4, None, False, quantised, False)
    with pytest.raises(ValueError, match="`dispatcher` must be one of `reduce='rank'`"):
        vllm_dispatch.prepare_and_finalize(TokenDispatcher(**SIZES, reduce="source"))


def test_sglangs_layers_take_a_dispatcher(monkeypatch):
    """Follow SGLang's classes: rows with this rank's ids go to a layer's kernels, and their sums come back."""

    class Base:
        pass

    class Chosen(NamedTuple):
        topk_weights: torch.Tensor
        topk_ids: torch.Tensor
        router_logits: Any

    class Dispatched(NamedTuple):
        hidden_states: torch.Tensor
        hidden_states_scale: Any
        topk_output: Any

    class ToCombine(NamedTuple):
        hidden_states: torch.Tensor

    standard, topk = types.ModuleType(sglang_dispatch.STANDARD), types.ModuleType(sglang_dispatch.TOPK)
    standard.BaseDispatcher, standard.StandardDispatchOutput = Base, Dispatched
    topk.TopKOutputChecker = types.SimpleNamespace(format_is_standard=lambda output: isinstance(output, Chosen))
    monkeypatch.setitem(sys.modules, sglang_dispatch.STANDARD, standard)
    monkeypatch.setitem(sys.modules, sglang_dispatch.TOPK, topk)
    location = ExpertLocation.from_mapping([[2, 0, 3, 1]])  # ids of this rank are slots
    ours = sglang_dispatch.dispatcher_of(TokenDispatcher(**SIZES, location=location))
    assert isinstance(ours, Base)
    ids = torch.tensor([[0, 1], [3, 2], [-1, 0]], dtype=torch.int32)
    for factor in (1.0, 3.0):
        rows, scale, chosen = ours.dispatch(ROWS * factor, Chosen(WEIGHTS / 4, ids, torch.randn(3, 4)))
        assert scale is None
        assert chosen.router_logits is None
        assert chosen.topk_ids.dtype == torch.int32
        assert chosen.topk_ids.tolist() == [[1, 3], [2, 0], [-1, 1]]
        made = rows * ((chosen.topk_ids + 1) * chosen.topk_weights).sum(1, keepdim=True)
        out = ours.combine(ToCombine(made))
        assert out[:, 0].tolist() == [factor * 1.5, factor * 1.0, factor * 0.5]
    with pytest.raises(ValueError, match="`combine_input` must be of tokens that were dispatched, got none"):
        ours.combine(ToCombine(made))
    with pytest.raises(ValueError, match="`topk_output` must be of the standard format, got str"):
        ours.dispatch(ROWS, "bypassed")
    with pytest.raises(ValueError, match="`dispatcher` must be one of `reduce='rank'`"):
        sglang_dispatch.dispatcher_of(TokenDispatcher(**SIZES, reduce="source"))
