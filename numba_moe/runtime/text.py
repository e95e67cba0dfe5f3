"""Words, tables and progress for people."""

import contextlib
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

UNBOUNDED = 1 << 16  # characters of a line
NARROWEST = 8
BETWEEN_LINES = 10.0  # seconds
T = TypeVar("T")


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts.

    >>> counted(1, "pass"), counted(12, "pass"), counted(0, "rank")
    ('1 pass', '12 passes', '0 ranks')
    """
    if number != 1:
        noun += "es" if noun.endswith("s") else "s"
    return f"{number} {noun}"


def filled(text: str) -> str:
    """Break the lines of a text where the terminal ends; where output is no terminal they stay as they are.

    >>> import os
    >>> os.environ["COLUMNS"] = "22"
    >>> print(filled("Best: stay, 8 slots. No rebalance takes less time."))
    Best: stay, 8 slots.
    No rebalance takes
    less time.
    >>> del os.environ["COLUMNS"]
    """
    return "\n".join(textwrap.fill(line, room()) for line in text.splitlines())


def room() -> int:
    """Return how wide the terminal is, or what `COLUMNS` says, or `UNBOUNDED` where output is no terminal."""
    return shutil.get_terminal_size((UNBOUNDED, 24)).columns


@contextlib.contextmanager
def ticking(total: int, noun: str) -> Iterator[Callable[[], object]]:
    """Yield what to call when one more thing is done, on a terminal with a bar, elsewhere with lines.

    A line comes every ten seconds, also while nothing is done. Both estimate the time left.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {noun}s", leave=False) as bar:
            yield bar.update
        return
    begin = last = time.monotonic()
    done, ended = 0, threading.Event()

    def say() -> None:
        nonlocal last
        now = time.monotonic()
        if now >= last + BETWEEN_LINES:
            last = now
            spent = now - begin
            time_of = f"about {spent / done * (total - done):.0f} s left" if done else f"{spent:.0f} s so far"
            print(f"{done} of {counted(total, noun)}, {time_of}", file=sys.stderr, flush=True)

    def tick() -> None:
        nonlocal done
        done += 1
        if done < total:
            say()

    def say_in_turn() -> None:
        with contextlib.suppress(OSError):  # nobody reads
            while not ended.wait(max(BETWEEN_LINES, 1.0)):
                say()

    thread = threading.Thread(target=say_in_turn, daemon=True)
    thread.start()
    try:
        yield tick
    finally:
        ended.set()
        thread.join()


def progress(items: Sequence[T], noun: str) -> Iterator[T]:
    """Yield items, and tick for each."""
    with ticking(len(items), noun) as tick:
        for item in items:
            yield item
            tick()


def fitted(
    rows: Sequence[Sequence[Any]],
    headers: Sequence[str],
    *,
    keys: int = 1,
    widths: Sequence[int | None] = (),
    floatfmt: Sequence[str] | str = "g",
    missingval: str = "",
    disable_numparse: Sequence[int] | bool = False,
) -> str:
    """Format a table for the terminal, with the parameters of `tabulate`; `widths` are the largest of columns.

    A table that is too wide is cut into parts, one after the other. Each has the first `keys` columns and some of the
    others, and long texts become several lines. Where output is no terminal, `COLUMNS` says the width, if it is set.

    >>> import os
    >>> os.environ["COLUMNS"] = "22"
    >>> print(fitted([["a", 1, 20000000], ["b", 2, 3]], ["name", "first", "second"]))
    name      first
    ------  -------
    a             1
    b             2
    <BLANKLINE>
    name      second
    ------  --------
    a       20000000
    b              3
    >>> del os.environ["COLUMNS"]
    """
    from tabulate import tabulate

    every = list(range(len(headers)))
    limits: list[int | None] = [widths[column] if column < len(widths) else None for column in every]
    formats = floatfmt if isinstance(floatfmt, str) else [*floatfmt, *["g"] * (len(headers) - len(floatfmt))]

    def formatted(columns: Sequence[int], limits: Sequence[int | None] = limits) -> str:
        cells = [[_wrapped(row[column], limits[column]) for column in columns] for row in rows]
        texts = disable_numparse
        if not isinstance(texts, bool):
            texts = [index for index, column in enumerate(columns) if column in texts]
        return tabulate(
            cells,
            [_wrapped(headers[column], limits[column]) for column in columns],
            floatfmt=formats if isinstance(formats, str) else [formats[column] for column in columns],
            missingval=missingval,
            disable_numparse=texts,
        )

    width = room()
    if _width(formatted(every)) <= width:
        return formatted(every)
    parts = [every[:keys]]
    for column in every[keys:]:
        if len(parts[-1]) > keys and _width(formatted([*parts[-1], column])) > width:
            parts.append(every[:keys])
        parts[-1] = [*parts[-1], column]
    return "\n\n".join(_narrowed(formatted, part, limits, width) for part in parts)


def _narrowed(formatted: Callable[..., str], columns: Sequence[int], limits: Sequence[int | None], width: int) -> str:
    """Format columns, the widest of them narrower until all fit, or until none is wide."""
    narrow = list(limits)
    widths = {column: _width(formatted([column])) for column in columns}
    while _width(formatted(columns, narrow)) > width and max(widths.values()) > NARROWEST:
        widest = max(columns, key=widths.__getitem__)
        widths[widest] -= 1
        narrow[widest] = widths[widest]
    return formatted(columns, narrow)


def _width(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


def _wrapped(cell: Any, width: int | None) -> Any:
    """Break a text that is wider, at words where that goes."""
    if not isinstance(cell, str) or width is None:
        return cell
    return "\n".join(textwrap.fill(line, width) for line in cell.splitlines())
