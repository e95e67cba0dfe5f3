"""Draw a dump: one HTML page with everything in it, on which experts are hot and what moving them would change."""

import argparse
import datetime
import functools
from collections.abc import Callable, Sequence

from numba_moe.recorder.dump_files import load
from numba_moe.recorder.report_findings import Findings, Placement
from numba_moe.recorder.report_page import page
from numba_moe.recorder.report_pictures import pictures, png
from numba_moe.runtime import checks, files
from numba_moe.runtime.text import counted, ticking


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read, check and place anew; return what writes the report and returns the exit status."""
    files.check_output("--out", options.out)
    if options.png is not None:
        checks.holds("--png", "in a folder", options.png.is_dir(), options.png)
        checks.installed("--png", "plot", "matplotlib")
    with checks.under_names(path="DUMP", num_layers="--layers", num_experts="--experts"):
        dump = load(options.dump, num_layers=options.num_layers, num_experts=options.num_experts)
    num_gpus = checks.integer("--gpus", dump.num_gpus if options.gpus is None else options.gpus, 1)
    checks.divides("--gpus", num_gpus, "the number of slots", dump.global_physical_count.shape[2])
    findings = Findings(dump, num_gpus)
    placements: list[Placement] = []
    if num_gpus > 1 and findings.total.any():
        with ticking(findings.layers_to_place, "layer") as tick:
            placements = findings.placements(options.algorithm, tick)
    return functools.partial(run, options, findings, placements)


def run(options: argparse.Namespace, findings: Findings, placements: Sequence[Placement]) -> int:
    """Write the report and return the exit status."""
    changed = datetime.datetime.fromtimestamp(options.dump.stat().st_mtime, datetime.timezone.utc)
    text = page(findings, options.dump.name, f"{changed:%Y-%m-%d %H:%M} UTC", placements)
    with files.replacing(options.out) as file:
        file.write(text.encode())
    passes, ranks = counted(len(findings.dump.logical_count), "pass"), counted(findings.num_gpus, "rank")
    if not findings.total.any():
        print(f"{options.out}: nothing was counted in {passes} on {ranks}")
        return 0
    if options.png is not None:
        for name, draw in pictures(findings, placements).items():
            with files.replacing(options.png / f"{name}.png") as file:
                file.write(png(draw))
    print(f"{options.out}: {passes} on {ranks}")
    return 0
