"""SGLang's `sglang.kernels.ops.moe` by its names and parameters, on our kernels: where release 0.5.23 has its gates.

Options that our kernels lack are put together from torch's operations around them; each docstring says which.
"""

from typing import Any

import torch

import numba_moe
from numba_moe.interop import into
from numba_moe.interop.composed import chosen_where, float32_bias, local_slots, packed_ids, real_tokens, slots_of
from numba_moe.interop.into import select_experts as choose_into
from numba_moe.interop.vllm_ops import align_into
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import apart

# SGLang's names of scores, and ours.
SCORING = {"sigmoid": "sigmoid", "sqrtsoftplus": "softplus_sqrt", "softmax": "softmax"}


@apart("packed_out")
def moe_fused_gate(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    scoring_func: str = "sigmoid",
    num_fused_shared_experts: int = 0,
    renormalize: bool = True,
    routed_scaling_factor: float | None = 1.0,
    apply_routed_scaling_factor_on_output: bool | None = False,
    moe_softcapping: float = 0.0,
    num_expert_group: int = 1,
    topk_group: int | None = 1,
    *,
    bias_alt: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    bias_alt_token_id: int | None = None,
    num_token_non_padded: torch.Tensor | None = None,
    renormalize_epsilon: float = 0.0,
    packed_out: torch.Tensor | None = None,
    sqrtsoftplus_log1p: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by logits, which are called `scores`, by groups if there are such.

    Parameters
    ----------
    scores : tensor of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits.
    bias : tensor of any float dtype, shape [num_experts], or None
        Counts for the choice alone; with softmax it is added to the logits, and so is in the weights too.
    topk : int
        Slots of a token, those of shared experts among them.
    scoring_func : {"sigmoid", "sqrtsoftplus", "softmax"}
        How logits become scores.
    num_fused_shared_experts : int
        The last slots of each token belong to shared experts, whose ids follow the other ids. Each has weight ``1 /
        routed_scaling_factor``, or 1 where the others are multiplied by it.
    renormalize : bool
        Divide the weights of a token by their sum.
    routed_scaling_factor : float
        Multiplies the weights if `apply_routed_scaling_factor_on_output`; None is 1.
    apply_routed_scaling_factor_on_output : bool
        See there; None is False.
    moe_softcapping : float
        Keeps logits within it before a softmax; 0 for none. Other scores have no cap.
    num_expert_group, topk_group : int
        Groups of consecutive experts, and how many of them are chosen first, by the sum of their best two.
    bias_alt : tensor of any float dtype, shape [num_experts], optional
        Replaces `bias` for tokens whose `input_ids` are `bias_alt_token_id`; without `input_ids` it is not used. A
        second launch chooses by it, and torch picks between the two results.
    num_token_non_padded : tensor of int32 or int64, shape [] or [1], optional
        On the device: tokens from there on get ids -1 and weights 0.
    renormalize_epsilon : float
        Added to the sum that weights are divided by.
    packed_out : tensor of int32, shape [num_tokens, topk], optional
        Written, by torch: ``id << 16`` with the bits of the weight in bfloat16 below.
    sqrtsoftplus_log1p : bool
        Chooses between two roundings that SGLang has; ours is the exact one in either case, with NaN last.

    Returns
    -------
    topk_weights, topk_ids : tensors of float32 and int32, shape [num_tokens, topk]

    Raises
    ------
    TypeError
        Wrong kind of argument or dtype.
    ValueError
        Unknown scores, a cap on scores that have none, no bias where scores need one, what `select_experts` refuses.
    """
    name = scoring_func.lower() if isinstance(scoring_func, str) else scoring_func
    checks.choice("scoring_func", name, tuple(SCORING))
    checks.boolean("sqrtsoftplus_log1p", sqrtsoftplus_log1p)
    checks.holds("bias", "given but for a softmax", bias is not None or name == "softmax", None)
    no_cap = name == "softmax" or moe_softcapping == 0
    checks.holds("moe_softcapping", f"0 for {name!r} scores", no_cap, moe_softcapping)
    num_shared = checks.integer("num_fused_shared_experts", num_fused_shared_experts, 0)
    factor = 1.0 if routed_scaling_factor is None else routed_scaling_factor
    on_output = bool(apply_routed_scaling_factor_on_output)
    options: dict[str, Any] = {
        "scoring_func": SCORING[name],
        "renormalize": renormalize,
        "renormalize_epsilon": renormalize_epsilon,
        "softcap": moe_softcapping,
        "bias_mode": "logits" if name == "softmax" and bias is not None else "choice",
        "num_expert_group": num_expert_group,
        "topk_group": 1 if topk_group is None else topk_group,
        "group_score": "top2_sum",
        "num_token_non_padded": num_token_non_padded,
        "num_fused_shared_experts": num_shared,
        "apply_routed_scaling_factor_on_output": on_output,
        "routed_scaling_factor": factor,
    }
    if num_shared and not renormalize:
        checks.holds("routed_scaling_factor", "other than 0 with shared experts", factor != 0, factor)
        options["shared_expert_weight"] = 1.0 if on_output else 1.0 / factor
    found = numba_moe.select_experts(scores, topk - num_shared, correction_bias=float32_bias(bias), **options)
    if input_ids is not None:
        checks.holds("bias_alt", "given with `input_ids`", bias_alt is not None, None)
        token = checks.integer("bias_alt_token_id", bias_alt_token_id, -(2**31))
        alternative = numba_moe.select_experts(
            scores, topk - num_shared, correction_bias=float32_bias(bias_alt), **options
        )
        found = chosen_where(input_ids == token, alternative, found)
    weights, ids = found
    if packed_out is not None:
        packed_ids(weights, ids, packed_out)
    return weights, ids


def align_with_bucket(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    write_inactive_prefix_count: bool,
) -> None:
    """Group slots by expert after the slots of id -1, which `num_experts` counts as one more expert."""
    names = torch.arange(-1, num_experts - 1, dtype=torch.int32, device=topk_ids.device)
    counts = torch.empty_like(names) if write_inactive_prefix_count else None
    given = sorted_token_ids, expert_ids, num_tokens_post_pad[:1]
    align_into(topk_ids.contiguous() + 1, num_experts, block_size, *given, names, counts=counts)
    if counts is not None:
        num_tokens_post_pad[1:] = (counts[:1] + block_size - 1) // block_size


def _check_counts(num_tokens_post_pad: torch.Tensor, write_inactive_prefix_count: bool) -> None:
    """Check that there is room for the number of blocks without an expert, if that is wanted."""
    checks.boolean("write_inactive_prefix_count", write_inactive_prefix_count)
    length = num_tokens_post_pad.numel()
    fits = length == 2 or not write_inactive_prefix_count
    checks.holds("len(num_tokens_post_pad)", "2 with `write_inactive_prefix_count`", fits, length)


@apart("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
def moe_align_small_numel(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    *,
    write_inactive_prefix_count: bool = False,
) -> None:
    """Group slots by expert, padded to blocks; `num_experts` counts one more, for slots of id -1, which come first.

    With `write_inactive_prefix_count` the second of two numbers is that of the blocks of id -1. All is written whole.
    """
    _check_counts(num_tokens_post_pad, write_inactive_prefix_count)
    given = sorted_token_ids, expert_ids, num_tokens_post_pad
    align_with_bucket(topk_ids, num_experts, block_size, *given, write_inactive_prefix_count)


@apart("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
def jit_moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor,
    pad_sorted_token_ids: bool = False,
    *,
    write_inactive_prefix_count: bool = False,
    map_invalid_experts_to_sentinel: bool = False,
    pad_expert_ids: bool = False,
) -> None:
    """Group slots by expert, as `moe_align_small_numel` does: `moe_align_block_size` of SGLang's `moe_align`.

    With `map_invalid_experts_to_sentinel` ids of no expert count as -1; without it they are skipped. Padding and unused
    names are written in any case, so `pad_sorted_token_ids` and `pad_expert_ids` change nothing, and `cumsum_buffer`,
    SGLang's scratch, is left as it was.
    """
    _check_counts(num_tokens_post_pad, write_inactive_prefix_count)
    checks.boolean("pad_sorted_token_ids", pad_sorted_token_ids)
    checks.boolean("pad_expert_ids", pad_expert_ids)
    checks.boolean("map_invalid_experts_to_sentinel", map_invalid_experts_to_sentinel)
    if map_invalid_experts_to_sentinel:
        topk_ids = torch.where((topk_ids >= 0) & (topk_ids < num_experts - 1), topk_ids, -1)
    given = sorted_token_ids, expert_ids, num_tokens_post_pad
    align_with_bucket(topk_ids, num_experts, block_size, *given, write_inactive_prefix_count)


def moe_align_single_token(
    topk_ids: torch.Tensor, block_size: int, *, return_inactive_prefix_count: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give each of one token's distinct experts a block, in ascending order.

    Returned are sorted slots, [top_k * block_size], experts of blocks, [top_k], and the number of positions; with
    `return_inactive_prefix_count` that of blocks of id -1 too. The order is by a sort of torch, as no number of experts
    is given.
    """
    checks.boolean("return_inactive_prefix_count", return_inactive_prefix_count)
    block_size = checks.integer("block_size", block_size, 1)
    num_tokens, top_k = topk_ids.shape
    checks.holds("len(topk_ids)", "1, the one token", num_tokens == 1, num_tokens)
    expert_ids, order = topk_ids[0].to(torch.int32).sort(stable=True)
    slots = torch.full((top_k, block_size), top_k, dtype=torch.int32, device=topk_ids.device)
    slots[:, 0] = order
    count = torch.full((1,), top_k * block_size, dtype=torch.int32, device=topk_ids.device)
    if return_inactive_prefix_count:
        count = torch.cat([count, (expert_ids < 0).sum(dtype=torch.int32).view(1)])
    return slots.ravel(), expert_ids, count


@apart(
    *("expert_offsets", "problem_sizes1", "problem_sizes2"),
    *("input_permutation", "output_permutation", "blockscale_offsets"),
)
def cutlass_prepare_moe_input(
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
    *,
    transpose_problem_sizes: bool = False,
) -> None:
    """Write what a grouped GEMM of [tokens, k] by [k, 2n] and one of [tokens, n] by [n, k] read.

    `expert_offsets`: first rows of experts. `problem_sizes1` and 2: rows, columns and depth of each expert's GEMM, with
    `transpose_problem_sizes` columns before rows. `input_permutation`: the token of each row, 0 for unused rows.
    `output_permutation`: the row of each slot, -1 for a skipped one. `blockscale_offsets`: first rows where each
    expert's are padded to 128.
    """
    maps = (input_permutation, output_permutation)
    prepare_grouped(
        *(topk_ids, expert_offsets, problem_sizes1, problem_sizes2, *maps, num_experts, n, k, blockscale_offsets),
        transposed=transpose_problem_sizes,
    )
    input_permutation.masked_fill_(input_permutation == topk_ids.shape[0], 0)


def prepare_grouped(
    topk_ids: torch.Tensor,
    expert_offsets: torch.Tensor,
    problem_sizes1: torch.Tensor,
    problem_sizes2: torch.Tensor,
    input_permutation: torch.Tensor,
    output_permutation: torch.Tensor,
    num_experts: int,
    n: int,
    k: int,
    blockscale_offsets: torch.Tensor | None,
    transposed: bool = False,
) -> None:
    """Write what grouped GEMMs read; the token of a row that is not in use is `num_tokens`."""
    checks.boolean("transpose_problem_sizes", transposed)
    num_slots, top_k = topk_ids.numel(), topk_ids.shape[1]
    counts = torch.empty(num_experts, dtype=torch.int32, device=topk_ids.device)
    rows = output_permutation.view(topk_ids.shape)
    slots = numba_moe.moe_align_block_size(topk_ids, 1, num_experts, counts=counts, inv_sorted_idx=rows)[0]
    tokens = slots[:num_slots].view(input_permutation.shape)
    torch.div(tokens, top_k, rounding_mode="floor", out=input_permutation)
    expert_offsets.copy_(numba_moe.expert_offsets(counts))  # which are int64, and these are int32
    if blockscale_offsets is not None:
        blockscale_offsets.copy_(numba_moe.expert_offsets(counts, 128))
    count_column = int(transposed)
    for sizes, columns, depth in ((problem_sizes1, 2 * n, k), (problem_sizes2, k, n)):
        sizes[:, count_column] = counts
        sizes[:, 1 - count_column] = columns
        sizes[:, 2] = depth


@apart("topk_weights", "topk_ids")
def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_fused_shared_experts: int = 0,
) -> None:
    """Choose experts by sigmoid scores; a bias counts for the choice alone, a factor for renormalised weights alone.

    The last slot, if there is a fused shared expert, is that of expert num_experts. It weighs 1, or the sum of the
    other weights over the factor where these are not renormalised.
    """
    num_shared = checks.integer("num_fused_shared_experts", num_fused_shared_experts, 0, 1)
    checks.number("routed_scaling_factor", routed_scaling_factor)
    options: dict[str, Any] = {"scoring_func": "sigmoid", "renormalize": renormalize}
    options |= {"correction_bias": float32_bias(correction_bias), "num_fused_shared_experts": num_shared}
    options |= {"routed_scaling_factor": routed_scaling_factor, "apply_routed_scaling_factor_on_output": renormalize}
    choose_into(topk_weights, topk_ids, gating_output, **options)


def gemma4_fused_routing(
    gating_output: torch.Tensor, per_expert_scale: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by softmax scores, renormalise, and multiply each weight by its expert's scale: Gemma 4's router.

    A softmax over the chosen logits alone is the renormalised softmax over all.
    """
    num_experts = gating_output.shape[1]
    fits = per_expert_scale.shape == (num_experts,)
    checks.holds("per_expert_scale", f"of num_experts = {num_experts}", fits, per_expert_scale.shape[0])
    found = numba_moe.select_experts(gating_output, topk, renormalize=True, expert_scale=per_expert_scale.float())
    return found.topk_weights, found.topk_ids


def hash_topk(
    router_logits: torch.Tensor,
    input_ids: torch.Tensor,
    tid2eid: torch.Tensor,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sqrtsoftplus",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh the experts that a table has for each token's id, and renormalise: DeepSeek V4's first layers.

    The last slots are those of shared experts, which weigh ``1 / routed_scaling_factor``.
    """
    checks.choice("scoring_func", scoring_func, ("sqrtsoftplus",))
    found = numba_moe.weigh_experts(
        *(router_logits, tid2eid.contiguous()),
        input_ids=input_ids,
        scoring_func=SCORING[scoring_func],
        renormalize=True,
        num_fused_shared_experts=num_fused_shared_experts,
        routed_scaling_factor=routed_scaling_factor,
        apply_routed_scaling_factor_on_output=False,
    )
    return found.topk_weights, found.topk_ids


@apart("topk_values", "topk_indices", "routing_replay_out")
def fused_topk_deepseek(
    scores: torch.Tensor,
    bias: torch.Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: torch.Tensor,
    topk_indices: torch.Tensor,
    launch_with_pdl: bool = True,
    routing_replay_out: torch.Tensor | None = None,
    *,
    backend: str = "default",
) -> None:
    """Choose groups and then experts by sigmoid scores and a bias, renormalise, and scale: DeepSeek V3's gate.

    It is FlashInfer's, which SGLang calls where it is installed. `scores` are logits. `routing_replay_out`, which may
    have more rows, gets the ids too. How FlashInfer would launch its kernel, and which one, changes nothing here.
    """
    checks.boolean("launch_with_pdl", launch_with_pdl)
    checks.choice("backend", backend, ("default", "cake"))
    slots = topk_indices.shape[1]
    checks.holds("topk", f"the columns of `topk_indices`, {slots}", topk == slots, topk)
    options: dict[str, Any] = {"num_expert_group": n_group, "topk_group": topk_group, "group_score": "top2_sum"}
    options |= {"correction_bias": float32_bias(bias), "routed_scaling_factor": routed_scaling_factor}
    choose_into(topk_values, topk_indices, scores, scoring_func="sigmoid", renormalize=True, **options)
    if routing_replay_out is not None:
        routing_replay_out[: len(topk_indices)].copy_(topk_indices)


@apart("output")
def moe_sum_reduce_triton(input: torch.Tensor, output: torch.Tensor, routed_scaling_factor: float) -> None:
    """Sum each token's rows, and scale the sums."""
    into.moe_sum(output, input, None, routed_scaling_factor)


@apart("out")
def moe_topk_sum(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Sum each token's rows into `out`, and return it."""
    into.moe_sum(out, x)
    return out


def mask_topk_ids(topk_ids: torch.Tensor, num_token_non_padded: torch.Tensor) -> None:
    """Write -1 for the ids of tokens from a number on the device on, by torch."""
    topk_ids.masked_fill_(~real_tokens(topk_ids, "num_token_non_padded", num_token_non_padded), -1)


@apart("outputs")
def moe_fused_mul_sum(
    inputs: torch.Tensor,
    topk_weights: torch.Tensor,
    outputs: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    routed_scaling_factor: float | None = None,
    is_ep: bool = False,
) -> torch.Tensor:
    """Sum each token's rows of `inputs`, [num_tokens, top_k, hidden], weighted, times the factor, into `outputs`.

    Slots of ids below 0, and of experts that the map lacks or sends there, add nothing. `is_ep` changes nothing, as in
    SGLang, where the ids say so.
    """
    checks.boolean("is_ep", is_ep)
    checks.holds("topk_ids", "given with `expert_map`", expert_map is None or topk_ids is not None, None)
    places = slots_of(inputs)
    if topk_ids is not None:
        places = places.where(local_slots(topk_ids, expert_map), -1)
    if outputs is None:
        outputs = torch.empty_like(inputs[:, 0], memory_format=torch.contiguous_format)
    factor = 1.0 if routed_scaling_factor is None else routed_scaling_factor
    into.moe_unpermute(outputs, inputs.reshape(-1, inputs.shape[2]), topk_weights, places, factor)
    return outputs
