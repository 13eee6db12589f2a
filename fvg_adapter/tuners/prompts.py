"""Class names to token ids: what enters the text tower, where a learned context lies in it, and what is refused.

Follows CoOp (trainers/coop.py): underscores become spaces, a prompt is `<context> <name>.` with its full stop, and the
length of a name is counted in tokens of the name alone. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fvg_adapter.errors import FVGError

Tokenizer = Callable[..., Any]
Position = Literal["end", "front", "middle"]
DEFAULT_TEMPLATE = "a photo of a {}."
MAX_CHARACTERS = 4096
"""Of a class name, a template, or words to start from; the longest text tower supported holds 512 tokens."""
MAX_CONTEXT = 1024
"""Learned tokens in a prompt, in a picture, or of a representation."""


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts of one class list.

    Attributes:
        input_ids: (C, L) token ids, padded behind the end-of-text token.
        attention_mask: (C, L), 1 on tokens, 0 on padding.
        context: (C, n_ctx) positions that a learned context takes, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    context: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> Prompts:
        """The prompts of some of the classes."""
        context = None if self.context is None else self.context[rows]
        return Prompts(self.input_ids[rows], self.attention_mask[rows], context)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on another device."""
        context = None if self.context is None else self.context.to(device)
        return Prompts(self.input_ids.to(device), self.attention_mask.to(device), context)


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """The class names as a tuple.

    Raises:
        FVGError: none given, a name that is no text or blank, or a name that stands twice.
    """
    if isinstance(classes, str):
        raise FVGError(f"classes is one string, {classes!r}; give a list of class names, such as [{classes!r}, …].")
    if not isinstance(classes, Iterable):
        raise FVGError(f"classes must be a list of class names, but is a {type(classes).__name__}.")
    names = tuple(classes)
    if not names:
        raise FVGError("classes is empty; give at least one class name.")
    for name in names:
        if not isinstance(name, str) or not plain(name):
            raise FVGError(f"class names must be non-empty text, but one is {name!r:.200}.")
        if len(name) > MAX_CHARACTERS:
            raise FVGError(f"the class name {name[:40]!r}… has {len(name)} characters; a text tower reads far fewer.")
    seen: dict[str, str] = {}
    for name in names:
        if plain(name) in seen:
            raise FVGError(f"class {name!r} stands twice in classes (as {seen[plain(name)]!r}); remove or rename one.")
        seen[plain(name)] = name
    return names


def plain(name: str) -> str:
    """A class name as CLIP reads it: underscores are spaces."""
    return name.replace("_", " ").strip()


def check_context(name: str, tokens: int, words: str | None = "") -> None:
    """Refuses contexts before words are made for them.

    Raises:
        FVGError: more than `MAX_CONTEXT` tokens, or more than `MAX_CHARACTERS` characters.
    """
    if tokens > MAX_CONTEXT:
        raise FVGError(f"{name} is {tokens}, but a tower reads no more than {MAX_CONTEXT} learned tokens; give fewer.")
    if len(words or "") > MAX_CHARACTERS:
        raise FVGError(f"ctx_init has {len(words or '')} characters; give the {tokens} words that {name} asks for.")


def fill(template: str, name: str) -> str:
    """The template with a class name in it."""
    return template.replace("{}", plain(name))


def check_template(template: str) -> str:
    """The template.

    Raises:
        FVGError: it has not exactly one place `{}` for the class name.
    """
    if not isinstance(template, str) or template.count("{}") != 1 or len(template) > MAX_CHARACTERS:
        raise FVGError(
            f"template {template!r:.200} needs exactly one {{}} for the class name, such as {DEFAULT_TEMPLATE!r}."
        )
    return template


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], limit: int, *, reserve: int = 0, pad_to_limit: bool = False
) -> Prompts:
    """Token ids of whole prompts, padded to the longest of them (or to the tower's window).

    Args:
        tokenizer: a Hugging Face tokenizer that adds start and end tokens.
        texts: C prompts.
        limit: the text tower's window in tokens.
        reserve: tokens of the window that something else will take (MMRL's representation tokens need none).
        pad_to_limit: pad to `limit`, for towers that pool at the last position.

    Raises:
        FVGError: a prompt is longer than the window; the message names it and both lengths.
    """
    rows = [list(row) for row in tokenizer(list(texts), padding=False, truncation=False)["input_ids"]]
    room = limit - reserve
    for text, row in zip(texts, rows, strict=True):
        if len(row) > room:
            raise FVGError(
                f"the prompt {text[:80]!r} has {len(row)} tokens, but the text tower holds {room}"
                + (f" beside {reserve} learned ones" if reserve else "")
                + "; shorten the class name or the context."
            )
    length = limit if pad_to_limit else max(map(len, rows))
    pad = getattr(tokenizer, "pad_token_id", None)
    ids = torch.full((len(rows), length), int(pad) if pad is not None else rows[0][-1], dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return Prompts(ids, mask)


def with_context(
    tokenizer: Tokenizer,
    classes: Sequence[str],
    limit: int,
    *,
    words: str,
    n_ctx: int,
    position: Position = "end",
    pad_to_limit: bool = False,
) -> Prompts:
    """Prompts `<words> <name>.` with the first `n_ctx` tokens after the start marked as the learned context.

    CoOp's three layouts: `end` = [SOS] ctx name . EOT, `front` = [SOS] name ctx . EOT, `middle` = the context in two
    halves around the name (floor for an odd n_ctx). The end-of-text position is the same in all three.

    Returns:
        Prompts with `context` (C, n_ctx): the positions of context token 0, 1, … in each prompt.
    """
    prompts = tokenize(tokenizer, [f"{words} {plain(c)}." for c in classes], limit, pad_to_limit=pad_to_limit)
    ids = prompts.input_ids.clone()
    context = torch.arange(1, 1 + n_ctx).repeat(len(classes), 1)  # (C, n_ctx)
    if position != "end":
        before = n_ctx // 2 if position == "middle" else 0
        for i, name in enumerate(classes):
            length = len(tokenizer(plain(name), padding=False, truncation=False)["input_ids"]) - 2  # without SOS, EOT
            order = [*range(1, 1 + before), *range(1 + n_ctx, 1 + n_ctx + length), *range(1 + before, 1 + n_ctx)]
            ids[i, 1 : 1 + len(order)] = prompts.input_ids[i, torch.tensor(order)]
            context[i, before:] += length
    return Prompts(ids, prompts.attention_mask, context)
