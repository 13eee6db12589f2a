"""The field's reference style, as the baseline: what trainers of the Dassl family do in every step.

The text tower runs on all 77 tokens in every step, frozen or not; whole image, foreground view and the plain CLIP's
image go through the encoder one by one; nothing is kept. It computes the same numbers, and the figures check that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvg_adapter.tuners import CoOp
from fvg_adapter.tuners.passes import untouched
from fvg_adapter.tuners.prompts import Prompts


def untrimmed(prompts: Prompts, length: int) -> Prompts:
    """The prompts padded to the whole window, with tokens that nothing may cut off."""
    ids = F.pad(prompts.input_ids, (0, length - prompts.input_ids.shape[1]), value=int(prompts.input_ids[0, -1]))
    return Prompts(ids, torch.ones_like(ids), prompts.context)


class ReferenceCoOp(CoOp):
    """CoOp as its own code runs it, behind the same interface."""

    encoder_needs_separate_passes = True
    text_memory = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.changes_images = True  # the plain CLIP's image features are computed again, not reused

    def prompts(self, classes: Sequence[str]) -> Prompts:
        """Padded to 77 tokens."""
        return untrimmed(super().prompts(classes), self.encoder.text_length)

    def prior_prompts(self, classes: Sequence[str]) -> Prompts:
        """Padded to 77 tokens."""
        return untrimmed(super().prior_prompts(classes), self.encoder.text_length)

    def text_features(self) -> Tensor:
        """Computed in every step."""
        return self._text(self.classes)

    def prior_text_features(self) -> Tensor:
        """Computed in every step."""
        with untouched():
            return F.normalize(self._encode(self.prior_prompts(self.classes)), dim=-1)

    def _image_tower_learns(self) -> bool:
        return False
