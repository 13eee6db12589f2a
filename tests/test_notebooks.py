"""The notebooks hold what their sources say, are small, clean and explain themselves; the slow test runs them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
SOURCES = sorted((FOLDER / "sources").glob("*.py"))
NAMES = [source.stem for source in SOURCES]


def cells(name: str) -> list[dict[str, object]]:
    found = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def test_there_are_six() -> None:
    assert len(NAMES) == 6
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_kept_as_run_from_the_source(name: str) -> None:
    from examples.notebooks import build

    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < build.MAX_BYTES
    source = build.read_source(FOLDER / "sources" / f"{name}.py")
    assert [cell["source"] for cell in cells(name)] == [cell.source for cell in source.cells]


@pytest.mark.parametrize("name", NAMES)
def test_says_what_one_will_have_and_what_to_change(name: str) -> None:
    first, *rest = cells(name)
    opening = str(first["source"])
    assert opening.startswith("# ") and "**What you will have:**" in opening and "ViT-B/16" in opening
    code = [cell for cell in rest if cell["cell_type"] == "code"]
    assert sum("# real:" in line for line in str(code[0]["source"]).splitlines()) == 2
    outputs = [output for cell in code for output in cell["outputs"]]  # type: ignore[attr-defined]
    assert outputs and all(cell["execution_count"] for cell in code)
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = json.dumps([output.get("text", output.get("data", {}).get("text/plain")) for output in outputs])
    assert "/tmp" not in text and "/home" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_in_a_minute(name: str) -> None:
    from examples.notebooks import build

    found = build.run(build.read_source(FOLDER / "sources" / f"{name}.py"), seconds=120)
    pictures = [o for cell in found.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures or name == "5_push_and_load"
