"""Data sets changed on purpose, to learn what a figure owes to the foreground (METHOD.md: controls)."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from fvg_adapter.data.errors import DataError


class OtherMasks(Dataset[dict[str, Any]]):
    """A data set in which images carry another image's mask, augmented on its own.

    Args:
        dataset: items with "foreground_mask", `classes` and `labels`.
        seed: of the pairing, one random cycle through the chosen images, so that none of them keeps its own mask.
        share: of the images that are chosen, in [0, 1]; all by default.

    Attributes:
        other: {index of an image: index of the image whose mask it carries}, of the chosen images.

    Raises:
        DataError: a share outside [0, 1]; on access, an image without a mask.
    """

    def __init__(self, dataset: Any, seed: int, share: float = 1.0) -> None:
        if not 0 <= share <= 1:
            raise DataError(f"share must lie in [0, 1], but is {share}.")
        self.dataset: Any = dataset
        self.classes: list[str] = dataset.classes
        self.labels: list[int] = dataset.labels
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        chosen = order[: round(share * len(order))]
        self.other: dict[int, int] = dict(zip(chosen.tolist(), chosen.roll(1).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self.other:
            item: dict[str, Any] = self.dataset[index]
            return item
        item, other = self.dataset[index], self.dataset[self.other[index]]
        if "foreground_mask" not in item or "foreground_mask" not in other:
            raise DataError(f"shuffled masks need a mask for every image, but image {index} or its partner has none.")
        return {**item, "foreground_mask": other["foreground_mask"]}
