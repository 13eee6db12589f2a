"""docs/results.md by one command: nine tasks, both test sets, every control beside every gain.

    python -m examples.pocket.results [--tasks NAME …] [--seeds 1,2,3] [--processes 2] [--output output/results]

Each task is tuned once a seed and scored on `test` (random backgrounds), `test_swapped` (another class's training
backgrounds) and `test_home` (the training backgrounds again). A task's figures lie in OUTPUT/<task>.json; what is there
is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "results.md"
SPLITS = {
    "test": "random backgrounds",
    "test_swapped": "backgrounds swapped between classes",
    "test_home": "the training backgrounds again, as in an ordinary benchmark",
}
TUNE = {"lr": 0.05, "epochs": 20, "batch_size": 32}  # the frozen recipe of pocket/README.md
CROP = (0.5, 1.0)
"""At 64 pixels a crop of 8 % holds no object: with Dassl's (0.08, 1) CoOp alone loses 3 to 7 points of base accuracy on
fruit_vegetables and mammals; chosen on CoOp, before FVG-PT was run on the final model."""
TUNER_OPTIONS = {"n_ctx": 4, "ctx_init": "a photo of a"}
FULL = "coop+fvg"
ROWS = {
    "clip": "CLIP",
    "coop": "CoOp",
    f"{FULL} [FDC only]": "+ FDC only (r = 1)",
    f"{FULL} [FRG+FDC]": "+ FRG + FDC",
    f"{FULL} [PC only]": "+ PC only",
    f"{FULL} [FDC+PC]": "+ FDC + PC (r = 1)",
    FULL: "**+ FVG-PT (all)**",
    f"{FULL} [x_fg=x]": "control: x_fg = x",
    f"{FULL} [lambda_d=0]": "control: λ_d = 0",
    f"{FULL} [shuffled masks]": "control: shuffled masks",
}
INTRODUCTION = """\
Made by `python -m examples.pocket.results`; do not edit by hand. The pocket suite is a test bench, not a claim about
natural images. {tasks} tasks, seeds {seeds}, 16 shots a base class, four augmented views from a FeatureBank.
CoOp: "a photo of a", SGD {lr}, {epochs} epochs, batch {batch_size}. FVG-PT: METHOD's settings (SGD 0.0035, batch 4,
10 epochs, λ_d = 10). Crops keep at least half of the picture in both stages. A
quarter of the training masks is a random box on purpose.

Accuracies are percent: mean ± standard deviation over seeds of the average over tasks. D_fg = KL(p_full ‖ p_fg) in nats
with true masks, beside the mean entropy, since a flatter softmax lowers it for nothing. ECE in percent."""
METRICS = ("base", "new", "hm", "joint_base", "joint_new", "joint_hm", "d_fg", "entropy", "ece")


def run_task(task: str, seeds: list[int], output: Path, threads: int) -> str:
    """One task: all rows, seeds and test sets, into OUTPUT/<task>.json."""
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    from examples.pocket.tasks import write_task
    from fvg_adapter.protocols import base_to_new
    from fvg_adapter.tuners.recipes import RECIPES

    torch.set_num_threads(threads)
    target = output / f"{task}.json"
    if target.exists():
        return f"{task}: there already"
    data = output / "data" / task
    if not (data / "classes.txt").exists():
        write_task(task, data)
    results = base_to_new(
        CLIPModel.from_pretrained(HERE / "model"),
        CLIPTokenizer.from_pretrained(HERE / "model"),
        data,
        tuner="coop",
        tuner_options=TUNER_OPTIONS,
        tune=dataclasses.replace(RECIPES["coop"].tune, **TUNE, crop_scale=CROP),
        heads=dataclasses.replace(RECIPES["coop"].fvg, crop_scale=CROP),
        seeds=seeds,
        test_split="test",
        also_test=tuple(SPLITS)[1:],
        ablation=True,
    )
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(results.to_json(), indent=1))
    temporary.replace(target)
    return f"{task}: {results.seconds:.0f} s"


# -- tables ------------------------------------------------------------------------------------------------------------


def gather(output: Path, tasks: list[str]) -> dict[str, dict[str, dict[str, dict[str, list[float]]]]]:
    """{split: {row: {metric: {task: [a value a seed]}}}}."""
    found: dict[str, Any] = {split: {row: {m: {} for m in METRICS} for row in ROWS} for split in SPLITS}
    for task in tasks:
        record = json.loads((output / f"{task}.json").read_text())
        for split, row, metric in itertools.product(SPLITS, ROWS, METRICS):
            rows = record if split == "test" else record["also"][split]
            found[split][row][metric][task] = rows[row][metric]
    return found


def average(by_task: dict[str, list[float]]) -> tuple[float, float]:
    """Mean over tasks and seeds, and the standard deviation over seeds of the average over tasks."""
    per_seed = [statistics.fmean(values) for values in zip(*by_task.values(), strict=True)]
    return statistics.fmean(per_seed), statistics.stdev(per_seed) if len(per_seed) > 1 else 0.0


def paired(one: dict[str, list[float]], other: dict[str, list[float]]) -> tuple[float, float, float, int]:
    """Mean and standard deviation over tasks of the difference (seeds averaged), sign-flip p, and tasks above 0."""
    differences = [statistics.fmean(one[t]) - statistics.fmean(other[t]) for t in one]
    return (
        statistics.fmean(differences),
        statistics.stdev(differences) if len(differences) > 1 else 0.0,
        sign_flip(differences),
        sum(d > 0 for d in differences),
    )


def sign_flip(differences: list[float]) -> float:
    """Exact two-sided p: the share of all sign patterns whose mean is at least as far from 0."""
    observed = abs(sum(differences)) - 1e-12
    flips = itertools.product((1, -1), repeat=len(differences))
    return statistics.fmean(abs(sum(s * d for s, d in zip(f, differences, strict=True))) >= observed for f in flips)


def main_table(rows: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    """Averages with the spread over seeds."""
    columns = {
        "base": "base",
        "new": "new",
        "hm": "HM",
        "joint_hm": "joint HM",
        "d_fg": "D_fg",
        "entropy": "entropy",
        "ece": "ECE",
    }
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for row, name in ROWS.items():
        cells = []
        for metric in columns:
            mean, spread = average(rows[row][metric])
            cells.append(f"{mean:.2f}" if metric in ("d_fg", "entropy", "ece") else f"{mean:.1f} ± {spread:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


DIFFERENCES = [
    ("tuning prompts: CoOp − CLIP", "coop", "clip"),
    ("FVG-PT − CoOp", FULL, "coop"),
    ("**foreground effect: true masks − x_fg = x**", FULL, f"{FULL} [x_fg=x]"),
    ("true masks − shuffled masks", FULL, f"{FULL} [shuffled masks]"),
    ("distillation: λ_d = 10 − λ_d = 0", FULL, f"{FULL} [lambda_d=0]"),
    ("the gate: all − (FDC + PC, r = 1)", FULL, f"{FULL} [FDC+PC]"),
    ("PC on new classes: PC only − CoOp", f"{FULL} [PC only]", "coop"),
    ("FDC used for new classes: FRG + FDC − CoOp", f"{FULL} [FRG+FDC]", "coop"),
]


def difference_table(rows: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    """Paired differences over tasks."""
    metrics = {"base": "base", "new": "new", "hm": "HM", "joint_hm": "joint HM"}
    lines = ["| difference | " + " | ".join(metrics.values()) + " |", "|---|" + "---:|" * len(metrics)]
    for name, one, other in DIFFERENCES:
        cells = []
        for metric in metrics:
            mean, spread, p, above = paired(rows[one][metric], rows[other][metric])
            cells.append(f"{mean:+.2f} ± {spread:.2f} ({above}/{len(rows[one][metric])}, p {p:.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def task_table(rows: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    """Base / new of the main rows, task by task."""
    shown = ["clip", "coop", FULL, f"{FULL} [x_fg=x]"]
    lines = ["| task | " + " | ".join(ROWS[r].strip("*") for r in shown) + " |", "|---|" + "---:|" * len(shown)]
    for task in rows["clip"]["base"]:
        cells = [
            f"{statistics.fmean(rows[r]['base'][task]):.1f} / {statistics.fmean(rows[r]['new'][task]):.1f}"
            for r in shown
        ]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return lines


def causes_table(record: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    """What `examples.pocket.causes` found, averaged over its tasks and seeds."""
    variants = next(iter(record.values()))
    metrics = list(next(iter(variants.values())))
    lines = [f"## What moves the figures ({', '.join(record)}; `python -m examples.pocket.causes`)", ""]
    lines += ["| | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
    for name in variants:
        means = [statistics.fmean(v for task in record.values() for v in task[name][m]) for m in metrics]
        lines.append(f"| {name} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
    return lines


def page(output: Path, tasks: list[str], seeds: list[int]) -> str:
    """The whole page: preconditions, tables, and the remarks kept beside this script."""
    found = gather(output, tasks)
    preconditions = json.loads((HERE / "preconditions.json").read_text())
    shown = {k: v for k, v in preconditions.items() if k != "tasks"}
    introduction = INTRODUCTION.format(tasks=len(tasks), seeds=", ".join(map(str, seeds)), **TUNE)
    parts = [
        "# Results on the pocket suite",
        "",
        introduction,
        "",
        "## Preconditions, measured before any FVG-PT was run",
    ]
    parts += ["", "```json", json.dumps(shown, indent=1, ensure_ascii=False), "```"]
    for split, title in SPLITS.items():
        rows = found[split]
        parts += ["", f"## Test set: {title} (`{split}`)", "", *main_table(rows), ""]
        parts += [
            "Paired over tasks (seeds averaged): mean ± standard deviation over tasks (tasks above 0, exact "
            "sign-flip p).",
            "",
        ]
        parts += [*difference_table(rows), "", "Base / new, task by task:", "", *task_table(rows)]
    if (output / "causes.json").exists():
        parts += ["", *causes_table(json.loads((output / "causes.json").read_text()))]
    remarks = HERE / "results_remarks.md"
    if remarks.exists():
        parts += ["", remarks.read_text().rstrip()]
    return "\n".join(parts) + "\n"


def main() -> None:
    from examples.pocket.concepts import TASKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/results"))
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        jobs = [pool.submit(run_task, t, seeds, options.output, 1) for t in options.tasks]
        for job in jobs:
            print(job.result(), file=sys.stderr, flush=True)
    options.page.write_text(page(options.output, options.tasks, seeds))
    print(f"{options.page} written in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
