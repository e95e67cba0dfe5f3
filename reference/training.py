"""What training adds to routing: losses that balance experts, and balance without a loss.

With T tokens, E experts, K of them for each token, scores q that sum to 1 over a token's experts, and c slots of each
expert, the load balancing loss of a sequence is ``E / (K * T**2) * sum_e c_e * sum_t q_te``: T times the part of the
slots that an expert has, times the part of the scores, summed. It is 1 where either is even. A gradient goes through
the scores alone.
"""

from typing import Any, NamedTuple

import numpy as np
from numba_moe.reference.gating import SCORING, slopes


class SequenceCounts(NamedTuple):
    """What each sequence has of slots by expert, and of tokens."""

    tokens_per_expert: Any
    num_tokens: Any


def sequence_of_tokens(
    num_rows: int,
    num_sequences: int = 1,
    sequence_ids: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
) -> np.ndarray:
    """Return the sequence of each token, -1 for padding; consecutive tokens make a sequence unless ids say otherwise.

    >>> sequence_of_tokens(4, 2, is_padding=np.array([False, True, False, False]))
    array([ 0, -1,  1,  1])
    """
    found = np.arange(num_rows) // max(1, num_rows // num_sequences) if sequence_ids is None else sequence_ids
    takes_part = (found >= 0) & (found < num_sequences)
    if num_token_non_padded is not None:
        takes_part &= np.arange(num_rows) < num_token_non_padded.item()
    if is_padding is not None:
        takes_part &= ~is_padding
    return np.where(takes_part, found, -1)


def count_by_sequence(
    topk_ids: np.ndarray,
    num_experts: int,
    *,
    num_sequences: int = 1,
    sequence_ids: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
) -> SequenceCounts:
    """Count the slots of each expert in each sequence, and its tokens.

    Parameters
    ----------
    topk_ids
        int [num_tokens, top_k]; ids outside ``[0, num_experts)`` are not counted.
    num_experts
        Number of experts.
    num_sequences
        Number of sequences, with equal numbers of consecutive tokens.
    sequence_ids
        int [num_tokens]: the sequence of each token; one outside ``[0, num_sequences)`` is padding.
    num_token_non_padded
        An integer [1] or []: the number of real tokens. The tokens after them are padding.
    is_padding
        bool [num_tokens]. Padding takes no part.

    Returns
    -------
    SequenceCounts
        tokens_per_expert: int32 [num_sequences, num_experts]. num_tokens: int32 [num_sequences].

    Examples
    --------
    >>> ids = np.array([[0, 2], [2, 1], [2, 0], [0, 1]])
    >>> count_by_sequence(ids, 3, num_sequences=2, is_padding=np.array([False, False, False, True]))
    SequenceCounts(tokens_per_expert=array([[1, 1, 2],
           [1, 0, 1]], dtype=int32), num_tokens=array([2, 1], dtype=int32))
    """
    sequences = sequence_of_tokens(len(topk_ids), num_sequences, sequence_ids, num_token_non_padded, is_padding)
    tokens, picks = np.nonzero((sequences >= 0)[:, None] & (topk_ids >= 0) & (topk_ids < num_experts))
    counts = np.zeros((num_sequences, num_experts), np.int32)
    np.add.at(counts, (sequences[tokens], topk_ids[tokens, picks]), 1)
    return SequenceCounts(counts, np.bincount(sequences[sequences >= 0], minlength=num_sequences).astype(np.int32))


def shares(logits: np.ndarray, scoring_func: str = "softmax") -> tuple[np.ndarray, np.ndarray]:
    """Return scores over their sum, of each row, and the logarithms of its sums of exponentials.

    >>> shares(np.log(np.array([[1.0, 3.0]])))
    (array([[0.25, 0.75]]), array([1.38629436]))
    """
    peak = logits.max(axis=1, keepdims=True)
    powers = np.exp(logits - peak)
    total = powers.sum(axis=1, keepdims=True)
    scores = powers if scoring_func == "softmax" else SCORING[scoring_func](logits)
    return scores / scores.sum(axis=1, keepdims=True), (peak + np.log(total))[:, 0]


def _by_token(
    num_rows: int,
    num_experts: int,
    tokens_per_expert: np.ndarray | None,
    num_tokens: np.ndarray | None,
    top_k: int,
    num_sequences: int,
    *padding: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each token's scores count for [num_rows, num_experts], and what its square does [num_rows]."""
    sequences = sequence_of_tokens(num_rows, num_sequences, *padding)
    if num_tokens is None:
        num_tokens = np.bincount(sequences[sequences >= 0], minlength=num_sequences)
    sizes = np.maximum(num_tokens, 1).astype(np.float64)
    part = np.where(sequences >= 0, 1.0 / max(1.0, float(num_tokens.sum())), 0.0)
    if tokens_per_expert is None:
        return np.zeros((num_rows, num_experts)), part
    factors = (
        tokens_per_expert.reshape(num_sequences, num_experts)
        * (num_experts / (top_k * num_sequences * sizes**2))[:, None]
    )
    return np.where((sequences >= 0)[:, None], factors[sequences], 0.0), part


def router_losses(
    gating_output: np.ndarray,
    tokens_per_expert: np.ndarray | None = None,
    num_tokens: np.ndarray | None = None,
    *,
    top_k: int = 1,
    scoring_func: str = "softmax",
    coefficient: float = 1.0,
    z_coefficient: float = 1.0,
    num_sequences: int = 1,
    sequence_ids: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the load balancing loss and the z-loss of a router.

    Parameters
    ----------
    gating_output
        float [num_tokens, num_experts], the router's logits.
    tokens_per_expert
        int32 or float32 [num_sequences, num_experts], the slots of each expert, over all ranks if there are more;
        without them the load balancing loss is 0.
    num_tokens
        Of the same dtype, [num_sequences]: the tokens of each, over all ranks; by default those that are no padding.
    top_k
        Experts of each token.
    scoring_func
        "softmax", "sigmoid" or "softplus_sqrt": how logits become scores, which are divided by their sum.
    coefficient
        Multiplies the load balancing loss, which is the mean over sequences.
    z_coefficient
        Multiplies the z-loss, the mean over tokens of the square of ``log(sum_e exp(x_e))``.
    num_sequences, sequence_ids, num_token_non_padded, is_padding
        As in `count_by_sequence`.

    Returns
    -------
    np.ndarray
        float64 [2]: the load balancing loss and the z-loss.

    Examples
    --------
    >>> logits = np.log(np.array([[0.75, 0.25], [0.5, 0.5]]))
    >>> router_losses(logits + 2, np.array([[2, 0]]), z_coefficient=0.001).round(6)
    array([1.25 , 0.004])
    """
    padding = (sequence_ids, num_token_non_padded, is_padding)
    sizes = (*gating_output.shape, tokens_per_expert, num_tokens, top_k, num_sequences)
    factors, part = _by_token(*sizes, *padding)
    scores, log_sums = shares(gating_output.astype(np.float64), scoring_func)
    takes_part = part > 0
    balance = (scores * factors)[takes_part].sum()
    return np.array([coefficient * balance, z_coefficient * (part * log_sums**2)[takes_part].sum()]) + 0.0


def router_losses_backward(
    gating_output: np.ndarray,
    tokens_per_expert: np.ndarray | None,
    num_tokens: np.ndarray | None,
    grad_losses: np.ndarray,
    *,
    top_k: int = 1,
    scoring_func: str = "softmax",
    coefficient: float = 1.0,
    z_coefficient: float = 1.0,
    num_sequences: int = 1,
    sequence_ids: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
) -> np.ndarray:
    """Return the gradient by the logits, given that by the two losses [2]; other parameters as in `router_losses`.

    >>> logits = np.log(np.array([[0.75, 0.25]]))
    >>> router_losses_backward(logits, np.array([[1, 0]]), None, np.array([1.0, 0.0]))
    array([[ 0.375, -0.375]])
    """
    padding = (sequence_ids, num_token_non_padded, is_padding)
    sizes = (*gating_output.shape, tokens_per_expert, num_tokens, top_k, num_sequences)
    factors, part = _by_token(*sizes, *padding)
    logits = gating_output.astype(np.float64)
    powers, log_sums = shares(logits)
    by_score = float(grad_losses[0]) * coefficient * factors
    if scoring_func == "softmax":
        scores, slope = powers, powers
    else:
        scores, _ = shares(logits, scoring_func)
        total = SCORING[scoring_func](logits).sum(axis=1, keepdims=True)
        slope = slopes(logits, scoring_func) / total
    grad = slope * (by_score - (by_score * scores).sum(axis=1, keepdims=True))
    grad += powers * (float(grad_losses[1]) * z_coefficient * 2 * part * log_sums)[:, None]
    return np.where(part[:, None] > 0, grad, 0.0).astype(gating_output.dtype)


def load_balancing_loss(
    gating_output: Any,
    topk_ids: Any,
    *,
    form: str = "switch",
    scoring_func: str = "softmax",
    coefficient: float = 1.0,
    num_sequences: int = 1,
    sequence_ids: np.ndarray | None = None,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
    tokens_per_expert: np.ndarray | None = None,
) -> float:
    """Return the load balancing loss of one layer's logits and choice, or of a tuple with those of several layers.

    Layers are taken for one long batch, as transformers does, whose `form` is "transformers": it is not divided by K.
    `tokens_per_expert` counts instead of what the choice says; other parameters are those of `router_losses`.

    >>> logits = np.log(np.array([[0.75, 0.25], [0.5, 0.5]]))
    >>> load_balancing_loss(logits, np.array([[0], [0]]))
    1.25
    >>> load_balancing_loss((logits, logits), (np.array([[0, 1], [0, 1]]),) * 2, form="transformers")
    2.0
    """
    layers = gating_output if isinstance(gating_output, tuple) else (gating_output,)
    chosen = topk_ids if isinstance(topk_ids, tuple) else (topk_ids,)
    where: dict[str, Any] = {"num_sequences": num_sequences, "sequence_ids": sequence_ids}
    where |= {"num_token_non_padded": num_token_non_padded, "is_padding": is_padding}
    found = [count_by_sequence(ids, layers[0].shape[1], **where) for ids in chosen]
    counts = sum(one.tokens_per_expert for one in found) if tokens_per_expert is None else tokens_per_expert
    sizes = np.sum([one.num_tokens for one in found], axis=0)
    top_k = 1 if form == "transformers" else chosen[0].shape[1]
    rules: dict[str, Any] = {"top_k": top_k, "scoring_func": scoring_func, "coefficient": coefficient, **where}
    return float(sum(router_losses(logits, counts, sizes, **rules)[0] for logits in layers))


def z_loss(
    gating_output: Any,
    *,
    coefficient: float = 1.0,
    num_token_non_padded: np.ndarray | None = None,
    is_padding: np.ndarray | None = None,
) -> float:
    """Return the mean over tokens, of one layer or a tuple of layers, of the square of ``log(sum_e exp(x_e))``.

    >>> round(z_loss(np.log(np.array([[1.0, 3.0], [9.0, 9.0]])), is_padding=np.array([False, True])), 6)
    1.921812
    """
    layers = gating_output if isinstance(gating_output, tuple) else (gating_output,)
    where = {"num_token_non_padded": num_token_non_padded, "is_padding": is_padding}
    losses = [router_losses(logits, z_coefficient=coefficient, **where)[1] for logits in layers]
    return float(np.mean(losses))


BIAS_RULES = ("sign", "proportional")


def move_correction_bias(
    counts: np.ndarray, rate: float, *, correction_bias: np.ndarray, rule: str = "sign", center: bool = False
) -> np.ndarray:
    """Move the correction bias of each expert towards even counts, in place.

    Parameters
    ----------
    counts
        int or float [num_experts] or [num_layers, num_experts]: the slots of each expert since the last update.
    rate
        How far.
    correction_bias
        float32 of the same shape, written. Where nothing was counted it stays as it is.
    rule
        "sign": ``rate * sign(mean - count)``. "proportional": ``rate * (mean - count) / mean``.
    center
        Take the mean over experts off the change, so that the mean of the biases stays.

    Returns
    -------
    np.ndarray
        `correction_bias` itself.

    Examples
    --------
    >>> counts = np.array([6, 1, 3, 2])
    >>> move_correction_bias(counts, 0.5, correction_bias=np.zeros(4, np.float32))
    array([-0.5,  0.5,  0. ,  0.5], dtype=float32)
    >>> move_correction_bias(counts, 0.75, correction_bias=np.zeros(4, np.float32), rule="proportional")
    array([-0.75,  0.5 ,  0.  ,  0.25], dtype=float32)
    """
    counts = counts.astype(np.float64)
    mean = counts.mean(axis=-1, keepdims=True)
    off = mean - counts
    change = np.sign(off) if rule == "sign" else off / np.where(mean > 0, mean, 1.0)
    if center:
        change = change - change.mean(axis=-1, keepdims=True)
    correction_bias += (rate * change).astype(np.float32)
    return correction_bias


def update_correction_bias(
    correction_bias: np.ndarray, counts: np.ndarray, rate: float, *, rule: str = "sign", center: bool = False
) -> np.ndarray:
    """Move a correction bias by `move_correction_bias`, whose parameters these are.

    >>> update_correction_bias(np.zeros(2, np.float32), np.array([3, 1]), 0.001)
    array([-0.001,  0.001], dtype=float32)
    """
    return move_correction_bias(counts, rate, correction_bias=correction_bias, rule=rule, center=center)
