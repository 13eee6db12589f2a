"""An adapter on the pocket model and one of its pictures, for the tests of the Space."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPModel, CLIPTokenizer

from fvg_adapter import wrap
from fvg_adapter.tuners import CoOp

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "examples" / "pocket"
PICTURE = POCKET / "data" / "test" / "banana" / "00.webp"
CLASSES = ["banana", "lemon", "carrot"]


def save_adapter(folder: Path) -> str:
    """Writes an adapter that has learnt nothing, for three classes."""
    model = POCKET / "model"
    clip, tokenizer = CLIPModel.from_pretrained(model), CLIPTokenizer.from_pretrained(model)
    tuner = CoOp(clip, tokenizer, CLASSES)
    tuner.save_pretrained(folder / "tuner")
    wrap(tuner).save_pretrained(folder / "adapter")
    return str(folder / "adapter")
