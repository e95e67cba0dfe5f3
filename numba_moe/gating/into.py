"""Gating into memory that is given, for callers whose own functions write what they are given."""

from typing import Any

import torch

from numba_moe.gating import selection
from numba_moe.gating.plans import GatingPlan
from numba_moe.gating.selection import NONE, asked, options_from, options_of, plan_selection
from numba_moe.permute.into import kernel_writes, on_device
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.plans import layout, planned

ID_DTYPES = (torch.int32, torch.int64)


@planned
def _plan(*arguments: Any) -> GatingPlan:
    rules: Any = (*arguments[:10], options_from(arguments[10:]))
    return plan_selection(*rules)


def select_experts(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    bias_mode: str = "choice",
    is_padding: torch.Tensor | None = None,
) -> None:
    """Write the weights and ids of each token's experts, [num_tokens, top_k]: `numba_moe.select_experts`.

    Memory is written by the kernel where it is contiguous, float32 and int32 or int64, and the call is the kernel's;
    otherwise the results are copied.
    """
    top_k = topk_ids.shape[1]
    direct = topk_weights.dtype == torch.float32 and topk_ids.dtype in ID_DTYPES and not checks.VALIDATE
    outs, inputs = (topk_weights, topk_ids), (gating_output, correction_bias, is_padding)
    if not (direct and kernel_writes(outs, inputs)):
        found = selection.select_experts(
            *(gating_output, top_k),
            scoring_func=scoring_func,
            renormalize=renormalize,
            correction_bias=correction_bias,
            routed_scaling_factor=routed_scaling_factor,
            softcap=softcap,
            bias_mode=bias_mode,
            is_padding=is_padding,
        )
        topk_weights.copy_(found.topk_weights)
        topk_ids.copy_(found.topk_ids)
        return
    indices = "int64" if topk_ids.dtype == torch.int64 else "int32"
    options = options_of(softcap, 0, True, 0, -1, None, None, is_padding, None, None, None, indices)
    rules = (1, 1, renormalize, scoring_func, layout(correction_bias), None, routed_scaling_factor, bias_mode)
    plan = _plan(layout(gating_output), top_k, *rules, *asked(options))
    for name, array, expected in (
        ("topk_weights", topk_weights, plan.topk_weights),
        ("topk_ids", topk_ids, plan.topk_ids),
    ):
        checks.changeable(name, array)
        checks.shape(name, layout(array), expected.shape, "(num_tokens, top_k)")
        if not array.is_inference():
            torch.autograd.graph.increment_version(array)
    moving: torch.Tensor | None = correction_bias
    extras: dict[str, Any] = {}
    if options is not NONE or bias_mode != "choice":
        logit_bias, moving = (correction_bias, None) if bias_mode == "logits" else (None, correction_bias)
        extras = {"logit_bias": logit_bias, **options.arrays()}
    with on_device(topk_ids):
        if plan.group_scores is not None:
            extras["group_scores"] = arrays.empty(*plan.group_scores)
        plan.choose(
            gating_output=gating_output,
            correction_bias=moving,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            **extras,
        )
