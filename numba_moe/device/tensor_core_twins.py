"""What the functions of tensor_core_intrinsics.py do, in Python: for Numba's simulator."""

from typing import Any

import numpy as np

from numba_moe.device import simulator
from numba_moe.device.tiles import TILES
from numba_moe.device.twins import ALL_LANES


def _nothing() -> None:
    """Do nothing: copies are made at once, and kernels run one after the other."""


commit_copies = wait_for_copies = let_next_start = _nothing


def copy_ahead(target: Any, to: int, source: Any, at: int, whole: bool) -> None:
    simulator.words(target, to)[:] = simulator.words(source, at) if whole else 0


def of_tile(tile: int, name: str) -> int:
    return int(getattr(TILES[tile], name))


def no_sums(tile: int) -> Any:
    return np.zeros((TILES[tile].row_tiles, TILES[tile].columns, 4), np.float32)


def matrix_places(tile: int, first: int, distance: int, last: int) -> Any:
    return tuple(min(int(first) + i * int(distance), last) for i in range(2 * TILES[tile].row_tiles))


def _halves(array: Any, index: int) -> Any:
    return simulator.words(array, index).view(np.uint16)


def load_matrix(tile: int, matrix: Any, places: Any, depth: int, end: int, stride: int) -> Any:
    """Return 16-bit elements [steps, places, 8]."""
    found = []
    for step in range(TILES[tile].steps):
        at = int(depth) + 32 * step
        at = at * int(stride) if at < end else 0
        found.append([_halves(matrix, place + at) for place in places])
    return np.array(found)


def multiply(tile: int, sums: Any, words: Any, tokens: Any, at: int, matrix: Any) -> Any:
    """Multiply what the lanes of the warp have, each by the part of the instruction's layout that it holds."""
    shape = TILES[tile]
    rows = words.swapaxes(1, 2) if shape.transposed else words  # [steps, rows of the lane, 8 in depth]
    distances = [
        [8 * column * shape.pitch + 32 * step for step in range(shape.steps)] for column in range(shape.columns)
    ]
    columns = np.array([[_halves(tokens, int(at) + distance) for distance in row] for row in distances])
    lanes, lane = simulator.exchange(ALL_LANES, (rows, columns))
    group, first = 4 * (lane // 4), 8 * (lane % 4)  # lanes of its rows, and of the first of its two columns
    left = np.stack([lanes[group + t][0] for t in range(4)], axis=1)  # [steps, 4, rows, 8]
    right = np.array([[lanes[first + 4 * i + t][1] for t in range(4)] for i in range(2)])  # [2, 4, columns, ...]
    wide = _as_float32(left, matrix), _as_float32(right, matrix)
    products = np.einsum("stre,itcse->cri", *wide).astype(np.float32)
    per_tile = products.reshape(shape.columns, shape.row_tiles, 4)
    return sums + per_tile.swapaxes(0, 1)


def _as_float32(bits: Any, matrix: Any) -> Any:
    if matrix.dtype == np.float16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def multiply_and_load(tile: int, sums: Any, words: Any, tokens: Any, at: int, matrix: Any, *source: Any) -> Any:
    return multiply(tile, sums, words, tokens, at, matrix), load_matrix(tile, matrix, *source)


def store_sums(tile: int, sums: Any, array: Any, at: int) -> None:
    for offset, value in zip(TILES[tile].offsets_of_sums(), sums.ravel(), strict=True):
        array[int(at) + offset] = value
