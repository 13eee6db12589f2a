"""What every data set of this package has in common: pictures with masks, labels, class names and cheap subsets."""

from __future__ import annotations

import copy
import operator
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL.Image import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset

from fvg_adapter.data.errors import DataError, DataFileError, UnreadableImageWarning, listed, suggestion
from fvg_adapter.data.images import Picture, decode_mask
from fvg_adapter.data.splits import select_classes
from fvg_adapter.data.watch import MaskWatch

MASK_POLICIES = ("require", "optional", "none")

Transform = Callable[[PILImage, "PILImage | None"], Mapping[str, Any]]
Self = TypeVar("Self", bound="MaskedDataset")


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be read: its index, its picture, and why."""

    index: int
    path: str
    reason: str


class MaskedDataset(Dataset[dict[str, Any]], ABC):
    """Pictures with labels and, where there are any, foreground masks; nothing is decoded before it is asked for.

    An item is what the transform makes of picture and mask, with the label:
    `{"pixel_values": float32 (3, H, W), "labels": int, "foreground_mask": float32 (1, H, W)}`. In a data set that has
    masks at all, an item whose own mask is missing carries an all-zero one (no usable mask, METHOD.md section 8), so
    that an item does not depend on the batch in which it travels. Without a transform an item is `raw(index)`.

    Unreadable pictures: nothing is ever replaced in silence. An item that cannot be decoded raises
    UnreadableImageError; `check()` decodes everything once and lists what fails; `drop_unreadable()` is the data set
    without it, with one named warning. Masks that decode but look wrong (most of the first 32 inverted, of other
    proportions than their pictures, or label numbers) are named in one SuspiciousMasksWarning.

    Attributes:
        classes: class names, `classes[i]` of label i.
        labels: label of each sample, known without decoding.
        transform: callable of (picture, mask or None), or None.
        has_masks: whether the data set as it was opened has any mask; subsets keep it.
        unreadable: what `drop_unreadable` left out.
    """

    classes: list[str]
    labels: list[int]
    transform: Transform | None
    has_masks: bool
    unreadable: tuple[Problem, ...] = ()
    _watch: MaskWatch | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The item: transformed if there is a transform, else raw. IndexError past the end."""
        if self.transform is None:
            return self.raw(index)
        return self._item(index, self.transform)

    @abstractmethod
    def raw(self, index: int) -> dict[str, Any]:
        """`{"image": RGB PIL, "label": int, "mask": "L" PIL of the same size with 0 and 255, or None, "path": str}`.

        Raises:
            UnreadableImageError: the picture or its mask cannot be decoded.
        """

    @abstractmethod
    def _path(self, index: int) -> str:
        """What to call a sample in messages."""

    @abstractmethod
    def _keep(self, indices: list[int]) -> None:
        """Reduce whatever the subclass holds for each sample."""

    def _decoded(self, stored: Any, name: str, picture: Picture) -> PILImage:
        """The decoded mask of a picture; see `data.images.read_mask`. Warns once if most masks look wrong."""
        mask = decode_mask(stored, name, picture)
        if self._watch is None:
            self._watch = MaskWatch(len(self))
        self._watch.see(name, mask)
        return mask.image

    def view(self, index: int, key: int) -> dict[str, Any]:
        """The item under the transform's view number `key`: repeatable, whatever the order or the worker.

        Raises:
            DataError: the transform has no `view` (PairedTransform has).
        """
        view = getattr(self.transform, "view", None)
        if view is None:
            raise DataError("view() needs a transform with numbered views: give the data set a PairedTransform.")
        return self._item(index, lambda image, mask: view(image, mask, key))

    def _item(self, index: int, transform: Transform) -> dict[str, Any]:
        raw = self.raw(index)
        item = {**transform(raw["image"], raw["mask"]), "labels": raw["label"]}
        pixels = item.get("pixel_values")
        if self.has_masks and "foreground_mask" not in item and isinstance(pixels, Tensor):
            item["foreground_mask"] = torch.zeros_like(pixels[:1])  # (1, H, W)
        return item

    def subset(
        self: Self,
        indices: Sequence[int],
        new_labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> Self:
        """These samples in this order, optionally with other labels and class names; shares everything else.

        Args:
            indices: positions, each in [0, len).
            new_labels: label of each kept sample; needs `classes`, whose numbering it follows.
            classes: class names of the subset.

        Raises:
            DataError: an index or a label out of range, lists of different lengths, new labels without class names.
        """
        chosen = [operator.index(index) for index in indices]
        outside = [index for index in chosen if not 0 <= index < len(self)]
        if outside:
            raise DataError(f"Indices {listed(outside)} lie outside a data set of {len(self)} samples.")
        if new_labels is not None and classes is None:
            raise DataError("New labels need the class names that they number: give classes= as well.")
        if new_labels is not None and len(new_labels) != len(chosen):
            raise DataError(f"{len(chosen)} indices came with {len(new_labels)} new labels; one for each is expected.")
        part = copy.copy(self)
        part.classes = class_names(self.classes if classes is None else classes)
        part.labels = [self.labels[i] for i in chosen] if new_labels is None else [int(label) for label in new_labels]
        check_labels(part.labels, part.classes)
        part._keep(chosen)
        return part

    def keep_classes(self: Self, wanted: Sequence[int]) -> Self:
        """The samples of these labels, renumbered from 0 in the order of `wanted` (see base_new_split).

        Raises:
            DataError: a label that the data set does not have, or one given twice.
        """
        outside = [label for label in wanted if not 0 <= label < len(self.classes)]
        if outside:
            raise DataError(f"Labels {listed(outside)} do not exist: there are {len(self.classes)} classes from 0.")
        indices, new_labels = select_classes(self.labels, wanted)
        return self.subset(indices, new_labels, [self.classes[label] for label in wanted])

    def without_masks(self) -> list[str]:
        """Names of the samples without a mask; none where only decoding all would tell (a Hub data set)."""
        return []

    def with_transform(self: Self, transform: Transform | None) -> Self:
        """The same samples under another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def check(self) -> list[Problem]:
        """Decode every picture and mask once and list those that fail, in order; empty if all is well."""
        problems = []
        for index in range(len(self)):
            try:
                self.raw(index)
            except DataFileError as error:
                problems.append(Problem(index, self._path(index), str(error)))
        return problems

    def drop_unreadable(self: Self) -> Self:
        """The data set without the samples whose picture or mask fails `check()`; names them in one warning.

        Warns:
            UnreadableImageWarning: how many were left out, the first of them by name; all are in `.unreadable`.

        Raises:
            DataFileError: nothing would be left.
        """
        problems = self.check()
        if not problems:
            return self
        names = listed(problem.path for problem in problems)
        if len(problems) == len(self):
            raise DataFileError(f"None of the {len(self)} pictures can be read: {names}. First: {problems[0].reason}")
        message = f"{len(problems)} of {len(self)} pictures cannot be read and were left out: {names}."
        warnings.warn(message, UnreadableImageWarning, stacklevel=2)
        bad = {problem.index for problem in problems}
        part = self.subset([index for index in range(len(self)) if index not in bad])
        part.unreadable = (*self.unreadable, *problems)
        return part


def class_names(classes: Sequence[str]) -> list[str]:
    """A checked list of class names.

    Raises:
        DataError: no list, no names, an empty name or the same name twice.
    """
    names = [] if isinstance(classes, str) else list(classes)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"A list of class names, none of them empty, is expected, but was given {classes!r:.200}.")
    twice = sorted(name for name, count in Counter(names).items() if count > 1) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"Class names must differ, but these come more than once: {listed(twice)}.")
    return names


def check_labels(labels: Sequence[int], classes: Sequence[str]) -> None:
    """Raise DataError if a label has no class name."""
    outside = sorted({label for label in labels if not 0 <= label < len(classes)})
    if outside:
        raise DataError(
            f"Labels {listed(outside)} have no class name: {len(classes)} classes take the labels "
            f"0 to {len(classes) - 1}. Unlabelled samples (often -1) have to be filtered out first."
        )


def check_masks_policy(masks: str) -> None:
    """Raise DataError for an unknown value of `masks`."""
    if masks not in MASK_POLICIES:
        raise DataError(f"masks={masks!r} is unknown. {suggestion(masks, MASK_POLICIES)}")
