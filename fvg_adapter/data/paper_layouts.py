"""How the lists of the paper's data sets are read: four layouts, and class names that are told apart.

A list gives (file, label) in order, and the name of each label.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvg_adapter.data.errors import ClassNameWarning, DataError, DataFileError, listed
from fvg_adapter.data.files import Files
from fvg_adapter.data.images import is_image_name

Listing = tuple[list[tuple[str, int]], dict[int, str]]
"""(file, label) in order, and the name of each label."""


@dataclass(frozen=True)
class PaperSet:
    """What is particular to one data set.

    Attributes:
        name: Dassl's, as in "OxfordPets". folders: names of its folder in CoOp and in the release, CoOp's first.
        images: names of the folder with the pictures in it. inside: folders that lie in that one, where its name is "".
        layout: "split" (a split_zhou JSON), "lines" (a text file a split), "folders" (a folder a synset), "numbers" (a
            folder a label). listing: file with the splits or the class names. class_list: file with names, for "lines".
        parts: folder of each split, for "folders" and "numbers".
        classes, sizes: how many classes and pictures there are (CoOp, table 6; the variants' own papers).
        renamed: class names that CoOp replaces. variant_of: the set whose classes a test-only set shares.
    """

    name: str
    folders: Sequence[str]
    images: Sequence[str]
    layout: str
    listing: str
    classes: int
    sizes: Mapping[str, int]
    inside: Sequence[str] = ()
    class_list: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    variant_of: str | None = None


@dataclass(frozen=True)
class Reading:
    """One split about to be listed."""

    files: Files
    images: str
    listing: str
    split: str
    set: PaperSet

    def below(self, file: str) -> str:
        """A picture's name from the top of the tree."""
        parts = file.split("/")
        if file.startswith("/") or ".." in parts or "\\" in file:
            raise DataError(f"{self.listing!r} names {file!r}, which does not lie below its own pictures.")
        return f"{self.images}/{file}"


def _from_split(reading: Reading) -> Listing:
    """CoOp's split_zhou JSON: {"train": [[file, label, class name], …], "val": …, "test": …}; names from all splits."""
    try:
        record = json.loads(reading.files.text(reading.listing))
        rows = {split: [(str(f), int(y), c) for f, y, c in record[split]] for split in ("train", "val", "test")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataFileError(
            f"{reading.listing!r} in {reading.files.name} is no split file of CoOp's: lists train, val and test of "
            f"[file, label, class name] are expected ({type(error).__name__}: {error})."
        ) from error
    names: dict[int, str] = {}
    for split in rows:
        for file, label, name in rows[split]:
            if names.setdefault(label, name) != name:
                raise DataError(
                    f"{reading.listing!r} calls label {label} both {names[label]!r} and {name!r} ({file!r}, {split})."
                )
    return [(reading.below(file), label) for file, label, _ in rows[reading.split]], names


def _from_lines(reading: Reading) -> Listing:
    """FGVC Aircraft: "<number> <class name>" a line, classes numbered by another file."""
    place = reading.listing.rpartition("/")[0]
    source = f"{place}/{reading.set.class_list}".strip("/")
    names = [line.strip() for line in reading.files.text(source).splitlines() if line.strip()]
    number = {name: label for label, name in enumerate(names)}
    entries = []
    for line in reading.files.text(reading.listing).splitlines():
        if not line.strip():
            continue
        picture, _, name = line.strip().partition(" ")
        if name not in number:
            raise DataError(f"{reading.listing!r} names the class {name!r}, which is not in {source!r}.")
        entries.append((reading.below(f"{picture}.jpg"), number[name]))
    return entries, dict(enumerate(names))


def _from_folders(reading: Reading) -> Listing:
    """ImageNet: a folder a synset, labels by sorted folder name, class names by synset."""
    words = _synset_names(reading)
    part = f"{reading.images}/{reading.set.parts[reading.split]}".rstrip("/")
    folders = sorted(reading.files.folders(part))
    unknown = [folder for folder in folders if folder not in words]
    if unknown:
        raise DataError(
            f"{len(unknown)} folders in {part!r} have no class name in {reading.listing!r}: {listed(unknown)}."
        )
    if not folders:
        raise DataFileError(f"{part!r} in {reading.files.name} has no class folders.")
    return _of_folders(reading, part, folders), {label: words[folder] for label, folder in enumerate(folders)}


def _from_numbers(reading: Reading) -> Listing:
    """ImageNetV2: a folder a label, class names in the order of the list."""
    words = list(_synset_names(reading).values())
    folders = [str(label) for label in range(len(words))]
    absent = sorted(set(folders) - reading.files.folders(reading.images), key=int)
    if absent:
        raise DataFileError(f"{reading.images!r} in {reading.files.name} lacks the folders of labels {listed(absent)}.")
    return _of_folders(reading, reading.images, folders), dict(enumerate(words))


def _of_folders(reading: Reading, part: str, folders: Sequence[str]) -> list[tuple[str, int]]:
    entries = []
    for label, folder in enumerate(folders):
        names = sorted(filter(is_image_name, reading.files.content(f"{part}/{folder}")[1]))
        if not names:
            raise DataFileError(f"the class folder {part}/{folder!s} in {reading.files.name} holds no pictures.")
        entries += [(f"{part}/{folder}/{name}", label) for name in names]
    return entries


def _synset_names(reading: Reading) -> dict[str, str]:
    """classnames.txt: "n01440764 tench" a line."""
    names = {}
    for number, line in enumerate(reading.files.text(reading.listing).splitlines(), 1):
        synset, _, name = line.strip().partition(" ")
        if synset and not name.strip():
            raise DataError(
                f"{reading.listing!r}, line {number}: {line!r} has no class name; 'n01440764 tench' is expected."
            )
        if synset:
            names[synset] = name.strip()
    return names


LAYOUTS: Mapping[str, Callable[[Reading], Listing]] = {
    "split": _from_split,
    "lines": _from_lines,
    "folders": _from_folders,
    "numbers": _from_numbers,
}
"""Readers by `PaperSet.layout`."""


def names_in_order(names: Mapping[int, Any], found: PaperSet, origin: str) -> list[str]:
    """Names in label order, CoOp's replacements made, and told apart where two classes share one."""
    gaps = sorted(set(range(len(names))) - set(names))
    if gaps:
        raise DataError(
            f"{origin} has {len(names)} classes but no label {listed(gaps)}; labels count from 0 without gaps."
        )
    result: list[str] = []
    seen: dict[str, int] = {}
    for label in range(len(names)):
        name = names[label]
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise DataError(f"{origin} calls label {label} {name!r}; a class name of printable characters is expected.")
        name = found.renamed.get(name, name).strip()
        plain = name.replace("_", " ")
        if plain in seen:
            both = f"the labels {seen[plain]} and {label} both {name!r}"
            warnings.warn(
                f"{origin} calls {both}; the second is '{name} ({label})' here.", ClassNameWarning, stacklevel=3
            )
            name = f"{name} ({label})"
        seen.setdefault(plain, label)
        result.append(name)
    return result
