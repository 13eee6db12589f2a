"""Pictures with labels, loaded as anybody's own code would; the loops beside this file share it, before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def pixels(file: str | Path, size: int = 64) -> Tensor:
    """A picture as CLIP wants it: (3, size, size) float32. ViT-B/16 wants size 224."""
    with Image.open(file) as picture:
        values = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy((values / 255 - MEAN) / STD).permute(2, 0, 1).float()  # (H, W, 3) -> (3, H, W)


class Pictures(Dataset[dict[str, Tensor]]):
    """The first few pictures of every class of a folder: items {"pixel_values": (3, H, W), "labels": ()}."""

    def __init__(self, folder: str, split: str, shots: int = 4) -> None:
        places = sorted(place for place in (Path(folder) / split).iterdir() if place.is_dir())
        self.classes = [place.name.replace("_", " ") for place in places]
        found = [(file, label) for label, place in enumerate(places) for file in sorted(place.iterdir())[:shots]]
        self.files, self.labels = [file for file, _ in found], [label for _, label in found]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": pixels(self.files[index]), "labels": torch.tensor(self.labels[index])}
