"""The shapes of a grid: the axes of each op, a sample of their product, and arguments drawn on the device.

A shape is drawn with all others of its op at equal odds. Those that cannot be are left out: more picks than experts,
experts that groups do not divide, more elements than 32 bits count.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe import reference
from numba_moe.bench.contenders import OPS
from numba_moe.reference.align import AlignedBlocks
from numba_moe.reference.permute import PermutedTokens

# Powers of two, what is halfway between them, and numbers that nothing divides.
TOKENS = tuple(sorted({1 << i for i in range(18)} | {3 << i for i in range(16)} | {5, 33, 100, 1000, 5000}))
EXPERTS = (2, 4, 8, 16, 32, 60, 64, 72, 96, 128, 144, 160, 256, 288, 320, 384, 512, 896, 1000, 1024)
PICKS = (1, 2, 4, 6, 8, 10, 16, 22)
SUMMED = (1, 2, 4, 6, 8, 9, 10, 16, 22)
DTYPES = ("float32", "bfloat16", "float16")
GROUPS = ((2, 1), (4, 2), (8, 2), (8, 4))  # groups, and how many of them are kept
BLOCK_SIZES = (16, 32, 64, 128, 256)
HIDDEN = (512, 1024, 2048, 2880, 4096, 5120, 7168)
MOST_ELEMENTS = 2**31 - 1
# Rows of a result that are compared on the host, spread over all tokens: an element of each logit or sum.
COMPARED_ELEMENTS = 2**16

Point = Mapping[str, Any]  # a value of each axis
BY_LOGITS = {"tokens": TOKENS, "experts": EXPERTS, "top_k": PICKS, "dtype": DTYPES, "renormalize": (False, True)}
OF_ROWS = {"tokens": TOKENS, "top_k": SUMMED, "hidden": HIDDEN, "dtype": DTYPES}


class Shape(NamedTuple):
    """A shape of an op, by what its arguments are drawn."""

    op: str
    point: Point

    @property
    def name(self) -> str:
        """What it is called in tables: numbers by axis, and the flags that are set."""
        numbers = {key: value for key, value in self.point.items() if key != "dtype" and value is not False}
        return " ".join(key if value is True else f"{key} {value}" for key, value in numbers.items())

    @property
    def across(self) -> int:
        """What a heat map has across the tokens: experts, or picks where there are none."""
        return int(self.point.get("experts", self.point["top_k"]))


class Buffer:
    """Random numbers on the device; every shape takes the first ones."""

    def __init__(self, device: str, seed: int) -> None:
        self._device, self._numbers = device, {torch.float32: torch.empty(0, dtype=torch.float32, device=device)}
        self._generator = torch.Generator(device).manual_seed(seed)

    def holds(self) -> bool:
        """Whether the device still answers."""
        try:
            torch.zeros(1, dtype=torch.int32, device=self._device).add_(1).item()
        except RuntimeError:
            return False
        return True

    def normal(self, *shape: int, dtype: str = "float32") -> torch.Tensor:
        """Return normally distributed numbers, the same at every call."""
        size, wanted = int(np.prod(shape)), getattr(torch, dtype)
        if wanted not in self._numbers or len(self._numbers[wanted]) < size:
            self._numbers.pop(wanted, None)
            numbers = torch.empty(1 << max(20, (size - 1).bit_length()), dtype=wanted, device=self._device)
            self._numbers[wanted] = numbers.normal_(generator=self._generator)
        return self._numbers[wanted][:size].view(shape)

    def ids(self, tokens: int, experts: int, top_k: int) -> torch.Tensor:
        """Return distinct experts of each token, all at equal odds."""
        scores = torch.rand(tokens, experts, dtype=torch.float32, device=self._device, generator=self._generator)
        return scores.topk(top_k).indices.to(torch.int32)

    def permutation(self, *shape: int) -> torch.Tensor:
        """Return the numbers from 0 on in some order."""
        size = int(np.prod(shape))
        order = torch.rand(size, dtype=torch.float32, device=self._device, generator=self._generator).argsort()
        return order.to(torch.int32).view(shape)


class Grid(NamedTuple):
    """The axes of an op, which of their points there are, and its arguments there."""

    axes: Mapping[str, Sequence[Any]]
    exists: Callable[[Point], bool]
    arguments: Callable[[Buffer, Point], dict[str, Any]]


def few_enough(at: Point) -> bool:
    return bool(at["top_k"] <= at.get("experts", at["top_k"])) and rows_fit(at)


def rows_fit(at: Point) -> bool:
    return bool(at["tokens"] * at["top_k"] * at.get("hidden", 1) <= MOST_ELEMENTS)


def in_groups(at: Point) -> bool:
    groups, kept = at["groups"]
    size, rest = divmod(at["experts"], groups)
    return bool(rest == 0 and size >= 2 and at["top_k"] <= kept * size)


def gating_arguments(buffer: Buffer, at: Point) -> dict[str, Any]:
    logits = buffer.normal(at["tokens"], at["experts"], dtype=at["dtype"])
    bias = {"correction_bias": 0.1 * buffer.normal(at["experts"])} if at["bias"] else {}
    return {"gating_output": logits, "top_k": at["top_k"], "renormalize": at["renormalize"], **bias}


def grouped_arguments(buffer: Buffer, at: Point) -> dict[str, Any]:
    groups, kept = at["groups"]
    chosen = {"num_expert_group": groups, "topk_group": kept, "scoring_func": "sigmoid"}
    return {**gating_arguments(buffer, {**at, "bias": True}), **chosen}


def align_arguments(buffer: Buffer, at: Point) -> dict[str, Any]:
    ids = buffer.ids(at["tokens"], at["experts"], at["top_k"])
    return {"topk_ids": ids, "block_size": at["block_size"], "num_experts": at["experts"]}


def sum_arguments(buffer: Buffer, at: Point) -> dict[str, Any]:
    return {"hidden_states": buffer.normal(at["tokens"], at["top_k"], at["hidden"], dtype=at["dtype"])}


def permute_arguments(buffer: Buffer, at: Point) -> dict[str, Any]:
    rows = buffer.normal(at["tokens"], at["hidden"], dtype=at["dtype"])
    ids = buffer.ids(at["tokens"], at["experts"], at["top_k"])
    return {"hidden_states": rows, "topk_ids": ids, "num_experts": at["experts"]}


def unpermute_arguments(buffer: Buffer, at: Point) -> dict[str, Any]:
    tokens, top_k = at["tokens"], at["top_k"]
    return {
        "permuted": buffer.normal(tokens * top_k, at["hidden"], dtype=at["dtype"]),
        "topk_weights": buffer.normal(tokens, top_k).abs(),
        "inv_permuted_idx": buffer.permutation(tokens, top_k),
    }


GRIDS = {
    "topk_softmax": Grid({**BY_LOGITS, "bias": (False, True)}, few_enough, gating_arguments),
    "topk_sigmoid": Grid({**BY_LOGITS, "bias": (False, True)}, few_enough, gating_arguments),
    "grouped_topk": Grid({**BY_LOGITS, "groups": GROUPS}, in_groups, grouped_arguments),
    "moe_align_block_size": Grid(
        {"tokens": TOKENS, "experts": EXPERTS, "top_k": PICKS, "block_size": BLOCK_SIZES}, few_enough, align_arguments
    ),
    "moe_sum": Grid(OF_ROWS, rows_fit, sum_arguments),
    "moe_permute": Grid({**OF_ROWS, "top_k": PICKS, "experts": EXPERTS}, few_enough, permute_arguments),
    "moe_unpermute": Grid(OF_ROWS, rows_fit, unpermute_arguments),
}


def draw(op: str, count: int, seed: int) -> list[Shape]:
    """Draw shapes of an op, no two alike: `count` of them, or all that there are."""
    grid = GRIDS[op]
    rng = random.Random(f"{op} {seed}")
    points = (dict(zip(grid.axes, values, strict=True)) for values in itertools.product(*grid.axes.values()))
    every = [Shape(op, point) for point in points if grid.exists(point)]
    return rng.sample(every, min(count, len(every)))


def draw_all(ops: Sequence[str], count: int, seed: int, part: int = 1, parts: int = 1) -> list[Shape]:
    """Draw shapes of several ops, one of each after the other; of equal parts of them, return one, counted from 1."""
    drawn = (draw(op, count, seed)[part - 1 :: parts] for op in ops)
    return [shape for of_each in itertools.zip_longest(*drawn) for shape in of_each if shape]


def arguments_of(shape: Shape, buffer: Buffer) -> dict[str, Any]:
    """Draw the arguments of a shape."""
    return GRIDS[shape.op].arguments(buffer, shape.point)


def fault_of(op: str, result: Any, arguments: Mapping[str, Any], wanted: Any) -> str:
    """Return what is wrong with a result, given what `expected` says; "" if nothing is."""
    rows, within, expected = wanted
    return OPS[op].fault(result if rows is None else _rows_of(result, rows), expected, within)


def _rows_of(result: Any, rows: torch.Tensor) -> Any:
    return tuple(part[rows] for part in result) if isinstance(result, tuple) else result[rows]


def expected(op: str, arguments: Mapping[str, Any]) -> tuple[torch.Tensor | None, Mapping[str, Any], Any]:
    """Return the rows of a result to look at, None for all, the arguments of these, and what the result should be.

    Orders of slots are made again by torch, all of them. Of gating and sums the reference makes some rows again.
    """
    if op == "moe_align_block_size":
        return None, arguments, aligned_by_torch(**arguments)
    if op == "moe_permute":
        return None, arguments, permuted_by_torch(arguments["topk_ids"], arguments["num_experts"])
    by_token = {"moe_sum": ("hidden_states",), "moe_unpermute": ("topk_weights", "inv_permuted_idx")}
    names = by_token.get(op, ("gating_output",))
    tokens, width = len(arguments[names[0]]), arguments[next(iter(arguments))][0].numel()
    count = max(1, min(tokens, COMPARED_ELEMENTS // width))
    rows = torch.linspace(0, tokens - 1, count, dtype=torch.float64, device=arguments[names[0]].device).long()
    within = {name: value[rows] if name in names else value for name, value in arguments.items()}
    if op == "moe_unpermute":  # the rows of these tokens alone
        places = within["inv_permuted_idx"]
        within["permuted"] = within["permuted"][places.flatten().long()]
        within["inv_permuted_idx"] = torch.arange(places.numel(), dtype=torch.int32, device=places.device).view_as(
            places
        )
    on_host = {
        name: value.cpu().to(torch.float32 if value.is_floating_point() else value.dtype).numpy()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in within.items()
    }
    return rows, within, getattr(reference, op)(**on_host)


def aligned_by_torch(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> AlignedBlocks:
    """Return what alignment gives, by torch's sort; only up to the last position in use."""
    experts, slots = topk_ids.flatten().long().sort(stable=True)
    counts = torch.bincount(experts, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    before = (blocks * block_size).cumsum(0) - blocks * block_size - (counts.cumsum(0) - counts)
    used = blocks.sum() * block_size
    placed = torch.full((int(used),), len(slots), dtype=torch.int64, device=slots.device)
    placed[torch.arange(len(slots), dtype=torch.int64, device=slots.device) + before[experts]] = slots
    names = torch.arange(num_experts, dtype=torch.int64, device=slots.device).repeat_interleave(blocks)
    return AlignedBlocks(placed, names, used.view(1))


def permuted_by_torch(topk_ids: torch.Tensor, num_experts: int) -> PermutedTokens:
    """Return the order of slots that permutation gives, by torch's sort, and no rows."""
    experts, slots = topk_ids.flatten().long().sort(stable=True)
    ends = torch.bincount(experts, minlength=num_experts).cumsum(0)
    offset = torch.cat([ends.new_zeros(1), ends])
    return PermutedTokens(*(None for _ in PermutedTokens._fields))._replace(
        expert_first_token_offset=offset, permuted_idx=slots
    )
