"""`fused_experts` where experts have few slots each: two products at the speed of memory, and a sum.

1. The slots are sorted into blocks of one expert each. One token needs no sort: each of its slots is a block.
2. `multiply_slots` gathers the tokens, multiplies by gates and ups, and writes what the activation makes of them.
3. `multiply_slots` multiplies that by the second matrix, and writes a row for each slot.
4. `combine_rows` sums the rows of each token, weighted.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from numba_moe.device import simulator
from numba_moe.device.tiles import TILES
from numba_moe.device.types import PRODUCTS
from numba_moe.ops.activation.activate_rows import NONE, Rule, family_of
from numba_moe.ops.gating.which_kernel import sized
from numba_moe.ops.multiply_slots import Blocks, Chosen, Factors, Products, multiply_slots
from numba_moe.ops.permute.move_rows import plan_combine, stride_of
from numba_moe.ops.sort import counting_sort
from numba_moe.reference.align import max_sorted_slots
from numba_moe.runtime import arrays
from numba_moe.runtime.arrays import Contiguous, contiguous
from numba_moe.runtime.launch import Launch
from numba_moe.runtime.plans import Layout

HALVES = (torch.float16, torch.bfloat16)
# Number of 16-bit elements in 16 bytes, which are moved at once.
RUN = 8
# The first compute capability with matrix instructions of bfloat16 and asynchronous copies.
AMPERE = (8, 0)
LARGEST_INT32 = 2**31 - 1
# (Mean slots of an expert, tokens of a tile) up to that mean. With more slots torch's grouped GEMM takes less time.
# Measured on an H200 for Mixtral-8x7B, Qwen3-30B-A3B and a quarter of DeepSeek-V3.
TOKENS_BY_MEAN = ((2, 8), (10, 16), (40, 32))
# The tiles of each product, by tokens: the first is taken that keeps the device busy for so much of its time.
FIRST = {8: (0, 1, 2), 16: (3, 4), 32: (5, 6)}
SECOND = {8: (2, 1, 0), 16: (3, 4), 32: (5, 6)}
TRANSPOSED = {8: (7, 8), 16: (9,), 32: (10,)}
BUSY = 0.9


class TilePlan(NamedTuple):
    """The launches, and what lies between them; one token is not sorted."""

    sort: counting_sort.SortPlan | None
    indices: tuple[Contiguous, ...]  # the slots in blocks, the expert of each block, and how many are in use
    placed: Contiguous  # the expert or the place of each slot, -1 for none
    first: Launch
    activated: Contiguous
    second: Launch
    rows: Contiguous
    combine: Launch


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; the simulator runs blocks one after another."""
    return 1 if simulator.ENABLED else int(torch.cuda.get_device_properties(device).multi_processor_count)


def serves(given: Any) -> bool:
    """Whether tensor cores can multiply these arrays: 16-bit floats that can be read 16 bytes at a time."""
    hidden_states, device = given.hidden_states, given.hidden_states.device
    matrices = (given.gate_up_proj, given.down_proj)
    _, hidden, width = given.down_proj.shape
    if hidden_states.dtype not in HALVES or 0 in (*given.topk_ids.shape, hidden, width):
        return False
    if not simulator.ENABLED and (device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE):
        return False
    read = (hidden_states, *matrices, given.gate_up_bias, given.down_bias)
    aligned = not any(array.address for array in read if array is not None)
    return aligned and not any(size % RUN for size in (hidden, width, stride_of(hidden_states)))


def tiles_for(given: Any, num_experts: int) -> tuple[int, int] | None:
    """Return the tiles of both products, None where experts have too many slots each."""
    num_tokens, top_k = given.topk_ids.shape
    num_slots = num_tokens * top_k
    if num_slots * max(given.gate_up_proj.shape[1:]) > LARGEST_INT32:
        return None
    mean = num_slots / num_experts
    if num_tokens == 1:
        return _busiest(FIRST[8], given.gate_up_proj, num_slots), _busiest(SECOND[8], given.down_proj, num_slots)
    tokens = next((tokens for most, tokens in TOKENS_BY_MEAN if mean <= most), None)
    if tokens is None:
        return None
    blocks = num_experts * -math.expm1(-mean)  # experts that random choices reach
    return _busiest(FIRST[tokens], given.gate_up_proj, blocks), _busiest(SECOND[tokens], given.down_proj, blocks)


def _busiest(tiles: tuple[int, ...], matrices: Layout, blocks: float) -> int:
    """Return the first of some tiles that keeps nearly all of the device busy, or the one that does best."""
    _, columns, depth = matrices.shape
    if matrices.strides is not None:
        tiles = TRANSPOSED[TILES[tiles[0]].tokens]

    def busy(number: int) -> float:
        tile = TILES[number]
        rounds = blocks * columns / tile.rows / (_num_processors(matrices.device) * tile.blocks)
        chunks = depth / tile.depth
        return rounds / math.ceil(rounds) * chunks / math.ceil(chunks)

    return next((tile for tile in tiles if busy(tile) >= BUSY), max(tiles, key=busy))


def plan_tiles(given: Any, rule: Rule, num_experts: int, tiles: tuple[int, int]) -> TilePlan:
    """Plan a call with this number of experts."""
    hidden_states, topk_ids, expert_map = given.hidden_states, given.topk_ids, given.expert_map
    dtype, device = hidden_states.dtype, hidden_states.device
    num_tokens, top_k = topk_ids.shape
    num_local, hidden, width = given.down_proj.shape
    num_slots = num_tokens * top_k
    tokens = TILES[tiles[0]].tokens
    placed = contiguous(torch.int32, num_tokens, top_k)
    sort = None
    indices: tuple[Contiguous, ...] = ()
    blocks = Blocks(None, None, None, num_slots)
    sizes = (topk_ids.dtype.itemsize, 0 if expert_map is None else expert_map.dtype.itemsize, num_experts, num_local)
    chosen = Chosen(sized(topk_ids), sized(expert_map), torch.int32, *sizes)
    num_blocks = num_slots
    if num_tokens > 1:
        num_positions = max_sorted_slots(num_slots, tokens, num_experts)
        num_blocks = min(num_slots, num_positions // tokens)
        sort = counting_sort.plan_sort(
            *(topk_ids, num_experts, num_positions, tokens),
            expert_map=expert_map,
            written=("position_of_slot", "expert_ids", "num_padded"),
            num_local=num_local,
        )
        indices = tuple(contiguous(torch.int32, size) for size in (num_positions, -(-num_positions // tokens), 1))
        blocks = Blocks(torch.int32, torch.int32, torch.int32, num_slots)
        chosen = Chosen(None, None, None, *sizes)
    where = (device, num_blocks, blocks, chosen)
    columns = given.gate_up_proj.shape[1]
    first = Factors(dtype, dtype, given.gate_up_bias, stride_of(hidden_states), hidden, columns, top_k)
    second = Factors(dtype, dtype, given.down_bias, width, width, hidden, 1)
    plain = rule._replace(kind=NONE, halves=1, interleaved=0)
    rows = Layout(torch.Size((num_tokens, top_k, hidden)), dtype, device, None, 0)
    places = Layout(torch.Size((num_tokens, top_k)), torch.int32, device, None, 0)
    return TilePlan(
        sort,
        indices,
        placed,
        _launch(*where, first, rule, width, tiles[0], family_of(given.activation), False),
        contiguous(dtype, num_slots, width),
        _launch(*where, second, plain, hidden, tiles[1], PRODUCTS, True),
        contiguous(dtype, num_tokens, top_k, hidden),
        plan_combine(rows, num_tokens, top_k, given.topk_weights, places, False, 1.0, dtype),
    )


def _launch(
    device: torch.device,
    num_blocks: int,
    blocks: Blocks,
    chosen: Chosen,
    factors: Factors,
    rule: Rule,
    width: int,
    tile: int,
    family: int,
    is_second: bool,
) -> Launch:
    shape = TILES[tile]
    row_tiles = -(-factors.columns // shape.rows)
    if is_second:
        chosen = chosen._replace(placed=None)
    grid = min(num_blocks * row_tiles, _num_processors(device) * shape.blocks)
    products = Products(factors.matrices, width, row_tiles, int(is_second))
    return Launch(
        *(multiply_slots, device, grid, shape.threads, factors, blocks, chosen, rule, products),
        shared_bytes=shape.shared_bytes,
        tile=tile,
        family=family,
    )


def run_tiles(plan: TilePlan, given: Any, combined: torch.Tensor) -> None:
    """Sort, multiply twice, and combine."""
    placed = arrays.empty(*plan.placed)
    by_ids: dict[str, Any] = {"topk_ids": given.topk_ids, "expert_map": given.expert_map}
    written = {"placed": placed}
    if plan.sort is not None:
        sorted_slots, block_experts, num_padded = (arrays.empty(*part) for part in plan.indices)
        written = {"expert_ids": block_experts, "num_padded": num_padded}
        counting_sort.sort(
            *(plan.sort, given.topk_ids, sorted_slots, given.expert_map), position_of_slot=placed, **written
        )
        by_ids = {"sorted_slots": sorted_slots, "block_experts": block_experts, "num_padded": num_padded}
        written = {}
    activated = arrays.empty(*plan.activated)
    factors = {"rows": given.hidden_states, "matrices": given.gate_up_proj, "bias": given.gate_up_bias}
    plan.first(**factors, **by_ids, **written, products=activated)
    rows = arrays.empty(*plan.rows)
    factors = {"rows": activated, "matrices": given.down_proj, "bias": given.down_bias}
    plan.second(**factors, **by_ids, products=rows)
    plan.combine(rows=rows, topk_weights=given.topk_weights, places=placed, combined=combined)
