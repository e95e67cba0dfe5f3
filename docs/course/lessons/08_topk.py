# %% [markdown]
# # 8. Choosing experts
#
# You will write `topk_softmax` as a kernel, and it will pass every case of the library.
#
# A thread serves a token. In NumPy it is three lines: a softmax, a stable sort from the largest down, and a look at
# the first `top_k`. In a kernel it is loops over the row. The corners make it interesting, and each has a case.

# %%
from numba_moe import lab

lab.use_simulator_without_gpu()

import math

import checks
import numpy as np
import pictures
from numba import cuda

# %% [markdown]
# **Overflow.** `exp(200)` is more than float32 holds. A softmax stays the same if the largest logit, the *peak*, is
# first taken away from all; then nothing is above `exp(0)`.
#
# **NaN and infinity.** A row with NaN or +inf, or of -inf alone, has no scores. Its weights are 0, and experts 0, 1,
# ... are chosen, as if all its logits were equal. A NaN is the one number for which `logit < inf` and `logit ==
# logit` are false.
#
# **Ties.** Of equal logits the lower expert comes first. So the next pick is the best of those that come *after* the
# last pick: a lower value, or the same value and a higher expert. No list of what was taken is needed.
#
# **Renormalise.** The chosen weights are divided by their sum, if that is above 0.


# %%
@cuda.jit
def best_two(logits, ids):
    """The first two picks of each row, without the corners. A thread for each token."""
    token = cuda.grid(1)
    if token < logits.shape[0]:
        last, last_id = np.float32(np.inf), -1
        for k in range(2):
            best, best_id = np.float32(-np.inf), -1
            for expert in range(logits.shape[1]):
                value = logits[token, expert]
                is_left = value < last or (value == last and expert > last_id)
                if is_left and (best_id < 0 or value > best):
                    best, best_id = value, expert
            ids[token, k] = best_id
            last, last_id = best, best_id


logits = np.array([[1, 5, 5, 2], [3, 1, 2, 0]], np.float32)
ids = np.zeros((2, 2), np.int32)
best_two[1, 32](logits, ids)
print(ids.tolist())
pictures.show("picks")

# %% [markdown]
# **Exercise.** Write `topk_softmax(gating_output, top_k, renormalize=False)`, which returns float32 weights and int32
# ids. Begin with the kernel above; add the peak, the sum of `math.exp(logit - peak)`, the weights, and the corners.
# Read logits as `np.float32(...)`, since some cases have float16. Make arrays with `cuda.device_array(shape, dtype)`.
#
# `lab.check(topk_softmax, like="topk_softmax", library="numba")` gives it arrays of Numba, and shows every case. Then
# read `steps/gating/`, where it becomes fast.


# %%
def topk_softmax(gating_output, top_k, renormalize=False):
    weights = np.full((len(gating_output), top_k), math.exp(0), np.float32)  # change this
    return weights, np.zeros((len(gating_output), top_k), np.int32)


checks.try_it("topk_softmax", topk_softmax)
