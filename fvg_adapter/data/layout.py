"""Where things lie in an image folder: splits, class folders, pictures and the mirrored `mask/` tree.

Only names are read, no picture is opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fvg_adapter.data.base import class_names
from fvg_adapter.data.errors import DataError, listed, suggestion
from fvg_adapter.data.images import is_image_name
from fvg_adapter.errors import FVGError
from fvg_adapter.untrusted import MAX_JSON_BYTES, read_bytes

MASK_FOLDER = "mask"
CLASSES_FILE = "classes.txt"
_SPLIT_NAMES = ("train", "val", "dev", "test", "eval")  # "validation", "test_swapped" and the like begin with one


def split_folder(root: Path, split: str | None) -> Path:
    """ROOT/<split>, or ROOT itself without a split.

    Raises:
        DataError: no such folder; names the splits that there are.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}. A folder with ROOT/<split>/<class>/<pictures> is expected.")
    if split is None:
        return root
    found = [folder.name for folder in _folders(root) if folder.name != MASK_FOLDER]
    if split not in found:
        above = root.absolute().parent
        if (above / split).is_dir() and not any(name.lower().startswith(_SPLIT_NAMES) for name in found):
            raise DataError(
                f"{root} has no split {split!r}. Did you mean the folder above, {above}? To take the class folders in "
                "it as one split, use split=None (in a command: --split .)."
            )
        raise DataError(
            f"{root} has no split {split!r}. {suggestion(split, found)} "
            "If the class folders lie in it directly, use split=None (in a command: --split .)."
        )
    return root / split


def split_names(root: Path) -> list[str]:
    """Names of the folders of a root that look like splits (train, val, test, test_swapped, …) and hold classes."""
    named = [folder for folder in _folders(root) if folder.name.lower().startswith(_SPLIT_NAMES)]
    return [folder.name for folder in named if class_folders(folder)]


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a split, sorted; a `mask` folder without pictures of its own is the mask tree."""
    names = [child.name for child in _folders(folder)]
    if MASK_FOLDER in names and not _images(folder / MASK_FOLDER):
        names.remove(MASK_FOLDER)
    return names


def resolve_classes(root: Path, split: str | None, classes: Sequence[str] | None) -> tuple[list[str], dict[str, int]]:
    """Class names in label order, and the label of each class folder of the split.

    The names are `classes`, else the lines of ROOT/classes.txt, else the sorted folder names of all splits together,
    so that every split numbers them alike. A class without a folder in this split is allowed if another split has it.

    Raises:
        DataError: no class folders; a class that no split has; a folder that no class names; two classes for a folder.
    """
    here = split_folder(root, split)
    present = class_folders(here)
    if not present:
        loose = f" {len(_images(here))} pictures lie in it directly." if _images(here) else ""
        raise DataError(f"{here} has no class folders.{loose} ROOT/<split>/<class>/<pictures> is expected.")
    anywhere = set(present) if split is None else _all_class_folders(root, here)
    names, origin = _given_names(root, classes)
    if names is None:
        names = sorted(anywhere)
    labels: dict[str, int] = {}
    absent = []
    for label, name in enumerate(names):
        folder = next((form for form in (name, name.replace(" ", "_")) if form in anywhere), None)
        if folder is None:
            absent.append(name)
        elif folder in labels:
            raise DataError(f"The classes {names[labels[folder]]!r} and {name!r} both mean the folder {folder!r}.")
        else:
            labels[folder] = label
    if absent:
        raise DataError(
            f"{len(absent)} of the classes in {origin} have no folder in {root}: {listed(absent)}. "
            f"{suggestion(absent[0], sorted(anywhere))} A folder bears the class name, spaces kept or as underscores."
        )
    unknown = [name for name in present if name not in labels]
    if unknown:
        raise DataError(
            f"{len(unknown)} folders in {here} are not among the classes in {origin}: {listed(unknown)}. "
            f"{suggestion(unknown[0], names)} Name them there, or open all classes and use keep_classes()."
        )
    return names, {folder: labels[folder] for folder in present}


def pictures(folder: Path) -> list[Path]:
    """All pictures below a class folder, in an order that is the same on every machine.

    Links are followed, also out of the root (data sets are often kept as links into a cache), each folder once; a
    picture keeps the path of its link, so that its mask is found beside the link and not at its target.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where the walk has been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if is_image_name(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


class MaskFinder:
    """Finds the mask of a picture in the trees that mirror the image tree (METHOD.md section 10).

    Looked at, in this order: ROOT/mask/<split>/<class>/, PARENT/mask/<ROOT's name>/<split>/<class>/ and
    ROOT/<split>/mask/<class>/, or in `mask_root` alone; in each the same file name, else the file name with .png behind
    it, else the same stem with another picture extension.

    Raises:
        DataError: no folder `mask_root`.
    """

    def __init__(self, root: Path, split_root: Path, mask_root: str | os.PathLike[str] | None = None) -> None:
        self._listed: dict[Path, list[str]] = {}
        if mask_root is not None:
            tree = Path(mask_root).expanduser()
            if not tree.is_dir():
                raise DataError(f"mask_root {tree} is no folder; give the folder that mirrors {root}.")
            self.trees: list[tuple[Path, Path]] = [(root, tree)]
            return
        self.trees = [
            (root, root / MASK_FOLDER),
            (root, root.parent / MASK_FOLDER / root.name),
        ]
        if split_root != root:
            self.trees.append((split_root, split_root / MASK_FOLDER))

    def find(self, picture: Path) -> Path | None:
        """The mask file of a picture, or None."""
        for origin, tree in self.trees:
            folder = tree / picture.relative_to(origin).parent
            names = self._names(folder)
            for name in (picture.name, picture.name + ".png"):
                if name in names:
                    return folder / name
            for name in names:
                # A mask that is another picture's by its full name is not this one's by its stem.
                if Path(name).stem == picture.stem and not (picture.parent / name).exists():
                    return folder / name
        return None

    def _names(self, folder: Path) -> list[str]:
        if folder not in self._listed:
            self._listed[folder] = _images(folder) if folder.is_dir() else []
        return self._listed[folder]


def _given_names(root: Path, classes: Sequence[str] | None) -> tuple[list[str] | None, str]:
    """Class names that somebody wrote down, and where."""
    file = root / CLASSES_FILE
    if classes is not None:
        return class_names(classes), "classes="
    if not file.is_file():
        return None, str(root)
    try:
        lines = read_bytes(file, MAX_JSON_BYTES, "a list of class names").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}): one class name a line is expected.") from error
    except FVGError as error:
        raise DataError(f"{file}: {error}") from error
    try:
        return class_names([line.strip() for line in lines if line.strip()]), str(file)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _all_class_folders(root: Path, here: Path) -> set[str]:
    splits = {here, *(folder for folder in _folders(root) if folder.name.lower().startswith(_SPLIT_NAMES))}
    return {name for folder in splits for name in class_folders(folder)}


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if is_image_name(child.name))
