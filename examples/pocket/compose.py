"""Pictures from glyphs and backgrounds: what is drawn (`draw`) and how (`render`; `fast.render` for pretraining).

A picture is a background, up to two small distractor glyphs and the object on top. `draw` makes the parameters from a
seeded PCG64 generator, using `random` and `integers` only; `render` uses IEEE element-wise arithmetic only. Same
seed, same bytes, on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backgrounds import SIZE as CANVAS

SIDE = 64
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
OBJECT_SCALE = (0.55, 0.95)
DISTRACTOR_SCALE = (0.16, 0.28)
TURN = 0.12  # tan(angle / 2): up to 14 degrees


@dataclass
class Layer:
    """Where and how B glyphs are drawn. `turn` is tan(angle/2), so that cosine and sine are plain divisions."""

    glyph: Ints  # (B,) row of the glyph bank
    scale: Floats  # (B,) side as a fraction of the picture
    aspect: Floats  # (B,) width over height of the drawn glyph relative to the original
    turn: Floats  # (B,)
    mirror: Floats  # (B,) 1 or −1
    centre: Floats  # (B, 2) x, y in pixels
    gain: Floats  # (B, 3) colour factors
    shown: Floats  # (B,) 1 or 0

    def axes(self) -> tuple[Floats, Floats, Floats, Floats]:
        """The inverse map picture → glyph (in glyph pixels) as a 2×2 matrix: four arrays of shape (B,)."""
        t = self.turn
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        wide, high = self.mirror / (self.scale * self.aspect), 1 / self.scale
        return cos * wide, sin * wide, -sin * high, cos * high


@dataclass
class Scenes:
    """B pictures to draw: the background and the layers from back to front, the object last."""

    background: Ints  # (B,) row of the flattened background bank
    corner: Ints  # (B, 2) y, x of the 64-pixel window in the 96-pixel background
    flip: Ints  # (B,) 1 mirrors the background
    layers: list[Layer]


def _span(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    return (low + (high - low) * rng.random(shape)).astype(np.float32)


def _layer(rng: np.random.Generator, glyph: Ints, scale: tuple[float, float], shown: Floats, aspect: float) -> Layer:
    n = len(glyph)
    size = _span(rng, *scale, n)
    room = np.clip(size[:, None] * np.float32(SIDE * 0.43), 4, SIDE / 2)
    centre = room + (SIDE - 2 * room) * _span(rng, 0, 1, n, 2)
    light, tint = _span(rng, 0.8, 1.15, n, 1), _span(rng, 0.92, 1.08, n, 3)
    return Layer(
        glyph, size, _span(rng, 1 - aspect, 1 + aspect, n), _span(rng, -TURN, TURN, n),
        (rng.integers(0, 2, n) * 2 - 1).astype(np.float32), centre.astype(np.float32), light * tint, shown,
    )  # fmt: skip


def draw(rng: np.random.Generator, objects: Ints, distractors: Ints, backgrounds: Ints, aspect: float = 0.0) -> Scenes:
    """Parameters of B pictures.

    Args:
        rng: a seeded generator.
        objects: (B,) glyph rows of the objects.
        distractors: glyph rows to draw the 0, 1 or 2 distractors from.
        backgrounds: (B,) rows of the flattened background bank.
        aspect: how far the aspect ratio varies (pretraining only; 0 in tasks).
    """
    n = len(objects)
    count = rng.integers(0, 3, n)
    layers = []
    for k in range(2):
        glyph = distractors[rng.integers(0, len(distractors), n)]
        layers.append(_layer(rng, glyph, DISTRACTOR_SCALE, (count > k).astype(np.float32), aspect))
    layers.append(_layer(rng, objects, OBJECT_SCALE, np.ones(n, np.float32), aspect))
    corner = rng.integers(0, CANVAS - SIDE + 1, (n, 2))
    return Scenes(backgrounds, corner, rng.integers(0, 2, n), layers)


def pyramid(glyphs: Bytes) -> list[Floats]:
    """Premultiplied glyphs at 64, 32 and 16 pixels, each with a border of one empty pixel.

    Args:
        glyphs: (N, 64, 64, 4) uint8.

    Returns:
        [(N, 66, 66, 4), (N, 34, 34, 4), (N, 18, 18, 4)] float32, colours in [0, 255], alpha in [0, 1].
    """
    level = glyphs.astype(np.float32)
    alpha = level[..., 3:] / np.float32(255)
    level = np.concatenate([level[..., :3] * alpha, alpha], -1)
    out = []
    for _ in range(3):
        out.append(np.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0))))
        level = (level[:, ::2, ::2] + level[:, 1::2, ::2] + level[:, ::2, 1::2] + level[:, 1::2, 1::2]) * np.float32(
            0.25
        )
    return out


def level_of(scale: Floats) -> Ints:
    """Which pyramid level a glyph of this scale is sampled from: 0 (64 pixels), 1 (32) or 2 (16)."""
    return (scale < 0.6).astype(np.int64) + (scale < 0.3)


def _sample(picture: Floats, x: Floats, y: Floats) -> Floats:
    """Bilinear values of one padded glyph (S, S, 4) at pixel coordinates x, y (64, 64); empty outside."""
    last = picture.shape[0] - 1
    x, y = np.clip(x, 0, last - np.float32(0.001)), np.clip(y, 0, last - np.float32(0.001))
    ix, iy = x.astype(np.int64), y.astype(np.int64)
    fx, fy = (x - ix)[..., None], (y - iy)[..., None]
    top = picture[iy, ix] * (1 - fx) + picture[iy, ix + 1] * fx
    low = picture[iy + 1, ix] * (1 - fx) + picture[iy + 1, ix + 1] * fx
    return top * (1 - fy) + low * fy


def render(scenes: Scenes, levels: list[Floats], bank: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
    """Draw the pictures, byte for byte the same everywhere.

    Args:
        scenes: B pictures' parameters.
        levels: `pyramid(glyphs)`.
        bank: (M, 96, 96, 3) uint8 backgrounds.

    Returns:
        Pictures (B, 64, 64, 3) uint8 and the objects' true masks (B, 64, 64), alpha > 0.5.
    """
    n = len(scenes.background)
    pictures, masks = np.empty((n, SIDE, SIDE, 3), np.uint8), np.empty((n, SIDE, SIDE), np.bool_)
    gy, gx = (g.astype(np.float32) + np.float32(0.5) for g in np.mgrid[0:SIDE, 0:SIDE])
    axes = [layer.axes() for layer in scenes.layers]
    for i in range(n):
        top, left = scenes.corner[i]
        canvas = bank[scenes.background[i], top : top + SIDE, left : left + SIDE].astype(np.float32)
        canvas = canvas[:, ::-1] if scenes.flip[i] else canvas
        for layer, (xx, xy, yx, yy) in zip(scenes.layers, axes, strict=True):
            if not layer.shown[i]:
                continue
            level = int(level_of(layer.scale[i : i + 1])[0])
            shrink = np.float32(1 / 2**level)
            dx, dy = gx - layer.centre[i, 0], gy - layer.centre[i, 1]
            x = (dx * xx[i] + dy * xy[i] + SIDE // 2) * shrink + np.float32(0.5)  # +1 border, −0.5 pixel centre
            y = (dx * yx[i] + dy * yy[i] + SIDE // 2) * shrink + np.float32(0.5)
            glyph = _sample(levels[level][layer.glyph[i]], x, y)
            alpha = glyph[..., 3:]
            canvas = canvas * (1 - alpha) + np.minimum(glyph[..., :3] * layer.gain[i], 255 * alpha)
        pictures[i] = np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8)
        masks[i] = alpha[..., 0] > 0.5  # the last layer is the object
    return pictures, masks
