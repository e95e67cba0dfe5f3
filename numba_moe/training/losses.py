"""The losses that balance a router's experts and keep its logits small, in the forms that trainers use."""

from collections.abc import Sequence
from typing import Any

import torch

from numba_moe.ops.router_losses import count_by_sequence, router_losses
from numba_moe.runtime import checks

FORMS = ("switch", "transformers")
Tensors = torch.Tensor | Sequence[torch.Tensor]


def summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum of a tensor over the ranks of a process group, the tensor itself without one; nobody waits."""
    if group is None:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _layers(argument: str, value: Any) -> tuple[torch.Tensor, ...]:
    found = (value,) if isinstance(value, torch.Tensor) else value
    good = isinstance(found, Sequence) and len(found) > 0 and all(isinstance(one, torch.Tensor) for one in found)
    if not good:
        raise TypeError(f"`{argument}` must be a tensor or a sequence of tensors, got {type(value).__name__}")
    return tuple(found)


def _where(is_padding: Any, attention_mask: Any, **where: Any) -> dict[str, Any]:
    """Return which tokens take part, as the ops are told."""
    if attention_mask is not None:
        checks.holds("attention_mask", "None where `is_padding` is given", is_padding is None, "both")
        is_padding = (attention_mask == 0).reshape(-1)
    return {"is_padding": is_padding, **where}


def load_balancing_loss(
    gating_output: Tensors,
    topk_ids: Tensors,
    *,
    form: str = "switch",
    scoring_func: str = "softmax",
    coefficient: float = 1.0,
    num_sequences: int = 1,
    sequence_ids: torch.Tensor | None = None,
    num_token_non_padded: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    tokens_per_expert: torch.Tensor | None = None,
    group: Any = None,
) -> torch.Tensor:
    """Compute the loss that is least where the experts of a router are chosen evenly.

    Parameters
    ----------
    gating_output : tensor of float32, float16 or bfloat16, shape [num_tokens, num_experts], or a sequence of them
        The router's logits, of one layer or of several, which then make one long batch.
    topk_ids : tensor of int32 or int64, shape [num_tokens, top_k], or a sequence of them
        The experts that were chosen by them. Ids outside ``[0, num_experts)`` are not counted.
    form : {"switch", "transformers"}
        ``E / (K * T**2) * sum_e c_e * sum_t q_te``, which is 1 where all is even, as Megatron-LM and TransformerEngine
        have it; or K times that, as transformers has it.
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt"}
        How logits become scores; q is a score divided by the sum of the token's scores.
    coefficient : float
        Multiplies the loss.
    num_sequences : int
        The loss is that of each sequence, and their mean: DeepSeek-V3's, with sigmoid. Consecutive tokens make one.
    sequence_ids : tensor of int32, shape [num_tokens], optional
        The sequence of each token, for sequences that are packed, or where the batch is the inner dimension; a token
        whose id is outside ``[0, num_sequences)`` is padding.
    num_token_non_padded : tensor of int32 or int64, shape [1] or [], optional
        Number of real tokens, on the device. The tokens after them are padding.
    is_padding : tensor of bool, shape [num_tokens], optional
        Which tokens are padding, and take no part.
    attention_mask : tensor, num_tokens elements, optional
        The same upside down: tokens where it is 0 are padding.
    tokens_per_expert : tensor of int32 or float32, shape [num_sequences, num_experts], optional
        Counts to be used instead of those of `topk_ids`: their mean over micro batches, for instance. They are those of
        all layers and ranks.
    group : ProcessGroup, optional
        Counts and numbers of tokens are summed over its ranks, so that the whole batch is to be even and not each
        rank's part. The ranks' losses add up to that of the whole batch.

    Returns
    -------
    tensor of float32, shape []

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape or layout, mixed devices, unknown names, or different numbers of layers of ids and of logits.

    Notes
    -----
    A gradient goes to the logits through the scores; counts have none. The logits of each layer are read once. Nothing
    synchronises with the host. Frameworks that average gradients over the ranks of `group` want the loss times their
    number.

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    >>> round(load_balancing_loss(logits, torch.tensor([[0], [0]])).item(), 4)
    1.25
    """
    layers, chosen = _layers("gating_output", gating_output), _layers("topk_ids", topk_ids)
    checks.holds("topk_ids", f"of {len(layers)} layers, as `gating_output` is", len(layers) == len(chosen), len(chosen))
    checks.choice("form", form, FORMS)
    where = _where(
        is_padding,
        attention_mask,
        num_sequences=num_sequences,
        sequence_ids=sequence_ids,
        num_token_non_padded=num_token_non_padded,
    )
    found = [count_by_sequence(ids.contiguous(), layers[0].shape[-1], **where) for ids in chosen]
    sizes = summed(_total([one.num_tokens for one in found]), group)
    if tokens_per_expert is None:
        tokens_per_expert = summed(_total([one.tokens_per_expert for one in found]), group)
    top_k = 1 if form == "transformers" else chosen[0].shape[-1]
    rules: dict[str, Any] = {"top_k": top_k, "scoring_func": scoring_func, "coefficient": coefficient, **where}
    sizes = sizes.to(tokens_per_expert.dtype)
    return _total([router_losses(logits, tokens_per_expert, sizes, **rules)[0] for logits in layers])


def z_loss(
    gating_output: Tensors,
    *,
    coefficient: float = 1.0,
    num_token_non_padded: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the mean over tokens of the square of ``log(sum_e exp(x_e))``, which keeps logits small (ST-MoE).

    Parameters
    ----------
    gating_output : tensor of float32, float16 or bfloat16, shape [num_tokens, num_experts], or a sequence of them
        The router's logits, of one layer or of several, over which the mean is taken.
    coefficient : float
        Multiplies the loss.
    num_token_non_padded : tensor of int32 or int64, shape [1] or [], optional
        Number of real tokens, on the device. The tokens after them are padding.
    is_padding : tensor of bool, shape [num_tokens], optional
        Which tokens are padding, and take no part.
    attention_mask : tensor, num_tokens elements, optional
        The same upside down: tokens where it is 0 are padding.

    Returns
    -------
    tensor of float32, shape []

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        A wrong shape or layout, or mixed devices.

    Notes
    -----
    Nothing synchronises with the host. `router_losses` computes this and the other loss while it reads logits once.

    Examples
    --------
    >>> import torch
    >>> round(z_loss(torch.tensor([[1.0, 3.0]]).log()).item(), 4)
    1.9218
    """
    layers = _layers("gating_output", gating_output)
    where = _where(is_padding, attention_mask, num_token_non_padded=num_token_non_padded)
    factor = coefficient / len(layers)
    return _total([router_losses(logits, z_coefficient=factor, **where)[1] for logits in layers])


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=parts[0].dtype)
