"""What the exercises of the lessons are judged by. Look after you have tried."""

import copy
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from numba_moe import reference
from numba_moe.verify import testing

STEPS = Path(__file__).parents[1] / "steps"


def step(name: str) -> Any:
    """Return the module of a step, such as "counting/03_atomics"."""
    path = STEPS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"step_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def try_it(exercise: str, solution: Callable[..., Any]) -> bool:
    """Say whether a solution is right, and if not, for which arguments."""
    wrong = fault_of(exercise, solution)
    print(f"Not yet. {wrong}" if wrong else "Right!")
    return not wrong


def fault_of(exercise: str, solution: Callable[..., Any]) -> str:
    """Return what is wrong with a solution, "" if nothing is."""
    try:
        return CHECKS[exercise](solution)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compare(solution: Callable[..., Any], expected: Callable[..., Any], *calls: tuple[Any, ...]) -> str:
    """Return for which of some calls a solution differs from what is expected, in value, dtype or shape."""
    for arguments in calls:
        wanted, given = expected(*arguments), copy.deepcopy(arguments)
        with testing.poisoned_libraries():  # what nobody writes shows
            found = solution(*given)
        found = found.copy_to_host() if hasattr(found, "copy_to_host") else found
        wrong = difference(found, wanted)
        if not wrong and not all(map(np.array_equal, given, arguments)):
            wrong = "it must leave its arguments as they are"
        if wrong:
            with np.printoptions(threshold=8, edgeitems=3):
                return f"For ({', '.join(map(repr, arguments))}) {wrong}."
    return ""


def difference(found: Any, wanted: Any) -> str:
    """Return how a result differs from the one that is wanted, "" if it does not."""
    if not isinstance(wanted, np.ndarray):
        same = math.isclose(found, wanted, rel_tol=1e-6)
        return "" if same else f"it must return {wanted}, got {found}"
    found = np.asarray(found)
    if found.shape != wanted.shape:
        return f"its result must have the shape {wanted.shape}, got {found.shape}"
    if found.dtype != wanted.dtype:
        return f"its result must be of dtype {wanted.dtype}, got {found.dtype}"
    differs = np.flatnonzero(~np.isclose(found, wanted))
    return f"element {differs[0]} must be {wanted[differs[0]]}, got {found[differs[0]]}" if differs.size else ""


def by_kernel(check: Callable[..., str], most_threads: int | None = None) -> Callable[..., str]:
    """Return a check that also wants a kernel to run, where the simulator can tell; and small ones no shared memory."""

    def checked(solution: Callable[..., Any]) -> str:
        from numba_moe import lab
        from numba_moe.device import simulator

        if not simulator.ENABLED:
            return check(solution)
        with lab.counting() as counts:
            wrong = check(solution)
        if wrong or not counts.launches:
            return wrong or "The answers are right, but no kernel ran: the exercise asks for one of yours."
        if most_threads and counts.threads > most_threads * counts.launches:
            return f"The answers are right, but a launch must have {most_threads} threads."
        if most_threads and counts.shared_loads + counts.shared_stores:
            return "The answers are right, but the kernel must use no shared memory."
        return ""

    return checked


def floats(size: int) -> np.ndarray:
    return np.random.default_rng(size).standard_normal(size, np.float32)


def ids_of(size: int, lowest: int = 0) -> np.ndarray:
    return np.random.default_rng(size).integers(lowest, 5, size)


def places(ids: np.ndarray, num_experts: int) -> np.ndarray:
    result = np.empty(ids.size, np.int32)
    result[np.argsort(ids, kind="stable")] = np.arange(ids.size)
    return result


def check_topk(solution: Callable[..., Any]) -> str:
    from numba_moe import lab

    names = ["Mixtral", "Qwen3", "ties", "saturated", "non-finite", "zero tokens", "300 tokens", "strided"]
    report = lab.check(solution, like="topk_softmax", cases=names, library="numba", show=False)
    if not report.passed:
        failed = [outcome for outcome in report.outcomes if not outcome.passed]
        return f"The case {failed[0].case!r} fails: {failed[0].message}." if failed else "It takes none of the cases."
    takes = [case for case, why in report.left_out if "correction_bias" not in why]
    return f"The case {takes[0]!r} gives an argument that it does not take." if takes else ""


def check_tester(solution: Callable[..., Any]) -> str:
    def right(ids: np.ndarray, num_experts: int) -> np.ndarray:
        return reference.count_tokens_per_expert(np.asarray(ids), num_experts)

    wrong: dict[str, Callable[..., Any]] = {
        "counts -1 as the last expert": lambda ids, n: np.bincount(np.asarray(ids) % n, minlength=n),
        "forgets the last slot": lambda ids, n: right(np.asarray(ids)[:-1], n),
        "never finds expert 0": lambda ids, n: right(ids, n) * (np.arange(n) > 0),
        "stops at the largest id": lambda ids, n: right(ids, n)[: max(np.asarray(ids).max(initial=-1) + 1, 0)],
        "counts an expert once": lambda ids, n: np.minimum(right(ids, n), 1),
    }
    if not solution(right):
        return "It refuses a function that is right."
    missed = [what for what, function in wrong.items() if accepts(solution, function)]
    return f"It accepts a function that {missed[0]}." if missed else ""


def accepts(solution: Callable[..., Any], function: Callable[..., Any]) -> bool:
    try:
        return bool(solution(function))
    except Exception:  # a test that raises has found something
        return False


def local_ids(rank: int, num_ranks: int, num_experts: int) -> np.ndarray:
    each, experts = num_experts // num_ranks, np.arange(num_experts)
    return np.where(experts // each == rank, experts - rank * each, -1).astype(np.int32)


def finish(calls: int, host_us: float, device_us: float) -> float:
    return host_us + (calls - 1) * max(host_us, device_us) + device_us


CHECKS: dict[str, Callable[[Callable[..., Any]], str]] = {
    "active_share": lambda f: compare(f, lambda n, k: k / n, (8, 2), (256, 8), (3, 3)),
    "num_skipped": lambda f: compare(
        f,
        lambda ids, n: int(((ids < 0) | (ids >= n)).sum()),
        *((np.array([[0, -1], [3, 2]]), 3), (np.array([[-7, 2**40]]), 9), (np.zeros((0, 2), np.int32), 4)),
        *((np.array([[-1, -1], [1, -1]]), 2), (np.array([[0, 1]]), 2)),
    ),
    "doubled": by_kernel(
        lambda f: compare(f, lambda values: values * 2, (floats(10),), (floats(64),), (floats(1),), (floats(257),))
    ),
    "shifted": by_kernel(
        lambda f: compare(f, lambda v: np.append(v[1:], v.dtype.type(0)), (floats(5),), (floats(64),), (floats(1),))
    ),
    "histogram": by_kernel(
        lambda f: compare(
            f, reference.count_tokens_per_expert, (ids_of(100), 5), (ids_of(300, -2), 4), (ids_of(1), 7), (ids_of(0), 3)
        )
    ),
    "places": lambda f: compare(f, places, (ids_of(6), 5), (ids_of(90), 5), (np.zeros(40, int), 1)),
    "sum_in_every_lane": by_kernel(
        lambda f: compare(
            f, lambda values: np.full(32, values.sum(), np.float32), (floats(32),), (np.arange(32, dtype=np.float32),)
        ),
        most_threads=32,
    ),
    "topk_softmax": by_kernel(check_topk),
    "least_us": lambda f: compare(
        f,
        lambda tokens, hidden, k, size, speed: (1 + k) * tokens * hidden * size / speed / 1e3,
        *((4096, 7168, 8, 2, 4800), (1, 64, 1, 4, 100)),
    ),
    "time_of": lambda f: compare(f, finish, (1, 3.0, 5.0), (50, 73.0, 4.0), (50, 3.0, 10.0), (2, 4.0, 4.0)),
    "is_right": check_tester,
    "expert_map": lambda f: compare(f, local_ids, (0, 2, 8), (1, 2, 8), (3, 4, 16), (0, 1, 3)),
}
