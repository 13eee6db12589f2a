"""How each tuner and FVG-PT behind it are trained, as data: one `Recipe` for each tuner, each number with its source.

Stage one (`tune`) learns the tuner, stage two (`fvg`) the heads behind it (METHOD.md section 7). `fvg-adapter train`
follows these; a loop of your own can read them too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE
from fvg_adapter.tuners.templates import CLIP_TEMPLATES, KGCOOP_TEMPLATES, dataset_name, template_for

WHOLE_CROP = (0.08, 1.0)
"""Scale of the random resized crop that Dassl uses when a config names none."""


@dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        optimizer: "sgd" (no dampening, no Nesterov) or "adamw" (betas 0.9, 0.999; eps 1e-8). lr: its learning rate.
        weight_decay, momentum: Dassl's defaults unless the source names others; momentum is SGD's.
        epochs, batch_size: length and batch. warmup_epochs: epochs at the constant rate `warmup_lr`.
        crop_scale: share of the picture that a random resized crop keeps, at least and at most.
        source: where the numbers stand.
    """

    optimizer: Literal["sgd", "adamw"]
    lr: float
    batch_size: int
    source: str
    epochs: int = 10
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    crop_scale: tuple[float, float] = WHOLE_CROP

    def make_optimizer(self, parameters: Iterable[Tensor] | Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over some parameters."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.optimizer != "sgd":
            raise FVGError(f"optimizer {self.optimizer!r} is unknown. {nearest(self.optimizer, ('sgd', 'adamw'))}")
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def learning_rate(self, epoch: int, epochs: int | None = None) -> float:
        """The rate during epoch `epoch` = 0, 1, …; see `dassl_learning_rate`."""
        return dassl_learning_rate(epoch, self.lr, epochs or self.epochs, self.warmup_epochs, self.warmup_lr)


@dataclass(frozen=True)
class Recipe:
    """Both trainings of a tuner.

    Attributes:
        tune: stage one; None where nothing is learned before the heads.
        fvg: stage two.
        templates: the hand-written prompt by data set (the prior's, and the tuner's own teacher's).
        arguments: what the authors' runs give to the constructor where it differs from our defaults.
    """

    tune: Stage | None
    fvg: Stage
    templates: Mapping[str, str] = field(default_factory=lambda: CLIP_TEMPLATES)
    arguments: Mapping[str, Any] = field(default_factory=dict)


EPOCHS_BY_DATASET: Mapping[str, int] = {"EuroSAT": 20}
"""Data sets that train longer (the paper's text; not in the released configs)."""

_HEADS_BY_SGD = Stage("sgd", 0.0035, 4, "configs/trainers/FVGPT_CoOp and FVGPT_KgCoOp of the release (METHOD 7)")

RECIPES: dict[str, Recipe] = {
    "zero_shot": Recipe(tune=None, fvg=_HEADS_BY_SGD),
    "external": Recipe(tune=None, fvg=_HEADS_BY_SGD),
    "coop": Recipe(
        tune=Stage("sgd", 0.0035, 4, "configs/trainers/CoOp/vit_b16_ep10.yaml of the release; crop: METHOD 7 (Dassl)"),
        fvg=_HEADS_BY_SGD,
        arguments={"n_ctx": 4, "ctx_init": ""},  # run_tuning.py: TRAINER.COOP.N_CTX 4, no words
    ),
    "kgcoop": Recipe(
        tune=Stage("sgd", 0.0035, 4, "configs/trainers/KgCoOp/vit_b16_ep10_ctxv1_bs4_lr35.yaml of the release"),
        fvg=_HEADS_BY_SGD,
        templates=KGCOOP_TEMPLATES,
        arguments={"weight": 2.0},  # the same file: W 2.0; 8.0 in the KgCoOp paper, our default
    ),
    "promptsrc": Recipe(
        tune=Stage("sgd", 0.0025, 32, "configs/trainers/PromptSRC/vit_b16_c2_ep10_batch32_4+4ctx.yaml of the release"),
        fvg=Stage("sgd", 0.0025, 32, "configs/trainers/FVGPT_PromptSRC of the release (METHOD 7)"),
    ),
    "mmrl": Recipe(
        tune=Stage("adamw", 1e-3, 4, "configs/trainers/MMRL/vit_b16.yaml of yunncheng/MMRL", crop_scale=(0.5, 1.0)),
        fvg=Stage("adamw", 1e-3, 4, "configs/trainers/FVGPT_MMRL of the release (METHOD 7)", crop_scale=(0.5, 1.0)),
    ),
    "lora": Recipe(
        tune=Stage(
            "adamw",
            2e-4,
            32,
            "run_utils.py and lora.py of MaxZanella/CLIP-LoRA (Zanella and Ben Ayed 2024); its 500 iterations a shot "
            "depend on the number of classes, so 50 epochs here are our choice",
            epochs=50,
            weight_decay=1e-2,
            warmup_epochs=0,
        ),
        fvg=_HEADS_BY_SGD,  # the paper has no LoRA; the heads learn as behind CoOp
    ),
}
"""Recipes by `Tuner.kind`; `register(recipe=…)` adds one."""


def recipe_on(kind: str, dataset: str) -> Recipe:
    """The recipe of a tuner kind on a data set of the paper: its template as an argument, and its number of epochs.

    A data set that is not known gets the default template and the recipe's own epochs.

    Raises:
        FVGError: there is no recipe of that name.

    >>> recipe_on("kgcoop", "eurosat").arguments["template"]
    'a centered satellite photo of {}.'
    """
    recipe = recipe_for(kind)
    template = template_for(dataset, recipe.templates, default=DEFAULT_TEMPLATE)
    arguments = {**recipe.arguments, "template": template}
    if kind == "kgcoop":
        arguments["teacher_template"] = template
    epochs = EPOCHS_BY_DATASET.get(dataset_name(dataset))
    if epochs is None:
        return replace(recipe, arguments=arguments)
    tune = recipe.tune and replace(recipe.tune, epochs=max(epochs, recipe.tune.epochs))
    return replace(recipe, tune=tune, fvg=replace(recipe.fvg, epochs=epochs), arguments=arguments)


def recipe_for(kind: str) -> Recipe:
    """The recipe of a tuner kind; a kind without one (a tuner of your own) is an error that lists the known ones.

    Raises:
        FVGError: there is no recipe of that name.
    """
    if kind not in RECIPES:
        raise FVGError(
            f"there is no recipe for the tuner {kind!r}. {nearest(kind, RECIPES)} A tuner of your own brings one: "
            "@register(recipe=Recipe(…))."
        )
    return RECIPES[kind]


def dassl_learning_rate(
    epoch: int, base_lr: float, epochs: int, warmup_epochs: int = 1, warmup_lr: float = 1e-5
) -> float:
    """Learning rate during epoch `epoch` (0-based): constant warm-up, then a cosine that is stepped once an epoch.

    η_e = η_w for e < W, else η (1 + cos(π (e − W) / T)) / 2 with T = all epochs, so it never reaches 0 (Dassl:
    ConstantWarmupScheduler around CosineAnnealingLR, golden/README.md).

    >>> [round(dassl_learning_rate(e, 0.002, 4), 6) for e in range(4)]
    [1e-05, 0.002, 0.001707, 0.001]
    """
    if epoch < warmup_epochs:
        return warmup_lr
    return base_lr * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs)) / 2
