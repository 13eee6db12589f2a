"""What an FVGModel gives back: the output of a pass, a prediction, its status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FVGOutput(ModelOutput):
    """Output of an FVGModel.

    Attributes:
        loss: () L of METHOD.md in training, the branch's cross entropy in evaluation, when labels were given.
        logits: (B, C) of the branch asked for, float32; log-probabilities for "joint".
        logits_base: (B, C) z_FDC, where computed.
        logits_new: (B, C) z_PC, where computed.
        foreground_trust: (B,) r in [0, 1], 0 where the mask is unusable; in evaluation only when a mask was given.
        prior_trust: (B,) b in [0, 1], where z_PC was computed.
        losses: the terms "base_ce", "frg", "distill", "new_ce", "new_kl", unweighted, each ().
        foreground_attention: (B, h, w) attention of the pooling token over the patches, where asked for or used.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_base: Tensor | None = None
    logits_new: Tensor | None = None
    foreground_trust: Tensor | None = None
    prior_trust: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    foreground_attention: Tensor | None = None


class Prediction(NamedTuple):
    """One class and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Status:
    """What is attached to a model, what learns and what is frozen.

    Attributes:
        tuner: kind of the tuner. foreground: where masks come from. branch: what "auto" means now.
        trainable: parameters that learn. frozen: parameters that do not. heads: parameters of the four heads.
        hooks: hooks of ours on the user's model. base_classes, classes: how many were tuned on, how many are scored.
    """

    tuner: str
    foreground: str
    branch: str
    trainable: int
    frozen: int
    heads: int
    hooks: int
    base_classes: int
    classes: int
