"""The paper's eleven data sets and ImageNet's variants, as CoOp and the authors' release lay them out.

What differs between them is data (`sets/*.json`); how they are read is here. Pictures come in the order of CoOp's
lists, so that `few_shot_indices` draws CoOp's pictures. ImageNet has no list: CoOp takes the order of the file system
within a class, which differs between machines; here it is by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from fvg_adapter.data.base import Transform
from fvg_adapter.data.errors import DataError, DataFileError, listed, suggestion
from fvg_adapter.data.files import Files, HubFiles, LocalFiles
from fvg_adapter.data.listed import ListedDataset
from fvg_adapter.data.paper_layouts import LAYOUTS, PaperSet, Reading, names_in_order

HUB_REPO = "JREion/Prompt_Tuning_Datasets_with_Foreground"
"""The authors' release of the data sets with masks."""


def _read_sets() -> dict[str, PaperSet]:
    files = sorted((Path(__file__).parent / "sets").glob("*.json"))
    return {s.name: s for s in (PaperSet(**json.loads(file.read_text(encoding="utf-8"))) for file in files)}


PAPER_SETS: Mapping[str, PaperSet] = _read_sets()
"""By Dassl's name."""

ELEVEN: tuple[str, ...] = tuple(name for name, found in PAPER_SETS.items() if found.variant_of is None)
"""Names of the eleven data sets of the paper's tables."""

VARIANTS: tuple[str, ...] = tuple(name for name, found in PAPER_SETS.items() if found.variant_of is not None)
"""Names of ImageNet's test-only variants."""


def paper_set(name: str) -> PaperSet | None:
    """The data set of a name or of a folder's name; case, "_" and "-" do not matter. None if it is not the paper's.

    >>> paper_set("caltech-101").name, paper_set("my_birds")
    ('Caltech101', None)
    """
    wanted = _key(name)
    for found in PAPER_SETS.values():
        if wanted in (_key(found.name), *map(_key, found.folders)):
            return found
    return None


def local_files(root: str | os.PathLike[str]) -> tuple[Files, str]:
    """The tree around a folder, and the folder's name in it: masks may lie beside it."""
    place = Path(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100 (resolve() would follow links)
    return LocalFiles(place.parent), place.name


def laid_out(root: str | os.PathLike[str], name: str) -> bool:
    """Whether a folder holds the named data set in CoOp's layout (else it is a folder of split folders, say)."""
    found = paper_set(name)
    if found is None or not Path(root).expanduser().is_dir():
        return False
    return _locate(*local_files(root), found) is not None


def open_paper_set(
    root: str | os.PathLike[str] | Files,
    name: str,
    split: str,
    *,
    masks: str = "optional",
    transform: Transform | None = None,
) -> ListedDataset:
    """One split of a data set of the paper.

    Args:
        root: the data set's folder, CoOp's or the release's nested one; the folder that holds all of them; or HubFiles
            of the release, whose pictures are fetched when they are asked for.
        name: the data set, as in "OxfordPets" or "oxford_pets".
        split: "train", "val" or "test".
        masks, transform: see MaskedImageFolder.

    Warns:
        ClassNameWarning: a class name stands for two classes; the second gets its number, as in "crane (517)".

    Raises:
        DataError: an unknown data set or split; a list that contradicts itself.
        DataFileError: the folder, the list, the class names or pictures are missing; names them.
    """
    found = paper_set(name)
    if found is None:
        raise DataError(f"{name!r} is no data set of the paper. {suggestion(name, PAPER_SETS)}")
    if split not in found.sizes:
        raise DataError(f"{found.name} has no split {split!r}. {suggestion(split, found.sizes)}")
    files, start = (root, "") if isinstance(root, Files) else local_files(root)
    place = _locate(files, start, found)
    if place is None:
        raise DataFileError(_not_found(files, start, found))
    listing = _listing_file(files, place, found, split)
    entries, names = LAYOUTS[found.layout](Reading(files, place, listing, split, found))
    classes = names_in_order(names, found, repr(listing))
    origin = f"{listing!r} ({split})"
    return ListedDataset(files, place, entries, classes, masks=masks, transform=transform, origin=origin)


def _locate(files: Files, start: str, found: PaperSet, depth: int = 3) -> str | None:
    """The folder with the pictures: in `start`, or in folders of the set's names below it."""
    inside = files.folders(start)
    for name in found.images:
        if (name and name in inside) or (not name and set(found.inside) & inside):
            images = f"{start}/{name}".strip("/")
            if _holds_its_list(files, images, found) and _right_parts(files, images, found):
                return images
    if depth == 0:
        return None
    for name in (*found.folders, found.name):
        if name in inside and (below := _locate(files, f"{start}/{name}".strip("/"), found, depth - 1)) is not None:
            return below
    return None


def _holds_its_list(files: Files, images: str, found: PaperSet) -> bool:
    return any(files.has(file) for file in _list_places(images, found, "train"))


def _right_parts(files: Files, images: str, found: PaperSet) -> bool:
    wanted = {part for part in found.parts.values() if part}
    return not wanted or bool(wanted & files.folders(images))


def _list_places(images: str, found: PaperSet, split: str) -> list[str]:
    """Where the list may lie: beside the pictures' folder, or up to two folders above."""
    name = found.listing.format(split=split)
    folder = images if not found.images[0] else images.rpartition("/")[0]
    places = []
    for _ in range(3):
        places.append(f"{folder}/{name}".strip("/"))
        if not folder:
            break
        folder = folder.rpartition("/")[0]
    return places


def _listing_file(files: Files, images: str, found: PaperSet, split: str) -> str:
    places = _list_places(images, found, split)
    for place in places:
        if files.has(place):
            return place
    raise DataFileError(f"{found.name} lacks the file {places[0]!r} in {files.name}; CoOp's DATASETS.md links it.")


def _not_found(files: Files, start: str, found: PaperSet) -> str:
    listing = found.listing.format(split="train")
    where = f"{files.name}/{start}" if start else files.name
    there = listed(sorted(files.folders(start) | files.content(start)[1]), 8)
    shown = found.images[0] or " and ".join(found.inside)
    packed = [n for n in sorted(files.content(start)[1]) if n.endswith((".zip", ".tar", ".gz", ".tgz", ".7z"))]
    hint = f" Unpack {listed(packed)} first." if packed else ""
    return (
        f"{found.name} was not found in {where}: the folder {shown!r} with {listing!r} beside it is expected, there "
        f"or in a folder named {' or '.join(map(repr, found.folders))}. There is: {there}.{hint}"
    )


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def open_release(revision: str | None = None) -> HubFiles:
    """The authors' release on the Hub, for `open_paper_set`: listed once, pictures fetched when they are asked for.

    Raises:
        DataError: no connection.
    """
    return HubFiles(HUB_REPO, revision)
