# %% [markdown]
# # 12. In a model, and on several GPUs
#
# You will put a kernel of yours where a model calls it, and see what changes when experts live on several GPUs.

# %%
from numba_moe import lab

lab.use_simulator_without_gpu()

import checks
import numpy as np
import pictures
import torch

import numba_moe

torch.manual_seed(0)
block = numba_moe.MoEBlock(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)
tokens = torch.randn(5, 16)
print(block(tokens).shape)

# %% [markdown]
# The block chooses, permutes, multiplies, and combines. The same by hand, with a choice of experts that may be your
# own function:


# %%
def choose(logits, top_k):
    weights, ids = torch.topk(torch.softmax(logits, dim=1), top_k)
    return weights, ids.to(torch.int32)


def mixture(tokens, router, gate_up, down, top_k=2):
    weights, ids = choose(tokens @ router, top_k)
    return numba_moe.fused_experts(tokens, gate_up, down, weights, ids)


with torch.no_grad():
    result = mixture(tokens, torch.randn(16, 4), torch.randn(4, 16, 16), torch.randn(4, 16, 8))
print(result.shape)

# %% [markdown]
# For torch to know the gradient of a kernel of yours, it has to be told; `docs/course/margin/` makes a whole op of
# one, with a gradient. `docs/put-it-in.md` says how vLLM, SGLang and transformers take ours.
#
# **Several GPUs.** With 256 experts each of 8 GPUs holds 32. A GPU is called a *rank*. A rank looks at all ids, and a
# map names its own: `expert_map[e]` is the number under which this rank knows expert e, and -1 for an expert that
# lives elsewhere.

# %%
local = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)  # this rank has experts 2 and 3
ids = torch.tensor([[0, 2], [3, 2]], dtype=torch.int32)
print(numba_moe.count_tokens_per_expert(ids, 4, expert_map=local).tolist())
pictures.show("ranks")

# %% [markdown]
# Some experts are wanted more than others, and the rank with the hottest makes all others wait. `numba-moe rebalance`
# says what moving or copying experts would bring.
#
# **Exercise.** Write `expert_map(rank, num_ranks, num_experts)`: int32, for ranks that hold `num_experts //
# num_ranks` neighbouring experts each.


# %%
def expert_map(rank, num_ranks, num_experts):
    return np.full(num_experts, -1, np.int32)  # change this


checks.try_it("expert_map", expert_map)
