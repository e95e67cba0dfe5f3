"""Colours of the report: of text and lines in light and dark, and of maps, whose scale is logarithmic and clipped."""

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

LIGHT = {
    "page": "#ffffff",
    "panel": "#f2f4f7",
    "text": "#1b1f24",
    "muted": "#4b5560",
    "axis": "#7d8792",
    "link": "#0b57a4",
    "series-1": "#0b62b5",
    "series-2": "#b3420a",
    "series-3": "#257325",
    "series-4": "#8036b0",
    "series-5": "#7a5a00",
}
DARK = {
    "page": "#14171a",
    "panel": "#20252b",
    "text": "#e6e9ec",
    "muted": "#b0b8c1",
    "axis": "#7f8892",
    "link": "#7cb7ff",
    "series-1": "#6cb0ff",
    "series-2": "#ff9e66",
    "series-3": "#7fd07f",
    "series-4": "#cf9cff",
    "series-5": "#e0bd54",
}
# Of maps, from low to high: dark to light, so that they can be read without colours as well.
MAP = ("#1b0c42", "#4b0c6b", "#781c6d", "#a52c60", "#cf4446", "#ed6925", "#fb9b06", "#f7d13d", "#fcffa4")
NOTHING = "#98a2ad"  # of 0, on light and dark
LOWEST, HIGHEST = 1 / 64, 64.0  # ends of scales


class Scale(NamedTuple):
    """A logarithmic scale; what is past its ends has the colour of the end, and 0 is grey."""

    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Scale":
        """Return the scale of values: powers of 2 around 98 % of those above 0.

        >>> Scale.of(np.array([0.0, 0.9, 1.1, 3.0]))
        Scale(low=0.5, high=4.0)
        """
        some = values[values > 0]
        low, high = np.percentile(some, (1, 99)) if len(some) else (1.0, 1.0)
        low, high = 2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high))
        return cls(min(max(low, LOWEST), 0.5), max(min(high, HIGHEST), 2.0))

    def place(self, values: np.ndarray) -> np.ndarray:
        """Return where values are on the scale, 0 to 1.

        >>> Scale(0.5, 2.0).place(np.array([0.0, 0.5, 1.0, 8.0]))
        array([0. , 0. , 0.5, 1. ])
        """
        inside = np.clip(values, self.low, self.high)
        return np.asarray(np.log2(inside / self.low) / math.log2(self.high / self.low))

    def ticks(self) -> list[float]:
        """Return powers of 2 on the scale, at most 7."""
        first, last = round(math.log2(self.low)), round(math.log2(self.high))
        return [2.0**power for power in range(first, last + 1, -(-(last - first) // 6))]


def png(values: np.ndarray, scale: Scale) -> bytes:
    """Return a map as PNG: one pixel for each value."""
    palette = [bytes.fromhex(colour[1:]) for colour in (NOTHING, *shades(255))]
    index = np.where(values > 0, 1 + np.rint(scale.place(values) * 254), 0).astype(np.uint8)
    rows, columns = values.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), index], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", b"".join(palette))]
    parts += [(b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def shades(number: int) -> list[str]:
    """Return colours of the map from low to high.

    >>> shades(3)
    ['#1b0c42', '#cf4446', '#fcffa4']
    """
    known = np.array([list(bytes.fromhex(colour[1:])) for colour in MAP])
    at = np.linspace(0, len(MAP) - 1, number)
    mixed = np.stack([np.interp(at, np.arange(len(MAP)), known[:, part]) for part in range(3)], axis=1)
    return ["#" + bytes(np.rint(colour).astype(np.uint8).tolist()).hex() for colour in mixed]
