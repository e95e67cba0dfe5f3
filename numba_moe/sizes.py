"""Sizes of results that follow from shapes, which may be symbols where torch traces."""

import math
from typing import Any

import torch

from numba_moe.reference.ragged import BLOCK_SIZES


def num_elements(array: Any) -> Any:
    """Return how many elements an array, a layout or a fake tensor has."""
    return math.prod(array.shape)


def smaller(one: Any, other: Any) -> Any:
    """Return the smaller of two numbers, of symbols without comparing them."""
    # As dynamo traces, symbols are integers and it minds them itself; not every version traces sym_min of others.
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else torch.sym_min(one, other)


def sorted_slots(num_slots: Any, block_size: Any, num_experts: Any, pad_sorted_ids: bool) -> Any:
    """Return what the reference's `max_sorted_slots` does, for symbols too.

    >>> sorted_slots(100, 16, 8, False), sorted_slots(100, 16, 8, True), sorted_slots(3, 16, 8, False)
    (220, 224, 48)
    """
    length = num_slots + smaller(num_slots, num_experts) * (block_size - 1)
    return -(-length // block_size) * block_size if pad_sorted_ids else length


def scheduled_blocks(num_slices: Any, num_rows: Any) -> Any:
    """Return what the reference's `max_blocks` does, for symbols too.

    >>> scheduled_blocks(4, 159), scheduled_blocks(4, 3), scheduled_blocks(0, 9)
    (13, 3, 0)
    """
    if isinstance(num_slices, int) and num_slices == 0:
        return min(num_rows, 0)
    first = smaller(num_slices, num_rows)
    return first + (num_rows - first) // BLOCK_SIZES[0]
