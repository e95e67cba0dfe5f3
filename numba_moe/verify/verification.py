"""Reference against GPU: every op over named cases, as a table.

On a machine without a CUDA device the same kernels run in Numba's CUDA simulator, on smaller cases, and by default on a
few of them: `numba_moe.verify.cases.few` says which.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import numba_moe
from numba_moe import parallel, placement, recorder, reference
from numba_moe.device import simulator
from numba_moe.runtime import cache, checks, declaration, files
from numba_moe.runtime.text import counted, fitted
from numba_moe.verify import testing
from numba_moe.verify.cases import Case, edge_cases, few, input_cases, model_cases

PAYLOADS = (  # whose dtype and layout a case chooses
    *("gating_output", "hidden_states", "permuted", "gate_up", "bias"),
    *("gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "constants", "combined"),
)
PACKAGES = ("numba-moe", "numba", "numba-cuda", "cuda-core", "numpy", "torch")
BLOCK_SIZE = 64  # rows of a block, for --input
MOST_PROCESSES = 8  # of the simulator; each takes seconds to start, and some 400 MB
CASES_OF_A_PROCESS = 20  # at least
SCRATCH = "workspace"  # what a kernel leaves there is its own affair
WRITTEN_FLOATS = ("identity_weights",)  # compared as results are
# The ops of the device, and the package that has each.
OPS: dict[str, Any] = {
    name: numba_moe for name in numba_moe.__all__ if name[0].islower() and hasattr(reference, name)
} | {"dispatch_ids": placement, "dispatch_layout": parallel, "add_expert_counts": recorder}


def twin_of(op: str) -> Callable[..., Any]:
    """Return the reference of an op, of the library's or of one that somebody else declared."""
    return getattr(reference, op, None) or declaration.DECLARATIONS[op].twin  # type: ignore[return-value]


class Outcome(NamedTuple):
    """What came of one case."""

    op: str
    case: str
    mismatches: int
    error: float
    repeats_equal: bool
    arguments_as_expected: bool  # inputs unchanged, what is given to be written as the reference writes it
    gpu_us: float | None
    reference_us: float
    message: str

    @property
    def passed(self) -> bool:
        return self.mismatches == 0 and self.repeats_equal and self.arguments_as_expected and not self.message

    @property
    def verdict(self) -> str:
        """What a table says of it."""
        return "passed" if self.passed else f"FAILED {self.message}"


def on_device(case: Case, arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the arguments of a case, made anew on a device, its payload in the dtype and layout that it asks for."""
    return {
        name: testing.to_device(value, device, case.dtype, case.strided)
        if name in PAYLOADS
        else testing.to_device(value, device)
        for name, value in arguments.items()
    }


def call(case: Case, arguments: dict[str, Any]) -> Any:
    """Call the op of a case with arguments of NumPy, on the CPU."""
    return getattr(OPS[case.op], case.op)(**on_device(case, arguments, "cpu"))


def run_case(
    case: Case,
    seed: int | Sequence[int],
    device: str,
    timed: bool = True,
    own: Callable[..., Any] | None = None,
) -> Outcome:
    """Compare one call with the reference, on poisoned memory, twice over, with arguments of its own each time.

    Another function may be called instead of the op: `own`, which takes and returns tensors as the op does.
    """
    arguments = case.arguments(np.random.default_rng(seed))
    given, given_again = on_device(case, arguments, device), on_device(case, arguments, device)
    begin = time.perf_counter()
    expected = twin_of(case.op)(**arguments)
    reference_us = (time.perf_counter() - begin) * 1e6
    left = on_device(case, arguments, device)  # the reference writes what it is given to be written, and nothing else
    op = own or getattr(OPS[case.op], case.op)
    needs_simulator = device != "cuda" and (own is None or simulator.ENABLED)
    running = simulator.running() if needs_simulator else contextlib.nullcontext()
    try:
        with running, testing.poisoned_memory():
            result = op(**given)
            with simulator.in_another_order():
                again = op(**given_again)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Outcome(case.op, case.name, 0, float("inf"), False, False, None, reference_us, message)
    comparisons = testing.compare_results(case.op, result, expected, arguments)
    same = _same_bits(result, again)
    changed = [n for n in left if not all(_is_left(n, after[n], left[n]) for after in (given, given_again))]
    messages = [
        f"{name}{comparison.message}"
        for name, comparison in zip(_names_of(expected, len(comparisons)), comparisons, strict=True)
        if comparison.message
    ]
    messages += [] if same else ["two calls with equal arguments have different results"]
    if changed:
        untouched = on_device(case, case.arguments(np.random.default_rng(seed)), device)
        messages += [f"`{name}` {_change(_is_left(name, left[name], untouched[name]))}" for name in changed]
    outcome = Outcome(
        case.op,
        case.name,
        sum(comparison.mismatches for comparison in comparisons),
        max(comparison.error for comparison in comparisons),
        same,
        not changed,
        None,
        reference_us,
        "; ".join(messages),
    )
    if timed and device == "cuda" and outcome.passed:
        return outcome._replace(gpu_us=testing.time_on_device(lambda: op(**given)))
    return outcome


def _names_of(expected: Any, count: int) -> list[str]:
    """Return what messages call the parts of a result that are compared, which are those that the call has."""
    names = [f"{name} " for name in _fields_of(expected)]
    return names[:count] if len(names) >= count else [""] * count


def _fields_of(expected: Any) -> list[str]:
    """Return the names of a result's arrays, also of those in tuples of its own."""
    if not isinstance(expected, tuple):
        return []
    parts = zip(getattr(expected, "_fields", ()), expected, strict=False)
    return [found for name, part in parts for found in _fields_of(part) or [name] * (part is not None)]


def _change(is_input: bool) -> str:
    """Return what is wrong with an argument after the call."""
    return "was changed, which it must not be" if is_input else "is not as the reference leaves it"


def _is_left(name: str, value: Any, expected: Any) -> bool:
    """Whether an argument is as the reference leaves it."""
    if name in WRITTEN_FLOATS and isinstance(value, torch.Tensor):
        return not testing.compare(value, testing.to_numpy(expected)).mismatches
    return name == SCRATCH or _same_bits(value, expected)


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
            outcome.verdict,
        )
        for outcome in outcomes
    ]
    headers = ("op", "case", "mismatches", "error / tolerance", "repeats equal", "GPU us", "reference us", "verdict")
    formats = ("", "", "", ".2g", "", ".1f", ".0f", "")
    return fitted(rows, headers, keys=2, floatfmt=formats, missingval="-")


def summary(outcomes: Iterable[Outcome]) -> str:
    """Count, for each op, the cases, those that failed, and the elements that differ; and say the largest error."""
    by_op: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_op.setdefault(outcome.op, []).append(outcome)
    rows = [
        (
            op,
            len(found),
            sum(not outcome.passed for outcome in found),
            sum(outcome.mismatches for outcome in found),
            max(outcome.error for outcome in found),
        )
        for op, found in by_op.items()
    ]
    return fitted(rows, ("op", "cases", "failed", "mismatches", "error / tolerance"), floatfmt=".2g")


def select_cases(options: argparse.Namespace, on_gpu: bool) -> list[Case]:
    """Return the cases that the options ask for."""
    sizes = {name: f"--{name.replace('_', '-')}" for name in ("num_experts", "top_k", "block_size")}
    if options.input is not None:
        rows = BLOCK_SIZE if options.block_size is None else options.block_size
        with checks.under_names(path="--input", array="--input", **sizes):
            cases = list(input_cases(options.input, options.num_experts, options.top_k, rows))
    else:
        for name, option in sizes.items():
            if getattr(options, name) is not None:
                raise ValueError(f"`{option}` must be given with --input")
        level = "quick" if options.quick else "full" if options.full else "default"
        cases = [*model_cases(level if on_gpu else "simulator"), *edge_cases()]
    for pattern in options.op or []:
        check_match(pattern, any(testing.matches(case.op, [pattern]) for case in cases))
    for pattern in options.case or []:
        check_match(pattern, any(testing.matches(case.name, [f"*{pattern}*"]) for case in cases))
    names = [f"*{pattern}*" for pattern in options.case or []]
    chosen = [case for case in cases if testing.matches(case.op, options.op) and testing.matches(case.name, names)]
    check_match(" with ".join([*(options.op or []), *(options.case or [])]), bool(chosen))
    return chosen


def check_match(pattern: str, matches: bool) -> None:
    if not matches:
        raise ValueError(f"nothing matches {pattern!r}; --list names them")


def environment(on_gpu: bool) -> dict[str, str]:
    """Return what a reader needs to know to compare two tables."""
    found = {name: cache.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if on_gpu else "Numba's CUDA simulator"
    return {"device": device, "python": platform.python_version(), **found}


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read and check what the options name; return what verifies or lists, and returns the exit status."""
    on_gpu = torch.cuda.is_available()
    checks.integer("--seed", options.seed, 0, checks.LARGEST_INT64)
    if options.json is not None:
        files.check_output("--json", options.json)
    cases = select_cases(options, on_gpu)
    if options.list:
        return functools.partial(list_cases, cases)
    return functools.partial(run, options, cases, on_gpu)


def takes_few(options: argparse.Namespace) -> bool:
    """Whether the simulator runs a few of the cases only: unless all are asked for, or some by name."""
    return not (options.full or options.op or options.case or options.input)


def list_cases(cases: Iterable[Case]) -> int:
    """Name the cases, and nothing else, for programs that read them."""
    print("\n".join(f"{case.op}: {case.name}" for case in cases))
    return 0


def in_processes(cases: Sequence[Case], numbers: Sequence[int], options: argparse.Namespace) -> Iterator[Outcome]:
    """Yield the outcomes of the cases of these numbers, in their order, from processes that share the work.

    A case holds functions, which cannot be sent, so each process selects the cases itself.
    """
    count = min(os.cpu_count() or 1, MOST_PROCESSES, len(numbers) // CASES_OF_A_PROCESS)
    if count < 2:
        yield from (run_case(cases[number], options.seed, "cpu") for number in numbers)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _select_in_process, (options,))
    before = set(multiprocessing.active_children())
    try:
        with _interrupts_put_off():
            outcomes = pool.map(_run_in_process, numbers)
        yield from outcomes
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Take no interrupt here until later, and never in processes that begin here: their owner ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_in_process: tuple[list[Case], int]  # the cases and the seed of a process that has a share of the work


def _select_in_process(options: argparse.Namespace) -> None:
    global _in_process
    torch.set_num_threads(1)
    _in_process = select_cases(options, on_gpu=False), options.seed


def _run_in_process(number: int) -> Outcome:
    cases, seed = _in_process
    return run_case(cases[number], seed, "cpu")


def run(options: argparse.Namespace, cases: Sequence[Case], on_gpu: bool) -> int:
    """Verify, print tables, and return the exit status: 1 if anything failed."""
    where = environment(on_gpu)
    if on_gpu:
        print(f"Comparing the kernels on {where['device']} with the NumPy reference.")
    else:
        print("No CUDA device here: the same kernels run in Numba's CUDA simulator, on smaller cases.")
    print(", ".join(f"{name} {value}" for name, value in where.items() if name != "device"), flush=True)
    if on_gpu:
        found: Iterator[Outcome] = (run_case(case, options.seed, "cuda") for case in cases)
        total = len(cases)
    else:
        numbers = few(cases, call) if takes_few(options) else range(len(cases))
        found, total = in_processes(cases, numbers, options), len(numbers)
    outcomes = list(tqdm(found, total=total, unit="case", disable=not sys.stderr.isatty(), leave=False))
    if options.verbose:
        print(table(outcomes), end="\n\n")
    print(summary(outcomes))
    if options.json is not None:
        report = {"environment": where, "outcomes": [{**o._asdict(), "passed": o.passed} for o in outcomes]}
        with files.replacing(options.json) as file:
            file.write(json.dumps(report, indent=1).encode())
    failures = [outcome for outcome in outcomes if not outcome.passed]
    if failures:
        print(table(failures))
    if left_out := len(cases) - len(outcomes):
        print(f"{counted(left_out, 'case')} left out, which take minutes in the simulator; --full runs them too.")
    print(f"{len(outcomes) - len(failures)} passed, {len(failures)} failed")
    return int(bool(failures))
