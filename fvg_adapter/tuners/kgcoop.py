"""KgCoOp: CoOp held near hand-written knowledge (Yao et al. 2023, "Visual-Language Prompt Tuning with
Knowledge-guided Context Optimization")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter.errors import FVGError
from fvg_adapter.tuners.coop import CoOp
from fvg_adapter.tuners.passes import untouched
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE, Prompts, check_template, fill


class KgCoOp(CoOp):
    """CoOp with a penalty on leaving the plain CLIP's features of a hand-written prompt.

    L = CE(s · v · tᵀ, y) + W · (1 − mean_c cos(t_c, w_c)), w_c the untouched CLIP's feature of `teacher_template`.

    Args:
        model, tokenizer, classes, template: as for `Tuner`; the template is only the prior's.
        n_ctx, ctx_init, csc: as for `CoOp`; the class name stands at the end.
        teacher_template: the data set's hand-written prompt (`templates.KGCOOP_TEMPLATES`), not the student's words.
        weight: W, 8.0 in the paper (section 4.1), 2.0 in the release's config.

    Learns:
        ctx: as `CoOp`.

    Losses:
        "ce": the cross entropy. "kg": W · (1 − mean cosine), weight included. Their sum is the loss.

    Raises:
        FVGError: what CoOp raises; a teacher template without exactly one {}; a negative weight.

    Source: trainers/kgcoop.py. Where that code reads any init words as "a photo of a", this takes the words given; its
    bias vector, meta net and adapter are never used and do not exist here.
    """

    kind: ClassVar[str] = "kgcoop"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        *,
        n_ctx: int = 4,
        ctx_init: str | None = "a photo of a",
        csc: bool = False,
        teacher_template: str = DEFAULT_TEMPLATE,
        weight: float = 8.0,
        template: str = DEFAULT_TEMPLATE,
    ) -> None:
        if weight < 0:
            raise FVGError(f"weight must not be negative, but is {weight!r}.")
        self._teacher_template, self._weight = check_template(teacher_template), float(weight)
        super().__init__(model, tokenizer, classes, n_ctx=n_ctx, ctx_init=ctx_init, csc=csc, template=template)

    def _check_prompts(self, classes: tuple[str, ...]) -> None:
        super()._check_prompts(classes)
        self._teacher_prompts(classes)

    def _teacher_prompts(self, classes: Sequence[str]) -> Prompts:
        texts = [fill(self._teacher_template, name) for name in classes]
        return self._tokenized_once(("teacher", self._teacher_template), classes, lambda: self.tokenized(texts))

    def teacher_features(self) -> Tensor:
        """w (C, D): the untouched CLIP's unit text features of the teacher template, without gradient."""

        def encode() -> Tensor:
            with untouched():
                return F.normalize(self._encode(self._teacher_prompts(self.classes)), dim=-1)

        return self._cached("teacher", (), encode)

    def loss_terms(self, image: Tensor, text: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """ "ce" and "kg"; their sum is the loss."""
        cosine = F.cosine_similarity(text, self.teacher_features(), dim=-1, eps=1e-7)  # (C,)
        return {**super().loss_terms(image, text, logits, labels), "kg": self._weight * (1 - cosine.mean())}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make this tuner again."""
        arguments = {k: v for k, v in super().arguments().items() if k != "class_token_position"}
        return {**arguments, "teacher_template": self._teacher_template, "weight": self._weight}
