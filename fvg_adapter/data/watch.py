"""What only many masks together show: inverted ones, ones of other proportions, label numbers. Warned of once."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np

from fvg_adapter.data.errors import SuspiciousMasksWarning
from fvg_adapter.data.images import DecodedMask

LOOKED_AT = 32
"""Masks that are looked at before anything is said; all of them in a smaller data set."""
_SAID = {
    "inverted": "cover the border of their picture and not its centre, so they may be inverted: foreground is white. "
    "Turn such files round (PIL.ImageOps.invert); a model that trains on them learns from the background",
    "stretched": "have other proportions than their picture and were stretched over it. If they were made of a crop, "
    "foreground and picture do not lie on each other: make them of the whole picture",
    "dark": "are empty though they are not black, so they may hold label numbers: store foreground as 255, or as ones",
}


def looks_inverted(mask: DecodedMask) -> bool:
    """Whether a mask covers most of the picture's border and less than half of its central ninth."""
    values = np.asarray(mask.image) > 0  # (H, W)
    height, width = values.shape
    if height < 3 or width < 3:
        return False
    y, x = height // 3, width // 3
    edges = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    return bool(edges.mean() > 0.5 and values[y : height - y, x : width - x].mean() < 0.5)


class MaskWatch:
    """Counts what is odd about the first masks of a data set, and warns once where it is most of them.

    Args:
        total: pictures in the data set.

    Attributes:
        seen: how many different pictures' masks were looked at. odd: how many of them were odd, by kind.
    """

    def __init__(self, total: int) -> None:
        self.seen: int = 0
        self.odd: Counter[str] = Counter()
        self._wanted = max(1, min(LOOKED_AT, total))
        self._names: set[str] = set()

    def see(self, name: str, mask: DecodedMask) -> None:
        """Looks at one mask; every picture counts once."""
        if self.seen >= self._wanted or name in self._names:
            return
        self._names.add(name)
        self.seen += 1
        kinds = {"inverted": looks_inverted(mask), "stretched": mask.stretched, "dark": mask.dark}
        self.odd.update(kind for kind, is_odd in kinds.items() if is_odd)
        if self.seen == self._wanted:
            self._names.clear()
            for message in odd_masks(self.odd, self.seen):
                warnings.warn(message, SuspiciousMasksWarning, stacklevel=4)


def odd_masks(odd: Counter[str], seen: int, what: str = "of the first") -> list[str]:
    """A sentence for each kind of oddness that most masks share."""
    return [f"{count} {what} {seen} foreground masks {_SAID[kind]}." for kind, count in odd.items() if 2 * count > seen]
