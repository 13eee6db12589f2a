"""Before and after, side by side: where plain CLIP, the tuner and FVG-PT look in some pictures, and what they answer.

`look` gives the numbers and maps, `panels` draws them. Needs matplotlib. Imports visualize, model and what lies below.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from fvg_adapter.attention import record_attention
from fvg_adapter.config import CLIP_MEAN, CLIP_STD
from fvg_adapter.errors import FVGError, closest, nearest
from fvg_adapter.features import attention_in_mask
from fvg_adapter.foreground import attention_mask_from_map, mask_area, prepare_mask
from fvg_adapter.model import FVGModel, answer_score
from fvg_adapter.modes import evaluating, full_precision
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.passes import untouched
from fvg_adapter.visualize import overlay

SIDE = 320
"""Pixels of a drawn picture, at least."""
MAPS: tuple[str, ...] = ("relevance", "attention", "rollout")
_SAME = (
    "Prompts of the text tower leave CLIP's as it is, and the heads of FVG-PT the tuner's: relevance tells them apart."
)
SAID: dict[str, str] = {
    "relevance": "Class relevance: what spoke for each model's own answer, brightest where most did.",
    "attention": f"Attention of the token that pools. {_SAME}",
    "rollout": f"Attention rollout through all layers. {_SAME}",
}
"""What is written below the panels."""


@dataclass(frozen=True)
class View:
    """One model's view of one picture.

    Attributes:
        name: "CLIP", the tuner's kind, or "FVG-PT". answer: the most probable class; probability: its, in [0, 1].
        map: (h, w) float32, not negative. inside: share of the map inside the mask; None without a
            mask, or where the map is empty.
    """

    name: str
    answer: str
    probability: float
    map: Tensor
    inside: float | None


@dataclass(frozen=True)
class Panel:
    """One picture: views of CLIP, the tuner and FVG-PT (those that there are), and the gates' trusts.

    Attributes:
        views: in that order. pixels: (3, H, W) as the models see it. mask: (1, H, W) of 0 and 1, or None.
        foreground_trust, prior_trust: r and b in [0, 1]; None where nothing gives them (r needs a mask).
        area: share of the picture that the mask covers.
    """

    views: list[View]
    pixels: Tensor
    mask: Tensor | None
    foreground_trust: float | None
    prior_trust: float | None
    area: float | None


def look(
    model: FVGModel | Tuner,
    pictures: Any,
    masks: Any = None,
    *,
    classes: Sequence[str] | None = None,
    maps: str = "relevance",
    layers: Any = (-1,),
    normal: tuple[Sequence[float], Sequence[float]] | None = None,
) -> list[Panel]:
    """Where plain CLIP, the tuner and FVG-PT look, what they answer, and how far the gates trust; changes nothing.

    Args:
        model: an FVGModel, or a tuner alone.
        pictures: a PIL picture, several, or normalised pixels (B, 3, H, W).
        masks: a mask for each picture (PIL, or (B, 1, H, W) of 0 and 1), "attention" for the model's own (of the
            layers and threshold of an FVGModel's config), or None. A mask is cropped as its picture is.
        classes: class names to score; the model's current ones when None.
        maps: "relevance" of each model's own answer, "attention", or "rollout".
        layers: vision layers of attention and relevance, as for `record_attention`.
        normal: mean and standard deviation that PIL pictures get; those of an FVGModel's config, or CLIP's, when None.

    Raises:
        FVGError: no pictures, another number of masks, or an unknown map.
    """
    if maps not in MAPS:
        raise FVGError(f"maps is {maps!r}. {nearest(maps, MAPS)}")
    tuner = model.tuner if isinstance(model, FVGModel) else model
    pixels, mask = _inputs(model, tuner, pictures, masks, normal)
    with evaluating(model), model.use_classes(list(model.classes) if classes is None else list(classes)):
        names = list(model.classes)
        seen = [("CLIP", *_plain(tuner, pixels, maps, layers))] if tuner.prior_is_clip else []
        if tuner.kind != "zero_shot":
            seen.append((_title(tuner), *_looked(tuner, pixels, maps, layers)))
        trust = prior_trust = None
        if isinstance(model, FVGModel):
            seen.append(("FVG-PT", *_looked(model, pixels, maps, layers)))
        if masks == "attention":
            asked, threshold = layers, 1.0
            if isinstance(model, FVGModel):  # as in training
                asked, threshold = model.config.attention_layers, model.config.attention_threshold
            with torch.no_grad(), record_attention(tuner, asked) as record:
                tuner.image_features(pixels)
            size = (pixels.shape[-2], pixels.shape[-1])
            mask = attention_mask_from_map(record.attention().mean((1, 2)), size, threshold=threshold)
        if isinstance(model, FVGModel):
            with torch.no_grad():
                output = model(pixels, foreground_mask=mask, branch="new")  # b is asked there, whichever answers
            trust, prior_trust = output.foreground_trust, output.prior_trust
    area = None if mask is None else mask_area(mask)
    panels = []
    for i in range(len(pixels)):
        views = []
        for name, logits, found in seen:
            chances = logits[i].softmax(-1)
            share = None if mask is None else float(attention_in_mask(found[i : i + 1], mask[i : i + 1]))
            inside = share if bool(found[i].any()) else None  # nothing spoke for the answer
            best = int(chances.argmax())
            views.append(View(name, names[best], float(chances[best]), found[i].cpu(), inside))
        numbers = [None if value is None else float(value[i]) for value in (trust, prior_trust, area)]
        panels.append(Panel(views, pixels[i].cpu(), None if mask is None else mask[i].cpu(), *numbers))
    return panels


def panels(
    model: FVGModel | Tuner,
    pictures: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    masks: Any = None,
    classes: Sequence[str] | None = None,
    maps: str = "relevance",
    layers: Any = (-1,),
    labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> Any:
    """Draws `look`: a row a picture, with its mask outlined, then CLIP, the tuner and FVG-PT, with answers, r and b.

    Args:
        model, pictures, masks, classes, maps, layers: as for `look`.
        path: the picture file to write, or None.
        labels: the true class of each picture: answers are then green or red. titles: a heading for each picture.

    Returns:
        The drawing, a PIL picture.

    Raises:
        FVGError: as `look`; another number of labels or titles than pictures; a label that is no class.

    Example:
        >>> panels(model, [picture], "before_after.png", masks=[mask])                  # doctest: +SKIP
    """
    found = look(model, pictures, masks, classes=classes, maps=maps, layers=layers)
    for name, given in (("labels", labels), ("titles", titles)):
        if given is not None and len(given) != len(found):
            raise FVGError(f"{len(given)} {name} were given for {len(found)} pictures; give one for each.")
    check_labels(labels or [], model.classes if classes is None else classes)
    config = getattr(model, "config", None)
    normal = (CLIP_MEAN, CLIP_STD) if config is None else (config.image_mean, config.image_std)
    drawing = draw(found, maps, normal, labels=labels, titles=titles)
    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        drawing.save(target)
    return drawing


def draw(
    found: Sequence[Panel],
    maps: str,
    normal: tuple[Sequence[float], Sequence[float]],
    *,
    labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> Any:
    """The drawing of panels as a PIL picture; `normal` is the mean and standard deviation of their pixels."""
    from PIL import Image

    columns = 1 + len(found[0].views)
    figure = Figure(figsize=(2.9 * columns, 3.5 * len(found) + 0.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), columns, squeeze=False)
    for row, panel in enumerate(found):
        mean, std = normal
        shown: list[tuple[Any, str, str, str]] = []
        heading = titles[row] if titles else labels[row] if labels else "picture"
        lines = [] if panel.area is None else [f"mask: {100 * panel.area:.0f} % of the picture"]
        gates = {"r": panel.foreground_trust, "b": panel.prior_trust}
        lines += [", ".join(f"{k} = {v:.2f}" for k, v in gates.items() if v is not None)]
        style: dict[str, Any] = {"mean": mean, "std": std, "side": SIDE}
        shown.append((overlay(panel.pixels, None, panel.mask, **style), heading, "\n".join(lines), "black"))
        for view in panel.views:
            colour = "black" if labels is None else "#1b6e3c" if view.answer == labels[row] else "#b3261e"
            text = f"{view.answer}, {100 * view.probability:.0f} %"
            text += "" if view.inside is None else f"\n{100 * view.inside:.0f} % inside the mask"
            shown.append((overlay(panel.pixels, view.map, panel.mask, **style), view.name, text, colour))
        for axis, (picture, title, text, colour) in zip(axes[row], shown, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=10, wrap=True)
            axis.set_xlabel(text, fontsize=9, color=colour)
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
    said = SAID[maps] if columns > 2 else SAID[maps].removesuffix(_SAME).rstrip()  # one model: no others to tell apart
    figure.supxlabel(textwrap.fill(said, 48 * columns) + _gates_said(found), fontsize=8, color="#444444")
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def check_labels(labels: Sequence[str], classes: Sequence[str]) -> None:
    """Refuses a true class that is not among those that are scored: no answer could ever be right.

    Raises:
        FVGError: naming it and the nearest one.
    """
    for label in labels:
        if label not in classes:
            near = closest(label, classes)
            raise FVGError(
                f"the label {label!r} is not among the {len(classes)} classes that are scored. {near}Give classes that "
                "hold it."
            )


def _gates_said(found: Sequence[Panel]) -> str:
    said = []
    if any(panel.foreground_trust is not None for panel in found):
        said.append("r: trust in the mask (training only)")
    if any(panel.prior_trust is not None for panel in found):
        said.append("b: trust in plain CLIP on new classes")
    return "\n" + "; ".join(said) + "." if said else ""


def _title(tuner: Tuner) -> str:
    return type(tuner).__name__


def _inputs(
    model: FVGModel | Tuner, tuner: Tuner, pictures: Any, masks: Any, normal: Any
) -> tuple[Tensor, Tensor | None]:
    """Pixels (B, 3, H, W) and masks (B, 1, H, W) as the model sees them."""
    from fvg_adapter.data import PairedTransform

    config = getattr(model, "config", None)
    normal = normal or (() if config is None else (config.image_mean, config.image_std))
    device = tuner.encoder.device
    given = None if masks is None or isinstance(masks, str) else masks
    if isinstance(masks, str) and masks != "attention":
        raise FVGError(f'masks is {masks!r}; give a mask for each picture, "attention", or None.')
    if isinstance(pictures, Tensor):
        pixels = (pictures if pictures.dim() == 4 else pictures.unsqueeze(0)).to(device)
        return pixels, None if given is None else prepare_mask(given, pixels)
    listed = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    cut = list(given) if isinstance(given, (list, tuple)) else [given] * len(listed) if given is None else [given]
    if not listed or len(cut) != len(listed):
        raise FVGError(
            f"{len(listed)} pictures and {0 if given is None else len(cut)} masks were given; give one each."
        )
    transform = PairedTransform(tuner.encoder.image_size, *normal, train=False)
    items = [transform(image.convert("RGB"), mask) for image, mask in zip(listed, cut, strict=True)]
    pixels = torch.stack([item["pixel_values"] for item in items]).to(device)
    if given is None:
        return pixels, None
    return pixels, (torch.stack([item["foreground_mask"] for item in items]).to(device) > 0.5).float()


def _looked(model: FVGModel | Tuner, pixels: Tensor, maps: str, layers: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, C), and the map of each picture (B, h, w)."""

    def logits(x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        return output.logits, answer_score(model, output)

    return _recorded(model, pixels, maps, layers, logits)


def _plain(tuner: Tuner, pixels: Tensor, maps: str, layers: Any) -> tuple[Tensor, Tensor]:
    """The same of plain CLIP."""
    text = tuner.prior_text_features()

    def logits(x: Tensor) -> tuple[Tensor, Tensor]:
        with untouched(gradients=torch.is_grad_enabled()):
            features = F.normalize(full_precision(tuner.encoder.image_features(x)), dim=-1)
            found = tuner.scores(features, text)
            return found, found.max(-1).values

    return _recorded(tuner.clip, pixels, maps, layers, logits)


def _recorded(model: nn.Module, pixels: Tensor, maps: str, layers: Any, logits_of: Any) -> tuple[Tensor, Tensor]:
    relevance = maps == "relevance"
    with (
        record_attention(model, layers, rollout=maps == "rollout", relevance=relevance) as record,
        torch.set_grad_enabled(relevance),
    ):
        logits, score = logits_of(pixels.clone().requires_grad_(relevance))
        if relevance:
            found = record.relevance(score)
        else:
            found = record.rollout() if maps == "rollout" else record.attention().mean((1, 2))
    return logits.detach(), found.detach()
