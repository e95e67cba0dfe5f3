# %% [markdown]
# # 2. The contract
#
# You will read what an op promises, down to the corners. An *op* is a function of this library, such as
# `moe_align_block_size`. A kernel of it is right if it keeps the contract, and a contract with holes makes kernels that
# differ.
#
# Every op has a twin in `numba_moe.reference`, written in NumPy. The twin *is* the contract.

# %%
import checks
import numpy as np
import pictures

from numba_moe import reference

ids = np.array([[2, 0], [0, 1], [2, -1]], np.int32)
print(reference.count_tokens_per_expert(ids, num_experts=3))

# %% [markdown]
# The -1 was skipped: it is no expert. So is 3 here, and any other number outside of 0 to 2. Servers use -1 for
# padding, and for experts that live on another GPU.
#
# Alignment groups slots by expert and pads each group to whole blocks. A *GEMM*, a multiplication of matrices, wants
# them so: it takes a block of rows at a time. There are six slots, so 6 is no slot and means padding:

# %%
blocks = reference.moe_align_block_size(ids, block_size=2, num_experts=3)
print(blocks.sorted_token_ids)
print(blocks.expert_ids, blocks.num_tokens_post_padded)
pictures.show("blocks")

# %% [markdown]
# Three promises are easy to miss. *Order*: the slots of an expert stand in ascending order, at every run. *Ties*: of
# two equal scores the lower expert wins. *Length*: the arrays are as long as any routing could need, so that nobody
# has to wait for the data to allocate them.

# %%
weights, chosen = reference.topk_softmax(np.array([[1.0, 3.0, 3.0], [np.nan, 1.0, 2.0]]), top_k=2)
print(chosen)
print(weights.round(3))

# %% [markdown]
# A row with a NaN has no scores at all: experts 0, 1, ... come with weight 0. It is a rule like another, and it keeps
# one bad token from spoiling a batch.
#
# **Exercise.** Write `num_skipped(ids, num_experts)`: how many slots no expert gets.


# %%
def num_skipped(ids, num_experts):
    return 0  # change this


checks.try_it("num_skipped", num_skipped)
