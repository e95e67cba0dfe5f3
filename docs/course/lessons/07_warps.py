# %% [markdown]
# # 7. Warps
#
# You will let 32 threads talk without memory: add, vote, and find ranks.
#
# A GPU runs threads in groups of 32, called *warps*. The threads of a warp are its *lanes*. They can hand
# values to each other, which is faster than any memory, and needs no barrier. A *mask* is a number with a bit for each
# lane. All lanes that a mask names must come together.

# %%
from numba_moe import lab

lab.use_simulator_without_gpu()

import checks
import numpy as np
import pictures
from numba import cuda

ALL_LANES = 0xFFFFFFFF


@cuda.jit
def ranks(ids, result):
    """NumPy: result[i] = (ids[:i] == ids[i]).sum()"""
    lane = cuda.laneid
    same = cuda.match_any_sync(ALL_LANES, ids[lane])  # the lanes that hold the same value
    result[lane] = cuda.popc(same & ((1 << lane) - 1))  # those before this one


ids = np.arange(32, dtype=np.int32) % 5
result = np.zeros(32, np.int32)
ranks[1, 32](ids, result)
print(result)

# %% [markdown]
# `popc` counts the bits of a mask, and `(1 << lane) - 1` is the mask of the lanes before this one.
#
# `shfl_xor_sync` hands a value to the lane whose number differs in one bit. After distances 16, 8, 4, 2 and 1 every
# lane knows the largest of all:


# %%
@cuda.jit
def largest(values, result):
    """NumPy: result[:] = values.max()"""
    value = values[cuda.laneid]
    for distance in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(ALL_LANES, value, distance))
    result[cuda.laneid] = value


values = np.random.default_rng(0).integers(0, 99, 32)
found = np.zeros_like(values)
with lab.counting() as counts:
    largest[1, 32](values, found)
print(found[:4], values.max(), counts)
pictures.show("shuffle")

# %% [markdown]
# **Exercise.** Write `sum_in_every_lane(values)`: of 32 float32, an array of 32 in which each element is the sum of
# all, by a kernel with one warp and no shared memory.


# %%
def sum_in_every_lane(values):
    return values  # change this


checks.try_it("sum_in_every_lane", sum_in_every_lane)
