"""What is timed: the shapes, the ops, the peers, and what makes a peer's result wrong."""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import lzma
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe import align_sizes, reference
from numba_moe.reference.align import AlignedBlocks, max_sorted_slots
from numba_moe.runtime import arrays, files
from numba_moe.verify import testing
from numba_moe.verify.cases import trained_routing
from numba_moe.verify.cases.draws import Case, align_out, counts, empty, floats, given, ids, permutation, uniform

OURS = "numba_moe"
SGLANG_GATE = "sglang.kernels.ops.moe.moe_fused_gate"
# peer -> the torch.ops namespace of its ops, and the module whose import registers them, or has them
PEERS = {
    "vllm": ("_moe_C", "vllm._moe_C"),
    "sglang": ("sgl_kernel", "sgl_kernel"),
    "torch": ("", "torch"),
    "triton": ("", SGLANG_GATE),
    "triton_kernels": ("", "triton_kernels.topk"),
}
# What stands in for the packages around peers' files in a folder of --peer-tree, and the folders there with packages.
STAND_INS = "stub_peers"
PACKAGES_IN_TREE = ("", "triton_kernels_new")

ALIGN_SHAPES = (  # tokens, experts, top_k, block_size
    (1, 64, 2, 16),
    (1, 256, 8, 16),
    (16, 256, 8, 16),
    (64, 256, 8, 16),
    (64, 896, 16, 16),
    (128, 8, 2, 64),
    (512, 256, 8, 64),
    (4096, 64, 2, 128),
    (4096, 256, 8, 64),
    (16384, 256, 8, 128),
    (16384, 512, 10, 128),
    (65536, 256, 8, 128),
    (131072, 128, 8, 128),
)
VARIANT_SHAPES = ((64, 256, 8, 16), (4096, 256, 8, 64), (65536, 256, 8, 128))
COUNT_SHAPES = ((1, 256, 8), (512, 256, 8), (16384, 256, 8), (131072, 128, 8))  # tokens, experts, top_k
BATCHED_SHAPES = ((1, 8, 16), (32, 64, 16), (128, 256, 64), (256, 128, 64), (2048, 32, 128), (4096, 256, 128))
LORA_SHAPES = (  # tokens, experts, top_k, block_size, max_loras
    (1, 64, 8, 16, 1),
    (32, 128, 8, 16, 4),
    (512, 128, 8, 64, 4),
    (4096, 128, 8, 64, 8),
    (16384, 256, 8, 64, 8),
)
RAGGED_SHAPES = ((1, 256, 8), (64, 256, 8), (4096, 128, 4), (16384, 256, 8), (65536, 256, 8))  # tokens, experts, top_k
GATING_SHAPES = (  # tokens, experts, top_k
    (1, 64, 2),
    (1, 256, 8),
    (64, 16, 1),
    (64, 32, 4),
    (64, 128, 4),
    (64, 256, 8),
    (64, 384, 6),
    (64, 512, 22),
    (64, 896, 16),
    (512, 256, 8),
    (4096, 64, 8),
    (4096, 256, 6),
    (4096, 256, 8),
    (4096, 288, 8),
    (4096, 384, 8),
    (4096, 896, 16),
    (16384, 256, 8),
    (16384, 512, 10),
    (65536, 128, 8),
    (4096, 2048, 8),
)
ROUTE_SHAPES = (  # tokens, experts, top_k, block_size
    (1, 64, 2, 16),
    (1, 256, 8, 16),
    (8, 256, 8, 16),
    (16, 256, 8, 16),
    (32, 256, 8, 16),
    (64, 256, 8, 16),
    (64, 128, 8, 16),
    (512, 256, 8, 64),
)
PERMUTE_SHAPES = ((1, 7168, 256, 8), (64, 7168, 256, 8), (4096, 7168, 256, 8), (16384, 2048, 128, 8))  # hidden second
GROUPED_TOKENS = (1, 16, 64, 512, 4096, 16384, 65536)
DTYPES = ("float32", "bfloat16")


class Contender(NamedTuple):
    """One implementation of an op, ready to be called on a case's arguments."""

    name: str  # of the peer, maybe followed by which of its ways it is
    call: Callable[[], Any]
    needs: str = ""  # the op that it calls: namespace.name in torch.ops


class Op(NamedTuple):
    """What the benchmark knows of an op; to add one, fill in these three."""

    cases: Callable[[Sequence[str]], Iterator[Case]]  # of the routings asked for
    peers: Callable[..., Iterator[Contender]]  # of the arguments on the device
    fault: Callable[[Any, Any, Mapping[str, Any]], str]  # of a peer's result, given the reference's; "" if right


def later(function: Any, given: int) -> tuple[Any, ...]:
    """Return what leaves an op as it was, for the parameters that newer releases have behind the first `given` ones."""
    schema = getattr(getattr(function, "default", function), "_schema", None)
    neutral = {"float": 1.0, "bool": False}
    return () if schema is None else tuple(neutral.get(str(more.type)) for more in schema.arguments[given:])


def of_module(module: str, name: str) -> Callable[..., Any]:
    """Return a function that gets another from a module when it is called, and keeps it."""

    @functools.cache
    def find() -> Any:
        return getattr(importlib.import_module(module), name)

    return lambda *args, **options: find()(*args, **options)


def align_cases(routings: Sequence[str]) -> Iterator[Case]:
    for (tokens, experts, top_k, block_size), routing in itertools.product(ALIGN_SHAPES, routings):
        arguments = given(topk_ids=ids(tokens, experts, top_k, routing), block_size=block_size, num_experts=experts)
        yield Case("moe_align_block_size", f"{tokens}x{experts} top {top_k} block {block_size} {routing}", arguments)
    for (tokens, experts, top_k, block_size), routing in itertools.product(VARIANT_SHAPES, routings):
        half = np.where(np.arange(experts) % 2, np.arange(experts) // 2, -1).astype(np.int32)
        num_slots, chosen = tokens * top_k, ids(tokens, experts, top_k, routing)
        space = align_sizes(num_slots, block_size, experts).workspace
        variants: dict[str, dict[str, Any]] = {
            "expert_map": {"expert_map": half},
            "ignore_invalid_experts": {"expert_map": half, "ignore_invalid_experts": True},
            "out": {"out": align_out(num_slots, block_size, experts), "workspace": empty(space)},
            "inverse and counts": {"inv_sorted_idx": empty(tokens, top_k), "counts": empty(experts)},
        }
        for name, options in variants.items():
            arguments = given(topk_ids=chosen, block_size=block_size, num_experts=experts, **options)
            label = f"{tokens}x{experts} top {top_k} block {block_size} {routing} {name}"
            yield Case("moe_align_block_size", label, arguments)
    for label, trained, experts in list(trained_routing())[-1:]:
        arguments = given(topk_ids=trained, block_size=64, num_experts=experts)
        tokens, top_k = trained.shape
        yield Case("moe_align_block_size", f"{tokens}x{experts} top {top_k} block 64 {label}", arguments)


def align_peers(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    ignore_invalid_experts: bool = False,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    **ours_alone: torch.Tensor,
) -> Iterator[Contender]:
    num_slots = topk_ids.numel()

    def blocks(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.empty(length, dtype=torch.int32, device=topk_ids.device),
            torch.empty(-(-length // block_size), dtype=torch.int32, device=topk_ids.device),
            torch.empty(1, dtype=torch.int32, device=topk_ids.device),
        )

    def vllm() -> Any:
        found = out or blocks(max_sorted_slots(num_slots, block_size, num_experts))
        slot_map = expert_map if ignore_invalid_experts else None
        align = torch.ops._moe_C.moe_align_block_size
        align(topk_ids, num_experts, block_size, *found, slot_map, *later(align, 7))
        if expert_map is not None and not ignore_invalid_experts:
            return found[0], expert_map[found[1]], found[2]
        return found

    def sglang() -> Any:
        buckets = num_experts + 1  # the first is for id -1
        longest = num_slots * block_size if num_slots < buckets else num_slots + buckets * (block_size - 1)
        found = blocks(longest)
        cumsum_buffer = torch.empty(buckets + 1, dtype=torch.int32, device=topk_ids.device)
        align = torch.ops.sgl_kernel.moe_align_block_size.default
        align(topk_ids, buckets, block_size, *found, cumsum_buffer, True, *later(align, 8))
        return found

    def triton() -> Any:
        found = blocks(num_slots * block_size)
        small_align(topk_ids, num_experts + 1, block_size, *found)
        return found

    if ours_alone.keys() & {"inv_sorted_idx", "counts"}:
        return  # which peers' ops do not give
    yield Contender("vllm", vllm, "_moe_C.moe_align_block_size")
    if expert_map is not None or out is not None:
        return
    yield Contender("sglang", sglang, "sgl_kernel.moe_align_block_size")
    if num_slots <= SMALL_SLOTS:
        yield Contender("triton", triton)


def align_fault(result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Compare the part in use; peers order the slots of an expert as they like and leave the rest undefined."""
    slots, experts, used = result
    placed, named, wanted_used = (arrays.to_tensor("expected", part).to(slots.device) for part in expected)
    length = int(wanted_used[0])
    if used.tolist() != [length]:
        return f"num_tokens_post_padded is {used.tolist()}, expected [{length}]"
    block_size = arguments["block_size"]
    wanted = named[: length // block_size]
    if not torch.equal(experts[: len(wanted)].long(), wanted.long()):
        return "the experts of the blocks differ"
    if len(slots) < length:
        return f"sorted_token_ids has {len(slots)} positions, {length} are in use"
    # all blocks of other ranks' experts are named -1, so that their slots are compared together
    names = wanted.repeat_interleave(block_size)
    got, want = (in_order(names, part[:length]) for part in (slots, placed))
    return "" if torch.equal(got, want) else "the slots of an expert differ"


def in_order(names: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return slots ordered by the name that each has, and those of a name by themselves, both in one number."""
    return ((names.long() << 32) + slots.long()).sort().values


def count_cases(routings: Sequence[str]) -> Iterator[Case]:
    for (tokens, experts, top_k), routing in itertools.product(COUNT_SHAPES, routings):
        arguments = given(topk_ids=ids(tokens, experts, top_k, routing), num_experts=experts)
        yield Case("count_tokens_per_expert", f"{tokens}x{experts} top {top_k} {routing}", arguments)


def count_peers(topk_ids: torch.Tensor, num_experts: int) -> Iterator[Contender]:
    yield Contender("torch", lambda: torch.histc(topk_ids, num_experts, 0, num_experts - 1))


def count_fault(result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    return "" if testing.to_numpy(result).tolist() == expected.tolist() else "the counts differ"


def batched_cases(routings: Sequence[str]) -> Iterator[Case]:
    for (most, experts, block_size), routing in itertools.product(BATCHED_SHAPES, routings):
        arguments = given(
            expert_num_tokens=counts(most, experts, min(4, experts), routing),
            max_tokens_per_batch=most,
            block_size=block_size,
        )
        yield Case("batched_moe_align_block_size", f"{experts} of {most} rows block {block_size} {routing}", arguments)


def batched_peers(expert_num_tokens: torch.Tensor, max_tokens_per_batch: int, block_size: int) -> Iterator[Contender]:
    num_blocks = len(expert_num_tokens) * -(-max_tokens_per_batch // block_size)

    def vllm() -> Any:
        sizes = (num_blocks * block_size, num_blocks, 1)
        found = tuple(torch.empty(size, dtype=torch.int32, device=expert_num_tokens.device) for size in sizes)
        batched = torch.ops._moe_C.batched_moe_align_block_size
        batched(max_tokens_per_batch, block_size, expert_num_tokens, *found, *later(batched, 6))
        return found

    yield Contender("vllm", vllm, "_moe_C.batched_moe_align_block_size")


def lora_cases(routings: Sequence[str]) -> Iterator[Case]:
    for (tokens, experts, top_k, block_size, max_loras), routing in itertools.product(LORA_SHAPES, routings):
        arguments = given(
            topk_ids=ids(tokens, experts, top_k, routing),
            token_lora_mapping=lambda rng, tokens=tokens, most=max_loras: rng.integers(-1, most, tokens, np.int32),
            block_size=block_size,
            num_experts=experts,
            max_loras=max_loras,
            adapter_enabled=np.ones(max_loras + 1, np.int32),
            # -1, for tokens of no adapter, comes last: vLLM 0.21 looks at the first max_loras entries alone
            lora_ids=np.append(np.arange(max_loras), -1).astype(np.int32),
        )
        label = f"{tokens}x{experts} top {top_k} block {block_size} {max_loras} adapters {routing}"
        yield Case("moe_lora_align_block_size", label, arguments)


def lora_peers(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    block_size: int,
    num_experts: int,
    max_loras: int,
    adapter_enabled: torch.Tensor,
    lora_ids: torch.Tensor,
) -> Iterator[Contender]:
    length = max_sorted_slots(topk_ids.numel(), block_size, num_experts, pad_sorted_ids=True)
    num_blocks = length // block_size

    def vllm() -> Any:
        sizes = (max_loras * length, max_loras * num_blocks, max_loras)
        found = tuple(torch.empty(size, dtype=torch.int32, device=topk_ids.device) for size in sizes)
        numbers = (num_experts, block_size, max_loras, length, num_blocks)
        align = torch.ops._moe_C.moe_lora_align_block_size
        align(topk_ids, token_lora_mapping, *numbers, *found, adapter_enabled, lora_ids, None)
        return found

    yield Contender("vllm", vllm, "_moe_C.moe_lora_align_block_size")


def lora_fault(result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Compare the rows of each adapter as alignments of their own."""
    adapters = arguments["max_loras"]
    for adapter in range(adapters):
        rows, wanted = ([part.reshape(adapters, -1)[adapter] for part in parts] for parts in (result, expected))
        if fault := align_fault(rows, AlignedBlocks(*wanted), arguments):
            return f"adapter {adapter}: {fault}"
    return ""


def ragged_cases(routings: Sequence[str]) -> Iterator[Case]:
    for (tokens, experts, top_k), routing in itertools.product(RAGGED_SHAPES, routings):
        sizes = counts(tokens, experts, top_k, routing)
        arguments = given(slice_sizes=sizes, num_rows=tokens * top_k)
        yield Case("make_ragged_metadata", f"{tokens}x{experts} top {top_k} {routing}", arguments)


def no_peers(**arguments: Any) -> Iterator[Contender]:
    """Yield nothing: triton's function of this kind comes with a package of its own."""
    yield from ()


def gating_cases(op: str) -> Iterator[Case]:
    for (tokens, experts, top_k), dtype in itertools.product(GATING_SHAPES, DTYPES):
        bias = {"correction_bias": floats(experts, scale=0.1)} if op == "topk_sigmoid" else {}
        logits = floats(tokens, experts, dtype=dtype)
        arguments = given(gating_output=logits, top_k=top_k, renormalize=True, **bias)
        yield Case(op, f"{tokens}x{experts} top {top_k}", arguments, dtype)


def gating_peers(
    scoring_func: str,
    gating_output: torch.Tensor,
    top_k: int,
    renormalize: bool,
    correction_bias: torch.Tensor | None = None,
) -> Iterator[Contender]:
    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(gating_output.shape[0], top_k, dtype=dtype, device=gating_output.device)

    def vllm() -> Any:
        out = empty(torch.float32), empty(torch.int32)
        gate = getattr(torch.ops._moe_C, f"topk_{scoring_func}")
        gate(*out, empty(torch.int32), gating_output, renormalize, correction_bias, *later(gate, 6))
        return out

    def sglang() -> Any:
        out = empty(torch.float32), empty(torch.int32)
        softcapping = (0.0,) if scoring_func == "softmax" else ()
        gate = getattr(torch.ops.sgl_kernel, f"topk_{scoring_func}").default
        gate(*out, gating_output, renormalize, *softcapping, correction_bias)
        return out

    def triton() -> Any:
        return sglang_gate(gating_output, bias_or_zeros, top_k, scoring_func, renormalize=renormalize)

    def triton_kernels() -> Any:
        chosen = sparse_topk(gating_output, top_k)
        return chosen.vals, chosen.indx

    def torch_ops() -> Any:
        logits = gating_output.float()
        scores = torch.softmax(logits, -1) if scoring_func == "softmax" else torch.sigmoid(logits)
        if correction_bias is None:
            weights, chosen = torch.topk(scores, top_k)
        else:
            chosen = torch.topk(scores + correction_bias, top_k).indices
            weights = scores.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights, chosen

    yield Contender("vllm", vllm, f"_moe_C.topk_{scoring_func}")
    # SGLang adds a bias to the logits before a softmax, and keeps it in the weights: another function
    if scoring_func == "sigmoid" or correction_bias is None:
        yield Contender("sglang", sglang, f"sgl_kernel.topk_{scoring_func}")
    yield Contender("torch", torch_ops)
    bias_or_zeros = correction_bias
    if scoring_func == "sigmoid":
        if correction_bias is None:
            bias_or_zeros = torch.zeros(gating_output.shape[1], dtype=torch.float32, device=gating_output.device)
        yield Contender("vllm grouped", vllm_grouped(gating_output, top_k, 1, 1, renormalize, bias_or_zeros), GROUPED)
    if scoring_func == "sigmoid" or correction_bias is None:
        yield Contender("triton", triton)
    if scoring_func == "softmax" and correction_bias is None and renormalize:
        yield Contender("triton_kernels", triton_kernels)


def grouped_cases() -> Iterator[Case]:
    for tokens, dtype in itertools.product(GROUPED_TOKENS, DTYPES):
        arguments = given(
            gating_output=floats(tokens, 256, dtype=dtype),
            top_k=8,
            num_expert_group=8,
            topk_group=4,
            renormalize=True,
            scoring_func="sigmoid",
            correction_bias=floats(256, scale=0.1),
        )
        yield Case("grouped_topk", f"{tokens}x256 top 8 groups 4 of 8", arguments, dtype)


def vllm_grouped(
    gating_output: torch.Tensor,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    correction_bias: torch.Tensor | None,
) -> Callable[[], Any]:
    """Return a call of vLLM's op for groups, which takes all experts for one as well."""

    def call() -> Any:
        groups = (num_expert_group, topk_group, top_k, renormalize, 1.0)
        weights, chosen = torch.ops._moe_C.grouped_topk(gating_output, *groups, correction_bias, 1)
        return weights.to(torch.float32), chosen.to(torch.int32)

    return call


def grouped_peers(
    gating_output: torch.Tensor,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    scoring_func: str,
    correction_bias: torch.Tensor,
) -> Iterator[Contender]:
    groups_and_bias = (num_expert_group, topk_group, renormalize, correction_bias)

    def triton() -> Any:
        groups = {"num_expert_group": num_expert_group, "topk_group": topk_group}
        return sglang_gate(gating_output, correction_bias, top_k, scoring_func, renormalize=renormalize, **groups)

    def sglang() -> Any:
        groups = (num_expert_group, topk_group, top_k, 0, 1.0, False)
        gate = torch.ops.sgl_kernel.moe_fused_gate.default
        return gate(gating_output.to(torch.float32), correction_bias, *groups)

    # both ops know sigmoid alone, and SGLang's always renormalises
    if scoring_func == "sigmoid":
        yield Contender("vllm", vllm_grouped(gating_output, top_k, *groups_and_bias), GROUPED)
        yield Contender("triton", triton)
        if renormalize:
            yield Contender("sglang", sglang, "sgl_kernel.moe_fused_gate")


def gating_fault(scoring_func: str, result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Compare choices by what they rank, and weights with the scores of the experts that were chosen.

    Peers break ties as they like and some work in the logits' dtype, whose tolerance therefore holds throughout.
    """
    weights, chosen = (testing.to_numpy(part) for part in result)
    if not weights.shape == chosen.shape == expected.topk_ids.shape:
        return f"shapes {weights.shape} and {chosen.shape}, expected {expected.topk_ids.shape}"
    chosen = chosen.astype(np.int64)
    logits, bias = testing.to_numpy(arguments["gating_output"]), arguments.get("correction_bias")
    bias = None if bias is None else testing.to_numpy(bias)
    in_order = np.sort(chosen, axis=1)
    invalid = (in_order < 0) | (in_order >= logits.shape[1])
    invalid[:, 1:] |= np.diff(in_order, axis=1) == 0
    if invalid.any():
        row = int(np.argwhere(invalid)[0, 0])
        return f"row {row} has ids twice or out of range: {chosen[row].tolist()}"

    relative, absolute = testing.TOLERANCES[arguments["gating_output"].dtype]

    def far(got: Any, wanted: Any) -> Any:
        return ~(np.abs(got - wanted) <= absolute + relative * np.abs(wanted))

    scores, ranks = reference.gating.score_and_rank(logits, scoring_func, bias)
    wanted_ranks, got_ranks = (
        np.sort(np.take_along_axis(ranks, picks, axis=1), axis=1) for picks in (expected.topk_ids, chosen)
    )
    worse = far(got_ranks, wanted_ranks).any(axis=1)
    if "num_expert_group" in arguments:
        # where the last group taken and the first left out are nearly equal, either choice is right
        picks = reference.gating.group_picks(None, chosen.shape[1], arguments["topk_group"], bias)
        groups = reference.gating.score_groups(scores, ranks, arguments["num_expert_group"], bias, picks)
        order, taken = -np.sort(-groups, axis=1), arguments["topk_group"]
        if taken < order.shape[1]:
            worse &= far(order[:, taken], order[:, taken - 1])
    if worse.any():
        row = int(np.flatnonzero(worse)[0])
        return f"row {row} chose {chosen[row].tolist()}, expected {expected.topk_ids[row].tolist()}"
    wanted = reference.gating.weigh(scores, chosen, arguments["renormalize"]).topk_weights
    if (wrong := far(weights, wanted)).any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        return f"weight {index} is {weights[index]}, expected {wanted[index]}"
    return ""


def permute_cases(routings: Sequence[str]) -> Iterator[Case]:
    for (tokens, hidden, experts, top_k), routing in itertools.product(PERMUTE_SHAPES, routings):
        rows, chosen = floats(tokens, hidden, dtype="bfloat16"), ids(tokens, experts, top_k, routing)
        arguments = given(hidden_states=rows, topk_ids=chosen, num_experts=experts)
        yield Case("moe_permute", f"{tokens}x{hidden} of {experts} top {top_k} {routing}", arguments, "bfloat16")


def permute_peers(hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_experts: int) -> Iterator[Contender]:
    (num_tokens, hidden), top_k = hidden_states.shape, topk_ids.shape[1]
    num_slots = topk_ids.numel()

    def vllm(with_scratch: bool = False) -> Any:
        def make(function: Any, *args: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return function(*args, dtype=dtype, device=topk_ids.device)

        rows = make(torch.empty, (num_slots, hidden), dtype=hidden_states.dtype)
        offset = make(torch.empty, num_experts + 1, dtype=torch.int64)
        inverse = make(torch.empty, (num_tokens, top_k))
        slots = make(torch.full, (num_slots,), num_slots)
        each_slot = make(torch.arange, 0, num_slots).reshape(num_tokens, top_k)
        sizes = (num_experts, num_experts, top_k)
        arguments = (hidden_states, topk_ids, each_slot, None, *sizes, rows, offset, inverse, slots)
        if with_scratch:
            torch.ops._moe_C.moe_permute_with_scratch(*arguments, *scratch())
        else:
            torch.ops._moe_C.moe_permute(*arguments)
        return rows, offset, slots, inverse

    @functools.cache
    def scratch() -> Any:
        size = torch.ops._moe_C.moe_permute_sort_workspace_size(num_slots, num_experts)
        workspace = torch.empty(size, dtype=torch.int8, device=topk_ids.device)
        return (workspace, *(torch.empty_like(topk_ids) for _ in range(3)))

    yield Contender("vllm", vllm, "_moe_C.moe_permute")
    yield Contender("vllm with scratch", functools.partial(vllm, True), "_moe_C.moe_permute_with_scratch")


def permute_fault(result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Check that rows are those of their slots; peers order the slots of an expert as they like."""
    rows, offset, slots, inverse = result[:4]
    starts, wanted = (
        arrays.to_tensor("expected", part).to(slots.device)
        for part in (expected.expert_first_token_offset, expected.permuted_idx)
    )
    if offset.tolist() != starts.tolist():
        return "the offsets of the experts differ"
    used = int(starts[-1])
    experts = torch.arange(len(starts) - 1, dtype=torch.int64, device=slots.device).repeat_interleave(starts.diff())
    if not torch.equal(*(in_order(experts, part[:used]) for part in (slots, wanted))):
        return "the slots of an expert differ"
    slots = slots[:used].long()
    if not torch.equal(rows[:used], arguments["hidden_states"][slots // arguments["topk_ids"].shape[1]]):
        return "a row is not that of its slot"
    if not torch.equal(inverse.flatten()[slots].long(), torch.arange(used, dtype=torch.int64, device=slots.device)):
        return "the inverse index differs"
    return ""


def unpermute_cases() -> Iterator[Case]:
    for tokens, hidden, _, top_k in PERMUTE_SHAPES:
        arguments = given(
            permuted=floats(tokens * top_k, hidden, dtype="bfloat16"),
            topk_weights=uniform(tokens, top_k),
            inv_permuted_idx=permutation(tokens, top_k),
        )
        yield Case("moe_unpermute", f"{tokens}x{hidden} top {top_k}", arguments, "bfloat16")


def unpermute_peers(
    permuted: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor
) -> Iterator[Contender]:
    (num_tokens, top_k), hidden = topk_weights.shape, permuted.shape[1]

    def vllm() -> Any:
        out = torch.empty(num_tokens, hidden, dtype=permuted.dtype, device=permuted.device)
        unpermute = torch.ops._moe_C.moe_unpermute
        unpermute(permuted, topk_weights, inv_permuted_idx.flatten(), None, top_k, out)
        return out

    yield Contender("vllm", vllm, "_moe_C.moe_unpermute")


def sum_cases() -> Iterator[Case]:
    for tokens, hidden, _, top_k in PERMUTE_SHAPES:
        arguments = given(hidden_states=floats(tokens, top_k, hidden, dtype="bfloat16"))
        yield Case("moe_sum", f"{tokens}x{hidden} top {top_k}", arguments, "bfloat16")


def sum_peers(hidden_states: torch.Tensor) -> Iterator[Contender]:
    def of(add: Callable[..., Any], *numbers: Any) -> Any:
        out = torch.empty_like(hidden_states[:, 0], memory_format=torch.contiguous_format)
        add(hidden_states, out, *numbers)
        return out

    def vllm() -> Any:
        return of(torch.ops._moe_C.moe_sum, *later(torch.ops._moe_C.moe_sum, 2))

    yield Contender("vllm", vllm, "_moe_C.moe_sum")
    yield Contender("sglang", lambda: of(torch.ops.sgl_kernel.moe_sum_reduce, 1.0), "sgl_kernel.moe_sum_reduce")
    yield Contender("sglang sum", lambda: of(torch.ops.sgl_kernel.moe_sum), "sgl_kernel.moe_sum")
    yield Contender("triton", lambda: of(triton_sum, 1.0))
    yield Contender("torch", lambda: hidden_states.sum(1))


def combine_fault(result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    return testing.compare(result, expected).message


def route_cases() -> Iterator[Case]:
    for (tokens, experts, top_k, block_size), dtype in itertools.product(ROUTE_SHAPES, DTYPES):
        logits = floats(tokens, experts, dtype=dtype)
        arguments = given(gating_output=logits, top_k=top_k, block_size=block_size, renormalize=True)
        yield Case("route", f"{tokens}x{experts} top {top_k} block {block_size}", arguments, dtype)


def route_peers(gating_output: torch.Tensor, top_k: int, block_size: int, renormalize: bool) -> Iterator[Contender]:
    """Yield each peer's gating and then its alignment."""
    ids = torch.zeros(gating_output.shape[0], top_k, dtype=torch.int32, device=gating_output.device)
    aligns = {peer.name for peer in align_peers(ids, block_size, gating_output.shape[1])}

    def call(peer: Contender) -> Any:
        topk = peer.call()
        blocks = {other.name: other.call for other in align_peers(topk[1], block_size, gating_output.shape[1])}
        return topk, blocks[peer.name]()

    for peer in gating_peers("softmax", gating_output, top_k, renormalize):
        if peer.name in aligns:
            yield peer._replace(call=functools.partial(call, peer))


def route_fault(result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Look at the blocks where the same experts were chosen in the same order; others have other blocks."""
    topk, blocks = result
    fault = gating_fault("softmax", topk, expected.topk, arguments)
    if fault or (testing.to_numpy(topk[1]) != expected.topk.topk_ids).any():
        return fault
    return align_fault(blocks, expected.blocks, arguments)


GROUPED = "_moe_C.grouped_topk"
SMALL_SLOTS = 64  # where SGLang takes its Triton kernel for alignment
sglang_gate = of_module(SGLANG_GATE, "moe_fused_gate")
small_align = of_module("sglang.kernels.ops.moe.moe_align_small_numel", "moe_align_small_numel")
triton_sum = of_module("sglang.kernels.ops.moe.fused_moe_triton_kernels", "moe_sum_reduce_triton")
sparse_topk = of_module("triton_kernels.topk", "topk")

OPS = {
    "moe_align_block_size": Op(align_cases, align_peers, align_fault),
    "count_tokens_per_expert": Op(count_cases, count_peers, count_fault),
    "batched_moe_align_block_size": Op(batched_cases, batched_peers, align_fault),
    "moe_lora_align_block_size": Op(lora_cases, lora_peers, lora_fault),
    "make_ragged_metadata": Op(ragged_cases, no_peers, align_fault),
    "moe_permute": Op(permute_cases, permute_peers, permute_fault),
    "moe_unpermute": Op(lambda routings: unpermute_cases(), unpermute_peers, combine_fault),
    "moe_sum": Op(lambda routings: sum_cases(), sum_peers, combine_fault),
    "topk_softmax": Op(
        lambda routings: gating_cases("topk_softmax"),
        functools.partial(gating_peers, "softmax"),
        functools.partial(gating_fault, "softmax"),
    ),
    "topk_sigmoid": Op(
        lambda routings: gating_cases("topk_sigmoid"),
        functools.partial(gating_peers, "sigmoid"),
        functools.partial(gating_fault, "sigmoid"),
    ),
    "grouped_topk": Op(lambda routings: grouped_cases(), grouped_peers, functools.partial(gating_fault, "sigmoid")),
    "route": Op(lambda routings: route_cases(), route_peers, route_fault),
}


def is_registered(op: str) -> bool:
    """Return whether torch.ops has an op, given as namespace.name; "" means torch's own functions."""
    namespace, _, name = op.partition(".")
    return not op or hasattr(getattr(torch.ops, namespace), name)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield a library file, unpacked to a temporary one if it ends in .xz."""
    if path.suffix != ".xz":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path.stem
        with files.reading(path) as packed, lzma.open(packed) as library, target.open("wb") as file:
            shutil.copyfileobj(library, file)
        yield target


def competes(contender: Contender, peers: Collection[str]) -> bool:
    """Whether a contender is one of these peers', and is there."""
    return contender.name.partition(" ")[0] in peers and is_registered(contender.needs)


def find_trees(trees: Sequence[Path]) -> None:
    """Let modules of peers be imported from folders, with stand-ins for the packages around them if there are some."""
    for tree in trees:
        if not tree.is_dir():
            raise ValueError(f"`--peer-tree` must be a folder, got {tree}")
        sys.path[:0] = [str(tree / name) for name in PACKAGES_IN_TREE]
        if (tree / f"{STAND_INS}.py").is_file():
            importlib.import_module(STAND_INS).install()


def load_peers(wanted: Sequence[str] | None, libraries: Sequence[Path], trees: Sequence[Path] = ()) -> dict[str, str]:
    """Register the peers' ops and return where each peer came from; ask for none by name to get all there are."""
    find_trees(trees)
    for path in libraries:
        with unpacked(path) as library:
            torch.ops.load_library(str(library))  # once loaded, the file may go
    sources = {}
    for name in wanted or PEERS:
        namespace, module = PEERS[name]
        package = module.partition(".")[0]
        if namespace and is_registered(f"{namespace}.moe_align_block_size"):
            sources[name] = " ".join(path.name for path in libraries) or "loaded before"
            continue
        if importlib.util.find_spec(package) is None:
            if wanted:
                raise ValueError(f"peer {name} is neither installed nor in a --peer-lib")
            continue
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            if wanted:
                raise ValueError(f"peer {name} is installed but does not load: {error}") from error
            print(f"Leaving out peer {name}, which is installed but does not load: {error}", file=sys.stderr)
            continue
        try:
            sources[name] = version({"sglang": "sglang-kernel"}.get(name, package))
        except PackageNotFoundError:  # on the path without being installed, or under an older name
            sources[name] = "of unknown version"
    return sources
