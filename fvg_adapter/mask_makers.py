"""What makes the masks of pictures for `mask_files`: a model's attention, a segmenter, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image as PILImage
from torch import Tensor

from fvg_adapter.attention import record_attention
from fvg_adapter.config import CLIP_MEAN, CLIP_STD, FVGConfig
from fvg_adapter.data import PairedTransform
from fvg_adapter.foreground import attention_mask_from_map, masks_from, prepare_mask
from fvg_adapter.segmenters import Segmenter

Maker = Callable[[Sequence[PILImage], Sequence[str]], "list[Tensor]"]
"""From upright RGB pictures and their class names to masks (H, W) bool, each in its picture's size."""


def attention_masks(model: Any, config: FVGConfig, size: tuple[int, int]) -> Maker:
    """Masks from a model's own attention, the whole picture stretched over its input.

    Args:
        model: what `record_attention` takes. config: layers, threshold and normalisation. size: of the model's input.
    """
    transform = PairedTransform(size, config.image_mean, config.image_std, train=False, resize=size)

    @torch.no_grad()
    def make(pictures: Sequence[PILImage], classes: Sequence[str]) -> list[Tensor]:
        pixels = torch.stack([transform(picture)["pixel_values"] for picture in pictures])
        tower = getattr(model, "vision_model", model)
        first = next(model.parameters())
        with record_attention(model, config.attention_layers) as record:
            _run_vision(model, tower, pixels.to(first.device, first.dtype))
        maps = record.attention().mean((1, 2))  # (B, layers, heads, h, w) -> (B, h, w)
        return [
            attention_mask_from_map(m[None], (p.height, p.width), threshold=config.attention_threshold)[0, 0]
            .bool()
            .cpu()
            for m, p in zip(maps, pictures, strict=True)
        ]

    return make


def _run_vision(model: Any, tower: Any, pixels: Tensor) -> None:
    run = getattr(model, "get_image_features", None)
    if callable(run):
        run(pixel_values=pixels)
    else:
        tower(pixel_values=pixels)


def source_masks(source: Any, size: int, device: Any = "cpu") -> Maker:
    """Masks from a Segmenter, at its own resolution, or from any callable, at `size` by `size` pixels."""
    if isinstance(source, Segmenter):
        return lambda pictures, classes: source.masks(pictures, list(classes) if source.prompted else None)
    transform = PairedTransform(size, CLIP_MEAN, CLIP_STD, train=False, resize=(size, size))

    @torch.no_grad()
    def make(pictures: Sequence[PILImage], classes: Sequence[str]) -> list[Tensor]:
        pixels = torch.stack([transform(picture)["pixel_values"] for picture in pictures]).to(device)
        masks = prepare_mask(masks_from(source, pixels, classes=list(classes)), pixels)  # (B, 1, size, size)
        sizes = [(picture.height, picture.width) for picture in pictures]
        large = [F.interpolate(m[None], size=s, mode="bilinear")[0, 0] for m, s in zip(masks, sizes, strict=True)]
        return [(m >= 0.5).cpu() for m in large]

    return make
