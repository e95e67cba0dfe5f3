# %% [markdown]
# # 9. Memory, and the roofline
#
# You will say how fast a kernel can be at best, before you write it.
#
# A kernel must read its inputs once and write its results once. Memory has a speed. Bytes over speed is the least
# time, and no kernel is faster. The share that a kernel reaches of it is its place under the *roofline*. All ops of
# this library but the GEMMs are bound by memory: a sum of eight numbers is nothing beside fetching them.

# %%
from numba_moe import lab

simulated = lab.use_simulator_without_gpu()

import checks
import numpy as np
import pictures
from numba import cuda

tokens, top_k, hidden = 4096, 8, 7168
needed = (top_k + 1) * tokens * hidden * 2  # bytes of bfloat16: each row read, each sum written
print(f"{needed / 1e6:.0f} MB; {needed / 4.8e12 * 1e6:.0f} us at 4.8 TB/s, an H200's memory")

# %% [markdown]
# Memory is fetched in lines of 32 bytes. If the lanes of a warp read neighbours, every byte of a line is used: this
# is called *coalesced*. If each lane reads a row of its own, a line is fetched for 4 bytes, and seven eighths of the
# speed are gone. Compare `steps/moe_sum/01_thread_per_token.py` with `02_thread_per_element.py`: the same bytes, in
# another order.


# %%
@cuda.jit
def add_rows(rows, out):
    """NumPy: out[:] = rows.sum(axis=1). A thread for each element, columns first: neighbours read neighbours."""
    token, column = divmod(cuda.grid(1), rows.shape[2])
    if token < rows.shape[0]:
        total = np.float32(0)
        for k in range(rows.shape[1]):
            total += rows[token, k, column]
        out[token, column] = total


def sums(hidden_states):
    out = cuda.device_array((hidden_states.shape[0], hidden_states.shape[2]), np.float32)
    add_rows[-(-out.size // 64), 64](hidden_states, out)
    return out


lab.roofline(sums, like="moe_sum", case="1030 columns" if simulated else "64x7168")
pictures.show("roofline")

# %% [markdown]
# In the simulator the share is of bytes: 100 % says that nothing is read twice. On a GPU it is of time, and says how
# well the loads are spread and kept on their way. `scripts/course_times.py` prints it for every step.
#
# **Exercise.** Write `least_us(num_tokens, hidden, top_k, bytes_each, gb_per_second)`: the least microseconds for
# `moe_permute` to read every token's row once and write it `top_k` times. Indices are too small to count.


# %%
def least_us(num_tokens, hidden, top_k, bytes_each, gb_per_second):
    return 0.0  # change this


checks.try_it("least_us", least_us)
