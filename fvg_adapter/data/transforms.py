"""Augmentation that moves a picture and its mask by one and the same geometry (METHOD.md section 7).

Training: random resized crop and flip, bicubic for the picture and nearest for the mask. Evaluation: CLIP's resize of
the shorter side and centre crop. Imports torch, numpy and PIL; torchvision is not needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image as PILImage
from PIL.Image import Resampling, Transpose
from torch import Tensor

from fvg_adapter.data.errors import DataError
from fvg_adapter.data.images import binary_mask, to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CROP_ATTEMPTS = 10
_MOST_PIXELS = 2**24

Box = tuple[int, int, int, int]


class Geometry(NamedTuple):
    """What happens to a picture and to its mask alike: crop, resize, crop again, mirror; boxes as PIL has them."""

    source: Box
    size: tuple[int, int]  # (width, height) to which the source box is resized
    window: Box
    flip: bool

    def apply(self, image: PILImage, resample: Resampling) -> PILImage:
        """The picture moved; only the interpolation may differ between a picture and its mask."""
        if self.size[0] * self.size[1] > _MOST_PIXELS:
            moved = image.resize(_size(self.window), resample, box=self._behind_window())
        else:
            moved = image.crop(self.source).resize(self.size, resample).crop(self.window)
        return moved.transpose(Transpose.FLIP_LEFT_RIGHT) if self.flip else moved

    def _behind_window(self) -> tuple[float, float, float, float]:
        """The part of the picture that the window shows, for pictures so long that the whole would not fit memory."""
        left, top, right, bottom = self.source
        across, down = (right - left) / self.size[0], (bottom - top) / self.size[1]
        x0, y0, x1, y1 = self.window
        return left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down


def _size(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


@dataclass(frozen=True)
class PairedTransform:
    """Turn a picture and its mask into `pixel_values` and `foreground_mask`, both moved by one geometry.

    Args:
        size: side of the square that the model takes, or (height, width).
        mean, std: of the normalisation, one value a channel; CLIP's by default.
        train: random resized crop and flip, or the fixed resize and centre crop.
        scale: share of the area that a crop keeps (Dassl's default; MMRL trains with (0.5, 1)).
        ratio: width over height of a crop.
        flip: probability of mirroring.
        seed: seed of `view`; calls draw from torch's generator, which DataLoader seeds in its workers.
        resize: evaluation only: the shorter side before the centre crop (default: the longer of `size`), or a
            (height, width) to which the picture is resized without keeping its proportions.
        resample: interpolation of the picture; the mask always takes nearest.

    Raises:
        DataError: a value that makes no picture.

    Source: torchvision's RandomResizedCrop and RandomHorizontalFlip, draw for draw, which Dassl uses; for evaluation
    transformers' CLIPImageProcessor (torchvision's centre crop differs by a pixel where the margin is odd).

    >>> from PIL import Image
    >>> transform = PairedTransform(32, train=False)
    >>> out = transform(Image.new("RGB", (40, 60)), Image.new("L", (40, 60), 255))
    >>> out["pixel_values"].shape, out["foreground_mask"].mean().item()
    (torch.Size([3, 32, 32]), 1.0)
    """

    size: int | tuple[int, int]
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    train: bool = field(kw_only=True)
    scale: tuple[float, float] = field(default=(0.08, 1.0), kw_only=True)
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), kw_only=True)
    flip: float = field(default=0.5, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)
    resize: int | tuple[int, int] | None = field(default=None, kw_only=True)
    resample: int = field(default=int(Resampling.BICUBIC), kw_only=True)

    def __post_init__(self) -> None:
        # Lists (a processor's, a config's) become tuples: a frozen value that can be hashed and compared.
        for name in ("mean", "std", "scale", "ratio"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not isinstance(self.size, int):
            object.__setattr__(self, "size", tuple(int(side) for side in self.size))
        _check(self)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __call__(
        self, image: PILImage, mask: PILImage | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Transform a picture and, if there is one, its mask.

        Args:
            image: PIL picture, any mode.
            mask: PIL mask, foreground bright; another size than the picture's is resized with nearest first.
            generator: source of the training draws; torch's default one if None.

        Returns:
            `pixel_values`: float32 (3, H, W), normalised; with a mask `foreground_mask`: float32 (1, H, W) of 0 and 1.

        Raises:
            DataError: something else than PIL images was given.
        """
        _check_images(image, mask)
        geometry = self.geometry(image.width, image.height, generator)
        out = {"pixel_values": self._normalised(geometry.apply(to_rgb(image), Resampling(self.resample)))}
        if mask is not None:
            same = mask if mask.size == image.size else mask.resize(image.size, Resampling.NEAREST)
            moved = np.array(geometry.apply(binary_mask(same), Resampling.NEAREST))  # (H, W) uint8, 0 and 255
            out["foreground_mask"] = torch.from_numpy(moved).bool().float()[None]  # (1, H, W)
        return out

    def view(self, image: PILImage, mask: PILImage | None, key: int) -> dict[str, Tensor]:
        """The view number `key`: the same for the same (seed, key), whatever was drawn before and in any process."""
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=4).digest()
        return self(image, mask, torch.Generator().manual_seed(int.from_bytes(digest, "big")))

    def geometry(self, width: int, height: int, generator: torch.Generator | None = None) -> Geometry:
        """The geometry for a picture of this size; random for training, fixed for evaluation."""
        rows, columns = self.output_size
        if self.train:
            source = self._random_box(width, height, generator)
            flip = bool(torch.rand(1, generator=generator) < self.flip)
            return Geometry(source, (columns, rows), (0, 0, columns, rows), flip)
        new_width, new_height = self._resized(width, height)
        left, top = (new_width - columns) // 2, (new_height - rows) // 2
        return Geometry((0, 0, width, height), (new_width, new_height), (left, top, left + columns, top + rows), False)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before the centre crop."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        shorter = self.resize or max(self.output_size)
        if width <= height:
            return shorter, int(shorter * height / width)
        return int(shorter * width / height), shorter

    def _random_box(self, width: int, height: int, generator: torch.Generator | None) -> Box:
        """torchvision's RandomResizedCrop.get_params, with its draws in its order."""
        low, high = torch.log(torch.tensor(self.ratio)).tolist()
        for _ in range(_CROP_ATTEMPTS):
            area = width * height * torch.empty(1).uniform_(*self.scale, generator=generator).item()
            aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
                left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
                return left, top, left + w, top + h
        # A picture too long for any draw: its centre, as square as `ratio` demands.
        w = min(width, round(height * self.ratio[1])) if width / height > self.ratio[1] else width
        h = min(height, round(width / self.ratio[0])) if width / height < self.ratio[0] else height
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _normalised(self, image: PILImage) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (H, W, 3) -> (3, H, W)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


def transform_for(source: Any, train: bool, **options: Any) -> PairedTransform:
    """The transform that belongs to a model: sizes, mean and std of its image processor.

    Args:
        source: an image processor, a processor that holds one, or a size (then CLIP's mean and std).
        train: augment or not.
        options: other fields of PairedTransform (scale, flip, seed, …), which override the processor's.

    Raises:
        DataError: the processor has no fixed output size, or is no image processor.
    """
    if isinstance(source, int | tuple | list):
        return PairedTransform(source if isinstance(source, int) else (source[0], source[1]), train=train, **options)
    processor = getattr(source, "image_processor", source)
    if getattr(processor, "size", None) is None:
        raise DataError(
            f"transform_for takes an image processor (with size, image_mean, image_std) or a size in pixels, "
            f"but was given {type(source).__name__}."
        )
    resize = _sides(processor.size)
    crop = _sides(processor.crop_size) if getattr(processor, "do_center_crop", False) else resize
    if isinstance(crop, int) and crop is resize and not isinstance(processor.size, int):
        raise DataError(
            f"{type(processor).__name__} keeps the proportions (size={dict(processor.size)}) without a centre crop, so "
            "pictures come out in different sizes and make no batch. Give a size in pixels instead of the processor."
        )
    plain = not getattr(processor, "do_normalize", True)
    found: dict[str, Any] = {
        "mean": (0.0, 0.0, 0.0) if plain else processor.image_mean or CLIP_MEAN,
        "std": (1.0, 1.0, 1.0) if plain else processor.image_std or CLIP_STD,
        "resize": resize,
        "resample": int(getattr(processor, "resample", None) or Resampling.BICUBIC),
    }
    return PairedTransform(crop, train=train, **{**found, **options})


def _sides(size: Any) -> int | tuple[int, int]:
    """A processor's size: the shorter side, or (height, width)."""
    if isinstance(size, int):
        return size
    sides = dict(size)
    if "height" in sides and "width" in sides:
        return int(sides["height"]), int(sides["width"])
    if "shortest_edge" in sides:
        return int(sides["shortest_edge"])
    raise DataError(
        f"A processor's size {sides} has neither height and width nor shortest_edge: give a size in pixels."
    )


def _check_images(image: object, mask: object) -> None:
    if not isinstance(image, PILImage) or not isinstance(mask, PILImage | None):
        given = f"{type(image).__name__} and {type(mask).__name__}"
        raise DataError(f"A transform takes a PIL image and a PIL mask or None, but was given {given}.")


def _check(transform: PairedTransform) -> None:
    sides = transform.output_size
    if len(sides) != 2 or min(sides) < 1:
        raise DataError(f"size={transform.size!r} is no picture: give a side in pixels, or (height, width).")
    if len(transform.mean) != 3 or len(transform.std) != 3 or min(transform.std) <= 0:
        raise DataError(f"mean={transform.mean}, std={transform.std}: three values each are expected, std above 0.")
    for name, (low, high) in (("scale", transform.scale), ("ratio", transform.ratio)):
        if not 0 < low <= high:
            raise DataError(f"{name}=({low}, {high}) is no range: 0 < low <= high is expected.")
    if not 0 <= transform.flip <= 1:
        raise DataError(f"flip={transform.flip} is no probability: a value from 0 to 1 is expected.")
    before = transform.resize
    rows, columns = before if isinstance(before, tuple) else (before or max(sides),) * 2
    if rows < sides[0] or columns < sides[1]:
        raise DataError(f"resize={before!r} is smaller than size={transform.size!r}: the crop would leave the picture.")
