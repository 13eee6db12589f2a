"""The results of a training as a person reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from fvg_adapter.protocols import Results

COLUMNS = {"base": "base", "new": "new", "hm": "HM", "joint_hm": "joint HM"}
"""Metrics of the table, by what stands above them."""


def table_of(results: Results) -> Table:
    """A row a model: mean and, over several seeds, standard deviation of each metric."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns hold the longest row
    table.add_column("model", no_wrap=True)
    for name in COLUMNS.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row, figures in results.rows.items():
        several = len(figures["base"]) > 1
        cells = (_spread(results.mean(row, m), results.spread(row, m), several) for m in COLUMNS)
        table.add_row(Text(row), *cells)
    return table


def title_of(data: str, seeds: list[int]) -> str:
    """What the figures of the table are."""
    over = f", mean ± standard deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    return f"{data}: accuracy in percent{over}"


def remarks_on(results: Results, tuner: str, output: Path | None) -> list[str]:
    """What the rows say about FVG-PT and the foreground, and where the files are."""
    ours = f"{tuner}+fvg"
    lines = []
    for other, meaning in (
        (tuner, f"FVG-PT over {tuner} alone"),
        (f"{ours} [x_fg=x]", "foreground effect (the masks over the whole image as foreground)"),
        (f"{ours} [shuffled masks]", "the masks over other pictures' masks"),
    ):
        if ours in results.rows and other in results.rows:
            several = len(results.rows[ours]["hm"]) > 1
            lines.append(f"{meaning}: HM {_spread(*results.difference(ours, other, 'hm'), several, '+')}")
    lines.append(f"{results.seconds:.0f} s")
    if output is not None:
        picture = "" if results.picture is None else ", picture.png"
        lines += [
            f"wrote {output}: results.json{picture} and the adapter; try",
            f"  fvg-adapter info {results.adapter}",
        ]
    return lines


def _spread(mean: float, deviation: float, several: bool, sign: str = "") -> str:
    return f"{mean:{sign}.1f} ± {deviation:.1f}" if several else f"{mean:{sign}.1f}"
