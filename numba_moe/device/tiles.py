"""Tiles of the matrix product of slots: what a block multiplies at a time, by which of its warps.

Rows of a matrix are the 16 rows of the tensor cores' instruction, tokens its 8 columns. A warp keeps its part of the
matrix in registers, loaded a chunk of depth ahead; tokens go through shared memory, whose rows are padded so that lanes
read them without conflicts.
"""

from typing import Annotated, NamedTuple

from numba_moe.device import simulator
from numba_moe.device.types import CONSTANT

# Chunks of tokens in shared memory: one is multiplied while two are on their way.
STAGES = 3
MOST_TOKENS = 32


class Tile(NamedTuple):
    """One shape of tile; sizes of arrays in shared memory are in elements."""

    tokens: int  # of one expert, a multiple of 8
    row_tiles: int  # tiles of 16 rows that a warp has
    along_rows: int  # warps beside each other
    along_depth: int  # warps that multiply different parts of a chunk along its depth
    steps: int  # of 32 in depth that a warp loads at a time
    blocks: int  # that are to fit on a multiprocessor
    transposed: bool = False  # elements of a column of the matrix lie side by side, not those of a row

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.along_rows

    @property
    def columns(self) -> int:
        """Tiles of 8 tokens."""
        return self.tokens // 8

    @property
    def depth(self) -> int:
        """Depth of a chunk."""
        return 32 * self.steps * self.along_depth

    @property
    def threads(self) -> int:
        return 32 * self.along_rows * self.along_depth

    @property
    def pitch(self) -> int:
        """Distance of the tokens of a chunk."""
        return self.depth + 32

    @property
    def stage(self) -> int:
        return self.tokens * self.pitch

    @property
    def sums_pitch(self) -> int:
        """Distance of the sums of tokens."""
        return self.rows + 4

    @property
    def part(self) -> int:
        """Sums of the warps beside each other."""
        return self.tokens * self.sums_pitch

    @property
    def shared_bytes(self) -> int:
        """Chunks of tokens, and after them in the same memory the sums."""
        return max(2 * STAGES * self.stage, 4 * self.along_depth * self.part)

    def offsets_of_sums(self) -> list[int]:
        """Return where each of a lane's sums goes in [tokens, sums_pitch], from its first one on."""
        apart, below = (2, 1) if self.transposed else (16, 8)  # of the rows of two tiles, and of a tile's two
        return [
            (8 * column + i % 2) * self.sums_pitch + row * apart + i // 2 * below
            for row in range(self.row_tiles)
            for column in range(self.columns)
            for i in range(4)
        ]


_MADE = (
    Tile(8, 1, 2, 4, 4, 3),
    Tile(8, 1, 4, 2, 4, 3),
    Tile(8, 2, 4, 2, 4, 2),
    Tile(16, 2, 8, 1, 4, 2),
    Tile(16, 2, 4, 2, 4, 2),
    Tile(32, 2, 4, 1, 4, 3),
    Tile(32, 1, 8, 1, 4, 2),
    Tile(8, 4, 2, 4, 1, 2, transposed=True),
    Tile(8, 4, 1, 8, 1, 2, transposed=True),
    Tile(16, 4, 2, 4, 1, 2, transposed=True),
    Tile(32, 4, 2, 2, 1, 3, transposed=True),
)


def _in_simulator(tile: Tile) -> Tile:
    """Return a tile of fewer warps."""
    return tile._replace(along_rows=1 if tile.transposed else 2, along_depth=min(2, tile.along_depth))


TILES = tuple(map(_in_simulator, _MADE)) if simulator.ENABLED else _MADE
TileNumber = Annotated[int, CONSTANT, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
BOUNDS = {number: (tile.threads, tile.blocks) for number, tile in enumerate(TILES)}
