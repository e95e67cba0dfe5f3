"""The types that kernel parameters may have, written as annotations in the kernels' signatures.

A kernel states for every parameter what it can be compiled for, so that the launcher, the PTX tests and a
reader all take it from the same place::

    @cuda.jit
    def count_slots(topk_ids: Ids, expert_map: ExpertMap, num_slots: Int32, ..., tile_counts: Int32Array):

Array parameters are flat: kernels index them with one integer. `None` among the dtypes means that the
argument may be absent; Numba then compiles the `is None` branch alone. (Numba's own launch takes no None: by hand,
give an array there.)
"""

from typing import Annotated, Any

Int32 = Annotated[int, "int32"]
Int64 = Annotated[int, "int64"]
Float64 = Annotated[float, "float64"]

Ids = Annotated[Any, "int32", "int64"]
ExpertMap = Annotated[Any, None, "int32", "int64"]
Int32Array = Annotated[Any, "int32"]
Int64Array = Annotated[Any, "int64"]
OptionalInt32Array = Annotated[Any, None, "int32"]
Float32Array = Annotated[Any, "float32"]
OptionalFloat32Array = Annotated[Any, None, "float32"]
FloatArray = Annotated[Any, "float32", "float16", "bfloat16"]
Words = Annotated[Any, "int64", "int32", "int16", "uint8"]

# bfloat16 travels as its 16 bits: primitives.load_float and store_float convert it.
ELEMENT_TYPES = {"bfloat16": "uint16"}
