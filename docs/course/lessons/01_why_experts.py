# %% [markdown]
# # 1. Why experts
#
# You will build a mixture of experts in ten lines of NumPy, and see what work it saves and what work it makes.
#
# A feed-forward layer multiplies every token by all of its weights. A *mixture of experts* has many small layers, the
# experts. A router gives each token a score for each expert, and the token visits only the best few. The model can
# know more, for the same arithmetic. What is new is moving tokens to their experts and back. This library does that.

# %%
import checks
import numpy as np
import pictures

rng = np.random.default_rng(0)
num_tokens, hidden, num_experts, top_k = 6, 8, 4, 2
tokens = rng.standard_normal((num_tokens, hidden))
router = rng.standard_normal((hidden, num_experts))
experts = rng.standard_normal((num_experts, hidden, hidden))

# %% [markdown]
# The router is one matrix. A softmax makes shares of its scores, and the largest two are taken.

# %%
scores = tokens @ router
shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
chosen = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
print(chosen)

# %% [markdown]
# A pair of a token and one of its choices is called a *slot*; there are `num_tokens * top_k`. The slow way takes one
# slot after another:

# %%
result = np.zeros_like(tokens)
for token in range(num_tokens):
    for expert in chosen[token]:
        result[token] += shares[token, expert] * (tokens[token] @ experts[expert])

# %% [markdown]
# A GPU wants large multiplications. So slots are grouped by expert, and each expert multiplies all of its rows at
# once. The answer is the same:

# %%
grouped = np.zeros_like(tokens)
for expert in range(num_experts):
    rows, _ = np.nonzero(chosen == expert)
    grouped[rows] += shares[rows, expert, None] * (tokens[rows] @ experts[expert])
print(np.allclose(result, grouped))
pictures.show("grouping")

# %% [markdown]
# **Exercise.** Write `active_share(num_experts, top_k)`: the part of all experts' weights that one token uses.


# %%
def active_share(num_experts, top_k):
    return 1.0  # change this


checks.try_it("active_share", active_share)
