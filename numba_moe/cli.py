"""The command `numba-moe`."""

import argparse
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from numba_moe import __version__
from numba_moe.device.switch import turn_on_without_gpu
from numba_moe.runtime.text import counted

WRONG = 2  # what was asked for cannot be done, as argparse says of options
INTERRUPTED = 130  # 128 and the number of the signal, as shells have it
PIPE_CLOSED = 141
OUR_FAULT = 70  # EX_SOFTWARE of sysexits.h


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message} (--help names the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    interrupts: list[int] = []

    def interrupt(number: int, _frame: object) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    is_ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            status = _run(list(sys.argv[1:] if arguments is None else arguments), interrupts)
            return INTERRUPTED if interrupts else status
        finally:
            sys.stdout.flush()  # here, and not at exit, a closed pipe can be answered
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        if interrupts:  # what is interrupted in the middle of an import has errors of its own
            return INTERRUPTED
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, before)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command of a shell and return its exit status; a fault of our own shows its traceback, and is 70."""
    try:
        return main(arguments)
    except Exception:
        traceback.print_exc()
        return OUR_FAULT


def _run(given: list[str], interrupts: Sequence[int]) -> int:
    """Run a command: it reads and checks all that it is given, and then it works, unless an interrupt has come.

    What is wrong with a file or an option is a ValueError or an OSError of the first part; of the second, only files
    that cannot be written are the user's affair.
    """
    if given[:1] == ["verify"]:
        turn_on_without_gpu()  # before anything imports numba
    options = _parser().parse_args(given)
    try:
        work: Callable[[], int] = options.prepare(options)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        return _refuse(options.command, error)
    if interrupts:  # one that a module caught as it was imported
        raise KeyboardInterrupt
    try:
        return work()
    except BrokenPipeError:
        raise
    except OSError as error:
        return _refuse(options.command, error)


def _refuse(command: str, error: Exception) -> int:
    print(f"numba-moe {command}: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return WRONG


def _parser() -> Parser:
    from numba_moe import serve_demo
    from numba_moe.bench import command as bench
    from numba_moe.lab import own_kernels
    from numba_moe.placement import simulate_command as rebalancing
    from numba_moe.recorder import merging, report
    from numba_moe.verify import verification

    parser = Parser("numba-moe", description="Mixture-of-Experts routing as Numba CUDA kernels.")
    parser.add_argument("--version", action="version", version=f"numba-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "compare the kernels with the reference"
    verify = commands.add_parser("verify", help=text, description=verification.__doc__)
    verification.add_arguments(verify)
    own_kernels.add_arguments(verify)
    verify.set_defaults(prepare=own_kernels.prepare)
    text = "time the ops beside other implementations"
    timing = commands.add_parser("bench", help=text, description=bench.__doc__)
    bench.add_arguments(timing)
    timing.set_defaults(prepare=bench.prepare)
    text = "replay recorded loads against ways of placing experts, to see whether moving them pays"
    rebalance = commands.add_parser("rebalance", help=text, description=rebalancing.__doc__)
    rebalancing.add_arguments(rebalance)
    rebalance.set_defaults(prepare=rebalancing.prepare)
    text = "draw what a recorder dumped: hot experts, loads of ranks, balance over time, what a rebalance would change"
    drawing = commands.add_parser("report", help=text, description=report.__doc__)
    report.add_arguments(drawing)
    drawing.set_defaults(prepare=report.prepare)
    text = "control a recorder on a tiny model over HTTP, to try it"
    serving = commands.add_parser("serve-demo", help=text, description=serve_demo.__doc__)
    serve_demo.add_arguments(serving)
    serving.set_defaults(prepare=serve_demo.prepare)
    text = "add the dumps that ranks, or one run after another, wrote"
    adding = commands.add_parser("merge", help=text, description=f"{text.capitalize()}.")
    merging.add_arguments(adding)
    adding.set_defaults(prepare=merging.prepare)
    text = "compile every kernel ahead of its first use, also on a machine without a GPU"
    warmup = commands.add_parser("warmup", help=text, description=f"{text.capitalize()}.")
    text = "comma-separated, like sm_90,sm_100 (default: those of the devices here)"
    warmup.add_argument("--arch", metavar="LIST", type=_architectures, help=text)
    warmup.set_defaults(prepare=_prepare_warmup)
    description = "write every kernel as a cubin, and manifest.json that describes them, for programs without Python"
    export = commands.add_parser("export", help=description, description=f"{description.capitalize()}.")
    export.add_argument("--arch", metavar="LIST", type=_architectures, help=text)
    export.add_argument(
        "folder", metavar="DIR", type=Path, help="made if need be; files of the same names are replaced"
    )
    export.set_defaults(prepare=_prepare_export)
    text = "print versions, devices, and what the cache of compiled kernels holds"
    info = commands.add_parser("info", help=text, description=f"{text.capitalize()}.")
    info.set_defaults(prepare=lambda options: _info)
    return parser


def _architectures(text: str) -> list[tuple[int, int]]:
    found = []
    for name in text.split(","):
        number = name.removeprefix("sm_")
        if not (name.startswith("sm_") and number.isdecimal() and len(number) >= 2):
            raise argparse.ArgumentTypeError(f"must be names like sm_90, got {name!r}")
        found.append((int(number[:-1]), int(number[-1])))
    return list(dict.fromkeys(found))


def _devices() -> dict[str, tuple[int, int]]:
    import torch

    return {
        f"{index}: {torch.cuda.get_device_name(index)}": torch.cuda.get_device_capability(index)
        for index in range(torch.cuda.device_count())
    }


def _wanted(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return what to compile for, if the compiler that is here knows it."""
    from cuda.bindings import nvrtc

    wanted: list[tuple[int, int]] = options.arch or sorted(set(_devices().values()))
    if not wanted:
        raise ValueError("no CUDA device here; name what to compile for with --arch")
    try:
        _, known = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError as error:
        raise ValueError(f"CUDA's compiler is not there: pip install numba-moe[cu13] ({error})") from error
    for major, minor in wanted:
        if 10 * major + minor not in known:
            names = ", ".join(f"sm_{arch}" for arch in known)
            raise ValueError(f"`--arch` must be among {names}, which the compiler here knows, got sm_{major}{minor}")
    return wanted


def _prepare_warmup(options: argparse.Namespace) -> Callable[[], int]:
    from numba_moe.runtime import cache

    wanted = _wanted(options)
    if not cache.enabled():
        raise ValueError("the cache is off (NUMBA_MOE_CACHE=0)")
    if cache.folder() is None:
        raise ValueError("there is no home directory; set NUMBA_MOE_CACHE_DIR")
    return functools.partial(_warmup, wanted)


def _warmup(wanted: list[tuple[int, int]]) -> int:
    from numba_moe.runtime import cache, compile

    count = compile.compile_all(wanted)
    print(
        f"{counted(count, 'kernel')} ready in {cache.folder()}, {compile.statistics['compiled']} of them compiled now"
    )
    return 0


def _prepare_export(options: argparse.Namespace) -> Callable[[], int]:
    from numba_moe.runtime import export, files

    wanted = _wanted(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    files.check_output("DIR", options.folder / export.MANIFEST)
    return functools.partial(_export, options.folder, wanted)


def _export(folder: Path, wanted: list[tuple[int, int]]) -> int:
    from numba_moe.runtime import export

    count = export.export(folder, wanted)
    print(f"{counted(count, 'kernel')} and {export.MANIFEST} in {folder}")
    return 0


def _info() -> int:
    import platform
    from collections import Counter

    from tabulate import tabulate

    from numba_moe.runtime import cache
    from numba_moe.verify.verification import PACKAGES

    versions = [("python", platform.python_version()), *((name, cache.version(name)) for name in PACKAGES)]
    print(tabulate(versions, ("package", "version")), end="\n\n")
    devices = [(name, "sm_{}{}".format(*capability)) for name, capability in _devices().items()]
    print(tabulate(devices, ("device", "arch")) if devices else "no CUDA device", end="\n\n")
    found = list(cache.entries())
    size = sum(path.stat().st_size for path, _ in found)
    state = "" if cache.enabled() else ", off (NUMBA_MOE_CACHE=0)"
    where = cache.folder() or "no folder, as there is no home directory"
    print(f"cache: {where}, {counted(len(found), 'kernel')}, {size / 1024:.0f} KiB{state}")
    current = Counter(
        (entry.kernel, entry.arch)
        for path, entry in found
        if path == cache.path_of(entry.kernel, entry.specialisation, entry.arch)
    )
    if current:
        rows = [(*name, count) for name, count in sorted(current.items())]
        print("\n" + tabulate(rows, ("kernel of this version", "arch", "specialisations")))
    return 0


if __name__ == "__main__":
    sys.exit(run())
