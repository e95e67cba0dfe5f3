"""Functions of ours under the peers' names against the peers' own, called the same way: what differs, one by one.

Both get memory with the same rubbish in it. What peers leave open is left out: the order of slots inside an expert,
what lies past the last block or row in use, rows of gating where rounding decides. Cases keep to what the peers can do:
fewer than 992 experts, no ids below 0 where vLLM 0.21 does not look for them, and sizes that SGLang has kernels for.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from numba_moe.bench import contenders
from numba_moe.interop import sglang, sglang_kernels, vllm, vllm_ops
from numba_moe.reference.align import AlignedBlocks, max_sorted_slots
from numba_moe.reference.gating import TopK
from numba_moe.verify import random_cases, testing

RUBBISH = -77
CASES = 2000


class Shape(NamedTuple):
    """The sizes of a call."""

    tokens: int
    experts: int
    top_k: int
    block_size: int
    hidden: int = 64


class Call(NamedTuple):
    """The arguments of an op, and which of them, by position, it writes; none if it returns its results."""

    args: tuple[Any, ...]
    written: tuple[int, ...]
    about: Mapping[str, Any]  # for the comparison


class Pair(NamedTuple):
    """One function of a peer and ours of that name."""

    theirs: str  # namespace.name in torch.ops, or module.name
    ours: Callable[..., Any]
    draw: Callable[[np.random.Generator, Shape, str], Call]
    fault: Callable[[Any, Any, Mapping[str, Any]], str]


def ints(device: str, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, RUBBISH, dtype=dtype, device=device)


def chosen(rng: np.random.Generator, shape: Shape, device: str) -> torch.Tensor:
    routing = str(rng.choice(testing.ROUTINGS))
    return torch.from_numpy(testing.random_ids(rng, *shape[:3], routing)).to(device)


def some_map(rng: np.random.Generator, experts: int, device: str) -> torch.Tensor:
    """Draw a map to a random number of this rank's experts, numbered in order."""
    local = rng.random(experts) < rng.random()
    return torch.from_numpy(np.where(local, np.cumsum(local) - 1, -1).astype(np.int32)).to(device)


def draw_align(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    ids, block = chosen(rng, shape, device), shape.block_size
    length = max_sorted_slots(ids.numel(), block, shape.experts)
    out = ints(device, length), ints(device, -(-length // block)), ints(device, 1)
    expert_map = some_map(rng, shape.experts, device) if rng.random() < 0.5 else None
    return Call((ids, shape.experts, block, *out, expert_map), (3, 4, 5), {"block_size": block})


def draw_sglang_align(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    ids, block, buckets = chosen(rng, shape, device), shape.block_size, shape.experts + 1
    if rng.random() < 0.5:
        ids = torch.where(torch.from_numpy(rng.random(ids.shape) < 0.1).to(device), -1, ids)
    length = ids.numel() * block if ids.numel() < buckets else ids.numel() + buckets * (block - 1)
    out = ints(device, length), ints(device, -(-length // block)), ints(device, 1)
    args = (ids, buckets, block, *out, ints(device, buckets + 1), True)
    return Call(args, (3, 4, 5), {"block_size": block})


def draw_batched(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    sizes = torch.from_numpy(rng.integers(0, shape.tokens + 1, shape.experts, np.int32)).to(device)
    num_blocks = shape.experts * -(-shape.tokens // shape.block_size)
    out = ints(device, num_blocks * shape.block_size), ints(device, num_blocks), ints(device, 1)
    return Call((shape.tokens, shape.block_size, sizes, *out), (3, 4, 5), {"block_size": shape.block_size})


def draw_lora(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    ids, block, adapters = chosen(rng, shape, device), shape.block_size, int(rng.integers(1, 9))
    mapping = torch.from_numpy(rng.integers(-1, adapters, shape.tokens, np.int32)).to(device)
    length = max_sorted_slots(ids.numel(), block, shape.experts, pad_sorted_ids=True)
    # vLLM leaves rows of adapters as they were that have none of the tokens; callers fill them first
    out = (
        torch.full((adapters * length,), ids.numel(), dtype=torch.int32, device=device),
        torch.full((adapters * (length // block),), -1, dtype=torch.int32, device=device),
        torch.zeros(adapters, dtype=torch.int32, device=device),
    )
    enabled = torch.ones(adapters + 1, dtype=torch.int32, device=device)
    lora_ids = torch.tensor([*range(adapters), -1], dtype=torch.int32, device=device)
    sizes = (shape.experts, block, adapters, length, length // block)
    about = {"block_size": block, "max_loras": adapters}
    return Call((ids, mapping, *sizes, *out, enabled, lora_ids, None), (7, 8, 9), about)


def logits(rng: np.random.Generator, tokens: int, experts: int, device: str, dtype: str = "") -> torch.Tensor:
    dtype = dtype or str(rng.choice(["float32", "float16", "bfloat16"]))
    drawn = testing.random_floats(rng, (tokens, experts))
    return torch.from_numpy(drawn).to(device=device, dtype=getattr(torch, dtype))


def bias_of(rng: np.random.Generator, experts: int, device: str) -> torch.Tensor:
    return torch.from_numpy(0.1 * rng.standard_normal(experts).astype(np.float32)).to(device)


def draw_choice(scoring_func: str, columns: bool) -> Callable[[np.random.Generator, Shape, str], Call]:
    """Return what draws calls of plain gating; vLLM's ops also number the slots, by `columns`."""

    def draw(rng: np.random.Generator, shape: Shape, device: str) -> Call:
        given = logits(rng, shape.tokens, shape.experts, device)
        renormalize = bool(rng.random() < 0.5)
        weights = torch.full((shape.tokens, shape.top_k), torch.nan, dtype=torch.float32, device=device)
        ids = ints(device, shape.tokens, shape.top_k)
        # SGLang adds a bias to the logits of a softmax
        biased = rng.random() < 0.5 and (columns or scoring_func == "sigmoid")
        bias = bias_of(rng, shape.experts, device) if biased else None
        about = {"gating_output": given, "renormalize": renormalize, "correction_bias": bias, "by": scoring_func}
        if columns:
            numbers = ints(device, shape.tokens, shape.top_k)
            return Call((weights, ids, numbers, given, renormalize, bias), (0, 1, 2), about)
        softcap = (0.0,) if scoring_func == "softmax" else ()
        return Call((weights, ids, given, renormalize, *softcap, bias), (0, 1), about)

    return draw


def draw_grouped(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    given, bias = logits(rng, shape.tokens, 256, device), bias_of(rng, 256, device)
    renormalize = bool(rng.random() < 0.5)
    about = {"gating_output": given, "renormalize": renormalize, "correction_bias": bias, "by": "sigmoid"}
    about |= {"num_expert_group": 8, "topk_group": 4}
    return Call((given, 8, 4, 8, renormalize, 1.0, bias, 1), (), about)


def draw_fused_gate(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    given, bias = logits(rng, shape.tokens, 256, device, "float32"), bias_of(rng, 256, device)
    about = {"gating_output": given, "renormalize": True, "correction_bias": bias, "by": "sigmoid"}
    about |= {"num_expert_group": 8, "topk_group": 4}
    return Call((given, bias, 8, 4, 8, 0, 1.0, False), (), about)


def draw_kimi(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    given, bias = logits(rng, shape.tokens, 384, device, "float32"), bias_of(rng, 384, device)
    renormalize = bool(rng.random() < 0.5)
    about = {"gating_output": given, "renormalize": renormalize, "correction_bias": bias, "by": "sigmoid"}
    return Call((given, bias, 8, renormalize, 1.0, False), (), about)


def draw_permute(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    ids, hidden = chosen(rng, shape, device), shape.hidden
    expert_map = some_map(rng, shape.experts, device) if rng.random() < 0.5 else None
    local = shape.experts if expert_map is None else int(expert_map.max()) + 1
    if local == 0:  # a rank without experts is nothing that vLLM has
        expert_map, local = None, shape.experts
    rows = logits(rng, shape.tokens, hidden, device)
    numbers = torch.arange(ids.numel(), dtype=torch.int32, device=device).view(ids.shape)
    out = (
        torch.zeros(ids.numel(), hidden, dtype=rows.dtype, device=device),
        ints(device, local + 1, dtype=torch.int64),
        ints(device, *ids.shape),
        torch.full((ids.numel(),), ids.numel(), dtype=torch.int32, device=device),
    )
    args = (rows, ids, numbers, expert_map, shape.experts, local, shape.top_k, *out)
    return Call(args, (7, 8, 9, 10), {})


def draw_unpermute(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    slots, hidden = shape.tokens * shape.top_k, shape.hidden
    rows = logits(rng, slots, hidden, device)
    weights = torch.from_numpy(rng.random((shape.tokens, shape.top_k), np.float32)).to(device)
    index = torch.from_numpy(rng.permutation(slots).astype(np.int32)).to(device)
    used = int(rng.integers(0, slots + 1))
    offset = torch.tensor([0, used], dtype=torch.int64, device=device) if rng.random() < 0.5 else None
    out = torch.full((shape.tokens, hidden), torch.nan, dtype=rows.dtype, device=device)
    return Call((rows, weights, index, offset, shape.top_k, out), (5,), {})


def slots(rng: np.random.Generator, shape: Shape, device: str) -> torch.Tensor:
    """Draw a row for each slot of each token."""
    drawn = logits(rng, shape.tokens * shape.top_k, shape.hidden, device, "float32")
    return drawn.view(shape.tokens, shape.top_k, shape.hidden)


def draw_sum(*scale: float) -> Callable[[np.random.Generator, Shape, str], Call]:
    """Return a function that draws calls that sum rows, with the factor `scale` if the op takes one."""

    def draw(rng: np.random.Generator, shape: Shape, device: str) -> Call:
        rows = slots(rng, shape, device)
        out = torch.full((shape.tokens, shape.hidden), torch.nan, dtype=torch.float32, device=device)
        return Call((rows, out, *scale), (1,), {})

    return draw


def draw_prepare(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    ids, experts = chosen(rng, shape, device), shape.experts
    written = (ints(device, experts + 1), ints(device, experts, 3), ints(device, experts, 3))
    permutations = ints(device, ids.numel()), ints(device, ids.numel())
    scales = ints(device, experts + 1) if rng.random() < 0.5 else None
    args = (ids, written[0], scales, *written[1:], *permutations, experts, 1024, 2048)
    return Call(args, (1, 2, 3, 4, 5, 6) if scales is not None else (1, 3, 4, 5, 6), {"ids": ids})


def draw_module_gate(
    scoring_func: str, experts: int = 0, *more: Any
) -> Callable[[np.random.Generator, Shape, str], Call]:
    """Return what draws calls of gates that modules have, by a bias if they know no softmax."""

    def draw(rng: np.random.Generator, shape: Shape, device: str) -> Call:
        given = logits(rng, shape.tokens, experts or shape.experts, device, "float32")
        bias = bias_of(rng, given.shape[1], device)
        about = {"gating_output": given, "renormalize": True, "correction_bias": bias, "by": scoring_func}
        args = (given, bias, *(more or (shape.top_k, scoring_func)))
        return Call(args, (), about)

    return draw


def draw_fused_topk(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    given = logits(rng, shape.tokens, shape.experts, device)
    about = {"gating_output": given, "renormalize": True, "correction_bias": None, "by": "softmax"}
    return Call((given, given, shape.top_k, True), (), about)


def draw_scaled(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    (given, _, top_k, _), *_, about = draw_fused_topk(rng, shape, device)
    return Call((given, torch.ones(shape.experts, dtype=torch.float32, device=device), top_k), (), about)


def draw_returned_align(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    return Call((chosen(rng, shape, device), shape.block_size, shape.experts), (), {"block_size": shape.block_size})


def draw_small_align(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    few = shape._replace(tokens=max(1, min(shape.tokens, contenders.SMALL_SLOTS // shape.top_k)))
    args, written, about = draw_sglang_align(rng, few, device)
    return Call(args[:6], written, about)  # without SGLang's scratch


def draw_returned_permute(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    rows = logits(rng, shape.tokens, shape.hidden, device)
    return Call((rows, None, chosen(rng, shape, device), shape.experts), (), {})


def draw_weighted_sum(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    weights = torch.from_numpy(rng.random((shape.tokens, shape.top_k), np.float32)).to(device)
    return Call((slots(rng, shape, device), weights), (), {})


def draw_count(rng: np.random.Generator, shape: Shape, device: str) -> Call:
    return Call((chosen(rng, shape, device), shape.experts, None), (), {})


def align_fault(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    return contenders.align_fault(theirs, AlignedBlocks(*map(testing.to_numpy, ours)), about)


def lora_fault(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    return contenders.lora_fault(theirs, AlignedBlocks(*map(testing.to_numpy, ours)), about)


def choice_fault(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    expected = TopK(*map(testing.to_numpy, ours[:2]))
    if fault := contenders.gating_fault(about["by"], theirs[:2], expected, about):
        return fault
    return same(ours[2:], theirs[2:], about)


def same(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    """Compare all results bit by bit."""
    for place, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        if not torch.equal(left, right):
            return f"result {place} differs"
    return ""


def permute_fault(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    """Compare rows in use, and where the slots of this rank went."""
    used = int(ours[1][-1])
    inverse = [torch.where(parts[2] < used, parts[2], -1) for parts in (ours, theirs)]
    cut = [(parts[0][:used], parts[1], parts[3][:used]) for parts in (ours, theirs)]
    return same((*cut[0], inverse[0]), (*cut[1], inverse[1]), about)


def sum_fault(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    found = testing.compare(theirs[0], testing.to_numpy(ours[0]).astype(np.float64))
    return f"{found.mismatches} elements differ; {found.message}" if found.mismatches else ""


def prepare_fault(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    """Compare sizes; tokens and rows are a pair of maps that fit each other and the experts' ranges."""
    if fault := same(ours[:-2], theirs[:-2], about):
        return fault
    offset, ids = testing.to_numpy(ours[0]), testing.to_numpy(about["ids"])
    tokens, rows = (testing.to_numpy(part) for part in theirs[-2:])
    slots, experts = np.arange(ids.size), ids.ravel()
    if not np.array_equal(np.sort(rows), slots) or not np.array_equal(tokens[rows], slots // ids.shape[1]):
        return "the permutations do not belong together"
    inside = (offset[experts] <= rows) & (rows < offset[experts + 1])
    return "" if inside.all() else "a row lies outside its expert's"


def permute_returned_fault(ours: Any, theirs: Any, about: Mapping[str, Any]) -> str:
    """Compare what the functions return, which is scales too."""
    return permute_fault((ours[0], *ours[2:]), (theirs[0], *theirs[2:]), about)


def prepare_as_registered(*args: Any) -> None:
    """Call ours with the arguments in the op's order, where offsets of scales come third."""
    ids, offsets, scales, sizes1, sizes2, tokens, rows, experts, n, k = args
    sglang.prepare_moe_input(ids, offsets, sizes1, sizes2, tokens, rows, experts, n, k, scales)


PAIRS = (
    Pair("_moe_C.moe_align_block_size", vllm_ops.moe_align_block_size, draw_align, align_fault),
    Pair("_moe_C.batched_moe_align_block_size", vllm_ops.batched_moe_align_block_size, draw_batched, align_fault),
    Pair("_moe_C.moe_lora_align_block_size", vllm_ops.moe_lora_align_block_size, draw_lora, lora_fault),
    Pair("_moe_C.topk_softmax", vllm_ops.topk_softmax, draw_choice("softmax", True), choice_fault),
    Pair("_moe_C.topk_sigmoid", vllm_ops.topk_sigmoid, draw_choice("sigmoid", True), choice_fault),
    Pair("_moe_C.grouped_topk", vllm_ops.grouped_topk, draw_grouped, choice_fault),
    Pair("_moe_C.moe_permute", vllm_ops.moe_permute, draw_permute, permute_fault),
    Pair("_moe_C.moe_unpermute", vllm_ops.moe_unpermute, draw_unpermute, sum_fault),
    Pair("_moe_C.moe_sum", vllm_ops.moe_sum, draw_sum(), sum_fault),
    Pair("sgl_kernel.moe_sum", sglang.moe_sum, draw_sum(), sum_fault),
    Pair("sgl_kernel.moe_sum_reduce", sglang.moe_sum_reduce, draw_sum(2.5), sum_fault),
    Pair("sgl_kernel.moe_align_block_size", sglang.moe_align_block_size, draw_sglang_align, align_fault),
    Pair("sgl_kernel.topk_softmax", sglang.topk_softmax, draw_choice("softmax", False), choice_fault),
    Pair("sgl_kernel.topk_sigmoid", sglang.topk_sigmoid, draw_choice("sigmoid", False), choice_fault),
    Pair("sgl_kernel.moe_fused_gate", sglang.moe_fused_gate, draw_fused_gate, choice_fault),
    Pair("sgl_kernel.kimi_k2_moe_fused_gate", sglang.kimi_k2_moe_fused_gate, draw_kimi, choice_fault),
    Pair("sgl_kernel.prepare_moe_input", prepare_as_registered, draw_prepare, prepare_fault),
)


def in_module(module: str, ours: Any, draw: Any, fault: Any) -> Pair:
    """Return a pair of a function that a module has, from --peer-tree or an installed peer."""
    return Pair(f"{module}.{ours.__name__}", ours, draw, fault)


VLLM, SGLANG = vllm.LAYERS, sglang.KERNELS
DEEPSEEK_V4 = draw_module_gate("softplus_sqrt", 256, torch.int32, 1.0)
MODULE_PAIRS = (
    in_module(f"{VLLM}.moe_align_block_size", vllm.moe_align_block_size, draw_returned_align, align_fault),
    in_module(f"{VLLM}.router.fused_topk_router", vllm.fused_topk, draw_fused_topk, choice_fault),
    in_module(f"{VLLM}.router.dsv4_topk", vllm.dsv4_topk, DEEPSEEK_V4, choice_fault),
    in_module(f"{VLLM}.moe_permute_unpermute", vllm.moe_permute, draw_returned_permute, permute_returned_fault),
    in_module(f"{VLLM}.moe_fused_mul_sum", vllm.moe_fused_mul_sum, draw_weighted_sum, sum_fault),
    in_module(f"{VLLM}.utils", vllm.count_expert_num_tokens, draw_count, same),
    in_module(f"{SGLANG}.moe_fused_gate", sglang_kernels.moe_fused_gate, draw_module_gate("sigmoid"), choice_fault),
    in_module(f"{SGLANG}.moe_align_small_numel", sglang_kernels.moe_align_small_numel, draw_small_align, align_fault),
    in_module(f"{SGLANG}.moe_fused_mul_sum", sglang_kernels.moe_fused_mul_sum, draw_weighted_sum, sum_fault),
    in_module(f"{SGLANG}.gemma4_routing", sglang_kernels.gemma4_fused_routing, draw_scaled, choice_fault),
)


def random_shape(rng: np.random.Generator, most_tokens: int = 8192) -> Shape:
    experts = int(rng.choice([8, 16, 32, 60, 64, 72, 128, 160, 256, 384, 512]))
    top_k = int(rng.choice([1, 2, 4, 6, 8]))
    return Shape(random_cases.number(rng, 1, most_tokens), experts, top_k, int(rng.choice([16, 32, 64, 128])))


def run(call: Callable[..., Any], made: Call) -> Any:
    """Call an op with arguments of its own; return what it wrote or returned."""
    args = [value.clone() if isinstance(value, torch.Tensor) else value for value in made.args]
    results = call(*args)
    if made.written:
        return tuple(args[place] for place in made.written)
    return tuple(results) if isinstance(results, tuple) else (results,)


def peers_own(name: str) -> Callable[..., Any] | None:
    """Return a peer's function, an op or one of a module; None where the peer is not there."""
    parent, _, last = name.rpartition(".")
    if "." not in parent:
        return getattr(getattr(torch.ops, parent), last) if contenders.is_registered(name) else None
    try:
        return getattr(importlib.import_module(parent), last, None)
    except ImportError:
        return None


def as_called(theirs: Callable[..., Any], made: Call) -> Call:
    """Return a call with what newer releases have behind the arguments."""
    return made._replace(args=(*made.args, *contenders.later(theirs, len(made.args))))


def compare(pair: Pair, shape: Shape, seed: Any, device: str, theirs: Callable[..., Any] | None = None) -> str:
    """Return what differs in one case, "" if nothing does."""
    made = pair.draw(np.random.default_rng(seed), shape, device)
    theirs = theirs or peers_own(pair.theirs)
    if theirs is None:
        raise ValueError(f"`pair` must be of a peer that is there, got {pair.theirs!r}")
    return pair.fault(run(pair.ours, made), run(theirs, as_called(theirs, made)), made.about)


def cases(seed: int, count: int) -> list[tuple[Pair, Shape, Any]]:
    """Return the bench's shapes for every op, and then random cases up to `count`, the ops in turn."""
    shapes = [Shape(*shape) for shape in contenders.ALIGN_SHAPES]
    found: list[tuple[Pair, Shape, Any]] = [(pair, shape, (seed, 0)) for pair in PAIRS for shape in shapes]
    for index in range(count):
        drawn = (seed, 1 + index)
        found.append((PAIRS[index % len(PAIRS)], random_shape(np.random.default_rng(drawn)), drawn))
    return found


def main() -> int:
    """Compare, print a table, and return 1 if anything differed or there was nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-lib", type=Path, action="append", default=[], metavar="FILE", help="op library to load")
    parser.add_argument("--cases", type=int, default=CASES, help=f"random ones, beside the bench's (default {CASES})")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    contenders.load_peers(None, given.peer_lib)
    faults: dict[str, list[str]] = {pair.theirs: [] for pair in PAIRS if contenders.is_registered(pair.theirs)}
    progress = tqdm(cases(given.seed, given.cases), unit="case", disable=not sys.stderr.isatty(), leave=False)
    counts = dict.fromkeys(faults, 0)
    for pair, shape, seed in progress:
        if pair.theirs in faults:
            counts[pair.theirs] += 1
            if fault := compare(pair, shape, seed, "cuda"):
                faults[pair.theirs].append(f"{pair.theirs} {shape} seed {seed}: {fault}")
    for found in faults.values():
        print(*found[:5], sep="\n", end="\n" if found else "")
    print(
        tabulate([(name, counts[name], len(found)) for name, found in faults.items()], ("op", "cases", "differences"))
    )
    return int(any(faults.values()) or not faults)
