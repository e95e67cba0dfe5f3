"""Device functions that need LLVM: float access in any of the float dtypes. Imported when a kernel is compiled."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic


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
