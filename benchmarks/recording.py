"""What recording attention itself costs: its own work ÷ the vision forward, and the bytes that it keeps.

The work is timed alone, on the tokens that really enter the layers, since within a forward it drowns in the noise; in
seconds of the CPU, since other load slows a long forward more than a short work.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.harness import Row, in_turns, row
from benchmarks.setting import Setting
from fvg_adapter import record_attention
from fvg_adapter.attention_kernels import Seen, row_of
from fvg_adapter.towers import DualEncoder

CLOCK = "seconds of the CPU"
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@torch.no_grad()
def recording(setting: Setting) -> list[Row]:
    """ViT-B/16 at 224 and ViT-L/14 at 336 (both tiny where the setting is)."""
    tiny = setting.size.name == "tiny"
    base: Any = setting.clip().vision_model
    large: Any = base if tiny else CLIPVisionModel(CLIPVisionConfig(**VIT_L, image_size=336, patch_size=14)).eval()
    side = setting.size.image if tiny else 336
    rows = []
    for name, tower, pixels in (
        ("ViT-B/16 at 224", base, setting.pixels()),
        ("ViT-L/14 at 336", large, torch.randn(1 if not tiny else 2, 3, side, side)),
    ):
        rows += _of(name, tower, pixels, setting.pairs)
    return rows


def _of(name: str, tower: Any, pixels: Tensor, pairs: int) -> list[Row]:
    encoder = DualEncoder(tower)
    seen = _tokens(encoder, pixels)

    def forward() -> None:
        tower(pixel_values=pixels)

    def one() -> Tensor:
        return row_of(encoder.layout, seen[-1])

    def all_layers() -> list[Tensor]:
        return [row_of(encoder.layout, each) for each in seen]

    plain, last, every = zip(*in_turns([forward, one, all_layers], pairs, clock=time.process_time), strict=True)
    with record_attention(tower, "all") as record:
        tower(pixel_values=pixels)
    kept = sum(r.untyped_storage().nbytes() for r in record._rows.values())
    tokens, heads = seen[0].hidden.shape[1], next(iter(record._rows.values())).shape[1]
    returned = len(seen) * len(pixels) * heads * tokens * tokens * 4
    return [
        row(f"recording's own work ÷ the forward, {name}, one layer", last, plain, "≤ 0.01", note=CLOCK),
        row(f"recording's own work ÷ the forward, {name}, all {len(seen)} layers", every, plain, "≤ 0.08", note=CLOCK),
        row(
            f"bytes that recording keeps ÷ those of output_attentions=True, {name}",
            [kept],
            [returned],
            "≤ 0.05",
            unit="bytes",
            note="counted: what storage the record holds, against (layers, B, heads, N, N) of float32",
        ),
    ]


def _tokens(encoder: DualEncoder, pixels: Tensor) -> list[Seen]:
    """What enters the attention of every layer."""
    found: list[Seen] = []
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: found.append(Seen.of(encoder.layout, m, args, kwargs)), with_kwargs=True
        )
        for module in encoder.pooling_attention
    ]
    encoder.vision(pixel_values=pixels)
    for handle in handles:
        handle.remove()
    return found
