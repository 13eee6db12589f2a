"""The tables of docs/results.md; their arithmetic is `fvg_adapter.reproduce.statistics`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvg_adapter.reproduce.statistics import average, paired
from fvg_adapter.reproduce.tables import header, line

Values = dict[str, list[float]]
"""{task: [a value a seed]}"""
Rows = dict[str, dict[str, Values]]
"""{row: {metric: Values}}"""

METRICS = ("base", "new", "hm", "joint_base", "joint_new", "joint_hm", "d_fg", "entropy", "ece")
SHOWN = {
    "base": "base",
    "new": "new",
    "hm": "HM",
    "joint_hm": "joint HM",
    "d_fg": "D_fg",
    "entropy": "entropy",
    "ece": "ECE",
}
PAIRED = {"base": "base", "new": "new", "hm": "HM", "joint_hm": "joint HM"}


def gather(folder: Path, tasks: Sequence[str], split: str) -> Rows:
    """What OUTPUT/<tuner>/<task>.json say of one test split."""
    found: Rows = {}
    for task in tasks:
        record = json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))
        rows = record["also"].get(split) if split in record["also"] else record
        for row, figures in rows.items():
            if row in ("also", "settings", "cost"):
                continue
            for metric in METRICS:
                found.setdefault(row, {}).setdefault(metric, {})[task] = figures[metric]
    return found


def main_table(rows: Rows, names: Mapping[str, str]) -> list[str]:
    """Averages over tasks with the spread over seeds."""
    return header("", list(SHOWN.values())) + body(rows, names)


def body(rows: Rows, names: Mapping[str, str]) -> list[str]:
    """Lines of `main_table` without its head."""
    lines = []
    for row, name in names.items():
        cells = []
        for metric in SHOWN:
            mean, spread = average(rows[row][metric])
            cells.append(f"{mean:.2f}" if metric in ("d_fg", "entropy", "ece") else f"{mean:.1f} ± {spread:.1f}")
        lines.append(line(name, cells))
    return lines


def difference_table(rows: Rows, differences: Sequence[tuple[str, str, str]]) -> list[str]:
    """Paired differences (name, row, other row) over tasks."""
    return header("difference", list(PAIRED.values())) + difference_lines(rows, differences)


def difference_lines(rows: Rows, differences: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lines of `difference_table` without its head."""
    lines = []
    for name, one, other in differences:
        cells = []
        for metric in PAIRED:
            mean, spread, p, above = paired(rows[one][metric], rows[other][metric])
            cells.append(f"{mean:+.2f} ± {spread:.2f} ({above}/{len(rows[one][metric])}, p {p:.3f})")
        lines.append(line(name, cells))
    return lines


def task_table(rows: Rows, names: Mapping[str, str]) -> list[str]:
    """Base / new of some rows, task by task, seeds averaged."""
    lines = header("task", list(names.values()))
    for task in next(iter(rows.values()))["base"]:
        pairs = [(statistics.fmean(rows[r]["base"][task]), statistics.fmean(rows[r]["new"][task])) for r in names]
        lines.append(line(task, [f"{base:.1f} / {new:.1f}" for base, new in pairs]))
    return lines


def variants_table(record: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> list[str]:
    """{task: {variant: {metric: [a value a seed]}}}, averaged over tasks and seeds."""
    variants = next(iter(record.values()))
    metrics = list(next(iter(variants.values())))
    lines = header("", metrics)
    for name in variants:
        means = [statistics.fmean(v for task in record.values() for v in task[name][m]) for m in metrics]
        lines.append(line(name, [f"{m:.1f}" for m in means]))
    return lines


def trust_table(record: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> list[str]:
    """{task: {source of masks: {figure: [a value a seed]}}}, averaged over tasks and seeds; empty where not asked."""
    first = next(iter(record.values()))
    columns = list(dict.fromkeys(name for figures in first.values() for name in figures))
    lines = header("masks", columns)
    for source in first:
        cells = []
        for name in columns:
            values = [v for task in record.values() for v in task[source].get(name, [])]
            percent = name in ("base", "new", "hm", "joint_hm")
            cells.append(f"{statistics.fmean(values):{'.1f' if percent else '.2f'}}" if values else "")
        lines.append(line(source, cells))
    return lines


def _everywhere(record: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The models of a part that were measured on every task, so that all means are over the same tasks."""
    tasks = [task[part] for task in record.values()]
    return {name: found for name, found in tasks[0].items() if all(name in task for task in tasks)}


def measured_on_some(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record of maps the tasks and models that were not measured on every task, with CLIP beside them."""
    everywhere = _everywhere(record, "maps")
    found = {}
    for task, parts in record.items():
        names = [name for name in parts["maps"] if name == "CLIP" or name not in everywhere]
        if len(names) > 1:
            found[task] = {part: {name: rows[name] for name in names} for part, rows in parts.items()}
    return found


def maps_table(record: Mapping[str, Any], figure: str) -> list[str]:
    """{task: {"maps": {model: {map: {figure: [a value a seed]}}}}}: one figure, a row a map and a column a model.

    FVG-PT stands behind a frozen tuner, whose attention is its own: only relevance tells them apart.
    """
    first = _everywhere(record, "maps")
    lines = header(figure, list(first))
    for kind in next(iter(first.values())):
        # an even map has no largest value; a point anywhere lies on the object as often as the mask covers the picture
        what = "share" if kind == "an even map" and figure == "pointing" else figure
        values = [[v for task in record.values() for v in task["maps"][model][kind][what]] for model in first]
        lines.append(line(kind, [f"{statistics.fmean(v):.2f}" for v in values]))
    return lines


def shift_table(record: Mapping[str, Any]) -> list[str]:
    """{task: {"shift": {model: {figure: [a value a seed]}}}}: D_fg, the entropy, and D_fg at plain CLIP's entropy."""
    first = _everywhere(record, "shift")
    columns = ["D_fg", "entropy", "D_fg at CLIP's entropy"]
    lines = header("nats", columns)
    for model in first:
        cells = []
        for name in columns:
            rows = [task["shift"][model] for task in record.values()]
            values = [v for row in rows for v in row.get(name, row["D_fg"])]
            cells.append(f"{statistics.fmean(values):.3f}")
        lines.append(line(model, cells))
    return lines


def planted_table(record: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """{task: {model: [figures a seed]}}: where the audit ranked the planted classes, mean over tasks and seeds."""
    first = next(iter(record.values()))
    columns = [name for name in next(iter(first.values()))[0] if name != "ranks"]
    lines = header("model audited", ["ranks of the planted classes", *columns])
    for model in first:
        runs = [run for task in record.values() for run in task[model]]
        ranks = "; ".join(", ".join(map(str, run["ranks"])) for run in runs)
        cells = []
        for name in columns:
            value = statistics.fmean(run[name] for run in runs)
            cells.append(f"{value:.2f}" if name in ("in front", "AUROC") else f"{value:.1f}")
        lines.append(line(model, [ranks, *cells]))
    return lines


def ways_table(record: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> list[str]:
    """{task: {way: {figure: [a value a seed]}}}: mean and standard deviation over seeds of the average over tasks."""
    first = next(iter(record.values()))
    columns = list(next(iter(first.values())))
    lines = header("", columns)
    for way in first:
        pairs = [average({task: record[task][way][name] for task in record}) for name in columns]
        lines.append(line(way, [f"{mean:.1f} ± {spread:.1f}" for mean, spread in pairs]))
    return lines


def preconditions_table(average: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Accuracy of CLIP, a linear probe and CoOp by test set: how much each leans on the backgrounds."""
    columns = list(next(iter(average.values())))
    lines = header("accuracy, percent", columns)
    return lines + [
        line(name.replace("_", ", "), [f"{figures[c]:.1f}" if c in figures else "" for c in columns])
        for name, figures in average.items()
    ]


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
