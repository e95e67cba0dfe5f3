"""Choose the experts of each token, step 5: value and id in one integer.

New: the bits of floats of one sign order as integers do, so a float and an id make one key of 64 bits. The largest
key is the best value, and of equal ones the lower id: a round is one shuffle and one `max`, without branches.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

import math

import numpy as np
from numba import cuda

ALL_LANES, LANES = 0xFFFFFFFF, 8


@cuda.jit(device=True)
def largest_of_lanes(value):
    for distance in (4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(ALL_LANES, value, distance))
    return value


@cuda.jit(device=True)
def key_of(bits, sign, expert):
    """Return a number that orders by a float, given its bits, and then by lower id. Bits of floats below 0 go down."""
    order = np.int64(bits) if bits >= 0 else np.int64(bits) ^ (sign - 1)
    return ((order if order != -1 else np.int64(0)) << 32) | (0x7FFFFFFF - expert)  # -0.0 is 0.0


@cuda.jit
def choose(logits, bits, sign, top_k, renormalize, weights, ids):
    """Choose one token's experts. Eight lanes for each token."""
    token, first, num_experts = cuda.grid(1) // LANES, cuda.grid(1) % LANES, logits.shape[1]
    is_token = token < logits.shape[0]
    row = min(token, logits.shape[0] - 1)  # lanes to spare work on the last row, and write nothing
    peak = np.float32(-np.inf)
    for expert in range(first, num_experts, LANES):
        logit = np.float32(logits[row, expert])
        peak = max(peak, logit if logit < np.inf else np.float32(np.inf))  # NaN too
    peak = largest_of_lanes(peak)
    usable = -np.inf < peak < np.inf
    total = np.float32(0)
    for expert in range(first, num_experts if usable else 0, LANES):
        total += math.exp(np.float32(logits[row, expert]) - peak)
    for distance in (4, 2, 1):
        total += cuda.shfl_xor_sync(ALL_LANES, total, distance)
    last, chosen = np.int64(0x7FFFFFFFFFFFFFFF), np.float32(0)
    for k in range(top_k):
        best = np.int64(-0x7FFFFFFFFFFFFFFF)
        for expert in range(first, num_experts, LANES):
            key = key_of(bits[row, expert] if usable else 0, sign, expert)
            if key < last:
                best = max(best, key)
        last = largest_of_lanes(best)
        last_id = 0x7FFFFFFF - (last & 0x7FFFFFFF)
        weight = math.exp(np.float32(logits[row, last_id]) - peak) / total if usable else np.float32(0)
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
        kind = np.int16 if gating_output.dtype == np.float16 else np.int32
        bits, sign = gating_output.view(kind), 1 << (8 * np.dtype(kind).itemsize - 1)
        choose[-(-num_tokens * LANES // 64), 64](gating_output, bits, sign, top_k, renormalize, weights, ids)
    return weights, ids


if __name__ == "__main__":
    assert lab.check(topk_softmax, like="topk_softmax", library="numba").passed
    lab.roofline(topk_softmax, like="topk_softmax", library="numba")
