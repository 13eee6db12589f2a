"""The tidy results file: a CSV row a figure, with the version of the format in every row."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fvg_adapter.errors import FVGError
from fvg_adapter.replacing import written

FORMAT = 1
"""Version of the tidy file and of the unit files."""

COST = "cost"
"""`split` of rows that say what a model costs."""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        format: version. protocol: "base-to-new", …. dataset: what was scored. split: which pictures of it ("test"), or
            "cost". source: what was tuned on, where it is another data set.
        tuner: `Tuner.kind`. row: "clip", "alone", "fvg", or a control or variant as in "fvg [x_fg=x]".
        shots: pictures a class. seed, metric, value: a figure that does not exist is nan.
        preset: of `FVGConfig`; files from before there were presets lack it, and are the paper's.
    """

    format: int
    protocol: str
    dataset: str
    split: str
    source: str
    tuner: str
    row: str
    shots: int
    seed: int
    metric: str
    value: float
    preset: str = "paper"


def figures_of(record: Mapping[str, Any]) -> list[Figure]:
    """The figures of a unit file (see `units`)."""
    unit = record["unit"]
    tuner, found = unit["tuner"], []
    preset = record["identity"]["config"].get("preset", Figure.preset)
    for split, rows in [*record["rows"].items(), (COST, record["cost"])]:
        foreign = split not in ("", COST) and split in record["targets"]
        dataset = split if foreign else unit["dataset"]
        source = unit["dataset"] if unit["protocol"] == "cross-dataset" and split != COST else ""
        shown = "test" if foreign or split == "" else split
        for row, metrics in rows.items():
            for metric, value in metrics.items():
                found.append(
                    Figure(
                        FORMAT,
                        unit["protocol"],
                        dataset,
                        shown,
                        source,
                        tuner,
                        plain_row(row, tuner),
                        unit["shots"],
                        unit["seed"],
                        metric,
                        math.nan if value is None else float(value),
                        preset,
                    )
                )
    return found


def plain_row(row: str, tuner: str) -> str:
    """A row's name without the tuner's: "coop" is "alone", "coop+fvg [x_fg=x]" is "fvg [x_fg=x]"."""
    if row == tuner:
        return "alone"
    return row.removeprefix(f"{tuner}+")


def write_tidy(path: str | os.PathLike[str], figures: Iterable[Figure]) -> Path:
    """Writes the file, whole or not at all; returns its path.

    Raises:
        FVGError: it cannot be written; what was there is unchanged.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written(target) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Figure)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(figure) for figure in figures)
    return target


def read_tidy(path: str | os.PathLike[str]) -> list[Figure]:
    """Reads the file.

    Raises:
        FVGError: no such file, another version's, or no results file at all.
    """
    target = Path(path)
    try:
        with target.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FVGError(f"the results {target} cannot be read: {error}") from error
    kinds: dict[str, type[Any]] = {"int": int, "float": float, "str": str}
    names = {f.name: kinds[str(f.type)] for f in fields(Figure)}
    found = []
    for number, line in enumerate(lines, 2):
        check_format(line.get("format"), str(target))
        try:
            values: dict[str, Any] = {
                name: kind(line[name]) for name, kind in names.items() if name in line or name != "preset"
            }
            found.append(Figure(**values))
        except (KeyError, TypeError, ValueError) as error:
            raise FVGError(f"{target}, line {number}, is no line of results: {line}.") from error
    return found


def check_format(given: Any, where: str) -> None:
    """Raises FVGError where a file was written in another version of the format."""
    if str(given) != str(FORMAT):
        raise FVGError(
            f"{where} is of format {given!r}, but this version of fvg_adapter writes and reads format {FORMAT}. Give "
            "another --output, or go on with the version that wrote it."
        )
