"""Names of tuners in files and on the command line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.storage import loads_kind
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.recipes import RECIPES, Recipe

TUNERS: dict[str, type[Tuner]] = {}
"""Tuner classes by `kind`."""

T = TypeVar("T", bound=type[Tuner])


@overload
def register(tuner: T) -> T: ...


@overload
def register(*, recipe: Recipe) -> Callable[[T], T]: ...


def register(tuner: T | None = None, *, recipe: Recipe | None = None) -> T | Callable[[T], T]:
    """Makes a tuner class known by its `kind`; a decorator, bare or with the recipe that it is trained by.

    Args:
        tuner: the class. recipe: how it and the heads behind it are trained; `fvg-adapter train` and `fit` follow it.

    Raises:
        FVGError: another class already has that name, or the class has none of its own.

    Example:
        >>> @register(recipe=Recipe(tune=Stage("sgd", 0.002, 32, "mine"), fvg=RECIPES["coop"].fvg))  # doctest: +SKIP
        ... class Mine(Tuner):
        ...     kind = "mine"
    """
    if tuner is None:
        return lambda given: _registered(given, recipe)
    return _registered(tuner, recipe)


def _registered(tuner: T, recipe: Recipe | None) -> T:
    if tuner.kind == Tuner.kind:
        raise FVGError(f"{tuner.__qualname__} has no kind of its own; give it one, such as kind = {'mine'!r}.")
    known = TUNERS.setdefault(tuner.kind, tuner)
    if known is not tuner:
        raise FVGError(
            f"a tuner of kind {tuner.kind!r} is already registered ({known.__qualname__}); choose another kind."
        )
    if recipe is not None:
        RECIPES[tuner.kind] = recipe
    return tuner


def tuner_named(name: str) -> type[Tuner]:
    """The tuner class of a kind ("coop"), or of "package.module:Class", which is imported and registered.

    Raises:
        FVGError: no such kind, module or class, or the class is no Tuner.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in TUNERS:
            raise FVGError(f"tuner {name!r} is unknown. {nearest(name, TUNERS)} One of your own: package.module:Class.")
        return TUNERS[name]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise FVGError(f"the tuner {name!r} could not be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Tuner)):
        raise FVGError(f"{name!r} is no tuner: a subclass of fvg_adapter.tuners.Tuner is expected.")
    return register(found)


def tuner_to_train(name: str) -> type[Tuner]:
    """The class of `tuner_named`, if a protocol can make it: of a model, a tokenizer and class names.

    Raises:
        FVGError: what `tuner_named` raises; a class that is made of something else (`External`, of functions).
    """
    found = tuner_named(name)
    if not _made_of_a_model(found):
        first = ", ".join(list(inspect.signature(found).parameters)[:2])
        makeable = ", ".join(repr(kind) for kind, other in TUNERS.items() if _made_of_a_model(other))
        raise FVGError(
            f"the tuner {name!r} is made as {found.__name__}({first}, …), not from a model, a tokenizer and class "
            "names, which is all that a command or a protocol has: make it in Python, wrap it, and train the heads "
            f"with fit. What can be trained by its name: {makeable}."
        )
    return found


def _made_of_a_model(tuner: type[Tuner]) -> bool:
    try:
        inspect.signature(tuner).bind_partial(None, None, ())
    except TypeError:
        return False
    return True


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
