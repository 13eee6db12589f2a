"""Segmenter: one foreground source over all families. Imports families, frames and cleaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL.Image import Image as PILImage
from torch import Tensor, nn

from fvg_adapter.config import CLIP_MEAN, CLIP_STD
from fvg_adapter.errors import FVGError
from fvg_adapter.segmenters.cleaning import NOTHING, check_cleaning, clean
from fvg_adapter.segmenters.families import Part, boxed, detect, family_of
from fvg_adapter.segmenters.frames import Frames, framing_of
from fvg_adapter.segmenters.labels import foreground_labels
from fvg_adapter.segmenters.loading import load_model, load_tokenizer, preprocessing

MOST_BOXES = 5
"""Boxes of a detector that are handed on, the surest first."""


class Segmenter:
    """Foreground masks from a segmentation model; give it to `wrap(…, foreground=segmenter)` or call `masks`.

    | family | asked with | foreground |
    |---|---|---|
    | CLIPSeg | the class name | the probability of the prompt |
    | SAM 3 | the class name | all instances whose score reaches `score` |
    | Grounding DINO and a SAM (1, HQ, 2, 3 tracker) | the class name | masks of up to 5 boxes that reach `score` |
    | a SAM alone | a grid of points | the main object: see `families.main_object` |
    | …ForSemanticSegmentation (SegFormer, DPT, BEiT, UperNet, …) | nothing | the probability of `labels` |
    | MaskFormer, Mask2Former, OneFormer, EoMT, DETR | nothing | the surest query of `labels` |
    | any module from pixels to logits (BiRefNet's code, say) | nothing | sigmoid of the last output |

    The model is left as it is; nothing learns here. A picture in which nothing reaches `score` gets an empty mask.

    Args:
        model: a transformers model, a pipeline ("image-segmentation", "mask-generation") or a module of the last row.
        processor: its processor, image processor or the JSON of one: size, mean and deviation; the family's when None.
        tokenizer: of a model that is asked with words (a processor may hold it).
        detector: a Grounding DINO, with `detector_processor` (image size and tokenizer) as above.
        prompt: made of the class name, with one {}. A detector's is lowered and ends with a full stop.
        labels: names of the foreground labels of a semantic or panoptic model; all but `STUFF` when None.
        threshold: foreground from this probability on.
        score: from which an instance or a box counts: 0.3, for Grounding DINO 0.25, the values of their processors.
        points: a side of the grid of points.
        side: of the frame in pixels, where it is not the model's own.
        largest, fill_holes, area: see `clean`.
        batch_size: pictures at once.

    Attributes:
        prompted: whether class names are needed.
        name: what the model was loaded from, for messages and records.

    Raises:
        FVGError: a missing tokenizer or detector, unknown labels, numbers out of range.

    Example:
        >>> segmenter = Segmenter.from_pretrained("CIDAS/clipseg-rd64-refined")         # doctest: +SKIP
        >>> segmenter.masks([picture], ["cat"])[0].shape                                # doctest: +SKIP
        torch.Size([480, 640])
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        tokenizer: Any = None,
        *,
        detector: nn.Module | None = None,
        detector_processor: Any = None,
        detector_tokenizer: Any = None,
        prompt: str = "{}",
        labels: Sequence[str] | None = None,
        threshold: float = 0.5,
        score: float | None = None,
        points: int = 5,
        side: int | None = None,
        largest: bool = False,
        fill_holes: bool = True,
        area: tuple[float, float] = NOTHING,
        batch_size: int = 8,
    ) -> None:
        if hasattr(model, "model") and hasattr(model, "preprocess"):  # a pipeline
            processor = processor or getattr(model, "image_processor", None)
            tokenizer = tokenizer or getattr(model, "tokenizer", None)
            model = model.model
        _check(model, prompt, threshold, score, points, batch_size)
        check_cleaning(largest, fill_holes, area)
        self._part = _part(model, processor, tokenizer, prompt, labels, score, points, side)
        self._detector: Part | None = None
        if detector is not None:
            if not self._part.family.takes_boxes:
                raise FVGError(f"a detector's boxes need a SAM, but the model is a {type(model).__name__}.")
            template = prompt if prompt.endswith(".") else prompt + "."
            self._detector = _part(
                detector, detector_processor, detector_tokenizer, template, None, score, points, None, detects=True
            )
        elif type(model).__name__.endswith("ForObjectDetection"):
            raise FVGError(
                f"a {type(model).__name__} gives boxes, not masks; give it as detector=… of a SAM, or load "
                '"DETECTOR+SAM" with from_pretrained.'
            )
        self.prompted: bool = self._detector is not None or self._part.family.prompted
        self.threshold: float = threshold
        self.largest: bool = largest
        self.fill_holes: bool = fill_holes
        self.area: tuple[float, float] = area
        self.batch_size: int = batch_size
        self.name: str = "+".join(_name(part) for part in (self._detector, self._part) if part is not None)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        detector: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Segmenter:
        """A segmenter from the Hub or a folder.

        Args:
            name: Hub id or folder; "DETECTOR+SAM" names a Grounding DINO and the SAM that takes its boxes.
            detector: the same, given apart. device: where to put it. dtype: float16 or bfloat16 for a GPU.
            revision: of the model (not of a detector). trust_remote_code: run a model's own code.
            options: of `Segmenter`.

        Raises:
            FVGError: it cannot be loaded, or is no segmenter that we know.
        """
        from pathlib import Path

        if detector is None and "+" in name and not Path(name).exists():
            detector, name = name.split("+", 1)
        loading: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        model = load_model(name, trust_remote_code=trust_remote_code, revision=revision, **loading)
        given: dict[str, Any] = {"processor": preprocessing(name, revision=revision), **options}
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if (family_of(model).prompted or kind == "oneformer") and detector is None:
            given.setdefault("tokenizer", load_tokenizer(name, revision=revision))
        if detector is not None:
            given["detector"] = load_model(detector, **loading)
            given["detector_processor"] = preprocessing(detector)
            given["detector_tokenizer"] = load_tokenizer(detector)
        made = cls(model, **given)
        return made if device is None else made.to(device)

    def to(self, device: str | torch.device) -> Segmenter:
        """Moves the models."""
        for part in self._parts():
            part.model.to(device)
        return self

    @property
    def identity(self) -> str:
        """What decides its masks, for records and caches: models, prompt, thresholds and cleaning."""
        part = self._part
        said = f"{self.name} prompt={part.prompt!r} threshold={self.threshold} score={part.score} points={part.points}"
        detector = "" if self._detector is None else f" detector_score={self._detector.score}"
        labels = f" labels={list(part.foreground)}" if part.foreground else ""
        frame = f" side={part.framing.side[0]}x{part.framing.side[1]}"
        tidy = f" largest={self.largest} fill_holes={self.fill_holes} area={self.area}"
        return said + detector + labels + frame + tidy

    @torch.no_grad()
    def __call__(
        self,
        pixel_values: Tensor,
        *,
        classes: Sequence[str] | None = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> Tensor:
        """Masks of normalised pixels, as a foreground source gives them.

        Args:
            pixel_values: (B, 3, H, W) normalised with image_mean and image_std.
            classes: the class name of each picture; needed if `prompted`.

        Returns:
            (B, H, W) bool, on the device of the pixels.

        Raises:
            FVGError: class names are needed and missing, or not one a picture.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise FVGError(f"pixel_values must be (B, 3, H, W), but have shape {tuple(pixel_values.shape)}.")
        names = self._names(len(pixel_values), classes)
        mean, std = (torch.tensor(v, device=pixel_values.device)[:, None, None] for v in (image_mean, image_std))
        rgb = (pixel_values.detach().float() * std + mean).clamp(0, 1)
        found = []
        for start, stop in self._blocks(len(rgb)):
            block = rgb[start:stop]
            frames = [p.framing.of_pixels(block, *_place(p.model)) for p in self._parts()]
            found += self._found(frames, names and names[start:stop])
        if not found:
            return pixel_values.new_zeros((0, *pixel_values.shape[-2:]), dtype=torch.bool)
        return torch.stack(found).to(pixel_values.device)

    @torch.no_grad()
    def masks(self, pictures: Sequence[PILImage], classes: Sequence[str] | None = None) -> list[Tensor]:
        """Masks of pictures, each (H, W) bool in its picture's size, on the CPU.

        Args:
            pictures: upright PIL pictures of any sizes. classes: as in a call.
        """
        names = self._names(len(pictures), classes)
        found = []
        for start, stop in self._blocks(len(pictures)):
            block = pictures[start:stop]
            frames = [p.framing.of_pictures(block, *_place(p.model)) for p in self._parts()]
            found += [mask.cpu() for mask in self._found(frames, names and names[start:stop])]
        return found

    def _parts(self) -> list[Part]:
        return [self._part] if self._detector is None else [self._part, self._detector]

    def _blocks(self, total: int) -> Iterator[tuple[int, int]]:
        for start in range(0, total, self.batch_size):
            yield start, min(start + self.batch_size, total)

    def _names(self, count: int, classes: Sequence[str] | None) -> list[str] | None:
        if not self.prompted:
            return None
        if classes is None or isinstance(classes, str) or len(classes) != count:
            given = "none" if classes is None else repr(classes) if isinstance(classes, str) else str(len(classes))
            raise FVGError(
                f"{self.name} is asked with class names: one for each of the {count} pictures is expected, but "
                f"{given} were given. In training they come from the labels."
            )
        return [str(name) for name in classes]

    def _found(self, frames: list[Frames], names: list[str] | None) -> list[Tensor]:
        """Binary masks (H, W) of a block, each in its picture's size."""
        if self._detector is None:
            maps = self._part.family.read(self._part, frames[0], names)
        else:
            boxes, kept = detect(self._detector, frames[1], names or (), MOST_BOXES)
            maps = boxed(self._part, frames[0], boxes, kept.to(frames[0].pixels.device))
        binary = [m >= self.threshold for m in frames[0].back(maps)]
        return [clean(m, largest=self.largest, fill_holes=self.fill_holes, area=self.area) for m in binary]


def _part(
    model: nn.Module,
    processor: Any,
    tokenizer: Any,
    prompt: str,
    labels: Sequence[str] | None,
    score: float | None,
    points: int,
    side: int | None,
    detects: bool = False,
) -> Part:
    family = family_of(model)
    config = getattr(model, "config", None)
    if detects and not type(model).__name__.endswith("ForObjectDetection"):
        raise FVGError(f"the detector must be a Grounding DINO, but is a {type(model).__name__}.")
    tokenizer = tokenizer or getattr(processor, "tokenizer", None)
    oneformer = getattr(config, "model_type", "") == "oneformer"
    if (family.prompted or oneformer) and tokenizer is None:
        raise FVGError(f"a {type(model).__name__} is asked with words; give its tokenizer, or load it from_pretrained.")
    own_size = getattr(getattr(config, "vision_config", config), "image_size", None) if family.fixed_size else None
    if family.fixed_size and own_size is None and config is not None:  # SAM 2 and SAM 3 say it further inside
        own_size = getattr(getattr(config.vision_config, "backbone_config", None), "image_size", None)
    if side is not None and family.fixed_size:
        raise FVGError(f"a {type(model).__name__} takes pictures of its own size, {own_size}; leave side out.")
    known = getattr(config, "id2label", None) if family.labelled else None
    if labels is not None and not known:
        raise FVGError(f"a {type(model).__name__} has no labels to choose from; leave labels out.")
    return Part(
        model,
        family,
        framing_of(processor, family.framing, own_size if side is None else side),
        tokenizer,
        foreground_labels(known, labels) if known else (),
        prompt,
        family.score if score is None else score,
        points,
    )


def _check(model: Any, prompt: str, threshold: float, score: float | None, points: int, batch_size: int) -> None:
    if not isinstance(model, nn.Module):
        raise FVGError(
            f"a Segmenter takes a model or a pipeline, but a {type(model).__name__} was given. A Hub id goes to "
            "Segmenter.from_pretrained; a plain function from pixels to masks goes to wrap(…, foreground=function)."
        )
    if prompt.count("{}") != 1:
        raise FVGError(f"the prompt {prompt!r} must hold one {{}} for the class name.")
    for name, value in (("threshold", threshold), ("score", score)):
        if value is not None and not 0 < value <= 1:
            raise FVGError(f"{name} must lie in (0, 1], but is {value}.")
    if points < 1 or batch_size < 1:
        raise FVGError(f"points and batch_size must be at least 1, but are {points} and {batch_size}.")


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)


def _name(part: Part) -> str:
    known = getattr(getattr(part.model, "config", None), "_name_or_path", "")
    return str(known) or type(part.model).__name__
