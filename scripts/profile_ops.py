"""Show the steps of an MoE layer by name in torch's profiler, with what each takes on host and device.

Eager calls are ranges `numba_moe::<op>`, which NUMBA_MOE_NVTX=1 turns on and Nsight Systems shows too. With --compile
the layer goes through torch.compile, and the ops are there by the names that the dispatcher knows them by.
"""

import argparse
import os

os.environ.setdefault("NUMBA_MOE_NVTX", "1")  # before numba_moe is imported

import torch
from torch.profiler import ProfilerActivity, profile

import numba_moe


def layer(
    logits: torch.Tensor, hidden_states: torch.Tensor, top_k: int
) -> tuple[numba_moe.AlignedBlocks, torch.Tensor]:
    """Route tokens, and bring their rows back as they went."""
    num_experts = logits.shape[1]
    weights, ids = numba_moe.topk_softmax(logits, top_k, renormalize=True)
    blocks = numba_moe.moe_align_block_size(ids, 64, num_experts)
    permuted = numba_moe.moe_permute(hidden_states, ids, num_experts)
    return blocks, numba_moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)


def main() -> None:
    """Profile a few calls and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("experts", 256), ("top-k", 8), ("hidden", 2048), ("calls", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for Perfetto or chrome://tracing too")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    logits = torch.randn(given.tokens, given.experts, dtype=torch.float32, device=device)
    hidden_states = torch.randn(given.tokens, given.hidden, dtype=torch.bfloat16, device=device)
    call = torch.compile(layer, fullgraph=True) if given.compile else layer
    call(logits, hidden_states, given.top_k)  # compiles
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(given.calls):
            call(logits, hidden_states, given.top_k)
        if on_gpu:
            torch.cuda.synchronize()
    print(profiled.key_averages().table(sort_by=f"{device}_time_total", row_limit=20, max_name_column_width=60))
    if given.trace:
        profiled.export_chrome_trace(given.trace)


if __name__ == "__main__":
    main()
