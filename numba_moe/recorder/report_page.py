"""The page of a report: what was recorded, what the counts say, and tables of the same for reading without pictures."""

import base64
import html
import importlib.resources
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from numba_moe import __version__
from numba_moe.recorder.dump_files import csv_of
from numba_moe.recorder.report_charts import Charts, number
from numba_moe.recorder.report_colours import DARK, LIGHT, Scale
from numba_moe.recorder.report_findings import MORE_SLOTS, MOST_BINS, Findings, Placement, bounds, over_mean
from numba_moe.reference.recorder import expert_entropy, traffic_matrix
from numba_moe.runtime.text import counted

MOST_ROWS = 24  # of a table over time
MOST_NAMED = 40  # experts named in a cell
WORTH = 0.01  # of balancedness, for which more slots are not advised
BALANCE = "mean load of the GPUs over that of the busiest"
Cell = str | int | float | None


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], words: bool = False) -> str:
    """Return a table; what is wider than a phone scrolls within its own frame."""

    def cell(value: Cell) -> str:
        text = "-" if value is None else value if isinstance(value, str) else number(value)
        return f"<td>{html.escape(text)}</td>"

    names = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    label, kind = html.escape(caption), ' class="words"' if words else ""
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{label}"><table{kind}><caption>{label}</caption>'
        f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def span(first: int, last: int) -> str:
    """Write a range of numbers.

    >>> span(3, 9), span(3, 3)
    ('3 to 9', '3')
    """
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


class Page:
    """A report that is put together."""

    def __init__(self, findings: Findings, name: str, written: str, placements: Sequence[Placement]) -> None:
        self.findings, self.dump, self.name, self.written = findings, findings.dump, name, written
        self.placements, self.charts = placements, Charts()
        ids = self.dump.forward_pass_id
        ends = bounds(len(ids), MOST_BINS)
        self.passes = [span(int(ids[first]), int(ids[end - 1])) for first, end in itertools.pairwise(ends)]
        self.per_part = f" (each point is the mean of up to {int(np.diff(ends).max())})" if len(ids) > MOST_BINS else ""

    def html(self) -> str:
        """Return the page."""
        sections = [("recorded", "What was recorded", self.recorded())]
        if self.findings.total.any():
            sections += [
                ("experts", "Experts", self.experts()),
                ("layers", "Layers", self.layers()),
                ("gpus", "GPUs", self.gpus()),
                ("time", "Over time", self.over_time()),
                ("together", "Experts chosen together", self.together()),
                ("replicas", "Replicas", self.replicas()),
                ("rebalance", "What a rebalance would change", self.rebalance()),
            ]
        bodies = [(name, title, "".join(body)) for name, title, body in sections]
        links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in bodies)
        main = "".join(
            f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{body}</section>'
            for name, title, body in bodies
        )
        title = html.escape(self.name)
        script = ""
        if self.charts.data:
            script = f'<script type="application/json" id="data">{self.charts.script()}</script>'
            script += f"<script>{_file('report.js')}</script>"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{title}</title>'
            f"<style>{style()}</style></head>\n"
            f"<body><header><h1>{title}</h1><p>Which experts were chosen, recorded by numba_moe.</p></header>"
            f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>{main}</main>\n'
            f"<footer><p>Made by numba_moe {html.escape(__version__)}.</p></footer>{script}</body></html>\n"
        )

    def recorded(self) -> Iterator[str]:
        """Say what the file holds, and what stands out."""
        dump, found = self.dump, self.findings
        num_steps, num_layers, num_experts = dump.logical_count.shape
        slots = dump.global_physical_count.shape[2]
        ids = dump.forward_pass_id
        passes = "none"
        if num_steps:
            passes = f"{num_steps:,}, ids {span(int(ids.min()), int(ids.max()))}"
        rows: list[list[Cell]] = [
            ["file", self.name],
            ["written", self.written],
            ["mode", dump.mode],
            ["passes", passes],
            ["layers", f"{num_layers:,}, numbers {span(0, num_layers - 1)}" if num_layers else "0"],
            ["experts of a layer", f"{num_experts:,}, numbers {span(0, num_experts - 1)}, in {counted(slots, 'slot')}"],
            ["GPUs", found.num_gpus],
            ["choices of an expert", int(found.total.sum())],
            ["version of numba_moe", __version__],
        ]
        names = sorted(set(dump.gatherer_key) - {"primary"})
        if names:
            rows.append(["parts of passes", ", ".join(names[:MOST_NAMED])])
        yield table("The recording", ["what", "value"], rows, words=True)
        if not found.total.any():
            yield "<p>Nothing was counted: there is nothing to draw, and nothing to rebalance by. Was recording on "
            yield "during the passes, and did the hooks see ids of experts?</p>"
            return
        yield '<ul class="facts">' + "".join(f"<li>{html.escape(fact)}</li>" for fact in self.facts()) + "</ul>"

    def facts(self) -> Iterator[str]:
        """Yield sentences on what stands out."""
        found = self.findings
        if found.hottest and self.dump.num_experts > 1:
            layer, expert = found.hottest[0]
            yield f"Expert {expert} of layer {layer} is the busiest, at {found.load[layer, expert]:.2f} times the mean."
        dead = sum(len(experts) for _, experts in found.dead)
        total = len(found.used) * self.dump.num_experts
        some = f"Never chosen: {dead:,} of {total:,} experts in layers with counts."
        yield some if dead else "Every expert was chosen at least once."
        idle = self.dump.logical_count.shape[1] - len(found.used)
        if idle:
            yield f"Nothing was counted in {counted(idle, 'layer')}; they are left out of all means."
        if found.num_gpus > 1:
            balance = found.balance[found.used]
            yield f"Balancedness of {found.num_gpus} GPUs is {balance.mean():.3f}: {BALANCE}, 1 is perfect."
        else:
            yield "The recording does not say on how many GPUs experts are."

    def experts(self) -> Iterator[str]:
        """Draw the load of every expert."""
        found, unit = self.findings, "x the mean of the layer"
        if self.dump.num_experts == 1:
            yield "<p>Layers have one expert each, which has all the load.</p>"
        yield self.charts.heat("map", "Load of experts", found.load, "layer", "expert", unit)
        code = base64.b64encode(csv_of(found.total).encode()).decode()
        yield f'<p><a download="counts.csv" href="data:text/csv;base64,{code}">Download all counts as CSV</a></p>'
        mean, uneven = found.sorted_shares()
        series = {"mean of layers": mean.tolist(), "most uneven layer": uneven.tolist()}
        series["even choice"] = np.linspace(0, 1, len(mean)).tolist()
        labels = [str(index) for index in range(len(mean))]
        axes = ("part of all choices", "busiest experts of a layer")
        yield self.charts.lines("curve", "Share of the busiest experts", series, labels, axes, 1.0)
        rows: list[list[Cell]] = [
            [layer, expert, int(found.total[layer, expert]), f"{found.load[layer, expert]:.2f}"]
            for layer, expert in found.hottest
        ]
        yield table("Hottest experts", ["layer", "expert", "count", "load (x mean)"], rows)
        dead = found.dead
        if not dead:
            yield "<p>No expert is dead: each was chosen at least once.</p>"
            return
        rows = [[layer, len(experts), _named(experts)] for layer, experts in dead]
        listed = table("Dead experts: those that were never chosen", ["layer", "number", "experts"], rows, words=True)
        yield listed if len(rows) <= MOST_ROWS else folded(f"Dead experts in {counted(len(rows), 'layer')}", listed)

    def layers(self) -> Iterator[str]:
        """Draw how even each layer is."""
        found, gpus = self.findings, self.findings.num_gpus
        num_layers = len(found.total)
        used = set(found.used.tolist())
        labels = [str(layer) for layer in range(num_layers)]
        entropy = expert_entropy(found.total)
        if gpus > 1:
            values = [float(found.balance[layer]) if layer in used else None for layer in range(num_layers)]
            yield self.charts.bars(
                "layer-balance", "Balancedness of layers", values, labels, ("balancedness", "layer"), 1.0
            )
        values = [float(entropy[layer]) if layer in used else None for layer in range(num_layers)]
        if self.dump.num_experts > 1:
            yield self.charts.bars("evenness", "Evenness of choices", values, labels, ("evenness", "layer"), 1.0)
            yield "<p>Evenness is the entropy of the choice of an expert: 1 if all are equal, 0 if one has all.</p>"
        header = ["layer", "count", "busiest expert", "its load (x mean)", "never chosen", "evenness"]
        header += ["balancedness"] if gpus > 1 else []
        rows: list[list[Cell]] = []
        for layer in range(num_layers):
            if layer not in used:
                rows.append([layer, 0, *["nothing counted"] * (len(header) - 2)])
                continue
            busiest = int(found.total[layer].argmax())
            row: list[Cell] = [layer, int(found.total[layer].sum()), str(busiest), f"{found.load[layer].max():.2f}"]
            row += [int((found.total[layer] == 0).sum()), f"{entropy[layer]:.3f}"]
            rows.append(row + ([f"{found.balance[layer]:.3f}"] if gpus > 1 else []))
        yield folded("Layers as a table", table("Counts of layers", header, rows))

    def gpus(self) -> Iterator[str]:
        """Draw the load of each GPU."""
        found = self.findings
        if found.num_gpus == 1:
            yield f"<p>The balance of GPUs is not drawn, as all slots are on one. {self._ask()}</p>"
            return
        labels = [str(rank) for rank in range(found.num_gpus)]
        loads = over_mean(found.rank_load.sum(axis=0).astype(float)[None])[0]
        yield self.charts.bars(
            "gpu-load", "Load of GPUs, all layers together", loads.tolist(), labels, ("load (x mean)", "GPU")
        )
        scale = self._scale()
        unit = "x the mean of the layer"
        before = over_mean(found.rank_load)
        yield self.charts.heat("gpu-map", "Load of GPUs, as recorded", before, "layer", "GPU", unit, scale)
        rows: list[list[Cell]] = [
            [rank, int(load), f"{over:.2f}"]
            for rank, (load, over) in enumerate(zip(found.rank_load.sum(axis=0), loads, strict=True))
        ]
        yield folded("GPUs as a table", table("Counts of GPUs", ["GPU", "count", "load (x mean)"], rows))
        if len(self.dump.rank_physical_count) > 1:
            traffic = traffic_matrix(self.dump.rank_physical_count, found.num_gpus).sum(axis=0)
            title = "Choices from rank to rank"
            mean = traffic / max(traffic.mean(), 1e-300)
            yield self.charts.heat("traffic", title, mean, "from rank", "to rank", "x the mean of all pairs")
            if found.num_gpus > MOST_NAMED:
                return
            header = ["from rank", *(f"to {rank}" for rank in range(found.num_gpus))]
            yield folded(
                "Choices from rank to rank as a table",
                table(title, header, [[rank, *row] for rank, row in enumerate(traffic.tolist())]),
            )

    def _scale(self) -> Scale:
        """Return one scale for the GPUs before and after, to compare."""
        return Scale.of(np.concatenate([over_mean(self.findings.rank_load), over_mean(self.placements[1].loads)]))

    def _ask(self) -> str:
        slots = counted(self.dump.global_physical_count.shape[2], "slot")
        return (
            "To see it, say how many GPUs share the "
            f"{slots}: <code>numba-moe report {html.escape(self.name)} --gpus N</code>."
        )

    def over_time(self) -> Iterator[str]:
        """Draw balance and choices over the passes."""
        found = self.findings
        if len(self.dump.forward_pass_id) < 2:
            yield "<p>There is one pass, so nothing changes over time.</p>"
            return
        across = f"pass{self.per_part}"
        series: dict[str, list[float | None]] = {}
        if found.num_gpus > 1:
            series["balancedness"] = found.balance_over_time()
            yield self.charts.lines(
                "balance", "Balancedness over time", series, self.passes, (f"balancedness: {BALANCE}", across), 1.0
            )
        first, before = found.drift()
        drift = {"since the first": first, "since the one before": before}
        yield self.charts.lines(
            "drift", "Drift of choices", drift, self.passes, ("part of choices that went elsewhere", across)
        )
        yield "<p>Without drift both lines stay level. If loads drift, the distance from the first grows.</p>"
        top = found.hottest[:5]
        hot = {f"expert {expert} of layer {layer}": found.over_time(layer, expert) for layer, expert in top}
        yield self.charts.lines(
            "hot", "Hottest experts over time", hot, self.passes, ("load (x mean of its layer)", across)
        )
        series |= drift | hot
        chosen = bounds(len(self.passes), MOST_ROWS)[:-1]
        rows: list[list[Cell]] = [
            [self.passes[at], *(None if values[at] is None else f"{values[at]:.3f}" for values in series.values())]
            for at in chosen
        ]
        title = "Values over time"
        title += f": {len(chosen)} of {len(self.passes)} points" if len(chosen) < len(self.passes) else ""
        yield folded("Over time as a table", table(title, ["passes", *series], rows))

    def together(self) -> Iterator[str]:
        """List the experts that tokens choose together."""
        together = self.findings.together()
        if together is None:
            yield "<p>This is known where the recorder keeps the ids of tokens, more than one of each: "
            yield '<code>mode="per_token"</code>.</p>'
            return
        if not together.pairs:
            yield "<p>No two experts are together more often than independent choices would give.</p>"
            return
        rows: list[list[Cell]] = [
            [p.layer, p.first, p.second, p.tokens, f"{p.expected:.1f}", f"{p.tokens / p.expected:.2f}"]
            for p in together.pairs
        ]
        title = f"Experts of layer {together.layer} chosen together"
        unit = "x the tokens expected of independent choices"
        yield self.charts.heat("pairs", title, together.ratio, "expert", "with expert", unit)
        header = ["layer", "expert", "and expert", "tokens", "expected tokens", "tokens / expected"]
        yield table("Pairs that tokens chose most beyond what independent choices would give", header, rows)
        if together.counted < together.recorded:
            yield f"<p>Counted over {together.counted:,} of {together.recorded:,} tokens.</p>"

    def replicas(self) -> Iterator[str]:
        """Say which experts have several slots."""
        found = self.findings
        many = np.argwhere(found.replicas > 1)
        if not len(many):
            yield "<p>Every expert has one slot. An expert that is much busier than the mean needs copies: a GPU that "
            yield "holds it alone has at least its load.</p>"
            return
        yield f"<p>{counted(len(many), 'expert')} of all layers have more than one slot in the last map.</p>"
        order = sorted(many.tolist(), key=lambda place: (-found.replicas[tuple(place)], -found.load[tuple(place)]))
        rows: list[list[Cell]] = [
            [layer, expert, int(found.replicas[layer, expert]), f"{found.load[layer, expert]:.2f}",
             f"{found.load[layer, expert] / found.replicas[layer, expert]:.2f}"]
            for layer, expert in order[:MOST_ROWS]
        ]  # fmt: skip
        title = "Experts with most slots" if len(order) > MOST_ROWS else "Experts with several slots"
        yield table(title, ["layer", "expert", "slots", "load (x mean)", "load of a slot (x mean)"], rows)

    def rebalance(self) -> Iterator[str]:
        """Compare placements, on the passes that they are chosen by and on others."""
        found = self.findings
        if found.num_gpus == 1:
            yield f"<p>A rebalance changes nothing on one GPU. {self._ask()}</p>"
            return
        base = self.placements[0].slots_per_gpu
        rows: list[list[Cell]] = []
        for placement in self.placements:
            more = placement.slots_per_gpu / base - 1
            held_out = None if placement.held_out is None else f"{placement.held_out:.3f}"
            row: list[Cell] = [placement.name, f"{placement.balance:.3f}", f"{placement.worst:.3f}", held_out]
            rows.append([*row, placement.slots_per_gpu, f"+{more:.1%}" if more else "same", placement.changed])
        header = ["placement", "balancedness, in hindsight", "of the worst layer"]
        header += ["on the second half, chosen by the first", "slots per GPU", "memory of experts", "slots that change"]
        yield table("Placements", header, rows)
        yield f"<p>{html.escape(self.verdict())}</p>"
        unit = "x the mean of the layer"
        after, scale = self.placements[1], self._scale()
        yield self.charts.heat(
            "gpu-map-after", "Load of GPUs after a rebalance", over_mean(after.loads), "layer", "GPU", unit, scale
        )
        yield f"<p>The map is that of {after.name} with the same slots, in hindsight.</p>"

    def verdict(self) -> str:
        """Say what the placements mean."""
        now, *tried = self.placements
        if now.held_out is None:
            several = len(self.dump.forward_pass_id) > 1
            why = "Nothing was counted in one half of the passes, so" if several else "There is one pass, so"
            return (
                "All numbers are in hindsight: each placement is chosen by the same counts that it is scored on. "
                f"{why} nothing says how a placement does on passes that it was not chosen by."
            )

        def score(placement: Placement) -> float:
            return placement.held_out or 0.0

        same = max((p for p in tried if p.slots_per_gpu == now.slots_per_gpu), key=score)
        most = max(map(score, tried))
        best = next(p for p in tried if score(p) > most - WORTH)  # those with fewest slots come first
        text = f"On passes that it was not chosen by, {same.name} with the same slots has {score(same):.3f}, "
        text += f"against {score(now):.3f} as recorded."
        if score(same) <= score(now):
            text = f"With the same slots no placement is better on passes that it was not chosen by: {score(same):.3f} "
            text += f"against {score(now):.3f} as recorded."
        if best.slots_per_gpu == now.slots_per_gpu:
            extra = f"1 to {MORE_SLOTS[-1]} more slots on each GPU"
            text += f" With {extra}, for copies of busy experts, it would be {most:.3f} at best."
        else:
            more = best.slots_per_gpu - now.slots_per_gpu
            text += f" With {counted(more, 'more slot')} on each GPU, for copies of busy experts, {best.name} has "
            text += f"{score(best):.3f}; that takes {more / now.slots_per_gpu:.1%} more memory for experts."
        return text


def _named(experts: list[int]) -> str:
    text = ", ".join(map(str, experts[:MOST_NAMED]))
    return text if len(experts) <= MOST_NAMED else f"{text} and {len(experts) - MOST_NAMED} more"


def _file(name: str) -> str:
    return importlib.resources.files("numba_moe.recorder").joinpath(name).read_text()


def style() -> str:
    """Return the style sheet: colours of light and dark, and rules."""

    def variables(colours: dict[str, str]) -> str:
        return ";".join(f"--{name}:{colour}" for name, colour in colours.items())

    dark = f"@media (prefers-color-scheme: dark){{:root{{{variables(DARK)}}}}}"
    return f":root{{color-scheme:light dark;{variables(LIGHT)}}}{dark}\n{_file('report.css')}"


def page(findings: Findings, name: str, written: str, placements: Sequence[Placement] = ()) -> str:
    """Return the report as HTML that refers to nothing outside itself."""
    return Page(findings, name, written, placements).html()
