"""Which labels of a semantic or panoptic model are foreground."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fvg_adapter.errors import FVGError, nearest

STUFF: frozenset[str] = frozenset(
    [
        "background",
        "wall",
        "sky",
        "floor",
        "ceiling",
        "ground",
        "earth",
        "land",
        "terrain",
        "road",
        "street",
        "sidewalk",
        "pavement",
        "path",
        "runway",
        "dirt",
        "sand",
        "gravel",
        "grass",
        "field",
        "playingfield",
        "hill",
        "mountain",
        "rock",
        "water",
        "sea",
        "river",
        "lake",
        "snow",
        "tree",
        "vegetation",
        "building",
        "house",
        "fence",
        "railing",
        "railroad",
        "platform",
        "window",
        "windowpane",
        "door",
        "roof",
        "stairs",
        "rug",
        "unlabeled",
        "void",
        "other",
    ]
)
"""First words of labels that are surroundings rather than objects: "wall-brick", "sky", "background", …"""


def foreground_labels(labels: Mapping[int, str], wanted: Sequence[str] | None) -> list[int]:
    """Numbers of the labels that count as foreground.

    Args:
        labels: a model's `id2label`.
        wanted: names of labels; None for all but surroundings: label 0 where labels have no names (LABEL_0, …), else
            those that begin with a word of `STUFF` or end in -merged, -stuff or -other (COCO's).

    Raises:
        FVGError: an unknown name, or no foreground at all; the message lists what there is.
    """
    if wanted is not None:
        numbers = {name.lower().strip(): number for number, name in labels.items()}
        for name in wanted:
            if name.lower().strip() not in numbers:
                raise FVGError(f"the segmenter has no label {name!r}. {nearest(name, list(labels.values())[:200])}")
        if not wanted:
            raise FVGError("labels=[] leaves no foreground; name some, or give None for everything but surroundings.")
        return [numbers[name.lower().strip()] for name in wanted]
    found = [number for number, name in labels.items() if not _is_stuff(number, name)]
    if not found:
        raise FVGError(f"all labels of this segmenter are surroundings: {list(labels.values())[:20]}; give labels=[…].")
    return found


def _is_stuff(number: int, name: str) -> bool:
    if re.fullmatch(r"LABEL_\d+", name):
        return number == 0
    words = re.split(r"[^a-z]+", name.lower().strip())
    return words[0] in STUFF or words[-1] in ("merged", "stuff", "other")
