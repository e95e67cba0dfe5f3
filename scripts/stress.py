"""Look for results that are wrong only in a crowd: many processes, empty caches, first calls, other libraries' kernels.

Several processes at once draw calls of all ops, and launch them by batches without a wait in between: on several
streams, some out of captured graphs, each at once followed by Triton kernels that read the same inputs and results, and
by kernels of torch. All processes of a round share a disk cache and Triton's cache, both empty at first, so that each
compiles some kernels in the middle of its work. Every result is compared with the reference, and with Triton's.

    python scripts/stress.py --rounds 3 --seconds 60               # rounds take turns: may kernels start early or not
    python scripts/stress.py --early-start off --processes 12
"""

import argparse
import collections
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import numba_moe
from numba_moe.runtime import launch
from numba_moe.runtime.compile import Specialisation
from numba_moe.verify import random_cases, testing
from numba_moe.verify.verification import OPS

try:
    import triton
    import triton.language as tl
except ImportError:
    sys.exit("stress.py: Triton is not installed, and its kernels are half of the crowd")

LIMITS = random_cases.Limits(2**12, 300, 0.0, 0)
BATCH = 12
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _combine(rows, weights, index, out, num_rows, hidden, top_k, BLOCK: tl.constexpr):  # noqa: N803
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(top_k):
        place = tl.load(index + token * top_k + k)
        weight = tl.load(weights + token * top_k + k).to(tl.float32)
        there = (column < hidden) & (place >= 0) & (place < num_rows)
        total += weight * tl.load(rows + place.to(tl.int64) * hidden + column, mask=there, other=0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * hidden + column, total, mask=column < hidden)


@triton.jit
def _copy(source, out, size, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(source + place, mask=place < size), mask=place < size)


def combine(rows: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Compute `moe_unpermute` by Triton, in float32."""
    (tokens, top_k), hidden = index.shape, rows.shape[1]
    out = torch.full((tokens, hidden), torch.nan, device="cuda")
    if tokens and hidden:
        _combine[(tokens, triton.cdiv(hidden, 128))](rows, weights, index, out, len(rows), hidden, top_k, BLOCK=128)
    return out


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Copy the memory of a tensor by Triton, at once behind whatever writes it."""
    out = torch.empty_like(tensor)
    if tensor.numel() and tensor.is_contiguous():
        _copy[(triton.cdiv(tensor.numel(), 512),)](tensor, out, tensor.numel(), BLOCK=512)
        return out
    return tensor.clone()


def tensors(result: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors(part)


class Drawn:
    """One call with its arguments on the device, what the reference says, and what came of it."""

    def __init__(self, index: int, seed: tuple[int, ...]) -> None:
        rng = np.random.default_rng((*seed, index))
        self.combining = index % 3 == 0
        case = random_cases.random_case(index, LIMITS)
        self.name = f"{case.op}, seed {seed}, index {index}"
        if self.combining:
            arguments = self._combination(rng)
        else:
            arguments = {name: testing.to_device(value, "cuda") for name, value in case.arguments(rng).items()}
            self.arguments = case.arguments(np.random.default_rng((*seed, index)))
            self.expected = getattr(numba_moe.reference, case.op)(**self.arguments)
        self.op, self.given = case.op, arguments
        self.captured = rng.random() < 0.1
        self.results: Any = None

    def _combination(self, rng: np.random.Generator) -> dict[str, Any]:
        tokens, top_k, hidden = int(rng.choice([32, 64])), int(rng.choice([2, 4, 8])), int(rng.choice([128, 256, 512]))
        dtype, of_weights = (WEIGHTS[int(rng.integers(3))] for _ in range(2))
        index = rng.permutation(tokens * top_k).astype(np.int32).reshape(tokens, top_k)
        self.name += f": moe_unpermute of {tokens} tokens, top {top_k}, {hidden} of {dtype}, weights of {of_weights}"
        return {
            "permuted": torch.from_numpy(rng.standard_normal((tokens * top_k, hidden), np.float32)).to("cuda", dtype),
            "topk_weights": torch.from_numpy(rng.random((tokens, top_k), np.float32)).to("cuda", of_weights),
            "inv_permuted_idx": torch.from_numpy(index).cuda(),
        }

    def launch(self) -> None:
        if self.combining:
            ours = numba_moe.moe_unpermute(**self.given)
            self.results = ours, combine(*self.given.values())
            return
        op = getattr(OPS[self.op], self.op)
        if self.captured and self.op != "fused_experts":
            op(**self.given)  # written arguments are written twice with the same
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                ours = op(**self.given)
            graph.replay()
            self.graph = graph
        else:
            ours = op(**self.given)
        self.results = ours, [copied(part) for part in tensors(ours)]

    def wrong(self) -> str | None:
        ours, triton_results = self.results
        if self.combining:
            relative, absolute = testing.TOLERANCES[ours.dtype]
            size = combine(self.given["permuted"].abs(), self.given["topk_weights"], self.given["inv_permuted_idx"])
            far = (ours.float() - triton_results).abs() > absolute + relative * size
            far |= ~triton_results.isfinite()
            return (
                f"{int(far.sum())} of {far.numel()} elements, rows {far.any(1).nonzero().ravel().tolist()}"
                if (far.any())
                else None
            )
        for part, copy in zip(tensors(ours), triton_results, strict=True):
            if part.contiguous().view(torch.uint8).ne(copy.view(torch.uint8)).any() if part.numel() else False:
                return "Triton read something else than what is there now"
        found = [c.message for c in testing.compare_results(self.op, ours, self.expected, self.arguments)]
        return "; ".join(message for message in found if message) or None


def noise(rng: np.random.Generator) -> None:
    """Let torch work on the current stream for some microseconds."""
    if rng.random() < 0.5:
        matrix = torch.randn(256, 256, device="cuda")
        (matrix @ matrix).sum()


def work(seed: tuple[int, ...], seconds: float) -> int:
    """Run batches until the time is over; return 1 at the first result that is wrong."""
    rng = np.random.default_rng(seed)
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    counts: collections.Counter[str] = collections.Counter()
    end, index = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with np.errstate(all="ignore"):
            batch = [Drawn(index + place, seed) for place in rng.permutation(BATCH)]
        index += BATCH
        torch.cuda.synchronize()
        poison = testing.poisoned_memory() if rng.random() < 0.5 else contextlib.nullcontext()
        with poison:
            for drawn in batch:
                with torch.cuda.stream(streams[int(rng.integers(3))]):
                    noise(rng)
                    drawn.launch()
        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(f"WRONG one of {[drawn.name for drawn in batch]}: {error}", flush=True)
            return 1
        for drawn in batch:
            counts["moe_unpermute beside Triton" if drawn.combining else drawn.op] += 1
            if message := drawn.wrong():
                print(f"WRONG {drawn.name}: {message}", flush=True)
                return 1
    print(f"{sum(counts.values())} calls right, among them {counts['moe_unpermute beside Triton']} beside Triton's")
    return 0


def never_early() -> None:
    """Launch every kernel so that it starts only after the end of the one ahead of it."""
    load = launch._load

    def late(kernel: Any, specialisation: Specialisation, device: int) -> tuple[int, bool]:
        return load(kernel, specialisation, device)[0], False

    launch._load = late


def main() -> int:
    """Return 1 if any process found a wrong result or died."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="each with new processes and empty caches (default 2)")
    parser.add_argument("--seconds", type=float, default=60, help="of work in a round (default 60)")
    parser.add_argument("--early-start", choices=("on", "off", "turns"), default="turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        if options.early_start == "off":
            never_early()
        return work((options.seed, *options.worker), options.seconds)
    failed = 0
    for number in range(options.rounds):
        early = ("on", "off")[number % 2] if options.early_start == "turns" else options.early_start
        with tempfile.TemporaryDirectory() as folder:
            caches = {"NUMBA_MOE_CACHE_DIR": f"{folder}/numba_moe", "TRITON_CACHE_DIR": f"{folder}/triton"}
            shared = [sys.executable, __file__, "--early-start", early, "--seconds", str(options.seconds)]
            started = [
                subprocess.Popen(
                    [*shared, "--seed", str(options.seed), "--worker", str(number), str(place)],
                    env={**os.environ, **caches},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for place in range(options.processes)
            ]
            outputs = [process.communicate()[0] for process in started]
        for place, (process, output) in enumerate(zip(started, outputs, strict=True)):
            failed += process.returncode != 0
            last = output if process.returncode else (output.strip().splitlines() or ["nothing printed"])[-1]
            print(f"round {number}, early start {early}, process {place}: {last[-3000:]}", flush=True)
    print(f"{options.rounds * options.processes - failed} processes right, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
