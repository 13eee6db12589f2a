"""Data sets changed on purpose, to learn what a figure owes to the foreground (METHOD.md: controls)."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from fvg_adapter.data.errors import DataError


class OtherMasks(Dataset[dict[str, Any]]):
    """A data set in which every image carries another image's mask, augmented on its own.

    Args:
        dataset: items with "foreground_mask", `classes` and `labels`.
        seed: of the pairing, one random cycle through all images, so that no image keeps its own mask.

    Raises:
        DataError: on access, an image without a mask.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.classes, self.labels = dataset, dataset.classes, dataset.labels
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        self.other = dict(zip(order.tolist(), order.roll(1).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, other = self.dataset[index], self.dataset[self.other[index]]
        if "foreground_mask" not in item or "foreground_mask" not in other:
            raise DataError(f"shuffled masks need a mask for every image, but image {index} or its partner has none.")
        return {**item, "foreground_mask": other["foreground_mask"]}
