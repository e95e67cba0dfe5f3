"""Logits, scores, ranks and weights, as the kernels of gating share them."""

from typing import Any, NamedTuple

from numba_moe.device.dialect import cuda, float32
from numba_moe.device.instructions import (
    fma,
    larger,
    load_eight,
    load_float,
    load_floats,
    present,
    reciprocal,
    square_root,
)
from numba_moe.device.primitives import INFINITY, NEGATIVE_INFINITY, exp
from numba_moe.device.types import Float32, Float32Array, FloatArray, Int32, Int32Array, Int64, OptionalFloat32Array

SCORING = ("softmax", "sigmoid", "softplus_sqrt", "raw")
SOFTMAX = 0
SIGMOID = 1
SOFTPLUS_SQRT = 2
SMALLEST_SUM = 1e-35  # of scores that are renormalised: a factor over less may be no float32
FAR_BELOW = -32.0  # from here down softplus(x) is exp(x), whose root is a float32 where it is none itself


class Rows(NamedTuple):
    """The router's logits."""

    gating_output: FloatArray  # [num_tokens, num_experts]
    num_tokens: Int32
    num_experts: Int32
    row_stride: Int64  # elements from one row to the next
    vector: Int32  # logits that one load reads: 8 or 4, or 0 for one


class Choice(NamedTuple):
    """How experts are chosen: groups first, by their best rank or the sum of their best, then experts in them."""

    correction_bias: OptionalFloat32Array  # [num_experts]
    whole_softmax: Int32  # whether ranks or weights need the sum over the whole row
    num_expert_group: Int32
    topk_group: Int32
    group_picks: Int32  # experts that are summed for the score of a group; 1 for the best rank
    group_size: Int32


class Weighting(NamedTuple):
    """How the scores of chosen experts become weights."""

    top_k: Int32
    scoring_func: Int32  # the index in SCORING
    renormalize: Int32
    routed_scaling_factor: Float32


class Chosen(NamedTuple):
    """The results; a token has `top_k` slots, and then one for each shared expert."""

    topk_weights: Float32Array  # [num_tokens, num_slots]
    topk_ids: Int32Array  # [num_tokens, num_slots], or of other integers if Extras says so


class Scores(NamedTuple):
    """What turns the logits of a row into scores and ranks."""

    correction_bias: Any  # [num_experts]
    scoring_func: Any
    peak: Any  # of a softmax: the largest logit
    total: Any  # and the sum of exponentials, 0 for a row that has none


@cuda.jit(device=True)
def softplus(value):
    """Return log(1 + exp(x)), with six digits or so even where that is little."""
    power = exp(-larger(value, -value))
    # log(1 + y) is 2 * atanh(y / (2 + y)), whose series has these terms; the next would add 1e-7 of it at most.
    part = power * reciprocal(float32(2.0) + power)
    square = part * part
    series = float32(1.0 / 9.0) + square * float32(1.0 / 11.0)
    series = float32(1.0 / 7.0) + square * series
    series = float32(1.0 / 5.0) + square * series
    series = float32(1.0 / 3.0) + square * series
    series = float32(1.0) + square * series
    return larger(value, float32(0.0)) + float32(2.0) * part * series


@cuda.jit(device=True)
def load_first(array, start, count, aligned, values):
    """Read the first `count` of eight floats; -inf for the others."""
    for i in range(8):
        values[i] = float32(NEGATIVE_INFINITY)
    if aligned == 8:  # and so is count
        if count > 0:
            eight = load_eight(array, start)
            for i in range(8):
                values[i] = eight[i]
    elif aligned:  # and count is a multiple of four
        for half in range(2):
            if 4 * half < count:
                four = load_floats(array, start + 4 * half)
                for i in range(4):
                    values[4 * half + i] = four[i]
    else:
        for i in range(8):
            if i < count:
                values[i] = load_float(array, start + i)


@cuda.jit(device=True)
def score_of(logit, scoring_func, peak, total):
    """Return the score of an expert; the total of a row without a softmax is 0."""
    if scoring_func == SOFTMAX:
        if total == float32(0.0):
            return float32(0.0)
        return exp(logit - peak) * reciprocal(total)
    if scoring_func == SIGMOID:
        return larger(reciprocal(float32(1.0) + exp(-logit)), float32(0.0))  # 0 for NaN
    if not logit < float32(INFINITY):
        logit = float32(NEGATIVE_INFINITY)
    if scoring_func == SOFTPLUS_SQRT:
        if logit < float32(FAR_BELOW):
            return exp(float32(0.5) * logit)
        return square_root(softplus(logit))
    return logit


@cuda.jit(device=True)
def score_all(logits, count, scoring_func, peak, total, scores):
    """Write the scores of `count` experts, a number known when this is compiled."""
    if scoring_func == SIGMOID:
        for i in range(count):
            scores[i] = larger(reciprocal(float32(1.0) + exp(-logits[i])), float32(0.0))  # 0 for NaN
    elif scoring_func != SOFTMAX:
        for i in range(count):
            scores[i] = score_of(logits[i], scoring_func, peak, total)
    elif total == float32(0.0):
        for i in range(count):
            scores[i] = float32(0.0)
    else:
        inverse = reciprocal(total)
        for i in range(count):
            scores[i] = exp(logits[i] - peak) * inverse


@cuda.jit(device=True)
def not_all_finite(logits, count):
    """Whether any logit is infinite or NaN: its product with 0 is NaN then, and so is the sum of these."""
    even = float32(0.0)
    odd = float32(0.0)  # two sums, so that neither waits for the other
    for i in range(count):
        if i % 2 == 0:
            even = fma(logits[i], float32(0.0), even)
        else:
            odd = fma(logits[i], float32(0.0), odd)
    return even != odd


@cuda.jit(device=True)
def has_no_softmax(logits, count):
    """Whether a logit is NaN or +inf."""
    broken = False
    for i in range(count):
        broken = broken or not logits[i] < float32(INFINITY)
    return broken


@cuda.jit(device=True)
def lower_unscored(logits, count, scoring_func):
    """Replace NaN by -inf, by which it ranks, and also +inf if the scores have no value for it."""
    for i in range(count):
        if not logits[i] < float32(INFINITY) and (scoring_func > SIGMOID or logits[i] != float32(INFINITY)):
            logits[i] = float32(NEGATIVE_INFINITY)


@cuda.jit(device=True)
def lower_broken(logits, count, scoring_func):
    """Let logits that have no rank be -inf, as `lower_unscored` does; return whether the row has no softmax."""
    broken = False
    if not_all_finite(logits, count):
        broken = has_no_softmax(logits, count)
        lower_unscored(logits, count, scoring_func)
    return broken


@cuda.jit(device=True)
def rank_of(logit, expert, scores):
    """Return the number by which an expert is chosen."""
    if present(scores.correction_bias):
        score = score_of(logit, scores.scoring_func, scores.peak, scores.total)
        return score + scores.correction_bias[expert]
    if scores.scoring_func == SOFTMAX and scores.total == float32(0.0):
        return float32(0.0)
    if scores.scoring_func > SIGMOID and not logit < float32(INFINITY):
        return float32(NEGATIVE_INFINITY)
    return logit


@cuda.jit(device=True)
def weight_of(logit, scoring_func, peak, total):
    """Return the weight of an expert before factors: its score, but 0 for a logit whose score is -inf."""
    score = score_of(logit, scoring_func, peak, total)
    if score == float32(NEGATIVE_INFINITY):
        return float32(0.0)
    return score
