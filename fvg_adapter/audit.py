"""audit: does a model look at the object, or at what is around it?

Every picture is scored three times: whole, with the background taken away (x ⊙ m), and with the box around the object
taken away. A class leans on its background where that background says its name. A hole of the object's outline would
say it too, so two pictures of different classes are compared with both their holes in both: only the background
differs. Classes are ranked by the mean difference in standard errors, so that a few odd pictures make no suspect.
Beside it: D_fg, and the share of attention and of class relevance inside the mask. Imports model and what lies below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fvg_adapter import losses as L
from fvg_adapter.attention import record_attention
from fvg_adapter.data import collate
from fvg_adapter.errors import FVGError
from fvg_adapter.features import attention_in_mask
from fvg_adapter.foreground import foreground_view, mask_area, prepare_mask, usable_mask
from fvg_adapter.model import FVGModel, answer_score
from fvg_adapter.modes import evaluating
from fvg_adapter.progress import Progress, counting
from fvg_adapter.tuners.base import Tuner, check_labels

SMALLEST_ERROR = 1e-6
"""Standard error in nats where all pictures agree, so that evidence stays finite."""


@dataclass(frozen=True)
class PictureAudit:
    """One picture. Probabilities are those of its own class among the data set's classes.

    Attributes:
        index: its place in the data set. name: its file, where it has one.
        label, answer: its class, and what the model says of the whole picture.
        answer_foreground, answer_background: what it says of the object alone, and of the background alone.
        p_whole, p_foreground, p_background: probability of the class under the three views, in [0, 1].
        lean: log-probability of the answer on this background minus that on another class's with the same holes, in
            nats; 0 where backgrounds tell nothing.
        d_fg, entropy: KL(p_whole ‖ p_foreground) and H(p_whole) in nats (a flatter softmax lowers d_fg for nothing).
        area: share of the picture that the mask covers. attention_in_mask, relevance_in_mask: shares of the attention
            and of the answer's class relevance inside the mask; an even map would have the mask's area.
    """

    index: int
    name: str
    label: str
    answer: str
    answer_foreground: str
    answer_background: str
    p_whole: float
    p_foreground: float
    p_background: float
    lean: float
    d_fg: float
    entropy: float
    area: float
    attention_in_mask: float
    relevance_in_mask: float


@dataclass(frozen=True)
class ClassAudit:
    """The pictures of one class, or of all (`Audit.summary`): counts, accuracies in percent, means.

    Attributes:
        name: the class. pictures: how many were scored.
        whole, foreground, background: accuracy in percent under the three views.
        lean: mean log-probability of the class on its own pictures' backgrounds minus that on other classes' with the
            same holes, in nats.
        evidence: the lean in standard errors (Student's t); above 3 or so it is no accident. NaN below two pictures.
        d_fg, entropy, area, attention_in_mask, relevance_in_mask: means over the pictures.
    """

    name: str
    pictures: int
    whole: float
    foreground: float
    background: float
    lean: float
    evidence: float
    d_fg: float
    entropy: float
    area: float
    attention_in_mask: float
    relevance_in_mask: float


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        summary: over all pictures; its lean and evidence are means over classes.
        classes: those that lean on the background with most evidence come first.
        pictures: in the order of the data set.
        left_out: pictures without a usable mask, which cannot be audited.
        branch: what scored: "tuner" for tuners, else the FVGModel's branch.
    """

    summary: ClassAudit
    classes: list[ClassAudit]
    pictures: list[PictureAudit]
    left_out: int = 0
    branch: str = "tuner"
    settings: dict[str, Any] = field(default_factory=dict)

    def leaning(self, count: int = 10) -> list[PictureAudit]:
        """The pictures whose answer leans on the background most."""
        return sorted(self.pictures, key=lambda p: -p.lean)[:count]

    def to_json(self) -> dict[str, Any]:
        """Everything, of types that JSON has: what is unknown (NaN) becomes None."""
        record: dict[str, Any] = _known({"format": "fvg_adapter audit 1", **asdict(self)})
        return record


def audit(
    model: FVGModel | Tuner,
    dataset: Any,
    *,
    layers: Any = (-1,),
    relevance: bool = True,
    outside: str = "mean",
    partners: int = 2,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = None,
) -> Audit:
    """Audits a model for shortcuts on a labelled data set with masks; leaves class list, mode and hooks as found.

    Args:
        model: an FVGModel or a tuner (ZeroShot for plain CLIP).
        dataset: items of {"pixel_values", "labels", "foreground_mask"} with `classes`, normalised for the model.
        layers: vision layers whose attention and relevance are read, as for `record_attention`.
        relevance: class relevance of the answer too; it costs a backward pass.
        outside: what takes the place of what is taken away: "mean" colour or "black".
        partners: pictures of other classes that each background is compared with. seed: of their choice.
        batch_size: pictures encoded at once, 3 + 2 · partners views of each.
        progress: called with (pictures done, pictures in all); True for a bar on stderr, False for silence; when None,
            a bar on a terminal only.

    Raises:
        FVGError: no class names, fewer than two classes, labels out of range, or no picture with a usable mask (an area
            between 2 and 98 %).
    """
    names = list(getattr(dataset, "classes", None) or [])
    if len(names) < 2:
        raise FVGError(
            f"an audit needs a data set with at least 2 classes in its `classes` attribute, but this one has {names}."
        )
    known = getattr(dataset, "labels", None)
    labels = torch.as_tensor([int(dataset[i]["labels"]) for i in range(len(dataset))] if known is None else known)
    check_labels(labels, len(names), len(dataset))
    pairs = _Pairs(dataset, other_classes(labels, partners, seed))
    parts: list[dict[str, Tensor]] = []
    done = 0
    bar = counting(progress, "auditing", len(dataset))
    with evaluating(model), model.use_classes(names), bar as tell:
        branch = model.branch_for("auto") if isinstance(model, FVGModel) else "tuner"
        for items, *others in DataLoader(pairs, batch_size, collate_fn=_collate_pairs):
            check_labels(items["labels"], len(names), len(items["pixel_values"]))
            found = _batch(model, items, layers, relevance, outside) | _backgrounds(model, items, others, outside)
            parts.append(found | {"index": done + torch.arange(len(items["labels"]))})
            done += len(items["labels"])
            tell(done)
    found = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    usable = found.pop("usable").bool()
    if not bool(usable.any()):
        raise FVGError(
            f"none of the {len(usable)} pictures has a usable mask (an area between 2 and 98 %): an audit needs to "
            "know where the object is. Put them into a mask/ folder that mirrors the pictures'."
        )
    kept = {k: v[usable] for k, v in found.items()}
    pictures = _pictures(kept, names, dataset)
    classes = [_class(kept, c, name) for c, name in enumerate(names) if bool((kept["labels"] == c).any())]
    classes.sort(key=lambda c: -c.evidence if c.evidence == c.evidence else float("inf"))  # unknown ones last
    summary = _class(kept, None, "all", (_mean([c.lean for c in classes]), _mean([c.evidence for c in classes])))
    settings = {"outside": outside, "layers": str(layers), "relevance": relevance}
    return Audit(summary, classes, pictures, int((~usable).sum()), branch, settings)


@torch.no_grad()
def _batch(model: FVGModel | Tuner, items: Any, layers: Any, relevance: bool, outside: str) -> dict[str, Tensor]:
    tuner = model.tuner if isinstance(model, FVGModel) else model
    config = getattr(model, "config", None)
    normal = {} if config is None else {"image_mean": config.image_mean, "image_std": config.image_std}
    pixels, mask = _on(tuner, items)
    area = mask_area(mask)
    with record_attention(model, layers, relevance=relevance) as record, torch.set_grad_enabled(relevance):
        output = model(pixels.clone().requires_grad_(relevance))
        whole = output.logits
        relevant = record.relevance(answer_score(model, output)) if relevance else None
    attention = record.attention().mean((1, 2))  # (B, h, w)
    views = [foreground_view(pixels, part, outside=outside, **normal) for part in (mask, 1 - boxes(mask))]
    foreground, background = (model(view).logits for view in views)
    none = torch.full_like(area, float("nan"))
    return {
        "labels": items["labels"],
        "usable": usable_mask(area).cpu(),
        "area": area.cpu(),
        "whole": L.log_probs(whole.detach()).float().cpu(),
        "foreground": L.log_probs(foreground).float().cpu(),
        "background": L.log_probs(background).float().cpu(),
        "attention": attention_in_mask(attention, mask).cpu(),
        "relevance": (none if relevant is None else attention_in_mask(relevant, mask)).cpu(),
    }


@torch.no_grad()
def _backgrounds(model: FVGModel | Tuner, items: Any, others: Sequence[Any], outside: str) -> dict[str, Tensor]:
    """(B, C) mean log-probability on the own background minus that on others', with the holes of both in both."""
    tuner = model.tuner if isinstance(model, FVGModel) else model
    config = getattr(model, "config", None)
    normal = {} if config is None else {"image_mean": config.image_mean, "image_std": config.image_std}
    pixels, mask = _on(tuner, items)
    differences = []
    for other in others:
        their_pixels, their_mask = _on(tuner, other)
        kept = (1 - mask) * (1 - their_mask)
        own, theirs = (
            L.log_probs(model(foreground_view(part, kept, outside=outside, **normal)).logits)
            for part in (pixels, their_pixels)
        )
        differences.append((own - theirs).float().cpu())
    return {"differs": torch.stack(differences).mean(0)}


def _on(tuner: Tuner, items: Any) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) and masks (B, 1, H, W) of a batch; pictures without a mask have an empty one."""
    pixels = items["pixel_values"].to(tuner.encoder.device)
    given = items.get("foreground_mask")
    return pixels, prepare_mask(pixels.new_zeros(len(pixels), *pixels.shape[-2:]) if given is None else given, pixels)


def other_classes(labels: Tensor, partners: int, seed: int) -> Tensor:
    """For each picture the indices (N, partners) of pictures of other classes, drawn with a seed.

    Raises:
        FVGError: all pictures are of one class, or fewer than one partner is wanted.
    """
    if partners < 1 or len(labels.unique()) < 2:
        raise FVGError(
            f"backgrounds are compared between classes: {len(labels.unique())} classes have pictures and partners is "
            f"{partners}; at least 2 and 1 are needed."
        )
    generator = torch.Generator().manual_seed(seed)
    apart = (labels[:, None] != labels[None, :]).double()
    return torch.multinomial(apart, partners, replacement=True, generator=generator)


class _Pairs(torch.utils.data.Dataset[list[Any]]):
    """Each item with those of its partners."""

    def __init__(self, dataset: Any, chosen: Tensor) -> None:
        self.dataset, self.chosen = dataset, chosen.tolist()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.dataset[index], *(self.dataset[other] for other in self.chosen[index])]


def _collate_pairs(rows: list[list[Any]]) -> list[Any]:
    return [collate(list(column)) for column in zip(*rows, strict=True)]


def boxes(mask: Tensor) -> Tensor:
    """The upright boxes around the foreground of masks (B, 1, H, W), as masks; empty where the mask is.

    >>> boxes(torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]]]))[0, 0]
    tensor([[0., 1., 1.],
            [0., 1., 1.],
            [0., 0., 0.]])
    """
    result = mask
    for dim in (-1, -2):
        other = -1 if dim == -2 else -2
        line = mask.amax(other, keepdim=True)  # where there is foreground along this axis
        before, behind = line.cummax(dim).values, line.flip(dim).cummax(dim).values.flip(dim)
        span = before * behind
        result = span if dim == -1 else result * span
    return result


def _pictures(found: dict[str, Tensor], names: Sequence[str], dataset: Any) -> list[PictureAudit]:
    views = {view: found[view].exp() for view in ("whole", "foreground", "background")}
    answers = {view: p.argmax(-1) for view, p in views.items()}
    divergence, entropy = L.kl_divergence(found["whole"], found["foreground"]), L.entropy(found["whole"])
    name_of = getattr(dataset, "_path", None)
    rows = []
    for i, label in enumerate(found["labels"].tolist()):
        index = int(found["index"][i])
        rows.append(
            PictureAudit(
                index=index,
                name=str(name_of(index)) if callable(name_of) else str(index),
                label=names[label],
                answer=names[int(answers["whole"][i])],
                answer_foreground=names[int(answers["foreground"][i])],
                answer_background=names[int(answers["background"][i])],
                p_whole=float(views["whole"][i, label]),
                p_foreground=float(views["foreground"][i, label]),
                p_background=float(views["background"][i, label]),
                lean=float(found["differs"][i, int(answers["whole"][i])]),
                d_fg=float(divergence[i]),
                entropy=float(entropy[i]),
                area=float(found["area"][i]),
                attention_in_mask=float(found["attention"][i]),
                relevance_in_mask=float(found["relevance"][i]),
            )
        )
    return rows


def _class(
    found: dict[str, Tensor], label: int | None, name: str, leaning: tuple[float, float] = (0.0, 0.0)
) -> ClassAudit:
    labels = found["labels"]
    mine = labels == label if label is not None else torch.ones_like(labels, dtype=torch.bool)

    def right(view: str) -> float:
        return 100 * float((found[view][mine].argmax(-1) == labels[mine]).float().mean())

    if label is not None:
        leaning = _leaning(found["differs"][mine, label])
    return ClassAudit(
        name=name,
        pictures=int(mine.sum()),
        whole=right("whole"),
        foreground=right("foreground"),
        background=right("background"),
        lean=leaning[0],
        evidence=leaning[1],
        d_fg=float(L.kl_divergence(found["whole"], found["foreground"])[mine].mean()),
        entropy=float(L.entropy(found["whole"])[mine].mean()),
        area=float(found["area"][mine].mean()),
        attention_in_mask=float(found["attention"][mine].mean()),
        relevance_in_mask=float(found["relevance"][mine].mean()),
    )


def _leaning(differences: Tensor) -> tuple[float, float]:
    """The mean, and the same in standard errors."""
    if len(differences) == 0:
        return float("nan"), float("nan")
    lean = float(differences.mean())
    if len(differences) < 2:
        return lean, float("nan")
    error = float((differences.var() / len(differences)).sqrt())
    return lean, lean / max(error, SMALLEST_ERROR)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else float("nan")
