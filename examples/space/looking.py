"""What the page shows of a picture: answers of CLIP, the tuner and FVG-PT, where each looks, the mask, r and b."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fvg_adapter import FVGModel, load, record_attention
from fvg_adapter.data import PairedTransform, UnreadableImageError
from fvg_adapter.data.images import read_picture
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import attention_mask_from_map
from fvg_adapter.visualize import overlay

MAX_BYTES = 20 * 2**20
MAX_CLASSES = 200
SHOWN = 384  # pixels of a side of the pictures on the page
TOP = 5


@dataclass(frozen=True)
class Look:
    """One picture as the models see it.

    answers: {"CLIP": {class: probability}, the tuner's kind: …, "FVG-PT": …}, the TOP most probable, best first.
    pictures: (RGB picture, caption). trust: r, prior_trust: b, both in [0, 1]. branch: what "auto" stood for.
    """

    answers: dict[str, dict[str, float]]
    pictures: list[tuple[Image.Image, str]]
    trust: float
    prior_trust: float
    branch: str


def class_names(text: str) -> list[str]:
    """Class names separated by commas or lines, without doubles.

    Raises:
        FVGError: fewer than two, or more than MAX_CLASSES.
    """
    names = list(dict.fromkeys(part.strip() for part in text.replace("\n", ",").split(",") if part.strip()))
    if not 2 <= len(names) <= MAX_CLASSES:
        raise FVGError(
            f"Type 2 to {MAX_CLASSES} different class names, separated by commas: cat, dog. {len(names)} given."
        )
    return names


def open_picture(path: str | None) -> Image.Image:
    """An upright RGB picture from an uploaded file.

    Raises:
        FVGError: no file, an empty or a huge one, or one that is no picture.
    """
    if not path:
        raise FVGError("Drop a picture first.")
    file = Path(path)
    size = file.stat().st_size
    if size == 0:
        raise FVGError(f"{file.name} is empty (0 bytes); drop another picture.")
    if size > MAX_BYTES:
        raise FVGError(f"{file.name} has {size / 2**20:.0f} MB; pictures up to {MAX_BYTES // 2**20} MB are read.")
    try:
        return read_picture(file, file.name).image
    except UnreadableImageError as error:
        raise FVGError(f"{file.name} is no picture that can be read. Drop a JPEG, PNG or WebP file.") from error


@functools.lru_cache(maxsize=2)
def open_adapter(name: str, base: str | None = None) -> FVGModel:
    """An adapter from a folder or a Hub id, around the base model that it names or another copy of it.

    Raises:
        FVGError: no name, nothing of ours there, or a tuner without the heads of FVG-PT.
    """
    if not name.strip():
        raise FVGError("Name an adapter: a Hub id such as me/pets-fvg, or a folder written by save_pretrained.")
    around: dict[str, Any] = {}
    if base:
        from transformers import AutoModel, AutoTokenizer

        around = {"clip": AutoModel.from_pretrained(base), "tokenizer": AutoTokenizer.from_pretrained(base)}
    model = load(name.strip(), **around)
    if not isinstance(model, FVGModel):
        raise FVGError(f"{name} holds a {model.kind} tuner alone; save an FVGModel, which wrap(tuner) makes.")
    return model.eval()


@torch.no_grad()
def look(model: FVGModel, picture: Image.Image, classes: list[str]) -> Look:
    """Scores a picture among any classes; the model's own class list comes back afterwards."""
    tuner, config = model.tuner, model.config
    transform = PairedTransform(tuner.encoder.image_size, config.image_mean, config.image_std, train=False)
    pixels = transform(picture)["pixel_values"].unsqueeze(0).to(tuner.encoder.device)  # (1, 3, H, W)
    with model.use_classes(classes):
        with record_attention(tuner.encoder.model, config.attention_layers) as record:
            prior_features = tuner.prior_image_features(pixels)
        clip_map = record.attention().mean((1, 2))  # (1, h, w)
        output = model(pixels, return_attention=True)
        assert output.foreground_attention is not None
        mask = attention_mask_from_map(output.foreground_attention, pixels.shape[-2:])  # (1, 1, H, W)
        gates = model(pixels, foreground_mask=mask, branch="new")
        scores = {
            "CLIP": tuner.scores(prior_features, tuner.prior_text_features()),
            tuner.kind: tuner.scores(tuner.image_features(pixels), tuner.text_features()),
            "FVG-PT": output.logits,
        }
        branch = model.branch_for("auto")
    seen = _seen(pixels[0], config.image_mean, config.image_std)
    tuned = output.foreground_attention
    kind = tuner.kind
    pictures = [
        (overlay(seen, clip_map[0]), "CLIP: attention"),
        (overlay(seen, tuned[0]), f"{kind}: attention"),
        (overlay(seen, tuned[0] * _patches(mask, tuned.shape[-2:])[0]), "FVG-PT: attention in the mask"),
        (overlay(_pale_outside(seen, mask[0, 0]), mask=mask[0]), "The mask"),
    ]
    assert gates.foreground_trust is not None and gates.prior_trust is not None
    return Look(
        {name: _top(logits, classes) for name, logits in scores.items()},
        pictures,
        float(gates.foreground_trust),
        float(gates.prior_trust),
        branch,
    )


def _top(logits: torch.Tensor, classes: list[str]) -> dict[str, float]:
    values, indices = logits.softmax(-1)[0].topk(min(TOP, len(classes)))
    return {classes[i]: p for i, p in zip(indices.tolist(), values.tolist(), strict=True)}


def _seen(pixels: torch.Tensor, mean: Any, std: Any) -> Image.Image:
    """Normalised pixels (3, H, W) back to a picture SHOWN pixels wide: the crop that the model sees."""
    image = pixels.cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)


def _patches(mask: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """A mask (1, 1, H, W) as the share of each patch that is foreground, (1, h, w)."""
    return torch.nn.functional.adaptive_avg_pool2d(mask, tuple(grid))[:, 0]


def _pale_outside(seen: Image.Image, mask: torch.Tensor) -> Image.Image:
    """The picture, nearly white where the mask (H, W) is 0."""
    inside = Image.fromarray((mask > 0.5).cpu().numpy()).resize(seen.size, Image.Resampling.NEAREST)
    return Image.composite(seen, Image.blend(seen, Image.new("RGB", seen.size, "white"), 0.7), inside)
