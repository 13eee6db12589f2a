"""Further ideas beside `preset="plus"`, on its validation tasks alone: examples/pocket/measured/plus/ideas.json.

    python -m examples.pocket.plus_ideas [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

A learnt gate for the joint label set, masks weighted by the trust r, prompts and heads trained in one stage, and the KL
of L_PC in the other direction; behind CoOp, on `test`. The references are trained and scored by the same code in the
same run. `python -m examples.pocket.plus --tuners` puts the figures into docs/plus.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.pocket.plus import CLIP, MEASURED, PAPER, PLUS, PLUS_ROW, TUNER, VALIDATION
from examples.pocket.plus_cells import METRICS, VIEWS, Cell, Pictures, Rows, figures, trained, trust, tuner_figures
from examples.pocket.plus_gate import BEST_GATE, GATES, POOLED, JointGate, Learn, gated, gates, pseudo
from examples.pocket.plus_variants import Losses, Variant
from examples.pocket.suite import pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig
from fvg_adapter.tuners.recipes import Stage

BANKS = Path(__file__).parent.parent.parent / "output" / "plus_ideas"
ONE_STAGE = "one stage, the heads' 10 epochs"
Record = dict[str, dict[str, dict[str, list[float]]]]
"""{idea: {metric: {task: [a value a seed]}}}"""


def references(cell: Cell) -> Rows:
    """Plain CLIP, the tuner, the paper's settings and plus."""
    paper = cell.heads(cell.tuner, FVGConfig())
    rows = {CLIP: figures(cell, paper, branches=(0, 0)), TUNER: tuner_figures(cell), PAPER: figures(cell, paper)}
    paper.release()
    return {**rows, PLUS_ROW: figures(cell, cell.plus)}


def directions(cell: Cell) -> Rows:
    """The KL of L_PC in the other direction, in plus and in the paper's settings; then that of L_dist."""
    rows = {
        f"plus, KL(p_PC ‖ p_CLIP), weight {weight}": trained(
            cell, replace(PLUS, lambda_new_kl=float(weight)), Losses(new_kl="turned")
        )
        for weight in (1, 3, 10, 30)
    }
    rows["plus, mean of both directions, weight 10"] = trained(cell, PLUS, Losses(new_kl="both"))
    rows["FVG-PT, KL(p_PC ‖ p_CLIP), weight 1"] = trained(cell, FVGConfig(), Losses(new_kl="turned"))
    rows["plus, L_dist turned round"] = trained(cell, PLUS, Losses(distill="turned"))
    return rows


def weights(cell: Cell) -> Rows:
    """Masks weighted by r: the weight of the attended view, and the distillation."""
    model = cell.plus
    learnt = torch.cat([trust(model, cell.train.view(k), cell.base) for k in range(VIEWS)])
    middle, view = float(learnt.mean()), PLUS.attended_view
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "view at weight r": lambda r: r,
        "view at weight 0.8 r": lambda r: 2 * view * r,
        "view at weight 0.4 r / mean r of the training pictures": lambda r: (view * r / middle).clamp(max=0.9),
        "view at weight 0.4 where r ≥ 0.5, else 0": lambda r: view * (r >= 0.5),
        "view at weight 0.4 where r ≥ that mean, else 0.2": lambda r: torch.where(r >= middle, view, view / 2),
        "the opposite: view at weight 0.8 (1 − r)": lambda r: 2 * view * (1 - r),
    }

    def by_trust(kind: Callable[[Tensor], Tensor]) -> Callable[[Pictures, Sequence[str]], Tensor]:
        return lambda pictures, classes: kind(trust(model, pictures, classes))

    rows = {name: figures(cell, model, weigh=by_trust(kind)) for name, kind in kinds.items()}
    rows["view at weight 0.4 where half of the attention is in the true mask, else 0 (no setting: needs masks)"] = (
        figures(cell, model, weigh=lambda p, _: view * (p.bank.features["attention_in_mask"][:, 0] >= 0.5))
    )
    for number in (1.0, 10.0):
        config = replace(PLUS, lambda_distill=number)
        rows[f"distillation r · KL(p_fg ‖ p_FDC) alone, λ_d = {number:g}"] = trained(
            cell, config, Losses(distill="trusted")
        )
    rows["distillation weighted with 2 r a picture, λ_d = 1"] = trained(cell, PLUS, Losses(distill="scaled"))
    return rows


def in_two_stages(cell: Cell, bank: FeatureBank) -> Variant:
    """Plus as it is."""
    return cell.heads(cell.tuned(bank), PLUS, bank=bank)


def in_one_stage(
    cell: Cell, bank: FeatureBank, config: FVGConfig = PLUS, own: float = 0.0, epochs: int | None = None
) -> Variant:
    """Prompts and heads together, by the heads' recipe; the prompts' rate is CoOp's, scaled to the heads' batch."""
    losses = Losses(tuner_ce=own, prompt_rate=small_batches().lr / stages("coop")["heads"].lr)
    return cell.heads(cell.fresh(bank.classes), replace(config, freeze_tuner=False), losses, bank, epochs)


def going_on(cell: Cell, bank: FeatureBank) -> Variant:
    """Two stages, but the prompts learn on in the second, from the same losses as the heads."""
    losses = Losses(prompt_rate=small_batches().lr / stages("coop")["heads"].lr)
    return cell.heads(cell.tuned(bank), replace(PLUS, freeze_tuner=False), losses, bank)


def small_batches() -> Stage:
    """CoOp's recipe with the heads' batch and epochs, the rate scaled with the batch."""
    tune, heads = stages("coop")["tune"], stages("coop")["heads"]
    rate = tune.lr * heads.batch_size / tune.batch_size
    stage: Stage = replace(tune, lr=rate, batch_size=heads.batch_size, epochs=heads.epochs)
    return stage


def one_stage(cell: Cell) -> Rows:
    """Prompts and heads trained together on plus's L, and what part of it is owed to longer training."""
    recipes = stages("coop")
    longer = recipes["heads"].epochs + recipes["tune"].epochs
    kinds: dict[str, Learn] = {
        ONE_STAGE: in_one_stage,
        "one stage, 10 epochs, and CoOp's own loss": lambda c, b: in_one_stage(c, b, own=1.0),
        "one stage, 30 epochs (both recipes')": lambda c, b: in_one_stage(c, b, epochs=longer),
        "one stage, 30 epochs, and CoOp's own loss": lambda c, b: in_one_stage(c, b, own=1.0, epochs=longer),
        "one stage, 10 epochs, with the paper's settings": lambda c, b: in_one_stage(c, b, FVGConfig()),
        "two stages, the prompts learning on in the second": going_on,
        "control: two stages, the heads for 30 epochs": lambda c, b: c.heads(c.tuned(b), PLUS, bank=b, epochs=longer),
        "control: two stages, CoOp tuned with the heads' batch and epochs": lambda c, b: c.heads(
            c.tuned(b, small_batches()), PLUS, bank=b
        ),
    }
    rows = {}
    for name, learn in kinds.items():
        model = learn(cell, cell.train.bank)
        rows[name] = figures(cell, model)
        model.release().detach()
    return rows


def both_together(cell: Cell) -> Rows:
    """What was best of two kinds, at once: chosen after the others had been seen."""
    rows = {}
    for name, learn in {"one stage": in_one_stage, "prompts learning on": going_on}.items():
        gate = JointGate(*pseudo(cell, learn), GATES[BEST_GATE])
        model = learn(cell, cell.train.bank)
        rows[f"{name}, and a learnt gate (log-odds of CLIP and both branches)"] = gated(cell, gate, model)
        model.release().detach()
    return rows


REFERENCE, GATE, WEIGHT, STAGE, DIRECTION, TOGETHER = (
    "reference",
    "a learnt gate for the joint label set, fitted on held-out halves of the base classes",
    "masks weighted by r",
    "prompts and heads in one stage",
    "the KL in the other direction",
    "one stage and a learnt gate together, tried after the rows above were seen",
)
GROUPS = (REFERENCE, GATE, WEIGHT, STAGE, DIRECTION, TOGETHER)


def together(cells: Iterable[tuple[str, Rows]]) -> Record:
    """Rows of cells put together, in the order of the runs."""
    record: Record = {}
    for task, rows in cells:
        for row, metrics in rows.items():
            for metric, value in metrics.items():
                record.setdefault(row, {}).setdefault(metric, {}).setdefault(task, []).append(value)
    return record


def run(tasks: Sequence[str], seeds: Sequence[int], banks: Path) -> list[dict[str, Any]]:
    """[{"group", "ideas": Record}] of every idea on every task and seed."""
    clip, tokenizer = pocket_clip()
    found: dict[str, list[tuple[str, Rows]]] = {n: [] for n in GROUPS}
    cells, ready = [], []
    for task in tasks:
        for seed in seeds:
            cell = Cell(clip, tokenizer, task, seed, banks)
            cells.append(cell)
            ready.append(pseudo(cell, in_two_stages))
            for group, rows in (
                (REFERENCE, references(cell)),
                (GATE, gates(cell, ready[-1])),
                (WEIGHT, weights(cell)),
                (STAGE, one_stage(cell)),
                (DIRECTION, directions(cell)),
                (TOGETHER, both_together(cell)),
            ):
                found[group].append((task, rows))
                for row, values in rows.items():
                    print(task, seed, row, values, flush=True)
    everything = [torch.cat(parts) for parts in zip(*ready, strict=True)]
    for name, columns in POOLED.items():
        pooled = JointGate(everything[0], everything[1], columns)
        found[GATE] += [(cell.task, {name: gated(cell, pooled, cell.plus)}) for cell in cells]
    return [{"group": group, "ideas": together(rows)} for group, rows in found.items()]


def main() -> None:
    """Runs every idea and writes ideas.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(VALIDATION))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--banks", type=Path, default=BANKS)
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = run(options.tasks, [int(s) for s in options.seeds.split(",")], options.banks)
    write_json(options.output / "ideas.json", record)
    for part in record:
        for idea, metrics in part["ideas"].items():
            means = [statistics.fmean(statistics.fmean(v) for v in metrics[m].values()) for m in METRICS]
            print(f"{idea:75s}", " ".join(f"{v:5.1f}" for v in means), flush=True)


if __name__ == "__main__":
    main()
