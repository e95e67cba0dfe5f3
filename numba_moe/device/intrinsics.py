"""Device functions that need LLVM: float access in any of the float dtypes. Imported when a kernel is compiled."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda import libdevice
from numba.cuda.core import targetconfig
from numba.cuda.extending import intrinsic

from numba_moe.device.types import HOPPER


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


def _floats(builder: Any, dtype: Any, vector: Any, count: int) -> list[Any]:
    """Convert a vector of words to float32, one for each word."""
    elements = builder.bitcast(vector, ir.VectorType(ir.IntType(dtype.bitwidth), count))
    lanes = [builder.extract_element(elements, ir.Constant(ir.IntType(32), lane)) for lane in range(count)]
    return [_as_float32(builder, dtype, lane) for lane in lanes]


def _bits_of_float32(builder: Any, dtype: Any, value: Any) -> Any:
    """Round a float32 to nearest even as a float32, float16 or bfloat16, and return its bits."""
    if dtype == types.float16:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
    if dtype == types.uint16:
        convert = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
        return builder.call(ir.InlineAsm(convert, "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [value])
    return builder.bitcast(value, ir.IntType(32))


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


def _memory_as(dtype: Any) -> Any:
    """Return an intrinsic that takes plain memory as that of another integer type."""

    @intrinsic
    def function(typingctx: Any, array: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], ir.IntType(dtype.bitwidth).as_pointer())

        return types.CPointer(dtype)(array), codegen

    return function


as_int16 = _memory_as(types.int16)
as_int64 = _memory_as(types.int64)
as_uint32 = _memory_as(types.uint32)


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
def store_words(typingctx: Any, array: Any, index: Any, words: Any) -> Any:
    """Write four int32 as 16 bytes; the address of array[index] must be a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, words = arguments
        address = _address(context, builder, signature.args[0], array, index)
        kind = ir.VectorType(ir.IntType(32), 4)
        vector = ir.Constant(kind, ir.Undefined)
        for lane in range(4):
            word = builder.extract_value(words, lane)
            vector = builder.insert_element(vector, word, ir.Constant(ir.IntType(32), lane))
        builder.store(vector, builder.bitcast(address, kind.as_pointer()), align=16)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.UniTuple(types.int32, 4)), codegen


def _atomic(operation: str) -> Any:
    """Return an intrinsic that changes an element of an integer array, in no particular order among threads."""

    @intrinsic
    def function(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = _address(context, builder, signature.args[0], *arguments[:2])
            builder.atomic_rmw(operation, address, arguments[2], "monotonic")
            return context.get_dummy_value()

        return types.void(array, types.int64, array.dtype), codegen

    return function


atomic_add = _atomic("add")
atomic_or = _atomic("or")


@intrinsic
def add_to_global(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Do what `atomic_add` does to an int32 or int64 in global memory; no thread waits for an answer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = signature.args[0].dtype.bitwidth
        number = ir.IntType(bits)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        address = builder.addrspacecast(address, number.as_pointer(1), "generic")
        reduce = ir.FunctionType(ir.VoidType(), [address.type, number])
        constraints = f"l,{'l' if bits == 64 else 'r'},~{{memory}}"
        code = f"red.relaxed.gpu.global.add.u{bits} [$0], $1;"
        builder.call(ir.InlineAsm(reduce, code, constraints, side_effect=True), [address, arguments[2]])
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


# A kernel of more blocks does not let the next one start before its own last blocks end, as the next one's blocks would
# take the room of ours. An H200 then sorts 32,768 slots in 15 us instead of 10.
MOST_BLOCKS_OVERTAKEN = 32
# The wait comes first: what starts early may read, before it waits itself, what kernels further ahead have written.
WAIT = f"""{{
    .reg .pred %few;
    .reg .u32 %blocks;
    griddepcontrol.wait;
    mov.u32 %blocks, %nctaid.x;
    setp.le.u32 %few, %blocks, {MOST_BLOCKS_OVERTAKEN};
    @%few griddepcontrol.launch_dependents;
}}"""


@intrinsic
def wait_for_earlier(typingctx: Any) -> Any:
    """Wait for the end of the kernel ahead on the stream, and let the next one start if this one is small."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if targetconfig.ConfigStack().top().compute_capability >= HOPPER:
            wait = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), WAIT, "~{memory}", side_effect=True)
            builder.call(wait, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def let_next_start(typingctx: Any) -> Any:
    """Let the next kernel on the stream start as soon as all blocks of this one have: where its blocks are short."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if targetconfig.ConfigStack().top().compute_capability >= HOPPER:
            code = "griddepcontrol.launch_dependents;"
            builder.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), code, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _of_cluster(code: str) -> str:
    """Return an instruction on clusters; a trap for GPUs that have none, to which no such launch is made."""
    return code if targetconfig.ConfigStack().top().compute_capability >= HOPPER else "trap;"


def _barrier(code: str) -> Any:
    """Return an intrinsic of one PTX instruction by which the threads of a cluster wait for each other."""

    @intrinsic
    def function(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [])
            barrier = ir.InlineAsm(kind, _of_cluster(code), "~{memory}", side_effect=True)
            builder.call(barrier, [], attrs=("convergent",))
            return context.get_dummy_value()

        return types.void(), codegen

    return function


cluster_arrive = _barrier("barrier.cluster.arrive.release.aligned;")
cluster_wait = _barrier("barrier.cluster.wait.acquire.aligned;")


@intrinsic
def of_block(typingctx: Any, array: Any, block: Any) -> Any:
    """Return the plain shared memory that another block of the cluster has where this one has an array."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, block = arguments
        kind = ir.FunctionType(array.type, [array.type, block.type])
        return builder.call(ir.InlineAsm(kind, _of_cluster("mapa.u64 $0, $1, $2;"), "=l,l,r"), [array, block])

    return array(array, types.int32), codegen


@intrinsic
def memory_at(typingctx: Any, address: Any, array: Any) -> Any:
    """Return the plain memory of the elements of an array's dtype that begins at an address, on any GPU."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = context.get_value_type(signature.return_type)
        return builder.inttoptr(arguments[0], pointer)

    return types.CPointer(array.dtype)(types.int64, array), codegen


def _on_memory(code: str, constraints: str, result: Any, *parameters: Any) -> Any:
    """Return an intrinsic of one PTX instruction on memory that other threads use too."""
    kinds = {types.int32: ir.IntType(32), types.int64: ir.IntType(64), types.void: ir.VoidType()}

    def emit(context: Any, builder: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(kinds[result], [kinds[parameter] for parameter in parameters])
        value = builder.call(ir.InlineAsm(kind, code, constraints, side_effect=True), arguments)
        return context.get_dummy_value() if result is types.void else value

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(context, builder, arguments)

    def nothing(typingctx: Any) -> Any:
        return result(*parameters), codegen

    def one(typingctx: Any, first: Any) -> Any:
        return result(*parameters), codegen

    def two(typingctx: Any, first: Any, second: Any) -> Any:
        return result(*parameters), codegen

    return intrinsic((nothing, one, two)[len(parameters)])


# Of all GPUs: what a thread wrote before, or what the writer of a value had written, is there.
release_store = _on_memory("st.release.sys.global.u32 [$0], $1;", "l,r,~{memory}", types.void, types.int64, types.int32)
acquire_load = _on_memory("ld.acquire.sys.global.u32 $0, [$1];", "=r,l,~{memory}", types.int32, types.int64)
fence_system = _on_memory("fence.acq_rel.sys;", "~{memory}", types.void)
nanoseconds = _on_memory("mov.u64 $0, %globaltimer;", "=l,~{memory}", types.int64)


@intrinsic
def arrive(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an int32 in global memory, and return what was there; blocks see what others wrote before they came."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.ptrtoint(_address(context, builder, signature.args[0], *arguments[:2]), ir.IntType(64))
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64), ir.IntType(32)])
        code = "atom.add.acq_rel.gpu.global.u32 $0, [$1], $2;"
        return builder.call(ir.InlineAsm(kind, code, "=r,l,r,~{memory}", side_effect=True), [address, arguments[2]])

    return types.int32(array, types.int64, types.int32), codegen


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
def load_word(typingctx: Any, array: Any, index: Any) -> Any:
    """Read a word of 1 to 16 bytes at once; its address must be a multiple of its size.

    Words of 16 bytes travel as complex128, for which Numba itself would read 8 bytes twice.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        if signature.return_type != types.complex128:
            return builder.load(address)
        halves = ir.VectorType(ir.IntType(64), 2)
        vector = builder.load(builder.bitcast(address, halves.as_pointer()), align=16)
        word = ir.Constant(context.get_value_type(types.complex128), ir.Undefined)
        for half in range(2):
            bits = builder.extract_element(vector, ir.Constant(ir.IntType(32), half))
            word = builder.insert_value(word, builder.bitcast(bits, ir.DoubleType()), half)
        return word

    return array.dtype(array, types.int64), codegen


@intrinsic
def store_word(typingctx: Any, array: Any, index: Any, word: Any) -> Any:
    """Write what `load_word` read, at once."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        word = arguments[2]
        if signature.args[2] != types.complex128:
            builder.store(word, address)
            return context.get_dummy_value()
        halves = [builder.bitcast(builder.extract_value(word, half), ir.IntType(64)) for half in range(2)]
        kind = ir.FunctionType(ir.VoidType(), [address.type, halves[0].type, halves[1].type])
        code = "st.global.cs.v2.b64 [$0], {$1, $2};"  # the first to leave the cache, which may not hold them all
        builder.call(ir.InlineAsm(kind, code, "l,l,l,~{memory}", side_effect=True), [address, *halves])
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), codegen


@intrinsic
def clear_word(typingctx: Any, array: Any, index: Any) -> Any:
    """Write a word of zeros."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        size = array.dtype.bitwidth // 8
        bits = ir.IntType(8 * size) if size < 16 else ir.VectorType(ir.IntType(64), 2)
        builder.store(ir.Constant(bits, None), builder.bitcast(address, bits.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def floats_of(typingctx: Any, array: Any, words: Any) -> Any:
    """Take 16 bytes, given as four int32, as the four or eight floats of an array of that dtype."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype, count = signature.args[0].dtype, signature.return_type.count
        vector = ir.Constant(ir.VectorType(ir.IntType(32), 4), ir.Undefined)
        for lane in range(4):
            word = builder.extract_value(arguments[1], lane)
            vector = builder.insert_element(vector, word, ir.Constant(ir.IntType(32), lane))
        return context.make_tuple(builder, signature.return_type, _floats(builder, dtype, vector, count))

    return types.UniTuple(types.float32, 128 // array.dtype.bitwidth)(array, types.UniTuple(types.int32, 4)), codegen


@intrinsic
def load_like(typingctx: Any, array: Any, index: Any, other: Any) -> Any:
    """Read at once the number of floats that 16 bytes of another array hold; the address is as for `store_floats`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype, count = signature.args[0].dtype, signature.return_type.count
        words = count * dtype.bitwidth // 32
        address = _address(context, builder, signature.args[0], *arguments[:2])
        address = builder.bitcast(address, ir.VectorType(ir.IntType(32), words).as_pointer())
        floats = _floats(builder, dtype, builder.load(address, align=min(16, 4 * words)), count)
        return context.make_tuple(builder, signature.return_type, floats)

    return types.UniTuple(types.float32, 128 // other.dtype.bitwidth)(array, types.int64, other), codegen


@intrinsic
def add_scaled(typingctx: Any, totals: Any, factor: Any, floats: Any) -> Any:
    """Add to each of a tuple of float32 the product of a factor and its partner, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, factor, floats = arguments
        sums = [
            builder.fma(factor, builder.extract_value(floats, lane), builder.extract_value(totals, lane))
            for lane in range(signature.return_type.count)
        ]
        return context.make_tuple(builder, signature.return_type, sums)

    return totals(totals, types.float32, totals), codegen


@intrinsic
def dot(typingctx: Any, left: Any, right: Any) -> Any:
    """Sum the products of two tuples of float32, from the first on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total = ir.Constant(ir.FloatType(), 0.0)
        for lane in range(signature.args[0].count):
            total = builder.fma(*(builder.extract_value(floats, lane) for floats in arguments), total)
        return total

    return types.float32(left, left), codegen


@intrinsic
def store_floats(typingctx: Any, array: Any, index: Any, floats: Any) -> Any:
    """Write four or eight float32 at once, rounded; the address must be a multiple of their size, or of 16 bytes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype, values = signature.args[0].dtype, arguments[2]
        bits = [
            _bits_of_float32(builder, dtype, builder.extract_value(values, lane))
            for lane in range(signature.args[2].count)
        ]
        if dtype.bitwidth == 16:  # in pairs, or LLVM would write eight of them as twice four
            pairs = [
                [builder.zext(half, ir.IntType(32)) for half in pair]
                for pair in zip(bits[::2], bits[1::2], strict=True)
            ]
            bits = [builder.or_(low, builder.shl(high, ir.Constant(high.type, 16))) for low, high in pairs]
        vector = ir.Constant(ir.VectorType(ir.IntType(32), len(bits)), ir.Undefined)
        for lane, word in enumerate(bits):
            vector = builder.insert_element(vector, word, ir.Constant(ir.IntType(32), lane))
        address = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=min(16, 4 * len(bits)))
        return context.get_dummy_value()

    return types.void(array, types.int64, floats), codegen


@intrinsic
def store_float(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a float32 to an element of a float32, float16 or bfloat16 array, rounded to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _bits_of_float32(builder, signature.args[0].dtype, arguments[2])
        address = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(value, builder.bitcast(address, value.type.as_pointer()))
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32), codegen


erfc = libdevice.erfcf
float_as_int = libdevice.float_as_int
int_as_float = libdevice.int_as_float
larger = libdevice.fmaxf  # of a NaN and a number the number
divide = libdevice.fast_fdividef
divide_rounded = libdevice.fdiv_rn  # by subnormal numbers too
tanh = libdevice.tanhf
log = libdevice.logf
fma = libdevice.fmaf  # factor * value + total
