"""Pictures named by a list (CoOp's split files) rather than by folders, with the masks that mirror their tree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from fvg_adapter.data.base import MaskedDataset, Transform, check_labels, check_masks_policy, class_names
from fvg_adapter.data.errors import DataFileError, listed
from fvg_adapter.data.files import Files
from fvg_adapter.data.images import read_mask, read_picture
from fvg_adapter.data.layout import MASK_FOLDER


class MirroredMasks:
    """Finds masks in every tree `D/mask/…` that mirrors the picture tree from D or from a folder below it.

    The release mirrors from the outer root (`caltech-101/mask/caltech-101/101_ObjectCategories/…`), its docstring from
    the inner one (`caltech-101/mask/101_ObjectCategories/…`); both are found (METHOD.md section 10).

    Args:
        files: the tree. images: the folder of the pictures in it.
    """

    def __init__(self, files: Files, images: str) -> None:
        self._files = files
        parts = images.split("/") if images else []
        above = ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]  # images, its parent, …, the top
        roots = [folder for folder in above if MASK_FOLDER in files.folders(folder)]
        self.trees: list[tuple[str, str]] = [
            (origin, _join(root, MASK_FOLDER)) for root in roots for origin in above if _within(origin, root)
        ]
        self._stems: dict[str, dict[str, str]] = {}

    def find(self, picture: str) -> str | None:
        """The mask of a picture: the same file name, else the same stem with another extension; None without one."""
        for number, (origin, tree) in enumerate(self.trees):
            folder, _, name = _join(tree, picture[len(origin) :].lstrip("/")).rpartition("/")
            found = name if self._files.has(f"{folder}/{name}") else self._by_stem(folder, name, picture)
            if found is not None:
                self.trees.insert(0, self.trees.pop(number))  # the next mask lies in the same tree
                return f"{folder}/{found}"
        return None

    def _by_stem(self, folder: str, name: str, picture: str) -> str | None:
        if folder not in self._stems:
            self._stems[folder] = {file.rpartition(".")[0]: file for file in sorted(self._files.content(folder)[1])}
        found = self._stems[folder].get(name.rpartition(".")[0])
        if found is None or self._files.has(_join(picture.rpartition("/")[0], found)):
            return None  # another picture's mask, by its full name
        return found


class ListedDataset(MaskedDataset):
    """Pictures by name and label; names are checked when it is opened, pictures and masks are read when asked for.

    Args:
        files: where they lie. images: the folder that holds the pictures and that masks mirror.
        entries: (file, label), in the order of the list; `files` names them from its top.
        classes: names in label order.
        masks, transform: see MaskedImageFolder.
        origin: what messages call the list.

    Attributes:
        entries: as given. digest: SHA-256 of the listing (file below `images`, label, class name), equal wherever the
            same data set lies.

    Raises:
        DataFileError: pictures that are not there; masks="require" and one is missing.
        DataError: labels without a class, names that are none.
    """

    def __init__(
        self,
        files: Files,
        images: str,
        entries: Sequence[tuple[str, int]],
        classes: Sequence[str],
        *,
        masks: str = "require",
        transform: Transform | None = None,
        origin: str = "the list",
    ) -> None:
        check_masks_policy(masks)
        self.transform = transform
        self.files: Files = files
        self.entries: list[tuple[str, int]] = list(entries)
        self.classes: list[str] = class_names(classes)
        self.labels: list[int] = [label for _, label in self.entries]
        check_labels(self.labels, self.classes)
        self._images = images
        absent = [file for file, _ in self.entries if not files.has(file)]
        if absent:
            raise DataFileError(
                f"{origin} names {len(self.entries)} pictures, of which {len(absent)} are not in {files.name}: "
                f"{listed(absent)}. Download or unpack them again; names count in exactly this case."
            )
        if not self.entries:
            raise DataFileError(f"{origin} names no pictures.")
        self._masks = None if masks == "none" else MirroredMasks(files, images)
        if masks == "require":
            self._check_masks()
        self.has_masks: bool = self._masks is not None and any(self._mask(i) for i in range(len(self.entries)))

    @property
    def digest(self) -> str:
        """SHA-256 of the listing, as 64 hexadecimal digits."""
        state = hashlib.sha256()
        start = len(self._images)
        for file, label in self.entries:
            state.update(f"{file[start:].lstrip('/')}\t{label}\t{self.classes[label]}\n".encode())
        return state.hexdigest()

    def raw(self, index: int) -> dict[str, Any]:
        """See MaskedDataset.raw; "path" is the picture's name in the tree."""
        file, _ = self.entries[index]
        picture = read_picture(self.files.path(file), file)
        found = self._mask(index)
        mask = None if found is None else read_mask(self.files.path(found), found, picture)
        return {"image": picture.image, "label": self.labels[index], "mask": mask, "path": file}

    def without_masks(self) -> list[str]:
        """Names of the pictures that have no mask file."""
        return [file for index, (file, _) in enumerate(self.entries) if self._mask(index) is None]

    def _mask(self, index: int) -> str | None:
        return None if self._masks is None else self._masks.find(self.entries[index][0])

    def _path(self, index: int) -> str:
        return self.entries[index][0]

    def _keep(self, indices: list[int]) -> None:
        self.entries = [(self.entries[index][0], label) for index, label in zip(indices, self.labels, strict=True)]

    def _check_masks(self) -> None:
        missing = self.without_masks()
        if missing:
            trees = sorted({tree for _, tree in self._masks.trees}) if self._masks is not None else []
            looked = f"below {listed(trees)}" if trees else f"for a folder {MASK_FOLDER!r} above {self._images!r}"
            raise DataFileError(
                f"{len(missing)} of {len(self.entries)} pictures have no foreground mask: {listed(missing)}; looked "
                f'{looked} in {self.files.name}. Add them, or open the data set with masks="optional" (pictures '
                'without one count as having no usable mask) or masks="none".'
            )


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _within(folder: str, root: str) -> bool:
    """Whether a folder is `root` or lies in it."""
    return not root or folder == root or folder.startswith(f"{root}/")
