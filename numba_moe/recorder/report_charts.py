"""Charts of the report as HTML: SVG that stretches, with its words outside, so that they keep their size on a phone.

Each chart is also an entry of the page's data, from which `report.js` shows values.
"""

import base64
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from numba_moe.recorder.report_colours import MAP, Scale, png

MOST_TICKS = 6
MOST_SHOWN = 100_000  # values of a map that the page holds; a larger map is a picture alone
Series = Mapping[str, Sequence[float | None]]


def number(value: float) -> str:
    """Write a number for people: thousands apart, three digits that count.

    >>> number(79953920), number(0.27149), number(2.5), number(1e-9)
    ('79,953,920', '0.271', '2.5', '1e-09')
    """
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def whole_ticks(count: int) -> list[int]:
    """Return round whole numbers below `count`, at most 6, from 0 on.

    >>> whole_ticks(1), whole_ticks(4), whole_ticks(256)
    ([0], [0, 1, 2, 3], [0, 50, 100, 150, 200, 250])
    """
    step = next(
        step for power in range(20) for step in (10**power, 2 * 10**power, 5 * 10**power) if count <= MOST_TICKS * step
    )
    return list(range(0, count, step))


def round_ticks(high: float) -> list[float]:
    """Return round numbers from 0 to at least `high`, at most 7.

    >>> round_ticks(1.0), round_ticks(2.3)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    """
    base = 10.0 ** math.floor(math.log10(high)) / 10
    step = next(base * part for part in (1, 2, 5, 10, 20, 50) if high <= base * part * MOST_TICKS * (1 + 1e-9))
    return [round(step * index, 12) for index in range(math.ceil(high / step - 1e-9) + 1)]


class Charts:
    """The charts of a page, and the data that is shown for them."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}

    def script(self) -> str:
        """Return the data as JSON that is safe within a page."""
        text = json.dumps(self.data, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")

    def heat(
        self, name: str, title: str, values: np.ndarray, rows: str, columns: str, unit: str, scale: Scale | None = None
    ) -> str:
        """Return a map of values [rows, columns]; an axis is what one row or column is, like "layer"."""
        scale = scale or Scale.of(values)
        num_rows, num_columns = values.shape
        if values.size <= MOST_SHOWN:
            shown = [[float(f"{value:.3g}") for value in row] for row in values.tolist()]
            self.data[name] = {"kind": "heat", "rows": rows, "columns": columns, "unit": unit, "values": shown}
        code = base64.b64encode(png(values, scale)).decode()
        drawn = (
            f'<image href="data:image/png;base64,{code}" width="{num_columns}" height="{num_rows}" '
            'preserveAspectRatio="none"/>'
        )
        says = (
            f"{title}: a map of {num_rows} by {num_columns}, {rows} by {columns}, from {number(float(values.min()))} "
        )
        says += f"to {number(float(values.max()))} {unit}"
        left = [((tick + 0.5) / num_rows, number(tick)) for tick in whole_ticks(num_rows)]
        below = [((tick + 0.5) / num_columns, number(tick)) for tick in whole_ticks(num_columns)]
        height, legend = "tall" if num_rows > 12 else "low", _legend(scale, values, unit)
        size, axes = (num_columns, num_rows), (rows, columns)
        return self._figure(name, title, says, drawn, size, left, below, axes, legend, height)

    def lines(
        self,
        name: str,
        title: str,
        series: Series,
        labels: Sequence[str],
        axes: tuple[str, str],
        high: float | None = None,
    ) -> str:
        """Return lines over the same labelled places; None is a gap."""
        known = [value for values in series.values() for value in values if value is not None]
        ticks = round_ticks(high or _top(known))
        self.data[name] = {"kind": "lines", "columns": axes[1], "labels": [*labels], "series": _rounded(series)}
        drawn = []
        for number_of_line, values in enumerate(series.values(), 1):
            path = " ".join(_path([None if value is None else 1 - value / ticks[-1] for value in values]))
            drawn.append(f'<path class="line series-{number_of_line}" d="{path}"/>')
        says = f"{title}: " + "; ".join(_range_of(*item) for item in series.items())
        return self._figure(
            name, title, says, "".join(drawn), (1, 1), _left(ticks), _below(labels), axes, _names(series)
        )

    def bars(
        self,
        name: str,
        title: str,
        values: Sequence[float | None],
        labels: Sequence[str],
        axes: tuple[str, str],
        high: float | None = None,
    ) -> str:
        """Return bars, one for each value; None has none."""
        ticks = round_ticks(high or _top([value for value in values if value is not None]))
        series = {axes[0]: values}
        self.data[name] = {"kind": "bars", "columns": axes[1], "labels": [*labels], "series": _rounded(series)}
        width = 1 / len(values)
        path = "".join(
            f"M{index * width + 0.1 * width:.5f} 1V{1 - value / ticks[-1]:.5f}h{0.8 * width:.5f}V1Z"
            for index, value in enumerate(values)
            if value is not None
        )
        drawn = f'<path class="bar" d="{path}"/>'
        below = _below(labels, 0.5)
        return self._figure(
            name, title, f"{title}: {_range_of(axes[0], values)}", drawn, (1, 1), _left(ticks), below, axes
        )

    def _figure(
        self,
        name: str,
        title: str,
        says: str,
        drawn: str,
        size: tuple[int, int],
        left: list[tuple[float, str]],
        below: list[tuple[float, str]],
        axes: tuple[str, str],
        legend: str = "",
        height: str = "low",
    ) -> str:
        reads = ""
        if name in self.data:
            label = html.escape(f"{title}; arrow keys read values")
            reads = f' data-chart="{name}" tabindex="0" role="group" aria-label="{label}"'
        lefts = "".join(f'<span style="top:{100 * place:.2f}%">{text}</span>' for place, text in left)
        belows = "".join(f'<span style="left:{100 * place:.2f}%">{text}</span>' for place, text in below)
        return (
            f'<figure id="{name}"><figcaption>{html.escape(title)}</figcaption>'
            f'<p class="axis-title">{html.escape(axes[0])}</p>'
            f'<div class="chart"><div class="left" aria-hidden="true">{lefts}</div>'
            f'<div class="plot {height}"{reads}>'
            f'<svg role="img" aria-label="{html.escape(says)}" viewBox="0 0 {size[0]} {size[1]}" '
            f'preserveAspectRatio="none">{drawn}</svg></div>'
            f'<div class="below" aria-hidden="true">{belows}</div></div>'
            f'<p class="axis-title across">{html.escape(axes[1])}</p>{legend}</figure>'
        )


def _top(values: Sequence[float]) -> float:
    """Return the end of an axis for values; 1 if they are 0 but for rounding."""
    top = max(values, default=0)
    return top if top > 1e-6 else 1.0


def _left(ticks: Sequence[float]) -> list[tuple[float, str]]:
    return [(1 - tick / ticks[-1], number(tick)) for tick in ticks]


def _below(labels: Sequence[str], offset: float = 0.0) -> list[tuple[float, str]]:
    """Return where labels are: of points from edge to edge, or of bars at their middle."""
    count = len(labels)
    ticks = whole_ticks(count)
    places = [(tick + offset) / count if offset else tick / max(count - 1, 1) for tick in ticks]
    return [(place, labels[tick].partition(" to ")[0]) for place, tick in zip(places, ticks, strict=True)]


def _path(heights: Sequence[float | None]) -> Iterator[str]:
    """Yield the path of a line through heights, with gaps; a point between gaps is a short stroke."""
    last = max(len(heights) - 1, 1)
    for index, height in enumerate(heights):
        if height is None:
            continue
        starts = index == 0 or heights[index - 1] is None
        alone = starts and (index + 1 == len(heights) or heights[index + 1] is None)
        yield f"{'M' if starts else 'L'}{index / last:.5f} {height:.5f}"
        if alone:
            yield "h.01"


def _rounded(series: Series) -> dict[str, list[float | None]]:
    return {
        name: [None if value is None else float(f"{value:.4g}") for value in values] for name, values in series.items()
    }


def _range_of(name: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{name} from {number(min(known))} to {number(max(known))}" if known else f"{name} unknown"


def _names(series: Series) -> str:
    """Return the legend of lines."""
    if len(series) < 2:
        return ""
    items = "".join(
        f'<li><svg class="key" aria-hidden="true" viewBox="0 0 24 8">'
        f'<path class="line series-{index}" d="M0 4H24"/></svg>'
        f"{html.escape(name)}</li>"
        for index, name in enumerate(series, 1)
    )
    return f'<ul class="legend">{items}</ul>'


def _legend(scale: Scale, values: np.ndarray, unit: str) -> str:
    """Return the bar of a map's colours."""
    ticks = scale.ticks()
    texts = [number(tick) if tick >= 1 else f"1/{round(1 / tick)}" for tick in ticks]
    if (values[values > 0] < scale.low).any():
        texts[0] = f"{texts[0]} or less"
    if (values > scale.high).any() and ticks[-1] == scale.high:
        texts[-1] = f"{texts[-1]} or more"
    places = scale.place(np.array(ticks))
    labels = "".join(
        f'<span style="left:{100 * place:.2f}%">{text}</span>' for place, text in zip(places, texts, strict=True)
    )
    none = " Grey: 0." if not values.all() else ""
    return (
        f'<div class="scale"><div class="colours" style="background:linear-gradient(90deg,{",".join(MAP)})"></div>'
        f'<div class="below" aria-hidden="true">{labels}</div></div>'
        f'<p class="axis-title across">{html.escape(unit)}; steps are equal factors.{none}</p>'
    )
