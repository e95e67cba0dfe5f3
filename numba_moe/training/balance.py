"""Balance without a loss: the biases of a model's routers move once a step."""

from typing import Any

import torch

from numba_moe.ops.correction_bias import move_correction_bias
from numba_moe.training.losses import summed


def update_correction_bias(
    correction_bias: torch.Tensor,
    counts: torch.Tensor,
    rate: float,
    *,
    rule: str = "sign",
    center: bool = False,
    group: Any = None,
) -> torch.Tensor:
    """Move the correction bias of each expert towards even counts, in place: once per step of the optimiser.

    Parameters
    ----------
    correction_bias : tensor of float32, shape [num_experts] or [num_layers, num_experts]
        Written.
    counts : tensor of int32, int64 or float32, of the same shape
        The slots of each expert since the last update, as ``select_experts(..., counts=counts)`` counts them.
    rate : float
        How far: 0.001 in DeepSeek-V3, and 0 at the end of its training.
    rule : {"sign", "proportional"}
        ``rate * sign(mean - count)``, or ``rate * (mean - count) / mean``, which moves biases further if counts are far
        off.
    center : bool
        Take the mean over experts off the change, so that the mean of the biases stays.
    group : ProcessGroup, optional
        Counts are summed over its ranks first, so that all move alike.

    Returns
    -------
    tensor of float32, of the shape of `counts`
        `correction_bias` itself.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape or layout, mixed devices, unknown `rule`.

    Notes
    -----
    One launch; nothing is read on the host, and CUDA graphs capture it. Where nothing was counted the bias stays.
    `counts` is left as it is: zero it for the next step.

    Examples
    --------
    >>> import torch
    >>> update_correction_bias(torch.zeros(4), torch.tensor([6, 1, 3, 2]), 0.5)
    tensor([-0.5000,  0.5000,  0.0000,  0.5000])
    """
    counts = summed(counts, group)
    move_correction_bias(counts, rate, correction_bias=correction_bias, rule=rule, center=center)
    return correction_bias
