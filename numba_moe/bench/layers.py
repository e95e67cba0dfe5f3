"""fused_experts beside the experts of vLLM and of Hugging Face transformers, and beside what reading takes.

A result is compared before it is timed. Device time is that of a replayed CUDA graph, eager time that between two
events around one call, host time that of a call while the queue has room. The floor is the time in which the matrices
of the experts that are chosen can be read, at the bandwidth of a large read in the same process. Weights are drawn at
random, and so is the routing.
"""

import argparse
import importlib
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe import fused_experts
from numba_moe.bench.contenders import OURS, load_peers
from numba_moe.bench.measure import device_time, host_time, read_bandwidth
from numba_moe.runtime.text import fitted
from numba_moe.verify import testing, verification


class Layer(NamedTuple):
    """Sizes of a published model's experts, or of those that a rank of several has."""

    hidden: int
    width: int
    experts: int
    top_k: int


LAYERS = {
    "Mixtral-8x7B": Layer(4096, 14336, 8, 2),
    "Qwen3-30B-A3B": Layer(2048, 768, 128, 8),
    "Qwen3-235B-A22B / 4": Layer(4096, 1536, 32, 8),
    "OLMoE": Layer(2048, 1024, 64, 8),
    "gpt-oss-20b": Layer(2880, 2880, 32, 4),
    "DeepSeek-V3 / 4": Layer(7168, 2048, 64, 8),
    "Llama-4-Scout": Layer(5120, 8192, 16, 1),
    "Kimi-K2 / 8": Layer(7168, 2048, 48, 8),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
ROUTINGS = ("uniform", "zipf")


class Times(NamedTuple):
    """What a call took, in microseconds."""

    device: float
    eager: float
    host: float


class Row(NamedTuple):
    """The times of one layer for a number of tokens, by who multiplies."""

    layer: str
    routing: str
    tokens: int
    in_use: int  # experts that are chosen
    floor: float
    times: dict[str, Times]

    @property
    def ratio(self) -> float:
        """Our device time over that of the best peer; NaN if there is none."""
        peers = [times.device for name, times in self.times.items() if name != OURS]
        return self.times[OURS].device / min(peers, default=float("nan"))


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


def contenders(weights: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the functions of tokens, their weights and ids that are here: ours, and those of peers."""
    found: dict[str, Callable[..., torch.Tensor]] = {OURS: lambda rows, *chosen: fused_experts(rows, *weights, *chosen)}
    theirs = {
        "transformers": "transformers.integrations.moe.grouped_mm_experts_forward",
        "vllm": "vllm.model_executor.layers.fused_moe.fused_moe.fused_experts_impl",
    }
    experts = as_module(*weights)
    for name, path in theirs.items():
        module, _, function = path.rpartition(".")
        try:
            theirs_function = getattr(importlib.import_module(module), function)
        except ImportError:
            continue
        if name == "vllm":
            found[name] = lambda rows, *chosen, call=theirs_function: call(rows, *weights, *chosen)
        else:
            found[name] = lambda rows, shares, ids, call=theirs_function: call(experts, rows, ids.long(), shares)
    return found


@torch.no_grad()
def measure(
    name: str, tokens: int, weights: tuple[torch.Tensor, torch.Tensor], routing: str, bytes_per_us: float
) -> Row:
    """Compare, then time, one layer for a number of tokens."""
    layer = LAYERS[name]
    rng = np.random.default_rng(0)
    ids = testing.to_device(testing.random_ids(rng, tokens, layer.experts, layer.top_k, routing), "cuda")
    rows = torch.randn(tokens, layer.hidden, dtype=torch.float32, device="cuda").bfloat16()
    shares = torch.rand(tokens, layer.top_k, dtype=torch.float32, device="cuda")
    shares /= shares.sum(-1, keepdim=True)
    calls = {name: lambda call=call: call(rows, shares, ids) for name, call in contenders(weights).items()}
    found = calls[OURS]()
    for other, call in calls.items():
        wanted = testing.to_numpy(call())
        size = testing.EXPERT_ROUNDINGS * testing.largest_in_row(wanted)
        comparison = testing.compare(found, wanted, size=size)
        if comparison.mismatches:
            raise RuntimeError(
                f"{name}, {tokens} tokens: {comparison.mismatches} differ from {other}'s, {comparison.message}"
            )
    in_use = ids.unique().numel()
    floor = in_use * sum(part[0].nbytes for part in weights) / bytes_per_us
    clocks = (device_time, testing.time_on_device, host_time)
    times = {other: Times(*(clock(call) for clock in clocks)) for other, call in calls.items()}
    return Row(name, routing, tokens, in_use, floor, times)


def table(rows: list[Row]) -> str:
    """Format the times for a terminal."""
    names = list(rows[0].times)
    lines = [
        (
            *(row.layer, row.routing, row.tokens, row.in_use, f"{row.floor:.1f}"),
            *(f"{time:.1f}" for name in names for time in row.times[name]),
            *(f"{row.floor / row.times[OURS].device:.0%}", f"{row.ratio:.3f}"),
        )
        for row in rows
    ]
    clocks = [f"{name} {clock}" for name in names for clock in Times._fields]
    headers = ("layer", "routing", "tokens", "experts", "floor us", *clocks, "floor / ours", "ours / best")
    return fitted(lines, headers, keys=4, disable_numparse=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--layer", action="append", choices=LAYERS, help="only these")
    parser.add_argument("--tokens", type=int, action="append", help=f"only these (default {TOKENS})")
    parser.add_argument("--routing", action="append", choices=testing.ROUTINGS, help=f"default {ROUTINGS}")
    parser.add_argument("--peer-lib", type=Path, action="append", default=[], metavar="FILE", help="op library to load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there too")


def run(options: argparse.Namespace) -> int:
    """Print a table; return 1 if ours took longer on the device than the best peer's for any row."""
    where = verification.environment(on_gpu=True)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    load_peers(None, options.peer_lib)
    bytes_per_us, rows = read_bandwidth(), []
    for name in options.layer or LAYERS:
        weights = weights_of(LAYERS[name])
        for routing in options.routing or ROUTINGS:
            rows += [measure(name, tokens, weights, routing, bytes_per_us) for tokens in options.tokens or TOKENS]
        del weights
    print(table(rows))
    if options.json is not None:
        found = [
            row._asdict() | {"times": {name: times._asdict() for name, times in row.times.items()}} for row in rows
        ]
        report = {"environment": where, "read_bytes_per_us": bytes_per_us, "rows": found}
        options.json.write_text(json.dumps(report, indent=1))
    return int(any(row.ratio > 1 for row in rows))
