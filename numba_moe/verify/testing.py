"""Inputs, poison, tolerances and comparison: shared by the tests, the verification and the benchmark."""

import contextlib
import fnmatch
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from numba_moe import reference
from numba_moe.ops.gating.scores import SMALLEST_SUM
from numba_moe.runtime import arrays

# (relative, absolute) error of a float result against the reference. float32: sums of up to a few thousand
# terms, and exp to 2 units in the last place. float16 and bfloat16: one unit in the last place, since a sum that
# differs in its last float32 bits may round to the neighbour.
TOLERANCES = {
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2.0**-10, 1e-5),
    torch.bfloat16: (2.0**-7, 1e-5),
}
# How often fused_experts rounds between its GEMMs: each may add an error of the size of its result.
EXPERT_ROUNDINGS = 4

# Ops of gating, and the scores that each chooses by; None where an argument says which.
GATING: dict[str, str | None] = {f"topk_{scoring_func}": scoring_func for scoring_func in reference.gating.SCORING}
GATING |= {"grouped_topk": None, "select_experts": None}

# Options of gating by which ids of a token may be the same, or no expert's.
NOT_DISTINCT = ("dispatch", "num_fused_shared_experts", "num_zero_experts", "num_token_non_padded", "is_padding")

# Options of gating that say what becomes of weights, not what they are before.
BESIDES_WEIGHING = (
    *("routed_scaling_factor", "apply_routed_scaling_factor_on_output", "zero_expert_id", "identity_weights"),
    *("counts", "counts_enabled", "indices_dtype", "expert_scale", "shared_expert_weight", *NOT_DISTINCT),
)

SMALLEST_SCORE = 2.0**-126  # the smallest normal float32

POISON = 0x5EADBEEF  # in integers of fewer bits, what fits

ROUTINGS = ("uniform", "zipf", "one_hot")


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a name fits a pattern, with * and ?, of these; every name does if there are none.

    >>> matches("moe_sum", ["topk_*", "moe_*"]), matches("moe_sum", ["topk_*"]), matches("moe_sum", None)
    (True, False, True)
    """
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def random_ids(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int, routing: str) -> np.ndarray:
    """Draw distinct experts for each token: int32 [num_tokens, top_k].

    `routing` is "uniform"; "zipf", where the r-th most wanted expert has weight 1 / r; "one_hot", where every
    token has one expert in common; or "half_empty", where the upper half of the experts gets nothing.
    """
    popularity = np.zeros(num_experts)
    if routing == "zipf":
        popularity = rng.permutation(-np.log1p(np.arange(num_experts)))
    elif routing == "one_hot":
        popularity[rng.integers(num_experts)] = 1e6
    elif routing == "half_empty":
        popularity[max(top_k, num_experts // 2) :] = -1e6
    elif routing != "uniform":
        raise ValueError(f"`routing` must be one of {ROUTINGS} or 'half_empty', got {routing!r}")
    draws = popularity - np.log(rng.exponential(size=(num_tokens, num_experts)))
    chosen = np.argpartition(-draws, top_k - 1, axis=1)[:, :top_k]
    return rng.permuted(chosen, axis=1).astype(np.int32)


def random_floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Draw normal numbers that the dtype can hold; NumPy has no bfloat16, so those come as float32."""
    values = rng.standard_normal(shape, np.float32)
    if dtype == "bfloat16":
        return torch.from_numpy(values).bfloat16().float().numpy()
    return values.astype(dtype)


def separated_logits(rng: np.random.Generator, num_tokens: int, num_experts: int) -> np.ndarray:
    """Draw logits of which no two in a row are near each other: float32 in (-4, 4), at least 8 / E / 2 apart."""
    steps = np.linspace(-4, 4, num_experts, endpoint=False)
    jitter = rng.random((num_tokens, num_experts)) * (4 / num_experts)
    return rng.permuted(steps + jitter, axis=1).astype(np.float32)


def to_device(value: Any, device: str, dtype: str | None = None, strided: bool = False) -> Any:
    """Copy a NumPy array to a device.

    Floats become the dtype; as strided, rows lie inside wider rows of NaN.
    """
    if isinstance(value, tuple):
        return tuple(to_device(part, device, dtype, strided) for part in value)
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value.copy()).to(device)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(getattr(torch, dtype))
    if strided and tensor.is_floating_point() and tensor.dim() > 1:
        width = tensor.shape[-1]
        wide = torch.full((*tensor.shape[:-1], width + 8), torch.nan, dtype=tensor.dtype, device=device)
        wide[..., :width] = tensor
        tensor = wide[..., :width]
    return tensor


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to the host; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def poison(array: Any) -> Any:
    """Fill an array, a tensor or NumPy's: NaN in floats, a large odd number in integers; and return it."""
    if isinstance(array, np.ndarray):
        kind = array.dtype.kind
        if kind in "biufc":
            array[...] = np.nan if kind in "fc" else kind == "b" or POISON & np.iinfo(array.dtype).max
        return array
    tensor = arrays.to_tensor("array", array)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else POISON & torch.iinfo(tensor.dtype).max)
    return array


@contextlib.contextmanager
def poisoned_libraries() -> Iterator[None]:
    """Fill what NumPy, torch, Numba and CuPy allocate without values, in functions that are not the library's own."""

    def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return poison(allocate(*args, **kwargs))

        return call

    modules = ((np, torch, sys.modules.get("numba.cuda"), sys.modules.get("cupy")), (torch.Tensor,))
    names = (("empty", "empty_like", "device_array", "device_array_like"), ("new_empty",))
    with contextlib.ExitStack() as stack:
        for module, name in (pair for pairs in zip(modules, names, strict=True) for pair in itertools.product(*pairs)):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, poisoned(getattr(module, name))))
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ops allocate: NaN in floats, a large odd number in integers."""
    empty = arrays.empty

    def poisoned(*description: Any) -> torch.Tensor:
        return poison(empty(*description))

    with mock.patch.object(arrays, "empty", poisoned):
        yield


class Comparison(NamedTuple):
    """How far one result is from the reference."""

    mismatches: int
    error: float  # the largest, in units of its tolerance
    message: str


def largest_in_row(array: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of each row, [..., 1]."""
    return np.asarray(np.abs(array.astype(np.float64)).max(axis=-1, keepdims=True, initial=0.0))


def squared(array: np.ndarray) -> np.ndarray:
    """Return the squares of numbers, in float64."""
    return np.asarray(array, np.float64) ** 2


SUMS = ("moe_sum", "moe_unpermute", "constant_experts")
FACTORS = ("hidden_states", "topk_weights", "constants", "combined")


def size_of_sums(name: str, arguments: Mapping[str, Any]) -> np.ndarray:
    """Return how large the sums of an op of `SUMS` are when signs are random, by which their errors go.

    That is the root of the sum of squares: a result may be small because its terms cancel, their errors do not.
    """
    if name == "constant_experts":
        factors = {part: squared(arguments[part]) for part in FACTORS if arguments.get(part) is not None}
        squares = reference.constant_experts(**{**arguments, **factors})
    elif name == "moe_sum":
        squares = reference.moe_sum(squared(arguments["hidden_states"]), arguments.get("topk_ids"))
    else:
        rows, weights = squared(arguments["permuted"]), squared(arguments["topk_weights"])
        squares = reference.moe_unpermute(rows, weights, arguments["inv_permuted_idx"])
    return np.asarray(np.sqrt(squares) * abs(arguments.get("routed_scaling_factor", 1.0)))


def size_of_experts(arguments: Mapping[str, Any]) -> np.ndarray:
    """Return what `size_of_sums` does of fused_experts."""
    given = {name: value for name, value in arguments.items() if name not in ("down_proj", "down_bias", "topk_weights")}
    rows, offset, places = reference.experts.first_half(**given)
    squares = reference.experts.multiply_by_expert(squared(rows), squared(arguments["down_proj"]), offset)
    if arguments.get("down_bias") is not None:
        squares = reference.moe_activation(squares, offset, squared(arguments["down_bias"]), activation="none")
    return np.sqrt(reference.moe_unpermute(squares, squared(arguments["topk_weights"]), places))


def compare(
    result: torch.Tensor, expected: np.ndarray, exact: bool = False, size: np.ndarray | None = None
) -> Comparison:
    """Compare a result with the reference's: integers and exact results bitwise, floats by `TOLERANCES`.

    The relative tolerance is of each element, and of a `size` where there is one.
    """
    got = to_numpy(result)
    if got.shape != expected.shape:
        return Comparison(max(got.size, expected.size, 1), np.inf, f"shape {got.shape}, expected {expected.shape}")
    if result.dtype not in TOLERANCES:
        if got.dtype != expected.dtype:
            return Comparison(max(got.size, 1), np.inf, f"dtype {got.dtype}, expected {expected.dtype}")
        exact = True
    if exact:
        wrong = got != expected
        error = np.inf if wrong.any() else 0.0
    else:
        relative, absolute = TOLERANCES[result.dtype]
        wanted = expected.astype(np.float64)
        size = np.abs(wanted) + (0.0 if size is None else size)
        with np.errstate(invalid="ignore"):
            ratio = np.abs(got.astype(np.float64) - wanted) / (absolute + relative * size)
        ratio = np.where((got == wanted) | (np.isnan(got) & np.isnan(wanted)), 0.0, ratio)
        wrong = ~(ratio <= 1.0)
        error = float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0.0))
    message = ""
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        message = f"first at {index}: got {got[index]}, expected {expected[index]}"
    return Comparison(int(np.count_nonzero(wrong)), error, message)


def rows_decided_by_rounding(arguments: Mapping[str, Any], rows: np.ndarray, scoring_func: str) -> np.ndarray:
    """Return which of the rows of a gating call hang on the last bits of float32 scores.

    Without a correction bias experts rank by their logits and nothing hangs on rounding, but for sums over
    groups, and capped logits. With one, two candidates may be closer than the float32 error of their scores;
    candidates of equal logit and equal bias are a tie on any machine, so they do not count.
    """
    logits = np.asarray(arguments["gating_output"], np.float64)[rows]
    bias, softcap = arguments.get("correction_bias"), arguments.get("softcap", 0.0)
    if softcap or arguments.get("bias_mode") == "logits":
        logit_bias, bias = (bias, None) if arguments.get("bias_mode") == "logits" else (None, bias)
        logits = reference.selection.adjust(logits, softcap, logit_bias).astype(np.float64)
    scores, ranks = reference.gating.score_and_rank(logits, scoring_func, bias)
    close = np.zeros(len(logits), bool)
    num_groups = arguments.get("num_expert_group", 1)
    picks = 1
    if num_groups > 1:
        rule = (arguments.get("group_score"), arguments["top_k"], arguments["topk_group"], bias)
        picks = reference.gating.group_picks(*rule)
    if num_groups > 1 and (bias is not None or picks > 1):
        groups = reference.gating.score_groups(scores, ranks, num_groups, bias, picks)
        order = -np.sort(-groups, axis=1)
        last = arguments["topk_group"]
        if last < num_groups:
            with np.errstate(invalid="ignore"):  # -inf twice is a tie
                close |= order[:, last - 1] - order[:, last] <= 1e-6 * np.maximum(1.0, np.abs(order[:, last]))
    if bias is not None or softcap:
        order = np.argsort(-ranks, axis=1, kind="stable")
        sorted_ranks = np.take_along_axis(ranks, order, axis=1)
        with np.errstate(invalid="ignore"):
            gaps = sorted_ranks[:, :-1] - sorted_ranks[:, 1:]
        given = np.asarray(arguments["gating_output"], np.float64)[rows]
        inputs = [np.take_along_axis(given, order, axis=1)]
        if arguments.get("correction_bias") is not None:
            inputs.append(np.asarray(arguments["correction_bias"])[order])
        tied = np.logical_and.reduce([values[:, :-1] == values[:, 1:] for values in inputs])
        close |= ((gaps <= 1e-6 * np.maximum(1.0, np.abs(sorted_ranks[:, 1:]))) & ~tied).any(axis=1)
    return close


def as_kernels_weigh(name: str, expected: Any, arguments: Mapping[str, Any]) -> tuple[Any, np.ndarray | None]:
    """Return the reference's weights, but not renormalised where scores sum to 1e-35 or less, as the contract says.

    And the size, for `compare`, of what renormalising makes of scores below the normal numbers, which may count as 0.
    """
    if not arguments.get("renormalize") or arguments.get("renormalize_epsilon"):
        return expected, None
    function = getattr(reference, name)
    weighing = inspect.signature(function).parameters.keys() - BESIDES_WEIGHING
    bare = {option: arguments[option] for option in weighing if option in arguments}
    scores = function(**bare | {"renormalize": False}).topk_weights.astype(np.float64)
    on_output = arguments.get("apply_routed_scaling_factor_on_output", True)
    factor = arguments.get("routed_scaling_factor", 1.0) if on_output else 1.0
    sums = scores.sum(axis=1)
    little = sums <= SMALLEST_SUM
    weights = expected.topk_weights.copy()
    routed = weights[:, : scores.shape[1]]  # a view
    routed[little] *= np.where(sums > 0, sums, 1.0)[little, None]
    if arguments.get("expert_scale") is not None:
        factor *= np.abs(arguments["expert_scale"]).max(initial=0.0)
    lost = np.where(little, 0.0, abs(factor) * scores.shape[1] * SMALLEST_SCORE / np.where(little, 1.0, sums))
    return expected._replace(topk_weights=weights), lost[:, None] / TOLERANCES[torch.float32][0]


def compare_topk(
    result: Any, expected: Any, arguments: Mapping[str, Any], scoring_func: str, size: np.ndarray | None = None
) -> list[Comparison]:
    """Compare weights and ids of a gating call, leaving out rows that float32 rounding decides; ids stay distinct."""
    got = to_numpy(result.topk_ids)
    num_experts = arguments["gating_output"].shape[1]
    if got.shape == expected.topk_ids.shape and got.size:
        in_order = np.sort(got, axis=1)
        valid = (in_order[:, 0] >= 0) & (in_order[:, -1] < num_experts) & (np.diff(in_order, axis=1) > 0).all(axis=1)
        valid |= any(arguments.get(name) is not None for name in NOT_DISTINCT)
        different = np.flatnonzero((got != expected.topk_ids).any(axis=1) & valid)
        left_out = different[rows_decided_by_rounding(arguments, different, scoring_func)]
        kept = np.ones(len(got), bool)
        kept[left_out] = False
        kept_rows = torch.from_numpy(np.flatnonzero(kept)).to(result.topk_ids.device)
        result = type(result)(*(part[kept_rows] for part in result))
        expected = type(expected)(*(part[kept] for part in expected))
        size = None if size is None else size[kept]
    return [compare(result[0], expected[0], size=size), compare(result[1], expected[1])]


def without_padding(part: torch.Tensor, permuted: Any) -> torch.Tensor:
    """Return a part of permuted tokens with zeros where rows or scales, left as they were, have no slot."""
    if part is permuted.permuted_hidden_states or part is permuted.permuted_scales:
        unused = permuted.permuted_idx == permuted.inv_permuted_idx.numel()
        part = part.clone()
        part[unused] = 0
    return part


def compare_results(name: str, result: Any, expected: Any, arguments: Mapping[str, Any]) -> list[Comparison]:
    """Compare the result of the public op `name` with the reference's, field by field."""
    if name == "route":
        compared = compare_results("select_experts", result.topk, expected.topk, arguments)
        if (to_numpy(result.topk.topk_ids) != expected.topk.topk_ids).any():
            return compared  # other slots have other blocks
        return compared + compare_results("moe_align_block_size", result.blocks, expected.blocks, arguments)
    if name in GATING or name == "weigh_experts":
        expected, size = as_kernels_weigh(name, expected, arguments)
        if name == "weigh_experts":
            return [compare(result[0], expected[0], size=size), compare(result[1], expected[1])]
        scoring_func = GATING[name] or arguments.get("scoring_func", "softmax")
        return compare_topk(result, expected, arguments, scoring_func, size)
    if not isinstance(expected, tuple):
        result, expected = (result,), (expected,)
    exact = name.startswith("moe_permute")  # which moves rows and computes nothing
    pairs = [pair for pair in zip(result, expected, strict=True) if pair != (None, None)]
    if not arguments.get("zero_padding", True):
        pairs = [(without_padding(part, result), wanted) for part, wanted in pairs]
    size = None
    if name == "fused_experts":
        size = EXPERT_ROUNDINGS * size_of_experts(arguments)
    elif name in SUMS:  # which sum in float32 and round the result alone to its dtype
        size = size_of_sums(name, arguments) * (TOLERANCES[torch.float32][0] / TOLERANCES[result[0].dtype][0])
    return [compare(part, wanted, exact, size) for part, wanted in pairs]


def time_on_device(call: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median device time of a call in microseconds, launch gaps included."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]
