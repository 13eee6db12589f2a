"""Training steps: what FVG-PT adds to the forwards it cannot do without, and what the reference style costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Row, compared, in_turns, row
from benchmarks.reference import ReferenceCoOp
from benchmarks.setting import Setting
from fvg_adapter import FeatureBank, FVGModel, wrap
from fvg_adapter.tuners import MMRL, CoOp, PromptSRC, Tuner


def fvg_steps(setting: Setting) -> list[Row]:
    """FVG-PT's step ÷ the frozen forwards of the same views, given masks."""
    layers = setting.size.layers
    depths = {"prompt_depth_text": min(9, layers), "prompt_depth_vision": min(9, layers)}
    rep = range(6, 13) if layers == 12 else range(1, layers + 1)
    return [
        _step(setting, CoOp, "two"),
        _step(setting, PromptSRC, "three", **depths, teacher_templates=("a photo of a {}.",)),
        _step(setting, MMRL, "three", rep_layers=rep),
    ]


def _step(setting: Setting, kind: type[Tuner], forwards: str, **options: Any) -> Row:
    tuner = kind(setting.clip(), setting.tokenizer, setting.names(), **options)
    model = wrap(tuner)
    pixels, masks = setting.pixels(), setting.masks()
    both = torch.cat([pixels, pixels * masks.unsqueeze(1)])

    @torch.no_grad()
    def frozen() -> None:
        tuner.branch_image_features(both)
        if tuner.changes_images:
            tuner.prior_image_features(pixels)

    work = training(model, pixels=pixels, labels=setting.labels, masks=masks)
    title = f"FVG-PT step ÷ its {forwards} frozen forwards, {kind.__name__}"
    return compared(title, work, frozen, "≤ 1.05", pairs=setting.pairs)


def training(model: FVGModel, *, pixels: Any, labels: Any, masks: Any) -> Callable[[], torch.Tensor]:
    """A step of the heads' training."""
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)
    model.train()

    def step() -> torch.Tensor:
        loss = model(pixels, labels, foreground_mask=masks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def reference_fvg(setting: Setting) -> list[Row]:
    """The reference style's FVG-PT step ÷ ours."""
    steps = []
    for kind in (ReferenceCoOp, CoOp):
        tuner = kind(setting.clip(), setting.tokenizer, setting.names())
        torch.manual_seed(2)  # the same heads
        model = wrap(tuner)
        steps.append(training(model, pixels=setting.pixels(), labels=setting.labels, masks=setting.masks()))
    torch.testing.assert_close(steps[0](), steps[1](), rtol=1e-3, atol=1e-3)  # the same number, before any is timed
    return [compared("FVG-PT step: reference style ÷ ours, CoOp", *steps, "≥ 3", pairs=setting.pairs)]


def prompt_steps(setting: Setting) -> list[Row]:
    """CoOp's own step: reference style ÷ ours in the loop, and ÷ ours from a bank."""
    works = []
    for kind in (ReferenceCoOp, CoOp):
        tuner = kind(setting.clip(), setting.tokenizer, setting.names())
        works.append(_prompt_step(tuner, pixel_values=setting.pixels(), labels=setting.labels))
    size = setting.size
    bank = FeatureBank.encode(tuner, setting.pictures(size.batch, size.batch), batch_size=size.batch)
    works.append(_prompt_step(tuner, features=bank.batches()[0][0], labels=setting.labels))
    losses = [work() for work in works]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
    times = in_turns(works, setting.pairs)
    reference, loop, banked = zip(*times, strict=True)
    return [
        row("CoOp step: reference style ÷ ours, in the loop", reference, loop, "≥ 3"),
        row("CoOp step: reference style ÷ ours, from a bank", reference, banked, "≥ 6"),
    ]


def _prompt_step(tuner: Tuner, **batch: Any) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)

    def step() -> torch.Tensor:
        loss = tuner(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
