"""Exceptions and warnings of the package; every message says what was given, what was expected and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

_MESSAGE, _END = 2000, 400
_GIVEN, _NAMES = 100, 2000


class FVGError(ValueError):
    """Something that the caller gave does not fit; the message names it and the way out.

    What a message quotes may be as long as a file; it is shortened in the middle, since the way out stands at the end.
    """

    def __init__(self, message: str = "", *args: object) -> None:
        if len(message) > _MESSAGE:
            message = f"{message[: _MESSAGE - _END]} … {message[-_END:]}"
        super().__init__(message, *args)


class ForegroundWarning(UserWarning):
    """A batch trained without foreground information although masks were expected."""


def closest(given: object, valid: Iterable[str]) -> str:
    """The nearest valid name as a question, `Did you mean 'joint'? `, or nothing; for names too many to list."""
    close = difflib.get_close_matches(str(given)[:_GIVEN], list(islice(valid, _NAMES)), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def nearest(given: object, valid: Iterable[str]) -> str:
    """A sentence that lists valid names and suggests the nearest: `Did you mean 'joint'? Valid: 'auto', 'joint'.`"""
    names = list(islice(valid, _NAMES))
    return f"{closest(given, names)}Valid: {', '.join(map(repr, names))}."
