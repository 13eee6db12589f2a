"""Plain CLIP as a tuner: hand-written prompts, nothing learned (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter.errors import FVGError, closest
from fvg_adapter.modes import full_precision
from fvg_adapter.towers import DualEncoder
from fvg_adapter.tuners.base import Tuner, feature_encoder
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE, check_classes
from fvg_adapter.untrusted import shapes_of


class ZeroShot(Tuner):
    """CLIP with a hand-written prompt; what FVG-PT is put behind when no prompts were tuned.

    Args:
        model: a CLIPModel, or a vision tower alone together with given text features.
        tokenizer: the model's tokenizer; None when `classes` holds text features.
        classes: class names, or {name: text feature (D,)} for a model without a text tower.
        template: the hand-written prompt, with one {}.
        projection: for a CLIPVisionModel, which has none, the module from its pooled states to features (B, D).
    """

    kind: ClassVar[str] = "zero_shot"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str] | Mapping[str, Tensor],
        *,
        template: str = DEFAULT_TEMPLATE,
        projection: nn.Module | None = None,
    ) -> None:
        encoder = feature_encoder(model, projection)
        self._given = _check_given(classes, encoder) if isinstance(classes, Mapping) else None
        if self._given is None and not encoder.has_text:
            raise FVGError(
                f"{type(encoder.model).__name__} has no text tower; give classes={{name: text feature}} with features "
                "of "
                f"width {encoder.feature_dim}."
            )
        given = self._given
        super().__init__(model, tokenizer, list(classes), template=template, projection=projection)
        if given is not None:
            self.register_buffer("class_features", torch.stack([given[c] for c in given]), persistent=True)

    def _check_prompts(self, classes: tuple[str, ...]) -> None:
        if self._given is None:
            super()._check_prompts(classes)
            return
        unknown = [c for c in classes if c not in self._given]
        if unknown:
            raise FVGError(
                f"no text feature was given for {unknown[:5]}; this model has no text tower, so only "
                f"{list(self._given)[:5]}… can be scored. {closest(unknown[0], self._given)}Wrap it "
                "again with classes={name: feature}."
            )

    def text_features(self) -> Tensor:
        """Unit text features (C, D): of the template, or the ones that were given."""
        if self._given is None and self._adapter_layers:
            return super().text_features()
        if self._given is None:
            return self.prior_text_features()  # the same features: one cache entry serves both
        return self._given_features()

    def prior_text_features(self) -> Tensor:
        """Unit text features (C, D) of the template, or the ones that were given."""
        return super().prior_text_features() if self._given is None else self._given_features()

    @classmethod
    def saved_classes(cls, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """Class names, or {name: feature} where features were given and saved."""
        names = config["base_classes"]
        if "class_features" not in tensors:
            return names
        shape = shapes_of(tensors)["class_features"]
        if shape[:1] != (len(names),):
            raise FVGError(f"{len(names)} classes, but text features of shape {shape} were saved.")
        return dict(zip(names, tensors["class_features"], strict=True))

    def _given_features(self) -> Tensor:
        assert self._given is not None
        features = self.get_buffer("class_features")

        def chosen() -> Tensor:
            order = {name: row for row, name in enumerate(self._given or ())}
            return F.normalize(full_precision(features[[order[c] for c in self.classes]]), dim=-1)

        with self.one_class_list():
            return self._text_cache.get(("given", self.classes), [features], chosen)


def _check_given(classes: Mapping[str, Tensor], encoder: DualEncoder) -> dict[str, Tensor]:
    check_classes(list(classes))
    given = {}
    for name, feature in classes.items():
        value = torch.as_tensor(feature).detach()
        if value.dim() != 1 or value.shape[0] != encoder.feature_dim:
            raise FVGError(
                f"the text feature of {name!r} has shape {tuple(value.shape)}, but this model's image features are "
                f"({encoder.feature_dim},); give one vector of that width for each class."
            )
        given[name] = full_precision(value).clone().to(encoder.device)
    return given
