"""What is done to a binary mask after it was found: parts, holes, bounds. Components are scipy's."""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fvg_adapter.errors import FVGError

NOTHING = (0.0, 1.0)
"""Area bounds that keep every mask."""


def clean(
    masks: Tensor, *, largest: bool = False, fill_holes: bool = False, area: tuple[float, float] = NOTHING
) -> Tensor:
    """Tidies binary masks, in this order: the largest part alone, holes filled, masks of a wrong area emptied.

    Args:
        masks: (B, H, W) or (H, W) bool.
        largest: keep the largest connected part (4-neighbourhood; of equals the first in reading order).
        fill_holes: background that the foreground encloses (4-neighbourhood) becomes foreground.
        area: share of the picture, both bounds included; a mask outside them becomes empty, which means "no usable
            mask" (r = 0), not "no object".

    Returns:
        The same shape, bool, on the same device.

    Raises:
        FVGError: scipy is not installed, another type or rank, or bounds that are no range in [0, 1].

    >>> ring = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 0, 1]]).bool()
    >>> clean(ring, largest=True, fill_holes=True).int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    """
    check_cleaning(largest, fill_holes, area)
    if masks.dtype != torch.bool or masks.dim() not in (2, 3):
        raise FVGError(f"masks must be bool (B, H, W) or (H, W), but are {masks.dtype} {tuple(masks.shape)}.")
    if not largest and not fill_holes and area == NOTHING:
        return masks
    tidy = [_one(mask, largest, fill_holes, area) for mask in masks.cpu().reshape(-1, *masks.shape[-2:]).numpy()]
    if not tidy:
        return masks
    return torch.from_numpy(np.stack(tidy)).reshape(masks.shape).to(masks.device)


def check_cleaning(largest: bool, fill_holes: bool, area: tuple[float, float]) -> None:
    """Raises FVGError for bounds that are no range, or where scipy is needed and missing."""
    if not 0 <= area[0] <= area[1] <= 1:
        raise FVGError(f"area={area} is no range: 0 <= low <= high <= 1 is expected.")
    if (largest or fill_holes) and importlib.util.find_spec("scipy") is None:
        raise FVGError(
            "connected parts and holes need scipy: pip install 'fvg-adapter[masks]', or leave them as they are with "
            "largest=False, fill_holes=False."
        )


def _one(
    mask: npt.NDArray[np.bool_], largest: bool, fill_holes: bool, area: tuple[float, float]
) -> npt.NDArray[np.bool_]:
    if largest and mask.any():
        from scipy import ndimage

        parts, _ = ndimage.label(mask)  # (H, W) part numbers from 1 in reading order
        mask = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    if fill_holes:
        from scipy import ndimage

        mask = ndimage.binary_fill_holes(mask)
    share = mask.mean() if mask.size else 0.0
    return mask if area[0] <= share <= area[1] else np.zeros_like(mask)
