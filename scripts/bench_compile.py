"""Time an MoE block eager and compiled, with our ops and with a peer's; needs a GPU.

python scripts/bench_compile.py --peer-lib vllm_moe.so

"graphs" is compiled for torch's own CUDA graphs, "captured" compiled and then captured into one, as serving engines do.
"queued" is the time of one of many calls that do not wait for each other, "alone" that of a call on an idle device.
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import numba_moe
from numba_moe.bench.contenders import is_registered, load_peers
from numba_moe.ops.grouped_products import product_by_expert
from numba_moe.verify import testing

CALLS = 50
REPEATS = 21
ROUNDS = 9  # over all blocks, of which the best time counts: what else the host does only adds
NOISE = 1.03
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead", "captured": "default"}

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class Block(torch.nn.Module):
    """A router and its experts, in bfloat16."""

    def __init__(self, run: Experts, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, top_k: int) -> None:
        super().__init__()
        self.run, self.top_k = run, top_k
        self.gate, self.up, self.down = (torch.nn.Parameter(part, requires_grad=False) for part in (gate, up, down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, x @ self.gate, self.up, self.down, self.top_k)


def ours(x: torch.Tensor, logits: torch.Tensor, up: torch.Tensor, down: torch.Tensor, top_k: int) -> torch.Tensor:
    """Choose experts and run them."""
    weights, ids = numba_moe.topk_softmax(logits, top_k, renormalize=True)
    return numba_moe.fused_experts(x, up, down, weights, ids)


def vllm(x: torch.Tensor, logits: torch.Tensor, up: torch.Tensor, down: torch.Tensor, top_k: int) -> torch.Tensor:
    """Do the same with the ops of vLLM, and torch's GEMMs and activation."""
    ops, (num_tokens, num_experts) = torch.ops._moe_C, logits.shape
    num_slots = num_tokens * top_k

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    weights, ids = empty(num_tokens, top_k, dtype=torch.float32), empty(num_tokens, top_k)
    source = empty(num_tokens, top_k)
    ops.topk_softmax(weights, ids, source, logits, True, None)
    rows, offset = empty(num_slots, x.shape[1], dtype=x.dtype), empty(num_experts + 1, dtype=torch.int64)
    inverse, slots = empty(num_tokens, top_k), torch.full((num_slots,), num_slots, dtype=torch.int32, device=x.device)
    each = torch.arange(num_slots, dtype=torch.int32, device=x.device).reshape(num_tokens, top_k)
    ops.moe_permute(x, ids, each, None, num_experts, num_experts, top_k, rows, offset, inverse, slots)
    ends = offset[1:].int()
    gates, ups = product_by_expert(rows, up, ends, grouped=True).chunk(2, dim=-1)
    rows = product_by_expert(torch.nn.functional.silu(gates) * ups, down, ends, grouped=True)
    out = empty(num_tokens, x.shape[1], dtype=x.dtype)
    ops.moe_unpermute(rows, weights, inverse.flatten(), None, top_k, out)
    return out


def captured(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a call that replays a CUDA graph of another and returns that one's result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    result.fill_(math.nan)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def queued_time(call: Callable[[], Any]) -> float:
    """Return the microseconds of a call among many that are queued one behind another."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return testing.time_on_device(calls, 5) / CALLS


def alone_time(call: Callable[[], Any]) -> float:
    """Return the microseconds from a call on an idle device to its end."""
    return testing.time_on_device(call, REPEATS)


@torch.no_grad()
def main() -> int:
    """Return 1 if results differ, or our block compiled takes longer than eager or than the peer's, beyond noise.

    Compiled is the best of the ways to compile.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 2048), ("width", 768), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, action="append", help="default 1, 64, 512 and 4096")
    parser.add_argument("--peer-lib", type=Path, action="append", default=[], help="vLLM's ops, if not installed")
    given = parser.parse_args()
    load_peers(None, given.peer_lib)
    torch._inductor.config.compile_threads = 1  # other processes of the compiler would take time from what is timed
    implementations: dict[str, Experts] = {"numba_moe": ours}
    if is_registered("_moe_C.moe_permute"):
        for name in ("topk_softmax", "moe_permute", "moe_unpermute"):  # which only write to their arguments
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"_moe_C::{name}", "Meta"):
                torch.library.register_fake(f"_moe_C::{name}", lambda *arguments: None)
        implementations["vllm"] = vllm

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    matrices = (
        draw(given.hidden, given.experts),
        draw(given.experts, 2 * given.width, given.hidden),
        draw(given.experts, given.hidden, given.width),
    )
    blocks = {name: Block(run, *matrices, given.top_k) for name, run in implementations.items()}
    clocks = {"queued": queued_time, "alone": alone_time}
    rows, failed = [], False
    for num_tokens in given.tokens or (1, 64, 512, 4096):
        x = draw(num_tokens, given.hidden) * given.hidden**0.5
        expected = blocks["numba_moe"](x)
        calls: dict[tuple[str, str], Callable[[], torch.Tensor]] = {}
        for (name, block), (how, mode) in itertools.product(blocks.items(), MODES.items()):
            call = block if mode is None else torch.compile(block, fullgraph=True, mode=mode)
            calls[name, how] = functools.partial(call, x)
            for step in range(4):  # in the first three of which torch's graphs are recorded
                if (how, step) == ("captured", 3):
                    calls[name, how] = captured(calls[name, how])
                error = (calls[name, how]() - expected).norm() / expected.norm()
                failed |= not error < 1e-2
        times: dict[tuple[str, str, str], float] = {}
        for _, ((name, how), call), (clock, measure) in itertools.product(range(ROUNDS), calls.items(), clocks.items()):
            times[name, how, clock] = min(times.get((name, how, clock), math.inf), measure(call))
        for clock in clocks:
            row = {(name, how): times[name, how, clock] for name, how in itertools.product(blocks, MODES)}
            compiled = {name: min(row[name, how] for how in MODES if how != "eager") for name in blocks}
            failed |= compiled["numba_moe"] > NOISE * min(row["numba_moe", "eager"], *compiled.values())
            rows.append((num_tokens, clock, *row.values()))
        torch.compiler.reset()
    headers = [f"{name} {how}" for name, how in itertools.product(blocks, MODES)]
    print(tabulate(rows, ("tokens", "us", *headers), floatfmt=".1f"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
