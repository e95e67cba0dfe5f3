"""`ExpertDispatch`: the tables of a rank on its device, where captured graphs find them again after experts moved."""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from numba_moe.ops.dispatch import ALGORITHMS, dispatch_ids
from numba_moe.placement.location import ExpertLocation, check_layers
from numba_moe.reference import dispatch as reference
from numba_moe.reference.dispatch import DispatchTables
from numba_moe.runtime import checks


class ExpertDispatch:
    """The way from experts to slots on one rank, for all layers: tables on its device, made once and changed in place.

    Parameters
    ----------
    location : ExpertLocation
        Where the experts are.
    rank : int
        The rank whose tokens are dispatched. Ranks that hold the same tokens must use the same number.
    device : torch.device or str
        Where to keep the tables.
    algorithm : {"static", "dynamic", "hash", "fake"}
        "static": a slot of the rank itself if it has the expert, else one of its node, else any; ranks are spread
        equally over the slots. "dynamic", "hash" and "fake" are those of `dispatch_ids`. The first two begin at a
        different slot on each rank, and "fake" goes from rank to rank.
    seed : int
        32 bits, the same on all ranks: "static" deals by it, "dynamic" draws by it and the rank.

    Attributes
    ----------
    physical_map : int32 tensor [L, E], [L, E, P - E + 1] or [L, P]
        The `physical_map` of `dispatch_ids` for each layer.
    num_valid : int32 tensor [L, E] or None
        Its `num_valid`.
    step : int64 tensor [L] or None
        Its `step`: the layer in the upper 32 bits, so that layers draw for themselves, and what `advance` counts.

    Raises
    ------
    TypeError
        No ExpertLocation, no integer.
    ValueError
        A rank that is not there, an unknown algorithm.

    Examples
    --------
    Two ranks with two slots each; expert 0 is on both:

    >>> location = ExpertLocation.from_mapping([[0, 1, 2, 0]], num_gpus=2)
    >>> ids = torch.tensor([[0, 1], [2, 0]])
    >>> ExpertDispatch(location, rank=0, device="cpu")(ids, layer=0)
    tensor([[0, 1],
            [2, 0]])
    >>> dispatch = ExpertDispatch(location, rank=1, device="cpu")
    >>> counts = torch.zeros(4, dtype=torch.int64)
    >>> dispatch(ids, layer=0, counts=counts), counts
    (tensor([[3, 1],
            [2, 3]]), tensor([0, 1, 1, 2]))

    After a rebalance the same tensors say the new slots:

    >>> dispatch.update(ExpertLocation.from_mapping([[1, 1, 2, 0]], num_gpus=2))
    >>> dispatch.physical_map.tolist()[0][0]
    3
    """

    @torch.inference_mode(False)  # tables that are made inside an inference mode can be written outside
    def __init__(
        self,
        location: ExpertLocation,
        rank: int,
        device: torch.device | str,
        *,
        algorithm: str = "static",
        seed: int = 0,
    ) -> None:
        checks.instance("location", location, ExpertLocation)
        last = location.num_gpus - 1
        self.rank = checks.integer("rank", rank, 0, last, f"num_gpus - 1 = {last}")
        checks.choice("algorithm", algorithm, ALGORITHMS)
        self.location, self.algorithm = location, algorithm
        self.seed = checks.integer("seed", seed, 0, 2**32 - 1)
        device = checks.device("device", device)
        tables = [table.to(device) for table in self._tables()]
        steps = torch.arange(location.num_layers, dtype=torch.int64, device=device) << 32
        self.physical_map = tables[0]
        self.num_valid: Any = tables[1] if len(tables) > 1 else None
        self.step = steps if algorithm == "dynamic" else None
        self._key = self.rank << 32 | self.seed if algorithm == "dynamic" else 0
        parts = [self.physical_map, self.num_valid, None if self.step is None else self.step[:, None]]
        absent = [None] * location.num_layers
        tables_of = zip(*(absent if part is None else part for part in parts), strict=True)
        self._layers = dict(enumerate(tables_of))

    def __call__(self, topk_ids: Any, layer: int, counts: Any = None, out: Any = None) -> Any:
        """Dispatch the slots of a layer; arguments, result and errors are those of `dispatch_ids`."""
        physical_map, num_valid, step = self._layers.get(layer) or self._missing(layer)
        rules = {"algorithm": self.algorithm, "seed": self._key, "step": step}
        return dispatch_ids(topk_ids, physical_map, num_valid, counts=counts, out=out, **rules)

    def tables(self, layer: int) -> DispatchTables:
        """Return what gating takes as `dispatch` to send the slots of a layer on in its own launch."""
        physical_map, num_valid, step = self._layers.get(layer) or self._missing(layer)
        return DispatchTables(physical_map, num_valid, self.algorithm, self._key, step)

    def _missing(self, layer: Any) -> NoReturn:
        last = self.location.num_layers - 1
        checks.integer("layer", layer, 0, last, f"num_layers - 1 = {last}")
        raise TypeError(f"`layer` must be an integer, got {type(layer).__name__}")

    def advance(self) -> None:
        """Let "dynamic" draw anew from here on: call it once for each forward pass, inside a captured graph too."""
        if self.step is not None:
            self.step += 1

    def update(self, location: ExpertLocation, layers: Iterable[int] | None = None) -> None:
        """Take some layers, all by default, from another location; the parameters are those of `ExpertLocation.update`.

        The tensors stay and are written on the current stream, one after the other, so graphs that were captured go by
        the new location. A dispatch on another stream might read one table of the old location and one of the new: let
        this stream wait for the dispatches before, and those that follow wait for this one, by events.
        """
        changed = check_layers(layers, self.location.num_layers)
        self.location = self.location.update(location, changed)
        new_tables = self._tables(changed) if changed else []
        for held, new in zip((self.physical_map, self.num_valid), new_tables, strict=False):
            for layer, table in zip(changed, new, strict=True):
                held[layer].copy_(table)

    def _tables(self, layers: list[int] | None = None) -> list[torch.Tensor]:
        found = reference.dispatch_map(self.location, self.rank, self.algorithm, self.seed, layers)
        return [torch.from_numpy(table) for table in found if table is not None]
