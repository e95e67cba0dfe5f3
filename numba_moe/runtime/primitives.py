"""Device functions that several kernels share: float access, warp and block reductions and scans, choice keys.

A warp function must be reached by all 32 lanes of the warp.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, float32, int32, int64, types

from numba_moe.runtime import simulator

ALL_LANES = 0xFFFFFFFF
WARP = 32
NEGATIVE_INFINITY = np.float32(-np.inf)
LARGEST_FLOAT = np.finfo(np.float32).max
LOWEST_KEY = np.iinfo(np.int64).min
HIGHEST_KEY = np.iinfo(np.int64).max


if simulator.ENABLED:

    def load_float(array: Any, index: int) -> Any:
        value = array[index]
        return np.uint32(value << 16).view(np.float32) if array.dtype == np.uint16 else np.float32(value)

    def store_float(array: Any, index: int, value: Any) -> None:
        if array.dtype == np.uint16:
            bits = int(np.float32(value).view(np.uint32))
            # Round to nearest, ties to even, as the hardware does; a NaN keeps its quiet bit.
            value = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 if value == value else 0x7FFF
        array[index] = value

    def float_as_int(value: Any) -> int:
        return int(np.float32(value).view(np.int32))

    def exp(value: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.exp(np.float32(value))

else:
    from numba.cuda import libdevice
    from numba.cuda.extending import intrinsic

    float_as_int = libdevice.float_as_int
    exp = libdevice.expf

    def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
        if isinstance(array_type, types.Array):
            array = context.make_array(array_type)(context, builder, array).data
        return builder.gep(array, [index])

    @intrinsic
    def load_float(typingctx: Any, array: Any, index: Any) -> Any:
        """Read an element of a float32, float16 or bfloat16 (as uint16) array as float32."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(_address(context, builder, signature.args[0], *arguments))
            dtype = signature.args[0].dtype
            if dtype == types.float16:
                return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
            if dtype == types.uint16:
                word = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
                return builder.bitcast(word, ir.FloatType())
            return value

        return types.float32(array, types.int64), codegen

    @intrinsic
    def store_float(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
        """Write a float32 to an element of a float32, float16 or bfloat16 array, rounded to nearest even."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            dtype = signature.args[0].dtype
            value = arguments[2]
            if dtype == types.float16:
                value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
            elif dtype == types.uint16:
                convert = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
                value = builder.call(ir.InlineAsm(convert, "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [value])
            builder.store(value, _address(context, builder, signature.args[0], *arguments[:2]))
            return context.get_dummy_value()

        return types.void(array, types.int64, types.float32), codegen


@cuda.jit(device=True)
def warp_index():
    """Index of this warp in the grid."""
    return (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP


@cuda.jit(device=True)
def lanes_below():
    """Mask of the lanes before this one."""
    return (1 << cuda.laneid) - 1


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
def warp_inclusive_sum(value):
    for distance in (1, 2, 4, 8, 16):
        below = cuda.shfl_up_sync(ALL_LANES, value, distance)
        if cuda.laneid >= distance:
            value += below
    return value


@cuda.jit(device=True)
def block_inclusive_sum(value, warp_sums):
    """Sum of `value` over this and all earlier threads of the block; warp_sums: shared int64 [32]."""
    warp = cuda.threadIdx.x // WARP
    value = warp_inclusive_sum(value)
    if cuda.laneid == WARP - 1:
        warp_sums[warp] = value
    cuda.syncthreads()
    for earlier in range(warp):
        value += warp_sums[earlier]
    cuda.syncthreads()
    return value


@cuda.jit(device=True)
def choice_key(value, index):
    """Return one integer that orders candidates by value, then by lower index; NaN ranks with -inf."""
    if value != value:
        value = float32(NEGATIVE_INFINITY)
    bits = int64(float_as_int(value + float32(0.0)))  # -0.0 becomes 0.0
    if bits < 0:
        bits = bits ^ 0x7FFFFFFF
    return (bits << 32) | (0xFFFFFFFF - index)


@cuda.jit(device=True)
def chosen_index(key):
    """Return the index that went into a choice key."""
    return int32(0xFFFFFFFF - (key & 0xFFFFFFFF))
