"""LoRA through PEFT, in one or both towers; also any PEFT adapter of a CLIP as a ready tuner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.files import PEFT_FILES, TUNER_FILE
from fvg_adapter.layouts import Layout
from fvg_adapter.tuners.adapter_files import FOLDER, WEIGHTS, fitting, read_adapter
from fvg_adapter.tuners.adapters import (
    adapter_layers,
    adapts_images,
    base_of,
    own_parameters,
    plain_output,
    take_out,
)
from fvg_adapter.tuners.arguments import check_arguments
from fvg_adapter.tuners.base import Tuner, feature_encoder
from fvg_adapter.tuners.passes import acts, let_gradients_in
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE
from fvg_adapter.untrusted import OTHER_FILE, sha256_of

ADAPTER = "default"
_REFUSALS = (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, ArithmeticError, AssertionError)
"""What PEFT raises for configs that fit no model."""
_PREFIX = "base_model.model."
_TOWERS = {"both": "text|vision", "text": "text", "vision": "vision"}


class LoRA(Tuner):
    """Low-rank adapters on the attention of a CLIP (Zanella and Ben Ayed 2024, "Low-Rank Few-Shot Adaptation of
    Vision-Language Models"), injected in place by PEFT.

    The student's prompt is the hand-written template. The prior is the CLIP without any adapter. `detach` takes what
    this tuner injected out again; the CLIP is then what it was.

    Args:
        model: a CLIP; or one that has PEFT adapters already (a `PeftModel` from disk or the Hub, say): these are then
            the tuner, ready or to be tuned further, and stay when it is detached.
        tokenizer, classes, template: as for `Tuner`.
        peft_config: PEFT's config of any method that is injected into layers; CLIP-LoRA's setting when None: rank 2,
            alpha 1, scaling alpha / √rank, dropout 0.25, on the query, key and value projections of every layer
            (run_utils.py and loralib/layers.py of MaxZanella/CLIP-LoRA).
        towers: which towers that setting adapts: "both", "text" or "vision".

    Learns:
        the adapters' parameters, float32 also in a half-precision CLIP. Losses: "ce", the cross entropy.

    Raises:
        FVGError: a config that fits no layer, a config beside adapters that are there already.

    Files: PEFT's own, in the subfolder lora/; `PeftModel.from_pretrained(clip, folder + "/lora")` reads them too.
    """

    kind: ClassVar[str] = "lora"
    saves_adapters: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        *,
        peft_config: Any = None,
        towers: Literal["both", "text", "vision"] = "both",
        template: str = DEFAULT_TEMPLATE,
    ) -> None:
        if towers not in _TOWERS:
            raise FVGError(f"towers {towers!r} is unknown. {nearest(towers, _TOWERS)}")
        there = adapter_layers(model) if isinstance(model, nn.Module) else []
        if there and peft_config is not None:
            raise FVGError(
                f"the model has {len(there)} adapted layers already, and a peft_config was given too; leave it out "
                f"to use "
                "these adapters, or give the plain model."
            )
        super().__init__(model, tokenizer, classes, template=template)
        self._injected = not there
        if not there:
            self._inject(peft_config if peft_config is not None else clip_lora(self.encoder.layout, towers))
            self._adapter_layers = adapter_layers(model)
            self.changes_images: bool = adapts_images(self.encoder, self._adapter_layers)
            for layer in self._adapter_layers:
                self._handles.append(layer.register_forward_hook(self._suspend, with_kwargs=True))
        self._handles.append(self.encoder.vision_encoder.register_forward_pre_hook(let_gradients_in, with_kwargs=True))
        if self.encoder.has_text:
            self._handles.append(
                self.encoder.text_encoder.register_forward_pre_hook(let_gradients_in, with_kwargs=True)
            )
        for layer in self._adapter_layers:
            for parameter in own_parameters(layer, active_only=True):
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float() if parameter.dtype != torch.float64 else parameter.data
            self._set_mode(layer, False)
        self.register_state_dict_post_hook(_with_adapters)  # type: ignore[no-untyped-call]

    def _inject(self, config: Any) -> None:
        from peft import inject_adapter_in_model

        from_file = isinstance(config, _FromFile)
        config = config.config if from_file else config
        try:
            inject_adapter_in_model(config, self.encoder.model, ADAPTER, low_cpu_mem_usage=from_file)
            if not adapter_layers(self.encoder.model):
                raise FVGError(f"{type(config).__name__} adapts no layer of {type(self.encoder.model).__name__}.")
        except BaseException as error:
            take_out(self.encoder.model, adapter_layers(self.encoder.model))
            self._hold.release(self.clip)
            if isinstance(error, FVGError) or not isinstance(error, _REFUSALS):
                raise
            raise FVGError(f"PEFT refused the config: {error}") from error

    def _suspend(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: outside this tuner's own passes and the owner's direct calls, what the plain layer gives."""
        return None if acts(self, in_direct_calls=True) else plain_output(layer, args, kwargs)

    def _set_mode(self, layer: nn.Module, mode: bool) -> None:
        base = base_of(layer)
        inside = {id(m) for m in base.modules()}
        for module in layer.modules():
            if id(module) not in inside:
                module.training = mode

    def train(self, mode: bool = True) -> LoRA:
        """Sets the mode of the adapters alone (their dropout); the CLIP's own modules stay in evaluation mode."""
        super().train(mode)
        for layer in self._adapter_layers:
            self._set_mode(layer, mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRA:
        """`.half()` reaches the CLIP, but the adapters stay in full precision."""
        kept = [(p, p.detach().clone()) for layer in self._adapter_layers for p in own_parameters(layer)]
        super()._apply(fn, recurse)
        for parameter, before in kept:
            if parameter.dtype in (torch.float16, torch.bfloat16) and before.dtype not in (
                torch.float16,
                torch.bfloat16,
            ):
                parameter.data = before.to(parameter.device)
        return self

    def detach(self) -> nn.Module:
        """Takes hooks and injected adapters off and gives the user's model back as it was found."""
        if self._injected:
            take_out(self.encoder.model, self._adapter_layers)
            self._adapter_layers, self._injected = [], False
        return super().detach()

    # -- files -----------------------------------------------------------------------------------------------------

    def save_beside(self, folder: Path) -> None:
        """PEFT's two files in lora/: its config without paths of this machine, and the adapter's weights."""
        from peft import get_peft_model_state_dict

        model: Any = self.encoder.model
        name = self._active_adapter()
        config = model.peft_config[name]
        state = get_peft_model_state_dict(model, adapter_name=name)
        (folder / FOLDER).mkdir(exist_ok=True)
        record, inference = config.base_model_name_or_path, config.inference_mode
        try:
            base = self.pretrained_config()["base_model"]
            config.base_model_name_or_path = None if base["id"] == "local" else base["id"]
            config.inference_mode = True
            config.save_pretrained(str(folder / FOLDER))
        finally:
            config.base_model_name_or_path, config.inference_mode = record, inference
        tensors = {_PREFIX + k.removeprefix(_PREFIX): v.detach().cpu().contiguous().clone() for k, v in state.items()}
        save_file(tensors, folder / FOLDER / WEIGHTS, metadata={"format": "pt"})

    def _active_adapter(self) -> str:
        active = [name for layer in self._adapter_layers for name in getattr(layer, "active_adapters", ())]
        if len(set(active)) != 1:
            raise FVGError(
                f"one active adapter can be saved, but {sorted(set(active))} are active; set_adapter to one."
            )
        return str(active[0])

    def pretrained_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Nothing beside PEFT's files."""
        return {name: {} for name in super().pretrained_tensors()}

    @classmethod
    def rebuild(
        cls,
        config: dict[str, Any],
        tensors: dict[str, Mapping[str, Tensor]],
        clip: nn.Module,
        tokenizer: Any,
        classes: Any = None,
        folder: Path | None = None,
    ) -> LoRA:
        """The tuner again around a plain CLIP, its adapter read from lora/; see `Pretrained.from_pretrained`."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        if folder is None or not (folder / FOLDER / WEIGHTS).is_file():
            raise FVGError(
                f"{folder} has no {FOLDER}/{WEIGHTS}, which a LoRA tuner needs; copy or download the whole folder."
            )
        if adapter_layers(clip):
            raise FVGError(
                "the model given has adapters already; give the plain CLIP, to which the saved ones are added."
            )
        if tensors.get(TUNER_FILE):
            raise FVGError(f"{TUNER_FILE} of a LoRA tuner holds no tensors, but has {list(tensors[TUNER_FILE])[:4]}.")
        arguments = config["tuner"].get("arguments", {})
        check_arguments(cls, arguments)
        peft_config, weights = read_adapter(folder, feature_encoder(clip).model)
        name = PEFT_FILES[0]
        if config["sha256"].get(name) not in (None, sha256_of(folder / name)):  # replaced since it was checked
            raise FVGError(OTHER_FILE.format(folder / name))
        saved = tensors.get(f"{FOLDER}/{WEIGHTS}", weights)  # checked against the config's hash, where it has one
        for tensor in saved:
            saved[tensor]  # refuses values that are not finite, before the model is touched
        tuner = cls(clip, tokenizer, config["base_classes"], peft_config=_FromFile(peft_config), **arguments)
        try:
            model = tuner.encoder.model
            own = get_peft_model_state_dict(model, adapter_name=ADAPTER)
            device = tuner.encoder.device
            state = {k: v.float().to(device) for k, v in fitting(saved, own, _PREFIX).items()}
            set_peft_model_state_dict(model, state, adapter_name=ADAPTER, low_cpu_mem_usage=True)
            _refuse_unfilled(tuner)
            names = classes if classes is not None else config["classes"] if config["kind"] == "tuner" else None
            if names is not None:
                tuner.set_classes(names)
        except BaseException:
            tuner.detach()
            raise
        tuner.eval()
        return tuner


class _FromFile:
    """A PEFT config from a file: its adapter gets memory when the file's tensors are known to fit it."""

    def __init__(self, config: Any) -> None:
        self.config = config


def _refuse_unfilled(tuner: LoRA) -> None:
    """Raises FVGError where the file left a part of the adapter without values."""
    left = [n for n, p in tuner.encoder.model.named_parameters() if p.is_meta]
    if left:
        raise FVGError(f"the adapter in {FOLDER}/ does not fit: {'; '.join(left[:6])} are missing.")


def clip_lora(layout: Layout, towers: str = "both") -> Any:
    """CLIP-LoRA's setting as a PEFT config, for a family of models."""
    from peft import LoraConfig

    query = layout.query.partition("[")[0]
    names = {"q_proj": "q_proj|k_proj|v_proj", "query": "query|key|value"}.get(query, query)
    return LoraConfig(
        r=2,
        lora_alpha=1,
        use_rslora=True,
        lora_dropout=0.25,
        target_modules=rf"(?:.*\.)?(?:{_TOWERS[towers]})_model\..*\.(?:{names})",
    )


def _with_adapters(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook: the adapters lie inside the CLIP, whose tensors are left out, but they are the tuner's own."""
    assert isinstance(module, LoRA)
    own = {id(p) for layer in module._adapter_layers for p in own_parameters(layer)}
    for name, parameter in module.clip.named_parameters():
        if id(parameter) in own:
            state[f"{prefix}clip.{name}"] = parameter.detach()
