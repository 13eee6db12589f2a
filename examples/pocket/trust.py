"""What FVG-PT makes of good and bad masks, on CoOp: base / new / HM and the trust r, by where the masks come from.

    python -m examples.pocket.trust [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

The same tuned prompts and pictures, with true masks, with a share of them shuffled, with random boxes, and with masks
from the CLIP's own attention. The gate is asked afterwards, for every training picture, how far it trusts the mask:
AUROC of r for right against wrong masks, beside the AUROC that its own target r* would give.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics.functional.classification import binary_auroc

from examples.pocket.causes import split_of
from examples.pocket.results import MEASURED
from examples.pocket.suite import PICTURES, SETTINGS, THREE, pocket_clip, stages, write_json
from examples.pocket.tasks import write_task
from fvg_adapter import FeatureBank, FVGConfig, evaluate, wrap
from fvg_adapter import losses as L
from fvg_adapter.data.controls import OtherMasks
from fvg_adapter.foreground import attention_mask_from_map
from fvg_adapter.train import fit
from fvg_adapter.tuners import CoOp

RIGHT_IOU = 0.5
"""A mask that overlaps the true one at least so far counts as right."""


class Boxes(Dataset[dict[str, Any]]):
    """Every picture with a random box as its mask."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self.classes, self.labels = dataset, seed, dataset.classes, dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        height, width = torch.randint(12, 41, (2,), generator=generator).tolist()
        item = self.dataset[index]
        mask = torch.zeros_like(item["foreground_mask"])
        top = int(torch.randint(mask.shape[-2] - height + 1, (), generator=generator))
        left = int(torch.randint(mask.shape[-1] - width + 1, (), generator=generator))
        mask[..., top : top + height, left : left + width] = 1
        return {**item, "foreground_mask": mask}


class WithAttention(Dataset[dict[str, Any]]):
    """Every picture with a mask from the CLIP's attention in some layers, as `foreground="attention"` makes it."""

    def __init__(self, dataset: Any, tuner: CoOp, layers: tuple[int, ...]) -> None:
        self.dataset, self.tuner, self.layers = dataset, tuner, layers
        self.classes, self.labels = dataset.classes, dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from fvg_adapter import record_attention

        item = self.dataset[index]
        pixels = item["pixel_values"].unsqueeze(0)
        with torch.no_grad(), record_attention(self.tuner, layers=list(self.layers)) as record:
            self.tuner.image_features(pixels)
        mask = attention_mask_from_map(record.attention().mean((1, 2)), pixels.shape[-2:])
        return {**item, "foreground_mask": mask[0]}


@dataclass(frozen=True)
class Masks:
    """One source of masks: a data set and which of its masks are wrong on purpose (None: decided by their IoU)."""

    pictures: Any
    wrong: Tensor | None = None


def sources(train: Any, tuner: CoOp, seed: int) -> dict[str, Masks]:
    """The sources compared, by name."""
    quarter, half = OtherMasks(train, seed, 0.25), OtherMasks(train, seed, 0.5)

    def chosen(data: OtherMasks) -> Tensor:
        return torch.tensor([i in data.other for i in range(len(train))])

    return {
        "true masks": Masks(train),
        "25 % of them shuffled": Masks(quarter, chosen(quarter)),
        "50 % of them shuffled": Masks(half, chosen(half)),
        "all shuffled": Masks(OtherMasks(train, seed)),
        "random boxes": Masks(Boxes(train, seed)),
        "attention, layer −1": Masks(WithAttention(train, tuner, (-1,))),
        "attention, layer −2": Masks(WithAttention(train, tuner, (-2,))),
    }


def overlap(pictures: Any, truth: Any) -> Tensor:
    """IoU (N,) of a source's masks with the true ones, on one fixed augmentation each."""
    found = []
    for index in range(len(truth)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            true = truth[index]["foreground_mask"] > 0.5
            torch.manual_seed(index)
            mask = pictures[index]["foreground_mask"] > 0.5
        union = (mask | true).sum().clamp_min(1)
        found.append((mask & true).sum() / union)
    return torch.stack(found)


@torch.no_grad()
def asked(model: Any, bank: FeatureBank) -> tuple[Tensor, Tensor]:
    """The trust r and its target r* of every picture, over the bank's views: (N, K) each."""
    labels = torch.tensor(bank.labels)
    trust, target = [], []
    for view in range(bank.views):
        features = {k: v[:, view] for k, v in bank.features.items()}
        trust.append(model(features=features, labels=labels).foreground_trust)
        text = model.tuner.text_features()
        full, fg = (model.tuner.scores(features[k], text) for k in ("image", "foreground"))
        target.append(L.reliability_target(fg, full, labels, model.config.reliability_margin))
    return torch.stack(trust, 1), torch.stack(target, 1)


def gate_figures(model: Any, bank: FeatureBank, wrong: Tensor | None) -> dict[str, float]:
    """Mean r, of right and of wrong masks, and how well r and r* tell them apart."""
    model.eval()
    trust, target = asked(model, bank)
    figures = {"mean r": float(trust.mean())}
    if wrong is None or not bool(wrong.any()) or bool(wrong.all()):
        return figures
    right = (~wrong).long().unsqueeze(1).expand_as(trust).reshape(-1)
    return figures | {
        "r, right masks": float(trust[~wrong].mean()),
        "r, wrong masks": float(trust[wrong].mean()),
        "AUROC of r": float(binary_auroc(trust.reshape(-1), right)),
        "AUROC of r*": float(binary_auroc(target.reshape(-1), right)),
    }


def run_task(task: str, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """{source: {figure: [a value a seed]}} on the test set with random backgrounds."""
    clip, tokenizer = pocket_clip()
    data = PICTURES.with_name("pocket_true_masks") / task
    if not (data / "classes.txt").exists():
        write_task(task, data, true_masks=True)
    found: dict[str, dict[str, list[float]]] = {}
    tests: Any = None
    for seed in seeds:
        split = split_of(data, seed)
        torch.manual_seed(seed)
        tuner = CoOp(clip, tokenizer, split.base_classes, **SETTINGS["coop"].options)
        tests = tests or tuple(FeatureBank.encode(tuner, s) for s in split.tests["test"])
        whole = FeatureBank.encode(tuner, split.train, views=4, seed=seed)
        fit(tuner, whole, recipe=stages("coop")["tune"], seed=seed)
        for name, masks in sources(split.train, tuner, seed).items():
            bank = FeatureBank.encode(tuner, masks.pictures, views=4, seed=seed)
            iou = overlap(masks.pictures, split.train)
            wrong = masks.wrong if masks.wrong is not None else iou < RIGHT_IOU
            torch.manual_seed(seed)
            model = wrap(tuner, config=FVGConfig(), foreground="given")
            fit(model, bank, recipe=stages("coop")["heads"], seed=seed)
            scored = evaluate(model, *tests)
            figures = {m: scored[m] for m in ("base", "new", "hm", "joint_hm")} | {"IoU": float(iou.mean())}
            for figure, value in (figures | gate_figures(model, bank, wrong)).items():
                found.setdefault(name, {}).setdefault(figure, []).append(value)
            model.release()
        tuner.detach()
    return found


def main() -> None:
    """Runs the tasks and writes trust.json."""
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
    write_json(options.output / "trust.json", record)


if __name__ == "__main__":
    main()
