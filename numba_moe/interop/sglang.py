"""SGLang's `sgl_kernel` functions by their names and parameters, on our kernels, and `patch`, which puts them there.

Signatures are those of sglang-kernel 0.4.6, and of 0.4.4 for what only that has; `numba_moe.interop.sglang_kernels` has
what `sglang.kernels` has of its own since release 0.5.23, which `patch` replaces too. Results are SGLang's but for what
a caller can rely on more: slots are in order inside an expert, ids that are no expert's are skipped, ties go to the
lower id and the lower group, all experts and groups are possible, outputs are written whole.

With NUMBA_MOE_SGLANG=1 in the environment SGLang patches itself, in every process, as this package registers a plugin.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

import numba_moe
from numba_moe.interop import into, sglang_kernels
from numba_moe.interop.composed import float32_bias
from numba_moe.interop.into import select_experts as choose_into
from numba_moe.interop.patching import Patch
from numba_moe.interop.vllm_ops import align_into, slot_numbers
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
    ignore_invalid_expert: bool = False,
) -> None:
    """Group slots by expert, padded to blocks; `num_experts` counts one more, for slots of id -1.

    Those come first, in blocks that `experts_ids` calls -1, or are left out with `ignore_invalid_expert`. Padding is
    written in any case; `cumsum_buffer` is SGLang's scratch, which nothing here needs. `num_tokens_post_pad` may have a
    second number, of the blocks called -1. Where a tensor is where the flag for padding is, the call is one of
    `moe_align_block_size_with_counters`.
    """
    given = sorted_token_ids, experts_ids, num_tokens_post_pad
    if isinstance(pad_sorted_token_ids, torch.Tensor):
        older = (topk_ids, num_experts, block_size, *given, cumsum_buffer, pad_sorted_token_ids)
        moe_align_block_size_with_counters(*older, ignore_invalid_expert)
        return
    checks.boolean("pad_sorted_token_ids", pad_sorted_token_ids)
    checks.boolean("ignore_invalid_expert", ignore_invalid_expert)
    with_blocks = num_tokens_post_pad.numel() == 2
    if not ignore_invalid_expert:
        sglang_kernels.align_with_bucket(topk_ids, num_experts, block_size, *given, with_blocks)
        return
    align_into(topk_ids.contiguous(), num_experts - 1, block_size, *given[:2], num_tokens_post_pad[:1])
    if with_blocks:
        num_tokens_post_pad[1:] = 0


@apart("sorted_token_ids", "experts_ids", "num_tokens_post_pad")
def moe_align_block_size_with_counters(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    token_cnts_buffer: torch.Tensor,
    cumsum_buffer: torch.Tensor,
    pad_sorted_token_ids: bool = False,
) -> None:
    """Group slots by expert: `moe_align_block_size` of releases that count tokens in a buffer of the caller's.

    There `num_experts` is the number of experts, and no id is -1. Both buffers are scratch that nothing here needs.
    """
    checks.boolean("pad_sorted_token_ids", pad_sorted_token_ids)
    given = sorted_token_ids, experts_ids, num_tokens_post_pad[:1]
    align_into(topk_ids.contiguous(), num_experts, block_size, *given)


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
        "correction_bias": float32_bias(correction_bias),
    }
    options["bias_mode"] = "choice" if correction_bias is None else "logits"
    choose_into(topk_weights, topk_ids, gating_output, **options)


@apart("topk_weights", "topk_ids", "token_expert_indices")
def topk_softmax_with_indices(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
) -> None:
    """Choose experts by softmax scores: `topk_softmax` of releases that number the slots column by column too."""
    topk_softmax(topk_weights, topk_ids, gating_output)
    slot_numbers(topk_ids, token_expert_indices)


@apart("topk_weights", "topk_ids")
def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    correction_bias: torch.Tensor | None = None,
) -> None:
    """Choose experts by sigmoid scores; a bias counts for the choice alone."""
    options: dict[str, Any] = {"renormalize": renormalize, "correction_bias": float32_bias(correction_bias)}
    choose_into(topk_weights, topk_ids, gating_output, scoring_func="sigmoid", **options)


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

    The last `num_fused_shared_experts` of each token's `topk` are the shared experts, whose ids follow the other ids.
    Each has weight ``1 / routed_scaling_factor``, or 1 where all weights are scaled by it.
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
    into.moe_sum(output_tensor, input_tensor)


@apart("output_tensor")
def moe_sum_reduce(input_tensor: torch.Tensor, output_tensor: torch.Tensor, routed_scaling_factor: float = 0) -> None:
    """Sum each token's rows, and scale the sums."""
    into.moe_sum(output_tensor, input_tensor, None, routed_scaling_factor)


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
    `input_permutation`: the token of each row, `num_tokens` for unused rows. `output_permutation`: the row of each
    slot, -1 for a skipped one. `blockscale_offsets`: first rows where each expert's are padded to 128.
    """
    maps = (input_permutation, output_permutation)
    sglang_kernels.prepare_grouped(
        *(topk_ids, expert_offsets, problem_sizes1, problem_sizes2, *maps, num_experts, n, k, blockscale_offsets)
    )


# By their names in `sgl_kernel.moe`; a tuple has the forms of several releases.
FUNCTIONS: dict[str, Any] = {
    "moe_align_block_size": (moe_align_block_size, moe_align_block_size_with_counters),
    "topk_softmax": (topk_softmax, topk_softmax_with_indices),
    "topk_sigmoid": (topk_sigmoid, sglang_kernels.topk_sigmoid),
    "moe_fused_gate": moe_fused_gate,
    "kimi_k2_moe_fused_gate": kimi_k2_moe_fused_gate,
    "moe_sum": moe_sum,
    "moe_sum_reduce": moe_sum_reduce,
    "prepare_moe_input": prepare_moe_input,
}
KERNELS = "sglang.kernels.ops.moe"


def _forget_kernels() -> None:
    """Let SGLang's selector look up again which kernels its ops have: it keeps what it found first."""
    selector = sys.modules.get("sglang.kernels.selector")
    for value in list(vars(selector).values()) if selector else ():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


PATCH = Patch(
    ["sgl_kernel", "sglang"],
    {
        "sgl_kernel.moe": FUNCTIONS,
        KERNELS: {"moe_align_block_size": moe_align_block_size, "topk_softmax": topk_softmax},
        f"{KERNELS}.moe_align": {"moe_align_block_size": sglang_kernels.jit_moe_align_block_size},
        f"{KERNELS}.moe_align_single_token": {"moe_align_single_token": sglang_kernels.moe_align_single_token},
        f"{KERNELS}.moe_align_small_numel": {"moe_align_small_numel": sglang_kernels.moe_align_small_numel},
        f"{KERNELS}.moe_fused_gate": {"moe_fused_gate": sglang_kernels.moe_fused_gate},
        f"{KERNELS}.moe_topk_softmax": {"topk_softmax": topk_softmax},
        f"{KERNELS}.moe_topk_sigmoid": {"topk_sigmoid": sglang_kernels.topk_sigmoid},
        f"{KERNELS}.cutlass_prepare_moe_input": {"cutlass_prepare_moe_input": sglang_kernels.cutlass_prepare_moe_input},
        f"{KERNELS}.dsv4": {"hash_topk": sglang_kernels.hash_topk, "mask_topk_ids": sglang_kernels.mask_topk_ids},
        f"{KERNELS}.moe_fused_mul_sum": {"moe_fused_mul_sum": sglang_kernels.moe_fused_mul_sum},
        f"{KERNELS}.gemma4_routing": {"gemma4_fused_routing": sglang_kernels.gemma4_fused_routing},
        f"{KERNELS}.fused_moe_triton_kernels": {"moe_sum_reduce_triton": sglang_kernels.moe_sum_reduce_triton},
        f"{KERNELS}.moe_topk_sum": {"moe_topk_sum": sglang_kernels.moe_topk_sum},
        "flashinfer.fused_moe.fused_routing_dsv3": {"fused_topk_deepseek": sglang_kernels.fused_topk_deepseek},
    },
    _forget_kernels,
    ["flashinfer"],
)


def patch(names: Sequence[str] | None = None) -> list[str]:
    """Put our functions into the installed `sgl_kernel` and `sglang`, wherever modules of theirs hold their own.

    If FlashInfer is there, its gate for DeepSeek V3, which SGLang prefers, is replaced too, in all its modules.

    Parameters
    ----------
    names : sequence of str, optional
        Only these, "moe_align_block_size" for instance; by default all that the installed releases have.

    Returns
    -------
    list of str
        What was replaced, each by its module and name.

    Raises
    ------
    ImportError
        Neither `sgl_kernel` nor `sglang` is installed.
    ValueError
        A name that is not among the functions, that these releases lack, or whose parameters here are unknown to ours.

    Notes
    -----
    Modules that are not loaded yet take what they import from those that are patched, and kernels that SGLang has
    looked up before are looked up again. Which of several forms a function gets goes by the parameters that the
    installed release has; with others than ours know, it stays SGLang's, and a warning is logged. Results that differ
    by our contract are listed in docs/put-it-in.md.
    """
    return PATCH.apply(names)


def unpatch() -> None:
    """Put SGLang's own functions back."""
    PATCH.undo()


def plugin() -> Any:
    """Patch if NUMBA_MOE_SGLANG=1 asks for it: what SGLang calls in every process that it starts."""
    return patch() if os.environ.get("NUMBA_MOE_SGLANG") == "1" else None
