"""A kernel of one's own beside the reference, over the cases of the op that it is like."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.device import simulator, switch
from numba_moe.lab.own import Grid, Own
from numba_moe.runtime import checks, text
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import Case, edge_cases, model_cases
from numba_moe.verify.verification import Outcome

POISONED = testing.POISON & 0x7FFFFFFF  # as int32
Cases = str | Case | Sequence[str | Case] | None


class Report(NamedTuple):
    """What came of the cases; `print` shows the table."""

    name: str
    like: str
    library: str
    outcomes: list[Outcome]
    left_out: list[tuple[str, str]]  # the case, and why
    untried: Sequence[str] = ()  # options that it takes, and none of all cases gives

    @property
    def passed(self) -> bool:
        """Whether every case passed that ran, and one did."""
        return bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)

    @property
    def failed(self) -> list[str]:
        """The names of the cases that failed."""
        return [outcome.case for outcome in self.outcomes if not outcome.passed]

    def __str__(self) -> str:
        rows = [(outcome.case, outcome.verdict) for outcome in self.outcomes]
        rows += [(case, f"left out: {why}") for case, why in self.left_out]
        table = text.fitted(rows, ("case", "verdict"), widths=(40, 100))
        number = len(self.outcomes) - len(self.failed)
        counts = f"{number} passed, {len(self.failed)} failed"
        if self.left_out:
            most, _ = Counter(why for _, why in self.left_out).most_common(1)[0]
            counts += f", {len(self.left_out)} left out (most: {most})"
        if self.untried:
            counts += f"\nno case that it takes gives {' or '.join(self.untried)}: what it does with that is not known"
        if any(f"got {POISONED}" in outcome.message for outcome in self.outcomes):
            counts += f"\n{POISONED} is what nobody wrote; a kernel that adds to its results wants `fill=0`"
        head = f"{self.name} beside {self.like}, with arrays of {self.library}"
        return f"{head}\n{table}\n{counts}"


def select(like: str, wanted: Cases, device: str) -> list[Case]:
    """Return the cases of an op that are asked for, by parts of their names or as they are."""
    given = [wanted] if isinstance(wanted, str | Case) else wanted
    if given is not None and not (isinstance(given, Sequence) and all(isinstance(one, str | Case) for one in given)):
        raise TypeError(f"`cases` must be parts of names, or cases, got {wanted!r}")
    checks.holds("cases", "at least one", given is None or bool(given), "none")
    given = given or []
    patterns = [one for one in given if isinstance(one, str)]
    own = [one for one in given if not isinstance(one, str)]
    for case in own:
        checks.holds("cases", f"of {like}", case.op == like, case.op)
    if own and not patterns:
        return own
    level = "default" if device == "cuda" else "simulator"
    known = [case for case in (*model_cases(level), *edge_cases()) if case.op == like]
    checks.holds("cases", f"given for {like}, which the library has no cases of", bool(known), repr(wanted))
    for pattern in patterns:
        names = ", ".join(case.name for case in known)
        checks.holds(
            "cases", f"in the names of cases ({names})", any(pattern in one.name for one in known), repr(pattern)
        )
    return own + [case for case in known if not patterns or any(pattern in case.name for pattern in patterns)]


def check(
    function: Any,
    like: str,
    cases: Cases = None,
    device: str | None = None,
    *,
    library: str | None = None,
    grid: Grid | None = None,
    fill: float | None = None,
    seed: int = 0,
    show: bool = True,
) -> Report:
    """Compare a function or a kernel of one's own with the reference, over the cases of an op.

    Parameters
    ----------
    function : callable or kernel
        It takes any of the op's arguments by their names, and returns what the op returns: an array, or a tuple of
        arrays, of any library. Or it is a ``@cuda.jit`` kernel, which takes arguments of the op by their names too, and
        the arrays of its result by theirs or in their order; those are made for it.
    like : str
        The op that it is like: "topk_softmax", "moe_align_block_size" and so on, or one that you declared by ``@op``.
    cases : str, or sequence of str and Case, optional
        Only those whose name contains this; or cases of one's own, which an op of one's own needs.
    device : str, optional
        "cuda" or "cpu"; by default "cuda" where there is a GPU. On the CPU kernels run in the simulator.
    library : str, optional
        Whose arrays it takes: "torch", "numpy", "numba" or "cupy". By default the first that it takes without an error.
    grid : tuple of int, or callable, optional
        Of a kernel: blocks and threads, and where it likes a stream and bytes of shared memory. A callable returns this
        tuple, given arguments of the op by their names.
    fill : float, optional
        Of a kernel: what its results hold before the launch. By default they are poisoned, so that what is not written
        shows; a kernel that adds to its results wants 0.
    seed : int
        Of the random inputs.
    show : bool
        Print the table.

    Returns
    -------
    Report
        passed : bool. failed : the names of the cases that failed. outcomes : all that is known of each. left_out :
        names of cases that give an argument which the function does not take, and why. untried : options that it takes
        and no case gives that it takes.

    Raises
    ------
    TypeError
        No function, a kernel without a grid, or with parameters that the op does not have.
    ValueError
        No such op, case or device.

    Notes
    -----
    Each case calls the function twice with equal arguments of its own. It fails where a result differs from the
    reference's, in an element, a dtype or a shape; where the two calls differ; where an argument is changed that is not
    to be written; and where the function raises an error. What it allocates without values is poisoned. NumPy, Numba
    and CuPy have no bfloat16, so cases of it come in float32 there. In the simulator threads and blocks run in another
    order in the second call. For an option that only cases give which are left out, one of those is run without what
    the function does not take.

    Examples
    --------
    >>> import numpy as np
    >>> def count(topk_ids, num_experts):
    ...     ids = topk_ids.astype(np.int32)
    ...     return np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts).astype(np.int32)
    >>> report = check(count, like="count_tokens_per_expert", cases=["one slot", "int64"], device="cpu")
    count beside count_tokens_per_expert, with arrays of numpy
    case                  verdict
    --------------------  ----------------------------------------
    one slot              passed
    int64 ids past int32  FAILED first at (0,): got 12, expected 0
    1 passed, 1 failed
    >>> report.failed
    ['int64 ids past int32']
    """
    device = device_of(device)
    own = Own(function, like, library, grid, fill)
    if own.is_kernel and device == "cpu" and not simulator.ENABLED:
        raise ValueError(f"a kernel needs a GPU, or the simulator: {switch.HOW}")
    chosen = select(like, cases, device)
    own.find_library(chosen, device)
    taken, left_out, tried = [], [], set[str]()
    for case in chosen:
        given = _given(case, seed)
        if lacks := own.lacks(given):
            left_out.append((case, lacks))
        else:
            taken.append(case)
            tried |= given.keys()
    shortened = {name: _shortened(own, name, left_out, seed) for name in own.options if not cases and name not in tried}
    taken += [case for case in shortened.values() if case]
    outcomes = [
        verification.run_case(own.case_for(case), seed, device, own=own) for case in text.progress(taken, "case")
    ]
    why = [(case.name, f"{own.name} does not take {' and '.join(lacks)}") for case, lacks in left_out]
    untried = [name for name, case in shortened.items() if case is None]
    report = Report(own.name, like, str(own.library), outcomes, why, untried)
    if show:
        print(report)
    return report


def _given(case: Case, seed: int) -> dict[str, Any]:
    return case.arguments(np.random.default_rng(seed))


def _shortened(own: Own, option: str, left_out: Sequence[tuple[Case, list[str]]], seed: int) -> Case | None:
    """Return a case that gives an option, without what the function does not take; None if there is no such case."""
    for case, lacks in left_out:
        given = _given(case, seed)
        if option not in given or not set(lacks) <= own.declaration.defaults.keys() & given.keys():
            continue

        def without(rng: np.random.Generator, whole: Case = case, lacks: Sequence[str] = lacks) -> dict[str, Any]:
            return {name: value for name, value in whole.arguments(rng).items() if name not in lacks}

        short = case._replace(name=f"{case.name} without {' and '.join(lacks)}", arguments=without)
        try:
            verification.twin_of(case.op)(**_given(short, seed))
        except (TypeError, ValueError):  # what is left is no call
            continue
        return short
    return None


def device_of(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    checks.choice("device", device, ("cuda", "cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` must be 'cpu' without a GPU, got 'cuda'")
    return device


@contextlib.contextmanager
def counting() -> Iterator[Any]:
    """Count what the threads of kernels do in the simulator: loads, stores, atomics, barriers.

    Yields
    ------
    Accesses
        launches, threads, loads, stores, shared_loads, shared_stores, atomics, barriers, warp_operations : int.
        bytes_moved : int, of loads, stores and atomics of device memory.

    Raises
    ------
    RuntimeError
        The simulator is off.

    Notes
    -----
    Numbers are sums over all threads; a barrier counts for each thread that comes to it.

    Examples
    --------
    >>> with counting() as counts:  # doctest: +SKIP
    ...     kernel[2, 64](ids, found)
    >>> print(counts)  # doctest: +SKIP
    launches: 1, threads: 128, loads: 100, atomics: 100, bytes moved: 800
    """
    if not simulator.ENABLED:
        raise RuntimeError(f"the simulator is off: {switch.HOW}")
    from numba_moe.device import watch

    with watch.counting() as found:
        yield found
