"""The pocket suite: frozen pictures, a model that loads like any CLIP, and tables whose arithmetic is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.pocket import results, tasks  # noqa: E402
from fvg_adapter.data import MaskedImageFolder, PairedTransform  # noqa: E402
from fvg_adapter.tuners import ZeroShot  # noqa: E402

POCKET = ROOT / "examples" / "pocket"


def test_a_task_has_the_same_pixels_on_every_machine() -> None:
    expected = json.loads((POCKET / "tasks.json").read_text())
    assert tasks.digest("fruit_vegetables") == expected["fruit_vegetables"]["sha256"]


def test_the_committed_task_and_model_fit_together() -> None:
    clip = CLIPModel.from_pretrained(POCKET / "model")
    assert sum(p.numel() for p in clip.parameters()) < 2.5e6 and clip.dtype == torch.float32
    processor = CLIPImageProcessor.from_pretrained(POCKET / "model")
    transform = PairedTransform(64, processor.image_mean, processor.image_std, train=False)
    pictures = MaskedImageFolder(POCKET / "data", "test", masks="require", transform=transform)
    assert pictures.classes == tasks.class_names("fruit_vegetables")
    tuner = ZeroShot(clip, CLIPTokenizer.from_pretrained(POCKET / "model"), pictures.classes)
    picked = range(0, len(pictures), 6)
    images = torch.stack([pictures[i]["pixel_values"] for i in picked])
    with torch.no_grad():
        right = tuner(images).logits.argmax(-1) == torch.tensor([pictures.labels[i] for i in picked])
    assert right.float().mean() > 0.5  # 24 classes: chance is 4 %


def test_spoiled_masks_are_a_quarter_of_the_training_masks_only() -> None:
    spoiled = json.loads((POCKET / "data" / "spoiled.json").read_text())
    train = len(MaskedImageFolder(POCKET / "data", "train").samples)
    names = spoiled if isinstance(spoiled, list) else list(spoiled)
    assert 0.15 < len(names) / train < 0.35
    assert all("test" not in str(name).split("/")[0] for name in names)


def test_sign_flip_by_hand() -> None:
    assert results.sign_flip([1.0, 1.0, 1.0]) == pytest.approx(2 / 8)
    assert results.sign_flip([1.0, -1.0]) == 1.0
    assert results.sign_flip([3.0, 1.0]) == pytest.approx(2 / 4)


def test_averages_and_paired_differences_by_hand() -> None:
    one = {"a": [1.0, 3.0], "b": [5.0, 7.0]}
    other = {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert results.average(one) == (4.0, pytest.approx(2**0.5))  # per seed: 3 and 5
    mean, spread, p, above = results.paired(one, other)
    assert (mean, p, above) == (2.5, 0.5, 2)
    assert spread == pytest.approx(4.5**0.5)
