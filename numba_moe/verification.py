"""Reference against GPU: every op over named cases, as a table.

On a machine without a CUDA device the same kernels run in Numba's CUDA simulator, on smaller cases.
"""

import argparse
import contextlib
import fnmatch
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

import numba_moe
from numba_moe import reference, testing
from numba_moe.runtime import simulator

OPS = tuple(name for name in numba_moe.__all__ if name[0].islower())


class Case(NamedTuple):
    """One call: how to make its arguments, and how its float arrays lie on the device."""

    op: str
    name: str
    arguments: Callable[[np.random.Generator], dict[str, Any]]
    dtype: str | None = None
    strided: bool = False


class Model(NamedTuple):
    """Routing dimensions of a published model."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    groups: tuple[int, int] | None = None


# From the configuration files that the models are published with.
MODELS = (
    Model("Mixtral-8x7B", 8, 2, 4096),
    Model("OLMoE", 64, 8, 2048),
    Model("Qwen3-30B-A3B", 128, 8, 2048),
    Model("gpt-oss-120b", 128, 4, 2880),
    Model("DeepSeek-V3", 256, 8, 7168, (8, 4)),
    Model("Kimi-K2", 384, 8, 7168),
)
TOKENS = {
    "simulator": (3,),
    "quick": (1, 100),
    "default": (1, 100, 4096),
    "full": (1, 7, 64, 512, 4096, 16384, 65536),
}
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_ROWS = 1 << 28  # elements of permuted rows in one case, for the memory of the host


def model_cases(level: str) -> Iterator[Case]:
    """Yield the cases shaped like published models."""
    for number, model in enumerate(MODELS):
        experts, top_k = model.num_experts, model.top_k
        for step, tokens in enumerate(TOKENS[level]):
            block_size = 16 if tokens < 512 else 64 if tokens < 16384 else 128
            dtype = DTYPES[(number + step) % len(DTYPES)]
            for routing in testing.ROUTINGS:
                name = f"{model.name} {tokens} tokens {routing}"
                yield Case("moe_align_block_size", name, _align(tokens, experts, top_k, routing, block_size))
            name = f"{model.name} {tokens} tokens"
            yield Case("count_tokens_per_expert", f"{name} zipf", _count(tokens, experts, top_k))
            yield Case("expert_offsets", f"{name} zipf", _offsets(tokens, experts, top_k, block_size))
            yield from _gating_cases(model, tokens, f"{name} {dtype}", dtype)
            hidden = 64 if level == "simulator" else model.hidden
            if tokens * top_k * hidden <= LARGEST_ROWS:
                size = (tokens, experts, top_k, hidden, dtype)
                yield Case("moe_permute", f"{name} {dtype}", _permute(*size), dtype)
                yield Case("moe_unpermute", f"{name} {dtype}", _unpermute(*size), dtype)


def _align(
    tokens: int, experts: int, top_k: int, routing: str, block_size: int, **options: Any
) -> Callable[[np.random.Generator], dict[str, Any]]:
    def arguments(rng: np.random.Generator) -> dict[str, Any]:
        ids = testing.random_ids(rng, tokens, experts, top_k, routing)
        return {"topk_ids": ids, "block_size": block_size, "num_experts": experts, **options}

    return arguments


def _count(tokens: int, experts: int, top_k: int) -> Callable[[np.random.Generator], dict[str, Any]]:
    return lambda rng: {
        "topk_ids": testing.random_ids(rng, tokens, experts, top_k, "zipf"),
        "num_experts": experts,
    }


def _offsets(tokens: int, experts: int, top_k: int, alignment: int) -> Callable[[np.random.Generator], dict[str, Any]]:
    return lambda rng: {
        "counts": np.bincount(
            testing.random_ids(rng, tokens, experts, top_k, "zipf").ravel(), minlength=experts
        ).astype(np.int32),
        "alignment": alignment,
    }


def _gating_cases(model: Model, tokens: int, name: str, dtype: str) -> Iterator[Case]:
    experts = model.num_experts

    def logits(rng: np.random.Generator) -> dict[str, Any]:
        return {
            "gating_output": testing.random_floats(rng, (tokens, experts), dtype),
            "top_k": model.top_k,
            "renormalize": True,
        }

    def biased(rng: np.random.Generator) -> dict[str, Any]:
        return {**logits(rng), "correction_bias": testing.random_floats(rng, (experts,)) * np.float32(0.1)}

    def grouped(rng: np.random.Generator) -> dict[str, Any]:
        assert model.groups is not None
        options = {"num_expert_group": model.groups[0], "topk_group": model.groups[1], "scoring_func": "sigmoid"}
        return {**biased(rng), **options, "routed_scaling_factor": 2.5}

    if model.groups is not None:
        yield Case("grouped_topk", name, grouped, dtype)
    elif experts > 256:
        yield Case("topk_sigmoid", f"{name} bias", biased, dtype)
    else:
        yield Case("topk_softmax", name, logits, dtype)


def _permute(
    tokens: int, experts: int, top_k: int, hidden: int, dtype: str
) -> Callable[[np.random.Generator], dict[str, Any]]:
    return lambda rng: {
        "hidden_states": testing.random_floats(rng, (tokens, hidden), dtype),
        "topk_ids": testing.random_ids(rng, tokens, experts, top_k, "zipf"),
        "num_experts": experts,
    }


def _unpermute(
    tokens: int, experts: int, top_k: int, hidden: int, dtype: str
) -> Callable[[np.random.Generator], dict[str, Any]]:
    def arguments(rng: np.random.Generator) -> dict[str, Any]:
        return {
            "permuted": testing.random_floats(rng, (tokens * top_k, hidden), dtype),
            "topk_weights": rng.random((tokens, top_k), np.float32).astype("float32" if dtype == "bfloat16" else dtype),
            "inv_permuted_idx": rng.permutation(tokens * top_k).astype(np.int32).reshape(tokens, top_k),
        }

    return arguments


def edge_cases() -> Iterator[Case]:
    """Yield the cases that break kernels."""
    few = {"num_experts": 8, "block_size": 4}

    def ids(make: Callable[[np.random.Generator], np.ndarray]) -> Iterator[Case]:
        """Yield the grouping ops over one kind of ids."""
        yield Case("moe_align_block_size", name, lambda rng, make=make: {"topk_ids": make(rng), **few})
        yield Case("count_tokens_per_expert", name, lambda rng, make=make: {"topk_ids": make(rng), "num_experts": 8})
        yield Case(
            "moe_permute",
            name,
            lambda rng, make=make: {
                "hidden_states": testing.random_floats(rng, (len(make(rng)), 20)),
                "topk_ids": make(rng),
                "num_experts": 8,
            },
        )

    for name, make in {
        "zero tokens": lambda rng: np.zeros((0, 2), np.int32),
        "one slot": lambda rng: np.array([[5]], np.int32),
        "-1 rows": lambda rng: np.repeat([[3, 1], [-1, -1], [7, 3]], 9, axis=0).astype(np.int32),
        "all ids -1": lambda rng: np.full((40, 2), -1, np.int32),
        "ids out of range": lambda rng: np.tile([[8, 2], [-7, 2**31 - 1], [0, -(2**31)]], (12, 1)).astype(np.int32),
        "int64 ids past int32": lambda rng: np.tile([[2**32 + 1, 2], [-(2**40), 5]], (12, 1)),
        "one hot expert": lambda rng: np.full((70, 2), 6, np.int32),
        "empty experts": lambda rng: rng.choice([1, 6], (70, 2)).astype(np.int32),
        "several tiles": lambda rng: rng.integers(-1, 9, (400, 2)).astype(np.int32),
    }.items():
        yield from ids(make)

    expert_map = np.array([-1, 0, 1, -1, 2, -1, 3, -1], np.int32)
    options: dict[str, dict[str, Any]] = {
        "expert_map": {"expert_map": expert_map},
        "expert_map int64": {"expert_map": expert_map.astype(np.int64)},
        "expert_map ignore_invalid_experts": {"expert_map": expert_map, "ignore_invalid_experts": True},
        "expert_map reversed": {"expert_map": np.arange(8, dtype=np.int32)[::-1].copy(), "ignore_invalid_experts": True},
        "expert_map of no expert": {"expert_map": np.full(8, -1, np.int32), "ignore_invalid_experts": True},
        "pad_sorted_ids": {"pad_sorted_ids": True},
        "inactive_expert_id 0": {"inactive_expert_id": 0},
        "block_size 1": {"block_size": 1},
        "block_size 3": {"block_size": 3},
        "block_size above the slots": {"block_size": 1024},
        "one dimension": {},
    }
    for name, option in options.items():
        shape = (50,) if name == "one dimension" else (25, 2)
        yield Case(
            "moe_align_block_size",
            name,
            lambda rng, shape=shape, option=option: {
                "topk_ids": rng.integers(-1, 9, shape).astype(np.int32),
                **few,
                **option,
            },
        )
    yield Case("moe_align_block_size", "one expert", _align(40, 1, 1, "uniform", 16))
    yield Case("moe_align_block_size", "257 experts", _align(30, 257, 10, "half_empty", 16))
    yield Case("moe_align_block_size", "2048 experts", _align(20, 2048, 8, "uniform", 2))
    yield Case("expert_offsets", "no experts", lambda rng: {"counts": np.zeros(0, np.int32)})
    yield Case("expert_offsets", "int64 counts past int32", lambda rng: {"counts": np.full(5, 2**31, np.int64)})
    yield Case("expert_offsets", "2048 experts", lambda rng: {"counts": rng.integers(0, 99, 2048), "alignment": 7})
    yield from _gating_edges()
    for dtype in DTYPES:
        yield Case("moe_permute", f"strided rows {dtype}", _permute(9, 4, 2, 33, dtype), dtype, strided=True)
        yield Case("moe_unpermute", f"strided rows {dtype}", _unpermute(9, 4, 2, 33, dtype), dtype, strided=False)
    yield Case("moe_permute", "hidden 0", _permute(9, 4, 2, 0, "float32"))
    yield Case("moe_unpermute", "zero tokens", _unpermute(0, 4, 2, 16, "float32"))
    yield Case(
        "moe_unpermute",
        "skipped slots",
        lambda rng: {
            "permuted": testing.random_floats(rng, (6, 40)),
            "topk_weights": rng.random((4, 3), np.float32),
            "inv_permuted_idx": np.array([[0, -1, 5], [-1, -1, -1], [6, 2, 1], [3, 4, 2**31 - 1]], np.int32),
        },
    )


def _gating_edges() -> Iterator[Case]:
    def case(name: str, logits: Callable[[np.random.Generator], np.ndarray], top_k: int, **options: Any) -> Iterator[Case]:
        strided = options.pop("strided", False)
        for bias in (False, True):

            def arguments(rng: np.random.Generator, bias: bool = bias) -> dict[str, Any]:
                made = logits(rng)
                given = {"gating_output": made, "top_k": top_k, **options}
                return {**given, "correction_bias": np.linspace(0, 1, made.shape[1], dtype=np.float32)} if bias else given

            label = f"{name} bias" if bias else name
            yield Case("topk_softmax", label, arguments, strided=strided)
            yield Case("topk_sigmoid", label, arguments, strided=strided)
            if logits(np.random.default_rng(0)).shape[1] % 4 == 0:
                for scoring_func in ("softmax", "sigmoid"):
                    for group_score in ("max", "top2_sum"):

                        def grouped(
                            rng: np.random.Generator,
                            scoring_func: str = scoring_func,
                            group_score: str = group_score,
                            arguments: Callable[[np.random.Generator], dict[str, Any]] = arguments,
                        ) -> dict[str, Any]:
                            groups = {"num_expert_group": 4, "topk_group": 2}
                            scoring = {"scoring_func": scoring_func, "group_score": group_score}
                            return {**arguments(rng), **groups, **scoring}

                        yield Case("grouped_topk", f"{label} {scoring_func} {group_score}", grouped, strided=strided)

    yield from case("zero tokens", lambda rng: np.zeros((0, 8), np.float32), 2)
    yield from case("one expert", lambda rng: testing.random_floats(rng, (3, 1)), 1, renormalize=True)
    yield from case("all logits equal", lambda rng: np.zeros((3, 40), np.float32), 6)
    yield from case("ties", lambda rng: rng.integers(0, 3, (6, 60)).astype(np.float32), 8, renormalize=True)
    yield from case("top_k = half the experts", lambda rng: testing.random_floats(rng, (2, 36)), 18)
    yield from case("strided rows", lambda rng: testing.separated_logits(rng, 4, 60), 4, strided=True)
    yield from case("signed zeros", lambda rng: np.array([[0.0, -0.0] * 4, [-0.0, 0.0] * 4], np.float32), 3)
    yield from case("saturated", lambda rng: rng.choice([-200.0, 200.0, 0.0], (4, 20)).astype(np.float32), 5)

    def non_finite(rng: np.random.Generator) -> np.ndarray:
        logits = testing.random_floats(rng, (7, 20))
        logits[0] = np.nan
        logits[1, 3] = np.nan
        logits[2, 4] = np.inf
        logits[3, ::2] = -np.inf
        logits[4] = -np.inf
        logits[5, 1], logits[5, 2], logits[5, 3] = np.inf, -np.inf, np.nan
        return logits

    yield from case("non-finite logits", non_finite, 6, renormalize=True)
    many = lambda rng: testing.separated_logits(rng, 2, 2048)  # noqa: E731
    yield Case("topk_softmax", "2048 experts", lambda rng: {"gating_output": many(rng), "top_k": 10})
    yield Case("topk_sigmoid", "2048 experts", lambda rng: {"gating_output": many(rng), "top_k": 40})


def input_cases(path: Path, num_experts: int | None, top_k: int, block_size: int) -> Iterator[Case]:
    """Yield every op that applies to a user's own routing; nothing in the file is executed."""
    for name, array in load_routing(path).items():
        label = f"{path.name}: {name}"
        if np.issubdtype(array.dtype, np.floating):
            # float16 keeps its dtype; the rest is rounded to float32 once, before both sides see it.
            logits = array if array.dtype == np.float16 else array.astype(np.float32)
            given = {"gating_output": logits, "top_k": min(top_k, logits.shape[1]), "renormalize": True}
            for op in ("topk_softmax", "topk_sigmoid"):
                yield Case(op, label, lambda rng, given=given: given)
            ids = reference.topk_softmax(logits, given["top_k"]).topk_ids  # type: ignore[arg-type]
            experts = logits.shape[1]
        else:
            ids = array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)
            experts = num_experts or int(ids.max(initial=0)) + 1
        align = {"topk_ids": ids, "block_size": block_size, "num_experts": experts}
        yield Case("moe_align_block_size", label, lambda rng, align=align: align)
        count = {"topk_ids": ids, "num_experts": experts}
        yield Case("count_tokens_per_expert", label, lambda rng, count=count: count)
        if ids.ndim == 2:
            yield Case(
                "moe_permute",
                label,
                lambda rng, count=count: {"hidden_states": testing.random_floats(rng, (len(count["topk_ids"]), 64)), **count},
            )


def load_routing(path: Path) -> dict[str, np.ndarray]:
    """Read topk_ids and gating logits from .npy, .npz, .safetensors or .pt, without running code from the file."""
    if path.suffix == ".npy":
        loaded: Any = {"array": np.load(path, allow_pickle=False)}
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            loaded = dict(file)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        loaded = load_file(path)
    elif path.suffix in (".pt", ".pth"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        loaded = loaded if isinstance(loaded, dict) else {"tensor": loaded}
    else:
        raise ValueError(f"`--input` must be a .npy, .npz, .safetensors or .pt file, got {path.name}")
    arrays = {
        str(name): testing.to_numpy(value) if isinstance(value, torch.Tensor) else value
        for name, value in loaded.items()
    }
    usable = {
        name: array
        for name, array in arrays.items()
        if isinstance(array, np.ndarray)
        and (np.issubdtype(array.dtype, np.integer) and array.ndim in (1, 2))
        or (isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating) and array.ndim == 2)
    }
    if not usable:
        raise ValueError(f"{path.name} holds no topk_ids (integers, 1 or 2 dimensions) and no logits (floats, 2)")
    return {name: np.ascontiguousarray(array) for name, array in usable.items()}


class Outcome(NamedTuple):
    """What came of one case."""

    op: str
    case: str
    mismatches: int
    error: float
    repeats_equal: bool
    inputs_unchanged: bool
    gpu_us: float | None
    reference_us: float
    message: str

    @property
    def passed(self) -> bool:
        return self.mismatches == 0 and self.repeats_equal and self.inputs_unchanged and not self.message


def run_case(case: Case, seed: int, device: str) -> Outcome:
    """Compare one call with the reference, on poisoned memory, twice over."""
    arguments = case.arguments(np.random.default_rng(seed))
    begin = time.perf_counter()
    expected = getattr(reference, case.op)(**arguments)
    reference_us = (time.perf_counter() - begin) * 1e6

    def on_device() -> dict[str, Any]:
        payload = ("gating_output", "hidden_states", "permuted")
        return {
            name: testing.to_device(value, device, case.dtype if name in payload else None, case.strided)
            for name, value in arguments.items()
        }

    given, untouched = on_device(), on_device()
    call = lambda: getattr(numba_moe, case.op)(**given)  # noqa: E731
    running = contextlib.nullcontext() if device == "cuda" else simulator.running()
    try:
        with running:
            with testing.poisoned_memory():
                result, again = call(), call()
            gpu_us = testing.time_on_device(call) if device == "cuda" else None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Outcome(case.op, case.name, 0, float("inf"), False, False, None, reference_us, message)
    comparisons = testing.compare_results(case.op, result, expected, arguments)
    return Outcome(
        case.op,
        case.name,
        sum(comparison.mismatches for comparison in comparisons),
        max(comparison.error for comparison in comparisons),
        _same_bits(result, again),
        all(_same_bits(value, untouched[name]) for name, value in given.items()),
        gpu_us,
        reference_us,
        "; ".join(comparison.message for comparison in comparisons if comparison.message),
    )


def _same_bits(left: Any, right: Any) -> bool:
    if isinstance(left, tuple):
        return all(map(_same_bits, left, right))
    if not isinstance(left, torch.Tensor):
        return bool(left == right)
    return testing.to_numpy(left).tobytes() == testing.to_numpy(right).tobytes()


def table(outcomes: list[Outcome]) -> str:
    """Format outcomes for a terminal; errors are in units of the tolerance."""
    rows = [
        (
            outcome.op,
            outcome.case,
            outcome.mismatches,
            outcome.error,
            "yes" if outcome.repeats_equal else "NO",
            outcome.gpu_us,
            outcome.reference_us,
            "passed" if outcome.passed else f"FAILED {outcome.message}",
        )
        for outcome in outcomes
    ]
    headers = ("op", "case", "mismatches", "error / tolerance", "repeats equal", "GPU us", "reference us", "verdict")
    formats = ("", "", "", ".2g", "", ".1f", ".0f", "")
    return tabulate(rows, headers, floatfmt=formats, missingval="-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verification."""
    parser.add_argument("--op", action="append", metavar="PATTERN", help="only these ops; * and ? match")
    parser.add_argument("--case", action="append", metavar="PATTERN", help="only cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="up to 100 tokens")
    size.add_argument("--full", action="store_true", help="up to 65536 tokens")
    parser.add_argument("--input", type=Path, metavar="FILE", help="topk_ids or logits to verify on instead")
    parser.add_argument("--num-experts", type=int, metavar="N", help="of topk_ids in --input (default: largest id + 1)")
    parser.add_argument("--top-k", type=int, default=8, metavar="K", help="for logits in --input (default 8)")
    parser.add_argument("--block-size", type=int, default=64, metavar="ROWS", help="for --input (default 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")


def select_cases(options: argparse.Namespace, on_gpu: bool) -> list[Case]:
    """Return the cases that the options ask for."""
    if options.input is not None:
        cases = list(input_cases(options.input, options.num_experts, options.top_k, options.block_size))
    else:
        level = "quick" if options.quick else "full" if options.full else "default"
        cases = [*model_cases(level if on_gpu else "simulator"), *edge_cases()]
    ops, names = options.op or ["*"], options.case or [""]
    return [
        case
        for case in cases
        if any(fnmatch.fnmatch(case.op, pattern) for pattern in ops)
        and any(fnmatch.fnmatch(case.name, f"*{pattern}*") for pattern in names)
    ]


def environment(on_gpu: bool) -> dict[str, str]:
    """Return what a reader needs to know to compare two tables."""
    packages = ("numba-moe", "numba", "numba-cuda", "cuda-core", "numpy", "torch")
    found = {name: version(name) for name in packages}
    device = torch.cuda.get_device_name() if on_gpu else "Numba's CUDA simulator"
    return {"device": device, "python": platform.python_version(), **found}


def run(options: argparse.Namespace) -> int:
    """Verify, print the table, and return the exit status: 1 if anything failed or nothing ran."""
    on_gpu = torch.cuda.is_available()
    where = environment(on_gpu)
    if on_gpu:
        print(f"Comparing the kernels on {where['device']} with the NumPy reference.")
    else:
        print("No CUDA device here: the same kernels run in Numba's CUDA simulator, on smaller cases.")
    cases = select_cases(options, on_gpu)
    if options.list:
        print("\n".join(f"{case.op}: {case.name}" for case in cases))
        return 0
    print(", ".join(f"{name} {value}" for name, value in where.items() if name != "device"))
    progress = tqdm(cases, unit="case", disable=not sys.stderr.isatty(), leave=False)
    outcomes = [run_case(case, options.seed, "cuda" if on_gpu else "cpu") for case in progress]
    print(table(outcomes))
    if options.json is not None:
        report = {"environment": where, "outcomes": [{**o._asdict(), "passed": o.passed} for o in outcomes]}
        options.json.write_text(json.dumps(report, indent=1))
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed or not outcomes else 0
