"""SGLang's `sgl_kernel` functions by their names and parameters, on our kernels, and `patch`, which puts them there.

Signatures are those of sglang-kernel 0.4.4. Results are SGLang's but for what a caller can rely on more: slots are in
order inside an expert, ids that are no expert's are skipped, ties go to the lower id and the lower group, all experts
and groups are possible, outputs are written whole.
"""

from collections.abc import Sequence
from typing import Any

import torch

import numba_moe
from numba_moe.interop.patching import Patch
from numba_moe.interop.vllm_ops import align_into
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import apart


@apart("sorted_token_ids", "experts_ids", "num_tokens_post_pad")
def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor,
    pad_sorted_token_ids: bool | torch.Tensor = False,
) -> None:
    """Group slots by expert, padded to blocks; `num_experts` counts one more, for slots of id -1.

    Those come first, in blocks that `experts_ids` calls -1. Padding is written in any case; `cumsum_buffer` is SGLang's
    scratch, which nothing here needs. `num_tokens_post_pad` may have a second number, of the blocks called -1. Older
    releases had counters of tokens before `cumsum_buffer`, which was where the flag is now: where a tensor is there,
    `num_experts` is the number of experts.
    """
    given = sorted_token_ids, experts_ids, num_tokens_post_pad[:1]
    if isinstance(pad_sorted_token_ids, torch.Tensor):
        align_into(topk_ids.contiguous(), num_experts, block_size, *given)
        return
    checks.boolean("pad_sorted_token_ids", pad_sorted_token_ids)
    names = torch.arange(-1, num_experts - 1, dtype=torch.int32, device=topk_ids.device)
    counts = None if num_tokens_post_pad.numel() == 1 else torch.empty_like(names)
    align_into(topk_ids.contiguous() + 1, num_experts, block_size, *given, names, counts=counts)
    if counts is not None:
        num_tokens_post_pad[1:] = (counts[:1] + block_size - 1) // block_size


@apart("topk_weights", "topk_ids")
def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: torch.Tensor | None = None,
) -> None:
    """Choose experts by softmax scores of logits that are capped and biased first: both count in the weights."""
    checks.number("moe_softcapping", moe_softcapping, infinite=True)
    options: dict[str, Any] = {
        "renormalize": renormalize,
        "softcap": moe_softcapping,
        "correction_bias": correction_bias,
    }
    mode = "choice" if correction_bias is None else "logits"
    _write(
        numba_moe.select_experts(gating_output, topk_ids.shape[1], bias_mode=mode, **options), topk_weights, topk_ids
    )


@apart("topk_weights", "topk_ids")
def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    correction_bias: torch.Tensor | None = None,
) -> None:
    """Choose experts by sigmoid scores; a bias counts for the choice alone."""
    found = numba_moe.topk_sigmoid(gating_output, topk_ids.shape[1], renormalize, correction_bias)
    _write(found, topk_weights, topk_ids)


def moe_fused_gate(
    input_tensor: torch.Tensor,
    bias: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose groups and then experts by sigmoid scores and a bias, and renormalise.

    The last `num_fused_shared_experts` of each token's `topk` are the shared experts, numbered behind the others. They
    weigh ``1 / routed_scaling_factor``, or 1 where all weights are scaled by it.
    """
    found = numba_moe.select_experts(
        *(input_tensor, topk - num_fused_shared_experts),
        scoring_func="sigmoid",
        renormalize=True,
        correction_bias=bias.float(),
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        group_score="top2_sum",
        num_fused_shared_experts=num_fused_shared_experts,
        routed_scaling_factor=routed_scaling_factor or 1.0,
        apply_routed_scaling_factor_on_output=apply_routed_scaling_factor_on_output,
    )
    return found.topk_weights, found.topk_ids


def kimi_k2_moe_fused_gate(
    input_tensor: torch.Tensor,
    bias: torch.Tensor,
    topk: int,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by sigmoid scores and a bias; weights that are not renormalised are not scaled either."""
    scaled = apply_routed_scaling_factor_on_output and renormalize
    found = numba_moe.select_experts(
        *(input_tensor, topk),
        scoring_func="sigmoid",
        renormalize=renormalize,
        correction_bias=bias.float(),
        routed_scaling_factor=routed_scaling_factor if scaled else 1.0,
    )
    return found.topk_weights, found.topk_ids


@apart("output_tensor")
def moe_sum(input_tensor: torch.Tensor, output_tensor: torch.Tensor) -> None:
    """Sum each token's rows."""
    output_tensor.copy_(numba_moe.moe_sum(input_tensor, out_dtype=output_tensor.dtype))


@apart("output_tensor")
def moe_sum_reduce(input_tensor: torch.Tensor, output_tensor: torch.Tensor, routed_scaling_factor: float = 0) -> None:
    """Sum each token's rows, and scale the sums."""
    options: dict[str, Any] = {"routed_scaling_factor": routed_scaling_factor, "out_dtype": output_tensor.dtype}
    output_tensor.copy_(numba_moe.moe_sum(input_tensor, **options))


@apart(
    *("expert_offsets", "problem_sizes1", "problem_sizes2"),
    *("input_permutation", "output_permutation", "blockscale_offsets"),
)
def prepare_moe_input(
    topk_ids: torch.Tensor,
    expert_offsets: torch.Tensor,
    problem_sizes1: torch.Tensor,
    problem_sizes2: torch.Tensor,
    input_permutation: torch.Tensor,
    output_permutation: torch.Tensor,
    num_experts: int,
    n: int,
    k: int,
    blockscale_offsets: torch.Tensor | None = None,
) -> None:
    """Write what a grouped GEMM of [tokens, k] by [k, 2n] and one of [tokens, n] by [n, k] read.

    `expert_offsets`: first rows of experts. `problem_sizes1` and 2: rows, columns and depth of each expert's GEMM.
    `input_permutation`: the token of each row, `num_tokens` behind the last. `output_permutation`: the row of each
    slot, -1 for a skipped one. `blockscale_offsets`: first rows where each expert's are padded to 128.
    """
    num_slots, top_k = topk_ids.numel(), topk_ids.shape[1]
    counts = torch.empty(num_experts, dtype=torch.int32, device=topk_ids.device)
    rows = torch.empty_like(topk_ids, dtype=torch.int32)
    slots = numba_moe.moe_align_block_size(topk_ids, 1, num_experts, counts=counts, inv_sorted_idx=rows)[0]
    input_permutation.copy_((slots[:num_slots] // top_k).view(input_permutation.shape))
    output_permutation.copy_(rows.view(output_permutation.shape))
    expert_offsets.copy_(numba_moe.expert_offsets(counts))
    if blockscale_offsets is not None:
        blockscale_offsets.copy_(numba_moe.expert_offsets(counts, 128))
    for sizes, columns, depth in ((problem_sizes1, 2 * n, k), (problem_sizes2, k, n)):
        sizes[:, 0] = counts
        sizes[:, 1] = columns
        sizes[:, 2] = depth


def _write(found: numba_moe.TopK, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    topk_weights.copy_(found.topk_weights)
    topk_ids.copy_(found.topk_ids)


FUNCTIONS = {
    function.__name__: function
    for function in (
        *(moe_align_block_size, topk_softmax, topk_sigmoid, moe_fused_gate, kimi_k2_moe_fused_gate),
        *(moe_sum, moe_sum_reduce, prepare_moe_input),
    )
}
PATCH = Patch(["sgl_kernel", "sglang"], {"sgl_kernel.moe": FUNCTIONS})


def patch(names: Sequence[str] | None = None) -> list[str]:
    """Put our functions into the installed `sgl_kernel`, and wherever modules of SGLang hold its own.

    Parameters
    ----------
    names : sequence of str, optional
        Only these, "moe_align_block_size" for instance; by default all.

    Returns
    -------
    list of str
        What was replaced, each by its module and name.

    Raises
    ------
    ImportError
        `sgl_kernel` is not installed.
    ValueError
        A name that is not among the functions.

    Notes
    -----
    Modules that are not loaded yet take what they import from `sgl_kernel`, which is patched. Results that differ by
    our contract are listed in docs/put-it-in.md.
    """
    return PATCH.apply(names)


def unpatch() -> None:
    """Put SGLang's own functions back."""
    PATCH.undo()
