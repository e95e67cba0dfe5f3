"""Dumps of several ranks, or of one after another, as one: `numba-moe merge`."""

import argparse
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from numba_moe.recorder.dump_files import FORMATS, Dump, load
from numba_moe.recorder.sums import LARGEST_INT64, add_rows, numbered, places_of
from numba_moe.runtime import checks, files
from numba_moe.runtime.text import counted

# A pass: its id, the debug name, the number of its map, and how many records of the same were before it in its dump.
Key = tuple[int, str, int, int]


def merge(dumps: Sequence[Any], *, num_layers: int | None = None, num_experts: int | None = None) -> Dump:
    """Add dumps: of ranks that wrote one each, and of files that followed one another.

    Parameters
    ----------
    dumps : sequence of path or Dump
        Files that `load` reads, of any format, or dumps; those of one mode, with the same layers, experts and slots.
    num_layers : int, optional
        Layers of the model (L), as `load` takes them.
    num_experts : int, optional
        Experts of a layer (E), in the same way.

    Returns
    -------
    Dump
        Of all passes, and with all maps, the last one last.

    Raises
    ------
    TypeError
        Something that is no sequence, or in it no path and no dump.
    ValueError
        No dumps, dumps that do not fit each other, a pass with other maps on other ranks, sums that int64 does not
        hold, a file that `load` refuses.
    OSError
        A file cannot be read.

    Notes
    -----
    Passes with the same id, map and debug name become one: the sum of all dumps that have it, with their tokens in the
    order of ranks. They are in the order of the first dump that has each. `rank_physical_count` has a row for each
    rank, in order, and dumps of one rank are added.

    Examples
    --------
    >>> import torch
    >>> from numba_moe.recorder import ExpertDistributionRecorder
    >>> dumps = []
    >>> for ids in ([[0, 2]], [[2, 1]]):                      # each rank has a recorder
    ...     recorder = ExpertDistributionRecorder(1, 3, mode="per_pass", device="cpu")
    ...     with recorder.recording(), recorder.with_forward_pass(7), recorder.with_current_layer(0):
    ...         recorder.on_select_experts(torch.tensor(ids))
    ...     dumps.append(recorder.dump_record("object"))
    >>> merge(dumps).logical_count
    array([[[1, 1, 2]]])
    """
    if isinstance(dumps, str | os.PathLike) or not isinstance(dumps, Sequence):
        raise TypeError(f"`dumps` must be a sequence of paths or dumps, got {type(dumps).__name__}")
    checks.holds("dumps", "one dump or more", len(dumps) > 0, "none")
    sizes = {"num_layers": num_layers, "num_experts": num_experts}
    found = [dump if isinstance(dump, Dump) else load(dump, **sizes) for dump in dumps]
    names = [f"dump {number}" if isinstance(dump, Dump) else Path(dump).name for number, dump in enumerate(dumps)]
    _check(found, names)
    maps, numbers = _joined_maps(found)
    keys = [_keys(dump, of_dump) for dump, of_dump in zip(found, numbers, strict=True)]
    _check_passes(keys, names)
    place, rows = places_of(keys)
    merged = dataclasses.replace(
        found[0],
        rank=min(dump.rank for dump in found),
        num_gpus=max(dump.num_gpus for dump in found),
        forward_pass_id=np.array([key[0] for key in place], np.int64),
        gatherer_key=[key[1] for key in place],
        map_of_pass=np.array([key[2] for key in place], np.int64),
        physical_to_logical_maps=maps,
        logical_count=_sum("logical_count", found, rows, len(place)),
        global_physical_count=_sum("global_physical_count", found, rows, len(place)),
        rank_physical_count=_of_ranks(found),
    )
    return dataclasses.replace(merged, **_tokens(found, rows, len(place)))


def _check(dumps: list[Dump], names: list[str]) -> None:
    """Check that dumps fit each other; a file that does not know of ranks says that there is 1."""
    first, num_gpus = dumps[0], max(dump.num_gpus for dump in dumps)
    for dump, name in zip(dumps, names, strict=True):
        sizes = {
            "mode": (first.mode, dump.mode),
            "num_experts": (first.num_experts, dump.num_experts),
            "(layers, slots)": tuple(part.physical_to_logical_maps.shape[1:] for part in (first, dump)),
            "num_gpus": (num_gpus, num_gpus if dump.num_gpus == 1 else dump.num_gpus),
        }
        for what, (wanted, there) in sizes.items():
            checks.holds("dumps", f"of one {what}, {wanted} as in {names[0]}", there == wanted, f"{there} in {name}")


def _data(dump: Dump) -> list[bytes]:
    return [places.tobytes() for places in dump.physical_to_logical_maps.astype(np.int64)]


def _joined_maps(dumps: list[Dump]) -> tuple[np.ndarray, list[list[int]]]:
    """Return the maps of all dumps, in an order that is that of each, and the numbers there of each dump's."""
    maps = {data: dump.physical_to_logical_maps[i] for dump in dumps for i, data in enumerate(_data(dump))}
    order: list[bytes] = []
    for own in map(_data, dumps):
        order = min((_chained(order, own), _chained(own, order)), key=len)
    return np.stack([maps[data] for data in order]), [[order.index(data) for data in _data(dump)] for dump in dumps]


def _chained(one: list[bytes], other: list[bytes]) -> list[bytes]:
    """Return the shortest list that begins as one does and in which the other follows, or lies in it.

    >>> _chained([b"a", b"b"], [b"b", b"c"]), _chained([b"a", b"b"], [b"b"]), _chained([b"a"], [b"b"])
    ([b'a', b'b', b'c'], [b'a', b'b'], [b'a', b'b'])
    """
    for first in range(len(one) + 1):
        shared = min(len(one) - first, len(other))
        if one[first : first + shared] == other[:shared]:
            return one + other[shared:]
    return one + other


def _keys(dump: Dump, numbers: list[int]) -> list[Key]:
    """Return what tells the records of a dump from each other."""
    of_maps = [numbers[index] for index in dump.map_of_pass]
    return numbered(zip(dump.forward_pass_id.tolist(), dump.gatherer_key, of_maps, strict=True))


def _check_passes(keys: list[list[Key]], names: list[str]) -> None:
    """Check that no pass was under other maps in one dump than in another."""
    known: dict[int, tuple[set[int], str]] = {}
    for of_dump, name in zip(keys, names, strict=True):
        maps: dict[int, set[int]] = {}
        for pass_id, _, index, _ in of_dump:
            maps.setdefault(pass_id, set()).add(index)
        for pass_id, own in maps.items():
            before, other = known.setdefault(pass_id, (own, name))
            same = pass_id < 0 or bool(before & own)
            checks.holds("dumps", f"of one map of pass {pass_id}, that of {other}", same, f"another in {name}")


def _sum(name: str, dumps: list[Dump], rows: list[np.ndarray], num_rows: int) -> np.ndarray:
    """Add the counts of dumps, whose records go to rows of the sum."""
    counts = [getattr(dump, name) for dump in dumps]
    _check_sums(name, counts)
    total = add_rows(counts, rows, (num_rows, *counts[0].shape[1:]))
    checks.counts(name, total)
    return total


def _check_sums(name: str, counts: list[np.ndarray]) -> None:
    most = sum(int(part.max(initial=0)) for part in counts)
    checks.holds("dumps", f"of {name} whose sums fit int64", most <= LARGEST_INT64, most)


def _of_ranks(dumps: list[Dump]) -> np.ndarray:
    """Return what the tokens of each rank chose; a dump has those from its own rank on."""
    _check_sums("rank_physical_count", [dump.rank_physical_count for dump in dumps])
    found: dict[int, np.ndarray] = {}
    for dump in dumps:
        for rank, counts in enumerate(dump.rank_physical_count, dump.rank):
            found[rank] = found.get(rank, 0) + counts
    return np.stack([found[rank] for rank in sorted(found)])


def _tokens(dumps: list[Dump], rows: list[np.ndarray], num_rows: int) -> dict[str, Any]:
    """Return the tokens of merged records; those of ranks follow one another."""
    found: dict[str, Any] = {}
    order = sorted(range(len(dumps)), key=lambda number: dumps[number].rank)
    for name in ("topk_ids", "topk_weights"):
        parts: list[list[np.ndarray]] = [[] for _ in range(num_rows)]
        given = [getattr(dump, name) for dump in dumps]
        if all(tokens is None for tokens in given):
            continue
        shape = next(tokens.shape[1:] for tokens in given if tokens is not None)
        for number in order:
            tokens, lengths = given[number], dumps[number].num_tokens
            there = tokens is not None and lengths is not None and tokens.shape[1:] == shape
            checks.holds("dumps", f"of {name} [tokens, {shape[0]}, {shape[1]}] each", there, "one with others or none")
            ends = list(itertools.accumulate(np.asarray(lengths).tolist()))
            for row, begin, end in zip(rows[number], [0, *ends], ends, strict=False):
                parts[row].append(tokens[begin:end])
        found["num_tokens"] = np.array([sum(map(len, of_row)) for of_row in parts], np.int64)
        found[name] = np.concatenate([np.zeros((0, *shape), tokens.dtype), *itertools.chain(*parts)])
    return found


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read, check and add; return what writes the sum and returns the exit status."""
    files.check_output("--out", options.out, [f".{name}" for name in FORMATS])
    with checks.under_names(path="DUMP", dumps="DUMP", num_layers="--layers", num_experts="--experts"):
        dump = merge(options.dumps, num_layers=options.num_layers, num_experts=options.num_experts)
    return functools.partial(run, options, dump)


def run(options: argparse.Namespace, dump: Dump) -> int:
    """Write the sum and return the exit status."""
    dump.save(options.out)
    passes, ranks = counted(len(dump.forward_pass_id), "pass"), counted(len(dump.rank_physical_count), "rank")
    print(f"{options.out}: {passes} of {ranks}, from {counted(len(options.dumps), 'file')}")
    return 0
