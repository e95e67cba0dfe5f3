"""Functions that `patch` puts into peers beside the peers' own: device and host time of calls as the peers make them.

Both write the memory that the caller gives, where there is such, and otherwise allocate their results.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from numba_moe.bench import comparison, measure
from numba_moe.bench.comparison import Pair, Shape
from numba_moe.bench.contenders import OURS, Contender
from numba_moe.bench.measure import Row
from numba_moe.verify import testing

THEIRS = "theirs"
# Decode and prefill.
SHAPES = tuple(Shape(tokens, 256, 8, 16 if tokens <= 64 else 64, 2048) for tokens in (1, 8, 64, 512, 4096))


def select_pairs(options: argparse.Namespace) -> list[tuple[Pair, Shape]]:
    """Return the functions and shapes that the options ask for."""
    pairs = [*comparison.PAIRS, *comparison.MODULE_PAIRS]
    named = [pair for pair in pairs if testing.matches(pair.theirs.rpartition(".")[2], options.op)]
    texts = options.shape or [""]
    chosen = [(pair, shape) for pair in named for shape in SHAPES if any(text in label(shape) for text in texts)]
    if not chosen:
        raise ValueError("no function and shape is called that")
    return chosen


def label(shape: Shape) -> str:
    return f"{shape.tokens}x{shape.experts} top {shape.top_k}"


def rows_of(pair: Pair, shape: Shape, device: str = "cuda") -> Iterator[Row]:
    """Check and time ours and the peer's own; nothing where the peer is not there."""
    theirs = comparison.peers_own(pair.theirs)
    if theirs is None:
        return
    made = pair.draw(np.random.default_rng(0), shape, device)
    dtype = next(str(value.dtype) for value in made.args if isinstance(value, torch.Tensor)).removeprefix("torch.")
    row = Row(pair.theirs, label(shape), shape.tokens, dtype, OURS, experts=shape.experts)
    expected, called = comparison.run(pair.ours, made), comparison.as_called(theirs, made)

    def check(name: str, result: Any) -> str:
        return "" if name == OURS else pair.fault(expected, comparison.run(theirs, called), made.about)

    def clock(call: Callable[[], Any], result: Any) -> dict[str, Any]:
        return {"device_us": measure.device_time(call), "host_us": measure.host_time(call)}

    for name, function, args in ((OURS, pair.ours, made.args), (THEIRS, theirs, called.args)):
        call = functools.partial(function, *args)
        yield measure.tried(row, Contender(name, call), check, functools.partial(clock, call))
