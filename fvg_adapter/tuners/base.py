"""What every tuner is: image and text features of a CLIP, some of them learned, for any class list at any time.

A tuner holds the user's own model as `clip`, frozen; it learns a few tensors of its own. It works through hooks that
are attached once and act only in its own passes. Imports towers, storage and prompts.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fvg_adapter.base_models import base_model_record
from fvg_adapter.errors import FVGError
from fvg_adapter.files import TUNER_FILE
from fvg_adapter.modes import Hold, full_precision, keep_full_precision
from fvg_adapter.storage import Pretrained, load_own, own_tensors_only
from fvg_adapter.towers import DualEncoder
from fvg_adapter.tuners.adapters import adapter_layers, adapter_state, adapts_images, without_adapter
from fvg_adapter.tuners.arguments import check_arguments
from fvg_adapter.tuners.cache import TextCache, parameters_of, remembered
from fvg_adapter.tuners.class_lists import Block
from fvg_adapter.tuners.encoding import encode_in_passes
from fvg_adapter.tuners.passes import is_unrecorded, own_pass, untouched
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE, Prompts, check_classes, check_template, fill, tokenize
from fvg_adapter.untrusted import made_for

Self = TypeVar("Self", bound="Tuner")


@dataclass
class TunerOutput(ModelOutput):
    """Output of a tuner.

    Attributes:
        loss: () the training loss, when labels were given.
        logits: (B, C) class scores, float32.
        losses: the terms of the loss by name, each ().
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class Tuner(nn.Module, Pretrained):
    """Base of all tuners: `ZeroShot`, `CoOp`, …; subclass it to add one.

    A subclass creates its parameters in `__init__` and overrides what differs: `_prompt_features` for learned text,
    `image_features` (with `changes_images = True`) for a learned image tower, `loss_terms` for its objective.

    Args:
        model: a Hugging Face dual encoder, or a PeftModel around one. It is frozen and put into evaluation mode;
            `detach()` gives it back as it was found.
        tokenizer: the model's tokenizer.
        classes: the class names, in the order of the labels.
        template: the hand-written prompt of the plain CLIP that the tuner is compared with (METHOD: the prior).

    Raises:
        FVGError: unusable class names or template.
        TypeError: the model is no supported dual encoder.
    """

    kind: ClassVar[str] = "tuner"
    encoder_needs_separate_passes: ClassVar[bool] = False
    """Whether whole images and foreground views cannot share one batch (a tower with batch statistics)."""
    saves_adapters: ClassVar[bool] = False
    """Whether files hold the PEFT adapters of the CLIP too."""
    changes_images: bool = False
    """Whether `image_features` differs from the plain CLIP's; where not, one pass serves both."""
    text_memory: int | None = 2**30
    """Bytes that the graph of the prompts may take in training. Beyond them (some 300 short class names behind a
    ViT-B/16) prompts are encoded in chunks whose layers are computed again in backward: the same gradients, some third
    more time for the text tower, a tenth of the memory and a fixed part. Settable on a tuner; None: never. The user's
    own gradient checkpointing of the text tower goes first."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        *,
        template: str = DEFAULT_TEMPLATE,
        projection: nn.Module | None = None,
    ) -> None:
        names = check_classes(classes)
        encoder = self._view_of(model, projection)
        super().__init__()
        self.clip = model
        self.projection = projection
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.template: str = check_template(template)
        self.base_classes = names
        self._classes = names
        self._block = Block()
        self._text_cache = TextCache()
        self._prompts: dict[Hashable, tuple[Prompts, Any]] = {}
        self._handles: list[Any] = []
        self._adapter_layers = adapter_layers(model)
        self._check_prompts(names)
        self._hold = Hold(model)
        model.requires_grad_(False).eval()
        own_tensors_only(self, "clip")
        if self._adapter_layers:  # the user's PEFT adapters: part of what is tuned, not of the plain CLIP
            self.changes_images = adapts_images(encoder, self._adapter_layers)
            for layer in self._adapter_layers:
                self._handles.append(layer.register_forward_hook(without_adapter, with_kwargs=True))

    def _view_of(self, model: nn.Module, projection: nn.Module | None) -> DualEncoder:
        """How the model is read; raises where it cannot be. Called before anything is set."""
        return feature_encoder(model, projection)

    # -- class lists -----------------------------------------------------------------------------------------------

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that columns of the logits stand for now, in this thread."""
        return self._classes if self._block.names is None else self._block.names

    def set_classes(self, classes: Sequence[str]) -> None:
        """Scores these classes from now on, in every thread; any names, any time.

        Inside a `use_classes` block it changes the block's list alone. A forward that is running keeps the list that it
        began with.

        Raises:
            FVGError: unusable names; the class list stays as it was.
        """
        names = check_classes(classes)
        self._check_prompts(names)
        if self._block.names is None:
            self._classes = names
        else:
            self._block.names = names

    @contextlib.contextmanager
    def use_classes(self, classes: Sequence[str]) -> Iterator[None]:
        """Scores these classes inside the block, and the former ones again behind it.

        The block belongs to its thread: others go on with their own classes, and threads that are started inside it
        have to enter one of their own (DataParallel's replicas take it over).

        Raises:
            FVGError: unusable names.
        """
        names = check_classes(classes)
        self._check_prompts(names)
        before, self._block.names = self._block.names, names
        try:
            yield
        finally:
            self._block.names = before

    @contextlib.contextmanager
    def one_class_list(self) -> Iterator[None]:
        """Inside, this thread keeps the class list of the moment, whatever other threads set."""
        before, self._block.names = self._block.names, self.classes
        try:
            yield
        finally:
            self._block.names = before

    def _check_prompts(self, classes: tuple[str, ...]) -> None:
        """Raises FVGError where a class cannot be tokenised into the text window; subclasses add their contexts."""
        self.prior_prompts(classes)

    # -- features --------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Tensor, *, branch: str = "base") -> Tensor:
        """Tuned image features f (B, D) of images (B, 3, H, W), unit length (MMRL's base branch is not), float32.

        Args:
            pixel_values: images normalised for the model.
            branch: "base" or "new"; only MMRL tells them apart (METHOD section 5).
        """
        return self._plain_image_features(pixel_values)

    def branch_image_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """f of the base and of the new branch, each (B, D), from one pass over the images."""
        features = self.image_features(pixel_values)
        return features, features

    def text_features(self) -> Tensor:
        """Tuned text features g(t) (C, D) of the current classes, unit length, float32.

        Computed once per class list as long as nothing that they depend on asks for a gradient.
        """
        return self._cached("tuned", self._own_text_state(), lambda: self._text(self.classes))

    def prior_image_features(self, pixel_values: Tensor) -> Tensor:
        """The plain CLIP's image features f_CLIP (B, D), unit length, without gradient."""
        with untouched():
            return self._plain_image_features(pixel_values)

    @property
    def prior_is_clip(self) -> bool:
        """Whether the prior is the CLIP at hand, so that one can see where it looks."""
        return True

    def prior_text_features(self) -> Tensor:
        """The plain CLIP's text features g_CLIP (C, D) of the template with each class name, without gradient."""

        def encode() -> Tensor:
            with untouched():
                return F.normalize(self._encode(self.prior_prompts(self.classes)), dim=-1)

        return self._cached("prior", (), encode)

    @property
    def logit_scale(self) -> Tensor:
        """s: the factor between cosines and logits, a scalar without gradient."""
        return full_precision(self.encoder.logit_scale.detach())

    def scores(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """s · f · gᵀ (B, C), with the model's bias where it has one, in full precision, also under autocast."""
        with torch.autocast(image_features.device.type, enabled=False):
            image, text = full_precision(image_features), full_precision(text_features)
            logits = self.logit_scale.to(image) * image @ text.to(image.dtype).T
            bias = self.encoder.logit_bias
            return logits if bias is None else logits + bias.detach().to(image)

    # -- training --------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> TunerOutput:
        """Class scores, and the tuner's own loss when labels are given.

        Args:
            pixel_values: (B, 3, H, W) images normalised for the model.
            labels: (B,) int64 indices into `classes`.
            features: a FeatureBank batch instead of pixels, for tuners that leave the image tower untouched.

        Raises:
            FVGError: neither or both inputs, labels out of range, features for a tuner that changes the images.
        """
        self._check_attached()
        with self.one_class_list():
            return self._scored(pixel_values, labels, features)

    def _scored(
        self, pixel_values: Tensor | None, labels: Tensor | None, features: Mapping[str, Tensor] | None
    ) -> TunerOutput:
        """`forward` over one class list; subclasses with further passes override it."""
        image = self._image_input(pixel_values, features)
        text = self.text_features()
        logits = self.scores(image, text)  # (B, C)
        if labels is None:
            return TunerOutput(logits=logits)
        labels = check_labels(labels, len(self.classes), len(logits))
        losses = self.loss_terms(image, text, logits, labels)
        return TunerOutput(loss=torch.stack(list(losses.values())).sum(), logits=logits, losses=losses)

    def loss_terms(self, image: Tensor, text: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms whose sum is the loss; here the mean cross entropy alone."""
        return {"ce": F.cross_entropy(logits, labels)}

    def _check_attached(self) -> None:
        if self._hold.released:
            raise FVGError(f"this {type(self).__name__} was detached from its CLIP; make a new one to go on.")

    def _image_input(self, pixel_values: Tensor | None, features: Mapping[str, Tensor] | None) -> Tensor:
        if (pixel_values is None) == (features is None):
            given = "neither" if features is None else "both"
            raise FVGError(f"give pixel_values or features; {given} was given.")
        if pixel_values is not None:
            return self.image_features(pixel_values)
        if self.changes_images:
            raise FVGError(
                f"{type(self).__name__} changes the image tower, so features of a bank cannot train it; give "
                "pixel_values."
            )
        assert features is not None
        return F.normalize(full_precision(features["image"]), dim=-1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimiser should get: the tuner's own."""
        return [p for p in self.parameters() if p.requires_grad]

    # -- passes ----------------------------------------------------------------------------------------------------

    def _plain_image_features(self, pixel_values: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and (pixel_values.requires_grad or self._image_tower_learns())
        with own_pass(self), torch.set_grad_enabled(wanted):  # no graph through a frozen tower, even when checkpointing
            return F.normalize(full_precision(self.encoder.image_features(pixel_values)), dim=-1)

    def _image_tower_learns(self) -> bool:
        return self.changes_images

    def prior_prompts(self, classes: Sequence[str]) -> Prompts:
        """The template with each class name, tokenised."""
        return self._tokenized_once(
            ("prior", self.template), classes, lambda: self.tokenized([fill(self.template, name) for name in classes])
        )

    def _tokenized_once(self, what: Hashable, classes: Sequence[str], tokenized: Callable[[], Prompts]) -> Prompts:
        """Prompts of a class list, which a training asks for in every step."""
        key = (what, tuple(classes))
        entry = self._prompts.get(key)
        if entry is not None and entry[1] is not self.tokenizer:
            self._prompts.clear()
        return remembered(self._prompts, key, lambda: (tokenized(), self.tokenizer))[0]

    def tokenized(self, texts: Sequence[str]) -> Prompts:
        """Token ids of whole texts for this text tower."""
        encoder = self.encoder
        return tokenize(self.tokenizer, texts, encoder.text_length, pad_to_limit=not encoder.layout.trims_text)

    def _text(self, classes: Sequence[str]) -> Tensor:
        """Tuned text features (C, D), unit length; subclasses with a learned text side override `_prompt_features`."""
        return F.normalize(self._prompt_features(classes), dim=-1)

    def _prompt_features(self, classes: Sequence[str]) -> Tensor:
        """Tuned text features (C, D) before normalisation, float32."""
        return self._encode(self.prior_prompts(classes))

    def _encode(
        self, prompts: Prompts, per_pass: Callable[[Tensor], contextlib.AbstractContextManager[None]] | None = None
    ) -> Tensor:
        """Raw text features (N, D) of prompts, in passes; `per_pass(rows)` surrounds each, also in a recomputation."""

        def encode(rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            with own_pass(self), per_pass(rows) if per_pass else contextlib.nullcontext():
                return full_precision(self.encoder.text_features(input_ids, attention_mask))

        return encode_in_passes(encode, prompts, self.encoder, self.text_memory)

    # -- frozen text features --------------------------------------------------------------------------------------

    def _own_text_state(self) -> Iterable[Tensor]:
        """The tuner's own tensors that text features depend on; the cache is bypassed while one needs a gradient."""
        others = [module for name, module in self.named_children() if name != "clip"]
        return [*self.parameters(recurse=False), *(p for module in others for p in module.parameters())]

    def _cached(self, what: str, own: Iterable[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        tower = parameters_of(self.encoder.text) if self.encoder.has_text else ()
        with self.one_class_list():  # the list that it is kept under is the list that is encoded
            context = (what, self.classes, self.template, self._adapters())
            return self._text_cache.get(context, [*own, *tower, *self._text_projection()], compute)

    def _text_projection(self) -> Iterable[Tensor]:
        module = self.encoder.text_projection if self.encoder.has_text else None
        return () if module is None else module.parameters()

    def _adapters(self) -> Hashable:
        return adapter_state(self._adapter_layers)

    def invalidate(self) -> None:
        """Forgets cached text features; needed only after `parameter.data` was edited, which leaves no trace."""
        self._text_cache.clear()

    # -- life ------------------------------------------------------------------------------------------------------

    def attention_target(self) -> tuple[nn.Module, Callable[[int], int], Callable[[], bool]]:
        """For `record_attention`: the model to hook, where the patches begin in the tokens of a layer, and whether a
        pass does not count: one of the untouched CLIP, or over a cut-out of the picture."""
        return self.clip, self.first_patch, is_unrecorded

    def first_patch(self, layer: int) -> int:
        """Index of the first patch token among the tokens that enter layer `layer` (0-based)."""
        return self.encoder.leading_tokens

    def detach(self) -> nn.Module:
        """Takes every hook off and gives the user's model back as it was found: flags, mode, hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hold.release(self.clip)
        self._text_cache.clear()
        return self.clip

    def train(self, mode: bool = True) -> Tuner:
        """Sets the mode of the tuner's own modules; the frozen CLIP stays in evaluation mode (no dropout in features).

        Layers with gradient checkpointing get the mode too, not what is in them: checkpointing asks for it.
        """
        self.training = mode
        for name, module in self.named_children():
            if name != "clip":
                module.train(mode)
        for module in self.clip.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_classes": self.classes}  # a copy made inside a block keeps the block's classes

    def _replicate_for_data_parallel(self) -> Tuner:
        replica: Tuner = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._classes = self.classes  # it runs in a thread of its own
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tuner:
        """`.half()` and `.to(bfloat16)` reach the CLIP only: prompts stay in full precision (DESIGN decision 5)."""
        for module in self.children():
            if module is self.clip or module is self.projection:
                module._apply(fn)
            else:
                module._apply(keep_full_precision(fn))
        super()._apply(keep_full_precision(fn), recurse=False)  # type: ignore[no-untyped-call]
        self._text_cache.clear()
        return self

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every tensor, the CLIP's included; `state_dict()` holds only the tuner's own."""
        return {**self.state_dict(), **{f"clip.{k}": v for k, v in self.clip.state_dict().items()}}

    @property
    def hook_count(self) -> int:
        """Hooks of this tuner on the user's model."""
        return len(self._handles)

    # -- files -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make this tuner again (JSON), beside model, tokenizer and classes."""
        return {"template": self.template}

    def pretrained_config(self) -> dict[str, Any]:
        """config.json: kind and arguments, class names, base model, image size."""
        if self.projection is not None:
            raise FVGError(
                "a model with a projection=module of yours cannot be saved: the file could not name that module; "
                "give a CLIPVisionModelWithProjection instead."
            )
        if self._adapter_layers and not self.saves_adapters:
            warnings.warn(
                f"the PEFT adapters of this CLIP are not in the files of a {type(self).__name__}: keep them yourself "
                "and load with clip=PeftModel.from_pretrained(…), or tune with LoRA(peft_model, …), which saves them.",
                stacklevel=4,
            )
        return {
            "kind": "tuner",
            "tuner": {"kind": self.kind, "arguments": self.arguments(), "adapted": bool(self._adapter_layers)},
            "base_classes": list(self.base_classes),
            "classes": list(self.classes),
            "base_model": base_model_record(self.clip, self.tokenizer),
            "preprocessing": {"image_size": list(self.encoder.image_size)},
        }

    def pretrained_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tuner's own tensors."""
        return {TUNER_FILE: dict(self.state_dict())}

    @classmethod
    def rebuild(
        cls: type[Self],
        config: dict[str, Any],
        tensors: dict[str, Mapping[str, Tensor]],
        clip: nn.Module,
        tokenizer: Any,
        classes: Any = None,
        folder: Path | None = None,
    ) -> Self:
        """The tuner again around a base model, in evaluation mode; see `Pretrained.from_pretrained`."""
        own = tensors.get(TUNER_FILE, {})
        if config["tuner"].get("adapted") and not adapter_layers(clip):
            raise FVGError(
                "this was saved on a CLIP with PEFT adapters, which it does not hold, but the model given has none; "
                "give "
                "clip=PeftModel.from_pretrained(…). Behind LoRA(peft_model, …) they are saved too."
            )
        arguments = config["tuner"].get("arguments", {})
        check_arguments(cls, arguments)
        try:
            with made_for(own):
                tuner = cls(clip, tokenizer, cls.saved_classes(config, own), **arguments)
        except TypeError as error:
            raise FVGError(f"the config's arguments do not fit {cls.__name__}: {error}.") from error
        try:
            load_own(tuner, own, TUNER_FILE)
            if classes is not None:
                tuner.set_classes(classes)
            elif config["kind"] == "tuner":
                tuner.set_classes(config["classes"])
        except BaseException:
            tuner.detach()
            raise
        tuner.eval()
        return tuner

    @classmethod
    def saved_classes(cls, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """What `classes` was on construction."""
        return config["base_classes"]

    def extra_repr(self) -> str:
        """What `print(tuner)` shows of it."""
        learned = sum(p.numel() for p in self.trainable_parameters())
        return f"classes={len(self.classes)}, template={self.template!r}, learned={learned}"


def feature_encoder(model: nn.Module, projection: nn.Module | None = None) -> DualEncoder:
    """The model read as a dual encoder that gives features.

    Raises:
        TypeError: no supported dual encoder.
        FVGError: a vision tower without a projection to features.
    """
    encoder = DualEncoder(model, projection)
    if encoder.layout.video:
        raise FVGError(
            f"{type(encoder.model).__name__} encodes videos, so that it gives no features of single images; "
            "record_attention reads it, wrap and the tuners need a dual encoder of images."
        )
    if not encoder.projects:
        raise FVGError(
            f"{type(encoder.model).__name__} has no projection to features; give a CLIPVisionModelWithProjection, or "
            "projection=module with one that maps its pooled states to the width of the text features."
        )
    return encoder


def check_labels(labels: Tensor, n_classes: int, batch: int) -> Tensor:
    """The labels as int64, once they are (B,) integers in [0, C). Values are read on CPU only.

    Raises:
        FVGError: another type, shape or range; the message says what was given.
    """
    if not isinstance(labels, Tensor):
        raise FVGError(f"labels must be a tensor of {batch} integers, but are a {type(labels).__name__}.")
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if not whole or labels.dim() != 1 or len(labels) != batch:
        raise FVGError(
            f"labels must be {batch} integers of shape ({batch},), one an image, "
            f"but are {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}."
        )
    if labels.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= n_classes:
            bad = low if low < 0 else high
            raise FVGError(f"label {bad} is out of range for {n_classes} classes; labels index the current class list.")
    return labels.long()
