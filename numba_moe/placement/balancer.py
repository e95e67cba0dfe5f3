"""`Balancer`: experts follow the load while a model runs, on all ranks together.

What is slow is done by a thread, beside the passes: finding a location, and bringing weights to where nobody reads them
yet. What all ranks have to do alike is done in `step`, between two passes of the same number on every rank: counts are
summed, plans compared, and slots and tables written. Before anything is written each rank has told all others that its
part has arrived, and whether it is written is what the first rank to decide says, in the group's store. So a layer has
moved on all ranks that are left, or on none.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from numba_moe.parallel.peers import Peers, PeerTimeoutError
from numba_moe.placement import migration
from numba_moe.placement.location import ExpertLocation, check_alike
from numba_moe.placement.migration import CorruptedWeightsError, LayerWeights, digest
from numba_moe.placement.rebalance import ALGORITHMS, check_loads, rebalance_experts
from numba_moe.reference import balancer as reference
from numba_moe.reference.rebalance import balancedness
from numba_moe.runtime import checks

COUNTING = ("stat", "stat_approx", "per_pass", "per_token")
MOST_LOOKS = 128  # that are kept


class BalancerLook(NamedTuple):
    """What a balancer saw and did."""

    num_passes: int  # passes until then
    balancedness: float  # of the counts of the window: the mean over layers
    expected: float  # the same after the move
    layers: list[int]  # those that move, in this order; none if it is not worth it
    num_filled: int  # slots that get another expert, on all ranks
    num_kept: int  # slots that `preserve_intragpu_slots` saved from that


class Plan(NamedTuple):
    """Where experts are to be."""

    location: ExpertLocation
    look: BalancerLook


def layers_worth_moving(
    weight: Any, old: Any, new: Any, *, min_gain: float = 0.0, move_cost: float = 0.0
) -> np.ndarray:
    """Choose the layers whose experts should move, those that gain most first.

    Parameters
    ----------
    weight : array of numbers, shape [L, E]
        Loads of experts over the time that the new location will be in force.
    old : ExpertLocation
        Where the experts are.
    new : ExpertLocation
        Where they would be: a location with the same sizes, ranks and nodes.
    min_gain : float
        What a layer has to gain at least, as a share of the load of its busiest rank.
    move_cost : float
        What it costs to fill a slot, in the unit of `weight`. Ranks fill their slots at the same time.

    Returns
    -------
    np.ndarray
        int64, numbers of layers. Of layers that gain equally the lower is first.

    Raises
    ------
    TypeError
        No locations; an array or a number of the wrong kind.
    ValueError
        Loads that are negative or not finite, or of another shape; locations of different sizes, ranks or nodes; a
        `min_gain` or `move_cost` below 0.

    Notes
    -----
    A layer gains what the load of its busiest rank falls by. It costs `move_cost` for each slot that gets another
    expert, on the rank that has most of them. A layer moves if it gains more than it costs, and at least `min_gain`.

    Examples
    --------
    Both layers gain by the exchange of experts 1 and 2, 6 of 12 tokens and 1 of 11:

    >>> old = ExpertLocation.from_mapping([[0, 1, 2, 3]] * 2, num_gpus=2)
    >>> new = ExpertLocation.from_mapping([[0, 2, 1, 3]] * 2, num_gpus=2)
    >>> weight = np.array([[6, 6, 0, 0], [6, 5, 4, 5]])
    >>> layers_worth_moving(weight, old, new), layers_worth_moving(weight, old, new, min_gain=0.1)
    (array([0, 1]), array([0]))
    >>> layers_worth_moving(weight, old, new, move_cost=6)
    array([], dtype=int64)
    """
    loads = check_loads("weight", weight, (2,))
    checks.instance("old", old, ExpertLocation)
    check_alike("new", new, old)
    shape = old.num_layers, old.num_logical_experts
    checks.host_shape("weight", loads, shape, "(num_layers, num_experts)")
    _check_gains(min_gain, move_cost)
    return reference.layers_worth_moving(loads, old, new, min_gain=min_gain, move_cost=move_cost)


def _check_gains(min_gain: float, move_cost: float) -> None:
    for name, value in {"min_gain": min_gain, "move_cost": move_cost}.items():
        checks.number(name, value)
        checks.holds(name, "at least 0", value >= 0, value)


class Balancer:
    """Move experts to where the load wants them, while the model runs.

    All ranks of a group make one with the same options, and each calls `step` after every forward pass.

    Parameters
    ----------
    weights : sequence of L mappings or sequences of tensors
        This rank's weights of each layer, as for `migrate`: tensors whose first dimension is the slots of this rank,
        all on one device. They are written, at the same addresses. `parallel.expert_weights` has those of a model.
    recorder : ExpertDistributionRecorder or callable
        What counts this rank's tokens: a recorder that is recording and does not sum over ranks, whose records the
        balancer takes; or a function that returns what was counted since its last call, int [L, E] or [passes, L, E].
    dispatchers : ExpertDispatch, TokenDispatcher, or a sequence of them
        What is told of each layer that has moved, and says where experts are: anything with a `location` and
        ``update(location, layers)``. All have the same location.
    group : ProcessGroup, optional
        The processes: rank i of the group is rank i of the location. By default all processes. A single rank needs no
        group.
    every : int
        Passes from one look at the counts to the next.
    threshold : float, optional
        Balancedness of the window, the mean over layers, from which on a look changes nothing. By default every look
        looks for a better location.
    window : int, optional
        Passes whose counts a look goes by: those since the last look by default, and those of earlier looks where this
        is more than `every`.
    algorithm : {"refined", "deepseek"}
        How locations are found, as in `rebalance_experts`.
    num_groups : int
        Groups of consecutive experts, as in `rebalance_experts`.
    max_moves : int, optional
        For "refined": most slots of a layer that change in one rebalance.
    preserve_intragpu_slots : bool
        Whether an expert that stays on its rank stays in its slot.
    min_gain : float
        What a layer has to gain at least, as a share of the load of its busiest rank.
    move_cost : float
        What it costs to fill a slot, in tokens of the busiest rank; see the notes.
    chunk_layers : int
        Layers that move together.
    overlap : int
        Passes that run beside the search for a location, and beside the way of each chunk. With 0 all is done in the
        step that looks.
    verify : bool
        Whether to compare checksums of what was sent and what arrived.
    physical_ids : bool
        Whether the recorder is given slots, which are ids after dispatch. It is then told of every move.
    timeout : float
        Seconds that a rank waits for another.

    Attributes
    ----------
    location : ExpertLocation
        Where experts are now.
    num_passes : int
        Calls of `step` so far.
    is_moving : bool
        Whether a search or a move is under way.
    looks : deque of BalancerLook
        The last 128 looks at the counts: balancedness, what was expected of a move, and how many slots changed.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        Arguments that do not fit together, or differ from rank to rank.

    Notes
    -----
    A look sums the counts of all ranks, and every rank finds the same location from them, in a thread. After `overlap`
    passes ranks compare digests of it, and the first layers begin to move: their weights travel to memory of their own,
    on a group and a CUDA stream of the balancer's, while passes read the old ones. After `overlap` passes more, when
    they have arrived on every rank, they are written into the slots together with the dispatchers' tables, between two
    passes and on the current stream, at addresses that captured graphs know. The layers that gain most come first.

    A layer gains the load that its busiest rank is relieved of, over as long as the window. It moves if it gains more
    than `move_cost` times the slots that change on one rank, and at least the share `min_gain` of that load, so that
    experts do not follow noise. This is asked twice: of the counts, and of a location that was found from every other
    pass, by the passes that it has not seen. For `move_cost`, divide the bytes of an expert by the bandwidth, and by
    the time that the experts of a layer take for a token.

    Memory: what a rank receives of `chunk_layers` layers, and the recorder's counts of each pass until the next look.
    Between looks `step` counts passes, and does nothing else.

    A rank that is late or gone ends in `PeerTimeoutError`, which names it, after one and a half times the timeout at
    most. Layers that had moved have moved on all other ranks, and no other was written, so dispatchers and weights can
    be used as they are. The balancer has ended: the ranks that are left would make another one.

    Examples
    --------
    One rank needs no balance, but shows how it is called:

    >>> from numba_moe.placement import ExpertDispatch
    >>> location = ExpertLocation.from_mapping([[0, 1, 2]])
    >>> dispatch = ExpertDispatch(location, rank=0, device="cpu")
    >>> counts = np.array([[8, 1, 4]])
    >>> with Balancer([[torch.zeros(3, 2)]], lambda: counts, dispatch, every=2) as balancer:
    ...     moved = [balancer.step() for _ in range(4)]
    >>> moved, len(balancer.looks), round(balancer.looks[0].balancedness, 3)
    ([[], [], [], []], 1, 1.0)
    """

    def __init__(
        self,
        weights: Sequence[LayerWeights],
        recorder: Any,
        dispatchers: Any,
        *,
        group: Any = None,
        every: int = 1000,
        threshold: float | None = None,
        window: int | None = None,
        algorithm: str = "refined",
        num_groups: int = 1,
        max_moves: int | None = None,
        preserve_intragpu_slots: bool = True,
        min_gain: float = 0.05,
        move_cost: float = 0.0,
        chunk_layers: int = 1,
        overlap: int = 1,
        verify: bool = False,
        physical_ids: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self._dispatchers = _check_dispatchers(dispatchers)
        location = self.location
        self._every = checks.integer("every", every, 1)
        self._window = self._every if window is None else checks.integer("window", window, 1)
        if threshold is not None:
            checks.number("threshold", threshold)
            checks.holds("threshold", "above 0", threshold > 0, threshold)
        self._threshold = threshold
        checks.choice("algorithm", algorithm, ALGORITHMS)
        if max_moves is not None:
            max_moves = checks.integer("max_moves", max_moves, 0)
            checks.holds("max_moves", "None with the algorithm 'deepseek'", algorithm == "refined", max_moves)
        self._algorithm, self._max_moves = algorithm, max_moves
        experts = location.num_logical_experts
        self._num_groups = checks.integer("num_groups", num_groups, 1, experts, f"num_experts = {experts}")
        flags = {"preserve_intragpu_slots": preserve_intragpu_slots, "verify": verify, "physical_ids": physical_ids}
        for name, flag in flags.items():
            checks.boolean(name, flag)
        self._preserve, self._verify, self._physical_ids = preserve_intragpu_slots, verify, physical_ids
        _check_gains(min_gain, move_cost)
        self._min_gain, self._move_cost = min_gain, move_cost
        self._chunk_layers = checks.integer("chunk_layers", chunk_layers, 1)
        self._overlap = checks.integer("overlap", overlap, 0)
        self._timeout = checks.seconds("timeout", timeout)
        if algorithm == "deepseek":
            even = len(set(location.slots_per_rank)) == 1 and bool((location.physical_to_logical_map >= 0).all())
            checks.holds("dispatchers", "of ranks with equally many experts, for 'deepseek'", even, location)
        self._rank = migration.check_group(group, location, "dispatchers")
        self._tensors = migration.check_weights(weights, location, self._rank, "dispatchers")
        self._device = migration.device_of(self._tensors)
        self._recorder = self._check_recorder(recorder)
        self._place(np.ones((location.num_layers, experts)))  # compiles, and raises what does not fit the location

        self.num_passes = self._last_look = 0
        self.looks: deque[BalancerLook] = deque(maxlen=MOST_LOOKS)
        self._counted: deque[tuple[int, np.ndarray]] = deque()  # passes of each look, and their counts
        self._work: Iterator[list[int]] | None = None
        self._error: BaseException | None = None
        self._numbers = itertools.count()
        self._group = self._own_group(group)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._peers = Peers(self._group, "numba_moe balancer", self._timeout)
        options = (every, threshold, window, algorithm, num_groups, max_moves, preserve_intragpu_slots, min_gain)
        self._agree(
            "start",
            weights=[[(rows.name, rows.bytes.shape[1]) for rows in layer] for layer in self._tensors],
            dispatchers=_places(location),
            every=(options, move_cost, chunk_layers, overlap, verify, timeout),
        )
        if self._group is not None:  # NCCL connects ranks at their first collective, which would hold up a pass
            dist.all_reduce(torch.zeros(1, dtype=torch.int64, device=self._device), group=self._group)

    @property
    def location(self) -> ExpertLocation:
        """Where experts are now."""
        return self._dispatchers[0].location

    @property
    def is_moving(self) -> bool:
        """Whether a search or a move is under way."""
        return self._work is not None

    def _check_recorder(self, recorder: Any) -> Callable[[], Any]:
        """Return what counts since the last call."""
        self._told = recorder if self._physical_ids else None
        if callable(recorder):
            checks.holds("physical_ids", "False with a function as `recorder`", not self._physical_ids, True)
            return recorder
        if not hasattr(recorder, "dump_record"):
            rule = "an ExpertDistributionRecorder or a function"
            raise TypeError(f"`recorder` must be {rule}, got {type(recorder).__name__}")
        checks.holds("recorder", f"one with a mode of {COUNTING}", recorder.mode in COUNTING, recorder.mode)
        sums = recorder.process_group is not None and recorder.mode in COUNTING[:2]
        checks.holds("recorder", "one without a process group, or of the mode 'per_pass'", not sums, recorder.mode)
        location = self.location
        slots = location.num_physical_experts if self._physical_ids else location.num_logical_experts
        found = recorder.num_layers, recorder.num_experts, recorder.num_slots
        wanted = location.num_layers, location.num_logical_experts, slots
        rule = f"of {wanted} layers, experts and ids, as `dispatchers` and `physical_ids` say"
        checks.holds("recorder", rule, found == wanted, found)
        if self._physical_ids:
            recorder.set_physical_to_logical_map(location)
        return lambda: recorder.dump_record("object").logical_count

    def _own_group(self, group: Any) -> Any:
        """Return a group of the same ranks, whose transfers wait for none of the model's and break none of them."""
        if self.location.num_gpus == 1:
            return None
        group = dist.group.WORLD if group is None else group
        return dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=timedelta(seconds=max(4 * self._timeout, 60)),  # NCCL's would end the process: ours comes before
            backend=dist.get_backend_config(group),
            use_local_synchronization=True,
        )

    def step(self) -> list[int]:
        """Note that a forward pass has ended, and do what is due between this one and the next.

        Every rank calls it after each of its passes, in the thread and on the stream that the passes run on.

        Returns
        -------
        list of int
            Layers whose experts are elsewhere from now on; most times none.

        Raises
        ------
        RuntimeError
            `PeerTimeoutError`, which is one, where a rank is late or gone; `CorruptedWeightsError` if `verify` finds a
            difference; the balancer was closed, or has raised before.
        ValueError
            Ranks that found different locations, or that have different ones.
        """
        if self._error is not None:
            raise RuntimeError("`step` must be called of a balancer without an error before") from self._error
        self.num_passes += 1
        if self._work is None:
            if self.num_passes % self._every:
                return []
            self._work = self._rebalance()
        return self._go_on()

    def finish(self) -> list[int]:
        """Do at once what is left of a move that is under way, on all ranks; return the layers that have moved."""
        moved: list[int] = []
        while self._work is not None:
            moved += self._go_on()
        return moved

    def close(self) -> None:
        """End the balancer. What has not moved stays where it is."""
        self._work = None
        self._error = self._error or RuntimeError("the balancer was closed")

    def __enter__(self) -> "Balancer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _go_on(self) -> list[int]:
        assert self._work is not None
        try:
            moved = next(self._work, None)
        except BaseException as error:
            self._error, self._work = error, None
            if self._stream is not None and hasattr(self._group, "abort"):  # older torch leaves it to NCCL's watchdog
                self._group.abort()  # as it may wait for a rank that is gone
            raise
        if moved is None:
            self._work = None
        return moved or []

    def _rebalance(self) -> Iterator[list[int]]:
        """Look, find a location and move to it; each yield is the end of a step."""
        halves = self._sum_counts()
        if not halves.any():
            return
        planned = self._beside(self._plan, halves, self.num_passes)
        for _ in range(self._overlap):
            yield []
        plan = planned.result()
        self._agree("plan", location=_places(plan.location), layers=plan.look.layers)
        self.looks.append(plan.look)
        layers = plan.look.layers
        moving = migration.Migration(self._tensors, self.location, plan.location, self._group, self._rank, self._verify)
        moved: list[int] = []
        for first in range(0, len(layers), self._chunk_layers):
            chunk = layers[first : first + self._chunk_layers]
            arriving = self._beside(self._stage, moving, chunk)
            for _ in range(self._overlap):
                yield moved
                moved = []
            moving.write(self._together("arrival", arriving, moving))
            for dispatcher in self._dispatchers:
                dispatcher.update(plan.location, chunk)
            if self._told is not None:
                self._told.set_physical_to_logical_map(self.location)
            moved = moved + chunk
        if moved:
            yield moved

    def _sum_counts(self) -> np.ndarray:
        """Return the counts of all ranks over the window, [2, L, E]: even passes and odd ones."""
        location = self.location
        shape = location.num_layers, location.num_logical_experts
        counts = checks.host_array("recorder", self._recorder(), "int64", (2, 3), empty=True)
        rule = f"what returns counts of (num_layers, num_experts) = {shape}"
        checks.holds("recorder", rule, counts.shape[-2:] == shape, f"shape {counts.shape}")
        checks.counts("recorder", counts)
        passes = counts.reshape(-1, *shape)
        mine = torch.from_numpy(np.stack([passes[half::2].sum(axis=0) for half in (0, 1)])).to(self._device)
        self._agree("look", dispatchers=_places(location), num_passes=self.num_passes)
        found = self._together("sum of counts", self._beside(self._sum, mine))
        self._counted.append((self.num_passes - self._last_look, found))
        self._last_look = self.num_passes
        while sum(number for number, _ in self._counted) - self._counted[0][0] >= self._window:
            self._counted.popleft()
        return np.sum([found for _, found in self._counted], axis=0)

    def _place(self, weight: np.ndarray) -> ExpertLocation:
        """Return the location that loads ask for."""
        location = self.location
        sizes = location.num_physical_experts, self._num_groups, location.num_nodes, location.num_gpus
        options: dict[str, Any] = {}
        if self._algorithm == "refined":
            places, sizes_of_ranks = location.physical_to_logical_map, location.slots_per_rank
            active = np.logical_or.reduceat((places >= 0).any(axis=0), np.cumsum(sizes_of_ranks) - sizes_of_ranks)
            options = {"current": places, "max_moves": self._max_moves}
            options |= {"slots_per_rank": sizes_of_ranks, "active_ranks": active}
        placed = rebalance_experts(weight, *sizes, algorithm=self._algorithm, **options)
        return location.with_places(placed.physical_to_logical_map)

    def _keeping_slots(self, found: ExpertLocation) -> ExpertLocation:
        return migration.preserve_intragpu_slots(self.location, found) if self._preserve else found

    def _plan(self, halves: np.ndarray, num_passes: int) -> Plan:
        """Find the location to move to, and the layers that it is worth for."""
        old, total = self.location, halves.sum(axis=0)
        before = self._balancedness(total, old)
        if self._threshold is not None and before >= self._threshold:
            return Plan(old, BalancerLook(num_passes, before, before, [], 0, 0))
        found = self._place(total)
        new = self._keeping_slots(found)
        gains = {"min_gain": self._min_gain, "move_cost": self._move_cost}
        layers = reference.layers_worth_moving(total, old, new, **gains).tolist()
        if layers and halves.any(axis=(1, 2)).all():
            unseen = halves[1] * (total.sum() / halves[1].sum())
            trial = self._keeping_slots(self._place(halves[0]))
            confirmed = reference.layers_worth_moving(unseen, old, trial, **gains)
            layers = [layer for layer in layers if layer in confirmed]
        after = self._balancedness(total, old.update(new, layers))
        filled, otherwise = (
            int((place.physical_to_logical_map != old.physical_to_logical_map)[layers].sum()) for place in (new, found)
        )
        return Plan(new, BalancerLook(num_passes, before, after, layers, filled, otherwise - filled))

    def _balancedness(self, weight: np.ndarray, location: ExpertLocation) -> float:
        places, sizes = location.physical_to_logical_map, location.slots_per_rank
        return float(balancedness(weight, places, location.num_gpus, slots_per_rank=sizes).mean())

    def _beside(self, work: Callable[..., Any], *given: Any) -> "futures.Future[Any]":
        """Do something in a thread, on a GPU on the balancer's stream and after what is queued now.

        A process that ends does not wait for the thread, which may wait for a rank that is gone.
        """
        ready: Any = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

        found: futures.Future[Any] = futures.Future()

        def on_stream() -> Any:
            if self._stream is None:
                return work(*given)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                result = work(*given)
                self._stream.synchronize()
                return result

        def run() -> None:
            try:
                found.set_result(on_stream())
            except BaseException as error:  # which `found.result()` raises
                found.set_exception(error)

        threading.Thread(target=run, name="numba-moe-balancer", daemon=True).start()
        return found

    def _sum(self, mine: torch.Tensor) -> np.ndarray:
        if self._group is not None:
            dist.all_reduce(mine, group=self._group)
        return mine.cpu().numpy()

    def _stage(self, moving: migration.Migration, layers: list[int]) -> list[migration.Arrival]:
        """Bring the weights of some layers to memory of their own."""
        try:
            arrivals = moving.stage(layers)
        except RuntimeError as error:
            if moving.peer is None:
                raise
            what = f"rank {moving.peer} was lost while weights of layers {layers} travelled"
            raise PeerTimeoutError(what, moving.peer, "arrival", self.num_passes) from error
        if self._verify and (wrong := moving.damaged(arrivals)):
            raise CorruptedWeightsError(moving.difference(wrong[0]))
        return arrivals

    def _agree(self, phase: str, **values: Any) -> None:
        """Check that all ranks come here, with the same values."""
        mine = [digest(value) for value in values.values()]
        told = self._peers.tell(phase, next(self._numbers), [mine] * self._peers.size)()
        for index, name in enumerate(values):
            others = [rank for rank, row in enumerate(told) if row[index] != told[0][index]]
            checks.holds(name, "the same on every rank", not others, f"others on ranks {others} than on rank 0")

    def _together(self, phase: str, work: "futures.Future[Any]", moving: Any = None) -> Any:
        """Return what the thread has found within half the timeout, if no rank has failed in it."""
        number = next(self._numbers)
        found: Any = None
        failed: Exception | None = None
        try:
            found = work.result(self._timeout / 2)
        except futures.TimeoutError:
            peer = -1 if moving is None or moving.peer is None else moving.peer
            whom = "" if peer < 0 else f" for rank {peer}"
            what = f"rank {self._rank} waited {self._timeout / 2:g} s in {phase} {number}{whom}"
            failed = PeerTimeoutError(what, peer, phase, number)
        except Exception as error:  # which is raised below, when all ranks know
            failed = error
        kind = 0 if failed is None else 1 + isinstance(failed, CorruptedWeightsError)
        told: list[list[int]] = []
        try:
            told = self._peers.tell(phase, number, [[kind]] * self._peers.size)()
        except PeerTimeoutError as error:
            error.__cause__ = failed or error.__cause__
            failed = error
        ranks = [rank for rank, row in enumerate(told) if row[0]]
        go_on = failed is None and not ranks
        decided = self._peers.decide(f"{phase} {number} goes on", "yes" if go_on else "no")
        if decided == "yes" and not kind:
            return found
        if failed is not None:
            raise failed
        if any(row[0] == 2 for row in told):
            raise CorruptedWeightsError(f"ranks {ranks} received other weights than were sent; none was written")
        raise RuntimeError(f"ranks {ranks or 'that came late'} failed in the {phase}; no weights were written")


def _places(location: ExpertLocation) -> Any:
    """Return what a location is, for a digest."""
    arrays = location.physical_to_logical_map, location.rank_of_slot, location.node_of_slot
    return [array.tobytes() for array in arrays]


def _check_dispatchers(dispatchers: Any) -> list[Any]:
    found = list(dispatchers) if isinstance(dispatchers, Sequence) else [dispatchers]
    checks.holds("dispatchers", "one or more", bool(found), "none")
    for dispatcher in found:
        if not (hasattr(dispatcher, "location") and callable(getattr(dispatcher, "update", None))):
            rule = "of an ExpertDispatch or a TokenDispatcher"
            raise TypeError(f"`dispatchers` must be {rule}, got {type(dispatcher).__name__}")
        checks.instance("dispatchers", dispatcher.location, ExpertLocation)
        same = dispatcher.location == found[0].location
        checks.holds("dispatchers", "of one location", same, f"{dispatcher.location} and {found[0].location}")
    return found
