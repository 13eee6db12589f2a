"""From pictures to what a segmenter takes, and from its maps back to the pictures.

Every picture of a batch is brought into one frame: stretched over it, or scaled to its longer side and padded to the
right and below, as the family was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image as PILImage
from PIL.Image import Resampling
from torch import Tensor

from fvg_adapter.errors import FVGError

Size = tuple[int, int]


@dataclass(frozen=True)
class Frames:
    """A batch of pictures in their frames.

    Attributes:
        pixels: (B, 3, S, T) normalised for the segmenter, 0 where there is no picture.
        filled: (height, width) of the upper left part of each frame that its picture fills.
        sizes: (height, width) of each picture.
    """

    pixels: Tensor
    filled: list[Size]
    sizes: list[Size]

    @property
    def side(self) -> Size:
        """(height, width) of the frames."""
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])

    def inside(self, size: Size | None = None) -> Tensor:
        """(B, h, w) bool: where a frame, or a map of it of another resolution, shows its picture."""
        h, w = size or self.side
        rows, columns = torch.arange(h), torch.arange(w)
        parts = [(rows[:, None] < y) & (columns[None, :] < x) for y, x in self._filled(h, w)]
        return torch.stack(parts).to(self.pixels.device)

    def back(self, maps: Tensor) -> list[Tensor]:
        """The part of each map (B, h, w) that shows its picture, bilinearly in the picture's size (H, W)."""
        cut = [m[:y, :x] for m, (y, x) in zip(maps.float(), self._filled(*maps.shape[-2:]), strict=True)]
        return [
            F.interpolate(m[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            for m, size in zip(cut, self.sizes, strict=True)
        ]

    def _filled(self, h: int, w: int) -> list[Size]:
        """The filled part at a resolution of h by w, at least one pixel."""
        scale = h / self.side[0], w / self.side[1]
        return [(max(1, round(y * scale[0])), max(1, round(x * scale[1]))) for y, x in self.filled]


@dataclass(frozen=True)
class Framing:
    """How a segmenter wants its pictures.

    Attributes:
        side: (height, width) of the frame.
        mean, std: of the normalisation.
        letterbox: keep the proportions and pad, instead of stretching.
    """

    side: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    letterbox: bool = False

    def of_pixels(self, rgb: Tensor, device: Any, dtype: torch.dtype) -> Frames:
        """Frames of pixels (B, 3, H, W) in [0, 1]."""
        size = int(rgb.shape[-2]), int(rgb.shape[-1])
        filled = self._filled(size)
        small = F.interpolate(
            rgb.to(device).float(), size=filled, mode="bilinear", align_corners=False, antialias=True
        ).clamp(0, 1)
        return Frames(self._padded(self._normal(small)).to(dtype), [filled] * len(rgb), [size] * len(rgb))

    def of_pictures(self, pictures: Sequence[PILImage], device: Any, dtype: torch.dtype) -> Frames:
        """Frames of PIL pictures."""
        sizes = [(picture.height, picture.width) for picture in pictures]
        filled = [self._filled(size) for size in sizes]
        frames = []
        for picture, (height, width) in zip(pictures, filled, strict=True):
            small = picture.convert("RGB").resize((width, height), Resampling.BILINEAR)
            rgb = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255  # (3, h, w)
            frames.append(self._padded(self._normal(rgb[None])))
        return Frames(torch.cat(frames).to(device, dtype), filled, sizes)

    def _filled(self, size: Size) -> Size:
        if not self.letterbox:
            return self.side
        scale = min(self.side[0] / size[0], self.side[1] / size[1])
        # Two at least: torch (2.13) averages over the whole height where an antialiased width is one pixel.
        height, width = (min(limit, max(2, round(s * scale))) for s, limit in zip(size, self.side, strict=True))
        return height, width

    def _normal(self, rgb: Tensor) -> Tensor:
        return (rgb - rgb.new_tensor(self.mean)[:, None, None]) / rgb.new_tensor(self.std)[:, None, None]

    def _padded(self, pixels: Tensor) -> Tensor:
        return F.pad(pixels, (0, self.side[1] - pixels.shape[-1], 0, self.side[0] - pixels.shape[-2]))


def framing_of(processor: Any, default: Framing, image_size: int | Size | None) -> Framing:
    """The framing that an image processor (object, or its JSON as a dict, or None) asks for.

    Args:
        processor: with size, image_mean and image_std; what it lacks is the family's.
        default: of the family. image_size: of the model where it takes that size alone; wins over the processor's.

    Raises:
        FVGError: values that make no frame.
    """
    processor = getattr(processor, "image_processor", processor)
    found: dict[str, Any] = (
        processor if isinstance(processor, dict) else {k: getattr(processor, k, None) for k in _FIELDS}
    )
    found = found.get("image_processor") or found
    side = default.side
    size = image_size if image_size is not None else found.get("size")
    if size is not None:
        side = _side(size)
    mean, std = (found.get(name) for name in ("image_mean", "image_std"))
    if found.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Framing(side, _three(mean or default.mean), _three(std or default.std), default.letterbox)


_FIELDS = ("size", "image_mean", "image_std", "do_normalize")


def _side(size: Any) -> Size:
    """A frame (height, width) of a processor's size, whichever form it has."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    sides = dict(size)
    if sides.get("height") and sides.get("width"):
        return int(sides["height"]), int(sides["width"])
    edge = sides.get("shortest_edge") or sides.get("longest_edge")
    if not edge:
        raise FVGError(f"the processor's size {sides} has neither height and width nor an edge; give side=….")
    return int(edge), int(edge)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise FVGError(f"a normalisation of three channels is expected, but {list(values)} was given.")
    return float(values[0]), float(values[1]), float(values[2])
