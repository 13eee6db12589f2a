"""MMRL: representation tokens shared by both towers (Guo and Gu 2025, "MMRL: Multi-Modal Representation Learning for
Vision-Language Models")."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.modes import full_precision
from fvg_adapter.towers import hidden_of, replace_hidden
from fvg_adapter.tuners.base import Tuner, TunerOutput, check_labels
from fvg_adapter.tuners.passes import acts, let_gradients_in, marked, own_pass
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE, check_context
from fvg_adapter.untrusted import room_for

LOGIT_SCALE = 100.0
"""The constant in the authors' forward; the CLIP's own logit_scale is not used."""
BRANCHES = ("base", "new")

_THREAD = threading.local()


class MMRL(Tuner):
    """Representation tokens in the higher layers of both towers, and a second image head made of them.

    Tokens R (n_rep_tokens, rep_dim) are mapped into each tower by a linear map of each rep layer's own. At the first
    rep layer they are inserted behind the start token (text) and CLS (vision); at later ones these places are
    overwritten; in between they are carried on. v = the main image feature (CLS), r = the representation feature: the
    mean over the tokens after the last LayerNorm, projected by `proj_rep`. Scores of tuned classes are
    100 · (α v + (1 − α) r) · t, of new classes 100 · v · t with the tokens still in both towers.

    Args:
        model, tokenizer, classes: as for `Tuner`.
        template: the data set's hand-written prompt; it is the student's and the prior's, nothing in it is learned.
        n_rep_tokens: 5. rep_layers: numbers of the layers, from 1 on: 6 … 12. rep_dim: 512 (the released configs).
        alpha: α, weight of the main head, 0.7. reg_weight: of both regularisers, 1.0 (0.2 cross-dataset, 0.5 few-shot).

    Learns (L = number of rep layers):
        rep_tokens (n_rep, rep_dim), r2t_weight (L, d_t, rep_dim), r2t_bias (L, d_t), r2v_weight (L, d_v, rep_dim),
        r2v_bias (L, d_v), proj_rep (d_v, D), float32. The maps start as copies of one layer, proj_rep at random.

    Losses (z, f the plain CLIP's unit image and text features, y the labels):
        "ce_main": α CE(100 v·t, y). "ce_rep": (1 − α) CE(100 r·t, y). "reg_image": reg_weight · (1 − mean cos(v, z)).
        "reg_text": reg_weight · (1 − mean cos(t, f)). Their sum is the loss; weights are included.

    Raises:
        FVGError: a layer that one of the towers does not have, sizes below 1, α outside [0, 1], a text tower that is
            not causal.

    Source: trainers/mmrl.py of yunncheng/MMRL; its evaluation keeps text features past a training step, this does not.
    """

    kind: ClassVar[str] = "mmrl"
    r2t_weight: nn.Parameter
    r2t_bias: nn.Parameter
    r2v_weight: nn.Parameter
    r2v_bias: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        *,
        n_rep_tokens: int = 5,
        rep_layers: Iterable[int] = range(6, 13),
        rep_dim: int = 512,
        alpha: float = 0.7,
        reg_weight: float = 1.0,
        template: str = DEFAULT_TEMPLATE,
    ) -> None:
        if n_rep_tokens < 1 or rep_dim < 1:
            raise FVGError(f"n_rep_tokens is {n_rep_tokens} and rep_dim {rep_dim}; both must be at least 1.")
        check_context("n_rep_tokens", n_rep_tokens)
        if not 0 <= alpha <= 1 or reg_weight < 0:
            raise FVGError(
                f"alpha must lie in [0, 1] and reg_weight not below 0, but they are {alpha} and {reg_weight}."
            )
        self._n_rep, self._rep_layers, self._rep_dim = n_rep_tokens, tuple(int(k) for k in rep_layers), rep_dim
        self._alpha, self._reg_weight = float(alpha), float(reg_weight)
        super().__init__(model, tokenizer, classes, template=template)
        self.changes_images = True
        self._make_parameters()
        self._attach()

    def _check_prompts(self, classes: tuple[str, ...]) -> None:
        layers, encoder = self._rep_layers, self.encoder
        if not layers or list(layers) != sorted(set(layers)):
            raise FVGError(f"rep_layers must be increasing numbers, each once, but is {list(layers)}.")
        for name, depth in (("text", len(encoder.text_layers)), ("vision", len(encoder.vision_layers))):
            if layers[0] < 1 or layers[-1] > depth:
                raise FVGError(f"rep_layers {list(layers)} go beyond layers 1 … {depth} of the {name} tower.")
        if encoder.layout.text != "causal" or encoder.layout.head is not None:
            raise FVGError(
                "MMRL needs a causal text tower that pools at the end of text and an image tower with a class token; "
                f"{encoder.layout.name}'s are not. CoOp, KgCoOp, PromptSRC and LoRA take it."
            )
        super()._check_prompts(classes)

    def _make_parameters(self) -> None:
        encoder, count, device = self.encoder, len(self._rep_layers), self.encoder.device
        room_for("rep_tokens", self._n_rep, self._rep_dim)
        for name, width in (("r2t", encoder.text_width), ("r2v", encoder.vision_width)):
            room_for(f"{name}_weight", count, width, self._rep_dim)
        self.rep_tokens: nn.Parameter = nn.Parameter(
            torch.empty(self._n_rep, self._rep_dim, device=device).normal_(std=0.02)
        )
        to_text = nn.Linear(self._rep_dim, encoder.text_width, device=device)
        to_vision = nn.Linear(self._rep_dim, encoder.vision_width, device=device)
        for name, linear in (("r2t", to_text), ("r2v", to_vision)):
            for part in ("weight", "bias"):
                start = getattr(linear, part).detach()
                self.register_parameter(f"{name}_{part}", nn.Parameter(start.expand(count, *start.shape).clone()))
        start = torch.randn(encoder.vision_width, encoder.feature_dim, device=device)
        self.proj_rep: nn.Parameter = nn.Parameter(start * encoder.vision_width**-0.5)  # (d_v, D)

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        encoder, text = self.encoder, self.encoder.text
        self._handles += [
            text.embeddings.register_forward_hook(self._lengthen_text),  # type: ignore[union-attr]
            text.encoder.register_forward_pre_hook(self._lengthen_mask, with_kwargs=True),  # type: ignore[union-attr]
            text.encoder.register_forward_pre_hook(let_gradients_in, with_kwargs=True),  # type: ignore[union-attr]
            encoder.vision_encoder.register_forward_pre_hook(let_gradients_in, with_kwargs=True),
            text.final_layer_norm.register_forward_pre_hook(self._shorten_text),  # type: ignore[union-attr]
            encoder.vision_encoder.register_forward_hook(self._keep_hidden),
        ]
        for index, number in enumerate(self._rep_layers):
            for layers, hook in (
                (encoder.text_layers, self._before_text_layer),
                (encoder.vision_layers, self._before_vision_layer),
            ):
                layer = layers[number - 1]
                self._handles.append(layer.register_forward_pre_hook(partial(hook, index), with_kwargs=True))

    def _lengthen_text(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Behind the embeddings: n_rep more places at the end, which causal attention keeps from being seen.

        They give way to the representation tokens at the first rep layer, so that one causal mask of length L + n_rep
        fits all layers, whichever attention implementation makes it.
        """
        if not acts(self, in_direct_calls=False):
            return None
        return torch.cat([output, output[:, -1:].expand(-1, self._n_rep, -1)], dim=1)  # (C, L + n_rep, d_t)

    def _lengthen_mask(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the encoder: transformers 4.57 makes the causal mask from the token ids, which are n_rep fewer."""
        if not acts(self, in_direct_calls=False):
            return None
        length = (args[0] if args else kwargs["inputs_embeds"]).shape[1]
        return tuple(_causal(a, length) for a in args), {k: _causal(v, length) for k, v in kwargs.items()}

    def _before_text_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden = hidden_of(args, kwargs)  # (C, L + n_rep, d_t)
        if not acts(self, in_direct_calls=False, hidden=hidden):
            return None
        tokens = self._mapped(self.r2t_weight[index], self.r2t_bias[index], hidden)
        behind = hidden[:, 1 : -self._n_rep] if index == 0 else hidden[:, 1 + self._n_rep :]
        return replace_hidden(args, kwargs, marked(torch.cat([hidden[:, :1], tokens, behind], dim=1), hidden))

    def _shorten_text(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the last LayerNorm: without the tokens, so that the end of text lies where the token ids have it."""
        if not acts(self, in_direct_calls=False):
            return None
        hidden = args[0]
        return (torch.cat([hidden[:, :1], hidden[:, 1 + self._n_rep :]], dim=1), *args[1:])  # (C, L, d_t)

    def _before_vision_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden = hidden_of(args, kwargs)  # (B, N, d_v), then (B, N + n_rep, d_v)
        if not acts(self, in_direct_calls=True, hidden=hidden):
            return None
        tokens = self._mapped(self.r2v_weight[index], self.r2v_bias[index], hidden)
        behind = hidden[:, 1:] if index == 0 else hidden[:, 1 + self._n_rep :]
        return replace_hidden(args, kwargs, marked(torch.cat([hidden[:, :1], tokens, behind], dim=1), hidden))

    def _keep_hidden(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the vision encoder, in a pass of ours: the tokens that the representation feature is made of."""
        if getattr(_THREAD, "wanted", None) is self and acts(self, in_direct_calls=False):
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            _THREAD.tokens = hidden[:, 1 : 1 + self._n_rep]  # (B, n_rep, d_v)

    def _mapped(self, weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        """R in a tower's width, in the hidden states' type (B, n_rep, d)."""
        return F.linear(self.rep_tokens, weight, bias).to(hidden.dtype).expand(len(hidden), -1, -1)

    # -- features --------------------------------------------------------------------------------------------------

    def both_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """v and r, each (B, D) and unit length, from one pass."""
        wanted, _THREAD.wanted = getattr(_THREAD, "wanted", None), self
        try:
            with own_pass(self):
                main = F.normalize(full_precision(self.encoder.image_features(pixel_values)), dim=-1)
                tokens = self.encoder.vision.post_layernorm(_THREAD.tokens)  # type: ignore[operator]
        finally:
            _THREAD.wanted, _THREAD.tokens = wanted, None
        rep = full_precision(tokens).mean(1)  # LayerNorm first, then the mean: (B, n_rep, d_v) -> (B, d_v)
        return main, F.normalize(full_precision(rep @ self.proj_rep.to(rep.dtype)), dim=-1)

    def branch_image_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """α v + (1 − α) r (not unit length) and v, each (B, D), from one pass."""
        main, rep = self.both_features(pixel_values)
        return self._fused(main, rep), main

    def image_features(self, pixel_values: Tensor, *, branch: str = "base") -> Tensor:
        """α v + (1 − α) r for the base branch (not unit length), v for the new one (METHOD section 5)."""
        if branch not in BRANCHES:
            raise FVGError(f"branch {branch!r} is unknown. {nearest(branch, BRANCHES)}")
        return self.branch_image_features(pixel_values)[BRANCHES.index(branch)]

    def _fused(self, main: Tensor, rep: Tensor) -> Tensor:
        return self._alpha * main + (1 - self._alpha) * rep

    @property
    def logit_scale(self) -> Tensor:
        """The constant 100."""
        return torch.tensor(LOGIT_SCALE, device=self.encoder.device)

    def logits(self, pixel_values: Tensor, *, branch: str = "base") -> Tensor:
        """Scores (B, C): α · main + (1 − α) · rep for tuned classes, the main head's for new ones."""
        return self.scores(self.image_features(pixel_values, branch=branch), self.text_features())

    # -- training --------------------------------------------------------------------------------------------------

    def _scored(
        self, pixel_values: Tensor | None, labels: Tensor | None, features: Mapping[str, Tensor] | None
    ) -> TunerOutput:
        """The fused scores of both heads, and the four losses when labels are given; the frozen CLIP runs only then."""
        if pixel_values is None or features is not None:
            self._image_input(pixel_values, features)  # says what is wrong
        assert pixel_values is not None
        main, rep = self.both_features(pixel_values)
        text = self.text_features()
        logits = self.scores(self._fused(main, rep), text)  # (B, C)
        if labels is None:
            return TunerOutput(logits=logits)
        check_labels(labels, len(self.classes), len(logits))
        plain = self.prior_image_features(pixel_values), self.prior_text_features()
        losses = {
            "ce_main": self._alpha * F.cross_entropy(self.scores(main, text), labels),
            "ce_rep": (1 - self._alpha) * F.cross_entropy(self.scores(rep, text), labels),
            "reg_image": self._reg_weight * (1 - F.cosine_similarity(main, plain[0], dim=-1).mean()),
            "reg_text": self._reg_weight * (1 - F.cosine_similarity(text, plain[1], dim=-1).mean()),
        }
        return TunerOutput(loss=torch.stack(list(losses.values())).sum(), logits=logits, losses=losses)

    # -- life ------------------------------------------------------------------------------------------------------

    def first_patch(self, layer: int) -> int:
        """Index of the first patch among the tokens of a layer (0-based); the rep tokens lie before it."""
        inserted = layer >= self._rep_layers[0] - 1
        return super().first_patch(layer) + (self._n_rep if inserted else 0)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make this tuner again."""
        return {
            **super().arguments(),
            "n_rep_tokens": self._n_rep,
            "rep_layers": list(self._rep_layers),
            "rep_dim": self._rep_dim,
            "alpha": self._alpha,
            "reg_weight": self._reg_weight,
        }


def _causal(value: Any, length: int) -> Any:
    """A causal mask (…, l, l) of another length made anew for `length` tokens; anything else as it is."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[-1] in (length, 1):
        return value
    seen = torch.ones(length, length, dtype=torch.bool, device=value.device).tril()
    if value.dtype is torch.bool:
        return seen.expand(*value.shape[:2], -1, -1)
    mask = torch.zeros(length, length, dtype=value.dtype, device=value.device)
    return mask.masked_fill(~seen, torch.finfo(value.dtype).min).expand(*value.shape[:2], -1, -1)
