"""Device functions that several kernels share: float access, warp and block reductions and scans, choice keys.

A warp function must be reached by all 32 lanes of the warp.
"""

import numpy as np

from numba_moe.device.dialect import cuda, float32, int32, int64, uint32
from numba_moe.device.instructions import as_int64, exp2, float_as_int, int_as_float, larger, store_words

ALL_LANES = 0xFFFFFFFF
WARP = 32
# A grid of more blocks takes all room of a GPU, and what starts beside it then slows it down: on an H200 gating of 192
# to 1,024 tokens takes 3 to 9 % less where the next kernel may start, and of 3,072 tokens up to 29 % more.
MOST_BLOCKS_BESIDE = 256
INFINITY = np.float32(np.inf)
NEGATIVE_INFINITY = np.float32(-np.inf)
LARGEST_FLOAT = np.finfo(np.float32).max
LOG2_E = np.float32(np.log2(np.e))
LARGEST_INT32 = np.iinfo(np.int32).max
LOWEST_ORDER = np.iinfo(np.int32).min
LOWEST_KEY = np.iinfo(np.int64).min
HIGHEST_KEY = np.iinfo(np.int64).max


def reciprocal_of(divisor: int) -> tuple[int, int]:
    """Return what `divided` takes for a divisor."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


@cuda.jit(device=True)
def divided(number, reciprocal, shift):
    """Divide an int32 that is not negative by the divisor of `reciprocal_of`, in a tenth of the time of a division."""
    return int32((int64(number) * reciprocal) >> shift)


@cuda.jit(device=True)
def load_integer(array, index, size):
    """Read an int32, or an int64 if that is the size in bytes."""
    if size == 8:
        return as_int64(array)[index]
    return int64(array[index])


@cuda.jit(device=True)
def fill(array, size, value, first, step):
    """Write array[first:size:step]."""
    index = uint32(first)  # which passes the size by up to a step, and that may be the largest int32
    while index < uint32(size):
        array[index] = value
        index = uint32(index + step)


@cuda.jit(device=True)
def fill_words(array, num_words, size, value, first, step):
    """Write int32 array[:size], the first num_words 16-byte words whole; `step` threads share this."""
    index = int32(first)
    while index < num_words:
        store_words(array, int64(index) << 2, (value, value, value, value))
        index = int32(index + step)
    fill(array, size, value, int32((num_words << 2) + first), step)


@cuda.jit(device=True)
def exp(value):
    """Return e to a power, with six digits or so; less than 1e-38 becomes 0."""
    return exp2(value * float32(LOG2_E))


@cuda.jit(device=True)
def warp_index():
    """Index of this warp in the grid."""
    return int32(cuda.blockIdx.x * (cuda.blockDim.x >> 5) + (cuda.threadIdx.x >> 5))


@cuda.jit(device=True)
def lanes_below():
    """Mask of the lanes before this one."""
    return (1 << cuda.laneid) - 1


@cuda.jit(device=True)
def first_lane(predicate):
    """Return the lowest lane for which a predicate holds; it holds for one at least."""
    return int32(cuda.ffs(uint32(cuda.ballot_sync(ALL_LANES, predicate))) - 1)


@cuda.jit(device=True)
def warp_max(value):
    for distance in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(ALL_LANES, value, distance))
    return value


@cuda.jit(device=True)
def warp_sum(value):
    """Sum over the warp, with the same bits in every lane and at every run."""
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(ALL_LANES, value, distance)
    return value


@cuda.jit(device=True)
def count_lanes(mask):
    """Count the lanes of a mask."""
    return int32(cuda.popc(uint32(mask)))


@cuda.jit(device=True)
def warp_inclusive_sum(value, dtype):
    """Sum of `value` over this and all lower lanes, in that dtype: Numba would widen int32 to int64."""
    for distance in (1, 2, 4, 8, 16):
        below = cuda.shfl_up_sync(ALL_LANES, value, distance)
        if cuda.laneid >= distance:
            value = dtype(value + below)
    return value


@cuda.jit(device=True)
def block_sums(value, warp_sums, dtype):
    """Sum `value` over this and all lower threads, and over the block; warp_sums: shared [32] of that dtype."""
    warp = int32(cuda.threadIdx.x >> 5)
    warps = int32(cuda.blockDim.x >> 5)
    value = warp_inclusive_sum(value, dtype)
    if cuda.laneid == WARP - 1:
        warp_sums[warp] = value
    cuda.syncthreads()
    of_warp = dtype(0)
    if cuda.laneid < warps:
        of_warp = warp_sums[cuda.laneid]
    upto = of_warp
    distance = int32(1)
    while distance < warps:
        below = cuda.shfl_up_sync(ALL_LANES, upto, distance)
        if cuda.laneid >= distance:
            upto = dtype(upto + below)
        distance = int32(distance << 1)
    total = cuda.shfl_sync(ALL_LANES, upto, warps - 1)
    before = cuda.shfl_sync(ALL_LANES, dtype(upto - of_warp), warp)
    cuda.syncthreads()
    return dtype(value + before), total


@cuda.jit(device=True)
def first_above(sums, size, value):
    """Return the index of the first of ascending sums[:size] that is above a value; the last one is."""
    low = int32(0)
    high = int32(size - 1)
    while low < high:
        middle = int32((low + high) >> 1)
        if sums[middle] > value:
            high = middle
        else:
            low = int32(middle + 1)
    return low


@cuda.jit(device=True)
def order_of_number(value):
    """Return an int32 above LOWEST_ORDER that orders as the float, which is not NaN, does; -0.0 is 0.0."""
    bits = int32(float_as_int(value + float32(0.0)))
    return int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@cuda.jit(device=True)
def order(value):
    """Return what `order_of_number` does; NaN is -inf."""
    return order_of_number(larger(value, float32(NEGATIVE_INFINITY)))


@cuda.jit(device=True)
def value_of(bits):
    """Return the float whose order this is."""
    return int_as_float(int32(bits ^ ((bits >> 31) & 0x7FFFFFFF)))


@cuda.jit(device=True)
def rank_key(rank, index):
    """Return one integer that orders candidates by rank, an int32, then by lower index."""
    return (int64(rank) << 32) | (0x7FFFFFFF - index)


@cuda.jit(device=True)
def choice_key(value, index):
    """Return one integer that orders candidates by value, then by lower index; NaN ranks with -inf."""
    return rank_key(order(value), index)


@cuda.jit(device=True)
def chosen_index(key):
    """Return the index that went into a key."""
    return int32(0x7FFFFFFF - (key & 0x7FFFFFFF))
