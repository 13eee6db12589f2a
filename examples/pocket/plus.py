"""docs/plus.md by one command: `preset="plus"` beside the paper's settings, on tasks that it was not chosen on.

    python -m examples.pocket.plus [--tuners coop …] [--tasks NAME …] [--tests test …] [--seeds 1,2,3] [--controls]

The figures of one seed of a tuner on a task lie in OUTPUT/<tuner>/<task>.<test>.<seed>.json, those of the controls
beside them; what is there is not run again. The committed ones lie in `examples/pocket/measured/plus`, so the page
alone (`--tuners` with nothing behind it) is a matter of a second.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.pocket.suite import CROP, SETTINGS, SPLITS, THREE, data_of, pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig, FVGModel, evaluate, wrap
from fvg_adapter.data.controls import OtherMasks
from fvg_adapter.protocols import base_to_new_split
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
"""Where each tuner runs. results.md has tuners that change the image tower on the validation tasks alone."""
SHOTS = 16
METRICS = ("base", "new", "hm", "joint_base", "joint_new", "joint_hm", "ece")
PLUS = FVGConfig(preset="plus")
CLIP, TUNER, PAPER, PLUS_ROW = "CLIP", "the tuner alone", "FVG-PT", "plus"
NO_HEADS = {
    "CLIP, plus's view and joint rule": ("prior", "prior"),
    "tuner (base) and CLIP (new), plus's view and joint rule": ("tuner", "prior"),
}
"""Rows without trained heads: what scores base and new classes."""
READINGS: dict[str, dict[str, float]] = {
    "plus, no attended view": {"attended_view": 0.0},
}
"""One training of plus read with one part of it taken away."""
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


def encoded(tuner: Tuner, pictures: Any, folder: Path | None, *, test: bool, seed: int = 0) -> FeatureBank:
    """Test pictures with their attended view, or four views of training pictures."""
    model = FVGModel(tuner, FVGConfig(preset="plus"), foreground="given")
    try:
        return FeatureBank.encode(
            model, pictures, views=1 if test else 4, measure=test, seed=seed, output=folder, batch_size=128
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
    """Plain CLIP, the tuner, and both with plus's view and joint rule: nothing of FVG-PT that learns."""
    model = FVGModel(tuner, FVGConfig(), foreground="given")
    note(found, CLIP, model, tests, ("prior", "prior"))
    model.release()
    note(found, TUNER, tuner, tests)
    model = FVGModel(tuner, FVGConfig(preset="plus"), foreground="given")
    for row, branches in NO_HEADS.items():
        note(found, row, model, tests, branches)
    model.release()


def heads(kind: str, tuner: Tuner, bank: FeatureBank, seed: int, config: FVGConfig, foreground: str) -> FVGModel:
    """Trained heads behind the frozen tuner; one seed gives every configuration the same start and batches."""
    torch.manual_seed(seed)
    model = wrap(tuner, config=replace(config), foreground=foreground)
    fit(model, bank, recipe=stages(kind)["heads"], seed=seed)
    return model


def main_rows(
    kind: str, tuner: Tuner, bank: FeatureBank, seed: int, tests: Tests, found: Found, *, paper: bool
) -> None:
    """Without heads, the paper's settings, plus, and plus without one of its parts."""
    without_heads(found, tuner, tests)
    if paper:  # where results.py has not measured it on the same prompts and pictures already
        model = heads(kind, tuner, bank, seed, FVGConfig(), "given")
        note(found, PAPER, model, tests)
        model.release()
    model = heads(kind, tuner, bank, seed, PLUS, "given")
    note(found, PLUS_ROW, model, tests)
    for row, fields in READINGS.items():
        for field, value in fields.items():
            setattr(model.config, field, value)
        note(found, row, model, tests)
        model.config = replace(PLUS)
    model.release()


def control_rows(
    kind: str, tuner: Tuner, bank: FeatureBank, others: FeatureBank, seed: int, tests: Tests, found: Found
) -> None:
    """Plus without the foreground, without distillation, and with other pictures' masks."""
    for row, source, config, foreground in (
        ("plus, x_fg = x", bank, PLUS, "whole"),
        ("plus, λ_d = 0", bank, replace(PLUS, lambda_distill=0.0), "given"),
        ("plus, shuffled masks", others, PLUS, "given"),
    ):
        model = heads(kind, tuner, source, seed, config, foreground)
        note(found, row, model, tests)
        model.release()


def run_task(kind: str, task: str, seeds: Sequence[int], tests: Sequence[str], controls: bool, banks: Path) -> Found:
    """All rows of one tuner on one task; what is encoded or tuned is kept in `banks`."""
    clip, tokenizer = pocket_clip()
    config = FVGConfig()
    normal = {"size": (64, 64), "mean": config.image_mean, "std": config.image_std, "crop_scale": CROP}
    found: Found = {}
    for seed in seeds:
        split = base_to_new_split(folder_of(task), shots=SHOTS, seed=seed, test_splits=tuple(tests), **normal)
        torch.manual_seed(seed)
        tuner: Tuner = TUNERS[kind](clip, tokenizer, split.base_classes, **SETTINGS[kind].options)
        state = banks / task / f"{kind}-{seed}.pt"
        place, own = banks / task, f"{kind}-{seed}-" if tuner.changes_images else ""
        kept, bank = place / f"{own}train-{seed}", None
        if not tuner.changes_images:
            bank = encoded(tuner, split.train, kept, test=False, seed=seed)
        if state.exists():
            tuner.load_state_dict(torch.load(state, weights_only=True), strict=False)
            tuner.eval()
        else:
            fit(tuner, split.train if bank is None else bank, recipe=stages(kind)["tune"], seed=seed)
            state.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tuner.state_dict(), state)
        bank = bank or encoded(tuner, split.train, kept, test=False, seed=seed)
        sets: Tests = {
            name: (
                encoded(tuner, base, place / f"{own}{name}-base", test=True),
                encoded(tuner, new, place / f"{own}{name}-new", test=True),
            )
            for name, (base, new) in split.tests.items()
        }
        if controls:
            shuffled = place / f"{own}shuffled-{seed}"
            others = encoded(tuner, OtherMasks(split.train, seed), shuffled, test=False, seed=seed)
            control_rows(kind, tuner, bank, others, seed, sets, found)
        else:
            main_rows(kind, tuner, bank, seed, sets, found, paper=recorded(kind, task) is None)
        tuner.detach()
    return found


def recorded(kind: str, task: str) -> Path | None:
    """Where results.py keeps the paper's rows of a task, if it ran there: same seeds, same prompts, same pictures."""
    file = HERE / "measured" / kind / f"{task}.json"
    return file if file.exists() else None


def run(
    kinds: Sequence[str],
    tasks: Sequence[str] | None,
    seeds: Sequence[int],
    test: str,
    controls: bool,
    output: Path,
    banks: Path,
) -> None:
    """Runs what is not there yet, seed by seed, into OUTPUT/<tuner>/<task>.<test>.<seed>[.controls].json."""
    torch.set_num_threads(1)
    for seed in seeds:
        for kind in kinds:
            for task in TASKS[kind] if tasks is None else tasks:
                target = output / kind / f"{task}.{test}.{seed}{'.controls' if controls else ''}.json"
                if not target.exists():
                    rows = run_task(kind, task, [seed], [test], controls, banks)[test]
                    write_json(target, {row: {m: v[0] for m, v in figures.items()} for row, figures in rows.items()})
                    print(target, flush=True)


def main() -> None:
    """Runs what is missing and writes the page."""
    from examples.pocket.plus_page import PAGE, page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuners", nargs="*", default=["coop"], choices=list(TASKS), help="none: the page alone")
    parser.add_argument("--tasks", nargs="*", help="these instead of all of the tuner's")
    parser.add_argument("--tests", nargs="*", default=["test"], choices=list(SPLITS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--controls", action="store_true", help="the rows x_fg = x, λ_d = 0 and shuffled masks")
    parser.add_argument("--output", type=Path, default=MEASURED)
    parser.add_argument("--banks", type=Path, default=BANKS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    for test in options.tests:
        run(options.tuners, options.tasks, seeds, test, options.controls, options.output, options.banks)
    options.page.write_text(page(options.output), encoding="utf-8")
    print(options.page)


if __name__ == "__main__":
    main()
