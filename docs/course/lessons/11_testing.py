# %% [markdown]
# # 11. Testing like we do
#
# You will find out what a test is worth: by making kernels wrong on purpose.
#
# A kernel that writes nothing passes a test whose memory happens to hold the answer of the last call. So new memory
# is *poisoned*: NaN in floats, a large number in integers. What nobody writes shows.

# %%
from numba_moe import lab

simulated = lab.use_simulator_without_gpu()

import checks
import numpy as np
import pictures
from numba import cuda


def forgets_empty_experts(topk_ids, num_experts):
    counts = np.empty(num_experts, np.int32)
    for expert in np.unique(topk_ids[(topk_ids >= 0) & (topk_ids < num_experts)]):
        counts[expert] = (topk_ids == expert).sum()
    return counts


lab.check(forgets_empty_experts, like="count_tokens_per_expert", cases="one slot", device="cpu")

# %% [markdown]
# Each case calls twice, with arguments of its own, and in the simulator with threads in another order. Two calls must
# give the same bits, and leave their inputs as they were.
#
# But are the cases enough? *Plant faults* and see which are caught. `lab.planted` changes one comparison, one sum or
# one number of your kernel at a time, leaves out a barrier or an atomic, and runs the cases:


# %%
@cuda.jit
def count(topk_ids, num_experts, counts):
    slot = cuda.grid(1)
    if slot < topk_ids.size:
        expert = topk_ids[slot // topk_ids.shape[1], slot % topk_ids.shape[1]]
        if 0 <= expert < num_experts:
            cuda.atomic.add(counts, expert, 1)


if simulated:  # kernels with faults run in the simulator alone
    faults = {
        "the last expert": ("expert < num_experts", "expert < num_experts - 1"),
        "-1": ("0 <= expert", "-1 <= expert"),
    }
    lab.planted(count, "count_tokens_per_expert", faults, "one slot", grid=(8, 64), fill=0)
pictures.show("planted")

# %% [markdown]
# Both were missed by that case: its one slot is expert 5. Give `cases=["one slot", "-1 rows"]` and both are caught. A
# fault that is missed asks for a case.
#
# **Exercise.** Write `is_right(count)`: it calls a function `count(ids, num_experts)` with cases of yours and says
# whether all answers are right. It will be given a right function and wrong ones.


# %%
def is_right(count):
    return count(np.array([0, 1, 1]), 2).tolist() == [1, 2]  # add cases


checks.try_it("is_right", is_right)
