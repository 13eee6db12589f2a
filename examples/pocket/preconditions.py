"""Stage 5: is there a background shortcut for FVG-PT to repair? Measured before any FVG-PT is run.

    python -m examples.pocket.preconditions [--model DIR] [--tasks NAME …]

(a) A linear probe reads the background family from frozen image features, on classes that it was not fitted on. (b) A
linear probe and CoOp are tuned on 16 training pictures a base class; their base accuracy is taken with training
backgrounds (home), random ones and another class's (swapped). New classes: CoOp against zero-shot CLIP.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter.tuners import CoOp

from . import backgrounds, concepts, encode, tasks

SHOTS, EPOCHS, BATCH, RATE = 16, 20, 32, 0.05  # CoOp's recipe; the small logit scale needs the large rate
TESTS = ("test_home", "test", "test_swapped")
OUT = concepts.HERE / "preconditions.json"


@dataclass
class Features:
    """Frozen features of one split."""

    image: Tensor  # (N, 128)
    labels: Tensor  # (N,)
    families: Tensor  # (N,)

    def rows(self, keep: Tensor) -> Features:
        return Features(self.image[keep], self.labels[keep], self.families[keep])


def encode_task(model: Any, task: str) -> dict[str, Features]:
    """Features of the four splits, and of the foreground views of `test` (key `foreground`)."""
    out = {}
    for split in tasks.PER_CLASS:
        done = tasks.compose_split(task, split)
        labels, families = torch.from_numpy(done.labels), torch.from_numpy(done.families)
        out[split] = Features(encode.image_features(model, done.pictures), labels, families)
        if split == "test":
            out["foreground"] = Features(encode.image_features(model, done.pictures, done.masks), labels, families)
    return out


def fit_probe(features: Tensor, labels: Tensor, classes: int, steps: int = 300) -> nn.Linear:
    """Multinomial logistic regression on standardised-by-ten unit features, with a little weight decay."""
    torch.manual_seed(0)
    probe = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.03, weight_decay=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(probe(10 * features), labels).backward()
        optimizer.step()
    return probe.requires_grad_(False)


def background_probe(splits: list[Features]) -> dict[str, float]:
    """(a): fitted on the even classes of all tasks' `test` splits, scored on the odd ones."""
    even = [s.rows(s.labels % 2 == 0) for s in splits]
    odd = [s.rows(s.labels % 2 == 1) for s in splits]
    families = len(backgrounds.NAMES)
    probe = fit_probe(torch.cat([s.image for s in even]), torch.cat([s.families for s in even]), families)
    score = encode.accuracy(probe(10 * torch.cat([s.image for s in odd])), torch.cat([s.families for s in odd]))
    return {"accuracy": score, "chance": 100 / families}


def few_shot(train: Features, half: int, seed: int) -> Features:
    """16 pictures of each class drawn over all classes, then the base half."""
    rng = np.random.Generator(np.random.PCG64([seed]))
    chosen = []
    for label in range(int(train.labels.max()) + 1):
        rows = (train.labels == label).nonzero()[:, 0].numpy()
        chosen.append(rng.permutation(rows)[:SHOTS])
    keep = torch.from_numpy(np.concatenate(chosen[:half]))
    return train.rows(keep)


def tune_coop(model: Any, tokenizer: Any, names: list[str], shots: Features, seed: int) -> CoOp:
    """CoOp on cached features: SGD 0.05, momentum 0.9, 20 epochs of batches of 32, cosine with one warm-up epoch."""
    torch.manual_seed(seed)
    tuner = CoOp(model, tokenizer, names)
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    for epoch in range(EPOCHS):
        rate = 1e-5 if epoch == 0 else RATE * (1 + math.cos(math.pi * (epoch - 1) / EPOCHS)) / 2
        optimizer.param_groups[0]["lr"] = rate
        for rows in torch.randperm(len(shots.labels)).split(BATCH):
            optimizer.zero_grad()
            tuner(features={"image": shots.image[rows]}, labels=shots.labels[rows]).loss.backward()
            optimizer.step()
    return tuner


def measure_task(model: Any, tokenizer: Any, task: str, features: dict[str, Features], seed: int) -> dict[str, Any]:
    """Accuracies of zero-shot CLIP, the linear probe and CoOp on the task, in percent."""
    names = tasks.class_names(task)
    half = -(-len(names) // 2)
    base = {k: f.rows(f.labels < half) for k, f in features.items()}
    new = {k: f.rows(f.labels >= half) for k, f in features.items()}
    text = encode.text_features(model, tokenizer, names)  # (C, 128)
    shots = few_shot(features["train"], half, seed)
    probe = fit_probe(shots.image, shots.labels, half)
    coop = tune_coop(model, tokenizer, names[:half], shots, seed)
    with torch.no_grad():
        tuned = coop.text_features()
        with coop.use_classes(names[half:]):
            tuned_new = coop.text_features()
    coop.detach()

    def score(f: Features, weights: Tensor, first: int = 0) -> float:
        return encode.accuracy(f.image @ weights.T, f.labels - first)

    return {
        "classes": len(names),
        "clip_base": {k: score(base[k], text[:half]) for k in (*TESTS, "foreground")},
        "clip_new": {k: score(new[k], text[half:], half) for k in (*TESTS, "foreground")},
        "probe_base": {k: encode.accuracy(probe(10 * base[k].image), base[k].labels) for k in TESTS},
        "coop_base": {k: score(base[k], tuned) for k in TESTS},
        "coop_new": {k: score(new[k], tuned_new, half) for k in TESTS},
    }


def average(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over tasks of every number."""
    return {
        key: {k: sum(r[key][k] for r in rows) / len(rows) for k in value}
        for key, value in rows[0].items()
        if isinstance(value, dict)
    }


def rounded(value: Any) -> Any:
    """Every float to one decimal."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return round(value, 1) if isinstance(value, float) else value


def run(folder: Path = encode.MODEL, names: list[str] | None = None, seed: int = 1) -> dict[str, Any]:
    """Measure the tasks; returns all numbers."""
    model, tokenizer = encode.load_model(folder)
    per_task, tests = {}, []
    for task in names or list(concepts.TASKS):
        features = encode_task(model, task)
        tests.append(features["test"])
        per_task[task] = measure_task(model, tokenizer, task, features, seed)
        print(task, json.dumps(rounded(per_task[task])), flush=True)
    return rounded(
        {
            "logit_scale": model.logit_scale.exp().item(),
            "background_probe": background_probe(tests),
            "average": average(list(per_task.values())),
            "tasks": per_task,
        }
    )


def main() -> None:
    """Measure, print, and write `preconditions.json` when all tasks were measured with the committed model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=encode.MODEL)
    parser.add_argument("--tasks", nargs="+", choices=[*concepts.TASKS])
    arguments = parser.parse_args()
    numbers = run(arguments.model, arguments.tasks)
    print(json.dumps({k: v for k, v in numbers.items() if k != "tasks"}, indent=1))
    if arguments.tasks is None and arguments.model == encode.MODEL:
        OUT.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
