"""Foreground sources by name, as the command line gives them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.foreground import SOURCES, ForegroundSource
from fvg_adapter.segmenters.segmenter import Segmenter


def source_named(name: str, *, device: Any = None, **options: Any) -> str | ForegroundSource:
    """The source of a name.

    Args:
        name: "attention", "given" or "whole"; "package.module:callable"; else the Hub id or folder of a segmenter, or
            "DETECTOR+SAM".
        device: where a segmenter goes. options: of `Segmenter`.

    Raises:
        FVGError: no such name, module, callable or segmenter; options for a source that takes none.

    Example:
        >>> source_named("attention")
        'attention'
    """
    if name in SOURCES:
        return name
    module, colon, attribute = name.partition(":")
    if colon and not Path(name).exists() and "/" not in name:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise FVGError(f"the foreground source {name!r} could not be imported: {error}.") from error
        if not callable(found):
            raise FVGError(f"{name!r} is a {type(found).__name__}, but a callable from pixels to masks is expected.")
        source: ForegroundSource = found
        return source
    if "/" not in name and not Path(name).exists():
        raise FVGError(
            f"the foreground source {name!r} is unknown. {nearest(name, SOURCES)} Or give package.module:callable, or "
            "a segmenter: a Hub id such as CIDAS/clipseg-rd64-refined, or a folder."
        )
    return Segmenter.from_pretrained(name, device=device, **options)
