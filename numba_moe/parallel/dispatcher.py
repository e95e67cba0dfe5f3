"""`TokenDispatcher`: the tokens of a rank to the ranks that hold their experts, and what experts made of them back."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from numba_moe.parallel.arrival import LAYOUTS
from numba_moe.parallel.memory import EmulatedRank, all_reach_each_other
from numba_moe.parallel.network import Network
from numba_moe.parallel.nvlink import PeerMemory, Sizes
from numba_moe.parallel.peers import Peers
from numba_moe.placement.expert_dispatch import ExpertDispatch
from numba_moe.placement.location import ExpertLocation
from numba_moe.placement.migration import digest, gather
from numba_moe.reference.parallel import DispatchedTokens
from numba_moe.runtime import checks
from numba_moe.runtime.plans import layout as layout_of

TRANSPORTS = ("auto", "nvlink", "nccl", "gloo")
REDUCTIONS = ("rank", "source")
_numbers: Counter[str] = Counter()  # dispatchers of each group


def even_location(num_experts: int, num_ranks: int) -> ExpertLocation:
    """Place consecutive experts on a rank, one more on the first where they do not divide; -1 where there are none.

    >>> even_location(3, 2).rank_of_slot, even_location(1, 2).physical_to_logical_map
    (array([0, 0, 1]), array([[ 0, -1]]))
    """
    places = [*range(num_experts), *[-1] * (num_ranks - num_experts)]
    return ExpertLocation.from_mapping([places], num_experts, num_ranks)


class PendingDispatch:
    """Tokens that are on their way."""

    def __init__(self, finish: Callable[[], DispatchedTokens]) -> None:
        self._finish, self._found = finish, None

    def wait(self) -> DispatchedTokens:
        """Return what this rank received, which later calls return again."""
        if self._found is None:
            self._found = self._finish()
        return self._found


class TokenDispatcher:
    """The way of tokens to the ranks that hold their experts, and back.

    All ranks of a group make one with the same arguments, and each calls `dispatch` and `combine` in turn, with
    whatever tokens it has, or none.

    Parameters
    ----------
    group : ProcessGroup, optional
        The ranks; by default all processes, or this one alone where there is no process group.
    num_experts : int
        Experts of a layer.
    top_k : int
        Experts of each token.
    hidden : int
        Columns of a row.
    max_tokens : int
        Tokens that a rank dispatches at most.
    dtype : torch.dtype
        Of the rows that are dispatched: float32, float16, bfloat16, uint8, int8 or float8.
    location : ExpertLocation, optional
        The slots and ranks that hold each expert, with any number of replicas. By default each rank has consecutive
        experts.
    transport : {"auto", "nvlink", "nccl", "gloo"}
        What carries the tokens. "nvlink": GPUs of one host read each other's memory. "nccl": GPUs of any hosts. "gloo":
        tensors on the CPU. "auto" is "nccl" for GPUs and "gloo" for the CPU.
    timeout : float
        Seconds that a rank waits for another.
    reduce : {"rank", "source"}
        "rank": each rank returns one row for a token, the sum over its slots. "source": a row for each slot; what
        `combine` returns then has the bits that one rank with all experts would have.
    capacity : int, optional
        Rows in expert order that this rank takes, or with the layout "masked" rows of each expert. Slots past them are
        dropped. By default there is room for all.
    raise_on_drop : bool
        Whether the next call raises if slots were dropped; it reads the number from the device.
    padded : bool
        Whether ranks send max_tokens tokens to all ranks, whatever there is: more bytes, but nothing that the host has
        to read, so that calls can be captured into a CUDA graph.
    slots : int
        Dispatches that are under way at a time; 1 with "nvlink".
    scale_bytes : int
        With "nvlink": bytes of the scales of a token, for which there is to be room.
    algorithm : {"static", "dynamic", "hash", "fake"}
        How one of an expert's replicas is chosen, as in `ExpertDispatch`.
    seed : int
        What that goes by, the same on all ranks.
    device : torch.device or str, optional
        Where tokens are; by default the CPU for "gloo", and otherwise the current CUDA device, if there is one.

    Attributes
    ----------
    rank, num_ranks, num_local_experts : int
        This rank, the number of ranks, and the slots for experts of this one.
    location : ExpertLocation
        Where experts are; `update` changes it.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        Arguments that do not fit together, or differ from rank to rank.

    Notes
    -----
    Received rows are in order of (source rank, token), and of one expert's rows ascend in that order. A rank adds the
    rows of a token's slots in order of k; the source adds those of ranks in order of ranks. Each sum is one of
    `moe_unpermute`, whose result has the dtype of the rows. So results are the same at every run.

    Results have gradients by the rows and by the weights, which travel the way back; every rank has to run backward,
    also one that wants none of them itself. With "nvlink" and with `padded`, where the host is told nothing, gradients
    are wanted by the same arguments on every rank.

    Examples
    --------
    >>> dispatcher = TokenDispatcher(num_experts=4, top_k=2, hidden=2, max_tokens=8, dtype=torch.float32)
    >>> rows, ids = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 3], [3, -1]])
    >>> sent = dispatcher.dispatch(rows, ids, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    >>> sent.permuted_hidden_states[:3], sent.expert_first_token_offset
    (tensor([[1., 2.],
            [1., 2.],
            [3., 4.]]), tensor([0, 1, 1, 1, 3]))
    >>> dispatcher.combine(10 * sent.permuted_hidden_states, sent)
    tensor([[10., 20.],
            [30., 40.]])
    """

    @torch.inference_mode(False)  # tables that are made inside an inference mode can be written outside
    def __init__(
        self,
        group: Any = None,
        *,
        num_experts: int,
        top_k: int,
        hidden: int,
        max_tokens: int,
        dtype: Any = torch.bfloat16,
        location: ExpertLocation | None = None,
        transport: str = "auto",
        timeout: float = 30.0,
        reduce: str = "rank",
        capacity: int | None = None,
        raise_on_drop: bool = False,
        padded: bool = False,
        slots: int = 1,
        scale_bytes: int = 0,
        algorithm: str = "static",
        seed: int = 0,
        device: Any = None,
    ) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        self._is_emulated = isinstance(group, EmulatedRank)
        if isinstance(group, EmulatedRank):
            self.num_ranks, self.rank = group.size, group.rank
        else:
            self.num_ranks = 1 if group is None else dist.get_world_size(group)
            self.rank = 0 if group is None else dist.get_rank(group)
        checks.holds("group", "a group that this process is in", self.rank >= 0, f"rank {self.rank}")
        self.num_experts = checks.integer("num_experts", num_experts, 1)
        self.top_k = checks.integer("top_k", top_k, 1)
        self.hidden = checks.integer("hidden", hidden, 0)
        self.max_tokens = checks.integer("max_tokens", max_tokens, 0)
        self.dtype = checks.dtype("dtype", dtype, (*checks.FLOATS, *checks.BYTES))
        checks.choice("transport", transport, TRANSPORTS)
        checks.choice("reduce", reduce, REDUCTIONS)
        checks.seconds("timeout", timeout)
        self.capacity = None if capacity is None else checks.integer("capacity", capacity, 1)
        for name, value in {"raise_on_drop": raise_on_drop, "padded": padded}.items():
            checks.boolean(name, value)
        self._slots = checks.integer("slots", slots, 1)
        self._scale_bytes = checks.integer("scale_bytes", scale_bytes, 0)
        self.reduce, self.raise_on_drop = reduce, raise_on_drop
        self.transport, self.device = self._choose(transport, device)

        if location is None:
            location = even_location(self.num_experts, self.num_ranks)
        checks.instance("location", location, ExpertLocation)
        rule = f"of num_experts = {self.num_experts} experts on {self.num_ranks} ranks, those of the group"
        fits = (location.num_logical_experts, location.num_gpus) == (self.num_experts, self.num_ranks)
        checks.holds("location", rule, fits, location)
        self._tables = ExpertDispatch(location, self.rank, self.device, algorithm=algorithm, seed=seed)
        self._layers_agree: list[Any] = []
        name = f"numba_moe dispatcher {self._number()}"
        self._peers = Peers(None if self._is_emulated else group, name, float(timeout))
        self._check_agreement(name, timeout, padded, slots, algorithm, seed, scale_bytes)
        rank_of_slot = torch.tensor(location.rank_of_slot, dtype=torch.int32, device=self.device)
        self.num_local_experts = int(location.slots_per_rank[self.rank])
        first = int(location.slots_per_rank[: self.rank].sum())
        by_slot = reduce == "source"
        self._end: Network | PeerMemory
        if self.transport == "nvlink":
            checks.holds("slots", "1 with the transport 'nvlink'", slots == 1, slots)
            near = self.num_ranks == 1 or all_reach_each_other(self.group, self.device)
            checks.holds("transport", "'nccl' where GPUs do not reach each other's memory", near, "'nvlink'")
            sizes = Sizes(self.max_tokens, self.top_k, self.hidden, self.dtype, self._scale_bytes)
            self._end = PeerMemory(group, self.rank, self.num_ranks, rank_of_slot, sizes, by_slot, float(timeout))
        else:
            self._end = Network(
                self._peers, rank_of_slot, first, self.num_local_experts, self.max_tokens, by_slot, padded
            )
        self._steps = itertools.count()
        self._open: dict[int, torch.Tensor | None] = {}  # what dispatches that are under way dropped, by their number
        self._dropped: tuple[int, torch.Tensor] | None = None

    def _choose(self, transport: str, device: Any) -> tuple[str, torch.device]:
        """Return the transport, and the device that tokens are on."""
        if device is None:
            on_cpu = transport == "gloo" or not torch.cuda.is_available()
            device = "cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device())
        found = checks.device("device", device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        if transport == "auto":
            transport = "nvlink" if self._is_emulated else "nccl" if found.type == "cuda" else "gloo"
        needed = "cpu" if transport == "gloo" else "cuda"
        right = found.type == needed or (self._is_emulated and transport == "nvlink")
        checks.holds("device", f"of type {needed!r}, for the transport {transport!r}", right, found)
        if self.group is not None and not self._is_emulated:
            backends, backend = dist.get_backend_config(self.group), "gloo" if transport == "gloo" else "nccl"
            checks.holds("group", f"one with the backend {backend!r}", backend in backends, backends)
        return transport, found

    def _number(self) -> int:
        """Count the dispatchers of the group; all ranks make them in the same order."""
        name = "" if self.group is None or self._is_emulated else self.group.group_name
        _numbers[name] += 1
        return _numbers[name]

    def _check_agreement(self, *others: Any) -> None:
        """Check that all ranks were given the same."""
        if self.num_ranks == 1 or self._is_emulated:
            return
        location = self.location
        values = {
            **{name: getattr(self, name) for name in ("num_experts", "top_k", "hidden", "max_tokens", "dtype")},
            **{name: getattr(self, name) for name in ("transport", "reduce")},
            "location": (location.physical_to_logical_map.tolist(), location.rank_of_slot.tolist()),
            "timeout": others,
        }
        everyone = gather([digest(value) for value in values.values()], self.group, self.device)
        for index, name in enumerate(values):
            differing = [rank for rank, found in enumerate(everyone) if found[index] != everyone[0][index]]
            rule = "the same on every rank" + ", as `padded`, `slots`, `algorithm` and `seed`" * (name == "timeout")
            checks.holds(name, rule, not differing, f"others on ranks {differing} than on rank 0")

    def __deepcopy__(self, _: Any) -> "TokenDispatcher":
        """Return the dispatcher itself, as copies of a module send their tokens by the same ranks."""
        return self

    @property
    def location(self) -> ExpertLocation:
        """Where experts are."""
        return self._tables.location

    def update(self, location: ExpertLocation, layers: Iterable[int] | None = None) -> None:
        """Send tokens to where another location has the experts of some layers, all by default, from here on.

        All ranks call it between the same steps, when the weights have moved. The parameters and errors are those of
        `ExpertLocation.update`.
        """
        self._tables.update(location, layers)

    @property
    def active_ranks(self) -> list[bool]:
        """Which ranks take part; all that do set the same. Tokens of experts on the others go nowhere."""
        return list(self._peers.active)

    @active_ranks.setter
    def active_ranks(self, active: Any) -> None:
        given = checks.host_array("active_ranks", active, "bool", (1,))
        checks.host_shape("active_ranks", given, (self.num_ranks,), "(num_ranks,)")
        checks.holds("active_ranks", "True for this rank", bool(given[self.rank]), given.tolist())
        self._peers.active = given.tolist()
        self._end.activate(given.tolist())

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        *,
        layout: str = "permuted",
        alignment: int | None = None,
        layer: int = 0,
        wait: bool = True,
    ) -> Any:
        """Send each token once to each rank that holds one of its experts.

        Parameters
        ----------
        hidden_states : tensor of `dtype`, shape [num_tokens, hidden]
            Rows of this rank's tokens.
        topk_ids : tensor of int32 or int64, shape [num_tokens, top_k]
            Their experts. Ids outside ``[0, num_experts)``, -1 for instance, go nowhere.
        topk_weights : tensor of float32, float16 or bfloat16, shape [num_tokens, top_k]
            What the rows of experts are weighted by.
        scales : tensor, shape [num_tokens] or [num_tokens, groups], optional
            What quantised rows are scaled by, which travels with them.
        layout : {"permuted", "masked", "tokens"}
            "permuted": rows in expert order, as `moe_permute` makes them. "masked": a batch of rows for each expert, as
            `moe_permute_masked` does. "tokens": rows as they are received, with ids and weights.
        alignment : int, optional
            Of "permuted": rows of an expert begin at a multiple of it, and `m_indices` names them.
        layer : int
            The layer of the location.
        wait : bool
            Whether to return what was received, and not a `PendingDispatch` whose `wait` does.

        Returns
        -------
        DispatchedTokens
            Of n tokens, in order of (source rank, token): topk_ids, int32 [n, top_k], this rank's own number of each
            expert, -1 for one of another rank; topk_weights, float32 [n, top_k]; num_tokens_per_rank, int32
            [num_ranks], tokens from each source; num_dropped, int32 [1]. hidden_states and scales are there in the
            layout "tokens". The others are those of `moe_permute` or `moe_permute_masked`, or None.

        Raises
        ------
        TypeError
            Wrong kind of array or dtype.
        ValueError
            Wrong shape, layout or device; more than max_tokens; slots dropped before, with `raise_on_drop`.
        RuntimeError
            Too many dispatches are under way. `PeerTimeoutError`, a subclass, if a rank is late or gone.
        """
        self._check(hidden_states, topk_ids, topk_weights, scales)
        checks.choice("layout", layout, LAYOUTS)
        if alignment is not None:
            checks.holds("alignment", f"None with the layout {layout!r}", layout == "permuted", alignment)
            alignment = checks.integer("alignment", alignment, 1)
        last = self.location.num_layers - 1
        layer = checks.integer("layer", layer, 0, last, f"num_layers - 1 = {last}")
        checks.boolean("wait", wait)
        self._raise_on_drop()
        if len(self._open) >= self._slots:
            raise RuntimeError(
                f"`dispatch` must be followed by `combine` or `release`: {list(self._open)} are under way, "
                f"and `slots` is {self._slots}"
            )
        step = next(self._steps)
        chosen = self._tables(topk_ids.contiguous(), layer).to(torch.int32)
        scales = None if scales is None else scales.detach().contiguous()
        finish = self._end.dispatch(hidden_states.contiguous(), chosen, topk_weights.float(), scales, step)
        self._open[step] = None

        def received() -> DispatchedTokens:
            try:
                found = finish(layout, alignment, self.capacity)
            except BaseException:
                self._open.pop(step, None)  # gone already where a failed dispatch is waited for again
                raise
            self._open[step] = found.num_dropped
            return found

        pending = PendingDispatch(received)
        return pending.wait() if wait else pending

    def combine(self, rows: torch.Tensor, sent: DispatchedTokens) -> torch.Tensor:
        """Bring rows back to the ranks that their tokens came from, and sum those of each token, weighted.

        Parameters
        ----------
        rows : tensor of float32, float16 or bfloat16
            What experts made of the rows that `dispatch` returned, in the same places: [num_rows, columns], or of
            "masked" [num_local_experts, capacity, columns]. Of "tokens" either [n, columns], where the caller has
            summed over this rank's slots, or [n, top_k, columns] for each slot, which `reduce="source"` needs.
        sent : DispatchedTokens
            What `dispatch` returned.

        Returns
        -------
        tensor of the dtype of `rows`, shape [num_tokens, columns]
            Zeros for a token that went nowhere.

        Raises
        ------
        TypeError
            Wrong kind of array or dtype.
        ValueError
            Rows of another shape or device.
        RuntimeError
            Nothing like `sent` is under way. `PeerTimeoutError`, which is one, where a rank is late or gone.
        """
        self._take(sent)
        n, top_k = sent.topk_ids.shape
        given = layout_of(rows.detach() if isinstance(rows, torch.Tensor) else rows)
        checks.array("rows", given, checks.FLOATS, (2, 3), rows=True)
        by_slot = self.reduce == "source"
        places = sent.inv_permuted_idx
        if places is None:
            leading: tuple[int, ...] = (n, top_k) if by_slot or rows.dim() == 3 else (n,)
        else:
            arrived = sent.permuted_hidden_states
            leading = tuple(arrived.shape[:-1])
        wanted = (*leading, rows.shape[-1])
        checks.holds("rows", f"of shape {wanted}", tuple(rows.shape) == wanted, f"shape {tuple(rows.shape)}")
        if places is None and rows.dim() == 3:
            slot = torch.arange(n * top_k, dtype=torch.int32, device=rows.device).view(n, top_k)
            places = torch.where(sent.topk_ids >= 0, slot, -1)
        try:
            return self._end.combine(rows.flatten(0, -2), places, sent)
        finally:
            self._close(sent)

    def release(self, sent: DispatchedTokens) -> None:
        """Let go of what was dispatched and is not to be combined."""
        self._take(sent)
        self._end.release(sent.way)
        self._close(sent)

    def check(self) -> None:
        """Raise what went wrong on the device, where calls did not wait for it: see `raise_on_drop`."""
        self._raise_on_drop()
        self._end.check()

    def input(self, num_tokens: int) -> torch.Tensor:
        """Return memory for the rows of tokens, from which `dispatch` need not copy them with "nvlink".

        The memory may be written after the previous `combine` has been called.
        """
        count = checks.integer("num_tokens", num_tokens, 0, self.max_tokens, f"max_tokens = {self.max_tokens}")
        if isinstance(self._end, PeerMemory):
            return self._end.part(self._end.at.rows, self.dtype, count, self.hidden)
        return torch.empty(count, self.hidden, dtype=self.dtype, device=self.device)

    def _take(self, sent: Any) -> None:
        if not isinstance(sent, DispatchedTokens):
            raise TypeError(f"`sent` must be what `dispatch` returned, got {type(sent).__name__}")
        if getattr(sent.way, "step", None) not in self._open:
            raise RuntimeError("`sent` must be of a dispatch that is under way, got one that was combined or released")

    def _close(self, sent: DispatchedTokens) -> None:
        del self._open[sent.way.step]
        self._dropped = sent.way.step, sent.num_dropped

    def _raise_on_drop(self) -> None:
        dropped, self._dropped = self._dropped, None
        if self.raise_on_drop and dropped is not None and (count := int(dropped[1])):
            rule = "enough for all slots, as `raise_on_drop` wants"
            checks.holds("capacity", rule, False, f"{self.capacity}, past which {count} were, of dispatch {dropped[0]}")

    def _check(self, hidden_states: Any, topk_ids: Any, topk_weights: Any, scales: Any) -> None:
        rows = layout_of(hidden_states)
        checks.array("hidden_states", rows, (self.dtype,), (2,), rows=True)
        checks.holds("hidden_states", f"on {self.device}, as the dispatcher", rows.device == self.device, rows.device)
        num_tokens = rows.shape[0]
        checks.shape("hidden_states", rows, (num_tokens, self.hidden), "(num_tokens, hidden)")
        most = f"tokens of at most max_tokens = {self.max_tokens}"
        checks.holds("hidden_states", most, num_tokens <= self.max_tokens, num_tokens)
        like = ("hidden_states", rows)
        ids, weights = layout_of(topk_ids), layout_of(topk_weights)
        checks.array("topk_ids", ids, checks.IDS, (2,), like, rows=True)
        checks.array("topk_weights", weights, checks.FLOATS, (2,), like, rows=True)
        for name, value in {"topk_ids": ids, "topk_weights": weights}.items():
            checks.shape(name, value, (num_tokens, self.top_k), "(num_tokens, top_k)")
        if scales is not None:
            of_scales = layout_of(scales)
            checks.array("scales", of_scales, (*checks.FLOATS, *checks.BYTES, torch.int32), (1, 2), like, rows=True)
            checks.shape("scales", of_scales, (num_tokens, *of_scales.shape[1:]), "(num_tokens, ...)")
