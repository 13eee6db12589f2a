"""FVGModel: the heads of FVG-PT around a frozen tuner; what a training loop calls (METHOD.md sections 2 to 6 and 11).

Imports tuners, heads, losses, config, attention and foreground. `wrapping.wrap` makes one from what the user has.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter import losses as L
from fvg_adapter.attention import AttentionProbe
from fvg_adapter.config import FVGConfig
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.files import HEADS_FILE
from fvg_adapter.foreground import ForegroundSource, resolve_source
from fvg_adapter.heads import N_CUES, BottleneckAdapter, ReliabilityGate
from fvg_adapter.modes import Hold, keep_full_precision, outside_graphs
from fvg_adapter.outputs import FVGOutput, Prediction, Status
from fvg_adapter.storage import Pretrained, load_own
from fvg_adapter.tuners.base import Tuner, check_labels
from fvg_adapter.tuners.prompts import plain
from fvg_adapter.tuners.zero_shot import ZeroShot
from fvg_adapter.untrusted import made_for, room_for
from fvg_adapter.views import ViewEncoder, Views

BRANCHES = ("auto", "base", "new", "joint")
HEADS = ("visual_adapter", "text_adapter", "foreground_gate", "backbone_gate")


class FVGModel(nn.Module, Pretrained):
    """FVG-PT behind a tuner. Make one with `fvg_adapter.wrap`; train `trainable_parameters()` on `model(**batch).loss`.

    Args:
        tuner: gives tuned and plain features; frozen here unless `config.freeze_tuner` is False.
        config: hyperparameters.
        foreground: "attention", "given" (masks must come with the batch), "whole" (the control x_fg = x), or a callable
            from pixels (B, 3, H, W) to masks (B, H, W), such as a `Segmenter`.
        base_classes: the class names tuned on; the tuner's when None.
    """

    def __init__(
        self,
        tuner: Tuner,
        config: FVGConfig | None = None,
        *,
        foreground: str | ForegroundSource = "attention",
        base_classes: Sequence[str] | None = None,
    ) -> None:
        config = FVGConfig() if config is None else config
        if not isinstance(config, FVGConfig):
            raise FVGError(
                f"config must be an FVGConfig, but is a {type(config).__name__}; FVGConfig(**values) makes one."
            )
        config.validate()
        source = resolve_source(foreground)
        if source == "attention" and not tuner.encoder.has_vision:
            raise FVGError(
                f"foreground='attention' needs a vision tower, but this {type(tuner).__name__} tuner has no CLIP; give "
                "it clip=…, or wrap with foreground='given', 'whole' or a callable that makes masks."
            )
        if config.attended_view > 0 and not tuner.encoder.has_vision:
            raise FVGError(
                f"attended_view={config.attended_view} needs a vision tower, but this {type(tuner).__name__} tuner has "
                "no CLIP; give it clip=…, or set attended_view=0."
            )
        super().__init__()
        self.tuner = tuner
        self.config = config
        self.foreground: str | ForegroundSource
        self.__dict__["foreground"] = foreground  # not as a part of the model, should it be a module
        self._source = source
        self.base_classes: tuple[str, ...] = tuple(base_classes or tuner.base_classes)
        self._seen: tuple[tuple[tuple[str, ...], tuple[str, ...]], list[bool]] | None = None
        self.wraps_clip = False
        dim, device = tuner.encoder.feature_dim, tuner.encoder.device
        room_for("visual_adapter.down.weight", config.bottleneck, dim)
        room_for("foreground_gate.hidden.weight", config.gate_hidden, N_CUES)
        self.visual_adapter: BottleneckAdapter = BottleneckAdapter(dim, config.bottleneck, config.init_std)
        self.text_adapter: BottleneckAdapter = BottleneckAdapter(dim, config.bottleneck, config.init_std)
        self.foreground_gate: ReliabilityGate = ReliabilityGate(config.gate_hidden)
        self.backbone_gate: ReliabilityGate = ReliabilityGate(config.gate_hidden)
        for head in self._heads():
            head.to(device)
        self._found_classes = tuner.classes
        self._hold = Hold(tuner)
        # Everything that can fail has come before the user's model is touched.
        self._probe = AttentionProbe(tuner.encoder, layers=config.attention_layers, first_patch=tuner.first_patch)
        if config.freeze_tuner:
            tuner.requires_grad_(False).eval()

    # -- class lists and branches ----------------------------------------------------------------------------------

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that columns of the logits stand for now."""
        return self.tuner.classes

    def set_classes(self, classes: Sequence[str]) -> None:
        """Scores these classes from now on, in every thread; `base_classes` stay what was tuned on."""
        self.tuner.set_classes(classes)

    @contextlib.contextmanager
    def use_classes(self, classes: Sequence[str]) -> Iterator[FVGModel]:
        """Scores these classes inside the block, and the former ones again behind it; in this thread alone."""
        with self.tuner.use_classes(classes):
            yield self

    @outside_graphs  # so that another class list does not compile the towers anew
    def branch_for(self, branch: str = "auto") -> str:
        """What a branch stands for now: "auto" is base if every class was tuned on, new if none, else joint."""
        if branch not in BRANCHES:
            raise FVGError(f"branch {branch!r} is unknown. {nearest(branch, BRANCHES)}")
        if branch != "auto":
            return branch
        seen = self._is_base()
        return "base" if all(seen) else "joint" if any(seen) else "new"

    def _is_base(self) -> list[bool]:
        """Which of the current classes were tuned on; kept, since every forward asks."""
        lists = (self.base_classes, self.classes)
        seen = self._seen  # read once: other threads may ask about their own class lists
        if seen is None or seen[0] != lists:
            known = {plain(name) for name in lists[0]}
            seen = self._seen = (lists, [plain(name) in known for name in lists[1]])
        return seen[1]

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        foreground_mask: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        *,
        branch: str = "auto",
        return_attention: bool = False,
    ) -> FVGOutput:
        """Training: L of both branches. Evaluation: the branch asked for alone; no mask is needed.

        Args:
            pixel_values: (B, 3, H, W) images normalised for the model.
            labels: (B,) int64 indices into `classes`.
            foreground_mask: B×H×W or B×1×H×W, bool, float in [0, 1] or uint8, any resolution; without one the
                `foreground` source supplies it in training. An image whose mask is all zero trains with r = 0.
            features: a FeatureBank batch instead of pixels.
            branch: "auto", "base" (z_FDC), "new" (z_PC) or "joint" (section 11).
            return_attention: fill `foreground_attention`.

        Raises:
            FVGError: neither or both inputs, labels out of range, a mask that does not fit, an unknown branch,
                training on classes that are not the base classes.
        """
        if self._hold.released:
            raise FVGError("this model was unwrapped; wrap the model again to go on.")
        with self.tuner.one_class_list():
            return self._forward(pixel_values, labels, foreground_mask, features, branch, return_attention)

    def _forward(
        self,
        pixel_values: Tensor | None,
        labels: Tensor | None,
        foreground_mask: Tensor | None,
        features: Mapping[str, Tensor] | None,
        branch: str,
        return_attention: bool,
    ) -> FVGOutput:
        """`forward` over one class list."""
        branch = self.branch_for(branch)
        learning = self.training and labels is not None
        if (pixel_values is None) == (features is None):
            raise FVGError(f"give pixel_values or features; {'neither' if features is None else 'both'} was given.")
        if features is not None and "image" not in features:
            raise FVGError(f"features lack 'image'; they hold {sorted(features)}. Give a batch of a FeatureBank.")
        if features is not None and (foreground_mask is not None or return_attention):
            raise FVGError(
                "masks and attention belong to pixels; a FeatureBank's features hold their foreground already."
            )
        if labels is not None:
            given = pixel_values if pixel_values is not None else features["image"]  # type: ignore[index]
            labels = check_labels(labels, len(self.classes), len(given))
            if learning and not all(self._is_base()):
                raise FVGError(
                    "training needs the classes that the model was wrapped for, but the current class list holds "
                    "others "
                    f"({[c for c, seen in zip(self.classes, self._is_base(), strict=True) if not seen][:3]}…); train "
                    "outside use_classes, or wrap with these classes."
                )
        asked = pixel_values is not None and pixel_values.requires_grad and not learning  # for class relevance, say
        frozen = (self.config.freeze_tuner or not learning) and not asked
        with torch.no_grad() if frozen else contextlib.nullcontext():
            views = self._views(
                pixel_values, foreground_mask, features, labels, learning, branch != "base", return_attention
            )
            views = views.blended(self.config.attended_view)
        device_type = views.base.device.type
        with torch.autocast(device_type, enabled=False):  # heads and losses stay in full precision (DESIGN decision 5)
            return self._train(views, labels, branch) if learning else self._score(views, labels, branch)  # type: ignore[arg-type]

    def _score(self, views: Views, labels: Tensor | None, branch: str) -> FVGOutput:
        text = self._cast(_ready_text(self.tuner))
        z_base = self._fdc_logits(views.base, text) if branch != "new" else None
        prior_trust = z_new = trust = None
        logits = z_base
        if branch != "base":
            z_prior = self._prior_logits(views)
            _, prior_trust, z_new = self._calibrate(views.new, text, z_prior)
            logits = z_new
        if z_base is not None and z_new is not None:
            logits = self.joint_log_probs(z_prior, z_base, z_new)
        if views.foreground is not None:
            z_full, z_fg = self._logits(views.base, text), self._logits(views.foreground, text)
            trust = self._trust(z_full, z_fg, views)[0]
        assert logits is not None
        return FVGOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            logits_base=z_base,
            logits_new=z_new,
            foreground_trust=trust,
            prior_trust=prior_trust,
            foreground_attention=views.attention,
        )

    def _train(self, views: Views, labels: Tensor, branch: str) -> FVGOutput:
        config = self.config
        with torch.no_grad() if config.freeze_tuner else contextlib.nullcontext():
            text = self._cast(_ready_text(self.tuner) if config.freeze_tuner else self.tuner.text_features())  # (C, D)
        assert views.foreground is not None and views.usable is not None
        with torch.no_grad() if config.freeze_tuner else contextlib.nullcontext():
            z_full = self._logits(views.base, text)
            z_fg = self._logits(views.foreground, text)
        z_prior = self._prior_logits(views)

        trust, gate_logits = self._trust(z_full, z_fg, views)
        target = L.reliability_target(z_fg, z_full, labels, config.reliability_margin)
        z_fdc = self._fdc_logits(views.base, text)
        reached = trust if config.gate_learns_from_distillation else trust.detach()
        tempered = {"temperature": config.temperature, "squared_temperature": config.squared_temperature}
        _, prior_trust, z_pc = self._calibrate(views.new, text, z_prior)
        terms = {
            "base_ce": F.cross_entropy(z_fdc, labels),
            "frg": L.gate_loss(gate_logits, target, views.usable),
            "distill": L.distillation_loss(reached, z_fg.detach(), z_full.detach(), z_fdc, **tempered),  # type: ignore[arg-type]
            "new_ce": F.cross_entropy(z_pc, labels),
            "new_kl": L.prior_divergence(z_prior, z_pc, **tempered),  # type: ignore[arg-type]
        }
        loss = (
            terms["base_ce"]
            + config.lambda_gate * terms["frg"]
            + config.lambda_distill * terms["distill"]
            + config.lambda_new * (terms["new_ce"] + config.lambda_new_kl * terms["new_kl"])
        )
        logits = {"base": z_fdc, "new": z_pc}.get(branch)
        if logits is None:
            logits = self.joint_log_probs(z_prior, z_fdc, z_pc)
        return FVGOutput(
            loss=loss,
            logits=logits,
            logits_base=z_fdc,
            logits_new=z_pc,
            foreground_trust=trust.detach(),
            prior_trust=prior_trust.detach(),
            losses={k: v.detach() for k, v in terms.items()},
            foreground_attention=views.attention,
        )

    # -- logits ----------------------------------------------------------------------------------------------------

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.visual_adapter.down.weight.dtype)

    def _logits(self, image: Tensor, text: Tensor) -> Tensor:
        return self.tuner.scores(self._cast(image), text)

    def _fdc_logits(self, image: Tensor, text: Tensor) -> Tensor:
        """z_FDC (B, C)."""
        return self.tuner.scores(self.visual_adapter(self._cast(image)), self.text_adapter(text))

    def _prior_logits(self, views: Views) -> Tensor:
        """z_CLIP (B, C); scored, not learned from, it keeps a graph to pixels that ask for gradients."""
        assert views.prior is not None
        with torch.no_grad() if self.training else contextlib.nullcontext():
            return self._logits(views.prior, self._cast(_ready_prior_text(self.tuner)))

    def _calibrate(self, image: Tensor, text: Tensor, z_prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_full of the new branch (B, C), b (B,) and z_PC (B, C)."""
        z_full = self._logits(image, text)
        if self.config.freeze_tuner and self.training:
            z_full = z_full.detach()
        cues = L.prior_cues(z_full, z_prior, self.config.temperature)
        prior_trust = torch.sigmoid(self.backbone_gate(cues))
        return z_full, prior_trust, L.calibrated_logits(z_full, z_prior, prior_trust)

    def joint_log_probs(self, z_prior: Tensor, z_base: Tensor, z_new: Tensor) -> Tensor:
        """The joint rule of `losses.joint_log_probs` over the current classes, as the config has it; logits (B, C)."""
        is_base = torch.tensor(self._is_base(), device=z_base.device)
        return _joint_log_probs(z_prior, z_base, z_new, is_base, group_temperature=self.config.group_temperature)

    def _trust(self, z_full: Tensor, z_fg: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """r (B,), 0 where the mask is unusable, and the gate's logits (B,)."""
        assert views.area is not None and views.usable is not None
        cues = L.foreground_cues(z_full, z_fg, views.area, self.config.temperature)
        gate_logits = self.foreground_gate(cues.detach())
        trust = torch.sigmoid(gate_logits)
        if self.config.trust != "gate":
            trust = torch.full_like(trust, 1.0 if self.config.trust == "one" else 0.5)
        return trust * views.usable.to(trust), gate_logits

    # -- views -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def views(
        self,
        pixel_values: Tensor,
        foreground_mask: Tensor | None = None,
        *,
        masks: Literal["training", "given"] = "training",
        measure: bool = False,
        classes: Sequence[str] | None = None,
    ) -> Views:
        """The features that the heads start from, without gradient: what a FeatureBank stores.

        Args:
            pixel_values: (B, 3, H, W). foreground_mask: as in `forward`.
            masks: "training" = as in training, where the foreground source supplies missing ones or replaces the view;
                "given" = only what is given here, for measuring.
            measure: also attention maps, plain CLIP's features of the foreground view, and those of the attended view
                where the config has one.
            classes: the class name of each picture, for foreground sources that are asked with it.
        """
        source = self.foreground if masks == "training" else None
        return self._encoder(learning=self.training and not measure).encode(
            pixel_values,
            foreground_mask,
            source,
            foreground=True,
            prior=True,
            attention=measure,
            foreground_prior=measure,
            classes=classes,
            attended=measure,
        )

    @torch.no_grad()
    def inference_views(self, features: Mapping[str, Tensor]) -> Views:
        """What a FeatureBank batch stands for at inference: the attended view blended in where the config has one."""
        stored = self._encoder().stored(features, None, foreground=False, attended=True)
        return stored.blended(self.config.attended_view)

    def _views(
        self,
        pixels: Tensor | None,
        mask: Tensor | None,
        features: Mapping[str, Tensor] | None,
        labels: Tensor | None,
        learning: bool,
        prior: bool,
        attention: bool,
    ) -> Views:
        source = self.foreground if learning else None
        if features is not None:
            return self._encoder().stored(features, source, foreground=learning, attended=not learning)
        assert pixels is not None
        asks = mask is None and self._source == "callable" and learning and labels is not None
        return self._encoder().encode(
            pixels,
            mask,
            source,
            foreground=learning or mask is not None,
            prior=learning or prior,
            attention=attention,
            classes=[self.classes[label] for label in labels.tolist()] if asks and labels is not None else None,
            attended=not learning,
        )

    def _encoder(self, *, learning: bool | None = None) -> ViewEncoder:
        learning = self.training if learning is None else learning
        return ViewEncoder(self.tuner, self.config, self._probe, learning=learning)

    # -- use -------------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimiser should get: the heads', 132,546 for ViT-B/16."""
        return [p for p in self.parameters() if p.requires_grad]

    @torch.no_grad()
    def predict(self, images: Any, classes: Sequence[str] | None = None, top_k: int = 5) -> Any:
        """The most probable classes of pictures, best first; in evaluation mode from any number of threads at once.

        Args:
            images: a picture (PIL), a list of them, or normalised pixels (B, 3, H, W).
            classes: class names to score; the current ones when None.
            top_k: how many; all when there are fewer.

        Returns:
            A list of `Prediction(name, probability)` for one picture, a list of such lists for several.
        """
        from PIL.Image import Image as PILImage

        from fvg_adapter.data.transforms import PairedTransform

        if top_k < 1:
            raise FVGError(f"top_k is {top_k}, but at least 1 class must be named.")
        single = not isinstance(images, (list, tuple, Tensor))
        if isinstance(images, Tensor):
            pixels = images if images.dim() == 4 else images.unsqueeze(0)
            single = images.dim() == 3
        else:
            size = self.tuner.encoder.image_size
            transform = PairedTransform(size, self.config.image_mean, self.config.image_std, train=False)
            pictures = [images] if single else list(images)
            if not pictures:
                return []
            for picture in pictures:
                if not isinstance(picture, PILImage):
                    raise FVGError(
                        f"predict takes PIL pictures or pixels, but got a {type(picture).__name__}; open it first."
                    )
            pixels = torch.stack([transform(picture.convert("RGB"))["pixel_values"] for picture in pictures])
        mode = self.training
        if mode:
            self.eval()
        try:
            with self.use_classes(classes) if classes is not None else self.tuner.one_class_list():
                logits = self(pixels.to(self.tuner.encoder.device)).logits
                names = self.classes
        finally:
            if mode:
                self.train()
        best = logits.softmax(-1).topk(min(top_k, len(names)), dim=-1)
        rows = [
            [Prediction(names[i], p) for p, i in zip(values, indices, strict=True)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return rows[0] if single else rows

    def class_logits(self, output: FVGOutput) -> Tensor:
        """What class relevance should ask about: (B, C) each class's logit in the branch that is made for it.

        Of branches "base" and "new" these are the output's logits. Those of "joint" are log-probabilities, whose
        gradient is gone where the model is sure; base classes have their z_FDC here, new ones their z_PC.

        Args:
            output: of this model, with its present classes.
        """
        assert output.logits is not None
        if output.logits_base is None or output.logits_new is None:
            return output.logits
        is_base = torch.tensor(self._is_base(), device=output.logits.device)
        return torch.where(is_base, output.logits_base, output.logits_new)

    def status(self) -> Status:
        """What is attached, what learns, what is frozen."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return Status(
            tuner=self.tuner.kind,
            foreground=self._source,
            branch=self.branch_for("auto"),
            trainable=sum(n for n, learns in counts if learns),
            frozen=sum(n for n, learns in counts if not learns),
            heads=sum(p.numel() for head in self._heads() for p in head.parameters()),
            hooks=self._probe.hook_count + self.tuner.hook_count,
            base_classes=len(self.base_classes),
            classes=len(self.classes),
        )

    def _heads(self) -> list[nn.Module]:
        return [getattr(self, name) for name in HEADS]

    def attention_target(self) -> tuple[nn.Module, Callable[[int], int], Callable[[], bool]]:
        """For `record_attention`: what the tuner says."""
        return self.tuner.attention_target()

    # -- life ------------------------------------------------------------------------------------------------------

    def release(self) -> Tuner:
        """Takes the hooks off and gives the tuner back as it was found; see `fvg_adapter.unwrap`."""
        self._probe.detach()
        if not self._hold.released:
            self.tuner.set_classes(self._found_classes)
        self._hold.release(self.tuner)
        return self.tuner

    def train(self, mode: bool = True) -> FVGModel:
        """Sets the mode of the heads; a frozen tuner is never reached (no dropout in frozen features)."""
        self.training = mode
        for head in self._heads():
            head.train(mode)
        if not self.config.freeze_tuner:
            self.tuner.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FVGModel:
        """`.half()` and `.to(bfloat16)` reach the CLIP only; the heads stay in full precision."""
        self.tuner._apply(fn)
        for head in self._heads():
            head._apply(keep_full_precision(fn))
        return self

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every tensor, the CLIP's included; `state_dict()` holds only the heads and the tuner's own."""
        return {**self.state_dict(), **{f"tuner.{k}": v for k, v in self.tuner.full_state_dict().items()}}

    # -- files -----------------------------------------------------------------------------------------------------

    def pretrained_config(self) -> dict[str, Any]:
        """config.json: the tuner's part and the heads'."""
        source = self._source
        if source == "callable":
            warnings.warn("a foreground callable cannot be saved; after loading, masks must be given.", stacklevel=3)
            source = "given"
        return {
            **self.tuner.pretrained_config(),
            "kind": "fvg",
            "base_classes": list(self.base_classes),
            "fvg": self.config.to_dict(),
            "foreground": source,
            "preprocessing": {
                "image_size": list(self.tuner.encoder.image_size),
                "image_mean": list(self.config.image_mean),
                "image_std": list(self.config.image_std),
            },
        }

    def pretrained_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The heads, and the tuner's own tensors."""
        return {HEADS_FILE: self._head_tensors(), **self.tuner.pretrained_tensors()}

    def save_beside(self, folder: Path) -> None:
        """What the tuner keeps in files of its own."""
        self.tuner.save_beside(folder)

    def _head_tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if not k.startswith("tuner.")}

    @classmethod
    def rebuild(
        cls,
        config: dict[str, Any],
        tensors: dict[str, Mapping[str, Tensor]],
        clip: nn.Module,
        tokenizer: Any,
        classes: Any = None,
        folder: Path | None = None,
    ) -> FVGModel:
        """The model again around a base model, in evaluation mode; see `Pretrained.from_pretrained`."""
        from fvg_adapter.tuners.registry import tuner_class

        settings = FVGConfig.from_dict(config.get("fvg") or {})
        tuner = tuner_class(config).rebuild(config, tensors, clip, tokenizer, None, folder)
        try:
            source = resolve_source(config.get("foreground", "attention"))
            with made_for(tensors.get(HEADS_FILE, {})):
                model = cls(tuner, settings, foreground=source, base_classes=config["base_classes"])
        except BaseException:
            tuner.detach()
            raise
        try:
            load_own(model, tensors.get(HEADS_FILE, {}), HEADS_FILE, own=model._head_tensors())
            model.set_classes(classes if classes is not None else config["classes"])
        except BaseException:
            model.release()
            tuner.detach()
            raise
        model.wraps_clip = type(tuner) is ZeroShot
        return model.eval()


def answer_score(model: FVGModel | Tuner, output: Any) -> Tensor:
    """(B,) the logit of each picture's answer, in the branch made for it, with its graph: for class relevance."""
    logits = model.class_logits(output) if isinstance(model, FVGModel) else output.logits
    return logits.gather(1, output.logits.argmax(-1, keepdim=True))[:, 0]


_joint_log_probs = outside_graphs(L.joint_log_probs)
"""Which classes belong together is asked of a tensor's values, which would break a graph in the middle."""


@outside_graphs
def _ready_text(tuner: Tuner) -> Tensor:
    """Text features that are looked up as ever, also in a compiled model: no compiler sees into the cache."""
    return tuner.text_features()


@outside_graphs
def _ready_prior_text(tuner: Tuner) -> Tensor:
    return tuner.prior_text_features()
