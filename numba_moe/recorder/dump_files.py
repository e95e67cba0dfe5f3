"""What a recorder gives out, and the files it is kept in."""

import dataclasses
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from numba_moe.placement.dumps import Slots, map_of_ids, slots_of_record
from numba_moe.placement.traces import load_trace
from numba_moe.recorder import sums
from numba_moe.recorder.hooks import MODES
from numba_moe.reference.recorder import logical_counts, utilization
from numba_moe.runtime import checks, files, formats

FORMATS = ("npz", "safetensors", "json", "csv", "pt")
# What a dump may lack.
OF_TOKENS = ("topk_ids", "topk_weights", "num_tokens")
# Tokens of a dump that are counted together.
TOKENS_AT_ONCE = 4096
# Numbers of a .json file that are written together, in about 2 ms.
NUMBERS_AT_ONCE = 16384


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
        path = checks.path("path", path)
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
    """Write the format by hand: its library takes the whole file into memory, or renames one of its own over a path."""
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


def csv_of(counts: np.ndarray) -> str:
    """Return counts [L, E] as lines of layer, expert and count."""
    lines = [f"{layer},{expert},{count}" for (layer, expert), count in np.ndenumerate(counts)]
    return "\n".join([formats.CSV_HEADER, *lines, ""])


def _write_csv(file: IO[bytes], dump: Dump) -> None:
    file.write(csv_of(dump.logical_count.sum(axis=0)).encode())


def _write_pt(file: IO[bytes], dump: Dump) -> None:
    content: dict[str, Any] = {"last_physical_to_logical_map": dump.last_physical_to_logical_map}
    if dump.mode in ("per_pass", "per_token"):
        content["records"] = dump.records()
    else:
        mean = float(utilization(dump.global_physical_count, dump.num_gpus).mean())
        names = ("logical_count", "global_physical_count", "forward_pass_id")
        content |= {name: getattr(dump, name) for name in names}
        content |= {"rank": dump.rank, "average_utilization_rate_over_window": mean}
    formats.write_pt(file, content)


_WRITERS = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".json": _write_json,
    ".csv": _write_csv,
    ".pt": _write_pt,
}


def _as_bytes(about: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(about).encode(), np.uint8)


def load(path: str | os.PathLike[str], *, num_layers: int | None = None, num_experts: int | None = None) -> Dump:
    r"""Read a dump.

    Parameters
    ----------
    path : path
        A ``.npz``, ``.safetensors``, ``.json``, ``.csv`` or ``.pt`` file: this library's, SGLang's dumps of counts
        and of records, or any with ``logical_count`` [L, E] or [steps, L, E], or with ``topk_ids`` [steps, L, T, K].
    num_layers : int, optional
        Layers of the model (L). A ``.csv`` file without a line for the last one needs it; other files are checked.
    num_experts : int, optional
        Experts of a layer (E), in the same way. Ids without counts and without a map need it, if no token chose the
        last expert.

    Returns
    -------
    Dump
        Where a file does not say, experts are slots, passes have ascending ids, and there is one rank.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Another kind of file, a pipe, a damaged file, one without counts, one whose arrays contradict each other; counts
        that are negative or whose sum int64 cannot hold; other sizes; numbers that ask for more memory than 64 MiB
        and than 200 times the file.

    Notes
    -----
    No code from the file is run.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "counts.csv"
    ...     _ = path.write_text("layer_id,expert_id,count\n0,0,5\n0,1,7\n")
    ...     load(path).logical_count, load(path, num_experts=4).logical_count
    (array([[[5, 7]]]), array([[[5, 7, 0, 0]]]))
    """
    path = checks.path("path", path)
    checks.choice("path", path.suffix.removeprefix("."), FORMATS)
    if path.suffix == ".csv":
        return _of_counts({"logical_count": formats.read_csv(path, num_layers, num_experts)})
    content = formats.read(path, [f".{name}" for name in FORMATS])
    if isinstance(content, list):
        content = {"records": content}
    known = isinstance(content, dict) and bool({"logical_count", "records", "topk_ids"} & content.keys())
    checks.holds("path", "a file with logical_count or records, or with topk_ids", known, path.name)
    if "about" in content:
        content |= _of_bytes(content.pop("about"), path)
    if {"physical_to_logical_maps", "map_of_pass"} & content.keys():
        dump = _of_arrays(content)
    elif "logical_count" in content and not content.get("records"):
        dump = _of_counts(content)
    elif "records" in content:
        dump = _of_records(content, path.stat().st_size, num_experts)
    else:
        loads = load_trace(path, num_experts=num_experts)
        dump = _of_counts({"logical_count": loads if loads.ndim == 3 else loads.sum(axis=3)})  # of all ranks
    for axis, (name, size) in enumerate({"num_layers": num_layers, "num_experts": num_experts}.items(), 1):
        if size is not None:
            there = dump.logical_count.shape[axis]
            checks.holds(name, f"that of {path.name} = {there}", checks.integer(name, size, 1) == there, size)
    return dump


def _of_bytes(about: Any, path: Path) -> dict[str, Any]:
    """Read what `_as_bytes` wrote."""
    found = formats.array("about", about, (1,))
    try:
        content = formats.parse_json(found.astype(np.uint8).tobytes())
    except ValueError as error:
        raise ValueError(f"`path` must be a whole dump, got {path.name} ({error})") from error
    checks.holds("about", "an object", isinstance(content, dict), type(content).__name__)
    return content


def _of_arrays(content: dict[str, Any]) -> Dump:
    names = [field.name for field in dataclasses.fields(Dump)]
    missing = [name for name in names if content.get(name) is None and name not in OF_TOKENS]
    checks.holds("path", "a whole dump", not missing, f"one without {', '.join(missing)}")
    checks.holds("mode", f"one of {', '.join(MODES)}", content["mode"] in MODES, repr(content["mode"]))
    maps = formats.array("physical_to_logical_maps", content["physical_to_logical_maps"], (3,))
    num_layers, num_slots = maps.shape[1:]
    experts = formats.integer("num_experts", content["num_experts"], 1)
    num_gpus = formats.integer("num_gpus", content["num_gpus"], 1)
    checks.divides("num_gpus", num_gpus, "the number of slots", num_slots)
    known = (maps >= -1) & (maps < experts)
    checks.every("physical_to_logical_maps", f"-1 or in [0, {experts})", known, maps, ("map", "layer", "slot"))
    pass_ids = formats.array("forward_pass_id", content["forward_pass_id"], (1,), empty=True)
    num_steps = len(pass_ids)
    map_of_pass = _shaped("map_of_pass", content["map_of_pass"], (num_steps,), "(records,)")
    known = (map_of_pass >= 0) & (map_of_pass < len(maps))
    checks.every("map_of_pass", f"in [0, {len(maps)})", known, map_of_pass, ("record",))
    keys = content["gatherer_key"]
    are_names = isinstance(keys, list) and len(keys) == num_steps and all(isinstance(key, str) for key in keys)
    checks.holds("gatherer_key", f"a list of {num_steps} names", are_names, keys)
    by_rank = formats.counts("rank_physical_count", content["rank_physical_count"], (3,))
    checks.host_shape("rank_physical_count", by_rank, (len(by_rank), num_layers, num_slots), "(sources, L, P)")
    dump = Dump(
        mode=content["mode"],
        rank=formats.integer("rank", content["rank"], 0),
        num_experts=experts,
        num_gpus=num_gpus,
        forward_pass_id=pass_ids,
        gatherer_key=keys,
        map_of_pass=map_of_pass,
        physical_to_logical_maps=maps,
        rank_physical_count=by_rank,
    )
    found: dict[str, Any] = {}
    for name, size in {"logical_count": experts, "global_physical_count": num_slots}.items():
        found[name] = _shaped(name, content[name], (num_steps, num_layers, size), "(records, L, E or P)")
        checks.counts(name, found[name])
    return dataclasses.replace(dump, **found, **_tokens_of(content, num_steps, num_layers, num_slots))


def _shaped(name: str, value: Any, shape: tuple[int, ...], because: str) -> np.ndarray:
    """Return an array of a shape; one without elements is a list of nothing in JSON, whatever its shape was."""
    if isinstance(value, list) and not value and 0 in shape:
        return np.zeros(shape, np.int64)
    found = formats.array(name, value, (len(shape),), empty=True)
    checks.host_shape(name, found, shape, because)
    return found


def _tokens_of(content: dict[str, Any], num_steps: int, num_layers: int, num_slots: int) -> dict[str, Any]:
    """Return what a dump has of tokens: nothing, or ids and how many of them each record has, and perhaps weights."""
    ids, weights, numbers = (content.get(name) for name in ("topk_ids", "topk_weights", "num_tokens"))
    if ids is None and weights is None and numbers is None:
        return {}
    for name, value in {"topk_ids": ids, "num_tokens": numbers}.items():
        checks.holds(name, "there, as others of tokens are", value is not None, None)
    numbers = _shaped("num_tokens", numbers, (num_steps,), "(records,)")
    checks.counts("num_tokens", numbers)
    found = {"num_tokens": numbers}
    total = int(numbers.sum())
    if not total and isinstance(ids, list):  # JSON keeps no shape of nothing
        ids = np.zeros((0, num_layers, 1), np.int64)
        weights = None if weights is None else ids.astype(np.float32)
    ids = formats.array("topk_ids", ids, (3,), empty=True)
    checks.host_shape("topk_ids", ids, (total, num_layers, ids.shape[2]), "(tokens, L, K)")
    checks.every("topk_ids", f"in [-1, {num_slots})", (ids >= -1) & (ids < num_slots), ids, ("token", "layer", "k"))
    found["topk_ids"] = ids.astype(np.int32)
    if weights is not None:
        found["topk_weights"] = formats.array("topk_weights", weights, (3,), "float64", empty=True).astype(np.float32)
        checks.host_shape("topk_weights", found["topk_weights"], ids.shape, "`topk_ids`.shape")
    return found


def _of_counts(content: dict[str, Any]) -> Dump:
    logical = formats.counts("logical_count", content["logical_count"], (2, 3))
    logical = logical if logical.ndim == 3 else logical[None]
    num_steps, num_layers, num_experts = logical.shape
    places = np.tile(np.arange(num_experts), (num_layers, 1))
    physical = logical
    if "last_physical_to_logical_map" in content and "global_physical_count" in content:
        places = formats.array("last_physical_to_logical_map", content["last_physical_to_logical_map"], (2,))
        known = (places >= -1) & (places < num_experts)
        checks.every("last_physical_to_logical_map", f"-1 or in [0, {num_experts})", known, places, ("layer", "slot"))
        physical = formats.counts("global_physical_count", content["global_physical_count"], (2, 3))
        physical = physical if physical.ndim == 3 else physical[None]
        shape = (num_steps, num_layers, places.shape[1])
        checks.host_shape("global_physical_count", physical, shape, "(steps, L, P)")
        checks.host_shape("last_physical_to_logical_map", places, shape[1:], "(L, P)")
    pass_ids = content.get("forward_pass_id", np.arange(num_steps))
    dump = Dump(
        mode="stat",
        rank=formats.integer("rank", content.get("rank", 0), 0),
        num_experts=num_experts,
        num_gpus=1,
        forward_pass_id=_shaped("forward_pass_id", pass_ids, (num_steps,), "(steps,)"),
        gatherer_key=["primary"] * num_steps,
        map_of_pass=np.zeros(num_steps, np.int64),
        physical_to_logical_maps=places[None],
    )
    return dataclasses.replace(dump.with_counts(physical), logical_count=logical)


def _of_records(content: dict[str, Any], size: int, num_experts: int | None) -> Dump:
    records, last_map = content["records"], content.get("last_physical_to_logical_map")
    are_records = isinstance(records, list) and bool(records) and all(isinstance(record, dict) for record in records)
    checks.holds("path", "a file with logical_count, or a list of records", are_records, type(records).__name__)
    if last_map is None:
        last_map = map_of_ids(records, num_experts, size)
    parts: list[Slots] = []
    maps: list[np.ndarray] = []
    map_of_pass = []
    for record in records:
        slots = slots_of_record(record, last_map)
        if not maps or not np.array_equal(maps[-1], slots.places):
            maps.append(slots.places)
            checks.host_shape("physical_to_logical_map", slots.places, maps[0].shape, "that of the first record")
        map_of_pass.append(len(maps) - 1)
        parts.append(slots)
    num_experts = int(max(places.max() for places in maps)) + 1
    checks.holds("physical_to_logical_map", "a map with an expert", num_experts > 0, "-1 everywhere")
    wanted = 8 * len(records) * len(maps[0]) * num_experts
    formats.check_memory("physical_to_logical_map", "the counts of its experts", wanted, size)
    counts = np.stack([slots.counts for slots in parts])
    checks.counts("global_physical_count", counts)
    pass_ids = [
        formats.integer("forward_pass_id", record.get("forward_pass_id", number), -1)
        for number, record in enumerate(records)
    ]
    dump = Dump(
        mode="per_pass",
        rank=formats.integer("rank", records[0].get("rank", 0), 0),
        num_experts=num_experts,
        num_gpus=1,
        forward_pass_id=np.array(pass_ids, np.int64),
        gatherer_key=[str(record.get("gatherer_key", "primary")) for record in records],
        map_of_pass=np.array(map_of_pass, np.int64),
        physical_to_logical_maps=np.stack(maps),
    )
    ids = [slots.topk_ids.transpose(1, 0, 2) for slots in parts if slots.topk_ids is not None]
    if len(ids) == len(records):
        tokens: dict[str, Any] = {"topk_ids": _joined("topk_ids_of_layer", ids), "num_tokens": [*map(len, ids)]}
        if all(record.get("topk_weights_of_layer") is not None for record in records):
            weights = [
                formats.array("topk_weights_of_layer", record["topk_weights_of_layer"], (3,), "float64", empty=True)
                for record in records
            ]
            tokens["topk_weights"] = _joined("topk_weights_of_layer", [part.transpose(1, 0, 2) for part in weights])
        dump = dataclasses.replace(dump, mode="per_token", **_tokens_of(tokens, *counts.shape))
    return dump.with_counts(counts)


def _joined(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """Join the tokens of records [T, L, K]."""
    for part in parts:
        checks.host_shape(name, part, (len(part), *parts[0].shape[1:]), "(tokens, L and K of the first record)")
    return np.concatenate(parts)


def over_ranks(dump: Dump, counts: torch.Tensor, group: Any) -> Dump:
    """Return a dump with counts [N, L, P] of all ranks, the sums of each rank among them."""
    import torch.distributed as dist

    mine = sums.Passes(counts, dump.forward_pass_id.tolist(), dump.map_of_pass.tolist())
    found = sums.by_pass(mine, dump.physical_to_logical_maps, group)
    with sums.together(group):
        of_rank = sums.sum_counts("rank_physical_count", sums.home_of(counts, group), 0)
    parts = [torch.empty_like(of_rank) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, of_rank, group=group)
    summed = dataclasses.replace(
        dump,
        forward_pass_id=np.array(found.pass_ids, np.int64),
        gatherer_key=["primary"] * len(found.pass_ids),
        map_of_pass=np.array(found.map_of_pass, np.int64),
    ).with_counts(found.counts.cpu().numpy())
    return dataclasses.replace(summed, rank_physical_count=torch.stack(parts).cpu().numpy())
