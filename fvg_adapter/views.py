"""From images and masks to the features that the heads start from: whole image, foreground view, plain CLIP.

METHOD.md section 2. Whole images and foreground views share one encoder batch where they can; where the tuner leaves
the image tower alone, its features serve plain CLIP too (DESIGN decision 4).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fvg_adapter.attended import blend, zoom_on_mask
from fvg_adapter.attention import AttentionProbe
from fvg_adapter.config import FVGConfig
from fvg_adapter.errors import ForegroundWarning, FVGError
from fvg_adapter.foreground import (
    ForegroundSource,
    attention_mask_from_map,
    foreground_view,
    mask_area,
    masks_from,
    prepare_mask,
    usable_mask,
)
from fvg_adapter.modes import full_precision
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.passes import beside

Source = str | ForegroundSource

_NO_MASKS = (
    "none of a batch's masks is usable (missing, empty, or covering a share of the picture outside {}): its pictures "
    "have no foreground and train with r = 0. If that is not meant, see that foreground_mask reaches the model, or "
    "take masks from elsewhere: foreground='attention', a segmenter (--foreground attention), or `fvg-adapter masks`."
)
"""One text whatever the batch: Python shows a warning of one text and place once."""


@dataclass(frozen=True)
class Views:
    """Features of a batch; what the heads start from.

    Attributes:
        base, new: (B, D) tuned features of the whole image for FRG/FDC and for PC (the same but for MMRL).
        prior: (B, D) plain CLIP's features of the whole image, or None.
        foreground, foreground_new, foreground_prior: the same three of x_fg, or None.
        area: (B,) share of the image that the mask covers. usable: (B,) bool. attention: (B, h, w) or None.
        attended, attended_new, attended_prior: the first three of the attended view, or None.
    """

    base: Tensor
    new: Tensor
    prior: Tensor | None = None
    foreground: Tensor | None = None
    foreground_new: Tensor | None = None
    foreground_prior: Tensor | None = None
    area: Tensor | None = None
    usable: Tensor | None = None
    attention: Tensor | None = None
    attended: Tensor | None = None
    attended_new: Tensor | None = None
    attended_prior: Tensor | None = None

    def blended(self, weight: float) -> Views:
        """With the attended view's features in those of the whole image; itself where there are none."""
        if self.attended is None or self.attended_new is None:
            return self
        base = blend(self.base, self.attended, weight)
        new = base if self.new is self.base else blend(self.new, self.attended_new, weight)
        prior = self.prior
        if prior is self.new:
            prior = new
        elif prior is not None and self.attended_prior is not None:
            prior = blend(prior, self.attended_prior, weight)
        return replace(self, base=base, new=new, prior=prior)


class ViewEncoder:
    """Encodes batches for one model; holds no tensors."""

    def __init__(self, tuner: Tuner, config: FVGConfig, probe: AttentionProbe, *, learning: bool) -> None:
        self.tuner: Tuner = tuner
        self.config: FVGConfig = config
        self.probe: AttentionProbe = probe
        self.learning: bool = learning

    def encode(
        self,
        pixels: Tensor,
        mask: Tensor | None,
        source: Source | None,
        *,
        foreground: bool,
        prior: bool,
        attention: bool,
        foreground_prior: bool = False,
        classes: Sequence[str] | None = None,
        attended: bool = False,
    ) -> Views:
        """Views of images (B, 3, H, W).

        Args:
            pixels: normalised images. mask: given masks in any accepted form, or None.
            source: where a mask comes from when none is given; None for nowhere.
            foreground: encode x_fg. prior: also plain CLIP's features. attention: also the attention map.
            foreground_prior: also plain CLIP's features of x_fg (for measuring).
            classes: the class name of each picture, for sources that are asked with it.
            attended: also the features of the attended view, where the config has one.
        """
        if mask is None and foreground and callable(source):
            config = self.config
            normal = {"image_mean": config.image_mean, "image_std": config.image_std}
            mask = masks_from(source, pixels, classes=classes, **normal)
        if mask is not None:
            mask = prepare_mask(mask, pixels, threshold=self.config.mask_threshold)
        from_attention = mask is None and foreground and source == "attention"
        attended = attended and self.config.attended_view > 0
        record = attention or attended
        one_batch = mask is not None and foreground and not record and not self.tuner.encoder_needs_separate_passes
        if one_batch:
            assert mask is not None
            views, view = self._together(pixels, mask, source)
        else:
            views, mask = self._whole_first(pixels, mask, record or from_attention, from_attention)
            views, view = self._then_foreground(views, pixels, mask, source) if foreground else (views, None)
        if prior:
            views = replace(views, prior=self._prior(views.new, pixels))
        if foreground_prior and views.foreground_new is not None:
            again = pixels if view is None else view
            views = replace(views, foreground_prior=self._prior(views.foreground_new, again))
        if attended:
            views = self._attend(views, pixels)
            views = views if attention or from_attention else replace(views, attention=None)
        return views

    def stored(
        self, features: Mapping[str, Tensor], source: Source | None, *, foreground: bool, attended: bool = False
    ) -> Views:
        """Views from a FeatureBank batch; see `FVGModel.forward`."""
        base = full_precision(features["image"])
        dim = self.tuner.encoder.feature_dim
        if base.dim() != 2 or base.shape[1] != dim:
            raise FVGError(f"features['image'] is {tuple(base.shape)}, but this model's features are (B, {dim}).")
        if self.tuner.changes_images and "prior" not in features:
            raise FVGError(
                "these features lack 'prior', which this tuner needs; encode them with FeatureBank.encode(model, …)."
            )
        new = full_precision(features.get("image_new", base))
        views = Views(base, new, prior=full_precision(features["prior"]) if "prior" in features else new)
        if attended and self.config.attended_view > 0:
            views = _with_attended(views, features)
        view = features.get("foreground")
        if view is None and not foreground:
            return views
        if view is None or "usable" not in features or "mask_area" not in features:
            return self._without_mask(views, source)
        usable = features["usable"].bool() & usable_mask(features["mask_area"], self.config.usable_area)
        self.report(usable)
        view = base if source == "whole" else full_precision(view)
        return replace(views, foreground=view, area=features["mask_area"], usable=usable)

    def _together(self, pixels: Tensor, mask: Tensor, source: Source | None) -> tuple[Views, Tensor | None]:
        """Whole images and foreground views as one encoder batch."""
        area, usable = self._measure(mask)
        if source == "whole" or _none(usable):  # x_fg = x, or r = 0 for every image
            base, new = self.tuner.branch_image_features(pixels)
            return Views(base, new, foreground=base, foreground_new=new, area=area, usable=usable), None
        view = self._view(pixels, mask)
        base, new = self.tuner.branch_image_features(torch.cat([pixels, view]))  # (2B, D)
        n = len(pixels)
        parts = {"base": base[:n], "new": new[:n], "foreground": base[n:], "foreground_new": new[n:]}
        return Views(**parts, area=area, usable=usable), view

    def _whole_first(
        self, pixels: Tensor, mask: Tensor | None, record: bool, from_attention: bool
    ) -> tuple[Views, Tensor | None]:
        """The whole image with its attention, which may make the mask."""
        if not record:
            base, new = self.tuner.branch_image_features(pixels)
            return Views(base, new), mask
        with self.probe.recording() as recorded:
            base, new = self.tuner.branch_image_features(pixels)
        maps = recorded.attention().mean((1, 2))  # (B, layers, heads, h, w) -> (B, h, w)
        if from_attention:
            size = (pixels.shape[-2], pixels.shape[-1])
            mask = attention_mask_from_map(maps, size, threshold=self.config.attention_threshold)
        return Views(base, new, attention=maps), mask

    def _then_foreground(
        self, views: Views, pixels: Tensor, mask: Tensor | None, source: Source | None
    ) -> tuple[Views, Tensor | None]:
        if mask is None:
            return self._without_mask(views, source), None
        area, usable = self._measure(mask)
        views = replace(views, area=area, usable=usable)
        if source == "whole" or _none(usable):
            return replace(views, foreground=views.base, foreground_new=views.new), None
        view = self._view(pixels, mask)
        base, new = self.tuner.branch_image_features(view)
        return replace(views, foreground=base, foreground_new=new), view

    def _without_mask(self, views: Views, source: Source | None) -> Views:
        """Missing masks: unusable (METHOD section 8), but for the control x_fg = x, which needs none."""
        area = views.base.new_full((len(views.base),), float(source == "whole"))
        usable = area > 0
        self.report(usable)
        return replace(views, foreground=views.base, foreground_new=views.new, area=area, usable=usable)

    def _prior(self, features: Tensor, pixels: Tensor) -> Tensor:
        return self.tuner.prior_image_features(pixels) if self.tuner.changes_images else features

    def _attend(self, views: Views, pixels: Tensor) -> Views:
        """The attended view; the whole image where the attention makes no usable mask."""
        config, maps = self.config, views.attention
        assert maps is not None
        size = (pixels.shape[-2], pixels.shape[-1])
        mask = attention_mask_from_map(maps, size, threshold=config.attention_threshold)
        view = self._view(pixels, mask)
        if config.attended_margin:
            view = zoom_on_mask(view, mask, config.attended_margin)
        usable = usable_mask(mask_area(mask), config.usable_area).view(-1, 1, 1, 1)
        view = torch.where(usable, view, pixels)
        with beside():  # a recorded map is one of the whole picture
            base, new = self.tuner.branch_image_features(view)
        prior = None if views.prior is None else self._prior(new, view)
        return replace(views, attended=base, attended_new=new, attended_prior=prior)

    def _view(self, pixels: Tensor, mask: Tensor) -> Tensor:
        config = self.config
        return foreground_view(
            pixels, mask, outside=config.outside_mask, image_mean=config.image_mean, image_std=config.image_std
        )

    def _measure(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        area = mask_area(mask)
        usable = usable_mask(area, self.config.usable_area)
        self.report(usable)
        return area, usable

    def report(self, usable: Tensor) -> None:
        """Raises or warns in training where masks are unusable, as the config says."""
        if not self.learning:
            return
        if self.config.unusable_mask == "error" and not bool(usable.all()):
            raise FVGError(
                f"{int((~usable).sum())} of {len(usable)} masks are missing, empty or cover a share outside "
                f"{self.config.usable_area}; give usable masks or set unusable_mask='skip'."
            )
        if _none(usable):
            warnings.warn(_NO_MASKS.format(self.config.usable_area), ForegroundWarning, stacklevel=1)


def _none(usable: Tensor) -> bool:
    """Whether no mask is usable; not asked on CUDA, where the answer would stall the stream, nor while compiling."""
    return usable.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(usable.any())


def _with_attended(views: Views, features: Mapping[str, Tensor]) -> Views:
    if "attended" not in features:
        raise FVGError(
            "these features lack 'attended', which this model (attended_view above 0) needs at inference; encode test "
            "pictures with FeatureBank.encode(model, …, measure=True)."
        )
    base = full_precision(features["attended"])
    new = full_precision(features["attended_new"]) if "attended_new" in features else base
    prior = full_precision(features["attended_prior"]) if "attended_prior" in features else new
    return replace(views, attended=base, attended_new=new, attended_prior=prior)
