"""Tables of a protocol in the paper's shape, from the tidy figures alone, with the paper's figures beside ours."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fvg_adapter.data import ELEVEN
from fvg_adapter.evaluation import harmonic_mean
from fvg_adapter.replacing import written
from fvg_adapter.reproduce import paper
from fvg_adapter.reproduce.statistics import average, paired
from fvg_adapter.reproduce.tidy import COST, Figure
from fvg_adapter.reproduce.units import Plan

Values = dict[str, list[float]]
"""{task: [a value a seed]}"""

SHOWN = {
    "clip": "CLIP",
    "alone": "{}",
    "fvg": "**{} + FVG-PT**",
    "fvg [x_fg=x]": "control: x_fg = x",
    "fvg [lambda_d=0]": "control: λ_d = 0",
    "fvg [shuffled masks]": "control: shuffled masks",
}
"""Rows of every table by what they are called there, {} the tuner."""

STEPS = {
    "fvg [FDC only]": "+ FDC only (r = 1)",
    "fvg [PC only]": "+ PC only",
    "fvg [FRG+FDC]": "+ FRG + FDC",
    "fvg [FDC+PC]": "+ FDC + PC (r = 1)",
    "fvg [lambda_d=1]": "λ_d = 1",
    "fvg [lambda_d=50]": "λ_d = 50",
    "fvg [width=16]": "adapters of width 16",
    "fvg [width=32]": "adapters of width 32",
    "fvg [width=128]": "adapters of width 128",
}
"""Further rows of the ablation."""

HONEST = {
    "joint_hm": "joint HM",
    "ece": "ECE",
    "joint_ece": "joint ECE",
    "worst_class": "worst class",
    "worst_group": "worst class × test set",
    "d_fg": "D_fg",
    "entropy": "entropy",
}
"""Metrics beyond the paper's: the columns of the second table."""

DIFFERENCES = {
    "FVG-PT − tuner": ("fvg", "alone"),
    "foreground effect: true masks − x_fg = x": ("fvg", "fvg [x_fg=x]"),
    "distillation: with it − λ_d = 0": ("fvg", "fvg [lambda_d=0]"),
    "true masks − shuffled masks": ("fvg", "fvg [shuffled masks]"),
}
"""Paired differences of every table: (row, other row)."""


class Gathered:
    """Figures by tuner, row, metric and task, of one test split; tasks without all seeds are left out and named.

    Args:
        figures: tidy figures of one protocol. seeds: that a task must have. split: which pictures.
    """

    def __init__(self, figures: Iterable[Figure], seeds: Sequence[int], split: str = "test") -> None:
        figures = list(figures)
        self.seeds: tuple[int, ...] = tuple(seeds)
        self.preset: str = figures[0].preset if figures else Figure.preset
        self._values: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
        for figure in figures:
            if figure.split == split:
                key = (figure.tuner, figure.row, figure.metric)
                self._values.setdefault(key, {}).setdefault(figure.dataset, {})[figure.seed] = figure.value

    def values(self, tuner: str, row: str, metric: str, tasks: Iterable[str] | None = None) -> Values:
        """{task: [a value a seed]} of tasks with all seeds and finite values, in the order of `tasks`."""
        found = self._values.get((tuner, row, metric), {})
        whole = {
            task: [by_seed[seed] for seed in self.seeds]
            for task, by_seed in found.items()
            if all(seed in by_seed and math.isfinite(by_seed[seed]) for seed in self.seeds)
        }
        return whole if tasks is None else {task: whole[task] for task in tasks if task in whole}

    def mean(self, tuner: str, row: str, metric: str, tasks: Iterable[str]) -> float | None:
        """Mean over tasks and seeds; None where a task is missing."""
        tasks = list(tasks)
        found = self.values(tuner, row, metric, tasks)
        return average(found)[0] if tasks and len(found) == len(tasks) else None


def write_tables(path: str | os.PathLike[str], plan: Plan, figures: Sequence[Figure]) -> Path:
    """Writes the tables of a plan as Markdown, all or nothing; returns the file.

    Raises:
        FVGError: it cannot be written; what was there is unchanged.
    """
    target = Path(path)
    with written(target) as file:
        file.write_text(tables_of(plan, figures), encoding="utf-8")
    return target


def tables_of(plan: Plan, figures: Sequence[Figure]) -> str:
    """All tables of a plan's protocol, as Markdown."""
    makers: dict[str, Callable[[Plan, Sequence[Figure]], list[str]]] = {
        "base-to-new": _base_to_new,
        "ablation": _ablation,
        "few-shot": _few_shot,
        "cross-dataset": _cross_dataset,
    }
    seeds = ", ".join(map(str, plan.seeds))
    missing = [unit.name for unit in plan.units() if not plan.file(unit).exists()]
    parts = [f"# {plan.protocol}, suite {plan.suite.name}", ""]
    parts += [
        f"Base model {plan.model}; seeds {seeds}; {', '.join(map(str, plan.shots))} shots. Accuracies in percent.",
        "",
    ]
    if plan.config.preset != "paper":
        parts += [f"FVG-PT with the preset {plan.config.preset} (docs/plus.md), not with the paper's settings.", ""]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        parts += [f"**{len(missing)} of {len(plan.units())} units have not been run:** {shown}.", ""]
    parts += makers[plan.protocol](plan, figures)
    return "\n".join([*parts, *cost_table(plan, figures)]).rstrip() + "\n"


# -- protocols ---------------------------------------------------------------------------------------------------------


def _base_to_new(plan: Plan, figures: Sequence[Figure]) -> list[str]:
    parts: list[str] = []
    for split, what in {"test": "", **plan.suite.also_test}.items():
        found = Gathered(figures, plan.seeds, split)
        for tuner in plan.tuners:
            tasks = _whole(plan, found, tuner, "hm")
            if not tasks:
                continue
            name = plan.suite.title(tuner)
            parts += [f"## {name}: {_over(tasks)}{f', {what} (`{split}`)' if what else ''}", ""]
            parts += [*averages(plan, found, tuner, tasks, compare=split == "test"), ""]
            parts += [*honest(found, tuner, name, tasks), "", *differences(found, tuner, tasks), ""]
            parts += [
                "Base / new / HM, data set by data set, seeds averaged:",
                "",
                *by_task(found, tuner, name, tasks),
                "",
            ]
    return parts


def averages(plan: Plan, found: Gathered, tuner: str, tasks: Sequence[str], *, compare: bool) -> list[str]:
    """Average base, new and HM; HM is of the averages, as in the paper, whose figure stands beside it."""
    columns = ["base", "new", "HM"] + (["HM in the paper", "difference"] if compare else [])
    lines = header("", columns)
    for row, name in _rows(found, tuner, plan.suite.title(tuner), tasks, "hm").items():
        pairs = [average(found.values(tuner, row, metric, tasks)) for metric in ("base", "new")]
        hm = harmonic_mean(pairs[0][0], pairs[1][0])
        cells = [_spread(*pair) for pair in pairs] + [f"{hm:.2f}"]
        if compare:
            theirs = _of_paper(paper.HM, tuner, row)
            cells += _beside(hm, theirs, comparable(plan, tasks))
        lines.append(line(name, cells))
    return lines


def honest(found: Gathered, tuner: str, name: str, tasks: Sequence[str]) -> list[str]:
    """What the paper does not give: joint accuracy, calibration, the worst class and group, D_fg with the entropy."""
    columns = {m: title for m, title in HONEST.items() if len(found.values(tuner, "fvg", m, tasks)) == len(tasks)}
    lines = header("", list(columns.values()))
    for row, shown in _rows(found, tuner, name, tasks, "hm").items():
        means = [found.mean(tuner, row, metric, tasks) for metric in columns]
        lines.append(line(shown, ["–" if mean is None else f"{mean:.2f}" for mean in means]))
    return lines


def differences(
    found: Gathered, tuner: str, tasks: Sequence[str], metrics: Sequence[str] = ("base", "new", "hm", "joint_hm")
) -> list[str]:
    """Paired differences over tasks with the exact sign-flip test."""
    lines = header("difference over tasks (tasks above 0, sign-flip p)", list(metrics))
    for name, (row, other) in DIFFERENCES.items():
        cells = []
        for metric in metrics:
            one, two = found.values(tuner, row, metric, tasks), found.values(tuner, other, metric, tasks)
            if set(one) != set(tasks) or set(two) != set(tasks):
                break
            mean, spread, p, above = paired(one, two)
            cells.append(f"{mean:+.2f} ± {spread:.2f} ({above}/{len(tasks)}, p {p:.3f})")
        if len(cells) == len(metrics):
            lines.append(line(name, cells))
    return lines


def by_task(found: Gathered, tuner: str, name: str, tasks: Sequence[str]) -> list[str]:
    """The paper's table 1: base / new / HM of each data set."""
    rows = _rows(found, tuner, name, tasks, "hm")
    lines = header("data set", [shown.strip("*") for shown in rows.values()])
    for task in tasks:
        cells = []
        for row in rows:
            values = [statistics.fmean(found.values(tuner, row, m, [task])[task]) for m in ("base", "new", "hm")]
            cells.append(" / ".join(f"{value:.1f}" for value in values))
        lines.append(line(task, cells))
    return lines


def _ablation(plan: Plan, figures: Sequence[Figure]) -> list[str]:
    parts: list[str] = []
    found = Gathered(figures, plan.seeds)
    for tuner in plan.tuners:
        tasks = _whole(plan, found, tuner, "hm")
        if not tasks:
            continue
        name = plan.suite.title(tuner)
        lines = header("", ["base", "new", "HM", "base / new in the paper", "HM in the paper", "difference"])
        shown = {"clip": SHOWN["clip"], "alone": SHOWN["alone"], **STEPS}
        shown |= {row: text for row, text in SHOWN.items() if row not in shown}
        for row, text in shown.items():
            if len(found.values(tuner, row, "hm", tasks)) < len(tasks):
                continue
            base, new = (average(found.values(tuner, row, metric, tasks)) for metric in ("base", "new"))
            hm = harmonic_mean(base[0], new[0])
            theirs = paper.ABLATION.get(row) if tuner == "coop" else None
            both = "" if theirs is None else f"{theirs[0]:.2f} / {theirs[1]:.2f}"
            their_hm = paper.SWEEPS.get(row) if tuner == "coop" else None
            if theirs is not None:
                their_hm = harmonic_mean(*theirs)
            cells = [_spread(*base), _spread(*new), f"{hm:.2f}", both]
            lines.append(line(called(text, name, found.preset), cells + _beside(hm, their_hm, comparable(plan, tasks))))
        parts += [f"## {name}: {_over(tasks)}", "", *lines, "", *differences(found, tuner, tasks), ""]
    return parts


def _few_shot(plan: Plan, figures: Sequence[Figure]) -> list[str]:
    parts: list[str] = []
    for tuner in plan.tuners:
        name = plan.suite.title(tuner)
        by_shots = {n: Gathered([f for f in figures if f.shots == n], plan.seeds) for n in plan.shots}
        tasks = [t for t in plan.datasets if all(t in g.values(tuner, "fvg", "accuracy") for g in by_shots.values())]
        if not tasks:
            continue
        lines = header("", [f"{n} shots" for n in plan.shots])
        for row, shown in _rows(by_shots[plan.shots[0]], tuner, name, tasks, "accuracy").items():
            lines.append(
                line(shown, [_spread(*average(g.values(tuner, row, "accuracy", tasks))) for g in by_shots.values()])
            )
        parts += [f"## {name}: {_over(tasks)}, all classes", "", *lines, ""]
        for n, found in by_shots.items():
            parts += [f"{n} shots:", "", *differences(found, tuner, tasks, ("accuracy", "ece", "worst_class")), ""]
    return parts


def _cross_dataset(plan: Plan, figures: Sequence[Figure]) -> list[str]:
    parts: list[str] = []
    for source in plan.datasets:
        found = Gathered([figure for figure in figures if figure.source == source], plan.seeds)
        for tuner in plan.tuners:
            targets = [t for t in plan.targets if t in found.values(tuner, "fvg", "accuracy")]
            if not targets or source not in found.values(tuner, "fvg", "accuracy"):
                continue
            name = plan.suite.title(tuner)
            lines = header("", [source, *targets, "average of targets", "in the paper", "difference"])
            whole = plan.suite.name == "paper" and source == "ImageNet" and set(targets) == set(ELEVEN) - {source}
            for row, shown in _rows(found, tuner, name, [source, *targets], "accuracy").items():
                each = [average(found.values(tuner, row, "accuracy", [t])) for t in (source, *targets)]
                mean = average(found.values(tuner, row, "accuracy", targets))
                theirs = _of_paper(paper.TARGETS, tuner, row)
                cells = [_spread(*pair) for pair in (*each, mean)]
                lines.append(line(shown, cells + _beside(mean[0], theirs, whole)))
            parts += [f"## {name}, tuned on all classes of {source}", "", *lines, ""]
            parts += [*differences(found, tuner, targets, ("accuracy", "ece", "worst_class")), ""]
    return parts


def cost_table(plan: Plan, figures: Sequence[Figure]) -> list[str]:
    """Parameters, speed and memory: the median over units, of the machine that ran them."""
    columns = {
        "parameters": "trainable parameters",
        "train_seconds": "tuning, s",
        "train_images_per_second": "tuning, images/s",
        "inference_images_per_second": "inference, images/s",
        "memory_mb": "peak memory, MB",
    }
    lines = header("", list(columns.values()))
    for tuner in plan.tuners:
        costs = [f for f in figures if f.split == COST and f.tuner == tuner]
        for row in ("clip", "alone", "fvg"):
            cells = []
            for metric in columns:
                values = [f.value for f in costs if f.row == row and f.metric == metric and math.isfinite(f.value)]
                cells.append(f"{statistics.median(values):,.0f}" if values else "–")
            if any(cell != "–" for cell in cells):
                lines.append(line(called(SHOWN[row], plan.suite.title(tuner), plan.config.preset), cells))
    way = f"from a bank of {plan.views} views (tuning: without the image encoder)" if plan.views else "in the loop"
    return ["## Cost", "", f"Median over units, {way}, on the machine that ran them.", "", *lines]


# -- parts -------------------------------------------------------------------------------------------------------------


def header(first: str, columns: Sequence[str]) -> list[str]:
    """The two head lines of a Markdown table."""
    return [f"| {first} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]


def line(name: str, cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {name} | " + " | ".join(cells) + " |"


def called(text: str, tuner: str, preset: str) -> str:
    """A row's name, {} the tuner; FVG-PT with a preset that is not the paper's is named with it."""
    return text.format(tuner).replace("FVG-PT", "FVG-PT" if preset == "paper" else f"FVG-PT ({preset})")


def comparable(plan: Plan, tasks: Sequence[str]) -> bool:
    """Whether an average is of what the paper averages."""
    return plan.suite.name == "paper" and set(tasks) == set(ELEVEN)


def _of_paper(table: Mapping[str, tuple[float, float]], tuner: str, row: str) -> float | None:
    if tuner not in table or row not in ("alone", "fvg"):
        return None
    return table[tuner][("alone", "fvg").index(row)]


def _beside(ours: float, theirs: float | None, same: bool) -> list[str]:
    """The paper's figure, and the difference where both are averages of the same data sets."""
    if theirs is None:
        return ["", ""]
    return [f"{theirs:.2f}", f"{ours - theirs:+.2f}" if same else "other data"]


def _rows(found: Gathered, tuner: str, name: str, tasks: Sequence[str], metric: str) -> dict[str, str]:
    """Rows that have every task, by what they are called."""
    return {
        row: called(text, name, found.preset)
        for row, text in SHOWN.items()
        if len(found.values(tuner, row, metric, tasks)) == len(tasks)
    }


def _whole(plan: Plan, found: Gathered, tuner: str, metric: str) -> list[str]:
    """Tasks that have every seed of the tuner with FVG-PT."""
    return [task for task in plan.datasets if task in found.values(tuner, "fvg", metric)]


def _over(tasks: Sequence[str]) -> str:
    return f"{len(tasks)} data sets" if len(tasks) > 1 else tasks[0]


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.2f} ± {deviation:.2f}"
