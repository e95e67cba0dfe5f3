"""The experts of each token and the slots grouped by them, for decode in one launch."""

from typing import Any

import torch

from numba_moe.device.primitives import WARP, reciprocal_of
from numba_moe.device.types import ROUTE_COLUMNS
from numba_moe.ops.align import moe_align_block_size
from numba_moe.ops.gating import which_kernel
from numba_moe.ops.gating.choose_and_sort import MOST_EXPERTS, MOST_THREADS, Blocks, Sorting, route_tokens
from numba_moe.ops.gating.select import (
    answer_by,
    backward,
    biases_of,
    check_data,
    extra_arrays,
    keep_selection,
    options_of,
    outputs_of,
    plan_selection,
    refuse,
    select_experts,
)
from numba_moe.reference import routing as reference
from numba_moe.reference.align import max_sorted_slots
from numba_moe.reference.dispatch import DispatchTables
from numba_moe.reference.gating import TopK
from numba_moe.reference.routing import RoutedTokens
from numba_moe.runtime import checks
from numba_moe.runtime.arrays import Array, contiguous
from numba_moe.runtime.launch import Launch, block_threads
from numba_moe.runtime.op import op
from numba_moe.sizes import sorted_slots

# Tokens for which one block chooses; up to MOST_TOKENS a cluster of blocks does, of so many each, if the device has
# clusters. On an H200, of 256 experts, one block takes 4.2 us for 16 tokens and 9.3 for 64, two launches 4.2 and 5.1.
ALONE, EACH, MOST_TOKENS = 16, 8, 64


@op(reference.route, writes=("identity_weights", "counts"), tallies=("counts",))
def route(
    gating_output: Array,
    top_k: int,
    block_size: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    correction_bias: Array | None = None,
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
    identity_weights: Array | None = None,
    num_token_non_padded: Array | None = None,
    is_padding: Array | None = None,
    dispatch: DispatchTables | None = None,
    counts: Array | None = None,
    counts_enabled: Array | None = None,
    indices_dtype: Any = "int32",
    expert_map: Array | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    inactive_expert_id: int = -1,
    num_physical_experts: int | None = None,
    out: RoutedTokens | None = None,
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
    out : tuple of a tuple of two arrays and one of three as in the result, optional
        Written: takes the result.

    Returns
    -------
    RoutedTokens
        topk : the `TopK` of `select_experts`. blocks : the `AlignedBlocks` of `moe_align_block_size` for its ids.

    Raises
    ------
    TypeError
        Wrong kind of array or dtype.
    ValueError
        What `select_experts` and `moe_align_block_size` refuse.

    Notes
    -----
    Order, ties and unused positions are those of the two ops. Up to 16 tokens, or 64 from compute capability 9.0 on,
    1024 slots and 512 experts take one launch, others the launches of both ops. On the caller's current stream, without
    synchronising; captures into CUDA graphs; allocates the results, and the scratch of both ops. The weights have the
    gradient of `select_experts`.

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


@route.outputs
def _(given: Any) -> tuple[Any, Any]:
    topk = outputs_of(given, given.top_k)
    num_slots = given.gating_output.shape[0] * topk[0].shape[1]
    length = sorted_slots(num_slots, given.block_size, _num_sorted(given), given.pad_sorted_ids)
    sizes = (length, -(-length // given.block_size), 1)
    return topk, tuple(contiguous(torch.int32, size) for size in sizes)


def _num_sorted(given: Any) -> Any:
    """Return how many experts, or places, slots are sorted by."""
    if given.num_physical_experts is not None:
        return given.num_physical_experts
    return given.gating_output.shape[1] - given.num_zero_experts + given.num_fused_shared_experts


@route.plan
def _(given: Any) -> Launch | None:
    """Return the launch of gating and alignment in one, if there is one for this call."""
    options = options_of(given)
    plan = plan_selection(given, options)
    gating_output = given.gating_output
    num_tokens = gating_output.shape[0]
    num_slots = num_tokens * (given.top_k + options.num_fused_shared_experts)
    block_size = checks.integer("block_size", given.block_size, 1)
    checks.boolean("pad_sorted_ids", given.pad_sorted_ids)
    checks.boolean("ignore_invalid_experts", given.ignore_invalid_experts)
    inactive = checks.integer("inactive_expert_id", given.inactive_expert_id, -(2**31))
    places = given.num_physical_experts
    with_places = (options.dispatch is not None) == (places is not None)
    checks.holds("num_physical_experts", "given with `dispatch`, and with it alone", with_places, places)
    if places is not None:
        checks.integer("num_physical_experts", places, 1)
    num_sorted = _num_sorted(given)
    expert_map, map_bytes = given.expert_map, 0
    if expert_map is not None:
        checks.array("expert_map", expert_map, checks.IDS, (1,), like=("gating_output", gating_output))
        checks.shape("expert_map", expert_map, (num_sorted,), "(experts that slots are sorted by,)")
        map_bytes = expert_map.dtype.itemsize
    num_positions = max_sorted_slots(num_slots, block_size, num_sorted, given.pad_sorted_ids)
    checks.fits_int32("gating_output", num_positions, "the number of padded positions")
    most = block_threads(MOST_THREADS)
    few = num_tokens <= MOST_TOKENS and num_slots <= most and num_sorted <= MOST_EXPERTS
    columns = next((columns for columns in ROUTE_COLUMNS if few and plan.columns and columns >= plan.columns), None)
    if columns is None:
        return None
    num_blocks = 1 if num_tokens <= ALONE else -(-num_tokens // EACH)
    threads = min(most, -(-max(num_slots, num_sorted, WARP * -(-num_tokens // num_blocks)) // 128) * 128)
    by_map = int(given.ignore_invalid_experts and map_bytes > 0)
    sorting = Sorting(which_kernel.sized(expert_map), map_bytes, by_map, num_sorted)
    num_names = -(-num_positions // block_size)
    aligned = given.out is None or given.out.values[1].values[0].address == 0
    num_words = num_positions // 4 if aligned else 0
    sizes = (num_positions, num_words, num_names, block_size, *reciprocal_of(block_size), inactive)
    launch = Launch(
        *(route_tokens, gating_output.device, num_blocks, threads, *plan.records, sorting),
        Blocks(torch.int32, torch.int32, torch.int32, *sizes),
        shared_bytes=4 * -(-num_slots // WARP) * num_sorted,
        one_cluster=num_blocks > 1,
        columns=columns,
        role=plan.role,
    )
    return launch if launch.fits() else None


route.validate(check_data)
route.refuse(refuse)
route.saves(keep_selection)
route.backward(backward)


@route.on_cpu
def _(given: Any) -> Any:
    return answer_by(reference.route, given)


@route.run
def _(
    route_tokens: Launch | None,
    given: Any,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
) -> None:
    if route_tokens is None:
        selection = {name: getattr(given, name) for name in select_experts.declaration.names if name != "out"}
        select_experts(**selection, out=TopK(topk_weights, topk_ids))
        moe_align_block_size(
            *(topk_ids if topk_ids.dtype in checks.IDS else topk_ids.int(), given.block_size, _num_sorted(given)),
            *(given.expert_map, given.pad_sorted_ids, given.ignore_invalid_experts),
            inactive_expert_id=given.inactive_expert_id,
            out=(sorted_token_ids, expert_ids, num_tokens_post_padded),
        )
        return
    logit_bias, correction_bias = biases_of(given)
    route_tokens(
        gating_output=given.gating_output,
        correction_bias=correction_bias,
        logit_bias=logit_bias,
        expert_map=given.expert_map,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        sorted_slots=sorted_token_ids,
        expert_ids=expert_ids,
        num_padded=num_tokens_post_padded,
        **extra_arrays(given),
    )
