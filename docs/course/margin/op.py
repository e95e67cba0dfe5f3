"""The op: its declaration, checks, launch and gradient. From here on it is one of the library's."""

from typing import Any

import kernel
import torch
import twin
from twin import TopKWithMargin

from numba_moe.ops.gating import choose
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, contiguous
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op


@op(twin.topk_softmax_with_margin)
def topk_softmax_with_margin(gating_output: Array, top_k: int, renormalize: bool = False) -> TopKWithMargin:
    """Choose experts, and say how far the last chosen logit is above the best of the others."""


@topk_softmax_with_margin.outputs
def _(given: Any) -> TopKWithMargin:
    num_tokens = given.gating_output.shape[0]
    weights, ids = (contiguous(dtype, num_tokens, given.top_k) for dtype in (torch.float32, torch.int32))
    return TopKWithMargin(weights, ids, contiguous(torch.float32, num_tokens))


@topk_softmax_with_margin.plan
def _(given: Any) -> Launch:
    logits = given.gating_output
    checks.array("gating_output", logits, checks.FLOATS, (2,), rows=True)
    num_tokens, num_experts = logits.shape
    top_k = checks.integer("top_k", given.top_k, 1, num_experts, "the number of experts")
    checks.boolean("renormalize", given.renormalize)
    stride = num_experts if logits.strides is None else logits.strides[0]
    rows = kernel.Rows(logits, num_tokens, num_experts, stride, top_k, int(given.renormalize))
    chosen, threads = kernel.Chosen(torch.float32, torch.int32, torch.float32), block_threads(128)
    return Launch(kernel.choose_with_margin, logits.device, -(-num_tokens // threads), threads, rows, chosen)


@topk_softmax_with_margin.run
def _(launch: Any, given: Any, topk_weights: Any, topk_ids: Any, margin: Any) -> None:
    launch(gating_output=given.gating_output, topk_weights=topk_weights, topk_ids=topk_ids, margin=margin)


@topk_softmax_with_margin.saves
def _(ctx: Any, given: Any, topk_weights: Any, topk_ids: Any, margin: Any) -> None:
    choose.keep(ctx, given.gating_output, topk_weights, topk_ids, "softmax", given.renormalize, 1.0)


topk_softmax_with_margin.backward(choose.backward)  # of the weights, as for `topk_softmax`
