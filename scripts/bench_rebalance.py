"""Time `rebalance_experts` and say how much more balanced "refined" is than "deepseek"."""

import argparse
import itertools
import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from numba_moe.placement import balancedness, rank_loads, rebalance_experts
from numba_moe.verify.cases import trained_routing

ALGORITHMS = ("deepseek", "refined")
TIMED = {
    "58 layers, 256 experts, 288 slots, 144 GPUs": (58, 256, 288, 8, 18, 144),
    "61 layers, 384 experts, 448 slots, 64 GPUs": (61, 384, 448, 1, 8, 64),
}
SETTINGS = {
    "256 experts, 288 slots, 8 groups, 4 nodes, 32 GPUs": (256, 288, 8, 4, 32),
    "256 experts, 320 slots, 8 groups, 8 nodes, 64 GPUs": (256, 320, 8, 8, 64),
    "256 experts, 288 slots, 144 GPUs": (256, 288, 1, 1, 144),
    "384 experts, 448 slots, 64 GPUs": (384, 448, 1, 1, 64),
    "128 experts, 160 slots, 32 GPUs": (128, 160, 1, 1, 32),
    "64 experts, 96 slots, 4 groups, 2 nodes, 8 GPUs": (64, 96, 4, 2, 8),
}
TRAINED = ("32 experts of a trained model, 40 slots, 8 GPUs", (40, 1, 1, 8))
ZIPF_EXPONENTS = (0.5, 1.2)
PARETO_SHAPE = 1.2


def random_loads(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    if kind == "uniform":
        return rng.uniform(0, 1, shape)
    if kind == "pareto":
        return rng.pareto(PARETO_SHAPE, shape)
    exponents = rng.uniform(*ZIPF_EXPONENTS, (shape[0], 1))
    return rng.permuted(1 / np.arange(1, shape[1] + 1) ** exponents, axis=1)


def milliseconds(repeats: int, *arguments: Any, algorithm: str) -> list[float]:
    rebalance_experts(*arguments, algorithm=algorithm)  # compiles
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        rebalance_experts(*arguments, algorithm=algorithm)
        taken.append(1000 * (time.perf_counter() - begin))
    return taken


def time_table(repeats: int, rng: np.random.Generator) -> str:
    rows = []
    for name, (num_layers, num_experts, *sizes) in TIMED.items():
        for kind in ("pareto", "zipf", "uniform"):
            weight = random_loads(kind, (num_layers, num_experts), rng)
            row: list[Any] = [name, kind]
            for algorithm in ALGORITHMS:
                taken = milliseconds(repeats, weight, *sizes, algorithm=algorithm)
                row += [statistics.median(taken), max(taken)]
            rows.append(row)
    headers = ["size", "loads", *(f"{algorithm} {what} ms" for algorithm in ALGORITHMS for what in ("median", "worst"))]
    return tabulate(rows, headers, floatfmt=".1f")


def gains(name: str, kind: str, weight: np.ndarray, sizes: Sequence[int]) -> list[Any]:
    balance = []
    for algorithm in ALGORITHMS:
        placed = rebalance_experts(weight, *sizes, algorithm=algorithm)
        balance.append(balancedness(weight, placed.physical_to_logical_map, sizes[-1]))
    gain = balance[1] / balance[0]
    return [name, kind, *(part.mean() for part in balance), gain.mean(), gain.min(), gain.max()]


def gain_table(num_loads: int, rng: np.random.Generator) -> str:
    rows = []
    for name, (num_experts, *sizes) in SETTINGS.items():
        for kind in ("pareto", "zipf", "uniform"):
            rows.append(gains(name, kind, random_loads(kind, (num_loads, num_experts), rng), sizes))
    trained = [np.bincount(ids.ravel(), minlength=experts) for _, ids, experts in trained_routing()]
    if trained:
        rows.append(gains(TRAINED[0], f"{len(trained)} layers", np.stack(trained), TRAINED[1]))
    headers = ["setting", "loads", *ALGORITHMS, "mean gain", "worst gain", "best gain"]
    return tabulate(rows, headers, floatfmt=".4f")


def next_steps(kind: str, rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Return loads of steps [S, L, E]: noise around a mean that may drift, change once, or alternate; or counts."""
    num_steps, *layers = shape
    time = np.arange(num_steps)[:, None, None]
    change: Any = 1
    if kind == "drift":
        change = np.exp(np.cumsum(rng.normal(0, 0.1, shape), axis=0))
    elif kind == "a change":
        change = np.where(time < num_steps // 3, *rng.lognormal(0, 0.7, (2, *layers)))
    elif kind == "two kinds":
        change = rng.lognormal(0, 0.7, (2, *layers))[rng.integers(0, 2, num_steps)]
    mean = rng.lognormal(0, 1, layers) * change
    if kind == "counts":
        return rng.poisson(20 * np.broadcast_to(mean, shape)).astype(float)
    return mean * rng.lognormal(0, 0.4, shape)


def next_table(num_loads: int) -> str:
    """Compare the busiest ranks of 20 steps after 20 recorded ones, over all settings."""
    rows = []
    for kind in ("noise", "counts", "drift", "a change", "two kinds"):
        ratios = []
        for (num_experts, *sizes), seed in itertools.product(SETTINGS.values(), range(num_loads)):
            loads = next_steps(kind, np.random.default_rng(seed), (40, 3, num_experts))
            busiest = []
            for algorithm in ALGORITHMS:
                placed = rebalance_experts(loads[:20], *sizes, algorithm=algorithm).physical_to_logical_map
                busiest.append(rank_loads(loads[20:], placed, sizes[-1]).max(axis=-1).sum())
            ratios.append(busiest[1] / busiest[0])
        rows.append([kind, len(ratios), statistics.geometric_mean(ratios), min(ratios), max(ratios)])
    return tabulate(rows, ["steps", "cases", "mean", "best", "worst"], floatfmt=".3f")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=21, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--loads", type=int, default=200, help="random loads for each setting (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    print(f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, NumPy {np.__version__}\n")
    print(time_table(options.repeats, rng), "\n")
    print("Balancedness (mean over max load of ranks), and that of refined over that of deepseek:\n")
    print(gain_table(options.loads, rng))
    print('\nLoad of the busiest rank on steps after those recorded, "refined" over "deepseek":\n')
    print(next_table(max(options.loads // 20, 1)))


if __name__ == "__main__":
    main()
