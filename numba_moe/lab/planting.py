"""Faults planted on purpose, in the library's kernels or in one's own, to see whether the cases catch them."""

import ast
import contextlib
import copy
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from numba_moe.device import simulator, switch
from numba_moe.lab import checking
from numba_moe.lab.checking import Cases
from numba_moe.lab.own import Grid, Own, is_kernel, name_of, plain_function
from numba_moe.runtime import checks
from numba_moe.runtime.text import fitted
from numba_moe.verify import faults, verification
from numba_moe.verify.cases import Case, simulated
from numba_moe.verify.verification import Outcome

MOST_FAULTS = 60  # of those that are made up for a function


class Planted(NamedTuple):
    """Which case caught each fault, None for a fault that all cases let pass."""

    caught: dict[str, str | None]
    messages: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every fault was caught."""
        return bool(self.caught) and None not in self.caught.values()

    @property
    def missed(self) -> list[str]:
        """The faults that no case caught."""
        return [fault for fault, case in self.caught.items() if case is None]

    def __str__(self) -> str:
        rows = [(fault, case or "MISSED", self.messages.get(fault, "")) for fault, case in self.caught.items()]
        table = fitted(rows, ("planted", "caught by", "what differs"), widths=(60, 40, 60))
        return f"{table}\n{len(rows) - len(self.missed)} caught, {len(self.missed)} missed"


def planted(
    function: Any = None,
    like: str | None = None,
    faults: Mapping[str, tuple[str, str]] | None = None,
    cases: Cases = None,
    *,
    library: str | None = None,
    grid: Grid | None = None,
    fill: float | None = None,
    show: bool = True,
) -> Planted:
    """Plant faults one at a time and show which of them the cases of an op catch.

    Parameters
    ----------
    function : callable or kernel, optional
        One's own, as `check` takes, whose source is at hand. Without it faults go into the library's kernels.
    like : str
        The name of the op.
    faults : mapping of str to pair of str, optional
        For a function of one's own: names, and a piece of its text with what is put there instead. By default they are
        made up: a comparison, a sum or a number is changed, a barrier, an atomic or a store left out.
    cases : str, or sequence of str and Case, optional
        As `check` takes.
    library : str, optional
        As `check` takes, and so are the others.
    grid : tuple of int, or callable, optional
        Of a kernel.
    fill : float, optional
        What a kernel's results hold before the launch.
    show : bool
        Print the table.

    Returns
    -------
    Planted
        passed : bool, whether all were caught. caught : for each fault the case that caught it, or None. missed : the
        names of the others. messages : what differed.

    Raises
    ------
    ValueError
        No such op, no kernels of its own, a text that is not in the function, or a function that fails without a fault.
    OSError
        A function without a source.

    Notes
    -----
    A fault that is missed is either harmless, since the program means the same with it, or a case is missing. Kernels
    with faults write where they should not, so they run in the simulator alone.

    Examples
    --------
    >>> import numpy as np
    >>> def count(topk_ids, num_experts):
    ...     ids = topk_ids[(topk_ids >= 0) & (topk_ids < num_experts)]
    ...     return np.bincount(ids, minlength=num_experts).astype(np.int32)
    >>> planted(count, like="count_tokens_per_expert", cases="one")  # doctest: +SKIP
    """
    if like is None:
        raise TypeError("`like` must be the name of an op, got None")
    if function is None:
        tried = _in_library(like, cases)
    else:
        own = Own(function, like, library, grid, fill)
        tried = _in_own(own, like, faults, cases)
    caught, messages = {}, {}
    for name, outcomes in tried:
        failed = next((outcome for outcome in outcomes if not outcome.passed), None)
        caught[name] = failed and failed.case
        if failed:
            messages[name] = failed.message
    result = Planted(caught, messages)
    if show:
        print(result)
    return result


def _in_library(like: str, wanted: Cases) -> Iterator[tuple[str, Iterator[Outcome]]]:
    """Yield the library's own faults, each with the outcomes of cases that are run with it."""
    _check_simulator()
    checks.choice("like", like, sorted({op for fault in faults.FAULTS for op in faults.ops_of(fault)}))
    chosen = checking.select(like, wanted, "cpu")
    kernels = {number: _kernels_of(case) for number, case in enumerate(chosen)}
    for fault in faults.FAULTS:
        touched = [chosen[number] for number, launched in kernels.items() if faults.kernel_of(fault) in launched]
        if like in faults.ops_of(fault) and touched:
            with faults.planted(fault):
                yield fault, (verification.run_case(case, 0, "cpu") for case in touched)


def _kernels_of(case: Case) -> set[str]:
    """Return the kernels that a case launches, none if it is a large one."""
    call = functools.partial(verification.call, case, case.arguments(np.random.default_rng(0)))
    launched, threads = simulated.launches_of(call)
    return {one.kernel for one in launched} if threads <= simulated.MOST_THREADS else set()


def _check_simulator() -> None:
    if not simulator.ENABLED:
        raise ValueError(f"kernels with faults run in the simulator alone: {switch.HOW}")


def _in_own(
    own: Own, like: str, given: Mapping[str, tuple[str, str]] | None, wanted: Cases
) -> Iterator[tuple[str, Iterator[Outcome]]]:
    """Yield faults of a function of one's own, each with the outcomes of the cases that it passes without."""
    program = Program(own.function)
    if program.has_kernels:
        _check_simulator()
    chosen = checking.select(like, wanted, "cpu")
    own.find_library(chosen, "cpu")
    good = [case for case in chosen if not own.lacks_in(case) and _run(own, case).passed]
    if not good:
        raise ValueError(f"`function` must pass a case before faults are planted, got {own.name}, which passes none")
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"`faults` must be a mapping of names to pairs of text, got {type(given).__name__}")
    texts = program.with_texts(given) if given is not None else program.with_faults()
    for name, changed in texts:
        other = own.with_function(changed)
        yield name, (_run(other, case) for case in good)


def _run(own: Own, case: Case) -> Outcome:
    return verification.run_case(own.case_for(case), 0, "cpu", own=own)


class Program:
    """The source of a function and of those that it calls, from the same file."""

    def __init__(self, function: Any) -> None:
        if not inspect.isfunction(plain_function(function)):
            raise ValueError(f"`function` must be written with def, got {name_of(function)}")
        self.name = plain_function(function).__name__
        self.trees: dict[str, ast.FunctionDef] = {}
        self.namespace: dict[str, Any] = {}
        self.has_kernels = False
        self._add(function)

    def _add(self, function: Any) -> None:
        plain = plain_function(function)
        if plain.__name__ in self.trees:
            return
        self.has_kernels |= is_kernel(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise ValueError(f"`function` must be written with def, got {plain.__name__}")
        self.trees[plain.__name__] = tree
        found = {**plain.__globals__, **inspect.getclosurevars(plain).nonlocals}
        self.namespace = {**found, **self.namespace}
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in sorted(names & found.keys()):
            called = plain_function(found[name])
            if inspect.isfunction(called) and called.__module__ == plain.__module__ and called.__name__ == name:
                self._add(found[name])

    def made(self, trees: Mapping[str, ast.FunctionDef]) -> Any:
        """Return the function, made anew of these trees."""
        namespace = dict(self.namespace)
        module = ast.Module([*list(trees.values())[::-1]], [])  # what is called comes first
        exec(compile(ast.fix_missing_locations(module), "<planted>", "exec"), namespace)
        return namespace[self.name]

    def with_texts(self, texts: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, Any]]:
        """Yield the function with each of some pieces of text replaced, wherever they are."""
        for name, (old, new) in texts.items():
            sources = {key: ast.unparse(tree) for key, tree in self.trees.items()}
            old, new = (text if "\n" in text else _unparsed(text) for text in (old, new))
            where = ", ".join(self.trees)
            checks.holds("faults", f"pieces of {where}", any(old in text for text in sources.values()), repr(old))
            try:
                parsed = {key: ast.parse(text.replace(old, new)).body[0] for key, text in sources.items()}
            except SyntaxError as error:
                raise ValueError(f"`faults` must leave a program, got {new!r} for {old!r}: {error.msg}") from error
            yield name, self.made(parsed)  # type: ignore[arg-type]

    def with_faults(self) -> Iterator[tuple[str, Any]]:
        """Yield the function with each of the faults that can be made up, at most `MOST_FAULTS` of them."""
        places = [
            (key, number, place)
            for key, tree in self.trees.items()
            for number, node in enumerate(ast.walk(tree))
            for place, _ in enumerate(_changes(node, tree))
        ]
        step, times = max(1, -(-len(places) // MOST_FAULTS)), Counter[str]()
        for key, number, place in places[::step]:
            trees = copy.deepcopy(self.trees)
            node = list(ast.walk(trees[key]))[number]
            what, change = list(_changes(node, trees[key]))[place]
            change()
            name = f"{key}, line {getattr(node, 'lineno', 0)}: {what}"
            times[name] += 1
            yield name if times[name] == 1 else f"{name} ({times[name]})", self.made(trees)


def _unparsed(text: str) -> str:
    """Return a piece of program as `ast.unparse` writes it, or as it is if it is none by itself."""
    with contextlib.suppress(SyntaxError):
        return ast.unparse(ast.parse(text.strip()))
    return text


COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SUMS = {ast.Add: ast.Sub, ast.Sub: ast.Add}
LEFT_OUT = ("syncthreads", "syncwarp")


def _changes(node: ast.AST, tree: ast.FunctionDef) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what can go wrong at a place of a program: what it is, and what makes it so.

    Nothing is changed that a `while` loop counts by, lest it never ends.
    """
    counted = {
        name.id
        for loop in ast.walk(tree)
        if isinstance(loop, ast.While)
        for name in ast.walk(loop.test)
        if isinstance(name, ast.Name)
    }
    tests = {id(part) for loop in ast.walk(tree) if isinstance(loop, ast.While) for part in ast.walk(loop.test)}
    steps = {
        id(part)
        for step in ast.walk(tree)
        if isinstance(step, ast.Assign | ast.AugAssign)
        for target in (step.targets if isinstance(step, ast.Assign) else [step.target])
        if isinstance(target, ast.Name) and target.id in counted
        for part in ast.walk(step)
    }
    signature = {id(part) for whole in (tree.args, *tree.decorator_list) for part in ast.walk(whole)}
    if id(node) in tests | steps | signature:
        return
    text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]()
        changed = ast.unparse(ast.Compare(node.left, [other, *node.ops[1:]], node.comparators))
        yield f"{text} becomes {changed}", lambda: node.ops.__setitem__(0, other)
    elif isinstance(node, ast.BinOp) and type(node.op) in SUMS:
        sign = SUMS[type(node.op)]()
        yield f"{text} becomes {ast.unparse(ast.BinOp(node.left, sign, node.right))}", lambda: setattr(node, "op", sign)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
        after = node.value + 1
        yield f"{node.value} becomes {after}", lambda: setattr(node, "value", after)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = ast.unparse(node.value.func).rpartition(".")[2]
        if name in LEFT_OUT or name.startswith(("store", "atomic", "add")):
            yield f"{text} is left out", lambda: setattr(node, "value", ast.Constant(None))
        if ast.unparse(node.value.func) == "cuda.atomic.add" and len(node.value.args) == 3:
            array, index, value = node.value.args
            place = ast.Subscript(array, index, ast.Load())
            plain = ast.Call(
                ast.Attribute(array, "__setitem__", ast.Load()), [index, ast.BinOp(place, ast.Add(), value)], []
            )
            yield f"{text} is no atomic", lambda: setattr(node, "value", plain)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        yield f"{text} is left out", lambda: setattr(node, "targets", [ast.Name("_left_out", ast.Store())])
    elif isinstance(node, ast.If) and not node.orelse:
        yield f"if {ast.unparse(node.test)} is always so", lambda: setattr(node, "test", ast.Constant(True))
