"""Training from a bank of features against training, or only looking, in the loop."""

from __future__ import annotations

import dataclasses
import time

import torch

from benchmarks.harness import Row, row, seconds
from benchmarks.setting import Setting
from fvg_adapter import FeatureBank, wrap
from fvg_adapter.train import fit
from fvg_adapter.tuners import CoOp
from fvg_adapter.tuners.recipes import recipe_for

EPOCHS, VIEWS, RUN_PAIRS = 10, 4, 2


def heads_from_bank(setting: Setting) -> list[Row]:
    """Ten epochs of the heads ÷ encoding the images (whole and foreground) once; some images stand for all."""
    size = setting.size
    total = size.shots * size.shot_classes
    model = wrap(CoOp(setting.clip(), setting.tokenizer, setting.names(size.shot_classes)), foreground="given")
    pictures = setting.pictures(size.some, size.shot_classes)
    small = FeatureBank.encode(model, pictures, batch_size=size.some)
    bank = small.subset([i % size.some for i in range(total)], [i % size.shot_classes for i in range(total)])
    fit(model, bank, recipe=_recipe(1))  # imports, text features
    training, encoding = [], []
    for _ in range(setting.pairs):
        encoded = seconds(lambda: FeatureBank.encode(model, pictures, batch_size=size.some))
        encoding.append(encoded * total / size.some)
        training.append(seconds(lambda: fit(model, bank, recipe=_recipe(EPOCHS))))
    figure = f"heads from a bank, {EPOCHS} epochs of {size.shots} shots × {size.shot_classes} classes ÷ encoding once"
    note = f"encoding measured on {size.some} of {total} images; batches of {_recipe(1).batch_size}, the paper's"
    return [row(figure, training, encoding, "≤ 0.05", note=note)]


def whole_run(setting: Setting) -> list[Row]:
    """A bank of four views and ten epochs of heads from it ÷ ten epochs that encode in the loop."""
    count, classes = setting.size.some, min(8, setting.size.some)
    model = wrap(CoOp(setting.clip(), setting.tokenizer, setting.names(classes)), foreground="given")
    pictures = setting.pictures(count, classes)
    recipe = dataclasses.replace(_recipe(EPOCHS), batch_size=setting.size.batch)
    fit(model, FeatureBank.encode(model, pictures), recipe=dataclasses.replace(recipe, epochs=1))
    banked, looped = [], []
    for _ in range(min(RUN_PAIRS, setting.pairs)):
        start = time.perf_counter()
        bank = FeatureBank.encode(model, pictures, views=VIEWS, batch_size=setting.size.batch)
        fit(model, bank, recipe=recipe)
        banked.append(time.perf_counter() - start)
        torch.manual_seed(0)
        looped.append(seconds(lambda: fit(model, pictures, recipe=recipe)))
    figure = f"whole FVG-PT run from a bank of {VIEWS} views ÷ {EPOCHS} epochs in the loop"
    note = f"{count} images, {classes} classes"
    return [row(figure, banked, looped, "≤ 0.45", note=note)]


def _recipe(epochs: int):  # type: ignore[no-untyped-def]
    return dataclasses.replace(recipe_for("coop").fvg, epochs=epochs)
