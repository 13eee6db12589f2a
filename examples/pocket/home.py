"""Why FVG-PT gains little behind PromptSRC and MMRL where the training backgrounds stay, and why joint HM can fall.

    python -m examples.pocket.home [--tuners promptsrc mmrl] [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

One training of the heads, read in several ways: each branch replaced by the tuner's own scores, and the joint rule with
the group (tuned or new class?) asked of the untouched CLIP, of the calibrated logits, or of the tuner.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.pocket.causes import measured, tuned
from examples.pocket.results import MEASURED
from examples.pocket.suite import CROP, SETTINGS, THREE, data_of, pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig, FVGModel, evaluate, wrap
from fvg_adapter import losses as L
from fvg_adapter.evaluation import harmonic_mean
from fvg_adapter.protocols import base_to_new_split
from fvg_adapter.train import fit

TEST = "test_home"
READINGS = {
    "FVG-PT": ("base", "new"),
    "base classes by FDC, new ones by the tuner (PC left out)": ("base", "tuner"),
    "base classes by the tuner (FDC left out), new ones by PC": ("tuner", "new"),
}
GROUPS = {"of the untouched CLIP (METHOD 11)": "prior", "of the calibrated logits": "new", "of the tuner": "tuner"}


@torch.no_grad()
def joint_hm(model: FVGModel, sets: Sequence[FeatureBank], asked: str) -> float:
    """Joint HM with the group asked of one of the models."""
    classes = [name for data in sets for name in data.classes]
    known = torch.tensor([name in model.base_classes for name in classes])
    right, offset = [], 0
    with model.use_classes(classes):
        for data in sets:
            hits = 0
            for features, labels in data.batches():
                z = {branch: model(features=features, branch=branch).logits for branch in ("base", "new")}
                z["prior"] = model.tuner.scores(features["prior"], model.tuner.prior_text_features())
                z["tuner"] = model.tuner.scores(features["image"], model.tuner.text_features())
                joint: Tensor = L.joint_log_probs(z[asked], z["base"], z["new"], known)
                hits += int((joint.argmax(-1) == labels + offset).sum())
            right.append(100 * hits / len(data))
            offset += len(data.classes)
    return harmonic_mean(*right)


def run_task(kind: str, task: str, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """{reading: {metric: [a value a seed]}}."""
    clip, tokenizer = pocket_clip()
    config = FVGConfig()
    normal = {"size": (64, 64), "mean": config.image_mean, "std": config.image_std, "crop_scale": CROP}
    found: dict[str, dict[str, list[float]]] = {}

    def note(name: str, figures: dict[str, float]) -> None:
        for metric, value in figures.items():
            found.setdefault(name, {}).setdefault(metric, []).append(value)

    for seed in seeds:
        split = base_to_new_split(data_of(task), shots=16, seed=seed, test_splits=(TEST,), **normal)
        tuner, bank = tuned(kind, clip, tokenizer, split, seed)
        sets: Any = [measured(tuner, s) for s in split.tests[TEST]]
        metrics = ("base", "new", "hm", "joint_hm")
        alone = evaluate(tuner, *sets)
        note(f"{SETTINGS[kind].name} alone", {m: alone[m] for m in metrics})
        torch.manual_seed(seed)
        model = wrap(tuner, config=config, foreground="given")
        fit(model, bank, recipe=stages(kind)["heads"], seed=seed)
        model.eval()
        for name, branches in READINGS.items():
            figures = evaluate(model, *sets, branches=branches)
            note(name, {m: figures[m] for m in metrics})
        whole = {m: v[-1] for m, v in found["FVG-PT"].items()}
        for name, asked in GROUPS.items():
            note(f"FVG-PT, group asked {name}", {**whole, "joint_hm": joint_hm(model, sets, asked)})
        model.release()
        tuner.detach()
    return found


def main() -> None:
    """Runs the tasks and writes home_<tuner>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuners", nargs="*", default=["promptsrc", "mmrl"], choices=list(SETTINGS))
    parser.add_argument("--tasks", nargs="*", default=list(THREE))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    for kind in options.tuners:
        record = {
            "title": f"{SETTINGS[kind].name} where the training backgrounds stay (`{TEST}`)",
            "text": f"Tasks {', '.join(options.tasks)}; seeds {options.seeds}; `python -m examples.pocket.home`.",
            "tasks": {task: run_task(kind, task, [int(s) for s in options.seeds.split(",")]) for task in options.tasks},
        }
        write_json(options.output / f"home_{kind}.json", record)
        print(kind, flush=True)


if __name__ == "__main__":
    main()
