"""What it takes at scale: an estimate, worked out from rates measured here and from assumptions that are named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import Result, in_turns
from benchmarks.setting import Setting
from fvg_adapter import FeatureBank, wrap
from fvg_adapter.tuners import ZeroShot

GPU_FLOPS = 100e12
"""Assumed: what one data-centre GPU sustains on a ViT-B/16 in bfloat16."""
IMAGE_FLOPS = 35.1e9
"""One ViT-B/16 forward of a 224² image: 17.56 G multiply-adds."""
HEADS_BATCH, EPOCHS = 256, 10
CASES = (
    ("ImageNet, 16 shots", 16_000, 1000, 4),
    ("ImageNet, whole", 1_281_167, 1000, 1),
    ("10 M images", 10**7, 10_000, 1),
)
"""Name, images, classes, views in the bank."""


def at_scale(setting: Setting) -> Result:
    """Hours, bytes and processes for three sizes of data."""
    size = setting.size
    model = wrap(ZeroShot(setting.clip(), setting.tokenizer, setting.names()), foreground="given")
    pictures = setting.pictures(size.some, size.some)
    bank = FeatureBank.encode(model, pictures, batch_size=size.some)
    bytes_each = sum(t.numel() * t.element_size() for t in bank.features.values()) / len(bank)
    encode = statistics.median(
        t[0] for t in in_turns([lambda: FeatureBank.encode(model, pictures, batch_size=size.some)], setting.pairs)
    )
    per_view = encode / len(bank)  # whole image and foreground view
    lines = []
    for name, images, classes, views in CASES:
        step = _heads_step(setting, classes if size.name != "tiny" else 10)
        seconds = statistics.median(t[0] for t in in_turns([step], setting.pairs))
        training = EPOCHS * images / HEADS_BATCH * seconds / 3600
        here = images * views * per_view / 3600
        gpu = images * views * 2 * IMAGE_FLOPS / GPU_FLOPS / 3600
        lines.append(
            [
                f"{name}, {views} view{'s' * (views > 1)}, {classes:,} classes",
                f"{here:,.1f}",
                f"{gpu:.2f}",
                f"{images * views * bytes_each / 1e9:.2f}",
                f"{training:.2f}",
                "1" if gpu < 1 else f"{math.ceil(gpu)} for an hour",
            ]
        )
    rate = GPU_FLOPS / IMAGE_FLOPS / 2
    rate = GPU_FLOPS / IMAGE_FLOPS / 2
    caption = (
        "**An estimate, not a measurement.** Encoding here: measured seconds an image (whole and foreground, without "
        "reading or decoding of files) times the images. One GPU: two forwards of "
        f"{IMAGE_FLOPS / 1e9:.1f} GFLOP a view at an assumed {GPU_FLOPS / 1e12:.0f} TFLOP/s, with a loader that keeps "
        f"up ({rate:,.0f} decoded images a second). Bank: {bytes_each:,.0f} bytes a view as it is stored now. Heads: "
        f"{EPOCHS} epochs in batches of {HEADS_BATCH} (the paper's are of 4 and need as many more steps) at the step "
        "time measured on this CPU. Processes: shards of the images are independent, so n processes divide the "
        "encoding by n; the heads need one."
    )
    header = ["data", "encoding here, h", "encoding on one GPU, h", "bank, GB", "heads, h", "processes"]
    return Result([], caption, [header, *lines])


def _heads_step(setting: Setting, classes: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(4)
    dim = setting.size.clip["projection_dim"]

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)

    model = wrap(setting.clip(), classes=dict(zip(setting.names(classes), unit(classes), strict=True))).train()
    features = {"image": unit(HEADS_BATCH), "foreground": unit(HEADS_BATCH)}
    features |= {"mask_area": torch.full((HEADS_BATCH,), 0.25), "usable": torch.ones(HEADS_BATCH, dtype=torch.bool)}
    labels = torch.arange(HEADS_BATCH) % classes
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(features=features, labels=labels).loss.backward()
        optimizer.step()

    return step
