"""One task with one seed for `plus_ideas`: what its ideas share, encoded and trained once, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.pocket.plus import PLUS, SHOTS, folder_of
from examples.pocket.plus_variants import PAPER_LOSSES, Losses, Variant
from examples.pocket.suite import CROP, SETTINGS, stages
from fvg_adapter import FeatureBank, FVGConfig, FVGModel
from fvg_adapter import losses as L
from fvg_adapter.attended import blend
from fvg_adapter.evaluation import harmonic_mean
from fvg_adapter.protocols import base_to_new_split
from fvg_adapter.train import fit
from fvg_adapter.tuners import TUNERS, Tuner
from fvg_adapter.tuners.recipes import Stage

METRICS = ("base", "new", "hm", "joint_base", "joint_new", "joint_hm")
VIEWS = 4
Logits = tuple[Tensor, Tensor, Tensor]
"""z_CLIP, z_FDC, z_PC (N, C) over one class list."""
Figures = dict[str, float]
Rows = dict[str, Figures]


class WithoutMasks(Dataset[dict[str, Any]]):
    """Pictures whose masks are to come from the attention."""

    def __init__(self, pictures: Any) -> None:
        self.pictures, self.classes, self.labels = pictures, pictures.classes, pictures.labels
        self.transform = f"{getattr(pictures, 'transform', '')} without masks"

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {k: v for k, v in self.pictures[index].items() if k != "foreground_mask"}


@dataclass(frozen=True)
class Pictures:
    """Features of some pictures: as plus needs them, and with x_fg cut out by the attention's mask."""

    bank: FeatureBank
    seen: FeatureBank

    def subset(self, rows: Sequence[int], labels: Sequence[int], classes: Sequence[str]) -> Pictures:
        """Some of them, with other labels."""
        return Pictures(self.bank.subset(rows, labels, classes), self.seen.subset(rows, labels, classes))

    def view(self, number: int) -> Pictures:
        """One augmented view of each."""

        def one(bank: FeatureBank) -> FeatureBank:
            features = {k: v[:, number : number + 1] for k, v in bank.features.items()}
            return FeatureBank(features, bank.labels, bank.classes, bank.fingerprint, bank.settings)

        return Pictures(one(self.bank), one(self.seen))


class Cell:
    """CoOp and plus on one task with one seed; what its ideas share is made once."""

    def __init__(self, clip: Any, tokenizer: Any, task: str, seed: int, banks: Path) -> None:
        self.clip, self.tokenizer, self.task, self.seed = clip, tokenizer, task, seed
        normal = {"size": (64, 64), "mean": PLUS.image_mean, "std": PLUS.image_std, "crop_scale": CROP}
        split = base_to_new_split(folder_of(task), shots=SHOTS, seed=seed, test_splits=("test",), **normal)  # type: ignore[arg-type]
        self.base: list[str] = list(split.base_classes)
        place, tuner = banks / task, self.fresh(self.base)
        self.train = self._encoded(tuner, split.train, place / f"train-{seed}", VIEWS)
        halves = zip(("base", "new"), split.tests["test"], strict=True)
        self.tests = [self._encoded(tuner, pictures, place / f"test-{half}", 1) for half, pictures in halves]
        self.new: list[str] = list(self.tests[1].bank.classes)
        tuner.detach()

    def _encoded(self, tuner: Tuner, pictures: Any, folder: Path, views: int) -> Pictures:
        banks = []
        for name, source, data in (("bank", "given", pictures), ("seen", "attention", WithoutMasks(pictures))):
            model = FVGModel(tuner, replace(PLUS), foreground=source)
            bank = FeatureBank.encode(
                model,
                data,
                views=views,
                measure=name == "bank",
                seed=self.seed if views > 1 else 0,
                output=folder / name,
                batch_size=128,
            )
            banks.append(bank)
            model.release()
        return Pictures(*banks)

    def fresh(self, classes: Sequence[str]) -> Tuner:
        """CoOp before it is tuned."""
        torch.manual_seed(self.seed)
        return TUNERS["coop"](self.clip, self.tokenizer, classes, **SETTINGS["coop"].options)

    def tuned(self, bank: FeatureBank, recipe: Stage | None = None) -> Tuner:
        """CoOp tuned on a bank's classes."""
        tuner = self.fresh(bank.classes)
        fit(tuner, bank, recipe=recipe or stages("coop")["tune"], seed=self.seed)
        return tuner

    def heads(
        self,
        tuner: Tuner,
        config: FVGConfig,
        losses: Losses = PAPER_LOSSES,
        bank: FeatureBank | None = None,
        epochs: int | None = None,
    ) -> Variant:
        """Trained heads; one seed gives every idea the same start and batches."""
        recipe = stages("coop")["heads"]
        torch.manual_seed(self.seed)
        model = Variant(tuner, config, losses)
        fit(model, bank or self.train.bank, recipe=replace(recipe, epochs=epochs or recipe.epochs), seed=self.seed)
        return model

    @cached_property
    def tuner(self) -> Tuner:
        """CoOp tuned on the base classes."""
        return self.tuned(self.train.bank)

    @cached_property
    def plus(self) -> Variant:
        """Plus behind it."""
        return self.heads(self.tuner, PLUS)


@torch.no_grad()
def logits(model: FVGModel, bank: FeatureBank, classes: Sequence[str], weight: Tensor | None = None) -> Logits:
    """z_CLIP, z_FDC and z_PC of a bank; `weight` (N,) of the attended view instead of the config's."""
    names = ("image", "attended")
    features = {k: v[:, 0] for k, v in bank.features.items() if k in names}
    view = model.config.attended_view
    if weight is not None:  # `blend` broadcasts
        features = {"image": blend(features["image"], features["attended"], weight.unsqueeze(1))}  # type: ignore[arg-type]
        model.config.attended_view = 0.0
    try:
        with model.use_classes(classes):
            output = model(features=features, branch="joint")
            prior = model.inference_views(features).prior
            assert prior is not None
            z_prior = model.tuner.scores(prior, model.tuner.prior_text_features())
    finally:
        model.config.attended_view = view
    return z_prior, output.logits_base, output.logits_new


@torch.no_grad()
def trust(model: FVGModel, pictures: Pictures, classes: Sequence[str]) -> Tensor:
    """r (N,) of the attention's masks, asked over a class list; 0 where the mask is not usable."""
    view, model.config.attended_view = model.config.attended_view, 0.0
    try:
        with model.use_classes(classes):
            features = {k: v[:, 0] for k, v in pictures.seen.features.items()}
            r: Tensor = model(features=features, branch="base").foreground_trust
    finally:
        model.config.attended_view = view
    return r


def accuracy(scores: Tensor, labels: Sequence[int], offset: int = 0) -> float:
    """In percent."""
    return 100 * float((scores.argmax(-1) == torch.tensor(labels) + offset).float().mean())


def figures(
    cell: Cell,
    model: FVGModel,
    weigh: Callable[[Pictures, Sequence[str]], Tensor] | None = None,
    joint: Callable[[Pictures, Logits], Tensor] | None = None,
    branches: tuple[int, int] = (1, 2),
) -> Figures:
    """As `evaluate`; with a weight of the view for every picture, or another joint rule, where one is given.

    Args:
        branches: which of `Logits` score base and new classes.
    """

    def asked(pictures: Pictures, classes: Sequence[str]) -> Logits:
        return logits(model, pictures.bank, classes, weigh and weigh(pictures, classes))

    both = [*cell.base, *cell.new]
    is_base = torch.arange(len(both)) < len(cell.base)
    found = {}
    for pictures, half, names, branch, offset in zip(
        cell.tests, ("base", "new"), (cell.base, cell.new), branches, (0, len(cell.base)), strict=True
    ):
        found[half] = accuracy(asked(pictures, names)[branch], pictures.bank.labels)
        z = asked(pictures, both)
        temperature = model.config.group_temperature
        ruled = L.joint_log_probs(z[0], z[branches[0]], z[branches[1]], is_base, group_temperature=temperature)
        scores = ruled if joint is None else joint(pictures, z)
        found[f"joint_{half}"] = accuracy(scores, pictures.bank.labels, offset)
    found["hm"] = harmonic_mean(found["base"], found["new"])
    found["joint_hm"] = harmonic_mean(found["joint_base"], found["joint_new"])
    return {m: round(found[m], 4) for m in METRICS}


def trained(cell: Cell, config: FVGConfig, losses: Losses = PAPER_LOSSES) -> Figures:
    """One idea in the losses, behind the tuned CoOp."""
    model = cell.heads(cell.tuner, config, losses)
    found = figures(cell, model)
    model.release()
    return found


@torch.no_grad()
def tuner_figures(cell: Cell) -> Figures:
    """The tuner alone, one softmax over all classes."""
    tuner, both, found = cell.tuner, [*cell.base, *cell.new], {}
    for pictures, half, names, offset in zip(
        cell.tests, ("base", "new"), (cell.base, cell.new), (0, len(cell.base)), strict=True
    ):
        for name, classes, first in ((half, names, 0), (f"joint_{half}", both, offset)):
            with tuner.use_classes(classes):
                scores = tuner.scores(pictures.bank.features["image"][:, 0], tuner.text_features())
            found[name] = accuracy(scores, pictures.bank.labels, first)
    found["hm"] = harmonic_mean(found["base"], found["new"])
    found["joint_hm"] = harmonic_mean(found["joint_base"], found["joint_new"])
    return {m: round(found[m], 4) for m in METRICS}
