"""Tiny random dual encoders of every supported family, made from configs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from fvg_adapter.layouts import LAYOUTS

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 49408,
    "max_position_embeddings": 32,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "projection_dim": 16,
    "type_vocab_size": 2,
}
OWN_TEXT: dict[str, dict[str, Any]] = {
    "altclip": {"project_dim": 16, "type_vocab_size": 1},
    "siglip": {"projection_size": 32},
    "siglip2": {"projection_size": 32},
    "tipsv2": {"hidden_size": 32},
    "blip": {"sep_token_id": 49407, "encoder_hidden_size": 24},
}
OWN_VISION: dict[str, dict[str, Any]] = {"siglip2": {"num_patches": 16}, "tipsv2": {"num_register_tokens": 2}}
COMPOSED = ("vit+bert", "dinov2+roberta", "dinov2_with_registers+bert")
FAMILIES = [
    name for name in LAYOUTS if name in CONFIG_MAPPING and name not in ("vit", "dinov2", "dinov2_with_registers")
]
IMAGE_FAMILIES = [name for name in FAMILIES if not LAYOUTS[name].video]


def tiny(family: str, implementation: str | None = None) -> nn.Module:
    """A random model of a family (or "vision+text"), in evaluation mode, with weights large enough to matter."""
    torch.manual_seed(0)
    if "+" in family:
        vision, text = (CONFIG_MAPPING[part] for part in family.split("+"))
        own = {"num_register_tokens": 2} if "registers" in family else {}
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            vision(**VISION, **own), text(**TEXT), projection_dim=16
        )
        model: nn.Module = transformers.VisionTextDualEncoderModel(config)
    else:
        kind = CONFIG_MAPPING[family]
        vision_name = "image_config" if family == "flava" else "vision_config"
        parts: dict[str, Any] = {
            vision_name: {**VISION, **OWN_VISION.get(family, {})},
            "text_config": {**TEXT, **OWN_TEXT.get(family, {})},
            "projection_dim": 16,
        }
        if family == "flava":
            parts |= {"multimodal_config": {**VISION, "num_hidden_layers": 1}, "hidden_size": 32}
        model = MODEL_MAPPING[kind](kind(**parts))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 1e-3:  # BLIP starts at 1e-10, so that all attention is even
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.mul_(3.0)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model.eval()


@contextlib.contextmanager
def giving_weights(tower: Any, kept: list[Any]) -> Iterator[None]:
    """Inside, every forward of an eager tower appends its attention weights (B, heads, N, N) a layer, in its graph."""
    plain = tower.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **{**kwargs, "output_attentions": True})
        kept.append(output.attentions)
        return output

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def use(model: nn.Module, implementation: str) -> None:
    """Another attention implementation, where transformers has it for the family (some are eager alone in 4.57)."""
    try:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    except ValueError as error:
        assert "does not support" in str(error)
