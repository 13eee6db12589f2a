"""docs/plus.md from `measured/plus`: the protocol, held-out tables with their tests, controls, every idea tried."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.pocket import tables
from examples.pocket.plus import (
    CLIP,
    HELD_OUT,
    MEASURED,
    METRICS,
    MORE,
    PAPER,
    PLUS_ROW,
    TASKS,
    TUNER,
    TURNED,
    VALIDATION,
    recorded,
)
from examples.pocket.suite import SETTINGS

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "plus.md"
SHOWN = {
    "base": "base",
    "new": "new",
    "hm": "HM",
    "joint_base": "joint base",
    "joint_new": "joint new",
    "joint_hm": "joint HM",
}
RECORDED = {CLIP: "clip", TUNER: "{kind}", PAPER: "{kind}+fvg"}
"""Rows of results.py: the paper's are read from there, the others must be equal to what was measured here."""


def gather(output: Path, kind: str, test: str, tasks: Sequence[str] | None = None) -> tables.Rows:
    """{row: {metric: {task: [a value a seed]}}} of the tasks whose seeds are all there; controls where they are."""
    rows: tables.Rows = {}
    for task in tasks or TASKS[kind]:
        for number, seed in enumerate((1, 2, 3)):
            found: dict[str, Mapping[str, float]] = {}
            for name in (f"{task}.{test}.{seed}.json", f"{task}.{test}.{seed}.controls.json"):
                if (output / kind / name).exists():
                    found |= tables.read(output / kind / name)
            file = recorded(kind, task)
            if found and file is not None and PAPER not in found:
                record = tables.read(file)
                known = record if test == "test" else record["also"][test]
                found[PAPER] = {m: known[RECORDED[PAPER].format(kind=kind)][m][number] for m in METRICS}
            for row, figures in found.items():
                for metric, value in figures.items():
                    rows.setdefault(row, {}).setdefault(metric, {}).setdefault(task, []).append(value)
    return rows


def seeds_of(rows: tables.Rows, task: str) -> int:
    """How many seeds of a task are measured."""
    return len(rows[PLUS_ROW]["joint_hm"].get(task, []))


def only(rows: tables.Rows, tasks: Sequence[str]) -> tables.Rows:
    """The rows that are measured on all of some tasks with the same seeds, on those tasks alone."""
    wanted = {task: seeds_of(rows, task) for task in tasks}
    whole = {
        row: metrics
        for row, metrics in rows.items()
        if all(len(metrics["joint_hm"].get(task, [])) == n for task, n in wanted.items())
    }
    return {row: {m: {t: v[t] for t in tasks} for m, v in metrics.items()} for row, metrics in whole.items()}


def mean(values: Mapping[str, Sequence[float]]) -> float:
    """Over tasks, seeds averaged first."""
    return statistics.fmean(statistics.fmean(v) for v in values.values())


def averages(rows: tables.Rows) -> list[str]:
    """A line a row."""
    lines = tables.header("", [*SHOWN.values(), "ECE"])
    for row, metrics in rows.items():
        name = f"**{row}**" if row in (PAPER, PLUS_ROW) else row
        lines.append(tables.line(name, [f"{mean(metrics[m]):.1f}" for m in (*SHOWN, "ece")]))
    return lines


def differences(rows: tables.Rows, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Paired differences over tasks; how many tasks gain, and gain a point; exact two-sided sign-flip p."""
    lines = tables.header(
        "difference", ["base", "new", "joint HM", "tasks above 0", "tasks at +1 or more", "p of joint HM"]
    )
    for one, other in pairs:
        if one not in rows or other not in rows:
            continue
        cells = [f"{tables.paired(rows[one][m], rows[other][m])[0]:+.2f}" for m in ("base", "new")]
        gain, spread, p, above = tables.paired(rows[one]["joint_hm"], rows[other]["joint_hm"])
        a, b = rows[one]["joint_hm"], rows[other]["joint_hm"]
        point = sum(statistics.fmean(a[t]) - statistics.fmean(b[t]) >= 1 for t in a)
        cells += [f"{gain:+.2f} ± {spread:.2f}", f"{above}/{len(a)}", f"{point}/{len(a)}", f"{p:.4f}"]
        lines.append(tables.line(f"{one} − {other}", cells))
    return lines


def by_task(rows: tables.Rows, names: Sequence[str]) -> list[str]:
    """Joint HM, task by task."""
    shown = [n for n in names if n in rows]
    lines = tables.header("joint HM", [*shown, "seeds"])
    for task in rows[PLUS_ROW]["joint_hm"]:
        values = [f"{statistics.fmean(rows[n]['joint_hm'][task]):.1f}" for n in shown]
        lines.append(tables.line(task, [*values, str(seeds_of(rows, task))]))
    return lines


def search_tables(output: Path) -> list[str]:
    """Every idea tried, with its validation figures."""
    lines = tables.header("validation tasks, behind CoOp, `test`", ["base", "new", "HM", "joint HM"])
    for part in tables.read(output / "search.json"):
        lines.append(tables.line(f"*{part['group']}*", ["", "", "", ""]))
        for idea, figures in part["ideas"].items():
            lines.append(tables.line(idea, [f"{v:.1f}" for v in figures.values()]))
    return lines


def idea_tables(output: Path) -> list[str]:
    """Further ideas on the validation tasks: means, and joint HM beside plus task by task and over tasks and seeds."""
    record = tables.read(output / "ideas.json")
    plus = record[0]["ideas"][PLUS_ROW]["joint_hm"]
    cells = sum(len(v) for v in plus.values())
    lines = tables.header(
        "validation tasks, behind CoOp, `test`", [*SHOWN.values(), "− plus", "tasks above", f"of {cells} runs above"]
    )
    for part in record:
        lines.append(tables.line(f"*{part['group']}*", [""] * (len(SHOWN) + 3)))
        for idea, metrics in part["ideas"].items():
            found = metrics["joint_hm"]
            gains = [a - b for task in plus for a, b in zip(found[task], plus[task], strict=True)]
            gain, _, _, above = tables.paired(found, plus)
            beside = [f"{gain:+.1f}", f"{above}/{len(plus)}", f"{sum(g > 0 for g in gains)}"]
            row = [f"{mean(metrics[m]):.1f}" for m in SHOWN]
            name = f"**{idea}**" if idea in (PAPER, PLUS_ROW) else idea
            lines.append(tables.line(name, row + (["", "", ""] if idea == PLUS_ROW else beside)))
    return lines


def section(output: Path, kind: str, test: str, tasks: Sequence[str], title: str) -> list[str]:
    """Averages, differences and tasks of one tuner on some tasks; nothing where nothing is measured."""
    rows = gather(output, kind, test, tasks)
    present = [t for t in tasks if PLUS_ROW in rows and seeds_of(rows, t)]
    if not present:
        return []
    everything = only(rows, present)
    pairs = [(PLUS_ROW, PAPER), (PLUS_ROW, CLIP), (PAPER, CLIP), (PLUS_ROW, TUNER)]
    pairs += [(PLUS_ROW, r) for r in everything if r not in (PLUS_ROW, PAPER, CLIP, TUNER)]
    names = (CLIP, TUNER, PAPER, PLUS_ROW)
    lines = [f"### {SETTINGS[kind].name}, `{test}`: {title}", "", *averages(everything), ""]
    lines += [*differences(everything, pairs), "", *by_task(everything, names), ""]
    measured = rows.get("plus, x_fg = x", {}).get("base", {})
    controlled = [t for t in present if len(measured.get(t, [])) == seeds_of(rows, t)]
    if controlled and len(controlled) < len(present):
        some = only(rows, controlled)
        pairs = [(PLUS_ROW, r) for r in some if r.startswith("plus,")]
        lines += [
            f"Controls, measured on {', '.join(controlled)}:",
            "",
            *averages(some),
            "",
            *differences(some, pairs),
            "",
        ]
    return lines


def page(output: Path = MEASURED) -> str:
    """The whole page."""
    parts = [(HERE / "plus_protocol.md").read_text("utf-8").rstrip(), "", "## Held-out tasks", ""]
    for kind in TASKS:
        for test in ("test", "test_swapped", "test_home"):
            for title, tasks in (
                ("held-out tasks", (*HELD_OUT, *MORE)),
                ("turned tasks", TURNED),
                ("validation tasks", VALIDATION),
            ):
                parts += section(output, kind, test, tasks, title)
    parts += [
        (HERE / "plus_remarks.md").read_text("utf-8").rstrip(),
        "",
        "## Every idea tried",
        "",
        *search_tables(output),
        "",
        (HERE / "plus_ideas_remarks.md").read_text("utf-8").rstrip(),
        "",
        *idea_tables(output),
    ]
    return "\n".join(parts) + "\n"
