"""`numba-moe verify --module FILE.py:function --like OP`: the verification of a kernel of one's own, from a shell."""

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba_moe.lab import checking, own
from numba_moe.runtime import checks, files
from numba_moe.verify import verification

NEEDS_MODULE = ("like", "library", "grid", "fill")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read and check what the options name; return what verifies, and returns the exit status."""
    if options.module is None:
        for name in NEEDS_MODULE:
            if getattr(options, name) is not None:
                raise ValueError(f"`--{name}` must be given with --module")
        return verification.prepare(options)
    if options.like is None:
        raise ValueError("`--module` must be given with --like, the op that it is like")
    for name in ("op", "input"):
        if getattr(options, name) is not None:
            raise ValueError(f"`--{name}` must be given without --module, which has the cases of --like")
    if options.json is not None:
        files.check_output("--json", options.json)
    function = load(options.module)
    with checks.under_names(function="--module", like="--like"):
        try:
            given = own.Own(function, options.like, options.library, options.grid, options.fill)
        except TypeError as error:
            raise ValueError(str(error)) from error
    cases = checking.select(options.like, options.case, checking.device_of(None))
    if options.list:
        return functools.partial(verification.list_cases, cases)
    return functools.partial(run, options, given.function, cases)


def load(text: str) -> Any:
    """Return what a file of Python calls by a name: FILE.py:NAME."""
    place, _, name = text.rpartition(":")
    path = Path(place)
    if not place or not name.isidentifier():
        raise ValueError(f"`--module` must be FILE.py:NAME, got {text!r}")
    if not path.is_file():
        raise ValueError(f"`--module` must be a file and a name in it, got {place!r}, which is no file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"`--module` must be a file of Python, got {place!r}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as when the file is run
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{place} fails when it is imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, name):
        raise ValueError(f"`--module` must be a file and a name in it, got {name!r}, which {place} has not")
    return getattr(module, name)


def run(options: argparse.Namespace, function: Any, cases: Any) -> int:
    """Verify, print the table, and return the exit status: 1 if a case failed."""
    more = {"library": options.library, "grid": options.grid, "fill": options.fill, "seed": options.seed}
    report = checking.check(function, options.like, cases, **more)
    if options.json is not None:
        outcomes = [{**outcome._asdict(), "passed": outcome.passed} for outcome in report.outcomes]
        with files.replacing(options.json) as file:
            file.write(json.dumps({"outcomes": outcomes, "left_out": report.left_out}, indent=1).encode())
    return int(not report.passed)
