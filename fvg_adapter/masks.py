"""Any mask that a caller may give, as float32 of 0 and 1 in the size of the pixels. Imports torch and numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fvg_adapter.errors import FVGError


class ForegroundError(FVGError):
    """A mask, a mask file or a foreground source does not fit; the message says what was expected."""


def prepare_mask(mask: Any, pixel_values: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Binary masks in the size of the pixels, whatever form they were given in.

    Another resolution is averaged over the area of each pixel, then thresholded: shapes keep their area and a flip of
    the mask is a flip of the result, which nearest sampling does not promise. Integer masks are 0/1 or 0..255, decided
    for each image by its largest value, so that splitting a batch changes nothing.

    Args:
        mask: tensor or array (B, H', W') or (B, 1, H', W'), or (H', W') for a single image; bool, floating point in
            [0, 1], or integers 0/1 or 0..255.
        pixel_values: (B, 3, H, W) the images that the masks belong to.
        threshold: foreground from this value on (train.py: 0.5).

    Returns:
        (B, 1, H, W) float32 of 0 and 1, on the device of the pixels, without gradient.

    Raises:
        ForegroundError: another batch size, rank or number of channels; NaN; values out of range. Values are looked at
            on CPU only, since that would stall a GPU's stream; there NaN counts as background.

    Example:
        >>> prepare_mask(torch.tensor([[0, 255], [0, 0]], dtype=torch.uint8), torch.zeros(1, 3, 4, 4))[0, 0]
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.],
                [0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    if pixel_values.dim() != 4:
        raise ForegroundError(f"pixel_values must be (B, 3, H, W), but have shape {tuple(pixel_values.shape)}.")
    if not 0 < threshold <= 1:
        raise ForegroundError(f"the mask threshold must lie in (0, 1], but is {threshold!r}.")
    with torch.no_grad():
        share = _shares(_shaped(_tensor(mask), len(pixel_values)).to(pixel_values.device))  # (B, 1, H', W')
        size = tuple(pixel_values.shape[-2:])
        if tuple(share.shape[-2:]) != size:
            share = F.interpolate(share, size=size, mode="area")
        return (share >= threshold).float()


def _tensor(mask: Any) -> Tensor:
    if isinstance(mask, Tensor):
        return mask
    kind = mask.dtype.kind if isinstance(mask, np.ndarray) else ""
    if kind not in tuple("buif"):
        given = f"an array of {mask.dtype}" if kind else type(mask).__name__
        raise ForegroundError(f"foreground_mask must be a tensor or a numeric array, but is {given}.")
    # A copy in a type that torch knows: arrays may be read-only, byte-swapped or uint16.
    return torch.from_numpy(np.array(mask, dtype={"b": np.bool_, "f": np.float32}.get(kind, np.int64)))


def _shaped(mask: Tensor, batch: int) -> Tensor:
    """(B, 1, H', W')."""
    shape = tuple(mask.shape)
    if mask.dim() == 2 and batch == 1:
        mask = mask[None]
    if mask.dim() == 3:
        mask = mask[:, None]
    if mask.dim() != 4:
        raise ForegroundError(f"foreground_mask must be (B, H, W) or (B, 1, H, W) with B = {batch}, but is {shape}.")
    if mask.shape[1] != 1:
        dim = 1 if mask.shape[1] in (3, 4) else -1 if mask.shape[3] in (1, 3, 4) else None
        how = f" Average the channels first: mask.float().mean({dim})." if dim is not None else ""
        raise ForegroundError(f"foreground_mask must have one channel, (B, 1, H, W), but is {shape}.{how}")
    if len(mask) != batch:
        colour = batch == 1 and len(shape) == 3 and 3 in (shape[0], shape[2])
        hint = " Average the channels of a colour mask first." if colour else ""
        raise ForegroundError(
            f"foreground_mask holds {len(mask)} masks for {batch} images (its shape is {shape}).{hint}"
        )
    if 0 in shape[1:]:
        raise ForegroundError(f"foreground_mask has no pixels: its shape is {shape}.")
    return mask


def _shares(mask: Tensor) -> Tensor:
    """Float32 in [0, 1] of masks (B, 1, H', W') of any type."""
    if mask.is_complex():
        raise ForegroundError(f"foreground_mask must be bool, floating point or integer, but is {mask.dtype}.")
    values = mask.float()
    if mask.dtype == torch.bool:
        return values
    look = values.device.type == "cpu" and not torch.compiler.is_compiling() and values.numel() > 0
    if mask.is_floating_point():
        if look:
            _check_range(values, 1, "floating-point masks must lie in [0, 1]: divide by 255 if they were pictures")
        return values
    if look:
        _check_range(values, 255, "integer masks must be 0/1 or 0..255")
    top = values.amax((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return values / torch.where(top > 1, 255.0, 1.0)


def _check_range(values: Tensor, top: int, what: str) -> None:
    low, high = float(values.min()), float(values.max())  # NaN if there is one
    if low != low:
        raise ForegroundError("foreground_mask contains NaN.")
    if low < 0 or high > top:
        raise ForegroundError(f"foreground_mask has values from {low:g} to {high:g}; {what}.")
