# %% [markdown]
# # 5. Counting, and atomics
#
# You will count the slots of each expert with a thread for each slot, lose some, and get them back.

# %%
from numba_moe import lab

lab.use_simulator_without_gpu()

import checks
import numpy as np
import pictures
from numba import cuda


@cuda.jit
def count_badly(ids, counts):
    slot = cuda.grid(1)
    if slot < ids.size:
        counts[ids[slot]] += 1


ids = np.random.default_rng(0).integers(0, 3, 60)
counts = np.zeros(3, np.int32)
count_badly[1, 64](ids, counts)
print(counts, "instead of", np.bincount(ids))

# %% [markdown]
# `counts[e] += 1` is three things: load, add, store. Two threads may load the same 4, and both store 5: one slot is
# lost. An *atomic* does all three with no other thread in between. In the simulator threads take turns after each
# load, so you see the loss there too.


# %%
@cuda.jit
def count(ids, counts):
    slot = cuda.grid(1)
    if slot < ids.size:
        cuda.atomic.add(counts, ids[slot], 1)


counts = np.zeros(3, np.int32)
count[1, 64](ids, counts)
print(counts)
pictures.show("lost")

# %% [markdown]
# The sum is right in whatever order threads come, because integers may be added in any order. Floats may not: their
# last bits depend on it. So this library never adds floats by atomics, and its results have the same bits at every
# run.
#
# Now give a kernel of yours to the library's own tests. `lab.check` makes the array for the result. It *poisons* it,
# which means that it fills it with large numbers, unless `fill` says what it holds:


# %%
@cuda.jit
def count_slots(topk_ids, num_experts, counts):
    slot = cuda.grid(1)
    if slot < topk_ids.size:
        expert = topk_ids[slot // topk_ids.shape[1], slot % topk_ids.shape[1]]
        cuda.atomic.add(counts, expert, 1)


lab.check(count_slots, like="count_tokens_per_expert", cases=["one slot", "-1 rows"], grid=(2, 64), fill=0)

# %% [markdown]
# One case fails: the contract says that ids which are no experts are skipped.
#
# **Exercise.** Write `histogram(ids, num_experts)`: the int32 counts of a flat array of ids, by a kernel with
# atomics. Ids that are no experts are skipped.


# %%
def histogram(ids, num_experts):
    return np.zeros(num_experts, np.int32)  # change this


checks.try_it("histogram", histogram)
