"""Map the experts that a router chose to physical ids, the places that hold the experts: `dispatch_ids`.

A thread takes one slot and looks its expert up. Where the expert has several places, it picks one by the generator
Philox4x32-10, by a hash of the token, or in turn. With many slots each block counts in shared memory first, so that
threads do not wait for a busy expert's counter.
"""

from typing import Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, int32, int64, uint32, uint64
from numba_moe.device.instructions import add_to_global, atomic_add, flat, present, quotient, wait_for_earlier
from numba_moe.device.primitives import fill, load_integer
from numba_moe.device.types import (
    Ids,
    Int32,
    Int64,
    LikeTopkIds,
    OptionalIds,
    OptionalInt32Array,
    OptionalInt64Array,
    OptionalSizedArray,
)
from numba_moe.reference import dispatch as reference
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.compile import MOST_SHARED_BYTES
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op
from numba_moe.runtime.plans import Layout

ALGORITHMS = ("static", "dynamic", "hash", "fake")
STATIC, DYNAMIC, HASH, FAKE = range(len(ALGORITHMS))

# Constants of Philox4x32-10, and of Knuth's hash.
LEFT_MULTIPLIER, RIGHT_MULTIPLIER = 0xD2511F53, 0xCD9E8D57
LEFT_STEP, RIGHT_STEP = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
HASH_MULTIPLIER = 2654435769
WORD = 0xFFFFFFFF

MOST_THREADS = 1024
# Two blocks for each multiprocessor of an H200.
MOST_BLOCKS = 264


class Dispatch(NamedTuple):
    """The places of the experts, and the rule that picks one of them for a slot."""

    physical_map: OptionalInt32Array  # [num_rows, width]; absent if experts keep their ids
    num_valid: OptionalInt32Array  # [num_rows]
    step: OptionalInt64Array  # [1]
    num_rows: Int32
    width: Int32  # 1 if each expert has one place
    algorithm: Int32  # the index in ALGORITHMS
    seed: Int64


class Slots(NamedTuple):
    """The experts of slots, and where their places are written."""

    topk_ids: Ids  # [num_slots]
    out: LikeTopkIds  # [num_slots]
    num_token_non_padded: OptionalSizedArray  # [1]; slots of later tokens have no place
    num_slots: Int32
    top_k: Int32
    scalar_bytes: Int32  # of an element of num_token_non_padded


class PhysicalCounts(NamedTuple):
    """The counters of the places."""

    counts: OptionalIds  # [num_physical]
    num_physical: Int32
    num_in_shared: Int32  # num_physical if a block counts in shared memory first, otherwise 0


@cuda.jit(device=True)
def random_word(slot, step, seed):
    """Return the first word of Philox4x32-10 for counter (slot, 0, step) and key seed."""
    a = uint32(slot)
    b = uint32(0)
    c = uint32(step & WORD)
    d = uint32((step >> 32) & WORD)
    left_key = uint32(seed & WORD)
    right_key = uint32((seed >> 32) & WORD)
    for _ in range(ROUNDS):
        left = uint64(a) * uint64(LEFT_MULTIPLIER)
        right = uint64(c) * uint64(RIGHT_MULTIPLIER)
        a = uint32(uint32(right >> 32) ^ b ^ left_key)
        b = uint32(right)
        c = uint32(uint32(left >> 32) ^ d ^ right_key)
        d = uint32(left)
        left_key = uint32(int64(left_key) + LEFT_STEP)
        right_key = uint32(int64(right_key) + RIGHT_STEP)
    return a


@cuda.jit(device=True)
def physical_of(expert, slot, token, dispatch):
    """Return the physical id that a slot of a token goes to for its expert, -1 for none."""
    if expert < 0 or (expert >= dispatch.num_rows and dispatch.algorithm != FAKE):
        return int32(-1)
    index = int64(expert) * dispatch.width
    if dispatch.algorithm == FAKE:
        index = int64(slot - quotient(slot, dispatch.num_rows) * dispatch.num_rows)
    elif dispatch.algorithm != STATIC:
        valid = min(dispatch.num_valid[expert], dispatch.width)
        if valid < 1:
            return int32(-1)
        if dispatch.algorithm == DYNAMIC:
            word = uint64(random_word(slot, dispatch.step[0], dispatch.seed))
            index += int64((word * uint64(valid)) >> 32)
        else:
            word = uint64(uint32(int64(token) * HASH_MULTIPLIER))
            index += int64(word % uint64(valid))
    return int32(max(dispatch.physical_map[index], -1))


@cuda.jit(launch_bounds=MOST_THREADS)
def map_ids(slots: Slots, dispatch: Dispatch, counted: PhysicalCounts):
    """Map the slots; a thread takes one slot of each grid-sized stretch, so any grid covers all slots.

    Dynamic shared memory: an int32 for each of `num_in_shared` counters.
    """
    wait_for_earlier()
    in_block = flat(cuda.shared.array(0, int32))  # [num_in_shared]
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    fill(in_block, counted.num_in_shared, 0, thread, threads)
    cuda.syncthreads()
    num_tokens = int64(slots.num_slots)
    if present(slots.num_token_non_padded):
        num_tokens = load_integer(slots.num_token_non_padded, 0, slots.scalar_bytes)
    slot = int64(cuda.blockIdx.x) * threads + thread
    while slot < slots.num_slots:
        token = quotient(int32(slot), slots.top_k)
        physical = int32(-1)
        if token < num_tokens:
            physical = physical_of(slots.topk_ids[slot], int32(slot), token, dispatch)
        slots.out[slot] = physical
        if physical >= 0 and physical < counted.num_physical:
            if counted.num_in_shared > 0:
                atomic_add(in_block, physical, 1)
            else:
                add_to_global(counted.counts, physical, 1)
        slot += int64(cuda.gridDim.x) * threads
    cuda.syncthreads()
    physical = thread
    while physical < counted.num_in_shared:
        count = in_block[physical]
        if count > 0:
            add_to_global(counted.counts, physical, count)
        physical = int32(physical + threads)


def _check_need(
    name: str,
    value: Any,
    needed: bool,
    algorithm: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    because: str,
    like: tuple[str, Layout],
) -> None:
    """Check an array that some algorithms need and the others refuse."""
    if needed:
        checks.array(name, value, (dtype,), (1,), like=like)
        checks.shape(name, value, shape, because)
    else:
        given = "an array" if isinstance(value, Layout) else getattr(value, "what", None)
        checks.holds(name, f"None with the algorithm {algorithm!r}", value is None, given)


def check_dispatch(topk_ids: Any, tables: Any) -> Dispatch:
    """Check dispatch tables, or the arguments of `dispatch_ids` with the same names; return the record for kernels."""
    physical_map, num_valid, step = tables.physical_map, tables.num_valid, tables.step
    algorithm = tables.algorithm
    checks.array("topk_ids", topk_ids, checks.IDS, (1, 2))
    num_slots = topk_ids.shape.numel()
    checks.fits_int32("topk_ids", num_slots, "the number of slots")
    checks.choice("algorithm", algorithm, ALGORITHMS)
    here = ("topk_ids", topk_ids)
    replicated = algorithm in ("dynamic", "hash")
    checks.array("physical_map", physical_map, (torch.int32,), (2,) if replicated else (1,), like=here)
    num_entries = physical_map.shape.numel()
    checks.holds("physical_map", "not empty", num_entries > 0, f"shape {tuple(physical_map.shape)}")
    checks.fits_int32("physical_map", num_entries, "the number of entries")
    num_rows = physical_map.shape[0]
    _check_need("num_valid", num_valid, replicated, algorithm, torch.int32, (num_rows,), "(num_experts,)", here)
    _check_need("step", step, algorithm == "dynamic", algorithm, torch.int64, (1,), "(1,)", here)
    seed = checks.integer("seed", tables.seed, 0, 2**63 - 1)
    rule = (num_rows, num_entries // num_rows, ALGORITHMS.index(algorithm), seed)
    return Dispatch(physical_map, num_valid, step, *rule)


@op(reference.dispatch_ids, writes=("counts",), own_out=True, onto={"out": "topk_ids"})
def dispatch_ids(
    topk_ids: Array,
    physical_map: Array,
    num_valid: Array | None = None,
    *,
    algorithm: str = "static",
    seed: int = 0,
    step: Array | None = None,
    num_token_non_padded: Array | None = None,
    counts: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Replace the expert of each slot by a physical id: one of the places that hold the expert.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_slots] or [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` become -1.
    physical_map : array of int32
        The places. "static" takes shape [num_experts], the place of each expert. "dynamic" and "hash" take
        [num_experts, max_replicas], the places of each expert. "fake" takes [length], places that slots get in turn. A
        negative number is no place.
    num_valid : array of int32, shape [num_experts], optional
        With "dynamic" and "hash": the number of places in each row of the map.
    algorithm : {"static", "dynamic", "hash", "fake"}
        "static": the one place of the expert in the map. "dynamic": one of the expert's places at random. "hash": the
        place that a hash of the token's index picks, as in vLLM. "fake": the next place in turn for any expert, to
        measure perfect balance; ids below 0 become -1.
    seed : int
        With "dynamic": the key of the random generator.
    step : array of int64, shape [1], optional
        With "dynamic": a counter on the device. The same seed, step and slot always give the same place. Add 1 to the
        counter to draw new places, also inside a captured graph.
    num_token_non_padded : array of int32 or int64, shape [1] or [], optional
        The number of tokens, on the device; slots of later tokens become -1 and are not counted. In one dimension a
        slot is a token.
    counts : array of int32 or int64, shape [num_physical], optional
        Written: 1 is added to the counter of each slot's physical id. Ids without a counter are not counted.
    out : array of the shape and dtype of `topk_ids`, optional
        Written: memory for the result. It may be `topk_ids` itself.

    Returns
    -------
    array of the shape and dtype of `topk_ids`
        Physical ids, -1 for a slot without a place. This is `out` if that is given.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, mixed devices, an unknown algorithm, an array that the algorithm needs and does not get
        or does not take, or a written array that shares memory with another argument (`out` may be `topk_ids`).

    Notes
    -----
    The op is one launch on the caller's current stream without synchronising, and CUDA graphs can capture it. Every run
    gives the same bits. It allocates the result only. The formulas are in the reference
    (`numba_moe.reference.dispatch_ids`). The random generator is Philox4x32-10. `ExpertDispatch` makes and keeps the
    tables.

    Examples
    --------
    >>> import numpy as np
    >>> ids = np.array([[0, 2], [1, -1], [0, 1]], np.int32)
    >>> dispatch_ids(ids, np.array([3, 1, 2], np.int32))
    array([[ 3,  2],
           [ 1, -1],
           [ 3,  1]], dtype=int32)
    >>> replicas, num_valid = np.array([[0, 3], [1, -1], [2, -1]], np.int32), np.array([2, 1, 1], np.int32)
    >>> counts = np.zeros(4, np.int32)
    >>> dispatch_ids(ids, replicas, num_valid, algorithm="dynamic", step=np.array([0]), counts=counts)
    array([[ 0,  2],
           [ 1, -1],
           [ 3,  1]], dtype=int32)
    >>> counts
    array([1, 2, 1, 1], dtype=int32)
    """


@dispatch_ids.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.topk_ids.dtype, *given.topk_ids.shape)


@dispatch_ids.plan
def _(given: Any) -> Launch:
    topk_ids, here = given.topk_ids, ("topk_ids", given.topk_ids)
    dispatch = check_dispatch(topk_ids, given)
    num_physical = 0
    if given.counts is not None:
        checks.array("counts", given.counts, checks.IDS, (1,), like=here)
        num_physical = given.counts.shape[0]
        checks.fits_int32("counts", num_physical, "the number of counters")
    if given.out is not None:
        checks.array("out", given.out, (topk_ids.dtype,), (1, 2), like=here)
        checks.shape("out", given.out, tuple(topk_ids.shape), "`topk_ids`.shape")
    num_slots = topk_ids.shape.numel()
    threads = block_threads(min(MOST_THREADS, -(-num_slots // 32) * 32))
    blocks = min(-(-num_slots // threads) if num_slots else 0, MOST_BLOCKS)
    in_shared = blocks > 1 and 4 * num_physical <= MOST_SHARED_BYTES
    num_in_shared = num_physical if in_shared else 0
    top_k = max(topk_ids.shape[1], 1) if len(topk_ids.shape) == 2 else 1
    num_tokens = given.num_token_non_padded
    scalar_bytes = 0
    if num_tokens is not None:
        checks.array("num_token_non_padded", num_tokens, checks.IDS, (0, 1), like=here)
        checks.shape("num_token_non_padded", num_tokens, (1,) * len(num_tokens.shape), "() or (1,)")
        scalar_bytes = num_tokens.dtype.itemsize
    slots = Slots(topk_ids, topk_ids, num_tokens and torch.int32, num_slots, top_k, scalar_bytes)
    counted = PhysicalCounts(given.counts, num_physical, num_in_shared)
    where = (topk_ids.device, blocks, threads)
    return Launch(map_ids, *where, slots, dispatch, counted, shared_bytes=4 * num_in_shared)


@dispatch_ids.validate
def _(given: Any) -> None:
    if given.algorithm != "fake":
        checks.ids(given.topk_ids, given.physical_map.shape[0])


@dispatch_ids.run
def _(map_ids: Any, given: Any, out: torch.Tensor) -> None:
    map_ids(
        topk_ids=given.topk_ids,
        physical_map=given.physical_map,
        num_valid=given.num_valid,
        step=given.step,
        num_token_non_padded=given.num_token_non_padded,
        counts=given.counts,
        out=out,
    )
