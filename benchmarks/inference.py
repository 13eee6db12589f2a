"""Inference against the plain CLIP's image forward, frozen texts with and without padding, and the file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, compared, in_turns, row
from benchmarks.reference import untrimmed
from benchmarks.setting import Setting
from fvg_adapter import wrap
from fvg_adapter.storage import HEADS_FILE
from fvg_adapter.tuners import CoOp, ZeroShot

MEGABYTE = 10**6


@torch.no_grad()
def inference(setting: Setting) -> list[Row]:
    """Scores of a batch ÷ the plain CLIP's with ready text features, for each branch."""
    clip, pixels = setting.clip(), setting.pixels()
    model = wrap(CoOp(clip, setting.tokenizer, setting.names())).eval()
    ready = model.tuner.prior_text_features()

    def plain() -> Tensor:
        image = F.normalize(model.tuner.encoder.image_features(pixels), dim=-1)
        return clip.logit_scale.exp() * image @ ready.T

    branches = ("base", "new", "joint")

    def scored(branch: str) -> Callable[[], Any]:
        def work() -> Any:
            with torch.no_grad():
                return model(pixels, branch=branch)

        return work

    times = in_turns([plain, *map(scored, branches)], setting.pairs)
    first, *others = zip(*times, strict=True)
    return [
        row(f"inference ÷ plain CLIP with ready texts, CoOp, branch {branch}", seconds, first, "≤ 1.02")
        for branch, seconds in zip(branches, others, strict=True)
    ]


@torch.no_grad()
def text_features(setting: Setting) -> list[Row]:
    """Text features of the class names on 77 tokens ÷ trimmed to the longest prompt."""
    tuner = ZeroShot(setting.clip(), setting.tokenizer, setting.names())
    prompts = tuner.prior_prompts(tuner.classes)
    padded = untrimmed(prompts, tuner.encoder.text_length)

    def encode(some: Any) -> Callable[[], Tensor]:
        def work() -> Tensor:
            with torch.no_grad():
                return F.normalize(tuner._encode(some), dim=-1)

        return work

    difference = float((encode(padded)() - encode(prompts)()).abs().max())
    if difference > 1e-5:
        raise AssertionError(f"trimmed text features differ by {difference:.1e}, but trimming is exact.")
    figure = f"text features of {len(prompts)} class names: 77 tokens ÷ {prompts.input_ids.shape[1]}"
    note = f"largest difference of a unit feature {difference:.0e}"
    return [compared(figure, encode(padded), encode(prompts), "≥ 4", pairs=setting.pairs, note=note)]


def heads_file(setting: Setting) -> list[Row]:
    """Bytes of the heads, single precision."""
    model = wrap(ZeroShot(setting.clip(), setting.tokenizer, setting.names()))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "saved")
        size = (Path(folder) / "saved" / HEADS_FILE).stat().st_size / MEGABYTE
    note = f"{model.status().trainable:,} parameters"
    return [Row("heads' file ÷ 1 MB", size, size, size, size, 1.0, "≤ 0.6", unit="MB", note=note)]
