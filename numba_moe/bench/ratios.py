"""What becomes of the times: ratios to the best peer, a table, a file to compare with later, a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

from numba_moe.bench.contenders import OURS
from numba_moe.bench.measure import Row
from numba_moe.runtime import files, formats
from numba_moe.runtime.text import fitted


def ratios(rows: Sequence[Row]) -> dict[tuple[str, ...], tuple[float | None, float | None]]:
    """Return, by the key of each row of ours, our device and host time over the best peer's."""
    found = {}
    for row in rows:
        if row.implementation == OURS:
            peers = [r for r in rows if r.key[:3] == row.key[:3] and r.implementation != OURS]
            found[row.key] = (
                _ratio(row.device_us, min((p.device_us for p in peers if p.device_us is not None), default=None)),
                _ratio(row.host_us, min((p.host_us for p in peers if p.host_us is not None), default=None)),
            )
    return found


def _ratio(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new / old


def means(rows: Sequence[Row]) -> dict[str, tuple[int, float, float]]:
    """Return, by op, how many shapes have a peer, and the geometric means of our device and host ratios there."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key, (device, host) in ratios(rows).items():
        if device is not None and host is not None:
            found.setdefault(key[0], []).append((device, host))
    return {
        op: (len(pairs), geometric_mean(device for device, _ in pairs), geometric_mean(host for _, host in pairs))
        for op, pairs in found.items()
    }


def table(rows: Sequence[Row], old: Mapping[tuple[str, ...], Row] | None = None) -> str:
    """Format rows for a terminal, beside those of an older run if there is one."""
    headers = ["op", "shape", "dtype", "implementation", "device us", "host us", "of copy"]
    headers += ["device / best peer", "host / best peer"]
    formats = ["", "", "", "", ".1f", ".1f", ".0%", ".2f", ".2f"]
    if old is not None:
        headers += ["old device us", "new / old", "old host us", "new / old"]
        formats += [".1f", ".2f", ".1f", ".2f"]
    to_peers = ratios(rows)
    lines = []
    for row in rows:
        line = [row.op, row.shape, row.dtype, row.implementation, row.device_us, row.host_us, row.copy_fraction]
        line += to_peers.get(row.key, (None, None))
        if old is not None:
            before = old.get(row.key, row._replace(device_us=None, host_us=None))
            line += [before.device_us, _ratio(row.device_us, before.device_us)]
            line += [before.host_us, _ratio(row.host_us, before.host_us)]
        note = f"WRONG {row.message}" if row.wrong else "refused" if row.message else ""
        lines.append([*line, note])
    return fitted(lines, [*headers, "note"], keys=4, floatfmt=[*formats, ""], missingval="-")


def write_report(path: Path, rows: Sequence[Row], environment: Mapping[str, str]) -> None:
    report = {"environment": environment, "rows": [row._asdict() for row in rows]}
    with files.replacing(path) as file:
        file.write(json.dumps(report, indent=1).encode())


def read_report(path: Path) -> dict[tuple[str, ...], Row]:
    """Read the rows of a report, by their keys."""
    return read_run(path)[0]


def read_run(path: Path) -> tuple[dict[tuple[str, ...], Row], dict[str, str]]:
    """Read the rows of a report, by their keys, and where they were measured."""
    with files.reading(path) as file:
        content = file.read()
    try:
        report = formats.parse_json(content)
        rows = {row.key: row for row in (Row(**fields) for fields in report["rows"])}
        return rows, {name: str(value) for name, value in report.get("environment", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of this benchmark: {error}") from error


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw device time over tokens: a panel per op, a line per implementation through the means over its shapes."""
    from matplotlib.figure import Figure

    ops = sorted({row.op for row in rows})
    figure = Figure(figsize=(6 * len(ops), 4.5), layout="constrained")
    panels = figure.subplots(1, len(ops), squeeze=False)[0]
    for panel, op in zip(panels, ops, strict=True):
        for name in dict.fromkeys(row.implementation for row in rows if row.op == op):
            times: dict[int, list[float]] = {}
            for row in rows:
                if row.op == op and row.implementation == name and row.device_us is not None:
                    times.setdefault(row.tokens, []).append(row.device_us)
            tokens = sorted(times)
            panel.plot(tokens, [geometric_mean(times[t]) for t in tokens], marker="o", label=name)
        panel.set(xscale="log", yscale="log", title=op, xlabel="tokens", ylabel="device us, geometric mean over shapes")
        panel.legend()
        panel.grid(alpha=0.3)
    with files.replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))
