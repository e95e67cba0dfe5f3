"""`ExpertLocation`: the slots and ranks that hold each expert, and the files of such locations."""

import copy
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from numba_moe.placement.dumps import read_file
from numba_moe.placement.rebalance import (
    check_map,
    check_slots_per_rank,
    even_sizes,
    rebalance_experts,
    slots_of_experts,
)
from numba_moe.runtime import checks, files, formats
from numba_moe.runtime.text import counted

FORMATS = (".json", ".npz", ".pt")
# What the tables of a location that is read may take: 61 layers of 384 experts on 384 ranks need half of it.
MOST_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertLocation:
    """The slots and ranks that hold each expert.

    Make one by `trivial`, `from_mapping`, `from_counts` or `load`. Arrays are int64 NumPy arrays that cannot be
    written; a change is a new location.

    Attributes
    ----------
    physical_to_logical_map : int64 [L, P]
        The expert of each slot, -1 throughout a rank without experts.
    logical_to_all_physical_map : int64 [L, E, P - E + 1]
        The slots of each expert, ascending, padded with -1. The last dimension follows from the others, so it stays
        as it is when experts move.
    logical_to_all_physical_map_num_valid : int64 [L, E]
        How many slots each expert has.
    rank_of_slot : int64 [P]
        Ascending from 0; ranks may differ in their numbers of slots.
    node_of_slot : int64 [P]
        Ascending from 0.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Arrays that contradict each other; the message names the first place.

    Examples
    --------
    >>> import numpy as np
    >>> location = ExpertLocation.from_mapping(np.array([[0, 1, 2, 0]]), num_gpus=2)
    >>> location.logical_to_all_physical_map
    array([[[ 0,  3],
            [ 1, -1],
            [ 2, -1]]])
    >>> location.rank_of_slot
    array([0, 0, 1, 1])
    >>> location == ExpertLocation.trivial(1, 3, 4, num_gpus=2)
    True
    """

    physical_to_logical_map: np.ndarray
    logical_to_all_physical_map: np.ndarray
    logical_to_all_physical_map_num_valid: np.ndarray
    rank_of_slot: np.ndarray
    node_of_slot: np.ndarray

    def __post_init__(self) -> None:
        ndims = (2, 3, 2, 1, 1)
        for field, ndim in zip(dataclasses.fields(self), ndims, strict=True):
            array = checks.host_array(field.name, getattr(self, field.name), "int64", (ndim,)).copy()
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        self.validate()

    @classmethod
    def trivial(
        cls,
        num_layers: int,
        num_experts: int,
        num_replicas: int | None = None,
        *,
        num_gpus: int = 1,
        num_nodes: int = 1,
        slots_per_rank: Any = None,
    ) -> "ExpertLocation":
        """Put expert ``slot % num_experts`` into each of `num_replicas` slots (one for each expert by default).

        `num_gpus`, `num_nodes` and `slots_per_rank` are those of `from_mapping`.

        Examples
        --------
        >>> ExpertLocation.trivial(1, num_experts=3, num_replicas=4).physical_to_logical_map
        array([[0, 1, 2, 0]])
        """
        num_layers = checks.integer("num_layers", num_layers, 1)
        num_experts = checks.integer("num_experts", num_experts, 1)
        num_slots = num_experts if num_replicas is None else checks.integer("num_replicas", num_replicas, 1)
        checks.at_least("num_replicas", num_slots, num_experts, "num_experts")
        places = np.tile(np.arange(num_slots) % num_experts, (num_layers, 1))
        return cls.from_mapping(places, num_experts, num_gpus, num_nodes, slots_per_rank=slots_per_rank)

    @classmethod
    def from_mapping(
        cls,
        physical_to_logical_map: Any,
        num_experts: int | None = None,
        num_gpus: int = 1,
        num_nodes: int = 1,
        *,
        slots_per_rank: Any = None,
    ) -> "ExpertLocation":
        """Take the expert of each slot.

        Parameters
        ----------
        physical_to_logical_map : array of int, shape [L, P]
            The expert of each slot, -1 throughout a rank without experts.
        num_experts : int, optional
            Experts of a layer (E); by default one more than the largest in the map.
        num_gpus, num_nodes : int
            Number of ranks, and of nodes. Consecutive ranks form a node, and sizes of nodes differ by at most 1.
        slots_per_rank : array of int, shape [num_gpus], optional
            Slots of each rank, as equal as can be by default, larger ranks first.

        Raises
        ------
        TypeError
            An array or a dtype of the wrong kind.
        ValueError
            More ranks than slots, sizes that do not agree, an expert without a slot, a rank with some empty slots.

        Examples
        --------
        >>> location = ExpertLocation.from_mapping([[0, 1, 2, 0, 1]], num_gpus=2, slots_per_rank=[2, 3])
        >>> location.rank_of_slot
        array([0, 0, 1, 1, 1])
        """
        places = checks.host_array("physical_to_logical_map", physical_to_logical_map, "int64", (2,))
        if num_experts is None:
            num_experts = max(int(places.max()) + 1, 1)
        num_slots = places.shape[1]
        experts = checks.integer("num_experts", num_experts, 1, num_slots, f"the number of slots = {num_slots}")
        num_gpus = checks.integer("num_gpus", num_gpus, 1, num_slots, f"the number of slots = {num_slots}")
        num_nodes = checks.integer("num_nodes", num_nodes, 1, num_gpus, f"num_gpus = {num_gpus}")
        sizes = check_slots_per_rank(slots_per_rank, num_slots, num_gpus)
        rank_of_slot = np.repeat(np.arange(num_gpus), sizes)
        node_of_rank = np.repeat(np.arange(num_nodes), even_sizes(num_gpus, num_nodes))
        check_map("physical_to_logical_map", places, experts, rank_of_slot)
        return cls(places, *slots_of_experts(places, experts), rank_of_slot, node_of_rank[rank_of_slot])

    @classmethod
    def from_counts(
        cls, weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, **options: Any
    ) -> "ExpertLocation":
        """Choose by loads; parameters, options and errors are those of `rebalance_experts`.

        Examples
        --------
        >>> location = ExpertLocation.from_counts([[8.0, 8.0, 4.0]], 4, 1, 1, 2, algorithm="refined")
        >>> location.physical_to_logical_map
        array([[1, 2, 0, 2]])
        """
        placed = rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus, **options)
        sizes = options.get("slots_per_rank")
        num_experts = placed.logical_to_all_physical_map_num_valid.shape[1]
        places = placed.physical_to_logical_map
        return cls.from_mapping(places, num_experts, num_gpus, num_nodes, slots_per_rank=sizes)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        num_replicas: int | None = None,
        num_groups: int | None = None,
        num_nodes: int | None = None,
        num_gpus: int | None = None,
        slots_per_rank: Any = None,
        num_layers: int | None = None,
        num_experts: int | None = None,
        **options: Any,
    ) -> "ExpertLocation":
        """Read a location, a map, or counts to place experts by.

        Parameters
        ----------
        path : path
            A ``.json``, ``.npz``, ``.pt``, ``.safetensors`` or ``.csv`` file (read without running code from it). It
            holds what `save` writes; or ``physical_to_logical_map`` alone, in ``.json`` also without its name; or
            ``logical_count`` [L, E] or [steps, L, E], as recorders dump it, in ``.csv`` one line for an expert. A list
            of records will do as well: each with ``logical_count`` [L, E], or SGLang's ``records`` of a rank with their
            ``global_physical_count`` [L, P], or with ``topk_ids_of_layer`` [L, T, K] alone.
        num_nodes, num_gpus, slots_per_rank : optional
            Where slots are, for a file that does not say. It needs `num_gpus`; the others are those of `from_mapping`.
        num_replicas, num_groups, **options : optional
            For a file of counts, those of `rebalance_experts`; groups are 1 by default. It needs `num_replicas`.
        num_layers, num_experts : int, optional
            Sizes of the model, for a ``.csv`` file without a line for the last layer or expert.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            Another kind of file, a pipe, a damaged file, one that holds neither, counts that are negative or whose sum
            int64 cannot hold, numbers that ask for far more memory than the file has, an argument that is missing, or
            one that the file has no use for.
        """
        path = checks.path("path", path)
        content = read_file(path, num_layers, num_experts)
        known = isinstance(content, dict) and bool({"physical_to_logical_map", "logical_count"} & content.keys())
        checks.holds("path", "a file with physical_to_logical_map or logical_count", known, path.name)
        of_csv = {} if path.suffix == ".csv" else {"num_layers": num_layers, "num_experts": num_experts}
        of_ranks = {"num_gpus": num_gpus, "num_nodes": num_nodes, "slots_per_rank": slots_per_rank}
        of_counts = {"num_replicas": num_replicas, "num_groups": num_groups, **options}
        has_map, has_ranks = "physical_to_logical_map" in content, "rank_of_slot" in content
        unused = {**of_csv, **(of_ranks if has_ranks else {}), **(of_counts if has_map else {})}
        for name, value in unused.items():
            checks.holds(name, f"left out for {path.name}, which does not need it", value is None, value)
        if has_ranks:
            return cls._from_content(content, path)
        for name, value in {"num_gpus": num_gpus, **({} if has_map else {"num_replicas": num_replicas})}.items():
            checks.holds(name, f"given for {path.name}, which does not say", value is not None, value)
        num_gpus, num_nodes = num_gpus or 0, 1 if num_nodes is None else num_nodes
        if has_map:
            mapping = formats.array("physical_to_logical_map", content["physical_to_logical_map"], (2,))
            check_tables("physical_to_logical_map", len(mapping), int(mapping.max()) + 1, mapping.shape[1])
            return cls.from_mapping(mapping, None, num_gpus, num_nodes, slots_per_rank=slots_per_rank)
        if slots_per_rank is not None:
            options["slots_per_rank"] = slots_per_rank
        counts = formats.array("logical_count", content["logical_count"], (2, 3), "float64")
        if np.asarray(content["logical_count"]).dtype.kind in "iu":
            counts = formats.counts("logical_count", content["logical_count"], (2, 3))
        else:
            total = float(counts.sum())
            rule = f"loads whose sum is at most {checks.LARGEST_INT64}, as of counts"
            checks.holds("logical_count", rule, total < 2.0**63, total)
        num_slots = checks.integer("num_replicas", num_replicas, 1)
        check_tables("num_replicas", counts.shape[-2], counts.shape[-1], num_slots)
        with checks.under_names(weight="logical_count"):
            num_groups = 1 if num_groups is None else num_groups
            return cls.from_counts(counts, num_slots, num_groups, num_nodes, num_gpus, **options)

    @classmethod
    def _from_content(cls, content: dict[str, Any], path: Path) -> "ExpertLocation":
        for name in ("num_logical_experts", "node_of_slot", "physical_to_logical_map"):
            checks.holds("path", f"a file with {name}", name in content, path.name)
        places = formats.array("physical_to_logical_map", content["physical_to_logical_map"], (2,))
        num_experts = formats.array("num_logical_experts", content["num_logical_experts"], (0,))
        num_slots = places.shape[1]
        experts = checks.integer("num_logical_experts", int(num_experts), 1, num_slots, f"the slots = {num_slots}")
        check_tables("physical_to_logical_map", len(places), experts, num_slots)
        rank_of_slot = formats.array("rank_of_slot", content["rank_of_slot"], (1,))
        checks.host_shape("rank_of_slot", rank_of_slot, (num_slots,), "(the number of slots,)")
        node_of_slot = formats.array("node_of_slot", content["node_of_slot"], (1,))
        check_ascending("rank_of_slot", rank_of_slot)
        check_map("physical_to_logical_map", places, experts, rank_of_slot)
        return cls(places, *slots_of_experts(places, experts), rank_of_slot, node_of_slot)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.json``, ``.npz`` or ``.pt`` file, whole or not at all.

        Parameters
        ----------
        path : path
            Where to write; a file that is there is replaced, through a link if it is one, and keeps its mode.

        Raises
        ------
        OSError
            The file could not be written: what was there is still there.
        ValueError
            Another kind of file.

        Notes
        -----
        The file holds ``physical_to_logical_map``, ``num_logical_experts``, ``rank_of_slot`` and ``node_of_slot``.

        Examples
        --------
        >>> import tempfile
        >>> location = ExpertLocation.trivial(2, 8, 12, num_gpus=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     location.save(f"{folder}/location.json")
        ...     ExpertLocation.load(f"{folder}/location.json") == location
        True
        """
        path = checks.path("path", path)
        checks.choice("path", path.suffix, FORMATS)
        arrays = {
            "physical_to_logical_map": self.physical_to_logical_map,
            "num_logical_experts": np.array(self.num_logical_experts),
            "rank_of_slot": self.rank_of_slot,
            "node_of_slot": self.node_of_slot,
        }
        with files.replacing(path) as file:
            if path.suffix == ".json":
                file.write(json.dumps({name: array.tolist() for name, array in arrays.items()}).encode())
            elif path.suffix == ".npz":
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            else:
                formats.write_pt(file, arrays)

    def __eq__(self, other: object) -> bool:
        """Compare all arrays."""
        if not isinstance(other, ExpertLocation):
            return NotImplemented
        names = [field.name for field in dataclasses.fields(self)]
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        layers, experts = counted(self.num_layers, "layer"), counted(self.num_logical_experts, "expert")
        slots, ranks = counted(self.num_physical_experts, "slot"), counted(self.num_gpus, "rank")
        return f"ExpertLocation({layers}, {experts} in {slots} of {ranks} on {counted(self.num_nodes, 'node')})"

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_map.shape[0])

    @property
    def num_physical_experts(self) -> int:
        return int(self.physical_to_logical_map.shape[1])

    @property
    def num_logical_experts(self) -> int:
        return int(self.logical_to_all_physical_map.shape[1])

    @property
    def num_gpus(self) -> int:
        return int(self.rank_of_slot[-1]) + 1

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_slot[-1]) + 1

    @property
    def slots_per_rank(self) -> np.ndarray:
        return np.bincount(self.rank_of_slot)

    def validate(self) -> None:
        """Check that the arrays agree; the error names the first place where they do not.

        Raises
        ------
        ValueError
            Shapes that differ, ranks or nodes out of order, an expert without a slot, a rank with some empty slots, a
            list of slots that is not that of the map.
        """
        num_layers, num_slots = self.physical_to_logical_map.shape
        num_experts = self.logical_to_all_physical_map.shape[1]
        shape = (num_layers, num_experts, num_slots - num_experts + 1)
        checks.host_shape("logical_to_all_physical_map", self.logical_to_all_physical_map, shape, "(L, E, P - E + 1)")
        valid = self.logical_to_all_physical_map_num_valid
        checks.host_shape("logical_to_all_physical_map_num_valid", valid, shape[:2], "(L, E)")
        for name in ("rank_of_slot", "node_of_slot"):
            array = getattr(self, name)
            checks.host_shape(name, array, (num_slots,), "(P,)")
            check_ascending(name, array)
        first_of_rank = np.searchsorted(self.rank_of_slot, self.rank_of_slot)
        same = self.node_of_slot == self.node_of_slot[first_of_rank]
        checks.every("node_of_slot", "the same in all slots of a rank", same, self.node_of_slot, ("slot",))
        check_map("physical_to_logical_map", self.physical_to_logical_map, num_experts, self.rank_of_slot)
        slots, count = slots_of_experts(self.physical_to_logical_map, num_experts)
        axes = ("layer", "expert", "replica")
        rule = "the number of slots that the map gives each expert"
        checks.every("logical_to_all_physical_map_num_valid", rule, valid == count, valid, axes[:2])
        found = self.logical_to_all_physical_map
        rule = "the slots that the map gives each expert, ascending, then -1"
        checks.every("logical_to_all_physical_map", rule, found == slots, found, axes)

    def update(self, other: "ExpertLocation", layers: Iterable[int] | None = None) -> "ExpertLocation":
        """Return a location with some layers of another.

        Parameters
        ----------
        other : ExpertLocation
            Of the same sizes, ranks and nodes.
        layers : iterable of int, optional
            Layers to take from it; all by default.

        Raises
        ------
        TypeError
            Another kind of object.
        ValueError
            Different sizes, ranks or nodes, or a layer that is not there.

        Examples
        --------
        >>> old = ExpertLocation.from_mapping([[0, 1], [0, 1]])
        >>> new = ExpertLocation.from_mapping([[1, 0], [1, 0]])
        >>> old.update(new, layers=[1]).physical_to_logical_map
        array([[0, 1],
               [1, 0]])
        """
        check_alike("other", other, self)
        indices = check_layers(layers, self.num_layers)
        updated = copy.copy(self)  # not checked again, as each layer is one of a location that was
        for name in [field.name for field in dataclasses.fields(self)][:3]:
            array = getattr(self, name).copy()
            array[indices] = getattr(other, name)[indices]
            array.flags.writeable = False
            object.__setattr__(updated, name, array)
        return updated

    def with_places(self, physical_to_logical_map: Any) -> "ExpertLocation":
        """Return a location with the same ranks and nodes, and other experts in the slots.

        Parameters
        ----------
        physical_to_logical_map : array of int, shape [L, P]
            The expert of each slot, -1 throughout a rank without experts.

        Raises
        ------
        TypeError
            An array or a dtype of the wrong kind.
        ValueError
            Another shape, an expert without a slot, a rank with some empty slots.

        Examples
        --------
        >>> old = ExpertLocation.from_mapping([[0, 1, 2, 2]], num_gpus=2)
        >>> old.with_places([[0, 1, 2, 0]])
        ExpertLocation(1 layer, 3 experts in 4 slots of 2 ranks on 1 node)
        """
        places = checks.host_array("physical_to_logical_map", physical_to_logical_map, "int64", (2,))
        shape = self.physical_to_logical_map.shape
        checks.host_shape("physical_to_logical_map", places, shape, "(L, P)")
        experts = self.num_logical_experts
        check_map("physical_to_logical_map", places, experts, self.rank_of_slot)
        return ExpertLocation(places, *slots_of_experts(places, experts), self.rank_of_slot, self.node_of_slot)


def check_alike(argument: str, value: Any, location: ExpertLocation) -> None:
    """Check that a location differs from another in the places of experts at most."""
    checks.instance(argument, value, ExpertLocation)
    for name in ("logical_to_all_physical_map", "rank_of_slot", "node_of_slot"):
        mine, given = getattr(location, name), getattr(value, name)
        same = mine.shape == given.shape and (mine.ndim > 1 or np.array_equal(mine, given))
        checks.holds(argument, "of the same sizes, ranks and nodes", same, value)


def check_ascending(argument: str, numbers: np.ndarray) -> None:
    """Check numbers of ranks or nodes, one for each slot."""
    step = np.diff(numbers, prepend=0)
    ascending = (step == 0) | ((step == 1) & (np.arange(len(numbers)) > 0))
    checks.every(argument, "ascending from 0 without gaps", ascending, numbers, ("slot",))


def check_tables(argument: str, num_layers: int, num_experts: int, num_slots: int) -> None:
    """Check that the slots of every expert, in a table [L, E, P - E + 1], take a size that a machine can have."""
    wanted = 8 * num_layers * num_experts * (num_slots - num_experts + 1)
    rule = f"small enough for the slots of every expert to take at most {MOST_BYTES} bytes"
    checks.holds(argument, rule, wanted <= MOST_BYTES, f"{wanted} bytes")


def check_layers(layers: Iterable[int] | None, num_layers: int) -> list[int]:
    """Return the layers asked for, all by default."""
    last = num_layers - 1
    chosen = range(num_layers) if layers is None else layers
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(f"`layers` must be integers, got {type(chosen).__name__}")
    return [checks.integer("layers", layer, 0, last, f"num_layers - 1 = {last}") for layer in chosen]
