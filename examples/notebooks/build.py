"""The notebooks from their sources: `python -m examples.notebooks.build [NAME …]` runs them and keeps their pictures.

A source is a Python file in jupytext's percent form, so that changes can be read; the .ipynb beside this file is what
readers open. Both hold the same cells, and a test says so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SOURCES = sorted((HERE / "sources").glob("*.py"))
MAX_BYTES = 400_000
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def read_source(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, not run."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def run(notebook: nbformat.NotebookNode, seconds: int = 120) -> nbformat.NotebookNode:
    """Runs every cell in this folder; an error in a cell is raised."""
    package = str(HERE.parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    NotebookClient(notebook, timeout=seconds, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this run
        if cell.cell_type == "code":  # progress bars and warnings of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(names: list[str]) -> None:
    """Writes the notebooks with these names, or all."""
    for source in SOURCES:
        if names and source.stem not in names:
            continue
        target = HERE / f"{source.stem}.ipynb"
        nbformat.write(run(read_source(source)), target)
        size = target.stat().st_size
        print(f"{target.name}: {size // 1000} kB")
        if size > MAX_BYTES:
            raise SystemExit(f"{target.name} is larger than {MAX_BYTES // 1000} kB; make its pictures smaller.")


if __name__ == "__main__":
    main(sys.argv[1:])
