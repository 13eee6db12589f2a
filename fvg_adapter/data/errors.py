"""Errors and warnings about data sets, and the two small phrases that their messages share."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from fvg_adapter.errors import FVGError, closest

_LISTED = 5
_COMPARED = 2000


class DataError(FVGError):
    """A data set, a split, a class list or a transform does not fit; the message says what was expected."""


class DataFileError(DataError):
    """A file that a data set needs is missing or of no use; the message names it."""


class UnreadableImageError(DataFileError):
    """A picture or a mask could not be decoded; the message names the file."""


class UnreadableImageWarning(UserWarning):
    """Pictures were left out because they could not be decoded; the message counts them and names the first."""


class ClassNameWarning(UserWarning):
    """Two classes of a data set have one name; the message names them and what the second is called here."""


class SuspiciousMasksWarning(UserWarning):
    """Most foreground masks of a data set look inverted, misshapen or unlike masks; the message counts them."""


def listed(names: Iterable[object], limit: int = _LISTED) -> str:
    """The first names of a list, and how many more there are: `'a', 'b' and 7 more`."""
    every = [str(name) for name in names]
    shown = ", ".join(map(repr, every[:limit])) or "none"
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"


def suggestion(given: object, valid: Iterable[str]) -> str:
    """The nearest valid name and the first of all of them: `Did you mean 'train'? There is: 'test', 'train'.`"""
    names = list(islice(valid, _COMPARED))
    return f"{closest(given, names)}There is: {listed(names, limit=10)}."
