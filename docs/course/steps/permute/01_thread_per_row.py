"""Copy each token's row once for each of its experts, step 1: a thread serves a row of the result.

New: an indirection. `order.permuted_idx` says which slot stands in a row (the library's own sort made it); the slot's
token is the slot over top_k. Rows after the last one in use hold zeros.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

import numba_moe


@cuda.jit
def gather(rows, slots, top_k, out):
    """Copy one row. A thread for each row of the result."""
    row = cuda.grid(1)
    if row < out.shape[0]:
        token = slots[row] // top_k
        for column in range(out.shape[1]):
            out[row, column] = rows[token, column] if token < rows.shape[0] else rows.dtype.type(0)


def moe_permute(hidden_states, topk_ids, num_experts):
    (num_tokens, hidden), dtype = hidden_states.shape, hidden_states.dtype
    order = numba_moe.moe_permute(cuda.device_array((num_tokens, 1), np.uint8), topk_ids, num_experts)
    out = cuda.device_array((topk_ids.size, hidden), dtype)
    if out.size:
        gather[-(-topk_ids.size // 64), 64](hidden_states, order.permuted_idx, topk_ids.shape[1], out)
    return out, *order[1:]


if __name__ == "__main__":
    assert lab.check(moe_permute, like="moe_permute", library="numba").passed
    lab.roofline(moe_permute, like="moe_permute", library="numba")
