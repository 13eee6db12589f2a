"""Few-shot draws and base/new splits as pure functions of label lists (METHOD.md section 10).

Everything here equals what CoOp and its family do on Dassl, picture for picture. Imports only the standard library.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from fvg_adapter.data.errors import DataError, listed

MAX_VAL_SHOTS = 4


def few_shot_indices(
    labels: Sequence[int], shots: int, *, seed: int, val_labels: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Draw `shots` pictures a class for training and at most four a class for validation, as CoOp does.

    One seeded stream runs over all classes in the order in which they first appear, training first, then validation;
    a class with fewer pictures gives all of them. Draw before the base/new cut: any other order gives other pictures.

    Args:
        labels: label of each training picture, in a fixed order: a folder's is the same on every machine; CoOp's own
            pictures come out only if they are listed in the order of CoOp's split file.
        shots: pictures a class, at least 1.
        seed: seed of the stream; Python's generator, hence equal on every machine and Python version.
        val_labels: label of each validation picture; without them the second list is empty.

    Returns:
        Indices into `labels`, and indices into `val_labels` with min(shots, 4) a class.

    Raises:
        DataError: `shots` is below 1.

    Source: Dassl `DatasetBase.generate_fewshot_dataset` (repeat=False) as called by CoOp's `datasets/*.py`, after
    `random.seed(seed)`. CoOp's ImageNet draws no validation pictures.

    >>> few_shot_indices([0, 0, 0, 1, 1, 1], 1, seed=1)
    ([0, 5], [])
    """
    if shots < 1:
        raise DataError(f"shots={shots} draws nothing: give at least 1, or use the data set without a few-shot draw.")
    stream = random.Random(seed)
    train = _draw(labels, shots, stream)
    val = [] if val_labels is None else _draw(val_labels, min(shots, MAX_VAL_SHOTS), stream)
    return train, val


def _draw(labels: Sequence[int], shots: int, stream: random.Random) -> list[int]:
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(int(label), []).append(index)
    drawn: list[int] = []
    for indices in by_class.values():
        drawn += stream.sample(indices, shots) if len(indices) >= shots else indices
    return drawn


def base_new_split(classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Label ids of the base classes and of the new ones: the first ceil(half) of the sorted labels, and the rest.

    The cut goes by label number, not by name: `classes[i]` belongs to label i, as in Dassl's `subsample_classes`.

    Raises:
        DataError: no classes, or a single string where a list of names is expected.

    >>> base_new_split(["ant", "bee", "cat", "dog", "eel"])
    ([0, 1, 2], [3, 4])
    """
    if isinstance(classes, str) or len(classes) == 0:
        raise DataError(f"base_new_split needs a list with at least one class name, but was given {classes!r}.")
    half = math.ceil(len(classes) / 2)
    return list(range(half)), list(range(half, len(classes)))


def select_classes(labels: Sequence[int], wanted: Sequence[int]) -> tuple[list[int], list[int]]:
    """Keep the samples of the wanted classes and number these classes from 0, in the order of `wanted`.

    Returns:
        Indices into `labels`, in their order, and the new label of each.

    Raises:
        DataError: a label is wanted twice.

    >>> select_classes([0, 1, 2, 1], wanted=[2, 1])
    ([1, 2, 3], [1, 0, 1])
    """
    new_label = {int(label): position for position, label in enumerate(wanted)}
    if len(new_label) != len(wanted):
        twice = sorted({int(label) for label in wanted if list(wanted).count(label) > 1})
        raise DataError(f"Each class can be wanted once, but these labels were given more than once: {listed(twice)}.")
    indices = [index for index, label in enumerate(labels) if int(label) in new_label]
    return indices, [new_label[int(labels[index])] for index in indices]
