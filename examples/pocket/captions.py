"""What the pretraining captions say, and the small CLIP tokenizer that reads them."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from . import backgrounds
from .concepts import Concept

TEMPLATE = "a photo of a {}."  # the hand-written template of the tasks
PLAIN = (
    TEMPLATE, TEMPLATE, "a photo of a {}", "a picture of a {}.", "a drawing of a {}.", "an image of a {}.",
    "a small {}.", "this is a {}.", "{}.", "a {}",
)  # fmt: skip
PLACED = ("a photo of a {} {}.", "a photo of a {} {}", "a {} {}.", "a picture of a {} {}.", "a drawing of a {} {}.")
PLACED_SHARE = 0.4
VOCABULARY = 2002
CONTEXT = 32


def caption(rng: np.random.Generator, name: str, family: int) -> str:
    """One caption: the object's name and, in 40 %, its background."""
    if rng.random() < PLACED_SHARE:
        words = backgrounds.FAMILIES[backgrounds.NAMES[family]][1]
        return PLACED[int(rng.integers(len(PLACED)))].format(name, words)
    return PLAIN[int(rng.integers(len(PLAIN)))].format(name)


def corpus(concepts: list[Concept]) -> list[str]:
    """Every name in two templates and every background phrase: what the byte-pair merges are learned from."""
    phrases = [words for _, words in backgrounds.FAMILIES.values()]
    placed = [PLACED[0].format(c.name, phrases[i % len(phrases)]) for i, c in enumerate(concepts)]
    return placed + [template.format(c.name) for c in concepts for template in PLAIN[-3:]]


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Up to `count` byte-pair merges, the most frequent pair first; ties go to the pair that sorts first."""
    frequency = Counter(word for text in texts for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower()))
    words = [([*word[:-1], word[-1] + "</w>"], n) for word, n in sorted(frequency.items())]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, n in words:
            for pair in pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts, _ in words:
            for k in range(len(parts) - 2, -1, -1):
                if tuple(parts[k : k + 2]) == best:
                    parts[k : k + 2] = ["".join(best)]
    return merges


def train_tokenizer(concepts: list[Concept], folder: Path) -> CLIPTokenizer:
    """Learn byte-pair merges and write CLIP's own `vocab.json` and `merges.txt`; the end token has the largest id."""
    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters]
    merges = learn_merges(corpus(concepts), VOCABULARY - 2 - len(words))
    words += ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({w: i for i, w in enumerate(dict.fromkeys(words))}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n", encoding="utf-8"
    )
    config = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": CONTEXT,
        "do_lower_case": True, "errors": "replace", "add_prefix_space": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
