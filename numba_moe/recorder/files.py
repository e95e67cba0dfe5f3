"""What a recorder gives out, and the files it is kept in."""

import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from numba_moe.placement.dumps import read_whole
from numba_moe.reference.recorder import logical_counts, utilization
from numba_moe.runtime import checks, files

FORMATS = ("npz", "safetensors", "json", "csv", "pt")
# Tokens of a dump that are counted together.
TOKENS_AT_ONCE = 4096
# Numbers of a .json file that are written together, in about 2 ms.
NUMBERS_AT_ONCE = 16384
CSV_HEADER = "layer_id,expert_id,count"


@dataclasses.dataclass(frozen=True, eq=False)
class Dump:
    """What was recorded of N passes: NumPy arrays.

    A record is a pass, or with debug names a part of it.

    Attributes
    ----------
    mode : str
        That of the recorder.
    rank : int
        The rank that wrote it.
    num_experts, num_gpus : int
        Experts of a layer (E); ranks that share the P slots equally.
    forward_pass_id : int64 [N]
        -1 for what was counted outside of passes.
    gatherer_key : list of str
        The debug name of each record, "primary" where there is none.
    map_of_pass : int64 [N]
        Which of the maps was in force.
    physical_to_logical_maps : int64 [M, L, P]
        The expert of each slot, the last map last.
    logical_count : int64 [N, L, E]
        Slots of routing by expert.
    global_physical_count : int64 [N, L, P]
        The same by the slot that they went to.
    rank_physical_count : int64 [sources, L, P]
        The sum over passes, for the tokens of each rank that the dump sums; see `traffic_matrix`.
    topk_ids : int32 [tokens, L, K] or None
        With "per_token" the slots chosen for each token, -1 for none.
    topk_weights : float32 [tokens, L, K] or None
        Their weights, where hooks were given them.
    num_tokens : int64 [N] or None
        How many of these tokens each record has, in order.
    """

    mode: str
    rank: int
    num_experts: int
    num_gpus: int
    forward_pass_id: np.ndarray
    gatherer_key: list[str]
    map_of_pass: np.ndarray
    physical_to_logical_maps: np.ndarray
    logical_count: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    global_physical_count: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    rank_physical_count: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    topk_ids: np.ndarray | None = None
    topk_weights: np.ndarray | None = None
    num_tokens: np.ndarray | None = None

    @property
    def last_physical_to_logical_map(self) -> np.ndarray:
        """The map in force at the end, int64 [L, P]."""
        return self.physical_to_logical_maps[-1]

    def with_counts(self, physical_count: np.ndarray) -> "Dump":
        """Return the dump with the counts of its records [N, L, P], and with what follows from them."""
        num_steps, num_layers, _ = physical_count.shape
        logical = np.zeros((num_steps, num_layers, self.num_experts), np.int64)
        for index, places in enumerate(self.physical_to_logical_maps):
            under = self.map_of_pass == index
            logical[under] = logical_counts(physical_count[under], places, self.num_experts)
        of_rank = physical_count.sum(axis=0)[None]
        return dataclasses.replace(
            self, global_physical_count=physical_count, logical_count=logical, rank_physical_count=of_rank
        )

    def with_counts_of_tokens(self, num_slots: int) -> "Dump":
        """Return the dump with the counts of its tokens; they are read in parts."""
        num_layers = self.physical_to_logical_maps.shape[1]
        counts = np.zeros((len(self.forward_pass_id), num_layers, num_slots), np.int64)
        first_slot = np.arange(num_layers)[:, None] * num_slots
        ends = np.cumsum([] if self.num_tokens is None else self.num_tokens).astype(int).tolist()
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            for first in range(begin, end, TOKENS_AT_ONCE):
                ids = np.asarray(self.topk_ids)[first : min(first + TOKENS_AT_ONCE, end)]
                found = np.bincount((ids + first_slot)[ids >= 0], minlength=counts[number].size)
                counts[number] += found.reshape(num_layers, num_slots)
        return self.with_counts(counts)

    def records(self) -> list[dict[str, Any]]:
        """Return a dict for each record, named as SGLang names things; ids as [L, T, K] without a copy."""
        ends = np.cumsum(np.zeros(len(self.forward_pass_id), int) if self.num_tokens is None else self.num_tokens)
        found = []
        for number, pass_id in enumerate(self.forward_pass_id.tolist()):
            record = {
                "forward_pass_id": pass_id,
                "rank": self.rank,
                "gatherer_key": self.gatherer_key[number],
                "global_physical_count": self.global_physical_count[number],
                "logical_count": self.logical_count[number],
                "physical_to_logical_map": self.physical_to_logical_maps[self.map_of_pass[number]],
            }
            for name, tokens in (("topk_ids_of_layer", self.topk_ids), ("topk_weights_of_layer", self.topk_weights)):
                if tokens is not None and self.num_tokens is not None:
                    part = tokens[ends[number] - self.num_tokens[number] : ends[number]]
                    record[name] = part.transpose(1, 0, 2)
            found.append(record)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.npz``, ``.safetensors``, ``.json``, ``.csv`` or ``.pt`` file, whole or not at all.

        ``.csv`` has the counts summed over passes. ``.pt`` is SGLang's: a dict of counts, or of records with a map.
        """
        path = Path(path)
        checks.choice("path", path.suffix.removeprefix("."), FORMATS)
        with files.replacing(path) as file:
            _WRITERS[path.suffix](file, self)


def _arrays(dump: Dump) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what is short, and the arrays."""
    about, found = {}, {}
    for field in dataclasses.fields(dump):
        value = getattr(dump, field.name)
        if isinstance(value, np.ndarray):
            found[field.name] = value
        elif value is not None:
            about[field.name] = value
    return about, found


def _write_npz(file: IO[bytes], dump: Dump) -> None:
    about, found = _arrays(dump)
    np.savez(file, about=_as_bytes(about), **found)  # type: ignore[arg-type]


def _write_safetensors(file: IO[bytes], dump: Dump) -> None:
    """Write the format by hand: its library would take the whole file into memory first."""
    names = {"int64": "I64", "int32": "I32", "float32": "F32", "uint8": "U8"}
    about, found = _arrays(dump)
    found = {"about": _as_bytes(about), **found}
    header: dict[str, Any] = {}
    end = 0
    for name, array in found.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for array in found.values():
        file.write(np.ascontiguousarray(array).data)


def _write_json(file: IO[bytes], dump: Dump) -> None:
    about, found = _arrays(dump)
    file.write(json.dumps(about).removesuffix("}").encode())
    for name, array in found.items():
        file.write(f', "{name}": '.encode())
        for text in _json_of(array):
            file.write(text.encode())
    file.write(b"}")


def _json_of(array: np.ndarray) -> Iterator[str]:
    """Write an array in parts: while a call writes the whole of a large one, no other thread runs."""
    if array.size <= NUMBERS_AT_ONCE or array.ndim == 1:
        yield json.dumps(array.tolist())
        return
    for number, part in enumerate(array):
        yield ", " if number else "["
        yield from _json_of(part)
    yield "]"


def _write_csv(file: IO[bytes], dump: Dump) -> None:
    total = dump.logical_count.sum(axis=0)
    lines = [f"{layer},{expert},{count}" for (layer, expert), count in np.ndenumerate(total)]
    file.write("\n".join([CSV_HEADER, *lines, ""]).encode())


def _write_pt(file: IO[bytes], dump: Dump) -> None:
    def tensors(content: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
            for name, value in content.items()
        }

    if dump.mode in ("per_pass", "per_token"):
        records = [tensors(record) for record in dump.records()]
        content = tensors({"last_physical_to_logical_map": dump.last_physical_to_logical_map}) | {"records": records}
    else:
        mean = float(utilization(dump.global_physical_count, dump.num_gpus).mean())
        names = ("logical_count", "global_physical_count", "forward_pass_id", "last_physical_to_logical_map")
        content = tensors({name: getattr(dump, name) for name in names})
        content |= {"rank": dump.rank, "average_utilization_rate_over_window": mean}
    torch.save(content, file)


_WRITERS = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".json": _write_json,
    ".csv": _write_csv,
    ".pt": _write_pt,
}


def _as_bytes(about: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(about).encode(), np.uint8)


def load(path: str | os.PathLike[str]) -> Dump:
    r"""Read a dump.

    Parameters
    ----------
    path : path
        A ``.npz``, ``.safetensors``, ``.json``, ``.csv`` or ``.pt`` file: this library's, SGLang's dumps of counts
        and of records, or any with ``logical_count`` [L, E] or [steps, L, E].

    Returns
    -------
    Dump
        Where a file does not say, experts are slots, passes have ascending ids, and there is one rank.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Another kind of file, a damaged one, one without counts.

    Notes
    -----
    No code from the file is run. Reading ``.safetensors`` takes the package of that name.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "counts.csv"
    ...     _ = path.write_text("layer_id,expert_id,count\n0,0,5\n0,1,7\n")
    ...     load(path).logical_count
    array([[[5, 7]]])
    """
    path = Path(path)
    checks.choice("path", path.suffix.removeprefix("."), FORMATS)
    content = _read_csv(path) if path.suffix == ".csv" else read_whole(path)
    if isinstance(content, list):
        content = {"records": content}
    known = isinstance(content, dict) and bool({"logical_count", "records"} & content.keys())
    checks.holds("path", "a file with logical_count or records", known, path.name)
    content = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in content.items()}
    if "about" in content:
        content |= json.loads(bytes(content.pop("about")))
    if "physical_to_logical_maps" in content:
        return _of_arrays(content)
    return _of_records(content) if content.get("records") else _of_counts(content)


def _of_arrays(content: dict[str, Any]) -> Dump:
    kinds = {"topk_ids": np.int32, "topk_weights": np.float32}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Dump):
        value = content.get(field.name)
        if field.name in ("mode", "rank", "num_experts", "num_gpus", "gatherer_key"):
            found[field.name] = value
        elif value is not None:
            found[field.name] = np.asarray(value, kinds.get(field.name, np.int64))
    missing = [name for name in ("mode", "logical_count", "forward_pass_id", "map_of_pass") if found.get(name) is None]
    checks.holds("path", "a whole dump", not missing, f"one without {', '.join(missing)}")
    return Dump(**found)


def _numbers(name: str, value: Any, ndims: tuple[int, ...]) -> np.ndarray:
    return checks.host_array(name, value, "int64", ndims)


def _of_counts(content: dict[str, Any]) -> Dump:
    logical = _numbers("logical_count", content["logical_count"], (2, 3))
    logical = logical if logical.ndim == 3 else logical[None]
    num_steps, num_layers, num_experts = logical.shape
    places = np.tile(np.arange(num_experts), (num_layers, 1))
    physical = logical
    if "last_physical_to_logical_map" in content and "global_physical_count" in content:
        places = _numbers("last_physical_to_logical_map", content["last_physical_to_logical_map"], (2,))
        physical = _numbers("global_physical_count", content["global_physical_count"], (3,))
    dump = Dump(
        mode="stat",
        rank=int(content.get("rank", 0)),
        num_experts=num_experts,
        num_gpus=1,
        forward_pass_id=np.asarray(content.get("forward_pass_id", np.arange(num_steps)), np.int64),
        gatherer_key=["primary"] * num_steps,
        map_of_pass=np.zeros(num_steps, np.int64),
        physical_to_logical_maps=places[None],
    )
    return dataclasses.replace(dump.with_counts(physical), logical_count=logical)


def _of_records(content: dict[str, Any]) -> Dump:
    records = content["records"]
    last = content.get("last_physical_to_logical_map")
    maps: list[np.ndarray] = []
    map_of_pass, counts, tokens, weights = [], [], [], []
    for record in records:
        count = record.get("global_physical_count", record.get("logical_count"))
        ids = record.get("topk_ids_of_layer")
        places = record.get("physical_to_logical_map", last)
        if ids is not None:
            tokens.append(np.asarray(ids, np.int32).transpose(1, 0, 2))
        if record.get("topk_weights_of_layer") is not None:
            weights.append(np.asarray(record["topk_weights_of_layer"], np.float32).transpose(1, 0, 2))
        if count is not None:
            counts.append(_numbers("global_physical_count", count, (2,)))
        if places is None:
            checks.holds("path", "a file with a map, or counts", count is not None, "records of ids alone")
            places = np.tile(np.arange(counts[-1].shape[1]), (len(counts[-1]), 1))
        places = _numbers("physical_to_logical_map", places, (2,))
        if not maps or not np.array_equal(maps[-1], places):
            maps.append(places)
        map_of_pass.append(len(maps) - 1)
    has_tokens = len(tokens) == len(records)
    dump = Dump(
        mode="per_token" if has_tokens else "per_pass",
        rank=int(records[0].get("rank", 0)),
        num_experts=int(max(places.max() for places in maps)) + 1,
        num_gpus=1,
        forward_pass_id=np.array([r.get("forward_pass_id", i) for i, r in enumerate(records)], np.int64),
        gatherer_key=[str(record.get("gatherer_key", "primary")) for record in records],
        map_of_pass=np.array(map_of_pass, np.int64),
        physical_to_logical_maps=np.stack(maps),
        topk_ids=np.concatenate(tokens) if has_tokens else None,
        topk_weights=np.concatenate(weights) if len(weights) == len(records) else None,
        num_tokens=np.array([len(part) for part in tokens], np.int64) if has_tokens else None,
    )
    if len(counts) == len(records):
        return dump.with_counts(np.stack(counts))
    return dump.with_counts_of_tokens(maps[0].shape[1])


def _read_csv(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines()
    checks.holds("path", f"a file with the header {CSV_HEADER}", lines[:1] == [CSV_HEADER], path.name)
    try:
        rows = np.array([[int(part) for part in line.split(",")] for line in lines[1:]], np.int64).reshape(-1, 3)
    except ValueError as error:
        raise ValueError(f"`path` must be a whole .csv file, got {path.name} ({error})") from error
    checks.holds("path", "a file of counts, none negative", bool(len(rows) and (rows >= 0).all()), path.name)
    count = np.zeros(rows[:, :2].max(axis=0) + 1, np.int64)
    np.add.at(count, (rows[:, 0], rows[:, 1]), rows[:, 2])
    return {"logical_count": count}
