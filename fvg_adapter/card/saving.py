"""Puts a card into a folder that is being saved: what is known of the files, a picture, and README.md if it may be."""

from __future__ import annotations

import io
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvg_adapter.base_models import is_hub_id
from fvg_adapter.card import make_card
from fvg_adapter.card.figures import figures_of, sound_about
from fvg_adapter.card.marks import header_problem, is_edited, read_card
from fvg_adapter.errors import FVGError
from fvg_adapter.files import CARD_FILE, PICTURE_FILE, write_config
from fvg_adapter.untrusted import sha256_of

_log = logging.getLogger(__name__)


def add_card(
    folder: Path,
    config: dict[str, Any],
    target: Path,
    *,
    weights_in: Path | None = None,
    before: Mapping[str, Any] | None = None,
    kept: Path | None = None,
    results: Any = None,
    picture: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> None:
    """Writes config.json with its "about", and README.md unless the target's is a person's, into the new folder.

    Args:
        folder: the new files. config: of config.json, without "about". target: where the files will lie.
        weights_in: the folder with the safetensors files; the new one when None.
        before: the "about" that the model was loaded with: its figures and its picture stay while the weights are the
            same, its data and licence stay in any case. kept: the folder that it was loaded from.
        results, picture, dataset, license: what is known now.
    """
    old = sound_about(before)
    weights = _weights(weights_in or folder)
    if old.get("weights") != weights:
        old.pop("results", None), old.pop("picture", None)
    for name, given in (("dataset", dataset), ("license", license)):
        if given is not None and (not isinstance(given, str) or not given.strip()):
            raise FVGError(f"{name} is {given!r}; give a name, such as {'eurosat' if name == 'dataset' else 'mit'!r}.")
    if dataset is not None and ("/" in dataset or "\\" in dataset) and not is_hub_id(dataset):
        raise FVGError(f"dataset {dataset!r} is a path here; give a name for the card, or a Hub id like 'me/pets'.")
    about = {
        "results": old.get("results")
        if results is None
        else figures_of(results, str(config["tuner"].get("kind")), str(config.get("kind"))),
        "dataset": dataset or old.get("dataset"),
        "license": license or old.get("license"),
        "picture": _drawn(picture, folder) if picture is not None else _found(old.get("picture"), folder, target, kept),
    }
    about = {name: value for name, value in about.items() if value is not None}
    config["about"] = {**about, "weights": weights} if about else {}
    write_config(folder, config)
    there = read_card(target / CARD_FILE)
    if there is None or not is_edited(there):
        (folder / CARD_FILE).write_text(make_card(config), "utf-8")
    else:
        tell_kept(there, str(target / CARD_FILE))


def tell_kept(card: str, where: str) -> None:
    """Says that a person's card was kept: to the log, or in a warning where its header is broken."""
    problem = header_problem(card)
    if problem is None:
        _log.info("%s was edited and is kept as it is; delete it to have one made.", where)
        return
    warnings.warn(
        f"{where} was kept as it is, but its YAML header is broken ({problem}), and the Hub takes no such card: mend "
        "the header between the two lines of ---, or delete the file to have one made.",
        stacklevel=5,
    )


def _weights(folder: Path) -> dict[str, str]:
    """Hashes of everything that the figures depend on."""
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*.safetensors"))}


def _drawn(picture: str | os.PathLike[str], folder: Path) -> str:
    """The picture as the card's PNG, without what a camera or an editor noted in it; returns its hash."""
    from PIL import Image

    try:
        with Image.open(picture) as opened:
            clean = opened.convert("RGB")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FVGError(
            f"the card's picture {str(picture)!r} cannot be read: {error}. Give the path of an image file, such as the "
            "one that visualize.before_after draws."
        ) from error
    stream = io.BytesIO()
    clean.save(stream, "PNG", optimize=True)
    (folder / PICTURE_FILE).write_bytes(stream.getvalue())
    return sha256_of(folder / PICTURE_FILE)


def _found(wanted: Any, folder: Path, *places: Path | None) -> str | None:
    """The picture of an earlier save, brought along from where it lies; None where it is gone."""
    for place in places:
        path = place / PICTURE_FILE if place is not None and wanted else None
        if path is not None and path.is_file() and sha256_of(path) == wanted:
            shutil.copyfile(path, folder / PICTURE_FILE)
            return str(wanted)
    return None
