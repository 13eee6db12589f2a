"""Results: what a protocol measured, a list of one value a seed under each model and metric."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvg_adapter.replacing import written

Rows = dict[str, dict[str, list[float]]]
"""{model: {metric: [a value a seed]}}"""


@dataclass
class Results:
    """One row a model, one list a metric, one value a seed.

    Attributes:
        rows: {"clip": {"base": [41.9, …], "new": …, "hm": …, "joint_hm": …, …}, "coop": …, "coop+fvg": …, controls}.
        settings: what was run: data, shots, seeds, recipes, FVGConfig, versions.
        seconds: wall time of the run.
        also: rows of further test splits, by name.
        cost: {model: {"parameters": [trainable], "train_seconds", "train_images_per_second", "memory_mb", …}}; see
            `fvg_adapter.costs`.
        adapter: folder of the first seed's saved model, where an output folder was given. picture: file, likewise.
    """

    rows: Rows = field(default_factory=dict)
    also: dict[str, Rows] = field(default_factory=dict)
    cost: Rows = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    adapter: str | None = None
    picture: str | None = None

    def add(self, row: str, figures: dict[str, float], split: str | None = None) -> None:
        """Appends one seed's figures to a row, of the main test split or of another."""
        rows = self.rows if split is None else self.also.setdefault(split, {})
        into = rows.setdefault(row, {})
        for metric, value in figures.items():
            into.setdefault(metric, []).append(round(value, 4))

    def add_cost(self, row: str, figures: dict[str, float]) -> None:
        """Appends one seed's cost to a row."""
        into = self.cost.setdefault(row, {})
        for name, value in figures.items():
            into.setdefault(name, []).append(round(value, 3))

    def last(self) -> dict[str, Any]:
        """The seed that was added last: {"rows": {split: {model: {metric: value}}}, "cost": {model: {name: value}}}.

        The main test split is called "".
        """

        def ends(rows: Rows) -> dict[str, dict[str, float | None]]:
            return {row: {m: values[-1] for m, values in metrics.items()} for row, metrics in _jsonable(rows).items()}

        return {
            "rows": {split: ends(rows) for split, rows in {"": self.rows, **self.also}.items()},
            "cost": ends(self.cost),
        }

    def mean(self, row: str, metric: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.rows[row][metric])

    def spread(self, row: str, metric: str) -> float:
        """Standard deviation over seeds (n − 1), 0 for one seed."""
        values = self.rows[row][metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def difference(self, row: str, other: str, metric: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds of the paired difference row − other."""
        pairs = zip(self.rows[row][metric], self.rows[other][metric], strict=True)
        values = [a - b for a, b in pairs]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def so_far(self, seeds: int) -> dict[str, Any]:
        """`to_json` of a run that has come to this many seeds."""
        found = self.to_json()
        return {**found, "settings": {**found["settings"], "seeds": self.settings["seeds"][:seeds]}}

    def to_json(self) -> dict[str, Any]:
        """Rows at the top level; "settings", "also" (other test splits) and "cost" beside them; NaN becomes None."""
        also = {"also": {name: _jsonable(rows) for name, rows in self.also.items()}} if self.also else {}
        cost = {"cost": _jsonable(self.cost)} if self.cost else {}
        return {
            **_jsonable(self.rows),
            **also,
            **cost,
            "settings": {**self.settings, "seconds": round(self.seconds, 1)},
        }


def _jsonable(rows: Rows) -> dict[str, dict[str, list[float | None]]]:
    return {
        row: {metric: [None if v != v else v for v in values] for metric, values in metrics.items()}
        for row, metrics in rows.items()
    }


def write_json(target: Path, record: Any) -> None:
    """A whole JSON file or none.

    Raises:
        FVGError: it cannot be written (a full disk, a folder that is read-only); the target is what it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with written(target) as file:
        file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
