"""Copy each token's row once for each of its experts, step 4: a row is read once and written top_k times.

New: turn the loop around. A thread serves a word of a *token*, reads it once, and writes it to the rows of all its
slots, which `order.inv_permuted_idx` has. For each token it reads one row and writes top_k; the steps before read top_k
as well.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

import numba_moe


@cuda.jit
def scatter(rows, places, used, out):
    """Copy one element to all rows of its token, and clear a row without a slot. A thread for each element."""
    token, column = divmod(cuda.grid(1), out.shape[1])
    if token < rows.shape[0]:
        value = rows[token, column]
        for k in range(places.shape[1]):
            if places[token, k] >= 0:
                out[places[token, k], column] = value
            else:  # one of the rows behind those in use is for each slot that was skipped
                number = 0
                for slot in range(token * places.shape[1] + k):
                    number += places[slot // places.shape[1], slot % places.shape[1]] < 0
                out[used[used.size - 1] + number, column] = rows.dtype.type(0)


def moe_permute(hidden_states, topk_ids, num_experts):
    (num_tokens, hidden), dtype = hidden_states.shape, hidden_states.dtype
    order = numba_moe.moe_permute(cuda.device_array((num_tokens, 1), np.uint8), topk_ids, num_experts)
    out = cuda.device_array((topk_ids.size, hidden), dtype)
    rows, words = hidden_states, out
    if hidden_states.is_c_contiguous() and hidden * dtype.itemsize % 16 == 0:
        rows, words = hidden_states.view(np.complex128), out.view(np.complex128)
    if out.size:
        blocks = -(-rows.size // 128)
        scatter[blocks, 128](rows, order.inv_permuted_idx, order.expert_first_token_offset, words)
    return out, *order[1:]


if __name__ == "__main__":
    assert lab.check(moe_permute, like="moe_permute", library="numba").passed
    lab.roofline(moe_permute, like="moe_permute", library="numba")
