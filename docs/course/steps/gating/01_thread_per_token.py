"""Choose the experts of each token, step 1: a thread serves a token.

New: the contract in loops. The largest logit goes away from all before `exp`, which else overflows. A row with NaN or
+inf has no scores: experts 0, 1, ... come with weight 0. The next pick is the best that comes after the last one, by
value and then by lower id. Neighbouring threads read whole rows apart, which is what makes it slow.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import math

import numpy as np
from numba import cuda


@cuda.jit
def choose(logits, top_k, renormalize, weights, ids):
    """Choose one token's experts. A thread for each token."""
    token = cuda.grid(1)
    if token >= logits.shape[0]:
        return
    num_experts, usable, peak = logits.shape[1], True, np.float32(-np.inf)
    for expert in range(num_experts):
        logit = np.float32(logits[token, expert])
        usable = usable and logit < np.inf  # which NaN is not
        peak = max(peak, logit)
    usable = usable and peak > -np.inf
    total = np.float32(0)
    for expert in range(num_experts):
        if usable:
            total += math.exp(np.float32(logits[token, expert]) - peak)
    last, last_id, chosen = np.float32(np.inf), -1, np.float32(0)
    for k in range(top_k):
        best, best_id = np.float32(-np.inf), -1
        for expert in range(num_experts):
            value = np.float32(logits[token, expert]) if usable else np.float32(0)
            is_left = value < last or (value == last and expert > last_id)
            if is_left and (best_id < 0 or value > best):
                best, best_id = value, expert
        weight = math.exp(best - peak) / total if usable else np.float32(0)
        weights[token, k], ids[token, k] = weight, best_id
        last, last_id, chosen = best, best_id, chosen + weight
    if renormalize and chosen > 0:
        for k in range(top_k):
            weights[token, k] /= chosen


def topk_softmax(gating_output, top_k, renormalize=False):
    num_tokens = gating_output.shape[0]
    weights, ids = (cuda.device_array((num_tokens, top_k), dtype) for dtype in (np.float32, np.int32))
    if num_tokens:
        choose[-(-num_tokens // 64), 64](gating_output, top_k, renormalize, weights, ids)
    return weights, ids


if __name__ == "__main__":
    assert lab.check(topk_softmax, like="topk_softmax", library="numba").passed
    lab.roofline(topk_softmax, like="topk_softmax", library="numba")
