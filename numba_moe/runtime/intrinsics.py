"""Device functions that need LLVM: float access in any of the float dtypes. Imported when a kernel is compiled."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    if isinstance(array_type, types.Array):
        array = context.make_array(array_type)(context, builder, array).data
    return builder.gep(array, [index])


def _as_float32(builder: Any, dtype: Any, value: Any) -> Any:
    """Convert a float32, float16 or bfloat16, given as a float or as its bits."""
    if dtype == types.float16:
        return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
    if dtype == types.uint16:
        word = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())
    return builder.bitcast(value, ir.FloatType())


@intrinsic
def flat(typingctx: Any, array: Any) -> Any:
    """Take an array in shared memory as plain memory: Numba would let every index also count from the end."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def tail(typingctx: Any, array: Any, elements: Any) -> Any:
    """Return plain memory from an element on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return array(array, types.int64), codegen


@intrinsic
def as_int32(typingctx: Any, array: Any) -> Any:
    """Take plain memory as int32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32).as_pointer())

    return types.CPointer(types.int32)(array), codegen


@intrinsic
def quotient(typingctx: Any, number: Any, divisor: Any) -> Any:
    """Divide numbers that are not negative in 32 bits: Numba's own `//` is of 64 bits, and rounds down below 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.udiv(*arguments)

    return types.int32(types.int32, types.int32), codegen


@intrinsic
def present(typingctx: Any, array: Any) -> Any:
    """Whether an optional array was given: its address is not null."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, array = signature.args[0], arguments[0]
        if isinstance(array_type, types.Array):
            array = context.make_array(array_type)(context, builder, array).data
        return builder.icmp_unsigned("!=", array, ir.Constant(array.type, None))

    return types.boolean(array), codegen


@intrinsic
def load_words(typingctx: Any, array: Any, index: Any) -> Any:
    """Read 16 bytes as four int32; the address of array[index] must be a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        words = ir.VectorType(ir.IntType(32), 4)
        vector = builder.load(builder.bitcast(address, words.as_pointer()), align=16)
        lanes = [builder.extract_element(vector, ir.Constant(ir.IntType(32), lane)) for lane in range(4)]
        return context.make_tuple(builder, signature.return_type, lanes)

    return types.UniTuple(types.int32, 4)(array, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an element of an integer array in device memory, in no particular order among threads."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.atomic_rmw(
            "add", _address(context, builder, signature.args[0], *arguments[:2]), arguments[2], "monotonic"
        )
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), codegen


@intrinsic
def load_float(typingctx: Any, array: Any, index: Any) -> Any:
    """Read an element of a float32, float16 or bfloat16 (as uint16) array as float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_address(context, builder, signature.args[0], *arguments))
        return _as_float32(builder, signature.args[0].dtype, value)

    return types.float32(array, types.int64), codegen


@intrinsic
def load_floats(typingctx: Any, array: Any, index: Any) -> Any:
    """Read four elements of a float array at once as float32; their address must be a multiple of their size."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype = signature.args[0].dtype
        address = _address(context, builder, signature.args[0], *arguments)
        bits = ir.IntType(dtype.bitwidth)
        vector = ir.VectorType(bits, 4)
        loaded = builder.load(builder.bitcast(address, vector.as_pointer()), align=dtype.bitwidth // 2)
        lanes = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), lane)) for lane in range(4)]
        floats = [_as_float32(builder, dtype, lane) for lane in lanes]
        return context.make_tuple(builder, signature.return_type, floats)

    return types.UniTuple(types.float32, 4)(array, types.int64), codegen


WORD = ir.IntType(32)
FOUR_WORDS = ir.VectorType(WORD, 4)


def _floats_of(builder: Any, dtype: Any, word: Any) -> list[Any]:
    """Return the float32 that a word of 32 bits holds, or its two float16 or bfloat16, as float32."""
    if dtype == types.float32:
        return [builder.bitcast(word, ir.FloatType())]
    if dtype == types.uint16:
        halves = [builder.shl(word, ir.Constant(WORD, 16)), builder.and_(word, ir.Constant(WORD, 0xFFFF0000))]
        return [builder.bitcast(half, ir.FloatType()) for half in halves]
    pair = builder.bitcast(word, ir.VectorType(ir.HalfType(), 2))
    return [builder.fpext(builder.extract_element(pair, ir.Constant(WORD, i)), ir.FloatType()) for i in range(2)]


def _word_of(builder: Any, dtype: Any, floats: list[Any]) -> Any:
    """Return the word of 32 bits of one float32, or of two rounded to float16 or bfloat16."""
    if dtype == types.float32:
        return builder.bitcast(floats[0], WORD)
    kind = "bf16x2" if dtype == types.uint16 else "f16x2"
    convert = ir.FunctionType(WORD, [ir.FloatType(), ir.FloatType()])
    # the first operand becomes the upper half
    return builder.call(ir.InlineAsm(convert, f"cvt.rn.{kind}.f32 $0, $1, $2;", "=r,f,f"), floats[::-1])


@intrinsic
def load_eight(typingctx: Any, array: Any, index: Any) -> Any:
    """Read eight elements of a float array as float32, 16 bytes at a time; the address must be a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype = signature.args[0].dtype
        address = builder.bitcast(_address(context, builder, signature.args[0], *arguments), FOUR_WORDS.as_pointer())
        floats: list[Any] = []
        for part in range(dtype.bitwidth // 16):
            words = builder.load(builder.gep(address, [ir.Constant(WORD, part)]), align=16)
            for i in range(4):
                floats += _floats_of(builder, dtype, builder.extract_element(words, ir.Constant(WORD, i)))
        return context.make_tuple(builder, signature.return_type, floats)

    return types.UniTuple(types.float32, 8)(array, types.int64), codegen


@intrinsic
def store_eight(typingctx: Any, array: Any, index: Any, values: Any) -> Any:
    """Write eight float32 to a float array, 16 bytes at a time; the address must be a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype = signature.args[0].dtype
        address = _address(context, builder, signature.args[0], *arguments[:2])
        address = builder.bitcast(address, FOUR_WORDS.as_pointer())
        floats = [builder.extract_value(arguments[2], i) for i in range(8)]
        of_word = 32 // dtype.bitwidth
        words = [_word_of(builder, dtype, floats[i : i + of_word]) for i in range(0, 8, of_word)]
        for part in range(len(words) // 4):
            vector = ir.Constant(FOUR_WORDS, ir.Undefined)
            for i in range(4):
                vector = builder.insert_element(vector, words[4 * part + i], ir.Constant(WORD, i))
            builder.store(vector, builder.gep(address, [ir.Constant(WORD, part)]), align=16)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.UniTuple(types.float32, 8)), codegen


@intrinsic
def warp_highest(typingctx: Any, value: Any) -> Any:
    """Return the highest int32 of the warp in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        reduce = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        code = "redux.sync.max.s32 $0, $1, 0xffffffff;"
        return builder.call(ir.InlineAsm(reduce, code, "=r,r", side_effect=True), arguments)

    return types.int32(types.int32), codegen


def _of_float32(code: str) -> Any:
    """Return an intrinsic of one PTX instruction that takes and returns a float32."""

    @intrinsic
    def function(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
            return builder.call(ir.InlineAsm(kind, f"{code} $0, $1;", "=f,f"), arguments)

        return types.float32(types.float32), codegen

    return function


exp2 = _of_float32("ex2.approx.ftz.f32")
reciprocal = _of_float32("rcp.approx.ftz.f32")
square_root = _of_float32("sqrt.approx.ftz.f32")


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
