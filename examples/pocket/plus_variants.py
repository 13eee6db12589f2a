"""What the ideas of `plus_ideas` change in training: FVG-PT on another L, with `Losses` saying which.

With `Losses()` a `Variant` is FVGModel itself, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fvg_adapter import FVGConfig, FVGModel
from fvg_adapter import losses as L
from fvg_adapter.outputs import FVGOutput
from fvg_adapter.tuners import Tuner
from fvg_adapter.views import Views


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


PAPER_LOSSES = Losses()
"""L as it is."""


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

    def __init__(self, tuner: Tuner, config: FVGConfig, losses: Losses = PAPER_LOSSES) -> None:
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
