"""What is measured: a CLIP of ViT-B/16 size with random weights (or a tiny one, for the test), images, masks, names.

Random weights: accuracies would mean nothing, sizes and costs are the real ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
TEXT = {"eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        name: "vit_b16" or "tiny". image: pixels a side. batch: of every step. classes: of steps and inference.
        many: classes of the memory figure. shots, shot_classes: of the bank's figure. some: images that stand for more
            of them. growth: class counts of the heads' cost. layers: of each tower. clip: arguments of CLIPConfig.
    """

    name: str = "vit_b16"
    image: int = 224
    batch: int = 8
    classes: int = 100
    many: int = 1000
    shots: int = 16
    shot_classes: int = 50
    some: int = 16
    growth: tuple[int, ...] = (10, 100, 1000, 3000, 10_000)
    layers: int = 12
    clip: Mapping[str, Any] = field(
        default_factory=lambda: {"text_config": TEXT, "vision_config": {"patch_size": 16}, "projection_dim": 512}
    )


SIZES = {
    "vit_b16": Size(),
    "tiny": Size(
        name="tiny",
        image=32,
        batch=2,
        classes=6,
        many=40,
        shots=2,
        shot_classes=3,
        some=4,
        growth=(2, 8, 32),
        layers=2,
        clip={
            "text_config": {**TEXT, **TINY},
            "vision_config": {**TINY, "image_size": 32, "patch_size": 8},
            "projection_dim": 16,
        },
    ),
}


class Setting:
    """A size, and how often pairs take turns. Everything is made anew on request, from fixed seeds."""

    def __init__(self, size: str = "vit_b16", pairs: int = 5) -> None:
        self.size, self.pairs = SIZES[size], pairs
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self.labels = torch.arange(self.size.batch)

    def clip(self, **options: Any) -> CLIPModel:
        """A CLIP with random weights."""
        torch.manual_seed(0)
        return CLIPModel._from_config(CLIPConfig(**copy.deepcopy(dict(self.size.clip))), **options).eval()

    def names(self, count: int | None = None) -> list[str]:
        """Class names of ordinary length: 10 tokens with the words around them."""
        return [f"class number {i}" for i in range(count or self.size.classes)]

    def pixels(self, count: int | None = None) -> Tensor:
        """(B, 3, H, W)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(count or self.size.batch, 3, self.size.image, self.size.image, generator=generator)

    def masks(self, count: int | None = None) -> Tensor:
        """(B, H, W): a box that covers a quarter of the picture."""
        masks = torch.zeros(count or self.size.batch, self.size.image, self.size.image)
        quarter = self.size.image // 4
        masks[:, quarter : 3 * quarter, quarter : 3 * quarter] = 1
        return masks

    def pictures(self, count: int, classes: int) -> Pictures:
        """A data set in memory."""
        return Pictures(self.pixels(count), self.masks(count), self.names(classes))


class Pictures(Dataset[dict[str, Any]]):
    """Normalised pictures with masks; reading from a disk is not measured."""

    def __init__(self, pixels: Tensor, masks: Tensor, classes: list[str]) -> None:
        self.pixels, self.masks, self.classes = pixels, masks.unsqueeze(1), classes
        self.labels = [i % len(classes) for i in range(len(pixels))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "pixel_values": self.pixels[index],
            "labels": self.labels[index],
            "foreground_mask": self.masks[index],
        }
