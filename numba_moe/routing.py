"""The experts of each token and the slots grouped by them, for decode in one launch."""

from typing import Any, NamedTuple

import torch

from numba_moe.align import moe_align_block_size
from numba_moe.gating import plans
from numba_moe.gating.routing import MOST_EXPERTS, MOST_THREADS, Blocks, Sorting, route_tokens
from numba_moe.gating.selection import (
    NONE,
    asked,
    options_from,
    options_of,
    plan_selection,
    refuse_gradient,
    refuse_overlaps,
    select_experts,
)
from numba_moe.reference.align import AlignedBlocks, max_sorted_slots
from numba_moe.reference.gating import TopK
from numba_moe.reference.routing import RoutedTokens
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.parameters import ROUTE_COLUMNS
from numba_moe.runtime.plans import Layout, layout, new_tuple, planned
from numba_moe.runtime.primitives import WARP, reciprocal_of

# Tokens for which one block chooses; up to MOST_TOKENS a cluster of blocks does, of so many each, if the device has
# clusters. On an H200, of 256 experts, one block takes 4.2 us for 16 tokens and 9.3 for 64, two launches 4.2 and 5.1.
ALONE, EACH, MOST_TOKENS = 16, 8, 64


class RoutePlan(NamedTuple):
    """The results, and the launch of gating and alignment in one, if there is one for so many tokens."""

    topk_weights: arrays.Contiguous
    topk_ids: arrays.Contiguous
    sorted_token_ids: arrays.Contiguous
    expert_ids: arrays.Contiguous
    num_tokens_post_padded: arrays.Contiguous
    num_sorted: int
    route: Launch | None


@planned
def _plan_route(
    gating_output: Layout,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    scoring_func: str,
    correction_bias: Layout | None,
    group_score: str | None,
    routed_scaling_factor: float,
    bias_mode: str,
    block_size: int,
    expert_map: Layout | None,
    pad_sorted_ids: bool,
    ignore_invalid_experts: bool,
    inactive_expert_id: int,
    num_physical_experts: int | None,
    *wanted: Any,
) -> RoutePlan:
    options = options_from(wanted)
    rules = (top_k, num_expert_group, topk_group, renormalize, scoring_func, correction_bias, group_score)
    plan = plan_selection(gating_output, *rules, routed_scaling_factor, bias_mode, options)
    num_tokens, num_slots = plan.topk_ids.shape[0], plan.topk_ids.shape[0] * plan.topk_ids.shape[1]
    block_size = checks.integer("block_size", block_size, 1)
    checks.boolean("pad_sorted_ids", pad_sorted_ids)
    checks.boolean("ignore_invalid_experts", ignore_invalid_experts)
    inactive = checks.integer("inactive_expert_id", inactive_expert_id, -(2**31))
    num_sorted = gating_output.shape[1] - options.num_zero_experts + options.num_fused_shared_experts
    needed = options.dispatch is not None
    given = num_physical_experts
    checks.holds(
        "num_physical_experts", "given with `dispatch`, and with it alone", needed == (given is not None), given
    )
    if given is not None:
        num_sorted = checks.integer("num_physical_experts", given, 1)
    map_bytes = 0
    if expert_map is not None:
        checks.array("expert_map", expert_map, checks.IDS, (1,), like=("gating_output", gating_output))
        checks.shape("expert_map", expert_map, (num_sorted,), "(experts that slots are sorted by,)")
        map_bytes = expert_map.dtype.itemsize
    num_positions = max_sorted_slots(num_slots, block_size, num_sorted, pad_sorted_ids)
    checks.fits_int32("gating_output", num_positions, "the number of padded positions")
    num_names = -(-num_positions // block_size)
    route = None
    most = block_threads(MOST_THREADS)
    few = num_tokens <= MOST_TOKENS and num_slots <= most and num_sorted <= MOST_EXPERTS
    columns = next((columns for columns in ROUTE_COLUMNS if few and plan.columns and columns >= plan.columns), None)
    if columns is not None:
        num_blocks = 1 if num_tokens <= ALONE else -(-num_tokens // EACH)
        threads = min(most, -(-max(num_slots, num_sorted, WARP * -(-num_tokens // num_blocks)) // 128) * 128)
        by_map = int(ignore_invalid_experts and map_bytes > 0)
        sorting = Sorting(plans.sized(expert_map), map_bytes, by_map, num_sorted)
        sizes = (num_positions, num_positions // 4, num_names, block_size, *reciprocal_of(block_size), inactive)
        blocks = Blocks(torch.int32, torch.int32, torch.int32, *sizes)
        launch = Launch(
            *(route_tokens, gating_output.device, num_blocks, threads, *plan.records, sorting, blocks),
            shared_bytes=4 * -(-num_slots // WARP) * num_sorted,
            one_cluster=num_blocks > 1,
            columns=columns,
            role=plan.role,
        )
        route = launch if launch.fits() else None
    return RoutePlan(
        *(plan.topk_weights, plan.topk_ids),
        arrays.contiguous(torch.int32, num_positions),
        arrays.contiguous(torch.int32, num_names),
        arrays.contiguous(torch.int32, 1),
        *(num_sorted, route),
    )


@arrays.public_writing("identity_weights", "counts")
def route(
    gating_output: Any,
    top_k: int,
    block_size: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    correction_bias: Any = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    bias_mode: str = "choice",
    num_fused_shared_experts: int = 0,
    apply_routed_scaling_factor_on_output: bool = True,
    num_zero_experts: int = 0,
    zero_expert_id: int = -1,
    identity_weights: Any = None,
    num_token_non_padded: Any = None,
    is_padding: Any = None,
    dispatch: Any = None,
    counts: Any = None,
    counts_enabled: Any = None,
    indices_dtype: Any = "int32",
    expert_map: Any = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    inactive_expert_id: int = -1,
    num_physical_experts: int | None = None,
) -> RoutedTokens:
    """Choose the experts of each token and group the slots by expert, in one launch where the tokens are few.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    top_k : int
        Experts per token, at most those of `topk_group` groups.
    block_size : int
        Rows of one GEMM block.
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt", "raw"}
        How logits become scores.
    renormalize : bool
        Divide the weights of a token by their sum (by 1 if the sum is not positive).
    correction_bias : array of float32, shape [num_experts], optional
        Added to the scores for the choice of groups and experts alone; the weights stay the scores.
    num_expert_group : int
        Number of groups, of which `topk_group` are chosen first; consecutive experts form a group, all of one size.
    topk_group : int
        Groups per token.
    group_score : {"max", "top2_sum", "topk_sum"}, optional
        As in `grouped_topk`; without a meaning where there is one group.
    routed_scaling_factor : float
        Multiplies the weights, after renormalising.
    softcap : float
        Keeps finite logits x within it: ``softcap * tanh(x / softcap)``; 0 or infinity for none.
    bias_mode : {"choice", "logits"}
        "choice": the correction bias moves the choice alone. "logits": it is added to the logits, after the cap, and so
        is in the weights, as SGLang has it for softmax.
    num_fused_shared_experts : int
        So many slots more for each token, behind the others, of experts num_real, num_real + 1, ..., where num_real is
        num_experts less the zero experts. They weigh the sum of the token's scores, or 1 if renormalised.
    apply_routed_scaling_factor_on_output : bool
        Multiply the weights by the factor. Otherwise the caller multiplies what the layer computes by it, so shared
        experts weigh their part divided by it.
    num_zero_experts : int
        So many of the last experts give a token back as it is: their slots get `zero_expert_id` and weight 0.
    zero_expert_id : int
        What stands for them: -1, or an expert that is computed in vain, as vLLM has it with 0.
    identity_weights : array of float32, shape [num_tokens], optional
        Written: what the zero experts of each token weigh.
    num_token_non_padded : array of int32 or int64, shape [1] or [], optional
        On the device: tokens from there on are padding, with ids -1 and weights 0.
    is_padding : array of bool, shape [num_tokens], optional
        Which tokens are padding.
    dispatch : DispatchTables, optional
        Returned are physical ids: what `placement.dispatch_ids` makes of the ids with these arguments;
        `ExpertDispatch.tables` has them for a layer. Zero experts have no place.
    counts : array of int32 or int64, shape [any] or [rows, any], optional
        Written: 1 is added for each slot at the id that is returned, if there is such a counter. Padding and zero
        experts are not counted. Token t adds to row t % rows, of which there is a power of two: with 32 of them
        counters are less busy, and many tokens are counted sooner.
    counts_enabled : array of int32, shape [1], optional
        0 on the device: nothing is counted.
    indices_dtype : {"int32", "int64", "int16"}
        Of `topk_ids`; a dtype of that name will do.
    expert_map : array of int32 or int64, shape [num_sorted], optional
        As in `moe_align_block_size`, of the experts that slots are sorted by: num_real + num_fused_shared_experts, or
        num_physical_experts.
    pad_sorted_ids : bool
        Round the length of `sorted_token_ids` up to a multiple of the block size.
    ignore_invalid_experts : bool
        With a map: leave out the slots of other ranks' experts.
    inactive_expert_id : int
        What `expert_ids` holds past the last block in use.
    num_physical_experts : int, optional
        With `dispatch`: how many places there are.

    Returns
    -------
    RoutedTokens
        topk : the `TopK` of `select_experts`. blocks : the `AlignedBlocks` of `moe_align_block_size` for its ids.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        What `select_experts` and `moe_align_block_size` refuse; logits that require a gradient.

    Notes
    -----
    Order, ties and unused positions are those of the two ops. Up to 16 tokens, or 64 from compute capability 9.0 on,
    1024 slots and 512 experts take one launch, others the launches of both ops. On the caller's current stream, without
    synchronising; captures into CUDA graphs; allocates the results, and the scratch of both ops.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[3, 1, 0], [0, 1, 2], [1, 3, 0]], np.float32)
    >>> topk, blocks = route(logits, 2, block_size=4)
    >>> topk.topk_ids.tolist()
    [[0, 1], [2, 1], [1, 0]]
    >>> blocks.sorted_token_ids.tolist(), blocks.expert_ids.tolist()
    ([0, 5, 6, 6, 1, 3, 4, 6, 2, 6, 6, 6, 6, 6, 6], [0, 1, 2, -1])
    """
    chosen = (top_k, num_expert_group, topk_group, renormalize, scoring_func)
    options = options_of(
        softcap,
        num_fused_shared_experts,
        apply_routed_scaling_factor_on_output,
        num_zero_experts,
        zero_expert_id,
        identity_weights,
        num_token_non_padded,
        is_padding,
        dispatch,
        counts,
        counts_enabled,
        indices_dtype,
    )
    padding = (pad_sorted_ids, ignore_invalid_experts, inactive_expert_id, num_physical_experts)
    rules = (layout(correction_bias), group_score, routed_scaling_factor, bias_mode)
    plan = _plan_route(
        layout(gating_output), *chosen, *rules, block_size, layout(expert_map), *padding, *asked(options)
    )
    if options is not NONE:
        others = {"correction_bias": correction_bias, "expert_map": expert_map}
        refuse_overlaps(options, gating_output=gating_output, **others)
    refuse_gradient(gating_output)
    if plan.route is None or checks.VALIDATE or arrays.answered_by_reference(gating_output):
        topk = select_experts(
            *(gating_output, top_k),
            scoring_func=scoring_func,
            renormalize=renormalize,
            correction_bias=correction_bias,
            num_expert_group=num_expert_group,
            topk_group=topk_group,
            group_score=group_score,
            routed_scaling_factor=routed_scaling_factor,
            bias_mode=bias_mode,
            **options._asdict(),
        )
        ids = topk.topk_ids if topk.topk_ids.dtype in checks.IDS else topk.topk_ids.int()
        mapped = (expert_map, pad_sorted_ids, ignore_invalid_experts)
        blocks = moe_align_block_size(ids, block_size, plan.num_sorted, *mapped, inactive_expert_id=inactive_expert_id)
        return new_tuple(RoutedTokens, (topk, blocks))
    topk_weights = arrays.empty(*plan.topk_weights)
    topk_ids = arrays.empty(*plan.topk_ids)
    sorted_token_ids = arrays.empty(*plan.sorted_token_ids)
    expert_ids = arrays.empty(*plan.expert_ids)
    num_padded = arrays.empty(*plan.num_tokens_post_padded)
    logit_bias, moving = (correction_bias, None) if bias_mode == "logits" else (None, correction_bias)
    plan.route(
        gating_output=gating_output,
        correction_bias=moving,
        logit_bias=logit_bias,
        expert_map=expert_map,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        sorted_slots=sorted_token_ids,
        expert_ids=expert_ids,
        num_padded=num_padded,
        **options.arrays(),
    )
    topk = new_tuple(TopK, (topk_weights, topk_ids))
    return new_tuple(RoutedTokens, (topk, new_tuple(AlignedBlocks, (sorted_token_ids, expert_ids, num_padded))))
