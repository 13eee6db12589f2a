"""Figures of a card: what `evaluate` or the base-to-new protocol measured, in one form whatever they came from."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvg_adapter.errors import FVGError, nearest

THIS = "this adapter"
"""The row of figures that came from `evaluate`."""
METRICS = {
    "accuracy": "accuracy",
    "base": "base",
    "new": "new",
    "hm": "HM",
    "joint_base": "joint base",
    "joint_new": "joint new",
    "joint_hm": "joint HM",
}
"""Metrics in percent, by what stands above them; accuracy where one list of classes was tuned on and scored."""
FURTHER = ("d_fg", "entropy", "attention_in_mask", "ece")
_MOST, _LONGEST, _LARGEST = 200, 300, 1e12
"""Rows, metrics and seeds; characters of a name; a figure or a seed: what a card has room for."""
_SETTINGS = ("seeds", "shots", "test_split", "views", "foreground", "tune", "heads", "data", "from_hub")


def figures_of(results: Any, tuner: str, kind: str) -> dict[str, Any]:
    """Rows of figures and how they were measured, as a JSON object without paths.

    Args:
        results: what `evaluate` returned, a `protocols.Results`, the content of a results.json or the path of one.
        tuner: the tuner's kind, for finding this adapter's row. kind: "fvg" or "tuner", likewise.

    Returns:
        {"rows": {name: {metric: [a value a seed]}}, "ours": name, and what of the settings a card shows}. NaN is None.

    Raises:
        FVGError: nothing that holds figures, or no row of this adapter.
    """
    if isinstance(results, (str, os.PathLike)):
        results = _read(Path(results))
    if hasattr(results, "to_json"):
        results = results.to_json()
    if not isinstance(results, Mapping) or not results:
        raise FVGError(
            f"results is a {type(results).__name__}; give what evaluate(…) returned, a protocols.Results, or the path "
            "of a results.json."
        )
    if all(isinstance(value, (int, float)) for value in results.values()):
        if "base" not in results or "new" not in results:
            raise FVGError(f"results hold {sorted(results)}, but 'base' and 'new' are expected: what evaluate returns.")
        return {"rows": {THIS: {name: [_number(value)] for name, value in results.items()}}, "ours": THIS}
    settings = results.get("settings") or {}
    rows = {
        str(name): {str(metric): [_number(v) for v in values] for metric, values in row.items()}
        for name, row in results.items()
        if name not in ("settings", "also", "cost")
        and isinstance(row, Mapping)
        and ("base" in row or "accuracy" in row)
    }
    ours = f"{tuner}+fvg" if kind == "fvg" else "clip" if tuner == "zero_shot" else tuner
    if ours not in rows:
        raise FVGError(f"results have no row {ours!r}, which is what this adapter is. {nearest(ours, rows)}")
    found = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    found = json.loads(json.dumps(found))  # as config.json will give it back
    if "data" in found:  # no path of this machine
        found["data"] = str(found["data"]) if found.get("from_hub") else Path(str(found["data"])).name
    return {"rows": rows, "ours": ours, **found}


def sound_about(about: Any) -> dict[str, Any]:
    """What of a config's "about" has the form that we write; a file from elsewhere may hold anything."""
    if not isinstance(about, Mapping):
        return {}
    found = dict(about)
    if not _is_sound(found.get("results")):
        found.pop("results", None)
    names = {"dataset": r"[^/\\]+|[\w.-]+/[\w.-]+", "license": r"[\w.-]+", "picture": r"[0-9a-f]{64}"}
    for name, pattern in names.items():
        if not (isinstance(found.get(name), str) and re.fullmatch(pattern, found[name])):
            found.pop(name, None)
    return found


def _is_sound(results: Any) -> bool:
    if not isinstance(results, Mapping) or not isinstance(results.get("rows"), Mapping):
        return False
    rows, several = results["rows"], results.get("seeds", [])
    texts = [results.get(name, "") for name in ("ours", "data", "test_split")]
    return (
        all(isinstance(text, str) and len(text) <= _LONGEST for text in (*texts, *rows))
        and isinstance(results.get("foreground", ""), str)
        and results.get("ours") in rows
        and len(rows) <= _MOST
        and all(isinstance(row, Mapping) and len(row) <= _MOST for row in rows.values())
        and all(_are_figures(values) for row in rows.values() for values in row.values())
        and isinstance(several, list)
        and all(type(n) is int for n in (*several, results.get("shots", 0)))
        and _are_figures(several)
        and ("/" not in results.get("data", "") or bool(results.get("from_hub")))
    )


def _are_figures(values: Any) -> bool:
    known = isinstance(values, list) and len(values) <= _MOST
    return known and all(v is None or (type(v) in (int, float) and abs(v) <= _LARGEST) for v in values)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FVGError(f"results {path} cannot be read as JSON: {error}; give a results.json.") from error


def _number(value: Any) -> float | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FVGError(f"results hold the value {value!r}; figures are numbers.")
    return round(float(value), 4)


def mean(values: list[float | None]) -> float | None:
    """Mean over seeds; None where one is missing."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def deviation(values: list[float | None]) -> float | None:
    """Standard deviation over seeds (n − 1); None for one seed."""
    known = [v for v in values if v is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def shown(values: list[float | None] | None, digits: int = 1, sign: str = "") -> str:
    """A mean with its spread as a person reads it; a dash where there is none.

    >>> shown([80.0, 84.0, 82.0])
    '82.0 ± 2.0'
    """
    centre, spread = (mean(values), deviation(values)) if values else (None, None)
    if centre is None:
        return "–"
    return f"{centre:{sign}.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def metrics_of(figures: Mapping[str, Any]) -> dict[str, str]:
    """Those of METRICS that the figures are about: accuracy of one list of classes, or base, new and joint."""
    halves = any("base" in row for row in figures["rows"].values())
    return {name: said for name, said in METRICS.items() if (name == "accuracy") != halves}


def difference(figures: Mapping[str, Any], row: str, other: str, metric: str) -> list[float | None] | None:
    """The paired difference of two rows, a value a seed; None where they cannot be paired."""
    pair = [figures["rows"].get(name, {}).get(metric, []) for name in (row, other)]
    if not pair[0] or len(pair[0]) != len(pair[1]):
        return None
    return [None if a is None or b is None else a - b for a, b in zip(*pair, strict=True)]
