"""Beside others that do the same job: PEFT's LoRA, an eager model's attentions, captum's maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, compared, in_turns, row
from benchmarks.setting import Setting
from fvg_adapter import record_attention
from fvg_adapter.towers import DualEncoder, pooled
from fvg_adapter.tuners import LoRA


def lora_step(setting: Setting) -> list[Row]:
    """A training step of `LoRA(clip, …)` ÷ the same in a loop of one's own around `get_peft_model`."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "lora_alpha": 1, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    tuner = LoRA(setting.clip(), setting.tokenizer, setting.names(), peft_config=LoraConfig(**config))
    theirs: Any = get_peft_model(setting.clip(), LoraConfig(**config))
    texts = [f"a photo of a {name}." for name in setting.names()]
    tokens = setting.tokenizer(texts, padding=True, return_tensors="pt")
    pixels, labels = setting.pixels(), setting.labels

    def ours_loss() -> Tensor:
        loss: Tensor = tuner(pixels, labels).loss
        return loss

    def their_loss() -> Tensor:
        image = F.normalize(pooled(theirs.get_image_features(pixel_values=pixels)), dim=-1)
        text = F.normalize(pooled(theirs.get_text_features(**tokens)), dim=-1)
        return F.cross_entropy(theirs.logit_scale.exp() * image @ text.T, labels)

    works = []
    for model, loss in ((tuner, ours_loss), (theirs, their_loss)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
        works.append(_step(loss, optimizer))
    torch.testing.assert_close(ours_loss(), their_loss(), rtol=1e-4, atol=1e-4)
    figure = "LoRA step: fvg_adapter.tuners.LoRA ÷ a loop around PEFT's get_peft_model"
    return [compared(figure, *works, pairs=min(3, setting.pairs))]


def _step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def attention(setting: Setting) -> list[Row]:
    """Where the pooling token looks: eager attentions and captum's gradient × activation ÷ record_attention."""
    from captum.attr import LayerGradientXActivation

    pixels = setting.pixels()
    clip = setting.clip().requires_grad_(False)
    eager: Any = DualEncoder(setting.clip(attn_implementation="eager").requires_grad_(False)).vision
    encoder = DualEncoder(clip)
    vision: Any = encoder.vision
    direction = F.normalize(torch.ones(setting.size.clip["projection_dim"]), dim=0)
    layer: Any = encoder.vision_layers[-1]
    explainer = LayerGradientXActivation(lambda x: encoder.image_features(x) @ direction, layer.layer_norm1)

    @torch.no_grad()
    def plain() -> None:
        vision(pixel_values=pixels)

    @torch.no_grad()
    def recorded() -> Tensor:
        with record_attention(clip, layers=[-1]) as record:
            vision(pixel_values=pixels)
        return record.attention().flatten(3)[:, 0]  # (B, heads, patches)

    @torch.no_grad()
    def returned() -> Tensor:
        weights: Tensor = eager(pixel_values=pixels, output_attentions=True).attentions[-1]  # (B, heads, N, N)
        return weights[:, :, 0, 1:]

    def explained() -> Tensor:
        found: Tensor = explainer.attribute(pixels)  # (B, N, width)
        return found[:, 1:].sum(-1)

    torch.testing.assert_close(recorded(), returned(), rtol=0, atol=1e-5)
    times = in_turns([plain, recorded, returned, explained], setting.pairs)
    bare, ours, theirs, captum = zip(*times, strict=True)
    return [
        row("record_attention ÷ the plain vision forward", ours, bare),
        row("eager output_attentions=True ÷ record_attention", theirs, ours, note="the same numbers within 1e-5"),
        row("captum LayerGradientXActivation ÷ record_attention", captum, ours, note="another map, for the same use"),
    ]
