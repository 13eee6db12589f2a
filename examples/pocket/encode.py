"""The pocket CLIP's frozen features of composed pictures, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from . import captions, fast
from .concepts import HERE

MODEL = HERE / "model"


def load_model(folder: Path = MODEL) -> tuple[CLIPModel, CLIPTokenizer]:
    """The pocket CLIP in fp32 and its tokenizer."""
    return CLIPModel.from_pretrained(folder).eval().requires_grad_(False), CLIPTokenizer.from_pretrained(folder)


def normalised(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, 64, 64, 3) bytes to normalised pixels (N, 3, 64, 64)."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - fast.MEAN) / fast.STD


@torch.no_grad()
def image_features(model: CLIPModel, pictures: NDArray[np.uint8], masks: NDArray[np.bool_] | None = None) -> Tensor:
    """Unit features (N, 128); with masks, of the foreground views (mean colour outside the mask)."""
    parts = []
    for start in range(0, len(pictures), 256):
        pixels = normalised(pictures[start : start + 256])
        if masks is not None:
            pixels = pixels * torch.from_numpy(masks[start : start + 256])[:, None]
        parts.append(F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1))
    return torch.cat(parts)


@torch.no_grad()
def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, names: Sequence[str]) -> Tensor:
    """Unit features (C, 128) of "a photo of a {}."."""
    tokens = tokenizer([captions.TEMPLATE.format(n) for n in names], padding=True, return_tensors="pt")
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest column is the label, in percent.

    >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    50.0
    """
    return 100 * (logits.argmax(1) == labels).float().mean().item()
