"""Balance without a loss: a bias on each expert's rank moves towards even counts."""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import divide, wait_for_earlier
from numba_moe.device.primitives import WARP, warp_index, warp_sum
from numba_moe.device.types import Float32, Float32Array, Int32
from numba_moe.reference import training as reference
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array
from numba_moe.runtime.launch import Launch, warps
from numba_moe.runtime.op import op

COUNTED = (torch.int32, torch.int64, torch.float32)


class Moved(NamedTuple):
    """The biases of each layer, and what its experts had of slots."""

    slot_counts: Annotated[Any, "int32", "int64", "float32"]  # [num_layers, num_experts]
    correction_bias: Float32Array  # [num_layers, num_experts], added to
    num_layers: Int32
    num_experts: Int32


class Step(NamedTuple):
    """How far a bias moves, and by which rule."""

    rate: Float32
    by_sign: Int32
    center: Int32


@cuda.jit(device=True)
def change_of(count, mean, step):
    """Return how a bias moves, in rates."""
    if step.by_sign:
        return float32(count < mean) - float32(count > mean)
    return divide(mean - count, mean) if mean > float32(0.0) else float32(0.0)


@cuda.jit
def move_biases(moved: Moved, step: Step):
    """Move the biases of a layer, by a warp, a lane every 32nd expert; the grid has a warp per layer."""
    wait_for_earlier()
    layer = warp_index()
    if layer >= moved.num_layers:
        return
    row = int64(layer) * moved.num_experts
    inverse = divide(float32(1.0), float32(moved.num_experts))
    mean = float32(0.0)
    expert = int32(cuda.laneid)
    while expert < moved.num_experts:
        mean += float32(moved.slot_counts[row + expert])
        expert = int32(expert + WARP)
    mean = warp_sum(mean) * inverse
    shift = float32(0.0)
    if step.center:
        expert = int32(cuda.laneid)
        while expert < moved.num_experts:
            shift += change_of(float32(moved.slot_counts[row + expert]), mean, step)
            expert = int32(expert + WARP)
        shift = warp_sum(shift) * inverse
    expert = int32(cuda.laneid)
    while expert < moved.num_experts:
        change = change_of(float32(moved.slot_counts[row + expert]), mean, step) - shift
        moved.correction_bias[row + expert] += float32(step.rate) * change
        expert = int32(expert + WARP)


@op(reference.move_correction_bias, out="correction_bias", own_out=True)
def move_correction_bias(
    counts: Array, rate: float, *, correction_bias: Array, rule: str = "sign", center: bool = False
) -> Any:
    """Move the correction bias of each expert towards even counts, in place.

    Parameters
    ----------
    counts : array of int32, int64 or float32, shape [num_experts] or [num_layers, num_experts]
        The slots of each expert since the last update.
    rate : float
        How far.
    correction_bias : array of float32, of the shape of `counts`
        Written.
    rule : {"sign", "proportional"}
        ``rate * sign(mean - count)``, or ``rate * (mean - count) / mean``.
    center : bool
        Take the mean over experts off the change.

    Returns
    -------
    array of float32, of the shape of `counts`
        `correction_bias` itself.
    """


@move_correction_bias.plan
def _(given: Any) -> Launch:
    checks.array("counts", given.counts, COUNTED, (1, 2))
    checks.array("correction_bias", given.correction_bias, (torch.float32,), (1, 2), like=("counts", given.counts))
    checks.shape("correction_bias", given.correction_bias, tuple(given.counts.shape), "`counts`.shape")
    checks.number("rate", given.rate)
    checks.choice("rule", given.rule, reference.BIAS_RULES)
    checks.boolean("center", given.center)
    *layers, num_experts = given.counts.shape
    num_layers = layers[0] if layers else 1
    checks.integer("num_experts (columns of `counts`)", num_experts, 1)
    moved = Moved(given.counts.dtype, torch.float32, num_layers, num_experts)
    step = Step(float(given.rate), int(given.rule == "sign"), int(given.center))
    return Launch(move_biases, given.counts.device, *warps(num_layers), moved, step)


@move_correction_bias.run
def _(move: Launch, given: Any, correction_bias: torch.Tensor) -> None:
    move(slot_counts=given.counts, correction_bias=correction_bias)
