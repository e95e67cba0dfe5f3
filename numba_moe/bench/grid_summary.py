"""What a grid says: a summary by op, the worst shapes, and maps of the ratio over tokens and experts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from numba_moe.bench.contenders import OURS
from numba_moe.bench.measure import Row
from numba_moe.runtime import files
from numba_moe.runtime.text import fitted

SLOWER = 1.05
# A shape that is slower by less than this is within what repeated measurements differ by.
NOTICEABLE, NOTICEABLE_US = 1.02, 0.05
WORST = 25


class Compared(NamedTuple):
    """A shape of an op: ours beside the best peer."""

    ours: Row
    best: Row | None  # None if no peer does it

    @property
    def ratio(self) -> float:
        """Our time over the best peer's; infinite if ours failed, NaN if there is no peer."""
        if self.ours.device_us is None:
            return math.inf
        return math.nan if self.best is None else self.ours.device_us / float(self.best.device_us or 0)

    @property
    def noticeable(self) -> bool:
        """Whether ours are slower by more than measurements differ."""
        if self.ours.device_us is None or self.best is None:
            return self.ours.device_us is None
        return self.ratio > NOTICEABLE and self.ours.device_us - float(self.best.device_us or 0) > NOTICEABLE_US


def compare(rows: Sequence[Row]) -> list[Compared]:
    """Pair our row of each shape with that of the peer that takes least."""
    shapes: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        shapes.setdefault(row.key[:3], []).append(row)
    found = []
    for of_shape in shapes.values():
        (ours,) = (row for row in of_shape if row.implementation == OURS)
        peers = [row for row in of_shape if row.implementation != OURS and row.device_us is not None]
        found.append(Compared(ours, min(peers, key=lambda row: float(row.device_us or 0), default=None)))
    return found


def summary(rows: Sequence[Row]) -> str:
    """Return a table by op: shapes, the mean and the worst ratio, and how many are above some."""
    lines = []
    compared = compare(rows)
    for op in dict.fromkeys(one.ours.op for one in compared):
        of_op = [one for one in compared if one.ours.op == op]
        every = [one.ratio for one in of_op if not math.isnan(one.ratio)]
        timed = [ratio for ratio in every if ratio < math.inf]
        mean, most = (geometric_mean(timed) if timed else None), max(every, default=None)
        above = [sum(ratio > limit for ratio in every) for limit in (1.0, SLOWER)]
        noticeable = sum(one.noticeable for one in of_op)
        failed = len(every) - len(timed)
        lines.append((op, len(of_op), len(of_op) - len(every), failed, mean, most, above[0], noticeable, above[1]))
    headers = ("op", "shapes", "no peer", "failed", "geometric mean", "worst", "> 1", "> 1.02, 0.05 us", "> 1.05")
    return fitted(lines, headers, floatfmt=("", "", "", "", ".3f", ".2f"), missingval="-")


def worst(rows: Sequence[Row], count: int = WORST) -> str:
    """Return a table of the shapes that are slowest beside the best peer."""
    ranked = sorted((one for one in compare(rows) if one.ratio > 1.0), key=lambda one: -one.ratio)[:count]
    lines = [
        (one.ratio, one.ours.op, one.ours.shape, one.ours.dtype, one.ours.device_us)
        + ((one.best.implementation, one.best.device_us) if one.best else (None, None))
        + (one.ours.message[:80],)
        for one in ranked
    ]
    headers = ("ratio", "op", "shape", "dtype", "ours us", "best peer", "its us", "")
    return fitted(lines, headers, keys=3, floatfmt=(".2f", "", "", "", ".2f", "", ".2f"), missingval="-")


def peers(rows: Sequence[Row]) -> str:
    """Return a table of how often each peer was right and best, was wrong, and refused a shape."""
    best = [one.best.key for one in compare(rows) if one.best]
    lines = []
    for op, name in dict.fromkeys((row.op, row.implementation) for row in rows if row.implementation != OURS):
        mine = [row for row in rows if (row.op, row.implementation) == (op, name)]
        failed = [row for row in mine if row.message]
        wrong = sum(row.wrong for row in failed)
        example = failed[0].message.splitlines()[0][:90] if failed else ""
        lines.append((op, name, len(mine), sum(row.key in best for row in mine), wrong, len(failed) - wrong, example))
    return fitted(lines, keys=2, headers=("op", "peer", "shapes", "best", "wrong", "refused", "first message"))


def draw_maps(path: Path, rows: Sequence[Row], about: Mapping[str, str]) -> None:
    """Draw a map for each op: tokens to the right, experts (picks of sums) up, the mean ratio as colour."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    by_op: dict[str, list[Compared]] = {}
    for one in compare(rows):
        if 0 < one.ratio < math.inf:
            by_op.setdefault(one.ours.op, []).append(one)
    columns = min(2, max(1, len(by_op)))
    lines = -(-len(by_op) // columns) or 1
    figure = Figure(figsize=(8 * columns, 5 * lines), layout="constrained")
    figure.suptitle(f"device time over the best peer's: {about.get('device', '')}")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    norm = TwoSlopeNorm(1.0, 0.25, 1.5)
    for panel, (op, compared) in zip(panels, by_op.items(), strict=False):
        cells: dict[tuple[int, int], list[float]] = {}
        for one in compared:
            cells.setdefault((one.ours.tokens, one.ours.experts or 0), []).append(one.ratio)
        tokens, across = (sorted(set(values)) for values in zip(*cells, strict=True))
        means = [[geometric_mean(cells.get((t, e), [math.nan])) for t in tokens] for e in across]
        drawn = panel.imshow(means, cmap="RdYlGn_r", norm=norm, aspect="auto", origin="lower")
        panel.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        panel.set_yticks(range(len(across)), across, fontsize=7)
        panel.set(title=op, xlabel="tokens", ylabel="picks" if "sum" in op or "unpermute" in op else "experts")
        figure.colorbar(drawn, ax=panel)
    for panel in panels[len(by_op) :]:
        panel.set_axis_off()
    with files.replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))
