"""Further ideas beside `preset="plus"`, on its validation tasks alone: examples/pocket/measured/plus/ideas.json.

    python -m examples.pocket.plus_ideas [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

A learnt gate for the joint label set, masks weighted by the trust r, prompts and heads trained in one stage, and the KL
of L_PC in the other direction; behind CoOp, on `test`. The references are trained and scored by the same code in the
same run. `python -m examples.pocket.plus --tuners` puts the figures into docs/plus.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from examples.pocket.plus import CLIP, MEASURED, PAPER, PLUS, PLUS_ROW, SHOTS, TUNER, VALIDATION, folder_of
from examples.pocket.suite import CROP, SETTINGS, pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig, FVGModel
from fvg_adapter import losses as L
from fvg_adapter.attended import blend
from fvg_adapter.evaluation import harmonic_mean
from fvg_adapter.outputs import FVGOutput
from fvg_adapter.protocols import base_to_new_split
from fvg_adapter.train import fit
from fvg_adapter.tuners import TUNERS, Tuner
from fvg_adapter.tuners.recipes import Stage
from fvg_adapter.views import Views

BANKS = Path(__file__).parent.parent.parent / "output" / "plus_ideas"
METRICS = ("base", "new", "hm", "joint_base", "joint_new", "joint_hm")
VIEWS = 4
HELD_SHOTS = 4
"""Shots of each base class that the gate for the joint label set is fitted on, and the prompts and heads are not."""
ONE_STAGE = "one stage, the heads' 10 epochs"
PENALTY = 0.01
"""Of the squared weights of that gate, whose cues are standardised."""

Logits = tuple[Tensor, Tensor, Tensor]
"""z_CLIP, z_FDC, z_PC (N, C) over one class list."""
Figures = dict[str, float]
Rows = dict[str, Figures]
Record = dict[str, dict[str, dict[str, list[float]]]]
"""{idea: {metric: {task: [a value a seed]}}}"""


# -- losses: the KL in the other direction, distillation weighted by r, one stage --------------------------------------


@dataclass(frozen=True)
class Losses:
    """What an idea changes in L; the defaults are L itself.

    Attributes:
        new_kl: KL(p_CLIP ‖ p_PC) as in the paper, KL(p_PC ‖ p_CLIP), or the mean of both.
        distill: as in the paper; r · KL(p_fg ‖ p_FDC) alone; the paper's weighted with 2 r a picture; or the paper's
            with both KLs turned round.
        tuner_ce: weight of CE(z_full, y), the loss that CoOp has alone; for one stage.
        prompt_rate: the prompts' learning rate over the heads' (as a factor of their gradient).
    """

    new_kl: Literal["paper", "turned", "both"] = "paper"
    distill: Literal["paper", "trusted", "scaled", "turned"] = "paper"
    tuner_ce: float = 0.0
    prompt_rate: float = 1.0


def prior_term(z_prior: Tensor, z_pc: Tensor, temperature: float, kind: str) -> Tensor:
    """The KL of L_PC, in the direction asked for."""
    there = L.prior_divergence(z_prior, z_pc, temperature)
    back = L.prior_divergence(z_pc, z_prior, temperature)
    return {"paper": there, "turned": back, "both": (there + back) / 2}[kind]


def distill_term(r: Tensor, z_fg: Tensor, z_full: Tensor, z_fdc: Tensor, temperature: float, kind: str) -> Tensor:
    """L_dist as asked for; r (B,), logits (B, C)."""
    if kind == "paper":
        return L.distillation_loss(r, z_fg, z_full, z_fdc, temperature)
    view, full, student = (L.log_probs(z, temperature) for z in (z_fg, z_full, z_fdc))
    if kind == "trusted":
        return (r * L.kl_divergence(view, student)).mean()
    if kind == "turned":
        return (r * L.kl_divergence(student, view) + (1 - r) * L.kl_divergence(student, full)).mean()
    return (2 * r * (r * L.kl_divergence(view, student) + (1 - r) * L.kl_divergence(full, student))).mean()


class Variant(FVGModel):
    """An FVGModel that trains on another L; with `Losses()` it is FVGModel itself, bit for bit."""

    def __init__(self, tuner: Tuner, config: FVGConfig, losses: Losses = Losses()) -> None:
        super().__init__(tuner, replace(config), foreground="given")
        self.idea = losses
        if not config.freeze_tuner and losses.prompt_rate != 1:
            for parameter in tuner.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: gradient * losses.prompt_rate)

    def _train(self, views: Views, labels: Tensor, branch: str) -> FVGOutput:
        config, idea = self.config, self.idea
        text = self.tuner.text_features()
        assert views.foreground is not None
        z_full, z_fg = self._logits(views.base, text), self._logits(views.foreground, text)
        if config.freeze_tuner:
            z_full, z_fg, text = z_full.detach(), z_fg.detach(), text.detach()
        z_prior = self._prior_logits(views)
        trust, gate_logits = self._trust(z_full, z_fg, views)
        target = L.reliability_target(z_fg, z_full, labels, config.reliability_margin)
        z_fdc = self._fdc_logits(views.base, text)
        z_pc = self._calibrate(views.new, text, z_prior)[2]
        teachers = (trust.detach(), z_fg.detach(), z_full.detach())
        distill = distill_term(*teachers, z_fdc, config.temperature, idea.distill)
        new_kl = prior_term(z_prior, z_pc, config.temperature, idea.new_kl)
        assert views.usable is not None
        loss = F.cross_entropy(z_fdc, labels)
        loss = loss + config.lambda_gate * L.gate_loss(gate_logits, target, views.usable)
        loss = loss + config.lambda_distill * distill
        loss = loss + config.lambda_new * (F.cross_entropy(z_pc, labels) + config.lambda_new_kl * new_kl)
        if idea.tuner_ce:
            loss = loss + idea.tuner_ce * F.cross_entropy(z_full, labels)
        return FVGOutput(loss=loss, logits=z_fdc, logits_base=z_fdc, logits_new=z_pc)


# -- one task and seed -------------------------------------------------------------------------------------------------


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
        losses: Losses = Losses(),
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


# -- scores ------------------------------------------------------------------------------------------------------------


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


def trained(cell: Cell, config: FVGConfig, losses: Losses = Losses()) -> Figures:
    """One idea in the losses, behind the tuned CoOp."""
    model = cell.heads(cell.tuner, config, losses)
    found = figures(cell, model)
    model.release()
    return found


# -- the ideas ---------------------------------------------------------------------------------------------------------


def references(cell: Cell) -> Rows:
    """Plain CLIP, the tuner, the paper's settings and plus."""
    paper = cell.heads(cell.tuner, FVGConfig())
    rows = {CLIP: figures(cell, paper, branches=(0, 0)), TUNER: tuner_figures(cell), PAPER: figures(cell, paper)}
    paper.release()
    return {**rows, PLUS_ROW: figures(cell, cell.plus)}


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


def directions(cell: Cell) -> Rows:
    """The KL of L_PC in the other direction, in plus and in the paper's settings; then that of L_dist."""
    rows = {
        f"plus, KL(p_PC ‖ p_CLIP), weight {weight}": trained(
            cell, replace(PLUS, lambda_new_kl=float(weight)), Losses(new_kl="turned")
        )
        for weight in (1, 3, 10, 30)
    }
    rows["plus, mean of both directions, weight 10"] = trained(cell, PLUS, Losses(new_kl="both"))
    rows["FVG-PT, KL(p_PC ‖ p_CLIP), weight 1"] = trained(cell, FVGConfig(), Losses(new_kl="turned"))
    rows["plus, L_dist turned round"] = trained(cell, PLUS, Losses(distill="turned"))
    return rows


def weights(cell: Cell) -> Rows:
    """Masks weighted by r: the weight of the attended view, and the distillation."""
    model = cell.plus
    learnt = torch.cat([trust(model, cell.train.view(k), cell.base) for k in range(VIEWS)])
    middle, view = float(learnt.mean()), PLUS.attended_view
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "view at weight r": lambda r: r,
        "view at weight 0.8 r": lambda r: 2 * view * r,
        "view at weight 0.4 r / mean r of the training pictures": lambda r: (view * r / middle).clamp(max=0.9),
        "view at weight 0.4 where r ≥ 0.5, else 0": lambda r: view * (r >= 0.5),
        "view at weight 0.4 where r ≥ that mean, else 0.2": lambda r: torch.where(r >= middle, view, view / 2),
        "the opposite: view at weight 0.8 (1 − r)": lambda r: 2 * view * (1 - r),
    }
    rows = {
        name: figures(cell, model, weigh=lambda p, c, kind=kind: kind(trust(model, p, c)))  # type: ignore[misc]
        for name, kind in kinds.items()
    }
    rows["view at weight 0.4 where half of the attention is in the true mask, else 0 (no setting: a bound)"] = figures(
        cell, model, weigh=lambda p, _: view * (p.bank.features["attention_in_mask"][:, 0] >= 0.5)
    )
    for number in (1.0, 10.0):
        config = replace(PLUS, lambda_distill=number)
        rows[f"distillation r · KL(p_fg ‖ p_FDC) alone, λ_d = {number:g}"] = trained(
            cell, config, Losses(distill="trusted")
        )
    rows["distillation weighted with 2 r a picture, λ_d = 1"] = trained(cell, PLUS, Losses(distill="scaled"))
    return rows


Learn = Callable[[Cell, FeatureBank], Variant]
"""Trains a model on a bank's classes from the start."""


def in_two_stages(cell: Cell, bank: FeatureBank) -> Variant:
    """Plus as it is."""
    return cell.heads(cell.tuned(bank), PLUS, bank=bank)


def in_one_stage(
    cell: Cell, bank: FeatureBank, config: FVGConfig = PLUS, own: float = 0.0, epochs: int | None = None
) -> Variant:
    """Prompts and heads together, by the heads' recipe; the prompts' rate is CoOp's, scaled to the heads' batch."""
    losses = Losses(tuner_ce=own, prompt_rate=small_batches().lr / stages("coop")["heads"].lr)
    return cell.heads(cell.fresh(bank.classes), replace(config, freeze_tuner=False), losses, bank, epochs)


def going_on(cell: Cell, bank: FeatureBank) -> Variant:
    """Two stages, but the prompts learn on in the second, from the same losses as the heads."""
    losses = Losses(prompt_rate=small_batches().lr / stages("coop")["heads"].lr)
    return cell.heads(cell.tuned(bank), replace(PLUS, freeze_tuner=False), losses, bank)


def small_batches() -> Stage:
    """CoOp's recipe with the heads' batch and epochs, the rate scaled with the batch."""
    tune, heads = stages("coop")["tune"], stages("coop")["heads"]
    rate = tune.lr * heads.batch_size / tune.batch_size
    stage: Stage = replace(tune, lr=rate, batch_size=heads.batch_size, epochs=heads.epochs)
    return stage


def one_stage(cell: Cell) -> Rows:
    """Prompts and heads trained together on plus's L, and what part of it is owed to longer training."""
    recipes = stages("coop")
    longer = recipes["heads"].epochs + recipes["tune"].epochs
    kinds: dict[str, Learn] = {
        ONE_STAGE: in_one_stage,
        "one stage, 10 epochs, and CoOp's own loss": lambda c, b: in_one_stage(c, b, own=1.0),
        "one stage, 30 epochs (both recipes')": lambda c, b: in_one_stage(c, b, epochs=longer),
        "one stage, 30 epochs, and CoOp's own loss": lambda c, b: in_one_stage(c, b, own=1.0, epochs=longer),
        "one stage, 10 epochs, with the paper's settings": lambda c, b: in_one_stage(c, b, FVGConfig()),
        "two stages, the prompts learning on in the second": going_on,
        "control: two stages, the heads for 30 epochs": lambda c, b: c.heads(c.tuned(b), PLUS, bank=b, epochs=longer),
        "control: two stages, CoOp tuned with the heads' batch and epochs": lambda c, b: c.heads(
            c.tuned(b, small_batches()), PLUS, bank=b
        ),
    }
    rows = {}
    for name, learn in kinds.items():
        model = learn(cell, cell.train.bank)
        rows[name] = figures(cell, model)
        model.release().detach()
    return rows


# -- a learnt gate for the joint label set -----------------------------------------------------------------------------

CUES = ("prior's odds", "FDC's odds", "PC's odds", "entropy of FDC", "entropy of PC", "r")
BEST_GATE = "learnt gate: log-odds of CLIP and both branches"
GATES: Mapping[str, tuple[int, ...]] = {
    "learnt gate: plain CLIP's log-odds alone (a temperature, an offset)": (0,),
    BEST_GATE: (0, 1, 2),
    "learnt gate: entropies of both branches alone": (3, 4),
    "learnt gate: log-odds and entropies": (0, 1, 2, 3, 4),
    "learnt gate: log-odds, entropies and r": (0, 1, 2, 3, 4, 5),
}
"""Which cues a gate sees."""
POOLED: Mapping[str, tuple[int, ...]] = {
    "one learnt gate for all tasks and seeds: log-odds of CLIP and both branches": (0, 1, 2),
    "one learnt gate for all tasks and seeds: log-odds, entropies and r": (0, 1, 2, 3, 4, 5),
}
"""The same, fitted on the held-out base classes of all tasks and seeds together."""


def cues(z: Logits, is_base: Tensor, r: Tensor) -> Tensor:
    """(N, 6) the cues of `CUES`: log-odds of base against new at T = 2, entropies within a group over log C, r."""
    odds = [(s / 2)[:, is_base].logsumexp(-1) - (s / 2)[:, ~is_base].logsumexp(-1) for s in z]
    inside = [z[1][:, is_base], z[2][:, ~is_base]]
    spread = [L.entropy(L.log_probs(s)) / math.log(s.shape[1]) for s in inside]
    return torch.stack([*odds, *spread, r], 1)


class JointGate:
    """log P(base | x) / P(new | x) as a logistic regression on standardised cues, fitted by its penalised likelihood.

    Args:
        seen: (N, 6) cues. is_base: (N,) 1 for pictures of tuned classes. columns: the cues that it uses.
    """

    def __init__(self, seen: Tensor, is_base: Tensor, columns: Sequence[int]) -> None:
        self.columns = list(columns)
        chosen = seen[:, self.columns].double()
        self.mean, self.std = chosen.mean(0), chosen.std(0).clamp_min(1e-6)
        x, y = (chosen - self.mean) / self.std, is_base.double()
        share = y.mean()
        weight = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))  # both groups count the same
        self.parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.parameters], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            z = x @ self.parameters[:-1] + self.parameters[-1]
            loss = F.binary_cross_entropy_with_logits(z, y, weight) + PENALTY * self.parameters[:-1].square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)

    @torch.no_grad()
    def __call__(self, seen: Tensor) -> Tensor:
        """(N,) log-odds."""
        x = (seen[:, self.columns].double() - self.mean) / self.std
        odds: Tensor = x @ self.parameters[:-1] + self.parameters[-1]
        return odds.float()


def pseudo(cell: Cell, learn: Learn) -> tuple[Tensor, Tensor]:
    """Cues (N, 6) and groups (N,) without a picture of a new class: each half of the base classes held out in turn.

    The model learns on one half of the base classes, less `HELD_SHOTS` shots; the cues are those of the shots left
    out and of as many of the other half, which plays the new classes, over both halves' names.
    """
    labels, half = cell.train.bank.labels, len(cell.base) // 2
    number = [labels[:i].count(y) for i, y in enumerate(labels)]  # which shot of its class
    found, groups = [], []
    for known in (range(half), range(half, len(cell.base))):
        order = [*known, *(c for c in range(len(cell.base)) if c not in known)]
        names = [cell.base[c] for c in order]
        rows = [i for i, y in enumerate(labels) if y in known and number[i] < SHOTS - HELD_SHOTS]
        part = cell.train.subset(rows, [order.index(labels[i]) for i in rows], names[: len(known)]).bank
        model = learn(cell, part)
        rest = [i for i, n in enumerate(number) if n >= SHOTS - HELD_SHOTS]
        pictures = cell.train.subset(rest, [order.index(labels[i]) for i in rest], names)
        is_base = torch.arange(len(names)) < len(known)
        for k in range(VIEWS):
            one = pictures.view(k)
            found.append(cues(logits(model, one.bank, names), is_base, trust(model, one, names)))
            groups.append(is_base[torch.tensor(one.bank.labels)])
        model.release().detach()
    return torch.cat(found), torch.cat(groups)


def gated(cell: Cell, gate: JointGate, model: Variant) -> Figures:
    """A model with a gate's groups instead of plain CLIP's."""
    both = [*cell.base, *cell.new]
    is_base = torch.arange(len(both)) < len(cell.base)

    def joint(pictures: Pictures, z: Logits) -> Tensor:
        odds = gate(cues(z, is_base, trust(model, pictures, both))).unsqueeze(1)
        base = F.logsigmoid(odds) + L.log_probs(z[1][:, is_base])
        return torch.cat([base, F.logsigmoid(-odds) + L.log_probs(z[2][:, ~is_base])], 1)

    return figures(cell, model, joint=joint)


def test_cues(cell: Cell) -> tuple[Tensor, Tensor]:
    """The same of the test pictures: what no gate may be fitted on."""
    both = [*cell.base, *cell.new]
    is_base = torch.arange(len(both)) < len(cell.base)
    found = [cues(logits(cell.plus, p.bank, both), is_base, trust(cell.plus, p, both)) for p in cell.tests]
    return torch.cat(found), torch.cat([torch.full((len(f),), i == 0) for i, f in enumerate(found)])


def gates(cell: Cell, ready: tuple[Tensor, Tensor]) -> Rows:
    """A gate of every kind fitted on this cell's held-out base classes; one fitted on the test pictures for a bound."""
    rows = {name: gated(cell, JointGate(*ready, columns), cell.plus) for name, columns in GATES.items()}
    bound = JointGate(*test_cues(cell), range(len(CUES)))
    return {**rows, "all cues, fitted on the test pictures (no setting: a bound)": gated(cell, bound, cell.plus)}


def both_together(cell: Cell) -> Rows:
    """What was best of two kinds, at once: chosen after the others had been seen."""
    rows = {}
    for name, learn in {"one stage": in_one_stage, "prompts learning on": going_on}.items():
        gate = JointGate(*pseudo(cell, learn), GATES[BEST_GATE])
        model = learn(cell, cell.train.bank)
        rows[f"{name}, and a learnt gate (log-odds of CLIP and both branches)"] = gated(cell, gate, model)
        model.release().detach()
    return rows


# -- the run -----------------------------------------------------------------------------------------------------------

REFERENCE, GATE, WEIGHT, STAGE, DIRECTION, TOGETHER = (
    "reference",
    "a learnt gate for the joint label set, fitted on held-out halves of the base classes",
    "masks weighted by r",
    "prompts and heads in one stage",
    "the KL in the other direction",
    "one stage and a learnt gate together, tried after the rows above were seen",
)
GROUPS = (REFERENCE, GATE, WEIGHT, STAGE, DIRECTION, TOGETHER)


def together(cells: Iterable[tuple[str, Rows]]) -> Record:
    """Rows of cells put together, in the order of the runs."""
    record: Record = {}
    for task, rows in cells:
        for row, metrics in rows.items():
            for metric, value in metrics.items():
                record.setdefault(row, {}).setdefault(metric, {}).setdefault(task, []).append(value)
    return record


def run(tasks: Sequence[str], seeds: Sequence[int], banks: Path) -> list[dict[str, Any]]:
    """[{"group", "ideas": Record}] of every idea on every task and seed."""
    clip, tokenizer = pocket_clip()
    found: dict[str, list[tuple[str, Rows]]] = {n: [] for n in GROUPS}
    cells, ready = [], []
    for task in tasks:
        for seed in seeds:
            cell = Cell(clip, tokenizer, task, seed, banks)
            cells.append(cell)
            ready.append(pseudo(cell, in_two_stages))
            for group, rows in (
                (REFERENCE, references(cell)),
                (GATE, gates(cell, ready[-1])),
                (WEIGHT, weights(cell)),
                (STAGE, one_stage(cell)),
                (DIRECTION, directions(cell)),
                (TOGETHER, both_together(cell)),
            ):
                found[group].append((task, rows))
                for row, values in rows.items():
                    print(task, seed, row, values, flush=True)
    everything = [torch.cat(parts) for parts in zip(*ready, strict=True)]
    for name, columns in POOLED.items():
        pooled = JointGate(everything[0], everything[1], columns)
        found[GATE] += [(cell.task, {name: gated(cell, pooled, cell.plus)}) for cell in cells]
    return [{"group": group, "ideas": together(rows)} for group, rows in found.items()]


def main() -> None:
    """Runs every idea and writes ideas.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(VALIDATION))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--banks", type=Path, default=BANKS)
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = run(options.tasks, [int(s) for s in options.seeds.split(",")], options.banks)
    write_json(options.output / "ideas.json", record)
    for part in record:
        for idea, metrics in part["ideas"].items():
            means = [statistics.fmean(statistics.fmean(v) for v in metrics[m].values()) for m in METRICS]
            print(f"{idea:75s}", " ".join(f"{v:5.1f}" for v in means), flush=True)


if __name__ == "__main__":
    main()
