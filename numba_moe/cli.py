"""The command `numba-moe`."""

import argparse
import functools
import importlib
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from numba_moe import __version__
from numba_moe.commands import COMMANDS
from numba_moe.device.switch import turn_on_without_gpu

WRONG = 2  # what was asked for cannot be done, as argparse says of options
INTERRUPTED = 130  # 128 and the number of the signal, as shells have it
PIPE_CLOSED = 141
OUR_FAULT = 70  # EX_SOFTWARE of sysexits.h


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    command = ""  # that is given

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog} {self.command}".rstrip() + f": {message} (--help names the options)\n")


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
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have what a terminal's encoding lacks
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
    options = _parser(given).parse_args(given)
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


class Help(argparse.HelpFormatter):
    """Fills paragraphs, and keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        filled = [
            part if part.startswith("  ") else super(Help, self)._fill_text(part, width, indent) for part in parts
        ]
        return "\n\n".join(filled)


def _parser(given: Sequence[str]) -> Parser:
    """Return a parser of the commands, with the options of the one that is given."""
    parser = Parser("numba-moe", description="Mixture-of-Experts routing as Numba CUDA kernels.")
    parser.add_argument("--version", action="version", version=f"numba-moe {__version__}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in given if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        examples = "examples:\n\n" + textwrap.indent(textwrap.dedent(command.examples).strip("\n"), "  ")
        one = choices.add_parser(
            name, help=command.text, description=command.about, epilog=examples, formatter_class=Help
        )
        one.set_defaults(prepare=functools.partial(_prepare, command.prepare))
        if name == wanted:
            parser.command = name
            command.options(one)
    return parser


def _prepare(where: str, options: argparse.Namespace) -> Callable[[], int]:
    if options.command == "verify":
        turn_on_without_gpu()  # before anything imports numba
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)(options)


if __name__ == "__main__":
    sys.exit(run())
