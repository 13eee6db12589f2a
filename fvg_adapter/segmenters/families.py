"""How each family of transformers' segmenters is asked, and what its output says about the foreground.

A family is a row of data and a function from frames to one map (B, h, w) in [0, 1] at whatever resolution the
model has. Adding one is adding a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fvg_adapter.errors import FVGError
from fvg_adapter.segmenters.frames import Frames, Framing

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MAIN_AREA = (0.02, 0.9)
"""Share of the picture that a class-agnostic candidate must cover to be the main object."""


@dataclass(frozen=True)
class Part:
    """A model with what it needs to be asked.

    Attributes:
        model: a transformers model, or any module from pixels to logits. tokenizer: for prompts, or None.
        framing: how it wants its pictures. foreground: numbers of its foreground labels.
        prompt: of the class name, with one {}. score: from which an instance or a box counts.
        points: a side of the grid of points that class-agnostic families are asked at.
    """

    model: nn.Module
    family: Family
    framing: Framing
    tokenizer: Any = None
    foreground: Sequence[int] = ()
    prompt: str = "{}"
    score: float = 0.3
    points: int = 5

    def asked(self, names: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """The tokens of a prompt a picture."""
        texts = [self.prompt.replace("{}", name.replace("_", " ").strip()) for name in names]
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(texts, return_tensors="pt", truncation=True, **options)
        return {name: tensor.to(device) for name, tensor in tokens.items()}


Read = Callable[[Part, Frames, "Sequence[str] | None"], Tensor]


@dataclass(frozen=True)
class Family:
    """A row: how to read it, and what it is trained with where no preprocessor says.

    Attributes:
        read: from frames and class names to (B, h, w) in [0, 1].
        prompted: asked with class names. labelled: has labels, some of which are foreground.
        fixed_size: takes the image size of its config alone.
        framing: where no preprocessor says otherwise. score: as in `Part`.
        takes_boxes: can be asked with the boxes of a detector.
    """

    read: Read
    framing: Framing
    prompted: bool = False
    labelled: bool = False
    fixed_size: bool = False
    takes_boxes: bool = False
    score: float = 0.3


def _clipseg(part: Part, frames: Frames, names: Sequence[str] | None) -> Tensor:
    """CLIPSeg: one logit a pixel for the prompt."""
    logits = part.model(pixel_values=frames.pixels, **part.asked(names or (), padding=True)).logits
    found: Tensor = logits.float().sigmoid().reshape(len(frames.sizes), *logits.shape[-2:])
    return found


def _sam3(part: Part, frames: Frames, names: Sequence[str] | None) -> Tensor:
    """SAM 3: all instances of the concept whose score (instance times presence) reaches the limit, together."""
    tokens = part.asked(names or (), padding="max_length", max_length=32)
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    output = part.model(pixel_values=frames.pixels, **tokens)
    scores = output.pred_logits.float().sigmoid()  # (B, Q)
    if output.presence_logits is not None:
        scores = scores * output.presence_logits.float().sigmoid()  # (B, Q) · (B, 1)
    found: Tensor = output.pred_masks.float().sigmoid() * (scores >= part.score)[..., None, None]  # (B, Q, h, w)
    return found.amax(1)


def _semantic(part: Part, frames: Frames, names: Sequence[str] | None) -> Tensor:
    """One logit a label and pixel: the probability of the foreground labels together."""
    logits: Tensor = part.model(pixel_values=frames.pixels).logits.float()  # (B, C, h, w)
    if logits.shape[1] == 1:
        return logits[:, 0].sigmoid()
    return logits.softmax(1)[:, list(part.foreground)].sum(1).clamp(0, 1)


def _universal(part: Part, frames: Frames, names: Sequence[str] | None) -> Tensor:
    """Mask classification (MaskFormer and its kin): the surest foreground query that covers the pixel."""
    takes = inspect.signature(part.model.forward).parameters
    given: dict[str, Tensor] = {}
    if "pixel_mask" in takes:
        given["pixel_mask"] = frames.inside().long()
    if "task_inputs" in takes:  # OneFormer
        length = part.model.config.task_seq_len  # type: ignore[union-attr]
        asked = part.tokenizer(["the task is semantic"], padding="max_length", max_length=length, truncation=True)
        tokens = torch.tensor(asked["input_ids"], device=frames.pixels.device)
        given["task_inputs"] = tokens.expand(len(frames.sizes), -1)  # (B, tokens)
    output = part.model(pixel_values=frames.pixels, **given)
    classes = output.get("class_queries_logits", output.get("logits"))  # (B, Q, C + 1), the last is "nothing"
    masks = output.get("masks_queries_logits", output.get("pred_masks"))  # (B, Q, h, w)
    share: Tensor = classes.float().softmax(-1)[..., list(part.foreground)].sum(-1).clamp(0, 1)  # (B, Q)
    found: Tensor = (share[..., None, None] * masks.float().sigmoid()).amax(1)
    return found


def _points(part: Part, frames: Frames, names: Sequence[str] | None) -> Tensor:
    """Class-agnostic: masks at a grid of points, of which the main object is taken; see `main_object`."""
    steps = (torch.arange(part.points) + 0.5) / part.points
    grid = torch.cartesian_prod(steps, steps).flip(-1)  # (n², 2) x and y in [0, 1]
    filled = torch.tensor([[x, y] for y, x in frames.filled], dtype=grid.dtype)
    points = (filled[:, None] * grid).unsqueeze(2).to(frames.pixels)  # (B, n², 1, 2) in pixels of the frame
    labels = torch.ones(points.shape[:3], dtype=torch.long, device=points.device)
    output = part.model(pixel_values=frames.pixels, input_points=points, input_labels=labels)
    masks = output.pred_masks.float().flatten(1, 2)  # (B, n²·3, h, w)
    scores = output.iou_scores.float().flatten(1)  # (B, n²·3)
    return main_object(masks, scores, frames.inside((masks.shape[-2], masks.shape[-1])))


def main_object(masks: Tensor, scores: Tensor, inside: Tensor) -> Tensor:
    """The candidate that is most likely the picture's object.

    That is the one with the largest `predicted IoU · (1 − border) · (1 − distance)` among those that cover 2 to 90 % of
    the picture: `border` is the share of the picture's outermost pixels that it covers, `distance` that of its centre
    of mass from the picture's centre, in halves of the diagonal. Where no candidate qualifies the map is zero.

    Args:
        masks: (B, N, h, w) logits. scores: (B, N) predicted IoU. inside: (B, h, w) bool, where the picture is; it
            fills the upper left corner.

    Returns:
        (B, h, w) in [0, 1].
    """
    shown = inside[:, None]  # (B, 1, h, w)
    binary = (masks > 0) & shown
    h, w = inside.any(2).sum(1).float(), inside.any(1).sum(1).float()  # (B,) the picture's size on the map
    rows = (torch.arange(masks.shape[-2], device=masks.device) + 0.5).float()
    columns = (torch.arange(masks.shape[-1], device=masks.device) + 0.5).float()
    count = binary.sum((2, 3)).float()  # (B, N)
    y = (binary.sum(3) * rows).sum(2) / count.clamp_min(1)
    x = (binary.sum(2) * columns).sum(2) / count.clamp_min(1)
    halves = torch.stack([(y / h[:, None] - 0.5), (x / w[:, None] - 0.5)]).norm(dim=0) / 0.5**0.5
    row, column = rows[None, :, None], columns[None, None, :]
    ring = inside & ((row < 1) | (column < 1) | (row > h[:, None, None] - 1) | (column > w[:, None, None] - 1))
    border = (binary & ring[:, None]).sum((2, 3)) / ring.sum((1, 2)).clamp_min(1)[:, None]
    area = count / (h * w)[:, None]
    merit = scores.clamp(0, 1) * (1 - border) * (1 - halves).clamp_min(0)
    merit = torch.where((area >= MAIN_AREA[0]) & (area <= MAIN_AREA[1]), merit, -1.0)
    best = merit.argmax(1)  # (B,)
    chosen = masks[torch.arange(len(masks), device=masks.device), best].sigmoid()
    good = merit.amax(1) >= 0
    return chosen * good[:, None, None] * inside


def boxed(part: Part, frames: Frames, boxes: Tensor, kept: Tensor) -> Tensor:
    """A SAM asked with boxes (B, n, 4; relative x, y, x, y), of which `kept` (B, n) count: their masks together."""
    filled = torch.tensor([[x, y, x, y] for y, x in frames.filled]).to(frames.pixels)  # (B, 4)
    output = part.model(
        pixel_values=frames.pixels, input_boxes=boxes.to(frames.pixels) * filled[:, None], multimask_output=False
    )
    masks: Tensor = output.pred_masks.float()[:, :, 0].sigmoid()  # (B, n, 1, h, w) -> (B, n, h, w)
    return (masks * kept[..., None, None]).amax(1)


def detect(part: Part, frames: Frames, names: Sequence[str], most: int) -> tuple[Tensor, Tensor]:
    """Boxes (B, n, 4) of a Grounding DINO, relative x, y, x, y of each picture, and which (B, n) reach the score."""
    tokens = part.asked([name.lower() for name in names], padding=True)
    output = part.model(pixel_values=frames.pixels, pixel_mask=frames.inside().long(), **tokens)
    scores = output.logits.float().sigmoid().amax(-1)  # (B, Q, tokens) -> (B, Q)
    best = scores.topk(min(most, scores.shape[1]), dim=1)
    centre, size = output.pred_boxes.float().gather(1, best.indices[..., None].expand(-1, -1, 4)).split(2, dim=-1)
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)
    return boxes, best.values >= part.score


def _plain(part: Part, frames: Frames, names: Sequence[str] | None) -> Tensor:
    """Any module from pixels to logits (salient-object models): the last of several outputs, one channel."""
    output = part.model(frames.pixels)
    logits = output.get("logits") if isinstance(output, dict) else output
    while isinstance(logits, list | tuple) and logits:
        logits = logits[-1]
    if not isinstance(logits, Tensor) or logits.dim() not in (3, 4) or (logits.dim() == 4 and logits.shape[1] != 1):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise FVGError(
            f"{type(part.model).__name__} gave {given}, but a segmenter that is none of the known families "
            "must give logits (B, 1, h, w) or (B, h, w), or a list that ends with them. Families: "
            f"{', '.join(FAMILIES)}. Or wrap it in a callable from pixels to masks."
        )
    return logits.float().reshape(len(frames.sizes), *logits.shape[-2:]).sigmoid()


def _boxes_only(part: Part, frames: Frames, names: Sequence[str] | None) -> Tensor:
    raise FVGError("a detector gives boxes, not masks; give it a SAM: Segmenter.from_pretrained(sam, detector=…).")


_SAM = Family(_points, Framing((1024, 1024), *_IMAGENET, letterbox=True), fixed_size=True, takes_boxes=True)
_SAM2 = Family(_points, Framing((1024, 1024), *_IMAGENET), fixed_size=True, takes_boxes=True)
_MASKS = Family(_universal, Framing((800, 800), *_IMAGENET, letterbox=True), labelled=True)
_DINO = Family(_boxes_only, Framing((800, 800), *_IMAGENET, letterbox=True), prompted=True, score=0.25)
SEMANTIC = Family(_semantic, Framing((512, 512), *_IMAGENET), labelled=True)
PLAIN = Family(_plain, Framing((1024, 1024), *_IMAGENET))
FAMILIES: dict[str, Family] = {
    "clipseg": Family(_clipseg, Framing((352, 352), *_IMAGENET), prompted=True),
    "sam3": Family(_sam3, Framing((1008, 1008), *_HALF), prompted=True, fixed_size=True),
    "grounding-dino": _DINO,
    "mm-grounding-dino": _DINO,
    "sam": _SAM,
    "sam_hq": _SAM,
    "sam2": _SAM2,
    "sam3_tracker": Family(_points, Framing((1008, 1008), *_HALF), fixed_size=True, takes_boxes=True),
    "mask2former": _MASKS,
    "maskformer": _MASKS,
    "oneformer": _MASKS,
    "detr": _MASKS,
    "eomt_dinov3": Family(_universal, Framing((640, 640), *_IMAGENET), labelled=True),
    "eomt": Family(_universal, Framing((640, 640), *_IMAGENET), labelled=True, fixed_size=True),
}
"""By `config.model_type`; beside these every …ForSemanticSegmentation, and modules from pixels to logits."""


def family_of(model: nn.Module) -> Family:
    """The row of a model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if type(model).__name__.endswith("ForSemanticSegmentation"):
        return SEMANTIC
    return FAMILIES.get(str(kind), PLAIN)
