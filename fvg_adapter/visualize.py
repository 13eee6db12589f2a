"""Pictures of what a model looks at: image, mask, attention and answers. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # and not pyplot, whose backend and open figures are the user's
from torch import Tensor

from fvg_adapter.config import CLIP_MEAN, CLIP_STD
from fvg_adapter.errors import FVGError
from fvg_adapter.features import attention_in_mask
from fvg_adapter.model import FVGModel
from fvg_adapter.modes import evaluating
from fvg_adapter.replacing import written

_WRONG, _RIGHT = "#b3261e", "#1b6e3c"


def overlay(
    picture: Any,
    attention: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    strength: float = 0.55,
    side: int | None = None,
) -> Any:
    """A picture with a map laid over it and the outline of a mask.

    Args:
        picture: a PIL picture, or normalised pixels (3, H, W).
        attention: (h, w) attention, rollout or relevance, at any resolution; from its smallest to its largest value.
        mask: (H', W') or (1, H', W') foreground, at any resolution.
        mean, std: the normalisation of pixels. strength: of the map, in [0, 1].
        side: a smaller picture is enlarged first until its shorter side has so many pixels, so that outlines are fine.

    Returns:
        A PIL picture (RGB) of the picture's size, unless it was enlarged.

    Raises:
        FVGError: a map or mask of another rank.
    """
    from PIL import Image

    base = np.asarray(picture.convert("RGB"), float) / 255 if isinstance(picture, Image.Image) else None
    if base is None:
        base = _picture(picture, mean, std).astype(float)
    if side is not None and min(base.shape[:2]) < side:
        times = -(-side // min(base.shape[:2]))
        base = base.repeat(times, 0).repeat(times, 1)
    size = base.shape[:2]
    for name, given in (("attention", attention), ("mask", mask)):
        if given is not None and given.squeeze().dim() != 2:
            raise FVGError(
                f"{name} must be one map (h, w), but has shape {tuple(given.shape)}; give that of one picture."
            )
    if attention is not None:
        heat = _heat(attention.detach().squeeze(), size)
        base = (1 - strength) * base + strength * matplotlib.colormaps["inferno"](heat)[..., :3]
    if mask is not None:
        inside = F.interpolate(mask.detach().cpu().float().squeeze()[None, None], size=size)[0, 0] > 0.5
        width = max(1, round(min(size) / 160))
        for colour, rings in (((1.0, 1.0, 1.0), 2), ((0.89, 0.0, 0.49), 1)):
            if rings == 2 and width == 1:  # no room for a white rim
                continue
            reach = width * rings
            grown = F.max_pool2d(inside[None, None].float(), 2 * reach + 1, 1, reach)[0, 0] > 0.5
            base = np.where((grown & ~inside).numpy()[..., None], np.array(colour), base)
    return Image.fromarray((np.clip(base, 0, 1) * 255).round().astype(np.uint8))


@torch.no_grad()
def before_after(
    model: FVGModel, base_set: Any, path: str | os.PathLike[str], *, new_set: Any = None, pictures: int = 6
) -> Path:
    """Draws some pictures of base and new classes with mask outline, attention, and the three models' answers.

    Each column is one picture, spread evenly over the set: above the picture with its true mask outlined, below the
    attention of the pooling token (mean over heads), then what CLIP, the tuner and FVG-PT answer, and r and b.

    Args:
        model: an FVGModel; its class list, mode and hooks are left as found.
        base_set, new_set: data sets of {"pixel_values", "labels"[, "foreground_mask"]} with `classes`.
        path: the PNG to write. pictures: how many columns.

    Returns:
        The path.
    """
    sets = [s for s in (base_set, new_set) if s is not None]
    per_set = max(1, pictures // len(sets))
    columns = [(s, i) for s in sets for i in _spread(len(s), per_set)]
    figure = Figure(figsize=(2.5 * len(columns), 7.0), layout="constrained")
    axes: Any = figure.subplots(3, len(columns), squeeze=False, height_ratios=(3, 3, 1.1))
    with evaluating(model):
        for column, (data, index) in enumerate(columns):
            _column(axes[:, column], model, data, index, "base" if data is base_set else "new")
    figure.suptitle(
        "Foreground outlined; the tuner's attention below; answers of CLIP, the tuner and FVG-PT", fontsize=11
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written(target) as file:
        figure.savefig(file, dpi=110)
    return target


def _column(axes: Sequence[Any], model: FVGModel, data: Any, index: int, group: str) -> None:
    item = data[index]
    device = model.tuner.encoder.device
    pixels = item["pixel_values"].unsqueeze(0).to(device)
    mask = item.get("foreground_mask")
    given = None if mask is None else mask.unsqueeze(0).to(device)
    with model.use_classes(data.classes):
        output = model(pixels, foreground_mask=given, return_attention=True)
        tuner = model.tuner
        prior = tuner.scores(tuner.prior_image_features(pixels), tuner.prior_text_features())
        tuned = tuner.scores(tuner.image_features(pixels), tuner.text_features())
        trust = model(pixels, branch="new").prior_trust  # b is asked of the new branch, whichever answered
    picture = _picture(pixels[0], model.config.image_mean, model.config.image_std)
    axes[0].imshow(picture)
    if mask is not None:
        axes[0].contour(mask[0].numpy(), levels=[0.5], colors=["white"], linewidths=2.0)
        axes[0].contour(mask[0].numpy(), levels=[0.5], colors=["#e4007c"], linewidths=1.0)
    truth = data.classes[int(item["labels"])]
    axes[0].set_title(f"{group}: {truth}", fontsize=9)
    attention = output.foreground_attention
    assert attention is not None
    axes[1].imshow(picture)
    axes[1].imshow(_heat(attention[0], picture.shape[:2]), cmap="inferno", alpha=0.65)
    inside = "" if given is None else f", {100 * float(attention_in_mask(attention, given)):.0f} % inside"
    axes[1].set_title(f"attention{inside}", fontsize=9)
    lines = []
    for name, logits in (("CLIP", prior), (tuner.kind, tuned), ("+FVG-PT", output.logits)):
        best = int(logits.argmax(-1))
        right = data.classes[best] == truth
        share = 100 * float(logits.softmax(-1)[0, best])
        lines.append((f"{name}: {data.classes[best]} {share:.0f} %", _RIGHT if right else _WRONG))
    gates = [
        f"{name} = {float(value):.2f}"
        for name, value in (("r", output.foreground_trust), ("b", trust))
        if value is not None
    ]
    lines.append((", ".join(gates), "black"))
    for row, (text, colour) in enumerate(lines):
        axes[2].text(0.0, 1.0 - 0.26 * row, text, color=colour, fontsize=9, transform=axes[2].transAxes, va="top")
    for axis in axes:
        axis.set_axis_off()


def _spread(total: int, wanted: int) -> list[int]:
    count = min(total, wanted)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _picture(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray[Any, Any]:
    """Normalised pixels (3, H, W) back to an RGB picture (H, W, 3) in [0, 1]."""
    shape = (3, 1, 1)
    image = pixels.cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def _heat(attention: Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A map (h, w) enlarged to the picture, from its smallest to its largest value."""
    heat = F.interpolate(attention.cpu().float()[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12)
    return heat.numpy()
