"""results.json and the page made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Result

INTRO = """# Benchmarks

Written by `python -m benchmarks` (`make benchmarks`); do not edit. Everything is measured at ViT-B/16 size (224²
images, random weights) on a CPU. A ratio is the median over pairs that took turns in one run, with the least and the
greatest pair behind it; the two medians are absolute and belong to the machine named below. Read the ratios, not the
seconds.
"""


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"groups": {}}
    return found


def add(path: Path, name: str, result: Result, **about: Any) -> dict[str, Any]:
    """Puts a group into results.json, in the place of what an earlier run found."""
    results = read(path)
    extra = {"caption": result.caption, "table": result.table, "picture": result.picture}
    results["groups"][name] = {"rows": [row.to_json() for row in result.rows], **extra, **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return results


def page(results: Mapping[str, Any], order: list[str]) -> str:
    """The page in Markdown."""
    groups = [results["groups"][name] for name in order if name in results["groups"]]
    rows = [row for group in groups for row in group["rows"]]
    parts = [INTRO, *_machines(groups)]
    for title, some in (
        ("Promises", [r for r in rows if r["bound"]]),
        ("Beside others", [r for r in rows if not r["bound"]]),
    ):
        if some:
            parts += [f"## {title}\n", _figures(some)]
    for group in groups:
        if group["table"]:
            parts += [f"## {group['title']}\n", f"{group['caption']}\n", _table(group["table"])]
        if group["picture"]:
            parts.append(f"![{group['title']}]({group['picture']})\n")
    parts.append(
        "pytorch-grad-cam is not compared: it installs torchvision, and torch with it. captum's map is another one "
        "than the attention of the pooling token, and needs a backward.\n"
    )
    return "\n".join(parts)


def _machines(groups: list[dict[str, Any]]) -> list[str]:
    seen = {}
    for group in groups:
        m = group["machine"]
        seen[
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, Python {m['python']}, torch {m['torch']}, "
            f"transformers {m['transformers']}"
        ] = None
    loads = [group["machine"]["load_at_start"] for group in groups]
    known = [load for load in loads if load is not None]
    load = f" Other load when a group began: {min(known)} to {max(known)}." if known else ""
    return [f"Machine: {'; '.join(seen)}.{load}\n"] if seen else []


def _figures(rows: list[dict[str, Any]]) -> str:
    header = ["figure", "bound", "ratio", "least to greatest", "first", "second", "pairs", "kept"]
    lines = []
    for row in rows:
        name = row["figure"] + (f" ({row['note']})" if row["note"] else "")
        kept = {True: "yes", False: "**no**", None: ""}[row["holds"]]
        spread = f"{_number(row['low'])} to {_number(row['high'])}"
        absolute = [f"{_number(row[k])} {row['unit']}" for k in ("first", "second")]
        lines.append([name, row["bound"], f"**{_number(row['ratio'])}**", spread, *absolute, str(row["pairs"]), kept])
    return _table([header, *lines])


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(lines: list[list[str]]) -> str:
    marked = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in marked) + "\n"
