"""Time dispatch and combine between the GPUs of one host, beside NCCL's collectives of the same bytes.

    python scripts/bench_parallel.py [--ranks N] [--out FILE]

Times are of CUDA graphs, the median of rounds, and of the slowest rank. GB/s are those over the link: what a rank sends
to others, where a token counts once for each rank that it goes to.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tabulate import tabulate

import numba_moe
from numba_moe.parallel import TokenDispatcher

LINK = 450.0  # GB/s in each direction, NVLink 4 of an H100 or H200
TOKENS = (1, 8, 64, 128, 512, 4096)


def settle() -> None:
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()


def time_of(function: Callable[[], Any], calls: int, rounds: int = 7) -> float:
    """Return microseconds of a call, of the slowest rank."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
        settle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                function()
        times = []
        for _ in range(rounds):
            settle()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
    slowest = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def measure(count: int, dtype: torch.dtype, skew: float, rank: int, ranks: int) -> list[dict[str, Any]]:
    hidden, top_k, experts = 7168, 8, 64 * ranks
    generator = torch.Generator(device="cuda").manual_seed(rank)
    rows = torch.randn(count, hidden, device="cuda", generator=generator).to(dtype)
    scores = torch.rand(count, experts, device="cuda", generator=generator)
    scores[:, : experts // ranks] *= skew
    weights, ids = scores.topk(top_k, dim=1)
    ids = ids.to(torch.int32)
    options: dict[str, Any] = {
        "num_experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "max_tokens": count,
        "dtype": dtype,
    }
    dispatcher = TokenDispatcher(**options, transport="nvlink")
    mine = dispatcher.input(count)
    mine.copy_(rows)
    remote = sum(int((ids // (experts // ranks) == r).any(1).sum()) for r in range(ranks) if r != rank)
    moved, back = remote * hidden * dtype.itemsize, remote * hidden * 2
    calls = 20 if count <= 512 else 4
    bf16 = rows.to(torch.bfloat16)

    def whole(given: torch.Tensor) -> None:
        sent = dispatcher.dispatch(given, ids, weights)
        made = sent.permuted_hidden_states
        dispatcher.combine(made, sent)

    def there(given: torch.Tensor) -> None:
        dispatcher.release(dispatcher.dispatch(given, ids, weights))

    out, every = torch.empty_like(bf16), torch.empty(ranks * count, hidden, dtype=torch.bfloat16, device="cuda")
    wide = torch.randn(ranks * count, hidden, device="cuda").to(torch.bfloat16)

    def all_gathered() -> None:
        dist.all_gather_into_tensor(every, bf16)
        permuted = numba_moe.moe_permute(every, all_ids, experts, expert_map, zero_padding=False)
        numba_moe.moe_unpermute(permuted.permuted_hidden_states, all_weights, permuted.inv_permuted_idx, out=wide)
        dist.reduce_scatter_tensor(out, wide)

    all_ids, all_weights = ids.repeat(ranks, 1), weights.repeat(ranks, 1)
    expert_map = torch.full((experts,), -1, dtype=torch.int32, device="cuda")
    expert_map[rank * 64 : rank * 64 + 64] = torch.arange(64, dtype=torch.int32, device="cuda")
    found = [("dispatch and release, copied", time_of(lambda: there(rows), calls), moved)]
    found.append(("dispatch and release, in place", time_of(lambda: there(mine), calls), moved))
    if dtype == torch.bfloat16:
        found.append(("dispatch and combine, in place", time_of(lambda: whole(mine), calls), moved + back))
        found.append(("all_gather, permute, unpermute, reduce_scatter", time_of(all_gathered, calls), moved + back))
        found.append(("NCCL all_to_all_single", time_of(lambda: dist.all_to_all_single(every, wide), calls), 0))
    dispatcher.check()
    return [
        {"tokens": count, "rows": str(dtype)[6:], "skew": skew, "what": what, "us": us, "GB/s": size / us / 1e3}
        | {"% of link": 100 * size / us / 1e3 / LINK}
        for what, us, size in found
    ]


def work(rank: int, ranks: int, port: int, out: str | None) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    device = torch.device("cuda", rank)
    wait = timedelta(seconds=120)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, device_id=device, timeout=wait)
    rows: list[dict[str, Any]] = []
    for count in TOKENS:
        rows += measure(count, torch.bfloat16, 1.0, rank, ranks)
    rows += measure(4096, torch.float8_e4m3fn, 1.0, rank, ranks)
    for skew in (2.0, 4.0):
        rows += measure(4096, torch.bfloat16, skew, rank, ranks)
    if rank == 0:
        print(f"{ranks} x {torch.cuda.get_device_name()}, hidden 7168, top 8 of {64 * ranks} experts")
        print(tabulate(rows, headers="keys", floatfmt=".1f"))
        if out:
            with open(out, "w") as file:
                json.dump(rows, file, indent=1)
    settle()
    sys.stdout.flush()
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--out", help="a .json file for the rows of the table")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        print("needs two CUDA devices")
        return 2
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    given = (arguments.ranks, store.port, arguments.out)
    mp.spawn(work, given, nprocs=arguments.ranks)  # type: ignore[attr-defined]
    return 0


if __name__ == "__main__":
    sys.exit(main())
