"""Move expert weights to the slots of a new location, over `torch.distributed` point-to-point.

Every rank derives the same plan from the two locations, so ranks need not agree on anything. Weights are bytes here.
A rank collects the new weights of a layer in memory of their own: local copies first, then those from other ranks, one
rank after the other, in rounds in which each rank has one peer. When all have arrived and all sends are complete, it
writes them into the slots.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from numba_moe.placement.location import ExpertLocation, check_alike, check_layers
from numba_moe.reference import migration as reference
from numba_moe.runtime import checks
from numba_moe.runtime.plans import layout

LayerWeights = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
WORD = 8  # bytes that a checksum takes at a time


class CorruptedWeightsError(RuntimeError):
    """Weights that arrived are not those that were sent; raised on every rank."""


class Copy(NamedTuple):
    """One expert on its way to one rank."""

    sender: int
    source: int  # slot of the sender
    receiver: int
    slots: list[int]  # slots of the receiver that get it


class Rows(NamedTuple):
    """One tensor of one layer, a row of bytes for each slot of this rank."""

    layer: int
    name: str
    bytes: torch.Tensor  # uint8 [local slots, bytes of an expert]


class Arrival(NamedTuple):
    """One expert's part of a tensor that is here, and not in its slots yet."""

    rows: Rows
    copy: Copy
    bytes: torch.Tensor  # uint8 [bytes of an expert]
    expected: torch.Tensor  # int64 [1], the checksum where it came from, if that is asked for


def plan_migration(old: Any, new: Any, layer: int) -> np.ndarray:
    """Choose, for each slot of a layer, the slot that sends its weights.

    Parameters
    ----------
    old : ExpertLocation
        Where the experts are.
    new : ExpertLocation
        Where the experts will be: a location with the same sizes, ranks and nodes.
    layer : int
        Number of the layer.

    Returns
    -------
    np.ndarray
        int64 [P], slots of `old`: the slot's own number if its expert stays, -1 if the slot will hold no expert.

    Raises
    ------
    TypeError
        No locations, no integer.
    ValueError
        Locations of different sizes, ranks or nodes; a layer that is not there.

    Notes
    -----
    The source is the first of these that holds the expert: the slot itself, the lowest slot of its rank, a slot of its
    node, any other slot. Slots are served in order. Of several other ranks, the one that sends least in this layer so
    far sends its lowest slot. A tie goes to the next rank after the receiver, cyclically. Slots of a rank that need the
    same expert have the same source, so a rank receives each expert once. Every rank gets the same answer by itself.

    Examples
    --------
    Expert 0 comes to slot 3, in place of expert 3, which moves to slot 0:

    >>> old = ExpertLocation.from_mapping([[0, 1, 2, 3]], num_gpus=2)
    >>> new = ExpertLocation.from_mapping([[3, 1, 2, 0]], num_gpus=2)
    >>> plan_migration(old, new, layer=0)
    array([3, 1, 2, 0])
    """
    checks.instance("old", old, ExpertLocation)
    check_alike("new", new, old)
    [layer] = check_layers([layer], old.num_layers)
    return reference.plan_migration(old, new, layer)


def preserve_intragpu_slots(old: Any, new: Any) -> ExpertLocation:
    """Put the experts of each rank into its slots so that those which stay on it stay in their slots.

    Parameters
    ----------
    old : ExpertLocation
        Where the experts are.
    new : ExpertLocation
        On which ranks they will be: a location with the same sizes, ranks and nodes.

    Returns
    -------
    ExpertLocation
        Each rank has the experts that it has in `new`, so loads of ranks are the same, and fewer slots to fill.

    Raises
    ------
    TypeError
        No locations.
    ValueError
        Locations of different sizes, ranks or nodes.

    Notes
    -----
    Slots are served in order; the experts that are new to a rank keep their order. The "refined" algorithm of
    `rebalance_experts` does this by itself where `current` is given.

    Examples
    --------
    The second rank keeps expert 3 in its last slot:

    >>> old = ExpertLocation.from_mapping([[0, 1, 2, 3]], num_gpus=2)
    >>> new = ExpertLocation.from_mapping([[2, 1, 3, 0]], num_gpus=2)
    >>> preserve_intragpu_slots(old, new).physical_to_logical_map
    array([[2, 1, 0, 3]])
    """
    checks.instance("old", old, ExpertLocation)
    check_alike("new", new, old)
    return new.with_places(reference.preserve_intragpu_slots(old, new))


def pair_ranks(size: Any) -> np.ndarray:
    """Divide what ranks send each other into rounds, in which each rank has one peer at most.

    Parameters
    ----------
    size : array of int, shape [R, R]
        What goes from each rank to each rank, in bytes or any other unit. The diagonal is ignored.

    Returns
    -------
    np.ndarray
        int64 [R, R], symmetric: the round in which two ranks exchange all that they have for each other, -1 for none.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        An array that is not square, or has numbers below 0.

    Notes
    -----
    Pairs take the first round in which both ranks are free, those with most to send in one direction first. Equal ones
    go by the turns of a round-robin tournament: if all ranks have equally much for all others, there are as few rounds
    as there can be. Where no rank has more than n peers, there are at most 2 n - 1 rounds.

    Examples
    --------
    Ranks 0 and 1 have most for each other. Ranks 2 and 3 exchange in the same round:

    >>> pair_ranks([[0, 9, 0, 1], [0, 0, 1, 0], [0, 0, 0, 4], [1, 0, 0, 0]])
    array([[-1,  0, -1,  1],
           [ 0, -1,  1, -1],
           [-1,  1, -1,  0],
           [ 1, -1,  0, -1]])
    """
    given = checks.host_array("size", size, "int64", (2,))
    checks.host_shape("size", given, (len(given), len(given)), "(num_ranks, num_ranks)")
    checks.every("size", "at least 0", given >= 0, given, ("sender", "receiver"))
    return reference.pair_ranks(given)


def copies_of(source: np.ndarray, rank_of_slot: np.ndarray) -> list[Copy]:
    """Return what a plan has to move, in order of the first slot that gets it; a rank gets an expert once."""
    found: dict[tuple[int, int], Copy] = {}
    for slot in np.flatnonzero((source >= 0) & (source != np.arange(len(source)))).tolist():
        key = int(rank_of_slot[slot]), int(source[slot])
        copy = found.setdefault(key, Copy(int(rank_of_slot[key[1]]), key[1], key[0], []))
        copy.slots.append(slot)
    return list(found.values())


def checksum(row: torch.Tensor) -> torch.Tensor:
    """Sum 8-byte words times 1, 3, 5, ... modulo 2^64: int64 [1]. A single word that differs changes it."""
    if row.numel() % WORD or row.storage_offset() % WORD:
        row = torch.nn.functional.pad(row, (0, -row.numel() % WORD))
    words = row.view(torch.int64)
    factors = torch.arange(1, 2 * words.numel(), 2, dtype=torch.int64, device=row.device)
    return (words * factors).sum().reshape(1)


class Migration:
    """What one rank does: `stage` brings weights of some layers to it, and `write` puts them into the slots."""

    def __init__(
        self, tensors: list[list[Rows]], old: ExpertLocation, new: ExpertLocation, group: Any, rank: int, verify: bool
    ) -> None:
        self.tensors, self.old, self.new, self.group, self.rank, self.verify = tensors, old, new, group, rank, verify
        self.first_slot = int(np.searchsorted(old.rank_of_slot, rank))
        self.device = device_of(tensors)
        self.peer: int | None = None  # the rank that this one exchanges with

    def move(self, layers: list[int]) -> None:
        """Move the weights of some layers, one after the other, and check that they arrived if that is asked for."""
        try:
            for layer in layers:
                arrivals = self.stage([layer])
                if self.verify:
                    self._compare(arrivals, layer)
                self.write(arrivals)
        except CorruptedWeightsError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"migration failed on rank {self.rank} in layers {layers}: a rank of the group is gone or late; a slot "
                "of these layers may hold the old or the new weights, other layers are whole"
            ) from error

    def stage(self, layers: list[int]) -> list[Arrival]:
        """Bring the weights of some layers that this rank is to hold to where nobody reads them yet."""
        num_ranks = self.old.num_gpus
        size = np.zeros((num_ranks, num_ranks), np.int64)
        exchanged: dict[int, list[tuple[Any, torch.Tensor]]] = {}
        arrivals = []
        for layer in layers:
            copies = copies_of(reference.plan_migration(self.old, self.new, layer), self.old.rank_of_slot)
            for copy in copies:
                size[copy.sender, copy.receiver] += sum(rows.bytes.shape[1] for rows in self.tensors[layer])
            mine = [copy for copy in copies if self.rank in (copy.sender, copy.receiver)]
            for rows in self.tensors[layer]:
                arrivals += self._begin(rows, mine, exchanged)
        rounds = reference.pair_ranks(size)[self.rank]
        for peer in sorted(exchanged, key=rounds.__getitem__):
            self.peer = peer
            self._exchange(exchanged[peer], peer)
        self.peer = None
        return arrivals

    def _row(self, rows: Rows, slot: int) -> torch.Tensor:
        return rows.bytes[slot - self.first_slot]

    def _begin(
        self, rows: Rows, copies: list[Copy], exchanged: dict[int, list[tuple[Any, torch.Tensor]]]
    ) -> list[Arrival]:
        """Copy what is here already, and add what is to be exchanged with each rank."""
        received = [copy for copy in copies if copy.receiver == self.rank]
        staged = rows.bytes.new_empty(len(received), rows.bytes.shape[1])
        expected = torch.zeros(len(received), dtype=torch.int64, device=staged.device)
        arrivals = [
            Arrival(rows, copy, staged[index], expected[index : index + 1]) for index, copy in enumerate(received)
        ]
        for arrival in arrivals:
            sender = arrival.copy.sender
            if sender != self.rank:
                parts = [arrival.bytes, arrival.expected][: 1 + self.verify]
                exchanged.setdefault(sender, []).extend((dist.irecv, part) for part in parts)
                continue
            row = self._row(rows, arrival.copy.source)
            arrival.bytes.copy_(row)
            if self.verify:
                arrival.expected.copy_(checksum(row))
        for copy in copies:
            if copy.receiver != self.rank:
                row = self._row(rows, copy.source)
                parts = [row, checksum(row)] if self.verify else [row]
                exchanged.setdefault(copy.receiver, []).extend((dist.isend, part) for part in parts)
        return arrivals

    def _exchange(self, parts: list[tuple[Any, torch.Tensor]], peer: int) -> None:
        """Send one rank all that there is for it, and take what it has."""
        group: Any = dist.group.WORLD if self.group is None else self.group
        there = dist.get_global_rank(group, peer)
        operations = [dist.P2POp(operation, tensor, there, group) for operation, tensor in parts]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def write(self, arrivals: list[Arrival]) -> None:
        """Write what has arrived into its slots."""
        for arrival in arrivals:
            for slot in arrival.copy.slots:
                self._row(arrival.rows, slot).copy_(arrival.bytes)

    def damaged(self, arrivals: list[Arrival]) -> list[Arrival]:
        """Return what differs from what was sent; this waits for a GPU."""
        if not arrivals:
            return []
        expected = torch.cat([arrival.expected for arrival in arrivals])
        found = torch.cat([checksum(arrival.bytes) for arrival in arrivals])
        return [arrivals[index] for index in (expected != found).nonzero().flatten().tolist()]

    def _compare(self, arrivals: list[Arrival], layer: int) -> None:
        """Compare checksums before anything is written, and tell all ranks."""
        wrong = self.damaged(arrivals)
        counts = [len(wrong)]
        if self.old.num_gpus > 1:
            counts = [count for [count] in gather(counts, self.group, self.device)]
        if wrong:
            raise CorruptedWeightsError(
                f"{self.difference(wrong[0])}; {len(wrong)} of {len(arrivals)} checksums differ"
            )
        if any(counts):
            ranks = [rank for rank, count in enumerate(counts) if count]
            raise CorruptedWeightsError(f"ranks {ranks} received other weights than were sent, in layer {layer}")

    def difference(self, arrival: Arrival) -> str:
        """Say what differs."""
        copy, rows = arrival.copy, arrival.rows
        return (
            f"rank {self.rank} received other weights for slot {copy.slots[0]} than slot {copy.source} of rank "
            f"{copy.sender} sent, in {rows.name} of layer {rows.layer}"
        )


def device_of(tensors: list[list[Rows]]) -> torch.device:
    """Return where the weights are."""
    return next((rows.bytes.device for layer in tensors for rows in layer), torch.device("cpu"))


def gather(values: list[int], group: Any, device: torch.device) -> list[list[int]]:
    """Return the integers of every rank."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [found.tolist() for found in everyone]


def digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)


def check_weights(weights: Any, location: ExpertLocation, rank: int, those_of: str = "old") -> list[list[Rows]]:
    """Return the tensors of each layer as rows of bytes."""
    if not isinstance(weights, Sequence):
        raise TypeError(f"`weights` must be a sequence with the tensors of each layer, got {type(weights).__name__}")
    layers = location.num_layers
    checks.holds("weights", f"of {layers} layers, those of `{those_of}`", len(weights) == layers, len(weights))
    num_slots = int(location.slots_per_rank[rank])
    found: list[list[Rows]] = []
    device: torch.device | None = None
    for layer, tensors in enumerate(weights):
        if not isinstance(tensors, Mapping | Sequence):
            rule = "a mapping or a sequence of tensors for each layer"
            raise TypeError(f"`weights` must be {rule}, got {type(tensors).__name__} at layer {layer}")
        named = tensors if isinstance(tensors, Mapping) else dict(enumerate(tensors))
        found.append([])
        for name, tensor in named.items():
            place = f"at layer {layer}, tensor {name}"
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"`weights` must be of torch tensors, got {type(tensor).__name__} {place}")
            device = device or tensor.device
            checks.holds("weights", f"all on {device}", tensor.device == device, f"{tensor.device} {place}")
            checks.readable("weights", layout(tensor))
            rule = f"of {num_slots} slots, those of rank {rank}"
            fits = tensor.dim() > 0 and len(tensor) == num_slots
            checks.holds("weights", rule, fits, f"shape {tuple(tensor.shape)} {place}")
            plain = not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
            checks.holds("weights", "neither quantized nor views that conjugate or negate", plain, f"one {place}")
            elements, strides = math.prod(tensor.shape[1:]), f"strides {tensor.stride()} {place}"
            checks.holds("weights", "contiguous in each slot", tensor[0].is_contiguous(), strides)
            apart = num_slots == 1 or tensor.stride(0) >= elements
            checks.holds("weights", "of slots that share no memory", apart, strides)
            if tensor.numel():
                rows = tensor.detach().as_strided((num_slots, elements), (tensor.stride(0), 1)).view(torch.uint8)
                found[-1].append(Rows(layer, f"tensor {name}", rows))
    return found


def check_group(group: Any, location: ExpertLocation, those_of: str = "old") -> int:
    """Return this process's rank."""
    ready = dist.is_available() and dist.is_initialized()
    if location.num_gpus == 1 and not ready:
        return 0
    checks.holds("group", "a process group, or None after init_process_group", ready, group)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    checks.holds("group", "a group that this process is in", rank >= 0, f"rank {rank}")
    rule = f"of {location.num_gpus} processes, the ranks of `{those_of}`"
    checks.holds("group", rule, size == location.num_gpus, size)
    return rank


def check_agreement(
    tensors: list[list[Rows]],
    locations: tuple[ExpertLocation, ExpertLocation],
    options: Any,
    group: Any,
    device: torch.device,
) -> None:
    """Check that every rank was given the same; the only thing that ranks tell each other before weights."""
    rows = [[(r.name, r.bytes.shape[1]) for r in layer] for layer in tensors]
    places = [(x.physical_to_logical_map.tolist(), x.rank_of_slot.tolist(), x.node_of_slot.tolist()) for x in locations]
    mine = [digest(rows), digest(places), digest(options)]
    try:
        everyone = gather(mine, group, device)
    except RuntimeError as error:
        raise RuntimeError("migration failed before anything moved: a rank of the group is gone or late") from error
    rules = {
        "weights": "of the same tensors and bytes per expert on every rank",
        "new": "the same on every rank, as `old`",
        "layers": "the same on every rank, as `chunk_layers` and `verify`",
    }
    for index, (argument, rule) in enumerate(rules.items()):
        others = [rank for rank, found in enumerate(everyone) if found[index] != everyone[0][index]]
        checks.holds(argument, rule, not others, f"others on ranks {others} than on rank 0")


def migrate_in_chunks(
    weights: Sequence[LayerWeights],
    old: ExpertLocation,
    new: ExpertLocation,
    group: Any = None,
    *,
    layers: Iterable[int] | None = None,
    chunk_layers: int = 1,
    verify: bool = False,
) -> Iterator[list[int]]:
    """Move expert weights to a new location, some layers at a time, so that other work can run in between.

    Parameters
    ----------
    weights : sequence of L mappings or sequences of tensors
        This rank's weights of each layer: tensors of any dtypes whose first dimension is the slots of this rank,
        contiguous in each slot, all on one device. They are written.
    old : ExpertLocation
        Where the experts are.
    new : ExpertLocation
        Where the experts will be: a location with the same sizes, ranks and nodes.
    group : ProcessGroup, optional
        The processes: rank i of the group is rank i of the locations. By default all processes. A single rank needs no
        group.
    layers : iterable of int, optional
        Distinct layers to move, in this order. By default all layers.
    chunk_layers : int
        Layers that move between two yields.
    verify : bool
        Whether to compare the checksums of the weights that were sent and that arrived. If they differ on one rank, no
        rank writes the layer.

    Returns
    -------
    iterator of list of int
        The layers that have just moved; pass them to ``location.update(new, layers)``. Nothing moves before the first
        step, and layers that were not stepped through have not moved.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        Locations of different sizes, ranks or nodes; tensors that do not have this rank's number of slots; a group of
        another size; weights, locations or options that differ between ranks.
    RuntimeError
        A rank is gone or late: raised when stepping. Of the layers of this chunk a slot may hold the old or the new
        weights; the others are whole. `CorruptedWeightsError`, which is one, if `verify` finds a difference.

    Notes
    -----
    Every rank of the group calls this and steps through it. `plan_migration` decides which weights go where. A slot
    whose expert stays, or that will hold no expert, is not written. A rank without experts in `new` still sends, and a
    rank without experts in `old` is never read.

    When called, ranks compare digests of their arguments (one all_gather); moving them takes sends and receives
    alone, and with `verify` one all_gather a layer. A rank exchanges with one other at a time (`pair_ranks`), all that
    they have for each other of a layer in one batch. Memory: what a rank receives of a layer. On GPUs the work is
    queued on the current stream, and nothing but `verify` waits for it. `Balancer` moves weights while a model runs.

    How long a rank waits for another is the timeout of the group (``new_group(timeout=...)``, ``init_process_group``).
    gloo reports a process that died as soon as its connection closes, and one that hangs when the timeout is over.
    NCCL reports either when the timeout is over: its watchdog ends the process, or with TORCH_NCCL_BLOCKING_WAIT=1
    the error is raised here.

    Examples
    --------
    >>> import torch
    >>> old = ExpertLocation.from_mapping([[0, 1], [0, 1]])
    >>> new = ExpertLocation.from_mapping([[1, 0], [1, 0]])
    >>> weights = [[torch.tensor([[1.5], [2.5]])], [torch.tensor([[3.5], [4.5]])]]
    >>> for done in migrate_in_chunks(weights, old, new):
    ...     print(done, [float(row) for layer in weights for row in layer[0]])
    [0] [2.5, 1.5, 3.5, 4.5]
    [1] [2.5, 1.5, 4.5, 3.5]
    """
    checks.instance("old", old, ExpertLocation)
    check_alike("new", new, old)
    chosen = check_layers(layers, old.num_layers)
    checks.holds("layers", "distinct", len(set(chosen)) == len(chosen), chosen)
    chunk_layers = checks.integer("chunk_layers", chunk_layers, 1)
    checks.boolean("verify", verify)
    rank = check_group(group, old)
    tensors = check_weights(weights, old, rank)
    migration = Migration(tensors, old, new, group, rank, verify)
    if old.num_gpus > 1:
        check_agreement(tensors, (old, new), (chosen, chunk_layers, verify), group, migration.device)
    chunks = [chosen[first : first + chunk_layers] for first in range(0, len(chosen), chunk_layers)]

    def step() -> Iterator[list[int]]:
        for chunk in chunks:
            migration.move(chunk)
            yield chunk

    return step()


def migrate(
    weights: Sequence[LayerWeights],
    old: ExpertLocation,
    new: ExpertLocation,
    group: Any = None,
    *,
    layers: Iterable[int] | None = None,
    verify: bool = False,
) -> None:
    """Move expert weights to a new location.

    Parameters
    ----------
    weights, old, new, group, layers, verify : as in `migrate_in_chunks`
        The weights, which are written; where experts are and where they will be; which layers move.

    Returns
    -------
    None
        The weights are changed in place.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        Arguments that do not fit together, or differ from rank to rank.
    RuntimeError
        A rank is gone or late, or weights were damaged on the way (`CorruptedWeightsError`).

    Notes
    -----
    Every rank of the group calls it. `migrate_in_chunks` does the same with time for other work in between, and has
    the details: memory, streams, and when a lost process is noticed.

    Examples
    --------
    >>> import torch
    >>> old = ExpertLocation.from_mapping([[0, 1, 0]])
    >>> new = ExpertLocation.from_mapping([[0, 1, 1]])
    >>> weights = [{"up": torch.tensor([[1.5], [2.5], [1.5]])}]
    >>> migrate(weights, old, new)
    >>> weights[0]["up"].ravel()
    tensor([1.5000, 2.5000, 2.5000])
    """
    checks.instance("old", old, ExpertLocation)
    every = old.num_layers
    for _ in migrate_in_chunks(weights, old, new, group, layers=layers, chunk_layers=every, verify=verify):
        pass
