"""The heads trained from a bank of four views against heads trained in the loop, with a new augmentation every time.

    python -m examples.pocket.loop_or_bank [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

Same tuned prompts, same recipe; what differs is whether an epoch sees one of four stored views or a view of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.pocket.causes import split_of, tuned
from examples.pocket.results import MEASURED
from examples.pocket.suite import data_of, pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig, evaluate, wrap
from fvg_adapter.train import fit

TASKS = ("fruit_vegetables",)
METRICS = ("base", "new", "hm", "joint_hm")


def run_task(task: str, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """{"bank" | "loop": {metric or "seconds": [a value a seed]}}; seconds include encoding the bank."""
    clip, tokenizer = pocket_clip()
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        split = split_of(data_of(task), seed)
        tuner, _ = tuned("coop", clip, tokenizer, split, seed)
        tests: Any = tuple(FeatureBank.encode(tuner, s) for s in split.tests["test"])
        for way in ("bank", "loop"):
            start = time.monotonic()
            bank = FeatureBank.encode(tuner, split.train, views=4, seed=seed) if way == "bank" else None
            torch.manual_seed(seed)
            model = wrap(tuner, config=FVGConfig(), foreground="given")
            fit(model, split.train if bank is None else bank, recipe=stages("coop")["heads"], seed=seed)
            seconds = time.monotonic() - start
            figures = evaluate(model, *tests)
            for name, value in {**{m: figures[m] for m in METRICS}, "seconds": seconds}.items():
                found.setdefault(way, {}).setdefault(name, []).append(round(value, 2))
            model.release()
        tuner.detach()
    return found


def main() -> None:
    """Runs the tasks and writes loop_or_bank.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    record = {task: run_task(task, [int(s) for s in options.seeds.split(",")]) for task in options.tasks}
    write_json(options.output / "loop_or_bank.json", record)
    for task, ways in record.items():
        for way, figures in ways.items():
            shown = {k: f"{statistics.fmean(v):.1f} ± {statistics.stdev(v):.1f}" for k, v in figures.items()}
            print(task, way, shown)


if __name__ == "__main__":
    main()
