"""Choose the experts of each token, step 2: a block serves a token, and its threads share what they find.

New: a reduction in shared memory. Half of the threads, then a quarter and so on take the better of two numbers;
between rounds all wait. Neighbours read neighbouring logits, a line at a time. Now it waits at barriers.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import math

import numpy as np
from numba import cuda

THREADS = 64


@cuda.jit(device=True)
def best_of_block(value, number, values, numbers):
    thread, half = cuda.threadIdx.x, THREADS // 2
    values[thread], numbers[thread] = value, number
    cuda.syncthreads()
    while half:
        if thread < half:
            other = thread + half
            is_better = values[other] > values[thread]
            if is_better or (values[other] == values[thread] and numbers[other] < numbers[thread]):
                values[thread], numbers[thread] = values[other], numbers[other]
        cuda.syncthreads()
        half //= 2
    best = values[0], numbers[0]
    cuda.syncthreads()
    return best


@cuda.jit
def choose(logits, top_k, renormalize, weights, ids):
    """Choose one token's experts. A block of THREADS for each token."""
    values = cuda.shared.array(THREADS, np.float32)
    numbers = cuda.shared.array(THREADS, np.int32)
    token, first, num_experts = cuda.blockIdx.x, cuda.threadIdx.x, logits.shape[1]
    peak = np.float32(-np.inf)
    for expert in range(first, num_experts, THREADS):
        logit = np.float32(logits[token, expert])
        peak = max(peak, logit if logit < np.inf else np.float32(np.inf))  # NaN too
    peak, _ = best_of_block(peak, 0, values, numbers)
    usable = -np.inf < peak < np.inf
    total = np.float32(0)
    for expert in range(num_experts if usable and first == 0 else 0):
        total += math.exp(np.float32(logits[token, expert]) - peak)
    last, last_id, chosen = np.float32(np.inf), -1, np.float32(0)
    for k in range(top_k):
        best, best_id = np.float32(-np.inf), num_experts
        for expert in range(first, num_experts, THREADS):
            value = np.float32(logits[token, expert]) if usable else np.float32(0)
            is_left = value < last or (value == last and expert > last_id)
            if is_left and (best_id == num_experts or value > best):
                best, best_id = value, expert
        last, last_id = best_of_block(best, best_id, values, numbers)
        if first == 0:
            weight = math.exp(last - peak) / total if usable else np.float32(0)
            weights[token, k], ids[token, k] = weight, last_id
            chosen += weight
    if first == 0 and renormalize and chosen > 0:
        for k in range(top_k):
            weights[token, k] /= chosen


def topk_softmax(gating_output, top_k, renormalize=False):
    num_tokens = gating_output.shape[0]
    weights, ids = (cuda.device_array((num_tokens, top_k), dtype) for dtype in (np.float32, np.int32))
    if num_tokens:
        choose[num_tokens, THREADS](gating_output, top_k, renormalize, weights, ids)
    return weights, ids


if __name__ == "__main__":
    assert lab.check(topk_softmax, like="topk_softmax", library="numba").passed
    lab.roofline(topk_softmax, like="topk_softmax", library="numba")
