"""A tuned model of one's own as a tuner: two functions, from pixels and from class names to features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter.errors import FVGError
from fvg_adapter.files import TUNER_FILE
from fvg_adapter.layouts import LAYOUTS
from fvg_adapter.modes import full_precision
from fvg_adapter.storage import own_tensors_only
from fvg_adapter.towers import DualEncoder
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE, check_classes

ImageFunction = Callable[[Tensor], Tensor]
TextFunction = Callable[[tuple[str, ...]], Tensor]


class External(Tuner):
    """FVG-PT behind a model that this package does not know: a trainer's `CustomCLIP`, another library, a remote
    encoder.

    Args:
        image_features: pixels (B, 3, H, W) -> tuned image features (B, D); normalised here.
        text_features: class names -> tuned text features (C, D); normalised here. Class names are given as they are in
            `classes`, underscores included.
        classes: the class names, in the order of the labels.
        clip, tokenizer, template: the plain CLIP of the prior and its hand-written prompt; `clip` is frozen.
        prior_image_features, prior_text_features: functions instead of it, of any common width.
        model: the module behind the two functions, if there is one: it is then moved, frozen and put into evaluation
            mode with the tuner, and frozen text features are computed once per class list. Without it they are asked
            for at every pass.
        logit_scale: s; the CLIP's when None.
        feature_dim: D; when None the CLIP's, or that of `text_features(classes)`.
        image_size: side of the pictures for `predict`, where there is no CLIP to say it.

    Functions keep their precision: float64 features give float64 scores.

    Attention as the foreground needs a vision tower that the package knows: without `clip` wrap refuses it, and where
    the functions do not run the CLIP the first batch does; use foreground="given", "whole" or a callable. Heads can be
    saved; to load them, make the tuner again (files hold no functions).

    Raises:
        FVGError: neither a CLIP nor both prior functions, no logit scale, features of another width or number.

    Example:
        >>> tuner = External(net.encode_image, net.encode_names, classes=names, clip=clip, tokenizer=tokenizer)
        ... # doctest: +SKIP
    """

    kind: ClassVar[str] = "external"

    def __init__(
        self,
        image_features: ImageFunction,
        text_features: TextFunction,
        *,
        classes: Sequence[str],
        clip: nn.Module | None = None,
        tokenizer: Any = None,
        template: str = DEFAULT_TEMPLATE,
        prior_image_features: ImageFunction | None = None,
        prior_text_features: TextFunction | None = None,
        model: nn.Module | None = None,
        logit_scale: float | Tensor | None = None,
        feature_dim: int | None = None,
        image_size: int = 224,
    ) -> None:
        missing = [
            f"{name}=…"
            for name, given in (
                ("prior_image_features", prior_image_features),
                ("prior_text_features", prior_text_features),
            )
            if given is None
        ]
        if clip is None and missing:
            raise FVGError(
                f"there is no prior: give the plain model as clip=… and tokenizer=…, or {' and '.join(missing)}."
            )
        if clip is None and logit_scale is None:
            raise FVGError(
                "logit_scale is missing: give s, the factor between cosines and logits (100 for released CLIPs)."
            )
        if clip is not None and prior_text_features is None and tokenizer is None:
            raise FVGError("tokenizer is missing: the prior's prompts need the tokenizer of clip.")
        if clip is None and feature_dim is None:
            feature_dim = _width(text_features, classes)
        self._functions = (
            image_features,
            text_features,
            prior_image_features,
            prior_text_features,
        )  # modules unregistered
        self._scale = logit_scale
        self._seen = (model, feature_dim, image_size)
        super().__init__(_Absent() if clip is None else clip, tokenizer, classes, template=template)
        self.model = model
        own_tensors_only(self, "clip", "model")
        self.changes_images = True

    def _view_of(self, model: nn.Module, projection: nn.Module | None) -> DualEncoder:
        module, feature_dim, image_size = self._seen
        if not isinstance(model, _Absent):
            super()._view_of(model, projection)  # refuses what gives no features
            return _SizedEncoder(model, feature_dim)
        assert feature_dim is not None
        return _NoEncoder(model, module, feature_dim, image_size)

    def _check_prompts(self, classes: tuple[str, ...]) -> None:
        if self._functions[3] is None:
            super()._check_prompts(classes)

    # -- features --------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Tensor, *, branch: str = "base") -> Tensor:
        """Tuned image features (B, D), unit length, in the function's own precision (float32 at least)."""
        return self._unit(
            self._functions[0](pixel_values), len(pixel_values), "image_features", self.encoder.feature_dim
        )

    def text_features(self) -> Tensor:
        """Tuned text features (C, D) of the current classes, unit length."""
        return self._asked("tuned", self._functions[1], "text_features", self.encoder.feature_dim)

    @property
    def prior_is_clip(self) -> bool:
        """Whether the prior is the CLIP at hand, and no function of the user's."""
        return self._functions[2] is None

    @torch.no_grad()
    def prior_image_features(self, pixel_values: Tensor) -> Tensor:
        """The plain model's image features, unit length, without gradient."""
        plain = self._functions[2]
        if plain is None:
            return super().prior_image_features(pixel_values)
        return self._unit(plain(pixel_values), len(pixel_values), "prior_image_features", None)

    @torch.no_grad()
    def prior_text_features(self) -> Tensor:
        """The plain model's text features (C, ·), unit length, without gradient."""
        plain = self._functions[3]
        if plain is None:
            return super().prior_text_features()
        return self._asked("prior", plain, "prior_text_features", None)

    def _asked(self, what: str, function: TextFunction, name: str, width: int | None) -> Tensor:
        def compute() -> Tensor:
            names = self.classes
            return self._unit(function(names), len(names), name, width)

        return compute() if self.model is None else self._cached(what, self.model.parameters(), compute)

    def _unit(self, features: Tensor, rows: int, name: str, width: int | None) -> Tensor:
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != rows:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise FVGError(f"{name} gave {shape}; expected a tensor of shape ({rows}, D).")
        if width is not None and features.shape[1] != width:
            raise FVGError(
                f"{name} gave features of width {features.shape[1]}, but feature_dim is {width}; give External the "
                f"matching feature_dim={features.shape[1]}."
            )
        return F.normalize(full_precision(features), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """s, a scalar without gradient."""
        if self._scale is None:
            return super().logit_scale
        return torch.as_tensor(self._scale, dtype=None if isinstance(self._scale, Tensor) else torch.float64).detach()

    # -- files -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What a file can tell of this tuner."""
        return {**super().arguments(), "feature_dim": self.encoder.feature_dim}

    def pretrained_config(self) -> dict[str, Any]:
        """config.json: without a base model where there is none."""
        if not isinstance(self.clip, _Absent):
            return super().pretrained_config()
        return {
            "kind": "tuner",
            "tuner": {"kind": self.kind, "arguments": self.arguments()},
            "base_classes": list(self.base_classes),
            "classes": list(self.classes),
            "base_model": {"id": "local", "revision": None, "path": None, "fingerprint": {}},
        }

    def pretrained_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Nothing: what was tuned lies in the functions."""
        return {TUNER_FILE: {}}

    @classmethod
    def rebuild(
        cls,
        config: dict[str, Any],
        tensors: dict[str, Mapping[str, Tensor]],
        clip: nn.Module,
        tokenizer: Any,
        classes: Any = None,
        folder: Path | None = None,
    ) -> External:
        """Raises FVGError: no file holds functions; the message says how to load the heads."""
        raise FVGError(
            "this was saved with an External tuner, whose functions no file holds. Make the tuner again with "
            "External(…), "
            "wrap it, and load the heads: model.load_state_dict(safetensors.torch.load_file(folder + "
            "'/fvg_heads.safetensors'))."
        )


class _Absent(nn.Module):
    """Stands where a tuner keeps its CLIP when there is none."""


class _SizedEncoder(DualEncoder):
    """A CLIP whose feature width is that of the tuned model."""

    def __init__(self, model: nn.Module, feature_dim: int | None) -> None:
        super().__init__(model)
        self._feature_dim = feature_dim

    @property
    def feature_dim(self) -> int:
        return super().feature_dim if self._feature_dim is None else self._feature_dim


class _NoEncoder(DualEncoder):
    """What the package asks of a dual encoder where there is none: sizes, and a layer whose attention is never seen."""

    def __init__(self, absent: nn.Module, module: nn.Module | None, feature_dim: int, image_size: int) -> None:
        self.model, self.projection, self.layout = absent, None, LAYOUTS["clip"]
        self._sizes = (feature_dim, image_size)
        self._module = module
        self._layer = nn.Identity()

    @property
    def has_text(self) -> bool:
        return False

    @property
    def has_vision(self) -> bool:
        return False

    @property
    def vision(self) -> nn.Module:
        return self._layer

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return [self._layer]

    @property
    def vision_embeddings(self) -> nn.Module:
        return self._layer

    @property
    def vision_encoder(self) -> nn.Module:
        return self._layer

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return layer

    @property
    def leading_tokens(self) -> int:
        return 1

    @property
    def logit_bias(self) -> None:
        return None

    @property
    def image_size(self) -> tuple[int, int]:
        return self._sizes[1], self._sizes[1]

    @property
    def feature_dim(self) -> int:
        return self._sizes[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        parameter = None if self._module is None else next(self._module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


@torch.no_grad()
def _width(text_features: TextFunction, classes: Sequence[str]) -> int:
    features = text_features(check_classes(classes))
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise FVGError(f"text_features gave {type(features).__name__}; expected a tensor of shape ({len(classes)}, D).")
    return int(features.shape[1])
