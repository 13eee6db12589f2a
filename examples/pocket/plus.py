"""docs/plus.md by one command: `FVGConfig(preset="plus")` beside the paper's settings on tasks that it was not chosen on.

    python -m examples.pocket.plus [--tuners coop …] [--tasks NAME …] [--seeds 1,2,3] [--output DIR] [--banks DIR]

The figures of a tuner on a task lie in OUTPUT/<tuner>/<task>.json; what is there is not run again. The committed ones
lie in `examples/pocket/measured/plus`, so the page alone is a matter of a second. `plus_search` is how it was chosen.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.pocket.suite import CROP, SETTINGS, SPLITS, THREE, data_of, pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig, FVGModel, evaluate, wrap
from fvg_adapter.attended import zoom_on_mask
from fvg_adapter.attention import record_attention
from fvg_adapter.data import OtherMasks
from fvg_adapter.foreground import attention_mask_from_map, foreground_view
from fvg_adapter.protocols import Split, base_to_new_split
from fvg_adapter.train import fit
from fvg_adapter.tuners import TUNERS, Tuner

HERE = Path(__file__).parent
MEASURED = HERE / "measured" / "plus"
BANKS = HERE.parent.parent / "output" / "plus_banks"
VALIDATION = THREE
HELD_OUT = ("mammals", "transport", "prepared_food", "tools_household", "places", "office_music")
MORE = ("plants_drinks", "leisure")
TURNED = tuple(f"{task}_turned" for task in HELD_OUT)
TASKS = {
    "coop": (*HELD_OUT, *MORE, *VALIDATION, *TURNED),
    "kgcoop": (*HELD_OUT, *MORE, *VALIDATION),
    "promptsrc": VALIDATION,
    "mmrl": VALIDATION,
    "lora": VALIDATION,
}
"""Where each tuner runs. Tuners that change the image tower have figures in results.md on the validation tasks alone."""
METRICS = ("base", "new", "hm", "joint_base", "joint_new", "joint_hm", "ece")
PLUS = FVGConfig(preset="plus")
CLIP, PAPER, PLUS_ROW = "CLIP", "FVG-PT", "plus"
Found = dict[str, dict[str, dict[str, list[float]]]]
"""{test split: {row: {metric: [a value a seed]}}}"""
Tests = dict[str, tuple[FeatureBank, FeatureBank]]


def folder_of(task: str) -> Path:
    """The pictures of a task; of a turned one, the same pictures with the two halves of the classes exchanged."""
    if not task.endswith("_turned"):
        return data_of(task)
    source = data_of(task.removesuffix("_turned"))
    target = source.parent / task
    if not (target / "classes.txt").exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("classes.txt"), dirs_exist_ok=True)
        names = (source / "classes.txt").read_text("utf-8").split("\n")[:-1]
        half = -(-len(names) // 2)
        (target / "classes.txt").write_text("\n".join([*names[half:], *names[:half]]) + "\n", encoding="utf-8")
    return target


@torch.no_grad()
def other_view(tuner: Tuner, pictures: Any, kind: str) -> Tensor:
    """(N, 1, D) features of the attended view with a mask that the attention did not make of this picture.

    Args:
        kind: "others" = of another picture's attention, "true" = the data set's masks.
    """
    items = [pictures[i] for i in range(len(pictures))]
    pixels = torch.stack([item["pixel_values"] for item in items])
    if kind == "true":
        masks = torch.stack([item["foreground_mask"] for item in items]).float()
    else:
        maps = []
        for part in pixels.split(128):
            with record_attention(tuner, layers=list(PLUS.attention_layers)) as recorded:
                tuner.image_features(part)
            maps.append(recorded.attention().mean((1, 2)))
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))
        size = (pixels.shape[-2], pixels.shape[-1])
        masks = attention_mask_from_map(torch.cat(maps)[order], size, threshold=PLUS.attention_threshold)
    view = zoom_on_mask(foreground_view(pixels, masks), masks, PLUS.attended_margin)
    return torch.cat([tuner.image_features(part) for part in view.split(128)]).unsqueeze(1)


def with_views(bank: FeatureBank, features: Tensor) -> FeatureBank:
    """A bank whose attended view is another one."""
    return FeatureBank({**bank.features, "attended": features}, bank.labels, bank.classes, bank.fingerprint)


def encoded(tuner: Tuner, pictures: Any, folder: Path | None, *, plus: bool, seed: int = 0) -> FeatureBank:
    """Four training views, or the test pictures with their attended view (`plus`)."""
    model = FVGModel(tuner, FVGConfig(preset="plus"), foreground="given")
    try:
        return FeatureBank.encode(
            model, pictures, views=1 if plus else 4, measure=plus, seed=seed, output=folder, batch_size=128
        )
    finally:
        model.release()


def note(found: Found, row: str, model: Any, tests: Tests, branches: tuple[str, str] = ("base", "new")) -> None:
    """Adds one seed's figures."""
    for test, sets in tests.items():
        figures = evaluate(model, *sets, branches=branches)
        for metric in METRICS:
            found.setdefault(test, {}).setdefault(row, {}).setdefault(metric, []).append(round(figures[metric], 4))


def without_heads(found: Found, tuner: Tuner, tests: Tests) -> None:
    """Plus's view and joint rule, without anything of FVG-PT that learns."""
    model = FVGModel(tuner, FVGConfig(preset="plus"), foreground="given")
    note(found, "CLIP, plus's view and joint rule", model, tests, ("prior", "prior"))
    note(found, "tuner, plus's view and joint rule", model, tests, ("tuner", "tuner"))
    note(found, "tuner for base, CLIP for new, plus's view and joint rule", model, tests, ("tuner", "prior"))
    model.release()


def heads(kind: str, tuner: Tuner, bank: FeatureBank, seed: int, config: FVGConfig, foreground: str) -> FVGModel:
    """Trained heads behind the frozen tuner; one seed gives every configuration the same start and batches."""
    torch.manual_seed(seed)
    model = wrap(tuner, config=replace(config), foreground=foreground)
    fit(model, bank, recipe=stages(kind)["heads"], seed=seed)
    return model


def one_seed(kind: str, task: str, seed: int, split: Split, clip: Any, tokenizer: Any, kept: Kept, found: Found) -> None:
    """All rows of one seed."""
    torch.manual_seed(seed)
    tuner: Tuner = TUNERS[kind](clip, tokenizer, split.base_classes, **SETTINGS[kind].options)
    changes = tuner.changes_images
    bank = None if changes else encoded(tuner, split.train, kept.folder(task, f"train-{seed}"), plus=False, seed=seed)
    fit(tuner, split.train if bank is None else bank, recipe=stages(kind)["tune"], seed=seed)
    bank = bank or encoded(tuner, split.train, None, plus=False, seed=seed)
    tests = kept.tests(tuner, task, split)
    plain = TUNERS["zero_shot"](clip, tokenizer, split.base_classes) if not changes else None
    if plain is not None:
        note(found, CLIP, plain, tests)
        plain.detach()
    else:
        note(found, CLIP, _Prior(tuner), tests, ("prior", "prior"))
    note(found, "tuner", tuner, tests)
    without_heads(found, tuner, tests)
    model = heads(kind, tuner, bank, seed, FVGConfig(), "given")
    note(found, PAPER, model, tests)
    if not changes:
        model.config.attended_view = PLUS.attended_view
        note(found, "FVG-PT, plus's view", model, tests)
    model.release()
    model = heads(kind, tuner, bank, seed, PLUS, "given")
    note(found, PLUS_ROW, model, tests)
    model.config.attended_view = 0.0
    note(found, "plus, no attended view", model, tests)
    model.config.attended_view, model.config.group_temperature = PLUS.attended_view, 1.0
    note(found, "plus, group temperature 1", model, tests)
    model.config.group_temperature = PLUS.group_temperature
    if kind == "coop" and not task.endswith("_turned"):
        first = {"test": tests["test"]}
        for name in ("others", "true"):
            label = {"others": "plus, view by another picture's attention", "true": "plus, view by the true mask"}[name]
            views = [kept.view(tuner, task, split, half, name) for half in (0, 1)]
            sets = tuple(with_views(b, v) for b, v in zip(first["test"], views, strict=True))
            note(found, label, model, {"test": sets})  # type: ignore[dict-item]
    model.release()
    if kind == "coop" and not task.endswith("_turned"):
        others = encoded(tuner, OtherMasks(split.train, seed), kept.folder(task, f"shuffled-{seed}"), plus=False, seed=seed)
        for row, source, config, foreground in (
            ("plus [x_fg = x]", bank, PLUS, "whole"),
            ("plus [λ_d = 0]", bank, replace(PLUS, lambda_distill=0.0), "given"),
            ("plus [shuffled masks]", others, PLUS, "given"),
        ):
            model = heads(kind, tuner, source, seed, config, foreground)
            note(found, row, model, tests)
            model.release()
    tuner.detach()
