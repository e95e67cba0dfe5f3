"""Tensor cores and copies ahead, as LLVM and PTX. Imported when a kernel is compiled.

Arrays in registers are tuples here, whose elements the compiler keeps apart: nothing indexes them at run time. A tile's
number is a constant that these functions look up in `tiles.TILES` as the code is made.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.core import targetconfig
from numba.cuda.core.errors import TypingError
from numba.cuda.extending import intrinsic

from numba_moe.device.tiles import TILES, Tile
from numba_moe.device.types import HOPPER

INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
FOUR_INT32, FOUR_FLOATS = (ir.LiteralStructType([kind] * 4) for kind in (INT32, FLOAT))
# A matrix is read once: it passes the first cache by, and comes in whole lines.
LOAD = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];"
MULTIPLY = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)


def _ptx(
    builder: Any, code: str, constraints: str, result: Any = None, arguments: Any = (), effect: bool = True
) -> Any:
    """Call an instruction of PTX that all lanes of a warp reach together."""
    kind = ir.FunctionType(result or ir.VoidType(), [argument.type for argument in arguments])
    inline = ir.InlineAsm(kind, code, constraints, side_effect=effect)
    return builder.call(inline, arguments, attrs=("convergent",))


def _literal(given: Any) -> Any:
    """Return the value of a constant; Numba asks a second time where it asked for the type alone."""
    if not isinstance(given, types.Literal):
        raise TypingError(f"a constant is wanted, got {given}")
    return given.literal_value


def _tile_of(number: Any) -> Tile:
    return TILES[_literal(number)]


def _parts(builder: Any, value: Any) -> list[Any]:
    """Return the elements of a tuple, or of a structure."""
    return [builder.extract_value(value, i) for i in range(len(value.type))]


def _address(builder: Any, array: Any, index: Any) -> Any:
    return builder.ptrtoint(builder.gep(array, [index]), INT64)


def _shared_address(builder: Any, array: Any, index: Any) -> Any:
    """Return where in shared memory an element is, in the 32 bits that its instructions take."""
    code = "{ .reg .u64 %shared; cvta.to.shared.u64 %shared, $1; cvt.u32.u64 $0, %shared; }"
    return _ptx(builder, code, "=r,l", INT32, [_address(builder, array, index)], effect=False)


def _instruction(code: str, since: tuple[int, int] = (8, 0)) -> Any:
    """Return an intrinsic of one instruction without operands, which does nothing on GPUs that lack it."""

    @intrinsic
    def function(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if targetconfig.ConfigStack().top().compute_capability >= since:
                _ptx(builder, code, "~{memory}")
            return context.get_dummy_value()

        return types.void(), codegen

    return function


commit_copies = _instruction("cp.async.commit_group;")
wait_for_copies = _instruction("cp.async.wait_group 1;")
let_next_start = _instruction("griddepcontrol.launch_dependents;", HOPPER)


@intrinsic
def copy_ahead(typingctx: Any, target: Any, to: Any, source: Any, at: Any, whole: Any) -> Any:
    """Begin to copy 16 bytes of global memory to shared memory, zeros unless they are whole."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, to, source, at, whole = arguments
        size = builder.select(whole, ir.Constant(INT32, 16), ir.Constant(INT32, 0))
        operands = [_shared_address(builder, target, to), _address(builder, source, at), size]
        code = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;"
        _ptx(builder, code, "r,l,r,~{memory}", None, operands)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, types.boolean), codegen


@intrinsic
def of_tile(typingctx: Any, tile: Any, name: Any) -> Any:
    """Return a number of a tile, a constant."""
    number = int(getattr(_tile_of(tile), _literal(name)))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(INT32, number)

    return types.int32(tile, name), codegen


def _kinds(tile: Tile) -> tuple[Any, Any, Any]:
    """Return the types of a warp's sums, of its words of the matrix, and of where it reads them."""
    return (
        types.UniTuple(types.float32, 4 * tile.row_tiles * tile.columns),
        types.UniTuple(types.int32, 8 * tile.steps * tile.row_tiles),
        types.UniTuple(types.int64, 2 * tile.row_tiles),
    )


@intrinsic
def no_sums(typingctx: Any, tile: Any) -> Any:
    """Return sums of nothing."""
    sums, _, _ = _kinds(_tile_of(tile))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(builder, sums, [ir.Constant(FLOAT, 0.0)] * sums.count)

    return sums(tile), codegen


@intrinsic
def matrix_places(typingctx: Any, tile: Any, first: Any, distance: Any, last: Any) -> Any:
    """Return where a lane reads: elements at a distance from a first one on, none past the last."""
    _, _, places = _kinds(_tile_of(tile))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, first, distance, last = arguments
        found = []
        for i in range(places.count):
            place = builder.add(first, builder.mul(distance, ir.Constant(INT64, i)))
            found.append(builder.select(builder.icmp_signed("<", place, last), place, last))
        return context.make_tuple(builder, places, found)

    return places(tile, types.int64, types.int64, types.int64), codegen


class _Warp:
    """The code of one warp: `words[step][i]` are the 16 bytes that a lane read at its i-th place."""

    def __init__(self, context: Any, builder: Any, tile: Tile) -> None:
        self.context, self.builder, self.tile = context, builder, tile
        self.sums_kind, self.words_kind, self.places_kind = _kinds(tile)
        self.words: list[list[Any]] = [[None] * self.places_kind.count for _ in range(tile.steps)]

    def give_words(self, words: Any) -> None:
        parts = iter(_parts(self.builder, words))
        self.words = [[[next(parts) for _ in range(4)] for _ in of_step] for of_step in self.words]

    def taken_words(self) -> Any:
        parts = [word for of_step in self.words for four in of_step for word in four]
        return self.context.make_tuple(self.builder, self.words_kind, parts)

    def load(self, steps: Any, matrix: Any, places: Any, depth: Any, end: Any, stride: Any) -> None:
        """Read some steps from a depth on; what is past the end is read at depth 0, and multiplied by zeros."""
        builder, offsets = self.builder, []
        for step in steps:
            at = builder.add(depth, ir.Constant(INT32, 32 * step))
            inside = builder.icmp_signed("<", at, end)
            at = builder.sext(builder.select(inside, at, ir.Constant(INT32, 0)), INT64)
            offsets.append(builder.mul(at, stride))
        for i, place in enumerate(_parts(builder, places)):
            for step, offset in zip(steps, offsets, strict=True):
                address = _address(builder, matrix, builder.add(place, offset))
                self.words[step][i] = _parts(builder, _ptx(builder, LOAD, "=r,=r,=r,=r,l", FOUR_INT32, [address]))

    def rows_of(self, step: int) -> list[list[Any]]:
        """Return a step's words of each of the lane's rows; a word holds two neighbours in depth."""
        words = self.words[step]
        if not self.tile.transposed:
            return words
        rows = []
        for row in range(8):
            code = (
                f"prmt.b32 $0, $1, $2, {0x7632 if row % 2 else 0x5410};"  # the upper halves of two words, or the lower
            )
            pairs = [(words[2 * i][row // 2], words[2 * i + 1][row // 2]) for i in range(4)]
            rows.append([_ptx(self.builder, code, "=r,r,r", INT32, pair, effect=False) for pair in pairs])
        return rows

    def multiply(self, sums: list[Any], steps: Any, tokens: Any, kind: str) -> None:
        """Add a lane's products of some steps to its sums; tokens is where it reads them in shared memory."""
        builder, tile = self.builder, self.tile
        for step in steps:
            rows = self.rows_of(step)
            for column in range(tile.columns):
                offset = 2 * (8 * column * tile.pitch + 32 * step)
                code = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
                four = _parts(builder, _ptx(builder, code, "=r,=r,=r,=r,r,~{memory}", FOUR_INT32, [tokens]))
                for half in (0, 2):
                    for row in range(tile.row_tiles):
                        first = 4 * (row * tile.columns + column)
                        low, high = rows[2 * row], rows[2 * row + 1]
                        words = [low[half], high[half], low[half + 1], high[half + 1], four[half], four[half + 1]]
                        operands = [*words, *sums[first : first + 4]]
                        constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
                        found = _ptx(builder, MULTIPLY.format(kind), constraints, FOUR_FLOATS, operands)
                        sums[first : first + 4] = _parts(builder, found)


def _kind_of(matrix: Any) -> str:
    return "f16" if matrix.dtype == types.float16 else "bf16"


@intrinsic
def load_matrix(typingctx: Any, tile: Any, matrix: Any, places: Any, depth: Any, end: Any, stride: Any) -> Any:
    """Read a chunk of a warp's rows of a matrix; `depth` is the lane's own, `stride` the distance in depth."""
    shape = _tile_of(tile)
    _, words, places = _kinds(shape)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        warp = _Warp(context, builder, shape)
        warp.load(range(shape.steps), *arguments[1:])
        return warp.taken_words()

    return words(tile, matrix, places, types.int32, types.int32, types.int64), codegen


@intrinsic
def multiply(typingctx: Any, tile: Any, sums: Any, words: Any, tokens: Any, at: Any, matrix: Any) -> Any:
    """Add the products of a chunk to a warp's sums; `at` is where a lane reads tokens in shared memory."""
    shape = _tile_of(tile)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums, words, tokens, at, _ = arguments
        warp, found = _Warp(context, builder, shape), _parts(builder, sums)
        warp.give_words(words)
        warp.multiply(found, range(shape.steps), _shared_address(builder, tokens, at), _kind_of(matrix))
        return context.make_tuple(builder, warp.sums_kind, found)

    sums, words, _ = _kinds(shape)
    return sums(tile, sums, words, tokens, types.int64, matrix), codegen


@intrinsic
def multiply_and_load(
    typingctx: Any,
    tile: Any,
    sums: Any,
    words: Any,
    tokens: Any,
    at: Any,
    matrix: Any,
    places: Any,
    depth: Any,
    end: Any,
    stride: Any,
) -> Any:
    """Do what `multiply` and then `load_matrix` do: a register is loaded anew as soon as it has been multiplied."""
    shape = _tile_of(tile)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums, words, tokens, at, *source = arguments
        warp, found = _Warp(context, builder, shape), _parts(builder, sums)
        warp.give_words(words)
        address = _shared_address(builder, tokens, at)
        for first in range(0, shape.steps, 2):
            steps = range(first, min(first + 2, shape.steps))
            warp.multiply(found, steps, address, _kind_of(matrix))
            warp.load(steps, *source)
        both = [context.make_tuple(builder, warp.sums_kind, found), warp.taken_words()]
        return context.make_tuple(builder, signature.return_type, both)

    sums, words, places = _kinds(shape)
    where = (places, types.int32, types.int32, types.int64)
    return types.Tuple((sums, words))(tile, sums, words, tokens, types.int64, matrix, *where), codegen


@intrinsic
def store_sums(typingctx: Any, tile: Any, sums: Any, array: Any, at: Any) -> Any:
    """Write a warp's sums to shared memory, [tokens, sums_pitch]; `at` is the first of the lane's."""
    shape = _tile_of(tile)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums, array, at = arguments
        parts = _parts(builder, sums)
        for place, offset in enumerate(shape.offsets_of_sums()):
            target = builder.gep(array, [builder.add(at, ir.Constant(INT64, offset))])
            builder.store(parts[place], target)
        return context.get_dummy_value()

    sums, _, _ = _kinds(shape)
    return types.void(tile, sums, array, types.int64), codegen
