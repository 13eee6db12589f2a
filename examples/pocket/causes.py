"""Experiments that isolate why a figure of docs/results.md has the sign it has; the page picks up their table.

    python -m examples.pocket.causes [--tasks NAME …] [--seeds 1,2,3] [--output output/results]

Three questions, asked with the same tuned prompts and banks: what the spoiled quarter of the masks costs with and
without the gate, what λ_d costs, and what a larger weight of the KL in L_PC does for new classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel, CLIPTokenizer

from examples.pocket.results import CROP, HERE, TUNE, TUNER_OPTIONS
from examples.pocket.tasks import write_task
from fvg_adapter import FeatureBank, FVGConfig, evaluate, wrap
from fvg_adapter.protocols import base_to_new_split
from fvg_adapter.train import fit
from fvg_adapter.tuners import CoOp
from fvg_adapter.tuners.recipes import RECIPES

TASKS = ("fruit_vegetables", "other_animals", "clothing")
SPLITS = ("test", "test_swapped")
VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "all (λ_d = 10, gate, a quarter of the masks spoiled)": (True, {}),
    "r = 1, a quarter of the masks spoiled": (True, {"trust": "one"}),
    "r = 1, spoiled masks left out": (False, {"trust": "one"}),
    "gate, spoiled masks left out": (False, {}),
    "λ_d = 1": (True, {"lambda_distill": 1.0}),
    "λ_d = 0": (True, {"lambda_distill": 0.0}),
    "weight of the KL in L_PC 10": (True, {"lambda_new_kl": 10.0}),
}
"""(whether spoiled masks are used, FVGConfig fields that differ from the defaults)."""


def without_spoiled(bank: FeatureBank, pictures: Any, data: Path) -> FeatureBank:
    """The bank with the spoiled pictures' masks marked unusable; their features stay."""
    bad = set(json.loads((data / "spoiled.json").read_text()))
    names = [sample.image.relative_to(data.resolve()).as_posix() for sample in pictures.samples]
    rows = torch.tensor([name in bad or name.removeprefix("train/") in bad for name in names])
    if not bool(rows.any()):
        raise SystemExit("no training picture is listed in spoiled.json; its names are not understood")
    usable = bank.features["usable"] & ~rows.unsqueeze(1)
    return FeatureBank({**bank.features, "usable": usable}, bank.labels, bank.classes, bank.fingerprint)


def run_task(task: str, seeds: list[int], output: Path) -> dict[str, dict[str, list[float]]]:
    """{variant: {metric: [a value a seed]}}."""
    clip, tokenizer = CLIPModel.from_pretrained(HERE / "model"), CLIPTokenizer.from_pretrained(HERE / "model")
    data = output / "data" / task
    if not (data / "classes.txt").exists():
        write_task(task, data)
    found: dict[str, dict[str, list[float]]] = {}
    tests: dict[str, Any] = {}
    base = FVGConfig()
    for seed in seeds:
        normal = {"size": (64, 64), "mean": base.image_mean, "std": base.image_std, "crop_scale": CROP}
        split = base_to_new_split(data, shots=16, seed=seed, test_splits=SPLITS, **normal)
        torch.manual_seed(seed)
        tuner = CoOp(clip, tokenizer, split.base_classes, **TUNER_OPTIONS)
        if not tests:
            tests = {n: tuple(FeatureBank.encode(tuner, s) for s in sets) for n, sets in split.tests.items()}
        bank = FeatureBank.encode(tuner, split.train, views=4, seed=seed)
        fit(tuner, bank, recipe=dataclasses.replace(RECIPES["coop"].tune, **TUNE), seed=seed)
        clean = without_spoiled(bank, split.train, data)
        for name, (spoiled, fields) in VARIANTS.items():
            torch.manual_seed(seed)
            model = wrap(tuner, config=FVGConfig(**fields), foreground="given")
            fit(model, bank if spoiled else clean, recipe=RECIPES["coop"].fvg, seed=seed)
            for test, sets in tests.items():
                figures = evaluate(model, *sets)
                for metric in ("base", "new", "joint_hm"):
                    found.setdefault(name, {}).setdefault(f"{test} {metric}", []).append(figures[metric])
            model.release()
        tuner.detach()
    return found


def main() -> None:
    """Runs the tasks and writes causes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=Path("output/results"))
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    record = {}
    for task in options.tasks:
        record[task] = run_task(task, seeds, options.output)
        print(task, flush=True)
    target = options.output / "causes.json"
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
