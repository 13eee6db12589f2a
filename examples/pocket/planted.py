"""A planted shortcut, and whether the audit finds it: some classes always stand on a background of their own.

    python -m examples.pocket.planted [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

Of a task's base classes some are drawn whose pictures all stand on one background; the others' stand anywhere. Tuners
are trained on such pictures and audited on new ones of the same law, as somebody would who suspects his data. The audit
knows nothing of the plan; what is written is where it ranks the planted classes, for plain CLIP (which learned what
lives where in its pretraining: a planted background is of the class's home), a tuner that can hardly learn a class's
background (CoOp), one that can (CoOp with a context for each class, 100 epochs), and FVG-PT behind them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from examples.pocket import backgrounds, compose, concepts
from examples.pocket.results import MEASURED
from examples.pocket.suite import SETTINGS, THREE, pocket_clip, stages, write_json
from examples.pocket.tasks import OWN_FIRST, _levels, _own_families, _random_bank, members
from fvg_adapter import FeatureBank, wrap
from fvg_adapter.audit import audit
from fvg_adapter.train import fit
from fvg_adapter.tuners import CoOp, ZeroShot

PLANTED = 4
KINDS = ("CLIP", "CoOp", "CoOp, a context a class")
SHOTS, TESTS = 16, 20
LONG = 100
"""Epochs of the contexts a class: until the training pictures are learned."""


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Composed pictures with true masks, normalised for the pocket CLIP."""

    def __init__(self, pictures: Any, masks: Any, labels: Any, classes: list[str]) -> None:
        from fvg_adapter.config import CLIP_MEAN, CLIP_STD

        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        self.pixels, self.masks = (pixels - mean) / std, torch.from_numpy(masks).float().unsqueeze(1)
        self.labels, self.classes = [int(v) for v in labels], classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "pixel_values": self.pixels[index],
            "labels": self.labels[index],
            "foreground_mask": self.masks[index],
        }


def compose_planted(task: str, seed: int, count: int = PLANTED) -> tuple[Pictures, Pictures, list[int]]:
    """Training and audit pictures of the base classes, and which classes were planted.

    Args:
        task: one of the pocket tasks. seed: of the plan and of the pictures. count: planted classes.
    """
    rows = np.array(members(task))
    half = -(-len(rows) // 2)
    rng = np.random.Generator(np.random.PCG64([concepts.SEED, 9, list(concepts.TASKS).index(task), seed]))
    planted = sorted(int(c) for c in rng.permutation(half)[:count])
    own = _own_families(task)[:half]
    mine = np.stack([backgrounds.variant(int(f), OWN_FIRST + i) for i, f in enumerate(own[:, 0])])  # one a class
    bank = np.concatenate([mine, _random_bank()])
    extras = np.array([i for i, c in enumerate(concepts.load()) if not c.task])
    names = [concepts.load()[i].name for i in rows[:half]]
    sets = []
    for each in (SHOTS, TESTS):
        labels = np.repeat(np.arange(half), each)
        anywhere = half + rng.integers(0, len(bank) - half, len(labels))
        places = np.where(np.isin(labels, planted), labels, anywhere)
        pictures, masks = compose.render(compose.draw(rng, rows[labels], extras, places), _levels(), bank)
        sets.append(Pictures(pictures, masks, labels, names))
    return sets[0], sets[1], planted


def tuned(kind: str, train: Pictures, seed: int) -> Any:
    """A tuner after its training."""
    clip, tokenizer = pocket_clip()
    torch.manual_seed(seed)
    if kind == "CLIP":
        return ZeroShot(clip, tokenizer, train.classes)
    each, recipe = kind == KINDS[2], stages("coop")["tune"]
    tuner = CoOp(
        clip, tokenizer, train.classes, **({"ctx_init": "", "csc": True} if each else SETTINGS["coop"].options)
    )
    recipe = dataclasses.replace(recipe, epochs=LONG) if each else recipe
    fit(tuner, FeatureBank.encode(tuner, train), recipe=recipe, seed=seed)
    return tuner


def ranked(model: Any, pictures: Pictures, planted: Sequence[int]) -> dict[str, Any]:
    """Where an audit ranks the planted classes: figures, and the ranks (1 = leans most)."""
    found = audit(model, pictures)
    places = {c.name: i + 1 for i, c in enumerate(found.classes)}
    ranks = [places[pictures.classes[c]] for c in planted]
    leans = torch.tensor([c.evidence for c in found.classes])
    is_planted = torch.tensor([c.name in {pictures.classes[p] for p in planted} for c in found.classes])
    return {
        "ranks": sorted(ranks),
        "in front": sum(r <= len(planted) for r in ranks) / len(planted),
        "AUROC": float(binary_auroc(torch.arange(len(leans), 0, -1) / (len(leans) + 1), is_planted.long())),
        "evidence, planted": float(leans[is_planted].mean()),
        "evidence, others": float(leans[~is_planted].mean()),
        "whole": found.summary.whole,
        "foreground": found.summary.foreground,
        "background": found.summary.background,
    }


def run_task(task: str, seeds: Sequence[int], kinds: Sequence[str] = KINDS) -> dict[str, list[dict[str, Any]]]:
    """{model: [figures a seed]}; FVG-PT is put behind every tuner but plain CLIP."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        train, test, planted = compose_planted(task, seed)
        for kind in kinds:
            tuner = tuned(kind, train, seed)
            found.setdefault(kind, []).append(ranked(tuner, test, planted))
            if kind != "CLIP":
                torch.manual_seed(seed)
                model = wrap(tuner, foreground="given")
                fit(model, FeatureBank.encode(model, train), recipe=stages("coop")["heads"], seed=seed)
                found.setdefault(f"{kind} + FVG-PT", []).append(ranked(model, test, planted))
                model.release()
            tuner.detach()
    return found


def main() -> None:
    """Runs the tasks and writes planted.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(THREE))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    record = {}
    for task in options.tasks:
        record[task] = run_task(task, [int(s) for s in options.seeds.split(",")])
        for name, rows in record[task].items():
            means = {k: round(statistics.fmean(r[k] for r in rows), 2) for k in rows[0] if k != "ranks"}
            print(task, name, [r["ranks"] for r in rows], means, flush=True)
    write_json(options.output / "planted.json", record)


if __name__ == "__main__":
    main()
