"""An image folder with a mirrored folder of masks: the layout of the authors' release (METHOD.md section 10)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fvg_adapter.data.base import MaskedDataset, Transform, check_masks_policy
from fvg_adapter.data.errors import DataError, DataFileError, listed
from fvg_adapter.data.images import read_picture
from fvg_adapter.data.layout import MaskFinder, pictures, resolve_classes, split_folder


@dataclass(frozen=True)
class Sample:
    """A picture file, its label, and its mask file if there is one."""

    image: Path
    label: int
    mask: Path | None = None


class MaskedImageFolder(MaskedDataset):
    """Pictures in ROOT/<split>/<class>/, masks of the same file name in ROOT/mask/<split>/<class>/.

    The masks may also lie in PARENT/mask/<ROOT's name>/<split>/<class>/ or bear another picture extension. Only names
    are read here; pictures are opened when an item is asked for. Links are followed, also out of ROOT, and each to a
    folder once: a linked picture counts as where the link lies, and its mask is looked for there, not at its target.

    Args:
        root: the folder ROOT.
        split: name of the split folder; None if the class folders lie in ROOT.
        masks: "require" (every picture must have one), "optional" (as far as there are any) or "none" (not looked for).
        mask_root: the folder that mirrors ROOT, if the masks lie elsewhere; then nowhere else is looked.
        transform: see PairedTransform; without one, items are raw.
        classes: class names in label order; else ROOT/classes.txt, one a line; else the sorted folder names of all
            splits. A folder bears the class name literally or with underscores for spaces.

    Attributes:
        root: absolute path of ROOT.
        samples: list of Sample, ordered by label and file name, the same on every machine.
        classes, labels, transform, has_masks: see MaskedDataset.

    Raises:
        DataError: no such folder or split, class folders and class names that do not match, no pictures.
        DataFileError: masks="require" and a mask is missing; counts them and says where it looked.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = "train",
        *,
        masks: str = "require",
        mask_root: str | os.PathLike[str] | None = None,
        transform: Transform | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        check_masks_policy(masks)
        self.root: Path = Path(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100 (resolve() would follow links)
        self.transform = transform
        here = split_folder(self.root, split)
        self.classes: list[str]
        self.classes, labels = resolve_classes(self.root, split, classes)
        by_label = sorted((label, folder) for folder, label in labels.items())
        self.samples: list[Sample] = [
            Sample(path, label) for label, folder in by_label for path in pictures(here / folder)
        ]
        if not self.samples:
            raise DataError(f"The {len(labels)} class folders in {here} hold no pictures: {listed(sorted(labels))}.")
        if masks != "none":
            self._find_masks(MaskFinder(self.root, here, mask_root), required=masks == "require")
        self.has_masks: bool = any(sample.mask is not None for sample in self.samples)
        self.labels: list[int] = [sample.label for sample in self.samples]

    def raw(self, index: int) -> dict[str, Any]:
        """See MaskedDataset.raw; "path" is the picture's file."""
        sample = self.samples[index]
        picture = read_picture(sample.image, str(sample.image))
        mask = None if sample.mask is None else self._decoded(sample.mask, str(sample.mask), picture)
        return {"image": picture.image, "label": sample.label, "mask": mask, "path": str(sample.image)}

    def without_masks(self) -> list[str]:
        """Files of the pictures that have no mask file, below the root."""
        return [str(sample.image.relative_to(self.root)) for sample in self.samples if sample.mask is None]

    def _path(self, index: int) -> str:
        return str(self.samples[index].image)

    def _keep(self, indices: list[int]) -> None:
        kept = [self.samples[index] for index in indices]
        self.samples = [replace(sample, label=label) for sample, label in zip(kept, self.labels, strict=True)]

    def _find_masks(self, finder: MaskFinder, required: bool) -> None:
        self.samples = [replace(sample, mask=finder.find(sample.image)) for sample in self.samples]
        missing = self.without_masks()
        if missing and required:
            trees = " and ".join(str(tree) for _, tree in finder.trees)
            raise DataFileError(
                f"{len(missing)} of {len(self.samples)} pictures have no foreground mask: {listed(missing)}. Masks "
                f"mirror the picture tree with the same file names; looked below {trees}. Add them, or open the data "
                'set with masks="optional" (pictures without one count as having no usable mask), or with masks="none" '
                'and let the model find the foreground (foreground="attention").'
            )
