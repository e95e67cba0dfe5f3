"""Where the tokens of a rank go: how many to each rank and to each expert, and which.

A warp takes a token: its lanes look up the ranks of the token's slots, and then each lane asks for a rank of its own
whether a slot has it. A block counts in shared memory, and adds what it has to the counts of all at its end.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, int32, int64
from numba_moe.device.instructions import add_to_global, atomic_add, flat, wait_for_earlier
from numba_moe.device.primitives import ALL_LANES, WARP, fill, warp_index
from numba_moe.device.types import Ids, Int32, Int32Array
from numba_moe.reference import parallel as reference
from numba_moe.reference.parallel import DispatchLayout
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, contiguous
from numba_moe.runtime.compile import MOST_SHARED_BYTES
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op

MOST_THREADS = 512
# Two blocks for each multiprocessor of an H200.
MOST_BLOCKS = 264


class Routed(NamedTuple):
    """The experts of tokens, and their ranks."""

    topk_ids: Ids  # [num_tokens, top_k]
    rank_of_expert: Int32Array  # [num_experts]
    num_tokens: Int32
    top_k: Int32
    num_experts: Int32
    num_ranks: Int32


class Destinations(NamedTuple):
    """What is counted; zeros before the launch."""

    num_tokens_per_rank: Int32Array  # [num_ranks]
    num_tokens_per_expert: Int32Array  # [num_experts]
    is_token_in_rank: Annotated[Any, "uint8"]  # [num_tokens, num_ranks]
    num_in_shared: Int32  # num_ranks + num_experts where a block counts in shared memory first, else 0


@cuda.jit(launch_bounds=MOST_THREADS)
def find_destinations(slots: Routed, found: Destinations):
    """Find the ranks of tokens: a warp takes a token and then the one that lies a whole grid further on.

    Dynamic shared memory: an int32 for each of `num_in_shared` counters.
    """
    wait_for_earlier()
    in_block = flat(cuda.shared.array(0, int32))  # [num_in_shared], ranks first
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    lane = int32(cuda.laneid)
    fill(in_block, found.num_in_shared, 0, thread, threads)
    cuda.syncthreads()
    token = warp_index()
    while token < slots.num_tokens:
        first_rank = int32(0)
        while first_rank < slots.num_ranks:
            is_mine = False
            first = int32(0)
            while first < slots.top_k:
                rank = int32(-1)
                if first + lane < slots.top_k:
                    expert = slots.topk_ids[int64(token) * slots.top_k + first + lane]
                    if expert >= 0 and expert < slots.num_experts:
                        rank = slots.rank_of_expert[expert]
                        if rank >= slots.num_ranks:
                            rank = int32(-1)
                        if rank >= 0 and first_rank == 0:
                            if found.num_in_shared > 0:
                                atomic_add(in_block, slots.num_ranks + int32(expert), 1)
                            else:
                                add_to_global(found.num_tokens_per_expert, int32(expert), 1)
                for k in range(min(WARP, slots.top_k - first)):
                    if int32(cuda.shfl_sync(ALL_LANES, rank, k)) == first_rank + lane:
                        is_mine = True
                first = int32(first + WARP)
            if first_rank + lane < slots.num_ranks:
                found.is_token_in_rank[int64(token) * slots.num_ranks + first_rank + lane] = 1 if is_mine else 0
                if is_mine:
                    if found.num_in_shared > 0:
                        atomic_add(in_block, first_rank + lane, 1)
                    else:
                        add_to_global(found.num_tokens_per_rank, first_rank + lane, 1)
            first_rank = int32(first_rank + WARP)
        token = int32(token + cuda.gridDim.x * (cuda.blockDim.x >> 5))
    cuda.syncthreads()
    counter = thread
    while counter < found.num_in_shared:
        count = in_block[counter]
        if count > 0:
            if counter < slots.num_ranks:
                add_to_global(found.num_tokens_per_rank, counter, count)
            else:
                add_to_global(found.num_tokens_per_expert, counter - slots.num_ranks, count)
        counter = int32(counter + threads)


@op(reference.dispatch_layout)
def dispatch_layout(
    topk_ids: Array, rank_of_expert: Array, num_ranks: int, *, out: DispatchLayout | None = None
) -> DispatchLayout:
    """Count the tokens that go to each rank and to each expert.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` go nowhere.
    rank_of_expert : array of int32, shape [num_experts]
        The rank that holds each expert; a number outside ``[0, num_ranks)`` is none.
    num_ranks : int
        Number of ranks.
    out : tuple of three arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    DispatchLayout
        num_tokens_per_rank : int32 [num_ranks], where a token counts once for each rank that it goes to.
        num_tokens_per_expert : int32 [num_experts], the slots of each expert that is somewhere. is_token_in_rank : bool
        [num_tokens, num_ranks].

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, or more slots than int32 can count.

    Notes
    -----
    The op runs on the caller's current stream without synchronising, and CUDA graphs can capture it. It allocates the
    result only.

    Examples
    --------
    >>> import numpy as np
    >>> layout = dispatch_layout(np.array([[0, 1], [2, -1], [1, 3]]), np.array([0, 0, 1, 1], np.int32), num_ranks=2)
    >>> layout.num_tokens_per_rank, layout.num_tokens_per_expert
    (array([2, 2], dtype=int32), array([1, 2, 1, 1], dtype=int32))
    >>> layout.is_token_in_rank
    array([[ True, False],
           [False,  True],
           [ True,  True]])
    """


@dispatch_layout.outputs
def _(given: Any) -> DispatchLayout:
    return DispatchLayout(
        contiguous(torch.int32, given.num_ranks),
        contiguous(torch.int32, given.rank_of_expert.shape[0]),
        contiguous(torch.bool, given.topk_ids.shape[0], given.num_ranks),
    )


@dispatch_layout.plan
def _(given: Any) -> Launch:
    topk_ids, rank_of_expert = given.topk_ids, given.rank_of_expert
    checks.array("topk_ids", topk_ids, checks.IDS, (2,))
    checks.array("rank_of_expert", rank_of_expert, (torch.int32,), (1,), like=("topk_ids", topk_ids))
    num_ranks = checks.integer("num_ranks", given.num_ranks, 1)
    num_tokens, top_k = topk_ids.shape
    num_experts = checks.integer("num_experts (of `rank_of_expert`)", rank_of_expert.shape[0], 1)
    checks.fits_int32("topk_ids", topk_ids.shape.numel(), "the number of slots")
    threads = block_threads(min(MOST_THREADS, max(1, num_tokens) * WARP))
    blocks = min(-(-num_tokens * WARP // threads), MOST_BLOCKS)
    num_counters = num_ranks + num_experts
    in_shared = num_counters if 4 * num_counters <= MOST_SHARED_BYTES else 0
    slots = Routed(topk_ids, rank_of_expert, num_tokens, top_k, num_experts, num_ranks)
    found = Destinations(torch.int32, torch.int32, torch.uint8, in_shared)
    return Launch(find_destinations, topk_ids.device, blocks, threads, slots, found, shared_bytes=4 * in_shared)


@dispatch_layout.validate
def _(given: Any) -> None:
    checks.ids(given.topk_ids, given.rank_of_expert.shape[0])


@dispatch_layout.run
def _(find: Any, given: Any, per_rank: torch.Tensor, per_expert: torch.Tensor, is_token_in_rank: torch.Tensor) -> None:
    per_rank.zero_()
    per_expert.zero_()
    find(
        topk_ids=given.topk_ids,
        rank_of_expert=given.rank_of_expert,
        num_tokens_per_rank=per_rank,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=is_token_in_rank.view(torch.uint8),
    )
