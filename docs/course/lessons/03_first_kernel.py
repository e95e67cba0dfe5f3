# %% [markdown]
# # 3. A first kernel
#
# You will write a kernel, launch it, and learn the one line that every kernel needs.
#
# A *kernel* is a function that many threads run at once. Each thread asks which one it is, and does its own small
# part. The first line below turns on Numba's simulator where there is no GPU. It comes before Numba is imported.

# %%
from numba_moe import lab

lab.use_simulator_without_gpu()

import checks
import numpy as np
import pictures
from numba import cuda


@cuda.jit
def add_one(values, result):
    index = cuda.grid(1)  # the number of this thread among all
    if index < values.size:
        result[index] = values[index] + 1


# %% [markdown]
# Threads come in *blocks* of one size, so their number is a multiple of it. Ten elements and blocks of four make
# three blocks and twelve threads. Two have nothing to do, and the `if` keeps them from writing past the end.

# %%
values = np.arange(10, dtype=np.float32)
result = np.zeros_like(values)
threads = 4
blocks = -(-values.size // threads)  # rounded up
add_one[blocks, threads](values, result)
print(blocks, result)
pictures.show("threads")

# %% [markdown]
# The line above each kernel of this course says what it is in NumPy. Here: `result = values + 1`. NumPy's loop became
# threads, and the index became `cuda.grid(1)`.
#
# **Exercise.** Write `doubled(values)`: it launches a kernel of yours and returns twice the values, for any number of
# them.


# %%
def doubled(values):
    return values  # change this


checks.try_it("doubled", doubled)
