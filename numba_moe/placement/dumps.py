"""What locations are read from: files of maps and of recorded counts, this library's and others'."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from numba_moe.runtime import checks

FORMATS = (".json", ".npz", ".pt", ".safetensors")


def read_file(path: Path) -> Any:
    """Read what a file holds, without running code from it; a list of records as the `logical_count` that it makes."""
    content = read_whole(path)
    records, mapping = content, None
    if isinstance(content, dict):
        records, mapping = content.get("records"), content.get("last_physical_to_logical_map")
    if _are_counted(records, mapping):
        return {"logical_count": counts_of_records(records, mapping)}
    return content


def read_whole(path: Path) -> Any:
    """Read what a file holds, as it is, without running code from it."""
    checks.choice("path", path.suffix, FORMATS)
    data = path.read_bytes()
    try:
        return _parse(data, path.suffix)
    except ImportError:  # of safetensors, which is no dependency
        raise
    except Exception as error:  # readers raise what they like
        found = f"{path.name} of {len(data)} bytes ({type(error).__name__}: {error})"
        raise ValueError(f"`path` must be a whole {path.suffix} file, got {found}") from error


def _parse(data: bytes, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(data)
    if suffix == ".npz":
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return dict(file)
    if suffix == ".safetensors":
        from safetensors.torch import load

        return load(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _are_counted(records: Any, mapping: Any) -> bool:
    if not isinstance(records, list) or not records:
        return False
    needed = {"logical_count"} if mapping is None else {"logical_count", "global_physical_count"}
    return all(isinstance(record, dict) and needed & record.keys() for record in records)


def counts_of_records(records: Sequence[dict[str, Any]], mapping: Any = None) -> np.ndarray:
    """Sum the records of each forward pass: int64 [passes, L, E], in the order in which passes first appear.

    A record has ``logical_count`` [L, E], or ``global_physical_count`` [L, P] by slot, whose experts the mapping [L, P]
    names. Records of equal ``forward_pass_id`` add up; one that has none is a pass of its own.

    >>> counts_of_records([{"global_physical_count": [[3, 1, 2]]}], mapping=[[0, 1, 0]])
    array([[[5, 1]]])
    >>> passes = [{"forward_pass_id": number, "logical_count": [[number, 1]]} for number in (7, 8, 8)]
    >>> counts_of_records(passes).tolist()
    [[[7, 1]], [[16, 2]]]
    """
    passes: dict[Any, np.ndarray] = {}
    shape = None
    for number, record in enumerate(records):
        if "logical_count" in record:
            count = checks.host_array("logical_count", record["logical_count"], "int64", (2,))
        else:
            count = _logical(record["global_physical_count"], mapping)
        shape = shape or count.shape
        checks.host_shape("logical_count", count, shape, "that of the first record")
        key = record.get("forward_pass_id", ("record", number))
        passes[key] = passes.get(key, 0) + count
    return np.stack(list(passes.values()))


def _logical(physical_count: Any, mapping: Any) -> np.ndarray:
    experts = checks.host_array("last_physical_to_logical_map", mapping, "int64", (2,))
    physical = checks.host_array("global_physical_count", physical_count, "int64", (2,))
    checks.host_shape("global_physical_count", physical, experts.shape, "that of `last_physical_to_logical_map`")
    count = np.zeros((len(experts), int(experts.max()) + 1), np.int64)
    layers, slots = np.nonzero(experts >= 0)
    np.add.at(count, (layers, experts[layers, slots]), physical[layers, slots])
    return count
