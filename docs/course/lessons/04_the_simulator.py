# %% [markdown]
# # 4. The simulator
#
# You will look into running kernels: print, stop, run out of bounds and wait for ever, without harm.
#
# In Numba's simulator a kernel is Python, one thread at a time. `print` works, and so does `breakpoint()`. The
# library adds what a GPU would not tell you.

# %%
from numba_moe import lab

lab.use_simulator()  # also where there is a GPU

import checks
import numpy as np
import pictures
from numba import cuda


@cuda.jit
def tell(values):
    index = cuda.grid(1)
    if index == 2:
        print("thread", index, "has", values[index])


tell[1, 4](np.array([5, 6, 7, 8]))

# %% [markdown]
# **Out of bounds.** A GPU reads and writes past an array without a word, or ends the program. Here the error names
# the thread:


# %%
@cuda.jit
def shift(values, result):
    index = cuda.grid(1)
    result[index] = values[index + 1]


try:
    shift[1, 4](np.arange(4), np.zeros(4, int))
except IndexError as error:
    print(error)

# %% [markdown]
# **Deadlock.** At `cuda.syncthreads()` all threads of a block wait for each other. If some never come, a GPU hangs.


# %%
@cuda.jit
def wait_in_vain(result):
    if cuda.threadIdx.x < 2:
        cuda.syncwarp()  # another barrier, of lesson 7
    else:
        cuda.syncthreads()


try:
    wait_in_vain[1, 4](np.zeros(4))
except RuntimeError as error:
    print(str(error)[:52])

# %% [markdown]
# **Counting.** What threads load, store and wait for is counted, so that two kernels can be compared without a GPU.

# %%
with lab.counting() as counts:
    tell[1, 4](np.array([5, 6, 7, 8]))
print(counts)
pictures.show("simulator")

# %% [markdown]
# **Exercise.** Write `shifted(values)`: `result[i]` is `values[i + 1]`, and the last one 0, by a kernel without the
# fault above.


# %%
def shifted(values):
    return values  # change this


checks.try_it("shifted", shifted)
