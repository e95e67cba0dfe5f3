"""Measure how many lanes should serve a token, and write the table that gating chooses by.

python scripts/choose_lanes.py measure times.json    # on a GPU: a few minutes
python scripts/choose_lanes.py table times.json      # writes numba_moe/ops/gating/lane_table.py

Lines of the table follow from the times of every number of lanes and of warps in a block: as few lines
as keep within 2 % of the least time at every number of tokens that was measured.
"""

import argparse
import functools
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "numba_moe" / "ops" / "gating" / "lane_table.py"
EXPERTS = (2, 4, 8, 16, 32, 64, 128, 256, 384, 512)
PICKS = (1, 2, 4, 8)
TOKENS = (1, 64, 512, 1024, 2048, 4096, 16384, 65536, 131072)
LANES = (1, 2, 4, 8, 16, 32)
WARPS = (4, 8, 16)
NEEDS = (0, 1, 2)
CLOSE = 1.02
MOST_TOKENS = 2**31 - 1

Row = tuple[int, int, int]  # experts, picks, and what a row needs: see gating.plans
Times = dict[str, float]  # microseconds by "lanes warps", with no lanes for the other kernels

HEADER = '''"""How many lanes serve a token, as measured on an {gpu}: written by scripts/choose_lanes.py.

The key is the number of experts, of picks, and what a row needs (see which_kernel.py). Each has lines of tokens, lanes
and warps of a block; the first line with enough tokens counts. 0 lanes mean that another kernel serves.
"""

LANES: dict[tuple[int, int, int], tuple[tuple[int, int, int], ...]] = {{
'''


def candidates(num_tokens: int, num_experts: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Yield numbers of lanes that can serve a token, 0 for another kernel, and of warps that a block may have."""
    from numba_moe.device.types import LANE_COLUMNS

    yield 0, WARPS[0]
    for lanes, warps in itertools.product(LANES, WARPS):
        fits = max(top_k, math.ceil(num_experts / LANE_COLUMNS[-1])) <= lanes <= max(8, num_experts)
        if fits and (warps == WARPS[0] or num_tokens * lanes > 32 * 32 * warps // 2):
            yield lanes, warps


def measure(seconds: float) -> dict[str, Any]:
    """Return the times of every choice for rows of the table in random order, for so many seconds."""
    import torch

    import numba_moe
    from numba_moe.bench.measure import device_time
    from numba_moe.ops.gating import which_kernel

    begin = time.monotonic()
    rows: list[Row] = [row for row in itertools.product(EXPERTS, PICKS, NEEDS) if row[1] <= row[0]]
    random.Random(0).shuffle(rows)
    found = []
    for number, (experts, picks, needs) in enumerate(rows):
        if time.monotonic() - begin > seconds:
            break
        for tokens in TOKENS:
            dtype = (torch.bfloat16, torch.float32)[number % 2]
            logits = torch.randn(tokens, experts, dtype=dtype, device="cuda")
            bias = torch.randn(experts, device="cuda") if needs == which_kernel.BIASED else None
            function = numba_moe.topk_sigmoid if needs == which_kernel.BIASED else numba_moe.topk_softmax
            call = functools.partial(function, logits, picks, needs == which_kernel.LOGITS, bias)
            times: Times = {}
            for lanes, warps in candidates(tokens, experts, picks):
                with which_kernel.preferring("lanes", (lanes, warps)):
                    times[f"{lanes} {warps}"] = device_time(call)
            found.append({"row": (experts, picks, needs), "tokens": tokens, "times": times})
    return {"gpu": torch.cuda.get_device_name(), "times": found}


def lines_of(times_by_tokens: dict[int, Times]) -> tuple[tuple[int, int, int], ...]:
    """Return lines of tokens, lanes and warps: the longest ones, one after the other, that keep close to the best."""
    measured = sorted(times_by_tokens.items())
    lines: list[tuple[int, int, int]] = []
    at = 0
    while at < len(measured):
        reach: dict[tuple[int, int], tuple[int, float]] = {}
        for choice in map(numbers, measured[at][1]):
            losses = [loss(times, *choice) for _, times in measured[at:]]
            upto = next((i for i, value in enumerate(losses) if value > CLOSE), len(losses))
            reach[choice] = upto, -sum(losses[:upto])
        best = max(reach, key=lambda choice: reach[choice])
        at += reach[best][0]
        limit = MOST_TOKENS if at == len(measured) else round(math.sqrt(measured[at - 1][0] * measured[at][0]))
        lines.append((limit, *best))
    return tuple(lines)


def numbers(name: str) -> tuple[int, int]:
    """Return lanes and warps."""
    lanes, warps = map(int, name.split())
    return lanes, warps


def loss(times: Times, lanes: int, warps: int) -> float:
    """Return how many times the least time a choice takes; where large blocks were not measured, that of small ones."""
    taken = times.get(f"{lanes} {warps}", times.get(f"{lanes} {WARPS[0]}", math.inf))
    return taken / min(times.values())


def table(measured: dict[str, Any]) -> str:
    """Return the module that holds the table."""
    rows: dict[Row, dict[int, Times]] = {}
    for entry in measured["times"]:
        rows.setdefault(tuple(entry["row"]), {})[entry["tokens"]] = entry["times"]
    lines = "".join(f"    {row}: {lines_of(rows[row])},\n" for row in sorted(rows))
    return HEADER.format(gpu=measured["gpu"]) + lines + "}\n"


def main() -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("file", type=Path, help="the times, as JSON")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to measure")
    given = parser.parse_args()
    if given.what == "measure":
        given.file.write_text(json.dumps(measure(given.seconds)))
    else:
        TABLE.write_text(table(json.loads(given.file.read_text())))


if __name__ == "__main__":
    main()
