"""The model card of a saved adapter: README.md, made from its config.json and from nothing else.

It names no path of this machine, and one that a person edited is never overwritten (`marks`). `save_pretrained` and
`push_to_hub` write it; huggingface_hub's ModelCard tools make and check its header.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fvg_adapter.card.figures import figures_of, sound_about
from fvg_adapter.card.marks import header_problem, is_edited, marked, read_card
from fvg_adapter.card.metadata import metadata_of, title_of
from fvg_adapter.card.text import sections

__all__ = ["figures_of", "header_problem", "is_edited", "make_card", "read_card", "sound_about"]


def make_card(config: Mapping[str, Any], repo_id: str | None = None, revision: str | None = None) -> str:
    """A model card.

    Args:
        config: what config.json of the adapter holds; its "about" has figures, data, licence and whether there is a
            picture.
        repo_id: where the adapter lies on the Hub; None for a folder, from which the card's example then loads.
        revision: the branch that the example loads, where it is not the main one.

    Returns:
        The text of README.md: a YAML header for the Hub and Markdown, with a last line by which a later save knows
        whether the card was edited.
    """
    config = {**config, "about": sound_about(config.get("about"))}
    header = metadata_of(config, repo_id or title_of(config)).to_yaml(line_break="\n")
    body = "\n\n".join(sections(config, repo_id, revision))
    return marked(f"---\n{header}\n---\n\n{body}")
