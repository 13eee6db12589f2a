"""A contact sheet: pictures with their masks on one page, the doubtful ones last. PIL only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.Image import Image as PILImage

from fvg_adapter.data import MaskedImageFolder
from fvg_adapter.replacing import written

_SIDE, _CAPTION, _COLUMNS, _GAP = 132, 26, 8, 4
_OUTLINE = (228, 0, 124)


def contact_sheet(
    datasets: Sequence[MaskedImageFolder],
    areas: Mapping[str, float],
    path: Path,
    *,
    pictures: int = 32,
    doubtful: int = 16,
    usable_area: tuple[float, float] = (0.02, 0.98),
) -> Path:
    """Writes a page of pictures: what the masks leave out is dimmed, their outline drawn.

    Args:
        datasets: opened with the masks. areas: share of each mask by its picture's path below the root.
        path: the PNG. pictures: spread evenly over the data. doubtful: at most so many more whose mask is
            unusable.
        usable_area: outside it a mask is unusable.

    Returns:
        The path.
    """
    places = [
        (data, i, sample.image.relative_to(data.root).as_posix())
        for data in datasets
        for i, sample in enumerate(data.samples)
    ]
    known = [place for place in places if place[2] in areas]
    count = min(pictures, len(known))
    chosen = [known[(2 * k + 1) * len(known) // (2 * count)] for k in range(count)]
    bad = [p for p in known if not usable_area[0] <= areas[p[2]] <= usable_area[1] and p not in chosen]
    few = min(doubtful, len(bad))
    chosen += [bad[k * len(bad) // few] for k in range(few)]
    rows = max(1, -(-len(chosen) // _COLUMNS))
    cell = _SIDE + _GAP, _SIDE + _CAPTION + _GAP
    page = Image.new("RGB", (_COLUMNS * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    pen = ImageDraw.Draw(page)
    for k, (data, index, name) in enumerate(chosen):
        raw = data.raw(index)
        left, top = _GAP + k % _COLUMNS * cell[0], _GAP + k // _COLUMNS * cell[1]
        small = shown(raw["image"], raw["mask"], _SIDE)
        page.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
        area = areas[name]
        doubt = "" if usable_area[0] <= area <= usable_area[1] else "empty " if area == 0 else "unusable "
        label = data.classes[raw["label"]][:20]
        pen.text((left, top + _SIDE), _plain(label), fill="black")
        pen.text((left, top + _SIDE + 12), f"{doubt}{100 * area:.1f} %", fill=_OUTLINE if doubt else "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        page.save(file, "PNG")
    return path


def shown(picture: PILImage, mask: PILImage | None, side: int) -> PILImage:
    """A small picture whose background is dimmed, with the outline of its mask."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)).astype(float)  # (h, w, 3)
    if mask is None:
        return Image.fromarray(small.astype(np.uint8))
    inside = np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 127  # (h, w)
    small = np.where(inside[..., None], small, 0.3 * small + 0.7 * 255 * 0.5)
    padded = np.pad(inside, 1, mode="edge")
    near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    small[near & ~inside] = _OUTLINE
    return Image.fromarray(small.astype(np.uint8))


def _plain(text: str) -> str:
    """What PIL's own font can draw."""
    return text.encode("latin-1", "replace").decode("latin-1")
