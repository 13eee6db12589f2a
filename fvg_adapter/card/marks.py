"""Whose a README.md is: a card that we made ends with a hash of itself, so that every edit shows and is kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_MARK = re.compile(r"\n*<!-- fvg_adapter: made by the library, sha256 ([0-9a-f]{64})[^>]*-->\s*\Z")


def marked(text: str) -> str:
    """A card with the line that tells whether it was edited."""
    body = text.rstrip() + "\n"
    note = "once you edit this page, it is yours and is not made again"
    return f"{body}\n<!-- fvg_adapter: made by the library, sha256 {_digest(body)}; {note} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card is a person's: without our line, or changed since we made it. Line endings do not count."""
    text = card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found = _MARK.search(text)
    return found is None or found[1] != _digest(text[: found.start()])


def _digest(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_card(path: Path) -> str | None:
    """The card in a file, None where there is none. It is only read: bytes that are no UTF-8 are replaced."""
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else None


def header_problem(card: str) -> str | None:
    """What is wrong with the YAML header of a card, in one line; None for a good one, or for a card without one."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from yaml import YAMLError

    text = card.removeprefix("\ufeff")
    if not REGEX_YAML_BLOCK.search(text):
        opened = text.lstrip().startswith("---\n") or text.lstrip().startswith("---\r\n")
        return "its header is opened by --- and never closed" if opened else None
    try:
        ModelCard(text)
    except (YAMLError, ValueError, TypeError, KeyError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None
