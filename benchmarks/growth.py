"""How the heads' cost grows with the number of classes: a step and an inference on ready features."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import Result, in_turns, row
from benchmarks.setting import Setting
from fvg_adapter import wrap

ROUNDS = 4
"""Rounds for one pair; these works take milliseconds."""
PICTURE = "benchmarks_classes.png"


def heads_by_classes(setting: Setting, folder: Path) -> Result:
    """Seconds of a step and of an inference by the number of classes; growth ÷ growth of the classes."""
    counts = setting.size.growth
    clip, works = setting.clip(), []
    for count in counts:
        works += _works(setting, clip, count)
    times = in_turns(works, ROUNDS * setting.pairs)
    by_work = list(zip(*times, strict=True))
    rows = []
    for offset, what in enumerate(("step", "inference")):
        least, most = by_work[offset], by_work[offset + 2 * (len(counts) - 1)]
        grown = counts[-1] / counts[0]
        figure = f"heads' {what}, {counts[0]} → {counts[-1]:,} classes: growth of time ÷ {grown:,.0f}"
        rows.append(row(figure, [m / grown for m in most], least, "≤ 1", note="numerator: per that many classes"))
    medians = [statistics.median(found) for found in by_work]
    steps, inferences = medians[0::2], medians[1::2]
    lines = [[f"{c:,}", f"{s * 1e3:.2f}", f"{i * 1e3:.2f}"] for c, s, i in zip(counts, steps, inferences, strict=True)]
    exponents = [_exponent(counts, found) for found in (steps, inferences)]
    caption = (
        f"The heads alone, on ready features of {setting.size.batch} images. Between the two largest counts time grows "
        f"as classes to the power {exponents[0]:.2f} (step) and {exponents[1]:.2f} (inference)."
    )
    _plot(folder / PICTURE, counts, steps, inferences)
    return Result(rows, caption, [["classes", "step, ms", "inference, ms"], *lines], PICTURE)


def _works(setting: Setting, clip: torch.nn.Module, count: int) -> list[Callable[[], None]]:
    generator = torch.Generator().manual_seed(3)
    dim, batch = setting.size.clip["projection_dim"], setting.size.batch

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)

    model = wrap(clip, classes=dict(zip(setting.names(count), unit(count), strict=True)))
    features = {"image": unit(batch), "foreground": unit(batch), "mask_area": torch.full((batch,), 0.25)}
    features["usable"] = torch.ones(batch, dtype=torch.bool)
    labels = setting.labels % count
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035, momentum=0.9)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(features=features, labels=labels).loss.backward()
        optimizer.step()

    @torch.no_grad()
    def infer() -> None:
        model.eval()
        model(features=features)

    return [step, infer]


def _exponent(counts: tuple[int, ...], times: list[float]) -> float:
    return math.log(times[-1] / times[-2]) / math.log(counts[-1] / counts[-2])


def _plot(path: Path, counts: tuple[int, ...], steps: list[float], inferences: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, times, marker in (("training step", steps, "o"), ("inference", inferences, "s")):
        axes.loglog(counts, [t * 1e3 for t in times], marker=marker, label=label)
    linear = [inferences[-1] * 1e3 * c / counts[-1] for c in counts]
    axes.loglog(counts, linear, "--", color="grey", label="linear in the classes")
    axes.set(xlabel="classes", ylabel="milliseconds", title="The heads' cost by the number of classes")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
