"""What the functions of intrinsics.py and of libdevice do, in Python: for Numba's simulator."""

import ctypes
import math
import time
from typing import Any

import numpy as np

from numba_moe.device import simulator
from numba_moe.device.dialect import cuda

ALL_LANES = 0xFFFFFFFF


def flat(array: Any) -> Any:
    return array


def quotient(number: int, divisor: int) -> int:
    return int(number) // int(divisor)


def present(array: Any) -> bool:
    return array is not None


def atomic_add(array: Any, index: int, value: Any) -> None:
    simulator.update(array, index, lambda old: old + value)


def atomic_or(array: Any, index: int, value: Any) -> None:
    simulator.update(array, index, lambda old: int(old) | int(value))


add_to_global = atomic_add


def load_words(array: Any, index: int) -> Any:
    return tuple(map(int, simulator.words(array, index)))


def store_words(array: Any, index: int, words: Any) -> None:
    simulator.words(array, index, "stores")[:] = words


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
    simulator.words(array, index)  # refuses an address that is no multiple of 16
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


def wait_for_earlier() -> None:
    """Do nothing: here a kernel starts when the one ahead has ended."""


def let_next_start() -> None:
    """Do nothing: here the next kernel starts when this one has ended."""


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


def log(value: Any) -> Any:
    with np.errstate(all="ignore"):
        return np.log(np.float32(value))


def memory_at(address: int, array: Any) -> Any:
    memory: Any = (ctypes.c_char * (1 << 40)).from_address(int(address))
    return np.frombuffer(memory, array.dtype)


def release_store(address: int, value: int) -> None:
    memory_at(address, np.empty(0, np.int32))[0] = value


def acquire_load(address: int) -> int:
    return int(memory_at(address, np.empty(0, np.int32))[0])


def arrive(array: Any, index: int, value: int) -> int:
    before = int(array[index])
    array[index] = before + value
    return before


def fence_system() -> None:
    pass


def nanoseconds() -> int:
    return time.monotonic_ns()
