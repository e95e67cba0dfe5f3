"""Time an MoE block eager, compiled, and compiled for CUDA graphs, with our ops and with a peer's; needs a GPU.

python scripts/bench_compile.py --peer-lib vllm_moe.so
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

import numba_moe
from numba_moe import testing
from numba_moe.bench.contenders import is_registered, load_peers
from numba_moe.experts import multiply_by_expert

REPEATS = 101
NOISE = 1.03

Block = Callable[..., torch.Tensor]


def ours(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, top_k: int) -> torch.Tensor:
    """Choose experts and run them."""
    weights, ids = numba_moe.topk_softmax(x @ gate, top_k, renormalize=True)
    return numba_moe.fused_experts(x, up, down, weights, ids)


def vllm(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, top_k: int) -> torch.Tensor:
    """Do the same with the ops of vLLM, and torch's GEMMs and activation."""
    ops, (num_tokens, num_experts) = torch.ops._moe_C, (len(x), gate.shape[1])
    num_slots = num_tokens * top_k

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    weights, ids = empty(num_tokens, top_k, dtype=torch.float32), empty(num_tokens, top_k)
    source = empty(num_tokens, top_k)
    ops.topk_softmax(weights, ids, source, x @ gate, True, None)
    rows, offset = empty(num_slots, x.shape[1], dtype=x.dtype), empty(num_experts + 1, dtype=torch.int64)
    inverse, slots = empty(num_tokens, top_k), torch.full((num_slots,), num_slots, dtype=torch.int32, device=x.device)
    each = torch.arange(num_slots, dtype=torch.int32, device=x.device).reshape(num_tokens, top_k)
    ops.moe_permute(x, ids, each, None, num_experts, num_experts, top_k, rows, offset, inverse, slots)
    ends = offset[1:].int()
    gates, ups = multiply_by_expert(rows, up, ends, grouped=True).chunk(2, dim=-1)
    rows = multiply_by_expert(torch.nn.functional.silu(gates) * ups, down, ends, grouped=True)
    out = empty(num_tokens, x.shape[1], dtype=x.dtype)
    ops.moe_unpermute(rows, weights, inverse.flatten(), None, top_k, out)
    return out


@torch.no_grad()
def main() -> int:
    """Return 1 if results differ, or our compiled block takes longer than eager or than the peer's, beyond noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 2048), ("width", 768), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, action="append", help="default 1, 64, 512 and 4096")
    parser.add_argument("--peer-lib", type=Path, action="append", default=[], help="vLLM's ops, if not installed")
    given = parser.parse_args()
    load_peers(None, given.peer_lib)
    blocks: dict[str, Block] = {"numba_moe": ours}
    if is_registered("_moe_C.moe_permute"):
        for name in ("topk_softmax", "moe_permute", "moe_unpermute"):  # which only write to their arguments
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"_moe_C::{name}", "Meta"):
                torch.library.register_fake(f"_moe_C::{name}", lambda *arguments: None)
        blocks["vllm"] = vllm

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    gate = draw(given.hidden, given.experts)
    up, down = draw(given.experts, 2 * given.width, given.hidden), draw(given.experts, given.hidden, given.width)
    rows, failed = [], False
    for num_tokens in given.tokens or (1, 64, 512, 4096):
        arguments = (draw(num_tokens, given.hidden) * given.hidden**0.5, gate, up, down, given.top_k)
        expected = ours(*arguments)
        times: dict[str, list[float]] = {}
        for name, block in blocks.items():
            for mode in ("default", "reduce-overhead", None):
                call = block if mode is None else torch.compile(block, fullgraph=True, mode=mode)
                error = (call(*arguments) - expected).norm() / expected.norm()
                failed |= not error < 1e-2
                timed = functools.partial(call, *arguments)
                testing.time_on_device(timed, REPEATS)  # in which graphs are recorded
                times.setdefault(name, []).append(testing.time_on_device(timed, REPEATS))
        *compiled, eager = times["numba_moe"]
        for column, own in enumerate(compiled):
            failed |= own > NOISE * min(eager, *(of_block[column] for of_block in times.values()))
        rows.append((num_tokens, *itertools.chain(*times.values())))
        torch.compiler.reset()
    headers = [f"{name} {how}" for name in blocks for how in ("compiled", "reduce-overhead", "eager")]
    print(tabulate(rows, ("tokens", *headers), floatfmt=".1f"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
