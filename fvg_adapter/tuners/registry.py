"""Names of tuners in files and on the command line."""

from __future__ import annotations

from typing import Any, TypeVar

from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.storage import loads_kind
from fvg_adapter.tuners.base import Tuner

TUNERS: dict[str, type[Tuner]] = {}
"""Tuner classes by `kind`."""

T = TypeVar("T", bound=type[Tuner])


def register(tuner: T) -> T:
    """Makes a tuner class known by its `kind`; usable as a decorator.

    Raises:
        FVGError: another class already has that name.
    """
    known = TUNERS.setdefault(tuner.kind, tuner)
    if known is not tuner:
        raise FVGError(
            f"a tuner of kind {tuner.kind!r} is already registered ({known.__qualname__}); choose another kind."
        )
    return tuner


def tuner_class(config: dict[str, Any]) -> type[Tuner]:
    """The class of the tuner in a saved config.

    Raises:
        FVGError: its kind is not registered here; the message lists the known ones.
    """
    kind = config["tuner"].get("kind")
    if not isinstance(kind, str) or kind not in TUNERS:
        raise FVGError(
            f"the saved tuner is a {kind!r}, which is not registered here. {nearest(kind, TUNERS)} Import the module "
            "that "
            "registers it, or upgrade fvg-adapter."
        )
    return TUNERS[kind]


loads_kind("tuner", tuner_class)
