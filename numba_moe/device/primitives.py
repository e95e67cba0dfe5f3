"""Device functions that several kernels share: float access, warp and block reductions and scans, choice keys.

A warp function must be reached by all 32 lanes of the warp.
"""

import math
from typing import Any

import numpy as np

from numba_moe.device import simulator
from numba_moe.device.dialect import Deferred, cuda, float32, int32, int64, uint32

ALL_LANES = 0xFFFFFFFF
WARP = 32
INFINITY = np.float32(np.inf)
NEGATIVE_INFINITY = np.float32(-np.inf)
LARGEST_FLOAT = np.finfo(np.float32).max
LOG2_E = np.float32(np.log2(np.e))
LARGEST_INT32 = np.iinfo(np.int32).max
LOWEST_ORDER = np.iinfo(np.int32).min
LOWEST_KEY = np.iinfo(np.int64).min
HIGHEST_KEY = np.iinfo(np.int64).max


flat: Any
quotient: Any
present: Any
atomic_add: Any
atomic_or: Any
add_to_global: Any
load_words: Any
store_words: Any
load_word: Any
store_word: Any
clear_word: Any
floats_of: Any
load_like: Any
add_scaled: Any
dot: Any
store_floats: Any
load_float: Any
load_floats: Any
load_eight: Any
store_float: Any
store_eight: Any
erfc: Any
float_as_int: Any
int_as_float: Any
warp_highest: Any
divide: Any
divide_rounded: Any
larger: Any
tail: Any
as_uint32: Any
cluster_arrive: Any
cluster_wait: Any
of_block: Any
as_int16: Any
as_int64: Any
tanh: Any
fma: Any
exp2: Any
reciprocal: Any
square_root: Any
if simulator.ENABLED:  # the twins of intrinsics.py and of libdevice

    def flat(array: Any) -> Any:
        return array

    def quotient(number: int, divisor: int) -> int:
        return int(number) // int(divisor)

    def present(array: Any) -> bool:
        return array is not None

    def atomic_add(array: Any, index: int, value: Any) -> None:
        array[index] = array[index] + value  # threads take turns

    def atomic_or(array: Any, index: int, value: Any) -> None:
        array[index] = int(array[index]) | int(value)

    add_to_global = atomic_add

    def load_words(array: Any, index: int) -> Any:
        return tuple(map(int, simulator.words(array, index)))

    def store_words(array: Any, index: int, words: Any) -> None:
        simulator.words(array, index)[:] = words

    def load_word(array: Any, index: int) -> Any:
        return array[index]

    def store_word(array: Any, index: int, word: Any) -> None:
        array[index] = word

    def clear_word(array: Any, index: int) -> None:
        array[index] = 0

    def floats_of(array: Any, words: Any) -> Any:
        elements = np.array(words, np.int32).view(array.dtype)
        return tuple(load_float(elements, lane) for lane in range(len(elements)))

    def load_like(array: Any, index: int, other: Any) -> Any:
        count = 16 // other.dtype.itemsize
        if index % count:
            raise IndexError(f"index {index} is not a multiple of {count} elements")
        return tuple(load_float(array, index + lane) for lane in range(count))

    def add_scaled(totals: Any, factor: Any, floats: Any) -> Any:
        with np.errstate(all="ignore"):
            products = (float(factor) * float(value) for value in floats)
            return tuple(np.float32(total + product) for total, product in zip(totals, products, strict=True))

    def dot(left: Any, right: Any) -> Any:
        total = np.float32(0.0)
        for factor, value in zip(left, right, strict=True):
            (total,) = add_scaled((total,), factor, (value,))
        return total

    def store_floats(array: Any, index: int, floats: Any) -> None:
        if index % len(floats):
            raise IndexError(f"index {index} is not a multiple of {len(floats)} elements")
        for lane, value in enumerate(floats):
            store_float(array, index + lane, value)

    def load_float(array: Any, index: int) -> Any:
        value = array[index]
        return np.uint32(int(value) << 16).view(np.float32) if array.dtype == np.uint16 else np.float32(value)

    def load_floats(array: Any, index: int) -> Any:
        if index % 4:
            raise IndexError(f"index {index} is not a multiple of four elements")
        return tuple(load_float(array, index + lane) for lane in range(4))

    def load_eight(array: Any, index: int) -> Any:
        array.words(index)  # refuses an address that is no multiple of 16
        return tuple(load_float(array, index + lane) for lane in range(8))

    def store_eight(array: Any, index: int, values: Any) -> None:
        array.words(index)
        for lane in range(8):
            store_float(array, index + lane, values[lane])

    def erfc(value: Any) -> Any:
        return np.float32(math.erfc(value))

    def store_float(array: Any, index: int, value: Any) -> None:
        if array.dtype == np.uint16:
            bits = int(np.float32(value).view(np.uint32))
            # Round to nearest, ties to even, as the hardware does; a NaN keeps its quiet bit.
            value = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 if value == value else 0x7FFF
        array[index] = value

    def float_as_int(value: Any) -> int:
        return int(np.float32(value).view(np.int32))

    def int_as_float(value: Any) -> Any:
        return np.int32(value).view(np.float32)

    @cuda.jit(device=True)
    def warp_highest(value):
        for distance in (16, 8, 4, 2, 1):
            value = max(value, cuda.shfl_xor_sync(ALL_LANES, value, distance))
        return value

    def larger(a: Any, b: Any) -> Any:
        return np.fmax(np.float32(a), np.float32(b))

    def divide(numerator: Any, denominator: Any) -> Any:
        return np.float32(numerator) / np.float32(denominator)

    def divide_rounded(numerator: Any, denominator: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.float32(numerator) / np.float32(denominator)

    def tail(array: Any, elements: int) -> Any:
        return array[elements:]

    def as_uint32(array: Any) -> Any:
        return array.view(np.uint32)

    def cluster_arrive() -> None:
        simulator.cluster_arrive()

    def cluster_wait() -> None:
        simulator.cluster_wait()

    def of_block(array: Any, block: int) -> Any:
        return simulator.of_block(array, int(block))

    def as_int16(array: Any) -> Any:
        return array  # which knows its own dtype

    def as_int64(array: Any) -> Any:
        return array

    def tanh(value: Any) -> Any:
        return np.tanh(np.float32(value))

    def fma(factor: Any, value: Any, total: Any) -> Any:
        return add_scaled((total,), factor, (value,))[0]

    def exp2(value: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.exp2(np.float32(value))

    def reciprocal(value: Any) -> Any:
        return np.float32(1.0) / np.float32(value)

    def square_root(value: Any) -> Any:
        return np.sqrt(np.float32(value))

else:
    flat = Deferred("numba_moe.device.intrinsics", "flat")
    quotient = Deferred("numba_moe.device.intrinsics", "quotient")
    present = Deferred("numba_moe.device.intrinsics", "present")
    atomic_add = Deferred("numba_moe.device.intrinsics", "atomic_add")
    atomic_or = Deferred("numba_moe.device.intrinsics", "atomic_or")
    add_to_global = Deferred("numba_moe.device.intrinsics", "add_to_global")
    load_words = Deferred("numba_moe.device.intrinsics", "load_words")
    store_words = Deferred("numba_moe.device.intrinsics", "store_words")
    load_word = Deferred("numba_moe.device.intrinsics", "load_word")
    store_word = Deferred("numba_moe.device.intrinsics", "store_word")
    clear_word = Deferred("numba_moe.device.intrinsics", "clear_word")
    floats_of = Deferred("numba_moe.device.intrinsics", "floats_of")
    load_like = Deferred("numba_moe.device.intrinsics", "load_like")
    add_scaled = Deferred("numba_moe.device.intrinsics", "add_scaled")
    dot = Deferred("numba_moe.device.intrinsics", "dot")
    store_floats = Deferred("numba_moe.device.intrinsics", "store_floats")
    load_float = Deferred("numba_moe.device.intrinsics", "load_float")
    load_floats = Deferred("numba_moe.device.intrinsics", "load_floats")
    load_eight = Deferred("numba_moe.device.intrinsics", "load_eight")
    store_float = Deferred("numba_moe.device.intrinsics", "store_float")
    store_eight = Deferred("numba_moe.device.intrinsics", "store_eight")
    erfc = Deferred("numba.cuda.libdevice", "erfcf")
    float_as_int = Deferred("numba.cuda.libdevice", "float_as_int")
    int_as_float = Deferred("numba.cuda.libdevice", "int_as_float")
    warp_highest = Deferred("numba_moe.device.intrinsics", "warp_highest")
    exp2 = Deferred("numba_moe.device.intrinsics", "exp2")
    reciprocal = Deferred("numba_moe.device.intrinsics", "reciprocal")
    square_root = Deferred("numba_moe.device.intrinsics", "square_root")
    larger = Deferred("numba.cuda.libdevice", "fmaxf")  # of a NaN and a number the number
    divide = Deferred("numba.cuda.libdevice", "fast_fdividef")
    divide_rounded = Deferred("numba.cuda.libdevice", "fdiv_rn")  # by subnormal numbers too
    cluster_arrive = Deferred("numba_moe.device.intrinsics", "cluster_arrive")
    cluster_wait = Deferred("numba_moe.device.intrinsics", "cluster_wait")
    of_block = Deferred("numba_moe.device.intrinsics", "of_block")
    as_uint32 = Deferred("numba_moe.device.intrinsics", "as_uint32")
    as_int16 = Deferred("numba_moe.device.intrinsics", "as_int16")
    as_int64 = Deferred("numba_moe.device.intrinsics", "as_int64")
    tanh = Deferred("numba.cuda.libdevice", "tanhf")
    fma = Deferred("numba.cuda.libdevice", "fmaf")  # factor * value + total
    tail = Deferred("numba_moe.device.intrinsics", "tail")


def reciprocal_of(divisor: int) -> tuple[int, int]:
    """Return what `divided` takes for a divisor."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


@cuda.jit(device=True)
def divided(number, reciprocal, shift):
    """Divide an int32 that is not negative by the divisor of `reciprocal_of`, in a tenth of the time of a division."""
    return int32((int64(number) * reciprocal) >> shift)


@cuda.jit(device=True)
def fill(array, size, value, first, step):
    """Write array[first:size:step]."""
    index = uint32(first)  # which passes the size by up to a step, and that may be the largest int32
    while index < uint32(size):
        array[index] = value
        index = uint32(index + step)


@cuda.jit(device=True)
def fill_words(array, num_words, size, value, first, step):
    """Write int32 array[:size], the first num_words words of 16 bytes as such, from the first of so many threads."""
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
