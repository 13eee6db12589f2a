"""Open a data set by path or by id, and put items together to batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvg_adapter.data.base import MaskedDataset
from fvg_adapter.data.errors import DataError
from fvg_adapter.data.folder import MaskedImageFolder
from fvg_adapter.data.hub import load_hub


def open_dataset(source: str | os.PathLike[str], split: str | None, **options: Any) -> MaskedDataset:
    """An image folder if `source` is a path, otherwise a data set from the Hub.

    Args:
        source: path of a folder (see MaskedImageFolder), or the id of a data set.
        split: name of the split; None only for folders.
        options: masks, transform, classes for both; the column names and load options of load_hub for the Hub.

    Raises:
        DataError: a path that does not exist, or whatever the two raise.
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if isinstance(source, os.PathLike) or folder.exists() or _looks_like_a_path(name):
        return MaskedImageFolder(folder, split, **options)
    if split is None:
        raise DataError(f"{name!r} is no folder here, and a data set from the Hub needs the name of a split.")
    try:
        return load_hub(name, split, **options)
    except DataError as error:
        raise DataError(f"{error} (There is no folder {name!r} here either.)") from error


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack items to a batch.

    Returns:
        `pixel_values` float32 (B, 3, H, W); `labels` int64 (B,), if the items have labels; `foreground_mask` float32
        (B, 1, H, W), if any item has one: where an item has none, zeros say that no mask is usable (METHOD.md
        section 8).

    Raises:
        DataError: no items, items without a transform, or pictures of different sizes.
    """
    if not items:
        raise DataError("A batch needs at least one item.")
    if any("pixel_values" not in item for item in items):
        raise DataError(f"Items hold {sorted(items[0])} but no pixel_values: give the data set a PairedTransform.")
    pixels = [torch.as_tensor(item["pixel_values"]) for item in items]
    sizes = sorted({tuple(pixel.shape) for pixel in pixels})
    if len(sizes) > 1:
        raise DataError(f"Pictures of one batch must have one size, but came as {sizes}: use one transform for all.")
    batch = {"pixel_values": torch.stack(pixels)}
    if all("labels" in item for item in items):
        batch["labels"] = torch.tensor([int(item["labels"]) for item in items], dtype=torch.int64)
    masks = [item.get("foreground_mask") for item in items]
    if any(mask is not None for mask in masks):
        empty = torch.zeros_like(pixels[0][:1])  # (1, H, W)
        batch["foreground_mask"] = torch.stack([empty if mask is None else torch.as_tensor(mask) for mask in masks])
    return batch


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", "/", "\\")) or name.count("/") > 1 or "\\" in name or name == ""
