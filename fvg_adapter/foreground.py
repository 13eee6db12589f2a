"""Foreground masks and foreground views: what x_fg = x ⊙ m is made of, and where m comes from (METHOD.md section 2).

A mask is given with the batch, read from a file in the authors' layout, made from the model's own attention, or made by
a callable such as a segmenter. Imports masks and config, and PIL when a file is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fvg_adapter.config import CLIP_MEAN, CLIP_STD
from fvg_adapter.errors import nearest
from fvg_adapter.masks import ForegroundError, prepare_mask

__all__ = [
    "ForegroundError",
    "ForegroundSource",
    "attention_mask_from_map",
    "foreground_view",
    "mask_area",
    "masks_from",
    "mirrored_mask_path",
    "prepare_mask",
    "read_mask",
    "resolve_source",
    "source_name",
    "usable_mask",
]

SOURCES = ("attention", "given", "whole")
"""Where a missing mask comes from: the model's attention, nowhere (it must be given), or everywhere (x_fg = x)."""
OUTSIDE = ("mean", "black")
MASK_FOLDER = "mask"


class ForegroundSource(Protocol):
    """A callable that makes masks: normalised images (B, 3, H, W) to masks (B, H, W) or (B, 1, H, W).

    Values as in `prepare_mask`: bool, floats in [0, 1] or integers, at any resolution. A source may ask for more by
    having parameters of these names (see `masks_from`): `classes`, the class name of each picture, and `image_mean` and
    `image_std`, the normalisation of the pixels.
    """

    def __call__(self, pixel_values: Tensor, /) -> Tensor:
        """Masks of a batch of images."""


SAYABLE = ("classes", "image_mean", "image_std")
"""What a source can be told beside the pixels."""


def masks_from(
    source: Any,
    pixel_values: Tensor,
    *,
    classes: Sequence[str] | None = None,
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Asks a callable source for the masks of a batch, with as much of the rest as it has parameters for.

    Args:
        source: see `ForegroundSource`. pixel_values: (B, 3, H, W) normalised images.
        classes: the class name of each picture, None where nobody knows it.
        image_mean, image_std: the normalisation of the pixels.

    Returns:
        What the source gives.

    Raises:
        ForegroundError: the source cannot do without class names, and there are none.

    Example:
        >>> def fruit(pixels, classes):
        ...     return torch.tensor([[[name == "banana"]] for name in classes])
        >>> masks_from(fruit, torch.zeros(2, 3, 1, 1), classes=["banana", "cat"]).flatten()
        tensor([ True, False])
    """
    known = {"classes": classes, "image_mean": tuple(image_mean), "image_std": tuple(image_std)}
    wanted = _parameters(source)
    told: dict[str, Any] = {}
    for name in SAYABLE:
        parameter = wanted.get(name)
        if parameter is None or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        if known[name] is not None:
            told[name] = known[name]
        elif parameter.default is parameter.empty or getattr(source, "prompted", False):
            raise ForegroundError(
                f"the foreground source {source_name(source)} is asked with class names, which come from the labels: "
                "give labels with the pixels, or masks."
            )
    made: Tensor = source(pixel_values, **told)
    return made


def source_name(source: Any) -> str:
    """What to call a source in messages and records: its own `identity`, or its name in code.

    Example:
        >>> source_name("attention"), source_name(mask_area)
        ('attention', 'mask_area')
    """
    if isinstance(source, str):
        return source
    own = getattr(source, "identity", None)
    return own if isinstance(own, str) else getattr(source, "__qualname__", type(source).__qualname__)


def _parameters(source: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable; of a module those of its forward; none where they cannot be read."""
    try:
        return inspect.signature(source.forward if isinstance(source, torch.nn.Module) else source).parameters
    except (TypeError, ValueError):
        return {}


def resolve_source(foreground: Any) -> str:
    """The kind of a foreground source: "attention", "given", "whole" or "callable".

    Raises:
        ForegroundError: neither one of the names nor a callable; suggests the nearest name.

    Example:
        >>> resolve_source("whole"), resolve_source(lambda pixel_values: pixel_values.mean(1) > 0)
        ('whole', 'callable')
    """
    if isinstance(foreground, str) and foreground in SOURCES:
        return foreground
    if callable(foreground):
        return "callable"
    raise ForegroundError(
        f"foreground is {foreground!r}. {nearest(foreground, SOURCES)} Or give a callable from normalised pixels "
        "(B, 3, H, W) to masks (B, H, W)."
    )


def foreground_view(
    pixel_values: Tensor,
    mask: Tensor,
    *,
    outside: str = "mean",
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """The foreground view x_fg = x ⊙ m (METHOD.md sections 2 and 8).

    Args:
        pixel_values: (B, 3, H, W) normalised images x.
        mask: (B, 1, H, W) m, as `prepare_mask` gives it.
        outside: "mean" leaves 0 after normalisation (the mean colour); "black" leaves black pixels.
        image_mean, image_std: the normalisation of the images; only "black" needs it.

    Returns:
        (B, 3, H, W) in the type of the images.

    Raises:
        ForegroundError: an unknown `outside`, or for "black" a normalisation of another number of channels.

    Example:
        >>> foreground_view(torch.full((1, 3, 1, 2), 5.0), torch.tensor([[[[1.0, 0.0]]]]))[0, 0]
        tensor([[5., 0.]])
    """
    if outside not in OUTSIDE:
        raise ForegroundError(f"outside is {outside!r}. {nearest(outside, OUTSIDE)}")
    mask = mask.to(pixel_values)
    view = pixel_values * mask
    if outside == "mean":
        return view
    channels = pixel_values.shape[1]
    if not len(image_mean) == len(image_std) == channels:
        raise ForegroundError(
            f"the images have {channels} channels, but image_mean has {len(image_mean)} and image_std {len(image_std)}."
        )
    black = [-mean / std for mean, std in zip(image_mean, image_std, strict=True)]
    return view + (1 - mask) * pixel_values.new_tensor(black).view(1, -1, 1, 1)


def mask_area(mask: Tensor) -> Tensor:
    """A(m): the share (B,) of each image that its mask (B, 1, H, W) covers, float32 in [0, 1].

    Example:
        >>> mask_area(torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]]))
        tensor([0.5000, 0.0000])
    """
    flat = mask.flatten(1)  # (B, H·W)
    return flat.sum(1, dtype=torch.float32) / flat.shape[1]


def usable_mask(area: Tensor, bounds: tuple[float, float] = (0.02, 0.98)) -> Tensor:
    """u: whether each mask can be trained with, its area (B,) within the bounds, both included (train.py).

    Example:
        >>> usable_mask(torch.tensor([0.0, 0.02, 0.5, 1.0]))
        tensor([False,  True,  True, False])
    """
    low, high = bounds
    return (area >= low) & (area <= high)


def attention_mask_from_map(attention: Tensor, size: tuple[int, int], *, threshold: float = 1.0) -> Tensor:
    """Foreground masks from attention maps: pixels whose weight reaches a multiple of the image's mean patch weight.

    The map is first enlarged bilinearly (patch centres stay where they are), then thresholded, so that outlines are not
    steps of whole patches; the mean is that of the patches. The same map always gives the same mask.

    Args:
        attention: (B, h, w) maps of patches, averaged over heads and layers; not negative.
        size: height and width of the images in pixels.
        threshold: foreground from this multiple of the mean on.

    Returns:
        (B, 1, H, W) float32 of 0 and 1, without gradient. A map of zeros or NaN gives an empty mask.

    Raises:
        ForegroundError: not (B, h, w), or a threshold that is not above 0.
    """
    if attention.dim() != 3:
        raise ForegroundError(
            f"attention must be (B, h, w), but has shape {tuple(attention.shape)}; average heads and layers first: "
            "record.attention().mean((1, 2))."
        )
    if not threshold > 0:
        raise ForegroundError(f"the attention threshold must be above 0, but is {threshold!r}.")
    with torch.no_grad():
        maps = attention.float().unsqueeze(1)  # (B, 1, h, w)
        limit = threshold * maps.mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
        pixels = F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
        return ((pixels >= limit) & (limit > 0)).float()


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """A mask file of the authors' layout: an ordinary RGB picture, foreground white (METHOD.md section 10).

    Channels are averaged and thresholded at one half, which takes JPEG noise away; another size is resized with
    nearest. A greyscale file of zeros and ones counts ones as foreground.

    Args:
        path: the mask file. size: height and width of its image, or None for the mask's own.

    Returns:
        (1, H, W) float32 of 0 and 1.

    Raises:
        ForegroundError: missing, truncated or not a picture.
    """
    from PIL import Image

    from fvg_adapter.data.images import binary_mask

    try:
        with Image.open(path) as stored:
            mask = binary_mask(stored)
    except (OSError, SyntaxError, ValueError) as error:
        raise ForegroundError(f"could not read the mask {str(path)!r} ({type(error).__name__}: {error}).") from error
    if size is not None:
        mask = mask.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(mask) > 0).float().unsqueeze(0)


def mirrored_mask_path(image_path: str | Path, root: str | Path) -> Path | None:
    """The mask file of an image in the folder `mask/` that mirrors the image tree, or None (METHOD.md section 10).

    Both layouts of the release are looked at: ROOT/mask/a/b/img.jpg, PARENT/mask/ROOT/a/b/img.jpg (the mirror begins at
    the outer root), then ROOT/a/mask/b/img.jpg (at an inner one).

    Args:
        image_path: ROOT/a/b/img.jpg. root: ROOT.

    Raises:
        ForegroundError: the image does not lie below the root.
    """
    image, root = Path(image_path), Path(root)
    if root not in image.parents:
        raise ForegroundError(f"the image {str(image)!r} does not lie below the root {str(root)!r}.")
    inner = [folder for folder in reversed(image.parents) if root in folder.parents]
    candidates = [origin / MASK_FOLDER / image.relative_to(origin) for origin in (root, root.parent, *inner)]
    return next((mask for mask in candidates if mask.is_file()), None)
