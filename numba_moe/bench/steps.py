"""Forward and backward of layers beside transformers, torch alone, ScatterMoE and TransformerEngine.

The loss and the gradients of a contender are compared with ours before it is timed. A step is a forward and a backward
pass on leaves without `.grad`; its time is the median between two events around it. Its peak is what it allocates at
most; kept are the bytes between its passes besides its input and its matrices. The floor is the sum of the six grouped
GEMMs of a step, each timed alone in the same process. Weights are drawn at random, and so is the routing.
"""

import argparse
import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear, silu

from numba_moe import fused_experts
from numba_moe.bench import layers
from numba_moe.bench.contenders import OURS
from numba_moe.bench.measure import environment
from numba_moe.ops.grouped_products import multiply_by_expert, outer_by_expert
from numba_moe.ops.permute.permutation import moe_permute
from numba_moe.runtime.text import fitted
from numba_moe.verify import testing

TOKENS = (2048, 16384)
NAMES = ("OLMoE", "Qwen3-30B-A3B", "Mixtral-8x7B")
QUICK: dict[str, Any] = {"names": ("OLMoE",), "tokens": (2048,)}
REPEATS = 20
MIB = 1 << 20
GRADIENTS = ("rows", "gate_up_proj", "down_proj", "topk_weights")


class Problem(NamedTuple):
    """What a step is of: four leaves, the experts of tokens, and the gradient that comes in."""

    rows: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    direction: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self[:4]


class Step(NamedTuple):
    """What a step took; nothing where it is wrong or was refused, and `message` says why."""

    us: float | None = None
    peak: int | None = None
    kept: int | None = None
    message: str = ""


class Row(NamedTuple):
    """The steps of one layer for a number of tokens, by who computed them, and the floor in microseconds."""

    layer: str
    tokens: int
    floor: float
    steps: dict[str, Step]

    @property
    def ratios(self) -> tuple[float | None, float | None]:
        """Our time over the floor, and over that of the best peer."""
        ours = self.steps[OURS].us
        peers = [step.us for name, step in self.steps.items() if name != OURS and step.us is not None]
        if ours is None:
            return None, None
        return ours / self.floor, ours / min(peers) if peers else None


def draw(layer: layers.Layer, tokens: int, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Draw a problem; the routing has some experts that are chosen more often than others."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden, width, experts, top_k = layer
    ids = testing.to_device(testing.random_ids(np.random.default_rng(seed), tokens, experts, top_k, "zipf"), device)

    def normal(*shape: int) -> torch.Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=device)
        return drawn.normal_(std=shape[-1] ** -0.5 if len(shape) == 3 else 1.0, generator=generator)

    shares = torch.rand(tokens, top_k, dtype=torch.float32, device=device, generator=generator) + 0.1
    matrices = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
    leaves = (normal(tokens, hidden), *matrices, shares / shares.sum(-1, keepdim=True))
    rows, gate_up_proj, down_proj, topk_weights = (leaf.requires_grad_() for leaf in leaves)
    return Problem(rows, gate_up_proj, down_proj, topk_weights, ids, normal(tokens, hidden))


def one_by_one(problem: Problem) -> torch.Tensor:
    """Run the experts in torch alone, one after another."""
    combined = torch.zeros_like(problem.rows, dtype=torch.float32)
    for expert, (gate_up_proj, down_proj) in enumerate(zip(problem.gate_up_proj, problem.down_proj, strict=True)):
        tokens, picks = torch.where(problem.topk_ids == expert)
        gate, up = linear(problem.rows[tokens], gate_up_proj).chunk(2, dim=-1)
        down = linear(silu(gate) * up, down_proj) * problem.topk_weights[tokens, picks, None]
        combined = combined.index_add(0, tokens, down.float())
    return combined.to(problem.rows.dtype)


def by_scattermoe(problem: Problem) -> torch.Tensor:
    """Run the experts by ScatterMoE's kernels."""
    theirs: Any = importlib.import_module("scattermoe.parallel_experts")
    experts, top_k = len(problem.down_proj), problem.topk_ids.shape[1]
    order = theirs.flatten_sort_count(problem.topk_ids.long(), experts)
    first, second = (matrix.permute(0, 2, 1) for matrix in (problem.gate_up_proj, problem.down_proj))
    gate, up = theirs.parallel_linear(problem.rows, first, top_k, *order, grouped_out=True).chunk(2, dim=-1)
    options = {"gates": problem.topk_weights.to(problem.rows.dtype), "grouped_in": True}
    found: torch.Tensor = theirs.parallel_linear(silu(gate) * up, second, 1, *order, **options)
    return found


def by_transformer_engine(problem: Problem) -> torch.Tensor:
    """Run the experts by TransformerEngine's permutation and grouped linear layers, on views of the same matrices."""
    te: Any = importlib.import_module("transformer_engine.pytorch")
    experts = len(problem.down_proj)
    counts = torch.bincount(problem.topk_ids.flatten(), minlength=experts).tolist()
    rows, where = te.moe_permute(problem.rows, problem.topk_ids, map_type="index")
    for matrices in (problem.gate_up_proj, problem.down_proj):
        _, width, columns = matrices.shape
        layer = te.GroupedLinear(experts, columns, width, bias=False, params_dtype=rows.dtype, device="meta")
        for expert, matrix in enumerate(matrices.unbind()):
            delattr(layer, f"weight{expert}")
            setattr(layer, f"weight{expert}", matrix)
        rows = layer(rows, counts)
        if matrices is problem.gate_up_proj:
            gate, up = rows.chunk(2, dim=-1)
            rows = silu(gate) * up
    found: torch.Tensor = te.moe_unpermute(rows, where, problem.topk_weights, map_type="index")
    return found


def by_transformers(problem: Problem) -> torch.Tensor:
    """Run the experts by the grouped GEMMs of transformers."""
    theirs: Any = importlib.import_module("transformers.integrations.moe")
    experts = layers.as_module(problem.gate_up_proj, problem.down_proj)
    found: torch.Tensor = theirs.grouped_mm_experts_forward(
        experts, problem.rows, problem.topk_ids.long(), problem.topk_weights
    )
    return found


def by_us(problem: Problem) -> torch.Tensor:
    """Run the experts by `fused_experts`."""
    rows, gate_up_proj, down_proj, topk_weights = problem.leaves
    found: torch.Tensor = fused_experts(rows, gate_up_proj, down_proj, topk_weights, problem.topk_ids)
    return found


Forward = Callable[[Problem], torch.Tensor]
# By name: the package that is needed, and the forward pass.
PEERS: dict[str, tuple[str, Forward]] = {
    "transformers": ("transformers", by_transformers),
    "torch": ("torch", one_by_one),
    "scattermoe": ("scattermoe", by_scattermoe),
    "transformer_engine": ("transformer_engine", by_transformer_engine),
}


def contenders() -> dict[str, Forward]:
    """Return ours, and the peers that are installed."""
    here = {name: call for name, (package, call) in PEERS.items() if importlib.util.find_spec(package) is not None}
    return {OURS: by_us, **here}


def run_step(forward: Forward, problem: Problem) -> tuple[torch.Tensor, ...]:
    """Run both passes; return the loss and the gradients of the leaves, which are left without."""
    result = forward(problem)
    result.backward(problem.direction)
    loss = (result.detach().float() * problem.direction.float()).sum()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in problem.leaves]
    for leaf in problem.leaves:
        leaf.grad = None
    return loss, *grads


def fault(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], dtype: torch.dtype) -> str:
    """Return what is wrong with a loss and gradients, "" if nothing is: their norms may differ by some roundings."""
    allowed = testing.EXPERT_ROUNDINGS * testing.TOLERANCES[dtype][0]
    for name, one, other in zip(GRADIENTS, found[1:], wanted[1:], strict=True):
        error = ((one.float() - other.float()).norm() / other.float().norm()).item()
        if not error <= allowed:
            return f"the gradient of {name} is {error:.2g} off, of its norm"
    size = wanted[1].float().norm() * wanted[1].numel() ** 0.5  # how large a sum of products may be
    error = ((found[0] - wanted[0]).abs() / size).item()
    return "" if error <= allowed else f"the loss is {error:.2g} off"


def kept_bytes(call: Callable[[], Any], known: Sequence[torch.Tensor]) -> tuple[int, Any]:
    """Return the bytes that a call keeps for its gradient besides those of some tensors, and its result."""
    ours, kept = {tensor.untyped_storage().data_ptr() for tensor in known}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    return sum(kept.values()), result


def gemms(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Return the six grouped GEMMs of a step, on rows in expert order."""
    with torch.no_grad():
        sorted_rows = moe_permute(problem.rows, problem.topk_ids, len(problem.down_proj))
        ends = sorted_rows.expert_first_token_offset[1:].to(torch.int32)
        hidden = sorted_rows.permuted_hidden_states
        gate_up = multiply_by_expert(hidden, problem.gate_up_proj, ends)
    narrow = gate_up.chunk(2, dim=-1)[0].contiguous()
    first, second = problem.gate_up_proj.detach(), problem.down_proj.detach()
    return {
        "first": functools.partial(multiply_by_expert, hidden, first, ends),
        "second": functools.partial(multiply_by_expert, narrow, second, ends),
        "rows of the second": functools.partial(multiply_by_expert, hidden, second.transpose(1, 2), ends),
        "matrices of the second": functools.partial(outer_by_expert, hidden, narrow, ends),
        "rows of the first": functools.partial(multiply_by_expert, gate_up, first.transpose(1, 2), ends),
        "matrices of the first": functools.partial(outer_by_expert, gate_up, hidden, ends),
    }


def time_of(call: Callable[[], Any]) -> float:
    """Return the median microseconds of a call, after some that warm up."""
    for _ in range(3):
        call()
    return testing.time_on_device(call, REPEATS)


def tried(forward: Forward, problem: Problem, wanted: Sequence[torch.Tensor]) -> Step:
    """Check a contender's step, then time it and see what memory it takes."""
    step = functools.partial(run_step, forward, problem)
    try:
        message = fault(step(), wanted, problem.rows.dtype)
    except Exception as error:  # a peer may refuse a layer
        return Step(message=f"{type(error).__name__}: {error}")
    if message:
        return Step(message=f"WRONG: {message}")
    kept, result = kept_bytes(functools.partial(forward, problem), problem.leaves)
    del result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    return Step(time_of(step), peak, kept)


def measure(name: str, tokens: int) -> Row:
    """Compare, then time, one layer for a number of tokens."""
    problem = draw(layers.LAYERS[name], tokens, "cuda", torch.bfloat16)
    wanted = run_step(by_us, problem)
    steps = {who: tried(forward, problem, wanted) for who, forward in contenders().items()}
    floor = sum(time_of(gemm) for gemm in gemms(problem).values())
    return Row(name, tokens, floor, steps)


def table(rows: Sequence[Row]) -> str:
    """Format the steps for a terminal."""
    names = list(rows[0].steps)
    lines = []
    for row in rows:
        steps = [row.steps[name] for name in names]
        memory = [None if size is None else size / MIB for step in steps for size in (step.peak, step.kept)]
        notes = "; ".join(f"{name}: {row.steps[name].message}" for name in names if row.steps[name].message)
        lines.append([row.layer, row.tokens, row.floor, *(step.us for step in steps), *row.ratios, *memory, notes])
    headers = ["layer", "tokens", "floor us", *(f"{name} us" for name in names), "ours / floor", "ours / best"]
    headers += [f"{name} {what} MiB" for name in names for what in ("peak", "kept")]
    formats = ["", "", ".0f", *[".0f"] * len(names), ".2f", ".2f", *[".0f"] * (2 * len(names)), ""]
    return fitted(lines, [*headers, "note"], keys=2, floatfmt=formats, missingval="-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--layer", action="append", choices=layers.LAYERS, help=f"only these (default {NAMES})")
    parser.add_argument("--tokens", type=int, action="append", help=f"only these (default {TOKENS})")
    parser.add_argument("--quick", action="store_true", help="one layer and number of tokens, unless others are given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")


def run(options: argparse.Namespace) -> int:
    """Print a table; return 1 if a result of ours is wrong or a step of ours took longer than the best peer's."""
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here, and nothing to time without one")
    names, tokens = (QUICK["names"], QUICK["tokens"]) if options.quick else (NAMES, TOKENS)
    where = environment({})
    print("\n".join(f"{name}: {value}" for name, value in where.items()))
    rows = [measure(name, count) for name in options.layer or names for count in options.tokens or tokens]
    print(table(rows))
    if options.json is not None:
        found = [row._asdict() | {"steps": {who: step._asdict() for who, step in row.steps.items()}} for row in rows]
        options.json.write_text(json.dumps({"environment": where, "rows": found}, indent=1))
    ratios = [row.ratios for row in rows]
    return int(any(floor is None or (best or 0.0) > 1 for floor, best in ratios))
