"""What the library says of itself: log messages, and ranges in profiles."""

import contextlib
import logging
from collections.abc import Iterator

import torch

from numba_moe.runtime import environment

# NUMBA_MOE_NVTX=1 names calls of public functions to NVTX, for Nsight Systems, and to torch's profiler.
RANGES = environment.Switch("NUMBA_MOE_NVTX")


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield


def range_of(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a range of a public function's name in profiles, or nothing where nobody asks for ranges now."""
    return _range(f"numba_moe::{name}") if RANGES else contextlib.nullcontext()


def set_log_level(level: int | str) -> None:
    """Choose what the library logs, and where nobody has set up logging, have it written to standard error.

    Parameters
    ----------
    level : int or str
        A level of `logging` or its name. "WARNING", as without this call: cache entries that are damaged, or that
        others can write. "INFO": also what `interop` replaces, and why the cache is not written. "DEBUG": also every
        kernel that is compiled, with the seconds that took, or read from the cache.

    Returns
    -------
    None

    Raises
    ------
    TypeError
        Neither an integer nor a string.
    ValueError
        No name of a level.

    Notes
    -----
    The logger is ``logging.getLogger("numba_moe")``.

    Examples
    --------
    >>> import logging
    >>> set_log_level("ERROR")
    >>> logging.getLogger("numba_moe").isEnabledFor(logging.WARNING)
    False
    >>> set_log_level("WARNING")
    """
    logger = logging.getLogger("numba_moe")
    logger.setLevel(level)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
