"""Compare dispatch and combine over GPUs with one GPU's own ops, on any number of GPUs of one host.

    python scripts/verify_parallel.py [--replays 10000] [--ranks N]

Each rank compares what comes back, bit by bit, with `moe_permute` and `moe_unpermute` of its own GPU: for each
transport, uneven tokens and none, skewed routing, odd widths, several dtypes; then gradients; a captured graph that is
replayed with ranks delayed at random; and a rank that does not come, whose name the others get in time.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import numba_moe
from numba_moe.parallel import PeerTimeoutError, TokenDispatcher, fused_experts

EXPERTS_A_RANK = 6


def draw(rank: int, count: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype, skew: float) -> list[Any]:
    """Return rows, ids and weights of a rank, the same on every rank that asks for them."""
    generator = torch.Generator(device="cuda").manual_seed(1000 + rank + count)
    rows = torch.randn(count, hidden, device="cuda", generator=generator)
    rows = (rows * 50).to(torch.uint8) if dtype == torch.uint8 else rows.to(dtype)
    scores = torch.rand(count, experts, device="cuda", generator=generator)
    scores[:, : experts // 4] += skew
    weights, ids = scores.topk(top_k, dim=1)
    ids[torch.rand(ids.shape, device="cuda", generator=generator) < 0.1] = -1
    return [rows, ids.to(torch.int32), weights.contiguous()]


def expected(tokens: list[Any], experts: int, ranks: int, by_slot: bool) -> torch.Tensor:
    """Return what comes back, by one GPU's ops: experts multiply by 0.5."""
    rows, ids, weights = tokens
    permuted = numba_moe.moe_permute(rows, ids, experts)
    made, index = permuted.permuted_hidden_states * 0.5, permuted.inv_permuted_idx
    if by_slot:
        return numba_moe.moe_unpermute(made, weights, index)
    parts = []
    for rank in range(ranks):
        mine = torch.where(ids // (experts // ranks) == rank, index, -1).to(torch.int32)
        parts.append(numba_moe.moe_unpermute(made, weights, mine))
    return numba_moe.moe_sum(torch.stack(parts, 1))


def cases() -> Iterator[dict[str, Any]]:
    """Yield sizes, from the usual to the odd."""
    usual = {"count": 130, "top_k": 4, "hidden": 512, "dtype": torch.bfloat16, "skew": 0.0, "layout": "permuted"}
    for transport in ("nvlink", "nccl", "nccl padded"):
        for reduce in ("rank", "source"):
            yield {**usual, "transport": transport, "reduce": reduce}
            yield {**usual, "transport": transport, "reduce": reduce, "count": "uneven", "skew": 2.0}
            yield {**usual, "transport": transport, "reduce": reduce, "count": 1, "hidden": 7168, "top_k": 6}
            yield {**usual, "transport": transport, "reduce": reduce, "layout": "masked", "hidden": 33}
            yield {**usual, "transport": transport, "reduce": reduce, "layout": "tokens", "dtype": torch.float16}
            yield {**usual, "transport": transport, "reduce": reduce, "dtype": torch.float32, "hidden": 7}


def make(case: dict[str, Any], ranks: int, most: int, **more: Any) -> TokenDispatcher:
    name, _, padded = case["transport"].partition(" ")
    return TokenDispatcher(
        num_experts=EXPERTS_A_RANK * ranks,
        top_k=case["top_k"],
        hidden=case["hidden"],
        max_tokens=most,
        dtype=case["dtype"],
        transport=name,
        reduce=case["reduce"],
        padded=bool(padded),
        **more,
    )


def there_and_back(dispatcher: TokenDispatcher, tokens: list[Any], layout: str) -> torch.Tensor:
    sent = dispatcher.dispatch(*tokens, layout=layout)
    if layout == "tokens":
        made = (sent.hidden_states * 0.5)[:, None].expand(-1, dispatcher.top_k, -1).contiguous()
    else:
        made = sent.permuted_hidden_states * 0.5
    return dispatcher.combine(made, sent)


def run_case(case: dict[str, Any], rank: int, ranks: int) -> None:
    count = (130 if rank == 0 else 0) if case["count"] == "uneven" else case["count"]
    dispatcher = make(case, ranks, 130)
    tokens = draw(rank, count, EXPERTS_A_RANK * ranks, case["top_k"], case["hidden"], case["dtype"], case["skew"])
    wanted = expected(tokens, EXPERTS_A_RANK * ranks, ranks, case["reduce"] == "source")
    for _ in range(3):
        out = there_and_back(dispatcher, tokens, case["layout"])
        torch.cuda.synchronize()
        dispatcher.check()
        assert torch.equal(out, wanted), f"{int((out != wanted).sum())} of {out.numel()} elements differ"


def gradients(transport: str, reduce: str, rank: int, ranks: int) -> None:
    """Compare gradients by tokens, weights and matrices with those of one GPU that has all experts and tokens."""
    experts, hidden, width, top_k, count = EXPERTS_A_RANK * ranks, 64, 32, 4, 40
    case = {"transport": transport, "reduce": reduce, "top_k": top_k, "hidden": hidden, "dtype": torch.float32}
    dispatcher = make(case, ranks, count)
    generator = torch.Generator(device="cuda").manual_seed(0)
    up = torch.randn(experts, 2 * width, hidden, device="cuda", generator=generator) / 8
    down = torch.randn(experts, hidden, width, device="cuda", generator=generator) / 8
    mine = slice(rank * EXPERTS_A_RANK, (rank + 1) * EXPERTS_A_RANK)
    every = [draw(r, count, experts, top_k, hidden, torch.float32, 0.0) for r in range(ranks)]
    rows, ids, weights = every[rank]
    here = [rows.clone(), up[mine].clone(), down[mine].clone(), weights.clone()]
    whole = [torch.cat([e[0] for e in every]), up.clone(), down.clone(), torch.cat([e[2] for e in every])]
    here, whole = ([part.requires_grad_() for part in parts] for parts in (here, whole))
    mine_of: Any = fused_experts
    mine_of(*here, ids, dispatcher).square().sum().backward()
    all_of: Any = numba_moe.fused_experts
    all_of(*whole, torch.cat([e[1] for e in every])).square().sum().backward()
    part = slice(rank * count, (rank + 1) * count)
    for one, other, own in zip(here, whole, (part, mine, mine, part), strict=True):
        wanted: Any = other.grad
        torch.testing.assert_close(one.grad, wanted[own], rtol=1e-4, atol=1e-4)


def replay(replays: int, rank: int, ranks: int) -> None:
    """Replay a captured graph, with this rank delayed now and then, and compare every result."""
    case = next(cases())
    dispatcher = make(case, ranks, 130, timeout=60.0)
    tokens = draw(rank, 130, EXPERTS_A_RANK * ranks, case["top_k"], case["hidden"], case["dtype"], 0.0)
    given = [part.clone() for part in tokens]
    others = draw(rank + 50, 130, EXPERTS_A_RANK * ranks, case["top_k"], case["hidden"], case["dtype"], 0.0)
    wanted = [expected(t, EXPERTS_A_RANK * ranks, ranks, False) for t in (tokens, others)]
    for _ in range(2):
        there_and_back(dispatcher, given, "permuted")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = there_and_back(dispatcher, given, "permuted")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    delays = torch.Generator().manual_seed(rank)
    for step in range(replays):
        for part, value in zip(given, others if step % 2 else tokens, strict=True):
            part.copy_(value)
        if torch.rand((), generator=delays) < 0.2:
            torch.cuda._sleep(int(torch.randint(1, 200_000, (), generator=delays)))
        graph.replay()
        wrong += (out != wanted[step % 2]).sum()
    torch.cuda.synchronize()
    dispatcher.check()
    assert int(wrong) == 0, f"{int(wrong)} elements differ over {replays} replays"


def absent(rank: int, ranks: int) -> None:
    """Let the last rank stay away: the others learn who it is, and go on without it."""
    case = next(cases())
    dispatcher = make(case, ranks, 16, timeout=2.0)
    tokens = draw(rank, 16, EXPERTS_A_RANK * ranks, case["top_k"], case["hidden"], case["dtype"], 0.0)
    there_and_back(dispatcher, tokens, "permuted")
    torch.cuda.synchronize()
    dist.barrier()
    if rank == ranks - 1:
        time.sleep(5)
        return
    begin = time.monotonic()
    sent = dispatcher.dispatch(*tokens)
    torch.cuda.synchronize()
    late: list[PeerTimeoutError] = []
    try:
        dispatcher.check()
    except PeerTimeoutError as error:
        late.append(error)
    assert [error.rank for error in late] == [ranks - 1]
    assert time.monotonic() - begin < 4
    dispatcher.active_ranks = [other != ranks - 1 for other in range(ranks)]
    dispatcher.release(sent)
    tokens[1][tokens[1] >= EXPERTS_A_RANK * (ranks - 1)] = -1
    wanted = expected(tokens, EXPERTS_A_RANK * ranks, ranks, False)
    for _ in range(3):
        assert torch.equal(there_and_back(dispatcher, tokens, "permuted"), wanted)
    dispatcher.check()


def work(rank: int, ranks: int, port: int, replays: int, failed: Any) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    device = torch.device("cuda", rank)
    wait = timedelta(seconds=120)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, device_id=device, timeout=wait)

    def section(name: str, function: Callable[[], None]) -> None:
        begin, outcome = time.monotonic(), "ok"
        try:
            function()
        except Exception:
            outcome = f"FAILED\n{traceback.format_exc(limit=6)}"
            with failed.get_lock():
                failed.value += 1
        if rank == 0 or outcome != "ok":
            print(f"rank {rank}: {name}: {outcome} ({time.monotonic() - begin:.1f} s)", flush=True)
        torch.cuda.synchronize()
        dist.barrier()

    for case in cases():
        section(" ".join(str(value) for value in case.values()), lambda case=case: run_case(case, rank, ranks))  # type: ignore[misc]
    for transport in ("nvlink", "nccl"):
        for reduce in ("rank", "source"):
            name = f"gradients {transport} {reduce}"
            section(name, lambda t=transport, r=reduce: gradients(t, r, rank, ranks))  # type: ignore[misc]
    section(f"{replays} replays of a graph", lambda: replay(replays, rank, ranks))
    section("a rank that does not come", lambda: absent(rank, ranks))
    sys.stdout.flush()
    os._exit(0)  # what is left of the last section has nobody to wait for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        print("needs two CUDA devices")
        return 2
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    failed = mp.get_context("spawn").Value("i", 0)
    given = (arguments.ranks, store.port, arguments.replays, failed)
    mp.spawn(work, given, nprocs=arguments.ranks)  # type: ignore[attr-defined]
    print(f"{failed.value} failed")
    return int(failed.value > 0)


if __name__ == "__main__":
    sys.exit(main())
