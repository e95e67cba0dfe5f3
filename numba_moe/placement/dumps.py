"""What locations are read from: files of maps and of recorded counts, this library's and others'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numba_moe.runtime import checks, formats

FORMATS = (".csv", ".json", ".npz", ".pt", ".safetensors")


class Slots(NamedTuple):
    """What a record says of slots."""

    places: np.ndarray  # int64 [L, P], the expert of each
    counts: np.ndarray  # int64 [L, P]
    topk_ids: np.ndarray | None  # int64 [L, T, K]


def read_file(path: Path, num_layers: int | None = None, num_experts: int | None = None) -> Any:
    """Read what a file holds, without running code from it; a list of records as the `logical_count` that it makes.

    The sizes are those of a ``.csv`` file, which has lines for some experts only; `num_experts` is that of ids as well.
    """
    if path.suffix == ".csv":
        return {"logical_count": formats.read_csv(path, num_layers, num_experts)}
    content = formats.read(path, FORMATS)
    if isinstance(content, list) and content and all(isinstance(row, list) for row in content):
        return {"physical_to_logical_map": content}  # alone
    records, mapping = content, None
    if isinstance(content, dict):
        records, mapping = content.get("records"), content.get("last_physical_to_logical_map")
    if not (isinstance(records, list) and records and all(isinstance(record, dict) for record in records)):
        return content
    of_ids = None if mapping is not None else map_of_ids(records, num_experts, path.stat().st_size)
    if of_ids is not None:
        mapping = of_ids
    if _are_counted(records, mapping):
        counts = counts_of_records(records, mapping, path.stat().st_size)
        return {"logical_count": counts, "of_ids": of_ids is not None}
    return content


def map_of_ids(records: list[dict[str, Any]], num_experts: int | None, size: int) -> np.ndarray | None:
    """Return a map with expert i in slot i, if records have ids alone: neither counts nor a map.

    `num_experts` is by default the largest id + 1, and `size` that of the file in bytes.
    """
    other = {"logical_count", "global_physical_count", "physical_to_logical_map"}
    if any("topk_ids_of_layer" not in record or other & record.keys() for record in records):
        return None
    ids = [formats.array("topk_ids_of_layer", record["topk_ids_of_layer"], (3,), empty=True) for record in records]
    least = max(int(part.max(initial=-1)) for part in ids) + 1
    if num_experts is not None:
        checks.at_least("num_experts", checks.integer("num_experts", num_experts, 1), least, "the largest id + 1")
    experts = num_experts or max(least, 1)
    formats.check_memory("topk_ids_of_layer", "the counts of its experts", 8 * len(ids) * len(ids[0]) * experts, size)
    return np.tile(np.arange(experts), (len(ids[0]), 1))


def _are_counted(records: list[dict[str, Any]], mapping: Any) -> bool:
    def is_counted(record: dict[str, Any]) -> bool:
        of_slots = {"global_physical_count", "topk_ids_of_layer"} & record.keys()
        has_map = mapping is not None or "physical_to_logical_map" in record
        return "logical_count" in record or bool(of_slots and has_map)

    return all(map(is_counted, records))


def slots_of_record(record: dict[str, Any], last_map: Any) -> Slots:
    """Read a record of SGLang's, or of ours; one that has counts and no map has an expert in each slot.

    `last_map` is the map of records that have none.
    """
    source = "physical_to_logical_map" if "physical_to_logical_map" in record else "last_physical_to_logical_map"
    places, counts, ids = record.get(source, last_map), record.get("global_physical_count"), None
    is_missing = places is None and source not in record
    if counts is None and "logical_count" in record:
        counts, is_missing = record["logical_count"], True
    if counts is not None:
        counts = formats.counts("global_physical_count", counts, (2,))
        if is_missing:
            places = np.tile(np.arange(counts.shape[1]), (len(counts), 1))
    checks.holds("path", "a file with a map, or counts", places is not None, "records with neither")
    places = formats.array(source, places, (2,))
    checks.every(source, "at least -1", places >= -1, places, ("layer", "slot"))
    if record.get("topk_ids_of_layer") is not None:
        ids = formats.array("topk_ids_of_layer", record["topk_ids_of_layer"], (3,), empty=True)
    if counts is None:
        checks.holds("path", "a file with counts, or ids of tokens", ids is not None, "a record with neither")
        counts = count_slots(ids, *places.shape)
    checks.host_shape("global_physical_count", counts, places.shape, f"`{source}`.shape")
    return Slots(places, counts, ids)


def counts_of_records(records: Sequence[dict[str, Any]], mapping: Any = None, size: int = 0) -> np.ndarray:
    """Sum the records of each forward pass: int64 [passes, L, E], in the order in which passes first appear.

    A record has ``logical_count`` [L, E]; or ``global_physical_count`` [L, P] by slot, or ``topk_ids_of_layer``
    [L, T, K] of slots, whose experts its own ``physical_to_logical_map`` [L, P] or the mapping names. Records of equal
    ``forward_pass_id`` add up; one that has none is a pass of its own. `size` is that of the file in bytes.

    >>> counts_of_records([{"global_physical_count": [[3, 1, 2]]}], mapping=[[0, 1, 0]])
    array([[[5, 1]]])
    >>> counts_of_records([{"topk_ids_of_layer": [[[0, 2], [1, -1]]]}], mapping=[[0, 1, 0]])
    array([[[2, 1]]])
    >>> passes = [{"forward_pass_id": number, "logical_count": [[number, 1]]} for number in (7, 8, 8)]
    >>> counts_of_records(passes).tolist()
    [[[7, 1]], [[16, 2]]]
    """
    place_of: dict[Any, int] = {}
    places: list[int] = []
    found: list[np.ndarray] = []
    for number, record in enumerate(records):
        if "logical_count" in record:
            count = formats.counts("logical_count", record["logical_count"], (2,))
        else:
            count = _logical(slots_of_record(record, mapping), len(records), size)
        checks.host_shape("logical_count", count, found[0].shape if found else count.shape, "that of the first record")
        key: Any = ("record", number)
        if "forward_pass_id" in record:
            key = formats.integer("forward_pass_id", record["forward_pass_id"], -1)
        places.append(place_of.setdefault(key, len(place_of)))
        found.append(count)
    counts = np.stack(found)
    checks.counts("logical_count", counts)
    total = np.zeros((len(place_of), *counts.shape[1:]), np.int64)
    np.add.at(total, places, counts)
    return total


def _logical(slots: Slots, num_records: int, size: int) -> np.ndarray:
    experts = slots.places
    num_experts = int(experts.max()) + 1
    checks.holds("physical_to_logical_map", "a map with an expert", num_experts > 0, "-1 everywhere")
    wanted = 8 * num_records * len(experts) * num_experts
    formats.check_memory("physical_to_logical_map", "the counts of its experts", wanted, size)
    count = np.zeros((len(experts), num_experts), np.int64)
    layers, places = np.nonzero(experts >= 0)
    np.add.at(count, (layers, experts[layers, places]), slots.counts[layers, places])
    return count


def count_slots(topk_ids: Any, num_layers: int, num_slots: int) -> np.ndarray:
    """Count how often ids [L, T, K] name each slot: [L, P]."""
    checks.holds("topk_ids_of_layer", f"of {num_layers} layers", len(topk_ids) == num_layers, len(topk_ids))
    known = (topk_ids >= -1) & (topk_ids < num_slots)
    checks.every("topk_ids_of_layer", f"in [-1, {num_slots})", known, topk_ids, ("layer", "token", "k"))
    return np.stack([np.bincount(ids[ids >= 0], minlength=num_slots) for ids in topk_ids])
