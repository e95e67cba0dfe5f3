"""Losses of a router with a gradient by its logits: how even its scores are, and how large its logits are.

A token's part of the load balancing loss is ``factor * sum_e counts[e] * share_e``: it needs the counts of its sequence
and nothing of other tokens. So a warp reads its row once, forward, and keeps four numbers: the largest logit, the sum
of exponentials, the sum of scores, and the sum of scores times counts. Each warp adds what its tokens make in order,
and one block adds the warps' sums in order, so the same bits come out at every run.
"""

from typing import Annotated, Any, NamedTuple

import torch

from numba_moe.device.dialect import cuda, float32, int32, int64
from numba_moe.device.instructions import (
    add_to_global,
    atomic_add,
    divide,
    flat,
    larger,
    load_float,
    log,
    present,
    quotient,
    store_float,
    wait_for_earlier,
)
from numba_moe.device.primitives import NEGATIVE_INFINITY, WARP, block_sums, exp, fill, warp_index, warp_max, warp_sum
from numba_moe.device.types import (
    LIKE,
    Float32,
    Float32Array,
    Int32,
    Int32Array,
    OptionalIds,
    OptionalInt32Array,
)
from numba_moe.ops.gating import which_kernel
from numba_moe.ops.gating.extras import Padding, is_padded
from numba_moe.ops.gating.scores import SCORING, SOFTMAX, Rows, load_first, score_of
from numba_moe.ops.gating.weight_gradients import slope_of
from numba_moe.reference import training as reference
from numba_moe.reference.training import SequenceCounts
from numba_moe.runtime import arrays, checks
from numba_moe.runtime.arrays import Array, Contiguous, contiguous
from numba_moe.runtime.compile import MOST_SHARED_BYTES
from numba_moe.runtime.launch import Launch, block_threads, warps
from numba_moe.runtime.op import op

# Scores that are at least 0, so that a part of them is one of a whole.
SHARED_SCORING = SCORING[:3]
# The number of warps that an H200 runs at a time.
MOST_WARPS = 132 * 32
COUNTED = (torch.int32, torch.float32)
# What says which tokens take part, and in which sequence.
WHERE = ("sequence_ids", "num_token_non_padded", "is_padding")


OptionalNumbers = Annotated[Any, "int32", "float32", None]  # counts, or means of counts
OptionalLikeCounts = Annotated[Any, LIKE, "tokens_per_expert", None]


class Span(NamedTuple):
    """How many sequences there are, and how many tokens each has where nothing else says so."""

    num_sequences: Int32
    sequence_length: Int32


class Picks(NamedTuple):
    """The experts of each token, absent where tokens alone are counted."""

    topk_ids: OptionalIds  # [num_rows, top_k]
    num_rows: Int32
    top_k: Int32
    num_experts: Int32


class Totals(NamedTuple):
    """The counters that a kernel adds to."""

    slot_counts: OptionalInt32Array  # [num_sequences, num_experts], absent where topk_ids are
    token_counts: Int32Array  # [num_sequences]
    num_in_shared: Int32  # num_sequences * (num_experts + 1) if a block counts in shared memory first, or else 0


class Balance(NamedTuple):
    """What the loss of a token's scores depends on beside them."""

    tokens_per_expert: OptionalNumbers  # [num_sequences, num_experts]
    scoring_func: Int32
    balance_factor: Float32  # coefficient * num_experts / (top_k * num_sequences)


class RowSums(NamedTuple):
    """What is known of a row once it is read; of a softmax the scores are exponentials."""

    peak: Any
    total: Any  # of exponentials
    scores: Any  # the sum of scores
    dot: Any  # the sum of scores times counts


@cuda.jit(device=True)
def sequence_of(token, sequence_ids, span, padding):
    """Return the sequence of a token, -1 for padding."""
    found = int32(quotient(int32(token), span.sequence_length))
    if present(sequence_ids):
        found = sequence_ids[token]
    if found < 0 or found >= span.num_sequences or is_padded(token, padding):
        return int32(-1)
    return int32(found)


@cuda.jit(launch_bounds=1024)
def count_slots_by_sequence(
    picks: Picks,
    sequence_ids: OptionalInt32Array,  # [num_rows]; without them consecutive tokens make a sequence
    span: Span,
    padding: Padding,
    totals: Totals,
):
    """Count a token and its slots, by a thread, and one a grid further on; shared int32 [num_in_shared]."""
    wait_for_earlier()
    in_block = flat(cuda.shared.array(0, int32))
    num_in_shared = totals.num_in_shared
    thread = int32(cuda.threadIdx.x)
    threads = int32(cuda.blockDim.x)
    fill(in_block, num_in_shared, 0, thread, threads)
    cuda.syncthreads()
    num_counts = int32(span.num_sequences * picks.num_experts)
    token = int32(cuda.blockIdx.x * threads + thread)
    while token < picks.num_rows:
        sequence = sequence_of(token, sequence_ids, span, padding)
        if sequence >= 0:
            if num_in_shared > 0:
                atomic_add(in_block, int32(num_counts + sequence), 1)
            else:
                add_to_global(totals.token_counts, sequence, 1)
            for pick in range(picks.top_k):
                expert = int64(picks.topk_ids[int64(token) * picks.top_k + pick])
                if expert >= 0 and expert < picks.num_experts:
                    index = int32(sequence * picks.num_experts + int32(expert))
                    if num_in_shared > 0:
                        atomic_add(in_block, index, 1)
                    else:
                        add_to_global(totals.slot_counts, index, 1)
        token = int32(token + cuda.gridDim.x * threads)
    cuda.syncthreads()
    index = thread
    while index < num_in_shared:
        count = in_block[index]
        if count > 0 and index < num_counts:
            add_to_global(totals.slot_counts, index, count)
        elif count > 0:
            add_to_global(totals.token_counts, int32(index - num_counts), count)
        index = int32(index + threads)


@cuda.jit(device=True)
def size_of(sequence, span, sequence_sizes):
    """Return how many tokens a sequence has, as a float32."""
    if present(sequence_sizes):
        return float32(sequence_sizes[sequence])
    return float32(span.sequence_length)


@cuda.jit(device=True)
def size_of_all(span, sequence_sizes):
    """Return how many tokens all sequences have, 1 at least, by a warp."""
    total = float32(0.0)
    sequence = int32(cuda.laneid)
    while sequence < span.num_sequences:
        total += size_of(sequence, span, sequence_sizes)
        sequence = int32(sequence + WARP)
    return larger(warp_sum(total), float32(1.0))


@cuda.jit(device=True)
def factor_of(sequence, span, sequence_sizes, balance):
    """Return what the scores times counts of a token are multiplied by."""
    inverse = divide(float32(1.0), larger(size_of(sequence, span, sequence_sizes), float32(1.0)))
    return float32(balance.balance_factor) * inverse * inverse


@cuda.jit(device=True)
def count_of(expert, first_count, balance):
    """Return how many slots an expert has in a sequence, whose counts begin at an index."""
    if present(balance.tokens_per_expert):
        return float32(balance.tokens_per_expert[first_count + expert])
    return float32(0.0)


@cuda.jit(device=True)
def read_row(rows, row, first_count, balance):
    """Read a row once and return its sums, the same in every lane; a NaN makes them NaN."""
    logits = cuda.local.array(8, float32)
    peak = float32(NEGATIVE_INFINITY)
    total = float32(0.0)
    scores = float32(0.0)
    dot = float32(0.0)
    scoring_func = balance.scoring_func
    expert = int32(8 * cuda.laneid)
    while expert < rows.num_experts:
        load_first(rows.gating_output, row + expert, rows.num_experts - expert, rows.vector, logits)
        highest = peak
        for i in range(8):
            highest = larger(highest, logits[i])
        if highest > peak:
            scale = exp(peak - highest)
            total *= scale
            if scoring_func == SOFTMAX:
                dot *= scale
            peak = highest
        for i in range(8):
            if expert + i < rows.num_experts:
                power = float32(0.0)
                if logits[i] != float32(NEGATIVE_INFINITY):
                    power = exp(logits[i] - peak)
                total += power
                score = power
                if scoring_func != SOFTMAX:
                    score = score_of(logits[i], scoring_func, float32(0.0), float32(1.0))
                    scores += score
                dot += score * count_of(expert + i, first_count, balance)
        expert = int32(expert + 8 * WARP)
    highest = warp_max(peak)
    scale = float32(1.0)
    if peak < highest:
        scale = exp(peak - highest)
    total = warp_sum(total * scale)
    if scoring_func == SOFTMAX:
        return RowSums(highest, total, total, warp_sum(dot * scale))
    return RowSums(highest, total, warp_sum(scores), warp_sum(dot))


@cuda.jit
def sum_losses(
    rows: Rows,
    sequence_ids: OptionalInt32Array,  # [num_tokens]
    span: Span,
    padding: Padding,
    sequence_sizes: OptionalLikeCounts,  # [num_sequences]
    balance: Balance,
    warp_losses: Float32Array,  # [warps of the grid, 2]
):
    """Sum what the tokens of a warp make, one of them a grid's warps behind the other."""
    wait_for_earlier()
    warp = warp_index()
    num_warps = int32(cuda.gridDim.x * (cuda.blockDim.x >> 5))
    of_balance = float32(0.0)
    of_squares = float32(0.0)
    token = warp
    while token < rows.num_tokens:
        sequence = sequence_of(token, sequence_ids, span, padding)
        if sequence >= 0:
            sums = read_row(rows, int64(token) * rows.row_stride, int64(sequence) * rows.num_experts, balance)
            log_sum = sums.peak + log(sums.total)
            of_balance += divide(sums.dot, sums.scores) * factor_of(sequence, span, sequence_sizes, balance)
            of_squares += log_sum * log_sum
        token = int32(token + num_warps)
    if cuda.laneid == 0:
        warp_losses[2 * warp] = of_balance
        warp_losses[2 * warp + 1] = of_squares


@cuda.jit(launch_bounds=1024)
def add_losses(
    span: Span,
    sequence_sizes: OptionalNumbers,  # [num_sequences]
    z_factor: Float32,
    warp_losses: Float32Array,  # [num_warps, 2]
    num_warps: Int32,
    losses: Float32Array,  # [2]
):
    """Add the sums of all warps, in one block of any whole number of warps."""
    wait_for_earlier()
    warp_sums = flat(cuda.shared.array(WARP, float32))
    of_balance = float32(0.0)
    of_squares = float32(0.0)
    warp = int32(cuda.threadIdx.x)
    while warp < num_warps:
        of_balance += warp_losses[2 * warp]
        of_squares += warp_losses[2 * warp + 1]
        warp = int32(warp + cuda.blockDim.x)
    _, of_balance = block_sums(of_balance, warp_sums, float32)
    _, of_squares = block_sums(of_squares, warp_sums, float32)
    num_tokens = size_of_all(span, sequence_sizes)
    if cuda.threadIdx.x == 0:
        losses[0] = of_balance
        losses[1] = divide(of_squares * float32(z_factor), num_tokens)


class LossGradients(NamedTuple):
    """The gradient by the two losses, and that by the logits, which is written."""

    grad_losses: Float32Array  # [2]
    grad_logits: Annotated[Any, LIKE, "gating_output"]  # [num_tokens, num_experts]


@cuda.jit
def differentiate_losses(
    rows: Rows,
    sequence_ids: OptionalInt32Array,  # [num_tokens]
    span: Span,
    padding: Padding,
    sequence_sizes: OptionalLikeCounts,  # [num_sequences]
    balance: Balance,
    z_factor: Float32,
    gradients: LossGradients,
):
    """Write the gradient of a token's row, by a warp, a lane every 32nd expert; the grid has a warp per token."""
    wait_for_earlier()
    token = warp_index()
    if token >= rows.num_tokens:
        return
    row = int64(token) * rows.row_stride
    grad_row = int64(token) * rows.num_experts
    sequence = sequence_of(token, sequence_ids, span, padding)
    first_count = int64(max(sequence, 0)) * rows.num_experts
    peak = float32(0.0)
    by_power = float32(0.0)
    by_score = float32(0.0)
    mean = float32(0.0)
    if sequence >= 0:
        sums = read_row(rows, row, first_count, balance)
        peak = sums.peak
        inverse = divide(float32(1.0), sums.total)
        log_sum = peak + log(sums.total)
        z_factor = divide(float32(z_factor) * gradients.grad_losses[1], size_of_all(span, sequence_sizes))
        by_power = float32(2.0) * z_factor * log_sum * inverse
        mean = divide(sums.dot, sums.scores)
        by_score = divide(factor_of(sequence, span, sequence_sizes, balance) * gradients.grad_losses[0], sums.scores)
    expert = int32(cuda.laneid)
    while expert < rows.num_experts:
        grad = float32(0.0)
        if sequence >= 0:
            logit = load_float(rows.gating_output, row + expert)
            power = exp(logit - peak)
            slope = power
            if balance.scoring_func != SOFTMAX:
                slope = slope_of(logit, balance.scoring_func)
            grad = by_power * power + by_score * slope * (count_of(expert, first_count, balance) - mean)
        store_float(gradients.grad_logits, grad_row + expert, grad)
        expert = int32(expert + WARP)


def _sequences(given: Any, num_rows: int, like: tuple[str, Any]) -> tuple[Any, Span, Padding]:
    """Check which tokens take part, and in which sequence."""
    num_sequences = checks.integer("num_sequences", given.num_sequences, 1)
    if given.sequence_ids is None:
        rule = f"a divisor of num_tokens = {num_rows}, where there are no `sequence_ids`"
        checks.holds("num_sequences", rule, num_rows % num_sequences == 0, num_sequences)
    else:
        checks.array("sequence_ids", given.sequence_ids, (torch.int32,), (1,), like=like)
        checks.shape("sequence_ids", given.sequence_ids, (num_rows,), "(num_tokens,)")
    padding = which_kernel.padding_of(given, num_rows, like)
    return given.sequence_ids, Span(num_sequences, max(1, num_rows // num_sequences)), padding


def _count(topk_ids: Any, num_rows: int, num_experts: int, records: tuple[Any, ...], device: torch.device) -> Launch:
    """Plan to count tokens, and with ids their slots."""
    threads = block_threads(256)
    num_counts = records[1].num_sequences * ((num_experts if topk_ids else 0) + 1)
    num_in_shared = num_counts if 4 * num_counts <= MOST_SHARED_BYTES else 0
    picks = Picks(topk_ids, num_rows, topk_ids.shape[1] if topk_ids else 0, num_experts if topk_ids else 0)
    totals = Totals(torch.int32 if topk_ids else None, torch.int32, num_in_shared)
    blocks = -(-num_rows // threads)
    return Launch(
        *(count_slots_by_sequence, device, blocks, threads, picks, *records, totals), shared_bytes=4 * num_in_shared
    )


@op(reference.count_by_sequence)
def count_by_sequence(
    topk_ids: Array,
    num_experts: int,
    *,
    num_sequences: int = 1,
    sequence_ids: Array | None = None,
    num_token_non_padded: Array | None = None,
    is_padding: Array | None = None,
    out: SequenceCounts | None = None,
) -> SequenceCounts:
    """Count the slots of each expert in each sequence, and its tokens.

    Parameters
    ----------
    topk_ids : array of int32 or int64, shape [num_tokens, top_k]
        Contiguous. Ids outside ``[0, num_experts)`` are not counted.
    num_experts : int
        Number of experts.
    num_sequences : int
        Sequences. Without `sequence_ids` consecutive tokens make one, of the same number each.
    sequence_ids : array of int32, shape [num_tokens], optional
        The sequence of each token; a token whose id is outside ``[0, num_sequences)`` is padding.
    num_token_non_padded : array of int32 or int64, shape [1] or [], optional
        Number of real tokens, on the device. The tokens after them are padding.
    is_padding : array of bool, shape [num_tokens], optional
        Which tokens are padding, and take no part.
    out : tuple of two arrays as in the result, optional
        Written: memory for the result.

    Returns
    -------
    SequenceCounts
        tokens_per_expert : int32 [num_sequences, num_experts]. num_tokens : int32 [num_sequences].

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape or layout, mixed devices, sequences that do not divide the tokens.

    Notes
    -----
    The op is one launch on the caller's current stream without synchronising, and CUDA graphs can capture it.

    Examples
    --------
    >>> import numpy as np
    >>> count_by_sequence(np.array([[0, 2], [2, 1], [2, 0], [0, 1]]), 3, num_sequences=2)
    SequenceCounts(tokens_per_expert=array([[1, 1, 2],
           [2, 1, 1]], dtype=int32), num_tokens=array([2, 2], dtype=int32))
    """


@count_by_sequence.outputs
def _(given: Any) -> tuple[Contiguous, Contiguous]:
    sizes = (given.num_sequences, given.num_experts)
    return contiguous(torch.int32, *sizes), contiguous(torch.int32, sizes[0])


@count_by_sequence.plan
def _(given: Any) -> Launch:
    num_experts = checks.routing(given.topk_ids, given.num_experts, None, ndims=(2,))
    num_rows = given.topk_ids.shape[0]
    records = _sequences(given, num_rows, ("topk_ids", given.topk_ids))
    checks.fits_int32("num_sequences", records[1].num_sequences * (num_experts + 1), "the number of counters")
    return _count(given.topk_ids, num_rows, num_experts, records, given.topk_ids.device)


@count_by_sequence.run
def _(count: Launch, given: Any, tokens_per_expert: torch.Tensor, num_tokens: torch.Tensor) -> None:
    tokens_per_expert.zero_()
    num_tokens.zero_()
    where = {name: getattr(given, name) for name in WHERE}
    count(topk_ids=given.topk_ids, slot_counts=tokens_per_expert, token_counts=num_tokens, **where)


class LossPlan(NamedTuple):
    """The launches of a call: tokens are counted first where padding says how many there are."""

    count_tokens: Launch | None
    size: Contiguous
    losses: Launch
    add: Launch | None
    scratch: Contiguous


def _plan(given: Any, grad_losses: Any = None) -> LossPlan:
    """Check a call, and plan the losses or their gradient."""
    gating_output = given.gating_output
    checks.array("gating_output", gating_output, checks.FLOATS, (2,), rows=True)
    num_rows, num_experts = gating_output.shape
    checks.integer("num_experts (columns of `gating_output`)", num_experts, 1)
    like = ("gating_output", gating_output)
    top_k = checks.integer("top_k", given.top_k, 1)
    checks.choice("scoring_func", given.scoring_func, SHARED_SCORING)
    checks.number("coefficient", given.coefficient)
    checks.number("z_coefficient", given.z_coefficient)
    sequence_ids, span, padding = _sequences(given, num_rows, like)
    counts, dtype = given.tokens_per_expert, torch.int32
    if counts is not None:
        checks.array("tokens_per_expert", counts, COUNTED, (1, 2), like=like)
        whole = (span.num_sequences, num_experts)
        expected = whole[1:] if len(counts.shape) == 1 and span.num_sequences == 1 else whole
        checks.shape("tokens_per_expert", counts, expected, "(num_sequences, num_experts)")
        dtype = counts.dtype
    if given.num_tokens is not None:
        checks.array("num_tokens", given.num_tokens, (dtype,), (1,), like=like)
        checks.shape("num_tokens", given.num_tokens, (span.num_sequences,), "(num_sequences,)")
    is_partial = (given.sequence_ids, given.num_token_non_padded, given.is_padding) != (None, None, None)
    counts_tokens = given.num_tokens is None and is_partial
    where = gating_output.device
    sizes = dtype if is_partial or given.num_tokens is not None else None
    factor = given.coefficient * num_experts / (top_k * span.num_sequences)
    balance = Balance(counts, SCORING.index(given.scoring_func), factor)
    rows = which_kernel.rows_of(gating_output, 4 * which_kernel.in_vectors(gating_output, num_experts))
    records = (rows, sequence_ids, span, padding, sizes, balance)
    count = _count(None, num_rows, num_experts, (sequence_ids, span, padding), where) if counts_tokens else None
    size = contiguous(torch.int32, span.num_sequences)
    z_factor = float(given.z_coefficient)
    if grad_losses is not None:
        checks.array("grad_losses", grad_losses, (torch.float32,), (1,), like=like)
        gradients = LossGradients(torch.float32, gating_output.dtype)
        launch = Launch(differentiate_losses, where, *warps(num_rows), *records, z_factor, gradients)
        return LossPlan(count, size, launch, None, size)
    blocks, threads = warps(max(1, min(num_rows, MOST_WARPS)))
    num_warps = blocks * threads // WARP
    of_all = (span, sizes, z_factor, torch.float32, num_warps, torch.float32)
    return LossPlan(
        *(count, size, Launch(sum_losses, where, blocks, threads, *records, torch.float32)),
        Launch(add_losses, where, 1, block_threads(256), *of_all),
        contiguous(torch.float32, num_warps, 2),
    )


def _arrays(plan: LossPlan, given: Any) -> dict[str, Any]:
    """Return the arrays of a call by the names of kernels, with its tokens counted."""
    where = {name: getattr(given, name) for name in WHERE}
    sizes = given.num_tokens
    if plan.count_tokens is not None:
        sizes = arrays.empty(*plan.size).zero_()
        plan.count_tokens(topk_ids=None, slot_counts=None, token_counts=sizes, **where)
        if given.tokens_per_expert is not None:
            sizes = sizes.to(given.tokens_per_expert.dtype)
    return {**where, "tokens_per_expert": given.tokens_per_expert, "sequence_sizes": sizes}


@op(reference.router_losses)
def router_losses(
    gating_output: Array,
    tokens_per_expert: Array | None = None,
    num_tokens: Array | None = None,
    *,
    top_k: int = 1,
    scoring_func: str = "softmax",
    coefficient: float = 1.0,
    z_coefficient: float = 1.0,
    num_sequences: int = 1,
    sequence_ids: Array | None = None,
    num_token_non_padded: Array | None = None,
    is_padding: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Compute the load balancing loss and the z-loss of a router, which reads its logits once.

    Parameters
    ----------
    gating_output : array of float32, float16 or bfloat16, shape [num_tokens, num_experts]
        The router's logits; rows may be strided.
    tokens_per_expert : array of int32 or float32, shape [num_sequences, num_experts], optional
        The slots of each expert, of all ranks and layers that make one batch: `count_by_sequence` has those of one.
        Without them the load balancing loss is 0.
    num_tokens : array of the dtype of `tokens_per_expert`, shape [num_sequences], optional
        The tokens of each sequence, of all ranks and layers; by default those of this call that are no padding.
    top_k : int
        Experts of each token, by which the load balancing loss is divided.
    scoring_func : {"softmax", "sigmoid", "softplus_sqrt"}
        How logits become scores; scores are divided by their sum.
    coefficient : float
        Multiplies the load balancing loss, the mean over sequences of ``E / (K * T**2) * sum_e c_e * sum_t q_te``.
    z_coefficient : float
        Multiplies the z-loss, the mean over tokens of ``log(sum_e exp(x_te))**2``.
    num_sequences : int
        Sequences. Without `sequence_ids` consecutive tokens make one, of the same number each.
    sequence_ids : array of int32, shape [num_tokens], optional
        The sequence of each token; a token whose id is outside ``[0, num_sequences)`` is padding.
    num_token_non_padded : array of int32 or int64, shape [1] or [], optional
        Number of real tokens, on the device. The tokens after them are padding.
    is_padding : array of bool, shape [num_tokens], optional
        Which tokens are padding, and take no part.
    out : array of float32, shape [2], optional
        Written: memory for the result.

    Returns
    -------
    array of float32, shape [2]
        The load balancing loss and the z-loss.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape or layout, mixed devices, unknown `scoring_func`, sequences that do not divide the tokens.

    Notes
    -----
    The op is two launches on the caller's current stream without synchronising, and one more if it must count padding.
    CUDA graphs can capture it, and every run gives the same bits. The losses have a first-order gradient by the logits,
    in one launch; counts have none. A NaN among the logits that count makes the losses NaN.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.log(np.array([[3, 1], [1, 1]], np.float32))
    >>> router_losses(logits, np.array([[2, 0]], np.int32)).round(4)
    array([1.25  , 1.2011], dtype=float32)
    """


@router_losses.outputs
def _(_: Any) -> Contiguous:
    return contiguous(torch.float32, 2)


@router_losses.plan
def _(given: Any) -> LossPlan:
    return _plan(given)


@router_losses.run
def _(plan: LossPlan, given: Any, losses: torch.Tensor) -> None:
    found = _arrays(plan, given)
    warp_losses = arrays.empty(*plan.scratch)
    plan.losses(gating_output=given.gating_output, warp_losses=warp_losses, **found)
    assert plan.add is not None
    plan.add(warp_losses=warp_losses, losses=losses, sequence_sizes=found["sequence_sizes"])


@router_losses.saves
def _(ctx: Any, given: Any, _: Any) -> None:
    names = ("gating_output", "tokens_per_expert", "num_tokens", *WHERE)
    ctx.save_for_backward(*(getattr(given, name) for name in names))
    numbers = ("top_k", "scoring_func", "coefficient", "z_coefficient", "num_sequences")
    ctx.rules = {name: getattr(given, name) for name in numbers}


@router_losses.backward
def _(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    logits, tokens_per_expert, num_tokens, *where = ctx.saved_tensors
    rules = {**ctx.rules, **dict(zip(WHERE, where, strict=True))}
    by_logits = router_losses_backward(logits, tokens_per_expert, num_tokens, grad.contiguous(), **rules)
    return {"gating_output": by_logits}


@op(reference.router_losses_backward, is_gradient=True)
def router_losses_backward(
    gating_output: Array,
    tokens_per_expert: Array | None,
    num_tokens: Array | None,
    grad_losses: Array,
    *,
    top_k: int = 1,
    scoring_func: str = "softmax",
    coefficient: float = 1.0,
    z_coefficient: float = 1.0,
    num_sequences: int = 1,
    sequence_ids: Array | None = None,
    num_token_non_padded: Array | None = None,
    is_padding: Array | None = None,
) -> Any:
    """Return the gradient by the logits, given that by the two losses; other arguments are those of `router_losses`.

    Parameters
    ----------
    gating_output, tokens_per_expert, num_tokens
        As in `router_losses`, and so are those by keyword.
    grad_losses : array of float32, shape [2]
        The gradient by the load balancing loss and by the z-loss.

    Returns
    -------
    array of the dtype of `gating_output`, shape [num_tokens, num_experts]
    """


@router_losses_backward.outputs
def _(given: Any) -> Contiguous:
    return contiguous(given.gating_output.dtype, *given.gating_output.shape)


@router_losses_backward.plan
def _(given: Any) -> LossPlan:
    return _plan(given, given.grad_losses)


@router_losses_backward.run
def _(plan: LossPlan, given: Any, grad_logits: torch.Tensor) -> None:
    found = _arrays(plan, given)
    plan.losses(gating_output=given.gating_output, grad_losses=given.grad_losses, grad_logits=grad_logits, **found)
