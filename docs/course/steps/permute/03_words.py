"""Copy each token's row once for each of its experts, step 3: 16 bytes to a thread.

New: a copy need not know what it copies. Seen as complex numbers of 16 bytes a row has a fourth of the elements, so
there are a fourth of the loads and stores. Rows with gaps, or of other lengths, are copied by element.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import numpy as np
from numba import cuda

import numba_moe


@cuda.jit
def gather(rows, slots, top_k, out):
    """Copy one element. A thread for each element of the result, columns first."""
    row, column = divmod(cuda.grid(1), out.shape[1])
    if row < out.shape[0]:
        token = slots[row] // top_k
        out[row, column] = rows[token, column] if token < rows.shape[0] else rows.dtype.type(0)


def moe_permute(hidden_states, topk_ids, num_experts):
    (num_tokens, hidden), dtype = hidden_states.shape, hidden_states.dtype
    order = numba_moe.moe_permute(cuda.device_array((num_tokens, 1), np.uint8), topk_ids, num_experts)
    out = cuda.device_array((topk_ids.size, hidden), dtype)
    rows, words = hidden_states, out
    if hidden_states.is_c_contiguous() and hidden * dtype.itemsize % 16 == 0:
        rows, words = hidden_states.view(np.complex128), out.view(np.complex128)
    if out.size:
        gather[-(-words.size // 128), 128](rows, order.permuted_idx, topk_ids.shape[1], words)
    return out, *order[1:]


if __name__ == "__main__":
    assert lab.check(moe_permute, like="moe_permute", library="numba").passed
    lab.roofline(moe_permute, like="moe_permute", library="numba")
