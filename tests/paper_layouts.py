"""Small folders that imitate the paper's data sets exactly: names, case, nesting, order of lists, JPEG masks.

For tests only. Two pictures a class and split, two to four classes; pictures are drawn from their name, so that every
machine makes the same ones.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLITS = ("train", "val", "test")
Rows = dict[str, list[list[Any]]]

# CoOp's folder, and the release's nested one: (top folder of the release, folders down to CoOp's files)
NESTED = {
    "ImageNet": ("imagenet-1k", "imagenet"),
    "Caltech101": ("caltech-101", "caltech-101"),
    "Food101": ("food101", "food-101"),
    "StanfordCars": ("stanford_cars", "stanford_cars"),
    "OxfordPets": ("oxford_pets", "oxford_pets"),
    "OxfordFlowers": ("flowers-102", "oxford_flowers"),
    "DescribableTextures": ("dtd", "dtd/dtd"),
    "EuroSAT": ("eurosat", "eurosat"),
    "FGVCAircraft": ("fgvc_aircraft", "fgvc-aircraft-2013b/fgvc_aircraft"),
    "SUN397": ("sun-397", "sun397"),
    "UCF101": ("ucf101", "ucf101"),
}


def picture(path: Path, size: tuple[int, int] = (36, 28)) -> None:
    """A JPEG with a bright rectangle on noise."""
    random = np.random.default_rng(zlib.crc32("/".join(path.parts[-2:]).encode()))
    pixels = random.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    pixels[6:20, 8:26] = random.integers(120, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=90)


def mask(path: Path, size: tuple[int, int] = (36, 28)) -> None:
    """The rectangle, white on black, as an RGB JPEG with its noise."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[6:20, 8:26] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=60)


def _split_file(folder: Path, suffix: str, rows: Rows) -> None:
    (folder / f"split_zhou_{suffix}.json").write_text(json.dumps(rows), encoding="utf-8")


def _rows(classes: Sequence[str], file: Callable[[str, str, int, int], str]) -> Rows:
    """Lists in an order that is neither alphabetical nor class by class, as CoOp's are: the last class comes first."""
    numbers = {"train": (3, 1, 2), "val": (5, 4), "test": (9, 7)}
    order = [len(classes) - 1, *range(len(classes) - 1)]
    return {
        split: [[file(split, classes[y], y, n), y, classes[y]] for n in numbers[split] for y in order]
        for split in SPLITS
    }


def _listed(folder: Path, images: str, suffix: str, rows: Rows) -> list[Path]:
    _split_file(folder, suffix, rows)
    return [folder / images / file for split in SPLITS for file, _, _ in rows[split]]


def caltech101(folder: Path) -> list[Path]:
    rows = _rows(["face", "leopard", "inline_skate"], lambda s, c, y, n: "")
    folders = ["Faces", "Leopards", "inline_skate"]
    for split in SPLITS:
        for count, row in enumerate(rows[split]):
            row[0] = f"{folders[row[1]]}/image_{1000 * SPLITS.index(split) + count:04d}.jpg"
    return _listed(folder, "101_ObjectCategories", "Caltech101", rows)


def oxford_pets(folder: Path) -> list[Path]:
    def file(split: str, name: str, label: int, n: int) -> str:
        shown = name.capitalize() if name in ("abyssinian", "bengal") else name  # cats begin with a capital
        return f"{shown}_{n}.jpg"

    return _listed(folder, "images", "OxfordPets", _rows(["abyssinian", "american_bulldog", "bengal", "pug"], file))


def stanford_cars(folder: Path) -> list[Path]:
    classes = ["2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 Ram C/V Cargo Van Minivan"]
    rows = _rows(classes, lambda s, c, y, n: f"{'cars_test' if s == 'test' else 'cars_train'}/{100 * y + n:05d}.jpg")
    return _listed(folder, "", "StanfordCars", rows)


def oxford_flowers(folder: Path) -> list[Path]:
    classes = ["pink primrose", "bird of paradise", "colt's foot"]
    return _listed(folder, "jpg", "OxfordFlowers", _rows(classes, lambda s, c, y, n: f"image_{100 * y + n:05d}.jpg"))


def food101(folder: Path) -> list[Path]:
    rows = _rows(["apple_pie", "baby_back_ribs", "waffles"], lambda s, c, y, n: f"{c}/{10000 * y + n}.jpg")
    return _listed(folder, "images", "Food101", rows)


def sun397(folder: Path) -> list[Path]:
    places = {
        "abbey": "a/abbey",
        "outdoor apartment building": "a/apartment_building/outdoor",
        "zen_garden": "z/zen_garden",
    }
    rows = _rows(list(places), lambda s, c, y, n: f"{places[c]}/sun_{10000 * y + n:016d}.jpg")
    return _listed(folder, "SUN397", "SUN397", rows)


def dtd(folder: Path) -> list[Path]:
    rows = _rows(["banded", "polka-dotted", "zigzagged"], lambda s, c, y, n: f"{c}/{c}_{n:04d}.jpg")
    return _listed(folder, "images", "DescribableTextures", rows)


def eurosat(folder: Path) -> list[Path]:
    stored = {"Annual Crop Land": "AnnualCrop", "Forest": "Forest", "Sea or Lake": "SeaLake"}
    rows = _rows(list(stored), lambda s, c, y, n: f"{stored[c]}/{stored[c]}_{n}.jpg")
    return _listed(folder, "2750", "EuroSAT", rows)


def ucf101(folder: Path) -> list[Path]:
    rows = _rows(["Apply_Eye_Makeup", "Yo_Yo"], lambda s, c, y, n: f"{c}/v_{c.replace('_', '')}_g{n:02d}_c01.jpg")
    return _listed(folder, "UCF-101-midframes", "UCF101", rows)


def fgvc_aircraft(folder: Path) -> list[Path]:
    classes = ["707-320", "737-200", "F/A-18"]
    (folder / "variants.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    rows = _rows(classes, lambda s, c, y, n: f"{1000000 + 100 * y + n}")
    for split in SPLITS:
        lines = [f"{number} {name}" for number, _, name in rows[split]]
        (folder / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [folder / "images" / f"{number}.jpg" for split in SPLITS for number, _, _ in rows[split]]


SYNSETS = {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane", "n03126707": "crane bird"}


def classnames(folder: Path, words: Mapping[str, str] = SYNSETS) -> None:
    """classnames.txt."""
    text = "".join(f"{synset} {name}\n" for synset, name in words.items())
    (folder / "classnames.txt").write_text(text, encoding="utf-8")


def imagenet(folder: Path) -> list[Path]:
    classnames(folder)
    train = [folder / "images/train" / s / f"{s}_{n}.JPEG" for s in SYNSETS for n in (10026, 10027, 9)]
    val = [folder / "images/val" / s / f"ILSVRC2012_val_{i}{n:07d}.JPEG" for i, s in enumerate(SYNSETS) for n in (1, 2)]
    return train + val


def imagenetv2(folder: Path) -> list[Path]:
    classnames(folder)
    root = folder / "imagenetv2-matched-frequency-format-val"
    return [root / str(label) / f"{n:040x}.jpeg" for label in range(len(SYNSETS)) for n in (1, 2)]


def imagenet_sketch(folder: Path) -> list[Path]:
    classnames(folder)
    return [folder / "images" / s / f"sketch_{n}.JPEG" for s in SYNSETS for n in (1, 2)]


def imagenet_a(folder: Path) -> list[Path]:
    classnames(folder)
    (folder / "imagenet-a").mkdir(parents=True, exist_ok=True)
    (folder / "imagenet-a/README.txt").write_text("not a class", encoding="utf-8")
    return [folder / "imagenet-a" / s / f"0.00{n}_{s}.jpg" for s in list(SYNSETS)[1:3] for n in (1, 2)]


def imagenet_r(folder: Path) -> list[Path]:
    classnames(folder)
    return [folder / "imagenet-r" / s / f"art_{n}.jpg" for s in list(SYNSETS)[:2] for n in (0, 1)]


MAKERS: dict[str, tuple[str, Callable[[Path], list[Path]]]] = {
    "Caltech101": ("caltech-101", caltech101),
    "OxfordPets": ("oxford_pets", oxford_pets),
    "StanfordCars": ("stanford_cars", stanford_cars),
    "OxfordFlowers": ("oxford_flowers", oxford_flowers),
    "Food101": ("food-101", food101),
    "FGVCAircraft": ("fgvc_aircraft", fgvc_aircraft),
    "SUN397": ("sun397", sun397),
    "DescribableTextures": ("dtd", dtd),
    "EuroSAT": ("eurosat", eurosat),
    "UCF101": ("ucf101", ucf101),
    "ImageNet": ("imagenet", imagenet),
    "ImageNetV2": ("imagenetv2", imagenetv2),
    "ImageNetSketch": ("imagenet-sketch", imagenet_sketch),
    "ImageNetA": ("imagenet-adversarial", imagenet_a),
    "ImageNetR": ("imagenet-rendition", imagenet_r),
}
"""CoOp's folder, and what fills it and returns the pictures to draw."""


def make(data: Path, name: str, masks: str | None = "coop", nested: bool = False) -> Path:
    """Writes a data set below `data`, as CoOp's DATASETS.md or (nested) the release's lay it out; returns its folder.

    Args:
        masks: where the mask tree mirrors from: "coop" (ROOT/mask among CoOp's files), "outer" or "inner" (of the
            release, whose mask folder lies beside CoOp's: mask/<CoOp's folder>/… or mask/…), or None.
    """
    folder, maker = MAKERS[name]
    top = data / folder
    inner = top
    if nested:
        outer, down = NESTED[name]
        top = data / outer
        inner = top / down
    inner.mkdir(parents=True)
    for path in maker(inner):
        picture(path)
        if masks == "outer":
            mask(inner.parent / "mask" / path.relative_to(inner.parent))
        elif masks is not None:
            mask((inner if masks == "coop" else inner.parent) / "mask" / path.relative_to(inner))
    return top
