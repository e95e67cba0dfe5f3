"""Kernels that read other ranks' memory: all ranks in one process, in the simulator or on one GPU."""

import contextlib

import numpy as np
import pytest
import torch
from numba_moe.reference import parallel as twin
from numba_moe.reference.dispatch import static_map

import numba_moe
from numba_moe import reference
from numba_moe.device import simulator
from numba_moe.parallel import PeerTimeoutError, TokenDispatcher, emulate
from numba_moe.placement import ExpertLocation
from numba_moe.runtime import torch_private

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def kernels():
    with contextlib.nullcontext() if ON_GPU else simulator.running():
        yield


def tokens_of(rng, counts, num_experts, top_k, hidden, dtype):
    """Return rows, ids and weights of all ranks."""
    found = []
    for count in counts:
        rows = rng.integers(0, 256, (count, hidden)) if dtype == "uint8" else rng.standard_normal((count, hidden))
        ids = rng.random((count, max(num_experts, top_k))).argsort(1)[:, :top_k] % num_experts
        ids[rng.random(ids.shape) < 0.25] = rng.choice([-1, num_experts])
        found.append((rows.astype(dtype), ids.astype(np.int32), rng.random(ids.shape, np.float32)))
    return [list(part) for part in zip(*found, strict=True)]


def rows_of(sent, layout):
    return sent.hidden_states if layout == "tokens" else sent.permuted_hidden_states


# ranks, tokens of each, experts, top_k, hidden, dtype, reduce, layout, more
CASES = {
    "rows of 16 bytes": (2, (3, 0), 4, 2, 8, "float32", "rank", "permuted", {}),
    "rows of bytes, with scales": (2, (2, 3), 5, 2, 7, "uint8", "rank", "permuted", {"scales": 3}),
    "batches": (3, (2, 3, 1), 5, 2, 9, "float16", "source", "masked", {}),
    "tokens": (3, (2, 3, 1), 5, 2, 8, "float32", "rank", "tokens", {}),
    "a row of each slot": (2, (2, 1), 4, 3, 8, "float16", "source", "tokens", {}),
    "many picks": (2, (1, 2), 40, 34, 4, "float32", "source", "permuted", {}),
    "capacity": (2, (3, 3), 4, 2, 8, "float32", "rank", "permuted", {"capacity": 2}),
    "aligned": (2, (3, 1), 3, 2, 8, "float32", "source", "permuted", {"alignment": 4}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if i > 2 else n for i, n in enumerate(CASES)])
def test_ranks_that_share_memory_do_what_the_reference_does(name):
    num_ranks, counts, num_experts, top_k, hidden, dtype, reduce, layout, more = CASES[name]
    rng = np.random.default_rng(7)
    steps = [tokens_of(rng, counts, num_experts, top_k, hidden, dtype) for _ in range(2)]
    scales = [rng.random((count, more.get("scales", 0)), np.float32) for count in counts]
    slots = num_experts + 1  # an expert has a replica
    location = ExpertLocation.trivial(1, num_experts, slots, num_gpus=num_ranks)
    out_dtype = torch.float32 if dtype == "uint8" else getattr(torch, dtype)
    sizes = {"num_experts": num_experts, "top_k": top_k, "hidden": hidden, "max_tokens": max(counts)}
    sizes |= {"location": location}
    options = {"reduce": reduce, "capacity": more.get("capacity"), "device": DEVICE, "timeout": 20.0}

    def experts(sent):
        made = rows_of(sent, layout).to(out_dtype) * 0.375
        return made[:, None].repeat(1, top_k, 1) if layout == "tokens" else made

    def program(group):
        if dtype == "uint8":
            sizes["scale_bytes"], options["reduce"] = 12, reduce
        dispatcher = TokenDispatcher(group, **sizes, dtype=getattr(torch, dtype), **options)
        assert dispatcher.transport == "nvlink"
        found = []
        for step in steps:
            mine = [torch.from_numpy(part[group.rank]).to(DEVICE) for part in step]
            of_mine = torch.from_numpy(scales[group.rank]).to(DEVICE) if "scales" in more else None
            shape = {"layout": layout, "alignment": more.get("alignment")}
            sent = dispatcher.dispatch(*mine, of_mine, **shape)
            kept = sent._replace(topk_ids=sent.topk_ids.clone(), topk_weights=sent.topk_weights.clone())
            if dtype == "uint8":
                dispatcher.release(sent)
                found.append((kept, None))
            else:
                found.append((kept, dispatcher.combine(experts(sent), sent)))
            dispatcher.check()
        return found

    results = emulate(num_ranks, program)
    table = static_map(location)[0].astype(np.int32)
    for number, (rows, ids, weights) in enumerate(steps):
        placed = [reference.dispatch_ids(i, table[:, rank]) for rank, i in enumerate(ids)]
        shape = {"layout": layout, "alignment": more.get("alignment"), "capacity": more.get("capacity")}
        given = scales if "scales" in more else None
        if layout == "masked":
            shape["capacity"] = num_ranks * max(counts)
        wanted = twin.dispatch(rows, placed, weights, location.rank_of_slot, scales=given, **shape)
        for rank, expected in enumerate(wanted):
            sent, out = results[rank][number]
            here = (sent.topk_ids >= 0).any(1).cpu()
            assert np.array_equal(sent.topk_ids.cpu()[here], expected.topk_ids)
            assert np.array_equal(sent.topk_weights.cpu()[here], expected.topk_weights)
            assert sent.num_dropped.tolist() == expected.num_dropped.tolist()
            if layout == "tokens":
                assert np.array_equal(sent.hidden_states.cpu()[here], expected.hidden_states)
            elif layout == "permuted":
                assert sent.expert_first_token_offset.tolist() == expected.expert_first_token_offset.tolist()
                used = np.flatnonzero(expected.permuted_idx < expected.topk_ids.size)
                assert np.array_equal(sent.permuted_hidden_states.cpu()[used], expected.permuted_hidden_states[used])
                if given is not None:
                    assert np.array_equal(sent.permuted_scales.cpu()[used], expected.permuted_scales[used])
            else:
                assert sent.masked_m.tolist() == expected.masked_m.tolist()
                for batch, count in enumerate(expected.masked_m.tolist()):
                    mine = sent.permuted_hidden_states[batch, :count].cpu()
                    assert np.array_equal(mine, expected.permuted_hidden_states[batch, :count])
            if out is not None:
                mine = [torch.from_numpy(part[rank]).to(DEVICE) for part in (rows, ids, weights)]
                check_sums(out, mine, num_experts, table[:, rank], location, reduce, more)


def check_sums(out, mine, num_experts, places, location, reduce, more):
    """Compare what came back with one rank's own `moe_unpermute`, bit for bit: of all slots, or rank by rank."""
    if "capacity" in more:
        return
    rows, ids, weights = mine
    permuted = numba_moe.moe_permute(rows, ids, num_experts)
    made, index = permuted.permuted_hidden_states * 0.375, permuted.inv_permuted_idx
    if reduce == "source":
        assert torch.equal(out, numba_moe.moe_unpermute(made, weights, index))
        return
    ranks = location.rank_of_slot[places[ids.clamp(0, num_experts - 1).cpu().numpy()]]
    total = torch.zeros(rows.shape, device=rows.device)
    for rank in range(location.num_gpus):
        of_rank = torch.where(torch.from_numpy(ranks == rank).to(index.device), index, -1)
        total += numba_moe.moe_unpermute(made, weights, of_rank).float()
    assert torch.equal(out, total.to(out.dtype))


def test_a_rank_that_does_not_come_is_named_and_the_others_go_on():
    sizes = {"num_experts": 3, "top_k": 1, "hidden": 4, "max_tokens": 1, "dtype": torch.float32}

    def program(group):
        dispatcher = TokenDispatcher(group, **sizes, device=DEVICE, timeout=0.05)
        if group.rank == 1:
            return None
        rows, weights = torch.ones(1, 4, device=DEVICE), torch.ones(1, 1, device=DEVICE)
        ids = torch.tensor([[group.rank]], dtype=torch.int32, device=DEVICE)
        sent = dispatcher.dispatch(rows, ids, weights)
        if ON_GPU:
            torch.cuda.synchronize()
        with pytest.raises(PeerTimeoutError, match=r"rank 1 told of dispatch 0, not 1, within 0\.05 s") as found:
            dispatcher.check()
        assert (found.value.rank, found.value.phase) == (1, "dispatch")
        dispatcher.active_ranks = [True, False, True]
        outs = [dispatcher.combine(sent.permuted_hidden_states, sent)]
        for expert in (1, group.rank):
            sent = dispatcher.dispatch(rows, torch.full_like(ids, expert), weights)
            outs.append(dispatcher.combine(2 * sent.permuted_hidden_states, sent))
        dispatcher.check()
        return [float(out.sum()) for out in outs]

    assert emulate(3, program) == [[4.0, 0.0, 8.0], None, [4.0, 0.0, 8.0]]


def test_a_rank_that_fails_ends_all():
    ended = []

    def program(group):
        try:
            for _ in range(3):
                group.turn()
            if group.rank == 1:
                raise KeyError("lost")
            while True:
                group.turn()
        finally:
            ended.append(group.rank)

    with pytest.raises(KeyError, match="lost"):
        emulate(3, program)
    assert sorted(ended) == [0, 1, 2]
    assert emulate(2, lambda group: group.rank) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["rank", "source"])
@pytest.mark.parametrize("layout", ["permuted", "tokens"])
def test_gradients_come_home(reduce, layout):
    rng = np.random.default_rng(3)
    rows, ids, weights = tokens_of(rng, (2, 1), 4, 2, 8, "float32")
    sizes = {"num_experts": 4, "top_k": 2, "hidden": 8, "max_tokens": 2, "dtype": torch.float32}

    def program(group):
        dispatcher = TokenDispatcher(group, **sizes, device=DEVICE, reduce=reduce, timeout=20.0)
        x, chosen, weight = (torch.from_numpy(part[group.rank]).to(DEVICE) for part in (rows, ids, weights))
        mine = [x.requires_grad_(), weight.requires_grad_()]
        sent = dispatcher.dispatch(mine[0], chosen, mine[1], layout=layout)
        made = rows_of(sent, layout) * 2
        out = dispatcher.combine(made[:, None].expand(-1, 2, -1) if layout == "tokens" else made, sent)
        return torch.autograd.grad(out, mine, torch.full_like(out, 3.0))

    found = emulate(2, program)
    assert not torch_private.is_in_backward()  # though passes of two ranks took turns
    for rank, (by_rows, by_weights) in enumerate(found):
        known = (ids[rank] >= 0) & (ids[rank] < 4)
        slope = 6 * (weights[rank] * known).sum(1, keepdims=True)
        np.testing.assert_allclose(by_rows.cpu(), np.broadcast_to(slope, by_rows.shape), rtol=1e-6)
        np.testing.assert_allclose(by_weights.cpu(), 6 * rows[rank].sum(1, keepdims=True) * known, rtol=1e-5, atol=1e-5)
