"""Segmenters as foreground sources: every family on tiny random models, cleaning, frames, prompts, and the loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from conftest import make_clip
from fvg_adapter import FeatureBank, unwrap, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import masks_from, source_name
from fvg_adapter.segmenters import STUFF, Segmenter, clean, source_named
from fvg_adapter.segmenters.families import FAMILIES, main_object
from fvg_adapter.segmenters.frames import Framing
from fvg_adapter.segmenters.labels import foreground_labels
from tiny_segmenters import BUILT, CLIP_TEXT, LABELS, SIDE, tiny

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PROCESSOR = {"size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}


class Words:
    """A tokenizer with one token a word, the same in every process."""

    def __init__(self, top: int = 99, end: int = 98) -> None:
        self.top, self.end = top, end
        self.seen: list[str] = []

    def __call__(self, texts: list[str], return_tensors: str | None = None, **options: Any) -> dict[str, Any]:
        self.seen += texts
        rows = [[1 + sum(map(ord, w)) % (self.end - 2) for w in text.split()] + [self.end] for text in texts]
        fixed = options.get("padding") == "max_length"
        length = options["max_length"] if fixed else max(map(len, rows))
        ids = [row + [0] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        if return_tensors is None:
            return {"input_ids": ids}
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def words(family: str) -> Words:
    return Words(CLIP_TEXT["vocab_size"], 49407) if family in ("clipseg", "sam3", "oneformer") else Words()


def segmenter(family: str, **options: Any) -> Segmenter:
    if family == "grounding-dino":
        return Segmenter(
            tiny("sam2"), PROCESSOR, detector=tiny(family), detector_processor=PROCESSOR, detector_tokenizer=words(family),
            **options,
        )
    return Segmenter(tiny(family), PROCESSOR, words(family), **options)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    array[8:20, 10:28] = rng.integers(150, 255, 3)
    return Image.fromarray(array)


# -- every family --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILT)
def test_every_family_gives_masks_of_pixels_and_of_pictures(family: str) -> None:
    made = segmenter(family, threshold=0.01, score=0.001, batch_size=2)
    pixels = torch.randn(3, 3, 24, 36)
    masks = made(pixels, classes=["cat", "dog", "tabby cat"])
    assert masks.dtype == torch.bool and masks.shape == (3, 24, 36)
    shown = made.masks([picture(0), picture(1, (30, 50)), picture(2)], ["cat", "dog", "cat"])
    assert [tuple(m.shape) for m in shown] == [(30, 40), (50, 30), (30, 40)]
    assert all(m.dtype == torch.bool for m in shown)
    assert made.prompted == (family in ("clipseg", "sam3", "grounding-dino"))


@pytest.mark.parametrize("family", BUILT)
def test_a_batch_is_its_pictures_one_by_one(family: str) -> None:
    made = segmenter(family, threshold=0.3, score=0.05, fill_holes=False)
    pictures, names = [picture(0), picture(1, (30, 50)), picture(2)], ["cat", "dog", "tabby cat"]
    together = made.masks(pictures, names)
    for one, name, mask in zip(pictures, names, together, strict=True):
        alone = made.masks([one], [name])[0]
        assert (alone == mask).float().mean() > 0.99  # sums of another order may tip a pixel at the threshold


def test_every_family_in_the_table_is_tried_or_shares_a_row_with_one_that_is() -> None:
    tried = {FAMILIES[name.replace("_", "-")] for name in BUILT if name.replace("_", "-") in FAMILIES}
    # kin that differ in their frame alone
    assert {n for n, row in FAMILIES.items() if row not in tried} <= {"sam3_tracker", "eomt_dinov3", "sam3"}


def test_clipseg_is_the_models_own_probability() -> None:
    model, tokens = tiny("clipseg"), words("clipseg")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    made = Segmenter(model, {**PROCESSOR, "image_mean": (0, 0, 0), "image_std": (1, 1, 1)}, tokens, fill_holes=False)
    rgb = pixels * 0.1 + 0.5
    with torch.no_grad():
        logits = model(pixel_values=rgb, **tokens(["a cat", "dog"], return_tensors="pt")).logits
    masks = made((rgb - 0.5) / 0.25, classes=["a_cat", "dog"], image_mean=MEAN, image_std=STD)
    assert (masks == (logits.sigmoid() >= 0.5)).float().mean() > 0.999
    assert tokens.seen[-2:] == ["a cat", "dog"]
    assert 0.02 < masks.float().mean() < 0.98


def test_the_prompt_decides_the_mask() -> None:
    made = segmenter("clipseg", prompt="a photo of a {}")
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert (made(pixels, classes=["cat"]) != made(pixels, classes=["hot air balloon"])).any()
    assert made._part.tokenizer.seen[-1] == "a photo of a hot air balloon"


@pytest.mark.skipif("sam3" not in BUILT, reason="this transformers has no SAM 3") if False else pytest.mark.filterwarnings("default")
def test_sam3_takes_the_instances_that_reach_the_score() -> None:
    if "sam3" not in BUILT:
        return
    made = segmenter("sam3", score=0.2, fill_holes=False)
    masks = torch.full((1, 3, 4, 4), -5.0)
    masks[0, 0, :2], masks[0, 1, 2], masks[0, 2, 3] = 5.0, 5.0, 5.0

    class Fake(nn.Module):
        def forward(self, **given: Any) -> Any:
            return SimpleNamespace(
                pred_masks=masks, pred_logits=torch.tensor([[2.0, 1.5, -5.0]]), presence_logits=torch.tensor([[-1.0]])
            )

    # presence 0.269: 0.88, 0.82 and 0.007 become 0.237, 0.220 and 0.002
    part = made._part
    object.__setattr__(part, "model", Fake())
    object.__setattr__(part, "tokenizer", None)
    object.__setattr__(part.__class__, "asked", part.__class__.asked)
    found = made._part.family.read(_Asked(part), SimpleNamespace(pixels=None, sizes=[(4, 4)]), ["cat"])
    assert (found[0] > 0.5).tolist() == [[True] * 4] * 3 + [[False] * 4]
    object.__setattr__(part, "score", 0.23)
    found = made._part.family.read(_Asked(part), SimpleNamespace(pixels=None, sizes=[(4, 4)]), ["cat"])
    assert (found[0] > 0.5).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
