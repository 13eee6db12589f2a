"""docs/results.md by one command: every tuner, alone and with FVG-PT, every control beside every gain.

    python -m examples.pocket.results [--tuners coop …] [--tasks NAME …] [--seeds 1,2,3] [--processes 2] [--output DIR]

What is missing is run, a process a part, and then the page is written: the tuners' tables by `fvg_adapter.reproduce`
(`suite.json`), the other sections by the modules in `FURTHER`. Each task is tuned once a seed and scored on `test`
(random backgrounds), `test_swapped` (another class's training backgrounds) and `test_home` (the training backgrounds
again). The figures of a tuner on a task lie in OUTPUT/<tuner>/<task>.json; what is there is not run again. The
committed ones lie in `examples/pocket/measured`, so the page alone is a matter of a second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.pocket import tables
from examples.pocket.suite import HERE, SETTINGS, SPLITS, THREE, run

PAGE = HERE.parent.parent / "docs" / "results.md"
MEASURED = HERE / "measured"
FURTHER = {
    **{f"causes_{kind}.json": ("causes", "--tuners", kind) for kind in SETTINGS},
    **{f"home_{kind}.json": ("home", "--tuners", kind) for kind in ("promptsrc", "mmrl")},
    **{f"{name}.json": (name,) for name in ("trust", "gate", "maps", "planted", "loop_or_bank")},
}
"""Records of the other sections of the page: the module that measures each, and its options."""
MAPS = """On base-class test pictures with random backgrounds (`python -m examples.pocket.maps`, one seed). IoU of the
mask that a map makes (patches above its mean, as `foreground="attention"` does) with the true one; pointing: how often
the map's largest value lies on the object; share: of the map's mass that lies inside the mask. The heads stand behind a
frozen tuner, whose attention is theirs: relevance alone tells FVG-PT from it."""
SHIFT = """KL(p_full ‖ p_fg) with true masks, the entropy of p_full beside it, and the same divergence at that
temperature which brings the model's mean entropy to plain CLIP's: a flatter softmax lowers D_fg for nothing. x_fg = x
is the control."""
PLANTED = """Four base classes have all their pictures on one background each, the others anywhere; how `fvg-adapter
audit` ranks the classes of new such pictures (`python -m examples.pocket.planted`, three seeds; ranks of the four by
evidence, one group a run). "In front": share of the four among the first four (by chance 0.33, 0.20 and 0.29, with 12,
20 and 14 classes); AUROC of the ranking (by chance 0.5); mean evidence (Student's t) of both groups; accuracies in
percent on whole pictures, objects alone, backgrounds alone."""

CONTROLS = {
    "fvg [x_fg=x]": "control: x_fg = x",
    "fvg [lambda_d=0]": "control: λ_d = 0",
    "fvg [shuffled masks]": "control: shuffled masks",
}
ABLATION = {
    "fvg [FDC only]": "+ FDC only (r = 1)",
    "fvg [FRG+FDC]": "+ FRG + FDC",
    "fvg [PC only]": "+ PC only",
    "fvg [FDC+PC]": "+ FDC + PC (r = 1)",
}
INTRODUCTION = """\
Made by `python -m examples.pocket.results`; do not edit by hand. The pocket suite is a test bench, not a claim about
natural images. Seeds {seeds}, 16 shots a base class, four augmented views from a FeatureBank. Crops keep at least half
of the picture in both stages. A quarter of the training masks is a random box on purpose. FVG-PT: METHOD's settings
behind each tuner (λ_d = 10, 10 epochs). Settings of the tuners, chosen with the tuner alone:

{settings}

Text-only tuners run on nine tasks, tuners that change the image tower on three ({three}).
Accuracies are percent: mean ± standard deviation over seeds of the average over tasks. D_fg = KL(p_full ‖ p_fg) in nats
with true masks, beside the mean entropy, since a flatter softmax lowers it for nothing. ECE in percent. Paired
differences are over tasks (seeds averaged): mean ± standard deviation over tasks (tasks above 0, exact two-sided
sign-flip p; with three tasks p cannot fall below 0.25)."""
TRUST = f"""\
Tasks {", ".join(THREE)}; `python -m examples.pocket.trust`. No mask is spoiled here but as said. IoU is that of the
masks with the true ones; r is asked for every training picture after training; AUROC of r for right against wrong
masks, beside what the gate's own target r* would give (wrong: shuffled on purpose, or an IoU below 0.5)."""
GATE = """The table above asks r of the training pictures. Here a quarter of the training masks is wrong (another
picture's, or a random box), and the same gate is asked of those pictures and of test pictures with random backgrounds,
a quarter of whose masks is wrong too (`python -m examples.pocket.gate`; means over three tasks and three seeds). "CoOp
right": on the whole pictures asked. r*: how often the foreground view lowers the cross entropy. AUROC: right against
wrong masks; by chance 0.5. "Gradient × 30": the gate alone learns thirty times as fast, in the same steps. "Converged
on r*" and "told right from wrong": gates of the same shape and cues, fitted on the training pictures to the target r*
and to the truth itself, a bound of what the cues can tell; where training pictures are asked these two have seen what
they are asked."""
COOP_DIFFERENCES = [
    ("tuning prompts: CoOp − CLIP", "coop", "clip"),
    ("FVG-PT − CoOp", "coop+fvg", "coop"),
    ("**foreground effect: true masks − x_fg = x**", "coop+fvg", "coop+fvg [x_fg=x]"),
    ("true masks − shuffled masks", "coop+fvg", "coop+fvg [shuffled masks]"),
    ("distillation: λ_d = 10 − λ_d = 0", "coop+fvg", "coop+fvg [lambda_d=0]"),
    ("the gate: all − (FDC + PC, r = 1)", "coop+fvg", "coop+fvg [FDC+PC]"),
    ("PC on new classes: PC only − CoOp", "coop+fvg [PC only]", "coop"),
    ("FDC used for new classes: FRG + FDC − CoOp", "coop+fvg [FRG+FDC]", "coop"),
]


def row_names(kind: str, ablation: bool = False) -> dict[str, str]:
    """Rows of one tuner in the order of the tables."""
    name = SETTINGS[kind].name
    names = {kind: name}
    if ablation:
        names |= {f"{kind}+{row}": text for row, text in ABLATION.items()}
    names[f"{kind}+fvg"] = f"**{name} + FVG-PT**"
    return names | {f"{kind}+{row}": text for row, text in CONTROLS.items()}


def comparison(output: Path, kinds: Sequence[str], tasks: Sequence[str], split: str) -> list[str]:
    """CLIP, then each tuner alone, with FVG-PT, and with the controls."""
    lines: list[str] = []
    for kind in kinds:
        rows = tables.gather(output / kind, tasks, split)
        lines = lines or tables.main_table(rows, {"clip": "CLIP"})
        lines += tables.body(rows, row_names(kind))
    return lines


def gains(output: Path, kinds: Sequence[str], tasks: Sequence[str], split: str) -> list[str]:
    """What FVG-PT adds to each tuner, and what of it the foreground is worth."""
    lines: list[str] = []
    for kind in kinds:
        full, setting = f"{kind}+fvg", SETTINGS[kind]
        paper = "" if setting.gain is None else f" (paper: HM {setting.gain:+.2f})"
        differences = [
            (f"FVG-PT − {setting.name}{paper}", full, kind),
            (f"**foreground effect behind {setting.name}: true masks − x_fg = x**", full, f"{full} [x_fg=x]"),
        ]
        rows = tables.gather(output / kind, tasks, split)
        lines = lines or tables.difference_table(rows, [])
        lines += tables.difference_lines(rows, differences)
    return lines


def coop_in_detail(output: Path, split: str) -> list[str]:
    """The paper's ablation on CoOp."""
    rows = tables.gather(output / "coop", SETTINGS["coop"].tasks, split)
    shown = {"clip": "CLIP"} | row_names("coop", ablation=True)
    few = {k: shown[k].strip("*") for k in ("clip", "coop", "coop+fvg", "coop+fvg [x_fg=x]")}
    parts = [f"### {SPLITS[split].capitalize()} (`{split}`)", "", *tables.main_table(rows, shown), ""]
    parts += [*tables.difference_table(rows, COOP_DIFFERENCES), "", "Base / new, task by task:", ""]
    return [*parts, *tables.task_table(rows, few), ""]


def page(output: Path, seeds: Sequence[int]) -> str:
    """The whole page: settings, tables, experiments on causes, and the remarks kept beside this script."""
    settings = "\n".join(f"- {s.name}: {s.said}" for s in SETTINGS.values())
    introduction = INTRODUCTION.format(settings=settings, three=", ".join(THREE), seeds=", ".join(map(str, seeds)))
    text_only = [k for k, s in SETTINGS.items() if len(s.tasks) > len(THREE)]
    parts = ["# Results on the pocket suite", "", introduction, ""]
    for split, title in SPLITS.items():
        parts += [f"## Test set: {title} (`{split}`)", ""]
        for kinds, tasks in ((text_only, SETTINGS["coop"].tasks), (list(SETTINGS), THREE)):
            parts += [f"{len(tasks)} tasks:", "", *comparison(output, kinds, tasks, split), ""]
            parts += [*gains(output, kinds, tasks, split), ""]
    for file in [*sorted(output.glob("causes*.json")), *sorted(output.glob("home*.json"))]:
        record = tables.read(file)
        parts += [f"## {record['title']}", "", record["text"], "", *tables.variants_table(record["tasks"]), ""]
    if (output / "trust.json").exists():
        parts += ["## What becomes of good and of bad masks (CoOp + FVG-PT, random backgrounds)", "", TRUST, ""]
        parts += [*tables.trust_table(tables.read(output / "trust.json")), ""]
    if (output / "gate.json").exists():
        parts += ["## Why r hardly tells right masks from wrong ones", "", GATE, ""]
        parts += [*tables.trust_table(tables.read(output / "gate.json")), ""]
    parts += looking(output)
    if (output / "loop_or_bank.json").exists():
        record = tables.read(output / "loop_or_bank.json")
        parts += [f"## Heads from a bank of four views, and in the loop ({', '.join(record)})", ""]
        parts += [
            "Behind the same tuned CoOp; `python -m examples.pocket.loop_or_bank`. Seconds include the encoding.",
            "",
        ]
        parts += [*tables.ways_table(record), ""]
    parts += [(HERE / "results_remarks.md").read_text(encoding="utf-8").rstrip(), ""]
    parts += ["## The ablation on CoOp", ""]
    for split in SPLITS:
        parts += coop_in_detail(output, split)
    preconditions = tables.read(HERE / "preconditions.json")["average"]
    parts += ["## Preconditions, measured before any FVG-PT was run", "", *tables.preconditions_table(preconditions)]
    return "\n".join(parts) + "\n"


def looking(output: Path) -> list[str]:
    """Where models look, how far they shift, and whether an audit finds what was planted."""
    parts: list[str] = []
    if (output / "maps.json").exists():
        record = tables.read(output / "maps.json")
        parts += [f"## Where models look ({', '.join(record)})", "", MAPS, ""]
        for figure in ("IoU", "pointing", "share"):
            parts += [*tables.maps_table(record, figure), ""]
        some = tables.measured_on_some(record)
        if some:
            parts += [f"Measured on {', '.join(some)} alone:", ""]
            for figure in ("IoU", "pointing", "share"):
                parts += [*tables.maps_table(some, figure), ""]
        parts += ["## D_fg, and at matched entropy", "", SHIFT, "", *tables.shift_table(record), ""]
        if some:
            parts += [f"Measured on {', '.join(some)} alone:", "", *tables.shift_table(some), ""]
    if (output / "planted.json").exists():
        record = tables.read(output / "planted.json")
        parts += [f"## A planted shortcut and the audit ({', '.join(record)})", "", PLANTED, ""]
        parts += [*tables.planted_table(record), ""]
    return parts


def run_further(output: Path) -> list[str]:
    """Measures the sections whose record is not there yet, each by its own module; returns which."""
    missing = [name for name in FURTHER if not (output / name).exists()]
    for name in missing:
        module, *options = FURTHER[name]
        command = [sys.executable, "-m", f"examples.pocket.{module}", "--output", str(output), *options]
        subprocess.run(command, check=True, cwd=HERE.parent.parent)
        if not (output / name).exists():
            raise SystemExit(f"{' '.join(command)} has not written {name}.")
    return missing


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuners", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tasks", nargs="*", help="only these; the page is left alone then")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=MEASURED)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    start = time.monotonic()
    run(options.tuners, options.tasks, seeds, options.output, options.processes)
    print(f"measured in {time.monotonic() - start:.0f} s")
    if options.tasks is None and set(options.tuners) == set(SETTINGS):
        run_further(options.output)
        options.page.write_text(page(options.output, seeds), encoding="utf-8")
        print(options.page)


if __name__ == "__main__":
    main()
