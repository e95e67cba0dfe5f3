"""Time `rebalance_experts` and say how much more balanced "refined" is than "deepseek"."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from numba_moe.placement import balancedness, rebalance_experts
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


def main() -> None:
    """Print both tables."""
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


if __name__ == "__main__":
    main()
