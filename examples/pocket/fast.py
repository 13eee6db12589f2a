"""The pretraining composer: `compose.draw`'s parameters rendered with torch, plus colour and blur augmentation.

Not byte-exact across machines (`compose.render` is), only fast: about 0.3 ms a picture on two cores.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .compose import SIDE, Bytes, Floats, Layer, Scenes, level_of

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
MEAN = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
STD = torch.tensor(CLIP_STD).view(1, 3, 1, 1)


class GlyphBank:
    """Premultiplied glyphs at three sizes, channels first, ready for `grid_sample`."""

    def __init__(self, glyphs: Bytes) -> None:
        level = torch.from_numpy(glyphs).permute(0, 3, 1, 2).float() / 255  # (N, 4, 64, 64)
        level[:, :3] *= level[:, 3:]
        self.levels = [level, F.avg_pool2d(level, 2), F.avg_pool2d(level, 4)]

    def draw(self, layer: Layer, shown: Tensor) -> Tensor:
        """(len(shown), 4, 64, 64): the glyphs of these rows of the layer at their places, premultiplied."""
        xx, xy, yx, yy = (torch.from_numpy(np.asarray(a, np.float32))[shown] for a in layer.axes())
        half = SIDE / 2
        shift = half - torch.from_numpy(layer.centre)[shown]  # picture centre relative to the glyph centre
        theta = torch.stack(
            [
                torch.stack([xx, xy, (xx * shift[:, 0] + xy * shift[:, 1]) / half], 1),
                torch.stack([yx, yy, (yx * shift[:, 0] + yy * shift[:, 1]) / half], 1),
            ],
            1,
        )  # (B, 2, 3)
        out = torch.empty(len(theta), 4, SIDE, SIDE)
        level = torch.from_numpy(level_of(layer.scale))[shown]
        glyph = torch.from_numpy(layer.glyph)[shown]
        for k in range(3):
            rows = (level == k).nonzero()[:, 0]
            if len(rows):
                grid = F.affine_grid(theta[rows], [len(rows), 4, SIDE, SIDE], align_corners=False)
                out[rows] = F.grid_sample(self.levels[k][glyph[rows]], grid, align_corners=False)
        return out


def colour_matrices(rng: np.random.Generator, gain: Floats) -> tuple[Tensor, Tensor]:
    """Random affine colour maps: (B, 3, 3) matrices and (B, 3) offsets (to be weighted by alpha).

    Mostly mild jitter; sometimes a hue shift, faded colours or a nearly one-coloured silhouette, so that shape counts
    and a drawing style that was never seen can be read.
    """
    n = len(gain)
    matrix = np.eye(3)[None] + rng.uniform(-0.08, 0.08, (n, 3, 3))
    offset = rng.uniform(-0.08, 0.08, (n, 3))
    kind = rng.random(n)
    grey = np.tile(np.array([0.3, 0.59, 0.11]), (3, 1))
    keep = rng.uniform(0, 1, (n, 1, 1))
    faded = keep * matrix + (1 - keep) * grey
    turned = np.eye(3)[np.argsort(rng.random((n, 3)), 1)]
    matrix = np.where((kind < 0.2)[:, None, None], faded, matrix)
    matrix = np.where(((kind > 0.2) & (kind < 0.3))[:, None, None], 0.5 * matrix + 0.5 * turned, matrix)
    blank = (kind > 0.3) & (kind < 0.33)
    matrix = np.where(blank[:, None, None], matrix * 0.15, matrix)
    offset = np.where(blank[:, None], rng.uniform(0, 0.85, (n, 3)), offset)
    matrix = matrix * gain[:, :, None]
    return torch.from_numpy(matrix).float(), torch.from_numpy(offset).float()


def render(rng: np.random.Generator, scenes: Scenes, glyphs: GlyphBank, bank: Tensor) -> Tensor:
    """(B, 3, 64, 64) normalised pixels. `bank`: (M, 96, 96, 3) uint8 tensor."""
    n = len(scenes.background)
    rows = torch.from_numpy(scenes.background).view(-1, 1, 1)
    y = torch.from_numpy(scenes.corner[:, :1]) + torch.arange(SIDE)  # (B, 64)
    x = torch.from_numpy(scenes.corner[:, 1:]) + torch.arange(SIDE)
    x = torch.where(torch.from_numpy(scenes.flip)[:, None] == 1, x.flip(1), x)
    canvas = bank[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).float() / 255  # (B, 3, 64, 64)
    for layer in scenes.layers:
        shown = torch.from_numpy(layer.shown).nonzero()[:, 0]
        glyph = glyphs.draw(layer, shown)
        alpha = glyph[:, 3:]
        matrix, offset = colour_matrices(rng, layer.gain[shown.numpy()])
        colour = torch.einsum("bij,bjhw->bihw", matrix, glyph[:, :3]) + offset[:, :, None, None] * alpha
        canvas[shown] = canvas[shown] * (1 - alpha) + torch.minimum(colour.clamp_min(0), alpha)
    soft = torch.from_numpy(rng.random(n) < 0.15)
    if soft.any():
        canvas[soft] = F.avg_pool2d(F.pad(canvas[soft], (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (canvas - MEAN) / STD
