"""fused_experts beside the grouped_mm implementation of Hugging Face transformers, and beside its GEMMs alone.

A result is compared before it is timed. Device time is that of a replayed CUDA graph, eager time that between two
events around one call, host time that of a call while the queue has room. Weights are drawn at random, and so is
the routing: skewed, as trained routers are.
"""

import argparse
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate

from numba_moe import fused_experts, moe_permute
from numba_moe.bench.measure import device_time, host_time
from numba_moe.ops.experts import product_by_expert
from numba_moe.verify import testing, verification


class Layer(NamedTuple):
    """Sizes of a published model's experts."""

    hidden: int
    width: int
    experts: int
    top_k: int


LAYERS = {
    "Mixtral-8x7B": Layer(4096, 14336, 8, 2),
    "Qwen3-30B-A3B": Layer(2048, 768, 128, 8),
    "DeepSeek-V3": Layer(7168, 2048, 256, 8),
}
TOKENS = (1, 64, 1024, 8192)


class Row(NamedTuple):
    """What one layer took for so many tokens, in microseconds; the share is of our device time."""

    layer: str
    tokens: int
    ours_device: float
    theirs_device: float
    ours_eager: float
    theirs_eager: float
    ours_host: float
    theirs_host: float
    gemms: float

    @property
    def outside(self) -> float:
        """The share of our time that is not the GEMMs'."""
        return 1 - self.gemms / self.ours_device


def weights_of(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the matrices of all experts, in bfloat16."""
    shapes = ((layer.experts, 2 * layer.width, layer.hidden), (layer.experts, layer.hidden, layer.width))
    drawn = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    gate_up_proj, down_proj = (weights.normal_(std=weights.shape[-1] ** -0.5) for weights in drawn)
    return gate_up_proj, down_proj


def as_module(gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> Any:
    """Return what transformers' function takes for a module of experts with silu."""

    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
    matrices = {"gate_up_proj": gate_up_proj, "down_proj": down_proj, "num_experts": len(down_proj)}
    return types.SimpleNamespace(**flags, **matrices, _is_expert_parallel=False, _apply_gate=apply_gate)


@torch.no_grad()
def measure(name: str, tokens: int, weights: tuple[torch.Tensor, torch.Tensor], routing: str) -> Row:
    """Compare, then time, one layer for so many tokens."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    layer = LAYERS[name]
    rng = np.random.default_rng(0)
    ids = testing.to_device(testing.random_ids(rng, tokens, layer.experts, layer.top_k, routing), "cuda")
    rows = torch.randn(tokens, layer.hidden, dtype=torch.float32, device="cuda").bfloat16()
    topk_weights = torch.rand(tokens, layer.top_k, dtype=torch.float32, device="cuda")
    topk_weights /= topk_weights.sum(-1, keepdim=True)
    module, long_ids = as_module(*weights), ids.long()  # which its routers give
    permuted = moe_permute(rows, ids, layer.experts)
    ends = permuted.expert_first_token_offset[1:].int()
    between = torch.randn(ids.numel(), layer.width, dtype=torch.float32, device="cuda").bfloat16()

    def ours() -> torch.Tensor:
        return fused_experts(rows, *weights, topk_weights, ids)

    def theirs() -> torch.Tensor:
        return grouped_mm_experts_forward(module, rows, long_ids, topk_weights)

    def gemms() -> Any:
        first = product_by_expert(permuted.permuted_hidden_states, weights[0], ends, grouped=True)
        return first, product_by_expert(between, weights[1], ends, grouped=True)

    wanted = testing.to_numpy(theirs())
    size = testing.EXPERT_ROUNDINGS * testing.largest_in_row(wanted)
    comparison = testing.compare(ours(), wanted, size=size)
    if comparison.mismatches:
        raise RuntimeError(f"{name}, {tokens} tokens: {comparison.mismatches} differ, {comparison.message}")
    both: tuple[Callable[[], Any], ...] = (ours, theirs)
    times = [clock(call) for clock in (device_time, testing.time_on_device, host_time) for call in both]
    return Row._make((name, tokens, *times, device_time(gemms)))


def table(rows: list[Row]) -> str:
    """Format the times for a terminal."""
    lines = [
        (*row, row.ours_device / row.theirs_device, row.ours_eager / row.theirs_eager, f"{row.outside:.0%}")
        for row in rows
    ]
    clocks = ("device us", "transformers", "eager us", "transformers", "host us", "transformers")
    headers = ("layer", "tokens", *clocks, "GEMMs us", "device ratio", "eager ratio", "outside GEMMs")
    return tabulate(lines, headers, floatfmt=("", "", *7 * (".1f",), ".3f", ".3f", ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--layer", action="append", choices=LAYERS, help="only these")
    parser.add_argument("--tokens", type=int, action="append", help=f"only these (default {TOKENS})")
    parser.add_argument("--routing", choices=testing.ROUTINGS, default="zipf", help="default zipf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there too")


def run(options: argparse.Namespace) -> int:
    """Print a table; return 1 if ours took longer than transformers' for any row."""
    where = verification.environment(on_gpu=True)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows = []
    for name in options.layer or LAYERS:
        weights = weights_of(LAYERS[name])
        rows += [measure(name, tokens, weights, options.routing) for tokens in options.tokens or TOKENS]
        del weights
    print(table(rows))
    if options.json is not None:
        report = {"environment": where, "rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(report, indent=1))
    return int(any(row.ours_device > row.theirs_device or row.ours_eager > row.theirs_eager for row in rows))
