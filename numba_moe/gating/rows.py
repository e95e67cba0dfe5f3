"""Scores and ranks of one expert, shared by the kernels of gating."""

from numba_moe.runtime.dialect import cuda, float32
from numba_moe.runtime.primitives import exp, larger, present, reciprocal

SCORING = ("softmax", "sigmoid")
SOFTMAX = 0
SMALLEST_SUM = 1e-35  # of scores that are renormalised: a factor over less may be no float32
GROUP_SCORES = ("max", "top2_sum")
MAX = 0
SMALLEST_SUM = 1e-35  # of scores that are renormalised: a factor over less may be no float32


@cuda.jit(device=True)
def score_of(logit, scoring_func, peak, total):
    """Return the score of an expert; the total of a row without a softmax is 0."""
    if scoring_func != SOFTMAX:
        return larger(reciprocal(float32(1.0) + exp(-logit)), float32(0.0))  # 0 for NaN
    if total == float32(0.0):
        return float32(0.0)
    return exp(logit - peak) * reciprocal(total)


@cuda.jit(device=True)
def score_all(logits, count, scoring_func, peak, total, scores):
    """Write the scores of `count` experts, a number known when this is compiled."""
    if scoring_func != SOFTMAX:
        for i in range(count):
            scores[i] = larger(reciprocal(float32(1.0) + exp(-logits[i])), float32(0.0))  # 0 for NaN
    elif total == float32(0.0):
        for i in range(count):
            scores[i] = float32(0.0)
    else:
        inverse = reciprocal(total)
        for i in range(count):
            scores[i] = exp(logits[i] - peak) * inverse


@cuda.jit(device=True)
def rank_of(logit, expert, correction_bias, scoring_func, peak, total):
    """Return the number by which an expert is chosen."""
    if present(correction_bias):
        return score_of(logit, scoring_func, peak, total) + correction_bias[expert]
    if scoring_func == SOFTMAX and total == float32(0.0):
        return float32(0.0)
    return logit
