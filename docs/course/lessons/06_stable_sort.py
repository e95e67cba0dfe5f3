# %% [markdown]
# # 6. A stable sort
#
# You will put slots into the order of their experts, and keep the order within each. Experts are few, so no
# comparison is needed: counting is enough.

# %%
from numba_moe import lab

lab.use_simulator_without_gpu()

import checks
import numpy as np
import pictures

ids = np.array([2, 0, 0, 1, 2, 1])

# %% [markdown]
# A slot's place is: how many slots belong to experts before its own, plus how many before it belong to its own. The
# first number is a sum over counts. The second is called its *rank*.

# %%
counts = np.bincount(ids, minlength=3)
offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
ranks = np.array([(ids[:slot] == ids[slot]).sum() for slot in range(ids.size)])
print(offsets[ids] + ranks)
pictures.show("places")

# %% [markdown]
# Why not take the next free place with an atomic? Every slot gets a place of its own, but which comes first is
# chance. The step `alignment/03_atomics_lose_the_order.py` does so, and fails:

# %%
atomics = checks.step("alignment/03_atomics_lose_the_order").moe_align_block_size
lab.check(atomics, like="moe_align_block_size", cases="one hot expert", library="numba")

# %% [markdown]
# `alignment/02_thread_per_expert.py` keeps the order, as each thread walks over all slots. Read it now. It needs
# three launches: *count*, *add up*, *place*. No thread may place a slot before all have counted, and the end of a
# launch is where all of a grid's threads have come.
#
# **Exercise.** Write `places(ids, num_experts)`: the place of each slot in the order of experts, int32, by NumPy or
# by kernels. All ids are experts.


# %%
def places(ids, num_experts):
    return np.arange(ids.size, dtype=np.int32)  # change this


checks.try_it("places", places)
