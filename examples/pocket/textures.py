"""Building blocks of the backgrounds: noise, waves and colours from a seeded generator.

Only IEEE element-wise arithmetic and comparisons, so the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZE = 96
Image = NDArray[np.uint8]  # (SIZE, SIZE, 3)
Field = NDArray[np.float32]  # (SIZE, SIZE), values in [0, 1]
Rng = np.random.Generator

Y, X = (g.astype(np.float32) for g in np.mgrid[0:SIZE, 0:SIZE])


def uniform(rng: Rng, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def noise(rng: Rng, cells_x: int, cells_y: int | None = None) -> Field:
    """Smooth value noise with this many cells a side."""
    cells_y = cells_x if cells_y is None else cells_y
    grid = rng.random((cells_y + 1, cells_x + 1)).astype(np.float32)
    y, x = Y * np.float32(cells_y / SIZE), X * np.float32(cells_x / SIZE)
    iy, ix = y.astype(np.int64), x.astype(np.int64)
    fy, fx = y - iy, x - ix
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    top = grid[iy, ix] * (1 - fx) + grid[iy, ix + 1] * fx
    low = grid[iy + 1, ix] * (1 - fx) + grid[iy + 1, ix + 1] * fx
    return top * (1 - fy) + low * fy


def cloud(rng: Rng, cells: int) -> Field:
    """Three octaves of smooth noise."""
    return (
        np.float32(0.55) * noise(rng, cells)
        + np.float32(0.3) * noise(rng, cells * 2)
        + np.float32(0.15) * noise(rng, cells * 5)
    )


def mix(field: Field, low: tuple[int, int, int], high: tuple[int, int, int]) -> NDArray[np.float32]:
    a, b = np.array(low, np.float32), np.array(high, np.float32)
    return a + (b - a) * field[..., None]


def jitter(rng: Rng, colour: tuple[int, int, int], by: int = 22) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + int(rng.integers(-by, by + 1)))) for c in colour)
    return r, g, b


def as_bytes(picture: NDArray[np.float32]) -> Image:
    return np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)


def any_colour(rng: Rng) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in rng.integers(20, 236, 3))
    return r, g, b


def contrast(rng: Rng) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two colours that can be told apart."""
    a = any_colour(rng)
    b = any_colour(rng)
    while abs(a[0] - b[0]) + abs(a[1] - b[1]) + abs(a[2] - b[2]) < 180:
        b = any_colour(rng)
    return a, b


def triangle(field: Field) -> Field:
    """Triangle wave of period 1: the integer-safe stand-in for a sine."""
    part = field - np.floor(field)
    return np.abs(part * 2 - 1)
