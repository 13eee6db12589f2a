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
from fvg_adapter.data.files import Files
from fvg_adapter.data.folder import MaskedImageFolder
from fvg_adapter.data.hub import load_hub
from fvg_adapter.data.paper_sets import laid_out, open_paper_set, paper_set


def open_dataset(
    source: str | os.PathLike[str] | Files, split: str | None, *, dataset: str | None = None, **options: Any
) -> MaskedDataset:
    """An image folder if `source` is a path, otherwise a data set from the Hub.

    A folder of CoOp's layout (a data set of the paper, with its split file) is read as `open_paper_set` does; any other
    one as a MaskedImageFolder.

    Args:
        source: path of a folder, the id of a data set, or the Files of the authors' release.
        split: name of the split; None only for folders.
        dataset: which data set of the paper it is, as in "oxford_pets"; by the folder's name if it is not given.
        options: masks, transform, classes for folders; the column names and load options of load_hub for the Hub.

    Raises:
        DataError: a path that does not exist, or whatever they raise.
    """
    if isinstance(source, Files):
        return open_paper_set(source, dataset or "", split or "", **options)
    name = os.fspath(source)
    folder = Path(name).expanduser()
    known = dataset or Path(os.path.abspath(folder)).name  # noqa: PTH100
    if split is not None and laid_out(folder, known):
        return open_paper_set(folder, known, split, **options)
    if split is not None and _lacks_something(folder, split, known, dataset is not None):
        return open_paper_set(folder, known, split, **options)  # which says what
    if isinstance(source, os.PathLike) or folder.exists() or _looks_like_a_path(name):
        return MaskedImageFolder(folder, split, **options)
    if split is None:
        raise DataError(f"{name!r} is no folder here, and a data set from the Hub needs the name of a split.")
    try:
        return load_hub(name, split, **options)
    except DataError as error:
        raise DataError(f"{error} (There is no folder {name!r} here either.)") from error


def _lacks_something(folder: Path, split: str, known: str, said: bool) -> bool:
    """Whether this is meant to be a data set of the paper, as one can tell from what was said or what is there."""
    found = paper_set(known)
    if found is None or not folder.is_dir() or (folder / split).is_dir():
        return False
    return said or any(name and (folder / name).is_dir() for name in found.images)


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
