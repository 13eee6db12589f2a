"""Experiments that isolate why a figure of docs/results.md has the sign it has; the page picks up their tables.

    python -m examples.pocket.causes [--tuners coop …] [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

With the same tuned prompts and banks each variant changes one thing: what the spoiled quarter of the masks costs with
and without the gate, what λ_d costs, and what a larger weight of the KL in L_PC does for new classes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.pocket.results import MEASURED
from examples.pocket.suite import CROP, SETTINGS, THREE, data_of, pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig, evaluate, wrap
from fvg_adapter.protocols import Split, base_to_new_split
from fvg_adapter.train import fit
from fvg_adapter.tuners import TUNERS, Tuner

TESTS = ("test", "test_swapped")
METRICS = ("base", "new", "hm", "joint_hm")
VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "all (λ_d = 10, gate, a quarter of the masks spoiled)": (True, {}),
    "r = 1, a quarter of the masks spoiled": (True, {"trust": "one"}),
    "r = 1, spoiled masks left out": (False, {"trust": "one"}),
    "gate, spoiled masks left out": (False, {}),
    "λ_d = 1": (True, {"lambda_distill": 1.0}),
    "λ_d = 0": (True, {"lambda_distill": 0.0}),
    "weight of the KL in L_PC 10": (True, {"lambda_new_kl": 10.0}),
    "weight of the KL in L_PC 50": (True, {"lambda_new_kl": 50.0}),
}
"""(whether spoiled masks are used, FVGConfig fields that differ from the defaults)."""
ALONE = "the tuner alone"

Figures = dict[str, dict[str, list[float]]]
"""{variant: {"<test> <metric>": [a value a seed]}}"""


def without_spoiled(bank: FeatureBank, pictures: Any, data: Path) -> FeatureBank:
    """The bank with the spoiled pictures' masks marked unusable; their features stay."""
    bad = set(json.loads((data / "spoiled.json").read_text(encoding="utf-8")))
    names = [sample.image.relative_to(data.resolve()).as_posix() for sample in pictures.samples]
    rows = torch.tensor([name in bad or name.removeprefix("train/") in bad for name in names])
    if not bool(rows.any()):
        raise SystemExit("no training picture is listed in spoiled.json; its names are not understood")
    usable = bank.features["usable"] & ~rows.unsqueeze(1)
    return FeatureBank({**bank.features, "usable": usable}, bank.labels, bank.classes, bank.fingerprint)


def split_of(data: Path, seed: int) -> Split:
    """The pictures of one seed, as the results have them."""
    config = FVGConfig()
    normal = {"size": (64, 64), "mean": config.image_mean, "std": config.image_std, "crop_scale": CROP}
    return base_to_new_split(data, shots=16, seed=seed, test_splits=TESTS, **normal)


def tuned(kind: str, clip: Any, tokenizer: Any, split: Split, seed: int) -> tuple[Tuner, FeatureBank]:
    """The tuner after stage one, and the bank of its training pictures."""
    torch.manual_seed(seed)
    tuner: Tuner = TUNERS[kind](clip, tokenizer, split.base_classes, **SETTINGS[kind].options)
    bank = None if tuner.changes_images else FeatureBank.encode(tuner, split.train, views=4, seed=seed)
    fit(tuner, split.train if bank is None else bank, recipe=stages(kind)["tune"], seed=seed)
    return tuner, bank or FeatureBank.encode(tuner, split.train, views=4, seed=seed)


def measured(tuner: Tuner, pictures: Any) -> FeatureBank:
    """The bank of test pictures."""
    return FeatureBank.encode(tuner, pictures, measure=True)


def note(found: Figures, variant: str, model: Any, tests: dict[str, Any]) -> None:
    """Adds one seed's figures."""
    for test, sets in tests.items():
        figures = evaluate(model, *sets)
        for metric in METRICS:
            found.setdefault(variant, {}).setdefault(f"{test} {metric}", []).append(figures[metric])


def run_task(kind: str, task: str, seeds: Sequence[int]) -> Figures:
    """All variants behind one tuner on one task."""
    clip, tokenizer = pocket_clip()
    data = data_of(task)
    found: Figures = {}
    tests: dict[str, Any] = {}
    for seed in seeds:
        split = split_of(data, seed)
        tuner, bank = tuned(kind, clip, tokenizer, split, seed)
        if tuner.changes_images or not tests:
            tests = {name: tuple(measured(tuner, s) for s in sets) for name, sets in split.tests.items()}
        note(found, ALONE, tuner, tests)
        clean = without_spoiled(bank, split.train, data)
        for variant, (spoiled, fields) in VARIANTS.items():
            torch.manual_seed(seed)
            model = wrap(tuner, config=FVGConfig(**fields), foreground="given")
            fit(model, bank if spoiled else clean, recipe=stages(kind)["heads"], seed=seed)
            note(found, variant, model, tests)
            model.release()
        tuner.detach()
    return found


def main() -> None:
    """Runs the tasks and writes a causes_<tuner>.json each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuners", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tasks", nargs="*", default=list(THREE))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    for kind in options.tuners:
        record = {
            "title": f"What moves the figures behind {SETTINGS[kind].name}",
            "text": f"Tasks {', '.join(options.tasks)}; seeds {options.seeds}; `python -m examples.pocket.causes`.",
            "tasks": {task: run_task(kind, task, seeds) for task in options.tasks},
        }
        target = options.output / f"causes_{kind}.json"
        write_json(target, record)
        print(target, flush=True)


if __name__ == "__main__":
    main()
