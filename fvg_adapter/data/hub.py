"""Hugging Face data sets with image, label and mask columns; `datasets` is imported only when one is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fvg_adapter.data.base import MaskedDataset, Transform, check_labels, check_masks_policy, class_names
from fvg_adapter.data.errors import DataError, DataFileError, listed, suggestion
from fvg_adapter.data.images import read_picture


class MaskedHubDataset(MaskedDataset):
    """A `datasets.Dataset` with an image, a label and, if there are any, a mask column.

    Labels are read without decoding pictures. Pictures are decoded here rather than by the datasets library, so that
    picture and mask are turned by the same EXIF rotation.

    Args:
        dataset: a loaded `datasets.Dataset` (one split).
        image, label, mask: column names; mask=None for a data set without masks.
        masks: "require" (each row must have one), "optional" (column or single masks may be missing) or "none".
        classes: class names in label order; else those of the ClassLabel feature; else, for a column of strings, its
            sorted values.
        transform: see PairedTransform; without one, items are raw.

    Raises:
        DataError: not one split of a data set, a column that is not there, labels without class names.
        DataFileError: on access, masks="require" and the row has none.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image: str = "image",
        label: str = "label",
        mask: str | None = "mask",
        masks: str = "require",
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        check_masks_policy(masks)
        columns = _columns(dataset)
        for column in (image, label):
            if column not in columns:
                raise DataError(f"The data set has no column {column!r}. {suggestion(column, columns)}")
        if mask is not None and mask not in columns and masks == "require":
            raise DataError(
                f"The data set has no mask column {mask!r}. {suggestion(mask, columns)} Without masks give mask=None "
                'and let the model find the foreground (foreground="attention").'
            )
        self.transform = transform
        self._image = image
        self._mask = mask if mask in columns and masks != "none" else None
        self._masks_required = masks == "require"
        self.has_masks: bool = self._mask is not None
        self.classes: list[str]
        self.labels: list[int]
        self.classes, self.labels = _labels(dataset, label, classes)
        self._dataset = _undecoded(dataset, [image] if self._mask is None else [image, self._mask])
        self._rows = list(range(len(self.labels)))
        if not self._rows:
            raise DataError("The data set has no rows.")

    def raw(self, index: int) -> dict[str, Any]:
        """See MaskedDataset.raw; "path" is the file that the row names, else its row number."""
        row = self._dataset[self._rows[index]]
        path = self._path(index)
        picture = read_picture(row[self._image], path)
        stored = None if self._mask is None else row[self._mask]
        if stored is None and self._mask is not None and self._masks_required:
            raise DataFileError(f'{path} has no mask in column {self._mask!r}; use masks="optional" to allow that.')
        mask = None if stored is None else self._decoded(stored, f"mask of {path}", picture)
        return {"image": picture.image, "label": self.labels[index], "mask": mask, "path": path}

    def _path(self, index: int) -> str:
        return f"row {self._rows[index]}"

    def _keep(self, indices: list[int]) -> None:
        self._rows = [self._rows[index] for index in indices]


def load_hub(
    id: str,
    split: str,
    *,
    image: str = "image",
    label: str = "label",
    mask: str | None = "mask",
    masks: str = "require",
    classes: Sequence[str] | None = None,
    transform: Transform | None = None,
    **load_options: Any,
) -> MaskedHubDataset:
    """Load one split of a data set from the Hub (or anything else that `datasets.load_dataset` knows).

    Args:
        id: data set id, as in "user/name".
        split: name of the split.
        load_options: passed on to `datasets.load_dataset` (name, revision, data_dir, …).

    The other arguments are MaskedHubDataset's.

    Raises:
        DataError: the datasets library is not installed, or the data set or split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("Data sets from the Hub need the datasets library: pip install datasets.") from error
    try:
        loaded = datasets.load_dataset(id, split=split, **load_options)
    except (OSError, ValueError) as error:  # no such data set or split, no connection
        raise DataError(f"Could not load the data set {id!r}, split {split!r}: {error}") from error
    return MaskedHubDataset(
        loaded, image=image, label=label, mask=mask, masks=masks, classes=classes, transform=transform
    )


def _columns(dataset: Any) -> list[str]:
    if isinstance(dataset, dict):
        raise DataError(f"A data set with splits was given: choose one, as in dataset['train']. {listed(dataset)}.")
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"A datasets.Dataset is expected, but {type(dataset).__name__} was given; load without streaming."
        )
    return list(dataset.column_names)


def _labels(dataset: Any, column: str, classes: Sequence[str] | None) -> tuple[list[str], list[int]]:
    """Class names and integer labels, from a ClassLabel, an integer or a string column."""
    values = list(dataset.with_format(None)[column])
    empty = [row for row, value in enumerate(values) if value is None]
    if empty:
        raise DataError(f"{len(empty)} rows have no label in column {column!r}: rows {listed(empty)}.")
    if values and isinstance(values[0], str):
        names = class_names(sorted(set(values)) if classes is None else classes)
        number = {name: label for label, name in enumerate(names)}
        unknown = sorted(set(values) - set(number))
        if unknown:
            raise DataError(f"Labels without a class: {listed(unknown)}. {suggestion(unknown[0], names)}")
        return names, [number[value] for value in values]
    known = getattr(dataset.features.get(column), "names", None) if classes is None else classes
    if known is None:
        raise DataError(f"The column {column!r} numbers its classes without naming them: give classes=[...].")
    names, labels = class_names(known), [int(value) for value in values]
    check_labels(labels, names)
    return names, labels


def _undecoded(dataset: Any, columns: list[str]) -> Any:
    """Only these columns, their pictures left as they are stored."""
    from datasets import Image

    kept = dataset.with_format(None).select_columns(columns)
    for column in columns:
        if isinstance(kept.features[column], Image):
            kept = kept.cast_column(column, Image(decode=False))
    return kept
