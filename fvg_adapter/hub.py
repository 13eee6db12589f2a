"""load: whatever was saved, from a folder or the Hub; and what is done with a saved folder without its base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fvg_adapter.errors import FVGError
from fvg_adapter.model import FVGModel
from fvg_adapter.replacing import read_whole, replacing, settle
from fvg_adapter.storage import load_any, loads_kind, read, read_config
from fvg_adapter.tuners.base import Tuner


def load(
    id_or_dir: str | os.PathLike[str],
    clip: nn.Module | None = None,
    classes: Sequence[str] | None = None,
    revision: str | None = None,
    *,
    tokenizer: Any = None,
    **hub: Any,
) -> FVGModel | Tuner:
    """Loads a tuner or an FVGModel, whatever was saved, in evaluation mode.

    Args:
        id_or_dir: a folder written by `save_pretrained`, or a Hub id such as "me/pets-fvg".
        clip: the base model; when None it is loaded by the id in the config.
        classes: class names to score instead of the saved ones; any names, unless contexts are class-specific.
        revision: branch, tag or commit on the Hub.
        tokenizer: the base model's tokenizer; when None it is loaded from where the base model came from.
        **hub: token, cache_dir, local_files_only, force_download, as in `huggingface_hub.snapshot_download`.

    Raises:
        FVGError: not one of our files, a newer format, another base model (both values are named), a truncated file.
    """
    loaded: FVGModel | Tuner = load_any(id_or_dir, clip, tokenizer, classes, revision=revision, **hub)
    return loaded


def update_card(
    folder: str | os.PathLike[str],
    *,
    results: Any = None,
    picture: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> Path:
    """Puts what is known by now into the card of a saved folder; weights and settings stay as they are.

    Args:
        folder: written by `save_pretrained`. results, picture, dataset, license: as there; None keeps what is there.

    Returns:
        The folder. A README.md that was edited is kept; the figures stand in config.json for the next card.

    Raises:
        FVGError: not one of our folders, results without this model's row, a picture that is none.
    """
    from fvg_adapter.card.saving import add_card

    target = Path(folder)
    given = {"results": results, "picture": picture, "dataset": dataset, "license": license}
    try:
        settle(target)
        config = read_config(target)
        with replacing(target) as new:
            before = config.pop("about", None)
            add_card(new, config, target, weights_in=target, before=before, **given)
    except OSError as error:
        raise FVGError(f"the card of {target} could not be written: {error}. It is as it was.") from error
    return target


def push_folder(folder: str | os.PathLike[str], repo_id: str, **options: Any) -> str:
    """Uploads a folder that `save_pretrained` wrote, without loading its base model.

    A README.md of the folder that a person edited goes along, unless the one on the Hub was edited too.

    Args:
        folder: with config.json and the safetensors files that it lists; nothing else in it is uploaded.
        repo_id: such as "me/pets-fvg". options: those of `FVGModel.push_to_hub`, but for what `update_card` sets.

    Returns:
        The address of the commit.

    Raises:
        FVGError: not one of our folders, a truncated file in it, or what `push_to_hub` raises.
    """
    from fvg_adapter.publishing import publish

    source = Path(folder)
    try:
        settle(source)
    except OSError as error:
        raise FVGError(f"what a killed save left in {source} could not be finished: {error}.") from error
    read_whole(source, read)  # what would be refused on loading is not pushed
    return publish(source, repo_id, **options)


loads_kind("fvg", lambda config: FVGModel)
