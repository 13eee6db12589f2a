"""The pictures of one seed of a protocol: a few-shot draw over all classes, then the cut (METHOD.md section 10)."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvg_adapter.data import Files, PairedTransform, base_new_split, few_shot_indices, open_dataset, select_classes
from fvg_adapter.data.errors import listed
from fvg_adapter.errors import FVGError

Source = str | os.PathLike[str] | Files
"""A folder, the id of a data set on the Hub, or the files of the authors' release."""


@dataclass(frozen=True)
class Split:
    """One seed's pictures.

    Attributes:
        train: the few-shot pictures of the base classes, as the heads see them.
        tests: by the name of the test split, (base, new) test sets, or a single one with all its classes.
        tune: the same pictures as the tuner sees them: cropped otherwise, where its recipe says so.
        branches: what scores a single test set, "base" where it is not said. templates: the prior's hand-written prompt
            for a test set, where it is another than in training.
    """

    train: Any
    tests: dict[str, tuple[Any, ...]]
    tune: Any
    branches: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)

    @property
    def base_classes(self) -> list[str]:
        """The classes tuned on."""
        return list(self.train.classes)


@dataclass(frozen=True)
class Drawing:
    """What is drawn for a seed, and how it is shown.

    Attributes:
        shots, seed: of the few-shot draw. size, mean, std: of the pictures as the model takes them.
        crop_scale: of the heads' augmentation. tune_crop_scale: of the tuner's, where it is another.
        masks: "require", "optional" or "none".
        dataset: which data set of the paper it is, where the folder's name does not say so.
    """

    shots: int
    seed: int
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    crop_scale: tuple[float, float] = (0.08, 1.0)
    tune_crop_scale: tuple[float, float] | None = None
    masks: str = "optional"
    dataset: str | None = None

    def pool(self, data: Source, crop_scale: tuple[float, float]) -> Any:
        """All training pictures."""
        shown = PairedTransform(self.size, self.mean, self.std, train=True, scale=crop_scale)
        return open_dataset(data, "train", dataset=self.dataset, masks=self.masks, transform=shown)

    def test(self, data: Source, split: str, dataset: str | None = None) -> Any:
        """All pictures of a test split."""
        plain = PairedTransform(self.size, self.mean, self.std, train=False)
        return open_dataset(data, split, dataset=dataset or self.dataset, masks=self.masks, transform=plain)

    def shown(self, data: Source, wanted: Sequence[int] | None = None) -> tuple[Any, Any]:
        """The few-shot pictures of the wanted (else all) classes, as the heads and as the tuner see them."""
        pool = self.pool(data, self.crop_scale)
        _tell_few(pool, self.shots)
        drawn = few_shot_indices(pool.labels, self.shots, seed=self.seed)[0]
        keep = range(len(pool.classes)) if wanted is None else wanted
        train = _only(pool.subset(drawn), keep)
        _tell_missing_masks(train, self.seed)
        train = tune = train.drop_unreadable()
        if self.tune_crop_scale is not None and self.tune_crop_scale != self.crop_scale:
            other = self.pool(data, self.tune_crop_scale)
            tune = _only(other.subset(drawn), keep).drop_unreadable()
        return train, tune


def _tell_few(pool: Any, shots: int) -> None:
    """Warns where classes have fewer pictures than are drawn: CoOp's draw takes all of them, without a word."""
    counts = Counter(int(label) for label in pool.labels)
    few = [label for label, count in counts.items() if count < shots]
    if few:
        least = min(few, key=counts.__getitem__)
        warnings.warn(
            f"{len(few)} of {len(counts)} classes have fewer than {shots} training pictures (the fewest: "
            f"{counts[least]} of {pool.classes[least]!r}); all of theirs are taken.",
            stacklevel=1,
        )


def _tell_missing_masks(train: Any, seed: int) -> None:
    """Warns where some pictures have masks and others do not: these would train without a foreground, unseen."""
    missing = train.without_masks() if train.has_masks else []
    if missing:
        warnings.warn(
            f"seed {seed}: {len(missing)} of {len(train)} training pictures have no mask file: {listed(missing)}. They "
            "have no foreground and train with r = 0, whatever foreground is chosen; write their masks (`fvg-adapter "
            "masks`), or move the mask folder away to take all masks from elsewhere.",
            stacklevel=1,
        )


def whole_split(data: Source, drawing: Drawing, test_splits: Sequence[str] = ("test",)) -> Split:
    """The pictures of one seed where all classes are tuned on: few-shot, and the source of cross-dataset scoring.

    Raises:
        FVGError: splits with different class lists.
    """
    train, tune = drawing.shown(data)
    tests: dict[str, tuple[Any, ...]] = {}
    for name in test_splits:
        test = drawing.test(data, name)
        _same_classes(data, name, train.classes, test.classes)
        tests[name] = (test.drop_unreadable(),)
    return Split(train, tests, tune)


def base_to_new_split(
    data: Source,
    *,
    shots: int,
    seed: int,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_scale: tuple[float, float] = (0.08, 1.0),
    tune_crop_scale: tuple[float, float] | None = None,
    test_splits: Sequence[str] = ("test",),
    masks: str = "optional",
    dataset: str | None = None,
) -> Split:
    """The pictures of one seed: draw over all classes first, then cut into base and new (METHOD section 10).

    Raises:
        FVGError: splits with different class lists, or fewer than two classes.
    """
    drawing = Drawing(shots, seed, size, mean, std, crop_scale, tune_crop_scale, masks, dataset)
    pool = drawing.pool(data, crop_scale)
    classes = list(pool.classes)
    base, new = base_new_split(classes)
    if not new:
        raise FVGError(
            f"{data} has {len(classes)} class; base-to-new needs at least two, one half to tune on, one to transfer to."
        )
    tests: dict[str, tuple[Any, ...]] = {}
    for name in test_splits:
        test = drawing.test(data, name)
        _same_classes(data, name, classes, test.classes)
        tests[name] = (_only(test, base).drop_unreadable(), _only(test, new).drop_unreadable())
    train, tune = drawing.shown(data, base)
    return Split(train, tests, tune)


def _same_classes(data: Source, name: str, classes: Sequence[str], others: Sequence[str]) -> None:
    if list(others) != list(classes):
        raise FVGError(f"the splits 'train' and {name!r} of {data} differ in classes; give both a classes.txt.")


def _only(dataset: Any, wanted: Sequence[int]) -> Any:
    indices, labels = select_classes(dataset.labels, wanted)
    return dataset.subset(indices, labels, [dataset.classes[i] for i in wanted])
