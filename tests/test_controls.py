"""Masks made wrong on purpose: which images are chosen, and whose masks they carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from fvg_adapter.data.controls import OtherMasks
from fvg_adapter.errors import FVGError


class Numbered(Dataset[dict[str, Any]]):
    """Ten images whose masks carry their numbers."""

    classes, labels = ("a", "b"), [0, 1] * 5

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"labels": self.labels[index], "foreground_mask": torch.full((1, 2, 2), float(index))}


def numbers(data: OtherMasks) -> list[int]:
    return [int(data[i]["foreground_mask"][0, 0, 0]) for i in range(len(data))]


def test_a_share_of_the_images_swap_masks_among_themselves() -> None:
    found = numbers(data := OtherMasks(Numbered(), seed=3, share=0.4))
    moved = [i for i in range(10) if found[i] != i]
    assert len(moved) == 4 and sorted(data.other) == moved
    assert sorted(found[i] for i in moved) == moved  # each mask is still carried once
    assert [data[i]["labels"] for i in range(10)] == Numbered.labels


def test_all_or_none_of_them() -> None:
    assert numbers(OtherMasks(Numbered(), seed=3, share=0.0)) == list(range(10))
    assert all(i != j for i, j in enumerate(numbers(OtherMasks(Numbered(), seed=3))))
    assert numbers(OtherMasks(Numbered(), seed=3)) != numbers(OtherMasks(Numbered(), seed=4))


def test_a_share_beyond_all_is_told() -> None:
    with pytest.raises(FVGError, match=r"share must lie in \[0, 1\], but is 1.5"):
        OtherMasks(Numbered(), seed=3, share=1.5)
