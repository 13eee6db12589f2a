"""load: whatever was saved, from a folder or the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from fvg_adapter.model import FVGModel
from fvg_adapter.storage import load_any, loads_kind
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


loads_kind("fvg", lambda config: FVGModel)
