"""A tuner's constructor arguments as a file gives them: known names and plain values of the annotated types.

Never a model, a projection or a PEFT config: those come from the caller. Imports errors only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fvg_adapter.errors import FVGError, nearest

_LARGEST = 1e9
_MOST = 4096


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= _MOST and all(map(fits, value))


_FITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text", _text),
    "str | None": ("text or null", lambda value: value is None or isinstance(value, str)),
    "Position": ("text", _text),
    "Iterable[int]": ("a list of whole numbers", _list_of(_whole)),
    "Sequence[str]": ("a list of texts", _list_of(_text)),
}
_CALLERS = ("self", "model", "tokenizer", "classes", "projection", "peft_config", "clip")


def check_arguments(
    tuner: type[Any], arguments: Mapping[str, Any], what: str = "the config's arguments", source: str = "a file"
) -> None:
    """Refuses what no file of this tuner says; arguments of other types than `_FITS` lists are the tuner's to check.

    Args:
        tuner: the class. arguments: by name. what, source: what a message calls the arguments, and where they stand.

    Raises:
        FVGError: an unknown name, one that only the caller may give, or a value of another type than annotated.
    """
    parameters = inspect.signature(tuner.__init__).parameters
    known = [name for name in parameters if name not in _CALLERS]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in arguments.items():
        if name in _CALLERS or (name not in known and not open_ended):
            raise FVGError(
                f"{what} do not fit {tuner.__name__}: it takes no {name[:80]!r} from {source}. {nearest(name, known)}"
            )
        annotation = parameters[name].annotation if name in parameters else None
        written = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        if written.startswith("Literal["):
            written = "str"
        expected, fits = _FITS.get(written, ("", lambda value: True))
        if not fits(value):
            raise FVGError(f"{what} do not fit {tuner.__name__}: {name} is {value!r:.80}, expected is {expected}.")
