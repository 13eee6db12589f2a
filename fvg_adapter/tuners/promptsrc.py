"""PromptSRC: deep prompts in both towers, held near the frozen CLIP in three ways (Khattak et al. 2023,
"Self-regulating Prompts: Foundational Model Adaptation without Forgetting")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter.errors import FVGError
from fvg_adapter.towers import hidden_of, replace_hidden
from fvg_adapter.tuners.averaging import GaussianAverage
from fvg_adapter.tuners.base import Tuner, TunerOutput, check_labels
from fvg_adapter.tuners.passes import acts, marked, untouched
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE, Prompts, check_context, check_template, fill, with_context
from fvg_adapter.tuners.templates import PROMPTSRC_TEMPLATES
from fvg_adapter.untrusted import room_for

MAX_TEMPLATES = 1000
WORDS_UP_TO = 4
"""Contexts longer than this start at random, whatever the init words (trainers/promptsrc.py)."""


class PromptSRC(Tuner):
    """Independent vision-language prompts with self-regularisation.

    Text: `text_ctx` takes the place of the first context words; before layers 2 … depth the same positions are
    overwritten by `text_deep`. Vision: `vision_ctx` is appended behind the patches, without positions, before the first
    LayerNorm; before layers 2 … depth these tokens are overwritten by `vision_deep`. Later layers carry them on.

    Args:
        model, tokenizer, classes, template: as for `Tuner`; the template is only the prior's.
        n_ctx_text, n_ctx_vision: prompt tokens in each tower.
        prompt_depth_text: layers with prompts of their own, the first included, at least 1.
        prompt_depth_vision: the same; 0 for none.
        ctx_init: words that `text_ctx` starts from, used for up to 4 tokens; words beyond n_ctx_text stay as they are.
            "" (and more than 4 tokens): N(0, 0.02²). All other prompts start at N(0, 0.02²).
        text_loss_weight, image_loss_weight: 25 and 10 (the released configs; the paper's λ1, λ2).
        teacher_templates: prompts whose mean is the frozen text feature; the authors' 60.
        gpa_mean, gpa_std: of the Gaussian weight averaging over epochs; `weight_average(epochs)` does it.

    Learns:
        text_ctx (n_ctx_text, d_t), text_deep (depth − 1, n_ctx_text, d_t), vision_ctx (n_ctx_vision, d_v), vision_deep
        (depth − 1, n_ctx_vision, d_v), float32; the deep ones are absent at depth 1, vision ones at depth 0.

    Losses (t, v tuned and f, z frozen unit features of text and image, l = s v·t, q = s z·f):
        "ce": CE(l, y). "scl_text": 25 · mean |t − f|. "scl_image": 10 · mean |v − z|. "scl_logits": KL(softmax q ‖
        softmax l) summed over everything and divided by B·C. Their sum is the loss; weights are included.

    Raises:
        FVGError: a depth beyond the tower, more tokens than the init words or the text window hold.
    """

    kind: ClassVar[str] = "promptsrc"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        *,
        n_ctx_text: int = 4,
        n_ctx_vision: int = 4,
        prompt_depth_text: int = 9,
        prompt_depth_vision: int = 9,
        ctx_init: str | None = "a photo of a",
        text_loss_weight: float = 25.0,
        image_loss_weight: float = 10.0,
        teacher_templates: Sequence[str] = PROMPTSRC_TEMPLATES,
        gpa_mean: float = 15,
        gpa_std: float = 1,
        template: str = DEFAULT_TEMPLATE,
    ) -> None:
        check_context("n_ctx_text", n_ctx_text, ctx_init)
        check_context("n_ctx_vision", n_ctx_vision)
        words = (ctx_init or "").replace("_", " ").strip() if n_ctx_text <= WORDS_UP_TO else ""
        self._words, self._ctx_init = words or " ".join(["X"] * n_ctx_text), words
        self._n_text, self._n_vision = n_ctx_text, n_ctx_vision if prompt_depth_vision else 0
        self._depth_text, self._depth_vision = prompt_depth_text, prompt_depth_vision if n_ctx_vision else 0
        self._weights = (float(text_loss_weight), float(image_loss_weight))
        self._teacher_templates = tuple(check_template(t) for t in teacher_templates)
        self._gpa = (float(gpa_mean), float(gpa_std))
        self._check_sizes()
        super().__init__(model, tokenizer, classes, template=template)
        self.changes_images: bool = self.changes_images or self._depth_vision > 0
        self._make_parameters()
        self._attach()

    def _check_sizes(self) -> None:
        if self._n_text < 1 or self._n_vision < 0:
            raise FVGError(
                f"n_ctx_text is {self._n_text} and n_ctx_vision {self._n_vision}; at least 1 and 0 are needed."
            )
        if self._depth_text < 1 or self._depth_vision < 0:
            raise FVGError(
                f"prompt_depth_text is {self._depth_text} and prompt_depth_vision {self._depth_vision}; at least 1 "
                f"and 0 "
                "are needed."
            )
        if not self._teacher_templates:
            raise FVGError("teacher_templates is empty; give at least one prompt.")
        if len(self._teacher_templates) > MAX_TEMPLATES:
            raise FVGError(f"teacher_templates holds {len(self._teacher_templates)} prompts; at most {MAX_TEMPLATES}.")

    def _check_prompts(self, classes: tuple[str, ...]) -> None:
        for kind, depth, layers in (
            ("text", self._depth_text, len(self.encoder.text_layers)),
            ("vision", self._depth_vision, len(self.encoder.vision_layers)),
        ):
            if depth > layers:
                raise FVGError(f"prompt_depth_{kind} is {depth}, but the {kind} tower has {layers} layers.")
        held = int(self.tokenized([self._words]).attention_mask.sum()) - 2  # without start and end
        if self._ctx_init and held < self._n_text:
            raise FVGError(
                f"ctx_init {self._ctx_init!r} has {held} tokens, but n_ctx_text is {self._n_text}; give more words, or "
                'ctx_init="" for a random context.'
            )
        super()._check_prompts(classes)
        self.prompts(classes)

    def _make_parameters(self) -> None:
        table, encoder = self.encoder.token_embedding.weight, self.encoder
        deep_text, deep_vision = self._depth_text - 1, self._depth_vision - 1
        room_for("text_ctx", self._n_text, encoder.text_width)
        if self._ctx_init:
            ids = self.tokenized([self._ctx_init]).input_ids[0, 1 : 1 + self._n_text]
            self.text_ctx: nn.Parameter = nn.Parameter(
                table.detach()[ids.to(table.device)].float().clone()
            )  # (n_ctx_text, d_t)
        else:
            self.text_ctx = _random(table, self._n_text, encoder.text_width)
        if deep_text:
            room_for("text_deep", deep_text, self._n_text, encoder.text_width)
            self.text_deep: nn.Parameter = _random(table, deep_text, self._n_text, encoder.text_width)
        if self._depth_vision:
            room_for("vision_ctx", self._n_vision, encoder.vision_width)
            self.vision_ctx: nn.Parameter = _random(table, self._n_vision, encoder.vision_width)
        if deep_vision > 0:
            room_for("vision_deep", deep_vision, self._n_vision, encoder.vision_width)
            self.vision_deep: nn.Parameter = _random(table, deep_vision, self._n_vision, encoder.vision_width)

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        encoder = self.encoder
        self._handles.append(encoder.token_embedding.register_forward_hook(self._insert_text))
        for k in range(1, self._depth_text):
            layer = encoder.text_layers[k]
            hook = partial(self._overwrite_text, k - 1)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if self._depth_vision:
            self._handles.append(encoder.vision_embeddings.register_forward_hook(self._append_vision))
        for k in range(1, self._depth_vision):
            layer = encoder.vision_layers[k]
            hook = partial(self._overwrite_vision, k - 1)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _insert_text(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Behind the token embedding, before positions are added: text_ctx at positions 1 … n_ctx."""
        if not acts(self, in_direct_calls=False):
            return None
        return _put(output, self.text_ctx, 1)

    def _overwrite_text(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before text layer index + 2: its own tokens at positions 1 … n_ctx, without positions."""
        hidden = hidden_of(args, kwargs)  # (C, L, d_t)
        if not acts(self, in_direct_calls=False, hidden=hidden):
            return None
        return replace_hidden(args, kwargs, marked(_put(hidden, self.text_deep[index], 1), hidden))

    def _append_vision(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Behind CLS and patches with their positions, before the first LayerNorm: vision_ctx."""
        if not acts(self, in_direct_calls=True):
            return None
        tokens = self.vision_ctx.to(output.dtype).expand(len(output), -1, -1)
        return torch.cat([output, tokens], dim=1)  # (B, N + n_ctx_vision, d_v)

    def _overwrite_vision(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before vision layer index + 2: its own tokens in the last n_ctx_vision places."""
        hidden = hidden_of(args, kwargs)  # (B, N + n_ctx_vision, d_v)
        if not acts(self, in_direct_calls=True, hidden=hidden):
            return None
        first = hidden.shape[1] - self._n_vision
        return replace_hidden(args, kwargs, marked(_put(hidden, self.vision_deep[index], first), hidden))

    # -- features --------------------------------------------------------------------------------------------------

    def prompts(self, classes: Sequence[str]) -> Prompts:
        """Tokenised prompts of the classes with the positions that `text_ctx` takes."""
        encoder = self.encoder
        return self._tokenized_once(
            "context",
            classes,
            lambda: with_context(
                self.tokenizer,
                classes,
                encoder.text_length,
                words=self._words,
                n_ctx=self._n_text,
                pad_to_limit=not encoder.layout.trims_text,
            ),
        )

    def _prompt_features(self, classes: Sequence[str]) -> Tensor:
        return self._encode(self.prompts(classes))

    def teacher_features(self) -> Tensor:
        """f (C, D): the untouched CLIP's text features, averaged over the templates and only then normalised."""

        def encode() -> Tensor:
            with untouched():
                total: Any = 0.0
                for template in self._teacher_templates:  # one after the other: (templates, C, D) would be gigabytes
                    total = total + self._encode(self.tokenized([fill(template, c) for c in self.classes]))
                return F.normalize(total / len(self._teacher_templates), dim=-1)  # (C, D)

        return self._cached("teacher", (), encode)

    # -- training --------------------------------------------------------------------------------------------------

    def _scored(
        self, pixel_values: Tensor | None, labels: Tensor | None, features: Mapping[str, Tensor] | None
    ) -> TunerOutput:
        """Class scores, and the four losses when labels are given; the frozen CLIP runs only then."""
        image = self._image_input(pixel_values, features)
        text = self.text_features()
        logits = self.scores(image, text)  # (B, C)
        if labels is None:
            return TunerOutput(logits=logits)
        check_labels(labels, len(self.classes), len(logits))
        frozen = image.detach()
        if self.changes_images:
            assert pixel_values is not None  # features are refused then
            frozen = self.prior_image_features(pixel_values)
        losses = {**self.loss_terms(image, text, logits, labels), **self._regularisers(image, text, logits, frozen)}
        return TunerOutput(loss=torch.stack(list(losses.values())).sum(), logits=logits, losses=losses)

    def _regularisers(self, image: Tensor, text: Tensor, logits: Tensor, frozen: Tensor) -> dict[str, Tensor]:
        """The three self-regularising terms, weights included; `frozen` is z (B, D)."""
        teacher = self.teacher_features()
        with torch.no_grad():
            target = F.log_softmax(self.scores(frozen, teacher), dim=-1)  # (B, C)
        divergence = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="sum", log_target=True)
        return {
            "scl_text": self._weights[0] * F.l1_loss(text, teacher),
            "scl_image": self._weights[1] * F.l1_loss(image, frozen),
            "scl_logits": divergence / logits.numel(),
        }

    def weight_average(self, epochs: int) -> GaussianAverage:
        """The Gaussian weight averaging of a training of so many epochs, with this tuner's mean and deviation."""
        return GaussianAverage(epochs, *self._gpa)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make this tuner again."""
        return {
            **super().arguments(),
            "n_ctx_text": self._n_text,
            "n_ctx_vision": self._n_vision,
            "prompt_depth_text": self._depth_text,
            "prompt_depth_vision": self._depth_vision,
            "ctx_init": self._ctx_init,
            "text_loss_weight": self._weights[0],
            "image_loss_weight": self._weights[1],
            "teacher_templates": list(self._teacher_templates),
            "gpa_mean": self._gpa[0],
            "gpa_std": self._gpa[1],
        }


def _random(like: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=like.device).normal_(std=0.02))


def _put(hidden: Tensor, tokens: Tensor, first: int) -> Tensor:
    """Hidden states (B, N, d) with tokens (n, d) from position `first` on."""
    tokens = tokens.to(hidden.dtype).expand(len(hidden), -1, -1)  # (B, n, d)
    return torch.cat([hidden[:, :first], tokens, hidden[:, first + tokens.shape[1] :]], dim=1)
