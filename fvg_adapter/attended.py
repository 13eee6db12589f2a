"""The attended view: what the model looks at, cut out and enlarged, blended into the features at inference.

FVG-PT needs no mask at inference, and new classes never see a foreground (METHOD.md section 6). With
`FVGConfig.attended_view` the model's own attention makes one for every picture, for base, new and prior features alike.
Not in the paper; measured in docs/plus.md. Pure functions of tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SIDE = 3 / 8
"""A cut-out is never smaller than this share of the picture: more would enlarge pixels, not objects."""


def zoom_on_mask(pixel_values: Tensor, mask: Tensor, margin: float = 1.2) -> Tensor:
    """The window around each mask, of the picture's own shape, resized to the size of the picture (bicubic).

    The window is the mask's bounding box, grown to the shape of the picture and `margin` times as large, not smaller
    than `SMALLEST_SIDE` and not larger than the picture, and shifted to lie inside it.

    Args:
        pixel_values: (B, 3, H, W). mask: (B, 1, H, W), foreground above 0; an empty one leaves the picture as it is.
        margin: side of the window over the side of the box.

    Returns:
        (B, 3, H, W) in the type of the pictures.

    Example:
        >>> picture, mask = torch.arange(64.0).view(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
        >>> mask[..., 2:6, 2:6] = 1
        >>> zoom_on_mask(picture, mask, 2.0).sub(picture).abs().max() < 1e-4  # the window is the whole picture
        tensor(True)
    """
    inside = mask[:, 0] > 0  # (B, H, W)
    low_y, high_y = _extent(inside.any(2))
    low_x, high_x = _extent(inside.any(1))
    side = torch.maximum(high_y - low_y, high_x - low_x) * margin  # (B,) shares of the picture
    side = torch.where(inside.any(2).any(1), side.clamp(SMALLEST_SIDE, 1.0), torch.ones_like(side))
    half = side / 2
    centre_y = torch.minimum(torch.maximum((low_y + high_y) / 2, half), 1 - half)
    centre_x = torch.minimum(torch.maximum((low_x + high_x) / 2, half), 1 - half)
    zero = torch.zeros_like(side)
    rows = [torch.stack([side, zero, 2 * centre_x - 1], 1), torch.stack([zero, side, 2 * centre_y - 1], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixel_values.shape), align_corners=False)  # (B, H, W, 2)
    zoomed = F.grid_sample(pixel_values.float(), grid, mode="bicubic", padding_mode="border", align_corners=False)
    return zoomed.to(pixel_values.dtype)


def _extent(present: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows or columns (B, N) begin and end to be present, as shares of N; 1 and 0 where none is."""
    n = present.shape[1]
    edges = torch.arange(n + 1, device=present.device, dtype=torch.float32) / n
    low = torch.where(present, edges[:-1], torch.ones_like(edges[:-1])).amin(1)
    high = torch.where(present, edges[1:], torch.zeros_like(edges[1:])).amax(1)
    return low, high


def blend(whole: Tensor, attended: Tensor, weight: float) -> Tensor:
    """‖f‖ · normalise((1 − w) · f + w · f_att) of features (B, D): unit features stay unit.

    Example:
        >>> blend(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 0.5)
        tensor([[2.1213, 2.1213]])
    """
    moved = (1 - weight) * whole.float() + weight * attended.float()
    norm: Tensor = whole.float().norm(dim=-1, keepdim=True)
    return (norm * F.normalize(moved, dim=-1)).to(whole.dtype)
