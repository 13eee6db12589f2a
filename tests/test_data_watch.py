"""What only many masks together show, links, and mask trees elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fvg_adapter.data import DataError, MaskedImageFolder, SuspiciousMasksWarning
from fvg_adapter.data.images import DecodedMask
from fvg_adapter.data.watch import looks_inverted


def mask_array(size: tuple[int, int] = (24, 32)) -> Any:
    mask = np.zeros(size, np.uint8)
    mask[6:18, 8:24] = 255
    return mask


def folder(root: Path, count: int, odd: int, make: Any) -> Path:
    """Pictures of one class, of whose masks some are odd."""
    for i in range(count):
        picture, mask = root / "train" / "cat" / f"{i:02}.png", root / "mask" / "train" / "cat" / f"{i:02}.png"
        for path in (picture, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(picture)
        Image.fromarray(make(mask_array()) if i < odd else mask_array()).save(mask)
    return root


def said_about(root: Path) -> list[str]:
    data = MaskedImageFolder(root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for i in range(len(data)):
                data.raw(i)
        data.subset(range(len(data))).check()
    return [str(w.message) for w in caught if issubclass(w.category, SuspiciousMasksWarning)]


ODD = {
    "inverted": (lambda mask: 255 - mask, "cover the border"),
    "stretched": (lambda mask: mask[:, 4:28], "other proportions"),
    "dark": (lambda mask: mask // 255 * np.uint8(20), "label numbers"),
}


@pytest.mark.parametrize("kind", ODD)
def test_most_masks_odd_is_said_once_with_counts(tmp_path: Path, kind: str) -> None:
    make, words = ODD[kind]
    said = said_about(folder(tmp_path / "many", 40, 30, make))
    assert len(said) == 1 and words in said[0] and said[0].startswith("30 of the first 32 foreground masks")
    few = said_about(folder(tmp_path / "few", 3, 2, make))
    assert len(few) == 1 and few[0].startswith("2 of the first 3 ")
    assert said_about(folder(tmp_path / "fine", 6, 3, make)) == []  # half is not most


def test_a_picture_that_is_looked_at_often_counts_once(tmp_path: Path) -> None:
    data = MaskedImageFolder(folder(tmp_path, 40, 1, ODD["inverted"][0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            data.raw(0)
    assert data._watch is not None and data._watch.seen == 1


def test_masks_of_another_resolution_are_not_odd(tmp_path: Path) -> None:
    assert said_about(folder(tmp_path, 4, 4, lambda mask: np.kron(mask, np.ones((2, 2), np.uint8)))) == []
    assert said_about(folder(tmp_path / "b", 4, 4, lambda mask: mask[::5, ::5])) == []  # 5 by 7: rounding


def test_what_looks_inverted() -> None:
    def looks(mask: Any) -> bool:
        return looks_inverted(DecodedMask(Image.fromarray(mask.astype(np.uint8))))

    mask = mask_array()
    assert looks(255 - mask) and not looks(mask)
    assert not looks(np.full((24, 32), 255)) and not looks(np.zeros((24, 32)))
    assert not looks(np.full((1, 1), 255)) and not looks(np.full((2, 500), 255))


def test_links_out_of_the_root_keep_their_own_masks(tmp_path: Path) -> None:
    elsewhere = tmp_path / "cache"
    elsewhere.mkdir()
    for i in (0, 1):
        Image.new("RGB", (8, 8), (i * 200, 0, 0)).save(elsewhere / f"blob{i}.png")
    Image.new("L", (8, 8), 255).save(elsewhere / "mask.png")
    root = tmp_path / "pets"
    for place in ("train/cat", "train/dog", "mask/train/cat"):
        (root / place).mkdir(parents=True)
    (root / "train/cat/a.png").symlink_to(elsewhere / "blob0.png")
    (root / "train/dog/a.png").symlink_to(elsewhere / "blob1.png")
    (root / "mask/train/cat/a.png").symlink_to(elsewhere / "mask.png")
    (root / "train/cat/more").symlink_to(root / "train/cat")  # a circle
    (root / "train/dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    data = MaskedImageFolder(root, masks="optional")
    assert [s.image.relative_to(root).as_posix() for s in data.samples] == [
        "train/cat/a.png",
        "train/dog/a.png",
        "train/dog/gone.png",
    ]
    assert data.raw(0)["mask"].getextrema() == (255, 255) and data.raw(1)["mask"] is None
    assert data.raw(1)["image"].getpixel((0, 0)) == (200, 0, 0)
    assert [p.index for p in data.check()] == [2] and "gone.png" in data.check()[0].reason


def test_a_mask_tree_elsewhere(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", 3, 0, None)
    (root / "mask").rename(tmp_path / "made")
    with pytest.raises(DataError, match="no foreground mask"):
        MaskedImageFolder(root)
    data = MaskedImageFolder(root, mask_root=tmp_path / "made")
    assert np.array_equal(data.raw(1)["mask"], mask_array())
    with pytest.raises(DataError, match="mask_root .*nowhere is no folder"):
        MaskedImageFolder(root, mask_root=tmp_path / "nowhere")


def test_a_mask_may_bear_the_whole_file_name(tmp_path: Path) -> None:
    """Two pictures that differ in their extension only keep their masks apart."""
    for kind in ("jpg", "png"):
        path = tmp_path / "train" / "cat" / f"a.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
        mask = tmp_path / "mask" / "train" / "cat" / f"a.{kind}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255 if kind == "jpg" else 0).save(mask)
    data = MaskedImageFolder(tmp_path)
    assert [(s.image.name, s.mask.name) for s in data.samples if s.mask] == [
        ("a.jpg", "a.jpg.png"),
        ("a.png", "a.png.png"),
    ]
