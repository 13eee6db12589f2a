"""evaluate: base, new, HM and joint accuracy, D_fg with the entropy beside it, attention inside the mask, calibration,
and the worst class and group; score: the same of one set among its own classes.

METHOD.md sections 6, 8 and 11. Images are encoded once; every figure is worked out from the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fvg_adapter import losses as L
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.features import FeatureBank
from fvg_adapter.model import FVGModel
from fvg_adapter.modes import evaluating
from fvg_adapter.tuners.base import Tuner, check_labels
from fvg_adapter.tuners.prompts import plain

ECE_BINS = 15
_BRANCHES = ("base", "new", "tuner", "prior")
_ATTENDED = {"image": "attended", "image_new": "attended_new", "prior": "attended_prior"}


def harmonic_mean(base: float, new: float) -> float:
    """HM = 2 · base · new / (base + new), 0 where both are 0.

    >>> harmonic_mean(50.0, 100.0)
    66.66666666666667
    """
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


@torch.no_grad()
def evaluate(
    model: FVGModel | Tuner,
    base_set: Any,
    new_set: Any,
    *,
    batch_size: int = 64,
    branches: tuple[str, str] = ("base", "new"),
    groups: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> dict[str, float]:
    """Scores a model on tuned and unseen classes; restores class list and mode as found.

    Args:
        model: an FVGModel or a tuner (ZeroShot for plain CLIP).
        base_set, new_set: data sets with `classes`, whose labels index their own classes; or FeatureBanks of them.
            Items may carry "foreground_mask"; the foreground figures are over images with a usable one.
        batch_size: images encoded at once.
        branches: what scores base and new classes of an FVGModel: "base" (z_FDC), "new" (z_PC), "tuner" (z_full)
            or "prior" (z_CLIP). The paper's ablation uses others than the default.
        groups: of each image of both sets, which group it belongs to beside its class: a background, a camera, a place.

    Returns:
        base, new: accuracy in percent, each among its own classes. hm: their harmonic mean.
        joint_base, joint_new, joint_hm: accuracy in percent among base and new classes together.
        d_fg: mean KL(p_full ‖ p_fg) in nats at τ = 1 with true masks; entropy: mean H(p_full) in nats, same images
            (a flatter softmax lowers d_fg for nothing). NaN without masks.
        attention_in_mask: mean share of the attention (of `config.attention_layers`; a tuner's: the last layer) inside
            the mask, in [0, 1]. NaN without masks.
        ece: expected calibration error in percent, 15 bins, of base and of new predictions, weighted by their number
            (torchmetrics). joint_ece: the same of the predictions among all classes.
        worst_class: the lowest accuracy of a class in percent, each among its own classes (the lower of base and new);
            joint_worst_class: the same among all classes.
        worst_group: the lowest accuracy of a class within a group, each among its own classes; only with `groups`.

    Raises:
        FVGError: a set without class names, base and new sets that share classes, an unknown branch, or a bank that was
            not encoded with measure=True where a tuner changes the images.
    """
    for branch in branches:
        if branch not in _BRANCHES:
            raise FVGError(f"branch {branch!r} is unknown. {nearest(branch, _BRANCHES)}")
    names = [_classes_of(base_set, "base_set"), _classes_of(new_set, "new_set")]
    shared = sorted({plain(n) for n in names[0]} & {plain(n) for n in names[1]})
    if shared:
        raise FVGError(f"base_set and new_set share the classes {shared[:5]}; split them with base_new_split.")
    with evaluating(model):
        banks = [_bank(model, data, batch_size) for data in (base_set, new_set)]
        for bank, classes in zip(banks, names, strict=True):
            check_labels(torch.tensor(bank.labels), len(classes), len(bank))
        told = groups or (None, None)
        own = [_scored(model, *given) for given in zip(banks, names, branches, told, strict=True)]
        everything = [*names[0], *names[1]]
        offsets = (0, len(names[0]))
        labels = [[y + offset for y in bank.labels] for bank, offset in zip(banks, offsets, strict=True)]
        logits = [_joint_logits(model, bank, everything, branches) for bank in banks]
    joint = [_accuracy(z, y) for z, y in zip(logits, labels, strict=True)]
    everywhere, truth = torch.cat(logits), [*labels[0], *labels[1]]
    base, new = (s["accuracy"] for s in own)
    return {
        "base": base,
        "new": new,
        "hm": harmonic_mean(base, new),
        "joint_base": joint[0],
        "joint_new": joint[1],
        "joint_hm": harmonic_mean(joint[0], joint[1]),
        "d_fg": _mean([s["d_fg"] for s in own]),
        "entropy": _mean([s["entropy"] for s in own]),
        "attention_in_mask": _mean([s["attention"] for s in own]),
        "ece": sum(s["ece"] * len(b) for s, b in zip(own, banks, strict=True)) / sum(map(len, banks)),
        "joint_ece": _calibration_error(everywhere.softmax(-1), torch.tensor(truth)),
        "worst_class": min(s["worst_class"] for s in own),
        "joint_worst_class": _worst(everywhere, truth, truth),
        **({} if groups is None else {"worst_group": min(s["worst_group"] for s in own)}),
    }


@torch.no_grad()
def score(
    model: FVGModel | Tuner,
    data: Any,
    *,
    branch: str = "base",
    batch_size: int = 64,
    groups: Sequence[Any] | None = None,
) -> dict[str, float]:
    """Scores a model on one set among its own classes by one branch, whatever classes were tuned on.

    Few-shot scoring uses "base", scoring on another data set "new" (METHOD.md section 10). Class list and mode are
    restored.

    Args:
        model: an FVGModel or a tuner.
        data: a data set with `classes`, or a FeatureBank of one; see `evaluate`.
        branch: "base" (z_FDC), "new" (z_PC) or "tuner" (z_full); a tuner's "new" is what it has for unseen classes.
        batch_size: images encoded at once. groups: as in `evaluate`, of each image.

    Returns:
        accuracy, worst_class, worst_group (with `groups`), ece in percent; d_fg, entropy in nats; attention_in_mask.

    Raises:
        FVGError: a set without class names, an unknown branch, or a bank that does not fit.
    """
    if branch not in _BRANCHES:
        raise FVGError(f"branch {branch!r} is unknown. {nearest(branch, _BRANCHES)}")
    names = _classes_of(data, "data")
    with evaluating(model):
        bank = _bank(model, data, batch_size)
        check_labels(torch.tensor(bank.labels), len(names), len(bank))
        found = _scored(model, bank, names, branch, groups)
    means = {"d_fg": _mean([found["d_fg"]]), "entropy": _mean([found["entropy"]])}
    names_of = [n for n in ("accuracy", "worst_class", "worst_group", "ece") if n in found]
    figures: dict[str, float] = {name: found[name] for name in names_of}
    return {**figures, **means, "attention_in_mask": _mean([found["attention"]])}


def _scored(
    model: FVGModel | Tuner,
    bank: FeatureBank,
    classes: Sequence[str],
    branch: str,
    groups: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Figures of one set among its own classes; foreground figures per usable image."""
    if groups is not None and len(groups) != len(bank):
        raise FVGError(f"{len(bank)} images came with {len(groups)} groups; one for each is expected.")
    logits = _logits(model, bank, classes, branch)
    empty = torch.empty(0)
    result: dict[str, Any] = {
        "accuracy": _accuracy(logits, bank.labels),
        "ece": _calibration_error(logits.softmax(-1), torch.tensor(bank.labels)),
        "worst_class": _worst(logits, bank.labels, bank.labels),
        "d_fg": empty,
        "entropy": empty,
        "attention": empty,
    }
    if groups is not None:
        result["worst_group"] = _worst(logits, bank.labels, list(zip(bank.labels, groups, strict=True)))
    if "foreground" in bank.features:
        usable = bank.features["usable"][:, 0].bool()
        view = FeatureBank(_foreground_view(bank), bank.labels, bank.classes)
        full = L.log_probs(logits)
        result["d_fg"] = L.kl_divergence(full, L.log_probs(_logits(model, view, classes, branch)))[usable]
        result["entropy"] = L.entropy(full)[usable]
        if "attention_in_mask" in bank.features:
            result["attention"] = bank.features["attention_in_mask"][:, 0][usable]
    return result


def _foreground_view(bank: FeatureBank) -> dict[str, Tensor]:
    """The foreground view's features in the places of the whole image's."""
    names = {"image": "foreground", "image_new": "foreground_new", "prior": "foreground_prior"}
    names |= {_ATTENDED[to]: source for to, source in names.items() if _ATTENDED[to] in bank.features}
    return {to: bank.features[source] for to, source in names.items() if source in bank.features}


def _logits(model: FVGModel | Tuner, bank: FeatureBank, classes: Sequence[str], branch: str) -> Tensor:
    """(N, C) logits of a bank over a class list."""
    device = _tuner_of(model).encoder.device
    rows = []
    with model.use_classes(classes):
        for features, _ in bank.batches():
            moved = {k: v.to(device) for k, v in features.items() if k in (*_ATTENDED, *_ATTENDED.values())}
            rows.append(_batch_logits(model, moved, branch).float().cpu())
    return torch.cat(rows)


def _joint_logits(
    model: FVGModel | Tuner, bank: FeatureBank, classes: Sequence[str], branches: tuple[str, str]
) -> Tensor:
    """(N, C) scores over base and new classes: a tuner's own logits, an FVGModel's rule of METHOD section 11."""
    if not isinstance(model, FVGModel):
        return _logits(model, bank, classes, "tuner")
    prior, base, new = (_logits(model, bank, classes, branch) for branch in ("prior", *branches))
    with model.use_classes(classes):
        return model.joint_log_probs(prior, base, new)


def _batch_logits(model: FVGModel | Tuner, features: dict[str, Tensor], branch: str) -> Tensor:
    if not isinstance(model, FVGModel):
        if branch == "prior":
            prior = features.get("prior", features.get("image_new", features["image"]))
            return model.scores(prior, model.prior_text_features())
        return model.scores(_tuner_features(model, features, branch), model.text_features())
    if branch in ("base", "new"):
        logits: Tensor = model(features=features, branch=branch).logits
        return logits
    tuner, views = model.tuner, model.inference_views(features)
    if branch == "prior":
        assert views.prior is not None
        return tuner.scores(views.prior, tuner.prior_text_features())
    seen = set(tuner.classes) <= set(tuner.base_classes)  # MMRL scores other classes with its "new" features
    return tuner.scores(views.base if seen else views.new, tuner.text_features())


def _tuner_of(model: FVGModel | Tuner) -> Tuner:
    return model.tuner if isinstance(model, FVGModel) else model


def _tuner_features(tuner: Tuner, features: dict[str, Tensor], branch: str) -> Tensor:
    """A tuner whose branches differ (MMRL) scores classes it was not tuned on with its "new" features."""
    seen = branch != "new" and set(tuner.classes) <= set(tuner.base_classes)
    return features["image"] if seen else features.get("image_new", features["image"])


def _bank(model: FVGModel | Tuner, data: Any, batch_size: int) -> FeatureBank:
    if isinstance(data, FeatureBank):
        data.check(model)
        if (
            _tuner_of(model).changes_images
            and "foreground" in data.features
            and "foreground_prior" not in data.features
        ):
            raise FVGError(
                "this bank was encoded for training; encode the test pictures with FeatureBank.encode(…, measure=True)."
            )
        return data
    return FeatureBank.encode(model, data, batch_size=batch_size, measure=True)


def _classes_of(data: Any, what: str) -> list[str]:
    classes = getattr(data, "classes", None)
    if not classes:
        raise FVGError(f"{what} has no class names; give it a `classes` attribute, a list in the order of its labels.")
    return list(classes)


def _accuracy(logits: Tensor, labels: Sequence[int]) -> float:
    return 100.0 * float((logits.argmax(-1) == torch.tensor(labels)).float().mean())


def _worst(logits: Tensor, labels: Sequence[int], cells: Sequence[Any]) -> float:
    """The lowest accuracy of a cell of images in percent."""
    right: dict[Any, list[bool]] = {}
    for cell, hit in zip(cells, (logits.argmax(-1) == torch.tensor(labels)).tolist(), strict=True):
        right.setdefault(cell, []).append(hit)
    return 100.0 * min(sum(hits) / len(hits) for hits in right.values())


def _mean(parts: list[Tensor]) -> float:
    values = torch.cat(parts)
    return float(values.mean()) if len(values) else float("nan")


def _calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ImportError as error:
        raise FVGError("evaluate needs torchmetrics: pip install 'fvg-adapter[train]'.") from error
    n = probabilities.shape[-1]
    if n < 2:
        return 0.0
    return 100.0 * float(multiclass_calibration_error(probabilities, labels, num_classes=n, n_bins=ECE_BINS, norm="l1"))
