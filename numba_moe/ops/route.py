"""Choose the experts of each token and group the slots by expert: `route`, one launch for decode."""

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

# One block serves up to ALONE tokens. Where the device has clusters, a cluster serves up to MOST_TOKENS, EACH tokens to
# a block. H200, 256 experts: 16 tokens take 4.2 us in one block and 4.2 us in two launches; 64 tokens take 9.3 us and
# 5.1 us.
ALONE, EACH, MOST_TOKENS = 16, 8, 64


@op(reference.route, writes=("identity_weights", "counts"), tallies=("counts",), like=select_experts)
def route(
    gating_output: Array,
    top_k: int,
    block_size: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    renormalize_epsilon: float = 0.0,
    correction_bias: Array | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str | None = None,
    routed_scaling_factor: float = 1.0,
    expert_scale: Array | None = None,
    softcap: float = 0.0,
    bias_mode: str = "choice",
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float | None = None,
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
    """Choose the experts of each token and group the slots by expert; few tokens take one launch.

    Parameters
    ----------
    block_size : int
        Rows of one GEMM block.
    indices_dtype : {"int32", "int64", "int16"}
        Dtype of `topk_ids`: its name, or a dtype object of that name.
    expert_map : array of int32 or int64, shape [num_sorted], optional
        The map of `moe_align_block_size` over the experts that slots are sorted by. num_sorted is
        `num_physical_experts` if that is given, and otherwise num_real + num_fused_shared_experts.
    pad_sorted_ids : bool
        Round the length of `sorted_token_ids` up to a multiple of the block size.
    ignore_invalid_experts : bool
        With a map: skip the slots of other ranks' experts and group by this rank's ids.
    inactive_expert_id : int
        Value of `expert_ids` after the last block in use.
    num_physical_experts : int, optional
        Number of physical experts. It must be given with `dispatch`, and only then.
    out : nested tuple of two and three arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    RoutedTokens
        topk : the `TopK` that `select_experts` returns. blocks : the `AlignedBlocks` that `moe_align_block_size`
        returns for its ids.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Any value that `select_experts` or `moe_align_block_size` refuses.

    Notes
    -----
    Order, ties and unused positions are those of the two ops. One launch serves up to 16 tokens (64 tokens from compute
    capability 9.0 on), 1024 slots and 512 experts. Larger calls take the launches of both ops. The call runs on the
    caller's current stream without synchronising, and CUDA graphs can capture it. It allocates the results and the
    scratch of both ops. The weights have the gradient of `select_experts`.

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
    """Return the number of experts, or of physical experts, that slots are sorted by."""
    if given.num_physical_experts is not None:
        return given.num_physical_experts
    return given.gating_output.shape[1] - given.num_zero_experts + given.num_fused_shared_experts


@route.plan
def _(given: Any) -> Launch | None:
    """Return the one launch that gates and aligns, or None where the call takes the launches of both ops."""
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
