"""Exceptions and warnings of the package; every message says what was given, what was expected and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FVGError(ValueError):
    """Something that the caller gave does not fit; the message names it and the way out."""


class ForegroundWarning(UserWarning):
    """A batch trained without foreground information although masks were expected."""


def closest(given: object, valid: Iterable[str]) -> str:
    """The nearest valid name as a question, `Did you mean 'joint'? `, or nothing; for names too many to list."""
    close = difflib.get_close_matches(str(given), list(valid), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def nearest(given: object, valid: Iterable[str]) -> str:
    """A sentence that lists valid names and suggests the nearest: `Did you mean 'joint'? Valid: 'auto', 'joint'.`"""
    names = list(valid)
    return f"{closest(given, names)}Valid: {', '.join(map(repr, names))}."
