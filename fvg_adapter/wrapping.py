"""wrap and unwrap: from what the user has to an FVGModel, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fvg_adapter.config import FVGConfig
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import ForegroundSource
from fvg_adapter.model import FVGModel
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE
from fvg_adapter.tuners.zero_shot import ZeroShot


def wrap(
    model: nn.Module,
    tokenizer: Any = None,
    classes: Sequence[str] | Mapping[str, Tensor] | None = None,
    *,
    config: FVGConfig | None = None,
    foreground: str | ForegroundSource = "attention",
    template: str = DEFAULT_TEMPLATE,
    projection: nn.Module | None = None,
) -> FVGModel:
    """Puts FVG-PT behind a CLIP or a tuner; 132,546 trainable parameters for ViT-B/16.

    The model is frozen and put into evaluation mode, hooks are attached to it; `unwrap` takes all of that back. A wrap
    that fails changes nothing.

    Args:
        model: a tuner (CoOp, …), a CLIPModel, a PeftModel around one, or a CLIPVisionModelWithProjection with
            `classes={name: text feature}` (a CLIPVisionModel needs `projection` too).
        tokenizer: the model's tokenizer; not with a tuner.
        classes: the base class names; with a tuner the ones that it was tuned on by default.
        config: hyperparameters; the paper's by default.
        foreground: where a mask comes from when a training batch carries none: "attention" (the model's own), "given"
            (nowhere: such images train with r = 0), "whole" (the control x_fg = x), or a callable on pixels such as
            `fvg_adapter.segmenters.Segmenter`; see `ForegroundSource`.
        template: the hand-written prompt of the prior, with one {}; not with a tuner, which has its own.
        projection: from a CLIPVisionModel's pooled states to features.

    Raises:
        FVGError: classes, template, config or foreground that do not fit; the message says how to fix it.
        TypeError: the model is no supported dual encoder.

    Example:
        >>> model = wrap(clip, tokenizer, ["cat", "dog"])                                   # doctest: +SKIP
        >>> loss = model(pixel_values, labels, foreground_mask).loss                        # doctest: +SKIP
    """
    if isinstance(model, FVGModel):
        raise FVGError("this model is wrapped already; unwrap(model) first to wrap it in another way.")
    if isinstance(model, Tuner):
        _only_a_tuners(tokenizer, template, projection)
        if isinstance(classes, Mapping):
            raise FVGError("a tuner makes its own text features; give classes as a list of names, or leave it out.")
        names = None if classes is None else list(classes)
        if names is not None:
            with model.use_classes(names):  # validates; restores
                pass
        wrapped = FVGModel(model, config, foreground=foreground, base_classes=names)
        if names is not None:
            model.set_classes(names)
        return wrapped
    if classes is None:
        raise FVGError("classes is missing: wrap(model, tokenizer, classes) needs the base class names.")
    if isinstance(classes, str):
        raise FVGError(f"classes is one string, {classes!r}; give a list of class names, such as [{classes!r}, …].")
    if isinstance(tokenizer, (str, list, tuple)):
        raise FVGError(
            f"tokenizer is a {type(tokenizer).__name__}; the order is wrap(model, tokenizer, classes), and the "
            "tokenizer an object, as AutoTokenizer.from_pretrained gives it."
        )
    if tokenizer is None and not isinstance(classes, Mapping):
        raise FVGError(
            "tokenizer is missing: wrap(model, tokenizer, classes) needs the model's tokenizer, or "
            "classes={name: text feature}."
        )
    tuner = ZeroShot(model, tokenizer, classes, template=template, projection=projection)
    try:
        wrapped = FVGModel(tuner, config, foreground=foreground)
    except BaseException:
        tuner.detach()
        raise
    wrapped.wraps_clip = True
    return wrapped


def unwrap(model: FVGModel) -> nn.Module:
    """Takes FVG-PT off again and returns what was given to `wrap`, as it was.

    Class, forward signature, state dict, hooks, requires_grad and mode are what `wrap` found. What a tuner did to its
    CLIP stays until `tuner.detach()`; a plain CLIP comes back bare.

    Raises:
        FVGError: the model is not wrapped.
    """
    if not isinstance(model, FVGModel):
        raise FVGError(f"unwrap takes the FVGModel that wrap returned, but a {type(model).__name__} was given.")
    tuner = model.release()
    return tuner.detach() if model.wraps_clip else tuner


def _only_a_tuners(tokenizer: Any, template: str, projection: Any) -> None:
    given = [n for n, v in (("tokenizer", tokenizer), ("projection", projection)) if v is not None]
    given += ["template"] if template != DEFAULT_TEMPLATE else []
    if given:
        raise FVGError(
            f"a tuner brings its own {' and '.join(given)}; leave {'them' if len(given) > 1 else 'it'} out of wrap."
        )
