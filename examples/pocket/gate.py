"""Why the trust r hardly tells right masks from wrong ones here: what is asked, of which pictures, and for how long.

    python -m examples.pocket.gate [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

Behind CoOp, with a quarter of the training masks wrong (shuffled, or random boxes), the same figures are asked of the
training pictures, whose backgrounds CoOp has learned, and of test pictures with random backgrounds, a quarter of whose
masks is wrong too. Beside the gate as it is trained: one whose gradient is thirty times as large, one of the same shape
and cues fitted to its target r* until it changes no more, and one fitted to right against wrong itself, as a bound of
what three cues can tell.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from examples.pocket.causes import split_of
from examples.pocket.results import MEASURED
from examples.pocket.suite import PICTURES, SETTINGS, THREE, pocket_clip, stages, write_json
from examples.pocket.tasks import write_task
from examples.pocket.trust import Boxes
from fvg_adapter import FeatureBank, FVGConfig, evaluate, wrap
from fvg_adapter import losses as L
from fvg_adapter.data.controls import OtherMasks
from fvg_adapter.heads import ReliabilityGate
from fvg_adapter.train import fit
from fvg_adapter.tuners import CoOp

SHARE, FASTER, STEPS = 0.25, 30.0, 1500
SOURCES = ("25 % shuffled", "25 % random boxes")
ASKED = {"training": "asked of training pictures", "test": "asked of test pictures"}


class SomeBoxes(torch.utils.data.Dataset[dict[str, Any]]):
    """A share of the pictures with a random box as mask; `other` names them, as in `OtherMasks`."""

    def __init__(self, dataset: Any, seed: int, share: float) -> None:
        self.dataset, self.boxes = dataset, Boxes(dataset, seed)
        self.classes, self.labels = dataset.classes, dataset.labels
        self.other = OtherMasks(dataset, seed, share).other

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = (self.boxes if index in self.other else self.dataset)[index]
        return item


def spoiled(source: str, dataset: Any, seed: int) -> Any:
    """The data set with a quarter of its masks wrong."""
    return (OtherMasks if source == SOURCES[0] else SomeBoxes)(dataset, seed, SHARE)


class Asked:
    """Cues, target and truth of every picture and view of a bank: (N · K, …)."""

    def __init__(self, model: Any, pictures: Any, bank: FeatureBank) -> None:
        wrong = torch.tensor([i in pictures.other for i in range(len(pictures))])
        labels, text = torch.tensor(bank.labels).repeat_interleave(bank.views), model.tuner.text_features()
        with torch.no_grad():
            full, view = (
                model.tuner.scores(bank.features[name].flatten(0, 1), text) for name in ("image", "foreground")
            )
        config = model.config
        self.cues = L.foreground_cues(full, view, bank.features["mask_area"].flatten(), config.temperature)
        self.target = L.reliability_target(view, full, labels, config.reliability_margin)
        self.right = (~wrong).repeat_interleave(bank.views)
        self.accuracy = 100 * float((full.argmax(-1) == labels).float().mean())

    def auroc(self, trust: Tensor) -> float:
        """Of a trust for right against wrong masks."""
        return float(binary_auroc(trust, self.right.long()))


def fitted(asked: Asked, truth: Tensor) -> ReliabilityGate:
    """A gate of the method's shape, fitted to a truth for long."""
    torch.manual_seed(0)
    gate = ReliabilityGate()
    optimizer = torch.optim.Adam(gate.parameters(), 0.01)
    for _ in range(STEPS):
        loss = F.binary_cross_entropy_with_logits(gate(asked.cues), truth.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gate


def trained(tuner: CoOp, bank: FeatureBank, seed: int, faster: float) -> Any:
    """The heads as everywhere, but for the gradient of the foreground gate."""
    torch.manual_seed(seed)
    model = wrap(tuner, config=FVGConfig(), foreground="given")
    hooks = [p.register_hook(lambda g: faster * g) for p in model.foreground_gate.parameters()]
    fit(model, bank, recipe=stages("coop")["heads"], seed=seed)
    for hook in hooks:
        hook.remove()
    return model


def run_task(task: str, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """{source and pictures asked: {figure: [a value a seed]}}."""
    clip, tokenizer = pocket_clip()
    data = PICTURES.with_name("pocket_true_masks") / task
    if not (data / "classes.txt").exists():
        write_task(task, data, true_masks=True)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        split = split_of(data, seed)
        torch.manual_seed(seed)
        tuner = CoOp(clip, tokenizer, split.base_classes, **SETTINGS["coop"].options)
        fit(tuner, FeatureBank.encode(tuner, split.train, views=4, seed=seed), recipe=stages("coop")["tune"], seed=seed)
        tests = tuple(FeatureBank.encode(tuner, s) for s in split.tests["test"])
        for source in SOURCES:
            pictures = {"training": spoiled(source, split.train, seed)}
            pictures["test"] = spoiled(source, split.tests["test"][0], seed)
            banks = {
                k: FeatureBank.encode(tuner, v, views=4 if k == "training" else 1, seed=seed)
                for k, v in pictures.items()
            }
            models = {each: trained(tuner, banks["training"], seed, each) for each in (1.0, FASTER)}
            base = {each: evaluate(model, *tests)["base"] for each, model in models.items()}
            asked = {k: Asked(models[1.0], pictures[k], banks[k]) for k in banks}
            gates = {"converged on r*": asked["training"].target, "told right from wrong": asked["training"].right}
            more = {name: fitted(asked["training"], truth) for name, truth in gates.items()}
            for where, each in asked.items():
                with torch.no_grad():
                    r = {f: torch.sigmoid(m.foreground_gate(each.cues)) for f, m in models.items()}
                    figures = {
                        "CoOp right, %": each.accuracy,
                        "r*, right masks": float(each.target[each.right].mean()),
                        "r*, wrong masks": float(each.target[~each.right].mean()),
                        "r, right masks": float(r[1.0][each.right].mean()),
                        "r, wrong masks": float(r[1.0][~each.right].mean()),
                        "AUROC of r*": each.auroc(each.target),
                        "AUROC of r": each.auroc(r[1.0]),
                        f"AUROC, gate's gradient × {FASTER:.0f}": each.auroc(r[FASTER]),
                        **{f"AUROC, {n}": each.auroc(torch.sigmoid(g(each.cues))) for n, g in more.items()},
                        "base": base[1.0],
                        f"base, gate's gradient × {FASTER:.0f}": base[FASTER],
                    }
                rows = found.setdefault(f"{source}, {ASKED[where]}", {})
                for name, value in figures.items():
                    rows.setdefault(name, []).append(round(value, 4))
            for model in models.values():
                model.release()
        tuner.detach()
    return found


def main() -> None:
    """Runs the tasks and writes gate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(THREE))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    record = {}
    for task in options.tasks:
        record[task] = run_task(task, [int(s) for s in options.seeds.split(",")])
        for name, figures in record[task].items():
            print(task, name, {k: round(statistics.fmean(v), 2) for k, v in figures.items()}, flush=True)
        write_json(options.output / "gate.json", record)


if __name__ == "__main__":
    main()
