"""Recorded loads, from files of counts and from files of choices."""

import math
from pathlib import Path

import numpy as np

from numba_moe.placement import dumps
from numba_moe.runtime import checks, formats


def count_choices(topk_ids: np.ndarray, num_experts: int, rank_of_token: np.ndarray | None = None) -> np.ndarray:
    """Count choices [steps, L, E], or by the rank of their tokens [steps, L, E, R]; other ids are skipped.

    topk_ids [steps, L, T, K], rank_of_token [steps, T]

    >>> count_choices(np.array([[[[0, 1], [1, -1]]]]), 2).tolist()
    [[[1, 2]]]
    >>> count_choices(np.array([[[[0, 1], [1, -1]]]]), 2, np.array([[0, 1]])).tolist()
    [[[[1, 0], [1, 1]]]]
    """
    shape: tuple[int, ...] = (*topk_ids.shape[:2], num_experts)
    is_expert = (topk_ids >= 0) & (topk_ids < num_experts)
    steps, layers, tokens, _ = np.nonzero(is_expert)
    index = [steps, layers, topk_ids[is_expert]]
    if rank_of_token is not None:
        shape = (*shape, int(rank_of_token.max()) + 1)
        index.append(rank_of_token[steps, tokens])
    return np.bincount(np.ravel_multi_index(index, shape), minlength=math.prod(shape)).reshape(shape)


def load_trace(
    path: Path,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    tokens_per_step: int | None = None,
    num_gpus: int | None = None,
) -> np.ndarray:
    """Read recorded loads: [steps, L, E], or [steps, L, E, R] where the file says on which ranks tokens live.

    A file holds ``logical_count`` [steps, L, E] or [L, E], or records of counts as `ExpertLocation.load` takes them, or
    lines of a ``.csv``, whose sizes are `num_layers` and `num_experts`; or ``topk_ids`` [steps, L, T, K] or [L, T, K],
    and perhaps ``rank_of_token`` [steps, T] or [T]; or an array [T, K] of integers for each layer, in the order of the
    file. `tokens_per_step` divides the tokens of a step into several steps; the last may be shorter.
    """
    known = path.suffix in (*dumps.FORMATS, *formats.ROUTING_FORMATS)
    checks.holds("path", "a .npy, .npz, .safetensors, .pt, .json or .csv file", known, path.name)
    content = dumps.read_file(path, num_layers, num_experts) if path.suffix in dumps.FORMATS else None
    content = content if isinstance(content, dict) else {}
    ids, homes = content.get("topk_ids"), content.get("rank_of_token")
    if "logical_count" in content:
        of_ids = {"tokens_per_step": tokens_per_step}
        if path.suffix != ".csv":
            of_ids["num_layers"] = num_layers
            if not content.get("of_ids"):
                of_ids["num_experts"] = num_experts
        for name, value in of_ids.items():
            checks.holds(name, f"left out for {path.name}, which has counts", value is None, value)
        counts = formats.counts("logical_count", content["logical_count"], (2, 3))
        return counts if counts.ndim == 3 else counts[None]
    checks.holds("num_layers", f"left out for {path.name}, which has ids", num_layers is None, num_layers)
    if ids is None:
        ids = _layers_of(path)
    found = formats.array("topk_ids", ids, (3, 4))
    found = found if found.ndim == 4 else found[None]
    num_steps, num_layers, num_tokens, top_k = found.shape
    ranks = None
    if homes is not None:
        ranks = formats.array("rank_of_token", homes, (1, 2))
        ranks = np.broadcast_to(ranks, (num_steps, num_tokens)) if ranks.ndim == 1 else ranks
        checks.host_shape("rank_of_token", ranks, (num_steps, num_tokens), "(steps, tokens)")
        most = ranks.max() + 1 if num_gpus is None else num_gpus
        checks.every("rank_of_token", f"in [0, {most})", (ranks >= 0) & (ranks < most), ranks, ("step", "token"))
    if tokens_per_step is not None:
        tokens_per_step = min(tokens_per_step, num_tokens)
        parts = -(-num_tokens // tokens_per_step)
        padding = parts * tokens_per_step - num_tokens
        padded = np.pad(found, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=-1)
        cut = padded.reshape(num_steps, num_layers, parts, tokens_per_step, top_k)
        found = cut.transpose(0, 2, 1, 3, 4).reshape(-1, num_layers, tokens_per_step, top_k)
        if ranks is not None:
            ranks = np.pad(ranks, ((0, 0), (0, padding))).reshape(-1, tokens_per_step)
    experts = int(found.max(initial=0)) + 1 if num_experts is None else num_experts
    num_ranks = 1 if ranks is None else int(ranks.max()) + 1 if num_gpus is None else num_gpus
    wanted = 8 * len(found) * num_layers * experts * num_ranks
    formats.check_memory("topk_ids", "the counts of their experts", wanted, path.stat().st_size)
    counts = count_choices(found, experts, ranks)
    if ranks is not None and num_gpus is not None:
        counts = np.pad(counts, ((0, 0), (0, 0), (0, 0), (0, num_gpus - counts.shape[3])))
    return counts


def _layers_of(path: Path) -> np.ndarray:
    if path.suffix == ".json":
        raise ValueError(f"`path` must be a file with logical_count or topk_ids, got {path.name}")
    layers = {name: ids for name, ids in formats.load_routing(path).items() if ids.dtype.kind in "iu" and ids.ndim == 2}
    shapes = {ids.shape for ids in layers.values()}
    rule = "a file with logical_count, topk_ids, or an array [tokens, top_k] of integers for each layer, all of a shape"
    checks.holds("path", rule, len(shapes) == 1, f"{path.name} with shapes {sorted(shapes)}")
    return np.stack(list(layers.values()))
