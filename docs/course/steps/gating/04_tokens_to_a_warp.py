"""Choose the experts of each token, step 4: eight lanes serve a token, so that a warp serves four.

New: one number. With 64 experts a lane of a whole warp has two of them to look at, and five rounds of shuffles to do;
eight lanes have eight, and three rounds for four tokens at once. A shuffle by less than eight stays among them.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import math

import numpy as np
from numba import cuda

ALL_LANES, LANES = 0xFFFFFFFF, 8


@cuda.jit(device=True)
def best_of_lanes(value, number):
    """Return the largest value of the lanes, and the lower number where two have it."""
    for distance in (4, 2, 1):
        other = cuda.shfl_xor_sync(ALL_LANES, value, distance)
        other_number = cuda.shfl_xor_sync(ALL_LANES, number, distance)
        if other > value or (other == value and other_number < number):
            value, number = other, other_number
    return value, number


@cuda.jit
def choose(logits, top_k, renormalize, weights, ids):
    """Choose one token's experts. Eight lanes for each token."""
    token, first, num_experts = cuda.grid(1) // LANES, cuda.grid(1) % LANES, logits.shape[1]
    is_token = token < logits.shape[0]
    row = min(token, logits.shape[0] - 1)  # lanes to spare work on the last row, and write nothing
    peak = np.float32(-np.inf)
    for expert in range(first, num_experts, LANES):
        logit = np.float32(logits[row, expert])
        peak = max(peak, logit if logit < np.inf else np.float32(np.inf))  # NaN too
    peak, _ = best_of_lanes(peak, 0)
    usable = -np.inf < peak < np.inf
    total = np.float32(0)
    for expert in range(first, num_experts if usable else 0, LANES):
        total += math.exp(np.float32(logits[row, expert]) - peak)
    for distance in (4, 2, 1):
        total += cuda.shfl_xor_sync(ALL_LANES, total, distance)
    last, last_id, chosen = np.float32(np.inf), -1, np.float32(0)
    for k in range(top_k):
        best, best_id = np.float32(-np.inf), num_experts
        for expert in range(first, num_experts, LANES):
            value = np.float32(logits[row, expert]) if usable else np.float32(0)
            is_left = value < last or (value == last and expert > last_id)
            if is_left and (best_id == num_experts or value > best):
                best, best_id = value, expert
        last, last_id = best_of_lanes(best, best_id)
        weight = math.exp(last - peak) / total if usable else np.float32(0)
        chosen += weight
        if first == 0 and is_token:
            weights[token, k], ids[token, k] = weight, last_id
    if first == 0 and is_token and renormalize and chosen > 0:
        for k in range(top_k):
            weights[token, k] /= chosen


def topk_softmax(gating_output, top_k, renormalize=False):
    num_tokens = gating_output.shape[0]
    weights, ids = (cuda.device_array((num_tokens, top_k), dtype) for dtype in (np.float32, np.int32))
    if num_tokens:
        choose[-(-num_tokens * LANES // 64), 64](gating_output, top_k, renormalize, weights, ids)
    return weights, ids


if __name__ == "__main__":
    assert lab.check(topk_softmax, like="topk_softmax", library="numba").passed
    lab.roofline(topk_softmax, like="topk_softmax", library="numba")
