"""The types that fields of kernels' records may have, written as annotations.

A kernel takes records: NamedTuples whose fields say what it can be compiled for, so that the launcher, the PTX tests,
exports and a reader all take it from the same place::

    class Slots(NamedTuple):
        ids: Ids  # [num_slots]
        expert_map: OptionalIds  # [num_experts]
        num_slots: Int32
        num_experts: Int32

    @cuda.jit
    def count_slots(slots: Slots, counts: Counts, items: Items): ...

Numba passes the fields of a record one by one, so a record costs nothing. Field names are unique in a kernel. Arrays
are flat: kernels index them with one integer. `None` among the dtypes means that the array may be absent, which the
kernel asks by `present(array)`: it then is a null pointer of the first dtype. (Numba's own launch takes no None: by
hand, give an array there.)

A `Constant` is a parameter of its own: a number that is known when the kernel is compiled, so that it can size a local
array or unroll a loop. A `LIKE` field is an array of the dtype of another field.
"""

from typing import Annotated, Any

# From this compute capability on, blocks form clusters, and a kernel may start before the one ahead of it on the stream
# has ended: it waits for it by itself.
HOPPER = (9, 0)

CONSTANT = "constant"
LIKE = "like"

Int32 = Annotated[int, "int32"]
Int64 = Annotated[int, "int64"]
Float32 = Annotated[float, "float32"]

Ids = Annotated[Any, "int32", "int64"]
AnyIds = Annotated[Any, "int32", "int64", "int16"]
OptionalIds = Annotated[Any, "int32", "int64", None]
Int16Array = Annotated[Any, "int16"]
OptionalInt16Array = Annotated[Any, "int16", None]
Int32Array = Annotated[Any, "int32"]
Int64Array = Annotated[Any, "int64"]
OptionalInt32Array = Annotated[Any, "int32", None]
OptionalInt64Array = Annotated[Any, "int64", None]
Float32Array = Annotated[Any, "float32"]
OptionalFloat32Array = Annotated[Any, "float32", None]
FloatArray = Annotated[Any, "float32", "float16", "bfloat16"]
OptionalFloatArray = Annotated[Any, "float32", "float16", "bfloat16", None]
# What rows are moved in, whatever they hold: words of 16 bytes are complex128 (see instructions.load_word).
Words = Annotated[Any, "complex128", "int64", "int32", "int16", "uint8"]

LikeTopkIds = Annotated[Any, LIKE, "topk_ids"]

OptionalFlags = Annotated[Any, "uint8", None]
# Integers whose size a number says: to compile a kernel for each would be many kernels for little.
SizedArray = Annotated[Any, "int32"]
OptionalSizedArray = Annotated[Any, "int32", None]

# Slots of one thread in the counting sort.
Items = Annotated[int, CONSTANT, 1, 4, 8]

# Rows that one thread adds at a time, all of them on their way at once.
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8)
Batch = Annotated[int, CONSTANT, 1, 2, 3, 4, 5, 6, 7, 8]

# Columns of one lane in the activation: eight are 16 bytes of a two-byte dtype.
Run = Annotated[int, CONSTANT, 1, 8]

# Activations: those that are the factor of a sigmoid or of gelu, and others, whose code would slow these down.
PRODUCTS, OTHERS = 0, 1
Family = Annotated[int, CONSTANT, 0, 1]

# Experts of one lane in gating: with 32 lanes each tier serves up to 32 times this number of experts.
COLUMNS = (1, 2, 4, 8, 16, 32)
Columns = Annotated[int, CONSTANT, 1, 2, 4, 8, 16, 32]

# Experts of one lane where 1 to 32 lanes serve a token.
LANE_COLUMNS = (1, 4, 8, 16, 24, 32)
LaneColumns = Annotated[int, CONSTANT, 1, 4, 8, 16, 24, 32]

# The same where gating and alignment are one kernel.
ROUTE_COLUMNS = (4, 8, 16)
RouteColumns = Annotated[int, CONSTANT, 4, 8, 16]

# What gating does: choose and weigh; count too; whatever it can.
PLAIN, COUNTING, EXTENDED = 0, 1, 2
Role = Annotated[int, CONSTANT, 0, 1, 2]

# bfloat16 travels as its 16 bits: instructions.load_float and store_float convert it.
ELEMENT_TYPES = {"bfloat16": "uint16"}
