"""The ranks of a group: what they tell each other by the group's store, and the tensors that they exchange.

Before anything travels each rank tells all others how much it will send, through the store that the group was made
with. So a rank that is late or gone is known by its number, and nothing was started that would wait for it: the group's
own connections are as good as before, and the other ranks can go on without it.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from numba_moe.runtime import torch_private

MOST_TENSORS = 8  # of an exchange
KINDS = ("dispatch", "combine", "gradient of combine", "gradient of dispatch")
NUM_TAGS = 1 << 30


class PeerTimeoutError(RuntimeError):
    """A rank is late or gone.

    Attributes
    ----------
    rank : int
        The rank that was waited for, in the group; the first of them if there are more.
    phase : str
        "dispatch" or "combine", or the gradient of one; of a `Balancer` what it did together.
    step : int
        The number of the dispatch, or of the phase.
    """

    def __init__(self, message: str, rank: int, phase: str, step: int) -> None:
        super().__init__(message)
        self.rank, self.phase, self.step = rank, phase, step


class Peers:
    """The ranks of a group as one of them sees them.

    Parameters
    ----------
    group
        The process group; None for a single rank without one.
    name
        What no other user of the group's store is called.
    timeout
        Seconds to wait for a rank.
    """

    def __init__(self, group: Any, name: str, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.tells_of_gradients = True  # not where the host is to do nothing
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.active = [True] * self.size
        self._store: Any = None
        if group is not None:
            self._store = dist.PrefixStore(name, torch_private.group_store(group))  # type: ignore[attr-defined]
        self._told = self._decided = ""

    def others(self) -> list[int]:
        """Return the other active ranks, beginning after this one, so that no rank is the first for all."""
        after = [(self.rank + step) % self.size for step in range(1, self.size)]
        return [rank for rank in after if self.active[rank]]

    def tell(self, phase: str, step: int, numbers: Sequence[Sequence[int]]) -> Callable[[], list[list[int]]]:
        """Tell each rank its row of numbers; return what waits for the row of numbers that each rank has for this one.

        Raises PeerTimeoutError, then, if an active rank does not come in time.
        """
        key, mine = f"{phase} {step}", np.array(numbers, np.int64).reshape(self.size, -1)
        deadline = time.monotonic() + self.timeout
        if self._store is not None:
            self._store.set(f"{key} {self.rank}", mine.tobytes())

        def listen() -> list[list[int]]:
            found = np.zeros_like(mine)
            found[self.rank] = mine[self.rank]
            others = self.others()
            for rank, told in zip(others, self._hear(key, others, deadline), strict=True):
                found[rank] = np.frombuffer(told, np.int64).reshape(mine.shape)[self.rank]
            return [row.tolist() for row in found]

        return listen

    def _hear(self, key: str, others: list[int], deadline: float) -> list[bytes]:
        if self._store is None or not others:
            return []
        keys = [f"{key} {rank}" for rank in others]
        cause: RuntimeError | None = None
        remaining = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        try:
            self._store.wait(keys, remaining)
            told = self._store.multi_get(keys) if self._store.has_extended_api() else list(map(self._store.get, keys))
            missing = sorted(rank for rank, value in zip(others, told, strict=True) if not value)
        except RuntimeError as error:
            missing, cause = sorted(self._late(others, keys)), error
        if missing:
            phase, step = key.rsplit(" ", 1)
            what = (
                f"ranks {missing} were not in {phase} {step} together with rank {self.rank} within {self.timeout:g} s"
            )
            raise PeerTimeoutError(what, missing[0], phase, int(step)) from cause
        if self._told:  # all ranks were there, and have read what was told before
            self._store.delete_key(self._told)
        self._told = f"{key} {self.rank}"
        return told

    def _late(self, others: list[int], keys: list[str]) -> list[int]:
        """Return who did not come, and take back what was told, so that who comes late learns that he is."""
        try:
            late = [rank for rank, key in zip(others, keys, strict=True) if not self._store.check([key])]
            self._store.set(f"{keys[0].rsplit(' ', 1)[0]} {self.rank}", b"")
        except RuntimeError:  # the store went with the rank that kept it
            return others
        return late or others

    def decide(self, name: str, mine: str) -> str:
        """Return what the first rank that came here gave, after all told each other that they would."""
        if self._store is None:
            return mine
        if self._decided and self.rank == 0:  # all ranks have told something since
            self._store.delete_key(self._decided)
        self._decided = name
        return self._store.compare_set(name, "", mine).decode()

    def exchange(
        self,
        tensors: Sequence[torch.Tensor],
        sent: Sequence[int],
        received: Sequence[int],
        kind: int,
        step: int,
        to_all: bool = False,
    ) -> list[torch.Tensor]:
        """Send parts of tensors to each rank, and return what each sent, in order of ranks.

        Parameters
        ----------
        tensors
            Contiguous; the first ``sent[0]`` elements along the first dimension go to rank 0, and so on.
        sent, received
            For each rank, elements that go to it, and that come from it.
        kind, step
            Which of KINDS, and the number of the dispatch: what belongs together has the same on all ranks.
        to_all
            Each rank gets the whole of the tensors.
        """
        found = [tensor.new_empty(sum(received), *tensor.shape[1:]) for tensor in tensors]
        ranks: list[int] = []
        operations: list[Any] = []
        for number, (source, target) in enumerate(zip(tensors, found, strict=True)):
            out = [source] * self.size if to_all else list(source.split(list(sent)))
            into = list(target.split(list(received)))
            into[self.rank].copy_(out[self.rank])
            tag = (len(KINDS) * step + kind) * MOST_TENSORS + number
            for rank in self.others():
                for call, part in ((dist.isend, out[rank]), (dist.irecv, into[rank])):
                    if part.numel():
                        peer = dist.get_global_rank(self.group, rank)
                        words = part.reshape(-1).view(torch.uint8)
                        operations.append(dist.P2POp(call, words, peer, self.group, tag % NUM_TAGS))
                        ranks.append(rank)
        works: list[Any] = []
        try:
            if operations and operations[0].tensor.is_cuda:  # in one launch
                works = dist.batch_isend_irecv(operations)
            else:
                for one in operations:
                    works.append(one.op(one.tensor, one.peer, one.group, one.tag))
            while works:
                works[-1].wait()
                works.pop()
        except RuntimeError as error:
            rank, phase = ranks[max(len(works) - 1, 0)], KINDS[kind]
            raise PeerTimeoutError(f"rank {rank} was lost in {phase} {step}", rank, phase, step) from error
        return found


class Exchange(torch.autograd.Function):
    """Tensors sent to all ranks; the gradient goes back the way that they came."""

    @staticmethod
    def forward(
        ctx: Any, peers: Peers, sent: list[int], received: list[int], kind: int, step: int, to_all: bool, *tensors: Any
    ) -> Any:
        ctx.peers, ctx.sizes, ctx.kind, ctx.step = peers, (sent, received), kind, step
        ctx.shapes = [tensor.shape for tensor in tensors] if to_all else None
        found = peers.exchange([tensor.contiguous() for tensor in tensors], sent, received, kind, step, to_all)
        needed = ctx.needs_input_grad[6:]
        ctx.mark_non_differentiable(*(part for part, wanted in zip(found, needed, strict=True) if not wanted))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (sent, received), needed = ctx.sizes, ctx.needs_input_grad[6:]
        wanted = [grad.contiguous() for grad, need in zip(grads, needed, strict=True) if need]
        kind = len(KINDS) - 1 - ctx.kind
        if ctx.peers.tells_of_gradients:
            ctx.peers.tell(KINDS[kind], ctx.step, [[0]] * ctx.peers.size)()
        parts = iter(ctx.peers.exchange(wanted, received, sent, kind, ctx.step))
        found = [next(parts) if need else None for need in needed]
        if ctx.shapes is not None:
            pairs = zip(found, ctx.shapes, strict=True)
            found = [part if part is None else part.view(-1, *shape).sum(0) for part, shape in pairs]
        return *(None,) * 6, *found


def wants_gradient(tensor: torch.Tensor) -> bool:
    """Whether a gradient by a tensor is wanted here."""
    return tensor.requires_grad and torch.is_grad_enabled()


def in_backward(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Return a tensor that is part of backward if it is on some rank: gradients of all ranks then meet."""
    return tensor.detach().requires_grad_() if wanted and not tensor.requires_grad else tensor


def exchange(
    peers: Peers,
    tensors: Sequence[torch.Tensor],
    sent: Sequence[int],
    received: Sequence[int],
    kind: str,
    step: int,
    to_all: bool = False,
) -> list[torch.Tensor]:
    """Do what `Peers.exchange` does, in torch's graph."""
    arguments = (peers, list(sent), list(received), KINDS.index(kind), step, to_all)
    return list(Exchange.apply(*arguments, *tensors))
