"""The report's pictures as PNG files, drawn by matplotlib."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numba_moe.recorder.report_colours import Scale
from numba_moe.recorder.report_findings import MOST_BINS, Findings, Placement, bounds, over_mean
from numba_moe.reference.recorder import traffic_matrix

Draw = Callable[[Any], None]  # on a figure of matplotlib


def _heat(values: np.ndarray, across: str, up: str, title: str, scale: Scale | None = None) -> Draw:
    scale = scale or Scale.of(values)

    def draw(figure: Any) -> None:
        from matplotlib.colors import LogNorm

        panel = figure.subplots()
        shown = np.ma.masked_equal(values, 0)
        norm = LogNorm(scale.low, scale.high, clip=True)
        image = panel.imshow(shown, aspect="auto", interpolation="nearest", norm=norm, cmap="inferno")
        panel.set(xlabel=across, ylabel=up)
        for axis in (panel.xaxis, panel.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, label=title, ticks=scale.ticks(), format="%g").minorticks_off()

    return draw


def _balance(values: Sequence[float | None], starts: Sequence[int]) -> Draw:
    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.plot(starts, [np.nan if value is None else value for value in values], marker=".")
        panel.set(xlabel="pass", ylabel="balancedness, mean over layers", ylim=(0, 1.02))
        panel.xaxis.get_major_locator().set_params(integer=True)

    return draw


def pictures(findings: Findings, placements: Sequence[Placement]) -> dict[str, Draw]:
    """Return what draws each picture, by name; those of GPUs only if there are several."""
    dump, num_gpus = findings.dump, findings.num_gpus
    found = {"experts": _heat(findings.load, "expert", "layer", "load / mean")}
    if num_gpus > 1:
        before, after = over_mean(findings.rank_load), over_mean(placements[1].loads)
        scale = Scale.of(np.concatenate([before, after]))  # the same colours, to compare
        found["ranks"] = _heat(before, "rank", "layer", "load / mean", scale)
        starts = bounds(len(dump.logical_count), MOST_BINS)[:-1].tolist()
        found["balance"] = _balance(findings.balance_over_time(), starts)
        found["rebalanced"] = _heat(after, "rank", "layer", "load / mean", scale)
        if len(dump.rank_physical_count) > 1:
            traffic = traffic_matrix(dump.rank_physical_count, num_gpus).sum(axis=0)
            mean = traffic / max(traffic.mean(), 1e-300)
            found["traffic"] = _heat(mean, "to rank", "from rank", "choices / mean")
    return found


def png(draw: Draw) -> bytes:
    """Return a picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    draw(figure)
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=200)
    return memory.getvalue()
