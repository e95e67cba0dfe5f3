"""The kernel: what step 1 of gating does, and one pick more than it writes. Records say what it can be compiled for."""

from typing import NamedTuple

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import load_float
from numba_moe.device.primitives import INFINITY, NEGATIVE_INFINITY, exp
from numba_moe.device.types import Float32Array, FloatArray, Int32, Int32Array


class Rows(NamedTuple):
    gating_output: FloatArray  # [num_tokens, num_experts], rows may be strided
    num_tokens: Int32
    num_experts: Int32
    stride: Int32
    top_k: Int32
    renormalize: Int32


class Chosen(NamedTuple):
    topk_weights: Float32Array  # [num_tokens, top_k]
    topk_ids: Int32Array  # [num_tokens, top_k]
    margin: Float32Array  # [num_tokens]


@cuda.jit
def choose_with_margin(rows: Rows, chosen: Chosen):
    """Choose one token's experts. A thread for each token."""
    token = int32(cuda.grid(1))
    if token >= rows.num_tokens:
        return
    first, usable, peak = int64(token) * rows.stride, True, float32(NEGATIVE_INFINITY)
    for expert in range(rows.num_experts):
        logit = load_float(rows.gating_output, first + expert)
        usable = usable and logit < float32(INFINITY)  # which NaN is not
        peak = max(peak, logit)
    usable = usable and peak > float32(NEGATIVE_INFINITY)
    total, picked = float32(0.0), float32(0.0)
    for expert in range(rows.num_experts if usable else 0):
        total += exp(load_float(rows.gating_output, first + expert) - peak)
    last, last_id, slot = float32(INFINITY), int32(-1), int64(token) * rows.top_k
    for k in range(rows.top_k + 1):
        best, best_id = float32(NEGATIVE_INFINITY), int32(-1)
        for expert in range(rows.num_experts):
            value = load_float(rows.gating_output, first + expert) if usable else float32(0.0)
            is_left = value < last or (value == last and expert > last_id)
            if is_left and (best_id < 0 or value > best):
                best, best_id = value, int32(expert)
        if k == rows.top_k:
            chosen.margin[token] = last - best if last != best else float32(0.0)
        else:
            weight = exp(best - peak) / total if usable else float32(0.0)
            chosen.topk_weights[slot + k], chosen.topk_ids[slot + k] = weight, best_id
            picked += weight
        last, last_id = best, best_id
    if rows.renormalize and picked > 0.0:
        for k in range(rows.top_k):
            chosen.topk_weights[slot + k] /= picked
